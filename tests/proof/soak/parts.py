"""The parts of a run: what the server can do, what three times that does to it, what an hour of less leaves behind."""

import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import msgspec

from engine.hub import RING_MAX
from tests.bench.targets import Unusable
from tests.proof.soak import judgement
from tests.proof.soak.judgement import Verdict
from tests.proof.soak.people import Seen
from tests.proof.soak.sampling import Sample
from tests.proof.soak.stage import HOLD_S, Stage

OVERLOAD_TIMES: Final = 3.0
SOAK_SHARE: Final = 0.7
# Requests under way of a closed loop; the number with the most changes a second is the peak.
AT_ONCE: Final = (64, 256)
ROUNDS: Final = 3
ROUND_S: Final = 5.0
ROUND_WARM_UP_S: Final = 1.0
ACQUAINT_MAX_S: Final = 300.0
USUAL_S: Final = 5.0  # of the probe alone, before the crowd comes
AFTERWARDS_MAX_S: Final = 60.0  # that we wait for it to recover, to say how long that takes
# Before the hour counts, the server stands still so often and so long, as virtual machines do: those who come in that
# time are all there when it goes on, and the pages that it needs for them it keeps (`judgement`). It needs them once:
# such an instant in the middle of the hour would pass for growth.
PAUSES: Final = 5
PAUSE_S: Final = 2.0
PAUSE_EVERY_S: Final = 10.0
SOAK_WARM_UP_SHARE: Final = 0.15  # of a soak: at most
SOAK_WARM_UP_MAX_S: Final = 300.0


class Peak(msgspec.Struct, frozen=True):
    """What the server can do in a closed loop: medians of rounds, of the number at once that did most."""

    at_once: int
    changes_per_s: float
    decided_per_s: float
    people_per_s: float
    rounds: dict[int, list[float]]  # changes per s, by number at once


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """`course`: what was seen at each look."""

    name: str
    rate: float
    seen: Seen
    verdicts: list[Verdict]
    figures: dict[str, float]
    course: list[Sample]


def acquaint(stage: Stage) -> None:
    """Until everybody has been there, the hub has as many events as it keeps, and holds run out as fast as they come.

    Raises:
        Unusable: that takes too long.
    """
    give_up_at, came, ring = time.monotonic() + ACQUAINT_MAX_S, 0, 0
    while came < stage.options.people or ring < RING_MAX:
        if time.monotonic() > give_up_at:
            raise Unusable(f"Within {ACQUAINT_MAX_S:g} s {came:,} of {stage.options.people:,} people came.")
        came += stage.crowd("warming up", HOLD_S, warm_up_s=0.0, at_once=AT_ONCE[-1]).came
        ring = max((one.statistics.ring for one in stage.sampler.since(0) if one.statistics), default=0)


def peak_of(stage: Stage, numbers: tuple[int, ...] = AT_ONCE, rounds: int = ROUNDS) -> Peak:
    seen: dict[int, list[Seen]] = {number: [] for number in numbers}
    for _ in range(rounds):
        for number, those in seen.items():
            those.append(stage.crowd(f"peak, {number} at once", ROUND_S, warm_up_s=ROUND_WARM_UP_S, at_once=number))
            stage.say(f"peak, {number} at once: {judgement.changes_per_s(those[-1]):,.0f} changes/s")
    best = max(seen, key=lambda number: _median(judgement.changes_per_s, seen[number]))
    return Peak(
        best,
        _median(judgement.changes_per_s, seen[best]),
        _median(judgement.decided_per_s, seen[best]),
        _median(lambda one: one.came / one.seconds, seen[best]),
        {number: [judgement.changes_per_s(one) for one in those] for number, those in seen.items()},
    )


