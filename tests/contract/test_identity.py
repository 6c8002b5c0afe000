"""Who is asking: X-User-Id and X-User-Name in development and in production, and signed tokens."""

import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import jwt
import psycopg
import pytest

from tests.contract.conftest import JWT_SECRET
from tests.contract.shop import Shop, Visitor, new_id, unique

SOME_ID = "0190a3c4-0000-7000-8000-000000000001"
NEEDS_IDENTITY = [
    ("GET", "/me"),
    ("POST", "/drops"),
    ("POST", f"/drops/{SOME_ID}/reserve"),
    ("POST", f"/drops/{SOME_ID}/purchase"),
    ("GET", "/reservations/me"),
    ("DELETE", f"/reservations/{SOME_ID}/cancel"),
    ("GET", "/purchases/me"),
]


@pytest.mark.parametrize(("method", "path"), NEEDS_IDENTITY)
def test_without_an_identity_it_is_401_auth_required(shop: Shop, method: str, path: str) -> None:
    assert shop.anybody.ask(method, path).error == (401, "AUTH_REQUIRED")
    assert shop.anybody.ask(method, path, headers={"X-User-Id": ""}).error == (401, "AUTH_REQUIRED")


@pytest.mark.parametrize(("method", "path"), NEEDS_IDENTITY)
def test_identity_is_asked_for_before_anything_else(shop: Shop, method: str, path: str) -> None:
    reply = shop.anybody.ask(method, path.replace(SOME_ID, "7"), content=b"{nonsense", headers={"X-User-Id": "7"})

    assert reply.error == (401, "INVALID_X_USER_ID")


@pytest.mark.parametrize(
    "user_id",
    [
        "7",
        "ann",
        "0190a3c4000070008000000000000001",
        "{0190a3c4-0000-7000-8000-000000000001}",
        "urn:uuid:0190a3c4-0000-7000-8000-000000000001",
        "0190a3c4-0000-7000-8000-0000000000011",
        "0190a3c4-0000-7000-8000-00000000000g",
        "0190a3c4-0000-7000-8000-000000000001, 0190a3c4-0000-7000-8000-000000000002",
    ],
)
def test_identity_that_is_no_uuid_is_401_invalid_x_user_id(shop: Shop, user_id: str) -> None:
    assert shop.visitor(user_id).get("/me").error == (401, "INVALID_X_USER_ID")


def test_unknown_user_without_a_name_gets_one_made_of_the_id(shop: Shop) -> None:
    user_id = new_id()

    reply = shop.visitor(user_id).get("/me")

    assert reply.status == 200
    assert reply.data == {"user": {"id": user_id, "username": "user_" + user_id.replace("-", "")[:12]}}


def test_unknown_user_gets_the_name_asked_for_and_keeps_it(shop: Shop) -> None:
    user_id, name = new_id(), unique("ann")

    assert shop.visitor(user_id, X_User_Name=name).get("/me").data == {"user": {"id": user_id, "username": name}}
    assert shop.visitor(user_id, X_User_Name="another").get("/me").data["user"]["username"] == name
    assert shop.visitor(user_id).get("/me").data["user"]["username"] == name


def test_id_in_capitals_is_the_same_user(shop: Shop) -> None:
    user_id, name = new_id(), unique("ann")
    shop.visitor(user_id, X_User_Name=name).get("/me")

    assert shop.visitor(user_id.upper()).get("/me").data == {"user": {"id": user_id, "username": name}}


def test_name_that_is_taken_gets_a_short_suffix(shop: Shop) -> None:
    for name in (unique("ann"), f"{unique('x'):x<50}"):
        shop.visitor(X_User_Name=name).get("/me")
        second = shop.visitor(X_User_Name=name).get("/me").data["user"]["username"]
        third = shop.visitor(X_User_Name=name).get("/me").data["user"]["username"]

        assert len({name, second, third}) == 3
        assert second.startswith(name[:40])
        assert max(len(second), len(third)) <= 50


@pytest.mark.parametrize("name", ["ann", "Zoë Müller", "渋谷太郎", "x" * 50])
def test_name_of_3_to_50_characters_in_any_script_is_taken_as_it_is(shop: Shop, name: str) -> None:
    reply = shop.anybody.ask("GET", "/me", headers={"X-User-Id": new_id(), "X-User-Name": name.encode()})

    assert reply.data["user"]["username"].startswith(name[:40])


@pytest.mark.parametrize("name", ["an", "x" * 51, "a\tnn", "", "渋谷"])
def test_name_that_is_none_is_422_and_makes_no_user(shop: Shop, name: str) -> None:
    user_id = new_id()

    reply = shop.anybody.ask("GET", "/me", headers={"X-User-Id": user_id, "X-User-Name": name.encode()})

    assert reply.wrong == ["X-User-Name"]
    assert shop.visitor(user_id).get("/me").data["user"]["username"].startswith("user_")


