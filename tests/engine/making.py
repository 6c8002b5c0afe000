"""Short makers of the domain's words for the engine's tests. Instants are small: at 0 a drop is made."""

from engine.drop import Drop, Rules
from engine.model import (
    Cancel,
    Command,
    Decision,
    DropCreated,
    DropId,
    DropRecord,
    DropStatus,
    Event,
    Instant,
    Purchase,
    PurchaseId,
    Refused,
    ReservationId,
    Reserve,
    Swept,
    Terms,
    UserId,
)

DROP = DropId("drop-1")
ANN, BEN, CAT = UserId("ann"), UserId("ben"), UserId("cat")
HOLD_MS = 60_000


def at(ms: int) -> Instant:
    return Instant(ms)


def terms(
    total: int = 2,
    *,
    drop_id: DropId = DROP,
    starts_at: int | None = None,
    ends_at: int | None = None,
    created_at: int = 0,
) -> Terms:
    return Terms(
        id=drop_id,
        name="Air One",
        price=12_000,
        currency="USD",
        total_stock=total,
        starts_at=None if starts_at is None else at(starts_at),
        ends_at=None if ends_at is None else at(ends_at),
        created_by=None,
        created_at=at(created_at),
    )


def born(of: Terms, status: DropStatus = DropStatus.LIVE) -> Drop:
    drop = Drop(of, status)
    drop.apply(DropCreated(1, of.created_at, of, status))
    return drop


def live(total: int = 2, *, ends_at: int | None = None) -> Drop:
    """A live drop at `seq` 1, without holds."""
    return born(terms(total, ends_at=ends_at))


def reserve(user: UserId, name: str = "", *, qty: int = 1, hold_ms: int = HOLD_MS) -> Reserve:
    """The reservation's id is the user's name unless another is given."""
    return Reserve(user, ReservationId(name or user), hold_ms, qty)


def purchase(user: UserId, name: str = "") -> Purchase:
    return Purchase(user, f"{user}-name", PurchaseId(name or f"{user}-buys"))


def cancel(user: UserId, name: str = "") -> Cancel:
    return Cancel(user, ReservationId(name or user))


def sweep(drop: Rules, now: int) -> list[Event]:
    """Apply everything that is due, as an actor does before it decides."""
    swept: list[Event] = []
    while (event := drop.due(at(now))) is not None:
        drop.apply(event)
        swept.append(event)
    return swept


def play(drop: Rules, command: Command, now: int) -> Decision:
    """Sweep, decide, apply: what an actor does with one command."""
    sweep(drop, now)
    decision = drop.decide(command, at(now))
    if not isinstance(decision, Refused | Swept):
        drop.apply(decision)
    return decision


def counts(drop: Rules) -> tuple[int, int, int]:
    """(available, held, sold)"""
    return drop.available, drop.held, drop.sold


def record_of(drop: Drop, epoch: int = 1, updated_at: int = 0) -> DropRecord:
    """The drop as a ledger would keep it."""
    return DropRecord(
        terms=drop.terms,
        status=drop.status,
        available_stock=drop.available,
        held_count=drop.held,
        sold_count=drop.sold,
        epoch=epoch,
        seq=drop.seq,
        holds=list(drop.holds.values()),
        newest_ended=dict(drop.newest_ended),
        latest_purchases=drop.latest_purchases,
        updated_at=Instant(updated_at),
    )
