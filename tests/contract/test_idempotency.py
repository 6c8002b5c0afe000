"""Idempotency-Key over real sockets: one effect, the first answer again to the byte, through a power cut too."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from tests.contract.shop import Shop, new_id, unique
from tests.contract.test_drops import wait_until
from tests.server import Server

JSON = {"Content-Type": "application/json"}
REUSED = (422, "IDEMPOTENCY_KEY_REUSED")


def new_drop(**more: object) -> dict[str, Any]:
    return {"name": unique("Drop"), "price": 1, "total_stock": 1, "status": "live", **more}


def test_retry_of_reserve_gets_the_first_answer_byte_for_byte(shop: Shop) -> None:
    drop, visitor = shop.drop(total_stock=3), shop.visitor()

    first = visitor.reserve(drop, key="k")
    again = visitor.reserve(drop, key="k")

    assert (first.status, first.is_replay) == (201, False)
    assert (again.status, again.is_replay) == (201, True)
    assert again.raw == first.raw
    assert again.headers["content-type"] == first.headers["content-type"]
    assert shop.stock(drop) == 2


def test_retry_of_purchase_gets_the_first_answer_byte_for_byte(shop: Shop) -> None:
    drop, visitor = shop.drop(total_stock=3), shop.visitor()
    visitor.holds(drop)

    first = visitor.purchase(drop, key="k")
    again = visitor.purchase(drop, key="k")

    assert (first.status, first.is_replay) == (201, False)
    assert (again.status, again.is_replay) == (201, True)
    assert again.raw == first.raw
    assert visitor.get("/purchases/me").data["pagination"]["total"] == 1


def test_retry_of_a_new_drop_makes_no_second_one(shop: Shop) -> None:
    seller, wanted = shop.visitor(), new_drop()

    first = seller.post("/drops", wanted, key="k")
    total = shop.anybody.get("/drops").data["pagination"]["total"]
    again = seller.post("/drops", wanted, key="k")

    assert (first.status, first.is_replay) == (201, False)
    assert (again.status, again.is_replay) == (201, True)
    assert again.raw == first.raw
    assert shop.anybody.get("/drops").data["pagination"]["total"] == total


def test_first_answer_is_replayed_whatever_happened_since(shop: Shop) -> None:
    drop, visitor = shop.drop(total_stock=1), shop.visitor()
    first = visitor.reserve(drop, key="k")
    visitor.cancel(first.data["reservation"]["id"])
    shop.visitor().holds(drop)

    again = visitor.reserve(drop, key="k")

    assert again.is_replay
    assert again.raw == first.raw
    assert visitor.get("/reservations/me").data == {"items": []}


def test_replay_names_the_first_request_in_its_body_and_the_retry_in_its_header(shop: Shop) -> None:
    drop, visitor = shop.drop(), shop.visitor()
    path = f"/drops/{drop['id']}/reserve"

    visitor.ask("POST", path, key="k", headers={"X-Request-Id": "first"})
    again = visitor.ask("POST", path, key="k", headers={"X-Request-Id": "second"})

    assert again.body["meta"] == {"requestId": "first", "seq": 2, "epoch": 1}
    assert again.headers["x-request-id"] == "second"


def test_refusal_under_a_key_is_replayed_too(shop: Shop) -> None:
    drop, holder, visitor = shop.drop(total_stock=1), shop.visitor(), shop.visitor()
    reservation_id = holder.holds(drop)

    first = visitor.reserve(drop, key="k")
    holder.cancel(reservation_id)
    again = visitor.reserve(drop, key="k")

    assert (first.error, first.is_replay) == ((409, "OUT_OF_STOCK"), False)
    assert (again.error, again.is_replay) == ((409, "OUT_OF_STOCK"), True)
    assert again.raw == first.raw
    assert shop.stock(drop) == 1
    assert visitor.reserve(drop, key="another").status == 201


def test_same_key_for_another_drop_is_422(shop: Shop) -> None:
    drop, other, visitor = shop.drop(), shop.drop(), shop.visitor()
    visitor.reserve(drop, key="k")

    assert visitor.reserve(other, key="k").error == REUSED
    assert shop.stock(other) == 1
    assert visitor.reserve(drop, key="k").is_replay


def test_same_key_with_another_body_is_422(shop: Shop) -> None:
    seller, wanted = shop.visitor(), new_drop()
    seller.post("/drops", wanted, key="k")
    total = shop.anybody.get("/drops").data["pagination"]["total"]

    assert seller.post("/drops", {**wanted, "price": 2}, key="k").error == REUSED
    assert seller.post("/drops", {**wanted, "currency": "EUR"}, key="k").error == REUSED
    assert shop.anybody.get("/drops").data["pagination"]["total"] == total


def test_same_body_in_other_words_is_the_same_request(shop: Shop) -> None:
    seller, name = shop.visitor(), unique("Drop")
    once = f'{{"name": "{name}", "price": 1, "total_stock": 1}}'.encode()
    twice = f'{{ "total_stock":1,"currency":"USD","price":1, "status": null, "name":"{name}" }}'.encode()

    first = seller.ask("POST", "/drops", content=once, headers=JSON, key="k")
    again = seller.ask("POST", "/drops", content=twice, headers=JSON, key="k")

    assert again.is_replay
    assert again.raw == first.raw


def test_both_base_paths_are_the_same_request(shop: Shop) -> None:
    drop, visitor = shop.drop(total_stock=2), shop.visitor()
    other = Shop(shop.server, "/api" if shop.base == "/api/v1" else "/api/v1", shop.http)

    first = visitor.reserve(drop, key="k")
    again = other.visitor(visitor.id).post(f"/drops/{drop['id'].upper()}/reserve", {}, key="k")

    assert again.is_replay
    assert again.raw == first.raw


def test_keys_of_other_users_are_other_keys(shop: Shop) -> None:
    drop, ann, ben = shop.drop(total_stock=2), shop.visitor(), shop.visitor()

    first, second = ann.reserve(drop, key="k"), ben.reserve(drop, key="k")

    assert [first.status, second.status] == [201, 201]
    assert not second.is_replay
    assert first.data["reservation"]["user_id"] == ann.id
    assert second.data["reservation"]["user_id"] == ben.id


def test_keys_of_other_operations_are_other_keys(shop: Shop) -> None:
    visitor = shop.visitor()
    drop = visitor.post("/drops", new_drop(), key="k").data

    assert visitor.reserve(drop, key="k").status == 201
    assert visitor.purchase(drop, key="k").status == 201
    assert not visitor.reserve(drop, key="another").is_replay


def test_request_that_was_not_valid_does_not_use_its_key_up(shop: Shop) -> None:
    seller, wanted = shop.visitor(), new_drop()

    assert seller.post("/drops", {**wanted, "price": -1}, key="k").wrong == ["price"]
    assert seller.post(f"/drops/{new_id()}/reserve", key="k").error == (404, "DROP_NOT_FOUND")
    drop = seller.post("/drops", wanted, key="k").data

    reply = seller.reserve(drop, key="k")
    assert (reply.status, reply.is_replay) == (201, False)


@pytest.mark.parametrize("key", [b"", b"x" * 256, "schlüssel".encode(), b"a\tb", b"\xff"])
def test_key_that_is_none_is_422_and_nothing_happens(shop: Shop, key: bytes) -> None:
    drop, visitor = shop.drop(total_stock=2), shop.visitor()
    visitor.holds(drop)
    shown = shop.show(drop)
    headers: dict[str, str | bytes] = {**JSON, "Idempotency-Key": key}

    for path in (f"/drops/{drop['id']}/reserve", f"/drops/{drop['id']}/purchase"):
        assert visitor.ask("POST", path, content=b"{}", headers=headers).wrong == ["Idempotency-Key"]
    assert visitor.ask("POST", "/drops", new_drop(), headers={"Idempotency-Key": key}).wrong == ["Idempotency-Key"]
    assert shop.show(drop) == shown


def test_key_of_255_printable_characters_is_a_key(shop: Shop) -> None:
    drop, visitor = shop.drop(), shop.visitor()
    key = "~ key " + "x" * 249

    assert visitor.reserve(drop, key=key).status == 201
    assert visitor.reserve(drop, key=key).is_replay


def test_key_on_other_routes_means_nothing(shop: Shop) -> None:
    drop, visitor = shop.drop(total_stock=1), shop.visitor()
    reservation_id = visitor.holds(drop)
    headers = {"Idempotency-Key": "k"}

    cancelled = visitor.ask("DELETE", f"/reservations/{reservation_id}/cancel", headers=headers)
    again = visitor.ask("DELETE", f"/reservations/{reservation_id}/cancel", headers=headers)

    assert cancelled.status == 200
    assert again.error == (409, "RESERVATION_NOT_ACTIVE")


def test_many_requests_with_one_key_at_once_have_one_effect_and_one_answer(shop: Shop) -> None:
    drop, visitor, wanted = shop.drop(total_stock=20), shop.visitor(), new_drop()
    total = shop.anybody.get("/drops").data["pagination"]["total"]

    with ThreadPoolExecutor(10) as pool:
        reserved = list(pool.map(lambda _: visitor.reserve(drop, key="k"), range(20)))
        purchased = list(pool.map(lambda _: visitor.purchase(drop, key="k"), range(20)))
        created = list(pool.map(lambda _: visitor.post("/drops", wanted, key="k"), range(20)))

    for replies in (reserved, purchased, created):
        assert {reply.status for reply in replies} == {201}
        assert len({reply.raw for reply in replies}) == 1
        assert [reply.is_replay for reply in replies].count(False) == 1
    assert shop.stock(drop) == 19
    assert shop.anybody.get("/drops").data["pagination"]["total"] == total + 1


def test_key_outlives_a_power_cut(database: str, tmp_path: Path, http: httpx.Client) -> None:
    server = Server(database, tmp_path / "log").start()
    try:
        shop = Shop(server, "/api/v1", http)
        visitor, wanted = shop.visitor(), new_drop(total_stock=3)
        created = visitor.post("/drops", wanted, key="k")
        drop = created.data
        reserved = visitor.reserve(drop, key="k")
        refused = visitor.reserve(drop, key="refused")
        purchased = visitor.purchase(drop, key="k")

        server.kill()
        server.start()

        for first, again in [
            (created, visitor.post("/drops", wanted, key="k")),
            (reserved, visitor.reserve(drop, key="k")),
            (refused, visitor.reserve(drop, key="refused")),
            (purchased, visitor.purchase(drop, key="k")),
        ]:
            assert again.is_replay
            assert (again.status, again.raw) == (first.status, first.raw)
        assert visitor.reserve(shop.drop(), key="k").error == REUSED
        assert refused.error == (409, "ALREADY_RESERVED")
        assert shop.stock(drop) == 2
        assert visitor.get("/purchases/me").data["pagination"]["total"] == 1
        assert visitor.reserve(drop, key="another").status == 201
    finally:
        server.stop()


def test_key_that_is_older_than_it_need_be_never_stops_its_drop(
    database: str, tmp_path: Path, http: httpx.Client
) -> None:
    server = Server(database, tmp_path / "log").start()
    try:
        shop = Shop(server, "/api/v1", http)
        visitor, drop = shop.visitor(), shop.drop(total_stock=3)
        assert visitor.reserve(drop, key="k").status == 201

        server.kill()
        with psycopg.connect(database) as connection:
            connection.execute("UPDATE idempotency_keys SET created_at = created_at - interval '25 hours'")
        server.start()

        # Replayed while its row stands, decided anew once it is pruned: never in the way of its drop.
        again = visitor.reserve(drop, key="k")
        assert again.is_replay or again.error == (409, "ALREADY_RESERVED")
        assert visitor.reserve(drop, key="another").error == (409, "ALREADY_RESERVED")
    finally:
        server.stop()


def test_key_that_only_the_database_remembers_stops_its_drop_for_a_moment_at_most(shop: Shop) -> None:
    # A row that outlived its time in memory, or that another server wrote.
    drop, visitor, other = shop.drop(total_stock=2), shop.visitor(), shop.visitor()
    with psycopg.connect(shop.server.dsn) as connection:
        connection.execute(
            "INSERT INTO idempotency_keys VALUES (%s, 'reserve', 'k', %s, '\\x00', 201, 'stored', now())",
            [visitor.id, drop["id"]],
        )

    reply = visitor.reserve(drop, key="k")

    assert reply.error in (REUSED, (503, "DROP_RESTARTING"))
    wait_until(lambda: other.reserve(drop).status == 201)
    assert visitor.reserve(drop, key="k").error == REUSED
    assert shop.stock(drop) == 1
