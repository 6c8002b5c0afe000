"""What only the real ledger meets: backends that die, freeze or hold on, other engines, a server unfit to
serve from."""

import os
import signal
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import NoReturn

import psycopg
import pytest
import trio
import trio.testing
from psycopg import sql

from api.settings import load
from engine.ledger import Batch, Change, InDoubt, LedgerFault, Rejected, Resolution, StorageFull, Unavailable
from engine.model import DropRecord, Instant
from persistence import ledger as ledger_module
from persistence import resolution, startup, statements
from persistence.embedded import EmbeddedServer
from persistence.ledger import PostgresLedger, open_ledger
from persistence.migrate import downgrade
from persistence.schema import SchemaOutdated
from persistence.startup import AnotherEngine, ClockSkew, StartRefused, UnsafeDurability
from persistence.trio_pg import ConnectionLost, TrioConnection
from tests.persistence.scribe import Scribe, at, user
from tests.persistence.subjects import TEST_OPTIONS, PostgresSubject, lose_answers, postgres_subject


@pytest.fixture
async def subject(database: str) -> AsyncIterator[PostgresSubject]:
    async with postgres_subject(database) as subject:
        yield subject


@pytest.fixture
async def session(database: str) -> AsyncIterator[TrioConnection]:
    """Somebody else in the same database."""
    async with await TrioConnection.connect(database, timeout_s=5) as conn:
        yield conn


def writer_pid(ledger: PostgresLedger) -> int:
    assert ledger._writer is not None
    assert ledger._writer.backend is not None
    return ledger._writer.backend.pid


async def born(subject: PostgresSubject, *scribes: Scribe) -> None:
    await subject.ledger.commit([scribe.birth() for scribe in scribes])


async def events_of(subject: PostgresSubject, scribe: Scribe) -> int:
    return len(await subject.events(scribe.drop_id))


# The writer's connection breaks -------------------------------------------------------------------------


async def test_a_writer_that_died_while_idle_is_replaced_without_any_doubt(
    subject: PostgresSubject, session: TrioConnection
) -> None:
    scribe = Scribe()
    await born(subject, scribe)
    await kill(session, writer_pid(subject.ledger))
    scribe.reserves(user())
    assert await subject.ledger.commit([scribe.change()]) == {scribe.drop_id}
    assert subject.ledger.statistics().connections == 2


async def kill(session: TrioConnection, pid: int) -> None:
    """Terminate a backend and wait until it is gone."""
    await session.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))


async def test_a_backend_killed_in_mid_statement_leaves_a_doubt_that_is_resolved(
    subject: PostgresSubject, session: TrioConnection
) -> None:
    scribe = Scribe()
    await born(subject, scribe)
    scribe.reserves(user())
    batch = [scribe.change()]
    pid = writer_pid(subject.ledger)
    async with session.transaction(), trio.open_nursery() as nursery:
        await session.execute("SELECT 1 FROM drops WHERE id = %s FOR UPDATE", (scribe.drop_id,))
        nursery.start_soon(doubts, subject.ledger, batch)
        await until_waiting(session, pid)
        await kill(session, pid)
    assert await subject.ledger.resolve(batch) == {scribe.drop_id: Resolution(False, 2)}
    assert await events_of(subject, scribe) == 1


async def doubts(ledger: PostgresLedger, batch: Batch) -> None:
    with pytest.raises(InDoubt):
        await ledger.commit(batch)


async def until_waiting(session: TrioConnection, pid: int) -> None:
    """Return once that backend waits for a lock."""
    with trio.fail_after(10):
        while True:
            cursor = await session.execute("SELECT cardinality(pg_blocking_pids(%s)) > 0", (pid,))
            row = await cursor.fetchone()
            if row is not None and row[0]:
                return


async def test_a_connection_that_was_closed_before_sending_leaves_no_doubt(subject: PostgresSubject) -> None:
    scribe = Scribe()
    await born(subject, scribe)
    assert subject.ledger._writer is not None
    subject.ledger._writer.abort()
    scribe.reserves(user())
    assert await subject.ledger.commit([scribe.change()]) == {scribe.drop_id}


