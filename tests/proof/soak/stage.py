"""Where a part happens: a database and a server of its own, its drops and viewers, and everybody who looks on."""

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
import psycopg
from psycopg import sql

from persistence import audit, migrate
from persistence.embedded import EmbeddedServer
from tests.bench import audience, targets
from tests.bench.job import Server as Address
from tests.bench.job import Users
from tests.bench.targets import LONG_HOLD_S, Target, Unusable
from tests.proof.soak import people
from tests.proof.soak import server as window
from tests.proof.soak.cast import THINKING_MAX_S, Cast
from tests.proof.soak.people import Job, Second, Seen
from tests.proof.soak.probe import Probe
from tests.proof.soak.sampling import Sampler
from tests.server import Server

# Longer than anybody thinks and waits, so that a buyer is hardly ever too late; short, so that the number of those who
# forgot is stationary soon.
HOLD_S: Final = 6
STOCK: Final = 100_000_000  # of a drop that is never sold out
SCARCE_STOCK: Final = 8
DROPS: Final = 24
SCARCE_DROPS: Final = 4
PROBES: Final = 200
CONNECTIONS_MAX: Final = 16_000  # of the server; people may be as many, less the viewers and those who look on
MAKER: Final = 0
FIRST_PERSON: Final = 1 + PROBES
SETTLE_S: Final = 15.0  # for what is due when the last hold has run out
SAY_EVERY: Final = 10  # s between two lines about a crowd

assert people.PATIENCE_S["reserve"] + THINKING_MAX_S < HOLD_S

Say = Callable[[str], None]


@dataclass
class Options:
    """What the command line chose; units in the names."""

    overload_s: float = 600.0
    soak_s: float = 3600.0
    connections: int = 8_000
    people: int = 60_000
    viewers: int = 200
    seed: int = 1
    fault: str = ""
    is_growth_measured: bool = True


class Observed(Server):
    """`tests.proof.soak.server`."""

    def command(self) -> list[str]:
        return [sys.executable, "-m", window.__name__, "serve"]


@dataclass
class Stage:
    options: Options
    target: Target
    cast: Cast
    sampler: Sampler
    probe: Probe
    say: Say
    log_path: Path
    seens: list[Seen] = field(default_factory=list)
    next_person: int = 0

    def crowd(
        self, title: str, seconds: float, *, warm_up_s: float, rate: float | None = None, at_once: int = 0
    ) -> Seen:
        """Have people come, for so long; what they saw."""
        connections = self.options.connections if rate else min(self.options.connections, 4 * at_once + 1_000)
        job = Job(
            server=self.target.server,
            cast=self.cast,
            first_person=self.next_person,
            connections=connections,
            seconds=seconds,
            warm_up_s=warm_up_s,
            rate=rate,
            at_once=at_once,
            watched=self.target.watched,
            seed=self.options.seed + len(self.seens),
        )
        seen = _performed(job, lambda second: self._tell(title, seconds, second))
        self.next_person = seen.next_person
        self.seens.append(seen)
        return seen

    def rest(self) -> None:
        """Until every hold has run out."""
        time.sleep(HOLD_S)
        give_up_at = time.monotonic() + SETTLE_S
        while self.active() and time.monotonic() < give_up_at:
            time.sleep(0.1)

    def active(self) -> int:
        """Reservations that are active in the tables, the probe's one aside."""
        query = "SELECT count(*) FROM reservations WHERE status = 'active' AND drop_id = ANY(%s)"
        return self._count(query, [[*self.cast.drops, *self.cast.scarce]])

    def purchases(self) -> int:
        return self._count("SELECT count(*) FROM purchases", [])

    def complaints(self) -> Counter[str]:
        """What the server's log says, and how often: there is nothing to warn of, however many people come."""
        return Counter(_event_of(line) for line in self.log_path.read_text(errors="replace").splitlines())

    def _count(self, query: str, values: list[object]) -> int:
        assert self.target.dsn is not None
        with psycopg.connect(self.target.dsn) as connection:
            row = connection.execute(query.encode(), values).fetchone()
        assert row is not None
        return int(row[0])

    def _tell(self, title: str, seconds: float, second: Second) -> None:
        if round(second.at_s) % SAY_EVERY:
            return
        sample = self.sampler.samples[-1] if self.sampler.samples else None
        rss = f"{sample.rss_bytes / 2**20:.1f} MiB, {sample.descriptors:,} descriptors" if sample else ""
        changes = sum(second.in_time.get(name, 0) for name in ("reserve 201", "purchase 201", "cancel 200"))
        self.say(
            f"{title} {second.at_s:,.0f}/{seconds:,.0f} s: {second.came:,} came, {second.turned_away:,} turned away,"
            f" {changes:,} changes, {sum(second.gave_up.values()):,} gave up; {rss}"
        )


