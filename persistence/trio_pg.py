"""psycopg 3.3 on Trio: one connection. `persistence.pool` lends several.

psycopg's protocol code is generators that say which way they want to wait for the socket; here Trio
does the waiting. So cursors, `execute`, `transaction()` and `pipeline()` are psycopg's own, and no
second event loop runs. Beside them stands the hot path, `prepare` and `run_prepared`: no cursor, no
adaptation, bytes in and a libpq result out.

Two rules hold everywhere below:

- A psycopg error that is not `ConnectionLost` and carries an SQLSTATE is a refusal by a living server:
  the statement is rolled back, for certain. `ConnectionLost` means nobody knows, unless `was_sent` is
  false. See `is_refusal`.
- No cancellation leaves a statement running behind a connection that somebody else will use: the server
  is asked to stop it and the answer is awaited, for a bounded time; failing that the connection is closed.

The names with a leading underscore that are taken from psycopg are the reason for the pin to 3.3.x;
`tests/persistence/test_trio_pg.py` holds a test of each thing relied on.
"""

import select
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Generic, NoReturn, Self

import psycopg
import trio
from psycopg import generators, pq
from psycopg.abc import RV, ConnDict, PQGen, PQGenConn
from psycopg.conninfo import conninfo_attempts, conninfo_to_dict, make_conninfo
from psycopg.pq.abc import PGconn, PGresult
from psycopg.rows import AsyncRowFactory, TupleRow, tuple_row
from psycopg.waiting import Ready, Wait

ACTIVE: Final = pq.TransactionStatus.ACTIVE
IDLE: Final = pq.TransactionStatus.IDLE
COMMAND_OK: Final = pq.ExecStatus.COMMAND_OK
TUPLES_OK: Final = pq.ExecStatus.TUPLES_OK
FATAL_ERROR: Final = pq.ExecStatus.FATAL_ERROR
PIPELINE_OFF: Final = pq.PipelineStatus.OFF
TEXT: Final = pq.Format.TEXT

# How long a cancelled caller may be kept while its statement is stopped and the answer drained. A live
# server needs milliseconds; past this the connection costs more to wait for than to replace.
GIVE_UP_S = 2.0

# A request to cancel that overtakes the statement it is meant for finds the server idle and is dropped
# there without a word, so it is repeated while the answer is awaited.
CANCEL_AGAIN_S = 0.25

# A peer that vanished without a FIN (power loss, partition, a firewall that forgot) is found within about
# ten seconds, both ways: by keepalive probes while we only wait for an answer (5 s + 5 probes of 1 s), by
# the user timeout while our own bytes stay unacknowledged. Linux alone would take two hours for the first
# and a quarter of one for the second, and the batch in doubt would stay frozen all that time. Without
# effect on Unix sockets; the DSN may set others.
BOUNDED_TCP: Final[ConnDict] = {
    "keepalives": 1,
    "keepalives_idle": 5,
    "keepalives_interval": 1,
    "keepalives_count": 5,
    "tcp_user_timeout": 10_000,  # ms
}

# Not every loss arrives as a closed socket. These states are sent by a server that is going away (57P0x),
# or by a coordinator or proxy that lost *its* connection and cannot know the outcome (08xxx, 40003).
# 08P01 is not among them: as an ERROR it says that our own message was malformed, a refusal.
OUTCOME_UNKNOWN: Final = frozenset(
    {"57P01", "57P02", "57P03", "57P04", "57P05", "08000", "08003", "08006", "08007", "40003"}
)

# The start of a backend as text that reads the same in every session, whatever its TimeZone or DateStyle.
_STARTED_AT: Final = """to_char(backend_start AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US')"""


class ConnectionLost(psycopg.OperationalError):
    """The connection broke, or the server ended it; it is closed now.

    `was_sent` is false only if the connection was known to be closed before a byte of the statement left.
    Otherwise the outcome is in doubt: done, not done, or (a COMMIT whose backend still lives) done later.
    """

    def __init__(self, message: str, *, was_sent: bool = True) -> None:
        super().__init__(message)
        self.was_sent = was_sent


def is_refusal(error: BaseException) -> bool:
    """Whether this error is the definite no of a living server: the statement has been rolled back."""
    return (
        isinstance(error, psycopg.Error)
        and not isinstance(error, ConnectionLost)
        and error.diag.sqlstate is not None
        and not _leaves_doubt(error)
    )


@dataclass(frozen=True, slots=True)
class Backend:
    """The server process behind one connection. The start is part of it: a restarted server reuses pids."""

    pid: int
    started_at: str  # UTC, ISO 8601, microseconds


