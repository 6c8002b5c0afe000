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
    for name, unit, is_least, bound, figure in FIGURES:
        seen = [value for found in rounds.values() if (value := _value(figure, found)) is not None]
        if seen:
            goals.append(Goal(name, unit, is_least, bound, seen))
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


HOT: Final = ("hot", "holdfast")

FIGURES: Final[Sequence[tuple[str, str, bool, float, Figure]]] = (
    ("reserves on one hot drop, to the classic transaction", "×", True, 9.0, _ratio(HOT, ("hot", "classic"))),
    ("reserves on one hot drop, to the single CTE", "×", True, 4.5, _ratio(HOT, ("hot", "cte"))),
    ("1,000 drops, to one hot drop", "×", True, 0.8, _ratio(("many", "holdfast"), HOT)),
    ("sold-out answers, to FastAPI's better one", "×", True, 8.0, _soldout),
    ("reserves, to a request that does nothing", "×", True, 0.35, _ratio(HOT, ("noop", "holdfast"))),
    ("p99 at half of the peak rate, open loop", "ms", False, 10.0, _p99_ms),
    ("journeys (reserve and purchase), to reserves", "×", True, 0.4, _journeys),
    ("resident memory of the server, an active hold", "KiB", False, 1.0, _kib_per_hold),
)
