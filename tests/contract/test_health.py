"""Whether it lives, whether it can work; the internal routes; and what happens when the database goes away."""

from pathlib import Path

import httpx
import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from persistence.embedded import EmbeddedServer
from tests.contract.shop import Shop, unique
from tests.contract.test_drops import wait_until
from tests.server import Server, serving


def test_health_makes_a_round_trip_to_the_database(shop: Shop) -> None:
    first = shop.anybody.get("/health")
    second = shop.anybody.get("/health")

    assert first.status == 200
    assert first.data == {"service": "api", "uptime": first.data["uptime"], "db": "up"}
    assert 0 < first.data["uptime"] < second.data["uptime"]


def test_probes_answer_under_the_base_paths_and_at_the_root(shop: Shop) -> None:
    assert shop.anybody.get("/healthz").data == {"status": "up"}
    assert shop.anybody.get("/readyz").data == {"status": "ready"}
    for path, status in (("/healthz", "up"), ("/readyz", "ready")):
        response = shop.http.get(shop.server.url + path)
        assert (response.status_code, response.json()["data"]) == (200, {"status": status})


# Internal routes --------------------------------------------------------------------------------------


def test_expire_now_leaves_holds_alone_that_are_not_due(shop: Shop) -> None:
    drop, visitor = shop.drop(total_stock=1), shop.visitor()
    visitor.holds(drop)

    reply = shop.anybody.post("/internal/expire-now")

    assert reply.status == 200
    assert reply.data == {"expiredCount": 0, "updatedDropIds": []}
    assert visitor.purchase(drop).status == 201


def test_internal_routes_are_not_there_in_production(strict: Shop) -> None:
    for path, body in [("/internal/users", {"username": unique("made")}), ("/internal/expire-now", None)]:
        assert strict.anybody.post(path, body).error == (404, "NOT_FOUND")
    assert strict.anybody.post("/internal/users", {"colour": "red"}).error == (404, "NOT_FOUND")


# The database -----------------------------------------------------------------------------------------


def set_open(server: EmbeddedServer, dsn: str, is_open: bool) -> None:
    """Let connections into the database; or let none in, and end those that there are."""
    name = str(conninfo_to_dict(dsn)["dbname"])
    with psycopg.connect(server.dsn_of("postgres"), autocommit=True) as connection:
        statement = sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}")
        connection.execute(statement.format(sql.Identifier(name), sql.Literal(is_open)))
        if not is_open:
            connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])


def test_without_its_database_the_server_says_so_and_comes_back_with_it(
    server: EmbeddedServer, database: str, tmp_path: Path, http: httpx.Client
) -> None:
    with serving(database, tmp_path / "log") as running:
        shop = Shop(running, "/api/v1", http)
        drop, visitor = shop.drop(total_stock=2), shop.visitor()
        reservation_id = visitor.holds(drop)

        set_open(server, database, False)
        try:
            for path in ("/health", "/readyz"):
                reply = shop.anybody.get(path)
                assert reply.error == (503, "DATABASE_UNAVAILABLE")
                assert int(reply.headers["retry-after"]) >= 1
            assert shop.anybody.get("/healthz").status == 200
            assert visitor.purchase(drop).error == (503, "DATABASE_UNAVAILABLE")
            assert shop.visitor().reserve(drop).error == (503, "DATABASE_UNAVAILABLE")
            assert visitor.get("/purchases/me").error == (503, "DATABASE_UNAVAILABLE")
            # What stands in memory was committed, and can still be seen.
            assert shop.stock(drop) == 1
            assert [item["id"] for item in visitor.get("/reservations/me").data["items"]] == [reservation_id]
        finally:
            set_open(server, database, True)

        wait_until(lambda: shop.anybody.get("/readyz").status == 200)
        assert shop.anybody.get("/health").status == 200
        assert visitor.purchase(drop).status == 201
        assert shop.visitor().reserve(drop).status == 201
        assert shop.stock(drop) == 0


def test_server_that_starts_without_its_database_waits_for_it_and_says_so(
    server: EmbeddedServer, database: str, tmp_path: Path, http: httpx.Client
) -> None:
    set_open(server, database, False)
    running = Server(database, tmp_path / "log")
    try:
        running.start(until="/healthz")
        shop = Shop(running, "/api/v1", http)
        assert shop.anybody.get("/readyz").error == (503, "DATABASE_UNAVAILABLE")
        assert shop.anybody.get("/health").error == (503, "DATABASE_UNAVAILABLE")
        assert shop.anybody.get("/drops").error == (503, "DATABASE_UNAVAILABLE")
        assert shop.visitor().get("/me").error == (503, "DATABASE_UNAVAILABLE")
        assert shop.anybody.get("/nothing").error == (404, "NOT_FOUND")

        set_open(server, database, True)

        running.wait_for("/readyz")
        assert shop.visitor().get("/me").status == 200
    finally:
        set_open(server, database, True)
        running.stop()
