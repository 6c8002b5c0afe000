"""The composition root: opens everything in nesting order, and is the only module that sees all of it.

    front end          answers from the first moment on: `/healthz`, and 503 to the rest until the engine is up
      storage          the embedded PostgreSQL or one of the user's own, checks, migrations, the ledger, reads
        engine         committer around registry around actors and timer
          gate open    until SIGTERM: then the door closes, what was asked is answered, the last batch committed

The front end opens first, since a process that waits for its database must say so; it is drained first, too.
"""

import ctypes
import gc
import math
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TypeVar

import msgspec
import structlog
import trio

from api.app import create_app
from api.auth import Authenticator, UserDirectory
from api.front import CertificateUnusable, Front, PortTaken, listen
from api.handlers import Gate, Service
from api.idempotency import KeyBook
from api.ids import IdSource
from api.promises import Errands
from api.settings import AuthMode, Settings
from engine.clock import Clock
from engine.hub import Hub
from engine.ledger import Unavailable
from engine.model import Instant
from engine.publisher import Publisher
from engine.registry import running
from persistence import schema
from persistence.embedded import EmbeddedPostgres, EmbeddedServer, forget_pg_variables
from persistence.installation import EmbeddedServerError
from persistence.ledger import LedgerOptions, PostgresLedger, open_ledger
from persistence.pool import Pool
from persistence.reads import Reads
from persistence.startup import CLOCK_SKEW_MAX_S, StartRefused

log = structlog.get_logger()

T = TypeVar("T")

RETRY_S = 0.2  # between two looks at a database that is not there yet
PATIENCE_S = 0.9  # that a read waits for a connection: then it is 503, within a second
# At the end, for answers to leave and for requests whose body is still on its way; a peer that does not read, or does
# not send, is not waited for longer.
LEAVE_S = 0.5
PRUNE_S = 3600.0  # between two clean-outs of old idempotency keys
WATCH_S = 0.2  # between two looks at the embedded server's process
MS_PER_HOUR = 3_600_000
GC_THRESHOLDS = (50_000, 20, 10)
CLOCK_LOOK_S = 60.0  # between two looks at how far the engine's clock is from the machine's
TRIM_S = 60.0  # between two times that memory which nobody uses goes back to the system

OPERATOR_ERRORS = (PortTaken, CertificateUnusable, StartRefused, EmbeddedServerError, schema.SchemaOutdated)


def main(settings: Settings) -> int:
    """Serve until SIGTERM or Ctrl-C; the process's exit code.

    Raises:
        One of OPERATOR_ERRORS: one sentence for the operator.
    """
    try:
        return trio.run(_serve, settings)
    except BaseExceptionGroup as group:
        told = _told_operator(group)
        if told is None:
            raise
        raise told from None


class Storage(msgspec.Struct, frozen=True):
    """The two ways to the database: the one that writes, and the pool that reads."""

    ledger: PostgresLedger
    reads: Reads


async def _serve(settings: Settings) -> int:
    listening = listen(settings.host, settings.port)
    gate = Gate()
    front = Front(create_app(settings, gate), settings, gate)
    for name in settings.ignored:
        log.warning("setting_without_effect", name=name, reason="deadlines are exact, not polled")
    async with trio.open_nursery() as nursery, front.open(listening):
        port = listening[0].getsockname()[1]
        scheme = "http" if settings.tls_certfile is None else "https"
        log.info("listening", url=f"{scheme}://{settings.host}:{port}", env=settings.app_env)
        stop = trio.Event()
        with trio.CancelScope() as starting:
            await nursery.start(_stop_on_signal, stop, gate, starting)
            async with _storage(settings) as storage, _engine(settings, storage) as service:
                # A full collection over all that start has made stops the loop for 50 to 70 ms, and with it every
                # expiry that is due; without it for 4 ms (tests/proof/test_exactness).
                gc.collect()
                gc.freeze()
                # A request leaves no cycle behind, so a collection finds nothing: 500,000 reserves made 2,611 of them
                # with the usual thresholds, the longest of 10 ms, and one of 0.04 ms with these. Nor does a viewer
                # (tests/contract/test_leaving).
                gc.set_threshold(*GC_THRESHOLDS)
                nursery.start_soon(trim)
                nursery.start_soon(watch_clock, service.registry.clock)
                gate.service = service
                log.info("ready", drops=service.registry.statistics().drops)
                await stop.wait()
                await _drain(settings, gate, front, service)
        nursery.cancel_scope.cancel()
    log.info("stopped")
    return 0


