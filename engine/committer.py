"""The one task that writes: packs what waits, of all drops, into one batch, and answers after its commit.

What arrived while the last commit ran is the next batch, up to a bound; there is no linger, so one caller alone waits
for one commit. Batches commit in order, one at a time.

    committed          settle: publish, answer, arm; no await in between
    rejected           nothing happened: each drop's part alone once more; then that drop pays for it, nobody else
    out of reach       nothing happened: everything not sent is refused until the ledger is back
    in doubt           it may have happened: the batch's drops stay frozen until the ledger told the truth
    no answer for long the commit goes on, but nobody else is kept waiting for it
"""

import math
from collections import deque
from typing import Protocol

import msgspec
import structlog
import trio

from engine.actor import GROWING, GuardMissed, Part
from engine.ledger import Batch, InDoubt, Ledger, Rejected, Resolution, StorageFull, Unavailable
from engine.model import DropId, FaultCode

log = structlog.get_logger()

RETRY_S = 0.2  # between two looks at a ledger that is out of reach, and two writes to one without room
# A database that had no room is not asked to take new rows again for so long: one probe a second costs nothing.
STORAGE_FULL_S = 1.0


class Outage(Protocol):
    """Told when the ledger goes out of reach, so that nobody waits for it, and when it is back."""

    def ledger_lost(self, code: FaultCode) -> None: ...

    def ledger_found(self) -> None: ...

    def drop_lost(self, drop_id: DropId) -> None: ...


class CommitterStatistics(msgspec.Struct, frozen=True):
    batches: int
    events: int
    rejected: int
    in_doubt: int
    guards_missed: int
    waiting: int
    is_available: bool
    storage_full: bool


