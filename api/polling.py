"""Which sockets are ready: thousands of them, one wake-up of one Trio task for all that are.

Trio's own `wait_readable` costs a task and a turn of the scheduler for each socket. `EpollPoller` keeps an epoll set of
its own and lets Trio wait for that alone. Where there is no epoll (macOS, BSD), `TaskPoller` does the same work with a
task for each socket: slower, and correct.
"""

import os
import select
import socket
from collections import deque
from typing import Final, Protocol

import trio

READ: Final = 1  # of interest, and of what is ready; EPOLLIN and EPOLLOUT have the same values everywhere
WRITE: Final = 4
BROKEN: Final = 0x18  # EPOLLERR, EPOLLHUP: ready whatever the interest

OTHERS_SHARE: Final = 4  # that part of a full report at least is for those who are not preferred

Ready = list[tuple[int, int]]
"""File descriptors, each with what it is ready for."""


class Poller(Protocol):
    """Told what to look for, by file descriptor; `wait` returns what is ready, level-triggered.

    Where more is ready than is asked for, what has been ready for longest comes first.
    """

    @property
    def stood_s(self) -> float:
        """How long, in s, a socket is ready by now before it is reported; 0: until a moment ago all were."""
        ...

    def prefer(self, sock: socket.socket, interest: int, *, is_preferred: bool) -> None:
        """Report this one before others from now on, or as any other again; some of a report is always for others."""
        ...

    def add(self, sock: socket.socket, interest: int) -> None: ...

    def change(self, sock: socket.socket, interest: int) -> None: ...

    def remove(self, sock: socket.socket) -> None: ...

    async def wait(self, most: int) -> Ready: ...

    def more(self, most: int) -> Ready:
        """What is ready right now, without waiting; maybe nothing although something is."""
        ...

    def close(self) -> None: ...


class EpollPoller:
    """The sockets of one set are reported in the order in which they became ready, and go to its end.

    Two things rest on that. Whoever is preferred is in a set of their own, which is looked at first. And when a report
    is full, so that more may be ready, a mark joins the line: how long it takes to come up is how long the line is.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._fd = self._epoll.fileno()
        self._first = select.epoll()
        self._preferred: set[int] = set()
        self._mark = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._marked_at: float | None = None
        self._stood_s = 0.0
        self._ours = (self._first.fileno(), self._mark)
        self._epoll.register(self._first.fileno(), READ)
        self._epoll.register(self._mark, READ | select.EPOLLET)  # reported once for each time that it is written to

    @property
    def stood_s(self) -> float:
        if self._marked_at is None:
            return self._stood_s
        return max(self._stood_s, trio.current_time() - self._marked_at)

    def prefer(self, sock: socket.socket, interest: int, *, is_preferred: bool) -> None:
        self.remove(sock)
        if is_preferred:
            self._preferred.add(sock.fileno())
        self._set_of(sock).register(sock.fileno(), interest)

    def add(self, sock: socket.socket, interest: int) -> None:
        self._epoll.register(sock.fileno(), interest)

    def change(self, sock: socket.socket, interest: int) -> None:
        self._set_of(sock).modify(sock.fileno(), interest)

    def remove(self, sock: socket.socket) -> None:
        self._set_of(sock).unregister(sock.fileno())
        self._preferred.discard(sock.fileno())

    async def wait(self, most: int) -> Ready:
        await trio.lowlevel.wait_readable(self._fd)
        return self.more(most)

    def more(self, most: int) -> Ready:
        # Those who are preferred may be so many, and again and again, that nobody else would have a turn.
        first = self._first.poll(0, most - most // OTHERS_SHARE) if self._preferred else []
        if len(first) == most:
            return first  # of one
        ready = self._epoll.poll(0, most - len(first))
        is_full = len(first) + len(ready) == most
        ours = self._ours
        others = [one for one in ready if one[0] not in ours]
        if self._marked_at is not None and (self._mark, READ) in ready:
            self._stood_s, self._marked_at = trio.current_time() - self._marked_at, None
        if not is_full:
            self._stood_s = 0.0
        elif self._marked_at is None:
            self._marked_at = trio.current_time()
            os.eventfd_write(self._mark, 1)
        return first + others

    def close(self) -> None:
        trio.lowlevel.notify_closing(self._fd)
        self._epoll.close()
        self._first.close()
        os.close(self._mark)

    def _set_of(self, sock: socket.socket) -> select.epoll:
        return self._first if sock.fileno() in self._preferred else self._epoll


class TaskPoller:
    """Its tasks run in `nursery`; each waits for one socket and one direction, once, and is started again by `wait`."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._interests: dict[socket.socket, int] = {}
        self._watched: set[tuple[socket.socket, int]] = set()
        self._ready: deque[tuple[socket.socket, int]] = deque()
        self._reported: list[socket.socket] = []  # since the last `wait`: what became of them is known when it comes
        self._lot = trio.lowlevel.ParkingLot()

    @property
    def stood_s(self) -> float:
        return 0.0  # not measured

    def prefer(self, sock: socket.socket, interest: int, *, is_preferred: bool) -> None:
        """Nobody is."""

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
