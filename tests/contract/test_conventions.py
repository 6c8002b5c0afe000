"""Envelopes, request ids, instants, ids, addresses and methods: what holds on every route."""

import time
import uuid

import httpx
import pytest

from tests.contract.shop import INSTANT, UUID, UUID7, Shop, ahead, new_id

NOWHERE = [
    "/nothing",
    "/dropss",
    "/drops/0190a3c4-0000-7000-8000-000000000001/reserve/now",
    "/drops/0190a3c4-0000-7000-8000-000000000001/refund",
    "/internal",
    "/%00",
]

SOME_ID = "0190a3c4-0000-7000-8000-000000000001"
WRONG_METHODS = [
    ("DELETE", "/health", "GET, HEAD"),
    ("POST", "/me", "GET, HEAD"),
    ("GET", "/demo/echo", "POST"),
    ("PUT", "/drops", "GET, HEAD, POST"),
    ("DELETE", f"/drops/{SOME_ID}", "GET, HEAD"),
    ("GET", f"/drops/{SOME_ID}/reserve", "POST"),
    ("PUT", f"/drops/{SOME_ID}/purchase", "POST"),
    ("POST", "/reservations/me", "GET, HEAD"),
    ("POST", f"/reservations/{SOME_ID}/cancel", "DELETE"),
    ("DELETE", "/purchases/me", "GET, HEAD"),
    ("GET", "/internal/users", "POST"),
    ("GET", "/internal/expire-now", "POST"),
    ("POST", "/healthz", "GET, HEAD"),
    ("POST", "/readyz", "GET, HEAD"),
    ("TRACE", "/drops", "GET, HEAD, POST"),
    ("BREW", "/drops", "GET, HEAD, POST"),
]


def test_success_is_the_envelope_and_nothing_else(shop: Shop) -> None:
    response = shop.http.get(shop.root + "/healthz", headers={"X-Request-Id": "order-7"})

    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"] == "order-7"
    assert response.json() == {"success": True, "data": {"status": "up"}, "meta": {"requestId": "order-7"}}


def test_error_is_the_envelope_and_nothing_else(shop: Shop) -> None:
    response = shop.http.get(shop.root + "/me", headers={"X-Request-Id": "order-7"})

    assert response.status_code == 401
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"] == "order-7"
    assert response.json() == {
        "success": False,
        "error": {"code": "AUTH_REQUIRED", "message": "Say who you are: X-User-Id is missing."},
        "meta": {"requestId": "order-7"},
    }


def test_the_details_of_a_422_are_a_list_of_path_and_message(shop: Shop) -> None:
    response = shop.http.get(shop.root + "/drops/7", headers={"X-Request-Id": "order-7"})

    assert response.status_code == 422
    assert response.json() == {
        "success": False,
        "error": {
            "code": "VALIDATION_ERROR",
            "message": "The request is well-formed, but not valid.",
            "details": [{"path": "id", "message": "must be a UUID"}],
        },
        "meta": {"requestId": "order-7"},
    }


# Request ids ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["a", "x" * 128, '"quoted" \\ ~ {tilde}', "0190a3c4-0000-7000-8000-000000000001"])
def test_request_id_of_up_to_128_printable_ascii_characters_is_echoed(shop: Shop, given: str) -> None:
    reply = shop.anybody.ask("GET", "/healthz", headers={"X-Request-Id": given})

    assert reply.headers["x-request-id"] == given
    assert reply.body["meta"] == {"requestId": given}


@pytest.mark.parametrize("given", [b"x" * 129, "café".encode(), b"a\tb", b"\xff", b""])
def test_any_other_request_id_is_replaced_by_a_new_one(shop: Shop, given: bytes) -> None:
    reply = shop.anybody.ask("GET", "/healthz", headers={"X-Request-Id": given})

    assert UUID.fullmatch(reply.headers["x-request-id"])
    assert reply.body["meta"] == {"requestId": reply.headers["x-request-id"]}


def test_request_without_an_id_gets_one_of_its_own(shop: Shop) -> None:
    first, second = shop.anybody.get("/healthz"), shop.anybody.get("/healthz")

    assert UUID.fullmatch(first.headers["x-request-id"])
    assert first.headers["x-request-id"] != second.headers["x-request-id"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("PUT", "/drops", 405), ("POST", "/demo/echo", 415), ("GET", "/me", 401)],
)
def test_request_id_is_echoed_by_errors_of_the_framework_too(shop: Shop, method: str, path: str, status: int) -> None:
    reply = shop.anybody.ask(method, path, content=b"x" if method == "POST" else None, headers={"X-Request-Id": "a 7"})

    assert reply.status == status
    assert reply.headers["x-request-id"] == "a 7"


