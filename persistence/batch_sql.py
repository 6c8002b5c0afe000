"""The statement that writes a batch: one for births, one for changes of existing drops, one for reserves alone.

Text, unlike the rest of our SQL (`persistence.statements`): it is one long chain of data-modifying CTEs over
`unnest`, and SQLAlchemy's form of it is twice as long and shows its shape no better. `persistence.encoding`
makes the parameters.

A batch is three sets of rows, each sent as parallel arrays: its parts (one a drop), their events, their
receipts. Events and receipts name their part by its position in the batch, from 1. Rows of `drops` are locked in
the order of their ids, so that no two statements can deadlock over them.

The plans are made once, while the tables may still be empty, so nothing here may lean on what the planner knows of
them. Two things that cost dearly before: whatever stands beside `hit` in the last FROM is computed anew for each of
its rows (an aggregate: 40 µs a drop), so there is one row only; and a condition that a partial index implies may be
looked up there, among all holds of the drop.
"""

from typing import Final

Columns = tuple[tuple[str, str], ...]

_GUARDED: Final[Columns] = (
    ("ordinal", "int"),
    ("drop_id", "uuid"),
    ("epoch", "bigint"),
    ("from_seq", "bigint"),
    ("to_seq", "bigint"),
    ("updated_at", "timestamptz"),
)

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
    *_GUARDED,
    ("status", "text"),
    ("available_delta", "bigint"),
    ("held_delta", "bigint"),
    ("sold_delta", "bigint"),
    *_EXPECTED,
)

RESERVE_COLUMNS: Final[Columns] = (
    *_GUARDED,
    ("reserved_qty", "bigint"),
    ("stated_stock", "bigint"),
    ("reserved_rows", "int"),
    ("receipt_rows", "int"),
)

BIRTH_COLUMNS: Final[Columns] = (
    *PART_COLUMNS,
    ("name", "text"),
    ("price", "bigint"),
    ("currency", "text"),
    ("total_stock", "bigint"),
    # Whole milliseconds: so they are logged, and become timestamps here.
    ("starts_at", "bigint"),
    ("ends_at", "bigint"),
    ("created_by", "uuid"),
    ("created_at", "bigint"),
)

RESERVED_COLUMNS: Final[Columns] = (
    ("part", "int"),
    ("seq", "bigint"),
    ("at", "timestamptz"),
    ("reservation_id", "uuid"),
    ("user_id", "uuid"),
    ("qty", "int"),
    ("expires_at", "timestamptz"),
    ("available_stock", "bigint"),
)

EVENT_COLUMNS: Final[Columns] = (
    *RESERVED_COLUMNS,
    ("type", "text"),
    ("purchase_id", "uuid"),
    ("status", "text"),
    # What its reservation is afterwards: of RESERVED, at the end of the change; else where it was there
    # before.
    ("outcome", "text"),
    ("resolved_at", "timestamptz"),
)

