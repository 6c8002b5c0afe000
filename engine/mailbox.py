"""An actor's inbox: bounded, refusing when full, with a side door for the timer.

Putting is synchronous and never waits: a full mailbox is the caller's answer, at once. The owner drains it with
`take`, many messages for one turn of the scheduler.
"""

from collections import deque
from collections.abc import Sequence
from typing import Generic, TypeVar

import msgspec
import trio

T = TypeVar("T")


class MailboxFull(Exception):
    """As many messages wait as may wait."""


class MailboxStatistics(msgspec.Struct, frozen=True):
    waiting: int
    waiting_max: int
    waiting_peak: int


class Mailbox(Generic[T]):
    """Room for `waiting_max` messages; one task reads."""

    __slots__ = ("_lot", "_nudged", "_waiting", "_waiting_peak", "waiting_max")

    def __init__(self, waiting_max: int) -> None:
        self.waiting_max = waiting_max
        self._waiting: deque[T] = deque()
        self._waiting_peak = 0
        self._nudged = False
        self._lot = trio.lowlevel.ParkingLot()

    def put_nowait(self, message: T) -> None:
        """Hand a message over.

        Raises:
            MailboxFull: and the message is not taken.
        """
        waiting = self._waiting
        if len(waiting) >= self.waiting_max:
            raise MailboxFull
        waiting.append(message)
        if len(waiting) > self._waiting_peak:
            self._waiting_peak = len(waiting)
        if self._lot:
            self._lot.unpark()

    def put_back(self, messages: Sequence[T]) -> None:
        """Return messages that were taken, in front of all others. They had their place: the bound is not asked."""
        self._waiting.extendleft(reversed(messages))
        self.nudge()

    def nudge(self) -> None:
        """Wake the reader without a message: something is due, or something has changed."""
        self._nudged = True
        if self._lot:
            self._lot.unpark()

    async def ready(self) -> None:
        """Return when there is a message or a nudge. Always lets other tasks run once."""
        if self._waiting or self._nudged:
            await trio.lowlevel.checkpoint()
        while not self._waiting and not self._nudged:
            await self._lot.park()
        self._nudged = False

    def take(self, most: int) -> list[T]:
        """Up to `most` messages, oldest first; maybe none."""
        waiting = self._waiting
        if len(waiting) <= most:
            taken = list(waiting)
            waiting.clear()
            return taken
        return [waiting.popleft() for _ in range(most)]

    def __len__(self) -> int:
        return len(self._waiting)

    def statistics(self) -> MailboxStatistics:
        return MailboxStatistics(len(self._waiting), self.waiting_max, self._waiting_peak)
