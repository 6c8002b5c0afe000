"""What goes out: envelopes to the byte, instants, and the shapes that are made of the engine's words."""

from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api import answers, errors
from api.errors import ApiError, Detail
from engine.drop import Drop
from engine.model import (
    Cancelled,
    DropCreated,
    DropId,
    DropStatus,
    FaultCode,
    Hold,
    Instant,
    Purchased,
    PurchaseId,
    RefusalCode,
    ReservationId,
    Reserved,
    Terms,
    UserId,
)

NOON = Instant(1_767_780_000_000)
CODES_OF_THE_CONTRACT = {200, 201, 204, 400, 401, 403, 404, 405, 409, 413, 415, 422, 429, 500, 503}

TERMS = Terms(DropId("drop-1"), "Air One", 12_900, "USD", 3, NOON, None, UserId("ann"), NOON)
HOLD = Hold(ReservationId("hold-1"), DropId("drop-1"), UserId("ben"), 1, Instant(NOON + 1), Instant(NOON + 60_001))


# Envelopes --------------------------------------------------------------------------------------------


def test_success_to_the_byte() -> None:
    answer = answers.success(201, {"id": "7", "name": "Zoë"}, "order-7")

    assert answer.status_code == 201
    assert answer.body.decode() == '{"success":true,"data":{"id":"7","name":"Zoë"},"meta":{"requestId":"order-7"}}'
    assert answer.headers == ()


def test_error_to_the_byte() -> None:
    failure = ApiError(404, "DROP_NOT_FOUND", "There is no such drop.")

    answer = answers.error(failure, 'a "7"')

    assert answer.status_code == 404
    assert answer.body == (
        b'{"success":false,"error":{"code":"DROP_NOT_FOUND","message":"There is no such drop."},'
        b'"meta":{"requestId":"a \\"7\\""}}'
    )
    assert answer.headers == ()


def test_version_of_the_drop_comes_after_the_request_id() -> None:
    version, meta = answers.Version(1_234, 2), b'"meta":{"requestId":"7","seq":1234,"epoch":2}}'

    assert answers.success(200, {"id": "x"}, "7", version).body == b'{"success":true,"data":{"id":"x"},' + meta
    assert answers.error(ApiError(409, "CODE", "Why."), "7", version).body == (
        b'{"success":false,"error":{"code":"CODE","message":"Why."},' + meta
    )
    with_details = answers.error(errors.invalid([Detail("price", "is required")]), "7", version)
    assert with_details.body.endswith(b'"message":"is required"}]},' + meta)


def test_details_to_the_byte() -> None:
    answer = answers.error(errors.invalid([Detail("price", "is required")]), "7")

    assert answer.status_code == 422
    assert b'"details":[{"path":"price","message":"is required"}]' in answer.body


@pytest.mark.parametrize("status_code", [429, 503])
def test_429_and_503_always_say_when_to_come_again(status_code: int) -> None:
    assert answers.error(ApiError(status_code, "CODE", "Why."), "7").headers == (("Retry-After", "1"),)
    assert answers.error(ApiError(status_code, "CODE", "Why.", retry_after_s=5), "7").headers == (("Retry-After", "5"),)


def test_other_errors_do_not_unless_told() -> None:
    assert answers.error(ApiError(409, "CODE", "Why."), "7").headers == ()
    assert answers.error(ApiError(405, "CODE", "Why.", headers=(("Allow", "GET"),)), "7").headers == (("Allow", "GET"),)


@pytest.mark.parametrize("code", RefusalCode)
def test_every_refusal_has_a_status_and_a_sentence(code: RefusalCode) -> None:
    failure = errors.refused(code)

    assert failure.code == code.value
    assert failure.status_code == (404 if code.value.endswith("_NOT_FOUND") else 409)
    assert failure.message.endswith(".")


@pytest.mark.parametrize("code", FaultCode)
def test_every_fault_is_503_and_says_when_to_come_again(code: FaultCode) -> None:
    failure = errors.fault(code)

    assert (failure.status_code, failure.code, failure.retry_after_s) == (503, code.value, 1)
    assert failure.status_code in CODES_OF_THE_CONTRACT
    assert failure.message.endswith(".")


