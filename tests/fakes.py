"""Fakes that tests put where the real thing is slow or can't be made to fail on demand.

`MemoryLedger` is the second implementation of `engine.ledger.Ledger`: the same guard, constraints and counts
as PostgreSQL's (one conformance suite holds both to it), on Trio's clock. Its tables are plain dicts, to be
looked at and, where a test needs it, put in order by hand.

A commit can be made to fail: by script (`fail_next`), or by chance (`chances`, with a seeded `random`).
Beside that there are states: `is_down` (everything is Unavailable), `freeze()` (nothing returns until
`thaw()`), and a rival engine (`rival_takes`).
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum, auto
from random import Random
from typing import Generic, TypeVar

import msgspec
import trio

from engine.ledger import Batch, Change, InDoubt, Rejected, Resolution, StorageFull, Unavailable
from engine.model import (
    Cancelled,
    DropCreated,
    DropId,
    DropRecord,
    DropStatus,
    DropUpdated,
    Event,
    Expired,
    Hold,
    Instant,
    LatestPurchase,
    Purchased,
    PurchaseId,
    ReservationId,
    ReservationStatus,
    Reserved,
    StoredReceipt,
    Terms,
    UserId,
)
from persistence.usernames import default_username

FIRST_EPOCH = 1
REJECTED = "the fake rejects"
KEY_IS_USED = "a key is used once"


class Trouble(Enum):
    """What becomes of one commit."""

    NONE = auto()
    REJECTED = auto()
    STORAGE_FULL = auto()
    UNAVAILABLE = auto()
    LOST_AFTER_COMMIT = auto()  # in doubt, and it is there
    LOST_BEFORE_COMMIT = auto()  # in doubt, and it will never be there
    LOST_AND_LATE = auto()  # in doubt, and it commits when somebody waits for its locks


class DropRow(msgspec.Struct):
    terms: Terms
    status: DropStatus
    available_stock: int
    held_count: int
    sold_count: int
    epoch: int
    seq: int
    updated_at: Instant


class ReservationRow(msgspec.Struct):
    hold: Hold
    status: ReservationStatus
    resolved_at: Instant | None
    seq: int


class PurchaseRow(msgspec.Struct):
    id: PurchaseId
    drop_id: DropId
    user_id: UserId
    reservation_id: ReservationId
    qty: int
    created_at: Instant
    seq: int


class EventRow(msgspec.Struct):
    epoch: int
    event: Event


ReceiptKey = tuple[UserId, str, str]


class Tables(msgspec.Struct):
    drops: dict[DropId, DropRow] = {}
    reservations: dict[ReservationId, ReservationRow] = {}
    active: dict[tuple[DropId, UserId], ReservationId] = {}  # the partial unique index
    purchases: dict[PurchaseId, PurchaseRow] = {}
    events: dict[tuple[DropId, int], EventRow] = {}
    receipts: dict[ReceiptKey, tuple[DropId, StoredReceipt]] = {}


class MemoryLedger:
    """See the module. `latency_s` is what a commit takes, half of it before its effect and half after."""

    def __init__(
        self,
        *,
        latency_s: float = 0.002,
        random: Random | None = None,
        chances: Mapping[Trouble, float] | None = None,
    ) -> None:
        self.tables = Tables()
        self.usernames: dict[UserId, str] = {}
        self.latency_s = latency_s
        self.is_down = False
        self.commits: list[Batch] = []  # every batch that came to be sent, in order
        self.chances = dict(chances or {})
        self._random = random or Random(0)
        self._script: deque[Trouble] = deque()
        self._late: list[Batch] = []
        self._thawed = trio.Event()
        self._thawed.set()

    # --- what tests do to it ------------------------------------------------------------------------------

    def fail_next(self, *troubles: Trouble) -> None:
        """The next commits meet these, one each; after them chance rules again."""
        self._script.extend(troubles)

    def freeze(self) -> None:
        """From now on nothing returns, as if the server's processes were stopped."""
        self._thawed = trio.Event()

    def thaw(self) -> None:
        self._thawed.set()

    def rival_takes(self, *drop_ids: DropId) -> None:
        """Another engine takes these drops over."""
        self._settle()
        for drop_id in drop_ids:
            self.tables.drops[drop_id].epoch += 1

    # --- the port -----------------------------------------------------------------------------------------

    async def take_over(self, drop_ids: Sequence[DropId] | None) -> list[DropRecord]:
        await self._reach()
        records = self._take_over(drop_ids)
        await trio.sleep(self.latency_s / 2)
        return records

    async def reclaim(self, drop_id: DropId, epoch: int) -> DropRecord | None:
        await self._reach()
        record = self._reclaim(drop_id, epoch)
        if record is not None:
            await trio.sleep(self.latency_s / 2)
        return record

    async def commit(self, batch: Batch) -> frozenset[DropId]:
        await trio.lowlevel.checkpoint_if_cancelled()
        if not batch:
            return frozenset()
        trouble = self._script.popleft() if self._script else self._by_chance()
        if self.is_down or trouble is Trouble.UNAVAILABLE:
            await trio.lowlevel.cancel_shielded_checkpoint()
            raise Unavailable("the fake is down")
        self.commits.append(batch)
        with trio.CancelScope(shield=True):
            await trio.sleep(self.latency_s / 2)
            await self._thawed.wait()
            hit = self._meet(trouble, batch)
            await trio.sleep(self.latency_s / 2)
            await self._thawed.wait()
        return hit

    async def resolve(self, batch: Batch) -> dict[DropId, Resolution]:
        await self._reach()
        resolutions = self._resolve(batch)
        await trio.sleep(self.latency_s / 2)
        return resolutions

    async def newest_instant(self) -> Instant | None:
        await self._reach()
        return self._newest_instant()

    # --- how it fails -------------------------------------------------------------------------------------

    async def _reach(self) -> None:
        await trio.sleep(self.latency_s / 2)
        await self._thawed.wait()
        if self.is_down:
            raise Unavailable("the fake is down")

    def _by_chance(self) -> Trouble:
        draw = self._random.random()
        for trouble, chance in self.chances.items():
            if draw < chance:
                return trouble
            draw -= chance
        return Trouble.NONE

    def _meet(self, trouble: Trouble, batch: Batch) -> frozenset[DropId]:
        match trouble:
            case Trouble.REJECTED:
                raise Rejected(REJECTED)
            case Trouble.STORAGE_FULL:
                raise StorageFull("the fake is full")
            case Trouble.LOST_AFTER_COMMIT:
                self._commit(batch)
                raise InDoubt("the fake lost the connection, after the commit")
            case Trouble.LOST_BEFORE_COMMIT:
                raise InDoubt("the fake lost the connection, before the commit")
            case Trouble.LOST_AND_LATE:
                self._late.append(batch)
                raise InDoubt("the fake lost the connection, and the commit is late")
            case _:
                return self._commit(batch)

    def _settle(self) -> None:
        """What waits for the locks of a late batch finds it committed, or refused by its guard."""
        while self._late:
            batch = self._late.pop(0)
            try:
                self._commit(batch)
            except Rejected:
                continue

    # --- how it takes over --------------------------------------------------------------------------------

    def _take_over(self, drop_ids: Sequence[DropId] | None) -> list[DropRecord]:
        self._settle()
        drops = self.tables.drops
        if drop_ids is None:
            over = (DropStatus.ENDED, DropStatus.CANCELLED)
            drop_ids = [id_ for id_, row in drops.items() if row.status not in over or row.held_count]
        taken = [drop_id for drop_id in dict.fromkeys(drop_ids) if drop_id in drops]
        for drop_id in taken:
            drops[drop_id].epoch += 1
        return self._records(taken)

    def _reclaim(self, drop_id: DropId, epoch: int) -> DropRecord | None:
        self._settle()
        row = self.tables.drops.get(drop_id)
        return None if row is None or row.epoch != epoch else self._take_over([drop_id])[0]

    def _resolve(self, batch: Batch) -> dict[DropId, Resolution]:
        self._settle()
        return {change.drop_id: self._resolution(change) for change in batch}

    def _newest_instant(self) -> Instant | None:
        instants = [row.updated_at for row in self.tables.drops.values()]
        instants += [receipt.created_at for _, receipt in self.tables.receipts.values()]
        return max(instants, default=None)

    # --- how it writes ------------------------------------------------------------------------------------

    def _commit(self, batch: Batch) -> frozenset[DropId]:
        is_birth = batch[0].is_birth
        assert all(change.is_birth == is_birth for change in batch)
        assert len({change.drop_id for change in batch}) == len(batch)
        writing = _Writing(self.tables)
        hit = frozenset(change.drop_id for change in batch if writing.write(change))
        writing.finish()
        return hit

    def _resolution(self, change: Change) -> Resolution:
        if change.events:
            written = self.tables.events.get((change.drop_id, change.to_seq))
            is_committed = written == EventRow(change.epoch, change.events[-1])
        elif change.receipts:
            receipt = change.receipts[0]
            is_committed = self.tables.receipts.get(_key(receipt)) == (change.drop_id, receipt)
        else:
            is_committed = False
        row = self.tables.drops.get(change.drop_id)
        if row is None or row.epoch != change.epoch:
            return Resolution(is_committed, None)
        row.epoch += 1
        return Resolution(is_committed, row.epoch)

    # --- how it reads -------------------------------------------------------------------------------------

    def _records(self, drop_ids: Iterable[DropId]) -> list[DropRecord]:
        records = {drop_id: self._record(self.tables.drops[drop_id]) for drop_id in drop_ids}
        for row in sorted(self.tables.reservations.values(), key=lambda row: row.seq):
            record = records.get(row.hold.drop_id)
            if record is None:
                continue
            if row.status is ReservationStatus.ACTIVE:
                record.holds.append(row.hold)
                record.newest_ended.pop(row.hold.user_id, None)
            else:
                record.newest_ended[row.hold.user_id] = row.status
        return list(records.values())

    def _record(self, row: DropRow) -> DropRecord:
        mine = [purchase for purchase in self.tables.purchases.values() if purchase.drop_id == row.terms.id]
        newest = sorted(mine, key=lambda purchase: purchase.seq, reverse=True)[:3]
        return DropRecord(
            terms=row.terms,
            status=row.status,
            available_stock=row.available_stock,
            held_count=row.held_count,
            sold_count=row.sold_count,
            epoch=row.epoch,
            seq=row.seq,
            holds=[],
            newest_ended={},
            latest_purchases=tuple(
                LatestPurchase(
                    purchase.user_id,
                    self.usernames.get(purchase.user_id, default_username(purchase.user_id)),
                    purchase.qty,
                    purchase.created_at,
                )
                for purchase in newest
            ),
            updated_at=row.updated_at,
        )


