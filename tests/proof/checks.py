"""What a history and the tables say about each other, and about the invariants.

Its own SQL and its own model of a drop, written apart from the product's audit, which is asked too: two checkers of
one thing see more than one. Every check returns its findings as sentences; none is what a test wants.
"""

from collections.abc import Iterable
from typing import Any, Final

import psycopg
from psycopg import sql
from psycopg.rows import dict_row

from persistence import audit
from tests.proof.clients import Exchange, History

Row = dict[str, Any]

# The engine rounds its instants down to the millisecond, and its clock runs on from one look at the wall's.
CLOCK_SLACK_S: Final = 0.05

_VIOLATIONS: Final = {
    "I1 conservation": "SELECT id FROM drops WHERE available_stock + held_count + sold_count <> total_stock"
    " OR least(available_stock, held_count, sold_count) < 0",
    "I2 held_count": "SELECT d.id FROM drops d WHERE held_count <> (SELECT coalesce(sum(qty), 0) FROM reservations"
    " WHERE drop_id = d.id AND status = 'active')",
    "I2 sold_count": "SELECT d.id FROM drops d WHERE sold_count <> (SELECT coalesce(sum(qty), 0) FROM purchases"
    " WHERE drop_id = d.id)",
    "I5 one active": "SELECT drop_id FROM reservations WHERE status = 'active' GROUP BY drop_id, user_id"
    " HAVING count(*) > 1",
    "I6 bought late": "SELECT p.id FROM purchases p JOIN reservations r ON r.id = p.reservation_id"
    " WHERE p.created_at >= r.expires_at",
    "I7 expired early": "SELECT id FROM reservations WHERE status = 'expired' AND resolved_at < expires_at",
    "I9 consumed without purchase": "SELECT r.id FROM reservations r LEFT JOIN purchases p ON p.reservation_id = r.id"
    " WHERE (r.status = 'consumed') <> (p.id IS NOT NULL)",
    "I10 numbering": "SELECT d.id FROM drops d LEFT JOIN drop_events e ON e.drop_id = d.id GROUP BY d.id"
    " HAVING count(e.seq) <> d.seq OR max(e.seq) <> d.seq OR min(e.seq) <> 1",
    "I15 epochs fall": "SELECT drop_id FROM (SELECT drop_id, epoch, lag(epoch) OVER w AS before FROM drop_events"
    " WINDOW w AS (PARTITION BY drop_id ORDER BY seq)) e WHERE epoch < before",
    "I19 time runs back": "SELECT drop_id FROM (SELECT drop_id, at, lag(at) OVER w AS before FROM drop_events"
    " WINDOW w AS (PARTITION BY drop_id ORDER BY seq)) e WHERE at < before",
    "orphan keys": "SELECT k.key FROM idempotency_keys k LEFT JOIN drops d ON d.id = k.drop_id WHERE d.id IS NULL",
}


def rows(dsn: str, query: str, *parameters: object) -> list[Row]:
    with psycopg.connect(dsn, autocommit=True, row_factory=dict_row) as connection:
        return connection.execute(sql.SQL(query), parameters).fetchall()


def number(dsn: str, query: str, *parameters: object) -> int:
    (row,) = rows(dsn, query, *parameters)
    return int(next(iter(row.values())) or 0)


def violations(dsn: str) -> list[str]:
    """Broken invariants, in one snapshot of the tables."""
    found: list[str] = []
    with psycopg.connect(dsn, row_factory=dict_row) as connection:
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        for name, query in _VIOLATIONS.items():
            found += [f"{name}: {row}" for row in connection.execute(sql.SQL(query)).fetchall()]
        drops = connection.execute("SELECT * FROM drops").fetchall()
        for drop in drops:
            events = connection.execute(
                "SELECT * FROM drop_events WHERE drop_id = %s ORDER BY seq", (drop["id"],)
            ).fetchall()
            reservations = connection.execute("SELECT * FROM reservations WHERE drop_id = %s", (drop["id"],)).fetchall()
            found += _replay(drop, events, reservations)
    for result in audit.run(dsn):
        found += [f"audit, {result.check.invariant} {result.check.name}: {row}" for row in result.rows]
    return found


def _replay(drop: Row, events: list[Row], reservations: list[Row]) -> list[str]:
    """A drop as a few lines of Python: each event must be legal where it stands, and all of them add up to the rows."""
    found: list[str] = []
    free = drop["total_stock"]
    active: dict[Any, Row] = {}
    ended: dict[Any, str] = {}
    for event in events:
        where = f"{drop['id']} seq {event['seq']}"
        kind, hold, user = event["type"], event["reservation_id"], event["user_id"]
        if kind == "RESERVED":
            free -= event["qty"]
            if user in active or hold in ended:
                found.append(f"{where}: reserved twice")
            active[user] = event
        elif kind in ("PURCHASED", "EXPIRED", "CANCELLED"):
            taken = active.pop(user, None)
            if taken is None or taken["reservation_id"] != hold:
                found.append(f"{where}: {kind} of a hold that is not active")
                continue
            ended[hold] = {"PURCHASED": "consumed", "EXPIRED": "expired", "CANCELLED": "cancelled"}[kind]
            free += 0 if kind == "PURCHASED" else taken["qty"]
            if (kind == "EXPIRED") != (event["at"] >= taken["expires_at"]):
                found.append(f"{where}: {kind} at {event['at']} of a hold until {taken['expires_at']}")
        if free < 0 or (event["available_stock"] is not None and event["available_stock"] != free):
            found.append(f"{where}: {event['available_stock']} free where the model has {free}")
    if free != drop["available_stock"]:
        found.append(f"{drop['id']}: {drop['available_stock']} free where the model has {free}")
    modelled = {event["reservation_id"]: "active" for event in active.values()} | ended
    stored = {row["id"]: row["status"] for row in reservations}
    if modelled != stored:
        found.append(f"{drop['id']}: reservations differ from the log: {set(modelled.items()) ^ set(stored.items())}")
    return found


