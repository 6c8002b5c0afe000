"""Reserve, give back, look; purchase, look: each success, and each refusal in the contract's order."""

import time
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from tests.contract.shop import Shop, ahead, new_id, seconds_of
from tests.contract.test_drops import wait_until

# Reserve ----------------------------------------------------------------------------------------------


def test_reservation_takes_one_unit_for_60_seconds(shop: Shop) -> None:
    drop, visitor = shop.drop(total_stock=3), shop.visitor()

    reply = visitor.reserve(drop)

    made = reply.data["reservation"]
    assert reply.status == 201
    assert reply.data == {
        "reservation": {
            "id": made["id"],
            "drop_id": drop["id"],
            "user_id": visitor.id,
            "status": "active",
            "expires_at": made["expires_at"],
            "created_at": made["created_at"],
        },
        "drop": {"id": drop["id"], "available_stock": 2},
    }
    assert round(seconds_of(made["expires_at"]) - seconds_of(made["created_at"]), 3) == 60.0
    assert shop.stock(drop) == 2


def test_reserve_of_an_unknown_drop_is_404(shop: Shop) -> None:
    assert shop.visitor().post(f"/drops/{new_id()}/reserve").error == (404, "DROP_NOT_FOUND")


def test_reserve_refuses_in_the_order_active_already_reserved_stock(shop: Shop) -> None:
    drop = shop.drop(total_stock=1, ends_at=ahead(0.5))
    holder, other = shop.visitor(), shop.visitor()
    holder.holds(drop)

    # No unit is free, and the holder has one already.
    assert holder.reserve(drop).error == (409, "ALREADY_RESERVED")
    assert other.reserve(drop).error == (409, "OUT_OF_STOCK")

    wait_until(lambda: shop.show(drop)["status"] == "ended")
    assert holder.reserve(drop).error == (409, "DROP_NOT_ACTIVE")
    assert other.reserve(drop).error == (409, "DROP_NOT_ACTIVE")


def test_refused_reserve_changes_nothing(shop: Shop) -> None:
    drop, holder, other = shop.drop(total_stock=1), shop.visitor(), shop.visitor()
    reservation_id = holder.holds(drop)
    shown = shop.show(drop)

    holder.reserve(drop)
    other.reserve(drop)

    assert shop.show(drop) == shown
    assert [item["id"] for item in holder.get("/reservations/me").data["items"]] == [reservation_id]
    assert other.get("/reservations/me").data == {"items": []}


def test_drop_without_stock_is_live_and_out_of_stock(shop: Shop) -> None:
    assert shop.visitor().reserve(shop.drop(total_stock=0)).error == (409, "OUT_OF_STOCK")


def test_of_many_who_want_the_last_three_units_three_get_them(shop: Shop) -> None:
    drop = shop.drop(total_stock=3)
    visitors = [shop.visitor() for _ in range(20)]

    with ThreadPoolExecutor(10) as pool:
        replies = list(pool.map(lambda visitor: visitor.reserve(drop), visitors))

    taken = [reply for reply in replies if reply.status == 201]
    assert len(taken) == 3
    assert sorted(reply.data["drop"]["available_stock"] for reply in taken) == [0, 1, 2]
    assert {reply.error for reply in replies if reply.status != 201} == {(409, "OUT_OF_STOCK")}
    assert shop.stock(drop) == 0


def test_of_many_requests_of_one_user_one_reserves(shop: Shop) -> None:
    drop, visitor = shop.drop(total_stock=20), shop.visitor()

    with ThreadPoolExecutor(10) as pool:
        replies = list(pool.map(lambda _: visitor.reserve(drop), range(20)))

    assert [reply.status for reply in replies].count(201) == 1
    assert {reply.error for reply in replies if reply.status != 201} == {(409, "ALREADY_RESERVED")}
    assert shop.stock(drop) == 19


# Looking ----------------------------------------------------------------------------------------------


def test_my_reservations_are_the_active_ones_oldest_first(shop: Shop) -> None:
    visitor = shop.visitor()
    first, second, bought = shop.drop(total_stock=2), shop.drop(total_stock=3), shop.drop()
    shop.visitor().holds(first)
    made = [visitor.reserve(drop).data["reservation"] for drop in (first, second, bought)]
    visitor.purchase(bought)

    reply = visitor.get("/reservations/me")

    assert reply.status == 200
    assert reply.data == {
        "items": [
            {
                "id": reservation["id"],
                "drop_id": drop["id"],
                "status": "active",
                "expires_at": reservation["expires_at"],
                "created_at": reservation["created_at"],
                "drop": {"id": drop["id"], "name": drop["name"], "available_stock": left},
            }
            for reservation, drop, left in [(made[0], first, 0), (made[1], second, 2)]
        ]
    }


def test_somebody_new_has_no_reservations_and_no_purchases(shop: Shop) -> None:
    assert shop.visitor().get("/reservations/me").data == {"items": []}
    assert shop.visitor().get("/purchases/me").data == {
        "items": [],
        "pagination": {"limit": 20, "offset": 0, "total": 0},
    }