RECEIPT_COLUMNS: Final[Columns] = (
    ("part", "int"),
    ("user_id", "uuid"),
    ("operation", "text"),
    ("key", "text"),
    ("fingerprint", "bytea"),
    ("status_code", "smallint"),
    ("body", "bytea"),
    ("created_at", "timestamptz"),
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


def _rows(columns: Columns, first: int) -> str:
    """A set of rows from one array parameter a column; the parameters are numbered from `first`."""
    # In the select list they step together. In FROM each fills a buffer of its own: 0.9 against 0.6 µs an event.
    return "SELECT " + ", ".join(f"unnest(${first + n}::{kind}[]) AS {name}" for n, (name, kind) in enumerate(columns))


def _write(parts: Columns, hit: str, *, reserves_only: bool = False) -> str:
    """The statement that writes a batch, given the CTEs that end in `hit`: the parts whose guard holds.

    Everything is joined to `hit`, so each drop's part stands or falls by its own guard. Data-modifying CTEs
    run on one snapshot and don't see each other's rows; hence a reservation that was taken and ended in one
    change is inserted as ended. And they run in any order, except where one reads another's result: `taken`
    reads `ended`, since a user may give a hold back and take the next in one change, and only one may be
    active. At the end the numbers of rows are compared with what the parts expect; a difference raises (the
    text is no integer), and so nothing of the batch happens.
    """
    columns = RESERVED_COLUMNS if reserves_only else EVENT_COLUMNS
    ended_rows = "0" if reserves_only else "(SELECT count(*) FROM ended)"
    sold_rows = "0" if reserves_only else "(SELECT count(*) FROM sold)"
    return f"""
WITH part AS ({_rows(parts, 1)}),
{hit},
event AS MATERIALIZED (
    SELECT hit.drop_id, hit.epoch, {_names(columns[1:], "event")}{"" if reserves_only else ", " + _DATA}
    FROM ({_rows(columns, 1 + len(parts))}) AS event JOIN hit ON hit.ordinal = event.part
),{_RESERVES if reserves_only else _CHANGES}
kept AS (
    INSERT INTO idempotency_keys (user_id, operation, key, drop_id, fingerprint, status_code, body, created_at)
    SELECT receipt.user_id, receipt.operation, receipt.key, hit.drop_id, receipt.fingerprint,
           receipt.status_code, receipt.body, receipt.created_at
    FROM ({_rows(RECEIPT_COLUMNS, 1 + len(parts) + len(columns))}) AS receipt JOIN hit ON hit.ordinal = receipt.part
    RETURNING 1
),
done AS MATERIALIZED (
    SELECT ARRAY[(SELECT count(*) FROM logged), (SELECT count(*) FROM taken), {ended_rows}, {sold_rows},
                 (SELECT count(*) FROM kept), 0] AS rows
),
due AS (
    SELECT ARRAY[sum(to_seq - from_seq), sum(reserved_rows), sum(ended_rows), sum(purchase_rows),
                 sum(receipt_rows), count(*) FILTER (WHERE available_stock <> stated_stock)]::bigint[] AS rows,
           array_agg(ordinal) AS ordinals
    FROM hit
    HAVING count(*) > 0
)
SELECT due.ordinals,
       CASE WHEN done.rows = due.rows THEN 0
            ELSE ('row counts (events, reserved, ended, purchases, receipts, stock differs) are '
                  || done.rows::text || ' where ' || due.rows::text || ' are due')::int END
FROM done, due
"""


_DATA: Final = "CASE event.type WHEN 'DROP_CREATED' THEN hit.data END AS data"

_CHANGES: Final = """
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
    WHERE event.type <> 'RESERVED' AND event.outcome IS NOT NULL
      -- Says "active" as the row's CHECK does, but not in the words of a partial index: so it is the primary key.
      AND reservations.resolved_at IS NULL
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
),"""

_RESERVES: Final = """
logged AS (
    INSERT INTO drop_events (drop_id, seq, epoch, type, at, reservation_id, user_id, qty, expires_at, available_stock)
    SELECT drop_id, seq, epoch, 'RESERVED', at, reservation_id, user_id, qty, expires_at, available_stock
    FROM event
    RETURNING 1
),
taken AS (
    INSERT INTO reservations (id, drop_id, user_id, qty, status, created_at, expires_at, seq)
    SELECT reservation_id, drop_id, user_id, qty, 'active', at, expires_at, seq
    FROM event
    RETURNING 1
),"""


_LOCKED: Final = """
locked AS MATERIALIZED (
    SELECT part.*
    FROM part JOIN drops ON drops.id = part.drop_id
    WHERE drops.epoch = part.epoch AND drops.seq = part.from_seq
    ORDER BY drops.id
    FOR NO KEY UPDATE OF drops
)"""

_RETURNED: Final = "part.ordinal, part.drop_id, part.epoch, part.from_seq, part.to_seq"

COMMIT: Final = _write(
    PART_COLUMNS,
    f"""{_LOCKED},
hit AS (
    UPDATE drops
    SET available_stock = drops.available_stock + part.available_delta,
        held_count = drops.held_count + part.held_delta,
        sold_count = drops.sold_count + part.sold_delta,
        status = coalesce(part.status, drops.status),
        updated_at = coalesce(part.updated_at, drops.updated_at),
        seq = part.to_seq
    FROM locked AS part
    WHERE drops.id = part.drop_id AND drops.epoch = part.epoch AND drops.seq = part.from_seq
      AND drops.available_stock + part.available_delta >= 0
    RETURNING {_RETURNED}, {_names(_EXPECTED, "part")}, drops.available_stock, NULL::jsonb AS data
)""",
)
"""Write changes of existing drops; one row, (positions of the parts whose guard hit, 0), or none if none did."""

RESERVE: Final = _write(
    RESERVE_COLUMNS,
    f"""{_LOCKED},
hit AS (
    UPDATE drops
    SET available_stock = drops.available_stock - part.reserved_qty,
        held_count = drops.held_count + part.reserved_qty,
        updated_at = coalesce(part.updated_at, drops.updated_at),
        seq = part.to_seq
    FROM locked AS part
    WHERE drops.id = part.drop_id AND drops.epoch = part.epoch AND drops.seq = part.from_seq
      AND drops.available_stock - part.reserved_qty >= 0
    RETURNING {_RETURNED}, part.stated_stock, part.reserved_rows, 0 AS ended_rows, 0 AS purchase_rows,
              part.receipt_rows, drops.available_stock
)""",
    reserves_only=True,
)
"""The same where every event is RESERVED: fewer columns, no rows to end or sell, less for the server to set up."""

BIRTH: Final = _write(
    BIRTH_COLUMNS,
    f"""
born AS (
    INSERT INTO drops (id, name, price, currency, total_stock, available_stock, held_count, sold_count,
                       starts_at, ends_at, status, created_by, created_at, updated_at, epoch, seq)
    SELECT drop_id, name, price, currency, total_stock, total_stock + available_delta, held_delta, sold_delta,
           {instant("starts_at")}, {instant("ends_at")}, status, created_by, {instant("created_at")},
           updated_at, epoch, to_seq
    FROM part
    ORDER BY drop_id
    ON CONFLICT (id) DO NOTHING
    RETURNING id, available_stock
),
hit AS (
    SELECT {_RETURNED}, {_names(_EXPECTED, "part")},
           born.available_stock,
           jsonb_build_object(
               'name', name, 'price', price, 'currency', currency, 'total_stock', total_stock,
               'starts_at', starts_at, 'ends_at', ends_at, 'created_by', created_by, 'created_at', created_at
           ) AS data
    FROM part JOIN born ON born.id = part.drop_id
)""",
)
"""Write drops that did not exist yet, with all their events; a drop whose id exists is left as it is."""

STATEMENTS: Final = {b"commit": COMMIT, b"reserve": RESERVE, b"birth": BIRTH}
"""By the names under which they are prepared."""
