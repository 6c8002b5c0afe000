"""Drops: what they are made of, which status they begin with, where they are listed, and how their clock moves them."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.contract.shop import Shop, ahead, new_id, seconds_of, unique

SOME_ID = "0190a3c4-0000-7000-8000-000000000001"
EDGE_S = 0.05  # the server's clock against ours, read in another process


def wait_until(is_so: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to be"
        time.sleep(0.01)


# Making -----------------------------------------------------------------------------------------------


def test_new_drop_is_answered_as_the_drop_itself(shop: Shop) -> None:
    seller = shop.visitor()

    reply = seller.post("/drops", {"name": "Air One", "price": 12_900, "total_stock": 100})

    assert reply.status == 201
    assert reply.data == {
        "id": reply.data["id"],
        "name": "Air One",
        "price": 12_900,
        "currency": "USD",
        "total_stock": 100,
        "available_stock": 100,
        "starts_at": None,
        "ends_at": None,
        "status": "draft",
        "created_by": seller.id,
        "created_at": reply.data["created_at"],
    }
    assert list(reply.data) == [
        "id",
        "name",
        "price",
        "currency",
        "total_stock",
        "available_stock",
        "starts_at",
        "ends_at",
        "status",
        "created_by",
        "created_at",
    ]
    assert abs(seconds_of(reply.data["created_at"]) - time.time()) < 5


@pytest.mark.parametrize(
    ("starts_in_s", "status", "begins_as"),
    [
        (None, None, "draft"),
        (-60, None, "live"),
        (0, None, "live"),
        (60, None, "scheduled"),
        (None, "draft", "draft"),
        (-60, "draft", "draft"),
        (60, "draft", "draft"),
        (60, "scheduled", "scheduled"),
        (None, "live", "live"),
        (-60, "live", "live"),
    ],
)
def test_status_of_a_new_drop_follows_from_its_start(
    shop: Shop, starts_in_s: float | None, status: str | None, begins_as: str
) -> None:
    wanted: dict[str, Any] = {"name": "Air One", "price": 1, "total_stock": 1}
    if starts_in_s is not None:
        wanted["starts_at"] = ahead(starts_in_s)
    if status is not None:
        wanted["status"] = status

    reply = shop.visitor().post("/drops", wanted)

    assert reply.status == 201
    assert reply.data["status"] == begins_as


def test_null_in_an_optional_field_is_the_same_as_nothing(shop: Shop) -> None:
    wanted = {"name": "Air", "price": 1, "total_stock": 1, "starts_at": None, "ends_at": None, "status": None}

    reply = shop.visitor().post("/drops", wanted)

    assert reply.status == 201
    assert (reply.data["status"], reply.data["starts_at"], reply.data["ends_at"]) == ("draft", None, None)


@pytest.mark.parametrize(
    ("window", "wrong"),
    [
        ({"status": "scheduled"}, ["starts_at"]),
        ({"status": "live", "starts_at": "2031-01-07T10:00:00Z"}, ["starts_at"]),
        ({"starts_at": "2031-01-07T10:00:00Z", "ends_at": "2031-01-07T10:00:00Z"}, ["ends_at"]),
        ({"starts_at": "2031-01-07T10:00:00Z", "ends_at": "2031-01-07T09:59:59.999Z"}, ["ends_at"]),
        ({"starts_at": "2031-01-07T10:00:00.0002Z", "ends_at": "2031-01-07T10:00:00.0008Z"}, ["ends_at"]),
        ({"starts_at": "2031-01-07T10:00:00+02:00", "ends_at": "2031-01-07T08:00:00Z"}, ["ends_at"]),
        (
            {"status": "live", "starts_at": "2031-01-07T10:00:00Z", "ends_at": "2030-01-07T10:00:00Z"},
            ["ends_at", "starts_at"],
        ),
    ],
)
def test_window_that_contradicts_itself_or_the_status_is_422(
    shop: Shop, window: dict[str, str], wrong: list[str]
) -> None:
    assert shop.visitor().post("/drops", {"name": "Air One", "price": 1, "total_stock": 1, **window}).wrong == wrong


def test_window_of_one_millisecond_is_a_window(shop: Shop) -> None:
    window = {"starts_at": "2031-01-07T10:00:00.000Z", "ends_at": "2031-01-07T10:00:00.001Z"}

    assert shop.visitor().post("/drops", {"name": "Air One", "price": 1, "total_stock": 1, **window}).status == 201


# Showing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["draft", "scheduled", "live"])
def test_drop_of_any_status_is_shown_with_its_feed(shop: Shop, status: str) -> None:
    drop = shop.drop(status=status, starts_at=ahead(60) if status == "scheduled" else None)

    assert shop.show(drop) == {**drop, "activity_feed": {"latest_purchasers": []}}


def test_id_in_capitals_is_the_same_drop(shop: Shop) -> None:
    drop = shop.drop()

    assert shop.anybody.get(f"/drops/{drop['id'].upper()}").data["id"] == drop["id"]
    assert shop.visitor().post(f"/drops/{drop['id'].upper()}/reserve").data["drop"]["id"] == drop["id"]


def test_unknown_drop_is_404(shop: Shop) -> None:
    assert shop.anybody.get(f"/drops/{new_id()}").error == (404, "DROP_NOT_FOUND")


@pytest.mark.parametrize(
    "drop_id", ["7", "air-one", "0190a3c4000070008000000000000001", f"{SOME_ID}0", f"{SOME_ID}%00"]
)
def test_drop_id_that_is_no_uuid_is_422(shop: Shop, drop_id: str) -> None:
    visitor = shop.visitor()

    assert visitor.get(f"/drops/{drop_id}").wrong == ["id"]
    assert visitor.post(f"/drops/{drop_id}/reserve").wrong == ["id"]
    assert visitor.post(f"/drops/{drop_id}/purchase").wrong == ["id"]


def test_feed_has_the_latest_three_purchases_newest_first(shop: Shop) -> None:
    drop = shop.drop(total_stock=5)
    buyers = [shop.visitor(X_User_Name=unique("buyer")) for _ in range(4)]
    bought = []
    for buyer in buyers:
        buyer.holds(drop)
        bought.append(buyer.purchase(drop).data["purchase"])

    feed = shop.show(drop)["activity_feed"]

    assert feed == {
        "latest_purchasers": [
            {
                "user_id": buyer.id,
                "username": buyer.headers["X-User-Name"],
                "qty": 1,
                "created_at": purchase["created_at"],
            }
            for buyer, purchase in [*zip(buyers, bought, strict=True)][:0:-1]
        ]
    }
    assert len(feed["latest_purchasers"]) == 3


# Listing ----------------------------------------------------------------------------------------------


def test_list_has_scheduled_and_live_drops_newest_first_with_their_feeds(shop: Shop) -> None:
    total_before = shop.anybody.get("/drops").data["pagination"]["total"]
    live = shop.drop(total_stock=2)
    draft = shop.drop(status="draft")
    scheduled = shop.drop(status="scheduled", starts_at=ahead(60))
    buyer = shop.visitor()
    buyer.holds(live)
    buyer.purchase(live)

    data = shop.anybody.get("/drops").data

    assert list(data) == ["items", "pagination"]
    assert data["items"][:2] == [shop.show(scheduled), shop.show(live)]
    assert data["items"][1]["available_stock"] == 1
    assert data["items"][1]["activity_feed"]["latest_purchasers"][0]["user_id"] == buyer.id
    assert draft["id"] not in [item["id"] for item in data["items"]]
    assert data["pagination"] == {"limit": 20, "offset": 0, "total": total_before + 2}


def test_list_is_cut_into_pages(shop: Shop) -> None:
    first, second, third = shop.drop(), shop.drop(), shop.drop()

    def page(query: str) -> tuple[list[str], dict[str, int]]:
        data = shop.anybody.get(f"/drops{query}").data
        return [item["id"] for item in data["items"]], data["pagination"]

    total = page("")[1]["total"]
    assert page("?limit=2") == ([third["id"], second["id"]], {"limit": 2, "offset": 0, "total": total})
    assert page("?limit=1&offset=2") == ([first["id"]], {"limit": 1, "offset": 2, "total": total})
    assert page("?limit=100&offset=1000000") == ([], {"limit": 100, "offset": 1_000_000, "total": total})
    assert page("?limit=1&colour=red")[0] == [third["id"]]


@pytest.mark.parametrize(
    ("query", "wrong"),
    [
        ("limit=0", ["limit"]),
        ("limit=101", ["limit"]),
        ("limit=-1", ["limit"]),
        ("limit=ten", ["limit"]),
        ("limit=1.0", ["limit"]),
        ("limit=", ["limit"]),
        ("limit=%2010", ["limit"]),
        ("limit=%D9%A3", ["limit"]),
        ("limit=1_0", ["limit"]),
        ("limit=NaN", ["limit"]),
        ("limit=99999999999999999999", ["limit"]),
        ("offset=-1", ["offset"]),
        ("offset=1000001", ["offset"]),
        ("offset=" + "9" * 1_500, ["offset"]),
        ("limit=0&offset=x", ["limit", "offset"]),
    ],
)
@pytest.mark.parametrize("path", ["/drops", "/purchases/me"])
def test_page_that_is_none_is_422(shop: Shop, path: str, query: str, wrong: list[str]) -> None:
    assert shop.visitor(SOME_ID).get(f"{path}?{query}").wrong == wrong


# The clock --------------------------------------------------------------------------------------------


def test_drop_goes_live_and_ends_at_its_instants(shop: Shop) -> None:
    starts_at, ends_at = time.time() + 0.4, time.time() + 1.0
    drop = shop.drop(total_stock=9, status="scheduled", starts_at=ahead(0.4), ends_at=ahead(1.0))
    early, timely, late = shop.visitor(), shop.visitor(), shop.visitor()

    assert early.reserve(drop).error == (409, "DROP_NOT_ACTIVE")
    wait_until(lambda: shop.show(drop)["status"] == "live")
    assert time.time() >= starts_at - EDGE_S
    timely.holds(drop)
    assert drop["id"] in [item["id"] for item in shop.anybody.get("/drops?limit=100").data["items"]]
    wait_until(lambda: shop.show(drop)["status"] == "ended")
    assert time.time() >= ends_at - EDGE_S
    assert late.reserve(drop).error == (409, "DROP_NOT_ACTIVE")
    assert drop["id"] not in [item["id"] for item in shop.anybody.get("/drops?limit=100").data["items"]]
    assert shop.stock(drop) == 8


def test_reservation_taken_before_the_end_can_be_bought_after_it(shop: Shop) -> None:
    drop = shop.drop(total_stock=2, ends_at=ahead(0.4))
    buyer, other = shop.visitor(), shop.visitor()
    buyer.holds(drop)
    given_back = other.holds(drop)
    wait_until(lambda: shop.show(drop)["status"] == "ended")

    assert buyer.purchase(drop).status == 201
    assert other.cancel(given_back).status == 200
    assert buyer.reserve(drop).error == (409, "DROP_NOT_ACTIVE")


def test_drop_whose_window_is_over_already_ends_at_once(shop: Shop) -> None:
    drop = shop.drop(starts_at=ahead(-20), ends_at=ahead(-10))

    wait_until(lambda: shop.show(drop)["status"] == "ended")

    assert shop.visitor().reserve(drop).error == (409, "DROP_NOT_ACTIVE")


def test_nobody_can_reserve_a_draft(shop: Shop) -> None:
    for drop in (shop.drop(status="draft"), shop.drop(status="draft", starts_at=ahead(-10))):
        assert shop.visitor().reserve(drop).error == (409, "DROP_NOT_ACTIVE")
        assert shop.show(drop)["status"] == "draft"
