"""Every fault by name. Each is done to a `World` under load, and returns when it is over: from then on it must serve.

When and how long is chance, drawn from the campaign's seed.
"""

import os
import random
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import httpx
import psycopg
import trio

from tests.proof.conftest import Postgres, wait_for
from tests.proof.faults.crowd import Crowd
from tests.proof.faults.tally import Sort
from tests.proof.proxy import Fault, Proxy
from tests.server import START_S, Server

DELAY_S: Final = (0.02, 0.3)  # least and most
STRUCK_S: Final = 10.0  # a crowd commits many times a second
OVER_S: Final = 10.0
FORCED_S: Final = 40.0  # two starts of an engine, on a machine that has other things to do


class NotServed(Exception):
    """Changes are not served any more, where they must be (I18)."""


@dataclass
class World:
    """What faults are done to: one PostgreSQL, the engines on one database of it, and their crowd."""

    postgres: Postgres
    dsn: str  # of the database, past every proxy
    engines: list[Server]
    crowd: Crowd
    rng: random.Random
    proxy: Proxy | None = None
    stopped: int = 0  # engines that were told to stop, and did with exit code 0
    notes: list[str] = field(default_factory=list)  # what went wrong beside the history

    async def query(self, statement: str, *parameters: object) -> list[tuple[object, ...]]:
        def ask() -> list[tuple[object, ...]]:
            with psycopg.connect(self.dsn, autocommit=True) as connection:
                return connection.execute(statement.encode(), parameters).fetchall()

        return await trio.to_thread.run_sync(ask)

    async def pause(self, least_s: float, most_s: float) -> None:
        await trio.sleep(self.rng.uniform(least_s, most_s))


@dataclass(frozen=True)
class Trouble:
    sort: Sort
    name: str
    strike: Callable[[World], Awaitable[None]]


# The database -------------------------------------------------------------------------------------------

OURS: Final = "datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"


async def terminate(world: World) -> None:
    """The writer's session is ended by an operator."""
    for pid in await _writers(world):
        await world.query("SELECT pg_terminate_backend(%s)", pid)


async def terminate_all(world: World) -> None:
    """Every session is, the one that holds the engine's lock too."""
    await world.query(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {OURS}")


async def kill_backend(world: World) -> None:
    """The writer's process dies; so the postmaster ends all others and recovers."""
    for pid in await _writers(world):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


async def freeze_backend(world: World) -> None:
    """The writer's process stands still: past the stall in most cases, past the time limit in many."""
    await _freeze(world, await _writers(world), world.rng.uniform(0.05, 1.2))


async def freeze_postmaster(world: World) -> None:
    """Nobody opens connections any more, just when the engine needs a new one."""
    pid = world.postgres.server.pid
    writers = await _writers(world)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        for writer in writers:
            with suppress(ProcessLookupError):
                os.kill(writer, signal.SIGTERM)
    try:
        await world.pause(0.05, 0.8)
    finally:
        os.kill(pid, signal.SIGCONT)


async def stop_immediately(world: World) -> None:
    """As `pg_ctl restart -m immediate`: nothing is finished, all is recovered."""
    await trio.to_thread.run_sync(world.postgres.stop_immediately)
    await world.pause(0, 0.2)
    await trio.to_thread.run_sync(world.postgres.start)


async def kill_postmaster(world: World) -> None:
    """It dies; its children notice, and it is started again."""
    await trio.to_thread.run_sync(world.postgres.kill)
    await trio.to_thread.run_sync(world.postgres.start)


async def _writers(world: World) -> list[int]:
    """The writers' sessions; there is at least one, or there will be soon."""
    where = f"{OURS} AND application_name = 'holdfast writer'"
    with trio.move_on_after(STRUCK_S):
        while not (found := await world.query(f"SELECT pid FROM pg_stat_activity WHERE {where}")):
            await trio.sleep(0.02)
        return [int(str(pid)) for (pid,) in found]
    raise NotServed(f"no writer has a session within {STRUCK_S} s")


async def _freeze(world: World, pids: Sequence[int], seconds: float) -> None:
    try:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        await trio.sleep(seconds)
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


# Its commits --------------------------------------------------------------------------------------------


async def cut(fault: Fault, world: World, delay_s: tuple[float, float] = DELAY_S) -> None:
    """What the proxy's `Fault` says befalls the next commit; where that is late, so late."""
    assert world.proxy is not None, "a cut needs a proxy"
    strike = world.proxy.strike(fault, delay_s=world.rng.uniform(*delay_s), share=world.rng.random())
    if not await trio.to_thread.run_sync(strike.struck.wait, STRUCK_S):
        raise NotServed(f"no commit came by for {fault.name} within {STRUCK_S} s")
    if not await trio.to_thread.run_sync(strike.over.wait, OVER_S):
        raise NotServed(f"{fault.name} did not end within {OVER_S} s")


# The engine ---------------------------------------------------------------------------------------------


async def kill(world: World) -> None:
    """SIGKILL, and a new one."""
    engine = world.rng.choice(world.engines)
    await trio.to_thread.run_sync(engine.kill)
    await _start(engine)


async def freeze(world: World) -> None:
    """The engine stands still, and goes on."""
    engine = world.rng.choice(world.engines)
    engine.signal(signal.SIGSTOP)
    try:
        await world.pause(0.05, 1.2)
    finally:
        engine.signal(signal.SIGCONT)


async def stop(world: World) -> None:
    """SIGTERM, and a new one once it has ended by itself."""
    engine = world.rng.choice(world.engines)
    code = await trio.to_thread.run_sync(engine.stop)
    if code != 0:
        world.notes.append(f"an engine that was told to stop ended with {code}")
    world.stopped += 1
    await _start(engine)


async def usurp(world: World) -> None:
    """One of two engines is killed, and started again although the other holds the lock: it takes every drop over."""
    engine = next((engine for engine in world.engines if not engine.is_started), world.rng.choice(world.engines))
    if engine.is_started:
        await trio.to_thread.run_sync(engine.kill)
    await _start(engine)

    def force() -> None:
        def is_in() -> bool:
            with psycopg.connect(world.dsn, autocommit=True) as connection:
                connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted"
                )
            with suppress(httpx.TransportError):
                return httpx.get(engine.url + "/readyz").status_code == 200
            if engine.process.poll() is not None:  # it waited for the lock for long enough
                engine.start(until="")
            return False

        wait_for(is_in, timeout_s=FORCED_S, poll_s=0.08)

    await trio.to_thread.run_sync(force)


