"""An actor's inbox: a bounded line, a bounded side door for what must not wait behind it, and a bell.

Putting is synchronous and never waits: no room is the caller's answer, at once. The owner drains it with `take`, many
messages for one turn of the scheduler; what came through the side door is taken first.
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
    """Room for `waiting_max` messages in line and for `urgent_max` at the side door; one task reads."""

    __slots__ = (
        "_is_asleep",
        "_line",
        "_lot",
        "_nudged",
        "_urgent",
        "_waiting_peak",
        "_wakes_for_line",
        "urgent_max",
        "waiting_max",
    )

    def __init__(self, waiting_max: int, urgent_max: int = 0) -> None:
        self.waiting_max = waiting_max
        self.urgent_max = urgent_max
        self._line: deque[T] = deque()
        self._urgent: deque[T] = deque()
        self._waiting_peak = 0
        self._nudged = False
        # Flags beside the lot: asking the lot itself for sleepers is a call, for each message.
        self._is_asleep = False
        self._wakes_for_line = False
        self._lot = trio.lowlevel.ParkingLot()

    def put_nowait(self, message: T) -> None:
        """Hand a message over, behind all others.

        Raises:
            MailboxFull: and the message is not taken.
        """
        line = self._line
        if len(line) >= self.waiting_max:
            raise MailboxFull
        line.append(message)
        if len(line) > self._waiting_peak:
            self._waiting_peak = len(line)
        if self._wakes_for_line:
            self._wake()

    def put_urgent_nowait(self, message: T) -> None:
        """Hand a message over at the side door, past the whole line.

        Raises:
            MailboxFull: and the message is not taken.
        """
        if len(self._urgent) >= self.urgent_max:
            raise MailboxFull
        self._urgent.append(message)
        if self._is_asleep:
            self._wake()

    def put_back(self, messages: Sequence[T]) -> None:
        """Return messages that were taken, to the head of the line. They had their place: the bound is not asked."""
        self._line.extendleft(reversed(messages))
        self.nudge()

    def nudge(self) -> None:
        """Wake the reader without a message: something is due, or something has changed."""
        self._nudged = True
        if self._is_asleep:
            self._wake()

    async def ready(self, *, urgent_only: bool = False) -> None:
        """Return when there is a message or a nudge; `urgent_only`: the line alone is no reason.

        Always lets other tasks run once.
        """
        if self._has_news(urgent_only):
            await trio.lowlevel.checkpoint()
        while not self._has_news(urgent_only):
            self._is_asleep, self._wakes_for_line = True, not urgent_only
            try:
                await self._lot.park()
            finally:
                self._is_asleep = self._wakes_for_line = False
        self._nudged = False

    def take(self, most: int) -> list[T]:
        """Up to `most` messages of the line, oldest first; maybe none."""
        return _taken(self._line, most)

    def take_urgent(self, most: int) -> list[T]:
        """Up to `most` messages that came through the side door, oldest first; maybe none."""
        return _taken(self._urgent, most)

    def take_all(self) -> list[T]:
        return [*self.take_urgent(len(self._urgent)), *self.take(len(self._line))]

    @property
    def in_line(self) -> int:
        return len(self._line)

    def __len__(self) -> int:
        return len(self._line) + len(self._urgent)

    def statistics(self) -> MailboxStatistics:
        return MailboxStatistics(len(self), self.waiting_max, self._waiting_peak)

    def _has_news(self, urgent_only: bool) -> bool:
        return self._nudged or bool(self._urgent) or (bool(self._line) and not urgent_only)

    def _wake(self) -> None:
        self._is_asleep = self._wakes_for_line = False
        self._lot.unpark()


def _taken(waiting: deque[T], most: int) -> list[T]:
    if len(waiting) <= most:
        taken = list(waiting)
        waiting.clear()
        return taken
    return [waiting.popleft() for _ in range(most)]
