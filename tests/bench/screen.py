"""What people see: a line and two bars while it runs, tables at the end. Nothing is redrawn when nobody looks."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from tests.bench.results import Audit, Goal, Report, Run

SPARKS = " ▁▂▃▄▅▆▇█"
PACED: Final = {
    "p50 ms": "answer_to_frame_p50_ms",
    "p99 ms": "answer_to_frame_p99_ms",
    "from request, p50": "request_to_frame_p50_ms",
    "p99": "request_to_frame_p99_ms",
    "server grew KiB": "rss_kib_grown",
    "unread KiB": "unread_kib",
}
# Of each family of scenarios about viewers: the title, and the figures that are shown, by their headings.
VIEWERS: Final[Mapping[str, tuple[str, Mapping[str, str]]]] = {
    "viewers": (
        "One update to all viewers, from its request: medians of the rounds",
        {
            "last ms": "last_ms",
            "middle ms": "middle_ms",
            "first to last": "first_to_last_ms",
            "answered": "answered_ms",
            "CPU µs/frame": "server_cpu_us_per_frame",
            "viewers' µs": "client_cpu_us_per_frame",
            "KiB/viewer": "rss_kib_per_viewer",
            "bytes": "text_bytes",
        },
    ),
    "watched": (
        "Reserves while viewers watch the drop: medians of the rounds",
        {
            "reserves/s": "reserves_per_s",
            "frames/s each": "frames_per_viewer_per_s",
            "viewers' share of CPU": "share_of_cpu_of_viewers",
        },
    ),
    "wire": (
        "From an update's answer to its frame, 100 viewers, so many updates a second: medians of the rounds",
        PACED,
    ),
    "stalled": (
        "The same at 20 a second without and with one viewer more, who watches 300 drops and never reads",
        PACED,
    ),
}


class Screen:
    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        if not self.console.is_terminal:
            self.console.width = 130  # of a file: nothing wraps there
        self._progress: Progress | None = None
        self._all: TaskID | None = None
        self._one: TaskID | None = None
        self._history: list[float] = []

    @contextmanager
    def showing(self, runs: int) -> Iterator[None]:
        """Bars for so many runs; one line a run where there is no terminal."""
        if not self.console.is_terminal:
            yield
            return
        columns = (TextColumn("{task.description:<34}"), BarColumn(28), MofNCompleteColumn(), TimeRemainingColumn())
        # 4 a second: the display shares the cores with what is measured.
        with Progress(
            *columns, TextColumn("{task.fields[figures]}"), console=self.console, refresh_per_second=4
        ) as progress:
            self._progress = progress
            self._all = progress.add_task("all runs", total=runs, figures="")
            self._one = progress.add_task("", total=1, figures="")
            yield
        self._progress = None

    def begin(self, title: str, seconds: float) -> None:
        self._history = []
        if self._progress is not None and self._one is not None:
            self._progress.reset(self._one, total=round(seconds, 1), description=title, figures="")

    def tick(self, elapsed_s: float, per_s: float, note: str = "") -> None:
        self._history = [*self._history, per_s][-24:]
        if self._progress is not None and self._one is not None:
            most = max(self._history) or 1
            curve = "".join(SPARKS[int(value / most * (len(SPARKS) - 1))] for value in self._history)
            self._progress.update(self._one, completed=elapsed_s, figures=f"{per_s:>9,.0f}/s {curve} {note}")

    def end(self, run: Run | None) -> None:
        if self._progress is not None and self._all is not None:
            self._progress.advance(self._all)
        elif run is not None:
            self.say(f"round {run.round}  {run.scenario:<10} {run.target:<9} {run.per_s:>10,.0f}/s  {wrong(run)}")

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False)

    # --- at the end ----------------------------------------------------------------------------------

    def summary(self, report: Report) -> None:
        if any(not is_about_viewers(run.scenario) for run in report.runs):
            self.console.print(runs_table(report))
        for title, headings, rows in figures_of_viewers(report):
            table = Table(title=title)
            for number, heading in enumerate(headings):
                table.add_column(heading, justify="right" if number > 1 else "left", no_wrap=True)
            for row in rows:
                table.add_row(*row)
            self.console.print(table)
        if report.goals:
            self.console.print(goals_table(report.goals))
        if report.audits:
            self.console.print(audits_table(report.audits))
        for note in report.notes:
            self.say(f"· {note}")


def wrong(run: Run) -> str:
    parts = []
    if run.load.failed:
        parts.append(f"{run.load.failed} wrong")
    if run.load.lost:
        parts.append(f"{run.load.lost} lost")
    others = sum(run.load.answers.values()) - run.load.done
    if others and run.scenario != "journey":  # where many must be sent away
        parts.append(f"{others} refused or other")
    return ", ".join(parts)


def groups(report: Report) -> dict[tuple[str, str], list[Run]]:
    found: dict[tuple[str, str], list[Run]] = {}
    for run in report.runs:
        found.setdefault((run.scenario, run.target), []).append(run)
    return found


def runs_table(report: Report) -> Table:
    table = Table(title="Medians of the rounds; cores: what each used, load: the generators' share of all CPU")
    for heading in ("scenario", "target"):
        table.add_column(heading, no_wrap=True)
    headings = ("per s", "least to most", "p50 ms", "p99 ms", "p99.9 ms", "server", "PostgreSQL", "load", "share")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("wrong")
    for (scenario, target), runs in groups(report).items():
        if is_about_viewers(scenario):
            continue
        rates = [run.per_s for run in runs]
        shares = [run.generator_share for run in runs if run.generator_share is not None]
        table.add_row(
            scenario,
            target,
            f"{statistics.median(rates):,.0f}",
            f"{min(rates):,.0f} – {max(rates):,.0f}",
            *(f"{median_ms(runs, name):.1f}" for name in ("p50_ms", "p99_ms", "p999_ms")),
            *(cores(runs, who) for who in ("server", "postgres", "generator")),
            f"{statistics.median(shares):.0%}" if shares else "",
            ", ".join(sorted({wrong(run) for run in runs} - {""})),
        )
    return table


def is_about_viewers(scenario: str) -> bool:
    """Whether its figures say everything; of the others the rate and the latencies count."""
    return scenario.partition(" ")[0] in ("viewers", "wire", "stalled")


def figures_of_viewers(report: Report) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """For each family of scenarios about viewers: title, headings, and rows of medians."""
    for family, (title, figures) in VIEWERS.items():
        found = {key: runs for key, runs in groups(report).items() if key[0].partition(" ")[0] == family}
        shown = {
            heading: name
            for heading, name in figures.items()
            if any(name in run.load.figures for runs in found.values() for run in runs)
        }
        rows = [
            [scenario, target, *(_median_of(runs, name) for name in shown.values())]
            for (scenario, target), runs in found.items()
        ]
        if rows:
            yield title, ["scenario", "target", *shown], rows


def _median_of(runs: Sequence[Run], name: str) -> str:
    values = [run.load.figures[name] for run in runs if name in run.load.figures]
    if not values:
        return ""
    middle = statistics.median(values)
    return f"{middle:,.2f}" if abs(middle) < 100 and middle != int(middle) else f"{middle:,.0f}"


def median_ms(runs: Sequence[Run], name: str) -> float:
    """`name` is a percentile's field of `Latency`."""
    values: list[float] = [getattr(run.load.latency, name) for run in runs]
    return statistics.median(values)


def cores(runs: Sequence[Run], who: str) -> str:
    used = [run.cores[who] for run in runs if who in run.cores]
    return f"{statistics.median(used):.2f}" if used else ""


def goals_table(goals: Sequence[Goal]) -> Table:
    table = Table(title="What was promised")
    table.add_column("figure")
    for heading in ("promised", "seen (median)", "least to most", "holds"):
        table.add_column(heading, justify="right")
    for goal in goals:
        table.add_row(
            goal.name,
            goal.promised,
            f"{goal.median:.2f} {goal.unit}",
            f"{min(goal.seen):.2f} to {max(goal.seen):.2f}",
            "[green]yes[/]" if goal.holds else "[red]no[/]",
        )
    return table


def audits_table(audits: Sequence[Audit]) -> Table:
    table = Table(title="holdfast audit")
    for heading in ("database", "invariants", "violations"):
        table.add_column(heading)
    for audit in audits:
        table.add_row(audit.database, str(audit.checks), "; ".join(audit.violations) or "none")
    return table
