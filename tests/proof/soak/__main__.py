"""`make soak`: three times what the server can do, and what it leaves behind; then an hour of an honest day's work.

    python -m tests.proof.soak                                 ten minutes of overload, an hour of soak; about 80 min
    python -m tests.proof.soak --overload 1m --soak 5m         the same, shorter
    python -m tests.proof.soak --overload 0 --soak 30s --fault memory    a server that leaks: this must end with 1

PostgreSQL (fsync on), the server and the crowd are processes of this machine, and share its cores: run nothing beside
it. The report is in `.soak`. Exit code: 0 if everything that was promised holds, 1 if not, 2 if it could not be seen.
"""

import argparse
import re
import resource
import shlex
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Final

from persistence.embedded import EmbeddedServer, forget_pg_variables, running
from tests.bench.__main__ import _machine as machine
from tests.bench.generator import raise_descriptor_limit
from tests.bench.job import Users
from tests.bench.targets import Unusable
from tests.proof.soak import growth, judgement, parts, report
from tests.proof.soak.growth import Growth
from tests.proof.soak.judgement import Verdict
from tests.proof.soak.parts import Part, Peak
from tests.proof.soak.report import Report
from tests.proof.soak.server import FAULTS
from tests.proof.soak.stage import Options, Stage, audited, stage

ROOT: Final = Path(__file__).parents[3]
BROKEN: Final = 1
UNUSABLE: Final = 2
DESCRIPTORS_KEPT: Final = 1_000  # beside one for each person who is there
OTHERS_CORES_MAX: Final = 0.15


class Run:
    """One call of the command: what it does, in order, and what it collects."""

    def __init__(self, options: Options, directory: Path) -> None:
        """The report, and the log of a server that had something to say, go into `directory`."""
        self.options = options
        self.directory = directory
        self.users = Users(uuid.uuid4().hex[:20])
        self.began = time.monotonic()
        self.peaks: dict[str, Peak] = {}
        self.parts: list[Part] = []
        self.growth: list[Growth] = []
        self.verdicts: list[Verdict] = []
        self.problems: list[str] = []
        self.notes: list[str] = []

    def run(self) -> None:
        forget_pg_variables()
        with tempfile.TemporaryDirectory(prefix="holdfast-soak-") as name, running(Path(name)) as postgres:
            directory = Path(name)
            if self.options.overload_s:
                self._overload(postgres, directory)
            if self.options.soak_s:
                self._soak(postgres, directory)
            if self.options.is_growth_measured:
                self.say("what grows by design")
                self.growth = growth.measured(postgres, directory, self.users, self.say)

    def _overload(self, postgres: EmbeddedServer, directory: Path) -> None:
        with stage(postgres, "overload", directory, self.users, self.options, self.say) as on:
            parts.acquaint(on)
            peak = self.peaks["before the overload"] = parts.peak_of(on)
            self._take(parts.overload(on, peak))
            # Not judged: the machine, too, is not what it was. It tells the two apart.
            self.peaks["after the overload"] = parts.peak_of(on, (peak.at_once,), 1)
            on.rest()
        self._settle(on)

    def _soak(self, postgres: EmbeddedServer, directory: Path) -> None:
        """On a server of its own: pages that a stampede once needed would hide an hour's leak."""
        with stage(postgres, "soak", directory, self.users, self.options, self.say) as on:
            parts.acquaint(on)
            known = self.peaks.get("before the overload")
            if known is None:
                known = self.peaks["before the soak"] = parts.peak_of(on)
            self._take(parts.soak(on, known))
            on.rest()
        self._settle(on)

    def _take(self, part: Part) -> None:
        self.parts.append(part)
        self.verdicts += part.verdicts
        others = part.figures["others_cores"]
        if others > OTHERS_CORES_MAX:
            self.notes.append(f"Others used {others:.1f} cores during the {part.name}: do not quote its figures.")

    def _settle(self, on: Stage) -> None:
        """What the log and the tables say, once the server has gone."""
        name = on.target.name
        complaints = on.complaints()
        told = ", ".join(f"{times:,} × {what}" for what, times in complaints.most_common(5)) or "none"
        if complaints:
            self.directory.mkdir(parents=True, exist_ok=True)
            shutil.copy(on.log_path, self.directory / on.log_path.name)
        self.say(f"audit of {name}")
        assert on.target.dsn is not None
        violations, checks = audited(on.target.dsn)
        self.verdicts += [
            Verdict(f"warnings and errors in the log of {name}", "none", told, not complaints),
            *judgement.of_tables(on.purchases(), on.seens, on.active(), violations, checks),
        ]

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:6.0f} s] {text}", flush=True)

    def report(self) -> Report:
        options = vars(self.options)
        return Report(
            format=report.FORMAT,
            began_at=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            seconds=time.monotonic() - self.began,
            command=shlex.join(["python", "-m", "tests.proof.soak", *sys.argv[1:]]),
            machine=machine() | {"python": sys.version.split()[0], "holdfast": version("holdfast")},
            settings={name: str(value) for name, value in options.items()},
            notes=self.notes,
            peaks=self.peaks,
            parts=self.parts,
            growth=self.growth,
            verdicts=self.verdicts,
            problems=self.problems,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    asked = _parser().parse_args(arguments)
    options = Options(
        overload_s=asked.overload,
        soak_s=asked.soak,
        connections=asked.connections,
        people=asked.people,
        viewers=asked.viewers,
        seed=asked.seed,
        fault=asked.fault or "",
        is_growth_measured=asked.growth,
    )
    raise_descriptor_limit()  # of the processes that we start, too
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if most < options.connections + DESCRIPTORS_KEPT:
        needed = options.connections + DESCRIPTORS_KEPT
        print(f"{options.connections} connections need {needed} descriptors, and a process may have {most}: ulimit -n")
        return UNUSABLE
    run = Run(options, Path(asked.report))
    code = 0
    try:
        run.run()
    except Unusable as fault:
        run.problems.append(str(fault))
        code = UNUSABLE
    except KeyboardInterrupt:
        run.problems.append("Interrupted: what is missing was not seen.")
        code = UNUSABLE
    written = run.report()
    for verdict in written.verdicts:
        print(f"{'holds ' if verdict.holds else 'BROKEN'}  {verdict.name}: {verdict.seen}   ({verdict.promised})")
    for problem in written.problems:
        print(problem, file=sys.stderr)
    for path in report.write(written, run.directory):
        print(path)
    return code or (0 if written.holds else BROKEN)


def seconds(text: str) -> float:
    """Of `90`, `90s`, `10m`, `1.5h`."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smh]?)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 90s, 10m or 1h")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.proof.soak", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--overload", type=seconds, default="10m", help="how long; 0: not at all")
    parser.add_argument("--soak", type=seconds, default="1h", help="how long; 0: not at all")
    parser.add_argument("--connections", type=int, default=Options.connections, help="people who are there at once")
    parser.add_argument("--people", type=int, default=Options.people, help="who come again and again")
    parser.add_argument("--viewers", type=int, default=Options.viewers, help="of the most wanted drop")
    parser.add_argument("--growth", action=argparse.BooleanOptionalAction, default=True, help="what grows by design")
    parser.add_argument("--fault", choices=sorted(FAULTS), help="plant this one: it must be seen")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", default=str(ROOT / ".soak"), help="directory of soak.json and soak.md")
    return parser


if __name__ == "__main__":
    sys.exit(main())
