"""The persistence port: what the engine asks of a ledger, and the ways in which a ledger can fail.

Two implementations: PostgreSQL (`persistence.ledger`) and an in-memory one for tests, held to the same
conformance suite. The order of drops in a batch means nothing; the order of events in a change does.
"""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from engine.model import DropCreated, DropId, DropRecord, Event, StoredReceipt


class Change(msgspec.Struct, frozen=True):
    """One drop's part of a batch. It stands or falls by its own guard: the drop still has `epoch` and `from_seq`.

    `events` are numbered `from_seq + 1 …` without gap; they may be empty when only receipts are stored (a refusal
    under a key). A drop is born by a change whose first event is `DropCreated`; then `from_seq` is 0, `epoch` 1.
    """

    drop_id: DropId
    epoch: int
    from_seq: int
    events: Sequence[Event]
    receipts: Sequence[StoredReceipt]

    @property
    def to_seq(self) -> int:
        return self.from_seq + len(self.events)

    @property
    def is_birth(self) -> bool:
        return bool(self.events) and isinstance(self.events[0], DropCreated)


Batch = Sequence[Change]
"""Changes of different drops, each drop at most once; either births or changes of existing drops, never both."""


class Resolution(msgspec.Struct, frozen=True):
    """What became of a change in doubt. `epoch` is the drop's new epoch, None where this engine lost the drop."""

    committed: bool
    epoch: int | None


class LedgerFault(Exception):
    """The ledger could not do what it was asked."""


class Unavailable(LedgerFault):
    """The ledger is out of reach and nothing was sent: definitely nothing happened."""


class InDoubt(LedgerFault):
    """The connection was lost after the batch was sent. It may be committed, or may yet be: resolve, never guess."""


class Rejected(LedgerFault):
    """The ledger refused the batch as a whole and rolled it back: definitely nothing happened."""


class StorageFull(Rejected):
    """Rejected for want of room (SQLSTATE class 53: disk full, and its like). Updates may still work."""


class Ledger(Protocol):
    async def take_over(self, drop_ids: Sequence[DropId] | None) -> list[DropRecord]:
        """Raise the epoch of each drop and load it; from then on no batch of an older epoch commits.

        None takes over every drop that can still change by itself: not over yet, or with units held. Unknown ids
        are left out of the result. Waits for transactions that still hold a drop.

        Raises:
            Unavailable: out of reach; ask again.
        """
        ...

    async def reclaim(self, drop_id: DropId, epoch: int) -> DropRecord | None:
        """Take over and load a drop that this engine owned at `epoch`; None if another engine has it since.

        For an actor that stopped: it goes on from the ledger, but never fights for its drop.

        Raises:
            Unavailable: out of reach; ask again.
        """
        ...

    async def commit(self, batch: Batch) -> frozenset[DropId]:
        """Make durable every change whose guard hits, in one round trip; return the drops whose guard hit.

        A drop that is missing from the result was not written at all: somebody else did write to it.
        Cancelled before it starts: nothing happened; once started it runs to its end.

        Raises:
            Unavailable, Rejected, StorageFull: nothing of the batch happened.
            InDoubt: call `resolve` with this batch before anything else.
        """
        ...

    async def resolve(self, batch: Batch) -> dict[DropId, Resolution]:
        """Learn what became of a batch in doubt, and fence off whatever of it may still be under way.

        Takes each drop over again behind its row lock, which waits for the old transaction, whichever way it
        ends. A birth that did not commit is absent from the ledger and stays so. With an empty batch this only
        shows that the ledger is in reach, and would take a batch.

        Raises:
            Unavailable: out of reach; the doubt stays, ask again.
        """
        ...
