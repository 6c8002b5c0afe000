"""Writes histories down (`tests.proof.history`): what clients ask and hear over HTTP, what the tables hold in the end.

An operation is in the book from the moment on in which it begins, as one whose outcome nobody knows. So whoever is
cut off, cancelled or killed in the middle of it has left a true record.
"""

import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeVar

import msgspec
import psycopg
from psycopg import sql

from tests.proof.clients import Exchange
from tests.proof.history import (
    Delivery,
    DropRow,
    Ending,
    EventRow,
    KeyRow,
    Kind,
    Operation,
    PurchaseRow,
    Recording,
    ReservationRow,
    Tables,
)

Row = TypeVar("Row")

NOT_SENT: Final = "NOT_SENT"  # nobody listened: for certain nothing was heard
NO_ANSWER: Final = "NO_ANSWER"
OUTCOME_UNKNOWN: Final = "OUTCOME_UNKNOWN"

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
MILLISECOND: Final = timedelta(milliseconds=1)
ROWS_AT_ONCE: Final = 20_000  # of a cursor: few round trips, and a million rows are never in memory twice


def now() -> int:
    """µs, on the one clock of this process's histories: monotonic, so that no step of the wall's bends an order."""
    return time.monotonic_ns() // 1000


# What an answer says ------------------------------------------------------------------------------------


class _Meta(msgspec.Struct):
    seq: int | None = None
    epoch: int | None = None


class _Error(msgspec.Struct):
    code: str


class _Envelope(msgspec.Struct):
    success: bool
    data: msgspec.Raw = msgspec.Raw()
    error: _Error | None = None
    meta: _Meta = msgspec.field(default_factory=_Meta)


class _Drop(msgspec.Struct):
    id: str
    available_stock: int
    status: str | None = None


class _Hold(msgspec.Struct):
    id: str
    expires_at: str
    created_at: str


class _Reserved(msgspec.Struct):
    reservation: _Hold
    drop: _Drop


class _Purchase(msgspec.Struct):
    id: str
    reservation_id: str
    created_at: str


class _Purchased(msgspec.Struct):
    purchase: _Purchase


class _Cancelled(msgspec.Struct):
    reservationId: str
    availableStock: int


_envelope = msgspec.json.Decoder(_Envelope).decode
_reserved = msgspec.json.Decoder(_Reserved).decode
_purchased = msgspec.json.Decoder(_Purchased).decode
_cancelled = msgspec.json.Decoder(_Cancelled).decode
_drop = msgspec.json.Decoder(_Drop).decode


def milliseconds(instant: str) -> int:
    """Of ISO 8601, since 1970; exact, where a float of seconds would not be."""
    return (datetime.fromisoformat(instant) - EPOCH) // MILLISECOND


class Recorder:
    """One history in the making; for one thread."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []

    def begin(
        self,
        kind: Kind,
        user_id: str,
        drop_id: str,
        *,
        key: str | None = None,
        reservation_id: str | None = None,
        total_stock: int | None = None,
    ) -> Operation:
        """Note that this is asked, just before it is sent. A drop in the making has no id yet: ""."""
        operation = Operation(
            len(self.operations),
            kind,
            user_id,
            drop_id,
            now(),
            None,
            Ending.UNKNOWN,
            NO_ANSWER,
            key=key,
            reservation_id=reservation_id,
            total_stock=total_stock,
        )
        self.operations.append(operation)
        return operation

    def answered(self, operation: Operation, status: int, body: bytes, *, is_replayed: bool = False) -> None:
        """Note the answer, just after it came.

        Raises:
            msgspec.DecodeError: it is not what the contract says; the operation stays unknown.
        """
        ended = now()
        envelope = _envelope(body)
        if status < 300:
            _take(operation, envelope.data)
        operation.ended = ended
        operation.seq, operation.epoch = envelope.meta.seq, envelope.meta.epoch
        operation.is_replayed = is_replayed
        operation.code = "" if envelope.error is None else envelope.error.code
        operation.ending = _ending(status, operation.code)
        if operation.key is not None:
            operation.answer = body

    def not_sent(self, operation: Operation) -> None:
        """Note that nobody listened."""
        operation.ended = now()
        operation.ending, operation.code = Ending.REFUSED, NOT_SENT


def operations_of(exchanges: Iterable[Exchange]) -> list[Operation]:
    """The history of clients who noted whole exchanges (`tests.proof.clients`). Its instants are the wall's."""
    recorder = Recorder()
    for exchange in sorted(exchanges, key=lambda exchange: exchange.began_at):
        operation = recorder.begin(Kind(exchange.operation), exchange.user_id, exchange.drop_id, key=exchange.key)
        if exchange.answer is not None:
            answer = exchange.answer
            recorder.answered(operation, answer.status, answer.body, is_replayed=answer.is_replayed)
        elif not exchange.was_sent:
            recorder.not_sent(operation)
        operation.began = int(exchange.began_at * 1_000_000)
        operation.ended = None if operation.ended is None else int(exchange.ended_at * 1_000_000)
    return recorder.operations


