"""The words of the domain: ids, instants, commands, events, refusals, records. Frozen, without behaviour.

A command is a wish, an event is a fact, a refusal is a fact that changed nothing. `engine.drop` turns the first
into one of the other two. Nothing here imports I/O, time or randomness.
"""

from collections.abc import Callable
from enum import StrEnum
from typing import NewType

import msgspec

DropId = NewType("DropId", str)
"""Ids are UUIDs in canonical text (36 characters, lower case): JSON and SQL arrays take them as they are."""
UserId = NewType("UserId", str)
ReservationId = NewType("ReservationId", str)
PurchaseId = NewType("PurchaseId", str)

Instant = NewType("Instant", int)
"""Whole milliseconds since the Unix epoch, UTC: what clients are shown is exactly what decides."""


class DropStatus(StrEnum):
    DRAFT = "draft"
    SCHEDULED = "scheduled"
    LIVE = "live"
    PAUSED = "paused"
    ENDED = "ended"
    CANCELLED = "cancelled"


class ReservationStatus(StrEnum):
    ACTIVE = "active"
    CONSUMED = "consumed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


class RefusalCode(StrEnum):
    """Why a well-formed command changed nothing. The codes are the contract's, to the letter."""

    DROP_NOT_FOUND = "DROP_NOT_FOUND"
    DROP_NOT_ACTIVE = "DROP_NOT_ACTIVE"
    OUT_OF_STOCK = "OUT_OF_STOCK"
    ALREADY_RESERVED = "ALREADY_RESERVED"
    RESERVATION_REQUIRED = "RESERVATION_REQUIRED"
    RESERVATION_EXPIRED = "RESERVATION_EXPIRED"
    RESERVATION_NOT_ACTIVE = "RESERVATION_NOT_ACTIVE"
    RESERVATION_NOT_FOUND = "RESERVATION_NOT_FOUND"
    ALREADY_PURCHASED = "ALREADY_PURCHASED"


class FaultCode(StrEnum):
    """Why the engine could not decide, or could not learn what became of its decision. Nobody's mistake but ours."""

    OVERLOADED = "OVERLOADED"  # a mailbox or the in-flight limit is full; nothing happened
    UNAVAILABLE = "DATABASE_UNAVAILABLE"  # the ledger is out of reach; nothing happened
    STORAGE_FULL = "STORAGE_FULL"  # the database has no room for new rows; nothing happened
    UNKNOWN = "OUTCOME_UNKNOWN"  # it may have happened: retry with the same key, or look
    STOPPING = "SERVER_STOPPING"  # the server is going down; nothing happened
    RESTARTING = "DROP_RESTARTING"  # this drop's actor stopped and reloads; nothing happened
    FENCED = "DROP_OWNED_ELSEWHERE"  # another engine took this drop over; nothing happened
    BROKEN = "DROP_OUT_OF_SERVICE"  # what the ledger holds of this drop contradicts itself; nothing happened


class Hold(msgspec.Struct, frozen=True, gc=False):
    """An active reservation: `qty` units of one drop kept for one user until `expires_at`, exclusive."""

    id: ReservationId
    drop_id: DropId
    user_id: UserId
    qty: int
    created_at: Instant
    expires_at: Instant


class LatestPurchase(msgspec.Struct, frozen=True, gc=False):
    """One line of a drop's activity feed."""

    user_id: UserId
    username: str
    qty: int
    created_at: Instant


class Terms(msgspec.Struct, frozen=True):
    """What the maker of a drop decided. `price` is in minor units of `currency`; None in the window is open."""

    id: DropId
    name: str
    price: int
    currency: str
    total_stock: int
    starts_at: Instant | None
    ends_at: Instant | None
    created_by: UserId | None
    created_at: Instant


# Commands ---------------------------------------------------------------------------------------------


class Create(msgspec.Struct, frozen=True):
    terms: Terms
    status: DropStatus


