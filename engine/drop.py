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
"""

import heapq
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


class Drop:
    """One drop's state: its terms, its counts, its holds, and how each user's newest reservation ended."""

    __slots__ = (
        "_deadlines",
        "available",
        "held",
        "holds",
        "latest_purchases",
        "newest_ended",
        "seq",
        "sold",
        "status",
        "terms",
    )

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
        self.latest_purchases: tuple[LatestPurchase, ...] = ()
        self._deadlines: list[tuple[Instant, int, Hold]] = []

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
        drop._deadlines = _deadlines_of(drop.holds)
        assert len(drop.holds) == len(record.holds), "two active holds of one user"
        assert sum(hold.qty for hold in record.holds) == drop.held, "held_count is not the sum of the active holds"
        drop._assert_conserved()
        return drop

    def copy(self) -> "Drop":
        """The same state, to be changed on its own. Holds and events are immutable and shared."""
        twin = Drop(self.terms, self.status)
        twin.available, twin.held, twin.sold, twin.seq = self.available, self.held, self.sold, self.seq
        twin.holds = dict(self.holds)
        twin.newest_ended = dict(self.newest_ended)
        twin.latest_purchases = self.latest_purchases
        twin._deadlines = _deadlines_of(twin.holds)
        return twin

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
        hold_at = self._next_expiry()
        clock_at = self._next_clock()
        if clock_at is not None and clock_at <= now and (hold_at is None or clock_at <= hold_at):
            status = DropStatus.LIVE if self.status is DropStatus.SCHEDULED else DropStatus.ENDED
            return DropUpdated(self.seq + 1, now, status)
        if hold_at is not None and hold_at <= now:
            hold = self._deadlines[0][2]
            return Expired(self.seq + 1, now, hold, self.available + hold.qty)
        return None

    def next_deadline(self) -> Instant | None:
        """When something is due next, or None: then nothing happens by itself."""
        hold_at = self._next_expiry()
        clock_at = self._next_clock()
        if hold_at is None or clock_at is None:
            return clock_at if hold_at is None else hold_at
        return min(hold_at, clock_at)

    def _decide_reserve(self, command: Reserve, now: Instant) -> Reserved | Refused:
        # The order of these checks is the contract's: found, active, already reserved, stock.
        if self.status is not DropStatus.LIVE:
            return Refused(RefusalCode.DROP_NOT_ACTIVE, self.seq)
        if command.user_id in self.holds:
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
        hold = self.holds.get(command.user_id)
        if hold is None:
            return Refused(PURCHASE_REFUSALS[self.newest_ended.get(command.user_id)], self.seq)
        # Its own look at the deadline, whatever the sweep did: rule 2.
        if now >= hold.expires_at:
            return Refused(RefusalCode.RESERVATION_EXPIRED, self.seq)
        return Purchased(self.seq + 1, now, hold, command.purchase_id, command.username, self.available)

    def _decide_cancel(self, command: Cancel, now: Instant) -> Cancelled | Refused:
        hold = self.holds.get(command.user_id)
        if hold is None or hold.id != command.reservation_id:
            return Refused(RefusalCode.RESERVATION_NOT_FOUND, self.seq)  # not among the active ones
        if now >= hold.expires_at:
            return Refused(RefusalCode.RESERVATION_EXPIRED, self.seq)
        return Cancelled(self.seq + 1, now, hold, self.available + hold.qty)

    def _next_clock(self) -> Instant | None:
        if self.seq == 0:
            return None  # not born yet: a start or an end that passes meanwhile comes after `DropCreated`
        if self.status is DropStatus.SCHEDULED:
            return self.terms.starts_at
        return self.terms.ends_at if self.status in ENDING else None

    def _next_expiry(self) -> Instant | None:
        deadlines, holds = self._deadlines, self.holds
        # Holds that ended early leave their entry behind; it is dropped when its turn comes.
        while deadlines and holds.get(deadlines[0][2].user_id) is not deadlines[0][2]:
            heapq.heappop(deadlines)
        return deadlines[0][0] if deadlines else None

    # Changing ----------------------------------------------------------------------------------------

    def apply(self, event: Event) -> None:
        """Make the event so. After `decide` or `due` said it, this must succeed."""
        assert event.seq == self.seq + 1, f"event {event.seq} does not follow {self.seq}"
        match event:
            case Reserved(hold=hold):
                assert hold.user_id not in self.holds, "a second active hold of one user"
                self.holds[hold.user_id] = hold
                heapq.heappush(self._deadlines, (hold.expires_at, event.seq, hold))
                self.available -= hold.qty
                self.held += hold.qty
            case Purchased(hold=hold):
                assert event.at < hold.expires_at, "bought at or after its deadline"
                self._end(hold, ReservationStatus.CONSUMED)
                self.sold += hold.qty
                line = LatestPurchase(hold.user_id, event.username, hold.qty, event.at)
                self.latest_purchases = (line, *self.latest_purchases[: FEED_LENGTH - 1])
            case Cancelled(hold=hold):
                self._end(hold, ReservationStatus.CANCELLED)
                self.available += hold.qty
            case Expired(hold=hold):
                assert event.at >= hold.expires_at, "expired before its deadline"
                self._end(hold, ReservationStatus.EXPIRED)
                self.available += hold.qty
            case DropUpdated(status=status):
                self.status = status
            case DropCreated():
                pass  # its terms stand since __init__; from here on it has a number
            case _:
                assert_never(event)
        self.seq = event.seq
        self._assert_conserved()

    def _end(self, hold: Hold, status: ReservationStatus) -> None:
        assert self.holds.get(hold.user_id) == hold, "no such active hold"
        del self.holds[hold.user_id]
        self.newest_ended[hold.user_id] = status
        self.held -= hold.qty
        # Entries of holds that ended early may pile up; past twice the live ones they are swept out (amortised O(1)).
        if len(self._deadlines) > 64 + 2 * len(self.holds):
            self._deadlines = _deadlines_of(self.holds)

    def _assert_conserved(self) -> None:
        total = self.terms.total_stock
        assert self.available >= 0, "negative stock"
        assert self.held >= 0, "negative holds"
        assert self.available + self.held + self.sold == total, "units appeared or vanished"


def _deadlines_of(holds: dict[UserId, Hold]) -> list[tuple[Instant, int, Hold]]:
    # Sorted is a heap. Holds of one instant keep the order in which they were taken (dicts remember it): the
    # index stands in for the seq, and stays below every seq to come only among equals, which is all that counts.
    ordered = sorted(holds.values(), key=lambda hold: hold.expires_at)
    return [(hold.expires_at, index - len(ordered), hold) for index, hold in enumerate(ordered)]
