"""The PostgreSQL ledger: one writer connection, one statement a batch, and the truth after a doubt.

Read `commit` and `resolve` first. The guard of each drop stands in its own row (`epoch`, `seq`,
`available_stock`), so a batch needs no transaction beyond its one statement, and no lock outlives it. Which
errors mean what is decided in one place, `_fault`.

Backends whose last batch is in doubt are kept in `_suspects`: if one of them still holds a drop's row when
the doubt is to be resolved, or might still give birth to a drop, it is terminated.
"""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Final, TypeVar

import psycopg
import structlog
import trio
from psycopg import pq
from psycopg.pq.abc import PGresult

from engine.ledger import (
    Batch,
    InDoubt,
    LedgerFault,
    Rejected,
    Resolution,
    StorageFull,
    Unavailable,
)
from engine.model import DropId, DropRecord, Instant
from persistence import batch_sql, loading, resolution, statements
from persistence.encoding import Unencodable, encode
from persistence.startup import CLOCK_SKEW_MAX_S, EngineLock, StartRefused, check_server, check_settings
from persistence.trio_pg import Backend, ConnectionLost, TrioConnection, is_refusal, terminate_backend

log = structlog.get_logger(__name__)

T = TypeVar("T")

# Generic plans: planning the statement anew costs more than running it. Nested loops over the indexes,
# whatever the statistics say: they are those of empty tables for the first minute of a new database, and a
# plan that scans a table that has grown since would hold the drops' rows for seconds.
_WRITER_SETTINGS: Final = {
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_mergejoin": "off",
    "jit": "off",
}
# What a role or a database may have set otherwise: a guard that lost its race must miss, not fail.
# And a load that a role's usual limit ends would begin again for ever; those of the writer are set beside this.
_SESSION_SETTINGS: Final = {"default_transaction_isolation": "read committed", "statement_timeout": "0"}
_TRANSACTION_TIMEOUT_SINCE: Final = 170_000  # PostgreSQL 17 has a limit for these, too
# Connections that reload drops at once: when many lose their guards in one instant, they must not take all there are.
_RECLAIMS_MAX: Final = 8
# The server gives up on a statement before we give up on the server: its refusal is definite, our timeout is
# not.
_SERVER_SHARE: Final = 0.75
# A backend that was told to go needs about a millisecond.
_GONE_POLL_S: Final = 0.01
_TIDY_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class LedgerOptions:
    connect_timeout_s: float = 5.0
    commit_timeout_s: float = 10.0  # a batch without an answer for so long is in doubt
    # How long one row lock is waited for before the backends in doubt are terminated. A batch takes
    # milliseconds.
    lock_timeout_s: float = 0.25
    # The same for a batch: another session's lock stops its own drop, by a refusal, and not all of them by a stall.
    commit_lock_timeout_s: float = 0.25
    resolve_timeout_s: float = 15.0
    take_over_timeout_s: float = 120.0  # for locks
    # What is loaded behind them may be years of reservations: as long as rows come it goes on. The longest silence is
    # before the first of them, while the server sorts.
    load_silence_s: float = 600.0
    clock_skew_max_s: float = CLOCK_SKEW_MAX_S
    allow_unsafe_durability: bool = False


@dataclass(frozen=True, slots=True)
class LedgerStatistics:
    """Counts since the start."""

    batches: int = 0
    changes: int = 0  # committed
    misses: int = 0  # changes whose guard did not hit
    rejected: int = 0
    unavailable: int = 0
    in_doubt: int = 0
    resolved: int = 0
    terminated: int = 0  # backends that had to be ended
    connections: int = 0  # of the writer
    is_connected: bool = False
    is_lock_held: bool = False


@asynccontextmanager
async def open_ledger(
    dsn: str, options: LedgerOptions | None = None, *, wall: Callable[[], float] = time.time
) -> AsyncIterator["PostgresLedger"]:
    """Check the database, take the engine's lock, and hold both until the end of the block.

    `wall` is our clock, in seconds since the epoch, compared with the server's.

    Raises:
        StartRefused, SchemaOutdated: the database must not be served from.
        Unavailable: it is out of reach.
    """
    options = options or LedgerOptions()
    lock = EngineLock(dsn, connect_timeout_s=options.connect_timeout_s)
    ledger = PostgresLedger(dsn, options, lock)
    try:
        await ledger.start(wall)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lock.keep)
            try:
                yield ledger
            finally:
                nursery.cancel_scope.cancel()
    finally:
        ledger.close()
        lock.release()


