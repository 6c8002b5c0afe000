"""The engine without its front end: reserves per second on one hot drop, durable, beside the same without a database.

Callers ask the registry directly, and again as soon as they are answered, without a task or a socket of their own:
mailbox, decision, batch, commit and answer are what is measured. The second figure runs on a ledger that says yes to
everything: what the engine itself costs. PostgreSQL runs with fsync on and shares the machine's cores.

    python -m tests.bench.engine [--callers 256] [--drops 1] [--rounds 5] [--seconds 2] [--answer-us 5]
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import trio
from rich.console import Console
from rich.table import Table

from api.ids import IdSource
from engine.clock import Clock
from engine.ledger import Batch, Ledger, Resolution
from engine.model import (
    Create,
    DropCreated,
    DropId,
    DropRecord,
    DropStatus,
    Outcome,
    ReservationId,
    Reserve,
    Reserved,
    Terms,
    UserId,
)
from engine.publisher import Publisher
from engine.registry import Registry, running
from persistence import migrate
from persistence.embedded import running as postgres_running
from persistence.ledger import open_ledger

STOCK = 100_000_000
HOLD_MS = 60_000


class Round(msgspec.Struct, frozen=True):
    per_s: float
    cpu_us: float  # of this process, a reserve
    events_per_commit: float


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--callers", type=int, default=256)
    options.add_argument("--drops", type=int, default=1)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--seconds", type=float, default=2.0)
    options.add_argument("--answer-us", type=float, default=0.0, help="what each answer costs; a send is about 5")
    asked = options.parse_args()
    temporary = tempfile.TemporaryDirectory(prefix="holdfast-bench-")
    with temporary as directory, postgres_running(Path(directory)) as postgres:
        migrate.upgrade(postgres.dsn)
        rounds = [trio.run(_both, postgres.dsn, asked) for _ in range(asked.rounds)]
    _report(asked, rounds)


async def _both(dsn: str, asked: argparse.Namespace) -> dict[str, Round]:
    async with open_ledger(dsn) as ledger:
        durable = await _round(ledger, asked)
    return {"durable": durable, "yes": await _round(YesLedger(), asked)}


class YesLedger:
    """Keeps nothing and answers at once: stands for the smallest cost that a ledger could have."""

    async def take_over(self, drop_ids: Sequence[DropId] | None) -> list[DropRecord]:
        return []

    async def reclaim(self, drop_id: DropId, epoch: int) -> DropRecord | None:
        return None

    async def commit(self, batch: Batch) -> frozenset[DropId]:
        await trio.lowlevel.checkpoint()
        return frozenset(change.drop_id for change in batch)

    async def resolve(self, batch: Batch) -> dict[DropId, Resolution]:
        return {}


async def _round(ledger: Ledger, asked: argparse.Namespace) -> Round:
    clock = Clock()
    async with running(ledger, clock, Publisher()) as registry:
        drops = [await _new_drop(registry, clock) for _ in range(asked.drops)]
        ids = IdSource(clock.now)
        answer_s = asked.answer_us / 1e6
        done = 0
        is_over = False

        def caller(drop_id: DropId) -> Callable[[], None]:
            def ask() -> None:
                command = Reserve(UserId(ids.new()), ReservationId(ids.new()), HOLD_MS)
                registry.ask(drop_id, command, answered)

            def answered(outcome: Outcome) -> None:
                nonlocal done
                assert isinstance(outcome, Reserved), outcome
                done += 1
                if answer_s:
                    until = time.perf_counter() + answer_s
                    while time.perf_counter() < until:
                        pass
                if not is_over:
                    ask()

            return ask

        began, cpu = time.perf_counter(), time.process_time()
        batches = registry.statistics().committer.batches
        for number in range(asked.callers):
            caller(drops[number % len(drops)])()
        await trio.sleep(asked.seconds)
        is_over = True
        counted = done
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        batches = registry.statistics().committer.batches - batches
        await registry.quiet()
        return Round(counted / seconds, cpu / counted * 1e6, counted / batches)


async def _new_drop(registry: Registry, clock: Clock) -> DropId:
    drop_id = DropId(str(uuid.uuid4()))
    terms = Terms(drop_id, "Bench", 1, "USD", STOCK, None, None, None, clock.now())
    outcome = await registry.wait_for(lambda reply: registry.create(Create(terms, DropStatus.LIVE), reply))
    assert isinstance(outcome, DropCreated), outcome
    return drop_id


def _report(asked: argparse.Namespace, rounds: list[dict[str, Round]]) -> None:
    title = f"{asked.callers} callers, {asked.drops} drops, {asked.rounds} alternating rounds of {asked.seconds:g} s"
    table = Table(title=f"{title}, medians")
    for heading in ("ledger", "reserves per s", "our CPU µs each", "reserves per commit"):
        table.add_column(heading, justify="left" if heading == "ledger" else "right")
    for name, label in (("durable", "PostgreSQL, fsync on"), ("yes", "one that says yes")):
        runs = [one[name] for one in rounds]
        medians = [statistics.median(getattr(run, field) for run in runs) for field in Round.__struct_fields__]
        table.add_row(label, f"{medians[0]:,.0f}", f"{medians[1]:.1f}", f"{medians[2]:.0f}")
    console = Console(width=100)
    console.print(table)
    ratios = [one["durable"].per_s / one["yes"].per_s for one in rounds]
    console.print(f"durable / yes: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")
    console.print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")


if __name__ == "__main__":
    main()
