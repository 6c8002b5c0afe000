"""What goes to the server in binary arrives there as it was, and each kind of batch takes the statement made for it."""

import json
import struct
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg import pq

from engine.ledger import Change, Rejected
from engine.model import DropStatus, Reserved, UserId
from persistence import batch_sql
from persistence.embedded import EmbeddedServer
from persistence.encoding import Unencodable, _of_columns, encode
from persistence.ledger import _WRITER_SETTINGS
from tests.persistence.scribe import HOLD_MS, Scribe, at, receipt, user
from tests.persistence.subjects import PostgresSubject, postgres_subject


@pytest.fixture
async def subject(database: str) -> AsyncIterator[PostgresSubject]:
    async with postgres_subject(database) as subject:
        yield subject


# Columns ------------------------------------------------------------------------------------------------


def read_back(server: EmbeddedServer, kind: str, values: Sequence[object], value: str = "value") -> Any:
    """The column as the server understood it, each `value` as JSON has it."""
    rows = f"SELECT {value} FROM unnest($1::{kind}[]) WITH ORDINALITY AS _(value, n) ORDER BY n"
    with psycopg.connect(server.dsn_of("postgres")) as connection:
        sql = f"SELECT to_json(ARRAY({rows})), cardinality($1::{kind}[])"
        (column,) = _of_columns([values], (("column", kind),))
        result = connection.pgconn.exec_params(sql.encode(), [column], param_formats=[pq.Format.BINARY])
        assert result.status == pq.ExecStatus.TUPLES_OK, result.error_message
        assert int(result.get_value(0, 1) or b"") == len(values)
        return json.loads(result.get_value(0, 0) or b"")


def columns(values: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    """Without NULL, which is packed in another way, and with."""
    return st.lists(values, max_size=20) | st.lists(st.none() | values, max_size=20)


@given(values=columns(st.uuids().map(str)))
def test_ids_arrive(server: EmbeddedServer, values: list[str | None]) -> None:
    assert read_back(server, "uuid", values) == values


@pytest.mark.parametrize(("kind", "bits"), [("smallint", 16), ("int", 32), ("bigint", 64)])
def test_integers_arrive_up_to_the_ends_of_their_type(server: EmbeddedServer, kind: str, bits: int) -> None:
    least, most = -(1 << bits - 1), (1 << bits - 1) - 1
    for values in ([], [0], [None], [least, -1, 0, 1, most], [least, None, most]):
        assert read_back(server, kind, values) == values
    for beyond in (least - 1, most + 1):
        with pytest.raises((struct.error, OverflowError)):
            _of_columns([[0, beyond]], (("column", kind),))


# From 4713 BC to the year 294276: what a timestamptz can hold.
FIRST_MS, LAST_MS = -210_866_803_200_000, 9_224_318_015_999_999


@given(values=columns(st.integers(FIRST_MS, LAST_MS)))
def test_instants_arrive_to_the_millisecond(server: EmbeddedServer, values: list[int | None]) -> None:
    # extract() is exact, where date_part() goes through a double.
    assert read_back(server, "timestamptz", values, "(extract(epoch FROM value) * 1000)::bigint") == values


@given(values=columns(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))))
def test_text_arrives_whatever_it_looks_like(server: EmbeddedServer, values: list[str | None]) -> None:
    assert read_back(server, "text", values) == values
    odd = ["", "NULL", "null", '"', "\\", "{}", "{a,b}", ",", " a ", "'", "$1", "é\U0001f642", None]
    assert read_back(server, "text", odd) == odd


@given(values=columns(st.binary()))
def test_bytes_arrive(server: EmbeddedServer, values: list[bytes | None]) -> None:
    hexadecimal = [None if value is None else value.hex() for value in values]
    assert read_back(server, "bytea", values, "encode(value, 'hex')") == hexadecimal


# Batches ------------------------------------------------------------------------------------------------


