"""New ids: UUIDv7 (RFC 9562), so that rows made together lie together in every index."""

import random
from collections.abc import Callable

from engine.model import Instant


class IdSource:
    """Ids of the engine's time. `bits(n)` gives n random bits; a seeded one makes a run replay to the byte."""

    def __init__(self, now: Callable[[], Instant], bits: Callable[[int], int] | None = None) -> None:
        self._now = now
        # Ids must be unique, not secret: nobody may do anything with an id that is not their own anyway.
        self._bits = bits or random.Random(random.SystemRandom().getrandbits(256)).getrandbits

    def new(self) -> str:
        """48 bits of milliseconds, version 7, 12 random bits, variant 10, 62 random bits."""
        bits = self._bits(74)
        tail = 0x8000_0000_0000_0000 | (bits & 0x3FFF_FFFF_FFFF_FFFF)
        text = f"{self._now():012x}7{bits >> 62:03x}{tail:016x}"
        return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
