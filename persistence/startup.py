"""What must be true before an engine serves from a database: it keeps what it acknowledges, its schema is
ours, its clock agrees with ours, and no other engine was started on it by mistake.

The last is a courtesy: a session advisory lock, held from start to stop. When its connection is lost the
engine goes on, and another might start meanwhile. The guarantee is the epoch in the guarded write, always.
"""

from collections.abc import Callable
from typing import Final

import psycopg
import structlog
import trio

from persistence import schema
from persistence.trio_pg import BOUNDED_TCP, TrioConnection

log = structlog.get_logger(__name__)

# "holdfast" in ASCII; any number does that nobody else in the database uses.
_ENGINE_LOCK: Final = int.from_bytes(b"holdfast")
# After a crash the server needs a moment to notice that the old session is gone, and with it the lock.
_PREDECESSOR_GONE_S: Final = 2.0
_RETRY_S: Final = 0.1
# A server whose peer vanished without a word (power, partition) would keep its session, and the lock, for two hours:
# `BOUNDED_TCP` is our end's alone. So its end asks as ours does. Without effect on a Unix socket.
_NOTICE_THAT_WE_ARE_GONE: Final = "SELECT " + ", ".join(
    f"set_config('tcp_{name}', '{BOUNDED_TCP[name]}', false)"
    for name in ("keepalives_idle", "keepalives_interval", "keepalives_count")
)
# Deadlines are shown to clients as the engine's own instants; two seconds are what NTP never lets drift.
CLOCK_SKEW_MAX_S: Final = 2.0
_SERVER_VERSION_MIN: Final = 150_000


class StartRefused(Exception):
    """This database is not fit to serve from. The message says why, and what to do."""


class UnsafeDurability(StartRefused):
    """The server may forget what it acknowledged."""


class ClockSkew(StartRefused):
    """The server's clock and ours disagree."""


class UnsupportedServer(StartRefused):
    """The server is too old, or not reached directly."""


class AnotherEngine(StartRefused):
    """Another engine serves from this database."""


async def check_server(
    conn: TrioConnection, *, allow_unsafe_durability: bool, clock_skew_max_s: float, wall: Callable[[], float]
) -> None:
    """All checks of the server itself; `wall` is our clock, in seconds since the epoch.

    Raises:
        StartRefused, SchemaOutdated: it must not be served from.
        psycopg.Error: it could not be asked.
    """
    await check_settings(conn, allow_unsafe_durability=allow_unsafe_durability)
    schema.require(await _revision(conn))
    await _check_clock(conn, clock_skew_max_s, wall)


async def check_settings(conn: TrioConnection, *, allow_unsafe_durability: bool) -> None:
    """The checks that a new connection repeats: after a failover it may be another server.

    Raises:
        UnsafeDurability, UnsupportedServer: as they say.
    """
    if conn.info.server_version < _SERVER_VERSION_MIN:
        raise UnsupportedServer("PostgreSQL 15 or newer is needed")
    backend_pid, *row = await _row(
        conn,
        "SELECT pg_backend_pid(),"
        " current_setting('fsync'), current_setting('full_page_writes'), current_setting('synchronous_commit')",
    )
    if backend_pid != conn.info.backend_pid:
        # It would lend each transaction another session: the lock, the settings and the backend in doubt would be
        # those of whoever comes next.
        raise UnsupportedServer("a connection pooler stands before PostgreSQL: name the server itself in DATABASE_URL")
    names = ("fsync", "full_page_writes", "synchronous_commit")
    # Of synchronous_commit only "off" acknowledges before the local flush.
    off = [name for name, value in zip(names, row, strict=True) if value == "off"]
    if off and not allow_unsafe_durability:
        raise UnsafeDurability(
            f"the server runs with {' and '.join(off)} off: acknowledged reservations could be lost."
            " Turn it on, or allow unsafe durability for a database whose content does not matter"
        )


async def _revision(conn: TrioConnection) -> str | None:
    if (await _row(conn, "SELECT to_regclass('alembic_version')"))[0] is None:
        return None
    cursor = await conn.execute("SELECT version_num FROM alembic_version")
    row = await cursor.fetchone()
    return None if row is None else str(row[0])


