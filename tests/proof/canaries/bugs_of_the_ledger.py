"""Bugs planted in the way to PostgreSQL, and in what is asked of it."""

from typing import Any, Final

import msgspec

from engine.committer import Committer
from engine.ledger import Batch, Change, Resolution
from engine.model import DropId
from persistence import batch_sql, ledger, resolution, startup
from persistence.ledger import PostgresLedger
from tests.proof.canaries.surgery import edit, reword, sing, wrap

CHANGES: Final = (b"commit", b"reserve")  # of drops that exist


def no_epoch_in_the_guard() -> None:
    """Whoever knows a drop's `seq` may write it."""
    for key in CHANGES:
        reword(batch_sql.STATEMENTS, key, ("drops.epoch = part.epoch AND ", "", 2))
    _sing_with_each_commit()


def naive_key_look() -> None:
    """What became of a batch is looked up at once, without waiting for the row locks that it may hold."""

    def around(found: Any) -> Any:
        async def resolve(conn: Any, batch: Batch, raises: resolution.OwnRaises) -> dict[DropId, Resolution]:
            written = await resolution._written(conn, batch)
            if batch:
                sing()
            return {change.drop_id: Resolution(change.drop_id in written, change.epoch) for change in batch}

        return resolve

    wrap(resolution, "resolve", around)
    edit(PostgresLedger, "resolve", ("await self._end_suspects(conn)", "pass"))


def ignored_row_count() -> None:
    """Every drop of a batch counts as written, whatever the statement says."""
    edit(
        ledger,
        "_hit",
        ("if not result.ntuples:\n        return frozenset()", "if not result.ntuples:\n        canary_sings()"),
        (
            "return frozenset([batch[int(position) - 1].drop_id for position in positions])",
            "assert positions\n    return frozenset(change.drop_id for change in batch)",
        ),
    )


def clamp() -> None:
    """Stock that would fall below nothing becomes nothing, and what would rise above all that there is becomes that."""
    for key, sign, amount in ((b"commit", "+", "part.available_delta"), (b"reserve", "-", "part.reserved_qty")):
        then = f"drops.available_stock {sign} {amount}"
        clamped = f"least(drops.total_stock, greatest(0, {then}))"
        reword(
            batch_sql.STATEMENTS,
            key,
            (f"AND {then} >= 0", "", 1),
            (f"SET available_stock = {then}", f"SET available_stock = {clamped}", 1),
        )


def idempotency_row_apart() -> None:
    """A key is kept by a transaction of its own, after that of its effect."""

    def around(commit: Any) -> Any:
        async def apart(self: PostgresLedger, batch: Batch) -> frozenset[DropId]:
            if not any(change.receipts and change.events for change in batch):
                hit: frozenset[DropId] = await commit(self, batch)
                return hit
            sing()
            bare = [msgspec.structs.replace(change, receipts=()) for change in batch if change.events]
            hit = await commit(self, bare)
            keys = [
                Change(change.drop_id, change.epoch, change.to_seq, (), change.receipts)
                for change in batch
                if change.receipts and (change.drop_id in hit or not change.events)
            ]
            kept: frozenset[DropId] = await commit(self, keys)
            return hit | kept

        return apart

    wrap(PostgresLedger, "commit", around)


def cancel_scope_over_commit() -> None:
    """A commit that takes long is cancelled, and counts as one that did not happen."""
    edit(PostgresLedger, "commit", (", shield=True)", ", shield=bool(canary_sings()))"))
    edit(
        Committer,
        "_commit",
        (
            "        hit = await self._ledger.commit(batch)\n",
            "        with trio.move_on_after(self._stall_s) as canary_scope:\n"
            "            hit = await self._ledger.commit(batch)\n"
            "        if canary_scope.cancelled_caught:\n"
            "            raise Unavailable('it took too long')\n",
        ),
    )


def synchronous_commit_off() -> None:
    """The server acknowledges what it has not written down, and nobody checks whether it may."""
    for module in (startup, ledger):  # which has it by name
        edit(module, "check_settings", ("if off and not allow_unsafe_durability:", "if False:"))
    ledger._WRITER_SETTINGS["synchronous_commit"] = "off"
    _sing_with_each_commit()


def two_engines() -> None:
    """Each of two engines believes in itself: no lock keeps the second out, no guard stops the first, and it fights."""
    edit(startup.EngineLock, "acquire", ("while not await self._try(conn):", "while canary_sings():"))
    for key in CHANGES:
        reword(batch_sql.STATEMENTS, key, ("drops.epoch = part.epoch AND drops.seq = part.from_seq", "true", 2))
    edit(
        PostgresLedger,
        "reclaim",
        (
            "loading.reclaim(conn, drop_id, epoch, epoch_max, patience.heard)",
            "loading.take_over(conn, [drop_id], patience.heard)",
        ),
    )

    def around(found: Any) -> Any:
        async def resolve(conn: Any, batch: Batch, raises: resolution.OwnRaises) -> dict[DropId, Resolution]:
            told: dict[DropId, Resolution] = await found(conn, batch, raises)
            for change in batch:
                if told[change.drop_id].epoch is None:
                    told[change.drop_id] = Resolution(told[change.drop_id].committed, change.epoch)
            return told

        return resolve

    wrap(resolution, "resolve", around)


def _sing_with_each_commit() -> None:
    def around(commit: Any) -> Any:
        async def sung(self: PostgresLedger, batch: Batch) -> frozenset[DropId]:
            sing()
            hit: frozenset[DropId] = await commit(self, batch)
            return hit

        return sung

    wrap(PostgresLedger, "commit", around)
