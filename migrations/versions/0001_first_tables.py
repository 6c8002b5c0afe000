"""The first tables: users, drops, their reservations and purchases, the log of events, idempotency keys."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql as pg

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

Instant = sa.DateTime(timezone=True)


def upgrade() -> None:
    _create_users()
    _create_drops()
    _create_reservations()
    _create_purchases()
    _create_drop_events()
    _create_idempotency_keys()


def downgrade() -> None:
    for table in ("idempotency_keys", "drop_events", "purchases", "reservations", "drops", "users"):
        op.drop_table(table)


def _create_users() -> None:
    op.create_table(
        "users",
        sa.Column("id", sa.Uuid, nullable=False),
        sa.Column("username", sa.Text, nullable=False),
        sa.Column("created_at", Instant, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_users"),
        sa.UniqueConstraint("username", name="uq_users_username"),
        _check("ck_users_username_length", "char_length(username) BETWEEN 3 AND 50"),
    )


def _create_drops() -> None:
    op.create_table(
        "drops",
        sa.Column("id", sa.Uuid, nullable=False),
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
        sa.Column("created_by", sa.Uuid),
        sa.Column("created_at", Instant, nullable=False),
        sa.Column("updated_at", Instant, nullable=False, comment="the drop's last event"),
        sa.Column("epoch", sa.BigInteger, nullable=False, comment="the fence: raised by each engine that takes over"),
        sa.Column("seq", sa.BigInteger, nullable=False, comment="number of the drop's last event"),
        sa.PrimaryKeyConstraint("id", name="pk_drops"),
        sa.ForeignKeyConstraint(["created_by"], ["users.id"], name="fk_drops_created_by_users"),
        _check("ck_drops_conservation", "available_stock + held_count + sold_count = total_stock"),
        _check("ck_drops_counts", "available_stock >= 0 AND held_count >= 0 AND sold_count >= 0"),
        _check("ck_drops_status", "status IN ('draft', 'scheduled', 'live', 'paused', 'ended', 'cancelled')"),
        _check("ck_drops_window", "ends_at > starts_at"),
        _check("ck_drops_name_length", "char_length(name) BETWEEN 2 AND 200"),
        _check("ck_drops_price", "price >= 0"),
        _check("ck_drops_currency", "char_length(currency) = 3"),
        _check("ck_drops_numbering", "epoch >= 1 AND seq >= 1"),
        postgresql_with={"fillfactor": 50},
    )


def _create_reservations() -> None:
    op.create_table(
        "reservations",
        sa.Column("id", sa.Uuid, nullable=False),
        sa.Column("drop_id", sa.Uuid, nullable=False),
        sa.Column("user_id", sa.Uuid, nullable=False),
        sa.Column("qty", sa.Integer, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("created_at", Instant, nullable=False),
        sa.Column("expires_at", Instant, nullable=False, comment="exclusive: at this instant it is over"),
        sa.Column("resolved_at", Instant),
        sa.Column("seq", sa.BigInteger, nullable=False, comment="number of its RESERVED event"),
        sa.PrimaryKeyConstraint("id", "drop_id", name="pk_reservations"),
        _check("ck_reservations_qty", "qty > 0"),
        _check("ck_reservations_status", "status IN ('active', 'consumed', 'expired', 'cancelled')"),
        _check("ck_reservations_resolved", "(status = 'active') = (resolved_at IS NULL)"),
        _check("ck_reservations_never_expired_early", "status <> 'expired' OR resolved_at >= expires_at"),
        _check(
            "ck_reservations_never_ended_late",
            "status NOT IN ('consumed', 'cancelled') OR resolved_at < expires_at",
        ),
        _check("ck_reservations_instants", "expires_at > created_at AND resolved_at >= created_at"),
    )
    active, ended = sa.text("status = 'active'"), sa.text("status <> 'active'")
    op.create_index(
        "uq_reservations_active", "reservations", ["drop_id", "user_id"], unique=True, postgresql_where=active
    )
    op.create_index("ix_reservations_expires_at", "reservations", ["expires_at"], postgresql_where=active)
    op.create_index(
        "ix_reservations_ended",
        "reservations",
        ["drop_id", "user_id", sa.text("seq DESC")],
        postgresql_include=["status"],
        postgresql_where=ended,
    )


def _create_purchases() -> None:
    op.create_table(
        "purchases",
        sa.Column("id", sa.Uuid, nullable=False),
        sa.Column("drop_id", sa.Uuid, nullable=False),
        sa.Column("user_id", sa.Uuid, nullable=False),
        sa.Column("reservation_id", sa.Uuid, nullable=False),
        sa.Column("qty", sa.Integer, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("created_at", Instant, nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False, comment="number of its PURCHASED event"),
        sa.PrimaryKeyConstraint("id", "drop_id", name="pk_purchases"),
        sa.UniqueConstraint("reservation_id", "drop_id", name="uq_purchases_reservation_id_drop_id"),
        sa.ForeignKeyConstraint(
            ["reservation_id", "drop_id"],
            ["reservations.id", "reservations.drop_id"],
            name="fk_purchases_reservation_id_reservations",
        ),
        _check("ck_purchases_qty", "qty > 0"),
        _check("ck_purchases_status", "status = 'paid'"),
    )
    op.create_index("ix_purchases_latest", "purchases", ["drop_id", sa.text("seq DESC")])
    op.create_index("ix_purchases_of_user", "purchases", ["user_id", sa.text("created_at DESC"), sa.text("id DESC")])


def _create_drop_events() -> None:
    op.create_table(
        "drop_events",
        sa.Column("drop_id", sa.Uuid, nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
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
        sa.PrimaryKeyConstraint("drop_id", "seq", name="pk_drop_events"),
        _check(
            "ck_drop_events_type",
            "type IN ('DROP_CREATED', 'DROP_UPDATED', 'RESERVED', 'PURCHASED', 'CANCELLED', 'EXPIRED')",
        ),
        _check("ck_drop_events_numbering", "seq >= 1 AND epoch >= 1"),
        _check(
            "ck_drop_events_shape",
            "type IN ('DROP_CREATED', 'DROP_UPDATED') AND status IS NOT NULL AND reservation_id IS NULL"
            " OR num_nulls(reservation_id, user_id, qty, expires_at, available_stock) = 0 AND status IS NULL",
        ),
        _check("ck_drop_events_purchase", "(type = 'PURCHASED') = (purchase_id IS NOT NULL)"),
        _check("ck_drop_events_created_first", "(type = 'DROP_CREATED') = (seq = 1)"),
    )


def _create_idempotency_keys() -> None:
    op.create_table(
        "idempotency_keys",
        sa.Column("user_id", sa.Uuid, nullable=False),
        sa.Column("operation", sa.Text, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("drop_id", sa.Uuid, nullable=False),
        sa.Column("fingerprint", sa.LargeBinary, nullable=False),
        sa.Column("status_code", sa.SmallInteger, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("created_at", Instant, nullable=False),
        sa.PrimaryKeyConstraint("user_id", "operation", "key", name="pk_idempotency_keys"),
    )
    op.create_index("ix_idempotency_keys_created_at", "idempotency_keys", ["created_at"])


def _check(name: str, condition: str) -> sa.CheckConstraint:
    # op.f: the name is final; without it the naming convention would be applied on top.
    return sa.CheckConstraint(condition, name=op.f(name))