def test_a_batch_takes_the_statement_made_for_it() -> None:
    scribe, other, ann = Scribe(), Scribe(), user()

    def statement(*batch: Change) -> bytes:
        name, parameters = encode(batch)
        assert f"${len(parameters)}::" in batch_sql.STATEMENTS[name]
        assert f"${len(parameters) + 1}::" not in batch_sql.STATEMENTS[name]
        return name

    assert statement(scribe.birth(), other.birth()) == b"birth"
    hold = scribe.reserves(ann)
    reserves = scribe.change(receipt(ann, "k"))
    assert statement(reserves) == b"reserve"
    assert statement(reserves, other.change(receipt(ann, "refused"))) == b"reserve"
    assert statement(other.change(receipt(ann, "refused"))) == b"commit"
    scribe.cancels(hold)
    assert statement(scribe.change()) == b"commit"
    scribe.becomes(DropStatus.PAUSED)
    assert statement(reserves, scribe.change()) == b"commit"


async def test_reserves_of_many_drops_each_stand_by_their_own_guard(subject: PostgresSubject) -> None:
    """Also those with a receipt and no event beside them."""
    scribes = [Scribe() for _ in range(5)]
    await subject.ledger.commit([scribe.birth() for scribe in scribes])
    empty, gone, stale, *_ = scribes
    await subject.rival_takes(gone.drop_id)
    stale.committed_seq, stale.seq = 7, 7
    ann = user()
    batch = [empty.change(receipt(ann, "refused"))]
    for scribe in scribes[1:]:
        for n in range(3):
            scribe.reserves(user(), ms=n, qty=n + 1)
        batch.append(scribe.change(receipt(ann, f"of {scribe.drop_id}")))
    batch = batch[::-1]
    assert encode(batch)[0] == b"reserve"
    hit = {empty.drop_id, *(scribe.drop_id for scribe in scribes[3:])}
    assert await subject.ledger.commit(batch) == hit
    for change, scribe in zip(batch, scribes[::-1], strict=True):
        is_hit = scribe.drop_id in hit
        assert (await subject.events(scribe.drop_id))[1:] == (list(change.events) if is_hit else [])
        kept = await subject.receipt(ann, "reserve", change.receipts[0].key)
        assert kept == (change.receipts[0] if is_hit else None)
        rows = await subject.sql(
            "SELECT available_stock, held_count, seq, date_part('epoch', updated_at) * 1000 FROM drops WHERE id = %s",
            scribe.drop_id,
        )
        written = bool(change.events) and is_hit
        assert rows == [(4, 6, 4, at(2)) if written else (10, 0, 1, at(0))]


async def test_a_batch_in_which_nothing_hits_writes_nothing(subject: PostgresSubject) -> None:
    scribe = Scribe()
    await subject.ledger.commit([scribe.birth()])
    await subject.rival_takes(scribe.drop_id)
    hold = scribe.reserves(user())
    assert await subject.ledger.commit([scribe.change()]) == set()
    scribe.cancels(hold)
    assert await subject.ledger.commit([scribe.change()]) == set()
    assert len(await subject.events(scribe.drop_id)) == 1


@pytest.mark.parametrize(
    ("table", "counts"),
    [
        ("drop_events", r"\{1,2,0,0,1,0\}"),
        ("reservations", r"\{2,1,0,0,1,0\}"),
        ("idempotency_keys", r"\{2,2,0,0,0,0\}"),
    ],
)
async def test_a_reserve_that_leaves_a_row_out_is_rolled_back(
    subject: PostgresSubject, table: str, counts: str
) -> None:
    scribe, ann = Scribe(), user()
    await subject.ledger.commit([scribe.birth()])
    # What no product of ours has: a trigger that drops the rows of one user without a word.
    await subject.sql("CREATE FUNCTION leave_out() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'")
    await subject.sql(
        f"CREATE TRIGGER leave_out BEFORE INSERT ON {table} FOR EACH ROW WHEN (NEW.user_id = '{ann}')"
        " EXECUTE FUNCTION leave_out()"
    )
    scribe.reserves(user())
    scribe.reserves(ann)
    with pytest.raises(Rejected, match=rf"row counts .* are {counts} where \{{2,2,0,0,1,0\}} are due"):
        await subject.ledger.commit([scribe.change(receipt(ann, "k"))])
    assert await subject.sql("SELECT available_stock, seq FROM drops") == [(10, 1)]
    assert await subject.sql("SELECT 1 FROM reservations") == []


