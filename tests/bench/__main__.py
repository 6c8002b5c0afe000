"""`make bench`: measure Holdfast before a launch, beside a baseline on the same PostgreSQL; or any server, by its URL.

    python -m tests.bench                                   all scenarios, five alternating rounds, with the baseline
    python -m tests.bench hot soldout --rounds 3 --no-baseline
    python -m tests.bench viewers --viewers 200,4000 --no-rivals
    python -m tests.bench --url https://staging.example --users ids.txt hot rate --rate 500

Without `--url` it starts a PostgreSQL of its own (fsync on), `holdfast serve`, the two baselines and, for viewers, two
other servers of WebSockets, each in processes of their own, and audits the databases at the end. With `--url` it uses
HTTP only, and leaves viewers out unless their scenarios are named. Exits with 1 when an answer was wrong or missing, or
an invariant is broken; a promised figure that was missed is said, and is no failure.
"""

import argparse
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Final

import msgspec
import psycopg
from psycopg import sql

from persistence import audit, migrate
from persistence.embedded import EmbeddedServer, forget_pg_variables, running
from tests.bench import audience, goals, report, targets
from tests.bench.generator import raise_descriptor_limit
from tests.bench.job import Users
from tests.bench.results import FORMAT, Audit, Report, Run
from tests.bench.scenarios import BASELINE_SCENARIOS, LEAD_S, SCENARIOS, Options, Stage, is_up
from tests.bench.screen import Screen
from tests.bench.targets import BASELINE_PYTHON, Target, Unusable

ROOT: Final = Path(__file__).parents[2]
WRONG: Final = 1
UNUSABLE: Final = 2
SHORT_HOLD_S: Final = 2
VIEWERS_ALONE: Final = ("viewers", "wire", "stalled")  # run on servers of their own
VIEWERS_NOTES: Final = (
    "Viewers: one process is all of them, and asks for the updates, so that one clock times both. In `viewers` each"
    " server is asked by an HTTP POST of the same size, and tells all a text of the same length. Holdfast's times"
    ' include a reserve and its durable commit, its rivals\' only the making of the text; "first to last ms" leaves'
    " that out. Its server's CPU includes all but PostgreSQL's.",
    "In `watched` the viewers' sockets are emptied twice a second, so that they take little of the cores from the"
    " server; figures say what share they took.",
)
OTHERS_CORES_MAX: Final = 0.15  # of CPU that went elsewhere: our own display and the kernel's threads take 0.05 or so


def main(arguments: Sequence[str] | None = None) -> int:
    asked = _parser().parse_args(arguments)
    options = Options(
        scenarios=tuple(
            asked.scenario or [name for name in SCENARIOS if not (asked.url and name in audience.FAMILIES)]
        ),
        rounds=asked.rounds,
        seconds=asked.seconds,
        connections=asked.connections,
        processes=asked.processes,
        rate=asked.rate,
        arrivals=asked.arrivals,
        connections_max=asked.connections_max,
        buyers=asked.buyers,
        patience_s=asked.patience,
        users_max=asked.users_max,
        seed=asked.seed,
        viewers=asked.viewers,
    )
    raise_descriptor_limit()  # of the servers too, which are our children
    bench = Bench(options, asked)
    try:
        bench.run()
    except Unusable as fault:
        if not bench.has_begun:
            print(fault, file=sys.stderr)
            return UNUSABLE
        bench.problems.append(str(fault))
    except KeyboardInterrupt:
        bench.problems.append("Interrupted: the rounds that are missing were not run.")
    return bench.finish()


