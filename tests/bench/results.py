"""What a benchmark run leaves behind: the words that its JSON is made of, and the arithmetic on them.

`results.json` is one `Report`, written by msgspec: field names are those below, in this order. Times are in the unit
that their name ends with; `at_s` counts from the begin of the counted window. `histogram` is an HdrHistogram (V2,
compressed, base64; values in µs, 1 µs to 60 s, three digits), so that anybody can merge and draw latencies again.

    Report      format, began_at, command, machine, versions, settings, and:
      runs      Run: one scenario, on one target, in one round
        load    Load: what the generator saw: answers by status and code, series over time, latency, CPU, checks
      goals     Goal: a figure that was promised, what was seen in each round, whether the median holds
      audits    Audit: `holdfast audit` on a database that the run wrote to
      problems  sentences; empty when every answer was right
"""

import base64
import statistics
from collections import Counter
from collections.abc import Sequence

import msgspec
from hdrh.histogram import HdrHistogram

FORMAT = 1
LATENCY_MAX_US = 60_000_000
FAILURES_SHOWN_MAX = 20


class Latency(msgspec.Struct, frozen=True):
    histogram: str
    p50_ms: float
    p90_ms: float
    p99_ms: float
    p999_ms: float
    max_ms: float
    mean_ms: float


class Moment(msgspec.Struct, frozen=True):
    """The answers of one stretch of the window, `Load.bucket_s` long."""

    at_s: float
    answers: int
    p50_ms: float
    p99_ms: float


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What one generator saw, or several together.

    `answers` and everything beside it is of the counted window, `all_answers` of the whole run, with its warm-up and
    its end: all of those are checked. `done` are the answers that the scenario wants; `lost` got none.
    """

    began_at: float  # of the machine's monotonic clock
    seconds: float
    done: int
    answers: dict[str, int]
    all_answers: dict[str, int]
    sent: int
    lost: int
    late: int  # open loop: sent more than 1 ms after their instant
    lateness_max_ms: float
    connections_used: int
    ran_out: bool  # of requests, before the time was over
    latency: Latency
    bucket_s: float
    over_time: list[Moment]
    stock: list[tuple[float, int]]  # (at_s, units), as the answers or a poll told it
    cpu_s: dict[str, float]  # in the window: generator, server, postgres, viewers; machine is everything on it
    rss_bytes: tuple[int, int] | None  # of the server, before the first request and after the last answer
    checked: dict[str, int]
    failed: int
    failures: list[str]  # the first ones
    reservation_ids: str = ""  # base64 of 16 bytes each; emptied once several generators' were compared
    figures: dict[str, float] = {}  # what only this scenario has to say


class Run(msgspec.Struct, frozen=True, kw_only=True):
    scenario: str
    target: str
    round: int
    connections: int
    processes: int
    load: Load

    @property
    def per_s(self) -> float:
        return self.load.done / self.load.seconds if self.load.seconds else 0.0

    @property
    def cores(self) -> dict[str, float]:
        """Cores' worth of CPU in the window, by who used them."""
        return {name: used / self.load.seconds for name, used in self.load.cpu_s.items() if self.load.seconds}

    @property
    def generator_share(self) -> float | None:
        """Of all CPU that this run used, the generator's part; None where the server's is not known."""
        used = self.load.cpu_s
        total = self._of_ours
        return used["generator"] / total if "server" in used and total > 0 else None

    @property
    def others_cores(self) -> float | None:
        """Cores' worth of CPU that went to processes that are not the run's, or to the machine's host."""
        if "server" not in self.load.cpu_s or not self.load.cpu_s.get("machine"):
            return None
        return max(0.0, self.load.cpu_s["machine"] - self._of_ours) / self.load.seconds

    @property
    def _of_ours(self) -> float:
        return sum(self.load.cpu_s.get(name, 0.0) for name in ("generator", "server", "postgres", "viewers"))


class Goal(msgspec.Struct, frozen=True):
    """`seen` has one value for each round; the median is held against `bound`."""

    name: str
    unit: str  # "×", "ms", "KiB"
    is_least: bool  # whether `bound` is the least or the most that is allowed
    bound: float
    seen: list[float]
    far: float | None = None  # what we would like to reach

    @property
    def median(self) -> float:
        return statistics.median(self.seen)

    @property
    def holds(self) -> bool:
        return self.median >= self.bound if self.is_least else self.median <= self.bound

    @property
    def promised(self) -> str:
        far = "" if self.far is None else f" (far {self.far:g})"
        return f"{'≥' if self.is_least else '≤'} {self.bound:g} {self.unit}{far}"


