"""All SQL of the product but the batch's (`persistence.batch_sql`): SQLAlchemy Core, compiled once to text.

Each is for a psycopg cursor, with named parameters: `execute(HOLDS, {"drop_ids": […]})`. SQLAlchemy's own
execution costs 20 µs a call and has no part in this. Instants come out as whole milliseconds and ids as text;
an instant goes in as a datetime (`as_datetime`). Rows of `drops` are locked in the order of their ids, so
that no two statements can deadlock over them.
"""

from datetime import UTC, datetime, timedelta
from typing import Any, Final, LiteralString

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.dialects.postgresql.psycopg import PGCompiler_psycopg, PGDialect_psycopg

from engine.model import DropStatus, Instant, ReservationStatus
from persistence.tables import drop_events, drops, idempotency_keys, purchases, reservations, users

Column = sa.ColumnElement[Any]


def as_datetime(instant: Instant) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=instant)


class _Compiler(PGCompiler_psycopg):
    """Writes constants into the text, so that only what is given at execution stays a parameter."""

    def visit_bindparam(self, bindparam: sa.BindParameter[Any], **options: Any) -> str:  # type: ignore[override]
        is_constant = bindparam.value is not None
        render = super().visit_bindparam
        text: str = render(bindparam, **(options | {"literal_binds": is_constant}))  # type: ignore[no-untyped-call]
        return text


class _Dialect(PGDialect_psycopg):
    statement_compiler = _Compiler


def _compiled(statement: sa.ClauseElement) -> LiteralString:
    # psycopg asks for a literal to keep user input out of it; this text is made from tables alone.
    return str(statement.compile(dialect=_Dialect()))  # type: ignore[no-untyped-call]


def _text(column: Column) -> Column:
    return sa.cast(column, sa.Text)


def _milliseconds(column: Column) -> Column:
    """The instant as whole milliseconds; a double is exact enough for them until long after the year 9999."""
    return sa.cast(sa.func.round(sa.func.date_part("epoch", column) * 1000), sa.BigInteger)


Type = sa.types.TypeEngine[Any] | type[sa.types.TypeEngine[Any]]


def _array(parameter: str, kind: Type) -> Column:
    return sa.bindparam(parameter, type_=pg.ARRAY(kind))


def _value(parameter: str, kind: Type) -> Column:
    return sa.bindparam(parameter, type_=kind)


def _rows(alias: str, **columns: Type) -> sa.TableValuedAlias:
    """A set of rows from one list parameter a column, each named as its column with an s."""
    arrays = [_array(f"{name}s", kind) for name, kind in columns.items()]
    named = [sa.column(name, kind) for name, kind in columns.items()]
    return sa.func.unnest(*arrays).table_valued(*named).render_derived(name=alias)


# Taking over and loading ------------------------------------------------------------------------------

_of_drops = _rows("wanted", drop_id=sa.Uuid)
_is_over = sa.or_(drops.c.status == DropStatus.ENDED.value, drops.c.status == DropStatus.CANCELLED.value)


def _take_over(condition: Column) -> LiteralString:
    locked = (
        sa.select(drops.c.id)
        .where(condition)
        .order_by(drops.c.id)
        .with_for_update(key_share=True)
        .cte("locked")
        .prefix_with("MATERIALIZED")
    )
    return _compiled(
        sa.update(drops)
        .values(epoch=drops.c.epoch + 1)
        .where(drops.c.id == locked.c.id)
        .returning(
            _text(drops.c.id),
            drops.c.name,
            drops.c.price,
            drops.c.currency,
            drops.c.total_stock,
            _milliseconds(drops.c.starts_at),
            _milliseconds(drops.c.ends_at),
            _text(drops.c.created_by),
            _milliseconds(drops.c.created_at),
            drops.c.status,
            drops.c.available_stock,
            drops.c.held_count,
            drops.c.sold_count,
            drops.c.epoch,
            drops.c.seq,
            _milliseconds(drops.c.updated_at),
        )
    )


TAKE_OVER: Final = _take_over(drops.c.id == sa.any_(_array("drop_ids", sa.Uuid)))
"""Raise the epoch of the drops `drop_ids`, and return all of their rows."""

TAKE_OVER_ALL: Final = _take_over(sa.or_(sa.not_(_is_over), drops.c.held_count > 0))
"""The same for every drop that can still change by itself."""

RECLAIM: Final = _take_over(
    sa.and_(
        drops.c.id == _value("drop_id", sa.Uuid),
        drops.c.epoch.between(_value("epoch_min", sa.BigInteger), _value("epoch_max", sa.BigInteger)),
    )
)
"""The same for the drop `drop_id`, if its epoch is still one of ours."""

