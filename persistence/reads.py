"""Cold reads for the API, and the few writes that are no drop's business: users, old idempotency keys.

Over a pool, beside the engine; nothing here decides anything about stock. Every failure to reach the database
is `engine.ledger.Unavailable`; each method may be called again after it. `add_user` tells doubt from it.
"""

import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from random import Random
from typing import Any, Final

import msgspec
import psycopg
import trio

from engine.ledger import InDoubt, Unavailable
from engine.model import (
    Cancelled,
    DropCreated,
    DropId,
    DropStatus,
    DropUpdated,
    Event,
    Expired,
    Hold,
    Instant,
    Purchased,
    PurchaseId,
    ReservationId,
    ReservationStatus,
    Reserved,
    StoredAnswer,
    StoredReceipt,
    Terms,
    UserId,
)
from persistence import statements
from persistence.pool import Pool
from persistence.trio_pg import ConnectionLost, TrioConnection
from persistence.usernames import default_username, with_suffix

# Each try adds 25 bits of randomness; a tenth one is needed only where something else is wrong.
_NAME_TRIES: Final = 10
# What is asked here takes milliseconds. A connection may go silent behind a proxy that acknowledges all the same, and
# whoever asked has been answered by then.
QUERY_S: Final = 5.0
_KEYS_AT_ONCE: Final = 2_000  # some 5 ms of the one thread
# Some 20 ms of deleting: short enough that nobody waits for it, long enough to be worth a commit.
_PRUNED_AT_ONCE: Final = 5_000


class UsernameTaken(Exception):
    """Another user has this name."""


class PurchaseLine(msgspec.Struct, frozen=True):
    """One purchase as its buyer sees it."""

    id: PurchaseId
    drop_id: DropId
    drop_name: str
    reservation_id: ReservationId
    qty: int
    status: str
    created_at: Instant


class PurchasePage(msgspec.Struct, frozen=True):
    items: list[PurchaseLine]
    total: int


class ReservationLine(msgspec.Struct, frozen=True):
    """A reservation as it was at `drop_seq` of its drop."""

    id: ReservationId
    drop_id: DropId
    user_id: UserId
    qty: int
    status: ReservationStatus
    created_at: Instant
    expires_at: Instant
    drop_seq: int
    drop_epoch: int