class TrioConnection(psycopg.AsyncConnection[TupleRow]):
    """A psycopg connection for one Trio task at a time; always in autocommit mode.

    Two tasks in one connection at once raise `trio.BusyResourceError`. `AsyncConnection.transaction()`
    makes explicit transactions; leaving `async with conn` closes it, and the server rolls back what is open.
    """

    def __init__(
        self,
        pgconn: PGconn,
        row_factory: AsyncRowFactory[TupleRow] = tuple_row,
    ) -> None:
        super().__init__(pgconn, row_factory)
        # psycopg's asyncio.Lock needs asyncio's loop as soon as it is contended.
        self.lock = _OneTask()  # type: ignore[assignment]
        self._autocommit = True
        self._backend: Backend | None = None

    @classmethod
    async def connect(  # type: ignore[override]  # narrower on purpose: what we do not offer is not accepted
        cls,
        dsn: str,
        *,
        timeout_s: float,
        application_name: str | None = None,
        prepare_threshold: int | None = None,
        identify: bool = False,
    ) -> Self:
        """Open a connection. With `identify`, its `backend` is known from the start.

        Several hosts, or several addresses of one, are tried in turn, each for its share of `timeout_s`.
        Names are resolved in a thread, since libpq would stop every task for as long as DNS takes.
        `application_name` goes before the DSN's, which goes before "holdfast". `prepare_threshold` is
        psycopg's; the hot path needs None (see `prepare`).

        Cancelled: the half-open connection is closed.

        Raises:
            psycopg.errors.ConnectionTimeout: no server answered within `timeout_s` seconds.
            psycopg.OperationalError: refused, or the name is unknown.
            psycopg.ProgrammingError: the DSN is malformed.
        """
        params = {"application_name": "holdfast", **BOUNDED_TCP, **conninfo_to_dict(dsn)}
        params["client_encoding"] = "UTF8"  # the hot path's parameters are bytes: their encoding is fixed
        if application_name is not None:
            params["application_name"] = application_name
        with trio.move_on_after(timeout_s) as scope:
            attempts = await trio.to_thread.run_sync(conninfo_attempts, params, abandon_on_cancel=True)
            conn = await cls._first_to_answer(attempts, scope.deadline)
            try:
                conn.prepare_threshold = prepare_threshold
                if identify:
                    await conn.identify()
            except BaseException:
                conn.abort()
                raise
            return conn
        raise psycopg.errors.ConnectionTimeout(f"no connection within {timeout_s} s")

    @classmethod
    async def _first_to_answer(cls, attempts: Sequence[ConnDict], deadline: float) -> Self:
        """Connect to the first server that lets us in; `deadline` is on Trio's clock."""
        failure = psycopg.OperationalError("no address to connect to")
        for remaining, attempt in zip(range(len(attempts), 0, -1), attempts, strict=True):
            # A share each: one dead host must not eat the time of those after it.
            share_s = max(0.0, deadline - trio.current_time()) / remaining
            with trio.move_on_after(share_s) as scope:
                try:
                    return await _drive_moving(cls._connect_gen(make_conninfo("", **attempt)))
                except psycopg.OperationalError as error:
                    failure = error
            if scope.cancelled_caught:
                failure = psycopg.errors.ConnectionTimeout(f"no answer within {share_s:.1f} s")
        raise failure

    # --- the hot path -----------------------------------------------------------------------------------

    async def prepare(self, name: bytes, sql: bytes | str) -> None:
        """Prepare a statement with `$1`-style parameters under `name`, for the life of the connection.

        Cancellation and errors as in `run_prepared`.
        """
        # After a ROLLBACK psycopg sends DEALLOCATE ALL if a cursor ever prepared something: our names too.
        assert self.prepare_threshold is None, "cursor-prepared statements would take ours down with them"
        text = sql.encode() if isinstance(sql, str) else sql
        await self._ask(lambda: self.pgconn.send_prepare(name, text))

    async def run_prepared(
        self,
        name: bytes,
        params: Sequence[bytes | None] = (),
        *,
        formats: Sequence[int] | None = None,
        result_format: int = TEXT,
        abandon_on_cancel: bool = False,
    ) -> PGresult:
        """Run a prepared statement once; one round trip. Values are in libpq's text format by default.

        Outside `transaction()` the statement is its own transaction, and committed when this returns.

        Cancelled before it starts: nothing happened. Cancelled later: the server is asked to stop it, and
        whether it did is not reported; a caller that must know shields the call. With `abandon_on_cancel`
        the connection is closed at once instead, for a caller who has waited long enough.

        Raises:
            ConnectionLost: in doubt, unless `was_sent` is false.
            psycopg.Error: any other is the server's definite refusal (`is_refusal`).
        """
        return await self._ask(
            lambda: self.pgconn.send_query_prepared(name, params, formats, result_format),
            abandon_on_cancel=abandon_on_cancel,
        )

    async def _ask(self, send: Callable[[], None], *, abandon_on_cancel: bool = False) -> PGresult:
        async with self.lock:
            assert self._pipeline is None, "the hot path does not mix with pipeline mode"
            exchange = self._exchange_gen(send)
            return self._sole_result(await self._step(exchange, abandon_on_cancel=abandon_on_cancel))

    def _exchange_gen(self, send: Callable[[], None]) -> PQGen[list[PGresult]]:
        try:
            send()
        except psycopg.Error:
            self.abort()  # some of the messages may be in libpq's buffer, without the Sync that ends them
            raise
        results: list[PGresult] = yield from generators.execute(self.pgconn)
        return results

    def _sole_result(self, results: Sequence[PGresult]) -> PGresult:
        # The implicit commit comes after the statement's own result: one that fails (a deferred constraint,
        # say) is an error *behind* a success. So every result is looked at, not just the first.
        for result in results:
            if result.status == FATAL_ERROR:
                self._raise_refusal_or_loss(psycopg.errors.error_from_result(result))
        if len(results) == 1 and results[0].status in (COMMAND_OK, TUPLES_OK):
            return results[0]
        self.abort()
        statuses = [pq.ExecStatus(result.status).name for result in results]
        raise ConnectionLost(f"unexpected answer: {statuses}")

    # --- what psycopg calls -----------------------------------------------------------------------------

    async def wait(self, gen: PQGen[RV], interval: float = 0.0, timeout: float | None = None) -> RV:
        """Run one of psycopg's generators to its end; replaces the wait that knows only asyncio.

        `interval` has no meaning here. `timeout` is in seconds; psycopg uses it in `notifies()`.

        Cancelled: see `run_prepared`. With a pipeline under way the connection is closed, since the answers
        to what was queued could no longer be told apart.
        """
        if timeout is None:
            return await self._step(gen)
        with trio.move_on_after(timeout):
            return await self._step(gen)
        raise psycopg.errors._WaitTimeout("wait timeout expired")

    async def _step(self, gen: PQGen[RV], *, stop_on_server: bool = True, abandon_on_cancel: bool = False) -> RV:
        self._check_connection_ok()
        exchange = _Exchange(gen, self.pgconn.socket)
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            return await exchange.run()
        except psycopg.Error as error:
            self._raise_refusal_or_loss(error)
        except BaseException:
            if abandon_on_cancel and self.pgconn.transaction_status == ACTIVE:
                self.abort()
            else:
                await self._give_up(exchange, stop_on_server=stop_on_server)
            raise

    def _raise_refusal_or_loss(self, error: psycopg.Error) -> NoReturn:
        """Raise the error as it came if the connection is sound; else close it and raise `ConnectionLost`."""
        # psycopg gave up in the middle of an answer, as it does on COPY through `execute`.
        is_stuck = error.diag.sqlstate is None and self.pgconn.transaction_status == ACTIVE
        if not (self.closed or is_stuck or _leaves_doubt(error)):
            raise error
        self.abort()
        if isinstance(error, ConnectionLost):
            raise error
        raise ConnectionLost(str(error)) from error

    async def _give_up(self, exchange: "_Exchange[Any]", *, stop_on_server: bool) -> None:
        """Bring a connection whose statement is no longer wanted back from ACTIVE, or close it."""
        if self.pgconn.transaction_status != ACTIVE:
            return
        try:
            with trio.move_on_after(GIVE_UP_S, shield=True):
                if stop_on_server:
                    await self._stop_on_server(exchange)
                else:
                    await exchange.run()
        except psycopg.Error as error:
            # QueryCanceled is what we hope for, and any other refusal is as good: the statement is over.
            if _leaves_doubt(error):
                self.abort()
        finally:
            if self.closed or self.pgconn.transaction_status == ACTIVE:
                self.abort()

    async def _stop_on_server(self, exchange: "_Exchange[Any]") -> None:
        # A request that fails, or is cut off by our bound, leaves the connection ACTIVE and so closed: one
        # of unknown fate might arrive late and hit whatever runs here next.
        await _drive_moving(self._cancel_gen())
        while self.pgconn.pipeline_status == PIPELINE_OFF:
            with trio.move_on_after(CANCEL_AGAIN_S):
                await exchange.run()
                return
            await _drive_moving(self._cancel_gen())

    async def cancel_safe(self, *, timeout: float = 30.0) -> None:
        """Ask the server to cancel the running statement; psycopg's own version needs asyncio.

        Raises:
            psycopg.errors.CancellationTimeout: not taken within `timeout` seconds (0: no limit).
        """
        if not self._should_cancel():
            return
        with trio.move_on_after(timeout or float("inf")):
            await _drive_moving(self._cancel_gen())
            return
        raise psycopg.errors.CancellationTimeout("cancellation timeout expired")

    @asynccontextmanager
    async def transaction(
        self, savepoint_name: str | None = None, force_rollback: bool = False
    ) -> AsyncIterator[psycopg.AsyncTransaction]:
        """psycopg's `transaction()`, with BEGIN, COMMIT and ROLLBACK safe from Trio's cancellation.

        Cancelled before COMMIT is sent: rolled back. Cancelled after: COMMIT is never stopped, its answer is
        awaited for at most `GIVE_UP_S`, and the outcome is not reported.
        """
        tx = _TrioTransaction(self, savepoint_name, force_rollback)
        if self._pipeline:
            async with self.pipeline(), tx, self.pipeline():
                yield tx
        else:
            async with tx:
                yield tx

    def _check_connection_ok(self) -> None:
        if self.closed:
            raise ConnectionLost("the connection is closed", was_sent=False)
        super()._check_connection_ok()

    # --- identity and end -------------------------------------------------------------------------------

    @property
    def backend(self) -> Backend | None:
        """The server process behind this connection, once `identify` has asked; kept after a loss."""
        return self._backend

    async def identify(self) -> Backend:
        """Ask the server, once, which backend this is, so that somebody else can end exactly that one.

        To be asked while all is well: a lost connection can't be asked any more.
        """
        if self._backend is None:
            sql = f"SELECT pid, {_STARTED_AT} FROM pg_stat_activity WHERE pid = pg_backend_pid()"
            row = await (await self.execute(sql.encode())).fetchone()
            assert row is not None, "a backend always sees itself"
            self._backend = Backend(pid=row[0], started_at=row[1])
        return self._backend

    @property
    def is_idle(self) -> bool:
        """Whether the connection lives, runs nothing and is in no transaction and no pipeline."""
        return self.pgconn.transaction_status == IDLE and self.pgconn.pipeline_status == PIPELINE_OFF

    @property
    def has_news(self) -> bool:
        """Whether an idle connection should be thrown away: a server has nothing to say, unless it is going."""
        return self.closed or bool(_ready_now(self.pgconn.socket) & Ready.R)

    def abort(self) -> None:
        """Close at once; does nothing the second time. A task that waits here gets `ConnectionLost`."""
        # A descriptor closed behind Trio's back would leave its waiter asleep, or wake it for the next owner.
        with suppress(psycopg.OperationalError):  # libpq has let go of the socket already
            trio.lowlevel.notify_closing(self.pgconn.socket)
        self.pgconn.finish()

    async def close(self) -> None:
        """Close at once, as `abort`; asynchronous because psycopg's is, and never a checkpoint."""
        self._closed = True
        self.abort()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        await self.close()


