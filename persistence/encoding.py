"""Turns a batch into the statement that writes it and its parameters: one PostgreSQL array a column, in binary.

What the statement should find is counted here a second time, apart from the rows themselves: how many rows of
each kind a part writes, and what it does to the counters. The statement compares (see `batch_sql._write`).

This runs for every event of the hot path. Nearly every batch holds reserves alone, and these are taken column by
column (`_reserves`); any other batch row by row, a row a plain tuple. The arrays are binary, since text costs the
server almost 2 µs more an event to read. An instant in them is whole microseconds, so it is exact for every year.
"""

import struct
from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain
from typing import Any, Final, TypeGuard, assert_never

from engine.ledger import Batch, Change
from engine.model import (
    Cancelled,
    DropCreated,
    DropUpdated,
    Event,
    Expired,
    Purchased,
    PurchaseId,
    ReservationId,
    ReservationStatus,
    Reserved,
    StoredReceipt,
    Terms,
)
from persistence.batch_sql import (
    BIRTH_COLUMNS,
    EVENT_COLUMNS,
    PART_COLUMNS,
    RECEIPT_COLUMNS,
    RESERVE_COLUMNS,
    RESERVED_COLUMNS,
    Columns,
)

FIRST_EPOCH: Final = 1

Parameters = Sequence[bytes]
Row = tuple[object, ...]
Values = Sequence[Any]  # of one column; None is NULL


class Unencodable(ValueError):
    """A value that its column can't hold: an integer too large, an id that is no UUID, text that is no UTF-8. Or a
    change that contradicts itself: that is for its drop to pay, when it is tried alone.
    """


def encode(batch: Batch) -> tuple[bytes, Parameters]:
    """The name of the statement that writes the batch (see `batch_sql.STATEMENTS`), and its parameters.

    Raises:
        Unencodable: nothing can be sent.
    """
    events = list(chain.from_iterable([change.events for change in batch]))
    receipts = [_receipt(receipt, ordinal) for ordinal, change in enumerate(batch, 1) for receipt in change.receipts]
    try:
        name, written = (b"reserve", _reserves(batch, events)) if _are_reserves(events) else _any(batch)
        return name, [*written, *_of_rows(receipts, RECEIPT_COLUMNS)]
    except (struct.error, OverflowError, ValueError, AssertionError) as error:
        raise Unencodable(str(error)) from error


# Reserves alone ---------------------------------------------------------------------------------------


def _are_reserves(events: Sequence[Event]) -> TypeGuard[Sequence[Reserved]]:
    return {type(event) for event in events} == {Reserved}


def _reserves(batch: Batch, events: Sequence[Reserved]) -> list[bytes]:
    parts: list[Row] = []
    part_of: list[int] = []
    seqs: list[int] = []
    first = 0
    for ordinal, change in enumerate(batch, 1):
        count = len(change.events)
        mine = events[first : first + count]
        first += count
        part_of += [ordinal] * count
        seqs += range(change.from_seq + 1, change.from_seq + 1 + count)
        qty = sum([event.hold.qty for event in mine])
        at, stated = (mine[-1].at, mine[-1].available_stock) if mine else (None, None)
        to_seq = change.from_seq + count
        parts.append(
            (
                *(ordinal, change.drop_id, change.epoch, change.from_seq, to_seq, at),
                *(qty, stated, count, len(change.receipts)),
            )
        )
    holds = [event.hold for event in events]
    ats = [event.at for event in events]
    assert [event.seq for event in events] == seqs, "a change's events are numbered on from its from_seq"
    assert [hold.created_at for hold in holds] == ats, "a hold begins at the instant of its decision"
    columns: list[Values] = [
        part_of,
        seqs,
        ats,
        [hold.id for hold in holds],
        [hold.user_id for hold in holds],
        [hold.qty for hold in holds],
        [hold.expires_at for hold in holds],
        [event.available_stock for event in events],
    ]
    return [*_of_rows(parts, RESERVE_COLUMNS), *_of_columns(columns, RESERVED_COLUMNS)]


