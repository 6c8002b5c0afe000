"""An actor's inbox: a bounded line, a bounded side door for what must not wait behind it, and a bell.

Putting is synchronous and never waits: no room is the caller's answer, at once. The owner is rung for, once, when it
listens and something comes; it drains with `take`, many messages at a time. What came through the side door is taken
first.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import msgspec

T = TypeVar("T")


class MailboxFull(Exception):
    """As many messages wait as may wait."""


class MailboxStatistics(msgspec.Struct, frozen=True):
    waiting: int
    waiting_max: int
    waiting_peak: int


class Mailbox(Generic[T]):
    """Room for `waiting_max` messages in line and for `urgent_max` at the side door; `ring` calls the one reader."""

    __slots__ = (
        "_hears_line",
        "_is_listening",
        "_line",
        "_nudged",
        "_ring",
        "_urgent",
        "_waiting_peak",
        "urgent_max",
        "waiting_max",
    )

    def __init__(self, ring: Callable[[], None], waiting_max: int, urgent_max: int = 0) -> None:
        self.waiting_max = waiting_max
        self.urgent_max = urgent_max
        self._line: deque[T] = deque()
        self._urgent: deque[T] = deque()
        self._waiting_peak = 0
        self._ring = ring
        self._nudged = False
        self._is_listening = False
        self._hears_line = False

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
        if self._hears_line:
            self._call()

    def put_urgent_nowait(self, message: T) -> None:
        """Hand a message over at the side door, past the whole line.

        Raises:
            MailboxFull: and the message is not taken.
        """
        if len(self._urgent) >= self.urgent_max:
            raise MailboxFull
        self._urgent.append(message)
        if self._is_listening:
            self._call()

    def put_back(self, messages: Sequence[T]) -> None:
        """Return messages that were taken, to the head of the line. They had their place: the bound is not asked."""
        self._line.extendleft(reversed(messages))
        self.nudge()

    def nudge(self) -> None:
        """Call the reader without a message: something is due, or something has changed."""
        self._nudged = True
        if self._is_listening:
            self._call()

    def listen(self, *, urgent_only: bool = False) -> None:
        """Ring once when there is a message or a nudge, maybe at once; `urgent_only`: the line alone is no reason."""
        if self._nudged or self._urgent or (self._line and not urgent_only):
            self._call()
        else:
            self._is_listening, self._hears_line = True, not urgent_only

    def heard(self) -> None:
        """The reader comes: whatever it was called for up to now, it need not be called for again."""
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

    def _call(self) -> None:
        self._is_listening = self._hears_line = False
        self._ring()


def _taken(waiting: deque[T], most: int) -> list[T]:
    if len(waiting) <= most:
        taken = list(waiting)
        waiting.clear()
        return taken
    return [waiting.popleft() for _ in range(most)]
