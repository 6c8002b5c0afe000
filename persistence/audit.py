"""The invariants as SQL: each check selects the rows that violate it, so nothing found means that it holds.

All run in one REPEATABLE READ snapshot, so they may run beside a busy engine: whatever is committed together
is seen together. They take the tables at their word and each other's: the log of events is replayed, and must
lead to the rows that are there. Constraints of the schema are checked again, since a constraint can be
dropped.

Synchronous; the command line prints the results.
"""

from dataclasses import dataclass
from typing import Any, Final

import psycopg
from psycopg import sql
from psycopg.rows import dict_row

ROWS_SHOWN_MAX: Final = 20


@dataclass(frozen=True, slots=True)
class Check:
    """`sql` selects the violations. `invariant` is the number in the list of invariants, or "replay"."""

    name: str
    invariant: str
    title: str
    sql: str


@dataclass(frozen=True, slots=True)
class Result:
    """What a check found: how many violations, and the first `ROWS_SHOWN_MAX` of them."""

    check: Check
    count: int
    rows: tuple[dict[str, Any], ...]

    @property
    def holds(self) -> bool:
        return self.count == 0


def run(dsn: str) -> list[Result]:
    """Run every check against one snapshot; changes nothing.

    Raises:
        psycopg.Error: the database is out of reach, or has another schema.
    """
    with psycopg.connect(dsn, row_factory=dict_row) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.read_only = True
        return [_run(connection, check) for check in CHECKS]


def _run(connection: psycopg.Connection[dict[str, Any]], check: Check) -> Result:
    # Our own constant text; SQL() asks for a literal to keep anything else out.
    violations = sql.SQL(check.sql)
    limited = sql.SQL("SELECT * FROM ({}) AS violation LIMIT {}").format(violations, ROWS_SHOWN_MAX)
    rows = connection.execute(limited).fetchall()
    count = len(rows)
    if count == ROWS_SHOWN_MAX:
        counted = connection.execute(sql.SQL("SELECT count(*) AS n FROM ({}) AS violation").format(violations))
        row = counted.fetchone()
        assert row is not None
        count = row["n"]
    return Result(check, count, tuple(rows))


_ENDS: Final = "type IN ('PURCHASED', 'CANCELLED', 'EXPIRED')"

