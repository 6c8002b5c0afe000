"""What people see: a line and two bars while it runs, tables at the end. Nothing is redrawn when nobody looks."""

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from tests.bench.results import Audit, Goal, Report, Run

SPARKS = " ▁▂▃▄▅▆▇█"


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
        self.console.print(runs_table(report))
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
            f"{'≥' if goal.is_least else '≤'} {goal.bound:g} {goal.unit}",
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
