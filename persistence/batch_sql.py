"""The statement that writes a batch: one for births, one for changes of existing drops.

Text, unlike the rest of our SQL (`persistence.statements`): it is one long chain of data-modifying CTEs over
`unnest`, and SQLAlchemy's form of it is twice as long and shows its shape no better. `persistence.encoding`
makes the parameters.

A batch is three sets of rows, each sent as parallel arrays: its parts (one a drop), their events, their
receipts. Events and receipts name their part by its position in the batch, from 1. An instant travels as
whole milliseconds and becomes a timestamptz here, exactly. Rows of `drops` are locked in the order of their
ids, so that no two statements can deadlock over them.
"""

from typing import Final

Columns = tuple[tuple[str, str], ...]

# `*_delta` is what the part's events add up to, `*_rows` how many rows of each kind they must touch, and
# `stated_stock` what the last of them says is available: the statement compares these with what it did.
_EXPECTED: Final[Columns] = (
    ("stated_stock", "bigint"),
    ("reserved_rows", "int"),
    ("ended_rows", "int"),
    ("purchase_rows", "int"),
    ("receipt_rows", "int"),
)

PART_COLUMNS: Final[Columns] = (
    ("drop_id", "uuid"),
    ("epoch", "bigint"),
    ("from_seq", "bigint"),
    ("to_seq", "bigint"),
    ("updated_at", "bigint"),
    ("status", "text"),
    ("available_delta", "bigint"),
    ("held_delta", "bigint"),
    ("sold_delta", "bigint"),
    *_EXPECTED,
)

BIRTH_COLUMNS: Final[Columns] = (
    *PART_COLUMNS,
    ("name", "text"),
    ("price", "bigint"),
    ("currency", "text"),
    ("total_stock", "bigint"),
    ("starts_at", "bigint"),
    ("ends_at", "bigint"),
    ("created_by", "uuid"),
    ("created_at", "bigint"),
)

EVENT_COLUMNS: Final[Columns] = (
    ("part", "int"),
    ("seq", "bigint"),
    ("type", "text"),
    ("at", "bigint"),
    ("reservation_id", "uuid"),
    ("user_id", "uuid"),
    ("qty", "int"),
    ("expires_at", "bigint"),
    ("purchase_id", "uuid"),
    ("available_stock", "bigint"),
    ("status", "text"),
    # What its reservation is afterwards: of RESERVED, at the end of the change; else where it was there
    # before.
    ("outcome", "text"),
    ("resolved_at", "bigint"),
)

RECEIPT_COLUMNS: Final[Columns] = (
    ("part", "int"),
    ("user_id", "uuid"),
    ("operation", "text"),
    ("key", "text"),
    ("fingerprint", "bytea"),
    ("status_code", "smallint"),
    ("body", "bytea"),
    ("created_at", "bigint"),
)


def instant(milliseconds: str) -> str:
    """SQL for the timestamptz that is so many milliseconds after the epoch, exact for every year.

    to_timestamp() goes through a double, which is off by microseconds from the year 2106 on; an interval of
    milliseconds alone is off from the year 4253 on. Hours, not days: a day is 23 hours long in some zones.
    """
    return (
        f"(timestamptz 'epoch' + {milliseconds} / 86400000 * interval '24 hours'"
        f" + {milliseconds} % 86400000 * interval '1 millisecond')"
    )


def _names(columns: Columns, of: str) -> str:
    return ", ".join(f"{of}.{name}" for name, _ in columns)


def _rows(columns: Columns, alias: str, first: int) -> str:
    """A set of rows from one array parameter a column, numbered from `first`."""
    arrays = ", ".join(f"${first + n}::{kind}[]" for n, (_, kind) in enumerate(columns))
    return f"unnest({arrays}) WITH ORDINALITY AS {alias}({', '.join(name for name, _ in columns)}, ordinal)"