CHECKS: Final = (
    Check(
        "conservation",
        "I1",
        "available, held and sold units add up to the total, and none is negative",
        """
        SELECT id, total_stock, available_stock, held_count, sold_count FROM drops
        WHERE available_stock + held_count + sold_count <> total_stock
           OR available_stock < 0 OR held_count < 0 OR sold_count < 0
        """,
    ),
    Check(
        "held_count",
        "I2",
        "a drop's held count is the sum of its active reservations",
        """
        SELECT drop_id, drops.held_count, coalesce(active.qty, 0) AS active_qty
        FROM (SELECT id AS drop_id, held_count FROM drops) AS drops
        FULL JOIN (SELECT drop_id, sum(qty) AS qty FROM reservations WHERE status = 'active' GROUP BY drop_id)
             AS active USING (drop_id)
        WHERE drops.held_count IS DISTINCT FROM coalesce(active.qty, 0)
        """,
    ),
    Check(
        "sold_count",
        "I2",
        "a drop's sold count is the sum of its purchases",
        """
        SELECT drop_id, drops.sold_count, coalesce(bought.qty, 0) AS purchased_qty
        FROM (SELECT id AS drop_id, sold_count FROM drops) AS drops
        FULL JOIN (SELECT drop_id, sum(qty) AS qty FROM purchases GROUP BY drop_id) AS bought USING (drop_id)
        WHERE drops.sold_count IS DISTINCT FROM coalesce(bought.qty, 0)
        """,
    ),
    Check(
        "one_active_reservation",
        "I5",
        "a user has at most one active reservation of a drop",
        """
        SELECT drop_id, user_id, count(*) AS active FROM reservations WHERE status = 'active'
        GROUP BY drop_id, user_id HAVING count(*) > 1
        """,
    ),
    Check(
        "purchased_in_time",
        "I6",
        "a purchase was decided before its reservation's deadline",
        """
        SELECT purchases.id, purchases.drop_id, purchases.created_at, reservations.resolved_at,
               reservations.expires_at, drop_events.at
        FROM purchases
        LEFT JOIN reservations
          ON reservations.id = purchases.reservation_id AND reservations.drop_id = purchases.drop_id
        LEFT JOIN drop_events ON drop_events.drop_id = purchases.drop_id AND drop_events.seq = purchases.seq
        WHERE greatest(purchases.created_at, reservations.resolved_at, drop_events.at)
              >= least(reservations.expires_at, drop_events.expires_at)
        """,
    ),
    Check(
        "never_expired_early",
        "I7",
        "no reservation expired before its deadline",
        """ SELECT reservations.id, reservations.drop_id, resolved_at, expires_at FROM reservations WHERE
        status = 'expired' AND resolved_at < expires_at UNION ALL SELECT reservation_id, drop_id, at,
        expires_at FROM drop_events WHERE type = 'EXPIRED' AND at < expires_at """,
    ),
    Check(
        "consumed_means_purchased",
        "I9",
        "a consumed reservation has exactly one purchase",
        """
        SELECT reservations.id, reservations.drop_id, count(purchases.id) AS purchases
        FROM reservations
        LEFT JOIN purchases
          ON purchases.reservation_id = reservations.id AND purchases.drop_id = reservations.drop_id
        WHERE reservations.status = 'consumed'
        GROUP BY reservations.id, reservations.drop_id
        HAVING count(purchases.id) <> 1
        """,
    ),
    Check(
        "purchased_means_consumed",
        "I9",
        "a purchase has a consumed reservation, of the same user and quantity",
        """
        SELECT purchases.id, purchases.drop_id, purchases.reservation_id, reservations.status
        FROM purchases
        LEFT JOIN reservations
          ON reservations.id = purchases.reservation_id AND reservations.drop_id = purchases.drop_id
        WHERE reservations.status IS DISTINCT FROM 'consumed'
           OR (reservations.user_id, reservations.qty) <> (purchases.user_id, purchases.qty)
        """,
    ),
    Check(
        "ends_once",
        "I9",
        "a reservation ends at most once, and after it began",
        f"""
        SELECT drop_id, reservation_id, array_agg(type ORDER BY seq) AS types
        FROM drop_events WHERE reservation_id IS NOT NULL
        GROUP BY drop_id, reservation_id
        HAVING count(*) FILTER (WHERE {_ENDS}) > 1 OR (array_agg(type ORDER BY seq))[1] <> 'RESERVED'
        """,
    ),
    Check(
        "numbered_without_gap",
        "I10",
        "a drop's events are numbered 1, 2, 3 … up to its seq",
        """
        SELECT drop_id, drops.seq, events.count, events.first, events.last
        FROM (SELECT id AS drop_id, seq FROM drops) AS drops
        FULL JOIN (
            SELECT drop_id, count(*) AS count, count(DISTINCT seq) AS numbers, min(seq) AS first, max(seq) AS
            last FROM drop_events GROUP BY drop_id
        ) AS events USING (drop_id)
        WHERE (drops.seq, drops.seq, drops.seq, 1) IS DISTINCT FROM (count, numbers, last, first)
        """,
    ),
    Check(
        "one_effect_a_key",
        "I14",
        "a user's key is used once",
        """
        SELECT user_id, operation, key, count(*) AS receipts FROM idempotency_keys
        GROUP BY user_id, operation, key HAVING count(*) > 1
        """,
    ),
    Check(
        "epochs_never_fall",
        "I15",
        "no event of an old epoch follows one of a new epoch",
        """
        SELECT drop_id, seq, epoch, before, drops_epoch
        FROM (
            SELECT drop_events.drop_id, drop_events.seq, drop_events.epoch, drops.epoch AS drops_epoch,
                   lag(drop_events.epoch) OVER (PARTITION BY drop_id ORDER BY drop_events.seq) AS before
            FROM drop_events JOIN drops ON drops.id = drop_events.drop_id
        ) AS event
        WHERE epoch < before OR epoch > drops_epoch
        """,
    ),
    Check(
        "time_never_runs_back",
        "I19",
        "a drop's events are in the order of their instants, up to its updated_at",
        """
        SELECT drop_id, seq, at, before, updated_at
        FROM (
            SELECT drop_events.drop_id, drop_events.seq, at, drops.seq AS last, updated_at,
                   lag(at) OVER (PARTITION BY drop_id ORDER BY drop_events.seq) AS before
            FROM drop_events JOIN drops ON drops.id = drop_events.drop_id
        ) AS event
        WHERE at < before OR (seq = last AND at <> updated_at)
        """,
    ),
    Check(
        "stock_replays",
        "replay",
        "the events, replayed, give the stock that each of them states, and in the end the drop's",
        """
        SELECT drop_id, event.seq, stated, replayed, drops.available_stock
        FROM (
            SELECT drop_id, seq, available_stock AS stated,
                   sum(CASE type WHEN 'DROP_CREATED' THEN available_stock WHEN 'RESERVED' THEN -qty
                                 WHEN 'CANCELLED' THEN qty WHEN 'EXPIRED' THEN qty ELSE 0 END)
                   OVER (PARTITION BY drop_id ORDER BY seq) AS replayed
            FROM drop_events
        ) AS event
        JOIN drops ON drops.id = event.drop_id
        WHERE stated <> replayed OR (event.seq = drops.seq AND replayed <> drops.available_stock)
        """,
    ),
    Check(
        "status_replays",
        "replay",
        "a drop's status is the last one that an event gave it, and its terms are those of its birth",
        """
        SELECT drops.id, drops.status, given.status AS given, born.data
        FROM drops
        LEFT JOIN LATERAL (
            SELECT status FROM drop_events WHERE drop_id = drops.id AND drop_events.status IS NOT NULL
            ORDER BY seq DESC LIMIT 1
        ) AS given ON true
        LEFT JOIN drop_events AS born ON born.drop_id = drops.id AND born.seq = 1
        WHERE drops.status IS DISTINCT FROM given.status
           OR (drops.name, drops.price::text, drops.currency, drops.total_stock::text) IS DISTINCT FROM
              (born.data->>'name', born.data->>'price', born.data->>'currency', born.data->>'total_stock')
        """,
    ),
    Check(
        "reservations_replay",
        "replay",
        "each reservation has its RESERVED event, and the reverse",
        """
        SELECT coalesce(event.drop_id, reservations.drop_id) AS drop_id, event.seq, event.reservation_id,
               reservations.id
        FROM (SELECT * FROM drop_events WHERE type = 'RESERVED') AS event
        FULL JOIN reservations ON reservations.drop_id = event.drop_id AND reservations.seq = event.seq
        WHERE (event.reservation_id, event.user_id, event.qty, event.at, event.expires_at) IS DISTINCT FROM
              (reservations.id, reservations.user_id, reservations.qty, created_at, reservations.expires_at)
        """,
    ),
    Check(
        "ends_replay",
        "replay",
        "each reservation that is over has the event that ended it, and the reverse",
        f"""
        SELECT coalesce(event.drop_id, ended.drop_id) AS drop_id, event.seq, event.type, event.reservation_id,
               ended.id, ended.status
        FROM (SELECT * FROM drop_events WHERE {_ENDS}) AS event
        FULL JOIN (SELECT * FROM reservations WHERE status <> 'active') AS ended
          ON ended.drop_id = event.drop_id AND ended.id = event.reservation_id
        WHERE (event.type, event.at, event.user_id, event.qty, event.expires_at) IS DISTINCT FROM
              (CASE ended.status WHEN 'consumed' THEN 'PURCHASED' ELSE upper(ended.status) END,
               ended.resolved_at, ended.user_id, ended.qty, ended.expires_at)
        """,
    ),
    Check(
        "purchases_replay",
        "replay",
        "each purchase has its PURCHASED event, and the reverse",
        """ SELECT coalesce(event.drop_id, purchases.drop_id) AS drop_id, event.seq, event.purchase_id,
        purchases.id FROM (SELECT * FROM drop_events WHERE type = 'PURCHASED') AS event FULL JOIN purchases ON
        purchases.drop_id = event.drop_id AND purchases.seq = event.seq WHERE (event.purchase_id,
        event.reservation_id, event.user_id, event.qty, event.at) IS DISTINCT FROM
              (purchases.id, purchases.reservation_id, purchases.user_id, purchases.qty, purchases.created_at)
        """,
    ),
    Check(
        "no_orphans",
        "replay",
        "no row names a drop that does not exist",
        """
        SELECT * FROM (
            SELECT 'reservations' AS of, drop_id FROM reservations
            UNION ALL SELECT 'purchases', drop_id FROM purchases
            UNION ALL SELECT 'drop_events', drop_id FROM drop_events
            UNION ALL SELECT 'idempotency_keys', drop_id FROM idempotency_keys
        ) AS named
        WHERE NOT EXISTS (SELECT FROM drops WHERE drops.id = named.drop_id)
        """,
    ),
)
