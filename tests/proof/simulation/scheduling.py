"""Trio, made replayable: tasks that could run in any order run in one that the seed decides, on a clock that jumps.

The clock does what `trio.testing.MockClock` does with `autojump_threshold=0`: it stands still while there is anything
to do, and then jumps to whatever comes next. Beside Trio's own deadlines it keeps naps, which cost a fifth of them:
most of what a simulation does is wait.
"""

import heapq
import math
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import trio
from trio.lowlevel import Abort

T = TypeVar("T")

FOREVER_S: Final = math.inf
# Real seconds, and how often: Trio wakes itself through a socket at the end of a run, and that alone is waited for.
IDLE_S: Final = 0.01
IDLE_MAX: Final = 500
LOOKS_MAX: Final = 200_000  # at the clock within one instant; a stampede makes some thousands


class Nap:
    """One wait of one task: until `wake`, or until its time comes."""

    __slots__ = ("is_woken", "task")

    def __init__(self) -> None:
        self.is_woken = False
        self.task: trio.lowlevel.Task | None = None

    def wake(self) -> None:
        self.is_woken = True
        self.ring()

    def ring(self) -> None:
        task, self.task = self.task, None
        if task is not None:
            trio.lowlevel.reschedule(task)

    async def until(self, at: float, may_be_cancelled: Callable[[], bool] | None = None) -> bool:
        """Whether it was woken before `at`, an instant of the simulated clock (s)."""
        if self.is_woken:
            return True
        self.task = trio.lowlevel.current_task()
        if at < FOREVER_S:
            _clock().push(at, self)

        def abort(_: Any) -> Abort:
            if may_be_cancelled is not None and not may_be_cancelled():
                return Abort.FAILED
            self.task = None
            return Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
        return self.is_woken


def _clock() -> "SimulatedClock":
    clock = trio.lowlevel.current_clock()
    assert isinstance(clock, SimulatedClock)
    return clock


async def sleep(seconds: float) -> None:
    await Nap().until(trio.current_time() + seconds)


class SimulatedClock(trio.abc.Clock):
    def __init__(self) -> None:
        self._now = 0.0
        self._naps: list[tuple[float, int, Nap]] = []
        self._count = 0
        self._idle = 0
        self._looks = 0  # since time went on

    def push(self, at: float, nap: Nap) -> None:
        self._count += 1
        heapq.heappush(self._naps, (at, self._count, nap))

    def start_clock(self) -> None:
        pass

    def current_time(self) -> float:
        self._looks += 1
        assert self._looks < LOOKS_MAX, "time stands still: something goes on and on without waiting"
        return self._now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """Asked by the run loop when no task can run: then `deadline` is the next of Trio's own."""
        naps = self._naps
        while naps and naps[0][2].task is None:
            heapq.heappop(naps)
        next_at = min(deadline, naps[0][0]) if naps else deadline
        if next_at == FOREVER_S:
            self._idle += 1
            assert self._idle < IDLE_MAX, "everything waits, and for nothing"
            return IDLE_S
        self._now = max(self._now, next_at)
        self._looks = 0
        while naps and naps[0][0] <= self._now:
            heapq.heappop(naps)[2].ring()
        return 0.0


def replay(seed: int, main: Callable[[], Awaitable[T]]) -> T:
    """Run `main` to its end. Whatever it does, it does again with the same seed."""
    scheduler: Any = trio._core._run
    was = scheduler._ALLOW_DETERMINISTIC_SCHEDULING
    # Without these Trio shuffles the tasks of each turn by an entropy of its own.
    scheduler._ALLOW_DETERMINISTIC_SCHEDULING = True
    scheduler._r.seed(seed)
    try:
        return trio.run(main, clock=SimulatedClock())
    finally:
        scheduler._ALLOW_DETERMINISTIC_SCHEDULING = was
