"""What was promised of overload and soak, and whether what was seen keeps it: from samples and counts to verdicts.

Goodput is what the crowd came for: changes that were made, durably, and told to somebody who was still waiting. A 2xx
to a reserve, a purchase or a cancellation counts if it came within that step's patience; `people.PATIENCE_S`. Refusals
do not count, honest or not: `OUT_OF_STOCK` is the truth, and costs the server a tenth of a sale, so that one which sold
nothing and sent everybody away would look splendid. Decided commands, with those refusals, are reported beside it.

A purchase that was refused, broken off or given up is a sale that was promised and lost: in the distribution of
purchases' latencies it counts as longer than any.

Memory grows with neither time nor requests, so the slope of what is resident is held against its level. It is the
median of the slopes between all pairs of points (Theil and Sen): a garbage collection or an allocator that takes an
arena moves a least-squares line, and not this one. It does not see one great step either, nor what begins to grow near
the end: so the last quarter is held against the first, too, by their medians. Pages come and go by the hundred; less
than `NOISE_BYTES` in all says nothing, however short the time.

What is resident is more than what is in use: pages that the crowd of one second needed stay, with a few objects in
each. A leak could fill those unseen, so what is in use has its own limits: Python's blocks, and the bytes of the heap.
"""

import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Final

import msgspec

from tests.proof.soak.cast import Step
from tests.proof.soak.people import BUCKETS_PER_S, Seen
from tests.proof.soak.probe import Touch
from tests.proof.soak.sampling import Sample

CHANGES: Final = ("reserve 201", "purchase 201", "cancel 200")

GOODPUT_LEAST: Final = 0.8  # of the peak
PURCHASE_P99_MS: Final = 250.0
RECOVERY_MAX_S: Final = 5.0
SLOPE_MAX: Final = 0.01  # of what is resident, an hour
OVERLOAD_GROWTH_MAX: Final = 0.01  # of what is resident, in the second half
# One arena of CPython, which are taken and given back whole: 1 % of a server with 100 MiB.
NOISE_BYTES: Final = 2**20
# Of some 1,600,000. A hold is ten of them, and there are a thousand more or fewer from one minute to the next.
NOISE_BLOCKS: Final = 60_000
SHORT_S: Final = 1_800.0  # such noise counts in a shorter time only: in a longer one the line runs through its middle
DESCRIPTORS_NOISE: Final = 20  # viewers that came and go
THREADS_NOISE: Final = 0
STATISTICS_GROWTH_MAX: Final = 0.1
STATISTICS_NOISE: Final = 200  # commands or holds more at the one time than at the other
POINTS_MAX: Final = 400  # of a line: medians of neighbouring samples; their pairs are looked at one by one

LATENESS_P99_MAX_MS: Final = 50.0  # later than that, the crowd measures itself
RATE_LEAST: Final = 0.95  # of the rate that was meant

PROBE_WINDOW_S: Final = 0.5
PROBE_TIMES: Final = 2.0  # as slow as before the crowd came, and it is still there
PROBE_NOISE_MS: Final = 3.0
IDLE_MAX: Final = 2  # commands in flight of a server that only the probe asks


class Verdict(msgspec.Struct, frozen=True):
    """One promise. `promised` and `seen` are for people."""

    name: str
    promised: str
    seen: str
    holds: bool


