"""A small pool of connections for reads: bounded, first come first served, nothing in the background."""

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import psycopg
import trio

from persistence.trio_pg import TrioConnection


class PoolTimeout(psycopg.OperationalError):
    """Every connection of the pool stayed lent for longer than the caller could wait. Nothing was sent."""


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    size_max: int  # connections, idle and lent together
    lent: int  # slots taken now, including those that are still connecting
    idle: int
    waiting: int
    opened_total: int
    discarded_total: int  # found dead while idle, or returned in a state nobody could use
    timeout_total: int


class Pool:
    """At most `size` connections, lent to one task at a time, first come first served.

    Connections are opened when needed. `on_connect` runs once on each new one, within the time for
    connecting; it must leave it idle. Nothing runs in the background.
    """

    def __init__(
        self,
        dsn: str,
        *,
        size: int,
        acquire_timeout_s: float,
        connect_timeout_s: float,
        on_connect: Callable[[TrioConnection], Awaitable[None]] | None = None,
        application_name: str | None = None,
        prepare_threshold: int | None = None,
    ) -> None:
        self._dsn = dsn
        self._acquire_timeout_s = acquire_timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._on_connect = on_connect
        self._application_name = application_name
        self._prepare_threshold = prepare_threshold
        self._slots = trio.CapacityLimiter(size)  # its queue is fair; a connection exists only in a slot
        self._idle: deque[TrioConnection] = deque()
        self._is_closed = False
        self._opened_total = self._discarded_total = self._timeout_total = 0

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator[TrioConnection]:
        """Borrow a connection that is idle and, as far as can be seen from here, alive.

        One that comes back closed, in a transaction or in mid-statement is closed for good.

        Raises:
            PoolTimeout: none came free within `acquire_timeout_s`.
            trio.ClosedResourceError: the pool is closed.
            psycopg.OperationalError: a new one could not be opened; see `TrioConnection.connect`.
        """
        slot = object()
        await self._take_slot(slot)
        conn: TrioConnection | None = None
        try:
            if self._is_closed:
                raise trio.ClosedResourceError("the pool is closed")
            conn = self._live_idle() or await self._open()
            yield conn
        finally:
            if conn is not None:
                self._take_back(conn)
            self._slots.release_on_behalf_of(slot)

    async def _take_slot(self, slot: object) -> None:
        with trio.move_on_after(self._acquire_timeout_s):
            await self._slots.acquire_on_behalf_of(slot)
            return
        self._timeout_total += 1
        raise PoolTimeout(f"no connection came free within {self._acquire_timeout_s} s")

    def _live_idle(self) -> TrioConnection | None:
        while self._idle:
            conn = self._idle.pop()  # the one used last: it is the least likely to have gone stale
            if not conn.has_news:
                return conn
            self._discard(conn)
        return None

    async def _open(self) -> TrioConnection:
        with trio.move_on_after(self._connect_timeout_s):
            conn = await TrioConnection.connect(
                self._dsn,
                timeout_s=self._connect_timeout_s,
                application_name=self._application_name,
                prepare_threshold=self._prepare_threshold,
            )
            try:
                if self._on_connect is not None:
                    await self._on_connect(conn)
                    assert conn.is_idle, "on_connect left something open"
            except BaseException:
                conn.abort()  # half prepared, it must never be lent
                raise
            self._opened_total += 1
            return conn
        raise psycopg.errors.ConnectionTimeout(f"no connection within {self._connect_timeout_s} s")

    def _take_back(self, conn: TrioConnection) -> None:
        if conn.is_idle and not self._is_closed:
            self._idle.append(conn)
        else:
            self._discard(conn)

    def _discard(self, conn: TrioConnection) -> None:
        conn.abort()
        self._discarded_total += 1

    def statistics(self) -> PoolStatistics:
        slots = self._slots.statistics()
        return PoolStatistics(
            size_max=int(slots.total_tokens),
            lent=slots.borrowed_tokens,
            idle=len(self._idle),
            waiting=slots.tasks_waiting,
            opened_total=self._opened_total,
            discarded_total=self._discarded_total,
            timeout_total=self._timeout_total,
        )

    async def aclose(self) -> None:
        """Close what is idle now, and what is lent as it comes back. Complete even if cancelled."""
        self._is_closed = True
        while self._idle:
            self._idle.pop().abort()
        await trio.lowlevel.checkpoint()
