"""The two ledgers of the conformance suite, each with what the suite must be able to see and to break."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from random import Random
from typing import Any, Protocol

import trio
from psycopg.pq.abc import PGresult

from engine.ledger import Ledger
from engine.model import DropId, Event, Hold, ReservationStatus, StoredReceipt, UserId
from persistence.ledger import LedgerOptions, PostgresLedger, open_ledger
from persistence.pool import Pool
from persistence.reads import Reads
from persistence.trio_pg import ConnectionLost, TrioConnection
from tests.fakes import MemoryLedger, Trouble
from tests.persistence.scribe import at

TEST_OPTIONS = LedgerOptions(
    connect_timeout_s=5,
    commit_timeout_s=5,
    lock_timeout_s=0.05,
    commit_lock_timeout_s=5,
    allow_unsafe_durability=True,
)


class Subject(Protocol):
    @property
    def ledger(self) -> Ledger: ...

    async def events(self, drop_id: DropId) -> list[Event]: ...

    async def receipt(self, user_id: UserId, operation: str, key: str) -> StoredReceipt | None: ...

    async def name(self, user_id: UserId, username: str) -> None: ...

    async def rival_takes(self, drop_id: DropId) -> None: ...

    async def end_behind_the_engine(self, hold: Hold) -> None:
        """Somebody edits the reservation by hand, and the drop's row with it."""
        ...

    async def lose_next(self, *, after_commit: bool) -> None:
        """The connection breaks at the next commit."""
        ...


class MemorySubject:
    def __init__(self) -> None:
        self.ledger = MemoryLedger()

    async def events(self, drop_id: DropId) -> list[Event]:
        rows = self.ledger.tables.events
        return [row.event for (of, _), row in sorted(rows.items()) if of == drop_id]

    async def receipt(self, user_id: UserId, operation: str, key: str) -> StoredReceipt | None:
        found = self.ledger.tables.receipts.get((user_id, operation, key))
        return None if found is None else found[1]

    async def name(self, user_id: UserId, username: str) -> None:
        self.ledger.usernames[user_id] = username

    async def rival_takes(self, drop_id: DropId) -> None:
        self.ledger.rival_takes(drop_id)

    async def end_behind_the_engine(self, hold: Hold) -> None:
        tables = self.ledger.tables
        row = tables.reservations[hold.id]
        row.status, row.resolved_at = ReservationStatus.CANCELLED, at(1)
        del tables.active[hold.drop_id, hold.user_id]

    async def lose_next(self, *, after_commit: bool) -> None:
        self.ledger.fail_next(Trouble.LOST_AFTER_COMMIT if after_commit else Trouble.LOST_BEFORE_COMMIT)


class PostgresSubject:
    def __init__(self, ledger: PostgresLedger, pool: Pool) -> None:
        self.ledger = ledger
        self._pool = pool
        self._reads = Reads(pool, Random(0))

    async def events(self, drop_id: DropId) -> list[Event]:
        return await self._reads.history(drop_id)

    async def receipt(self, user_id: UserId, operation: str, key: str) -> StoredReceipt | None:
        return await self._reads.find_receipt(user_id, operation, key)

    async def name(self, user_id: UserId, username: str) -> None:
        await self._reads.add_user(user_id, username, at=at(0))

    async def rival_takes(self, drop_id: DropId) -> None:
        await self.sql("UPDATE drops SET epoch = epoch + 1 WHERE id = %s", drop_id)

    async def end_behind_the_engine(self, hold: Hold) -> None:
        await self.sql("UPDATE reservations SET status = 'cancelled', resolved_at = created_at WHERE id = %s", hold.id)

    async def lose_next(self, *, after_commit: bool) -> None:
        lose_answers(await self.ledger._ready_writer(), run=after_commit)

    async def sql(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        async with self._pool.acquire() as conn:
            cursor = await conn.execute(statement.encode(), values)
            return await cursor.fetchall() if cursor.description else []


def lose_answers(conn: TrioConnection, *, run: bool) -> None:
    """From now on what is asked on this connection is run, or is not, and the connection breaks before the
    answer."""
    ask: Callable[..., Any] = conn.run_prepared

    async def run_prepared(name: bytes, params: Sequence[bytes | None] = (), **options: Any) -> PGresult:
        if run:
            await ask(name, params, **options)
        await trio.lowlevel.checkpoint()
        conn.abort()
        raise ConnectionLost("cut by the test")

    conn.run_prepared = run_prepared  # type: ignore[method-assign]


@asynccontextmanager
async def postgres_subject(dsn: str) -> AsyncIterator[PostgresSubject]:
    pool = Pool(dsn, size=3, acquire_timeout_s=5, connect_timeout_s=5)
    async with open_ledger(dsn, TEST_OPTIONS) as ledger:
        try:
            yield PostgresSubject(ledger, pool)
        finally:
            await pool.aclose()
