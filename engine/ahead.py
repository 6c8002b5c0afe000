"""A drop's state ahead of its committed one: what is decided and on its way to the ledger, and no more than that.

A full second copy would cost each hold its memory twice, and each failure a walk through all of them. So this looks
through to the committed state wherever nothing is on its way, and a failure drops O(what is on its way). The rules are
those of `engine.drop`, to the letter; only where a hold stands is answered here.

The deadlines of both states are one, and kept here. A hold that has ended here but not there, and whose turn comes, is
set aside: it comes back if that end does not land.
"""

from bisect import insort
from collections.abc import Sequence

from engine.drop import Drop, Ending, Rules
from engine.model import (
    Cancelled,
    DropCreated,
    DropUpdated,
    Event,
    Expired,
    Hold,
    Instant,
    Purchased,
    ReservationStatus,
    Reserved,
    UserId,
)

OF_NO_HOLD = (DropCreated, DropUpdated)


class Ahead(Rules):
    """`land` what was committed, after it was applied to the committed state; `fall_back` when it will not be."""

    __slots__ = ("_aside", "_committed", "_on_the_way")

    def __init__(self, committed: Drop) -> None:
        self._committed = committed
        self._deadlines = committed.hand_over_deadlines()
        self._on_the_way: dict[UserId, Reserved | Ending] = {}  # of each user the newest change
        self._aside: list[Hold] = []  # sorted by deadline
        self.fall_back()

    def fall_back(self) -> None:
        """Forget all that is on its way. O(that), whatever the drop holds."""
        committed = self._committed
        self.terms, self.status, self.seq = committed.terms, committed.status, committed.seq
        self.available, self.held, self.sold = committed.available, committed.held, committed.sold
        self.latest_purchases = committed.latest_purchases
        self._on_the_way.clear()
        assert self._deadlines is not None
        self._deadlines.push_back(self._aside)
        self._aside.clear()

    def land(self, events: Sequence[Event]) -> None:
        """These, the oldest that were on their way, are in the committed state now."""
        newest = self._on_the_way
        assert self._deadlines is not None
        for event in events:
            if isinstance(event, OF_NO_HOLD):
                continue
            if newest.get(event.hold.user_id) is event:
                del newest[event.hold.user_id]
            elif isinstance(event, Reserved):
                # Its end is on the way too, and may have dropped it from the deadlines; but that end may not land.
                self._deadlines.push(event.hold)
        if self._aside:
            holds = self._committed.holds
            self._aside = [hold for hold in self._aside if holds.get(hold.user_id) is hold]

    def is_settled(self, now: Instant) -> bool:
        """Whether nothing is due in the committed state. O(1): a hold left behind may deny it for a while."""
        assert self._deadlines is not None
        clock_at = self._committed.next_clock()
        first = self._deadlines.first()
        return (
            (clock_at is None or clock_at > now)
            and (first is None or first.expires_at > now)
            and (not self._aside or self._aside[0].expires_at > now)
        )

    def hold_of(self, user_id: UserId) -> Hold | None:
        event = self._on_the_way.get(user_id)
        if event is None:
            return self._committed.holds.get(user_id)
        return event.hold if isinstance(event, Reserved) else None

    def ended_of(self, user_id: UserId) -> ReservationStatus | None:
        event = self._on_the_way.get(user_id)
        match event:
            case Purchased():
                return ReservationStatus.CONSUMED
            case Cancelled():
                return ReservationStatus.CANCELLED
            case Expired():
                return ReservationStatus.EXPIRED
            case _:
                return self._committed.newest_ended.get(user_id)

    def _take(self, event: Reserved) -> None:
        self._on_the_way[event.hold.user_id] = event
        assert self._deadlines is not None
        self._deadlines.push(event.hold)

    def _end(self, event: Ending, status: ReservationStatus) -> None:
        self._on_the_way[event.hold.user_id] = event
        deadlines, holds = self._deadlines, self._committed.holds
        assert deadlines is not None
        if deadlines.is_littered(len(holds) + len(self._on_the_way)):
            deadlines.clean_out(lambda hold: hold is holds.get(hold.user_id) or hold is self.hold_of(hold.user_id))

    def _set_aside(self, hold: Hold) -> None:
        if self._committed.holds.get(hold.user_id) is hold:
            insort(self._aside, hold, key=lambda one: one.expires_at)
