"""The one task that writes: packs what waits, of all drops, into one batch, and answers after its commit.

What arrived while the last commit ran is the next batch, up to a bound; there is no linger, so one caller alone waits
for one commit. Batches commit in order, one at a time. The answers to a committed batch wait in the outbox until the
next one is sent, and leave while the database works; an idle engine answers at once. Reserves are answered last.

    committed          settle: change what is shown, publish, put the answers into the outbox; no await in between
    rejected           nothing happened: each drop's part alone once more; then that drop pays for it, nobody else
    out of reach       nothing happened: everything not sent is refused until the ledger is back
    in doubt           it may have happened: the batch's drops stay frozen until the ledger told the truth
    no answer for long the commit goes on, but nobody else is kept waiting for it
"""

import math
from collections import deque
from collections.abc import Iterable
from typing import Protocol

import msgspec
import structlog
import trio

from engine.actor import GROWING, Ask, GuardMissed, Load, Part
from engine.ledger import Batch, InDoubt, Ledger, LedgerFault, Rejected, Resolution, StorageFull, Unavailable
from engine.model import DropId, FaultCode, Reserve

log = structlog.get_logger()

RETRY_S = 0.2  # between two looks at a ledger that is out of reach, and two writes to one without room
# A database that had no room is not asked to take new rows again for so long: one probe a second costs nothing.
STORAGE_FULL_S = 1.0
STOOD_STILL_S = 0.05  # later than it meant to wake up: the machine paused us, or something kept the loop
STOOD_STILL_MAX = 3  # times in a row; then we are slow, and a stall is one all the same
# Answers that leave before other tasks have their turn again; each costs a `send`, about 5 µs. As many as a front end
# reads in a turn: with fewer, what is committed waits behind what is asked, and grows.
ANSWERS_AT_ONCE = 128


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

    def __init__(self, ledger: Ledger, load: Load, *, batch_max: int, stall_s: float) -> None:
        self.fault: FaultCode | None = None
        self.outage: Outage | None = None
        self._ledger = ledger
        self._load = load
        self._batch_max = batch_max
        self._stall_s = stall_s
        self._waiting: list[Part] = []
        self._alone: deque[Part] = deque()  # of a batch that was rejected: each is tried once more, by itself
        # Decided and committed; bounded, since each still counts as in flight.
        self._outbox: deque[Ask] = deque()
        self._outbox_first: deque[Ask] = (
            deque()
        )  # what is no reserve: who holds a unit does not wait behind who wants one
        self._settled = trio.lowlevel.ParkingLot()
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
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_for_stalls)
                nursery.start_soon(self._answer_in_slices)
                await self._commit_batches()
        finally:
            self._answer_all()  # what is committed is told, whatever ends us

    async def idle(self) -> None:
        """Wait until nothing waits, nothing is in flight, and everybody is answered."""
        while self._waiting or self._sent_at is not None or self._has_answers:
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

    async def _commit_batches(self) -> None:
        while True:
            while not self._waiting:
                self._idle.unpark_all()
                await self._work.park()
            if trio.current_time() < self._rest_until:
                await trio.sleep_until(self._rest_until)
                continue  # what waited may have been withdrawn meanwhile
            await self._commit(self._take_batch(), alone_next=True)

    def _take_batch(self) -> list[Part]:
        """What waits, up to `batch_max` events or receipts; births and other changes are never mixed.

        Where not all fit: the oldest part, so that none waits for ever, and beside it the smallest. So a quiet drop's
        buyer waits for the commit under way and for its own, however much the hot drops bring: as long as the others'
        parts fit into `batch_max` less the part of one hot drop.
        """
        is_birth = self._waiting[0].from_seq == 0
        parts = [part for part in self._waiting if (part.from_seq == 0) == is_birth]
        if sum(part.size for part in parts) > self._batch_max:
            parts = _fitting([parts[0], *sorted(parts[1:], key=lambda part: part.size)], self._batch_max)
        if len(parts) == len(self._waiting):
            self._waiting.clear()
        else:
            taken = set(parts)
            self._waiting = [part for part in self._waiting if part not in taken]
        for part in parts:
            part.actor.take_part()
        return parts

    async def _commit(self, parts: list[Part], *, alone_next: bool) -> None:
        batch = [part.change() for part in parts]
        self._sent_at = trio.current_time()
        self._sent.unpark_all()
        try:
            hit = await self._ledger.commit(batch)
        except LedgerFault as fault:
            self._answer_all()  # before anybody hears of the failure that came after
            await self._mend(parts, fault, alone_next=alone_next)
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
                self._put_out(part.asks)
            else:
                self._answer_all()
                self._guards_missed += 1
                log.error("guard_missed", drop_id=part.actor.drop_id, epoch=part.epoch, from_seq=part.from_seq)
                part.actor.break_down(GuardMissed(part.actor.drop_id))
                part.actor.fail(part, FaultCode.RESTARTING)
        self._let_answers_leave()

    # The answers -------------------------------------------------------------------------------------

    def _let_answers_leave(self) -> None:
        """At once if the database has nothing to do anyway; otherwise as soon as it has.

        With another batch waiting, our task goes on to send that without a break, and only then lets the other one
        run. With 256 callers whose answers cost 5 µs each that gave a fourth more reserves per second on two cores.
        """
        if not self._waiting:
            self._answer(ANSWERS_AT_ONCE)
        if self._has_answers:
            self._settled.unpark_all()

    async def _answer_in_slices(self) -> None:
        while True:
            while not self._has_answers:
                self._idle.unpark_all()
                await self._settled.park()
            self._answer(ANSWERS_AT_ONCE)
            await trio.lowlevel.checkpoint()

    @property
    def _has_answers(self) -> bool:
        return bool(self._outbox or self._outbox_first)

    def _put_out(self, asks: Iterable[Ask]) -> None:
        for ask in asks:
            (self._outbox if type(ask.command) is Reserve else self._outbox_first).append(ask)

    def _answer_all(self) -> None:
        self._answer(len(self._outbox) + len(self._outbox_first))

    def _answer(self, most: int) -> None:
        """Answer the next `most`: reserves last, otherwise in the order in which they were decided."""
        load = self._load
        for outbox in (self._outbox_first, self._outbox):
            count = min(most, len(outbox))
            most -= count
            for _ in range(count):
                ask = outbox.popleft()
                assert ask.outcome is not None
                load.answer(ask, ask.outcome)

    # When it fails -----------------------------------------------------------------------------------

    async def _mend(self, parts: list[Part], fault: LedgerFault, *, alone_next: bool) -> None:
        match fault:
            case InDoubt():
                self._in_doubt += 1
                await self._resolve(parts, fault)
            case Rejected():
                self._rejected += 1
                self._sent_at = None
                self._ledger_answered()  # it may have taken so long that it counted as an outage
                if alone_next:
                    await self._commit_each_alone(parts)
                else:
                    self._give_up(parts[0], fault)
            case _:
                assert isinstance(fault, Unavailable), fault
                log.error("ledger_unavailable", reason=str(fault))
                self._lose_ledger()
                for part in parts:
                    part.actor.fail(part, FaultCode.UNAVAILABLE)
                await self._find_ledger()

    async def _commit_each_alone(self, parts: list[Part]) -> None:
        self._alone.extend(parts)
        while self._alone:
            await self._commit([self._alone.popleft()], alone_next=False)

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
                self._put_out(part.asks)
            else:
                part.actor.fail(part, FaultCode.UNAVAILABLE)
            was_never_born = part.from_seq == 0 and not resolution.committed
            if resolution.epoch is None and not was_never_born and self.outage is not None:
                self.outage.drop_lost(part.actor.drop_id)
        self._answer_all()
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
            sent_at = self._sent_at
            due = sent_at + self._stall_s
            for _ in range(STOOD_STILL_MAX):
                await trio.sleep_until(due)
                if trio.current_time() - due <= STOOD_STILL_S:
                    break
                due = trio.current_time() + STOOD_STILL_S  # it was we who stood still: an answer may be there, unread
            if self._sent_at == sent_at:
                if self.fault is None:
                    log.error("commit_stalled", after_s=self._stall_s)
                    self._lose_ledger()
                await self._sent.park()

    def _lose_ledger(self) -> None:
        if self.fault is None:
            self.fault = FaultCode.UNAVAILABLE
            while self._alone:  # rejected once, and not sent again: nothing of them has happened
                part = self._alone.popleft()
                part.actor.fail(part, FaultCode.UNAVAILABLE)
            if self.outage is not None:
                self.outage.ledger_lost(FaultCode.UNAVAILABLE)

    def _ledger_answered(self) -> None:
        if self.fault is FaultCode.UNAVAILABLE:
            log.warning("ledger_available")
            self.fault = None
            if self.outage is not None:
                self.outage.ledger_found()


def _fitting(parts: list[Part], size_max: int) -> list[Part]:
    """The first of the parts, and the following ones as far as there is room."""
    taken = [parts[0]]
    size = parts[0].size
    for part in parts[1:]:
        size += part.size
        if size > size_max:
            break
        taken.append(part)
    return taken
