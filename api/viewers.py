"""Connections of viewers: what the hub tells leaves by raw sends, and nobody waits for anybody.

A viewer's socket has one buffer, for what the kernel did not take. The hub's frames, our replies and what a WebSocket
library writes (handshake, pong, close) all go through it, so they can't interleave; while something is left in it, the
hub's are not taken, and the hub remembers where the viewer stands instead. The kernel's own buffer is bounded too: left
alone it grows to megabytes for each viewer that does not read.
"""

import socket
from abc import abstractmethod
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import trio

KERNEL_BYTES: Final = 32_768  # of a socket's send buffer; Linux takes twice that
LEFT_MAX: Final = 131_072  # bytes of ours that may wait for a viewer to read; beyond, it is cut off
RECEIVE_BYTES: Final = 4_096
LINGER_S: Final = 2.0  # for the last that we sent to leave, and then for the peer to close
UNACKED_MS: Final = 60_000  # that the kernel goes on with a peer of which it hears nothing
CLOSE_FRAME: Final = 0x88  # the first byte of a WebSocket's last frame

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
        self.hindered: Callable[[], None] | None = None  # told when something is, or the last has been said
        self._heard_at = trio.current_time()
        self._is_asked = False
        self._received = received
        self._left = bytearray()
        self._is_draining = False
        self._is_over = False  # the last has been said
        self._is_ended = False  # by the WebSocket library, which reads no more
        self._nursery = nursery
        self._empty = trio.lowlevel.ParkingLot()

    # For the hub, and for replies --------------------------------------------------------------------

    @property
    def has_room(self) -> bool:
        return not self._left and not self._is_over and not self.is_closed

    def send(self, data: bytes) -> bool:
        """Send, or keep the rest; False: something is left to send from before, and nothing of this was taken."""
        if not self.has_room:
            return False
        sent = self._send(data)
        if sent != len(data) and not self.is_closed:
            self.keep(data[sent:])  # one send of the hub's, and it bounds them
        return True

    @property
    def direct(self) -> Callable[[bytes], int] | None:
        """The socket's own `send`, as long as `hindered` has not been told; None: nothing can leave past us."""
        return None

    def write(self, data: bytes) -> None:
        """Send in any case, behind what is left. A viewer for whom too much is left is cut off."""
        if self._is_over or self.is_closed:
            return
        sent = 0 if self._left else self._send(data)
        if len(self._left) + len(data) - sent > LEFT_MAX:
            self.cut()
        elif sent != len(data) and not self.is_closed:
            self.keep(data[sent:])

    def keep(self, rest: bytes) -> None:
        """Send it as soon as the kernel takes it."""
        self._left += rest
        self._hinder()
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
        if data[:1] == bytes((CLOSE_FRAME,)):
            self._end()
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
        if self._is_ended or self.is_closed:
            await trio.lowlevel.checkpoint()
            raise trio.ClosedResourceError
        data = await self._receive(max_bytes or RECEIVE_BYTES)
        self._heard_at = trio.current_time()
        self._is_asked = False
        return data

    def unread(self, received: bytes) -> None:
        """Read it again."""
        self._received = received + self._received

    def end_if_silent(self, now: float, ask_s: float, end_s: float, question: bytes) -> None:
        """Ask a peer that has been silent for `ask_s` whether it is there; cut it off after `end_s`."""
        silent_s = now - self._heard_at
        if silent_s > end_s:
            self.cut()
        elif silent_s > ask_s and not self._is_asked:
            self._is_asked = True
            self.write(question)

    async def aclose(self) -> None:
        """The library is done with it; `finish` closes it."""
        self._is_ended = True
        self._end()
        await trio.lowlevel.checkpoint()

    # The end -----------------------------------------------------------------------------------------

    def _end(self) -> None:
        self._is_over = True
        self._hinder()

    def _hinder(self) -> None:
        if self.hindered is not None:
            self.hindered()

    async def flush(self) -> None:
        """Wait until what was sent has left, not for long; nothing may follow it."""
        self._end()
        with trio.move_on_after(LINGER_S):
            while self._left and not self.is_closed:
                await self._empty.park()

    async def finish(self) -> None:
        """Close it so that what has left arrives: closing at once would destroy it, with something of theirs unread.

        Nobody else may be using it.
        """
        gone = (OSError, trio.ClosedResourceError, trio.BrokenResourceError)
        try:
            if not self._left and not self.is_closed:
                with trio.move_on_after(LINGER_S), suppress(*gone):
                    await self.send_eof()
                    while await self._receive(RECEIVE_BYTES):
                        pass
        finally:
            self.cut()

    def cut(self) -> None:
        """Close at once; whoever waits on it finds it closed."""
        if not self.is_closed:
            self.is_closed = True
            self._hinder()
            self._left.clear()
            self._empty.unpark_all()
            self._close()

    # Of each transport -------------------------------------------------------------------------------

    @abstractmethod
    def _send(self, data: bytes) -> int:
        """Bytes that left at once; maybe none."""
        ...

    @abstractmethod
    async def _wait_writable(self) -> None: ...

    @abstractmethod
    async def _send_some(self, data: bytearray) -> int: ...

    @abstractmethod
    async def _receive(self, most: int) -> bytes: ...

    @abstractmethod
    def _close(self) -> None: ...


class PlainViewer(ViewerStream):
    """On a socket, which it owns."""

    def __init__(self, nursery: trio.Nursery, sock: socket.socket, received: bytes) -> None:
        super().__init__(nursery, received)
        _bound(sock.setsockopt)
        self._sock = sock

    @property
    def direct(self) -> Callable[[bytes], int] | None:
        return self._sock.send if self.has_room else None

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
        _bound(transport.setsockopt)
        self._stream = stream
        self._transport = transport

    def _send(self, data: bytes) -> int:
        return 0

    async def _wait_writable(self) -> None:
        await trio.lowlevel.checkpoint()

    async def _send_some(self, data: bytearray) -> int:
        sent = bytes(data)  # to which more may be added meanwhile
        try:
            await self._stream.send_all(sent)
        except trio.Cancelled:
            self.cut()  # a record may have left in part
            raise
        return len(sent)

    async def _receive(self, most: int) -> bytes:
        if self._is_ended:
            return await self._transport.receive_some(most)  # and forgotten
        return bytes(await self._stream.receive_some(most))

    async def send_eof(self) -> None:
        self._is_ended = True
        await self._transport.send_eof()

    def _close(self) -> None:
        self._transport.socket.close()


def _bound(set_option: Callable[[int, int, int], None]) -> None:
    """Bound what the kernel keeps for a viewer, and for how long."""
    set_option(socket.SOL_SOCKET, socket.SO_SNDBUF, KERNEL_BYTES)
    bound_unacked(set_option)


def bound_unacked(set_option: Callable[[int, int, int], None]) -> None:
    """Bound for how long the kernel goes on with a peer that is gone, or takes nothing."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # of Linux
        set_option(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKED_MS)
