"""`meta.seq` and `meta.epoch`: an answer about one drop says at which of its states it is true, in both lanes alike.

What the answers say is compared with the tables. Between each server and its database stands a proxy that can take
the database away.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import httpx
import psycopg
import pytest

from persistence.embedded import EmbeddedServer
from tests.conftest import _new_database
from tests.contract.shop import PATIENCE_S, Reply, Shop, new_id
from tests.contract.test_drops import wait_until
from tests.contract.test_lanes import PAST, WRITE_PAST
from tests.proof.proxy import Fault, Proxy
from tests.server import Server, serving

# Two in flight fill the engine, and it is a while until a silent database counts as lost.
LIMITS: Final = {"IN_FLIGHT_MAX": "2", "ANSWER_TIMEOUT_MS": "2000", "COMMIT_STALL_MS": "2000"}
UNKNOWN: Final = "OUTCOME_UNKNOWN"
NONE: Final = ()
Version = tuple[int, ...]


class Lane:
    """A server of which one lane answers, with its shop, its tables and what stands between them."""

    def __init__(self, server: Server, proxy: Proxy, dsn: str, http: httpx.Client) -> None:
        self.server = server
        self.proxy = proxy
        self.shop = Shop(server, "/api/v1", http)
        self._dsn = dsn

    def query(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            return connection.execute(statement.encode(), values).fetchall()

    def stored(self, drop_id: str) -> Version:
        """The drop's own row."""
        ((seq, epoch),) = self.query("SELECT seq, epoch FROM drops WHERE id = %s", drop_id)
        return seq, epoch

    def events(self, drop_id: str) -> list[tuple[Any, ...]]:
        return self.query("SELECT type, seq, epoch FROM drop_events WHERE drop_id = %s ORDER BY seq", drop_id)


@pytest.fixture(scope="module", params=["hot", "cold"])
def lane(
    request: pytest.FixtureRequest, server: EmbeddedServer, template: str, logs: Path, certificate: Path
) -> Iterator[Lane]:
    tls = {"TLS_CERTFILE": str(certificate)} if request.param == "cold" else {}
    assert server.port is not None
    with _new_database(server, template) as dsn, Proxy(server.port) as proxy:
        with psycopg.connect(dsn) as connection:
            for statement in WRITE_PAST:
                connection.execute(statement, {name.decode()[6:-1]: value for name, value in PAST.items()})
        log = logs / f"versions-{request.param}.log"
        with (
            serving(proxy.dsn(dsn), log, **LIMITS, **tls) as running,
            httpx.Client(timeout=PATIENCE_S, verify=running.tls or True) as http,
        ):
            yield Lane(running, proxy, dsn, http)


# What was decided -------------------------------------------------------------------------------------


def test_change_has_its_own_number(lane: Lane) -> None:
    wanted = {"name": "Drop", "price": 1, "total_stock": 3, "status": "live"}
    visitor, other = lane.shop.visitor(), lane.shop.visitor()
    created = visitor.post("/drops", wanted)
    drop = created.data

    reserved, purchased = visitor.reserve(drop), visitor.purchase(drop)
    again = visitor.reserve(drop)
    cancelled = visitor.cancel(again.data["reservation"]["id"])
    of_other = other.reserve(drop)

    told = [created, reserved, purchased, again, cancelled, of_other]
    types = ["DROP_CREATED", "RESERVED", "PURCHASED", "RESERVED", "CANCELLED", "RESERVED"]
    assert [reply.version for reply in told] == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (6, 1)]
    assert lane.events(drop["id"]) == [(type_, *reply.version) for type_, reply in zip(types, told, strict=True)]


def test_refusal_has_the_number_of_the_last_change_before_it(lane: Lane) -> None:
    drop, draft = lane.shop.drop(total_stock=1), lane.shop.drop(status="draft")
    holder, late = lane.shop.visitor(), lane.shop.visitor()
    held = holder.holds(drop)

    def refused(reply: Reply, code: str) -> Version:
        assert reply.error == (409, code)
        return reply.version

    assert refused(late.reserve(draft), "DROP_NOT_ACTIVE") == (1, 1)
    assert refused(late.reserve(drop), "OUT_OF_STOCK") == (2, 1)
    assert refused(holder.reserve(drop), "ALREADY_RESERVED") == (2, 1)
    assert refused(late.purchase(drop), "RESERVATION_REQUIRED") == (2, 1)
    assert refused(late.reserve(drop, key="k"), "OUT_OF_STOCK") == (2, 1)
    holder.cancel(held)
    assert refused(holder.purchase(drop), "RESERVATION_NOT_ACTIVE") == (3, 1)
    holder.holds(drop)
    holder.purchase(drop)
    assert refused(holder.purchase(drop), "ALREADY_PURCHASED") == (5, 1)
    assert lane.stored(drop["id"]) == (5, 1)


