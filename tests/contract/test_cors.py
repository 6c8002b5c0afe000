"""Which pages of which origins a browser lets talk to us."""

import pytest

from tests.contract.conftest import PAGE
from tests.contract.shop import Shop

PREFLIGHT = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "content-type, x-user-id, idempotency-key",
}


def words(header: str) -> set[str]:
    return {word.strip().lower() for word in header.split(",")}


def test_in_development_every_page_may_ask(shop: Shop) -> None:
    reply = shop.anybody.ask("GET", "/healthz", headers={"Origin": "http://localhost:5173"})

    assert reply.status == 200
    assert reply.headers["access-control-allow-origin"] == "http://localhost:5173"
    assert "origin" in words(reply.headers["vary"])
    assert words(reply.headers["access-control-expose-headers"]) >= {"x-request-id", "idempotency-replayed"}


def test_without_an_origin_nothing_is_said_about_origins(shop: Shop) -> None:
    headers = shop.anybody.get("/healthz").headers

    assert not [name for name in headers if name.startswith("access-control-")]
    assert "origin" in words(headers["vary"])


@pytest.mark.parametrize("path", ["/drops", "/drops/0190a3c4-0000-7000-8000-000000000001/reserve", "/nothing"])
def test_preflight_of_an_allowed_page_says_what_it_may_send(strict: Shop, path: str) -> None:
    response = strict.http.options(strict.root + path, headers={"Origin": PAGE, **PREFLIGHT})

    assert response.status_code == 204
    assert response.content == b""
    assert "content-length" not in response.headers
    assert response.headers["access-control-allow-origin"] == PAGE
    assert words(response.headers["access-control-allow-methods"]) >= {"get", "post", "patch", "delete"}
    assert words(response.headers["access-control-allow-headers"]) >= {
        "content-type",
        "authorization",
        "idempotency-key",
        "x-request-id",
        "x-user-id",
        "x-user-name",
    }
    assert int(response.headers["access-control-max-age"]) > 0


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "http://shop.example",
        "https://shop.example:8443",
        "https://shop.example.evil.example",
        "https://xshop.example",
        "https://shop.example/",
        "null",
        "",
    ],
)
def test_page_of_another_origin_is_told_nothing(strict: Shop, origin: str) -> None:
    preflight = strict.http.options(strict.root + "/drops", headers={"Origin": origin, **PREFLIGHT})
    reply = strict.anybody.ask("GET", "/healthz", headers={"Origin": origin})

    assert preflight.status_code == 204
    for headers in (preflight.headers, reply.headers):
        assert not [name for name in headers if name.startswith("access-control-")]
        assert "origin" in words(headers["vary"])


def test_allowed_page_can_read_errors_too(strict: Shop) -> None:
    for method, path, status in [("GET", "/me", 401), ("GET", "/nothing", 404), ("PUT", "/drops", 405)]:
        reply = strict.anybody.ask(method, path, headers={"Origin": PAGE})
        assert reply.status == status
        assert reply.headers["access-control-allow-origin"] == PAGE


def test_options_without_a_preflight_is_an_empty_answer(shop: Shop) -> None:
    response = shop.http.options(shop.root + "/drops")

    assert (response.status_code, response.content) == (204, b"")


# Whom a proxy knows by a cookie, which a browser sends along with what any page asks.


def test_page_of_another_site_does_not_act_for_its_visitor(strict: Shop, known_user: str) -> None:
    visitor = strict.visitor(known_user)
    drop = visitor.post("/drops", {"name": "Drop", "price": 1, "total_stock": 5, "status": "live"}).data
    reservation_id = visitor.holds(drop)
    for origin in ("https://evil.example", "https://shop.example.evil.example", "null"):
        for site in ("cross-site", "same-site"):
            abused = strict.visitor(known_user, origin=origin, sec_fetch_site=site)
            refused = [
                abused.reserve(drop),
                abused.purchase(drop),
                abused.cancel(reservation_id),
                abused.post("/drops", {"name": "Drop", "price": 1, "total_stock": 5}),
                abused.get("/me"),
            ]
            assert {reply.error for reply in refused} == {(403, "ORIGIN_NOT_ALLOWED")}
    assert strict.stock(drop) == 4
    assert visitor.purchase(drop).status == 201


@pytest.mark.parametrize(
    ("origin", "site"),
    [
        (PAGE, "cross-site"),
        (PAGE, "same-site"),
        ("https://behind.a.proxy.example", "same-origin"),
        ("https://of.an.older.browser.example", ""),
    ],
)
def test_allowed_page_and_our_own_act_for_their_visitors(strict: Shop, known_user: str, origin: str, site: str) -> None:
    visitor = strict.visitor(known_user, origin=origin, sec_fetch_site=site)
    drop = visitor.post("/drops", {"name": "Drop", "price": 1, "total_stock": 5, "status": "live"}).data
    assert visitor.cancel(visitor.holds(drop)).status == 200


def test_link_on_another_site_may_be_followed(strict: Shop, known_user: str) -> None:
    assert strict.visitor(known_user, sec_fetch_site="cross-site").get("/me").status == 200


def test_in_development_every_page_may_act_for_its_visitor(shop: Shop) -> None:
    visitor = shop.visitor(origin="http://localhost:5173", sec_fetch_site="same-site")
    assert visitor.reserve(shop.drop()).status == 201
