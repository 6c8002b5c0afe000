"""The report as one HTML file, and its summary as one picture for a README.

The page needs nothing beside itself: no script, no font, no host. The pictures are drawings inside of it, with text
that can be searched and read aloud, in colours of the page (light or dark, and apart for colour-blind eyes too; each
line has its own stroke as well).
"""

import html as escaping
import io
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from tests.bench.results import Goal, Report, Run, histogram_of
from tests.bench.screen import cores, figures_of_viewers, groups, is_about_viewers, median_ms, wrong

LABELS: Final = {
    "holdfast": "Holdfast",
    "cte": "FastAPI, one CTE statement",
    "classic": "FastAPI, classic transaction",
    "server": "the server",
    "bare": "bare send in a loop: the limit",
    "broadcast": "Python websockets, broadcast()",
    "ws": "Node ws",
    "ws-frame": "Node ws, one prepared frame",
}
INK: Final = "#010203"  # stands for the page's text colour in a drawing
# Okabe and Ito's palette: what a line is drawn in, and its name in the page's style.
COLOURS: Final = {"holdfast": "#0072b2", "cte": "#d55e00", "classic": "#8a6d00", "server": "#0072b3", "rate": "#a3487f"}
STROKES: Final = {"holdfast": "-", "cte": "--", "classic": ":", "server": "-", "rate": "-."}
ORDER: Final = ("holdfast", "server", "cte", "classic")

PERCENTILES: Final = (0, 25, 50, 75, 90, 95, 99, 99.5, 99.9, 99.95, 99.99)

