"""Writes changes of a drop as its engine would, for tests of the ledger. Instants are milliseconds after
T0."""

import itertools

from engine.ledger import Change
from engine.model import (
    Cancelled,
    DropCreated,
    DropId,
    DropStatus,
    DropUpdated,
    Event,
    Expired,
    Hold,
    Instant,
    Purchased,
    PurchaseId,
    ReservationId,
    Reserved,
    StoredAnswer,
    StoredReceipt,
    Terms,
    UserId,
)

T0 = 1_767_780_000_000  # 2026-01-07T10:00:00Z
HOLD_MS = 60_000

_numbers = itertools.count(1)


def new_id() -> str:
    return f"019b0000-0000-7000-8000-{next(_numbers):012x}"


def at(ms: int) -> Instant:
    return Instant(T0 + ms)


def user() -> UserId:
    return UserId(new_id())


def receipt(user_id: UserId, key: str, *, operation: str = "reserve", body: bytes = b"{}") -> StoredReceipt:
    return StoredReceipt(user_id, operation, key, b"\x00print\xff", StoredAnswer(201, body), at(0))


class Scribe:
    """Keeps the counts of one drop and numbers its events; `change` takes what was written since the last
    one."""

    def __init__(self, total: int = 10, *, epoch: int = 1) -> None:
        self.drop_id = DropId(new_id())
        self.terms = Terms(
            id=self.drop_id,
            name='Air "One", {size 42}\\',
            price=12_000,
            currency="USD",
            total_stock=total,
            starts_at=at(-1000),
            ends_at=None,
            created_by=None,
            created_at=at(0),
        )
        self.epoch = epoch
        self.available = total
        self.committed_seq = 0
        self.seq = 0
        self._events: list[Event] = []

    def change(self, *receipts: StoredReceipt) -> Change:
        events, self._events = self._events, []
        change = Change(self.drop_id, self.epoch, self.committed_seq, events, receipts)
        self.committed_seq = self.seq
        return change

    def birth(self, status: DropStatus = DropStatus.LIVE) -> Change:
        self._events.append(DropCreated(self._next(), at(0), self.terms, status))
        return self.change()

    def becomes(self, status: DropStatus, *, ms: int = 0) -> None:
        self._events.append(DropUpdated(self._next(), at(ms), status))

    def reserves(self, user_id: UserId, *, ms: int = 0, qty: int = 1, hold_ms: int = HOLD_MS) -> Hold:
        hold = Hold(ReservationId(new_id()), self.drop_id, user_id, qty, at(ms), at(ms + hold_ms))
        self.available -= qty
        self._events.append(Reserved(self._next(), at(ms), hold, self.available))
        return hold

    def purchases(self, hold: Hold, *, ms: int = 1, username: str = "") -> PurchaseId:
        purchase_id = PurchaseId(new_id())
        name = username or "user_" + hold.user_id.replace("-", "")[:12]
        self._events.append(Purchased(self._next(), at(ms), hold, purchase_id, name, self.available))
        return purchase_id

    def cancels(self, hold: Hold, *, ms: int = 1) -> None:
        self.available += hold.qty
        self._events.append(Cancelled(self._next(), at(ms), hold, self.available))

    def expires(self, hold: Hold, *, ms: int = HOLD_MS) -> None:
        self.available += hold.qty
        self._events.append(Expired(self._next(), at(ms), hold, self.available))

    def _next(self) -> int:
        self.seq += 1
        return self.seq
