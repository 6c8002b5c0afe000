"""Taking drops over: raise their epochs, and load all that a decision needs, in five set queries.

Runs in one transaction, behind the row locks that raising the epochs took: nobody else writes these drops
meanwhile, so what is loaded fits together.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, LiteralString

import msgspec

from engine.model import (
    DropId,
    DropRecord,
    DropStatus,
    Hold,
    LatestPurchase,
    ReservationStatus,
    Terms,
)
from persistence import statements
from persistence.trio_pg import TrioConnection
from persistence.usernames import default_username

# Rows fetched at once from a cursor: enough that the round trips vanish, little enough that no other task of
# the loop waits for more than some 20 ms while they are turned into records.
_ROWS_AT_ONCE: Final = 10_000

Row = tuple[Any, ...]


async def take_over(
    conn: TrioConnection, drop_ids: Sequence[DropId] | None, heard: Callable[[], None]
) -> list[DropRecord]:
    """See `engine.ledger.Ledger.take_over`. To be called in a transaction; what it did counts once that
    commits. `heard` is called once the drops are locked, and whenever rows have come.

    Raises:
        psycopg.errors.LockNotAvailable: a drop is locked for longer than the session's lock_timeout.
        psycopg.Error: any other failure.
    """
    if drop_ids is None:
        return await _load(conn, statements.TAKE_OVER_ALL, {}, heard)
    return await _load(conn, statements.TAKE_OVER, {"drop_ids": list(drop_ids)}, heard)


async def reclaim(
    conn: TrioConnection, drop_id: DropId, epoch: int, epoch_max: int, heard: Callable[[], None]
) -> list[DropRecord]:
    """The drop, taken over if its epoch is one of `epoch … epoch_max`; otherwise as `take_over`."""
    wanted = {"drop_id": drop_id, "epoch_min": epoch, "epoch_max": epoch_max}
    return await _load(conn, statements.RECLAIM, wanted, heard)


async def _load(
    conn: TrioConnection, raising: LiteralString, wanted: dict[str, Any], heard: Callable[[], None]
) -> list[DropRecord]:
    cursor = await conn.execute(raising, wanted)
    records = {record.terms.id: record for record in map(_record, await cursor.fetchall())}
    heard()
    await _load_holds(conn, records, heard)
    await _load_newest_ended(conn, records, heard)
    await _load_latest_purchases(conn, records, heard)
    return list(records.values())


def _record(row: Row) -> DropRecord:
    id_, name, price, currency, total_stock, starts_at, ends_at, created_by, created_at = row[:9]
    status, available_stock, held_count, sold_count, epoch, seq, updated_at = row[9:]
    return DropRecord(
        terms=Terms(
            id=id_,
            name=name,
            price=price,
            currency=currency,
            total_stock=total_stock,
            starts_at=starts_at,
            ends_at=ends_at,
            created_by=created_by,
            created_at=created_at,
        ),
        status=DropStatus(status),
        available_stock=available_stock,
        held_count=held_count,
        sold_count=sold_count,
        epoch=epoch,
        seq=seq,
        holds=[],
        newest_ended={},
        latest_purchases=(),
        updated_at=updated_at,
    )


async def _load_holds(conn: TrioConnection, records: dict[DropId, DropRecord], heard: Callable[[], None]) -> None:
    def take(rows: list[Row]) -> None:
        for drop_id, id_, user_id, qty, created_at, expires_at in rows:
            record = records[drop_id]
            # The record's own id object: a million holds of one drop share it.
            record.holds.append(Hold(id_, record.terms.id, user_id, qty, created_at, expires_at))

    await _read(conn, statements.HOLDS, [id_ for id_, record in records.items() if record.held_count], take, heard)


async def _load_newest_ended(
    conn: TrioConnection, records: dict[DropId, DropRecord], heard: Callable[[], None]
) -> None:
    statuses = {status.value: status for status in ReservationStatus}

    def take(rows: list[Row]) -> None:
        for drop_id, user_id, status in rows:
            records[drop_id].newest_ended[user_id] = statuses[status]

    await _read(conn, statements.NEWEST_ENDED, list(records), take, heard)
    for record in records.values():
        for hold in record.holds:
            record.newest_ended.pop(hold.user_id, None)


async def _load_latest_purchases(
    conn: TrioConnection, records: dict[DropId, DropRecord], heard: Callable[[], None]
) -> None:
    latest: dict[DropId, list[LatestPurchase]] = {id_: [] for id_, record in records.items() if record.sold_count}

    def take(rows: list[Row]) -> None:
        for drop_id, user_id, username, qty, created_at in rows:
            purchase = LatestPurchase(user_id, username or default_username(user_id), qty, created_at)
            latest[drop_id].append(purchase)

    await _read(conn, statements.LATEST_PURCHASES, list(latest), take, heard)
    for id_, purchases in latest.items():
        records[id_] = msgspec.structs.replace(records[id_], latest_purchases=tuple(purchases))


async def _read(
    conn: TrioConnection,
    statement: LiteralString,
    drop_ids: list[DropId],
    take: Callable[[list[Row]], None],
    heard: Callable[[], None],
) -> None:
    if not drop_ids:
        return
    async with conn.cursor(name="load") as cursor:
        await cursor.execute(statement, {"drop_ids": drop_ids})
        while rows := await cursor.fetchmany(_ROWS_AT_ONCE):
            take(rows)
            heard()
