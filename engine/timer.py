"""One task, one heap: rings each drop's alarm when the next of its deadlines has come.

It decides nothing. The drop that is woken looks at the clock itself, so an alarm that rings late, twice or for
nothing does no harm.
"""

import heapq
import itertools
from collections.abc import Callable

import msgspec
import trio

from engine.clock import Clock
from engine.model import Instant


class TimerStatistics(msgspec.Struct, frozen=True):
    waiting: int
    rung: int


class Alarm:
    """One drop's alarm: at most one pending instant, the earliest that it was set to."""

    __slots__ = ("_queued", "_ring", "_set_to", "_timer")

    def __init__(self, timer: "Timer", ring: Callable[[], None]) -> None:
        self._timer = timer
        self._ring = ring
        self._set_to: Instant | None = None
        self._queued: set[Instant] = set()  # in the heap, be it only as what was meant before an earlier one came

    def set(self, deadline: Instant | None) -> None:
        """Ring at `deadline` or, if already set to an earlier instant, then; None leaves it as it is."""
        if deadline is None or (self._set_to is not None and self._set_to <= deadline):
            return
        self._set_to = deadline
        if deadline not in self._queued:  # a drop's end may be set again after each of its holds, for weeks
            self._queued.add(deadline)
            self._timer.push(deadline, self)

    def ring_if_set_to(self, deadline: Instant) -> bool:
        """Ring, if `deadline`, which has left the heap, is still what it is set to."""
        self._queued.discard(deadline)
        if self._set_to != deadline:
            return False  # it was set to an earlier instant since, and has rung then
        self._set_to = None
        self._ring()
        return True


class Timer:
    """`run` in a nursery; alarms may be set before and after."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._heap: list[tuple[Instant, int, Alarm]] = []
        self._tie = itertools.count()
        self._earlier = trio.Event()
        self._rung = 0

    def alarm(self, ring: Callable[[], None]) -> Alarm:
        """`ring` is called from the timer's task; it must not block."""
        return Alarm(self, ring)

    def push(self, deadline: Instant, alarm: Alarm) -> None:
        if not self._heap or deadline < self._heap[0][0]:
            self._earlier.set()
        heapq.heappush(self._heap, (deadline, next(self._tie), alarm))

    def look_again(self) -> None:
        """The clock was moved: the next deadline comes sooner than it seemed."""
        self._earlier.set()

    async def run(self) -> None:
        while True:
            self._earlier = trio.Event()
            self._ring_due()
            next_s = self._clock.trio_time(self._heap[0][0]) if self._heap else float("inf")
            with trio.move_on_at(next_s):
                await self._earlier.wait()

    def _ring_due(self) -> None:
        now = self._clock.now()
        heap = self._heap
        while heap and heap[0][0] <= now:
            deadline, _, alarm = heapq.heappop(heap)
            self._rung += alarm.ring_if_set_to(deadline)

    def statistics(self) -> TimerStatistics:
        return TimerStatistics(len(self._heap), self._rung)
