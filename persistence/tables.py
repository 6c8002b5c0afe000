"""The tables, in SQLAlchemy Core: what is stored, and what the database itself refuses to store.

Migrations (`migrations/versions`) write the same tables as explicit DDL, and a test holds the two together.
Rules that every table keeps: its key contains `drop_id` where it has one, so that tables can be distributed
by it; an instant is a `timestamptz` that the engine's clock decided, never `now()`; nothing is done by
triggers or functions.

Rows of `reservations`, `purchases` and `drop_events` reference drops and users without a foreign key: they are written
only where their drop's guarded update hit, so the drop exists by construction, and a check of the user would lock and
rewrite a row of `users` for every hold on the hot path. `persistence.audit` looks for orphans of drops; a user without
a row merely has the name that users without a name get.
"""

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from engine.model import DropStatus, ReservationStatus

metadata = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    }
)

Instant = sa.DateTime(timezone=True)

EVENT_TYPES = ("DROP_CREATED", "DROP_UPDATED", "RESERVED", "PURCHASED", "CANCELLED", "EXPIRED")


def _one_of(column: str, values: tuple[str, ...]) -> str:
    return f"{column} IN ({', '.join(repr(str(value)) for value in values)})"


users = sa.Table(
    "users",
    metadata,
    sa.Column("id", sa.Uuid, primary_key=True),
    sa.Column("username", sa.Text, nullable=False, unique=True),
    sa.Column("created_at", Instant, nullable=False),
    sa.CheckConstraint("char_length(username) BETWEEN 3 AND 50", name="username_length"),
)