class Reads:
    """`random` makes the suffixes of names that are taken."""

    def __init__(self, pool: Pool, random: Random) -> None:
        self._pool = pool
        self._random = random

    async def ping(self) -> None:
        """One round trip.

        Raises:
            Unavailable: it did not come back.
        """
        async with self._session() as conn:
            await conn.execute("SELECT 1")

    async def purchases_of(self, user_id: UserId, *, limit: int, offset: int) -> PurchasePage:
        """A user's purchases, newest first, and how many there are in all."""
        async with self._session() as conn:
            page = {"user_id": user_id, "limit": limit, "offset": offset}
            rows = await (await conn.execute(statements.PURCHASES_OF_USER, page)).fetchall()
            counted = await conn.execute(statements.COUNT_PURCHASES_OF_USER, {"user_id": user_id})
            total = await counted.fetchone()
        assert total is not None
        return PurchasePage([PurchaseLine(*row) for row in rows], total[0])

    async def reservation(self, reservation_id: ReservationId) -> ReservationLine | None:
        async with self._session() as conn:
            row = await (await conn.execute(statements.RESERVATION, {"id": reservation_id})).fetchone()
        if row is None:
            return None
        id_, drop_id, user_id, qty, status, *instants_and_version = row
        return ReservationLine(id_, drop_id, user_id, qty, ReservationStatus(status), *instants_and_version)

    async def has_drop(self, drop_id: DropId) -> bool:
        async with self._session() as conn:
            cursor = await conn.execute(statements.HAS_DROP, {"id": drop_id})
            return await cursor.fetchone() is not None

    async def history(self, drop_id: DropId, *, after_seq: int = 0, limit: int = 1000) -> list[Event]:
        """A drop's events with a `seq` above `after_seq`, in order, at most `limit`; each as it was
        committed."""
        wanted = {"drop_id": drop_id, "after_seq": after_seq, "limit": limit}
        async with self._session() as conn:
            rows = await (await conn.execute(statements.HISTORY, wanted)).fetchall()
        return [_event(drop_id, row) for row in rows]

    # --- users --------------------------------------------------------------------------------------------

    async def introduce(
        self, wanted: Sequence[tuple[UserId, str | None]], *, create: bool, at: Instant
    ) -> dict[UserId, str]:
        """The names of these users; with `create`, users that are new are made.

        A new user gets the wanted name, or a variation of it if it is taken; without a wish, one made of the
        id. Without `create` unknown users are missing from the result.
        """
        async with self._session() as conn:
            names = await self._names(conn, [user_id for user_id, _ in wanted])
            if not create:
                return names
            new = {id_: name or default_username(id_) for id_, name in wanted if id_ not in names}
            for _ in range(_NAME_TRIES):
                if not new:
                    return names
                names |= await self._add(conn, new, at)
                # Not added: somebody else added that user just now, or the name is taken.
                names |= await self._names(conn, [id_ for id_ in new if id_ not in names])
                new = {id_: with_suffix(name, self._random) for id_, name in new.items() if id_ not in names}
        raise Unavailable(f"no free name for {len(new)} users")

    async def add_user(self, user_id: UserId, username: str, *, at: Instant) -> None:
        """Make one user with this name and no other.

        Raises:
            UsernameTaken: another user has it.
            InDoubt: the statement was sent, and nothing came back: the user may have been made.
        """
        try:
            async with self._session() as conn:
                if await self._add(conn, {user_id: username}, at):
                    return
                if (await self._names(conn, [user_id])).get(user_id) != username:
                    raise UsernameTaken(username)
        except Unavailable as fault:
            lost = fault.__cause__  # none: it took too long
            if lost is None or (isinstance(lost, ConnectionLost) and lost.was_sent):
                raise InDoubt(str(fault)) from fault
            raise

    async def _names(self, conn: TrioConnection, ids: Sequence[UserId]) -> dict[UserId, str]:
        if not ids:
            return {}
        cursor = await conn.execute(statements.USERS, {"ids": list(ids)})
        return dict(await cursor.fetchall())

    async def _add(self, conn: TrioConnection, new: Mapping[UserId, str], at: Instant) -> dict[UserId, str]:
        rows = {"ids": list(new), "usernames": list(new.values()), "at": statements.as_datetime(at)}
        try:
            return dict(await (await conn.execute(statements.ADD_USERS, rows)).fetchall())
        except psycopg.errors.DeadlockDetected:
            # Two callers wanted the same names in another order. The other one goes on; we look again.
            return {}

    # --- idempotency keys ---------------------------------------------------------------------------------

    async def find_receipt(self, user_id: UserId, operation: str, key: str) -> StoredReceipt | None:
        wanted = {"user_id": user_id, "operation": operation, "key": key}
        async with self._session() as conn:
            row = await (await conn.execute(statements.RECEIPT, wanted)).fetchone()
        if row is None:
            return None
        fingerprint, status_code, body, created_at = row
        return StoredReceipt(user_id, operation, key, fingerprint, StoredAnswer(status_code, body), created_at)

    async def tell_keys(self, learn: Callable[[Sequence[tuple[UserId, str, str]]], None]) -> None:
        """Hand (user, operation, key) of every receipt to `learn`, some at a time: there may be tens of millions."""
        async with self._session(math.inf) as conn, conn.transaction(), conn.cursor(name="keys") as cursor:
            await cursor.execute(statements.KEYS)
            while rows := await cursor.fetchmany(_KEYS_AT_ONCE):
                learn(rows)

    async def prune(self, before: Instant, *, at_once: int = _PRUNED_AT_ONCE) -> int:
        """Forget all receipts from before `before`, `at_once` a transaction; return how many there were."""
        chunk = {"before": statements.as_datetime(before), "limit": at_once}
        total = 0
        while True:
            async with self._session(math.inf) as conn:
                pruned = (await conn.execute(statements.PRUNE, chunk)).rowcount
            total += pruned
            if pruned < at_once:
                return total

    @asynccontextmanager
    async def _session(self, timeout_s: float = QUERY_S) -> AsyncIterator[TrioConnection]:
        """A connection, for so long; whatever fails on it is `Unavailable`."""
        try:
            async with self._pool.acquire() as conn:
                with trio.move_on_after(timeout_s) as patience:
                    yield conn
                if patience.cancelled_caught:
                    raise Unavailable(f"no answer within {timeout_s} s")
        except (psycopg.OperationalError, psycopg.InternalError) as error:
            # Internal to the server are, among others, that it has become read-only and that a page is damaged.
            raise Unavailable(str(error)) from error


def _event(drop_id: DropId, row: tuple[Any, ...]) -> Event:
    seq, kind, at, reservation_id, user_id, qty, created_at, expires_at = row[:8]
    purchase_id, username, available_stock, status, data = row[8:]
    if kind == "DROP_CREATED":
        return DropCreated(seq, at, Terms(id=drop_id, **data), DropStatus(status))
    if kind == "DROP_UPDATED":
        return DropUpdated(seq, at, DropStatus(status))
    hold = Hold(reservation_id, drop_id, user_id, qty, created_at, expires_at)
    match kind:
        case "RESERVED":
            return Reserved(seq, at, hold, available_stock)
        case "PURCHASED":
            name = username or default_username(user_id)
            return Purchased(seq, at, hold, purchase_id, name, available_stock)
        case "CANCELLED":
            return Cancelled(seq, at, hold, available_stock)
        case _:
            assert kind == "EXPIRED", kind
            return Expired(seq, at, hold, available_stock)
