"""The database of a simulation: one set of tables, and each engine's session on them.

`tests.fakes.MemoryLedger` keeps the tables and knows what a guard and a constraint are. Added here is what stands
between an engine and a real server: time that every call takes, a server that is down or frozen, connections that are
lost around a commit, batches that commit long after their engine has lost them, or died.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from random import Random
from typing import TypeVar

import trio

from engine.ledger import Batch, Change, InDoubt, Rejected, Resolution, Unavailable
from engine.model import (
    Cancelled,
    DropCreated,
    DropId,
    DropRecord,
    Event,
    Expired,
    Instant,
    Purchased,
    ReservationId,
    ReservationStatus,
    Reserved,
    StoredReceipt,
    UserId,
)
from persistence.reads import ReservationLine
from tests.fakes import MemoryLedger, Tables, Trouble
from tests.proof.simulation.mortality import Mortal, Point
from tests.proof.simulation.scheduling import FOREVER_S, Nap

T = TypeVar("T")

ENDED = {
    Purchased: ReservationStatus.CONSUMED,
    Cancelled: ReservationStatus.CANCELLED,
    Expired: ReservationStatus.EXPIRED,
}
LATENCY_S_MIN = 0.0005
LATENCY_S_MAX = 1.5  # of half a round trip: longer than a commit may take without being an outage
LATE_ODDS = 0.7  # that a batch which was lost from sight does commit
PATIENCE_S = 0.9  # that a read waits for its answer, as a connection of the pool does


class Ghosts(list[Batch]):
    """Batches that were sent and lost from sight: they may commit yet, or never."""

    def __init__(self) -> None:
        super().__init__()
        self.lot = trio.lowlevel.ParkingLot()

    def append(self, batch: Batch) -> None:
        super().append(batch)
        self.lot.unpark_all()


class Storage:
    """What all sessions share."""

    def __init__(self, chance: Random, *, latency_s: float, commit_timeout_s: float) -> None:
        self.chance = chance
        self.tables = Tables()
        # How each user's newest reservation on a drop ended, or that it is active.
        self.newest: dict[tuple[DropId, UserId], ReservationStatus] = {}
        self.ghosts = Ghosts()
        self.latency_s = latency_s
        self.commit_timeout_s = commit_timeout_s
        self.slowness = 1.0  # times the latency
        self.is_down = False
        self.chances: dict[Trouble, float] = {}
        self.has_room_for_updates = True  # while it has none for new rows
        self.server = Session(self, Mortal(_never))  # nobody's: it writes what comes late
        self._lost = self.ghosts.lot
        self.is_frozen = False
        self._stuck: list[Nap] = []

    def freeze(self) -> None:
        """From now on nothing returns, as if the server's processes were stopped."""
        self.is_frozen = True

    def thaw(self) -> None:
        self.is_frozen = False
        stuck, self._stuck = self._stuck, []
        for nap in stuck:
            nap.wake()

    async def round_trip(self, deadline: float, may_be_cancelled: Callable[[], bool] | None = None) -> bool:
        """Half the way to the server or back, however long it takes; False: longer than until `deadline`."""
        latency_s = self.latency_s * self.slowness * (0.25 + self.chance.random() / 2)
        there_at = trio.current_time() + min(max(LATENCY_S_MIN, latency_s), LATENCY_S_MAX)
        await Nap().until(min(there_at, deadline), may_be_cancelled)
        if self.is_frozen and there_at <= deadline:
            nap = Nap()
            self._stuck.append(nap)
            return await nap.until(deadline, may_be_cancelled)
        return there_at <= deadline

    def trouble(self, batch: Batch) -> Trouble:
        """What becomes of a batch."""
        for trouble, chance in self.chances.items():
            if self.chance.random() < chance:
                is_spared = trouble is Trouble.STORAGE_FULL and self.has_room_for_updates and not _is_growing(batch)
                return Trouble.NONE if is_spared else trouble
        return Trouble.NONE

    async def haunted(self) -> None:
        """Wait until there is a batch that was lost from sight."""
        while not self.ghosts:
            await self._lost.park()

    def settle(self) -> None:
        """What waits for the locks of a batch that was lost from sight finds it committed, or gone for good."""
        while self.ghosts:
            self.appear(self.ghosts[0])

    def appear(self, ghost: Batch) -> None:
        """A batch that was lost from sight comes to its end."""
        self.ghosts.remove(ghost)
        if self.chance.random() < LATE_ODDS:
            with suppress(Rejected):
                self.server.write(ghost)

    def note(self, changes: Sequence[Change]) -> None:
        """These were committed."""
        for change in changes:
            for event in change.events:
                if isinstance(event, Reserved):
                    self.newest[event.hold.drop_id, event.hold.user_id] = ReservationStatus.ACTIVE
                elif isinstance(event, Purchased | Cancelled | Expired):
                    self.newest[event.hold.drop_id, event.hold.user_id] = ENDED[type(event)]


