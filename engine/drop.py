"""The rules of a drop: what may happen, what happens, what is due. Pure and synchronous; all of it is here.

    draft ──> scheduled ──starts_at──> live ──ends_at──> ended         (paused, cancelled: by its owner)

                        ┌── Purchased ──> consumed
    Reserved ──> active ┼── Cancelled ──> cancelled                    (each end absorbs)
                        └── Expired ────> expired

1. available + held + sold = total, at every moment.
2. A hold is bought before `expires_at`, and expires at or after it. Nothing happens to it twice.
3. One active hold per user and drop.
4. Changes are numbered: the event after `seq` n has `seq` n + 1.
5. Whatever is due is settled before anything else is decided: a late timer can sell nothing that has run out.

`decide` and `due` read; `apply` is the only thing that changes a drop. A broken rule is an AssertionError: it stops
this drop, and nothing else.

The rules are written once (`Rules`), for two ways of keeping who holds what: `Drop` keeps all of it; `engine.ahead`
runs ahead of a `Drop` by the changes that are on their way to the ledger, and keeps those alone.
"""

import heapq
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import assert_never

from engine.model import (
    Cancel,
    Cancelled,
    Command,
    Create,
    Decision,
    DropCreated,
    DropRecord,
    DropStatus,
    DropUpdated,
    Event,
    Expired,
    Hold,
    Instant,
    LatestPurchase,
    Purchase,
    Purchased,
    RefusalCode,
    Refused,
    ReservationStatus,
    Reserve,
    Reserved,
    Sweep,
    Swept,
    Terms,
    UserId,
)

FEED_LENGTH = 3  # purchases in a drop's activity feed (the contract's `latest_purchasers`)

ENDING = (DropStatus.LIVE, DropStatus.PAUSED)  # statuses that `ends_at` ends

PURCHASE_REFUSALS = {
    None: RefusalCode.RESERVATION_REQUIRED,
    ReservationStatus.EXPIRED: RefusalCode.RESERVATION_EXPIRED,
    ReservationStatus.CANCELLED: RefusalCode.RESERVATION_NOT_ACTIVE,
    ReservationStatus.CONSUMED: RefusalCode.ALREADY_PURCHASED,
}


Ending = Purchased | Cancelled | Expired


class Deadlines:
    """Which hold runs out next; at one instant in the order in which they were taken.

    Holds nearly always last equally long, so they run out as they were taken: a queue, at 8 bytes a hold instead of a
    heap's 120. A heap has only those that run out before another that was taken earlier.

    Holds that ended early stay behind; each is dropped when its turn comes, or in a clean-out.
    """

    __slots__ = ("_heap", "_latest", "_number", "_queue")

    def __init__(self, holds: Iterable[Hold]) -> None:
        self._queue = deque(sorted(holds, key=lambda hold: hold.expires_at))  # stable
        self._heap: list[tuple[Instant, int, Hold]] = []
        self._number = 0  # of the heap's entries, so that holds themselves are never compared
        # Never falls, so that of two that run out together the queue's is always the one that was taken first.
        self._latest = self._queue[-1].expires_at if self._queue else 0

    def push(self, hold: Hold) -> None:
        if hold.expires_at >= self._latest:
            self._latest = hold.expires_at
            self._queue.append(hold)
        else:
            self._number += 1
            heapq.heappush(self._heap, (hold.expires_at, self._number, hold))

    def push_back(self, holds: Sequence[Hold]) -> None:
        """Return holds that were popped, sorted by deadline."""
        queue = self._queue
        for hold in reversed(holds):
            if not queue or hold.expires_at <= queue[0].expires_at:
                queue.appendleft(hold)
            else:
                self.push(hold)

    def first(self) -> Hold | None:
        queue, heap = self._queue, self._heap
        if heap and (not queue or heap[0][0] < queue[0].expires_at):
            return heap[0][2]
        return queue[0] if queue else None

    def pop(self) -> None:
        """Drop the first."""
        if self._queue and self.first() is self._queue[0]:
            self._queue.popleft()
        else:
            heapq.heappop(self._heap)

    def is_littered(self, active: int) -> bool:
        return len(self) > 64 + 2 * active

    def clean_out(self, may_count: Callable[[Hold], bool]) -> None:
        """Drop holds that are over. Called when littered, it is O(1) for each that ended."""
        self._queue = deque(filter(may_count, self._queue))
        self._heap = [entry for entry in self._heap if may_count(entry[2])]
        heapq.heapify(self._heap)

    def __len__(self) -> int:
        return len(self._queue) + len(self._heap)