STYLE: Final = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --line: #d5d9de; --soft: #5a636e; --good: #0b6b3a;
  --bad: #a11d1d; --holdfast: #0072b2; --cte: #d55e00; --classic: #8a6d00; --server: #0072b2; --rate: #a3487f }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --paper: #14171a; --line: #363c43; --soft: #a0a8b2;
  --good: #5fd08f; --bad: #ff8f8f; --holdfast: #56b4e9; --cte: #ff9a57; --classic: #e6c84b; --server: #56b4e9;
  --rate: #e59ac6 } }
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.5rem }
figure { margin: 1.5rem 0 } figcaption { color: var(--soft) } svg { width: 100%; height: auto; color: var(--ink) }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; min-width: 100% }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: right; white-space: nowrap }
th:first-child, td:first-child, .words td, .words th { text-align: left; white-space: normal }
.good { color: var(--good); font-weight: 600 } .bad { color: var(--bad); font-weight: 600 }
.problems { border-left: 4px solid var(--bad); padding-left: 1rem } code { overflow-wrap: anywhere }
"""


def html(report: Report) -> str:
    """The whole page."""
    parts = [
        f"<h1>Holdfast benchmark, {_text(report.began_at)}</h1>",
        f"<p>{_verdict(report)}</p>",
        _list("problems", report.problems),
        *_figures(report),
        "<h2>What was promised</h2>" + _goals(report.goals) if report.goals else "",
        "<h2>All scenarios</h2><p>Medians of the rounds. Server, PostgreSQL and load: cores' worth of CPU that each"
        " used; share: the load generators' part of all three; others: cores that went to what else ran here.</p>",
        _runs(report),
        *_viewers(report),
        *_journeys(report),
        "<h2>Answers, checked</h2><p>Warm-ups included. Each answer was read in full after its run.</p>",
        _checks(report),
        "<h2>Audit</h2>" + _audits(report) if report.audits else "",
        "<h2>How it was run</h2>",
        f"<p><code>{_text(report.command)}</code></p>",
        _list("", report.notes),
        *(_words(pairs) for pairs in (report.machine, report.versions, report.settings)),
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    title = f"<title>Holdfast benchmark {_text(report.began_at)}</title>"
    body = "\n".join(part for part in parts if part)
    head += f"{title}<style>{STYLE}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def picture(report: Report, path: Path) -> None:
    """The three drawings that say the most, as one PNG."""
    below = [draw for draw in (_draw_percentiles, _draw_journey) if draw(report, None)]
    with mpl.rc_context(_rc("#1b1f24")):
        figure = Figure(figsize=(12, 7), dpi=110, layout="constrained", facecolor="white")
        grid = figure.add_gridspec(2, max(1, len(below)), height_ratios=(2, 3))
        if _draw_rates(report, None):
            _draw_rates(report, figure.add_subplot(grid[0, :]))
        for number, draw in enumerate(below):
            draw(report, figure.add_subplot(grid[1, number]))
        figure.savefig(path, format="png")


# --- drawings ----------------------------------------------------------------------------------------

Draw = Callable[[Report, Axes | None], bool]
"""Draws into the axes, if there are any; whether there is something to draw."""


def _figures(report: Report) -> Iterable[str]:
    drawings: Sequence[tuple[Draw, str]] = (
        (_draw_rates, "Durable reserves a second on one hot drop: medians of the rounds, with the least and the most."),
        (_draw_throughput, "Throughput over time, hot: the round in the middle of each target's."),
        (_draw_latency, "Latency over time, hot: p99 of each tenth of a second, same rounds, logarithmic."),
        (_draw_percentiles, "Latency by percentile, all rounds together, logarithmic. In the closed loop it is the"
         " number of connections divided by the throughput; the open loop shows what a caller sees at half of the"
         " peak."),
        (_draw_stock, "Stock against time, hot: units given out since the window began."),
        (_draw_journey, "Stock against time, journey: it opens at 0; what is cancelled or runs out comes back and is"
         " taken again."),
    )  # fmt: skip
    for number, (draw, caption) in enumerate(drawings):
        if draw(report, None):
            yield f"<figure>{_svg(report, draw, number, caption)}<figcaption>{_text(caption)}</figcaption></figure>"


def _svg(report: Report, draw: Draw, number: int, title: str) -> str:
    with mpl.rc_context(_rc(INK)):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        draw(report, figure.add_subplot())
        written = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    drawn = written.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r' xmlns(:\w+)?="[^"]*"', "", drawn)
    # Several drawings on one page: their ids must differ.
    drawn = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>d{number}-", drawn)
    drawn = drawn.replace(INK, "currentColor")
    for name, colour in COLOURS.items():
        drawn = drawn.replace(colour, f"var(--{name})")
    return drawn.replace("<svg", f'<svg role="img" aria-label="{_text(title)}"', 1)


def _rc(ink: str) -> Any:
    of_ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    return {
        **dict.fromkeys(of_ink, ink),
        "svg.fonttype": "none",
        "svg.hashsalt": "holdfast",
        "font.family": "sans-serif",
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.15,
        "legend.frameon": False,
        "lines.linewidth": 2,
    }


def _targets(report: Report, scenario: str) -> list[tuple[str, list[Run]]]:
    return [(target, runs) for target in ORDER if (runs := report.of(scenario, target))]


def _middle(runs: Sequence[Run]) -> Run:
    return sorted(runs, key=lambda run: run.per_s)[len(runs) // 2]


def _draw_rates(report: Report, axes: Axes | None) -> bool:
    found = _targets(report, "hot")
    if axes is None:
        return bool(found)
    for place, (target, runs) in enumerate(reversed(found)):
        rates = [run.per_s for run in runs]
        rate = statistics.median(rates)
        axes.barh(place, rate, color=COLOURS[target], height=0.6)
        axes.errorbar(rate, place, xerr=[[rate - min(rates)], [max(rates) - rate]], color=_ink(), capsize=4, lw=1)
        axes.text(max(rates), place, f"  {rate:,.0f}", va="center")
    axes.set_yticks(range(len(found)), [LABELS[target] for target, _ in reversed(found)])
    axes.set_xlabel("durable reserves per second, one hot drop")
    axes.margins(x=0.18)
    axes.grid(visible=False, axis="y")
    return True


def _ink() -> str:
    return str(mpl.rcParams["text.color"])


def _draw_throughput(report: Report, axes: Axes | None) -> bool:
    found = _targets(report, "hot")
    if axes is None:
        return bool(found)
    for target, runs in found:
        load = _middle(runs).load
        at = [moment.at_s for moment in load.over_time]
        per_s = [moment.answers / load.bucket_s for moment in load.over_time]
        axes.plot(at, per_s, color=COLOURS[target], ls=STROKES[target], label=LABELS[target])
    axes.set(xlabel="s", ylabel="reserves per second", ylim=(0, None))
    axes.legend(loc="center right")
    return True


def _draw_latency(report: Report, axes: Axes | None) -> bool:
    found = _targets(report, "hot")
    if axes is None:
        return bool(found)
    for target, runs in found:
        moments = [moment for moment in _middle(runs).load.over_time if moment.answers]
        at, p99 = [moment.at_s for moment in moments], [moment.p99_ms for moment in moments]
        axes.plot(at, p99, color=COLOURS[target], ls=STROKES[target], label=LABELS[target])
    axes.set(xlabel="s", ylabel="p99, ms", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend()
    return True


def _draw_percentiles(report: Report, axes: Axes | None) -> bool:
    lines = [(LABELS[target], target, runs) for target, runs in _targets(report, "hot")]
    for target, runs in _targets(report, "rate"):
        name = f"{LABELS[target]}, open loop at {_middle(runs).load.figures.get('rate', 0):,.0f}/s"
        lines.append((name, "rate", runs))
    if axes is None:
        return bool(lines)
    for name, style, runs in lines:
        histogram = histogram_of([run.load.latency for run in runs])
        values = [max(histogram.get_value_at_percentile(p), 1) / 1000 for p in PERCENTILES]
        axes.plot([_tail(p) for p in PERCENTILES], values, color=COLOURS[style], ls=STROKES[style], label=name)
    shown = (50, 90, 99, 99.9, 99.99)
    axes.set(xscale="log", yscale="log", xlabel="of the answers came within", ylabel="ms")
    axes.set_xticks([_tail(p) for p in shown], [f"{p:g} %" for p in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(fontsize=9)
    return True


def _tail(percentile: float) -> float:
    """Where a percentile stands on an axis that gives each further nine the same room."""
    return 1 / (1 - percentile / 100)


def _draw_stock(report: Report, axes: Axes | None) -> bool:
    found = [(target, runs) for target, runs in _targets(report, "hot") if _middle(runs).load.stock]
    if axes is None:
        return bool(found)
    for target, runs in found:
        load = _middle(runs).load
        stock = [(at, units) for at, units in load.stock if 0 <= at <= load.seconds]
        taken = [stock[0][1] - units for _, units in stock]
        axes.plot([at for at, _ in stock], taken, color=COLOURS[target], ls=STROKES[target], label=LABELS[target])
    axes.set(xlabel="s", ylabel="units given out", ylim=(0, None))
    axes.legend()
    return True


def _draw_journey(report: Report, axes: Axes | None) -> bool:
    found = [(target, run) for target, runs in _targets(report, "journey") for run in runs if run.load.stock]
    if axes is None:
        return bool(found)
    for target, run in found[:1]:
        axes.step([at for at, _ in run.load.stock], [units for _, units in run.load.stock], where="post",
                  color=COLOURS[target], label=LABELS[target])  # fmt: skip
    axes.axvline(0, color=_ink(), lw=1, alpha=0.5)
    axes.set(xlabel="s since the drop opened", ylabel="units available", ylim=(0, None))
    return True


# --- words and tables --------------------------------------------------------------------------------


def _verdict(report: Report) -> str:
    kept = sum(goal.holds for goal in report.goals)
    answers = sum(sum(run.load.all_answers.values()) for run in report.runs)
    wrongs = sum(run.load.failed for run in report.runs)
    right = f"{answers:,} answers, " + ("all of them right" if not wrongs else f"{wrongs:,} wrong or missing")
    audit = ""
    if report.audits:
        broken = sum(len(audit.violations) for audit in report.audits)
        audit = "; the audit found nothing" if not broken else f"; the audit found {broken} invariants broken"
    promised = f"; {kept} of {len(report.goals)} promised figures hold" if report.goals else ""
    return _text(f"{right}{audit}{promised}.")


def _goals(goals: Sequence[Goal]) -> str:
    rows = [
        (
            goal.name,
            goal.promised,
            f"{goal.median:.2f} {goal.unit}",
            f"{min(goal.seen):.2f} to {max(goal.seen):.2f}",
            _mark("holds" if goal.holds else "missed", goal.holds),
        )
        for goal in goals
    ]
    return _table(("figure", "promised", "seen, median", "least to most", ""), rows)


def _runs(report: Report) -> str:
    headings = ("scenario", "target", "rounds", "per s", "least to most", "p50 ms", "p99 ms", "p99.9 ms", "max ms")
    rows = []
    for (scenario, target), runs in groups(report).items():
        if is_about_viewers(scenario):
            continue
        rates = [run.per_s for run in runs]
        shares = [run.generator_share for run in runs if run.generator_share is not None]
        others = [run.others_cores for run in runs if run.others_cores is not None]
        rows.append(
            (
                scenario,
                LABELS.get(target, target),
                str(len(runs)),
                f"{statistics.median(rates):,.0f}",
                f"{min(rates):,.0f} to {max(rates):,.0f}",
                *(f"{median_ms(runs, name):.1f}" for name in ("p50_ms", "p99_ms", "p999_ms", "max_ms")),
                *(cores(runs, who) for who in ("server", "postgres", "generator")),
                f"{statistics.median(shares):.0%}" if shares else "",
                f"{statistics.median(others):.2f}" if others else "",
            )
        )
    return _table((*headings, "server", "PostgreSQL", "load", "share", "others"), rows)


def _viewers(report: Report) -> Iterable[str]:
    tables = [
        f"<h3>{_text(title)}</h3>{_table(headings, [[row[0], LABELS.get(row[1], row[1]), *row[2:]] for row in rows])}"
        for title, headings, rows in figures_of_viewers(report)
    ]
    if tables:
        yield "<h2>Viewers</h2>"
        yield from tables


def _journeys(report: Report) -> Iterable[str]:
    runs = [run for run in report.runs if run.scenario == "journey"]
    if not runs:
        return
    yield "<h2>The crowd at the opening</h2>"
    rows = [
        (name.replace("_", " "), *(f"{run.load.figures[name]:,.0f}" for run in runs)) for name in runs[0].load.figures
    ]
    yield _table(("", *(LABELS.get(run.target, run.target) for run in runs)), rows)


def _checks(report: Report) -> str:
    rows = []
    for (scenario, target), runs in groups(report).items():
        answers: dict[str, int] = {}
        checked: dict[str, int] = {}
        for run in runs:
            for counts, more in ((answers, run.load.all_answers), (checked, run.load.checked)):
                for name, count in more.items():
                    counts[name] = counts.get(name, 0) + count
        bad = ", ".join(sorted({wrong(run) for run in runs if run.load.failed or run.load.lost}))
        rows.append(
            (f"{scenario}, {LABELS.get(target, target)}", _counts(answers), _counts(checked), bad or "none wrong")
        )
    return _table(("", "answers", "checks", ""), rows, "words")


def _counts(counts: dict[str, int]) -> str:
    return "; ".join(f"{name}: {count:,}" for name, count in sorted(counts.items()))


def _audits(report: Report) -> str:
    rows = [
        (audit.database, str(audit.checks), _mark("; ".join(audit.violations) or "none", not audit.violations))
        for audit in report.audits
    ]
    return _table(("database", "invariants", "violations"), rows, "words")


class _Safe(str):
    """Text that is HTML already."""


def _mark(text: str, is_good: bool) -> str:
    return _Safe(f'<span class="{"good" if is_good else "bad"}">{_text(text)}</span>')


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    head = "".join(f'<th scope="col">{_text(heading)}</th>' for heading in headings)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _words(pairs: dict[str, str]) -> str:
    return _table(("", ""), list(pairs.items()), "words") if pairs else ""


def _list(kind: str, sentences: Sequence[str]) -> str:
    if not sentences:
        return ""
    return f'<ul class="{kind}">{"".join(f"<li>{_text(sentence)}</li>" for sentence in sentences)}</ul>'


def _text(text: str) -> str:
    return text if isinstance(text, _Safe) else escaping.escape(text)