class _TrioTransaction(psycopg.AsyncTransaction):
    """Trio's cancellation stays in force: every wait of a cancelled task raises at once, ROLLBACK's too."""

    def __init__(self, connection: TrioConnection, savepoint_name: str | None, force_rollback: bool) -> None:
        super().__init__(connection, savepoint_name, force_rollback)
        self._trio_conn = connection

    async def __aenter__(self) -> Self:
        self._check_enter()
        await trio.lowlevel.checkpoint_if_cancelled()
        async with self._trio_conn.lock:
            try:
                await self._trio_conn._step(self._enter_gen(), stop_on_server=False)
            except BaseException as error:
                await self._roll_back(error)  # __aexit__ is not called for a block that was never entered
                raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> bool:
        async with self._trio_conn.lock:
            if exc_val is not None or self.force_rollback:
                return await self._roll_back(exc_val)
            try:
                await trio.lowlevel.checkpoint_if_cancelled()
            except trio.Cancelled as cancelled:
                await self._roll_back(cancelled)
                raise
            return await self._trio_conn._step(self._exit_gen(None, None, None), stop_on_server=False)

    async def _roll_back(self, error: BaseException | None) -> bool:
        """Roll back, or close, which comes to the same; true if `error` was only a `psycopg.Rollback`."""
        if self._trio_conn.closed:
            self.status = self.Status.FAILED
            return False
        try:
            with trio.move_on_after(GIVE_UP_S, shield=True):
                return await self._trio_conn._step(
                    self._exit_gen(type(error) if error else None, error, None), stop_on_server=False
                )
        except ConnectionLost:
            return False
        self._trio_conn.abort()
        return False