class Rules(ABC):
    """What may happen to a drop, what happens, what is due; with its terms and its counts."""

    __slots__ = (
        "_deadlines",
        "available",
        "held",
        "latest_purchases",
        "seq",
        "sold",
        "status",
        "terms",
    )

    terms: Terms
    status: DropStatus
    available: int
    held: int
    sold: int
    seq: int
    latest_purchases: tuple[LatestPurchase, ...]
    _deadlines: Deadlines | None  # None: the state that runs ahead of this one keeps them

    # How holds are kept ------------------------------------------------------------------------------

    @abstractmethod
    def hold_of(self, user_id: UserId) -> Hold | None:
        """The user's active hold."""

    @abstractmethod
    def ended_of(self, user_id: UserId) -> ReservationStatus | None:
        """How the newest reservation of a user without an active one ended."""

    @abstractmethod
    def _take(self, event: Reserved) -> None: ...

    @abstractmethod
    def _end(self, event: Ending, status: ReservationStatus) -> None: ...

    @abstractmethod
    def _set_aside(self, hold: Hold) -> None:
        """It has left the deadlines, since it is not active here."""

    # Reading -----------------------------------------------------------------------------------------

    def decide(self, command: Command, now: Instant) -> Decision:
        """What the command does at `now`; nothing is changed yet. Sweep first: see rule 5."""
        match command:
            case Reserve():
                return self._decide_reserve(command, now)
            case Purchase():
                return self._decide_purchase(command, now)
            case Cancel():
                return self._decide_cancel(command, now)
            case Sweep():
                return Swept(0, self.seq)  # its caller counts what the sweep before it expired
            case Create():
                assert self.seq == 0, "a drop is born once"
                return DropCreated(1, now, command.terms, command.status)
        assert_never(command)

    def due(self, now: Instant) -> Event | None:
        """The next thing that is due at `now`, or None: apply it and ask again.

        In the order of deadlines; at one instant the drop's own clock comes before its holds, and these in the
        order in which they were taken.
        """
        hold = self._next_to_expire()
        clock_at = self.next_clock()
        if clock_at is not None and clock_at <= now and (hold is None or clock_at <= hold.expires_at):
            status = DropStatus.LIVE if self.status is DropStatus.SCHEDULED else DropStatus.ENDED
            return DropUpdated(self.seq + 1, now, status)
        if hold is not None and hold.expires_at <= now:
            return Expired(self.seq + 1, now, hold, self.available + hold.qty)
        return None

    def next_deadline(self) -> Instant | None:
        """When something is due next, or None: then nothing happens by itself."""
        hold = self._next_to_expire()
        clock_at = self.next_clock()
        if hold is None or clock_at is None:
            return clock_at if hold is None else hold.expires_at
        return min(hold.expires_at, clock_at)

    def _decide_reserve(self, command: Reserve, now: Instant) -> Reserved | Refused:
        # The order of these checks is the contract's: found, active, already reserved, stock.
        if self.status is not DropStatus.LIVE:
            return Refused(RefusalCode.DROP_NOT_ACTIVE, self.seq)
        if self.hold_of(command.user_id) is not None:
            return Refused(RefusalCode.ALREADY_RESERVED, self.seq)
        if self.available < command.qty:
            return Refused(RefusalCode.OUT_OF_STOCK, self.seq)
        assert command.qty > 0
        assert command.hold_ms > 0
        hold = Hold(
            command.reservation_id,
            self.terms.id,
            command.user_id,
            command.qty,
            now,
            Instant(now + command.hold_ms),
        )
        return Reserved(self.seq + 1, now, hold, self.available - command.qty)

    def _decide_purchase(self, command: Purchase, now: Instant) -> Purchased | Refused:
        hold = self.hold_of(command.user_id)
        if hold is None:
            return Refused(PURCHASE_REFUSALS[self.ended_of(command.user_id)], self.seq)
        # Its own look at the deadline, whatever the sweep did: rule 2.
        if now >= hold.expires_at:
            return Refused(RefusalCode.RESERVATION_EXPIRED, self.seq)
        return Purchased(self.seq + 1, now, hold, command.purchase_id, command.username, self.available)

    def _decide_cancel(self, command: Cancel, now: Instant) -> Cancelled | Refused:
        hold = self.hold_of(command.user_id)
        if hold is None or hold.id != command.reservation_id:
            return Refused(RefusalCode.RESERVATION_NOT_FOUND, self.seq)  # not among the active ones
        if now >= hold.expires_at:
            return Refused(RefusalCode.RESERVATION_EXPIRED, self.seq)
        return Cancelled(self.seq + 1, now, hold, self.available + hold.qty)

    def next_clock(self) -> Instant | None:
        """When the drop's own clock moves its status next."""
        if self.seq == 0:
            return None  # not born yet: a start or an end that passes meanwhile comes after `DropCreated`
        if self.status is DropStatus.SCHEDULED:
            return self.terms.starts_at
        return self.terms.ends_at if self.status in ENDING else None

    def _next_to_expire(self) -> Hold | None:
        assert self._deadlines is not None, "ask the state that runs ahead"
        while (hold := self._deadlines.first()) is not None:
            if self.hold_of(hold.user_id) is hold:
                return hold
            self._deadlines.pop()
            self._set_aside(hold)
        return None

    # Changing ----------------------------------------------------------------------------------------

    def apply(self, event: Event) -> None:
        """Make the event so. After `decide` or `due` said it, this must succeed."""
        assert event.seq == self.seq + 1, f"event {event.seq} does not follow {self.seq}"
        match event:
            case Reserved(hold=hold):
                assert self.hold_of(hold.user_id) is None, "a second active hold of one user"
                self._take(event)
                self.available -= hold.qty
                self.held += hold.qty
            case Purchased(hold=hold):
                assert event.at < hold.expires_at, "bought at or after its deadline"
                self._end_active(event, ReservationStatus.CONSUMED)
                self.sold += hold.qty
                line = LatestPurchase(hold.user_id, event.username, hold.qty, event.at)
                self.latest_purchases = (line, *self.latest_purchases[: FEED_LENGTH - 1])
            case Cancelled(hold=hold):
                self._end_active(event, ReservationStatus.CANCELLED)
                self.available += hold.qty
            case Expired(hold=hold):
                assert event.at >= hold.expires_at, "expired before its deadline"
                self._end_active(event, ReservationStatus.EXPIRED)
                self.available += hold.qty
            case DropUpdated(status=status):
                self.status = status
            case DropCreated():
                pass  # its terms stand since __init__; from here on it has a number
            case _:
                assert_never(event)
        self.seq = event.seq
        self._assert_conserved()

    def _end_active(self, event: Ending, status: ReservationStatus) -> None:
        hold = event.hold
        assert self.hold_of(hold.user_id) == hold, "no such active hold"
        self._end(event, status)
        self.held -= hold.qty

    def _assert_conserved(self) -> None:
        assert self.available >= 0, "negative stock"
        assert self.held >= 0, "negative holds"
        assert self.available + self.held + self.sold == self.terms.total_stock, "units appeared or vanished"


