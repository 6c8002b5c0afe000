"""WebSocket as far as a viewer of the benchmark needs it: to come in, to say a text, to see where frames end."""

import base64
from typing import Final

from tests.bench.job import Server

TEXT: Final = 1
CLOSE: Final = 8
PING: Final = 9
PONG: Final = 10

Frame = tuple[int, bytes]
"""Opcode and payload."""


def handshake(server: Server, path: str) -> bytes:
    key = base64.b64encode(bytes(16)).decode()
    lines = (f"GET {path} HTTP/1.1", f"Host: {server.host}:{server.port}", "Upgrade: websocket", "Connection: Upgrade")
    return "\r\n".join((*lines, f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13", "", "")).encode()


def said(payload: bytes, opcode: int = TEXT) -> bytes:
    """A client's frame: masked, as it must be, with a mask of zeros that changes nothing."""
    size = len(payload)
    if size < 126:
        head = bytes((0x80 | opcode, 0x80 | size))
    elif size < 65_536:
        head = bytes((0x80 | opcode, 0x80 | 126)) + size.to_bytes(2, "big")
    else:
        head = bytes((0x80 | opcode, 0x80 | 127)) + size.to_bytes(8, "big")
    return head + bytes(4) + payload


def payload_at(data: bytes | bytearray, at: int, end: int) -> tuple[int, int] | None:
    """Where the payload of the frame that begins `at` begins and ends; None if its head is not whole before `end`.

    Raises:
        ValueError: it is masked, which a server's must not be: these are no frames, or we lost their boundaries.
    """
    if end - at < 2:
        return None
    size, begin = data[at + 1], at + 2
    if size >= 126:
        if size > 127:
            raise ValueError(f"a server's frame is masked: {bytes(data[at : at + 16])!r}")
        begin += 2 if size == 126 else 8
        if begin > end:
            return None
        size = int.from_bytes(data[at + 2 : begin], "big")
    return begin, begin + size


def frames_in(data: bytes) -> tuple[list[Frame], bytes]:
    """The whole frames of a server, in order, and what has come of the next."""
    found = []
    at, end = 0, len(data)
    while (payload := payload_at(data, at, end)) is not None and payload[1] <= end:
        found.append((data[at] & 0x0F, data[payload[0] : payload[1]]))
        at = payload[1]
    return found, data[at:]