async def _start(engine: Server) -> None:
    """Returns once it listens: until then Python starts, and from then on it recovers."""
    await trio.to_thread.run_sync(partial(engine.start, until=""))
    with trio.move_on_after(START_S):
        while True:
            try:
                stream = await trio.open_tcp_stream("127.0.0.1", engine.port)
            except OSError:
                await trio.sleep(0.02)
            else:
                await stream.aclose()
                return
    raise NotServed(f"an engine does not listen {START_S} s after its start:\n{engine.log()[-3000:]}")


# By name ------------------------------------------------------------------------------------------------

DATABASE: Final[Mapping[Callable[[World], Awaitable[None]], int]] = {
    terminate: 12,
    terminate_all: 5,
    freeze_backend: 7,
    kill_backend: 6,
    freeze_postmaster: 4,
    stop_immediately: 4,
    kill_postmaster: 3,
}
"""How often each comes, of all."""

CUTS: Final[Mapping[Fault, int]] = {
    Fault.CUT_BEFORE: 14,
    Fault.CUT_AFTER: 16,
    Fault.RESET_BEFORE: 10,
    Fault.RESET_AFTER: 12,
    Fault.MID_BATCH: 14,
    Fault.MID_ANSWER: 12,
    Fault.LATE: 8,
    Fault.UNENDED: 6,
    Fault.LATE_END: 6,
    Fault.SILENT_BEFORE: 3,
    Fault.SILENT_AFTER: 3,
}

DELAYS: Final[Mapping[Fault, int]] = {Fault.FROZEN: 5, Fault.DELAYED: 3, Fault.SLICED: 1}

ENGINE: Final[Mapping[Callable[[World], Awaitable[None]], int]] = {kill: 20, freeze: 4, stop: 3}


def database_troubles(count: int, rng: random.Random) -> list[Trouble]:
    troubles = [Trouble(Sort.DATABASE, act.__name__, act) for act in DATABASE]
    return drawn(troubles, list(DATABASE.values()), count, rng)


def cuts(count: int, rng: random.Random) -> list[Trouble]:
    """So many COMMITs cut, and others held up, in proportion."""
    mixed: list[Trouble] = []
    for sort, weights in ((Sort.CUT, CUTS), (Sort.DELAY, DELAYS)):
        troubles = [Trouble(sort, fault.name, partial(cut, fault)) for fault in weights]
        share = -(-count * sum(weights.values()) // sum(CUTS.values()))
        mixed += drawn(troubles, list(weights.values()), share, rng)
    rng.shuffle(mixed)
    return mixed


def engine_troubles(kills: int, rng: random.Random) -> list[Trouble]:
    """So many kills, and the others in proportion."""
    total = -(-kills * sum(ENGINE.values()) // ENGINE[kill])
    killed = [Trouble(Sort.ENGINE, "kill", kill)] * kills
    others = [Trouble(Sort.ENGINE, act.__name__, act) for act in (freeze, stop)]
    rest = drawn(others, [ENGINE[freeze], ENGINE[stop]], total - kills, rng)
    mixed = killed + rest
    rng.shuffle(mixed)
    return mixed


def drawn(troubles: Sequence[Trouble], weights: Sequence[int], count: int, rng: random.Random) -> list[Trouble]:
    """`count` of them in their proportions, in any order; each at least once if there is room."""
    total = sum(weights)
    found = [
        trouble
        for trouble, weight in zip(troubles, weights, strict=True)
        for _ in range(max(1, weight * count // total))
    ]
    rng.shuffle(found)
    found = found[:count]
    found += rng.choices(troubles, weights, k=count - len(found))
    return found
