"""Histories that are right, made up: a naive shop that decides one thing at a time, and clients that overlap.

It knows neither the engine nor the checker. Each operation begins, is decided at one instant between its beginning and
its end, and ends, or is never answered. What the tables hold and what viewers are shown follows from the decisions.
A seed gives one history.
"""

import heapq
import itertools
import random
from typing import Final

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

BEGAN_MS: Final = 1_767_780_000_000  # of engine time at µs 0 of the history's: 2026-01-07T10:00:00Z
NOWHERE: Final = "drop-nowhere"  # a drop that never was
FAULTS: Final = ("OVERLOADED", "DATABASE_UNAVAILABLE", "DROP_RESTARTING")
OPERATIONS: Final = {Kind.RESERVE: "reserve", Kind.PURCHASE: "purchase", Kind.CREATE: "create_drop"}
MIX: Final = (
    *((Kind.RESERVE,) * 10),
    *((Kind.PURCHASE,) * 5),
    *((Kind.CANCEL,) * 3),
    *((Kind.SHOW,) * 2),
    Kind.EXPIRE,
)
TOLD: Final = (  # what an answer says, and so does its replay
    *("ending", "code", "seq", "epoch", "answer", "drop_id", "reservation_id", "purchase_id"),
    *("created_at", "expires_at", "available_stock", "status"),
)
STOCK: Final = ("RESERVED", "CANCELLED", "EXPIRED")


class Stall:
    """One drop."""

    def __init__(self, id_: str, total: int) -> None:
        self.row = DropRow(id_, total, total, 0, 0, "", 1, 0)
        self.holds: dict[str, ReservationRow] = {}  # of each user, the active one
        self.newest: dict[str, ReservationRow] = {}
        self.events: list[EventRow] = []
        self.decided: list[int] = []  # µs, of each event


