"""What is promised, and what was done: figures that add up."""

from collections.abc import Mapping
from typing import Final

import msgspec

SLOWEST_MAX: Final = 10  # seeds that are named
VIOLATIONS_MAX: Final = 200  # that are kept of one sitting, with their words; all are counted
WORDS_MAX: Final = 6_000  # characters of one violation
S_PER_HOUR: Final = 3_600


Counts = dict[str, int]  # no Counter: it would not come back from a file


def add_counts(counts: Counts, more: Mapping[str, int]) -> None:
    for name, count in more.items():
        counts[name] = counts.get(name, 0) + count


class Goals(msgspec.Struct, frozen=True):
    """What one set must reach. Canaries: all; violations: none.

    `cases` and `schemathesis_s` are not promised by number: what the fuzzers are given at least.
    """

    seeds: int
    operations: int
    hours: float
    faults: int
    cuts: int
    kills: int
    cases: int  # of each fuzzer
    schemathesis_s: int  # for each of its runs


LONG: Final = Goals(
    seeds=50_000,
    operations=20_000_000,
    hours=1_000,
    faults=1_000,
    cuts=5_000,
    kills=200,
    cases=20_000,
    schemathesis_s=300,
)
FAST: Final = Goals(
    seeds=1_000, operations=400_000, hours=25, faults=40, cuts=200, kills=20, cases=2_000, schemathesis_s=10
)
SETS: Final = {"long": LONG, "fast": FAST}


class Violation(msgspec.Struct, frozen=True):
    """`count`: how many of them `told` speaks of. `replay` is the one command that shows it again."""

    part: str
    seed: int | None
    told: str
    replay: str
    count: int = 1


class SlowSeed(msgspec.Struct, frozen=True):
    seconds: float
    seed: int
    operations: int


class Simulated(msgspec.Struct):
    """Seeds of the simulation. Coverage is by cell, its five words joined by `coverage.JOINT`."""

    seeds: int = 0
    operations: int = 0
    simulated_s: float = 0.0
    corpus: int = 0  # seeds of the corpus, which nothing else here counts
    replayed: int = 0  # seeds that were run twice, for the same history to the byte
    cpu_s: float = 0.0
    faults: Counts = {}
    coverage: Counts = {}
    slowest: list[SlowSeed] = []

    @property
    def hours(self) -> float:
        return self.simulated_s / S_PER_HOUR

    def add(self, other: "Simulated") -> None:
        self.seeds += other.seeds
        self.operations += other.operations
        self.simulated_s += other.simulated_s
        self.corpus = max(self.corpus, other.corpus)
        self.replayed += other.replayed
        self.cpu_s += other.cpu_s
        add_counts(self.faults, other.faults)
        add_counts(self.coverage, other.coverage)
        self.add_slow(*other.slowest)

    def add_slow(self, *seeds: SlowSeed) -> None:
        self.slowest = sorted([*self.slowest, *seeds], key=lambda slow: -slow.seconds)[:SLOWEST_MAX]


class Struck(msgspec.Struct):
    """Real faults. `by_name`: by sort, then by name."""

    database: int = 0
    cuts: int = 0
    kills: int = 0
    operations: int = 0
    by_name: dict[str, Counts] = {}
    served_late: int = 0  # faults after which a change was not served within 2 s
    served_max_s: dict[str, float] = {}  # by name: the longest time from a fault's end to a change that was served
    late_max_ms: float = 0.0  # of expiries, while all was well
    longest_answer_s: float = 0.0
    skipped: dict[str, str] = {}  # what this machine could not do, and why
    seconds: float = 0.0

    def add(self, other: "Struck") -> None:
        self.database += other.database
        self.cuts += other.cuts
        self.kills += other.kills
        self.operations += other.operations
        for sort, counts in other.by_name.items():
            add_counts(self.by_name.setdefault(sort, {}), counts)
        self.served_late += other.served_late
        for name, longest_s in other.served_max_s.items():
            self.served_max_s[name] = max(self.served_max_s.get(name, 0.0), longest_s)
        self.late_max_ms = max(self.late_max_ms, other.late_max_ms)
        self.longest_answer_s = max(self.longest_answer_s, other.longest_answer_s)
        self.skipped.update(other.skipped)
        self.seconds += other.seconds


class Fuzzed(msgspec.Struct):
    """By fuzzer."""

    cases: Counts = {}
    answers: Counts = {}
    seconds: float = 0.0

    def add(self, other: "Fuzzed") -> None:
        add_counts(self.cases, other.cases)
        add_counts(self.answers, other.answers)
        self.seconds += other.seconds


class Flown(msgspec.Struct, frozen=True):
    """One canary's fate. `by`: who caught it, or should have."""

    is_caught: bool
    by: list[str]
    seconds: float


class Tried(msgspec.Struct):
    """Schemathesis."""

    tests: int = 0
    longest_s: int = 0  # for each of its runs, in the longest turn that it had
    seconds: float = 0.0

    def add(self, other: "Tried") -> None:
        self.tests += other.tests
        self.longest_s = max(self.longest_s, other.longest_s)
        self.seconds += other.seconds


class Figures(msgspec.Struct):
    """Of a sitting, or of several added up."""

    simulated: Simulated = msgspec.field(default_factory=Simulated)
    struck: Struck = msgspec.field(default_factory=Struck)
    fuzzed: Fuzzed = msgspec.field(default_factory=Fuzzed)
    canaries: dict[str, Flown] = {}  # by name, the newest flight of each
    tried: Tried = msgspec.field(default_factory=Tried)
    violations: list[Violation] = []
    violation_count: int = 0
    problems: list[str] = []  # what could not run, or broke off

    @property
    def operations(self) -> int:
        """That the checker has seen."""
        return self.simulated.operations + self.struck.operations

    @property
    def caught(self) -> int:
        return sum(flown.is_caught for flown in self.canaries.values())

    def convict(self, violation: Violation) -> None:
        self.violation_count += violation.count
        if len(self.violations) < VIOLATIONS_MAX:
            told = violation.told
            if len(told) > WORDS_MAX:
                told = f"{told[: WORDS_MAX // 2]}\n…\n{told[-WORDS_MAX // 2 :]}"
            self.violations.append(msgspec.structs.replace(violation, told=told))

    def add(self, other: "Figures") -> None:
        """Of a later sitting."""
        self.simulated.add(other.simulated)
        self.struck.add(other.struck)
        self.fuzzed.add(other.fuzzed)
        self.canaries.update(other.canaries)
        self.tried.add(other.tried)
        self.violations += other.violations
        self.violation_count += other.violation_count
        self.problems += other.problems
