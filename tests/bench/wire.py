"""Keep-alive connections to one server, as plain sockets in one epoll set (a selector where there is none)."""

import select
import selectors
import socket
import ssl
from collections.abc import Callable
from typing import Final, Protocol

from tests.bench.job import Server

RECEIVE_BYTES: Final = 4096  # an answer is one of these; a longer one is put together from several
PATIENCE_S: Final = 10.0  # for a connection, and after the window for answers under way


class Poller(Protocol):
    def poll(self, timeout: float, maxevents: int = ..., /) -> list[tuple[int, int]]: ...

    def register(self, fd: int, eventmask: int, /) -> None: ...

    def unregister(self, fd: int, /) -> None: ...

    def fileno(self) -> int: ...


class _Selectors:
    """The same where there is no epoll."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def poll(self, timeout: float, maxevents: int = -1, /) -> list[tuple[int, int]]:
        return [(key.fd, mask) for key, mask in self._selector.select(max(0.0, timeout))]

    def register(self, fd: int, eventmask: int, /) -> None:
        self._selector.register(fd, selectors.EVENT_READ)

    def unregister(self, fd: int, /) -> None:
        self._selector.unregister(fd)

    def fileno(self) -> int:
        return -1


def new_poller() -> Poller:
    return select.epoll() if hasattr(select, "epoll") else _Selectors()


class Connections:
    """Keep-alive connections by descriptor. `received` puts answers together; what breaks is opened again."""

    def __init__(self, server: Server, count: int) -> None:
        self._server = server
        self.poller = new_poller()
        self._context = ssl.create_default_context() if server.is_tls else None
        self._sockets: dict[int, socket.socket] = {}
        self.receive: dict[int, Callable[[int], bytes]] = {}
        self.send: dict[int, Callable[[bytes], None]] = {}
        self.whole: set[int] = set()  # lengths of answers that were whole
        self.parts: dict[int, bytes] = {}
        for _ in range(count):
            self.open()

    def open(self) -> int:
        connected = socket.create_connection((self._server.host, self._server.port), timeout=PATIENCE_S)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._context is not None:
            connected = self._context.wrap_socket(connected, server_hostname=self._server.host)
        connected.setblocking(False)
        fd = connected.fileno()
        self._sockets[fd] = connected
        self.send[fd] = connected.sendall
        self.receive[fd] = connected.recv if self._context is None else _receiver(connected)
        self.poller.register(fd, select.POLLIN)
        return fd

    def reopen(self, fd: int) -> int:
        self._drop(fd)
        return self.open()

    def received(self, fd: int, data: bytes) -> bytes | None:
        """The whole answer that ends with `data`, or None while some of it is still to come.

        Raises:
            ConnectionError: the other side hung up.
        """
        if not data:
            raise ConnectionResetError("the server closed the connection")
        data = self.parts.pop(fd, b"") + data
        head, end, body = data.partition(b"\r\n\r\n")
        lower = head.lower()
        _, stated, length = lower.partition(b"\r\ncontent-length:")
        if stated:
            is_whole = bool(end) and len(body) >= int(length.partition(b"\r\n")[0])
        elif b"\r\ntransfer-encoding: chunked" in lower:
            is_whole = body.endswith(b"\r\n0\r\n\r\n") or body == b"0\r\n\r\n"
        else:
            is_whole = bool(end)
        if not is_whole:
            self.parts[fd] = data
            return None
        if stated:
            self.whole.add(len(data))
        if b"\r\nconnection: close" in lower:
            self.whole.clear()  # each answer must be looked at, from now on
        return data

    def close(self) -> None:
        for fd in list(self._sockets):
            self._drop(fd)

    def _drop(self, fd: int) -> None:
        self.poller.unregister(fd)
        self._sockets.pop(fd).close()
        self.parts.pop(fd, None)
        del self.receive[fd], self.send[fd]

    @property
    def fds(self) -> list[int]:
        return list(self._sockets)


def _receiver(connected: socket.socket) -> Callable[[int], bytes]:
    """Reads what TLS has, over several records; raises BlockingIOError when that is nothing."""

    def receive(size: int) -> bytes:
        data = b""
        while True:
            try:
                part = connected.recv(size)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                if data:
                    return data
                raise BlockingIOError from None
            data += part
            if not part:
                return data

    return receive


def poll_exactly(poller: Poller, timeout: float, count: int) -> list[tuple[int, int]]:
    """epoll rounds its time-out up to whole ms, which would send most requests late; select does not."""
    if timeout > 0 and (fd := poller.fileno()) >= 0:
        if not select.select([fd], [], [], timeout)[0]:
            return []
        timeout = 0.0
    return poller.poll(max(0.0, timeout), count)
