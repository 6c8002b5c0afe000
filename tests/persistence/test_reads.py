"""Cold reads, users and idempotency keys."""

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from random import Random

import psycopg
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from engine.ledger import InDoubt, Unavailable
from engine.model import Instant, ReservationId, ReservationStatus, UserId
from persistence import reads as reads_module
from persistence import statements
from persistence.batch_sql import instant
from persistence.embedded import EmbeddedServer
from persistence.ledger import PostgresLedger, open_ledger
from persistence.pool import Pool
from persistence.reads import PurchasePage, Reads, ReservationLine, UsernameTaken
from persistence.usernames import NAME_LENGTH_MAX, default_username, with_suffix
from tests.persistence.scribe import HOLD_MS, Scribe, at, new_id, receipt, user
from tests.persistence.subjects import TEST_OPTIONS


@pytest.fixture
async def pool(database: str) -> AsyncIterator[Pool]:
    pool = Pool(database, size=4, acquire_timeout_s=5, connect_timeout_s=5)
    yield pool
    await pool.aclose()


@pytest.fixture
def reads(pool: Pool) -> Reads:
    return Reads(pool, Random(0))


@pytest.fixture
async def ledger(database: str) -> AsyncIterator[PostgresLedger]:
    async with open_ledger(database, TEST_OPTIONS) as ledger:
        yield ledger


# Purchases and reservations -----------------------------------------------------------------------------


async def test_a_users_purchases_come_newest_first_in_pages(reads: Reads, ledger: PostgresLedger) -> None:
    ann, ben = user(), user()
    scribes = [Scribe(), Scribe()]
    await ledger.commit([scribe.birth() for scribe in scribes])
    bought = []
    for ms in range(1, 6):
        scribe = scribes[ms % 2]
        hold = scribe.reserves(ann, ms=ms)
        bought.append((scribe.purchases(hold, ms=ms), scribe, hold, ms))
    scribes[0].purchases(scribes[0].reserves(ben, ms=6), ms=6)
    await ledger.commit([scribe.change() for scribe in scribes])

    page = await reads.purchases_of(ann, limit=2, offset=1)
    assert page.total == 5
    assert [line.id for line in page.items] == [bought[3][0], bought[2][0]]
    purchase_id, scribe, hold, ms = bought[3]
    line = page.items[0]
    assert (line.id, line.drop_id, line.drop_name) == (purchase_id, scribe.drop_id, scribe.terms.name)
    assert (line.reservation_id, line.qty, line.status, line.created_at) == (hold.id, 1, "paid", at(ms))
    assert (await reads.purchases_of(ann, limit=10, offset=5)).items == []
    assert await reads.purchases_of(user(), limit=10, offset=0) == PurchasePage([], 0)


async def test_a_reservation_is_found_by_its_id_alone(reads: Reads, ledger: PostgresLedger) -> None:
    scribe, ann = Scribe(), user()
    await ledger.commit([scribe.birth()])
    hold = scribe.reserves(ann, qty=2)
    await ledger.commit([scribe.change()])
    line = ReservationLine(hold.id, scribe.drop_id, ann, 2, ReservationStatus.ACTIVE, at(0), at(HOLD_MS), 2, 1)
    assert await reads.reservation(hold.id) == line
    assert await reads.reservation(ReservationId(new_id())) is None


async def test_a_reservation_comes_with_the_version_of_its_own_drop(reads: Reads, ledger: PostgresLedger) -> None:
    scribe, other = Scribe(), Scribe()
    await ledger.commit([scribe.birth(), other.birth()])
    hold = scribe.reserves(user())
    scribe.reserves(user())
    await ledger.commit([scribe.change()])
    await ledger.take_over([scribe.drop_id])
    line = await reads.reservation(hold.id)
    assert line is not None
    assert (line.drop_seq, line.drop_epoch) == (3, 2)


async def test_history_comes_in_pages(reads: Reads, ledger: PostgresLedger) -> None:
    scribe = Scribe()
    await ledger.commit([scribe.birth()])
    for _ in range(4):
        scribe.reserves(user())
    change = scribe.change()
    await ledger.commit([change])
    assert await reads.history(scribe.drop_id, after_seq=2, limit=2) == list(change.events)[1:3]
    assert await reads.history(scribe.drop_id, after_seq=5) == []


