"""The committed statement by itself: what a reservation costs us to encode, and PostgreSQL to write.

One writer, one batch after the other, straight into the ledger, without engine and front end. All columns but the last
are for one event: CPU of `persistence.encoding`; our whole CPU for the commit, encoding and libpq included; CPU of the
backend that runs the statement (its own clock, read from outside; the median commit, so that neither a WAL segment that
is made just then nor a neighbour on the machine counts); WAL written. The last is from call to answer, for the batch.

PostgreSQL is the embedded one with fsync on, and shares the machine's cores. Users are random, as they come. A third of
a mixed batch takes holds, a third buys those of batches before, a third gives them back.

    python -m tests.bench.statement [--rounds 5] [--events 8192] [--commits-max 400]
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psycopg
import trio
from rich.console import Console
from rich.table import Table

from engine.ledger import Batch
from engine.model import Hold, UserId
from persistence import migrate
from persistence.embedded import running as postgres_running
from persistence.encoding import encode
from persistence.ledger import PostgresLedger, open_ledger
from tests.persistence.scribe import Scribe

STOCK = 100_000_000


class Shape(msgspec.Struct, frozen=True):
    events: int  # a batch
    drops: int
    is_mixed: bool = False

    @property
    def label(self) -> str:
        return f"{self.events} {'mixed' if self.is_mixed else 'reserves'}, {self.drops} drop{'s'[: self.drops > 1]}"


SHAPES = (
    *(Shape(events, 1) for events in (1, 8, 64, 256, 512)),
    Shape(256, 256),
    Shape(256, 1, is_mixed=True),
    Shape(256, 256, is_mixed=True),
)


class Round(msgspec.Struct, frozen=True):
    encode_us: float
    ours_us: float
    backend_us: float
    wal_bytes: float
    commit_ms: float


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--events", type=int, default=8192, help="of each shape and round")
    options.add_argument("--commits-max", type=int, default=400, help="of each shape and round")
    asked = options.parse_args()
    temporary = tempfile.TemporaryDirectory(prefix="holdfast-bench-")
    with temporary as directory, postgres_running(Path(directory)) as postgres:
        migrate.upgrade(postgres.dsn)
        rounds = trio.run(_rounds, postgres.dsn, asked)
    _report(asked, rounds)


async def _rounds(dsn: str, asked: argparse.Namespace) -> list[dict[Shape, Round]]:
    rounds = []
    with psycopg.connect(dsn, autocommit=True) as observer:
        async with open_ledger(dsn) as ledger:
            for _ in range(asked.rounds + 1):
                rounds.append({shape: await _round(ledger, observer, shape, asked) for shape in SHAPES})
    return rounds[1:]  # the first one filled caches


async def _round(
    ledger: PostgresLedger, observer: psycopg.Connection, shape: Shape, asked: argparse.Namespace
) -> Round:
    scribes = [Scribe(STOCK) for _ in range(shape.drops)]
    await ledger.commit([scribe.birth() for scribe in scribes])
    commits = min(asked.commits_max, max(1, asked.events // shape.events))
    source = _batches(shape, scribes)
    await ledger.commit(next(source))  # the holds that the first mixed batch ends
    batches = [next(source) for _ in range(commits)]
    events = sum(len(change.events) for batch in batches for change in batch)

    began = time.thread_time()
    for batch in batches:
        encode(batch)
    encoded = time.thread_time() - began

    backend, theirs = _backend_clock(ledger), []
    wal, ours, began = _wal(observer), time.thread_time(), time.perf_counter()
    for batch in batches:
        theirs.append(-backend())
        assert len(await ledger.commit(batch)) == shape.drops
        theirs[-1] += backend()
    seconds, ours, wal = time.perf_counter() - began, time.thread_time() - ours, _wal(observer) - wal
    return Round(
        encode_us=encoded / events * 1e6,
        ours_us=ours / events * 1e6,
        backend_us=statistics.median(theirs) / shape.events * 1e6,
        wal_bytes=wal / events,
        commit_ms=seconds / commits * 1e3,
    )


def _batches(shape: Shape, scribes: list[Scribe]) -> Iterator[Batch]:
    each = shape.events // shape.drops
    held: dict[Scribe, list[Hold]] = {scribe: [] for scribe in scribes}
    ms = 0
    while True:
        ms += 5
        for number, scribe in enumerate(scribes):
            for event in range(each):
                kind = (number + event) % 3 if shape.is_mixed and held[scribe] else 0
                match kind:
                    case 0:
                        held[scribe].append(scribe.reserves(UserId(str(uuid.uuid4())), ms=ms))
                    case 1:
                        scribe.purchases(held[scribe].pop(0), ms=ms)
                    case _:
                        scribe.cancels(held[scribe].pop(0), ms=ms)
        yield [scribe.change() for scribe in scribes]


def _backend_clock(ledger: PostgresLedger) -> Callable[[], float]:
    """CPU seconds of the writer's backend. The clock of another process is named by its pid, as clock_getcpuclockid(3)
    does: nanoseconds, where /proc has ticks of 10 ms."""
    assert ledger._writer is not None
    assert ledger._writer.backend is not None
    clock = ~ledger._writer.backend.pid << 3 | 2
    return lambda: time.clock_gettime(clock)


def _wal(observer: psycopg.Connection) -> int:
    row = observer.execute("SELECT pg_current_wal_lsn() - '0/0'::pg_lsn").fetchone()
    assert row is not None
    return int(row[0])


def _report(asked: argparse.Namespace, rounds: list[dict[Shape, Round]]) -> None:
    table = Table(title=f"An event, medians of {asked.rounds} rounds")
    table.add_column("a batch of")
    for heading in ("encode µs", "all our CPU µs", "backend µs", "WAL bytes", "a commit ms"):
        table.add_column(heading, justify="right")
    for shape in SHAPES:
        runs = [one[shape] for one in rounds]
        medians = [statistics.median(getattr(run, field) for run in runs) for field in Round.__struct_fields__]
        table.add_row(shape.label, *(f"{n:.1f}" for n in medians[:3]), f"{medians[3]:,.0f}", f"{medians[4]:.2f}")
    console = Console(width=100)
    console.print(table)
    console.print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")


if __name__ == "__main__":
    main()
