"""psycopg on Trio, against a real server: every pitfall that was hit, and what the pool promises.

Where a fault must strike at a known point, a `Road` carries the bytes over TCP and can hold or cut them.
Nothing here waits for a duration; `eventually` polls for a state and gives up after a generous bound.
"""

import asyncio
import os
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from functools import partial
from typing import Any

import psycopg
import pytest
import trio
import trio.testing
from psycopg import errors, pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.waiting import Ready, Wait

from persistence import trio_pg
from persistence.pool import Pool, PoolTimeout
from persistence.trio_pg import (
    Backend,
    ConnectionLost,
    TrioConnection,
    is_refusal,
    terminate_backend,
)

GENEROUS_S = 30.0

ACTIVE = pq.TransactionStatus.ACTIVE
IDLE = pq.TransactionStatus.IDLE


# --- fixtures and tools ---------------------------------------------------------------------------------


@pytest.fixture
async def conn(empty_database: str) -> AsyncIterator[TrioConnection]:
    """The connection under test, with one table and the prepared statements that most tests use."""
    async with await connect(empty_database) as conn:
        await conn.execute("CREATE TABLE sale (id int PRIMARY KEY)")
        await conn.prepare(b"sell", "INSERT INTO sale VALUES ($1::int)")
        await conn.prepare(b"echo", b"SELECT $1::text")
        await conn.prepare(b"sleep", b"SELECT pg_sleep($1::float)")
        yield conn


@pytest.fixture
async def observer(empty_database: str) -> AsyncIterator[TrioConnection]:
    """Another session, which sees what the server does with the first."""
    async with await connect(empty_database, application_name="observer") as conn:
        yield conn


@pytest.fixture
async def roads(empty_database: str) -> AsyncIterator["Roads"]:
    async with open_roads(empty_database) as roads:
        yield roads


async def connect(dsn: str, **options: Any) -> TrioConnection:
    return await TrioConnection.connect(dsn, timeout_s=GENEROUS_S, **options)


async def value(conn: TrioConnection, sql: str, *params: object) -> Any:
    row = await (await conn.execute(sql.encode(), params)).fetchone()
    assert row is not None
    return row[0]


async def sales(conn: TrioConnection) -> int:
    return int(await value(conn, "SELECT count(*) FROM sale"))


async def eventually(claim: Callable[[], Awaitable[bool]]) -> None:
    with trio.fail_after(GENEROUS_S):
        while not await claim():  # the event is in another process
            await trio.sleep(0.005)


async def wait_until_running(observer: TrioConnection, pid: int, sql_part: str = "pg_sleep") -> None:
    async def is_running() -> bool:
        return bool(
            await value(
                observer,
                "SELECT count(*) FROM pg_stat_activity WHERE pid = %s AND state = 'active' AND strpos(query, %s) > 0",
                pid,
                sql_part,
            )
        )

    await eventually(is_running)


async def sessions(observer: TrioConnection, application_name: str) -> int:
    """How many of that name there are in this test's database."""
    sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = %s"
    return int(await value(observer, sql, application_name))


async def wait_until_gone(observer: TrioConnection, application_name: str) -> None:
    async def is_gone() -> bool:
        return await sessions(observer, application_name) == 0

    await eventually(is_gone)


class Road:
    """One TCP connection's way to the server. Each direction passes bytes on only while it is open."""

    def __init__(self, client: trio.SocketStream, server: trio.SocketStream) -> None:
        self._client, self._server = client, server
        self.to_server, self.to_client = Gate(), Gate()

    async def carry(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._pass_on, self._client, self._server, self.to_server)
            nursery.start_soon(self._pass_on, self._server, self._client, self.to_client)

    async def _pass_on(self, source: trio.SocketStream, target: trio.SocketStream, gate: "Gate") -> None:
        try:
            while True:
                await gate.wait_open()
                data = await source.receive_some(65536)
                await gate.wait_open()
                if not data:
                    break
                await target.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        self.cut()

    def cut(self) -> None:
        self._client.socket.close()
        self._server.socket.close()


class Gate:
    def __init__(self) -> None:
        self._opened = trio.Event()
        self._opened.set()

    def shut(self) -> None:
        self._opened = trio.Event()

    def open(self) -> None:
        self._opened.set()

    async def wait_open(self) -> None:
        await self._opened.wait()


class Roads:
    """A TCP port in front of the server's Unix socket; `roads` are in the order they were opened."""

    def __init__(self, dsn: str) -> None:
        params = conninfo_to_dict(dsn)
        self._target = f"{params['host']}/.s.PGSQL.{params.get('port', 5432)}"
        self._dsn = dsn
        self.port = 0
        self.roads: list[Road] = []

    @property
    def dsn(self) -> str:
        return make_conninfo(self._dsn, host="127.0.0.1", port=self.port, sslmode="disable")

    async def listen(self, listener: trio.SocketListener) -> None:
        self.port = listener.socket.getsockname()[1]
        self._listener = listener
        async with trio.open_nursery() as nursery:
            try:
                while True:
                    nursery.start_soon(self._admit, await listener.accept())
            except trio.ClosedResourceError:
                return

    def refuse_more(self) -> None:
        self._listener.socket.close()

    async def _admit(self, client: trio.SocketStream) -> None:
        async with client, await trio.open_unix_socket(self._target) as server:
            road = Road(client, server)
            self.roads.append(road)
            await road.carry()