HOLDS: Final = _compiled(
    sa.select(
        _text(reservations.c.drop_id),
        _text(reservations.c.id),
        _text(reservations.c.user_id),
        reservations.c.qty,
        _milliseconds(reservations.c.created_at),
        _milliseconds(reservations.c.expires_at),
    )
    .join(_of_drops, _of_drops.c.drop_id == reservations.c.drop_id)
    .where(reservations.c.status == ReservationStatus.ACTIVE.value)
)
"""The active reservations of the drops `drop_ids`, in no order."""

NEWEST_ENDED: Final = _compiled(
    sa.select(_text(reservations.c.drop_id), _text(reservations.c.user_id), reservations.c.status)
    .join(_of_drops, _of_drops.c.drop_id == reservations.c.drop_id)
    .where(reservations.c.status != ReservationStatus.ACTIVE.value)
    .ext(pg.distinct_on(reservations.c.drop_id, reservations.c.user_id))
    .order_by(reservations.c.drop_id, reservations.c.user_id, reservations.c.seq.desc())
)
"""For each user of the drops `drop_ids`, the newest of the reservations that are over."""


def _latest_purchases() -> LiteralString:
    # Three probes of the index a drop: a window function would read every purchase there is.
    newest = (
        sa.select(purchases)
        .where(purchases.c.drop_id == _of_drops.c.drop_id)
        .order_by(purchases.c.seq.desc())
        .limit(3)
        .lateral("newest")
    )
    return _compiled(
        sa.select(
            _text(newest.c.drop_id),
            _text(newest.c.user_id),
            users.c.username,
            newest.c.qty,
            _milliseconds(newest.c.created_at),
        )
        .select_from(_of_drops.join(newest, sa.true()).outerjoin(users, users.c.id == newest.c.user_id))
        .order_by(newest.c.drop_id, newest.c.seq.desc())
    )


LATEST_PURCHASES: Final = _latest_purchases()
"""The newest three purchases of each of the drops `drop_ids`, newest first."""

NEWEST_INSTANT: Final = _compiled(
    sa.select(
        sa.func.greatest(
            sa.select(_milliseconds(sa.func.max(drops.c.updated_at))).scalar_subquery(),
            sa.select(_milliseconds(sa.func.max(idempotency_keys.c.created_at))).scalar_subquery(),
        )
    )
)
"""The newest instant that any engine decided something at, or null. Each event moves its drop's
`updated_at`."""

# Resolving a doubt ------------------------------------------------------------------------------------


def _fence() -> LiteralString:
    claimed = _rows("claimed", drop_id=sa.Uuid, epoch_min=sa.BigInteger, epoch_max=sa.BigInteger)
    locked = (
        sa.select(drops.c.id)
        .join(claimed, claimed.c.drop_id == drops.c.id)
        .where(drops.c.epoch.between(claimed.c.epoch_min, claimed.c.epoch_max))
        .order_by(drops.c.id)
        .with_for_update(key_share=True, of=drops)
        .cte("locked")
        .prefix_with("MATERIALIZED")
    )
    return _compiled(
        sa.update(drops)
        .values(epoch=drops.c.epoch + 1)
        .where(drops.c.id == locked.c.id)
        .returning(_text(drops.c.id), drops.c.epoch, drops.c.seq)
    )


FENCE: Final = _fence()
"""Raise the epoch of those drops whose epoch is still one of ours; waits for whoever holds their rows."""


def _committed_events() -> LiteralString:
    sought = _rows("sought", drop_id=sa.Uuid, seq=sa.BigInteger, epoch=sa.BigInteger, reservation_id=sa.Uuid)
    return _compiled(
        sa.select(_text(sought.c.drop_id)).join(
            drop_events,
            sa.and_(
                drop_events.c.drop_id == sought.c.drop_id,
                drop_events.c.seq == sought.c.seq,
                drop_events.c.epoch == sought.c.epoch,
                drop_events.c.reservation_id.is_not_distinct_from(sought.c.reservation_id),
            ),
        )
    )


COMMITTED_EVENTS: Final = _committed_events()
"""Those of the drops whose event `seq` was written in our epoch and about this reservation."""


def _committed_receipts() -> LiteralString:
    sought = _rows(
        "sought",
        drop_id=sa.Uuid,
        user_id=sa.Uuid,
        operation=sa.Text,
        key=sa.Text,
        created_at=sa.TIMESTAMP(timezone=True),
    )
    return _compiled(
        sa.select(_text(sought.c.drop_id)).join(
            idempotency_keys,
            sa.and_(
                idempotency_keys.c.user_id == sought.c.user_id,
                idempotency_keys.c.operation == sought.c.operation,
                idempotency_keys.c.key == sought.c.key,
                idempotency_keys.c.drop_id == sought.c.drop_id,
                idempotency_keys.c.created_at == sought.c.created_at,
            ),
        )
    )


COMMITTED_RECEIPTS: Final = _committed_receipts()
"""Those of the drops whose receipt is there."""

# Cold reads for the API -------------------------------------------------------------------------------