async def test_a_stock_that_would_fall_below_zero_is_a_miss(subject: PostgresSubject) -> None:
    scribe = Scribe(total=1)
    await subject.ledger.commit([scribe.birth()])
    scribe.reserves(user(), qty=2)
    assert await subject.ledger.commit([scribe.change()]) == set()


async def test_what_no_column_can_hold_is_rejected_before_it_is_sent(subject: PostgresSubject) -> None:
    scribe = Scribe()
    await subject.ledger.commit([scribe.birth()])
    scribe.reserves(user())
    good = scribe.change()
    (reserved,) = good.events
    assert isinstance(reserved, Reserved)
    for spoilt in (
        msgspec.structs.replace(reserved.hold, user_id=UserId("not an id")),
        msgspec.structs.replace(reserved.hold, user_id=UserId("019b0000-0000-7000-8000-0000000000")),
        msgspec.structs.replace(reserved.hold, qty=1 << 31),
    ):
        bad = msgspec.structs.replace(reserved, hold=spoilt)
        with pytest.raises(Rejected, match="Unencodable"):
            await subject.ledger.commit([msgspec.structs.replace(good, events=[bad])])
    for odd in ("\0", "\ud800"):
        with pytest.raises(Rejected):
            await subject.ledger.commit([msgspec.structs.replace(good, receipts=[receipt(user(), odd)])])
    assert subject.ledger.statistics().rejected == 5
    assert await subject.ledger.commit([good]) == {scribe.drop_id}
    assert subject.ledger.statistics().connections == 1


@pytest.mark.parametrize("is_reserve", [True, False], ids=["reserves alone", "others"])
def test_a_change_that_contradicts_itself_is_rejected_and_stops_nobody_else(*, is_reserve: bool) -> None:
    scribe = Scribe()
    hold = scribe.reserves(user())
    if not is_reserve:
        scribe.purchases(hold)
    change = scribe.change()
    with pytest.raises(Unencodable):
        encode([msgspec.structs.replace(change, from_seq=change.from_seq + 1)])


def test_an_id_of_another_length_is_no_uuid() -> None:
    with pytest.raises(Unencodable, match="no UUID"):
        encode([Scribe().change(receipt(UserId("00"), "k"))])


# The plan -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", batch_sql.STATEMENTS)
def test_a_hold_is_ended_by_its_primary_key_and_nothing_is_scanned(database: str, name: bytes) -> None:
    """The plan is made on empty tables and kept; the index of active holds would read every hold of the drop."""
    with psycopg.connect(database) as connection:
        for setting, value in _WRITER_SETTINGS.items():
            connection.execute("SELECT set_config(%s, %s, false)", (setting, value))
        plan = connection.execute(f"EXPLAIN (GENERIC_PLAN) {batch_sql.STATEMENTS[name]}".encode()).fetchall()
    lines = [line for (line,) in plan]
    assert not [line for line in lines if "Seq Scan" in line]
    on_reservations = [line.strip() for line in lines if "Scan" in line and " on reservations" in line]
    assert all("Index Scan using pk_reservations on reservations" in line for line in on_reservations)
    assert bool(on_reservations) == (name != b"reserve")


async def test_a_hold_long_past_its_deadline_ends_all_the_same(subject: PostgresSubject) -> None:
    scribe = Scribe()
    await subject.ledger.commit([scribe.birth()])
    hold = scribe.reserves(user())
    await subject.ledger.commit([scribe.change()])
    scribe.expires(hold, ms=1000 * HOLD_MS)
    assert await subject.ledger.commit([scribe.change()]) == {scribe.drop_id}