class Bench:
    """One call of the command: what it starts, what it collects, what it writes at the end."""

    def __init__(self, options: Options, asked: argparse.Namespace) -> None:
        self.options = options
        self.asked = asked
        self.screen = Screen()
        self.began_at = datetime.now(UTC)
        self.has_begun = False
        self.runs: list[Run] = []
        self.audits: list[Audit] = []
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.versions = {"python": platform.python_version()}
        self.stage = Stage(options, Users(uuid.uuid4().hex[:20], asked.users), self.screen)

    def run(self) -> None:
        if self.asked.url:
            self._run_at_url()
        else:
            self._run_here()

    # --- our own servers -----------------------------------------------------------------------------

    def _run_here(self) -> None:
        forget_pg_variables()
        with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as name, running(Path(name)) as postgres:
            directory = Path(name)
            migrate.upgrade(postgres.dsn)
            self.versions |= {"holdfast": version("holdfast"), "trio": version("trio")}
            self.versions["postgresql"] = _ask_postgres(postgres.dsn, "SHOW server_version")
            targets.introduce(postgres.dsn, self.stage.users, 0, self.options.users_max)
            (maker,) = self.stage.users.ids(0, 1)
            if set(self.options.scenarios) - {"journey", *VIEWERS_ALONE}:
                self._together_here(postgres, directory, maker)
            if set(VIEWERS_ALONE) & set(self.options.scenarios):
                self._viewers_here(postgres, directory)
            if "journey" in self.options.scenarios:
                self._journey_here(postgres, directory)

    def _together_here(self, postgres: EmbeddedServer, directory: Path, maker: str) -> None:
        """What one Holdfast and the baselines are asked in turns."""
        with ExitStack() as stack:
            opened = [
                stack.enter_context(targets.holdfast(postgres.dsn, postgres.pid, directory / "holdfast.log", maker))
            ]
            if self.asked.baseline and set(self.options.scenarios) & set(BASELINE_SCENARIOS):
                self.versions |= _baseline_versions()
                opened += [
                    stack.enter_context(
                        targets.baseline(
                            mode, postgres.dsn, postgres.pid, directory / f"{mode}.log", self.asked.baseline_pool
                        )
                    )
                    for mode in ("classic", "cte")
                ]
            self._say_conditions(len(opened) > 1)
            self._rounds(opened, postgres)
            self._audit(postgres.dsn, "holdfast")

    def _say_conditions(self, has_baseline: bool) -> None:
        self.notes += [
            "Everything shares one machine's cores: the server under test, PostgreSQL (fsync on) and the load. Servers"
            " whose turn it is not are up, and idle. A CHECKPOINT comes before each round.",
            "Each request is another user's. Holdfast has all of them in its table, and knows them by name but in"
            " strangers; the baselines look nobody up. Its holds last a day here, so that none runs out in another's"
            " turn (in journey 2 s).",
        ]
        if has_baseline:
            self.notes.append(
                f"The baselines have {self.asked.baseline_pool} connections to PostgreSQL each; baseline.py says what"
                " other numbers gave, and --baseline-pool tries another."
            )

    def _viewers_here(self, postgres: EmbeddedServer, directory: Path) -> None:
        """Each run on a server of its own, so that its memory is its viewers'; on a database of their own."""
        rivals, versions, notes = audience.rivals() if self.asked.rivals else ({}, {}, [])
        _ask_postgres(postgres.dsn, "CREATE DATABASE viewers")
        dsn = postgres.dsn_of("viewers")
        migrate.upgrade(dsn)
        targets.introduce(dsn, self.stage.users, 0, audience.USERS)
        (maker,) = self.stage.users.ids(0, 1)

        def holdfast(directory: Path) -> AbstractContextManager[Target]:
            return targets.holdfast(dsn, postgres.pid, directory / "viewers.log", maker)

        plan = []
        for family in (name for name in VIEWERS_ALONE if name in self.options.scenarios):
            opened = {"holdfast": holdfast, **(rivals if family == "viewers" else {})}
            for scenario in audience.expanded(family, self.options.viewers):
                plan += [(scenario, name, opening) for name, opening in opened.items()]
        if rivals and "viewers" in self.options.scenarios:
            self.versions |= versions
        self.notes += [*notes, *VIEWERS_NOTES]
        self.has_begun = True
        with self.screen.showing(len(plan) * self.options.rounds):
            for number in range(1, self.options.rounds + 1):
                _ask_postgres(postgres.dsn, "CHECKPOINT")
                for scenario, name, opening in plan:
                    self.screen.begin(f"round {number}: {scenario}, {name}", self.options.seconds + 0.5)
                    with opening(directory) as target:
                        self.runs.append(self.stage.measure(scenario, target, number))
        self._audit(dsn, "viewers")

    def _journey_here(self, postgres: EmbeddedServer, directory: Path) -> None:
        """With holds that run out while one looks, so on a server and a database of its own."""
        self.has_begun = True
        _ask_postgres(postgres.dsn, "CREATE DATABASE journey")
        dsn = postgres.dsn_of("journey")
        migrate.upgrade(dsn)
        targets.introduce(dsn, self.stage.users, 0, self.options.buyers)
        (maker,) = self.stage.users.ids(0, 1)
        log = directory / "journey.log"
        with targets.holdfast(dsn, postgres.pid, log, maker, SHORT_HOLD_S) as target:
            self._journey(target)
        self._audit(dsn, "journey")

    def _journey(self, target: Target) -> None:
        with self.screen.showing(1):
            self.screen.begin(f"journey, {target.name}", LEAD_S + self.options.patience_s)
            self.runs.append(self.stage.measure("journey", target, 1))

    def _rounds(self, opened: list[Target], postgres: EmbeddedServer | None) -> None:
        self.has_begun = True
        elsewhere = ("journey", *(VIEWERS_ALONE if postgres is not None else ()))
        families = [name for name in SCENARIOS if name in self.options.scenarios and name not in elsewhere]
        wanted = [name for family in families for name in self._expanded(family)]
        plan = [
            (scenario, target)
            for scenario in wanted
            for target in opened
            if target.name not in ("classic", "cte") or scenario in BASELINE_SCENARIOS
        ]
        with self.screen.showing(len(plan) * self.options.rounds):
            if wanted:
                for target in reversed(opened):  # Holdfast's is the pool that stays
                    self.stage.familiarise(target)
            for number in range(1, self.options.rounds + 1):
                if postgres is not None:
                    # So that no checkpoint, with its full page images, falls into the turn of one target alone.
                    _ask_postgres(postgres.dsn, "CHECKPOINT")
                for scenario, target in plan:
                    self.screen.begin(f"round {number}: {scenario}, {target.name}", self.options.seconds + 0.5)
                    self.runs.append(self.stage.measure(scenario, target, number))

    def _expanded(self, family: str) -> list[str]:
        return audience.expanded(family, self.options.viewers) if family in audience.FAMILIES else [family]

    def _audit(self, dsn: str, name: str) -> None:
        results = audit.run(dsn)
        broken = [f"{one.check.name}: {one.count} ({one.check.title})" for one in results if not one.holds]
        self.audits.append(Audit(name, len(results), broken))

    # --- somebody's server ---------------------------------------------------------------------------

    def _run_at_url(self) -> None:
        target = targets.at_url(self.asked.url)
        is_up(target)
        (target.maker,) = self.stage.users.ids(0, 1)
        if self.asked.users:
            with Path(self.asked.users).open() as file:
                self.options.users_max = min(self.options.users_max, sum(1 for _ in file))
            self.options.scenarios = tuple(name for name in self.options.scenarios if name != "strangers")
        self._rounds([target], None)
        if "journey" in self.options.scenarios:
            self._journey(target)
        if self.asked.database_url:
            self._audit(self.asked.database_url, "the server's")

    # --- the end -------------------------------------------------------------------------------------

    def finish(self) -> int:
        """Write the report, show it, and say in the exit code whether every answer was right."""
        self._collect_problems()
        written = Report(
            format=FORMAT,
            began_at=self.began_at.isoformat(timespec="seconds").replace("+00:00", "Z"),
            command=shlex.join(["python", "-m", "tests.bench", *sys.argv[1:]]),
            machine=_machine(),
            versions=self.versions,
            settings=self._settings(),
            notes=self.notes,
            runs=self.runs,
            goals=goals.of(self.runs),
            audits=self.audits,
            problems=self.problems,
        )
        directory = Path(self.asked.report)
        directory.mkdir(parents=True, exist_ok=True)
        json_path, html_path = directory / "results.json", directory / "report.html"
        json_path.write_bytes(msgspec.json.format(msgspec.json.encode(written)))
        self.screen.summary(written)
        html_path.write_text(report.html(written))
        if self.asked.picture:
            report.picture(written, Path(self.asked.picture))
        self.screen.say(f"{json_path}\n{html_path}")
        for problem in self.problems:
            print(problem, file=sys.stderr)
        return WRONG if self.problems else 0

    def _collect_problems(self) -> None:
        for run in self.runs:
            what = f"Round {run.round}, {run.scenario} on {run.target}"
            if run.load.failed:
                shown = "; ".join(run.load.failures[:3])
                self.problems.append(f"{what}: {run.load.failed} answers are wrong or missing: {shown}.")
            if run.load.ran_out and not run.load.answers:
                self.problems.append(
                    f"{what}: all requests were used up in the warm-up. Give it more with --users-max."
                )
            elif run.load.ran_out and run.scenario != "noop":
                self.notes.append(f"{what}: ended after {run.load.seconds:.1f} s, when its requests were used up.")
        others = [run.others_cores for run in self.runs if run.others_cores is not None]
        if others and statistics.median(others) > OTHERS_CORES_MAX:
            self.notes.append(
                f"Other processes used {statistics.median(others):.1f} cores in the median while this was measured. Do"
                " not quote these figures: what takes turns between processes, as the baselines do, suffers more."
            )
        for one in self.audits:
            if one.violations:
                self.problems.append(f"The audit of {one.database} found violations: {'; '.join(one.violations)}.")

    def _settings(self) -> dict[str, str]:
        shown = {name: str(value) for name, value in vars(self.options).items() if name != "scenarios"}
        return {"scenarios": " ".join(self.options.scenarios), **shown, "baseline_pool": str(self.asked.baseline_pool)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("scenario", nargs="*", choices=[*SCENARIOS, []], help="default: all of them")
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds; medians are reported")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of each run's counted window")
    parser.add_argument("--connections", type=int, default=64, help="keep-alive connections")
    parser.add_argument("--processes", type=int, default=1, help="load generators that share the connections")
    parser.add_argument("--rate", type=float, help="of the scenario rate, per s; default: half of hot's peak")
    parser.add_argument("--arrivals", choices=("poisson", "constant"), default="poisson")
    parser.add_argument("--connections-max", type=int, default=512, help="that the scenario rate may use")
    parser.add_argument("--buyers", type=int, default=2_000, help="of the scenario journey")
    parser.add_argument("--patience", type=float, default=6.0, help="s for which they look for a unit")
    parser.add_argument("--users-max", type=int, default=150_000, help="different users that a run may use")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--viewers", type=_counts, default="200,1000,4000", help="of the scenarios about them")
    parser.add_argument("--rivals", action=argparse.BooleanOptionalAction, default=True, help="beside `viewers`")
    parser.add_argument("--baseline", action=argparse.BooleanOptionalAction, default=True, help="FastAPI beside it")
    parser.add_argument("--baseline-pool", type=int, default=5, help="its connections to PostgreSQL")
    parser.add_argument("--report", default=str(ROOT / ".bench"), help="directory of results.json and report.html")
    parser.add_argument("--picture", help="write a summary as PNG, too")
    parser.add_argument("--url", help="measure this server instead; it must be live, and is written to")
    parser.add_argument("--users", help="with --url: a file of user ids, one a line; without it they are made up")
    parser.add_argument("--database-url", help="with --url: audit this database at the end")
    return parser


def _counts(text: str) -> tuple[int, ...]:
    counts = tuple(int(one) for one in text.split(","))
    if min(counts) < 1:
        raise ValueError
    return counts


def _ask_postgres(dsn: str, statement: str) -> str:
    with psycopg.connect(dsn, autocommit=True) as connection:
        cursor = connection.execute(sql.SQL(statement))
        row = cursor.fetchone() if cursor.description else None
    return str(row[0]) if row else ""


def _baseline_versions() -> dict[str, str]:
    names = ("fastapi", "uvicorn", "uvloop", "httptools", "asyncpg", "pydantic")
    if not BASELINE_PYTHON.exists():
        return {}
    program = f"from importlib.metadata import version as v; print(*(v(name) for name in {names!r}))"
    said = subprocess.run([BASELINE_PYTHON, "-c", program], capture_output=True, text=True, check=True).stdout
    return dict(zip(names, said.split(), strict=True))


def _machine() -> dict[str, str]:
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {"system": f"{platform.system()} {platform.machine()}", "processor": model, "cores": str(os.cpu_count())}


if __name__ == "__main__":
    sys.exit(main())