drops = sa.Table(
    "drops",
    metadata,
    sa.Column("id", sa.Uuid, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("price", sa.BigInteger, nullable=False, comment="minor units of currency"),
    sa.Column("currency", sa.Text, nullable=False),
    sa.Column("total_stock", sa.BigInteger, nullable=False),
    sa.Column("available_stock", sa.BigInteger, nullable=False),
    sa.Column("held_count", sa.BigInteger, nullable=False),
    sa.Column("sold_count", sa.BigInteger, nullable=False),
    sa.Column("starts_at", Instant),
    sa.Column("ends_at", Instant),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("created_by", sa.Uuid, sa.ForeignKey("users.id")),
    sa.Column("created_at", Instant, nullable=False),
    sa.Column("updated_at", Instant, nullable=False, comment="the drop's last event"),
    sa.Column("epoch", sa.BigInteger, nullable=False, comment="the fence: raised by each engine that takes over"),
    sa.Column("seq", sa.BigInteger, nullable=False, comment="number of the drop's last event"),
    sa.CheckConstraint("available_stock + held_count + sold_count = total_stock", name="conservation"),
    sa.CheckConstraint("available_stock >= 0 AND held_count >= 0 AND sold_count >= 0", name="counts"),
    sa.CheckConstraint(_one_of("status", tuple(DropStatus)), name="status"),
    sa.CheckConstraint("ends_at > starts_at", name="window"),
    sa.CheckConstraint("char_length(name) BETWEEN 2 AND 200", name="name_length"),
    sa.CheckConstraint("price >= 0", name="price"),
    sa.CheckConstraint("char_length(currency) = 3", name="currency"),
    sa.CheckConstraint("epoch >= 1 AND seq >= 1", name="numbering"),
    # Every batch rewrites these few rows. Half of each page stays free for the new versions and no index
    # covers what changes, so that the updates stay HOT (99 % of them; 22 of 385,831 with an index on
    # available_stock).
    postgresql_with={"fillfactor": 50},
)

reservations = sa.Table(
    "reservations",
    metadata,
    sa.Column("id", sa.Uuid, primary_key=True),
    sa.Column("drop_id", sa.Uuid, primary_key=True),
    sa.Column("user_id", sa.Uuid, nullable=False),
    sa.Column("qty", sa.Integer, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("created_at", Instant, nullable=False),
    sa.Column("expires_at", Instant, nullable=False, comment="exclusive: at this instant it is over"),
    sa.Column("resolved_at", Instant),
    # Instants tie within a millisecond, this never does: it says which of a user's reservations is the
    # newest.
    sa.Column("seq", sa.BigInteger, nullable=False, comment="number of its RESERVED event"),
    sa.CheckConstraint("qty > 0", name="qty"),
    sa.CheckConstraint(_one_of("status", tuple(ReservationStatus)), name="status"),
    sa.CheckConstraint("(status = 'active') = (resolved_at IS NULL)", name="resolved"),
    sa.CheckConstraint("status <> 'expired' OR resolved_at >= expires_at", name="never_expired_early"),
    sa.CheckConstraint("status NOT IN ('consumed', 'cancelled') OR resolved_at < expires_at", name="never_ended_late"),
    sa.CheckConstraint("expires_at > created_at AND resolved_at >= created_at", name="instants"),
    sa.Index(
        "uq_reservations_active",
        "drop_id",
        "user_id",
        unique=True,
        postgresql_where=sa.text("status = 'active'"),
    ),
    # With the unique one above, this makes all rows of a drop reachable by its id; together they hold each
    # row once.
    sa.Index(
        "ix_reservations_ended",
        "drop_id",
        "user_id",
        sa.text("seq DESC"),
        postgresql_include=["status"],
        postgresql_where=sa.text("status <> 'active'"),
    ),
)

purchases = sa.Table(
    "purchases",
    metadata,
    sa.Column("id", sa.Uuid, primary_key=True),
    sa.Column("drop_id", sa.Uuid, primary_key=True),
    sa.Column("user_id", sa.Uuid, nullable=False),
    sa.Column("reservation_id", sa.Uuid, nullable=False),
    sa.Column("qty", sa.Integer, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("created_at", Instant, nullable=False),
    sa.Column("seq", sa.BigInteger, nullable=False, comment="number of its PURCHASED event"),
    sa.UniqueConstraint("reservation_id", "drop_id"),
    sa.ForeignKeyConstraint(["reservation_id", "drop_id"], ["reservations.id", "reservations.drop_id"]),
    sa.CheckConstraint("qty > 0", name="qty"),
    sa.CheckConstraint("status = 'paid'", name="status"),
    sa.Index("ix_purchases_latest", "drop_id", sa.text("seq DESC")),
    sa.Index("ix_purchases_of_user", "user_id", sa.text("created_at DESC"), sa.text("id DESC")),
)

drop_events = sa.Table(
    "drop_events",
    metadata,
    sa.Column("drop_id", sa.Uuid, primary_key=True),
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("epoch", sa.BigInteger, nullable=False, comment="of the engine that decided it"),
    sa.Column("type", sa.Text, nullable=False),
    sa.Column("at", Instant, nullable=False, comment="the decision"),
    sa.Column("reservation_id", sa.Uuid),
    sa.Column("user_id", sa.Uuid),
    sa.Column("qty", sa.Integer),
    sa.Column("expires_at", Instant),
    sa.Column("purchase_id", sa.Uuid),
    sa.Column("available_stock", sa.BigInteger, comment="after this event"),
    sa.Column("status", sa.Text, comment="of the drop, where this event set it"),
    sa.Column("data", pg.JSONB, comment="the terms of DROP_CREATED"),
    sa.CheckConstraint(_one_of("type", EVENT_TYPES), name="type"),
    sa.CheckConstraint("seq >= 1 AND epoch >= 1", name="numbering"),
    sa.CheckConstraint(
        "type IN ('DROP_CREATED', 'DROP_UPDATED') AND status IS NOT NULL AND reservation_id IS NULL"
        " OR num_nulls(reservation_id, user_id, qty, expires_at, available_stock) = 0 AND status IS NULL",
        name="shape",
    ),
    sa.CheckConstraint("(type = 'PURCHASED') = (purchase_id IS NOT NULL)", name="purchase"),
    sa.CheckConstraint("(type = 'DROP_CREATED') = (seq = 1)", name="created_first"),
)

idempotency_keys = sa.Table(
    "idempotency_keys",
    metadata,
    # The one key without drop_id, on purpose: a user's key has one effect, whichever drop it was used with
    # (I14).
    sa.Column("user_id", sa.Uuid, primary_key=True),
    sa.Column("operation", sa.Text, primary_key=True),
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("drop_id", sa.Uuid, nullable=False),
    sa.Column("fingerprint", sa.LargeBinary, nullable=False),
    sa.Column("status_code", sa.SmallInteger, nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sa.Column("created_at", Instant, nullable=False),
    sa.Index("ix_idempotency_keys_created_at", "created_at"),
)