class _OneTask:
    """Stands where psycopg holds an asyncio.Lock. A second task is a bug to be told, not one to be queued."""

    def __init__(self) -> None:
        self._is_held = False

    async def __aenter__(self) -> None:
        if self._is_held:
            raise trio.BusyResourceError("another task is using this connection")
        self._is_held = True

    async def __aexit__(self, *_: object) -> None:
        self._is_held = False


async def terminate_backend(conn: psycopg.AsyncConnection[Any], backend: Backend) -> bool:
    """Over `conn`, end exactly that backend; false if it is gone, though another may have its pid by now.

    True means the signal was sent: the backend dies shortly after, and its locks with it. Call it outside a
    transaction, which would see the same snapshot of the backends each time.

    Raises:
        psycopg.errors.InsufficientPrivilege: the backend belongs to somebody else.
    """
    sql = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = %s AND {_STARTED_AT} = %s"
    row = await (await conn.execute(sql.encode(), (backend.pid, backend.started_at))).fetchone()
    return row is not None and bool(row[0])


def _leaves_doubt(error: psycopg.Error) -> bool:
    diag = error.diag
    if diag.sqlstate is None:
        return error.pgresult is not None  # no server wrote this: libpq gave up on an answer
    return diag.severity_nonlocalized in ("FATAL", "PANIC") or diag.sqlstate in OUTCOME_UNKNOWN