class Session(MemoryLedger):
    """One engine's ledger, and what it reads. Dies with its engine: from then on no call comes back or has effect."""

    def __init__(self, storage: Storage, mortal: Mortal) -> None:
        super().__init__()
        self.tables = storage.tables
        self.storage = storage
        self._late = storage.ghosts
        self._mortal = mortal
        self._in_flight: Batch | None = None

    def die(self) -> None:
        """What was on its way to the server may arrive; its answer won't."""
        if self._in_flight is not None:
            if self.storage.chance.random() < 0.5:
                self.storage.ghosts.append(self._in_flight)
            self._in_flight = None

    def taken_over(self, drop_id: DropId) -> list[DropRecord]:
        """The same of taking over."""
        return self._take_over([drop_id])

    def write(self, batch: Batch) -> frozenset[DropId]:
        """At once, with nothing in between."""
        return self._commit(batch)

    # The port ----------------------------------------------------------------------------------------

    async def take_over(self, drop_ids: Sequence[DropId] | None) -> list[DropRecord]:
        return await self._call(Point.TAKE_OVER, lambda: self._take_over(drop_ids))

    async def reclaim(self, drop_id: DropId, epoch: int) -> DropRecord | None:
        return await self._call(Point.RECLAIM, lambda: self._reclaim(drop_id, epoch))

    async def resolve(self, batch: Batch) -> dict[DropId, Resolution]:
        return await self._call(Point.RESOLVE, lambda: self._resolve(batch))

    async def newest_instant(self) -> Instant | None:
        return await self._call(Point.LOAD, self._newest_instant)

    async def commit(self, batch: Batch) -> frozenset[DropId]:
        await trio.lowlevel.checkpoint_if_cancelled()
        await self._mortal.lives()
        if not batch:
            return frozenset()
        storage = self.storage
        trouble = storage.trouble(batch)
        if storage.is_down or trouble is Trouble.UNAVAILABLE:
            await trio.lowlevel.cancel_shielded_checkpoint()
            raise Unavailable("the server is down")
        deadline = trio.current_time() + storage.commit_timeout_s
        self._in_flight = batch
        try:
            await self._shielded_half_way(deadline)
            self._pass_by_commit(batch)
            await self._mortal.lives()
            self._in_flight = None
            try:
                hit = self._meet(trouble, batch)
            finally:
                self._mortal.pass_by(Point.COMMIT_DONE)
            await self._shielded_half_way(deadline)
            return hit
        finally:
            self._in_flight = None

    async def _shielded_half_way(self, deadline: float) -> None:
        """As far as the server or back; a commit that was sent is not cancelled, but it ends with its engine."""
        is_in_time = await self.storage.round_trip(deadline, lambda: self._mortal.is_dead)
        await self._mortal.lives()
        if not is_in_time:
            if self._in_flight is not None:
                self.storage.ghosts.append(self._in_flight)
            raise InDoubt("no answer came in time")

    def _pass_by_commit(self, batch: Batch) -> None:
        if any(type(event) is Expired for change in batch for event in change.events):
            self._mortal.pass_by(Point.SWEEP)
        self._mortal.pass_by(Point.COMMIT_SENT)

    # What else is read -------------------------------------------------------------------------------

    async def find_receipt(self, user_id: UserId, operation: str, key: str) -> StoredReceipt | None:
        found = await self._read(lambda: self.tables.receipts.get((user_id, operation, key)))
        return None if found is None else found[1]

    async def tell_keys(self, learn: Callable[[Sequence[tuple[UserId, str, str]]], None]) -> None:
        learn(await self._call(Point.LOAD, lambda: list(self.tables.receipts)))

    async def has_drop(self, drop_id: DropId) -> bool:
        return await self._read(lambda: drop_id in self.tables.drops)

    async def reservation(self, reservation_id: ReservationId) -> ReservationLine | None:
        return await self._read(lambda: self._reservation_line(reservation_id))

    async def history(self, drop_id: DropId, after_seq: int, most: int) -> Sequence[Event]:
        return await self._read(lambda: self._history(drop_id, after_seq, most))

    # Leaves ------------------------------------------------------------------------------------------

    async def _call(self, point: Point, work: Callable[[], T], deadline: float = FOREVER_S) -> T:
        await self._mortal.lives()
        await self._half_way(deadline)
        if self.storage.is_down:
            raise Unavailable("the server is down")
        value = work()
        self._mortal.pass_by(point)
        await self._half_way(deadline)
        return value

    async def _read(self, work: Callable[[], T]) -> T:
        return await self._call(Point.LOAD, work, trio.current_time() + PATIENCE_S)

    async def _half_way(self, deadline: float = FOREVER_S) -> None:
        is_in_time = await self.storage.round_trip(deadline)
        await self._mortal.lives()
        if not is_in_time:
            raise Unavailable("no connection came free in time")

    def _settle(self) -> None:
        self.storage.settle()

    def _commit(self, batch: Batch) -> frozenset[DropId]:
        hit = super()._commit(batch)
        self.storage.note([change for change in batch if change.drop_id in hit])
        return hit

    def _reservation_line(self, reservation_id: ReservationId) -> ReservationLine | None:
        row = self.tables.reservations.get(reservation_id)
        if row is None:
            return None
        hold, drop = row.hold, self.tables.drops[row.hold.drop_id]
        return ReservationLine(
            id=hold.id,
            drop_id=hold.drop_id,
            user_id=hold.user_id,
            qty=hold.qty,
            status=row.status,
            created_at=hold.created_at,
            expires_at=hold.expires_at,
            drop_seq=drop.seq,
            drop_epoch=drop.epoch,
        )

    def _history(self, drop_id: DropId, after_seq: int, most: int) -> list[Event]:
        events, last = self.tables.events, self.tables.drops[drop_id].seq
        return [events[drop_id, seq].event for seq in range(after_seq + 1, min(last, after_seq + most) + 1)]


def _never(point: Point) -> None:
    raise AssertionError("nobody's session dies")


def _is_growing(batch: Batch) -> bool:
    return any(isinstance(event, Reserved | DropCreated) for change in batch for event in change.events)