def test_refused_cancellation_has_the_version_of_the_row_that_refuses_it(lane: Lane) -> None:
    drop, visitor = lane.shop.drop(total_stock=3), lane.shop.visitor()
    cancelled = visitor.holds(drop)
    visitor.cancel(cancelled)
    consumed = visitor.holds(drop)
    visitor.purchase(drop)

    for over in (cancelled, consumed):
        reply = visitor.cancel(over)
        assert reply.error == (409, "RESERVATION_NOT_ACTIVE")
        assert reply.version == lane.stored(drop["id"]) == (5, 1)


def test_what_ran_out_before_the_server_started_is_refused_with_a_version(lane: Lane) -> None:
    drop_id, reservation_id, user_id = (PAST[name] for name in (b"<past drop>", b"<past reservation>", b"<past user>"))
    visitor = lane.shop.visitor(user_id)

    for reply in (visitor.cancel(reservation_id), visitor.purchase({"id": drop_id}), visitor.cancel(reservation_id)):
        assert reply.error == (409, "RESERVATION_EXPIRED")
        assert reply.version == lane.stored(drop_id)
    assert lane.stored(drop_id)[0] == 3


def test_drop_is_shown_with_its_version(lane: Lane) -> None:
    drop = lane.shop.drop(total_stock=3)
    lane.shop.visitor().holds(drop)

    assert lane.shop.anybody.get(f"/drops/{drop['id']}").version == lane.stored(drop["id"]) == (2, 1)
    assert lane.shop.anybody.get(f"/drops/{drop['id'].upper()}").version == (2, 1)


def test_replay_has_the_version_of_the_first_answer(lane: Lane) -> None:
    visitor, buyer = lane.shop.visitor(), lane.shop.visitor()
    wanted = {"name": "Drop", "price": 1, "total_stock": 3, "status": "live"}
    created = visitor.post("/drops", wanted, key="k")
    drop = created.data
    first = [created, visitor.reserve(drop, key="k"), visitor.reserve(drop, key="l"), visitor.purchase(drop, key="k")]
    buyer.holds(drop)

    again = [
        visitor.post("/drops", wanted, key="k"),
        visitor.reserve(drop, key="k"),
        visitor.reserve(drop, key="l"),
        visitor.purchase(drop, key="k"),
    ]

    assert [reply.version for reply in first] == [(1, 1), (2, 1), (2, 1), (3, 1)]
    assert all(reply.is_replay for reply in again)
    assert [reply.version for reply in again] == [reply.version for reply in first]


# What is about no drop, or about several --------------------------------------------------------------


def test_answer_that_is_about_no_single_drop_has_no_version(lane: Lane) -> None:
    shop = lane.shop
    drop, visitor, other = shop.drop(total_stock=3), shop.visitor(), shop.visitor()
    held = other.holds(drop)
    reserve, missing = f"/drops/{drop['id']}/reserve", {"id": new_id()}
    visitor.reserve(drop, key="k")

    for reply, outcome in (
        (visitor.reserve(missing), (404, "DROP_NOT_FOUND")),
        (visitor.purchase(missing), (404, "DROP_NOT_FOUND")),
        (visitor.get(f"/drops/{missing['id']}"), (404, "DROP_NOT_FOUND")),
        (visitor.cancel(new_id()), (404, "RESERVATION_NOT_FOUND")),
        (visitor.cancel(held), (404, "RESERVATION_NOT_FOUND")),
        (shop.anybody.post(reserve), (401, "AUTH_REQUIRED")),
        (visitor.ask("POST", reserve, ["no object"]), (400, "INVALID_JSON")),
        (visitor.post(f"/drops/{drop['id']}/nothing"), (404, "NOT_FOUND")),
        (visitor.reserve(shop.drop(), key="k"), (422, "IDEMPOTENCY_KEY_REUSED")),
        (visitor.reserve(drop, key="x" * 256), (422, "VALIDATION_ERROR")),
    ):
        assert (reply.error, reply.version) == (outcome, NONE)
    for path in ("/drops", "/me", "/reservations/me", "/purchases/me", "/health"):
        assert visitor.get(path).version == NONE
    assert visitor.post("/internal/expire-now").version == NONE


# When it goes wrong -----------------------------------------------------------------------------------