class Reserve(msgspec.Struct, frozen=True, gc=False):
    """`hold_ms` is how long the hold lasts, counted from the instant of the decision."""

    user_id: UserId
    reservation_id: ReservationId
    hold_ms: int
    qty: int = 1


class Purchase(msgspec.Struct, frozen=True, gc=False):
    user_id: UserId
    username: str
    purchase_id: PurchaseId


class Cancel(msgspec.Struct, frozen=True, gc=False):
    user_id: UserId
    reservation_id: ReservationId


class Sweep(msgspec.Struct, frozen=True, gc=False):
    """Settle whatever is due at this instant, and say how much that was."""


Command = Create | Reserve | Purchase | Cancel | Sweep

# Events -----------------------------------------------------------------------------------------------
# Each carries the drop's `seq` (1, 2, 3 … without gap) and the instant of its decision, `at`.


class DropCreated(msgspec.Struct, frozen=True, gc=False):
    seq: int
    at: Instant
    terms: Terms
    status: DropStatus


class DropUpdated(msgspec.Struct, frozen=True, gc=False):
    """The drop's own clock moved its status."""

    seq: int
    at: Instant
    status: DropStatus


class Reserved(msgspec.Struct, frozen=True, gc=False):
    seq: int
    at: Instant
    hold: Hold
    available_stock: int  # after this event, as in all of these


class Purchased(msgspec.Struct, frozen=True, gc=False):
    seq: int
    at: Instant
    hold: Hold
    purchase_id: PurchaseId
    username: str
    available_stock: int


class Cancelled(msgspec.Struct, frozen=True, gc=False):
    seq: int
    at: Instant
    hold: Hold
    available_stock: int


class Expired(msgspec.Struct, frozen=True, gc=False):
    seq: int
    at: Instant
    hold: Hold
    available_stock: int


Event = DropCreated | DropUpdated | Reserved | Purchased | Cancelled | Expired

# Outcomes ---------------------------------------------------------------------------------------------


class Refused(msgspec.Struct, frozen=True, gc=False):
    """The command changed nothing; true at the drop's `seq`."""

    code: RefusalCode
    seq: int


class Swept(msgspec.Struct, frozen=True, gc=False):
    """How many holds a `Sweep` expired."""

    expired: int
    seq: int


class Fault(msgspec.Struct, frozen=True, gc=False):
    code: FaultCode


Decision = Event | Refused | Swept
Outcome = Decision | Fault

Reply = Callable[[Outcome], None]
"""Called once, synchronously, after the commit on which the outcome rests. Must neither block nor raise."""


class StoredAnswer(msgspec.Struct, frozen=True, gc=False):
    """An answer as its first caller got it: kept with its effect, so that a retry gets the same bytes."""

    status_code: int
    body: bytes


class Receipt(msgspec.Struct, frozen=True, gc=False):
    """A caller's idempotency key on its way to the ledger.

    `render` turns the decision into the answer at the moment of the decision, so that answer and effect are
    written in one transaction. `fingerprint` identifies the request that the key was first used with.
    """

    user_id: UserId
    operation: str
    key: str
    fingerprint: bytes
    render: Callable[[Decision], StoredAnswer]


class StoredReceipt(msgspec.Struct, frozen=True, gc=False):
    """A receipt with its answer, as the ledger keeps it."""

    user_id: UserId
    operation: str
    key: str
    fingerprint: bytes
    answer: StoredAnswer
    created_at: Instant


class DropRecord(msgspec.Struct, frozen=True):
    """A drop as the ledger has it, with all that a decision needs.

    `newest_ended` is the status of each user's newest reservation on this drop where that one is over;
    `latest_purchases` are the newest three, newest first. `updated_at` is the instant of its last event.
    """

    terms: Terms
    status: DropStatus
    available_stock: int
    held_count: int
    sold_count: int
    epoch: int
    seq: int
    holds: list[Hold]
    newest_ended: dict[UserId, ReservationStatus]
    latest_purchases: tuple[LatestPurchase, ...]
    updated_at: Instant
