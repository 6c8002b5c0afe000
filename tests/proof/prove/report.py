"""What the report says: the summary first, then whatever was found, then the figures behind it."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from tests.proof.prove import document, parts
from tests.proof.prove.coverage import FAULTS, Reached
from tests.proof.prove.document import Block, Cell, Heading, Listing, Mark, Table, Text
from tests.proof.prove.figures import Figures, Goals
from tests.proof.prove.sittings import Counted, Sitting
from tests.proof.simulation.coverage import NONE

TITLE: Final = "Holdfast, proved"
SHORT: Final = 10  # characters of a commit
MISSING_MAX: Final = 200  # cells that are named
S_PER_HOUR: Final = 3_600
ORDER: Final = ("database", "cut", "delay", "engine")  # sorts of real faults
SORTS: Final = {
    "database": "of the database",
    "cut": "COMMIT cut",
    "delay": "COMMIT held up",
    "engine": "of the engine",
}
FUZZERS: Final = {"lane": "requests, mutated", "frames": "frames of viewers, mutated"}


class Report(msgspec.Struct):
    """All that it says, for other programs: `report.json`."""

    set_name: str
    goals: Goals
    canaries: Sequence[str]  # all that there are
    commits: list[str]
    counted: Counted

    @property
    def is_good(self) -> bool:
        """Nothing was found, and nothing broke off; whether it is complete, `is_complete` says."""
        figures = self.counted.figures
        return bool(self.counted.sittings) and not figures.violation_count and not figures.problems

    @property
    def is_complete(self) -> bool:
        return self.is_good and all(line.is_reached for line in lines(self))


class Line(msgspec.Struct, frozen=True):
    """Of the summary."""

    name: str
    goal: float
    done: int
    is_most: bool = False  # the goal is what may not be exceeded

    @property
    def is_reached(self) -> bool:
        return self.done <= self.goal if self.is_most else self.done >= self.goal

    @property
    def row(self) -> tuple[str, str, Cell]:
        mark = Mark.NONE if self.is_reached else Mark.BAD
        return self.name, f"{self.goal:,.0f}", Cell(f"{self.done:,}", mark)


def lines(report: Report) -> list[Line]:
    goals, figures = report.goals, report.counted.figures
    cells = Reached(figures.simulated.coverage)
    return [
        Line("seeds, each a simulated world of its own", goals.seeds, figures.simulated.seeds),
        Line("operations checked", goals.operations, figures.operations),
        Line("simulated hours", goals.hours, int(figures.simulated.hours)),
        Line("database faults under load", goals.faults, figures.struck.database),
        Line("COMMITs cut", goals.cuts, figures.struck.cuts),
        Line("engine kills", goals.kills, figures.struck.kills),
        *(Line(f"fuzzed: {FUZZERS[name]}", goals.cases, figures.fuzzed.cases.get(name, 0)) for name in FUZZERS),
        Line("schemathesis, seconds for each of its runs", goals.schemathesis_s, figures.tried.longest_s),
        Line("canaries caught", len(report.canaries), sum(_is_caught(figures, name) for name in report.canaries)),
        Line("cells of command × state × fault reached", cells.feasible, cells.reached),
        Line("violations", 0, figures.violation_count, is_most=True),
    ]


def _is_caught(figures: Figures, name: str) -> bool:
    return name in figures.canaries and figures.canaries[name].is_caught


def write(report: Report, folder: Path) -> list[Path]:
    """All three forms of it; where they are."""
    blocks = list(_blocks(report))
    written = {
        "report.md": document.markdown(TITLE, blocks).encode(),
        "report.html": document.page(TITLE, blocks).encode(),
        "report.json": msgspec.json.format(msgspec.json.encode(report)),
    }
    for name, text in written.items():
        (folder / name).write_bytes(text)
    return [folder / name for name in written]


def summary(report: Report) -> Table:
    return Table(("", f"{report.set_name} set", "done"), [line.row for line in lines(report)])


def verdict(report: Report) -> Text:
    if not report.counted.sittings:
        return Text("Nothing has been proved: no sitting counts.", Mark.BAD)
    figures, lacking = report.counted.figures, [line.name for line in lines(report) if not line.is_reached]
    if figures.violation_count:
        return Text(f"{_count(figures.violation_count, 'violation')} found.", Mark.BAD)
    if figures.problems:
        return Text("No violation was found, but not all could run: see the problems.", Mark.BAD)
    if lacking:
        return Text(f"No violation was found. Still lacking: {'; '.join(lacking)}.")
    return Text(f"No violation was found, and all figures of the {report.set_name} set are reached.", Mark.GOOD)


def _blocks(report: Report) -> Iterator[Block]:
    counted = report.counted
    yield verdict(report)
    yield summary(report)
    if counted.sittings:
        yield Text(_provenance(counted.sittings))
    yield from _findings(counted.figures)
    yield from _simulated(counted.figures)
    yield from _coverage(Reached(counted.figures.simulated.coverage))
    yield from _struck(counted.figures)
    yield from _fuzzed(counted.figures)
    yield from _flown(report)
    yield from _sittings(counted)


def _provenance(sittings: Sequence[Sitting]) -> str:
    commits = list(dict.fromkeys(_commit(sitting) for sitting in sittings))
    machines = list(
        dict.fromkeys(
            f"{sitting.machine['cores']} cores of {sitting.machine['processor'] or sitting.machine['system']},"
            f" Python {sitting.machine['python']}"
            for sitting in sittings
        )
    )
    days = sorted({sitting.began_at[:10] for sitting in sittings})
    days = list(dict.fromkeys([days[0], days[-1]]))
    took = _span(sum(sitting.seconds for sitting in sittings))
    return (
        f"{_count(len(sittings), 'sitting')} of {took} together, {' to '.join(days)};"
        f" {_count(len(commits), 'commit', listed=commits)}; {'; '.join(machines)}."
    )


def _count(number: int, noun: str, listed: Sequence[str] = ()) -> str:
    text = f"{number:,} {noun}{'' if number == 1 else 's'}"
    return f"{text} ({', '.join(listed)})" if listed else text


def _span(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < S_PER_HOUR else f"{seconds / S_PER_HOUR:.1f} h"


def _commit(sitting: Sitting) -> str:
    return sitting.commit[:SHORT] + (" with changes of its own" if sitting.is_dirty else "")


def _findings(figures: Figures) -> Iterator[Block]:
    if figures.violations:
        yield Heading("Violations")
    for found in figures.violations:
        yield Heading(found.part if found.seed is None else f"{found.part}, seed {found.seed}", 3)
        yield Listing(f"{found.told}\n\n{found.replay}")
    if figures.problems:
        yield Heading("Problems")
        yield Text("What could not run, or broke off:")
    for problem in figures.problems:
        yield Listing(problem)


def _simulated(figures: Figures) -> Iterator[Block]:
    simulated = figures.simulated
    if not simulated.seeds:
        return
    yield Heading("Simulation")
    yield Text(
        f"{simulated.seeds:,} seeds, {simulated.operations:,} operations, {simulated.hours:,.1f} hours in"
        f" {_span(simulated.cpu_s)} of CPU. Beside these ran {_count(simulated.corpus, 'seed')} of the"
        f" corpus. {_count(simulated.replayed, 'seed')} ran a second time, for the same history to the byte."
    )
    yield _counts("fault", simulated.faults)
    rows = [(parts.replay_of(slow.seed), f"{slow.seconds:.2f}", f"{slow.operations:,}") for slow in simulated.slowest]
    yield Heading("Slowest seeds", 3)
    yield Table(("again", "s of CPU", "operations"), rows)


def _coverage(reached: Reached) -> Iterator[Block]:
    if not reached.reached:
        return
    yield Heading("Coverage")
    missing = reached.missing()
    yield Text(
        f"{reached.reached:,} of {reached.feasible:,} cells were reached: a command, while a drop, its asker's newest"
        " reservation on it and its stock were so and so, and while one fault was in effect, or none. Here by the"
        " drop's status: how many times; where cells are missing, how many of them were reached."
    )
    rows = reached.by_status()
    most = max((times for _, _, figures in rows for times, _, _ in figures.values()), default=1)
    yield Table(
        ("command", "drop", *(fault if fault != NONE else "no fault" for fault in FAULTS)),
        [(kind, status, *(_heat(*figures[fault], most) for fault in FAULTS)) for kind, status, figures in rows],
        words=2,
    )
    if missing:
        rest = len(missing) - MISSING_MAX
        yield Table(
            ("command", "drop", "newest reservation", "stock", "fault"),
            [[Cell(word, Mark.BAD) for word in cell] for cell in missing[:MISSING_MAX]],
            words=5,
            folded="Missing" + (f"; {rest} more" if rest > 0 else ""),
        )


def _heat(times: int, reached: int, feasible: int, most: int) -> Cell:
    if not feasible:
        return Cell("")
    if reached < feasible:
        return Cell(f"{times:,} ({reached} of {feasible})", Mark.BAD)
    return Cell(f"{times:,}", heat=math.log1p(times) / math.log1p(max(most, 1)))


def _struck(figures: Figures) -> Iterator[Block]:
    struck = figures.struck
    if not struck.by_name and not struck.skipped:
        return
    yield Heading("Faults on a real PostgreSQL, under load")
    yield Text(
        f"{struck.operations:,} operations checked. After {_count(struck.served_late, 'fault')} a change was served"
        f" later than 2 s after its end; the longest wait for an answer was {struck.longest_answer_s:.2f} s; expiries,"
        f" while all was well, were at the most {struck.late_max_ms:.0f} ms late."
    )
    rows = [
        (SORTS.get(sort, sort), name, f"{count:,}", f"{struck.served_max_s.get(name, 0.0):.2f}")
        for sort in sorted(struck.by_name, key=lambda sort: ORDER.index(sort) if sort in ORDER else len(ORDER))
        for name, count in sorted(struck.by_name[sort].items())
    ]
    yield Table(("fault", "", "times", "served again after, s at most"), rows, words=2)
    if struck.skipped:
        yield Text("What a machine could not do:")
        yield Table(
            ("fault", "why not"), [(name, Cell(why, Mark.BAD)) for name, why in struck.skipped.items()], words=2
        )


def _fuzzed(figures: Figures) -> Iterator[Block]:
    fuzzed, tried = figures.fuzzed, figures.tried
    if fuzzed.cases:
        yield Heading("Fuzzing")
        told = "; ".join(f"{FUZZERS.get(name, name)}: {count:,} cases" for name, count in sorted(fuzzed.cases.items()))
        yield Text(f"{told}. What the servers answered:")
        yield _counts("answer", fuzzed.answers)
    if tried.tests:
        yield Heading("Schemathesis")
        yield Text(
            f"{_count(tried.tests, 'test')} of the API as its document has it, each run of {tried.longest_s} s at the"
            f" most; {tried.seconds / 60:.0f} minutes together."
        )


def _flown(report: Report) -> Iterator[Block]:
    flown = report.counted.figures.canaries
    if not flown:
        return
    yield Heading("Canaries")
    yield Text("Each is a deliberate bug; each of these must go red for its reason.")
    rows = []
    for name in report.canaries:
        one = flown.get(name)
        if one is None:
            rows.append((name, Cell("not set loose", Mark.BAD), "", ""))
        else:
            fate = Cell("caught", Mark.GOOD) if one.is_caught else Cell("SURVIVED", Mark.BAD)
            rows.append((name, fate, "; ".join(one.by), f"{one.seconds:.0f}"))
    yield Table(("canary", "", "by", "s"), rows, words=3)


def _sittings(counted: Counted) -> Iterator[Block]:
    if counted.sittings:
        yield Heading("Sittings")
        yield _table_of(counted.sittings)
    if counted.twice:
        yield Text("Seeds that a later sitting ran as well are counted there. Without their seeds count those of:")
        yield _table_of(counted.twice)
    if counted.left_out:
        yield Heading("Sittings that do not count")
        yield Text("Of other commits; with --since COMMIT those count that are of it, or of later ones.")
        yield _table_of(counted.left_out)


def _table_of(sittings: Sequence[Sitting]) -> Table:
    rows = [
        (
            sitting.began_at,
            _commit(sitting),
            sitting.command,
            _span(sitting.seconds) + ("" if sitting.is_whole else ", cut short"),
            f"{sitting.first:,} to {sitting.end - 1:,}" if sitting.end > sitting.first else "none",
            f"{sitting.figures.operations:,}",
            Cell(str(sitting.figures.violation_count), Mark.BAD if sitting.figures.violation_count else Mark.NONE),
        )
        for sitting in sittings
    ]
    return Table(("began", "commit", "command", "took", "seeds", "operations", "violations"), rows, words=3)


def _counts(noun: str, counts: Mapping[str, int]) -> Table:
    return Table((noun, "times"), [(name, f"{count:,}") for name, count in Counter(counts).most_common()])