class _Writing:
    """One batch on its way into the tables: all of it is checked before any of it is done."""

    def __init__(self, tables: Tables) -> None:
        self._drops = _Overlay(tables.drops)
        self._reservations = _Overlay(tables.reservations)
        self._active = _Overlay(tables.active)
        self._purchases = _Overlay(tables.purchases)
        self._events = _Overlay(tables.events)
        self._receipts = _Overlay(tables.receipts)

    def write(self, change: Change) -> bool:
        """Write the change if its guard hits; raise Rejected for what a constraint refuses."""
        if not self._guard_hits(change):
            return False
        for seq, event in enumerate(change.events, change.from_seq + 1):
            assert event.seq == seq
            self._write_event(change, event)
        for receipt in change.receipts:
            _require(_key(receipt) not in self._receipts, KEY_IS_USED)
            self._receipts[_key(receipt)] = (change.drop_id, receipt)
        return True

    def finish(self) -> None:
        for table in (self._drops, self._reservations, self._active, self._purchases, self._events, self._receipts):
            table.apply()

    def _guard_hits(self, change: Change) -> bool:
        row = self._drops.get(change.drop_id)
        if change.is_birth:
            assert change.from_seq == 0
            assert change.epoch == FIRST_EPOCH
            return row is None
        if row is None or (row.epoch, row.seq) != (change.epoch, change.from_seq):
            return False
        return row.available_stock + sum(map(_available_delta, change.events)) >= 0

    def _write_event(self, change: Change, event: Event) -> None:
        if isinstance(event, DropCreated):
            self._create(event)
        before = self._drops.get(change.drop_id)
        assert before is not None
        row = msgspec.structs.replace(before)
        row.seq, row.updated_at = event.seq, event.at
        match event:
            case DropCreated() | DropUpdated():
                row.status = event.status
            case Reserved(hold=hold):
                row.held_count += hold.qty
                self._reserve(event)
            case Purchased(hold=hold):
                row.held_count -= hold.qty
                row.sold_count += hold.qty
                self._end(event, ReservationStatus.CONSUMED)
                self._purchase(event)
            case Cancelled(hold=hold):
                row.held_count -= hold.qty
                self._end(event, ReservationStatus.CANCELLED)
            case Expired(hold=hold):
                row.held_count -= hold.qty
                self._end(event, ReservationStatus.EXPIRED)
        row.available_stock += _available_delta(event)
        if not isinstance(event, DropCreated | DropUpdated):
            # PostgreSQL compares once, at the end of the change.
            is_last = event.seq == change.to_seq
            _require(not is_last or row.available_stock == event.available_stock, "row counts: stock differs")
        _require(min(row.available_stock, row.held_count, row.sold_count) >= 0, "counts")
        _require(row.available_stock + row.held_count + row.sold_count == row.terms.total_stock, "conservation")
        self._drops[change.drop_id] = row
        self._events[change.drop_id, event.seq] = EventRow(change.epoch, event)

    def _create(self, event: DropCreated) -> None:
        terms = event.terms
        _require(2 <= len(terms.name) <= 200, "name_length")
        _require(terms.price >= 0, "price")
        _require(len(terms.currency) == 3, "currency")
        _require(terms.starts_at is None or terms.ends_at is None or terms.starts_at < terms.ends_at, "window")
        self._drops[terms.id] = DropRow(terms, event.status, terms.total_stock, 0, 0, FIRST_EPOCH, event.seq, event.at)

    def _reserve(self, event: Reserved) -> None:
        hold = event.hold
        assert hold.created_at == event.at
        _require(hold.id not in self._reservations, "a reservation's id is used once")
        _require((hold.drop_id, hold.user_id) not in self._active, "one active reservation a user")
        _require(hold.qty > 0, "qty")
        _require(hold.expires_at > hold.created_at, "instants")
        self._active[hold.drop_id, hold.user_id] = hold.id
        self._reservations[hold.id] = ReservationRow(hold, ReservationStatus.ACTIVE, None, event.seq)

    def _end(self, event: Purchased | Cancelled | Expired, status: ReservationStatus) -> None:
        row = self._reservations.get(event.hold.id)
        is_active = (
            row is not None and row.status is ReservationStatus.ACTIVE and row.hold.drop_id == event.hold.drop_id
        )
        _require(is_active, "row counts: an ended reservation was active before")
        assert row is not None
        is_due = event.at >= row.hold.expires_at
        _require(is_due == (status is ReservationStatus.EXPIRED), "never expired early, never ended late")
        del self._active[row.hold.drop_id, row.hold.user_id]
        self._reservations[event.hold.id] = ReservationRow(row.hold, status, event.at, row.seq)

    def _purchase(self, event: Purchased) -> None:
        # That a reservation is purchased once follows from its end, which is checked before.
        hold = event.hold
        _require(event.purchase_id not in self._purchases, "a purchase's id is used once")
        self._purchases[event.purchase_id] = PurchaseRow(
            event.purchase_id, hold.drop_id, hold.user_id, hold.id, hold.qty, event.at, event.seq
        )


K = TypeVar("K")
V = TypeVar("V")


class _Overlay(Generic[K, V]):
    """Changes on top of a table, kept apart from it until all are known to be good."""

    def __init__(self, table: dict[K, V]) -> None:
        self._table = table
        self._changes: dict[K, V | None] = {}

    def get(self, key: K) -> V | None:
        return self._changes[key] if key in self._changes else self._table.get(key)

    def __contains__(self, key: K) -> bool:
        return self.get(key) is not None

    def __setitem__(self, key: K, value: V) -> None:
        self._changes[key] = value

    def __delitem__(self, key: K) -> None:
        self._changes[key] = None

    def apply(self) -> None:
        for key, value in self._changes.items():
            if value is None:
                self._table.pop(key, None)
            else:
                self._table[key] = value


def _require(is_met: bool, constraint: str) -> None:
    if not is_met:
        raise Rejected(constraint)


def _key(receipt: StoredReceipt) -> ReceiptKey:
    return receipt.user_id, receipt.operation, receipt.key


def _available_delta(event: Event) -> int:
    match event:
        case Reserved(hold=hold):
            return -hold.qty
        case Cancelled(hold=hold) | Expired(hold=hold):
            return hold.qty
        case _:
            return 0