async def watch_clock(clock: Clock, wall: Callable[[], float] = time.time) -> None:
    """Say it where the engine's clock is not the machine's, now and then, for ever.

    It follows no step of the machine's clock, and starts no earlier than what it decided last: after a start with a
    clock that was wrong it stays ahead, so drops go on sale too early by as much. Holds last their time all the same.
    """
    while True:
        ahead_s = clock.ahead_s(wall)
        if abs(ahead_s) > CLOCK_SKEW_MAX_S:
            log.error("clock_off", ahead_s=round(ahead_s, 3))
        await trio.sleep(CLOCK_LOOK_S)


async def trim() -> None:
    """Give back what glibc keeps free, every now and then, for ever.

    By itself it does so at the end of its heap only, where something small is always in use: what a crowd needed would
    stay with the server when it has gone, and with every burst there would be a little more of it. It takes 0.4 ms
    where 4 MiB of 90 go back, 2 ms where all do.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other systems' have none
    while malloc_trim is not None:
        await trio.sleep(TRIM_S)
        malloc_trim(0)


async def _stop_on_signal(
    stop: trio.Event, gate: Gate, starting: trio.CancelScope, task_status: trio.TaskStatus[None]
) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for number in signals:
            log.info("stopping", signal=signal.Signals(number).name)
            break
    # A second one ends us at once, wherever we are; the ledger is as safe as after any crash.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    stop.set()
    if gate.service is None:
        starting.cancel()


async def _drain(settings: Settings, gate: Gate, front: Front, service: Service) -> None:
    """No new requests; those that were taken are answered; the last batch is committed."""
    gate.is_stopping = True
    front.close_door()
    with trio.move_on_after(max(0.0, settings.shutdown_timeout_ms / 1000 - LEAVE_S)):
        await service.registry.quiet()
    await front.drain(LEAVE_S)
    with trio.move_on_after(LEAVE_S):
        await service.registry.drain()


@asynccontextmanager
async def _engine(settings: Settings, storage: Storage) -> AsyncIterator[Service]:
    reads = storage.reads
    clock = Clock(not_before=await _patiently(storage.ledger.newest_instant))
    may_create = not settings.is_production or settings.auth_mode is AuthMode.JWT
    users = UserDirectory(lambda strangers: reads.introduce(strangers, create=may_create, at=clock.now()))
    keep_ms = settings.idempotency_keep_hours * MS_PER_HOUR
    publisher = Publisher()
    async with AsyncExitStack() as engine:
        registry = await _patiently(
            lambda: engine.enter_async_context(running(storage.ledger, clock, publisher, settings.limits))
        )
        nursery = await engine.enter_async_context(trio.open_nursery())
        hub = Hub(registry.board, lambda drop_id, seq, most: reads.history(drop_id, after_seq=seq, limit=most))
        publisher.subscribe(hub)
        nursery.start_soon(hub.run)
        errands = Errands(nursery)
        # Every row that there is, and for as long as one can be: a key that the book does not know while its row stands
        # would be taken for a new one, and its row's key would reject the part that brings it. What an engine before
        # this one has written is all there by now: since we took its drops over, it writes no more.
        keys = KeyBook(lambda *key: errands.run(lambda: reads.find_receipt(*key)), keep_ms / 1000 + 2 * PRUNE_S)
        await _patiently(lambda: reads.tell_keys(keys.learn))
        nursery.start_soon(users.run)
        nursery.start_soon(_prune_keys, reads, clock, keep_ms)
        yield Service(
            settings=settings,
            registry=registry,
            reads=reads,
            users=users,
            auth=Authenticator(settings, users),
            keys=keys,
            ids=IdSource(clock.now),
            errands=errands,
            hub=hub,
            started_at=trio.current_time(),
        )
        nursery.cancel_scope.cancel()


async def _prune_keys(reads: Reads, clock: Clock, keep_ms: int) -> None:
    while True:
        try:
            await reads.prune(Instant(clock.now() - keep_ms))
        except Unavailable as fault:
            log.warning("prune_failed", reason=str(fault))
        except Exception:
            log.exception("prune_failed")
        await trio.sleep(PRUNE_S)


# Storage ----------------------------------------------------------------------------------------------


@asynccontextmanager
async def _storage(settings: Settings) -> AsyncIterator[Storage]:
    if settings.allow_unsafe_durability and settings.is_production:
        log.warning("unsafe_durability_allowed", reason="a crash of the database may lose what was acknowledged")
    options = LedgerOptions(
        commit_timeout_s=settings.commit_timeout_ms / 1000,
        clock_skew_max_s=math.inf if settings.allow_clock_skew else CLOCK_SKEW_MAX_S,
        allow_unsafe_durability=settings.allow_unsafe_durability,
    )
    async with _database(settings) as dsn, AsyncExitStack() as opened:
        ledger = await _patiently(lambda: opened.enter_async_context(open_ledger(dsn, options)))
        pool = Pool(dsn, size=settings.pool_size, acquire_timeout_s=PATIENCE_S, connect_timeout_s=PATIENCE_S)
        try:
            yield Storage(ledger, Reads(pool, random.Random()))
        finally:
            await pool.aclose()


async def _patiently(attempt: Callable[[], Awaitable[T]]) -> T:
    """What an attempt returns, however long the database is not there."""
    reason = ""
    while True:
        try:
            return await attempt()
        except Unavailable as fault:
            if str(fault) != reason:
                reason = str(fault)
                log.warning("database_awaited", reason=reason)
            await trio.sleep(RETRY_S)


@asynccontextmanager
async def _database(settings: Settings) -> AsyncIterator[str]:
    """The database's DSN: the user's own, or that of an embedded server that lives as long as this block."""
    if settings.database_url is not None:
        yield settings.database_url
        return
    postgres = EmbeddedPostgres(settings.data_dir)
    try:
        server = await _started(postgres)
        forget_pg_variables()
        await trio.to_thread.run_sync(_upgrade, server.dsn)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_keep_running, postgres)
            yield server.dsn
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(postgres.stop)


async def _started(postgres: EmbeddedPostgres, *, may_create: bool = True) -> EmbeddedServer:
    """Start the server, which may have minutes of recovery before it; cancelled, it is given up at once."""

    async def give_up_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            postgres.give_up()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(give_up_when_cancelled)
        started: EmbeddedServer | EmbeddedServerError
        try:
            started = await trio.to_thread.run_sync(partial(postgres.start, may_create=may_create))
        except EmbeddedServerError as fault:
            started = fault
        nursery.cancel_scope.cancel()
    if isinstance(started, EmbeddedServerError):
        raise started
    return started


def _upgrade(dsn: str) -> None:
    """Bring the schema of our own server up to date."""
    if schema.current(dsn) != schema.REVISION:
        from persistence import migrate  # only here: Alembic takes long to import

        migrate.upgrade(dsn)


async def _keep_running(postgres: EmbeddedPostgres) -> None:
    """Start the embedded server again when it dies under us."""
    while True:
        await trio.sleep(WATCH_S)
        if postgres.is_running:
            continue
        log.error("embedded_postgres_died")
        try:
            await trio.to_thread.run_sync(postgres.stop)
            await _started(postgres, may_create=False)
            log.warning("embedded_postgres_restarted")
        except EmbeddedServerError as fault:
            log.error("embedded_postgres_not_restarted", reason=str(fault))


def _told_operator(error: BaseException) -> Exception | None:
    """The one thing in a group of errors that an operator can mend, if there is one."""
    if isinstance(error, BaseExceptionGroup):
        return next((told for part in error.exceptions if (told := _told_operator(part))), None)
    return error if isinstance(error, OPERATOR_ERRORS) else None
