"""What became of a batch in doubt: fence each drop by its own row, then read the truth behind the fence.

The fence is the row lock. Raising a drop's epoch waits until the old transaction is over, whichever way it
ended, and what has not committed by then never will, since its guard names the old epoch. So `seq` decides:
moved past the batch means committed. Where the epoch is not ours any more somebody else has raised the same
fence, and the log of events says whether our batch came before it.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import structlog

from engine.ledger import Batch, Change, Resolution
from engine.model import Cancelled, DropId, Expired, Purchased, Reserved
from persistence import statements
from persistence.trio_pg import TrioConnection

log = structlog.get_logger(__name__)


class OwnRaises:
    """Epochs that we may have raised ourselves, in a transaction whose COMMIT broke off before we learned its end.

    Without this such a drop would look like one that another engine took, and be let go for good. Only what was
    about to be committed is kept here: an attempt that never came so far raised nothing, and the next epoch is then
    another engine's. If that COMMIT failed and another engine raised the same epoch, we take the drop from it once:
    that is safe, it is fenced off as any other would be.
    """

    def __init__(self) -> None:
        self._newest: dict[DropId, int] = {}

    def newest(self, drop_id: DropId, epoch: int) -> int:
        """The highest epoch of this drop that may be ours, given that `epoch` was."""
        return max(epoch, self._newest.get(drop_id, epoch))

    def note(self, drop_id: DropId, epoch: int) -> None:
        """It was raised to this one; next comes the COMMIT."""
        self._newest[drop_id] = epoch

    def forget(self, drop_ids: Iterable[DropId]) -> None:
        """These came to their end, and were told."""
        for drop_id in drop_ids:
            self._newest.pop(drop_id, None)


async def resolve(conn: TrioConnection, batch: Batch, raises: OwnRaises) -> dict[DropId, Resolution]:
    """See `engine.ledger.Ledger.resolve`. To be called in a transaction; the epochs count once that commits.

    Raises:
        psycopg.errors.LockNotAvailable: a drop is locked for longer than the session's lock_timeout.
        psycopg.Error: any other failure.
    """
    cursor = await conn.execute(
        statements.FENCE,
        {
            "drop_ids": [change.drop_id for change in batch],
            "epoch_mins": [change.epoch for change in batch],
            "epoch_maxs": [raises.newest(change.drop_id, change.epoch) for change in batch],
        },
    )
    fenced = {drop_id: (epoch, seq) for drop_id, epoch, seq in await cursor.fetchall()}
    # A new statement, so a new snapshot: it sees all that the locks have waited for.
    written = await _written(conn, batch)
    resolutions = {}
    for change in batch:
        is_committed = change.drop_id in written
        epoch, seq = fenced.get(change.drop_id, (None, None))
        counted = change.to_seq if is_committed else change.from_seq
        if change.events and epoch == change.epoch + 1 and seq != counted:
            # No engine came between, and yet the counter in the locked row says otherwise. That is for this drop's
            # next guard to miss, which reloads it; the other drops of the batch want their truth.
            log.error("seq_contradicts_log", drop_id=change.drop_id, seq=seq, logged=counted)
        resolutions[change.drop_id] = Resolution(is_committed, epoch)
    for drop_id, (epoch, _) in fenced.items():
        raises.note(drop_id, epoch)
    return resolutions


async def _written(conn: TrioConnection, changes: Sequence[Change]) -> set[DropId]:
    """Those drops whose last event of the change is in the log, or whose first receipt is kept if it has
    none."""
    with_events = [change for change in changes if change.events]
    receipts = [(change, change.receipts[0]) for change in changes if not change.events and change.receipts]
    rows: list[tuple[Any, ...]] = []
    if with_events:
        cursor = await conn.execute(
            statements.COMMITTED_EVENTS,
            {
                "drop_ids": [change.drop_id for change in with_events],
                "seqs": [change.to_seq for change in with_events],
                "epochs": [change.epoch for change in with_events],
                "reservation_ids": [_reservation(change) for change in with_events],
            },
        )
        rows += await cursor.fetchall()
    if receipts:
        cursor = await conn.execute(
            statements.COMMITTED_RECEIPTS,
            {
                "drop_ids": [change.drop_id for change, _ in receipts],
                "user_ids": [receipt.user_id for _, receipt in receipts],
                "operations": [receipt.operation for _, receipt in receipts],
                "keys": [receipt.key for _, receipt in receipts],
                "created_ats": [statements.as_datetime(receipt.created_at) for _, receipt in receipts],
            },
        )
        rows += await cursor.fetchall()
    return {drop_id for (drop_id,) in rows}


def _reservation(change: Change) -> str | None:
    match change.events[-1]:
        case Reserved(hold=hold) | Purchased(hold=hold) | Cancelled(hold=hold) | Expired(hold=hold):
            return hold.id
        case _:
            return None
