"""Connections of viewers: what the hub tells leaves by raw sends, and nobody waits for anybody.

A viewer's socket has one buffer, for what the kernel did not take. The hub's frames, our replies and what a WebSocket
library writes (handshake, pong, close) all go through it, so they can't interleave; while something is left in it, the
hub's are not taken, and the hub remembers where the viewer stands instead. The kernel's own buffer is bounded too: left
alone it grows to megabytes for each viewer that does not read.
"""

import socket
from collections.abc import Callable
from typing import Any, Final

import trio

KERNEL_BYTES: Final = 32_768  # of a socket's send buffer; Linux takes twice that
LEFT_MAX: Final = 131_072  # bytes of ours that may wait for a viewer to read; beyond, it is cut off
RECEIVE_BYTES: Final = 4_096

TEXT: Final = 1
BINARY: Final = 2


def frame(payload: bytes, opcode: int = TEXT) -> bytes:
    """A whole WebSocket message from a server (RFC 6455, 5.2)."""
    size = len(payload)
    if size < 126:
        return bytes((0x80 | opcode, size)) + payload
    if size < 65_536:
        return bytes((0x80 | opcode, 126)) + size.to_bytes(2, "big") + payload
    return bytes((0x80 | opcode, 127)) + size.to_bytes(8, "big") + payload


class ViewerStream(trio.abc.HalfCloseableStream):
    """A viewer's connection. As a Trio stream it is what a WebSocket library reads from and writes to."""

    def __init__(self, nursery: trio.Nursery, received: bytes) -> None:
        """`received` has been read from it already; `nursery` is that of its writer."""
        self.is_closed = False
        self.drained: Callable[[], None] | None = None  # told when nothing is left of what was to be sent
        self._heard_at = trio.current_time()
        self._is_asked = False
        self._received = received
        self._left = bytearray()
        self._is_draining = False
        self._nursery = nursery
        self._empty = trio.lowlevel.ParkingLot()

    # For the hub, and for replies --------------------------------------------------------------------

    def send(self, data: bytes) -> bool:
        """Send, or keep the rest; False: something is left to send from before, and nothing of this was taken."""
        if self._left or self.is_closed:
            return False
        sent = self._send(data)
        if sent != len(data) and not self.is_closed:
            self._keep(data[sent:])
        return True

    def write(self, data: bytes) -> None:
        """Send in any case, behind what is left. A viewer for whom too much is left is cut off."""
        if self.is_closed:
            return
        sent = 0 if self._left else self._send(data)
        if sent != len(data) and not self.is_closed:
            self._keep(data[sent:])

    def _keep(self, rest: bytes) -> None:
        if len(self._left) + len(rest) > LEFT_MAX:
            self.cut()
            return
        self._left += rest
        if not self._is_draining:
            self._is_draining = True
            self._nursery.start_soon(self._drain)

    async def _drain(self) -> None:
        try:
            while self._left and not self.is_closed:
                await self._wait_writable()
                sent = await self._send_some(self._left)
                del self._left[:sent]
        except (OSError, trio.ClosedResourceError, trio.BrokenResourceError):
            self.cut()
        finally:
            self._is_draining = False
            self._empty.unpark_all()
        if self.drained is not None and not self.is_closed:
            self.drained()

    # For a WebSocket library -------------------------------------------------------------------------

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        self.write(bytes(data))
        while self._left and not self.is_closed:
            await self._empty.park()
        if self.is_closed:
            raise trio.BrokenResourceError("the viewer is gone")

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        received, self._received = self._received, b""
        if received:
            await trio.lowlevel.checkpoint()
            return received
        if self.is_closed:
            await trio.lowlevel.checkpoint()
            raise trio.ClosedResourceError
        data = await self._receive(max_bytes or RECEIVE_BYTES)
        self._heard_at = trio.current_time()
        self._is_asked = False
        return data

    def end_if_silent(self, now: float, ask_s: float, end_s: float, question: bytes) -> None:
        """Ask a peer that has been silent for `ask_s` whether it is there; cut it off after `end_s`."""
        silent_s = now - self._heard_at
        if silent_s > end_s:
            self.cut()
        elif silent_s > ask_s and not self._is_asked:
            self._is_asked = True
            self.write(question)

    async def aclose(self) -> None:
        self.cut()
        await trio.lowlevel.checkpoint()

    def cut(self) -> None:
        """Close at once; whoever waits on it finds it closed."""
        if not self.is_closed:
            self.is_closed = True
            self._left.clear()
            self._empty.unpark_all()
            self._close()

    # Of each transport -------------------------------------------------------------------------------

    def _send(self, data: bytes) -> int:
        """Bytes that left at once; maybe none."""
        raise NotImplementedError

    async def _wait_writable(self) -> None:
        raise NotImplementedError

    async def _send_some(self, data: bytearray) -> int:
        raise NotImplementedError

    async def _receive(self, most: int) -> bytes:
        raise NotImplementedError

    def _close(self) -> None:
        raise NotImplementedError


class PlainViewer(ViewerStream):
    """On a socket, which it owns."""

    def __init__(self, nursery: trio.Nursery, sock: socket.socket, received: bytes) -> None:
        super().__init__(nursery, received)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, KERNEL_BYTES)
        self._sock = sock

    def _send(self, data: bytes) -> int:
        try:
            return self._sock.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            self.cut()
            return 0

    async def _wait_writable(self) -> None:
        await trio.lowlevel.wait_writable(self._sock)

    async def _send_some(self, data: bytearray) -> int:
        try:
            return self._sock.send(data)
        except BlockingIOError:
            return 0

    async def _receive(self, most: int) -> bytes:
        while True:
            await trio.lowlevel.wait_readable(self._sock)
            try:
                return self._sock.recv(most)
            except BlockingIOError:
                continue
            except OSError as fault:
                raise trio.BrokenResourceError from fault

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError as fault:
            raise trio.BrokenResourceError from fault

    def _close(self) -> None:
        trio.lowlevel.notify_closing(self._sock)
        self._sock.close()


class StreamViewer(ViewerStream):
    """On any Trio stream, such as one with TLS: nothing leaves at once there, so everything goes through the buffer."""

    def __init__(self, nursery: trio.Nursery, stream: Any, transport: trio.SocketStream, received: bytes) -> None:
        super().__init__(nursery, received)
        self._stream = stream
        self._transport = transport

    def _send(self, data: bytes) -> int:
        return 0

    async def _wait_writable(self) -> None:
        await trio.lowlevel.checkpoint()

    async def _send_some(self, data: bytearray) -> int:
        await self._stream.send_all(bytes(data))
        return len(data)

    async def _receive(self, most: int) -> bytes:
        return bytes(await self._stream.receive_some(most))

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()

    def _close(self) -> None:
        self._transport.socket.close()