def test_many_first_requests_of_one_user_make_one_user(shop: Shop) -> None:
    user_id, name = new_id(), unique("ann")
    visitor = shop.visitor(user_id, X_User_Name=name)

    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: visitor.get("/me"), range(16)))

    assert Counter(reply.data["user"]["username"] for reply in replies) == {name: 16}


def test_many_users_who_want_one_name_all_get_names(shop: Shop) -> None:
    name = unique("ann")

    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: shop.visitor(X_User_Name=name).get("/me"), range(16)))

    names = [reply.data["user"]["username"] for reply in replies]
    assert len(set(names)) == 16
    assert names.count(name) == 1


# Production -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), NEEDS_IDENTITY)
def test_in_production_an_unknown_user_is_401_and_is_not_made(strict: Shop, method: str, path: str) -> None:
    stranger = strict.visitor(X_User_Name=unique("stranger"))

    assert stranger.ask(method, path).error == (401, "AUTH_REQUIRED")
    with psycopg.connect(strict.server.dsn) as connection:
        assert connection.execute("SELECT count(*) FROM users WHERE id = %s", [stranger.id]).fetchone() == (0,)


def test_in_production_a_known_user_is_served(strict: Shop, known_user: str) -> None:
    reply = strict.visitor(known_user).get("/me")

    assert reply.status == 200
    assert reply.data["user"]["id"] == known_user
    assert reply.data["user"]["username"].startswith("known_")


def test_in_production_a_user_who_is_added_later_is_served_from_then_on(strict: Shop) -> None:
    late = strict.visitor()
    assert late.get("/me").error == (401, "AUTH_REQUIRED")

    with psycopg.connect(strict.server.dsn) as connection:
        connection.execute("INSERT INTO users VALUES (%s, %s, now())", [late.id, unique("late")])

    assert late.get("/me").status == 200


# Tokens -----------------------------------------------------------------------------------------------


def bearer(shop: Shop, claims: Mapping[str, object], key: str = JWT_SECRET, algorithm: str = "HS256") -> Visitor:
    token = jwt.encode({"exp": time.time() + 60, **claims}, key, algorithm)
    return Visitor(shop.http, shop.root, {"Authorization": f"Bearer {token}"})


def test_token_says_who_is_asking(tokens: Shop) -> None:
    user_id, name = new_id(), unique("ann")

    reply = bearer(tokens, {"sub": user_id, "name": name}).get("/me")

    assert reply.data == {"user": {"id": user_id, "username": name}}


def test_token_makes_its_user_in_production_too(tokens: Shop) -> None:
    user_id = new_id()

    assert bearer(tokens, {"sub": user_id}).get("/me").data["user"]["username"] == f"user_{user_id[:8]}{user_id[9:13]}"


def test_with_tokens_the_header_says_nothing(tokens: Shop) -> None:
    user_id = new_id()
    assert tokens.visitor(user_id).get("/me").error == (401, "AUTH_REQUIRED")

    both = bearer(tokens, {"sub": user_id})
    both.headers["X-User-Id"] = new_id()
    assert both.get("/me").data["user"]["id"] == user_id


@pytest.mark.parametrize(("method", "path"), NEEDS_IDENTITY)
def test_without_a_token_it_is_401_auth_required(tokens: Shop, method: str, path: str) -> None:
    assert tokens.anybody.ask(method, path).error == (401, "AUTH_REQUIRED")


def test_token_that_is_over_forged_or_unsigned_is_401_invalid_token(tokens: Shop) -> None:
    user_id = new_id()
    over = bearer(tokens, {"sub": user_id, "exp": time.time() - 60})
    forged = bearer(tokens, {"sub": user_id}, key="another secret of thirty-two bytes or more")
    unsigned = bearer(tokens, {"sub": user_id}, key="", algorithm="none")

    for visitor in (over, forged, unsigned):
        reply = visitor.get("/me")
        assert reply.error == (401, "INVALID_TOKEN")
        assert JWT_SECRET not in reply.raw.decode()


def test_two_bearers_are_two_users(tokens: Shop) -> None:
    ann, ben = bearer(tokens, {"sub": new_id()}), bearer(tokens, {"sub": new_id()})
    drop = ann.post("/drops", {"name": "Two of them", "price": 1, "total_stock": 2, "status": "live"}).data

    assert [ann.reserve(drop).status, ben.reserve(drop).status] == [201, 201]
    assert ann.reserve(drop).error == (409, "ALREADY_RESERVED")
