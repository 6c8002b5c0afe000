"""What was done to the system, and what came of it, as figures that add up and go into a report as JSON."""

from collections import Counter
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Any, Final

import msgspec

from tests.proof.history import Operation
from tests.proof.recorder import NOT_SENT

SERVED_S: Final = 2.0  # I18: changes are served so soon after a fault is over
LATE_P99_MS, LATE_P999_MS, LATE_MAX_MS = 25.0, 50.0, 250.0  # I8, on a machine that has nothing else to do
VIOLATIONS_KEPT_MAX: Final = 50


class Sort(StrEnum):
    """Of faults, as the figures count them."""

    DATABASE = "database"
    CUT = "cut"
    DELAY = "delay"  # of a COMMIT that passes all the same
    ENGINE = "engine"
    CLOCK = "clock"


class Tally(msgspec.Struct):
    """Of one campaign, or of several added up."""

    seeds: list[int] = []
    faults: dict[str, Counter[str]] = {}  # by sort, then by name
    operations: int = 0
    endings: Counter[str] = msgspec.field(default_factory=Counter)
    codes: Counter[str] = msgspec.field(default_factory=Counter)  # of what was not answered with yes
    violations: list[str] = []
    violation_count: int = 0
    served_s: dict[str, list[float]] = {}  # by fault: from its end to the first change that was served
    late_ms: list[float] = []  # of expiries whose deadline came while all was well: commit - deadline
    overdue_s: list[float] = []  # of faults: from their end to that of the last hold that had fallen due meanwhile
    longest_s: float = 0.0  # that somebody waited for an answer
    skipped: dict[str, str] = {}  # what could not be done on this machine, and why
    seconds: float = 0.0

    def note(self, sort: Sort, name: str, served_s: float) -> None:
        self.faults.setdefault(sort, Counter())[name] += 1
        self.served_s.setdefault(name, []).append(served_s)

    def hear(self, operations: Iterable[Operation]) -> None:
        for operation in operations:
            self.operations += operation.code != NOT_SENT  # of that nothing can be false
            self.endings[operation.ending] += 1
            if operation.code:
                self.codes[operation.code] += 1

    def convict(self, found: Sequence[str]) -> None:
        self.violation_count += len(found)
        self.violations += found[: max(0, VIOLATIONS_KEPT_MAX - len(self.violations))]

    def add(self, other: "Tally") -> None:
        self.seeds += other.seeds
        for sort, counts in other.faults.items():
            self.faults.setdefault(sort, Counter()).update(counts)
        self.operations += other.operations
        self.endings.update(other.endings)
        self.codes.update(other.codes)
        self.convict(other.violations)
        self.violation_count += other.violation_count - len(other.violations)
        for name, times in other.served_s.items():
            self.served_s.setdefault(name, []).extend(times)
        self.late_ms += other.late_ms
        self.overdue_s += other.overdue_s
        self.longest_s = max(self.longest_s, other.longest_s)
        self.skipped.update(other.skipped)
        self.seconds += other.seconds

    def count(self, sort: Sort) -> int:
        return sum(self.faults.get(sort, {}).values())

    def summary(self) -> dict[str, Any]:
        """For a report: plain JSON."""
        engine = self.faults.get(Sort.ENGINE, Counter())
        return {
            "seeds": self.seeds,
            "database_faults": self.count(Sort.DATABASE),
            "commits_cut": self.count(Sort.CUT),
            "engine_kills": engine["kill"],
            "operations": self.operations,
            "violations": self.violation_count,
            "faults": {sort: dict(sorted(counts.items())) for sort, counts in sorted(self.faults.items())},
            "endings": dict(sorted(self.endings.items())),
            "codes": dict(sorted(self.codes.items())),
            "served_again_s": {name: _spread(times) for name, times in sorted(self.served_s.items())},
            "served_late": sum(time > SERVED_S for times in self.served_s.values() for time in times),
            "expiry_late_ms": _spread(self.late_ms),
            "overdue_s": _spread(self.overdue_s),
            "longest_answer_s": round(self.longest_s, 3),
            "skipped": self.skipped,
            "seconds": round(self.seconds, 1),
            "found": self.violations,
        }

    def text(self) -> str:
        """The same in a few lines, for people."""
        lines = [
            f"{self.count(Sort.DATABASE)} database faults, {self.count(Sort.CUT)} COMMITs cut,"
            f" {self.faults.get(Sort.ENGINE, Counter())['kill']} engine kills; {self.operations} operations checked"
            f" ({', '.join(f'{n} {ending}' for ending, n in sorted(self.endings.items()))}):"
            f" {self.violation_count} violations, in {self.seconds:.0f} s"
        ]
        for sort, counts in sorted(self.faults.items()):
            for name, times in sorted(counts.items()):
                served = _spread(self.served_s[name])
                lines.append(f"  {sort:8} {name:18} {times:5}   served again after {_figures(served, 's')}")
        late = [sum(time > SERVED_S for time in times) for times in self.served_s.values()]
        lines.append(
            f"  served again within {SERVED_S:.0f} s (I18): {'holds' if not sum(late) else f'{sum(late)} MISSED'}"
        )
        if self.late_ms:
            spread = _spread(self.late_ms)
            holds = spread["p99"] <= LATE_P99_MS and spread["p999"] <= LATE_P999_MS and spread["max"] <= LATE_MAX_MS
            lines.append(
                f"  lateness of {len(self.late_ms)} expiries while all was well (I8): {_figures(spread, 'ms')}:"
                f" {'holds' if holds else 'MISSED'}"
            )
        if self.overdue_s:
            lines.append(
                f"  holds that fell due in one of {len(self.overdue_s)} faults were ended, after it served again,"
                f" within {_figures(_spread(self.overdue_s), 's')}"
            )
        lines.append(f"  longest wait for an answer {self.longest_s:.2f} s; {dict(sorted(self.codes.items()))}")
        lines += [f"  skipped: {name}: {why}" for name, why in self.skipped.items()]
        lines += [f"  VIOLATION {found}" for found in self.violations]
        return "\n".join(lines)


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3)

    return {"p50": at(0.5), "p99": at(0.99), "p999": at(0.999), "max": round(ordered[-1], 3)}


def _figures(spread: dict[str, float], unit: str) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in spread.items()) + f" {unit}"