def lost_or_made_up(dsn: str, history: History, *, drop_ids: Iterable[str] | None = None) -> list[str]:
    """I3 and I4: every id that a client was given is there, and nothing is there that nobody was told of.

    Rows of users whose last word is unknown may be there or not.
    """
    found: list[str] = []
    only = None if drop_ids is None else set(drop_ids)
    for operation, table in (("reserve", "reservations"), ("purchase", "purchases")):
        query = f"SELECT id::text, user_id::text, drop_id::text FROM {table}"
        stored = {row["id"]: row for row in rows(dsn, query) if only is None or row["drop_id"] in only}
        told = {exchange.made: exchange for exchange in history.of(operation, 201) if exchange.made is not None}
        open_ = {(exchange.user_id, exchange.drop_id) for exchange in history.unresolved()}
        for id_, exchange in told.items():
            row = stored.get(id_)
            if row is None:
                found.append(f"lost: {operation} {id_} of {exchange.user_id}")
            elif (row["user_id"], row["drop_id"]) != (exchange.user_id, exchange.drop_id):
                found.append(f"somebody else's: {operation} {id_}")
        for id_, row in stored.items():
            if id_ not in told and (row["user_id"], row["drop_id"]) not in open_:
                found.append(f"made up: {operation} {id_} of {row['user_id']}")
    return found


def dishonest(dsn: str, history: History) -> list[str]:
    """I13: refusals that were not true at any moment between the question and the answer."""
    found: list[str] = []
    logs: dict[str, list[Row]] = {}
    query = "SELECT *, date_part('epoch', at) AS at_s, date_part('epoch', expires_at) AS expires_at_s FROM drop_events"
    for row in rows(dsn, f"{query} ORDER BY drop_id, seq"):
        logs.setdefault(str(row["drop_id"]), []).append(row)
    for exchange in history.exchanges:
        if exchange.status != 409:
            continue
        log = logs[exchange.drop_id]
        if not _was_true(exchange, log):
            found.append(
                f"{exchange.operation} {exchange.code} of {exchange.user_id}: not true from"
                f" {exchange.began_at:.3f} to {exchange.ended_at:.3f}"
            )
    return found


def _was_true(exchange: Exchange, log: list[Row]) -> bool:
    if exchange.answer is not None and exchange.answer.is_replayed:
        return True  # it was true when it was first said
    since, until = exchange.began_at - CLOCK_SLACK_S, exchange.ended_at + CLOCK_SLACK_S
    own = [event for event in log if str(event["user_id"]) == exchange.user_id]
    match exchange.code:
        case "OUT_OF_STOCK":
            return any(event["available_stock"] == 0 for event in _in_effect(log, since, until, "available_stock"))
        case "ALREADY_RESERVED":
            return any(event["type"] == "RESERVED" for event in _in_effect(own, since, until, "type"))
        case "RESERVATION_EXPIRED":
            return any(event["expires_at_s"] <= until for event in own if event["type"] in ("RESERVED", "EXPIRED"))
        case "ALREADY_PURCHASED":
            return any(event["type"] == "PURCHASED" for event in _in_effect(own, since, until, "type"))
        case "RESERVATION_REQUIRED":
            return not own or own[0]["at_s"] >= since
    return False


def _in_effect(log: list[Row], since: float, until: float, column: str) -> list[Row]:
    """The events after which the drop was as they left it at some time between `since` and `until`."""
    telling = [event for event in log if event[column] is not None]
    ends = [event["at_s"] for event in telling[1:]] + [float("inf")]
    return [event for event, end in zip(telling, ends, strict=True) if event["at_s"] <= until and end >= since]


def out_of_order(dsn: str, history: History) -> list[str]:
    """I12, as far as ids tell: what was answered before another was asked has the smaller number."""
    numbers = {
        str(row["id"]): row["seq"]
        for table in ("reservations", "purchases")
        for row in rows(dsn, f"SELECT id, seq FROM {table}")
    }
    found: list[str] = []
    for drop_id in {exchange.drop_id for exchange in history.exchanges}:
        told = [
            (exchange, numbers[exchange.made])
            for exchange in history.exchanges
            if exchange.drop_id == drop_id
            and exchange.made in numbers
            and exchange.answer is not None
            and not exchange.answer.is_replayed
        ]
        answered = sorted(told, key=lambda one: one[0].ended_at)
        newest, position = 0, 0
        for exchange, seq in sorted(told, key=lambda one: one[0].began_at):
            while position < len(answered) and answered[position][0].ended_at < exchange.began_at:
                newest = max(newest, answered[position][1])
                position += 1
            if seq < newest:
                found.append(f"{exchange.operation} {exchange.made}: {seq} asked after {newest} was answered")
    return found