# Giving back ------------------------------------------------------------------------------------------


def test_cancelled_reservation_gives_its_unit_back_at_once(shop: Shop) -> None:
    drop, visitor, other = shop.drop(total_stock=1), shop.visitor(), shop.visitor()
    reservation_id = visitor.holds(drop)

    reply = visitor.cancel(reservation_id)

    assert reply.status == 200
    assert reply.data == {
        "reservationId": reservation_id,
        "dropId": drop["id"],
        "availableStock": 1,
        "status": "cancelled",
    }
    assert visitor.get("/reservations/me").data == {"items": []}
    assert other.reserve(drop).status == 201


def test_another_users_reservation_is_404_and_stays_theirs(shop: Shop) -> None:
    drop, visitor, other = shop.drop(total_stock=2), shop.visitor(), shop.visitor()
    reservation_id = visitor.holds(drop)
    other.holds(drop)

    assert other.cancel(reservation_id).error == (404, "RESERVATION_NOT_FOUND")
    assert shop.visitor().cancel(reservation_id).error == (404, "RESERVATION_NOT_FOUND")
    assert visitor.purchase(drop).status == 201
    assert other.cancel(reservation_id).error == (404, "RESERVATION_NOT_FOUND")


def test_unknown_reservation_is_404(shop: Shop) -> None:
    assert shop.visitor().cancel(new_id()).error == (404, "RESERVATION_NOT_FOUND")


@pytest.mark.parametrize("reservation_id", ["7", "me", "0190a3c4000070008000000000000001"])
def test_reservation_id_that_is_no_uuid_is_422(shop: Shop, reservation_id: str) -> None:
    assert shop.visitor().cancel(reservation_id).wrong == ["id"]


def test_hold_on_a_drop_that_another_engine_took_is_not_said_to_be_over(shop: Shop) -> None:
    drop, holder, other = shop.drop(total_stock=2), shop.visitor(), shop.visitor()
    held = holder.holds(drop)
    with psycopg.connect(shop.server.dsn) as connection:
        connection.execute("UPDATE drops SET epoch = epoch + 1 WHERE id = %s", [drop["id"]])
    # The next write misses its guard, and the drop is let go.
    wait_until(lambda: other.reserve(drop).error == (503, "DROP_OWNED_ELSEWHERE"))

    assert holder.cancel(held).error == (503, "DROP_OWNED_ELSEWHERE")


def test_reservation_that_is_over_cannot_be_cancelled(shop: Shop) -> None:
    drop, visitor = shop.drop(total_stock=5), shop.visitor()
    cancelled = visitor.holds(drop)
    visitor.cancel(cancelled)
    consumed = visitor.holds(drop)
    visitor.purchase(drop)

    assert visitor.cancel(cancelled).error == (409, "RESERVATION_NOT_ACTIVE")
    assert visitor.cancel(consumed).error == (409, "RESERVATION_NOT_ACTIVE")
    assert shop.stock(drop) == 4


def test_old_reservation_is_not_taken_for_the_active_one_on_the_same_drop(shop: Shop) -> None:
    drop, visitor = shop.drop(total_stock=1), shop.visitor()
    old = visitor.holds(drop)
    visitor.cancel(old)
    active = visitor.holds(drop)

    assert visitor.cancel(old.upper()).error == (409, "RESERVATION_NOT_ACTIVE")
    assert visitor.cancel(active.upper()).status == 200


# Purchase ---------------------------------------------------------------------------------------------


def test_purchase_consumes_the_reservation_and_leaves_the_stock_alone(shop: Shop) -> None:
    drop, visitor = shop.drop(total_stock=2), shop.visitor()
    reservation = visitor.reserve(drop).data["reservation"]

    reply = visitor.purchase(drop)

    made = reply.data["purchase"]
    assert reply.status == 201
    assert reply.data == {
        "purchase": {
            "id": made["id"],
            "drop_id": drop["id"],
            "user_id": visitor.id,
            "reservation_id": reservation["id"],
            "qty": 1,
            "status": "paid",
            "created_at": made["created_at"],
        },
        "reservation": {"id": reservation["id"], "status": "consumed", "expires_at": reservation["expires_at"]},
    }
    assert seconds_of(reservation["created_at"]) <= seconds_of(made["created_at"]) < time.time() + 1
    assert shop.stock(drop) == 1


def test_purchase_of_an_unknown_drop_is_404(shop: Shop) -> None:
    assert shop.visitor().post(f"/drops/{new_id()}/purchase").error == (404, "DROP_NOT_FOUND")


def test_purchase_is_refused_by_the_newest_reservation(shop: Shop) -> None:
    drop, visitor = shop.drop(total_stock=5), shop.visitor()

    assert visitor.purchase(drop).error == (409, "RESERVATION_REQUIRED")
    visitor.cancel(visitor.holds(drop))
    assert visitor.purchase(drop).error == (409, "RESERVATION_NOT_ACTIVE")
    visitor.holds(drop)
    assert visitor.purchase(drop).status == 201
    assert visitor.purchase(drop).error == (409, "ALREADY_PURCHASED")
    visitor.cancel(visitor.holds(drop))
    assert visitor.purchase(drop).error == (409, "RESERVATION_NOT_ACTIVE")
    assert shop.stock(drop) == 4


