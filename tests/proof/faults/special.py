"""Faults that need a place of their own: a disk that fills up, a torn network, a clock that is set, two engines."""

from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import psycopg
import trio

from tests.proof import checks
from tests.proof.conftest import Postgres, until
from tests.proof.faults import places
from tests.proof.faults.campaign import campaign, world
from tests.proof.faults.tally import Sort, Tally
from tests.proof.faults.troubles import Trouble, World, kill, usurp
from tests.proof.proxy import Proxy

DATA_MB: Final = 64
WAL_MB: Final = 96  # six segments of 16 MB
FULL_MAX_S: Final = 30.0  # until somebody notices that it is full
STEPS_S: Final = (3600.0, -3600.0, 40 * 86_400.0, -5.0, 0.0)


async def full_disk(postgres: Postgres, at: Path, seed: int, tally: Tally, *, times: int = 2) -> None:
    """Tables on a disk that is full now and then: nothing new fits in, and what is there goes on."""
    with ExitStack() as stack:
        disk = stack.enter_context(places.small_disk(at / "disk", megabytes=DATA_MB))
        tablespace = stack.enter_context(places.tablespace_on(postgres, disk))
        found = stack.enter_context(world(postgres, at, seed, tablespace=tablespace))

        async def fill(world: World) -> None:
            ballast, heard = disk / "ballast", len(world.crowd.recorder.operations)
            try:
                await trio.to_thread.run_sync(places.fill, ballast)
                with trio.fail_after(FULL_MAX_S):
                    while not any(
                        operation.code == "STORAGE_FULL" for operation in world.crowd.recorder.operations[heard:]
                    ):
                        await trio.sleep(0.02)
                    await world.pause(0.2, 1.0)
            finally:
                places.remove(ballast)

        await campaign(found, [Trouble(Sort.DATABASE, "disk_full", fill)] * times, seed=seed, tally=tally)


async def full_wal(postgres: Postgres, at: Path, seed: int, tally: Tally, *, times: int = 1) -> None:
    """The WAL's disk is full: the server panics, and may not come up before there is room."""
    with places.small_disk(at / "disk", megabytes=WAL_MB) as disk:
        own = Postgres(at / "postgres", min_wal_size="32MB", max_wal_size="48MB")
        own.start()
        try:
            own.make_template()
            own.stop()
            places.move_wal(own, disk)
            own.start()
            with world(own, at, seed) as found:
                trouble = Trouble(Sort.DATABASE, "wal_full", partial(_fill_wal, disk / "ballast"))
                await campaign(found, [trouble] * times, seed=seed, tally=tally)
        finally:
            own.stop()


async def _fill_wal(ballast: Path, world: World) -> None:
    before = _panics(world.postgres)

    def is_noticed() -> bool:
        places.fill(ballast)  # what a checkpoint gave back, too
        with suppress(psycopg.OperationalError), psycopg.connect(world.dsn, autocommit=True) as connection:
            # A segment has room for seconds of load; the next one has none.
            connection.execute("SELECT pg_switch_wal()")
        return not world.postgres.is_running or _panics(world.postgres) > before

    try:
        await until(is_noticed, timeout_s=FULL_MAX_S)
        await world.pause(0.1, 0.5)
    finally:
        places.remove(ballast)
    # It gives up where even its recovery finds no room; somebody starts it again.
    with trio.move_on_after(0.5):
        while world.postgres.is_running:
            await trio.sleep(0.02)
    if not world.postgres.is_running:
        await trio.to_thread.run_sync(world.postgres.stop)
        await trio.to_thread.run_sync(world.postgres.start)


def _panics(postgres: Postgres) -> int:
    return postgres.server.log_path.read_text(errors="replace").count("PANIC:")


async def partition(postgres: Postgres, at: Path, seed: int, tally: Tally, *, times: int = 3) -> None:
    """The cable between the engine and the database is cut: packets are lost, and nobody is told."""
    with (
        places.network() as network,
        Proxy(postgres.port, network.listen) as proxy,
        world(postgres, at, seed, proxy=proxy) as found,
    ):

        async def tear(world: World) -> None:
            await trio.to_thread.run_sync(network.cut)
            try:
                await world.pause(0.2, 1.5)
            finally:
                await trio.to_thread.run_sync(network.mend)

        await campaign(found, [Trouble(Sort.DATABASE, "partition", tear)] * times, seed=seed, tally=tally)


async def clock_steps(postgres: Postgres, at: Path, seed: int, tally: Tally, *, times: int = 5) -> None:
    """The engine's wall clock is set, forward and back, while it runs; and then it is killed and starts by that."""
    clock = places.WallClock(at / "clock")
    with world(postgres, at, seed, settings={"ALLOW_CLOCK_SKEW": "true", **clock.environment}) as found:

        async def step(world: World) -> None:
            clock.set(world.rng.choice(STEPS_S))
            await world.pause(0.1, 0.4)

        async def step_and_kill(world: World) -> None:
            # Not by much: an engine never runs behind what it has decided once, and the holds wait for that.
            clock.set(world.rng.choice((-30.0, -2.0, 0.0, 1.0)))
            killed = world.engines[0].process.pid
            await kill(world)
            clock.forget(killed)

        steps = [Trouble(Sort.CLOCK, "clock_step", step)] * times
        troubles = [*steps, Trouble(Sort.CLOCK, "clock_step_and_kill", step_and_kill)]
        await campaign(found, troubles, seed=seed, tally=tally, is_clock_true=False)
        last = found.engines[0].process.pid
    clock.forget(last)


async def two_engines(postgres: Postgres, at: Path, seed: int, tally: Tally, *, times: int = 3) -> None:
    """Two engines serve one database, by force: they take drops from each other, all at once and one by one."""
    with world(postgres, at, seed, engines=2) as found:
        troubles = [Trouble(Sort.ENGINE, "usurp", usurp)] * times
        await campaign(found, troubles, seed=seed, tally=tally, is_contested=True, pause_s=(0.3, 0.6))
        epochs = checks.number(
            found.dsn,
            "SELECT max(n) FROM (SELECT count(DISTINCT epoch) AS n FROM drop_events GROUP BY drop_id) AS of_drop",
        )
        if epochs < 2:
            tally.convict(["no drop had two owners: the engines did not contest anything"])


@dataclass(frozen=True)
class Place:
    """`faults` is how many of the database's it adds."""

    name: str
    faults: int
    act: Callable[[Postgres, Path, int, Tally], Awaitable[None]]


ALL: Final = (
    Place("full disk", 2, full_disk),
    Place("full WAL", 1, full_wal),
    Place("partition", 3, partition),
    Place("clock steps", 0, clock_steps),
    Place("two engines", 0, two_engines),
)