async def test_an_error_that_no_server_wrote_leaves_doubt(subject: PostgresSubject) -> None:
    scribe = Scribe()
    await born(subject, scribe)
    writer = await subject.ledger._ready_writer()

    async def odd(*_: object, **__: object) -> NoReturn:
        raise psycopg.OperationalError("something odd")

    writer.run_prepared = odd  # type: ignore[method-assign]
    scribe.reserves(user())
    batch = [scribe.change()]
    with pytest.raises(InDoubt, match="something odd"):
        await subject.ledger.commit(batch)
    assert writer.closed
    assert await subject.ledger.resolve(batch) == {scribe.drop_id: Resolution(False, 2)}


async def test_a_role_with_another_isolation_level_makes_no_difference(database: str, session: TrioConnection) -> None:
    name = sql.Identifier(session.info.dbname)
    serializable = sql.SQL("ALTER DATABASE {} SET default_transaction_isolation = 'serializable'").format(name)
    await session.execute(serializable)
    async with open_ledger(database, TEST_OPTIONS) as ledger:
        scribe = Scribe()
        await ledger.commit([scribe.birth()])
        scribe.reserves(user())
        batch = [scribe.change()]
        hits: list[frozenset[str]] = []

        async def commit() -> None:
            hits.append(frozenset(await ledger.commit(batch)))

        async with trio.open_nursery() as nursery, session.transaction():
            await session.execute("UPDATE drops SET epoch = epoch + 1 WHERE id = %s", (scribe.drop_id,))
            nursery.start_soon(commit)
            await until_waiting(session, writer_pid(ledger))
        assert hits == [frozenset()]


async def test_a_server_out_of_reach_is_unavailable(subject: PostgresSubject, server: EmbeddedServer) -> None:
    scribe = Scribe()
    await born(subject, scribe)
    scribe.reserves(user())
    batch = [scribe.change()]
    subject.ledger.close()
    subject.ledger._dsn = server.dsn_of("no_such_database")
    with pytest.raises(Unavailable):
        await subject.ledger.commit(batch)
    with pytest.raises(Unavailable):
        await subject.ledger.take_over(None)
    with pytest.raises(Unavailable):
        await subject.ledger.resolve(batch)
    with pytest.raises(Unavailable):
        await subject.ledger.newest_instant()


# Backends that freeze or hold on ------------------------------------------------------------------------


async def test_a_frozen_backend_times_out_into_doubt_and_is_terminated(database: str) -> None:
    options = replace(TEST_OPTIONS, commit_timeout_s=0.2)
    async with open_ledger(database, options) as ledger:
        scribe = Scribe()
        await ledger.commit([scribe.birth()])
        scribe.reserves(user())
        batch = [scribe.change()]
        pid = writer_pid(ledger)
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(InDoubt, match=r"no answer within 0\.2 s"):
                await ledger.commit(batch)
            # It froze before it took the lock: the fence is up at once, and holds when it thaws.
            assert await ledger.resolve(batch) == {scribe.drop_id: Resolution(False, 2)}
            assert ledger.statistics().terminated == 1
        finally:
            os.kill(pid, signal.SIGCONT)
        await until_gone(database, pid)
        assert counts(await ledger.take_over([scribe.drop_id])) == (10, 0, 0, 1)


def counts(records: Sequence[DropRecord]) -> tuple[int, ...]:
    (record,) = records
    return tuple(getattr(record, name) for name in ("available_stock", "held_count", "sold_count", "seq"))


async def until_gone(dsn: str, pid: int) -> None:
    async with await TrioConnection.connect(dsn, timeout_s=5) as conn:
        with trio.fail_after(10):
            while True:
                cursor = await conn.execute("SELECT 1 FROM pg_stat_activity WHERE pid = %s", (pid,))
                if await cursor.fetchone() is None:
                    return