# Instants and ids -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("2031-01-07T10:00:00.000Z", "2031-01-07T10:00:00.000Z"),
        ("2031-01-07T10:00:00Z", "2031-01-07T10:00:00.000Z"),
        ("2031-01-07T12:30:00+02:30", "2031-01-07T10:00:00.000Z"),
        ("2031-01-06T23:00:00.25-11:00", "2031-01-07T10:00:00.250Z"),
        ("2031-01-07T10:00:00.001999Z", "2031-01-07T10:00:00.001Z"),
    ],
)
def test_instants_are_utc_in_whole_milliseconds(shop: Shop, given: str, shown: str) -> None:
    drop = shop.drop(status="scheduled", starts_at=given)

    assert drop["starts_at"] == shown
    assert INSTANT.fullmatch(drop["created_at"])


def test_ids_are_uuids_of_version_7_made_just_now(shop: Shop) -> None:
    visitor = shop.visitor()
    before_ms = time.time_ns() // 1_000_000
    drop = shop.drop()
    reservation = visitor.reserve(drop).data["reservation"]
    purchase = visitor.purchase(drop).data["purchase"]
    user = shop.anybody.post("/internal/users", {"username": f"made-{new_id()[:8]}"}).data
    after_ms = time.time_ns() // 1_000_000

    for made in (drop["id"], reservation["id"], purchase["id"], user["id"]):
        assert UUID7.fullmatch(made)
        made_ms = uuid.UUID(made).int >> 80
        assert before_ms - 50 <= made_ms <= after_ms + 50


# Addresses and methods --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", NOWHERE)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "PUT"])
def test_unknown_address_is_404_in_json(shop: Shop, method: str, path: str) -> None:
    assert shop.anybody.ask(method, path).error == (404, "NOT_FOUND")


@pytest.mark.parametrize("path", ["//drops", "/drops//", "/reservations//me"])
def test_address_with_a_slash_too_many_is_404_in_json(shop: Shop, path: str) -> None:
    response = shop.http.get(httpx.URL(shop.server.url, raw_path=(shop.base + path).encode()))

    assert response.status_code == 404
    assert response.json()["error"]["code"] == "NOT_FOUND"


def test_address_outside_the_base_paths_is_404_in_json(shop: Shop) -> None:
    for path in ("/drops", "/api/v2/drops", "/api/v1x/drops", "/apis"):
        response = shop.http.get(shop.server.url + path)
        assert response.status_code == 404, path
        assert response.json()["error"]["code"] == "NOT_FOUND"


@pytest.mark.parametrize(("method", "path", "allowed"), WRONG_METHODS)
def test_wrong_method_is_405_in_json_and_says_which_are_allowed(
    shop: Shop, method: str, path: str, allowed: str
) -> None:
    reply = shop.anybody.ask(method, path)

    assert reply.error == (405, "METHOD_NOT_ALLOWED")
    assert reply.headers["allow"] == allowed


def test_head_answers_as_get_does_without_a_body(shop: Shop) -> None:
    drop = shop.drop()
    for path, status in [(f"/drops/{drop['id']}", 200), ("/drops?limit=1", 200), ("/me", 401), ("/nothing", 404)]:
        response = shop.http.head(shop.root + path)
        assert response.status_code == status
        assert response.content == b""
        assert response.headers["content-type"] == "application/json"
        assert int(response.headers["content-length"]) > 0


def test_trailing_slash_makes_no_difference(shop: Shop) -> None:
    assert shop.anybody.get("/drops/?limit=1").status == 200
    assert shop.anybody.get("/healthz/").status == 200


def test_answers_may_not_be_kept_or_guessed_at(shop: Shop) -> None:
    headers = shop.anybody.get("/drops").headers

    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"
    assert "server" not in headers


def test_both_base_paths_show_the_same_world(shop: Shop) -> None:
    drop = shop.drop(starts_at=ahead(-5))

    for base in ("/api/v1", "/api"):
        other = Shop(shop.server, base, shop.http)
        assert other.show(drop)["id"] == drop["id"]