class PostgresLedger:
    """`engine.ledger.Ledger` on PostgreSQL 15 or newer. Made by `open_ledger`.

    `commit` is for one task at a time; everything else may run beside it.
    """

    def __init__(self, dsn: str, options: LedgerOptions, lock: EngineLock) -> None:
        self._dsn = dsn
        self._options = options
        self._lock = lock
        self._reclaims = trio.CapacityLimiter(_RECLAIMS_MAX)
        self._writer: TrioConnection | None = None
        self._suspects: dict[Backend, bool] = {}  # whether it was told to go
        self._doubted: Backend | None = None  # the newest of them
        self._raises = resolution.OwnRaises()
        self._statistics = LedgerStatistics()

    async def start(self, wall: Callable[[], float]) -> None:
        """The checks at start, as `open_ledger` says."""
        async with self._session() as conn:
            await check_server(
                conn,
                allow_unsafe_durability=self._options.allow_unsafe_durability,
                clock_skew_max_s=self._options.clock_skew_max_s,
                wall=wall,
            )
        try:
            await self._lock.acquire()
        except psycopg.Error as error:
            raise self._fault(error, was_sent=False) from error
        await self._ready_writer()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.abort()
            self._writer = None

    def statistics(self) -> LedgerStatistics:
        return replace(
            self._statistics,
            is_connected=self._writer is not None and not self._writer.closed,
            is_lock_held=self._lock.is_held,
        )

    # --- writing ------------------------------------------------------------------------------------------

    async def commit(self, batch: Batch) -> frozenset[DropId]:
        """See `engine.ledger.Ledger.commit`. One statement in autocommit: its end is its commit."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if not batch:
            return frozenset()
        try:
            statement, parameters = encode(batch)
        except Unencodable as error:
            self._count(rejected=1)
            raise Rejected(f"{type(error).__name__}: {error}") from error
        writer = await self._ready_writer()
        try:
            # Shielded: nobody's cancellation may leave a batch in doubt. Bounded all the same.
            with trio.move_on_after(self._options.commit_timeout_s, shield=True):
                formats = [pq.Format.BINARY] * len(parameters)
                result = await writer.run_prepared(statement, parameters, formats=formats, abandon_on_cancel=True)
                hit = _hit(batch, result)
                self._count(batches=1, changes=len(hit), misses=len(batch) - len(hit))
                return hit
        except psycopg.Error as error:
            fault = self._fault(error)
            if isinstance(fault, Rejected):
                raise fault from error
            self._drop_writer(writer, is_suspect=isinstance(fault, InDoubt))
            raise fault from error
        self._drop_writer(writer, is_suspect=True)
        self._count(in_doubt=1)
        raise InDoubt(f"no answer within {self._options.commit_timeout_s} s")

    async def _ready_writer(self) -> TrioConnection:
        """The writer's connection, opened if there is none or the old one is dying."""
        if self._writer is not None:
            if not self._writer.has_news:
                return self._writer
            self.close()
        try:
            conn = await TrioConnection.connect(
                self._dsn,
                timeout_s=self._options.connect_timeout_s,
                application_name="holdfast writer",
                identify=True,
            )
        except psycopg.Error as error:
            raise self._fault(error, was_sent=False) from error
        try:
            with trio.fail_after(self._options.connect_timeout_s):
                await self._prepare(conn)
        except BaseException as error:
            conn.abort()
            if isinstance(error, (psycopg.Error, StartRefused, trio.TooSlowError)):
                raise self._fault(error, was_sent=False) from error
            raise
        self._writer = conn
        self._count(connections=1)
        return conn

    async def _prepare(self, conn: TrioConnection) -> None:
        await check_settings(conn, allow_unsafe_durability=self._options.allow_unsafe_durability)
        # As it was just seen to be, whatever the configuration says later: a session's own value outlives a reload.
        await conn.execute("SELECT set_config('synchronous_commit', current_setting('synchronous_commit'), false)")
        timeouts_s = {
            "statement_timeout": self._options.commit_timeout_s * _SERVER_SHARE,
            "lock_timeout": self._options.commit_lock_timeout_s,
        }
        timeouts = {name: str(int(timeout_s * 1000)) for name, timeout_s in timeouts_s.items()}
        await _set(conn, {**_SESSION_SETTINGS, **_WRITER_SETTINGS, **timeouts})
        for name, text in batch_sql.STATEMENTS.items():
            await conn.prepare(name, text)

    def _drop_writer(self, writer: TrioConnection, *, is_suspect: bool) -> None:
        if is_suspect and writer.backend is not None:
            self._suspects[writer.backend] = False
            self._doubted = writer.backend
        writer.abort()
        self._writer = None

    def _fault(self, error: Exception, *, was_sent: bool = True) -> LedgerFault:
        """Which of the port's faults an error is. `was_sent`: whether a batch was under way.

        An ERROR of the server rolled the statement back, for certain. Everything else that came after the
        batch was sent leaves doubt, a FATAL too: it may have arrived between the commit and its
        acknowledgement.
        """
        text = _describe(error)
        if not was_sent or (isinstance(error, ConnectionLost) and not error.was_sent):
            self._count(unavailable=1)
            return Unavailable(text)
        if not is_refusal(error):
            self._count(in_doubt=1)
            return InDoubt(text)
        sqlstate = getattr(error, "sqlstate", None) or ""
        if sqlstate in _ELSEWHERE:
            self._count(unavailable=1)
            return Unavailable(text)
        self._count(rejected=1)
        return StorageFull(text) if sqlstate.startswith("53") else Rejected(text)

    # --- taking over and resolving ------------------------------------------------------------------------

    async def take_over(self, drop_ids: Sequence[DropId] | None) -> list[DropRecord]:
        """See `engine.ledger.Ledger.take_over`."""
        if drop_ids is not None and not drop_ids:
            return []
        options = self._options
        # Somebody waits for one that is asked for; before the start there is nobody.
        timeout_s = options.take_over_timeout_s if drop_ids is None else options.connect_timeout_s
        async with self._session() as conn, _bounded(timeout_s) as scope:
            patience = _Patience(scope, options.load_silence_s)
            return await self._behind_locks(conn, lambda: loading.take_over(conn, drop_ids, patience.heard), patience)

    async def reclaim(self, drop_id: DropId, epoch: int) -> DropRecord | None:
        """See `engine.ledger.Ledger.reclaim`."""
        epoch_max = self._raises.newest(drop_id, epoch)
        async with self._reclaims, self._session() as conn, _bounded(self._options.take_over_timeout_s) as scope:
            patience = _Patience(scope, self._options.load_silence_s)

            async def take() -> list[DropRecord]:
                records = await loading.reclaim(conn, drop_id, epoch, epoch_max, patience.heard)
                for record in records:
                    self._raises.note(drop_id, record.epoch)
                return records

            records = await self._behind_locks(conn, take, patience)
        self._raises.forget([drop_id])
        return records[0] if records else None

    async def resolve(self, batch: Batch) -> dict[DropId, Resolution]:
        """See `engine.ledger.Ledger.resolve`."""
        async with self._session() as conn:
            async with _bounded(self._options.resolve_timeout_s):
                if batch and batch[0].is_birth:
                    # No row, no lock to wait behind: only when its backend is gone can it write no more. Suspects from
                    # before that one have their truth already, and one of them may be frozen.
                    await self._end_suspects(conn, wait_for=self._doubted)
                resolutions = await self._behind_locks(conn, lambda: resolution.resolve(conn, batch, self._raises))
            self._raises.forget(change.drop_id for change in batch)
            self._count(resolved=1)
            # The truth is known, and the old session is of no use to anybody any more.
            with suppress(psycopg.Error), trio.move_on_after(_TIDY_S):
                await self._end_suspects(conn)
        if not batch:
            await self._ready_writer()  # else it may answer, and take no batch all the same
        return resolutions

    async def _behind_locks(
        self, conn: TrioConnection, work: Callable[[], Awaitable[T]], patience: "_Patience | None" = None
    ) -> T:
        """Run a transaction, again and again while somebody holds its rows or tables."""
        while True:
            try:
                async with conn.transaction():
                    return await work()
            except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
                if patience is not None:
                    patience.wait_for_locks()
                await self._end_suspects(conn)

    async def _end_suspects(self, conn: TrioConnection, *, wait_for: Backend | None = None) -> None:
        """Terminate the backends in doubt; return no sooner than the transaction of one of them is over.

        Each stays a suspect until it is seen to be gone: a frozen one goes only when it thaws.
        """
        for backend, was_told in list(self._suspects.items()):
            is_alive = await terminate_backend(conn, backend)
            if is_alive and not was_told:
                self._suspects[backend] = True
                self._count(terminated=1)
                log.warning("backend_terminated", pid=backend.pid)
            while backend == wait_for and is_alive:
                await trio.sleep(_GONE_POLL_S)
                is_alive = await terminate_backend(conn, backend)
            if not is_alive:
                self._suspects.pop(backend, None)

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[TrioConnection]:
        """A connection for one errand; whatever fails on it is `Unavailable`."""
        try:
            conn = await TrioConnection.connect(
                self._dsn, timeout_s=self._options.connect_timeout_s, application_name="holdfast ledger"
            )
            async with conn:
                limits = {"lock_timeout": str(int(self._options.lock_timeout_s * 1000))}
                if conn.info.server_version >= _TRANSACTION_TIMEOUT_SINCE:
                    limits["transaction_timeout"] = "0"
                with trio.fail_after(self._options.connect_timeout_s):
                    await _set(conn, {**_SESSION_SETTINGS, **limits})
                yield conn
        except (psycopg.Error, trio.TooSlowError) as error:
            raise self._fault(error, was_sent=False) from error

    # --- reading ------------------------------------------------------------------------------------------

    async def newest_instant(self) -> Instant | None:
        """The newest instant at which any engine decided something here; None in an empty ledger.

        Raises:
            Unavailable: out of reach; ask again.
        """
        async with self._session() as conn, _bounded(self._options.take_over_timeout_s):
            row = await (await conn.execute(statements.NEWEST_INSTANT)).fetchone()
            return None if row is None or row[0] is None else Instant(row[0])

    def _count(self, **more: int) -> None:
        now = self._statistics
        self._statistics = replace(now, **{name: getattr(now, name) + n for name, n in more.items()})