async def test_a_backend_that_holds_the_lock_is_terminated_to_resolve(subject: PostgresSubject, database: str) -> None:
    """The half-open old session: its statement ran, its transaction is open, and nobody will end it."""
    scribe = Scribe()
    await born(subject, scribe)
    scribe.reserves(user())
    batch = [scribe.change()]
    ledger = subject.ledger
    async with await TrioConnection.connect(database, timeout_s=5, identify=True) as half_open:
        assert half_open.backend is not None
        await half_open.execute("BEGIN")
        await half_open.execute("UPDATE drops SET seq = 2, updated_at = created_at WHERE id = %s", (scribe.drop_id,))
        lose_answers(await ledger._ready_writer(), run=False)
        with pytest.raises(InDoubt):
            await ledger.commit(batch)
        ledger._suspects[half_open.backend] = False
        assert await ledger.resolve(batch) == {scribe.drop_id: Resolution(False, 2)}
        await until_gone(database, half_open.backend.pid)
    assert ledger.statistics().terminated >= 1


async def test_a_strangers_lock_is_waited_for_not_terminated(subject: PostgresSubject, session: TrioConnection) -> None:
    scribe = Scribe()
    await born(subject, scribe)
    scribe.reserves(user())
    batch = [scribe.change()]
    lose_answers(await subject.ledger._ready_writer(), run=True)
    with pytest.raises(InDoubt):
        await subject.ledger.commit(batch)
    subject.ledger._options = replace(TEST_OPTIONS, resolve_timeout_s=0.3, take_over_timeout_s=0.3)
    async with session.transaction():
        await session.execute("SELECT 1 FROM drops WHERE id = %s FOR UPDATE", (scribe.drop_id,))
        with pytest.raises(Unavailable):
            await subject.ledger.resolve(batch)
        with pytest.raises(Unavailable):
            await subject.ledger.take_over([scribe.drop_id])
    # The stranger is done, and the doubt is still there to be resolved.
    assert await subject.ledger.resolve(batch) == {scribe.drop_id: Resolution(True, 2)}


async def test_a_drop_that_somebody_wrote_to_by_hand_keeps_no_other_from_its_truth(
    subject: PostgresSubject, session: TrioConnection
) -> None:
    tampered, other = Scribe(), Scribe()
    await born(subject, tampered, other)
    tampered.reserves(user())
    other.reserves(user())
    batch = [tampered.change(), other.change()]
    await session.execute("UPDATE drops SET seq = seq + 7 WHERE id = %s", (tampered.drop_id,))
    assert await subject.ledger.commit(batch) == {other.drop_id}
    assert await subject.ledger.resolve(batch) == {
        tampered.drop_id: Resolution(False, 2),
        other.drop_id: Resolution(True, 2),
    }
    # The contradiction is for its own guard to find.
    assert await subject.ledger.commit([Change(tampered.drop_id, 2, 1, batch[0].events, [])]) == frozenset()


async def test_a_birth_in_doubt_waits_until_its_backend_is_gone(database: str) -> None:
    """Frozen before it wrote anything, it holds no lock that would make us wait; it must not wake up and
    write."""
    options = replace(TEST_OPTIONS, commit_timeout_s=0.2, resolve_timeout_s=0.3)
    async with open_ledger(database, options) as ledger:
        scribe = Scribe()
        batch = [scribe.birth()]
        pid = writer_pid(ledger)
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(InDoubt):
                await ledger.commit(batch)
            with pytest.raises(Unavailable):
                await ledger.resolve(batch)
        finally:
            os.kill(pid, signal.SIGCONT)
        ledger._options = TEST_OPTIONS
        assert await ledger.resolve(batch) == {scribe.drop_id: Resolution(False, None)}
        assert await ledger.take_over([scribe.drop_id]) == []


async def test_a_birth_in_doubt_waits_for_its_own_backend_and_for_no_other(database: str) -> None:
    options = replace(TEST_OPTIONS, commit_timeout_s=0.2)
    async with open_ledger(database, options) as ledger:
        scribe, newcomer = Scribe(), Scribe()
        await ledger.commit([scribe.birth()])
        scribe.reserves(user())
        change = [scribe.change()]
        pid = writer_pid(ledger)
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(InDoubt):
                await ledger.commit(change)
            assert await ledger.resolve(change) == {scribe.drop_id: Resolution(False, 2)}
            birth = [newcomer.birth()]
            lose_answers(await ledger._ready_writer(), run=True)
            with pytest.raises(InDoubt):
                await ledger.commit(birth)
            assert await ledger.resolve(birth) == {newcomer.drop_id: Resolution(True, 2)}
        finally:
            os.kill(pid, signal.SIGCONT)
        await until_gone(database, pid)