class Committer:
    """`run` in a nursery; `submit` from actors. A commit that takes longer than `stall_s` counts as an outage."""

    def __init__(self, ledger: Ledger, *, batch_max: int, stall_s: float) -> None:
        self.fault: FaultCode | None = None
        self.outage: Outage | None = None
        self._ledger = ledger
        self._batch_max = batch_max
        self._stall_s = stall_s
        self._waiting: deque[Part] = deque()
        self._work = trio.lowlevel.ParkingLot()
        self._idle = trio.lowlevel.ParkingLot()
        self._full_until = -math.inf
        self._rest_until = -math.inf
        self._sent_at: float | None = None
        self._sent = trio.lowlevel.ParkingLot()
        self._batches = self._events = self._rejected = self._in_doubt = self._guards_missed = 0

    @property
    def storage_full(self) -> bool:
        """Whether the database said a moment ago that it has no room for new rows."""
        return trio.current_time() < self._full_until

    def submit(self, part: Part) -> None:
        """Queue a part. It may grow until it is taken. Bounded: at most one part of each drop waits."""
        self._waiting.append(part)
        if self._work:
            self._work.unpark()

    def withdraw(self, part: Part) -> None:
        """Take back a part that was not sent."""
        self._waiting.remove(part)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_for_stalls)
            while True:
                while not self._waiting:
                    self._idle.unpark_all()
                    await self._work.park()
                if trio.current_time() < self._rest_until:
                    await trio.sleep_until(self._rest_until)
                    continue  # what waited may have been withdrawn meanwhile
                await self._commit(self._take_batch(), alone_next=True)

    async def idle(self) -> None:
        """Wait until nothing waits and nothing is in flight."""
        while self._waiting or self._sent_at is not None:
            await self._idle.park()

    def statistics(self) -> CommitterStatistics:
        return CommitterStatistics(
            self._batches,
            self._events,
            self._rejected,
            self._in_doubt,
            self._guards_missed,
            len(self._waiting),
            self.fault is None,
            self.storage_full,
        )

    def _take_batch(self) -> list[Part]:
        """The oldest parts, up to `batch_max` events or receipts; births and other changes are never mixed."""
        parts: list[Part] = []
        size = 0
        is_birth = self._waiting[0].from_seq == 0
        while self._waiting:
            part = self._waiting[0]
            part_size = max(len(part.events), len(part.receipts))
            if parts and (size + part_size > self._batch_max or (part.from_seq == 0) != is_birth):
                break
            self._waiting.popleft()
            parts.append(part.actor.take_part())
            size += part_size
        return parts

    async def _commit(self, parts: list[Part], *, alone_next: bool) -> None:
        batch = [part.change() for part in parts]
        self._sent_at = trio.current_time()
        self._sent.unpark_all()
        try:
            hit = await self._ledger.commit(batch)
        except InDoubt as doubt:
            self._in_doubt += 1
            await self._resolve(parts, doubt)
        except Unavailable as fault:
            log.error("ledger_unavailable", reason=str(fault))
            self._lose_ledger()
            for part in parts:
                part.actor.fail(part, FaultCode.UNAVAILABLE)
            await self._find_ledger()
        except Rejected as fault:
            self._rejected += 1
            self._sent_at = None
            self._ledger_answered()  # it may have taken so long that it counted as an outage
            if alone_next:
                await self._commit_each_alone(parts)
            else:
                self._give_up(parts[0], fault)
        else:
            self._batches += 1
            self._events += sum(len(change.events) for change in batch)
            self._settle(parts, hit)
        finally:
            self._sent_at = None

    def _settle(self, parts: list[Part], hit: frozenset[DropId]) -> None:
        self._sent_at = None
        self._ledger_answered()
        for part in parts:
            if part.actor.drop_id in hit:
                part.actor.settle(part)
            else:
                self._guards_missed += 1
                log.error("guard_missed", drop_id=part.actor.drop_id, epoch=part.epoch, from_seq=part.from_seq)
                part.actor.break_down(GuardMissed(part.actor.drop_id))
                part.actor.fail(part, FaultCode.RESTARTING)

    # When it fails -----------------------------------------------------------------------------------

    async def _commit_each_alone(self, parts: list[Part]) -> None:
        for part in parts:
            if self.fault is None:
                await self._commit([part], alone_next=False)
            else:
                part.actor.fail(part, self.fault)

    def _give_up(self, part: Part, fault: Rejected) -> None:
        """A part was rejected twice, the second time alone: its drop pays for it."""
        drop_id = part.actor.drop_id
        if not isinstance(fault, StorageFull):
            log.error("part_rejected", drop_id=drop_id, reason=str(fault))
            part.actor.break_down(fault)
            part.actor.fail(part, FaultCode.RESTARTING)
            return
        log.error("storage_full", drop_id=drop_id, reason=str(fault))
        if any(isinstance(ask.command, GROWING) for ask in part.asks):
            self._full_until = trio.current_time() + STORAGE_FULL_S
            part.actor.retry_without_growth(part)
        else:
            part.actor.fail(part, FaultCode.STORAGE_FULL)
            # What is due stays due and is tried again; not in a busy loop, and not once for each drop.
            self._rest_until = trio.current_time() + RETRY_S

    async def _resolve(self, parts: list[Part], doubt: InDoubt) -> None:
        """Keep the batch's drops frozen until it is known what became of it; then answer with the truth."""
        log.error("commit_in_doubt", drops=len(parts), reason=str(doubt))
        self._lose_ledger()
        batch = [part.change() for part in parts]
        resolutions = await self._truth_about(batch)
        for part in parts:
            resolution = resolutions[part.actor.drop_id]
            log.warning("doubt_resolved", drop_id=part.actor.drop_id, committed=resolution.committed)
            if resolution.epoch is not None:
                part.actor.epoch = resolution.epoch
            if resolution.committed:
                part.actor.settle(part)
            else:
                part.actor.fail(part, FaultCode.UNAVAILABLE)
            was_never_born = part.from_seq == 0 and not resolution.committed
            if resolution.epoch is None and not was_never_born and self.outage is not None:
                self.outage.drop_lost(part.actor.drop_id)
        self._ledger_answered()

    async def _find_ledger(self) -> None:
        await self._truth_about([])  # of nothing: this only shows that it is in reach
        self._ledger_answered()

    async def _truth_about(self, batch: Batch) -> dict[DropId, Resolution]:
        """What became of the batch, however long the ledger takes to be in reach again."""
        while True:
            try:
                return await self._ledger.resolve(batch)
            except Unavailable:
                await trio.sleep(RETRY_S)

    async def _watch_for_stalls(self) -> None:
        while True:
            if self._sent_at is None:
                await self._sent.park()
                continue
            due = self._sent_at + self._stall_s
            await trio.sleep_until(due)
            if self._sent_at is not None and self._sent_at + self._stall_s <= trio.current_time():
                if self.fault is None:
                    log.error("commit_stalled", after_s=self._stall_s)
                    self._lose_ledger()
                await self._sent.park()

    def _lose_ledger(self) -> None:
        if self.fault is None:
            self.fault = FaultCode.UNAVAILABLE
            if self.outage is not None:
                self.outage.ledger_lost(FaultCode.UNAVAILABLE)

    def _ledger_answered(self) -> None:
        if self.fault is FaultCode.UNAVAILABLE:
            log.warning("ledger_available")
            self.fault = None
            if self.outage is not None:
                self.outage.ledger_found()
