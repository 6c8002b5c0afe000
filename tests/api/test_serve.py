"""What the server does beside serving."""

import os
import platform
import threading
from typing import cast

import pytest
import structlog
import structlog.testing
import trio
from trio.testing import MockClock

from api.serve import CLOCK_LOOK_S, TRIM_S, _started, trim, watch_clock
from engine.clock import Clock
from persistence.embedded import EmbeddedPostgres, EmbeddedServer
from persistence.installation import EmbeddedServerError
from persistence.startup import CLOCK_SKEW_MAX_S
from tests.bench import usage

PIECES = 100_000
PIECE_BYTES = 1_000  # beyond what Python's own allocator takes, far below what would be a mapping of its own


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps its heap, and can be asked for it")
async def test_memory_that_nobody_uses_goes_back_to_the_system(autojump_clock: MockClock) -> None:
    crowd = [bytearray(PIECE_BYTES) for _ in range(PIECES)]
    last = crowd[-1]  # at the end of the heap
    crowd.clear()
    before = usage.rss_bytes(os.getpid())
    with trio.move_on_after(1.5 * TRIM_S):
        await trim()
    after = usage.rss_bytes(os.getpid())
    assert before is not None
    assert after is not None
    assert before - after > PIECES * PIECE_BYTES / 2
    assert len(last) == PIECE_BYTES


class Recovering:
    """An embedded server that starts for as long as nobody gives it up, or in vain."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._is_given_up = threading.Event()

    def start(self, *, may_create: bool = True) -> EmbeddedServer:
        self._is_given_up.wait(self._patience_s)
        raise EmbeddedServerError("PostgreSQL did not start")

    def give_up(self) -> None:
        self._is_given_up.set()


async def test_start_of_the_embedded_server_ends_when_it_is_cancelled() -> None:
    with trio.fail_after(10), trio.move_on_after(0.1) as starting:
        await _started(cast(EmbeddedPostgres, Recovering(60)))
    assert starting.cancelled_caught
    with pytest.raises(EmbeddedServerError):
        await _started(cast(EmbeddedPostgres, Recovering(0.01)))


@pytest.mark.parametrize("step_s", [3_600.0, -3_600.0])
async def test_a_clock_that_is_not_the_machines_is_told_of(autojump_clock: MockClock, step_s: float) -> None:
    stepped_s = 0.0

    def wall() -> float:
        return trio.current_time() + stepped_s

    with structlog.testing.capture_logs() as lines, trio.move_on_after(2.5 * CLOCK_LOOK_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch_clock, Clock(wall=wall), wall)
            await trio.sleep(0.5 * CLOCK_LOOK_S)
            stepped_s = 0.9 * CLOCK_SKEW_MAX_S
            await trio.sleep(CLOCK_LOOK_S)
            assert not lines
            stepped_s = step_s
            await trio.sleep(CLOCK_LOOK_S)
    ((event, ahead_s),) = [(line["event"], line["ahead_s"]) for line in lines]
    assert event == "clock_off"
    assert ahead_s == pytest.approx(-step_s, abs=0.002)