async def test_a_resolution_that_broke_off_can_be_asked_again_and_keeps_the_drop(
    subject: PostgresSubject, monkeypatch: pytest.MonkeyPatch
) -> None:
    scribe = Scribe()
    await born(subject, scribe)
    scribe.reserves(user())
    batch = [scribe.change()]
    lose_answers(await subject.ledger._ready_writer(), run=True)
    with pytest.raises(InDoubt):
        await subject.ledger.commit(batch)
    resolve = resolution.resolve

    async def breaks_off(conn: TrioConnection, batch: Batch, raises: resolution.OwnRaises) -> NoReturn:
        """The new epoch is committed, and nobody hears of it."""
        await resolve(conn, batch, raises)
        await conn.execute("COMMIT")
        conn.abort()
        raise ConnectionLost("cut by the test")

    with monkeypatch.context() as patch:
        patch.setattr(resolution, "resolve", breaks_off)
        with pytest.raises(Unavailable):
            await subject.ledger.resolve(batch)
    assert await subject.ledger.resolve(batch) == {scribe.drop_id: Resolution(True, 3)}


@pytest.mark.parametrize("is_locked", [False, True], ids=["out of reach", "locked"])
async def test_a_drop_that_a_rival_took_while_we_could_not_ask_is_let_go(
    subject: PostgresSubject, session: TrioConnection, server: EmbeddedServer, *, is_locked: bool
) -> None:
    """However often we asked: what never came to a commit has raised nothing."""
    doubtful, broken = Scribe(), Scribe()
    await born(subject, doubtful, broken)
    doubtful.reserves(user())
    batch = [doubtful.change()]
    ledger, dsn = subject.ledger, subject.ledger._dsn
    lose_answers(await ledger._ready_writer(), run=True)
    with pytest.raises(InDoubt):
        await ledger.commit(batch)
    ledger._options = replace(TEST_OPTIONS, resolve_timeout_s=0.2, take_over_timeout_s=0.2)
    async with session.transaction():
        if is_locked:
            await session.execute("SELECT 1 FROM drops FOR UPDATE")
        else:
            ledger._dsn = server.dsn_of("no_such_database")
        for _ in range(2):
            with pytest.raises(Unavailable):
                await ledger.resolve(batch)
            with pytest.raises(Unavailable):
                await ledger.reclaim(broken.drop_id, 1)
    ledger._dsn, ledger._options = dsn, TEST_OPTIONS
    for scribe in (doubtful, broken):
        await subject.rival_takes(scribe.drop_id)
    assert await ledger.resolve(batch) == {doubtful.drop_id: Resolution(True, None)}
    assert await ledger.reclaim(broken.drop_id, 1) is None
    assert await subject.sql("SELECT DISTINCT epoch FROM drops") == [(2,)], "the rival's are untouched"


# Locks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", ["commit", "take_over", "resolve"])
async def test_drops_are_locked_in_the_order_of_their_ids_so_nothing_deadlocks(
    subject: PostgresSubject, session: TrioConnection, write: str
) -> None:
    low, high = Scribe(), Scribe()
    await born(subject, low, high)
    ledger = subject.ledger
    ledger._options = replace(TEST_OPTIONS, lock_timeout_s=5)
    for scribe in (low, high):
        scribe.reserves(user())
    batch = [high.change(), low.change()]
    writes = {
        "commit": lambda: ledger.commit(batch),
        "take_over": lambda: ledger.take_over([high.drop_id, low.drop_id]),
        "resolve": lambda: ledger.resolve(batch),
    }
    async with trio.open_nursery() as nursery, session.transaction():
        await session.execute("SELECT 1 FROM drops WHERE id = %s FOR UPDATE", (low.drop_id,))
        nursery.start_soon(writes[write])
        await until_somebody_waits_for(session)
        # If it had begun with the other one, each of us would hold what the other waits for.
        await session.execute("SELECT 1 FROM drops WHERE id = %s FOR UPDATE NOWAIT", (high.drop_id,))


async def until_somebody_waits_for(session: TrioConnection) -> None:
    """Return once another backend waits for a lock that this session holds."""
    waits = "SELECT 1 FROM pg_locks WHERE NOT granted AND pg_backend_pid() = ANY (pg_blocking_pids(pid))"
    with trio.fail_after(10):
        while await (await session.execute(waits)).fetchone() is None:
            pass