PURCHASES_OF_USER: Final = _compiled(
    sa.select(
        _text(purchases.c.id),
        _text(purchases.c.drop_id),
        drops.c.name,
        _text(purchases.c.reservation_id),
        purchases.c.qty,
        purchases.c.status,
        _milliseconds(purchases.c.created_at),
    )
    .join(drops, drops.c.id == purchases.c.drop_id)
    .where(purchases.c.user_id == _value("user_id", sa.Uuid))
    .order_by(purchases.c.created_at.desc(), purchases.c.id.desc())
    .limit(_value("limit", sa.BigInteger))
    .offset(_value("offset", sa.BigInteger))
)
"""A user's purchases, newest first."""

COUNT_PURCHASES_OF_USER: Final = _compiled(
    sa.select(sa.func.count()).where(purchases.c.user_id == _value("user_id", sa.Uuid))
)

HAS_DROP: Final = _compiled(sa.select(drops.c.seq).where(drops.c.id == _value("id", sa.Uuid)))

RESERVATION: Final = _compiled(
    sa.select(
        _text(reservations.c.id),
        _text(reservations.c.drop_id),
        _text(reservations.c.user_id),
        reservations.c.qty,
        reservations.c.status,
        _milliseconds(reservations.c.created_at),
        _milliseconds(reservations.c.expires_at),
        drops.c.seq,
        drops.c.epoch,
    )
    .join(drops, drops.c.id == reservations.c.drop_id)
    .where(reservations.c.id == _value("id", sa.Uuid))
)
"""One reservation by its id alone, the first part of its key; and the version of its drop, in the same snapshot."""

HISTORY: Final = _compiled(
    sa.select(
        drop_events.c.seq,
        drop_events.c.type,
        _milliseconds(drop_events.c.at),
        _text(drop_events.c.reservation_id),
        _text(drop_events.c.user_id),
        drop_events.c.qty,
        _milliseconds(reservations.c.created_at),
        _milliseconds(drop_events.c.expires_at),
        _text(drop_events.c.purchase_id),
        users.c.username,
        drop_events.c.available_stock,
        drop_events.c.status,
        drop_events.c.data,
    )
    .select_from(
        drop_events.outerjoin(
            reservations,
            sa.and_(
                reservations.c.id == drop_events.c.reservation_id,
                reservations.c.drop_id == drop_events.c.drop_id,
            ),
        ).outerjoin(users, users.c.id == drop_events.c.user_id)
    )
    .where(
        drop_events.c.drop_id == _value("drop_id", sa.Uuid),
        drop_events.c.seq > _value("after_seq", sa.BigInteger),
    )
    .order_by(drop_events.c.seq)
    .limit(_value("limit", sa.BigInteger))
)
"""A drop's events after `after_seq`, in order."""

# Users ------------------------------------------------------------------------------------------------

USERS: Final = _compiled(
    sa.select(_text(users.c.id), users.c.username).where(users.c.id == sa.any_(_array("ids", sa.Uuid)))
)


def _add_users() -> LiteralString:
    new = _rows("new", id=sa.Uuid, username=sa.Text)
    return _compiled(
        pg.insert(users)
        .from_select(
            ["id", "username", "created_at"],
            # In the order of their ids, so that two callers with the same users don't deadlock.
            sa.select(new.c.id, new.c.username, _value("at", sa.TIMESTAMP(timezone=True))).order_by(new.c.id),
        )
        .on_conflict_do_nothing()
        .returning(_text(users.c.id), users.c.username)
    )


ADD_USERS: Final = _add_users()
"""Add those users whose id and name are both free."""

# Idempotency keys -------------------------------------------------------------------------------------

RECEIPT: Final = _compiled(
    sa.select(
        idempotency_keys.c.fingerprint,
        idempotency_keys.c.status_code,
        idempotency_keys.c.body,
        _milliseconds(idempotency_keys.c.created_at),
    ).where(
        idempotency_keys.c.user_id == _value("user_id", sa.Uuid),
        idempotency_keys.c.operation == _value("operation", sa.Text),
        idempotency_keys.c.key == _value("key", sa.Text),
    )
)

KEYS: Final = _compiled(
    sa.select(_text(idempotency_keys.c.user_id), idempotency_keys.c.operation, idempotency_keys.c.key)
)


def _prune() -> LiteralString:
    old = (
        sa.select(idempotency_keys.c.user_id, idempotency_keys.c.operation, idempotency_keys.c.key)
        .where(idempotency_keys.c.created_at < _value("before", sa.TIMESTAMP(timezone=True)))
        .order_by(idempotency_keys.c.created_at)
        .limit(_value("limit", sa.BigInteger))
        .cte("old")
    )
    return _compiled(
        sa.delete(idempotency_keys).where(
            idempotency_keys.c.user_id == old.c.user_id,
            idempotency_keys.c.operation == old.c.operation,
            idempotency_keys.c.key == old.c.key,
        )
    )


PRUNE: Final = _prune()
"""Forget the oldest `limit` keys from before `before`."""