def _write(parts: Columns, hit: str) -> str:
    """The statement that writes a batch, given the CTEs that end in `hit`: the parts whose guard holds.

    Everything is joined to `hit`, so each drop's part stands or falls by its own guard. Data-modifying CTEs
    run on one snapshot and don't see each other's rows; hence a reservation that was taken and ended in one
    change is inserted as ended. And they run in any order, except where one reads another's result: `taken`
    reads `ended`, since a user may give a hold back and take the next in one change, and only one may be
    active. At the end the numbers of rows are compared with what the parts expect; a difference raises (the
    text is no integer), and so nothing of the batch happens.
    """
    return f"""
WITH part AS (SELECT part.* FROM {_rows(parts, "part", 1)}),
{hit},
event AS MATERIALIZED (
    SELECT hit.drop_id, hit.epoch, event.seq, event.type, {instant("event.at")} AS at, event.reservation_id,
           event.user_id, event.qty, {instant("event.expires_at")} AS expires_at, event.purchase_id,
           event.available_stock, event.status, event.outcome,
           {instant("event.resolved_at")} AS resolved_at, CASE event.type WHEN 'DROP_CREATED' THEN hit.data END AS data
    FROM {_rows(EVENT_COLUMNS, "event", 1 + len(parts))} JOIN hit ON hit.ordinal = event.part
),
logged AS (
    INSERT INTO drop_events (drop_id, seq, epoch, type, at, reservation_id, user_id, qty, expires_at,
                             purchase_id, available_stock, status, data)
    SELECT drop_id, seq, epoch, type, at, reservation_id, user_id, qty, expires_at,
           purchase_id, available_stock, status, data
    FROM event
    RETURNING 1
),
ended AS (
    UPDATE reservations
    SET status = event.outcome, resolved_at = event.resolved_at
    FROM event
    WHERE event.type <> 'RESERVED' AND event.outcome IS NOT NULL AND reservations.status = 'active'
      AND reservations.id = event.reservation_id AND reservations.drop_id = event.drop_id
    RETURNING 1
),
taken AS (
    INSERT INTO reservations (id, drop_id, user_id, qty, status, created_at, expires_at, resolved_at, seq)
    SELECT reservation_id, drop_id, user_id, qty, outcome, at, expires_at, resolved_at, seq
    FROM event
    WHERE type = 'RESERVED' AND (SELECT count(*) FROM ended) >= 0
    RETURNING 1
),
sold AS (
    INSERT INTO purchases (id, drop_id, user_id, reservation_id, qty, status, created_at, seq)
    SELECT purchase_id, drop_id, user_id, reservation_id, qty, 'paid', at, seq
    FROM event
    WHERE type = 'PURCHASED'
    RETURNING 1
),
kept AS (
    INSERT INTO idempotency_keys (user_id, operation, key, drop_id, fingerprint, status_code, body, created_at)
    SELECT receipt.user_id, receipt.operation, receipt.key, hit.drop_id, receipt.fingerprint,
           receipt.status_code, receipt.body, {instant("receipt.created_at")}
    FROM {_rows(RECEIPT_COLUMNS, "receipt", 1 + len(parts) + len(EVENT_COLUMNS))}
    JOIN hit ON hit.ordinal = receipt.part
    RETURNING 1
),
done AS (
    SELECT ARRAY[(SELECT count(*) FROM logged), (SELECT count(*) FROM taken), (SELECT count(*) FROM ended),
                 (SELECT count(*) FROM sold), (SELECT count(*) FROM kept), 0] AS rows
),
due AS (
    SELECT ARRAY[sum(to_seq - from_seq), sum(reserved_rows), sum(ended_rows), sum(purchase_rows),
                 sum(receipt_rows), count(*) FILTER (WHERE available_stock <> stated_stock)]::bigint[] AS rows
    FROM hit
)
SELECT hit.ordinal,
       CASE WHEN done.rows = due.rows THEN 0
            ELSE ('row counts (events, reserved, ended, purchases, receipts, stock differs) are '
                  || done.rows::text || ' where ' || due.rows::text || ' are due')::int END
FROM hit, done, due
"""


COMMIT: Final = _write(
    PART_COLUMNS,
    f"""
locked AS MATERIALIZED (
    SELECT part.*
    FROM part JOIN drops ON drops.id = part.drop_id
    WHERE drops.epoch = part.epoch AND drops.seq = part.from_seq
    ORDER BY drops.id
    FOR NO KEY UPDATE OF drops
),
hit AS (
    UPDATE drops
    SET available_stock = drops.available_stock + part.available_delta,
        held_count = drops.held_count + part.held_delta,
        sold_count = drops.sold_count + part.sold_delta,
        status = coalesce(part.status, drops.status),
        updated_at = coalesce({instant("part.updated_at")}, drops.updated_at),
        seq = part.to_seq
    FROM locked AS part
    WHERE drops.id = part.drop_id AND drops.epoch = part.epoch AND drops.seq = part.from_seq
      AND drops.available_stock + part.available_delta >= 0
    RETURNING part.ordinal, part.drop_id, part.epoch, part.from_seq, part.to_seq, {_names(_EXPECTED, "part")},
              drops.available_stock, NULL::jsonb AS data
)""",
)
"""Write changes of existing drops; one row, (position of the part, 0), for each whose guard hit."""

BIRTH: Final = _write(
    BIRTH_COLUMNS,
    f"""
born AS (
    INSERT INTO drops (id, name, price, currency, total_stock, available_stock, held_count, sold_count,
                       starts_at, ends_at, status, created_by, created_at, updated_at, epoch, seq)
    SELECT drop_id, name, price, currency, total_stock, total_stock + available_delta, held_delta, sold_delta,
           {instant("starts_at")}, {instant("ends_at")}, status, created_by, {instant("created_at")},
           {instant("updated_at")}, epoch, to_seq
    FROM part
    ORDER BY drop_id
    ON CONFLICT (id) DO NOTHING
    RETURNING id, available_stock
),
hit AS (
    SELECT part.ordinal, part.drop_id, part.epoch, part.from_seq, part.to_seq, {_names(_EXPECTED, "part")},
           born.available_stock,
           jsonb_build_object(
               'name', name, 'price', price, 'currency', currency, 'total_stock', total_stock,
               'starts_at', starts_at, 'ends_at', ends_at, 'created_by', created_by, 'created_at', created_at
           ) AS data
    FROM part JOIN born ON born.id = part.drop_id
)""",
)
"""Write drops that did not exist yet, with all their events; a drop whose id exists is left as it is."""