async def test_a_commit_waits_for_a_rival_and_then_misses(subject: PostgresSubject, session: TrioConnection) -> None:
    scribe = Scribe()
    await born(subject, scribe)
    scribe.reserves(user())
    batch = [scribe.change()]
    hits: list[frozenset[str]] = []

    async def commit() -> None:
        hits.append(frozenset(await subject.ledger.commit(batch)))

    async with trio.open_nursery() as nursery, session.transaction():
        await session.execute("UPDATE drops SET epoch = epoch + 1 WHERE id = %s", (scribe.drop_id,))
        nursery.start_soon(commit)
        await until_waiting(session, writer_pid(subject.ledger))
    assert hits == [frozenset()]
    assert await events_of(subject, scribe) == 1


async def test_a_locked_drop_is_refused_before_it_counts_as_a_stall_of_all(
    database: str, session: TrioConnection
) -> None:
    assert ledger_module.LedgerOptions().commit_lock_timeout_s < load({}, None).commit_stall_ms / 1000
    locked, other = Scribe(), Scribe()
    async with open_ledger(database, replace(TEST_OPTIONS, commit_lock_timeout_s=0.05)) as ledger:
        await ledger.commit([locked.birth(), other.birth()])
        locked.reserves(user())
        other.reserves(user())
        async with session.transaction():
            await session.execute("SELECT 1 FROM drops WHERE id = %s FOR UPDATE", (locked.drop_id,))
            with pytest.raises(Rejected, match="55P03"):
                await ledger.commit([locked.change()])
            assert await ledger.commit([other.change()]) == {other.drop_id}
        assert ledger.statistics().connections == 1


async def test_a_commit_under_way_is_not_cancelled_with_its_caller(
    subject: PostgresSubject, session: TrioConnection
) -> None:
    scribe = Scribe()
    await born(subject, scribe)
    scribe.reserves(user())
    hits: list[frozenset[str]] = []
    caller = trio.CancelScope()

    async def commit() -> None:
        with caller:
            hits.append(frozenset(await subject.ledger.commit([scribe.change()])))

    async with trio.open_nursery() as nursery, session.transaction():
        await session.execute("SELECT 1 FROM drops WHERE id = %s FOR UPDATE", (scribe.drop_id,))
        nursery.start_soon(commit)
        await until_waiting(session, writer_pid(subject.ledger))
        caller.cancel()
        await trio.testing.wait_all_tasks_blocked()
    assert hits == [{scribe.drop_id}]
    assert subject.ledger.statistics().connections == 1


# Refusals of the server ---------------------------------------------------------------------------------


async def test_a_row_count_that_differs_says_what_it_counted(subject: PostgresSubject) -> None:
    scribe = Scribe()
    await born(subject, scribe)
    hold = scribe.reserves(user())
    await subject.ledger.commit([scribe.change()])
    await subject.end_behind_the_engine(hold)
    scribe.expires(hold)
    with pytest.raises(Rejected, match=r"row counts .* are \{1,0,0,0,0,0\} where \{1,0,1,0,0,0\} are due"):
        await subject.ledger.commit([scribe.change()])


async def test_a_constraint_is_named_and_no_value_is_quoted(subject: PostgresSubject) -> None:
    scribe, ann = Scribe(), user()
    await born(subject, scribe)
    scribe.reserves(ann)
    await subject.ledger.commit([scribe.change()])
    scribe.reserves(ann)
    with pytest.raises(Rejected, match=r"23505 \(uq_reservations_active\)") as caught:
        await subject.ledger.commit([scribe.change()])
    assert ann not in str(caught.value)


