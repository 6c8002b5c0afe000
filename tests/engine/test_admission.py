"""Who may stand in line: a rush is let in whole, a line that stands is cut short, and then everybody may come again."""

import trio
from trio.testing import MockClock

from engine.actor import CROWD, Ask, Load
from engine.admission import CALM_S, LINE_S, RUSH_S, TICK_S, Admission
from engine.clock import Clock
from engine.model import Create, DropStatus, Fault, FaultCode, Outcome, Purchased, Reserved, UserId
from engine.publisher import Publisher
from engine.registry import Limits, running
from tests.engine.making import ANN, DROP, purchase, reserve, terms
from tests.fakes import MemoryLedger

IN_FLIGHT_MAX = 20_000
RATE = 4_000  # answered a second


class Door:
    """Reserves that come at a rate, and a server that answers at another; both in ticks of 10 ms."""

    STEP_S = 0.01

    def __init__(self) -> None:
        self.load = Load(IN_FLIGHT_MAX)
        self.admission = Admission(self.load)
        self.most = self.load.reserve_max
        self.refused = 0

    async def run(self, seconds: float, arrivals: int, *, answers: int = RATE) -> None:
        for _ in range(round(seconds / self.STEP_S)):
            for _ in range(round(arrivals * self.STEP_S)):
                if self.load.in_flight >= self.load.reserve_max:
                    self.load.reserves_refused += 1
                    self.refused += 1
                else:
                    self.load.take()
            for _ in range(min(self.load.in_flight, round(answers * self.STEP_S))):
                self.load.answer(Ask(reserve(ANN), lambda _: None, None), Fault(FaultCode.UNKNOWN))
            await trio.sleep(self.STEP_S)


async def test_rush_is_let_in_whole(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    door = Door()
    nursery.start_soon(door.admission.run)
    await door.run(RUSH_S / 2, 10_000)
    await door.run(RUSH_S, 0)
    assert door.refused == 0
    assert door.load.reserve_max == door.most


async def test_busy_server_that_keeps_up_refuses_nobody(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    door = Door()
    nursery.start_soon(door.admission.run)
    await door.run(0.3, 2 * RATE)
    await door.run(20.0, RATE)
    assert CROWD < door.load.in_flight < RATE * LINE_S
    assert door.refused == 0


async def test_line_that_stands_is_cut_to_what_is_done_in_time(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    door = Door()
    nursery.start_soon(door.admission.run)
    await door.run(5.0, 3 * RATE)
    assert door.admission.is_shedding
    for _ in range(20):
        await door.run(0.5, 3 * RATE)
        # A tick more or less of what is answered.
        assert door.load.in_flight <= RATE * (LINE_S + 2 * TICK_S)
        assert door.load.in_flight >= RATE * LINE_S / 2, "it does nothing for want of work"
    await door.run(LINE_S + CALM_S + 1.0, RATE // 2)
    assert not door.admission.is_shedding
    refused = door.refused
    await door.run(RUSH_S / 2, 10_000)
    assert door.refused == refused, "the next rush is let in whole again"


async def test_line_before_the_door_counts(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """Nobody reads as fast as is asked, so the line stands where it can't be counted."""
    door = Door()
    nursery.start_soon(door.admission.run)
    await door.run(0.2, 3 * RATE)
    waiting = door.load.in_flight
    assert CROWD < waiting < RATE * LINE_S / 2
    await door.run(RUSH_S, RATE)
    assert not door.admission.is_shedding
    door.load.stood_s = LINE_S * 0.9
    await door.run(RUSH_S / 2, RATE)
    assert not door.admission.is_shedding
    await door.run(RUSH_S, RATE)
    assert door.admission.is_shedding
    assert door.load.in_flight <= max(CROWD, RATE * LINE_S * 0.1 + RATE * TICK_S)
    door.load.stood_s = 2 * LINE_S
    await door.run(RUSH_S, RATE)
    assert 0 < door.load.in_flight <= CROWD, "some are taken, however long the line"
    door.load.stood_s = 0.0
    await door.run(CALM_S + 2.0, RATE // 2)
    assert not door.admission.is_shedding


async def test_server_that_slows_down_takes_less(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    door = Door()
    nursery.start_soon(door.admission.run)
    await door.run(5.0, 3 * RATE)
    await door.run(5.0, 3 * RATE, answers=RATE // 4)
    assert door.load.in_flight <= max(CROWD, RATE / 4 * (LINE_S + 2 * TICK_S))


async def test_engine_asked_for_more_than_it_can_do_refuses_reserves_and_serves_who_holds(
    autojump_clock: MockClock,
) -> None:
    """A commit of 100 ms takes 100 changes: 1,000 a second, and twice as many are wanted."""
    limits = Limits(part_max=114, batch_max=114)  # an eighth of a part is kept from reserves
    async with running(MemoryLedger(latency_s=0.1), Clock(wall=lambda: 0.0), Publisher(), limits) as registry:
        create = Create(terms(1_000_000), DropStatus.LIVE)
        await registry.wait_for(lambda reply: registry.create(create, reply))
        outcomes: list[Outcome] = []
        held: list[UserId] = []
        slowest_s = 0.0
        for number in range(500):
            for place in range(20):
                user = UserId(f"user-{number}-{place}")
                registry.ask(DROP, reserve(user, f"{user}-hold", hold_ms=60_000), outcomes.append)
            held += [one.hold.user_id for one in outcomes if isinstance(one, Reserved)]
            refused = sum(isinstance(one, Fault) for one in outcomes)
            outcomes.clear()
            if number >= 300:  # it stands in line since long
                # A tick more or less, and a commit: all of its answers come at once.
                assert registry.statistics().in_flight <= 1_000 * (LINE_S + 2 * TICK_S + 0.1)
                if number % 20 == 0:
                    assert refused
                    asked_at = trio.current_time()
                    assert isinstance(await registry.call(DROP, purchase(held.pop())), Purchased)
                    slowest_s = max(slowest_s, trio.current_time() - asked_at)
            await trio.sleep(0.01)
        assert slowest_s <= 0.21, "who holds a unit waits for two commits, not for the line"
        await registry.drain()
