"""A recorded history: who asked what, when, what each was told, and the tables in the end.

The one form in which every proof speaks of what it saw, whether it came over HTTP or out of a simulation, and all that
`tests.proof.checker` knows. Nothing here, and nothing there, is the engine's: plain text, numbers and lists.

An operation ends in one of three ways:

    ok        2xx: it happened, as the answer says
    refused   it did not happen, for sure: a refusal of the rules (a 409 or the like), or a 503 that says so
    unknown   nobody knows yet: no answer at all, or 503 OUTCOME_UNKNOWN; the final tables say what became of it
"""

from enum import StrEnum

import msgspec


class Kind(StrEnum):
    CREATE = "create"
    RESERVE = "reserve"
    PURCHASE = "purchase"
    CANCEL = "cancel"
    SHOW = "show"  # GET of one drop
    EXPIRE = "expire"  # settle what is due


class Ending(StrEnum):
    OK = "ok"
    REFUSED = "refused"
    UNKNOWN = "unknown"


class Operation(msgspec.Struct, gc=False, omit_defaults=True):
    """One invocation and what came of it.

    `began` and `ended` are instants of one clock that all of a history's clients share, in whole µs: of real time, not
    of the engine's. `ended` is None where no answer ever came: then it may take effect at any later time. `seq` and
    `epoch` are those of the answer's `meta`; None where there was none.
    """

    number: int  # in the order in which the history began them
    kind: Kind
    user_id: str
    drop_id: str
    began: int
    ended: int | None
    ending: Ending
    code: str = ""  # of the refusal or the fault
    seq: int | None = None
    epoch: int | None = None
    key: str | None = None  # the idempotency key
    answer: bytes = b""  # the body, for one with a key: a replay has the same bytes
    is_replayed: bool = False
    qty: int = 1
    reservation_id: str | None = None  # asked for (cancel), or told (reserve, purchase)
    purchase_id: str | None = None  # told
    created_at: int | None = None  # told, of a reservation or a purchase: ms since 1970
    expires_at: int | None = None  # told, of a reservation: ms since 1970
    available_stock: int | None = None  # told
    total_stock: int | None = None  # asked for (create)
    status: str | None = None  # told (create, show): the drop's


class DropRow(msgspec.Struct, gc=False):
    id: str
    total_stock: int
    available_stock: int
    held_count: int
    sold_count: int
    status: str
    epoch: int
    seq: int
    starts_at: int | None = None  # ms since 1970
    ends_at: int | None = None


class ReservationRow(msgspec.Struct, gc=False):
    """Instants are ms since 1970."""

    id: str
    drop_id: str
    user_id: str
    qty: int
    status: str
    created_at: int
    expires_at: int
    resolved_at: int | None
    seq: int


class PurchaseRow(msgspec.Struct, gc=False):
    id: str
    drop_id: str
    user_id: str
    reservation_id: str
    qty: int
    created_at: int
    seq: int


class EventRow(msgspec.Struct, gc=False):
    """`type` is as in `drop_events`: DROP_CREATED, DROP_UPDATED, RESERVED, PURCHASED, CANCELLED, EXPIRED."""

    drop_id: str
    seq: int
    epoch: int
    type: str
    at: int
    user_id: str | None = None
    reservation_id: str | None = None
    purchase_id: str | None = None
    qty: int | None = None
    expires_at: int | None = None
    available_stock: int | None = None
    status: str | None = None


class KeyRow(msgspec.Struct, gc=False):
    user_id: str
    operation: str  # as in `idempotency_keys`: reserve, purchase, create_drop
    key: str
    drop_id: str
    status_code: int
    body: bytes


class Tables(msgspec.Struct):
    """What the database holds in the end, in one snapshot; each list in any order.

    `keys` belongs to every history whose clients give keys: an answer under a key that is not here counts as lost.
    """

    drops: list[DropRow]
    reservations: list[ReservationRow]
    purchases: list[PurchaseRow]
    events: list[EventRow]
    keys: list[KeyRow] = []


class Delivery(msgspec.Struct, gc=False):
    """What one viewer was shown of one drop, in the order in which it came. `at`: µs of the history's clock.

    A snapshot says all up to its `seq`; an event says what happened at it.
    """

    viewer: int
    drop_id: str
    seq: int
    is_snapshot: bool
    at: int
    type: str = ""  # of an event, as the feed names it
    available_stock: int | None = None


class Recording(msgspec.Struct):
    operations: list[Operation]
    tables: Tables
    deliveries: list[Delivery] = []
    ttl_ms: int | None = None  # that every hold lasts, where they all last as long
    # Drops that were there before the history began, and the `seq` that each had reached: up to it nobody need have
    # asked for anything. All drops of a history without any `create` are such, with all that clients did to them in it.
    given: dict[str, int] = {}
