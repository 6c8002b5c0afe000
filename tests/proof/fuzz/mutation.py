"""Small harm to bytes, by chance from a seed: what line noise, a careless client and an attacker do."""

import random
from collections.abc import Awaitable, Callable, Sequence
from itertools import pairwise
from typing import Final

# Bytes at which parsers part ways: ends of lines, white space, signs with a meaning, what is no ASCII, what is no text.
SPECIAL: Final = (
    b"\r",
    b"\n",
    b"\r\n",
    b"\0",
    b" ",
    b"\t",
    b"\x0b",
    b"\x7f",
    b"\x80",
    b"\xff",
    b":",
    b",",
    b";",
    b"/",
    b"?",
    b"#",
    b"%",
    b"%00",
    b"%2f",
    b"%ff",
    b"\\",
    b'"',
    b"{",
    b"}",
    b"[",
    b"0",
    b"-",
    b"+",
    b".",
    b"_",
    b"\xc3\xa9",
    b"\xe2\x80\xa8",
    b"\xc0\xaf",
)
LONGEST: Final = 4  # harms to one request


def flip(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes((data[at] ^ (1 << rng.randrange(8)),)) + data[at + 1 :]


def put(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + rng.choice(SPECIAL) + data[at + 1 :]


def insert(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(SPECIAL) + data[at:]


def delete(rng: random.Random, data: bytes) -> bytes:
    begin = rng.randrange(len(data))
    return data[:begin] + data[begin + rng.choice((1, 1, 1, 2, 4, 16)) :]


def duplicate(rng: random.Random, data: bytes) -> bytes:
    begin = rng.randrange(len(data))
    piece = data[begin : begin + rng.choice((1, 2, 8, 40))]
    return data[:begin] + piece * rng.choice((2, 2, 3)) + data[begin + len(piece) :]


def swap(rng: random.Random, data: bytes) -> bytes:
    """Two neighbouring pieces change places."""
    begin, size = rng.randrange(len(data)), rng.choice((1, 2, 8))
    one, other = data[begin : begin + size], data[begin + size : begin + 2 * size]
    return data[:begin] + other + one + data[begin + 2 * size :]


def truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(1, len(data))] if len(data) > 1 else data


BYTES: Final = (flip, put, insert, delete, duplicate, swap)
Harm = Callable[[random.Random, bytes], bytes]


def harmed(rng: random.Random, data: bytes, harms: Sequence[Harm] = BYTES, most: int = LONGEST) -> bytes:
    """One harm in most cases, a few in some."""
    for _ in range(min(rng.choice((1, 1, 1, 2, 2, 3, most)), most)):
        if data:
            data = rng.choice(harms)(rng, data)
    return data


def sliced(rng: random.Random, data: bytes) -> tuple[bytes, ...]:
    """The same bytes in pieces: whole, cut a few times, by the line, or by the byte."""
    match rng.randrange(8):
        case 0 if len(data) < 400:
            cuts = list(range(1, len(data)))
        case 1:
            cuts = [at + 1 for at, byte in enumerate(data) if byte == 10][:60]
        case 2 | 3:
            cuts = sorted(rng.sample(range(1, len(data)), min(rng.randrange(1, 4), len(data) - 1)))
        case _:
            cuts = []
    bounds = [0, *cuts, len(data)]
    return tuple(piece for begin, end in pairwise(bounds) if (piece := data[begin:end]))


async def shorten(data: bytes, fails: Callable[[bytes], Awaitable[bool]], keep: Callable[[bytes], None]) -> None:
    """Hand ever shorter bytes that fail still to `keep`, by leaving out ever smaller pieces (delta debugging)."""
    size = len(data) // 2
    while size:
        at = 0
        while at < len(data):
            shorter = data[:at] + data[at + size :]
            if shorter and await fails(shorter):
                data = shorter
                keep(data)
            else:
                at += size
        size //= 2
