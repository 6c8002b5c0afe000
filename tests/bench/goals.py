"""The figures that were promised, as ratios within one round, so that a noisy machine hits both sides of each alike."""

from collections.abc import Callable, Sequence
from typing import Final

from tests.bench.results import Goal, Run

Found = Callable[[str, str], Run]
Figure = Callable[[Found], float]


def of(runs: Sequence[Run]) -> list[Goal]:
    """Those whose runs are all there, each round's value in order."""
    rounds: dict[int, dict[tuple[str, str], Run]] = {}
    for run in runs:
        rounds.setdefault(run.round, {})[run.scenario, run.target] = run
    goals = []
    for name, unit, is_least, bound, far, figure in FIGURES:
        seen = [value for found in rounds.values() if (value := _value(figure, found)) is not None]
        if seen:
            goals.append(Goal(name, unit, is_least, bound, seen, far))
    return goals


def _value(figure: Figure, found: dict[tuple[str, str], Run]) -> float | None:
    try:
        return figure(lambda scenario, target: found[scenario, target])
    except (KeyError, ZeroDivisionError):
        return None


def _ratio(ours: tuple[str, str], theirs: tuple[str, str]) -> Figure:
    return lambda run: run(*ours).per_s / run(*theirs).per_s


def _soldout(run: Found) -> float:
    """To the better of the two baselines."""
    return run("soldout", "holdfast").per_s / max(run("soldout", "classic").per_s, run("soldout", "cte").per_s)


def _p99_ms(run: Found) -> float:
    return run("rate", "holdfast").load.latency.p99_ms


def _journeys(run: Found) -> float:
    return run("pairs", "holdfast").load.figures["journeys_per_s"] / run("hot", "holdfast").per_s


def _kib_per_hold(run: Found) -> float:
    load = run("hot", "holdfast").load
    if load.rss_bytes is None:
        raise KeyError
    return (load.rss_bytes[1] - load.rss_bytes[0]) / load.all_answers["201"] / 1024


def _of_figures(name: str, scenario: str, theirs: str) -> Figure:
    """Ours to a rival's."""

    def figure(run: Found) -> float:
        return run(scenario, "holdfast").load.figures[name] / run(scenario, theirs).load.figures[name]

    return figure


def _wire_p99_ms(run: Found) -> float:
    return run("wire 20", "holdfast").load.latency.p99_ms


HOT: Final = ("hot", "holdfast")
WATCHED: Final = ("watched 4000", "holdfast")
UNWATCHED: Final = ("watched 0", "holdfast")
LAST: Final = _of_figures("last_ms", "viewers 4000", "ws")
CPU: Final = _of_figures("server_cpu_us_per_frame", "viewers 4000", "broadcast")

FIGURES: Final[Sequence[tuple[str, str, bool, float, float | None, Figure]]] = (
    ("reserves on one hot drop, to the classic transaction", "×", True, 9.0, None, _ratio(HOT, ("hot", "classic"))),
    ("reserves on one hot drop, to the single CTE", "×", True, 4.5, None, _ratio(HOT, ("hot", "cte"))),
    ("1,000 drops, to one hot drop", "×", True, 0.8, None, _ratio(("many", "holdfast"), HOT)),
    ("sold-out answers, to FastAPI's better one", "×", True, 8.0, None, _soldout),
    ("reserves, to a request that does nothing", "×", True, 0.35, None, _ratio(HOT, ("noop", "holdfast"))),
    ("p99 at half of the peak rate, open loop", "ms", False, 10.0, None, _p99_ms),
    ("journeys (reserve and purchase), to reserves", "×", True, 0.4, None, _journeys),
    ("resident memory of the server, an active hold", "KiB", False, 1.0, None, _kib_per_hold),
    ("one update to the last of 4,000 viewers, to Node ws", "×", False, 0.8, 0.65, LAST),
    ("server CPU for a viewer's frame, to broadcast() of websockets", "×", False, 0.75, 0.6, CPU),
    ("reserves with 4,000 viewers of the drop, to none", "×", True, 0.6, 0.8, _ratio(WATCHED, UNWATCHED)),
    ("p99 from a commit to the frame on the wire, 20 a second", "ms", False, 60.0, 10.0, _wire_p99_ms),
)