@pytest.mark.parametrize(
    ("sqlstate", "fault"),
    [
        ("53100", StorageFull),  # disk_full
        ("53200", StorageFull),  # out_of_memory
        ("58030", Rejected),  # io_error: as an ERROR it rolled back, but room is not what is missing
        ("40P01", Rejected),
        ("57014", Rejected),  # statement_timeout
        ("25006", Unavailable),  # read-only: a standby, or a primary that was demoted
    ],
)
async def test_each_refusal_of_the_server_has_its_fault(
    subject: PostgresSubject, sqlstate: str, fault: type[LedgerFault]
) -> None:
    scribe = Scribe()
    await born(subject, scribe)
    # A trigger is the trick to make the server say it; the product has none.
    await subject.sql(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '{sqlstate}'; END$$"
    )
    await subject.sql("CREATE TRIGGER refuse BEFORE INSERT ON drop_events EXECUTE FUNCTION refuse()")
    scribe.reserves(user())
    batch = [scribe.change()]
    with pytest.raises(fault) as caught:
        await subject.ledger.commit(batch)
    assert type(caught.value) is fault
    assert sqlstate in str(caught.value)
    await subject.sql("DROP TRIGGER refuse ON drop_events")
    assert await subject.ledger.commit(batch) == {scribe.drop_id}


async def test_a_fatal_error_leaves_doubt(subject: PostgresSubject, session: TrioConnection) -> None:
    # 57P01 comes as an answer to the statement, and yet may have come after its commit.
    scribe = Scribe()
    await born(subject, scribe)
    pid = writer_pid(subject.ledger)
    await subject.sql(
        "CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS"
        " $$BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); PERFORM pg_sleep(5); RETURN NEW; END$$"
    )
    await subject.sql("CREATE TRIGGER die BEFORE INSERT ON drop_events EXECUTE FUNCTION die()")
    scribe.reserves(user())
    batch = [scribe.change()]
    with pytest.raises(InDoubt):
        await subject.ledger.commit(batch)
    assert [backend.pid for backend in subject.ledger._suspects] == [pid]
    assert await subject.ledger.resolve(batch) == {scribe.drop_id: Resolution(False, 2)}


# The start ----------------------------------------------------------------------------------------------


async def test_a_second_engine_is_refused(
    subject: PostgresSubject, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup, "_PREDECESSOR_GONE_S", 0.1)
    with pytest.raises(AnotherEngine, match=r"another engine serves from this database \(pid \d+\)"):
        async with open_ledger(database, TEST_OPTIONS):
            pytest.fail("it was let in")


