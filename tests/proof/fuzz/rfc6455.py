"""A client's WebSocket frames: how they are written, rightly and wrongly, and what RFC 6455 makes of a stream of them.

The reading is of the specification and of the limits that Holdfast documents, and knows nothing of any library.
"""

import struct
from typing import Final, NamedTuple

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
PROTOCOL_ERROR, NOT_UTF8, POLICY, TOO_LARGE = 1002, 1007, 1008, 1009
NO_CODE: Final = 1005  # of a close frame that says none
MASK: Final = b"\x1f\x8b\xa5\x3c"
CODES: Final = (1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011)  # of the RFC, that may stand in a frame
LATER_CODES: Final = (1012, 1013, 1014)  # registered since, and not known to every library


def frame(
    opcode: int,
    payload: bytes = b"",
    *,
    fin: bool = True,
    reserved: int = 0,
    mask: bytes | None = MASK,
    length: int | None = None,
    size: int | None = None,
) -> bytes:
    """`length`: what is said of it, if not the truth; `size`: bits in which it is said (7, 16 or 64)."""
    said = len(payload) if length is None else length
    size = size or (7 if said < 126 else 16 if said < 65_536 else 64)
    masked = 0 if mask is None else 0x80
    head = bytes(((0x80 if fin else 0) | reserved << 4 | opcode,))
    match size:
        case 7:
            head += bytes((masked | said & 0x7F,))
        case 16:
            head += bytes((masked | 126,)) + struct.pack("!H", said & 0xFFFF)
        case _:
            head += bytes((masked | 127,)) + struct.pack("!Q", said & 0xFFFF_FFFF_FFFF_FFFF)
    return head + (b"" if mask is None else mask) + (payload if mask is None else _masked(payload, mask))


def _masked(payload: bytes, mask: bytes) -> bytes:
    whole = mask * (len(payload) // 4 + 1)
    return (int.from_bytes(payload, "big") ^ int.from_bytes(whole[: len(payload)], "big")).to_bytes(len(payload), "big")


class Reading(NamedTuple):
    """What a server must find in what a client sent."""

    messages: list[bytes]
    pings: list[bytes]
    codes: set[int]  # any of which ends the connection; empty: it goes on
    may: set[int]  # that may end it, since what is not complete is wrong already, or nearly too large


def read(data: bytes, message_max: int) -> Reading:
    """Frame after frame, to the first that breaks a rule, says good-bye, or is not complete."""
    messages: list[bytes] = []
    pings: list[bytes] = []
    parts: bytes | None = None
    kind = 0
    may: set[int] = set()
    at = 0
    while at + 2 <= len(data):
        first, second = data[at], data[at + 1]
        opcode, is_last, length = first & 0x0F, bool(first & 0x80), second & 0x7F
        wrong: set[int] = set()
        if first & 0x70 or opcode in (3, 4, 5, 6, 7) or opcode > PONG or not second & 0x80:
            wrong.add(PROTOCOL_ERROR)
        if opcode >= CLOSE and (not is_last or length > 125):
            wrong.add(PROTOCOL_ERROR)
        if opcode < CLOSE and (opcode == CONTINUATION) != (parts is not None):
            wrong.add(PROTOCOL_ERROR)
        begin = at + 2
        extended = {126: 2, 127: 8}.get(length, 0)
        if begin + extended > len(data):
            return Reading(messages, pings, set(), may | wrong)
        if extended:
            length = int.from_bytes(data[begin : begin + extended], "big")
            begin += extended
            if length < (126 if extended == 2 else 65_536) or length >> 63:
                wrong.add(PROTOCOL_ERROR)
        before = len(parts or b"")
        if opcode < CLOSE and before + length > message_max:
            may = may | {TOO_LARGE}
        if wrong:
            return Reading(messages, pings, wrong | may, set())
        mask, begin = data[begin : begin + 4], begin + 4
        payload = _masked(data[begin : begin + length], mask) if len(mask) == 4 else b""
        so_far = (parts or b"") + payload if opcode < CLOSE else b""
        opened = opcode if opcode in (TEXT, BINARY) else kind
        if opcode < CLOSE and opened == TEXT and not _is_text(so_far, is_whole=False):
            may = may | {NOT_UTF8}
        if begin + length > len(data):
            return Reading(messages, pings, set(), may | ({TOO_LARGE} if len(so_far) > message_max else set()))
        at = begin + length
        match opcode:
            case 9:
                pings.append(payload)
            case 10:
                pass
            case 8:
                return Reading(messages, pings, _answer_to_close(payload) | may, set())
            case _:
                kind = opened
                size = len(so_far.decode(errors="replace")) if kind == TEXT else len(so_far)
                if kind == TEXT and not _is_text(so_far, is_whole=is_last):
                    return Reading(messages, pings, {NOT_UTF8} | may, set())
                if size > message_max:
                    return Reading(messages, pings, {TOO_LARGE}, set())
                if is_last:
                    messages.append(so_far)
                    parts = None
                else:
                    parts = so_far
    return Reading(messages, pings, set(), may)


def _is_text(data: bytes, *, is_whole: bool) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError as fault:
        # What is cut within a character may still become one. A surrogate cannot, and yet is refused at its third
        # byte: Python's incremental decoder waits for that one, and the RFC does not say how soon to refuse.
        rest = data[fault.start :]
        is_surrogate = len(rest) == 2 and rest[0] == 0xED and 0xA0 <= rest[1] <= 0xBF
        return not is_whole and (is_surrogate or fault.reason == "unexpected end of data")
    return True


def _answer_to_close(payload: bytes) -> set[int]:
    if not payload:
        return {NO_CODE, 1000}
    if len(payload) == 1:
        return {PROTOCOL_ERROR}
    code = int.from_bytes(payload[:2], "big")
    if code in LATER_CODES:
        return {code, PROTOCOL_ERROR, NOT_UTF8}
    if code not in CODES and not 3000 <= code < 5000:
        return {PROTOCOL_ERROR}
    return {code} if _is_text(payload[2:], is_whole=True) else {NOT_UTF8}


class Said(NamedTuple):
    """A server's frame."""

    opcode: int
    payload: bytes


def said(data: bytes) -> tuple[list[Said], str]:
    """A server's frames, and what is wrong with them."""
    frames: list[Said] = []
    at = 0
    while at < len(data):
        if at + 2 > len(data):
            return frames, "half a frame"
        first, second = data[at], data[at + 1]
        if first & 0x70 or not first & 0x80 or second & 0x80 or first & 0x0F not in (TEXT, CLOSE, PING, PONG):
            return frames, f"a frame that no server of ours sends: {data[at : at + 40]!r}"
        length, at = second & 0x7F, at + 2
        if length > 125:
            extended = 2 if length == 126 else 8
            length, at = int.from_bytes(data[at : at + extended], "big"), at + extended
        if at + length > len(data):
            return frames, "half a frame"
        frames.append(Said(first & 0x0F, data[at : at + length]))
        at += length
    return frames, ""


def size(frames: list[Said]) -> int:
    """Bytes of a server's frames on the wire."""
    return sum(
        len(one.payload) + (2 if len(one.payload) < 126 else 4 if len(one.payload) < 65_536 else 10) for one in frames
    )