# Users --------------------------------------------------------------------------------------------------


async def test_unknown_users_are_made_only_where_that_is_wanted(reads: Reads) -> None:
    ann = user()
    assert await reads.introduce([(ann, "ann")], create=False, at=at(0)) == {}
    assert await reads.introduce([(ann, "ann")], create=True, at=at(0)) == {ann: "ann"}
    assert await reads.introduce([(ann, "other")], create=True, at=at(1)) == {ann: "ann"}, "the first name stays"
    assert await reads.introduce([(ann, None)], create=False, at=at(1)) == {ann: "ann"}
    assert await reads.introduce([], create=True, at=at(1)) == {}


async def test_a_user_without_a_name_gets_one_of_the_id(reads: Reads) -> None:
    ann = UserId("019b1234-5678-7000-8000-000000000001")
    assert await reads.introduce([(ann, None)], create=True, at=at(0)) == {ann: "user_019b12345678"}


async def test_a_name_that_is_taken_is_varied(reads: Reads) -> None:
    people = [user() for _ in range(20)]
    names = await reads.introduce([(who, "ann") for who in people], create=True, at=at(0))
    assert names.keys() == set(people)
    assert len(set(names.values())) == 20
    assert "ann" in names.values()
    assert all(name == "ann" or name.startswith("ann_") for name in names.values())


def test_a_varied_name_stays_within_the_limit() -> None:
    assert len(with_suffix("x" * NAME_LENGTH_MAX, Random(0))) == NAME_LENGTH_MAX
    assert with_suffix("ann", Random(0)) == with_suffix("ann", Random(0))


async def test_many_callers_with_the_same_users_and_names_agree(reads: Reads) -> None:
    people = [(user(), f"name {n % 5}") for n in range(10)]
    answers: list[dict[UserId, str]] = []

    async def introduce(seed: int) -> None:
        order = list(people)
        Random(seed).shuffle(order)
        answers.append(await reads.introduce(order, create=True, at=at(0)))

    async with trio.open_nursery() as nursery:
        for seed in range(8):
            nursery.start_soon(introduce, seed)
    assert len(set(answers[0].values())) == 10
    assert all(answer == answers[0] for answer in answers)


async def test_one_user_with_exactly_this_name(reads: Reads) -> None:
    ann, ben = user(), user()
    await reads.add_user(ann, "ann", at=at(0))
    await reads.add_user(ann, "ann", at=at(0))
    with pytest.raises(UsernameTaken):
        await reads.add_user(ben, "ann", at=at(0))
    assert await reads.introduce([(ann, None), (ben, None)], create=False, at=at(0)) == {ann: "ann"}


# Idempotency keys ---------------------------------------------------------------------------------------