# Instants ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("instant", "text"),
    [
        (0, "1970-01-01T00:00:00.000Z"),
        (1, "1970-01-01T00:00:00.001Z"),
        (999, "1970-01-01T00:00:00.999Z"),
        (1_000, "1970-01-01T00:00:01.000Z"),
        (1_767_780_000_000, "2026-01-07T10:00:00.000Z"),
        (32_503_679_999_999, "2999-12-31T23:59:59.999Z"),
    ],
)
def test_instants_are_iso_8601_in_utc_with_milliseconds(instant: int, text: str) -> None:
    assert answers.iso(Instant(instant)) == text


@settings(deadline=None)
@given(st.integers(0, 32_503_679_999_999))
def test_every_instant_can_be_read_back(instant: int) -> None:
    text = answers.iso(Instant(instant))

    assert len(text) == 24
    assert datetime.fromisoformat(text) == datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=instant)


def test_no_instant_is_null() -> None:
    assert answers.iso_or_none(None) is None
    assert answers.iso_or_none(Instant(0)) == "1970-01-01T00:00:00.000Z"


# Shapes -----------------------------------------------------------------------------------------------


def test_new_drop_has_all_its_stock_and_no_feed() -> None:
    assert answers.new_drop(DropCreated(1, NOON, TERMS, DropStatus.LIVE)) == {
        "id": "drop-1",
        "name": "Air One",
        "price": 12_900,
        "currency": "USD",
        "total_stock": 3,
        "available_stock": 3,
        "starts_at": "2026-01-07T10:00:00.000Z",
        "ends_at": None,
        "status": "live",
        "created_by": "ann",
        "created_at": "2026-01-07T10:00:00.000Z",
    }


def test_drop_is_shown_as_it_is_committed_with_its_feed() -> None:
    drop = Drop(TERMS, DropStatus.LIVE)
    drop.apply(DropCreated(1, NOON, TERMS, DropStatus.LIVE))
    drop.apply(Reserved(2, Instant(NOON + 1), HOLD, 2))
    drop.apply(Purchased(3, Instant(NOON + 5_000), HOLD, PurchaseId("purchase-1"), "ben", 2))

    shown = answers.drop(drop)

    assert (shown["total_stock"], shown["available_stock"], shown["status"]) == (3, 2, "live")
    assert shown["activity_feed"] == {
        "latest_purchasers": [{"user_id": "ben", "username": "ben", "qty": 1, "created_at": "2026-01-07T10:00:05.000Z"}]
    }


@pytest.mark.parametrize("request_id", ["r-1", 'a "quoted" \\ one'])
def test_reservation_is_answered_with_the_stock_that_it_left(request_id: str) -> None:
    answer = answers.reserved(HOLD, 2, request_id, answers.Version(7, 3))

    assert answer.status_code == 201
    # To the byte what the encoder makes of it, although it is written out by hand.
    assert answer.body == msgspec.json.encode(
        {
            "success": True,
            "data": {
                "reservation": {
                    "id": "hold-1",
                    "drop_id": "drop-1",
                    "user_id": "ben",
                    "status": "active",
                    "expires_at": "2026-01-07T10:01:00.001Z",
                    "created_at": "2026-01-07T10:00:00.001Z",
                },
                "drop": {"id": "drop-1", "available_stock": 2},
            },
            "meta": {"requestId": request_id, "seq": 7, "epoch": 3},
        }
    )


def test_purchase_is_shown_with_the_reservation_that_it_consumed() -> None:
    bought = Purchased(3, Instant(NOON + 5_000), HOLD, PurchaseId("purchase-1"), "ben", 2)

    assert answers.purchased(bought) == {
        "purchase": {
            "id": "purchase-1",
            "drop_id": "drop-1",
            "user_id": "ben",
            "reservation_id": "hold-1",
            "qty": 1,
            "status": "paid",
            "created_at": "2026-01-07T10:00:05.000Z",
        },
        "reservation": {"id": "hold-1", "status": "consumed", "expires_at": "2026-01-07T10:01:00.001Z"},
    }


def test_cancellation_is_shown_in_the_words_of_the_earlier_systems() -> None:
    event = Cancelled(3, Instant(NOON + 5_000), HOLD, 3)

    assert answers.cancelled(event.hold, event.available_stock) == {
        "reservationId": "hold-1",
        "dropId": "drop-1",
        "availableStock": 3,
        "status": "cancelled",
    }
