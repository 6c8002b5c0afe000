"""A rival for viewers: Python `websockets`, `broadcast()` on asyncio. As lean as it can be: no compression, no pings.

    python -m tests.bench.broadcast <port for viewers> <port for the trigger> [bare]

With `bare` it is no rival but the limit of any server in Python: one frame, and `send` on each socket in a loop.
`POST /send?bytes=N` sends a JSON text of N bytes to all, and is answered 201.
"""

import asyncio
import json
import os
import socket
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from websockets.asyncio.server import ServerConnection, broadcast, serve

from api.viewers import frame
from tests.bench.generator import raise_descriptor_limit

ANSWER: Final = b"HTTP/1.1 201 Created\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


def text(number: int, size: int) -> str:
    """What Holdfast tells of one reserve, as large."""
    at = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    data = {"dropId": "0190a5a0-0000-7000-8000-000000000001", "availableStock": 100_000_000 - number}
    event = {"type": "event", "event": "STOCK_UPDATED", "seq": number, "at": at, "data": data}
    shortest = json.dumps(event, separators=(",", ":"))
    return shortest + " " * (size - len(shortest))


Tell = Callable[[str], None]


class Trigger(asyncio.Protocol):
    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._number = 0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """One request: they are short, and come one at a time."""
        self._number += 1
        size = int(data.partition(b"bytes=")[2].partition(b" ")[0])
        self._tell(text(self._number, size))
        assert self._transport is not None
        self._transport.write(ANSWER)


class Bare:
    """All viewers' sockets, once more, for sends behind the library's back. What would block is an error."""

    def __init__(self) -> None:
        self._sends: dict[int, Callable[[bytes], int]] = {}

    async def watch(self, connection: ServerConnection) -> None:
        with socket.socket(fileno=os.dup(connection.transport.get_extra_info("socket").fileno())) as again:
            self._sends[again.fileno()] = again.send
            await connection.wait_closed()
            del self._sends[again.fileno()]

    def tell(self, message: str) -> None:
        data = frame(message.encode())
        for send in self._sends.values():
            send(data)


async def watch(connection: ServerConnection) -> None:
    await connection.wait_closed()


async def main(port: int, trigger_port: int, *, is_bare: bool) -> None:
    loop = asyncio.get_running_loop()
    bare = Bare()
    handler = bare.watch if is_bare else watch
    async with serve(handler, "127.0.0.1", port, compression=None, ping_interval=None, backlog=4096) as server:
        tell: Tell = bare.tell if is_bare else lambda message: broadcast(server.connections, message)
        await loop.create_server(lambda: Trigger(tell), "127.0.0.1", trigger_port)
        await server.serve_forever()


if __name__ == "__main__":
    raise_descriptor_limit()
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), is_bare=sys.argv[3:] == ["bare"]))