@contextmanager
def stage(
    postgres: EmbeddedServer, name: str, directory: Path, users: Users, options: Options, say: Say
) -> Iterator[Stage]:
    """Everything there, and idle."""
    dsn = new_database(postgres, name)
    targets.introduce(dsn, users, 0, FIRST_PERSON + options.people)
    with observed(postgres, dsn, directory, name, users, HOLD_S, options.fault) as (target, statistics_at):
        drops = tuple(target.new_drop(STOCK) for _ in range(DROPS))
        scarce = tuple(target.new_drop(SCARCE_STOCK) for _ in range(SCARCE_DROPS))
        cast = Cast(
            users=users,
            first_user=FIRST_PERSON,
            people=options.people,
            drops=drops,
            scarce=scarce,
            seed=options.seed,
        )
        sampler = Sampler(target.watched["server"], statistics_at, target.server, drops[0])
        probe = Probe(target.server, target.new_drop(STOCK), users.ids(1, PROBES))
        with ExitStack() as stack:
            if options.viewers:
                stack.enter_context(audience.draining(target, drops[0], users, options.viewers))
            stack.enter_context(sampler.looking())
            stack.enter_context(probe.touching())
            yield Stage(options, target, cast, sampler, probe, say, directory / f"{name}.log")


@contextmanager
def observed(
    postgres: EmbeddedServer,
    dsn: str,
    directory: Path,
    name: str,
    users: Users,
    hold_s: int = LONG_HOLD_S,
    fault: str = "",
) -> Iterator[tuple[Target, Path]]:
    """A server with a window, and where the window is.

    It lets no more connections in than its descriptors allow, so that it has nothing to warn of at its start.
    """
    statistics_at = directory / f"{name}.sock"
    settings = {
        "LOG_LEVEL": "WARNING",
        "RESERVATION_TTL_SECONDS": str(hold_s),
        "ALLOW_UNSAFE_DURABILITY": "false",
        "CONNECTIONS_MAX": str(CONNECTIONS_MAX),
        "SOAK_STATISTICS": str(statistics_at),
        "SOAK_FAULT": fault,
    }
    server = Observed(dsn, directory / f"{name}.log", None, **settings)
    try:
        server.start()
        watched = {"server": server.process.pid, "postgres": postgres.pid}
        (maker,) = users.ids(MAKER, 1)
        yield Target(name, Address("127.0.0.1", server.port), watched, dsn, maker), statistics_at
    finally:
        server.stop()


def new_database(postgres: EmbeddedServer, name: str) -> str:
    with psycopg.connect(postgres.dsn, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    dsn = postgres.dsn_of(name)
    migrate.upgrade(dsn)
    return dsn


def audited(dsn: str) -> tuple[list[str], int]:
    """Sentences about what is violated, and how many checks there are."""
    results = audit.run(dsn)
    return [f"{one.check.name}: {one.count} ({one.check.title})" for one in results if not one.holds], len(results)


def _event_of(line: str) -> str:
    try:
        told = json.loads(line)
        return " ".join(str(told[name]) for name in ("level", "event", "code") if name in told)
    except (ValueError, TypeError):
        return line[:100]


def _performed(job: Job, hear: Callable[[Second], None]) -> Seen:
    """
    Raises:
        Unusable: the crowd broke off.
    """
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-m", people.__name__], stdin=pipe, stdout=pipe, stderr=pipe)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    errors: list[bytes] = []
    reader = threading.Thread(target=lambda: errors.append(process.stderr.read() if process.stderr else b""))
    reader.start()
    seen = None
    try:
        process.stdin.write(msgspec.json.encode(job))
        process.stdin.close()
        for line in process.stdout:
            if line.startswith(b'{"second":'):
                hear(msgspec.json.decode(line[10:-2], type=Second))
            elif line.startswith(b'{"seen":'):
                seen = msgspec.json.decode(line[8:-2], type=Seen)
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stdout.close()
        process.stderr.close()
    if seen is None:
        raise Unusable(f"The crowd broke off: {b''.join(errors).decode(errors='replace')[-2000:]}")
    return seen