def overload(stage: Stage, peak: Peak) -> Part:
    """Three times as many people as there were at the peak; then nobody."""
    seconds, rate = stage.options.overload_s, OVERLOAD_TIMES * peak.people_per_s
    stage.rest()
    began = time.monotonic()
    time.sleep(USUAL_S)
    usual = stage.probe.since(began)
    warm_up_s = min(10.0, seconds / 10)
    seen = stage.crowd("overload", seconds, warm_up_s=warm_up_s, rate=rate)
    ended_at = seen.began_at + seen.seconds
    recovered_s = None
    while recovered_s is None and time.monotonic() < ended_at + AFTERWARDS_MAX_S:
        time.sleep(0.5)
        recovered_s = judgement.recovery_s(usual, stage.probe.since(ended_at), stage.sampler.since(ended_at), ended_at)
    samples = stage.sampler.since(seen.began_at, ended_at)
    verdicts = [
        *judgement.of_overload(seen, rate, peak.changes_per_s, samples),
        judgement.of_recovery(usual, recovered_s),
    ]
    during = stage.probe.since(seen.began_at, ended_at)
    served = [touch.latency_ms for touch in during if touch.is_served]
    figures = {
        **_figures(seen),
        "probe_usual_ms": statistics.median(touch.latency_ms for touch in usual) if usual else 0.0,
        "probe_ms": statistics.median(served) if served else 0.0,
        "probe_unserved": float(len(during) - len(served)),
        "in_flight_most": float(max((one.statistics.in_flight for one in samples if one.statistics), default=0)),
    }
    return Part(name="overload", rate=rate, seen=seen, verdicts=verdicts, figures=figures, course=samples)


def soak(stage: Stage, peak: Peak) -> Part:
    seconds, rate = stage.options.soak_s, SOAK_SHARE * peak.people_per_s
    with _pausing(stage.target.watched["server"]):
        seen = stage.crowd("soak", seconds, warm_up_s=ROUND_WARM_UP_S + (PAUSES + 1) * PAUSE_EVERY_S, rate=rate)
    warm_up_s = min(SOAK_WARM_UP_SHARE * seconds, SOAK_WARM_UP_MAX_S)
    samples = stage.sampler.since(seen.began_at + warm_up_s, seen.began_at + seen.seconds)
    missed = sum(sample.statistics is None for sample in samples) + stage.sampler.visitors.turned_out
    verdicts = [
        *judgement.of_soak(samples),
        *judgement.of_service(seen, SOAK_SHARE * peak.changes_per_s),
        *judgement.of_crowd("soak", seen, rate),
        Verdict(
            "the server's figures, and its visitors", "always told, and let in", f"{missed} times not", missed == 0
        ),
    ]
    return Part(
        name="soak",
        rate=rate,
        seen=seen,
        verdicts=verdicts,
        figures=_figures(seen),
        course=stage.sampler.since(seen.began_at, seen.began_at + seen.seconds),
    )


@contextmanager
def _pausing(pid: int) -> Iterator[None]:
    """The process stands still now and then, from now on, until it has done so `PAUSES` times."""
    is_over = threading.Event()

    def pause() -> None:
        for _ in range(PAUSES):
            if is_over.wait(PAUSE_EVERY_S - PAUSE_S):
                return
            os.kill(pid, signal.SIGSTOP)
            is_over.wait(PAUSE_S)
            os.kill(pid, signal.SIGCONT)

    pausing = threading.Thread(target=pause)
    pausing.start()
    try:
        yield
    finally:
        is_over.set()
        pausing.join()


def _figures(seen: Seen) -> dict[str, float]:
    ours = sum(used for name, used in seen.cpu_s.items() if name != "machine")
    figures = {
        "changes_per_s": judgement.changes_per_s(seen),
        "decided_per_s": judgement.decided_per_s(seen),
        "came_per_s": seen.came / seen.seconds,
        "turned_away_share": seen.turned_away / max(1, seen.came),
        "gave_up_per_s": sum(seen.gave_up.values()) / seen.seconds,
        "refused_503_per_s": sum(n for name, n in seen.answers.items() if " 503" in name) / seen.seconds,
        "people_share_of_cpu": seen.cpu_s.get("people", 0.0) / ours if ours else 0.0,
        "lateness_p99_ms": judgement.percentile_ms(seen.lateness, 0.99),
        "purchase_p99_ms": judgement.purchase_p99_ms(seen),
        "purchases_lost": float(judgement.purchases_lost(seen)),
    }
    for step, buckets in seen.latencies.items():
        for name, share in (("p50", 0.5), ("p99", 0.99)):
            figures[f"{step}_{name}_ms"] = judgement.percentile_ms(buckets, share)
    for who in ("server", "postgres", "people", "machine"):
        figures[f"{who}_cores"] = seen.cpu_s.get(who, 0.0) / seen.seconds
    figures["others_cores"] = max(0.0, (seen.cpu_s.get("machine", 0.0) - ours) / seen.seconds)
    return figures


def _median(figure: Callable[[Seen], float], seen: list[Seen]) -> float:
    return statistics.median(map(figure, seen))