# Any other batch --------------------------------------------------------------------------------------


def _any(batch: Batch) -> tuple[bytes, list[bytes]]:
    is_birth = batch[0].is_birth
    parts: list[Row] = []
    events: list[Row] = []
    for ordinal, change in enumerate(batch, 1):
        assert change.is_birth == is_birth, "a batch holds births or changes of existing drops, never both"
        parts.append(_part(change, ordinal, events))
    name, part_columns = (b"birth", BIRTH_COLUMNS) if is_birth else (b"commit", PART_COLUMNS)
    return name, [*_of_rows(parts, part_columns), *_of_rows(events, EVENT_COLUMNS)]


def _part(change: Change, ordinal: int, events: list[Row]) -> Row:
    """Add the rows of the change's events to `events`; return the row of the change itself."""
    available = held = sold = 0
    stated = status = None
    taken: dict[ReservationId, int] = {}  # where in `events` each hold of this change was taken
    reserved = ended = purchased = 0
    seq = change.from_seq
    for event in change.events:
        seq += 1
        assert event.seq == seq, f"event {event.seq} of {change.drop_id} where {seq} is next"
        match event:
            case Reserved(hold=hold):
                assert hold.created_at == event.at, "a hold begins at the instant of its decision"
                available -= hold.qty
                held += hold.qty
                reserved += 1
                taken[hold.id] = len(events)
                events.append(_of_hold(event, "RESERVED", ordinal, None, ReservationStatus.ACTIVE, None))
            case Purchased(hold=hold):
                held -= hold.qty
                sold += hold.qty
                purchased += 1
                ended += _end(events, taken, event, "PURCHASED", ordinal, event.purchase_id, ReservationStatus.CONSUMED)
            case Cancelled(hold=hold):
                held -= hold.qty
                available += hold.qty
                ended += _end(events, taken, event, "CANCELLED", ordinal, None, ReservationStatus.CANCELLED)
            case Expired(hold=hold):
                held -= hold.qty
                available += hold.qty
                ended += _end(events, taken, event, "EXPIRED", ordinal, None, ReservationStatus.EXPIRED)
            case DropUpdated():
                status = event.status
                events.append(_of_drop(event, "DROP_UPDATED", ordinal, None))
                continue
            case DropCreated():
                status = event.status
                events.append(_of_drop(event, "DROP_CREATED", ordinal, event.terms.total_stock))
                continue
            case _:
                assert_never(event)
        stated = event.available_stock
    updated_at = change.events[-1].at if change.events else None
    row: Row = (
        *(ordinal, change.drop_id, change.epoch, change.from_seq, change.to_seq, updated_at, status),
        *(available, held, sold),
        *(stated, reserved, ended, purchased, len(change.receipts)),
    )
    return row + _terms(change) if change.is_birth else row


def _end(
    events: list[Row],
    taken: dict[ReservationId, int],
    event: Purchased | Cancelled | Expired,
    kind: str,
    ordinal: int,
    purchase: PurchaseId | None,
    outcome: ReservationStatus,
) -> bool:
    """Add the row of an event that ends a hold; true if that hold was there before this change.

    Where it was not, the reservation is written once, as ended, by the row that takes it.
    """
    position = taken.get(event.hold.id)
    if position is not None:
        events[position] = (*events[position][:-2], outcome, event.at)
        events.append(_of_hold(event, kind, ordinal, purchase, None, None))
        return False
    events.append(_of_hold(event, kind, ordinal, purchase, outcome, event.at))
    return True


def _of_hold(
    event: Reserved | Purchased | Cancelled | Expired,
    kind: str,
    ordinal: int,
    purchase: PurchaseId | None,
    outcome: ReservationStatus | None,
    resolved_at: object,
) -> Row:
    hold = event.hold
    return (
        *(ordinal, event.seq, event.at, hold.id, hold.user_id, hold.qty, hold.expires_at, event.available_stock),
        *(kind, purchase, None, outcome, resolved_at),
    )