class Drop(Rules):
    """One drop's state: its terms, its counts, its holds, and how each user's newest reservation ended."""

    __slots__ = ("holds", "newest_ended")

    def __init__(self, terms: Terms, status: DropStatus) -> None:
        """A drop that is about to be born: `apply` of its `DropCreated` makes it exist."""
        self.terms = terms
        self.status = status
        self.available = terms.total_stock
        self.held = 0
        self.sold = 0
        self.seq = 0
        self.holds: dict[UserId, Hold] = {}
        self.newest_ended: dict[UserId, ReservationStatus] = {}
        self.latest_purchases = ()
        self._deadlines = Deadlines(())

    @classmethod
    def restored(cls, record: DropRecord) -> "Drop":
        """The drop as the ledger has it; an AssertionError where its counts contradict its rows."""
        drop = cls(record.terms, record.status)
        drop.available = record.available_stock
        drop.held = record.held_count
        drop.sold = record.sold_count
        drop.seq = record.seq
        drop.holds = {hold.user_id: hold for hold in record.holds}
        drop.newest_ended = dict(record.newest_ended)
        drop.latest_purchases = record.latest_purchases
        drop._deadlines = Deadlines(record.holds)
        assert len(drop.holds) == len(record.holds), "two active holds of one user"
        assert sum(hold.qty for hold in record.holds) == drop.held, "held_count is not the sum of the active holds"
        drop._assert_conserved()
        return drop

    def hold_of(self, user_id: UserId) -> Hold | None:
        return self.holds.get(user_id)

    def ended_of(self, user_id: UserId) -> ReservationStatus | None:
        return self.newest_ended.get(user_id)

    def hand_over_deadlines(self) -> Deadlines:
        """From now on somebody else says what is due, who knows of later changes than this."""
        deadlines, self._deadlines = self._deadlines, None
        assert deadlines is not None, "one state runs ahead of it already"
        return deadlines

    def _take(self, event: Reserved) -> None:
        self.holds[event.hold.user_id] = event.hold
        if self._deadlines is not None:
            self._deadlines.push(event.hold)

    def _end(self, event: Ending, status: ReservationStatus) -> None:
        del self.holds[event.hold.user_id]
        self.newest_ended[event.hold.user_id] = status
        deadlines, holds = self._deadlines, self.holds
        if deadlines is not None and deadlines.is_littered(len(holds)):
            deadlines.clean_out(lambda hold: holds.get(hold.user_id) is hold)

    def _set_aside(self, hold: Hold) -> None:
        pass  # over is over