async def test_a_server_that_does_not_say_whether_another_engine_serves_is_out_of_reach(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slow(lock: startup.EngineLock, conn: TrioConnection) -> bool:
        await conn.execute("SELECT pg_sleep(5)")
        return True

    monkeypatch.setattr(startup, "_PREDECESSOR_GONE_S", 0.1)
    monkeypatch.setattr(startup.EngineLock, "_try", slow)
    with pytest.raises(Unavailable, match="no word about the lock"):
        async with open_ledger(database, TEST_OPTIONS):
            pytest.fail("it was let in")


async def test_a_ledger_is_in_reach_when_it_would_take_a_batch(
    subject: PostgresSubject, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(conn: TrioConnection, *, allow_unsafe_durability: bool) -> None:
        raise UnsafeDurability("the test turned it off")

    ledger = subject.ledger
    assert isinstance(ledger, PostgresLedger)
    ledger.close()
    with monkeypatch.context() as patched:
        patched.setattr(ledger_module, "check_settings", refuse)
        with pytest.raises(Unavailable, match="the test turned it off"):
            await ledger.resolve([])
    assert await ledger.resolve([]) == {}
    assert ledger.statistics().is_connected


async def test_what_is_flushed_is_the_sessions_own_setting_and_no_reload_changes_it(subject: PostgresSubject) -> None:
    ledger = subject.ledger
    assert isinstance(ledger, PostgresLedger)
    writer = ledger._writer
    assert writer is not None
    asked = "SELECT source FROM pg_settings WHERE name = 'synchronous_commit'"
    assert await (await writer.execute(asked)).fetchone() == ("session",)


async def test_a_server_notices_that_the_machine_of_an_engine_is_gone(database: str, server: EmbeddedServer) -> None:
    over_tcp = psycopg.conninfo.make_conninfo(database, host="127.0.0.1", port=server.port)
    async with await startup.EngineLock(over_tcp, connect_timeout_s=5)._connect() as lock:
        asked = "SELECT setting FROM pg_settings WHERE name LIKE 'tcp_keepalives_%' ORDER BY name"
        cursor = await lock.execute(asked)
        assert await cursor.fetchall() == [("5",), ("5",), ("1",)]  # count, idle, interval


async def test_an_engine_may_start_as_soon_as_another_has_stopped(database: str) -> None:
    for _ in range(2):
        async with open_ledger(database, TEST_OPTIONS) as ledger:
            assert ledger.statistics().is_lock_held


async def test_a_lost_engine_lock_is_taken_again_and_the_engine_goes_on(
    subject: PostgresSubject, session: TrioConnection
) -> None:
    cursor = await session.execute("SELECT pid FROM pg_locks WHERE locktype = 'advisory'")
    row = await cursor.fetchone()
    assert row is not None
    await kill(session, row[0])
    scribe = Scribe()
    await born(subject, scribe)
    with trio.fail_after(10):
        while True:
            cursor = await session.execute("SELECT pid FROM pg_locks WHERE locktype = 'advisory'")
            again = await cursor.fetchone()
            if again is not None and again != row:
                break
            await trio.lowlevel.checkpoint()
    while not subject.ledger.statistics().is_lock_held:
        await trio.lowlevel.checkpoint()


async def test_a_server_that_may_forget_is_refused(database: str, session: TrioConnection) -> None:
    # The test server runs without fsync.
    options = replace(TEST_OPTIONS, allow_unsafe_durability=False)
    with pytest.raises(UnsafeDurability, match="runs with fsync off"):
        async with open_ledger(database, options):
            pytest.fail("it was let in")
    name = session.info.dbname
    await session.execute(sql.SQL("ALTER DATABASE {} SET synchronous_commit = off").format(sql.Identifier(name)))
    with pytest.raises(UnsafeDurability, match="runs with fsync and synchronous_commit off"):
        async with open_ledger(database, options):
            pytest.fail("it was let in")


async def test_a_pooler_before_the_server_is_refused(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pooler makes the process number up that it sends for cancel requests."""
    monkeypatch.setattr(psycopg.ConnectionInfo, "backend_pid", 1)
    with pytest.raises(StartRefused, match="a connection pooler stands before PostgreSQL"):
        async with open_ledger(database, TEST_OPTIONS):
            pass


async def test_a_database_without_a_schema_is_refused_with_the_command_to_run(empty_database: str) -> None:
    with pytest.raises(SchemaOutdated, match=r"has schema \(none\).*holdfast migrate"):
        async with open_ledger(empty_database, TEST_OPTIONS):
            pytest.fail("it was let in")


async def test_a_database_that_was_migrated_back_is_refused(database: str) -> None:
    await trio.to_thread.run_sync(downgrade, database, "base")
    with pytest.raises(SchemaOutdated, match="holdfast migrate"):
        async with open_ledger(database, TEST_OPTIONS):
            pytest.fail("it was let in")


async def test_a_newer_schema_is_refused(database: str, session: TrioConnection) -> None:
    await session.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(SchemaOutdated, match="newer"):
        async with open_ledger(database, TEST_OPTIONS):
            pytest.fail("it was let in")


@pytest.mark.parametrize("off_s", [-3, 3])
async def test_a_clock_that_disagrees_is_refused(database: str, off_s: float) -> None:
    with pytest.raises(ClockSkew, match=r"3\.0 s apart"):
        async with open_ledger(database, TEST_OPTIONS, wall=lambda: time.time() + off_s):
            pytest.fail("it was let in")
    allowed = replace(TEST_OPTIONS, clock_skew_max_s=float("inf"))
    async with open_ledger(database, allowed, wall=lambda: time.time() + off_s):
        pass


# Instants -----------------------------------------------------------------------------------------------


# Taking over ------------------------------------------------------------------------------------------------


async def test_a_load_goes_on_as_long_as_rows_come(
    database: str, subject: PostgresSubject, monkeypatch: pytest.MonkeyPatch
) -> None:
    scribe = Scribe()
    await born(subject, scribe)
    scribe.reserves(user())
    await subject.ledger.commit([scribe.change()])
    slow = statements.HOLDS + " AND pg_sleep(0.3) IS NOT NULL"
    monkeypatch.setattr(statements, "HOLDS", slow)
    subject.ledger._options = replace(TEST_OPTIONS, take_over_timeout_s=0.2, load_silence_s=5.0)
    assert counts(await subject.ledger.take_over(None)) == (9, 1, 0, 2)
    record = await subject.ledger.reclaim(scribe.drop_id, 2)
    assert record is not None
    assert counts([record]) == (9, 1, 0, 2)
    subject.ledger._options = replace(TEST_OPTIONS, take_over_timeout_s=5.0, load_silence_s=0.2)
    with pytest.raises(Unavailable, match="not done within"):
        await subject.ledger.take_over(None)


async def test_a_roles_limit_for_statements_does_not_end_a_load(
    subject: PostgresSubject, database: str, session: TrioConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    scribe = Scribe()
    await born(subject, scribe)
    scribe.reserves(user())
    await subject.ledger.commit([scribe.change()])
    monkeypatch.setattr(statements, "HOLDS", statements.HOLDS + " AND pg_sleep(0.3) IS NOT NULL")
    name = session.info.dbname
    for limit in ("statement_timeout", "transaction_timeout"):
        await session.execute(f'ALTER DATABASE "{name}" SET {limit} = 200'.encode())
        assert counts(await subject.ledger.take_over(None)) == (9, 1, 0, 2)


async def test_a_table_that_somebody_keeps_locked_is_not_waited_for_for_ever(
    subject: PostgresSubject, session: TrioConnection
) -> None:
    """Each attempt locks the drop, waits for the table in vain, and begins again."""
    scribe = Scribe()
    await born(subject, scribe)
    scribe.reserves(user())
    await subject.ledger.commit([scribe.change()])
    subject.ledger._options = replace(
        TEST_OPTIONS, connect_timeout_s=0.7, take_over_timeout_s=0.7, lock_timeout_s=0.1, load_silence_s=60.0
    )
    async with session.transaction():
        await session.execute("LOCK TABLE reservations IN ACCESS EXCLUSIVE MODE")
        for wanted in (None, [scribe.drop_id]):
            with trio.fail_after(5), pytest.raises(Unavailable, match="rows stay locked"):
                await subject.ledger.take_over(wanted)


async def test_drops_that_are_reloaded_together_take_few_connections(
    subject: PostgresSubject, session: TrioConnection, database: str
) -> None:
    scribes = [Scribe() for _ in range(30)]
    await born(subject, *scribes)
    most = 0
    async with (
        trio.open_nursery() as nursery,
        await TrioConnection.connect(database, timeout_s=5) as holder,
        holder.transaction(),
    ):
        await holder.execute("SELECT 1 FROM drops FOR UPDATE")
        for scribe in scribes:
            nursery.start_soon(subject.ledger.reclaim, scribe.drop_id, 1)
        for _ in range(20):
            cursor = await session.execute(
                "SELECT count(*) FROM pg_stat_activity"
                " WHERE application_name = 'holdfast ledger' AND datname = current_database()"
            )
            row = await cursor.fetchone()
            assert row is not None
            most = max(most, row[0])
            await trio.sleep(0.02)
    assert 0 < most <= 8


async def test_every_millisecond_survives_the_round_trip(subject: PostgresSubject) -> None:
    """The seconds that a double can't hold, both ends of the calendar, a leap day, around a change of the
    clocks."""
    instants = [0, 1, 999, -1, -999, 951_782_400_000, 1_774_746_000_001, 4_294_967_296_123, 253_402_300_799_998]
    scribes = [Scribe() for _ in instants]
    for scribe, ms in zip(scribes, instants, strict=True):
        terms = scribe.terms
        scribe.terms = type(terms)(
            id=terms.id,
            name=terms.name,
            price=0,
            currency="USD",
            total_stock=0,
            starts_at=Instant(ms),
            ends_at=Instant(ms + 1),
            created_by=None,
            created_at=Instant(ms),
        )
    await born(subject, *scribes)
    records = await subject.ledger.take_over([scribe.drop_id for scribe in scribes])
    loaded = {record.terms.id: record.terms for record in records}
    assert loaded == {scribe.drop_id: scribe.terms for scribe in scribes}
    rows = await subject.sql("SELECT count(*) FROM drops WHERE date_trunc('milliseconds', created_at) = created_at")
    assert rows == [(len(instants),)]
    assert await subject.ledger.newest_instant() == at(0)