@asynccontextmanager
async def open_roads(dsn: str) -> AsyncIterator[Roads]:
    roads = Roads(dsn)
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(roads.listen, listener)
        await trio.testing.wait_all_tasks_blocked()
        yield roads
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_silent_server() -> AsyncIterator[tuple[int, trio.MemoryReceiveChannel[str]]]:
    """A port that accepts and then says nothing, and a channel that tells "accepted" and "closed"."""
    tell, told = trio.open_memory_channel[str](16)

    async def keep_silent(stream: trio.SocketStream) -> None:
        tell.send_nowait("accepted")
        while await stream.receive_some():
            pass
        tell.send_nowait("closed")

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, keep_silent, 0, host="127.0.0.1"))
        yield listener.socket.getsockname()[1], told
        nursery.cancel_scope.cancel()


# --- what we lean on ------------------------------------------------------------------------------------


def test_psycopg_is_the_pinned_series_with_the_private_parts_we_override() -> None:
    assert psycopg.__version__.startswith("3.3.")
    for name in ("_connect_gen", "_cancel_gen", "_check_connection_ok", "_should_cancel", "wait", "cancel_safe"):
        assert callable(getattr(psycopg.AsyncConnection, name)), name
    for name in ("_check_enter", "_enter_gen", "_exit_gen"):
        assert callable(getattr(psycopg.AsyncTransaction, name)), name


def test_libpq_can_cancel_without_blocking() -> None:
    assert pq.version() >= 170000


async def test_asyncio_lock_is_replaced_and_a_second_task_is_told(
    conn: TrioConnection, observer: TrioConnection
) -> None:
    lock: object = conn.lock
    assert not isinstance(lock, asyncio.Lock)
    answered = False

    async def first() -> None:
        nonlocal answered
        with pytest.raises(errors.QueryCanceled):
            await conn.run_prepared(b"sleep", [b"60"])
        answered = True

    with trio.fail_after(GENEROUS_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first)
            await wait_until_running(observer, conn.pgconn.backend_pid)
            with pytest.raises(trio.BusyResourceError):
                await conn.run_prepared(b"echo", [b"second"])
            with pytest.raises(trio.BusyResourceError):
                await conn.execute("SELECT 1")
            assert not answered
            await conn.cancel_safe()
    assert await value(conn, "SELECT 1") == 1


# --- the hot path ---------------------------------------------------------------------------------------


async def test_prepared_statement_runs_with_text_binary_and_null_parameters(conn: TrioConnection) -> None:
    result = await conn.run_prepared(b"echo", ["größe".encode()])
    assert result.get_value(0, 0) == "größe".encode()
    assert (await conn.run_prepared(b"echo", [None])).get_value(0, 0) is None

    await conn.prepare(b"double", b"SELECT $1::int4 * 2")
    binary = await conn.run_prepared(b"double", [(21).to_bytes(4, "big")], formats=[1], result_format=1)
    assert binary.get_value(0, 0) == (42).to_bytes(4, "big")

    inserted = await conn.run_prepared(b"sell", [b"1"])
    assert inserted.command_tuples == 1


async def test_parameter_larger_than_the_send_buffer_goes_there_and_back(roads: Roads) -> None:
    big = os.urandom(8_000_000).hex().encode()
    async with await connect(roads.dsn) as conn:
        await conn.prepare(b"echo", b"SELECT $1::text")
        with trio.fail_after(GENEROUS_S):
            result = await conn.run_prepared(b"echo", [big])
        assert result.get_value(0, 0) == big
        assert await value(conn, "SELECT length(%s)", big.decode()) == len(big)


async def test_many_rows_come_whole(conn: TrioConnection) -> None:
    await conn.prepare(b"rows", b"SELECT g FROM generate_series(1, $1::int) g")
    result = await conn.run_prepared(b"rows", [b"200000"])
    assert (result.ntuples, result.get_value(199_999, 0)) == (200_000, b"200000")
    cursor = await conn.execute("SELECT g FROM generate_series(1, 200000) g")
    assert [row[0] for row in await cursor.fetchall()] == list(range(1, 200_001))


async def test_hot_path_survives_a_rollback(conn: TrioConnection) -> None:
    for _ in range(10):  # more often than psycopg's default threshold for preparing
        async with conn.transaction(force_rollback=True):
            await conn.execute("SELECT %s::int", [1])
            await conn.run_prepared(b"sell", [b"1"])
    assert await value(conn, "SELECT count(*) FROM pg_prepared_statements") == 3
    await conn.run_prepared(b"sell", [b"1"])
    assert await sales(conn) == 1


async def test_deallocate_all_is_real_and_prepare_refuses_a_connection_that_may_send_it(
    conn: TrioConnection,
) -> None:
    conn.prepare_threshold = 0
    with pytest.raises(AssertionError, match="cursor-prepared"):
        await conn.prepare(b"more", b"SELECT 1")

    async with conn.transaction(force_rollback=True):
        await conn.execute("SELECT %s::int", [1])
    with pytest.raises(errors.InvalidSqlStatementName):
        await conn.run_prepared(b"sell", [b"1"])


async def test_listening_and_server_side_cursors_work(conn: TrioConnection, observer: TrioConnection) -> None:
    await conn.execute("LISTEN sold")
    await observer.execute("NOTIFY sold, 'one'")
    async with aclosing(conn.notifies(stop_after=1)) as notifies:
        assert [notify.payload async for notify in notifies] == ["one"]
    async with aclosing(conn.notifies(timeout=0.01)) as notifies:
        assert [notify async for notify in notifies] == []

    async with conn.transaction(), conn.cursor("named") as cursor:
        await cursor.execute("SELECT generate_series(1, 3)")
        assert await cursor.fetchall() == [(1,), (2,), (3,)]