async def _check_clock(conn: TrioConnection, skew_max_s: float, wall: Callable[[], float]) -> None:
    before = wall()
    (server,) = await _row(conn, "SELECT date_part('epoch', clock_timestamp())")
    after = wall()
    # The server read its clock at some time between: only what lies outside is skew for certain.
    skew = max(before - float(str(server)), float(str(server)) - after)
    if skew > skew_max_s:
        raise ClockSkew(f"the server's clock and ours are {skew:.1f} s apart: synchronize them")


async def _row(conn: TrioConnection, sql: str) -> tuple[object, ...]:
    row = await (await conn.execute(sql.encode())).fetchone()
    assert row is not None
    return row


class EngineLock:
    """The advisory lock of the one engine, on a connection of its own."""

    def __init__(self, dsn: str, *, connect_timeout_s: float) -> None:
        self._dsn = dsn
        self._connect_timeout_s = connect_timeout_s
        self._conn: TrioConnection | None = None

    @property
    def is_held(self) -> bool:
        return self._conn is not None and not self._conn.closed

    async def acquire(self) -> None:
        """Take the lock, or say who has it.

        Raises:
            AnotherEngine: it is taken, and stays so for the time that a crashed session may need to go away.
            psycopg.OperationalError: the server is out of reach.
        """
        conn = await self._connect()
        is_taken = False
        try:
            with trio.move_on_after(_PREDECESSOR_GONE_S):
                while not await self._try(conn):
                    is_taken = True
                    await trio.sleep(_RETRY_S)
                self._conn = conn
                return
            if not is_taken:
                raise psycopg.errors.ConnectionTimeout(f"no word about the lock within {_PREDECESSOR_GONE_S} s")
            holder = await self._holder(conn)
        finally:
            if self._conn is not conn:
                conn.abort()
        raise AnotherEngine(
            f"another engine serves from this database ({holder}): stop it first, or use another database"
        )

    async def keep(self) -> None:
        """Notice when the lock's connection breaks and take the lock again, for ever; losing it stops
        nothing."""
        while True:
            if self._conn is not None:
                await self._broken(self._conn)
                self._conn.abort()
                self._conn = None
                log.warning("engine_lock_lost")
            await trio.sleep(_RETRY_S)
            await self._take_again()

    async def _take_again(self) -> None:
        try:
            conn = await self._connect()
        except psycopg.Error:
            return
        try:
            if await self._try(conn):
                self._conn = conn
                log.info("engine_lock_regained")
                return
            log.error("engine_lock_taken", holder=await self._holder(conn))
            await trio.sleep(_PREDECESSOR_GONE_S)
        except psycopg.Error:
            return
        finally:
            if self._conn is not conn:
                conn.abort()

    def release(self) -> None:
        if self._conn is not None:
            self._conn.abort()
            self._conn = None

    async def _connect(self) -> TrioConnection:
        conn = await TrioConnection.connect(
            self._dsn, timeout_s=self._connect_timeout_s, application_name="holdfast engine lock"
        )
        try:
            with trio.fail_after(self._connect_timeout_s):
                await _row(conn, _NOTICE_THAT_WE_ARE_GONE)
        except BaseException as error:
            conn.abort()
            if isinstance(error, trio.TooSlowError):
                raise psycopg.errors.ConnectionTimeout("no answer from the server") from error
            raise
        return conn

    async def _try(self, conn: TrioConnection) -> bool:
        return bool((await _row(conn, f"SELECT pg_try_advisory_lock({_ENGINE_LOCK})"))[0])

    async def _holder(self, conn: TrioConnection) -> str:
        # A bigint key is shown as its two halves.
        cursor = await conn.execute(
            "SELECT 'pid ' || a.pid || coalesce(' from ' || host(a.client_addr), '')"
            " FROM pg_locks l JOIN pg_stat_activity a USING (pid)"
            " WHERE l.locktype = 'advisory' AND l.granted AND l.classid = %s AND l.objid = %s"
            "   AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())",
            (_ENGINE_LOCK >> 32, _ENGINE_LOCK & 0xFFFFFFFF),
        )
        row = await cursor.fetchone()
        return "just gone" if row is None else str(row[0])

    async def _broken(self, conn: TrioConnection) -> None:
        """Return once the connection is gone."""
        try:
            while True:
                # The server speaks unasked when it is going away, and for small talk such as a new setting.
                await trio.lowlevel.wait_readable(conn.pgconn.socket)
                await conn.execute("SELECT 1")
        except (psycopg.Error, OSError, trio.ClosedResourceError):
            return
