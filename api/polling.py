"""Which sockets are ready: thousands of them, one wake-up of one Trio task for all that are.

Trio's own `wait_readable` costs a task and a turn of the scheduler for each socket. `EpollPoller` keeps an epoll set of
its own and lets Trio wait for that alone. Where there is no epoll (macOS, BSD), `TaskPoller` does the same work with a
task for each socket: slower, and correct.
"""

import select
import socket
from collections import deque
from typing import Final, Protocol

import trio

READ: Final = 1  # of interest, and of what is ready; EPOLLIN and EPOLLOUT have the same values everywhere
WRITE: Final = 4
BROKEN: Final = 0x18  # EPOLLERR, EPOLLHUP: ready whatever the interest

Ready = list[tuple[int, int]]
"""File descriptors, each with what it is ready for."""


class Poller(Protocol):
    """Told what to look for, by file descriptor; `wait` returns what is ready, level-triggered."""

    def add(self, sock: socket.socket, interest: int) -> None: ...

    def change(self, sock: socket.socket, interest: int) -> None: ...

    def remove(self, sock: socket.socket) -> None: ...

    async def wait(self, most: int) -> Ready: ...

    def more(self, most: int) -> Ready:
        """What is ready right now, without waiting; maybe nothing although something is."""
        ...

    def close(self) -> None: ...


class EpollPoller:
    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._fd = self._epoll.fileno()

    def add(self, sock: socket.socket, interest: int) -> None:
        self._epoll.register(sock.fileno(), interest)

    def change(self, sock: socket.socket, interest: int) -> None:
        self._epoll.modify(sock.fileno(), interest)

    def remove(self, sock: socket.socket) -> None:
        self._epoll.unregister(sock.fileno())

    async def wait(self, most: int) -> Ready:
        await trio.lowlevel.wait_readable(self._fd)
        return self._epoll.poll(0, most)

    def more(self, most: int) -> Ready:
        return self._epoll.poll(0, most)

    def close(self) -> None:
        trio.lowlevel.notify_closing(self._fd)
        self._epoll.close()


class TaskPoller:
    """Its tasks run in `nursery`; each waits for one socket and one direction, once, and is started again by `wait`."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._interests: dict[socket.socket, int] = {}
        self._watched: set[tuple[socket.socket, int]] = set()
        self._ready: deque[tuple[socket.socket, int]] = deque()
        self._reported: list[socket.socket] = []  # since the last `wait`: what became of them is known when it comes
        self._lot = trio.lowlevel.ParkingLot()

    def add(self, sock: socket.socket, interest: int) -> None:
        self.change(sock, interest)

    def change(self, sock: socket.socket, interest: int) -> None:
        self._interests[sock] = interest
        self._watch(sock)

    def remove(self, sock: socket.socket) -> None:
        del self._interests[sock]
        trio.lowlevel.notify_closing(sock)

    async def wait(self, most: int) -> Ready:
        for sock in self._reported:
            self._watch(sock)
        self._reported.clear()
        await trio.lowlevel.checkpoint()
        while not self._ready:
            await self._lot.park()
        ready: Ready = []
        while self._ready and len(ready) < most:
            sock, direction = self._ready.popleft()
            if self._interests.get(sock, 0) & direction:  # else it has lost interest since, or was removed
                ready.append((sock.fileno(), direction))
                self._reported.append(sock)
        return ready

    def more(self, most: int) -> Ready:
        return []  # a task must find it first

    def close(self) -> None:
        for sock in list(self._interests):
            self.remove(sock)

    def _watch(self, sock: socket.socket) -> None:
        for direction in (READ, WRITE):
            key = sock, direction
            if self._interests.get(sock, 0) & direction and key not in self._watched:
                self._watched.add(key)
                self._nursery.start_soon(self._watch_once, sock, direction)

    async def _watch_once(self, sock: socket.socket, direction: int) -> None:
        try:
            if direction == READ:
                await trio.lowlevel.wait_readable(sock)
            else:
                await trio.lowlevel.wait_writable(sock)
        except (trio.ClosedResourceError, OSError, ValueError):
            return  # it was removed, and closed
        finally:
            self._watched.discard((sock, direction))
        self._ready.append((sock, direction))
        self._lot.unpark()