def _of_drop(event: DropCreated | DropUpdated, kind: str, ordinal: int, stock: int | None) -> Row:
    return (
        *(ordinal, event.seq, event.at, None, None, None, None, stock),
        *(kind, None, event.status, None, None),
    )


def _terms(birth: Change) -> Row:
    created = birth.events[0]
    assert isinstance(created, DropCreated)
    assert birth.from_seq == 0, "a drop's first event is its birth"
    assert birth.epoch == FIRST_EPOCH, "a drop is born in its first epoch"
    terms: Terms = created.terms
    assert terms.id == birth.drop_id
    return (
        *(terms.name, terms.price, terms.currency, terms.total_stock),
        *(terms.starts_at, terms.ends_at, terms.created_by, terms.created_at),
    )


def _receipt(receipt: StoredReceipt, ordinal: int) -> Row:
    answer = receipt.answer
    return (
        *(ordinal, receipt.user_id, receipt.operation, receipt.key),
        *(receipt.fingerprint, answer.status_code, answer.body, receipt.created_at),
    )


# PostgreSQL's binary arrays ---------------------------------------------------------------------------


def _of_rows(rows: list[Row], columns: Columns) -> Sequence[bytes]:
    return _of_columns(list(zip(*rows, strict=True)), columns) if rows else _of_no_rows(columns)


@cache
def _of_no_rows(columns: Columns) -> Sequence[bytes]:
    return _of_columns([()] * len(columns), columns)


def _of_columns(values: Sequence[Values], columns: Columns) -> Sequence[bytes]:
    return [_KINDS[kind](column) for column, (_, kind) in zip(values, columns, strict=True)]


_NULL: Final = b"\xff\xff\xff\xff"  # a length of -1
_LENGTH: Final = struct.Struct(">i").pack
_EPOCH_US: Final = 946_684_800_000_000  # timestamptz counts microseconds from the year 2000


def _array(oid: int, count: int, elements: bytes) -> bytes:
    """One dimension from 1 on, of the type `oid`; an element is its length and its bytes. Empty: no dimension."""
    return struct.pack(">5i", 1, 0, oid, count, 1) + elements if count else struct.pack(">3i", 0, 0, oid)


def _integers(oid: int, size: int, code: str) -> Callable[[Values], bytes]:
    element = "i" + code
    pack_one = struct.Struct(">" + element).pack

    def array(values: Values) -> bytes:
        count = len(values)
        if None in values:
            elements = b"".join([_NULL if value is None else pack_one(size, value) for value in values])
        else:
            # One call for them all: 50 ns each, where one call each costs 95.
            lengths_and_values = [size] * (2 * count)
            lengths_and_values[1::2] = values
            elements = struct.pack(">" + element * count, *lengths_and_values)
        return _array(oid, count, elements)

    return array


def _instants(values: Values) -> bytes:
    return _microseconds([None if value is None else value * 1000 - _EPOCH_US for value in values])


def _uuids(values: Values) -> bytes:
    elements = ["ffffffff" if value is None else "00000010" + value for value in values]
    binary = bytes.fromhex("".join(elements).replace("-", ""))
    if len(binary) != 20 * len(values) - 16 * values.count(None):
        raise ValueError("an id is no UUID")
    return _array(2950, len(values), binary)


def _texts(values: Values) -> bytes:
    return _byteas([None if value is None else value.encode() for value in values], oid=25)


def _byteas(values: Values, oid: int = 17) -> bytes:
    elements = [_NULL if value is None else _LENGTH(len(value)) + value for value in values]
    return _array(oid, len(values), b"".join(elements))


_microseconds: Final = _integers(1184, 8, "q")

_KINDS: Final[dict[str, Callable[[Values], bytes]]] = {
    "smallint": _integers(21, 2, "h"),
    "int": _integers(23, 4, "i"),
    "bigint": _integers(20, 8, "q"),
    "timestamptz": _instants,
    "uuid": _uuids,
    "text": _texts,
    "bytea": _byteas,
}