class _Exchange(Generic[RV]):
    """One of psycopg's generators, on a socket that stays the same, and what it is waiting for.

    So that it can be taken up again after a cancellation: stepping it without an answer is no way to ask
    what it waits for, its C version fails on that while the send buffer is full.
    """

    __slots__ = ("_fd", "_gen", "_want")

    def __init__(self, gen: PQGen[RV], fd: int) -> None:
        self._gen = gen
        self._fd = fd
        self._want: Wait | None = None

    async def run(self) -> RV:
        result: RV
        try:
            if self._want is None:
                self._want = next(self._gen)
        except StopIteration as stop:
            await trio.lowlevel.cancel_shielded_checkpoint()
            result = stop.value
            return result
        try:
            while True:
                self._want = self._gen.send(await _ready(self._fd, self._want))
        except StopIteration as stop:
            result = stop.value
            return result
        except (OSError, trio.ClosedResourceError) as error:
            raise ConnectionLost("the connection was closed while waiting for the server") from error


async def _drive_moving(gen: PQGenConn[RV]) -> RV:
    """Run a generator that may change sockets (to connect, to ask for a cancel). Cancelled: it is closed."""
    result: RV
    try:
        fd, want = next(gen)
        while True:
            fd, want = gen.send(await _ready(fd, want))
    except StopIteration as stop:
        result = stop.value
        return result
    except OSError as error:
        raise psycopg.OperationalError("the socket failed while connecting") from error
    finally:
        gen.close()  # frees libpq's connection now, not when somebody drops a traceback


async def _ready(fd: int, want: Wait) -> int:
    if want == Wait.R:
        await trio.lowlevel.wait_readable(fd)
        return Ready.R
    if want == Wait.W:
        await trio.lowlevel.wait_writable(fd)
        return Ready.W
    # Both: the send buffer is full, or a pipeline asks before each command, when the socket is nearly
    # always ready; then one turn of the scheduler does, so that a long pipeline starves nobody.
    if state := _ready_now(fd):
        await trio.lowlevel.checkpoint()
        return state
    return await _ready_either(fd)


def _ready_now(fd: int) -> int:
    """What the socket can do at this moment. An error or a hang-up is something to read."""
    poll = select.poll()  # not select(): descriptors above 1023 are ordinary here
    poll.register(fd, select.POLLIN | select.POLLOUT)
    events = sum(event for _, event in poll.poll(0))
    state: int = Ready.NONE
    if events & select.POLLOUT:
        state |= Ready.W
    if events & ~select.POLLOUT:
        state |= Ready.R
    return state


async def _ready_either(fd: int) -> int:
    state: int = Ready.NONE
    failure: Exception | None = None

    async def watch(wait: Callable[[int], Awaitable[None]], bit: Ready) -> None:
        nonlocal state, failure
        try:
            await wait(fd)
            state |= bit
        except (OSError, trio.ClosedResourceError) as error:
            failure = error  # raised below, out of the nursery, so that it comes without a group around it
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch, trio.lowlevel.wait_readable, Ready.R)
        nursery.start_soon(watch, trio.lowlevel.wait_writable, Ready.W)
    if failure is not None:
        raise failure
    return state
