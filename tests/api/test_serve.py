"""What the server does beside serving."""

import os
import platform

import pytest
import trio
from trio.testing import MockClock

from api.serve import TRIM_S, trim
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
