"""The committed picture that readers see: every drop, who holds what, and which drops are listed.

Reads never reach an actor and never wait. What stands here has been committed; what is only decided is not here.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable

from engine.drop import Drop
from engine.model import (
    Cancelled,
    DropCreated,
    DropId,
    DropStatus,
    DropUpdated,
    Event,
    Expired,
    Hold,
    Purchased,
    Reserved,
    UserId,
)

LISTED = (DropStatus.SCHEDULED, DropStatus.LIVE)


class Board:
    """The drops' committed states, shared with their actors, which alone change them; and two indexes of them."""

    def __init__(self) -> None:
        self._drops: dict[DropId, Drop] = {}
        self._newest_first: list[tuple[int, DropId]] = []  # (minus created_at, id) of the listed drops
        # Nearly everybody holds in one drop: that hold itself; a tuple of them only for who holds in several.
        self._holds: dict[UserId, Hold | tuple[Hold, ...]] = {}

    def show(self, drop: Drop) -> None:
        """Put a drop's committed state on the board, in place of an earlier one."""
        drop_id = drop.terms.id
        self.forget(drop_id)
        self._drops[drop_id] = drop
        self._list(drop)
        for hold in drop.holds.values():
            self._add_hold(hold)

    def forget(self, drop_id: DropId) -> None:
        """Take a drop off the board: another engine owns it now, or its state is about to be replaced."""
        drop = self._drops.pop(drop_id, None)
        if drop is None:
            return
        self._unlist(drop)
        for hold in drop.holds.values():
            self._remove_hold(hold)

    def committed(self, drop_id: DropId, event: Event) -> None:
        """Follow a committed event. The drop's own state has been changed by it already."""
        match event:
            case Reserved(hold=hold):
                self._add_hold(hold)
            case Purchased(hold=hold) | Cancelled(hold=hold) | Expired(hold=hold):
                self._remove_hold(hold)
            case DropCreated():
                pass  # shown by the registry, which made it
            case DropUpdated():
                self._list(self._drops[drop_id])

    def drop(self, drop_id: DropId) -> Drop | None:
        return self._drops.get(drop_id)

    def drops(self) -> Iterable[Drop]:
        return self._drops.values()

    def listed(self, limit: int, offset: int) -> tuple[list[Drop], int]:
        """A page of the scheduled and live drops, newest first, and how many there are in all."""
        page = self._newest_first[offset : offset + limit]
        return [self._drops[drop_id] for _, drop_id in page], len(self._newest_first)

    def holds_of(self, user_id: UserId) -> tuple[Hold, ...]:
        """The user's committed holds, oldest first. Some may have run out this instant: compare `expires_at`."""
        # Drops are loaded in any order, so their holds come in any order; nearly always there is one.
        return tuple(sorted(_each(self._holds.get(user_id)), key=lambda hold: hold.created_at))

    def _list(self, drop: Drop) -> None:
        if drop.status not in LISTED:
            self._unlist(drop)
            return
        key = _listing_key(drop)
        at = bisect_left(self._newest_first, key)
        if self._newest_first[at : at + 1] != [key]:
            insort(self._newest_first, key)

    def _unlist(self, drop: Drop) -> None:
        key = _listing_key(drop)
        at = bisect_left(self._newest_first, key)
        if self._newest_first[at : at + 1] == [key]:
            del self._newest_first[at]

    def _add_hold(self, hold: Hold) -> None:
        others = self._holds.setdefault(hold.user_id, hold)
        if others is not hold:
            self._holds[hold.user_id] = (*_each(others), hold)

    def _remove_hold(self, hold: Hold) -> None:
        left = tuple(other for other in _each(self._holds.pop(hold.user_id, None)) if other.id != hold.id)
        if left:
            self._holds[hold.user_id] = left if len(left) > 1 else left[0]


def _each(holds: Hold | tuple[Hold, ...] | None) -> tuple[Hold, ...]:
    if holds is None:
        return ()
    return holds if isinstance(holds, tuple) else (holds,)


def _listing_key(drop: Drop) -> tuple[int, DropId]:
    return -drop.terms.created_at, drop.terms.id