class Audit(msgspec.Struct, frozen=True):
    database: str
    checks: int
    violations: list[str]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    format: int
    began_at: str
    command: str
    machine: dict[str, str]
    versions: dict[str, str]
    settings: dict[str, str]
    notes: list[str]
    runs: list[Run]
    goals: list[Goal]
    audits: list[Audit]
    problems: list[str]

    def of(self, scenario: str, target: str) -> list[Run]:
        return [run for run in self.runs if (run.scenario, run.target) == (scenario, target)]


def new_histogram() -> HdrHistogram:
    return HdrHistogram(1, LATENCY_MAX_US, 3)


def latency_of(histogram: HdrHistogram) -> Latency:
    encoded = histogram.encode()
    text = encoded.decode() if isinstance(encoded, bytes) else encoded
    if not histogram.get_total_count():
        return Latency(text, 0, 0, 0, 0, 0, 0)
    p50, p90, p99, p999 = (histogram.get_value_at_percentile(p) / 1000 for p in (50, 90, 99, 99.9))
    return Latency(text, p50, p90, p99, p999, histogram.get_max_value() / 1000, histogram.get_mean_value() / 1000)


def histogram_of(latencies: Sequence[Latency]) -> HdrHistogram:
    """All of them as one."""
    merged = new_histogram()
    for latency in latencies:
        merged.decode_and_add(latency.histogram)
    return merged


def over_time(done_at: Sequence[float], latencies_s: Sequence[float], seconds: float, bucket_s: float) -> list[Moment]:
    """Answers and latencies of each stretch; `done_at` counts from the begin of the window. Empty stretches too."""
    buckets: list[list[float]] = [[] for _ in range(max(1, round(seconds / bucket_s)))]
    for at, latency in zip(done_at, latencies_s, strict=True):
        number = int(at / bucket_s)
        if 0 <= number < len(buckets):
            buckets[number].append(latency * 1000)
    moments = []
    for number, bucket in enumerate(buckets):
        bucket.sort()
        p50, p99 = (round(bucket[int(len(bucket) * p)], 3) if bucket else 0.0 for p in (0.5, 0.99))
        moments.append(Moment(round(number * bucket_s, 3), len(bucket), p50, p99))
    return moments


def together(loads: Sequence[Load]) -> Load:
    """What several generators saw of one run. No reservation may have been given to two of them."""
    if len(loads) == 1:
        return msgspec.structs.replace(loads[0], reservation_ids="")
    given: Counter[bytes] = Counter()
    for load in loads:
        blob = base64.b64decode(load.reservation_ids)
        given.update(blob[at : at + 16] for at in range(0, len(blob), 16))
    twice = sum(count > 1 for count in given.values())
    failures = [failure for load in loads for failure in load.failures]
    if twice:
        failures.insert(0, f"{twice} reservation ids were given to users of two generators")
    first = loads[0]
    return Load(
        began_at=min(load.began_at for load in loads),
        seconds=statistics.mean(load.seconds for load in loads),
        done=sum(load.done for load in loads),
        answers=_added([load.answers for load in loads]),
        all_answers=_added([load.all_answers for load in loads]),
        sent=sum(load.sent for load in loads),
        lost=sum(load.lost for load in loads),
        late=sum(load.late for load in loads),
        lateness_max_ms=max(load.lateness_max_ms for load in loads),
        connections_used=sum(load.connections_used for load in loads),
        ran_out=any(load.ran_out for load in loads),
        latency=latency_of(histogram_of([load.latency for load in loads])),
        bucket_s=first.bucket_s,
        over_time=[_moment(moments) for moments in zip(*(load.over_time for load in loads), strict=False)],
        stock=sorted((at, units) for load in loads for at, units in load.stock),
        # All watched the same server, each itself.
        cpu_s={**first.cpu_s, "generator": sum(load.cpu_s["generator"] for load in loads)},
        rss_bytes=first.rss_bytes,
        checked=_added([load.checked for load in loads]),
        failed=sum(load.failed for load in loads) + twice,
        failures=failures[:FAILURES_SHOWN_MAX],
        figures=first.figures,
    )


def _added(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))


def _moment(moments: Sequence[Moment]) -> Moment:
    # Percentiles of parts do not add up: the worst part's is shown, the histogram has the true ones.
    return Moment(
        moments[0].at_s,
        sum(moment.answers for moment in moments),
        max(moment.p50_ms for moment in moments),
        max(moment.p99_ms for moment in moments),
    )
