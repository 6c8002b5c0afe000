"""Engine time: the wall clock, read once, then carried on by Trio's monotonic clock.

It decides what is early and what is late, so it never runs backward: not when somebody sets the machine's clock,
not across a restart, since it starts no earlier than the newest instant that the ledger holds, and not where a drop
comes from an engine whose clock was ahead of ours: then it catches up.
"""

import time
from collections.abc import Callable

import trio

from engine.model import Instant

MS_PER_S = 1000
# Added to every alarm: the sum of two floats may fall a hair short of the millisecond that it stands for, and an
# alarm that rings before `now()` says so would ring again and again.
ROUNDING_S = 1e-5


class Clock:
    """Made inside `trio.run`; `not_before` is the newest instant known to be decided already, or None."""

    def __init__(self, not_before: Instant | None = None, wall: Callable[[], float] = time.time) -> None:
        anchor_ms = int(wall() * MS_PER_S)
        self._anchor_ms = anchor_ms if not_before is None else max(anchor_ms, not_before)
        # `trio.current_time` asks this one, through two calls that look for it: 0.15 µs instead of 0.07 of each look,
        # and every command looks at least twice.
        self._current_time = trio.lowlevel.current_clock().current_time
        self._anchor_s = self._current_time()

    def now(self) -> Instant:
        """The current instant, rounded down: a deadline in whole milliseconds has come exactly when it says so."""
        return Instant(self._anchor_ms + int((self._current_time() - self._anchor_s) * MS_PER_S))

    def catch_up(self, instant: Instant) -> bool:
        """Be no earlier than this instant, which another engine has decided at; whether that moved the clock.

        Alarms that were set come sooner then: tell the timer.
        """
        behind_ms = instant - self.now()
        self._anchor_ms += max(0, behind_ms)
        return behind_ms > 0

    def trio_time(self, instant: Instant) -> float:
        """When, on Trio's clock, `instant` comes (s)."""
        return self._anchor_s + (instant - self._anchor_ms) / MS_PER_S + ROUNDING_S

    def ahead_s(self, wall: Callable[[], float] = time.time) -> float:
        """How far this clock runs ahead of the wall clock (s); negative when behind."""
        return self.now() / MS_PER_S - wall()