def test_503_of_an_outage_has_the_committed_version(lane: Lane) -> None:
    drop, visitor, buyer = lane.shop.drop(total_stock=3), lane.shop.visitor(), lane.shop.visitor()
    held = visitor.holds(drop)
    buyer.get("/me")
    lane.proxy.refuse()
    try:
        for reply in (
            buyer.reserve(drop),
            buyer.reserve(drop, key="k"),
            buyer.purchase(drop),
            visitor.cancel(held),
            lane.shop.visitor().reserve(drop),  # nobody knows yet who that is
        ):
            assert (reply.error, reply.version) == ((503, "DATABASE_UNAVAILABLE"), (2, 1))
        assert lane.shop.anybody.get(f"/drops/{drop['id']}").version == (2, 1)
        wanted = {"name": "Drop", "price": 1, "total_stock": 3}
        for reply in (
            visitor.post("/drops", wanted),
            visitor.reserve({"id": new_id()}),
            visitor.cancel(new_id()),
            visitor.get(f"/drops/{new_id()}"),
        ):
            assert (reply.error, reply.version) == ((503, "DATABASE_UNAVAILABLE"), NONE)
    finally:
        lane.proxy.accept()
        lane.server.wait_for("/readyz")
    assert lane.stored(drop["id"])[0] == 2


def test_503_of_a_full_engine_and_of_no_answer_have_the_committed_version(lane: Lane) -> None:
    drop, visitors = lane.shop.drop(total_stock=3), [lane.shop.visitor() for _ in range(3)]
    for visitor in visitors:
        visitor.get("/me")
    lane.proxy.freeze()
    try:
        with ThreadPoolExecutor(3) as pool:
            replies = list(pool.map(lambda visitor: visitor.reserve(drop, key="k"), visitors))
    finally:
        lane.proxy.thaw()

    # One is on its way to the database, one is with it or waits to be, and for one there is no room.
    codes = sorted(reply.error[1] for reply in replies)
    assert codes in ([second, UNKNOWN, "OVERLOADED"] for second in ("DATABASE_UNAVAILABLE", UNKNOWN))
    assert [reply.version for reply in replies] == [(1, 1)] * 3
    lane.server.wait_for("/readyz")
    assert sorted(visitor.reserve(drop, key="k").version for visitor in visitors) == [(2, 1), (3, 1), (4, 1)]


def test_answer_after_a_doubt_has_the_epoch_at_which_the_doubt_was_resolved(lane: Lane) -> None:
    drop, visitor, other = lane.shop.drop(total_stock=3), lane.shop.visitor(), lane.shop.visitor()
    other.get("/me")
    visitor.get("/me")
    lane.proxy.strike(Fault.CUT_AFTER)

    plain = visitor.reserve(drop)

    assert (plain.status, plain.version) == (201, (2, 2))
    assert lane.events(drop["id"])[1:] == [("RESERVED", 2, 1)]
    lane.proxy.strike(Fault.CUT_AFTER)
    # What is kept for a retry was rendered when it was decided, and says so.
    keyed = other.reserve(drop, key="k")
    assert (keyed.status, keyed.version) == (201, (3, 2))
    assert lane.events(drop["id"])[2:] == [("RESERVED", 3, 2)]
    assert other.reserve(drop, key="k").raw == keyed.raw
    assert other.reserve(drop).version == lane.stored(drop["id"]) == (3, 3)


def test_drop_that_another_server_took_has_no_version_here(lane: Lane) -> None:
    drop, holder, other = lane.shop.drop(total_stock=3), lane.shop.visitor(), lane.shop.visitor()
    held = holder.holds(drop)
    lane.query("UPDATE drops SET epoch = epoch + 1 WHERE id = %s RETURNING id", drop["id"])
    wait_until(lambda: other.reserve(drop).error == (503, "DROP_OWNED_ELSEWHERE"))

    for reply in (other.reserve(drop), holder.cancel(held), other.get(f"/drops/{drop['id']}")):
        assert (reply.error, reply.version) == ((503, "DROP_OWNED_ELSEWHERE"), NONE)


def test_epoch_rises_with_the_next_server_and_replays_keep_theirs(lane: Lane) -> None:
    drop, visitor = lane.shop.drop(total_stock=3), lane.shop.visitor()
    first = visitor.reserve(drop, key="k")

    lane.server.kill()
    lane.server.start()

    assert visitor.purchase(drop).version == lane.stored(drop["id"]) == (3, 2)
    replay = visitor.reserve(drop, key="k")
    assert (replay.is_replay, replay.raw) == (True, first.raw)
    assert replay.version == (2, 1)
