"""What a run leaves behind: `soak.json`, all of it, and `soak.md`, what one reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from tests.proof.soak.growth import Growth
from tests.proof.soak.judgement import Verdict
from tests.proof.soak.parts import Part, Peak
from tests.proof.soak.sampling import Sample

FORMAT: Final = 1
ROWS: Final = 12  # of a part's course
# Of the server's own, in a course.
FIGURES: Final = ("in_flight", "mailboxes", "parts", "outbox", "holds", "blocks", "heap_bytes")


class Report(msgspec.Struct, frozen=True, kw_only=True):
    format: int
    began_at: str
    seconds: float
    command: str
    machine: dict[str, str]
    settings: dict[str, str]
    notes: list[str]
    peaks: dict[str, Peak]
    parts: list[Part]
    growth: list[Growth]
    verdicts: list[Verdict]  # all of them, those of the parts too
    problems: list[str]

    @property
    def holds(self) -> bool:
        return not self.problems and all(verdict.holds for verdict in self.verdicts)


def write(report: Report, directory: Path) -> list[Path]:
    directory.mkdir(parents=True, exist_ok=True)
    as_json, as_text = directory / "soak.json", directory / "soak.md"
    as_json.write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    as_text.write_text(markdown(report))
    return [as_json, as_text]


def markdown(report: Report) -> str:
    machine = ", ".join(f"{name}: {value}" for name, value in report.machine.items())
    lines = [
        "# Overload and soak",
        "",
        f"`{report.command}`, {report.began_at}, {report.seconds / 60:,.0f} min. {machine}.",
        "",
        "Everything holds." if report.holds else "**Not everything holds.**",
        "",
        *table(["", "promised", "seen", "holds"], [_row(one) for one in report.verdicts]),
    ]
    lines += [f"**{problem}**" for problem in report.problems]
    for name, peak in report.peaks.items():
        lines += [
            "",
            f"Peak {name}: {peak.changes_per_s:,.0f} changes/s, {peak.decided_per_s:,.0f} commands decided/s,"
            f" {peak.people_per_s:,.0f} people/s, closed loop with {peak.at_once} requests at once. Rounds: "
            + "; ".join(
                f"{at_once} at once {', '.join(f'{one:,.0f}' for one in rounds)}"
                for at_once, rounds in peak.rounds.items()
            ),
        ]
    for part in report.parts:
        figures = [[name.replace("_", " "), f"{value:,.2f}"] for name, value in part.figures.items()]
        step = max(1, len(part.course) // ROWS)
        course = [_moment(one, part.seen.began_at) for one in part.course[::step]]
        lines += [
            "",
            f"## {part.name.capitalize()}: {part.rate:,.0f} people/s for {part.seen.seconds:,.0f} s",
            "",
            *table(["figure", "seen"], figures),
            "",
            *table(["s", "resident MiB", "descriptors", *(name.replace("_", " ") for name in FIGURES)], course),
            "",
            *table(["answer", "times"], [[name, f"{times:,}"] for name, times in part.seen.answers.items()]),
        ]
    if report.growth:
        grown = [[one.what, f"{one.bytes_each:,.0f}", f"{one.made:,}"] for one in report.growth]
        lines += ["", "## What grows with sales, by design", "", *table(["for each", "bytes", "measured with"], grown)]
    lines += ["", *(f"- {note}" for note in report.notes), ""]
    return "\n".join(lines)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [headings, ["---"] * len(headings), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def _moment(sample: Sample, began_at: float) -> list[str]:
    seen = sample.statistics
    told = ["?"] * len(FIGURES) if seen is None else [f"{getattr(seen, name):,}" for name in FIGURES]
    return [f"{sample.at - began_at:,.0f}", f"{sample.rss_bytes / 2**20:,.1f}", f"{sample.descriptors:,}", *told]


def _row(verdict: Verdict) -> list[str]:
    return [verdict.name, verdict.promised, verdict.seen, "yes" if verdict.holds else "**no**"]
