"""Run the long set, or some of it, and write the report.

python -m tests.proof.prove [--seeds N | --minutes M] [--sitting] [--only simulation,faults] [--report-only]
"""

import argparse
import random
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Final

from tests.proof.canaries.flock import FLOCK
from tests.proof.prove import checkout, document, parts, report
from tests.proof.prove.crew import Crew
from tests.proof.prove.figures import SETS, Figures
from tests.proof.prove.parts import FUZZERS, SIMULATION, WEIGHTS, Simulation, Turn, Wanted
from tests.proof.prove.report import Report
from tests.proof.prove.screen import Screen
from tests.proof.prove.sittings import Counted, InUse, Shelf, Sitting, counted, next_seed
from tests.proof.simulation import corpus

FOLDER: Final = checkout.ROOT / ".proof"
FIRST_MAX: Final = 10**9  # of a first sitting, whose seeds are drawn
KEEP_EACH_S: Final = 10.0  # so much is lost at the most when it is killed, beside the piece under way
GOOD, VIOLATED, BROKEN = 0, 1, 2  # exit codes
ENDLESS: Final = float("inf")


class Stop:
    """Asked for by Ctrl-C, or by SIGTERM; asked for twice, it is not waited for."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self.is_asked = False

    @contextmanager
    def heard(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.is_asked:
            raise KeyboardInterrupt
        self.is_asked = True
        self._screen.say("stopping: what was done is kept; once more to break off")


def main(arguments: Sequence[str]) -> int:
    parser = _parser()
    asked = parser.parse_args(arguments)
    screen = Screen()
    source = checkout.here()
    try:
        commits = frozenset([source.commit]) | (checkout.since(asked.since) if asked.since else frozenset())
    except checkout.NoSuchCommit as why:
        parser.error(str(why))
    shelf = Shelf(asked.folder)
    try:
        with shelf.held():
            if not asked.report_only:
                sit(asked, arguments, shelf, screen, source, commits)
            return conclude(asked, shelf, screen, commits)
    except InUse as why:
        print(why, file=sys.stderr)
        return BROKEN


def sit(
    asked: argparse.Namespace,
    arguments: Sequence[str],
    shelf: Shelf,
    screen: Screen,
    source: checkout.Checkout,
    commits: frozenset[str],
) -> None:
    """One sitting, which is on the shelf in the end, however it ends."""
    earlier = shelf.sittings()
    first = asked.first if asked.first is not None else next_seed(earlier)
    sitting = Sitting(
        began_at=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        commit=source.commit,
        is_dirty=source.is_dirty,
        machine=checkout.machine(),
        command=shlex.join(["python", "-m", "tests.proof.prove", *arguments]),
        first=random.randrange(FIRST_MAX) if first is None else first,
    )
    sitting.end = sitting.first
    stop = Stop(screen)
    try:
        with stop.heard():
            _run(asked, sitting, shelf, screen, stop, wanted_of(asked, counted(earlier, commits)))
        sitting.is_whole = not stop.is_asked
    finally:
        shelf.finish(sitting)


def wanted_of(asked: argparse.Namespace, done: Counted) -> Wanted:
    """How much this sitting is to do: as much as is asked for, or the set, or with --sitting what it still lacks."""
    goals = SETS[asked.set]
    before = done.figures if asked.sitting else Figures()
    is_endless = asked.minutes is not None and not asked.sitting

    def amount(named: int | None, goal: float, reached: float) -> float:
        if named is not None:
            return named
        return ENDLESS if is_endless else max(0.0, goal - reached)

    is_counted = asked.seeds is None
    return Wanted(
        seeds=amount(asked.seeds, goals.seeds, before.simulated.seeds),
        operations=amount(None, goals.operations, before.operations) if is_counted else 0.0,
        hours=amount(None, goals.hours, before.simulated.hours) if is_counted else 0.0,
        faults=amount(asked.faults, goals.faults, before.struck.database),
        cuts=amount(asked.cuts, goals.cuts, before.struck.cuts),
        kills=amount(asked.kills, goals.kills, before.struck.kills),
        cases={name: amount(asked.cases, goals.cases, before.fuzzed.cases.get(name, 0)) for name in FUZZERS},
        canaries=[name for name in FLOCK if not (name in before.canaries and before.canaries[name].is_caught)],
        schemathesis_s=goals.schemathesis_s if before.tried.longest_s < goals.schemathesis_s else 0.0,
    )


def _run(asked: argparse.Namespace, sitting: Sitting, shelf: Shelf, screen: Screen, stop: Stop, wanted: Wanted) -> None:
    began = time.monotonic()
    until = ENDLESS if asked.minutes is None else began + 60 * asked.minutes
    kept_at = began

    def note_failing(seed: int, told: str) -> None:
        path = note(shelf.folder, seed, told)
        screen.say(f"seed {seed} is noted in {path}")

    crew = Crew(asked.jobs)
    simulation = Simulation(crew, sitting.first, note_failing=note_failing)

    def keep() -> None:
        nonlocal kept_at
        sitting.seconds, sitting.end = time.monotonic() - began, simulation.end
        if time.monotonic() >= kept_at + KEEP_EACH_S:
            kept_at = time.monotonic()
            shelf.keep(sitting)

    runs: dict[str, Callable[[Turn, Wanted], None]] = {
        parts.CANARIES: parts.canaries,
        parts.SCHEMATHESIS: parts.schemathesis,
        parts.FUZZ: parts.fuzz,
        parts.FAULTS: parts.faults,
        SIMULATION: simulation.run,
    }
    plan = [part for part in WEIGHTS if part in asked.only]
    try:
        with crew, screen.showing(plan):
            for number, part in enumerate(plan):
                if stop.is_asked:
                    break
                share = WEIGHTS[part] / sum(WEIGHTS[one] for one in plan[number:])
                now = time.monotonic()
                part_until = now + max(0.0, until - now) * share
                screen.begin(part)
                turn = Turn(sitting.figures, screen, until=part_until, is_stopped=lambda: stop.is_asked, keep=keep)
                runs[part](turn, wanted)
                screen.end("stopped" if stop.is_asked else "done")
    finally:
        keep()


def conclude(asked: argparse.Namespace, shelf: Shelf, screen: Screen, commits: frozenset[str]) -> int:
    """Write the report on all that counts, show its summary, and say how it stands in the exit code."""
    done = counted(shelf.sittings(), commits)
    told = Report(
        set_name=asked.set, goals=SETS[asked.set], canaries=list(FLOCK), commits=sorted(commits), counted=done
    )
    written = report.write(told, shelf.folder)
    blocks: list[document.Block] = [report.summary(told), report.verdict(told)]
    screen.say("the sum of what counts:\n" + document.markdown(report.TITLE, blocks).partition("\n\n")[2])
    screen.say("\n".join(map(str, written)))
    if done.figures.violation_count:
        return VIOLATED
    return BROKEN if done.figures.problems else GOOD


def note(folder: Path, seed: int, told: str) -> Path:
    """Write a seed down that found something, as the corpus would have it."""
    path = folder / "failing-seeds.txt"
    if not path.exists():
        path.write_text(
            "# Seeds that found something. Once the cause is known, keep the seed, with the reason in a few words:\n"
            f'#     echo "<seed> <why>" >> {corpus.FILE.relative_to(checkout.ROOT)}\n'
            "# or all of them, as they are:\n"
            f"#     grep -v '^#' {path} >> {corpus.FILE.relative_to(checkout.ROOT)}\n"
        )
    kept = {line.split()[0] for line in path.read_text().splitlines() if line and not line.startswith("#")}
    if str(seed) not in kept:
        why = " ".join(told.replace("#", "").split())[:WHY_MAX]
        with path.open("a") as file:
            file.write(f"{seed} {why}\n")
    return path


WHY_MAX: Final = 120  # characters


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m tests.proof.prove", description="The long set, and the report on it.")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--seeds", type=int, help="simulate so many (as many as the set's figures ask for)")
    amount.add_argument("--minutes", type=float, help="share so much time between the parts instead")
    parser.add_argument("--first", type=int, help="the first seed (the one after all that were run; or a random one)")
    parser.add_argument("--jobs", type=int, default=2, help="processes that simulate (2)")
    parser.add_argument("--only", type=_parts, default=tuple(WEIGHTS), help=f"of {','.join(WEIGHTS)}")
    parser.add_argument("--sitting", action="store_true", help="do what the counted sittings still lack")
    parser.add_argument("--since", metavar="COMMIT", help="count sittings of this commit and later ones, too")
    parser.add_argument("--report-only", action="store_true", help="run nothing, write the report")
    parser.add_argument("--set", choices=list(SETS), default="long", help="whose figures are to be reached (long)")
    parser.add_argument("--faults", type=int, help="so many of the database (the set's)")
    parser.add_argument("--cuts", type=int, help="so many COMMITs (the set's)")
    parser.add_argument("--kills", type=int, help="so many engines (the set's)")
    parser.add_argument("--cases", type=int, help="so many of each fuzzer (the set's)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where sittings and reports are (.proof)")
    return parser


def _parts(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= set(WEIGHTS):
        raise argparse.ArgumentTypeError(f"parts are {', '.join(WEIGHTS)}")
    return names


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
