"""Turns a batch into the parameters of the statement that writes it: one PostgreSQL array, as text, a column.

What the statement should find is counted here a second time, apart from the rows themselves: how many rows of
each kind a part writes, and what it does to the counters. The statement compares (see `batch_sql._write`).

This runs for every event of the hot path, so a row is a plain tuple and a column is joined once.
"""

from collections.abc import Iterable, Sequence
from typing import Final, assert_never

from engine.ledger import Batch, Change
from engine.model import (
    Cancelled,
    DropCreated,
    DropUpdated,
    Expired,
    Instant,
    Purchased,
    ReservationId,
    Reserved,
    StoredReceipt,
    Terms,
)
from persistence.batch_sql import BIRTH_COLUMNS, EVENT_COLUMNS, PART_COLUMNS, RECEIPT_COLUMNS, Columns

FIRST_EPOCH: Final = 1

Parameters = Sequence[bytes]
Row = tuple[object, ...]
NULL: Final = "NULL"


def encode(batch: Batch) -> Parameters:
    """The parameters of `batch_sql.COMMIT`, or of `batch_sql.BIRTH` if the batch holds births."""
    is_birth = batch[0].is_birth
    parts: list[Row] = []
    events: list[Row] = []
    receipts: list[Row] = []
    for ordinal, change in enumerate(batch, 1):
        assert change.is_birth == is_birth, "a batch holds births or changes of existing drops, never both"
        parts.append(_part(change, ordinal, events))
        receipts += [_receipt(receipt, ordinal) for receipt in change.receipts]
    part_columns = BIRTH_COLUMNS if is_birth else PART_COLUMNS
    return [
        *_arrays(parts, part_columns),
        *_arrays(events, EVENT_COLUMNS),
        *_arrays(receipts, RECEIPT_COLUMNS),
    ]


def _part(change: Change, ordinal: int, events: list[Row]) -> Row:
    """Add the rows of the change's events to `events`; return the row of the change itself."""
    available = held = sold = 0
    stated: object = NULL
    status: object = NULL
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
                events.append(_of_hold(event, "RESERVED", ordinal, NULL, "active", NULL))
            case Purchased(hold=hold):
                held -= hold.qty
                sold += hold.qty
                purchased += 1
                ended += _end(events, taken, event, "PURCHASED", ordinal, event.purchase_id, "consumed")
            case Cancelled(hold=hold):
                held -= hold.qty
                available += hold.qty
                ended += _end(events, taken, event, "CANCELLED", ordinal, NULL, "cancelled")
            case Expired(hold=hold):
                held -= hold.qty
                available += hold.qty
                ended += _end(events, taken, event, "EXPIRED", ordinal, NULL, "expired")
            case DropUpdated():
                status = event.status.value
                events.append(_of_drop(event, "DROP_UPDATED", ordinal, NULL))
                continue
            case DropCreated():
                status = event.status.value
                events.append(_of_drop(event, "DROP_CREATED", ordinal, event.terms.total_stock))
                continue
            case _:
                assert_never(event)
        stated = event.available_stock
    updated_at: object = change.events[-1].at if change.events else NULL
    row: Row = (
        *(change.drop_id, change.epoch, change.from_seq, change.to_seq, updated_at, status),
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
    purchase: str,
    outcome: str,
) -> bool:
    """Add the row of an event that ends a hold; true if that hold was there before this change.

    Where it was not, the reservation is written once, as ended, by the row that takes it.
    """
    position = taken.get(event.hold.id)
    if position is not None:
        events[position] = (*events[position][:-2], outcome, event.at)
        events.append(_of_hold(event, kind, ordinal, purchase, NULL, NULL))
        return False
    events.append(_of_hold(event, kind, ordinal, purchase, outcome, event.at))
    return True


def _of_hold(
    event: Reserved | Purchased | Cancelled | Expired,
    kind: str,
    ordinal: int,
    purchase: str,
    outcome: str,
    resolved_at: object,
) -> Row:
    hold = event.hold
    return (
        *(ordinal, event.seq, kind, event.at, hold.id, hold.user_id, hold.qty, hold.expires_at),
        *(purchase, event.available_stock, NULL, outcome, resolved_at),
    )


def _of_drop(event: DropCreated | DropUpdated, kind: str, ordinal: int, stock: object) -> Row:
    return (
        *(ordinal, event.seq, kind, event.at, NULL, NULL, NULL, NULL),
        *(NULL, stock, event.status.value, NULL, NULL),
    )


def _terms(birth: Change) -> Row:
    created = birth.events[0]
    assert isinstance(created, DropCreated)
    assert birth.from_seq == 0, "a drop's first event is its birth"
    assert birth.epoch == FIRST_EPOCH, "a drop is born in its first epoch"
    terms: Terms = created.terms
    assert terms.id == birth.drop_id
    return (
        *(_quoted(terms.name), terms.price, _quoted(terms.currency), terms.total_stock),
        *(_optional(terms.starts_at), _optional(terms.ends_at), _optional(terms.created_by), terms.created_at),
    )


def _receipt(receipt: StoredReceipt, ordinal: int) -> Row:
    answer = receipt.answer
    return (
        *(ordinal, receipt.user_id, _quoted(receipt.operation), _quoted(receipt.key)),
        *(_bytea(receipt.fingerprint), answer.status_code, _bytea(answer.body), receipt.created_at),
    )


def _arrays(rows: list[Row], columns: Columns) -> Iterable[bytes]:
    if not rows:
        return [b"{}"] * len(columns)
    assert len(rows[0]) == len(columns)
    return [("{" + ",".join(map(str, column)) + "}").encode() for column in zip(*rows, strict=True)]


def _quoted(text: str) -> str:
    # Quoted always: an empty string, the word NULL, commas and braces would mean something else.
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _bytea(value: bytes) -> str:
    return '"\\\\x' + value.hex() + '"'


def _optional(value: Instant | str | None) -> object:
    return NULL if value is None else value