class Shop:
    def __init__(
        self,
        seed: int,
        *,
        operations: int = 600,
        drops: int = 3,
        users: int = 8,
        stock: int = 4,
        ttl_ms: int = 40,
        viewers: int = 3,
        pause_us: int = 1_000,
    ) -> None:
        self.rng = random.Random(seed)
        self.users = [f"user-{number}" for number in range(users)]
        self.stalls = [Stall(f"drop-{number}", stock + number) for number in range(drops)]
        self.by_id = {stall.row.id: stall for stall in self.stalls}
        self.asked = operations
        self.ttl_ms = ttl_ms
        self.viewers = viewers
        self.pause_us = pause_us
        self.operations: list[Operation] = []
        self.reservations: dict[str, ReservationRow] = {}
        self.purchases: list[PurchaseRow] = []
        self.keys: dict[tuple[str, str, str], tuple[KeyRow, Operation]] = {}
        self.known: list[tuple[str, str, str]] = []  # drop, user, reservation that clients were told of
        self._ids = itertools.count(1)
        self._order = itertools.count()
        self._queue: list[tuple[int, int, Operation, str | None]] = []  # (when, order, operation, or key to try again)

    def run(self) -> Recording:
        rng = self.rng
        at = 0
        for stall in self.stalls:
            at += 5_000
            status = "scheduled" if len(self.stalls) > 1 and stall is self.stalls[-1] else "live"
            operation = self.begin(Kind.CREATE, "owner", "", at, key=self.key(0.5))
            operation.total_stock = stall.row.total_stock
            self.create(stall, operation, status, at + 100)
        at += 5_000
        for _ in range(self.asked):
            at += rng.randrange(2 * self.pause_us)
            self.decide_until(at)
            self.ask(at)
        self.decide_until(at + 1_000_000)
        return Recording(self.operations, self.tables(), self.deliveries(at), self.ttl_ms)

    def tables(self) -> Tables:
        events = [event for stall in self.stalls for event in stall.events]
        rows = [row for row, _ in self.keys.values()]
        drops = [stall.row for stall in self.stalls]
        self.rng.shuffle(events)
        return Tables(drops, list(self.reservations.values()), self.purchases, events, rows)

    # Clients -----------------------------------------------------------------------------------------

    def key(self, chance: float) -> str | None:
        return f"key-{next(self._ids)}" if self.rng.random() < chance else None

    def begin(self, kind: Kind, user_id: str, drop_id: str, at: int, *, key: str | None = None) -> Operation:
        number = len(self.operations)
        operation = Operation(number, kind, user_id, drop_id, at, None, Ending.UNKNOWN, "NO_ANSWER", key=key)
        self.operations.append(operation)
        return operation

    def ask(self, at: int) -> None:
        rng = self.rng
        kind = rng.choice(MIX)
        user_id, drop_id = rng.choice(self.users), rng.choice(self.stalls).row.id
        is_keyed = kind in (Kind.RESERVE, Kind.PURCHASE)
        if is_keyed and rng.random() < 0.01:
            drop_id = NOWHERE
        operation = self.begin(kind, user_id, drop_id, at, key=self.key(0.3) if is_keyed else None)
        if kind == Kind.CANCEL:
            drop_id, user_id, reservation_id = rng.choice(self.known[-8:] or [(drop_id, user_id, "none")])
            operation.drop_id, operation.reservation_id = drop_id, reservation_id
            operation.user_id = user_id if rng.random() < 0.9 else rng.choice(self.users)
        self.send(operation)

    def send(self, operation: Operation) -> None:
        """On its way; some are lost, and then their clients try again if they have a key."""
        luck = self.rng.random()
        if luck < 0.03:
            self.try_again(operation)  # lost before it came
            return
        decided = operation.began + self.rng.randrange(1, 4 * self.pause_us)
        heapq.heappush(self._queue, (decided, next(self._order), operation, None))

    def try_again(self, operation: Operation) -> None:
        if operation.key is not None:
            at = operation.began + self.rng.randrange(1, 20 * self.pause_us)
            heapq.heappush(self._queue, (at, next(self._order), operation, operation.key))

    def decide_until(self, at: int) -> None:
        queue = self._queue
        while queue and queue[0][0] <= at:
            now, _, operation, key = heapq.heappop(queue)
            if key is None:
                self.decide(operation, now)
                continue
            again = self.begin(operation.kind, operation.user_id, operation.drop_id, now, key=key)
            self.send(again)

    # The shop ----------------------------------------------------------------------------------------

    def decide(self, operation: Operation, at: int) -> None:
        rng = self.rng
        if operation.drop_id == NOWHERE:
            operation.ending, operation.code, operation.ended = Ending.REFUSED, "DROP_NOT_FOUND", at + 1
            return
        stored = self.stored(operation)
        drop_id = operation.drop_id if stored is None else stored.drop_id  # nobody knows the drop of a lost `create`
        stall = self.by_id[drop_id]
        row = stall.row
        if rng.random() < 0.01:
            row.epoch += 1
        if rng.random() < 0.02:
            self.refuse(operation, stall, rng.choice(FAULTS), at)
            return
        if stored is not None:
            self.replay(operation, stored, at)
            return
        self.settle(stall, at)
        match operation.kind:
            case Kind.RESERVE:
                self.reserve(stall, operation, at)
            case Kind.PURCHASE:
                self.purchase(stall, operation, at)
            case Kind.CANCEL:
                self.cancel(stall, operation, at)
            case _:
                operation.available_stock, operation.status = row.available_stock, row.status
                self.answer(operation, stall, at)

    def stored(self, operation: Operation) -> Operation | None:
        found = self.keys.get((operation.user_id, operation.kind, operation.key or ""))
        return None if found is None else found[1]

    def note(self, stall: Stall, type_: str, at: int, hold: ReservationRow | None = None, **fields: str) -> EventRow:
        row = stall.row
        row.seq += 1
        event = EventRow(row.id, row.seq, row.epoch, type_, BEGAN_MS + at // 1000)
        if hold is not None:
            event.user_id, event.reservation_id, event.qty = hold.user_id, hold.id, hold.qty
            event.expires_at, event.available_stock = hold.expires_at, row.available_stock
        event.purchase_id, event.status = fields.get("purchase_id"), fields.get("status")
        stall.events.append(event)
        stall.decided.append(at)
        return event

    def settle(self, stall: Stall, at: int) -> None:
        """What is due: the drop's own clock now and then, and every hold that has run out."""
        row, now = stall.row, BEGAN_MS + at // 1000
        # All last equally long, so they run out in the order in which they were taken.
        for hold in list(itertools.takewhile(lambda hold: hold.expires_at <= now, stall.holds.values())):
            self.end(stall, hold, "expired", now)
            row.available_stock += hold.qty
            self.note(stall, "EXPIRED", at, hold)
        # Opens for certain, and rests now and then.
        if row.status != "live" and self.rng.random() < 0.2:
            if row.status == "scheduled":
                row.starts_at = now
            row.status = "live"
            self.note(stall, "DROP_UPDATED", at, status="live")
        elif row.status == "live" and self.rng.random() < 0.01:
            row.status = "paused"
            self.note(stall, "DROP_UPDATED", at, status="paused")

    def create(self, stall: Stall, operation: Operation, status: str, at: int) -> None:
        stall.row.status = status
        event = self.note(stall, "DROP_CREATED", at, status=status)
        event.available_stock = stall.row.total_stock
        operation.drop_id = stall.row.id
        operation.status, operation.available_stock = status, stall.row.total_stock
        self.answer(operation, stall, at)

    def reserve(self, stall: Stall, operation: Operation, at: int) -> None:
        row, user_id, now = stall.row, operation.user_id, BEGAN_MS + at // 1000
        if row.status != "live":
            self.refuse(operation, stall, "DROP_NOT_ACTIVE", at)
        elif user_id in stall.holds:
            self.refuse(operation, stall, "ALREADY_RESERVED", at)
        elif row.available_stock < 1:
            self.refuse(operation, stall, "OUT_OF_STOCK", at)
        else:
            id_ = f"hold-{next(self._ids)}."
            row.available_stock -= 1
            row.held_count += 1
            hold = ReservationRow(id_, row.id, user_id, 1, "active", now, now + self.ttl_ms, None, row.seq + 1)
            self.reservations[id_] = stall.holds[user_id] = stall.newest[user_id] = hold
            self.note(stall, "RESERVED", at, hold)
            operation.reservation_id = id_
            operation.created_at, operation.expires_at = now, hold.expires_at
            operation.available_stock = row.available_stock
            self.answer(operation, stall, at)

    def purchase(self, stall: Stall, operation: Operation, at: int) -> None:
        row, user_id, now = stall.row, operation.user_id, BEGAN_MS + at // 1000
        newest = stall.newest.get(user_id)
        if newest is None:
            self.refuse(operation, stall, "RESERVATION_REQUIRED", at)
        elif newest.status == "expired":
            self.refuse(operation, stall, "RESERVATION_EXPIRED", at)
        elif newest.status == "cancelled":
            self.refuse(operation, stall, "RESERVATION_NOT_ACTIVE", at)
        elif newest.status == "consumed":
            self.refuse(operation, stall, "ALREADY_PURCHASED", at)
        else:
            id_ = f"purchase-{next(self._ids)}."
            self.end(stall, newest, "consumed", now)
            row.sold_count += 1
            event = self.note(stall, "PURCHASED", at, newest, purchase_id=id_)
            self.purchases.append(PurchaseRow(id_, row.id, user_id, newest.id, 1, now, event.seq))
            operation.reservation_id, operation.purchase_id, operation.created_at = newest.id, id_, now
            self.answer(operation, stall, at)

    def cancel(self, stall: Stall, operation: Operation, at: int) -> None:
        hold = self.reservations.get(operation.reservation_id or "")
        if hold is None or hold.user_id != operation.user_id:
            self.refuse(operation, stall, "RESERVATION_NOT_FOUND", at)
        elif hold.status == "expired":
            self.refuse(operation, stall, "RESERVATION_EXPIRED", at)
        elif hold.status != "active":
            self.refuse(operation, stall, "RESERVATION_NOT_ACTIVE", at)
        else:
            self.end(stall, hold, "cancelled", BEGAN_MS + at // 1000)
            stall.row.available_stock += 1
            self.note(stall, "CANCELLED", at, hold)
            operation.available_stock = stall.row.available_stock
            self.answer(operation, stall, at)

    def end(self, stall: Stall, hold: ReservationRow, status: str, now: int) -> None:
        hold.status, hold.resolved_at = status, now
        del stall.holds[hold.user_id]
        stall.row.held_count -= 1

    # Answers -----------------------------------------------------------------------------------------

    def refuse(self, operation: Operation, stall: Stall, code: str, at: int) -> None:
        self.answer(operation, stall, at, code)

    def answer(self, operation: Operation, stall: Stall, at: int, code: str = "") -> None:
        """Tell the client, unless the answer is lost on its way; keep it under the key either way."""
        operation.seq, operation.epoch, operation.code = stall.row.seq, stall.row.epoch, code
        operation.ending = Ending.REFUSED if code else Ending.OK
        if operation.key is not None and code not in FAULTS:
            ids = f"{operation.reservation_id} {operation.purchase_id}"
            operation.answer = f"{operation.kind} {code} {ids} {operation.number}".encode()
            name = OPERATIONS[operation.kind]
            row = KeyRow(operation.user_id, name, operation.key, stall.row.id, 409 if code else 201, operation.answer)
            self.keys[operation.user_id, operation.kind, operation.key] = (row, _copied(operation))
        self.tell(operation, at)

    def replay(self, operation: Operation, stored: Operation, at: int) -> None:
        for field in TOLD:
            setattr(operation, field, getattr(stored, field))
        operation.is_replayed = True
        self.tell(operation, at)

    def tell(self, operation: Operation, at: int) -> None:
        luck = self.rng.random()
        if luck < 0.05 and operation.code not in FAULTS:
            _forget(operation)
            if luck < 0.02:
                operation.ended, operation.code = at + self.rng.randrange(1, 3 * self.pause_us), "OUTCOME_UNKNOWN"
            self.try_again(operation)
            return
        operation.ended = at + self.rng.randrange(1, 3 * self.pause_us)
        if operation.kind == Kind.RESERVE and operation.reservation_id is not None:
            self.known.append((operation.drop_id, operation.user_id, operation.reservation_id))

    # Viewers -----------------------------------------------------------------------------------------

    def deliveries(self, until: int) -> list[Delivery]:
        found: list[Delivery] = []
        for viewer in range(self.viewers):
            for stall in self.stalls:
                self.watch(viewer, stall, until, found)
        return found

    def watch(self, viewer: int, stall: Stall, until: int, found: list[Delivery]) -> None:
        """Passes as a feed makes them: of stock the newest, of all else each; a snapshot at first, and at times."""
        events, decided, drop_id = stall.events, stall.decided, stall.row.id
        at, position = self.rng.randrange(until), -1
        stock = [0]
        for event in events:
            stock.append(stock[-1] if event.available_stock is None else event.available_stock)
        told = seen = 0
        while at < until + 2_000_000:
            while seen < len(events) and decided[seen] < at:
                seen += 1
            if seen and (position < 0 or self.rng.random() < 0.02):
                found.append(Delivery(viewer, drop_id, seen, True, at, available_stock=stock[seen]))
                position = told = seen
            elif seen:
                newest = max((event.seq for event in events[position:seen] if event.type in STOCK), default=0)
                for event in events[position:seen]:
                    if event.type == "PURCHASED":
                        for type_ in ("ACTIVITY_UPDATED", "PURCHASE_COMPLETED"):
                            found.append(Delivery(viewer, drop_id, event.seq, False, at, type_))
                    elif event.type == "DROP_UPDATED":
                        found.append(Delivery(viewer, drop_id, event.seq, False, at, "DROP_UPDATED"))
                    elif event.seq == newest and newest > told:
                        found.append(Delivery(viewer, drop_id, newest, False, at, "STOCK_UPDATED", stock[newest]))
                        told = newest
                position = seen
            at += self.rng.randrange(1, 60 * self.pause_us)


def _copied(operation: Operation) -> Operation:
    """As it was told first, whatever became of that answer."""
    copy = Operation(0, operation.kind, operation.user_id, operation.drop_id, 0, None, operation.ending)
    for field in TOLD:
        setattr(copy, field, getattr(operation, field))
    return copy


def _forget(operation: Operation) -> None:
    """The answer never came: nothing of it is known."""
    operation.ending, operation.code, operation.is_replayed, operation.answer = Ending.UNKNOWN, "NO_ANSWER", False, b""
    operation.seq = operation.epoch = operation.purchase_id = operation.created_at = None
    operation.expires_at = operation.available_stock = operation.status = None
    if operation.kind != Kind.CANCEL:
        operation.reservation_id = None
    if operation.kind == Kind.CREATE:
        operation.drop_id = ""