# --- lines -------------------------------------------------------------------------------------------


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Theil and Sen's: of `(at_s, value)`, per s; 0 for fewer than two."""
    thinned = _thinned(points)
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in combinations(thinned, 2) if b[0] > a[0]]
    return statistics.median(slopes) if slopes else 0.0


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    size = -(-len(points) // POINTS_MAX)
    parts = [points[at : at + size] for at in range(0, len(points), size)] if size else []
    return [(statistics.median(at for at, _ in part), statistics.median(value for _, value in part)) for part in parts]


def grown(points: Sequence[tuple[float, float]]) -> float:
    """By how much the line rises from the first point to the last."""
    return slope(points) * (points[-1][0] - points[0][0]) if points else 0.0


def risen(points: Sequence[tuple[float, float]]) -> float:
    """By how much more there is in the last quarter of the points than in the first."""
    first, last = _ends([value for _, value in points])
    return last - first


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """Medians of the first quarter and of the last: values come and go."""
    quarter = max(1, len(values) // 4)
    return statistics.median(values[:quarter]), statistics.median(values[-quarter:])


def percentile_ms(buckets: Mapping[int, int], share: float, beyond: int = 0) -> float:
    """Of latencies in buckets of people; `beyond` more are longer than any. Infinite if it is one of those."""
    total = sum(buckets.values()) + beyond
    rank, passed = share * total, 0
    for bucket in sorted(buckets):
        passed += buckets[bucket]
        if passed >= rank:
            return (bucket + 1) * 1000 / BUCKETS_PER_S
    return float("inf") if beyond else 0.0


# --- overload ----------------------------------------------------------------------------------------


def changes_per_s(seen: Seen) -> float:
    """Goodput."""
    return _changes(seen.in_time) / seen.seconds


def _changes(in_time: Mapping[str, int]) -> int:
    return sum(in_time.get(name, 0) for name in CHANGES)


def decided_per_s(seen: Seen) -> float:
    """Commands that the rules decided, either way, and in time."""
    return sum(n for name, n in seen.in_time.items() if not _is_refused_unheard(name)) / seen.seconds


def _is_refused_unheard(name: str) -> bool:
    return name.partition(" ")[2][:3] in ("429", "503") or name.startswith("look")


def purchases_lost(seen: Seen) -> int:
    answered = sum(n for name, n in seen.answers.items() if name.startswith("purchase ") and name != "purchase 201")
    return answered + seen.gave_up.get("purchase", 0) + seen.broken.get("purchase", 0)


def purchase_p99_ms(seen: Seen) -> float:
    refused = sum(n for name, n in seen.answers.items() if name[:12] in ("purchase 429", "purchase 503"))
    # A refusal by the rules has a latency among the others, and is no sale all the same.
    late = seen.answers.get("purchase 409 RESERVATION_EXPIRED", 0)
    unanswered = seen.gave_up.get("purchase", 0) + seen.broken.get("purchase", 0)
    step: Step = "purchase"
    return percentile_ms(seen.latencies.get(step, {}), 0.99, refused + late + unanswered)


def of_overload(seen: Seen, rate: float, peak_per_s: float, samples: Sequence[Sample]) -> list[Verdict]:
    goodput = changes_per_s(seen)
    half = [sample for sample in samples if sample.at >= seen.began_at + seen.seconds / 2]
    return [
        Verdict(
            "goodput under overload",
            f"≥ {GOODPUT_LEAST:.0%} of the peak of {peak_per_s:,.0f}/s",
            f"{goodput:,.0f}/s, {goodput / peak_per_s:.0%}" if peak_per_s else "no peak",
            peak_per_s > 0 and goodput >= GOODPUT_LEAST * peak_per_s,
        ),
        _purchases("purchases under overload, p99", seen),
        _flat("memory in the second half of the overload", half, OVERLOAD_GROWTH_MAX, over_s=None),
        *of_crowd("overload", seen, rate),
    ]


def _purchases(name: str, seen: Seen) -> Verdict:
    p99_ms = purchase_p99_ms(seen)
    return Verdict(
        name,
        f"≤ {PURCHASE_P99_MS:g} ms, those that were lost included",
        f"{p99_ms:,.1f} ms; {purchases_lost(seen):,} lost of {_asked('purchase', seen):,}",
        p99_ms <= PURCHASE_P99_MS and _asked("purchase", seen) > 0,
    )


def of_crowd(part: str, seen: Seen, rate: float) -> list[Verdict]:
    """Whether the load was what it should be, and every answer such as may come."""
    p99_ms = percentile_ms(seen.lateness, 0.99)
    came_per_s = seen.came / seen.seconds
    return [
        Verdict(
            f"the crowd of the {part} came on time",
            f"≥ {RATE_LEAST:.0%} of {rate:,.0f}/s, p99 ≤ {LATENESS_P99_MAX_MS:g} ms late",
            f"{came_per_s:,.0f}/s, p99 {p99_ms:.1f} ms late",
            came_per_s >= RATE_LEAST * rate and p99_ms <= LATENESS_P99_MAX_MS,
        ),
        Verdict(
            f"answers of the {part}",
            "none wrong",
            f"{seen.wrong} wrong of {sum(seen.all_answers.values()):,}"
            + "".join(f"; {one}" for one in seen.wrongs[:3]),
            seen.wrong == 0,
        ),
    ]


def _asked(step: Step, seen: Seen) -> int:
    answered = sum(n for name, n in seen.answers.items() if name.startswith(f"{step} "))
    return answered + seen.gave_up.get(step, 0) + seen.broken.get(step, 0)


def of_recovery(before: Sequence[Touch], recovered_s: float | None) -> Verdict:
    usual = statistics.median(touch.latency_ms for touch in before) if before else float("nan")
    return Verdict(
        "recovery",
        f"≤ {RECOVERY_MAX_S:g} s after the load's end, to a probe's usual {usual:.1f} ms and empty mailboxes",
        "not seen" if recovered_s is None else f"{recovered_s:.1f} s",
        recovered_s is not None and recovered_s <= RECOVERY_MAX_S,
    )


def recovery_s(
    before: Sequence[Touch], after: Sequence[Touch], samples: Sequence[Sample], ended_at: float
) -> float | None:
    """From the load's end until the probe is served as before the load came, and nothing waits any more.

    None: it was not seen to recover.
    """
    if not before or not all(touch.is_served for touch in before):
        return None
    usual = statistics.median(touch.latency_ms for touch in before)
    most_ms = max(PROBE_TIMES * usual, usual + PROBE_NOISE_MS)
    quiet_at = next((sample.at for sample in samples if sample.at >= ended_at and _is_quiet(sample)), None)
    if quiet_at is None:
        return None
    # Those that were asked before the end were asked of a server under load.
    later = [touch for touch in after if touch.at - touch.latency_ms / 1000 >= ended_at]
    for number, first in enumerate(later):
        window = [touch for touch in later[number:] if touch.at < first.at + PROBE_WINDOW_S]
        is_whole = later[-1].at >= first.at + PROBE_WINDOW_S
        if is_whole and all(touch.is_served for touch in window) and _median_ms(window) <= most_ms:
            return max(first.at, quiet_at) - ended_at
    return None


def _median_ms(touches: Sequence[Touch]) -> float:
    return statistics.median(touch.latency_ms for touch in touches)


def _is_quiet(sample: Sample) -> bool:
    seen = sample.statistics
    return seen is not None and seen.mailboxes == 0 and seen.in_flight <= IDLE_MAX


# --- soak --------------------------------------------------------------------------------------------


def of_service(seen: Seen, meant_per_s: float) -> list[Verdict]:
    """That the hour was served, all of it: a server that turns everybody away after a while keeps little memory.

    `meant_per_s`: changes that the load comes to, were each of them made.
    """
    quarter = max(1, len(seen.course) // 4)
    parts = [seen.course[at : at + quarter] for at in range(0, quarter * 4, quarter)]
    quarters = [sum(_changes(second.in_time) for second in part) / quarter for part in parts]
    return [
        Verdict(
            "changes in each quarter of the soak",
            f"≥ {GOODPUT_LEAST:.0%} of the {meant_per_s:,.0f}/s that the load comes to",
            ", ".join(f"{each:,.0f}" for each in quarters) + "/s",
            meant_per_s > 0 and min(quarters) >= GOODPUT_LEAST * meant_per_s,
        ),
        _purchases("purchases of the soak, p99", seen),
    ]


def of_soak(samples: Sequence[Sample]) -> list[Verdict]:
    """Of samples under a steady load, the warm-up left out."""
    return [
        _flat("memory of the soak", samples, SLOPE_MAX, over_s=3600.0),
        _blocks(samples),
        _heap(samples),
        _no_more("descriptors", [float(sample.descriptors) for sample in samples], DESCRIPTORS_NOISE, 0.0),
        _no_more("threads", [float(sample.threads) for sample in samples], THREADS_NOISE, 0.0),
        *(_figure(name, samples) for name in FIGURES),
    ]


FIGURES: Final = (
    "drops",
    "in_flight",
    "mailboxes",
    "parts",
    "outbox",
    "timer",
    "deadlines",
    "holds",
    "endings",
    "viewers",
    "feeds",
    "ring",
    "keys",
    "users",
)


def _flat(name: str, samples: Sequence[Sample], share: float, *, over_s: float | None) -> Verdict:
    """`share` of the level may be added over so many s; over the whole time where None."""
    points = [(sample.at, float(sample.rss_bytes)) for sample in samples]
    if len(points) < 2:
        return Verdict(name, "to be seen", "too few samples", False)
    level, rise, seconds = statistics.median(value for _, value in points), grown(points), points[-1][0] - points[0][0]
    step = risen(points)
    allowed = max(level * share * (1.0 if over_s is None else seconds / over_s), NOISE_BYTES)
    per = "" if over_s is None else " an hour"
    promised = f"≤ {share:.0%}{per}, or {NOISE_BYTES / 2**20:g} MiB in all"
    seen = f"{rise / 2**20:+,.2f} MiB in {seconds:,.0f} s at {level / 2**20:,.1f} MiB"
    if over_s is not None:
        seen += f": {rise / seconds * over_s / level:+.2%} an hour"
    seen += f"; {step / 2**20:+,.2f} MiB from the first quarter to the last"
    return Verdict(name, promised, seen, level > 0 and max(rise, step) <= allowed)


def _blocks(samples: Sequence[Sample]) -> Verdict:
    """What Python has handed out: a leak of objects shows here long before it needs another page."""
    points = [(one.at, float(one.statistics.blocks)) for one in samples if one.statistics is not None]
    if len(points) < 2:
        return Verdict("blocks of Python's memory", "to be seen", "too few samples", False)
    level, rise, seconds = statistics.median(value for _, value in points), grown(points), points[-1][0] - points[0][0]
    step = risen(points)
    allowed = max(level * SLOPE_MAX * seconds / 3600, NOISE_BLOCKS if seconds < SHORT_S else 0.0)
    return Verdict(
        "blocks of Python's memory",
        f"≤ {SLOPE_MAX:.0%} an hour, or {NOISE_BLOCKS:,} in less than {SHORT_S / 60:.0f} min",
        f"{rise:+,.0f} in {seconds:,.0f} s at {level:,.0f}; {step:+,.0f} from the first quarter to the last",
        max(rise, step) <= allowed,
    )


def _heap(samples: Sequence[Sample]) -> Verdict:
    """What libraries in C have, and objects of more than 512 bytes. Its limit is a share of all that is resident."""
    told = [one for one in samples if one.statistics is not None]
    points = [(one.at, float(one.statistics.heap_bytes)) for one in told if one.statistics is not None]
    if len(points) < 2:
        return Verdict("bytes of the heap in use", "to be seen", "too few samples", False)
    rise, step, seconds = grown(points), risen(points), points[-1][0] - points[0][0]
    resident = statistics.median(one.rss_bytes for one in told)
    return Verdict(
        "bytes of the heap in use",
        f"≤ {SLOPE_MAX:.0%} an hour of what is resident, or {NOISE_BYTES / 2**20:g} MiB in all",
        f"{rise / 2**20:+,.2f} MiB in {seconds:,.0f} s; {step / 2**20:+,.2f} MiB from the first quarter to the last",
        max(rise, step) <= max(resident * SLOPE_MAX * seconds / 3600, NOISE_BYTES),
    )


def _figure(name: str, samples: Sequence[Sample]) -> Verdict:
    values = [float(getattr(one.statistics, name)) for one in samples if one.statistics is not None]
    return _no_more(name, values, STATISTICS_NOISE, STATISTICS_GROWTH_MAX)


def _no_more(name: str, values: Sequence[float], noise: float, share: float) -> Verdict:
    """The last quarter has no more than the first had: by the medians, since both come and go."""
    if len(values) < 4:
        return Verdict(name, "to be seen", "too few samples", False)
    first, last = _ends(values)
    return Verdict(
        name,
        "no more in the last quarter than in the first",
        f"{first:,.0f}, then {last:,.0f}",
        last - first <= max(noise, share * first),
    )


def of_tables(
    purchases: int, seen: Sequence[Seen], active: int, audit_violations: Sequence[str], checks: int
) -> list[Verdict]:
    """`purchases` and `active` reservations are rows of the tables, once the last hold has run out."""
    told = sum(one.all_answers.get("purchase 201", 0) for one in seen)
    unknown = sum(one.all_unanswered.get("purchase", 0) for one in seen)
    return [
        Verdict(
            "purchases in the tables",
            f"those that were told, {told:,}, and at most the {unknown:,} without an answer",
            f"{purchases:,}",
            told <= purchases <= told + unknown,
        ),
        Verdict("holds at the end", "all settled", f"{active:,} active", active == 0),
        Verdict("audit", f"{checks} checks hold", "; ".join(audit_violations) or "no violation", not audit_violations),
    ]