async def test_pipeline_works(conn: TrioConnection) -> None:
    async with conn.pipeline(), conn.transaction():
        cursors = [await conn.execute("INSERT INTO sale VALUES (%s) RETURNING id", [n]) for n in range(1000)]
    assert [await cursor.fetchone() for cursor in cursors] == [(n,) for n in range(1000)]
    assert conn.is_idle


async def test_waiting_for_both_ends_with_the_first() -> None:
    """Else server and client could each wait for the other to read, once the buffers between them are full."""
    ours, theirs = socket.socketpair()
    with ours, theirs, trio.fail_after(GENEROUS_S):
        ours.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                ours.send(bytes(65536))
        async with trio.open_nursery() as nursery:
            waited: list[int] = []

            async def wait() -> None:
                waited.append(await trio_pg._ready(ours.fileno(), Wait.RW))

            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            assert waited == []
            theirs.send(b"!")
        assert waited == [Ready.R]


async def test_pipeline_of_more_than_the_buffers_hold_goes_through(roads: Roads) -> None:
    big = "x" * 100_000
    async with await connect(roads.dsn) as conn:
        with trio.fail_after(GENEROUS_S):
            async with conn.pipeline():
                cursors = [await conn.execute("SELECT %s", [big]) for _ in range(300)]
            assert [await cursor.fetchone() for cursor in cursors] == [(big,)] * 300


async def test_refusal_in_a_pipeline_aborts_the_pipeline_and_not_the_connection(conn: TrioConnection) -> None:
    async with conn.pipeline():
        refused = await conn.execute("SELECT 1 / 0")
        with pytest.raises(errors.DivisionByZero):
            await refused.fetchone()
        behind = await conn.execute("SELECT 1")
        with pytest.raises(errors.PipelineAborted):
            await behind.fetchone()
    assert conn.is_idle

    with suppress(errors.PipelineAborted):  # from leaving it
        async with conn.pipeline():
            await conn.execute("SELECT 1 / 0")
            for _ in range(100):  # some are still under way when the answer to another is seen
                with suppress(errors.DivisionByZero, errors.PipelineAborted):
                    await conn.execute("SELECT 1")
    assert conn.is_idle


async def test_copy_works_and_copy_by_mistake_closes_the_connection(conn: TrioConnection) -> None:
    async with conn.cursor() as cursor:
        async with cursor.copy("COPY sale FROM STDIN") as copy:
            for n in range(1000):
                await copy.write_row((n,))
        async with cursor.copy("COPY sale TO STDOUT") as copy:
            assert len([row async for row in copy.rows()]) == 1000
    assert conn.is_idle
    with pytest.raises(ConnectionLost, match="COPY"):
        await conn.execute("COPY sale FROM STDIN")
    assert conn.closed


async def test_cancel_in_a_pipeline_closes_the_connection(conn: TrioConnection, observer: TrioConnection) -> None:
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery, conn.pipeline():
            nursery.start_soon(cancel_when_running, observer, conn.pgconn.backend_pid, scope)
            await (await conn.execute("SELECT pg_sleep(60)")).fetchone()
    assert scope.cancelled_caught
    assert conn.closed
    await wait_until_gone(observer, "holdfast")  # its statement too: closing alone does not stop one


# --- cancellation ---------------------------------------------------------------------------------------


async def cancel_when_running(observer: TrioConnection, pid: int, scope: trio.CancelScope) -> None:
    await wait_until_running(observer, pid)
    scope.cancel()


@pytest.mark.parametrize("way", ["hot path", "cursor"])
async def test_cancel_stops_the_statement_on_the_server_and_leaves_the_connection_usable(
    conn: TrioConnection, observer: TrioConnection, way: str
) -> None:
    pid = conn.pgconn.backend_pid
    with trio.fail_after(GENEROUS_S):
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                nursery.start_soon(cancel_when_running, observer, pid, scope)
                if way == "cursor":
                    await conn.execute("SELECT pg_sleep(60)")
                else:
                    await conn.run_prepared(b"sleep", [b"60"])
    assert scope.cancelled_caught
    assert conn.is_idle
    assert await value(observer, "SELECT state FROM pg_stat_activity WHERE pid = %s", pid) == "idle"
    assert (await conn.run_prepared(b"echo", [b"still here"])).get_value(0, 0) == b"still here"
    assert conn.pgconn.backend_pid == pid


async def test_cancelled_before_it_starts_sends_nothing(conn: TrioConnection) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await conn.run_prepared(b"sell", [b"1"])
    assert scope.cancelled_caught
    with trio.CancelScope() as scope:
        scope.cancel()
        await conn.execute("INSERT INTO sale VALUES (2)")
    assert scope.cancelled_caught
    with trio.CancelScope() as scope:
        scope.cancel()
        async with conn.transaction():
            raise AssertionError("a cancelled task must not get into a transaction")
    assert scope.cancelled_caught
    assert conn.is_idle
    assert await sales(conn) == 0


async def test_cancel_request_that_overtakes_its_statement_is_repeated(
    roads: Roads, observer: TrioConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trio_pg, "GIVE_UP_S", GENEROUS_S)
    monkeypatch.setattr(trio_pg, "CANCEL_AGAIN_S", 0.02)
    async with await connect(roads.dsn) as conn:
        main_road = roads.roads[0]
        main_road.to_server.shut()

        async def let_through_after_first_cancel() -> None:
            async def has_cancelled() -> bool:
                return len(roads.roads) >= 3  # ours, a request to cancel, and the one after

            await eventually(has_cancelled)
            main_road.to_server.open()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(let_through_after_first_cancel)
            with trio.move_on_after(0.02) as scope:
                await conn.execute("SELECT pg_sleep(60)")
        assert scope.cancelled_caught
        assert conn.is_idle
        assert await value(conn, "SELECT 1") == 1


