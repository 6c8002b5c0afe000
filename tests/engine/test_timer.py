"""One heap of deadlines: exact, whatever order they were set in; stale entries ring nobody."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from engine.clock import Clock
from engine.model import Instant
from engine.timer import Timer


@asynccontextmanager
async def running_timer() -> AsyncIterator[tuple[Timer, Clock]]:
    clock = Clock(wall=lambda: 0.0)
    timer = Timer(clock)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(timer.run)
        await wait_all_tasks_blocked()
        yield timer, clock
        nursery.cancel_scope.cancel()


async def test_an_alarm_rings_exactly_at_its_deadline(autojump_clock: MockClock) -> None:
    async with running_timer() as (timer, clock):
        rung: list[int] = []
        timer.alarm(lambda: rung.append(clock.now())).set(Instant(60_000))
        await trio.sleep(59.9999)
        assert rung == []
        await trio.sleep(1)
        assert rung == [60_000]
        assert timer.statistics().rung == 1


async def test_an_alarm_set_before_the_timer_runs_rings_too(autojump_clock: MockClock) -> None:
    clock = Clock(wall=lambda: 0.0)
    timer = Timer(clock)
    rung: list[int] = []
    timer.alarm(lambda: rung.append(clock.now())).set(Instant(5))
    timer.alarm(lambda: rung.append(clock.now())).set(Instant(-5))
    with trio.move_on_after(1):
        await timer.run()
    assert rung == [0, 5]


async def test_an_earlier_deadline_wakes_a_timer_that_sleeps_for_a_later_one(autojump_clock: MockClock) -> None:
    async with running_timer() as (timer, clock):
        rung: list[tuple[str, int]] = []
        timer.alarm(lambda: rung.append(("late", clock.now()))).set(Instant(500))
        await trio.sleep(0.1)
        timer.alarm(lambda: rung.append(("early", clock.now()))).set(Instant(200))
        await trio.sleep(1)
        assert rung == [("early", 200), ("late", 500)]


async def test_an_alarm_rings_at_its_instant_when_the_clock_is_moved_toward_it(autojump_clock: MockClock) -> None:
    async with running_timer() as (timer, clock):
        rung: list[tuple[int, float]] = []
        timer.alarm(lambda: rung.append((clock.now(), round(trio.current_time(), 3)))).set(Instant(60_000))
        await trio.sleep(1)
        assert clock.catch_up(Instant(58_000))
        timer.look_again()
        await trio.sleep(5)
        assert rung == [(60_000, 3.0)]


async def test_an_alarm_rings_at_the_earliest_instant_it_was_set_to_and_once(autojump_clock: MockClock) -> None:
    async with running_timer() as (timer, clock):
        rung: list[int] = []
        alarm = timer.alarm(lambda: rung.append(clock.now()))
        for deadline in (300, 100, 200, None, 100):
            alarm.set(None if deadline is None else Instant(deadline))
        await trio.sleep(1)
        assert rung == [100]
        assert timer.statistics().waiting == 0


async def test_a_stale_entry_does_not_ring_twice_when_set_again_to_the_same_instant(autojump_clock: MockClock) -> None:
    async with running_timer() as (timer, clock):
        rung: list[int] = []
        alarm = timer.alarm(lambda: rung.append(clock.now()))
        alarm.set(Instant(200))
        alarm.set(Instant(100))
        await trio.sleep(0.15)
        alarm.set(Instant(200))
        await trio.sleep(1)
        assert rung == [100, 200]
        alarm.set(Instant(3_000))
        await trio.sleep(3)
        assert rung == [100, 200, 3_000]


async def test_a_deadline_that_is_set_again_and_again_is_queued_once(autojump_clock: MockClock) -> None:
    async with running_timer() as (timer, clock):
        rung: list[int] = []
        alarm = timer.alarm(lambda: rung.append(clock.now()))
        for begin in range(0, 1_000, 10):  # as a drop that ends one day, with a hold now and then
            alarm.set(Instant(5_000))
            alarm.set(Instant(begin + 5))
            await trio.sleep(0.01)
            assert timer.statistics().waiting == 1
        alarm.set(Instant(5_000))
        await trio.sleep(5)
        assert rung == [*range(5, 1_000, 10), 5_000]
        assert timer.statistics().waiting == 0


async def test_a_deadline_that_has_passed_rings_at_once(autojump_clock: MockClock) -> None:
    async with running_timer() as (timer, clock):
        await trio.sleep(1)
        rung: list[int] = []
        timer.alarm(lambda: rung.append(clock.now())).set(Instant(10))
        await wait_all_tasks_blocked()
        assert rung == [1_000]


async def test_an_alarm_may_set_itself_again_while_it_rings(autojump_clock: MockClock) -> None:
    async with running_timer() as (timer, clock):
        rung: list[int] = []

        def ring() -> None:
            rung.append(clock.now())
            if len(rung) < 4:
                alarm.set(Instant(clock.now() + 10))

        alarm = timer.alarm(ring)
        alarm.set(Instant(10))
        await trio.sleep(1)
        assert rung == [10, 20, 30, 40]


async def test_ten_thousand_alarms_ring_exactly_and_in_order(autojump_clock: MockClock) -> None:
    async with running_timer() as (timer, clock):
        rung: list[tuple[int, int]] = []

        def set_one(deadline: int) -> None:
            timer.alarm(lambda: rung.append((deadline, clock.now()))).set(Instant(deadline))

        deadlines = [(number * 7_919) % 3_001 + 1 for number in range(10_000)]
        for deadline in deadlines:
            set_one(deadline)
        assert timer.statistics().waiting == 10_000
        await trio.sleep(4)
        assert rung == [(deadline, deadline) for deadline in sorted(deadlines)]
        assert timer.statistics().waiting == 0
