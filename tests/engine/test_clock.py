"""Engine time: anchored once, carried on by Trio's clock, never backward."""

import pytest
import trio
from trio.testing import MockClock

from engine.clock import Clock
from engine.model import Instant


async def test_time_starts_at_the_wall_clock_in_whole_milliseconds(mock_clock: MockClock) -> None:
    assert Clock(wall=lambda: 1_767_780_000.9999).now() == 1_767_780_000_999


async def test_time_starts_no_earlier_than_the_newest_instant_known(mock_clock: MockClock) -> None:
    assert Clock(Instant(5_000), wall=lambda: 4.0).now() == 5_000
    assert Clock(Instant(5_000), wall=lambda: 6.0).now() == 6_000


async def test_a_step_of_the_wall_clock_moves_nothing(mock_clock: MockClock) -> None:
    wall_s = 100.0
    clock = Clock(wall=lambda: wall_s)
    wall_s = 50.0
    assert clock.now() == 100_000
    mock_clock.jump(1.0)
    assert clock.now() == 101_000
    assert clock.ahead_s(wall=lambda: wall_s) == pytest.approx(51.0)
    assert clock.ahead_s(wall=lambda: 102.0) == pytest.approx(-1.0)


async def test_clock_that_was_behind_another_catches_up_and_never_falls_back(mock_clock: MockClock) -> None:
    clock = Clock(wall=lambda: 100.0)
    mock_clock.jump(0.5)
    assert clock.catch_up(Instant(103_000))
    assert clock.now() == 103_000
    mock_clock.jump(1.0)
    assert clock.now() == 104_000
    assert clock.trio_time(Instant(104_000)) == pytest.approx(trio.current_time(), abs=1e-4)
    assert not clock.catch_up(Instant(104_000))
    assert not clock.catch_up(Instant(5))
    assert clock.now() == 104_000


async def test_a_millisecond_begins_when_it_says_so(mock_clock: MockClock) -> None:
    clock = Clock(wall=lambda: 0.0)
    mock_clock.jump(0.0009)
    assert clock.now() == 0
    mock_clock.jump(0.0002)
    assert clock.now() == 1


@pytest.mark.parametrize("anchor_s", [0.0, 0.1, 1_767_780_000.123, 2**31 + 0.7])
@pytest.mark.parametrize("later_s", [0.0, 1e-9, 12345.678901, 86_400.0 * 400])
async def test_an_alarm_never_rings_before_its_instant_and_less_than_a_millisecond_after(
    autojump_clock: MockClock, anchor_s: float, later_s: float
) -> None:
    autojump_clock.jump(later_s)
    clock = Clock(wall=lambda: anchor_s)
    start = clock.now()
    for ms in [1, 2, 3, 7, 10, 999, 1_000, 59_999, 60_000, 86_400_001]:
        deadline = Instant(start + ms)
        await trio.sleep_until(clock.trio_time(deadline))
        assert clock.now() == deadline