@pytest.mark.parametrize("direction", ["to_server", "to_client"])
async def test_cancel_closes_the_connection_when_the_server_does_not_react(
    roads: Roads, monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    """`to_server`: our send buffer is full, nobody reads. `to_client`: the answer never comes."""
    monkeypatch.setattr(trio_pg, "GIVE_UP_S", 0.1)
    async with await connect(roads.dsn) as conn:
        await conn.prepare(b"echo", b"SELECT $1::text")
        gate: Gate = getattr(roads.roads[0], direction)
        gate.shut()
        with trio.fail_after(GENEROUS_S), trio.move_on_after(0.05) as scope:
            await conn.run_prepared(b"echo", [b"x" * 32_000_000 if direction == "to_server" else b"x"])
        assert scope.cancelled_caught
        assert conn.closed
        assert conn.pgconn.transaction_status != ACTIVE
        with pytest.raises(ConnectionLost) as lost:
            await conn.run_prepared(b"echo", [b"x"])
        assert not lost.value.was_sent


async def test_cancel_closes_the_connection_when_the_cancel_request_fails(
    roads: Roads, observer: TrioConnection
) -> None:
    async with await connect(roads.dsn) as conn, trio.open_nursery() as nursery:
        pid = conn.pgconn.backend_pid
        roads.refuse_more()
        with trio.CancelScope() as scope:
            nursery.start_soon(cancel_when_running, observer, pid, scope)
            with trio.fail_after(GENEROUS_S):
                await conn.execute("SELECT pg_sleep(60)")
        assert scope.cancelled_caught
        assert conn.closed
    await value(observer, "SELECT pg_terminate_backend(%s)", pid)  # nobody else would, for a minute


async def test_abort_from_another_task_wakes_the_one_that_waits_for_an_answer(
    conn: TrioConnection, observer: TrioConnection
) -> None:
    async def abort_when_running() -> None:
        await wait_until_running(observer, conn.pgconn.backend_pid)
        conn.abort()

    with trio.fail_after(GENEROUS_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(abort_when_running)
            with pytest.raises(ConnectionLost) as lost:
                await conn.run_prepared(b"sleep", [b"2"])
    assert lost.value.was_sent
    conn.abort()  # twice is harmless


async def test_abort_from_another_task_wakes_the_one_that_is_sending(roads: Roads) -> None:
    async with await connect(roads.dsn) as conn:
        await conn.prepare(b"echo", b"SELECT $1::text")
        roads.roads[0].to_server.shut()

        async def abort_when_full() -> None:
            await trio.testing.wait_all_tasks_blocked()
            conn.abort()

        with trio.fail_after(GENEROUS_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(abort_when_full)
                with pytest.raises(ConnectionLost) as lost:
                    await conn.run_prepared(b"echo", [b"x" * 32_000_000])
        assert lost.value.was_sent


# --- transactions ---------------------------------------------------------------------------------------


async def test_transaction_commits_rolls_back_and_nests(conn: TrioConnection, observer: TrioConnection) -> None:
    async with conn.transaction():
        await conn.run_prepared(b"sell", [b"1"])
        assert await sales(observer) == 0
    assert await sales(observer) == 1

    async def sell_and_raise(error: Exception) -> None:
        async with conn.transaction():
            await conn.run_prepared(b"sell", [b"2"])
            raise error

    with pytest.raises(ZeroDivisionError):
        await sell_and_raise(ZeroDivisionError())
    await sell_and_raise(psycopg.Rollback())
    assert await sales(observer) == 1

    async with conn.transaction():
        await conn.run_prepared(b"sell", [b"4"])
        with pytest.raises(errors.UniqueViolation):
            async with conn.transaction():
                await conn.run_prepared(b"sell", [b"4"])
        await conn.run_prepared(b"sell", [b"5"])
    assert await sales(observer) == 3
    assert conn.is_idle


async def test_commit_that_the_server_refuses_is_a_refusal(conn: TrioConnection) -> None:
    await conn.execute("ALTER TABLE sale ADD UNIQUE (id) DEFERRABLE INITIALLY DEFERRED")
    await conn.execute("ALTER TABLE sale DROP CONSTRAINT sale_pkey")
    with pytest.raises(errors.UniqueViolation) as refused:
        async with conn.transaction():
            await conn.execute("INSERT INTO sale VALUES (1), (1)")
    assert is_refusal(refused.value)
    assert conn.is_idle
    assert await sales(conn) == 0


async def test_cancel_inside_a_transaction_rolls_back_and_leaves_the_connection_usable(
    conn: TrioConnection,
) -> None:
    with trio.CancelScope() as scope:
        async with conn.transaction():
            await conn.run_prepared(b"sell", [b"1"])
            scope.cancel()
            await conn.run_prepared(b"sell", [b"2"])
    assert scope.cancelled_caught
    assert conn.is_idle
    with trio.CancelScope() as scope:
        async with conn.transaction():
            await conn.run_prepared(b"sell", [b"1"])
            scope.cancel()  # and COMMIT is the first to notice
    assert scope.cancelled_caught
    assert conn.is_idle
    assert await sales(conn) == 0
    async with conn.transaction():
        await conn.run_prepared(b"sell", [b"1"])
    assert await sales(conn) == 1


@asynccontextmanager
async def cancelled_before_the_answer(
    road: Road, claim: Callable[[], Awaitable[bool]]
) -> AsyncIterator[trio.CancelScope]:
    """Cancel the body once the server has made `claim` true; only then let its answer through."""

    async def cancel_then_open() -> None:
        await eventually(claim)
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        road.to_client.open()

    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            nursery.start_soon(cancel_then_open)
            yield scope


async def test_cancel_after_commit_was_sent_lets_it_finish(
    roads: Roads, conn: TrioConnection, observer: TrioConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trio_pg, "GIVE_UP_S", GENEROUS_S)

    async def is_committed() -> bool:
        return await sales(observer) == 1

    async with await connect(roads.dsn) as remote:
        road = roads.roads[0]
        async with cancelled_before_the_answer(road, is_committed) as scope, remote.transaction():
            await remote.execute("INSERT INTO sale VALUES (1)")
            road.to_client.shut()
        assert scope.cancelled_caught
        assert remote.is_idle
        assert len(roads.roads) == 1  # no request to cancel was made
    assert await sales(observer) == 1


async def test_cancel_after_begin_was_sent_leaves_no_transaction_open(
    roads: Roads, observer: TrioConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trio_pg, "GIVE_UP_S", GENEROUS_S)
    async with await connect(roads.dsn) as remote:
        pid = remote.pgconn.backend_pid

        async def has_begun() -> bool:
            state = await value(observer, "SELECT state FROM pg_stat_activity WHERE pid = %s", pid)
            return bool(state == "idle in transaction")

        road = roads.roads[0]
        road.to_client.shut()
        async with cancelled_before_the_answer(road, has_begun) as scope, remote.transaction():
            raise AssertionError("a cancelled task must not get into a transaction")
        assert scope.cancelled_caught
        assert remote.is_idle
        async with remote.transaction():
            assert await value(remote, "SELECT 1") == 1


async def test_transaction_whose_connection_broke_never_looks_committed(conn: TrioConnection) -> None:
    async def sell_and_break() -> None:
        async with conn.transaction():
            await conn.run_prepared(b"sell", [b"1"])
            conn.abort()

    with pytest.raises(ConnectionLost) as lost:
        await sell_and_break()
    assert not lost.value.was_sent  # COMMIT was not


async def test_leaving_a_connection_closes_it_even_if_cancelled(empty_database: str) -> None:
    with trio.CancelScope() as scope:
        async with await connect(empty_database) as conn:
            await conn.execute("BEGIN")
            scope.cancel()
    assert conn.closed


# --- a definite no, or doubt ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("INSERT INTO sale VALUES (1)", errors.UniqueViolation),
        ("INSERT INTO nowhere VALUES (1)", errors.UndefinedTable),
        ("SELECT 1 / 0", errors.DivisionByZero),
        ("SET statement_timeout = '20ms'; SELECT pg_sleep(60)", errors.QueryCanceled),
        ("DO $$ BEGIN RAISE EXCEPTION '' USING ERRCODE = '08P01'; END $$", errors.ProtocolViolation),
        ("DO $$ BEGIN RAISE EXCEPTION '' USING ERRCODE = '53100'; END $$", errors.DiskFull),
        ("DO $$ BEGIN RAISE EXCEPTION '' USING ERRCODE = 'HF001'; END $$", psycopg.OperationalError),
    ],
)
async def test_error_result_of_a_living_server_is_a_definite_refusal(
    conn: TrioConnection, sql: str, expected: type[psycopg.Error]
) -> None:
    await conn.run_prepared(b"sell", [b"1"])
    with pytest.raises(expected) as refused:
        await conn.execute(sql.encode())
    assert is_refusal(refused.value)
    assert not isinstance(refused.value, ConnectionLost)
    assert conn.is_idle
    assert await sales(conn) == 1


async def test_what_libpq_cannot_send_closes_the_connection(conn: TrioConnection) -> None:
    with pytest.raises(ConnectionLost, match="65535"):
        await conn.run_prepared(b"sell", [b"1"] * 65536)
    assert conn.closed


async def test_wrong_number_of_parameters_is_a_refusal(conn: TrioConnection) -> None:
    with pytest.raises(errors.ProtocolViolation) as refused:
        await conn.run_prepared(b"sell", [b"1", b"2"])
    assert is_refusal(refused.value)
    assert conn.is_idle


async def test_refusal_that_comes_behind_the_success_is_found_on_the_hot_path(conn: TrioConnection) -> None:
    """A deferred constraint fails at the implicit commit, after the row count has already been sent."""
    await conn.execute("CREATE TABLE late (id int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
    await conn.prepare(b"late", b"INSERT INTO late SELECT $1::int FROM generate_series(1, 2) RETURNING id")
    with pytest.raises(errors.UniqueViolation) as refused:
        await conn.run_prepared(b"late", [b"1"])
    assert is_refusal(refused.value)
    assert conn.is_idle
    assert await value(conn, "SELECT count(*) FROM late") == 0


@pytest.mark.parametrize("state", ["57P01", "57P02", "57P03", "57P05", "08006", "08007", "40003"])
async def test_error_of_a_server_that_cannot_know_the_outcome_is_a_loss(conn: TrioConnection, state: str) -> None:
    sql = f"DO $$ BEGIN RAISE EXCEPTION 'gone' USING ERRCODE = '{state}'; END $$"
    with pytest.raises(ConnectionLost, match="gone") as lost:
        await conn.execute(sql.encode())
    assert lost.value.was_sent
    assert not is_refusal(lost.value)
    assert conn.closed


def test_same_state_is_a_refusal_as_an_error_and_none_as_a_fatal_one() -> None:
    def disk_full(severity: bytes) -> psycopg.Error:
        fields = {pq.DiagnosticField.SEVERITY_NONLOCALIZED: severity, pq.DiagnosticField.SQLSTATE: b"53100"}
        return errors.DiskFull("disk full", info={int(field): text for field, text in fields.items()})

    assert is_refusal(disk_full(b"ERROR"))
    assert not is_refusal(disk_full(b"FATAL"))
    assert not is_refusal(disk_full(b"PANIC"))
    assert not is_refusal(psycopg.OperationalError("libpq's own"))
    assert not is_refusal(ConnectionLost("gone"))
    assert not is_refusal(ValueError())


async def test_fatal_error_with_an_ordinary_state_is_a_loss(conn: TrioConnection) -> None:
    await conn.execute("SET transaction_timeout = '20ms'")
    with trio.fail_after(GENEROUS_S), pytest.raises(ConnectionLost) as lost:
        await conn.run_prepared(b"sleep", [b"60"])
    cause = lost.value.__cause__
    assert isinstance(cause, psycopg.Error)
    assert cause.diag.sqlstate == "25P04"
    assert conn.closed


@pytest.mark.parametrize("way", ["hot path", "cursor", "transaction"])
async def test_backend_terminated_in_mid_statement_is_a_loss_in_doubt(
    conn: TrioConnection, observer: TrioConnection, way: str
) -> None:
    backend = await conn.identify()

    async def terminate_when_running() -> None:
        await wait_until_running(observer, backend.pid)
        assert await terminate_backend(observer, backend)

    async def sleep() -> None:
        if way == "hot path":
            await conn.run_prepared(b"sleep", [b"60"])
        elif way == "cursor":
            await conn.execute("SELECT pg_sleep(60)")
        else:
            async with conn.transaction():
                await conn.execute("SELECT pg_sleep(60)")

    with trio.fail_after(GENEROUS_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(terminate_when_running)
            with pytest.raises(ConnectionLost) as lost:
                await sleep()
    assert lost.value.was_sent
    assert not is_refusal(lost.value)
    assert conn.closed
    assert conn.backend == backend  # still known: now is when it is needed


async def test_backend_terminated_while_idle_is_a_loss_on_the_next_statement(
    conn: TrioConnection, observer: TrioConnection
) -> None:
    await terminate_backend(observer, await conn.identify())

    async def is_lost() -> bool:
        try:
            await conn.run_prepared(b"echo", [b"x"])
        except ConnectionLost as lost:
            return lost.was_sent
        return False  # the signal is still on its way

    await eventually(is_lost)
    with pytest.raises(ConnectionLost) as again:
        await conn.run_prepared(b"echo", [b"x"])
    assert not again.value.was_sent
    with pytest.raises(ConnectionLost) as again:
        await conn.execute("SELECT 1")
    assert not again.value.was_sent


async def test_connection_cut_before_the_answer_is_a_loss_though_the_statement_committed(
    roads: Roads, conn: TrioConnection, observer: TrioConnection
) -> None:
    async def cut_once_committed() -> None:
        async def is_committed() -> bool:
            return await sales(observer) == 1

        await eventually(is_committed)
        roads.roads[0].cut()

    async with await connect(roads.dsn) as remote:
        await remote.prepare(b"sell", b"INSERT INTO sale VALUES ($1::int)")
        roads.roads[0].to_client.shut()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cut_once_committed)
            with trio.fail_after(GENEROUS_S), pytest.raises(ConnectionLost) as lost:
                await remote.run_prepared(b"sell", [b"7"])
        assert lost.value.was_sent
        assert remote.closed
    assert await sales(observer) == 1


async def test_connection_cut_while_sending_is_a_loss(roads: Roads) -> None:
    async with await connect(roads.dsn) as conn:
        await conn.prepare(b"echo", b"SELECT $1::text")
        roads.roads[0].to_server.shut()
        async with trio.open_nursery() as nursery:

            async def cut_when_full() -> None:
                await trio.testing.wait_all_tasks_blocked()
                roads.roads[0].cut()

            nursery.start_soon(cut_when_full)
            with trio.fail_after(GENEROUS_S), pytest.raises(ConnectionLost) as lost:
                await conn.run_prepared(b"echo", [b"x" * 32_000_000])
        assert lost.value.was_sent
        assert conn.closed


# --- connecting -----------------------------------------------------------------------------------------


async def test_cancel_while_connecting_closes_the_half_open_connection() -> None:
    async with open_silent_server() as (port, told):
        with trio.fail_after(GENEROUS_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connect, f"host=127.0.0.1 port={port}")
                assert await told.receive() == "accepted"
                nursery.cancel_scope.cancel()
            assert await told.receive() == "closed"


async def test_silent_server_times_out_and_is_closed() -> None:
    async with open_silent_server() as (port, told):
        with trio.fail_after(GENEROUS_S):
            with pytest.raises(errors.ConnectionTimeout):
                await TrioConnection.connect(f"host=127.0.0.1 port={port}", timeout_s=0.05)
            assert [await told.receive(), await told.receive()] == ["accepted", "closed"]


async def test_silent_host_does_not_eat_the_time_of_the_next_one(roads: Roads) -> None:
    async with open_silent_server() as (silent_port, _):
        dsn = make_conninfo(roads.dsn, host="127.0.0.1,127.0.0.1", port=f"{silent_port},{roads.port}")
        async with await TrioConnection.connect(dsn, timeout_s=1.0) as conn:
            assert await value(conn, "SELECT 1") == 1


async def test_names_are_resolved_in_a_thread(roads: Roads, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []

    def resolve(host: str, port: object, **_: object) -> list[tuple[object, ...]]:
        assert host == "db.example"
        threads.append(threading.get_ident())
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", roads.port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    async with await connect(make_conninfo(roads.dsn, host="db.example")) as conn:
        assert await value(conn, "SELECT 1") == 1
    assert threads
    assert threading.get_ident() not in threads


async def test_refused_connection_and_bad_dsn_say_so(empty_database: str, tmp_path: object) -> None:
    with pytest.raises(psycopg.OperationalError, match="No such file"):
        await connect(f"host={tmp_path}")
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        await connect(make_conninfo(empty_database, dbname="nowhere"))
    with pytest.raises(psycopg.ProgrammingError):
        await connect("no=such option")


async def test_tcp_peer_that_vanishes_is_found_in_bounded_time(roads: Roads) -> None:
    async with await connect(roads.dsn) as conn:
        with socket.socket(fileno=os.dup(conn.fileno())) as sock:
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            if hasattr(socket, "TCP_KEEPIDLE"):
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 5
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 1
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 5
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 10_000
    async with await connect(make_conninfo(roads.dsn, keepalives_idle=60)) as conn:
        with socket.socket(fileno=os.dup(conn.fileno())) as sock:
            if hasattr(socket, "TCP_KEEPIDLE"):
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60


async def test_session_is_autocommit_utf8_and_named(empty_database: str) -> None:
    async with await connect(make_conninfo(empty_database, client_encoding="LATIN1")) as conn:
        assert conn.autocommit
        assert await value(conn, "SHOW client_encoding") == "UTF8"
        assert await value(conn, "SHOW application_name") == "holdfast"
    async with await connect(make_conninfo(empty_database, application_name="from dsn")) as conn:
        assert await value(conn, "SHOW application_name") == "from dsn"
    async with await connect(empty_database, application_name="writer") as conn:
        assert await value(conn, "SHOW application_name") == "writer"


# --- backend identity -----------------------------------------------------------------------------------


async def test_backend_is_terminated_only_if_pid_and_start_agree(empty_database: str) -> None:
    async with (
        await connect(empty_database, identify=True) as conn,
        await connect(make_conninfo(empty_database, options="-c TimeZone=Asia/Tokyo -c DateStyle=German")) as other,
    ):
        backend = conn.backend
        assert backend is not None
        assert backend.pid == conn.pgconn.backend_pid

        assert not await terminate_backend(other, Backend(backend.pid, "2001-01-01T00:00:00.000000"))
        assert not await terminate_backend(other, Backend(other.pgconn.backend_pid, backend.started_at))
        assert await value(conn, "SELECT 1") == 1
        assert await value(other, "SELECT 1") == 1

        assert await terminate_backend(other, backend)

        async def is_gone() -> bool:
            return not await terminate_backend(other, backend)

        await eventually(is_gone)
        with pytest.raises(ConnectionLost):
            await conn.execute("SELECT 1")


# --- pool -----------------------------------------------------------------------------------------------


def pool_of(dsn: str, size: int, **options: Any) -> Pool:
    options = {"acquire_timeout_s": GENEROUS_S, "connect_timeout_s": GENEROUS_S, **options}
    return Pool(dsn, size=size, application_name="pool", **options)


async def test_pool_reuses_a_connection_and_opens_none_before_it_is_needed(empty_database: str) -> None:
    async with aclosing(pool_of(empty_database, 3)) as pool:
        assert pool.statistics().opened_total == 0
        pids = set()
        for _ in range(5):
            async with pool.acquire() as conn:
                pids.add(await value(conn, "SELECT pg_backend_pid()"))
                assert pool.statistics().lent == 1
        assert len(pids) == 1
        statistics = pool.statistics()
        assert (statistics.size_max, statistics.lent, statistics.idle, statistics.opened_total) == (3, 0, 1, 1)


async def test_pool_serves_in_order_of_arrival(empty_database: str) -> None:
    async with aclosing(pool_of(empty_database, 1)) as pool:
        served: list[int] = []

        async def borrow(number: int) -> None:
            async with pool.acquire() as conn:
                served.append(number)
                await value(conn, "SELECT 1")

        async with trio.open_nursery() as nursery, pool.acquire():
            for number in range(10):
                nursery.start_soon(borrow, number)
                await trio.testing.wait_all_tasks_blocked()
            assert pool.statistics().waiting == 10
            assert served == []
        assert served == list(range(10))
        assert pool.statistics().waiting == 0


async def test_pool_is_bounded(empty_database: str) -> None:
    async with aclosing(pool_of(empty_database, 2)) as pool:

        async def borrow() -> None:
            async with pool.acquire() as conn:
                assert await sessions(conn, "pool") <= 2
                assert pool.statistics().lent <= 2

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(borrow)
        assert pool.statistics().opened_total == 2
        assert pool.statistics().idle == 2


async def test_pool_timeout_is_typed_and_costs_no_slot(empty_database: str) -> None:
    async with aclosing(pool_of(empty_database, 1, acquire_timeout_s=0.02)) as pool:
        async with pool.acquire():
            with pytest.raises(PoolTimeout):
                async with pool.acquire():
                    raise AssertionError("lent twice")
        assert pool.statistics().timeout_total == 1
        async with pool.acquire() as conn:
            assert await value(conn, "SELECT 1") == 1


async def test_cancelled_waiter_costs_no_slot(empty_database: str) -> None:
    async with aclosing(pool_of(empty_database, 1)) as pool:
        async with pool.acquire():
            with trio.CancelScope() as scope:
                scope.cancel()
                async with pool.acquire():
                    raise AssertionError("lent twice")
            assert scope.cancelled_caught
        async with pool.acquire() as conn:
            assert await value(conn, "SELECT 1") == 1
        assert pool.statistics().lent == 0


async def test_idle_connection_whose_backend_was_terminated_is_discarded(
    empty_database: str, observer: TrioConnection
) -> None:
    async with aclosing(pool_of(empty_database, 1)) as pool:
        async with pool.acquire() as conn:
            first = await conn.identify()
        await terminate_backend(observer, first)
        await wait_until_gone(observer, "pool")
        async with pool.acquire() as conn:
            assert await value(conn, "SELECT pg_backend_pid()") != first.pid
        statistics = pool.statistics()
        assert (statistics.discarded_total, statistics.opened_total, statistics.idle) == (1, 2, 1)


async def test_connection_returned_in_a_transaction_or_broken_is_closed(
    empty_database: str, observer: TrioConnection
) -> None:
    async with aclosing(pool_of(empty_database, 1)) as pool:
        async with pool.acquire() as conn:
            await conn.execute("BEGIN")
        assert conn.closed
        async with pool.acquire() as conn:
            conn.abort()
        with pytest.raises(errors.DivisionByZero):
            async with pool.acquire() as conn:
                await conn.execute("SELECT 1 / 0")
        assert not conn.closed  # a refusal is no reason
        assert pool.statistics().discarded_total == 2
    await wait_until_gone(observer, "pool")


async def test_cancelled_borrower_returns_a_usable_connection(empty_database: str, observer: TrioConnection) -> None:
    async with aclosing(pool_of(empty_database, 1)) as pool, trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            async with pool.acquire() as conn:
                nursery.start_soon(cancel_when_running, observer, conn.pgconn.backend_pid, scope)
                await conn.execute("SELECT pg_sleep(60)")
        assert scope.cancelled_caught
        assert pool.statistics().idle == 1
        assert conn.pgconn.transaction_status == IDLE


async def test_on_connect_prepares_each_new_connection_once(empty_database: str) -> None:
    async def prepare(conn: TrioConnection) -> None:
        await conn.prepare(b"one", b"SELECT 1")

    async with aclosing(pool_of(empty_database, 2, on_connect=prepare)) as pool:
        for _ in range(2):
            async with pool.acquire() as a, pool.acquire() as b:
                for conn in (a, b):
                    assert (await conn.run_prepared(b"one")).get_value(0, 0) == b"1"
        assert pool.statistics().opened_total == 2


async def test_cancel_during_set_up_leaks_no_backend_and_no_slot(empty_database: str, observer: TrioConnection) -> None:
    started = trio.Event()

    async def never_ready(conn: TrioConnection) -> None:
        started.set()
        await trio.sleep_forever()

    async with aclosing(pool_of(empty_database, 1, on_connect=never_ready)) as pool:
        async with trio.open_nursery() as nursery:

            async def borrow() -> None:
                async with pool.acquire():
                    raise AssertionError("lent half prepared")

            nursery.start_soon(borrow)
            await started.wait()
            nursery.cancel_scope.cancel()
        await wait_until_gone(observer, "pool")
        statistics = pool.statistics()
        assert (statistics.lent, statistics.idle, statistics.opened_total) == (0, 0, 0)


async def test_set_up_that_fails_or_hangs_leaks_no_backend_and_no_slot(
    empty_database: str, observer: TrioConnection
) -> None:
    async def fail(conn: TrioConnection) -> None:
        await conn.execute("SELECT 1 / 0")

    async def leave_open(conn: TrioConnection) -> None:
        await conn.execute("BEGIN")

    async def hang(conn: TrioConnection) -> None:
        await conn.execute("SELECT pg_sleep(60)")

    for on_connect, limit_s, expected in (
        (fail, GENEROUS_S, errors.DivisionByZero),
        (leave_open, GENEROUS_S, AssertionError),
        (hang, 0.1, errors.ConnectionTimeout),
    ):
        pool = pool_of(empty_database, 1, on_connect=on_connect, connect_timeout_s=limit_s)
        for _ in range(2):
            with pytest.raises(expected):
                async with pool.acquire():
                    raise AssertionError("lent half prepared")
        await wait_until_gone(observer, "pool")
        assert pool.statistics().lent == 0


async def test_failed_connect_gives_the_slot_back(tmp_path: object) -> None:
    pool = pool_of(f"host={tmp_path}", 1)
    for _ in range(3):
        with pytest.raises(psycopg.OperationalError):
            async with pool.acquire():
                raise AssertionError("there is no server")
    assert pool.statistics().lent == 0


async def test_closed_pool_closes_idle_connections_now_and_lent_ones_on_return(
    empty_database: str, observer: TrioConnection
) -> None:
    pool = pool_of(empty_database, 2)
    async with pool.acquire() as lent:
        async with pool.acquire() as idle:
            pass
        with trio.CancelScope() as scope:
            scope.cancel()
            await pool.aclose()
        assert idle.closed
        assert await value(lent, "SELECT 1") == 1
        with pytest.raises(trio.ClosedResourceError):
            async with pool.acquire():
                raise AssertionError("lent by a closed pool")
    assert lent.closed
    await wait_until_gone(observer, "pool")
