"""The history of a simulation while it is made, and how much of all that can be asked was asked in it."""

from collections.abc import Callable
from typing import Any

import trio

from tests import fakes
from tests.proof import history
from tests.proof.history import Delivery, Kind, Operation
from tests.proof.recorder import Recorder

US_PER_S = 1_000_000

EVENT_NAMES = {
    "DropCreated": "DROP_CREATED",
    "DropUpdated": "DROP_UPDATED",
    "Reserved": "RESERVED",
    "Purchased": "PURCHASED",
    "Cancelled": "CANCELLED",
    "Expired": "EXPIRED",
}


class Book(Recorder):
    """Operations and deliveries, in simulated µs: what is noted later has a later instant, if only by 1 µs."""

    def __init__(self, trace: Callable[[str], None] | None = None) -> None:
        super().__init__()
        self.deliveries: list[Delivery] = []
        self.is_traced = trace is not None
        self._trace = trace
        self._last = 0

    def stamp(self) -> int:
        self._last = max(self._last + 1, int(trio.current_time() * US_PER_S))
        return self._last

    def begin(self, kind: Kind, user_id: str, drop_id: str, **asked: Any) -> Operation:
        operation = super().begin(kind, user_id, drop_id, **asked)
        operation.began = self.stamp()
        if self._trace is not None:
            self.say(f"#{operation.number} {kind} begins: user {user_id[:8]} drop {drop_id[-8:]} {asked}")
        return operation

    def answered(self, operation: Operation, status: int, body: bytes, *, is_replayed: bool = False) -> None:
        super().answered(operation, status, body, is_replayed=is_replayed)
        self.ended(operation)

    def not_sent(self, operation: Operation) -> None:
        super().not_sent(operation)
        self.ended(operation)

    def ended(self, operation: Operation) -> None:
        operation.ended = self.stamp()
        if self._trace is not None:
            told = f"{operation.ending} {operation.code} seq {operation.seq} epoch {operation.epoch}"
            self.say(f"#{operation.number} {operation.kind} ends: {told}")

    def say(self, sentence: str) -> None:
        if self._trace is not None:
            self._trace(f"{trio.current_time():11.6f}  {sentence}")


def tables_of(tables: fakes.Tables) -> history.Tables:
    """The tables of the fake, as a history has them."""
    return history.Tables(
        drops=[
            history.DropRow(
                id=row.terms.id,
                total_stock=row.terms.total_stock,
                available_stock=row.available_stock,
                held_count=row.held_count,
                sold_count=row.sold_count,
                status=row.status.value,
                epoch=row.epoch,
                seq=row.seq,
                starts_at=row.terms.starts_at,
                ends_at=row.terms.ends_at,
            )
            for row in tables.drops.values()
        ],
        reservations=[
            history.ReservationRow(
                id=row.hold.id,
                drop_id=row.hold.drop_id,
                user_id=row.hold.user_id,
                qty=row.hold.qty,
                status=row.status.value,
                created_at=row.hold.created_at,
                expires_at=row.hold.expires_at,
                resolved_at=row.resolved_at,
                seq=row.seq,
            )
            for row in tables.reservations.values()
        ],
        purchases=[
            history.PurchaseRow(
                id=row.id,
                drop_id=row.drop_id,
                user_id=row.user_id,
                reservation_id=row.reservation_id,
                qty=row.qty,
                created_at=row.created_at,
                seq=row.seq,
            )
            for row in tables.purchases.values()
        ],
        events=[event_row(drop_id, row) for (drop_id, _), row in tables.events.items()],
        keys=[
            history.KeyRow(
                user_id=receipt.user_id,
                operation=receipt.operation,
                key=receipt.key,
                drop_id=drop_id,
                status_code=receipt.answer.status_code,
                body=receipt.answer.body,
            )
            for drop_id, receipt in tables.receipts.values()
        ],
    )


def event_row(drop_id: str, row: fakes.EventRow) -> history.EventRow:
    event: Any = row.event
    written = history.EventRow(drop_id, event.seq, row.epoch, EVENT_NAMES[type(event).__name__], event.at)
    hold = getattr(event, "hold", None)
    if hold is None:
        written.status = event.status.value
        if written.type == "DROP_CREATED":
            written.available_stock = event.terms.total_stock
        return written
    written.user_id, written.reservation_id, written.qty = hold.user_id, hold.id, hold.qty
    written.purchase_id = getattr(event, "purchase_id", None)
    written.expires_at, written.available_stock = hold.expires_at, event.available_stock
    return written