async def test_receipts_are_found_told_and_forgotten(
    reads: Reads, ledger: PostgresLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    scribe, ann = Scribe(), user()
    await ledger.commit([scribe.birth()])
    kept = [receipt(ann, f"key {n}") for n in range(7)]
    kept = [type(one)(one.user_id, one.operation, one.key, b"f", one.answer, at(n)) for n, one in enumerate(kept)]
    await ledger.commit([scribe.change(*kept)])
    assert await reads.find_receipt(ann, "reserve", "key 3") == kept[3]
    assert await reads.find_receipt(ann, "purchase", "key 3") is None
    monkeypatch.setattr(reads_module, "_KEYS_AT_ONCE", 3)
    told: list[Sequence[tuple[UserId, str, str]]] = []
    await reads.tell_keys(told.append)
    assert [len(some) for some in told] == [3, 3, 1]
    assert {key for some in told for key in some} == {(ann, "reserve", f"key {n}") for n in range(7)}
    assert await reads.prune(at(5), at_once=2) == 5
    assert await reads.prune(at(5), at_once=2) == 0
    told.clear()
    await reads.tell_keys(told.append)
    assert sorted(key for some in told for _, _, key in some) == ["key 5", "key 6"]


# The database is away -----------------------------------------------------------------------------------


async def test_a_database_out_of_reach_is_unavailable(reads: Reads, server: EmbeddedServer) -> None:
    await reads.ping()
    pool = Pool(server.dsn_of("no_such_database"), size=1, acquire_timeout_s=5, connect_timeout_s=5)
    away = Reads(pool, Random(0))
    with pytest.raises(Unavailable):
        await away.ping()
    with pytest.raises(Unavailable):
        await away.introduce([(user(), None)], create=True, at=at(0))


async def test_a_database_that_takes_no_writes_is_unavailable(reads: Reads) -> None:
    """As a standby that was promoted away, or one whose disk is nearly full: 25006, an internal error to psycopg."""
    async with reads._session() as conn:
        await conn.execute("SET default_transaction_read_only = on")
    with pytest.raises(Unavailable, match="read-only"):
        await reads.introduce([(user(), None)], create=True, at=at(0))


async def test_a_database_that_does_not_answer_is_unavailable(reads: Reads) -> None:
    with pytest.raises(Unavailable, match="no answer within"):
        async with reads._session(0.05) as conn:
            await conn.execute("SELECT pg_sleep(30)")
    await reads.ping()


async def test_a_connection_that_dies_while_it_is_used_is_unavailable(reads: Reads, pool: Pool) -> None:
    with pytest.raises(Unavailable):
        async with reads._session() as conn:
            await conn.execute("SELECT pg_terminate_backend(pg_backend_pid())")
    await reads.ping()


MAKE_ANN = "INSERT INTO users (id, username, created_at) VALUES (gen_random_uuid(), 'ann', now())"
END_WHO_WAIT = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE datname = current_database() AND wait_event_type = 'Lock'
"""


@contextmanager
def somebody_making_ann(database: str) -> Iterator[None]:
    """A transaction that has not ended: whoever wants her name, too, waits for it."""
    with psycopg.connect(database) as rival:
        rival.execute(MAKE_ANN)
        yield
        rival.rollback()


async def test_a_user_whose_statement_was_sent_and_not_answered_is_in_doubt(reads: Reads, database: str) -> None:
    async def end_who_waits() -> None:
        with psycopg.connect(database, autocommit=True) as observer:
            while not observer.execute(END_WHO_WAIT).fetchall():
                await trio.sleep(0.01)

    with somebody_making_ann(database):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(end_who_waits)
            with pytest.raises(InDoubt):
                await reads.add_user(user(), "ann", at=at(0))


async def test_a_user_whose_statement_takes_too_long_is_in_doubt(
    reads: Reads, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reads, "_session", partial(reads._session, 0.2))
    with somebody_making_ann(database), pytest.raises(InDoubt, match="no answer within"):
        await reads.add_user(user(), "ann", at=at(0))


async def test_a_user_whom_the_database_did_not_take_is_in_no_doubt(reads: Reads, server: EmbeddedServer) -> None:
    pool = Pool(server.dsn_of("no_such_database"), size=1, acquire_timeout_s=5, connect_timeout_s=5)
    with pytest.raises(Unavailable):
        await Reads(pool, Random(0)).add_user(user(), "ann", at=at(0))
    async with reads._session() as conn:
        await conn.execute("SET default_transaction_read_only = on")
    with pytest.raises(Unavailable, match="read-only"):
        await reads.add_user(user(), "ann", at=at(0))


# Names and instants -------------------------------------------------------------------------------------


def test_a_default_name_is_as_long_as_the_contract_says() -> None:
    assert default_username(UserId("0123abcd-4567-89ab-cdef-000000000000")) == "user_0123abcd4567"


# From year 1 to year 9999, less a day at each end: Python's calendar ends there, in any zone.
FIRST_MS, LAST_MS = -62_135_510_400_000, 253_402_214_399_999


@given(milliseconds=st.integers(FIRST_MS, LAST_MS))
def test_an_instant_is_exact_in_sql_and_in_python(server: EmbeddedServer, milliseconds: int) -> None:
    sql = f"SELECT t, round(date_part('epoch', t) * 1000)::bigint FROM (SELECT {instant('%s::bigint')} AS t) AS _"
    with psycopg.connect(server.dsn_of("postgres"), options="-c timezone=Europe/Berlin") as connection:
        row = connection.execute(sql.replace(" % 8", " %% 8").encode(), (milliseconds, milliseconds)).fetchone()
    assert row == (statements.as_datetime(Instant(milliseconds)), milliseconds)