def test_another_users_reservation_buys_nothing(shop: Shop) -> None:
    drop, visitor, other = shop.drop(), shop.visitor(), shop.visitor()
    visitor.holds(drop)

    assert other.purchase(drop).error == (409, "RESERVATION_REQUIRED")


def test_reservation_on_another_drop_buys_nothing(shop: Shop) -> None:
    drop, other, visitor = shop.drop(), shop.drop(), shop.visitor()
    visitor.holds(drop)

    assert visitor.purchase(other).error == (409, "RESERVATION_REQUIRED")


def test_of_many_purchases_of_one_reservation_one_succeeds(shop: Shop) -> None:
    drop, visitor = shop.drop(total_stock=5), shop.visitor()
    visitor.holds(drop)

    with ThreadPoolExecutor(10) as pool:
        replies = list(pool.map(lambda _: visitor.purchase(drop), range(10)))

    assert [reply.status for reply in replies].count(201) == 1
    assert {reply.error for reply in replies if reply.status != 201} == {(409, "ALREADY_PURCHASED")}
    assert visitor.get("/purchases/me").data["pagination"]["total"] == 1


def test_after_a_purchase_or_a_cancellation_the_user_may_reserve_again(shop: Shop) -> None:
    drop, visitor = shop.drop(total_stock=3), shop.visitor()
    visitor.cancel(visitor.holds(drop))
    visitor.holds(drop)
    visitor.purchase(drop)
    visitor.holds(drop)

    assert visitor.purchase(drop).status == 201
    assert shop.stock(drop) == 1


def test_my_purchases_are_newest_first_in_pages(shop: Shop) -> None:
    visitor, drops = shop.visitor(), [shop.drop(), shop.drop(), shop.drop()]
    bought = []
    for drop in drops:
        visitor.holds(drop)
        bought.append(visitor.purchase(drop).data["purchase"])

    items = [
        {
            "id": purchase["id"],
            "drop_id": drop["id"],
            "reservation_id": purchase["reservation_id"],
            "qty": 1,
            "status": "paid",
            "created_at": purchase["created_at"],
            "drop": {"id": drop["id"], "name": drop["name"]},
        }
        for drop, purchase in zip(drops, bought, strict=True)
    ]
    assert visitor.get("/purchases/me").data == {
        "items": [items[2], items[1], items[0]],
        "pagination": {"limit": 20, "offset": 0, "total": 3},
    }
    assert visitor.get("/purchases/me?limit=1&offset=1").data == {
        "items": [items[1]],
        "pagination": {"limit": 1, "offset": 1, "total": 3},
    }
    assert visitor.get("/purchases/me?offset=3").data["items"] == []


# Expiry (holds of two seconds) ---------------------------------------------------------------------------


def test_hold_expires_at_its_deadline_and_the_unit_returns(hasty: Shop) -> None:
    drop, visitor, other = hasty.drop(total_stock=1), hasty.visitor(), hasty.visitor()
    reservation = visitor.reserve(drop).data["reservation"]
    assert round(seconds_of(reservation["expires_at"]) - seconds_of(reservation["created_at"]), 3) == 2.0

    wait_until(lambda: hasty.stock(drop) == 1)

    assert time.time() >= seconds_of(reservation["expires_at"]) - 0.05
    assert visitor.get("/reservations/me").data == {"items": []}
    assert visitor.purchase(drop).error == (409, "RESERVATION_EXPIRED")
    assert visitor.cancel(reservation["id"]).error == (409, "RESERVATION_EXPIRED")
    assert hasty.visitor().cancel(reservation["id"]).error == (404, "RESERVATION_NOT_FOUND")
    assert other.reserve(drop).status == 201
    assert hasty.stock(drop) == 0


def test_after_an_expiry_the_user_may_reserve_and_purchase(hasty: Shop) -> None:
    drop, visitor = hasty.drop(total_stock=1), hasty.visitor()
    visitor.holds(drop)
    wait_until(lambda: hasty.stock(drop) == 1)

    visitor.holds(drop)

    assert visitor.purchase(drop).status == 201
    assert hasty.stock(drop) == 0


def test_units_that_were_bought_or_cancelled_do_not_return_at_the_deadline(hasty: Shop) -> None:
    drop, buyer, leaver = hasty.drop(total_stock=2), hasty.visitor(), hasty.visitor()
    buyer.holds(drop)
    given_back = leaver.holds(drop)
    buyer.purchase(drop)
    leaver.cancel(given_back)
    assert hasty.stock(drop) == 1

    time.sleep(2.2)

    assert hasty.stock(drop) == 1
    assert buyer.purchase(drop).error == (409, "ALREADY_PURCHASED")
    assert leaver.purchase(drop).error == (409, "RESERVATION_NOT_ACTIVE")