def _ending(status: int, code: str) -> Ending:
    if status < 300:
        return Ending.OK
    # Of a failure inside the server nobody knows what it left behind.
    return Ending.UNKNOWN if code == OUTCOME_UNKNOWN or status == 500 else Ending.REFUSED


def _take(operation: Operation, data: msgspec.Raw) -> None:
    match operation.kind:
        case Kind.RESERVE:
            reserved = _reserved(data)
            operation.reservation_id = reserved.reservation.id
            operation.created_at = milliseconds(reserved.reservation.created_at)
            operation.expires_at = milliseconds(reserved.reservation.expires_at)
            operation.available_stock = reserved.drop.available_stock
        case Kind.PURCHASE:
            bought = _purchased(data).purchase
            operation.purchase_id, operation.reservation_id = bought.id, bought.reservation_id
            operation.created_at = milliseconds(bought.created_at)
        case Kind.CANCEL:
            cancelled = _cancelled(data)
            operation.reservation_id, operation.available_stock = cancelled.reservationId, cancelled.availableStock
        case Kind.CREATE | Kind.SHOW:
            drop = _drop(data)
            operation.drop_id = drop.id
            operation.available_stock, operation.status = drop.available_stock, drop.status
        case Kind.EXPIRE:
            pass


# The tables ---------------------------------------------------------------------------------------------


def _ms(column: str) -> str:
    """Whole milliseconds since 1970, in whole numbers all the way."""
    return f"(extract(epoch FROM {column}) * 1000)::bigint"


_DROPS: Final = (
    "SELECT id::text, total_stock, available_stock, held_count, sold_count, status, epoch, seq,"
    f" {_ms('starts_at')}, {_ms('ends_at')} FROM drops"
)
_RESERVATIONS: Final = (
    f"SELECT id::text, drop_id::text, user_id::text, qty, status, {_ms('created_at')}, {_ms('expires_at')},"
    f" {_ms('resolved_at')}, seq FROM reservations"
)
_PURCHASES: Final = (
    f"SELECT id::text, drop_id::text, user_id::text, reservation_id::text, qty, {_ms('created_at')}, seq FROM purchases"
)
_EVENTS: Final = (
    f"SELECT drop_id::text, seq, epoch, type, {_ms('at')}, user_id::text, reservation_id::text, purchase_id::text,"
    f" qty, {_ms('expires_at')}, available_stock, status FROM drop_events"
)
_KEYS: Final = "SELECT user_id::text, operation, key, drop_id::text, status_code, body FROM idempotency_keys"


def read_tables(dsn: str) -> Tables:
    """All that the database holds, in one snapshot."""
    with psycopg.connect(dsn) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.read_only = True
        return Tables(
            drops=_rows(connection, _DROPS, DropRow),
            reservations=_rows(connection, _RESERVATIONS, ReservationRow),
            purchases=_rows(connection, _PURCHASES, PurchaseRow),
            events=_rows(connection, _EVENTS, EventRow),
            keys=_rows(connection, _KEYS, KeyRow),
        )


def _rows(connection: psycopg.Connection[Any], query: str, kind: Callable[..., Row]) -> list[Row]:
    with connection.cursor(name="rows") as cursor:
        cursor.itersize = ROWS_AT_ONCE
        cursor.execute(sql.SQL(query))
        return [kind(*row) for row in cursor]


def recording(
    operations: list[Operation],
    dsn: str,
    *,
    deliveries: list[Delivery] | None = None,
    ttl_ms: int | None = None,
    given: dict[str, int] | None = None,
) -> Recording:
    """A history whose clients have all ended, with the tables as they are now."""
    return Recording(operations, read_tables(dsn), deliveries or [], ttl_ms, given or {})