# Refusals that say "not here, not now" rather than "not this batch": a standby that was promoted away, a
# prepared statement that some proxy lost. The connection is replaced, the batch can be sent again as it is.
_ELSEWHERE: Final = frozenset({"25006", "26000"})


def _hit(batch: Batch, result: PGresult) -> frozenset[DropId]:
    """The drops whose positions the statement returned, as an array in text; no row if there are none."""
    if not result.ntuples:
        return frozenset()
    positions = (result.get_value(0, 0) or b"")[1:-1].split(b",")
    return frozenset([batch[int(position) - 1].drop_id for position in positions])


@asynccontextmanager
async def _bounded(timeout_s: float) -> AsyncIterator[trio.CancelScope]:
    began = trio.current_time()
    with trio.move_on_after(timeout_s) as scope:
        yield scope
    if scope.cancelled_caught:
        waited_s = trio.current_time() - began
        raise Unavailable(f"not done within {waited_s:.3g} s: rows stay locked, or a backend does not go away")


class _Patience:
    """How long a load is waited for: for locks as long as was said, for its rows anew with each that come."""

    def __init__(self, scope: trio.CancelScope, silence_s: float) -> None:
        self._scope = scope
        self._silence_s = silence_s
        self._for_locks = scope.deadline

    def heard(self) -> None:
        """The server has said something of what is loaded."""
        self._scope.deadline = trio.current_time() + self._silence_s

    def wait_for_locks(self) -> None:
        """All that was loaded is loaded again."""
        self._scope.deadline = self._for_locks


async def _set(conn: TrioConnection, settings: Mapping[str, str]) -> None:
    names, values = list(settings), list(settings.values())
    each = "SELECT set_config(name, value, false) FROM unnest(%s::text[], %s::text[]) AS setting(name, value)"
    await conn.execute(each.encode(), (names, values))


def _describe(error: Exception) -> str:
    if isinstance(error, psycopg.Error) and error.sqlstate is not None:
        # The primary message only: DETAIL quotes the row.
        constraint = f" ({error.diag.constraint_name})" if error.diag.constraint_name else ""
        return f"{error.sqlstate}{constraint}: {error.diag.message_primary or error}"
    return str(error) or type(error).__name__
