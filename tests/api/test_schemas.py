"""What comes in: never anything but a value within its limits, or an ApiError that can be sent."""

import json
import re
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, TypeVar

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from api import answers, schemas
from api.errors import ApiError
from engine.model import DropStatus, Instant

unhurried = settings(deadline=None)  # a loaded machine is no finding

JSON = "application/json"
NOW = Instant(1_767_780_000_000)  # 2026-01-07T10:00:00Z
KINDS = [schemas.NewDrop, schemas.NewUser, schemas.Echo, schemas.Nothing]
FIELDS = [
    *("name", "price", "total_stock", "currency", "starts_at", "ends_at", "status", "username", "email"),
]

V = TypeVar("V")

# All text that a JSON escape can make: lone surrogates, NUL and noncharacters too.
any_text = st.text(st.characters(codec=None), max_size=40)
any_number = st.integers() | st.floats() | st.integers(-(10**40), 10**40)
any_json = st.recursive(
    st.none() | st.booleans() | any_number | any_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=10,
)
any_object = st.dictionaries(st.sampled_from(FIELDS) | any_text, any_json, max_size=8)


def sendable(failure: ApiError) -> int:
    """The failure's status, after it has been put into bytes."""
    assert failure.code
    body = json.loads(answers.error(failure, "7").body)
    assert body["error"]["message"]
    return failure.status_code


def attempt(make: Callable[[], V]) -> V | ApiError:
    """What is made, or the refusal, which can be sent; any other exception fails the test."""
    try:
        return make()
    except ApiError as failure:
        sendable(failure)
        return failure


def refusal(kind: type[msgspec.Struct], value: object, content_type: str | None = JSON) -> dict[str, str]:
    """What is wrong with a body, by field."""
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    with pytest.raises(ApiError) as caught:
        schemas.body(kind, content_type, raw)
    assert sendable(caught.value) == 422
    assert caught.value.details is not None
    return {detail.path: detail.message for detail in caught.value.details}


def drop(**fields: object) -> schemas.NewDrop:
    whole = {"name": "Air One", "price": 1, "total_stock": 1, **fields}
    return schemas.body(schemas.NewDrop, JSON, json.dumps(whole).encode())


# Bodies: whatever comes -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@unhurried
@given(raw=st.binary(max_size=200))
@example(raw=b"[" * 10_000)
@example(raw=b'{"a":' * 3_000)
@example(raw=b'"\\ud800"')
@example(raw=b"-")
@example(raw=b"\xef\xbb\xbf{}")
def test_any_bytes_are_a_value_or_an_api_error(kind: type[msgspec.Struct], raw: bytes) -> None:
    made = attempt(lambda: schemas.body(kind, JSON, raw))

    assert not isinstance(made, ApiError) or made.status_code in (400, 422)


@pytest.mark.parametrize("kind", KINDS)
@unhurried
@given(value=any_object)
def test_any_json_object_is_a_value_within_limits_or_an_api_error(
    kind: type[msgspec.Struct], value: dict[str, Any]
) -> None:
    made = attempt(lambda: schemas.body(kind, JSON, json.dumps(value).encode()))

    if isinstance(made, ApiError):
        assert made.status_code in (400, 422)
        return
    for text in (each for each in msgspec.to_builtins(made).values() if isinstance(each, str)):
        assert "\x00" not in text
        assert text.encode()


@unhurried
@given(field=st.sampled_from(FIELDS[:7]), value=any_json)
@example(field="name", value="\ud800\udfff")
@example(field="status", value="\ud800")
@example(field="starts_at", value="2026-01-07T10:00:00\ud800")
@example(field="starts_at", value="9999-12-31T23:59:59-23:59")
@example(field="starts_at", value="0001-01-01T00:00:00+23:59")
@example(field="price", value=10**400)
def test_any_json_in_one_field_of_a_drop_is_taken_or_that_field_is_named(field: str, value: object) -> None:
    raw = json.dumps({"name": "Air One", "price": 1, "total_stock": 1, field: value}).encode()

    made = attempt(lambda: schemas.body(schemas.NewDrop, JSON, raw))

    if isinstance(made, ApiError):
        assert made.status_code == 400 or [detail.path for detail in made.details or []] == [field]
        return
    assert 2 <= len(made.name) <= 200
    assert 0 <= made.price <= 2**53 - 1
    assert type(made.price) is type(made.total_stock) is int
    assert 0 <= made.total_stock <= 1_000_000_000
    assert re.fullmatch("[A-Z]{3}", made.currency)
    assert made.status in (None, "draft", "scheduled", "live")


@unhurried
@given(
    name=st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=2, max_size=200).filter(str.strip),
    price=st.integers(0, 2**53 - 1),
    total_stock=st.integers(0, 1_000_000_000),
    starts_at=st.none() | st.datetimes(datetime(1970, 1, 2), datetime(2999, 12, 30), timezones=st.just(UTC)),
)
def test_every_good_drop_is_taken_as_it_is(name: str, price: int, total_stock: int, starts_at: datetime | None) -> None:
    made = drop(
        name=name, price=price, total_stock=total_stock, starts_at=None if starts_at is None else starts_at.isoformat()
    )

    assert (made.name, made.price, made.total_stock, made.starts_at) == (name, price, total_stock, starts_at)


def test_defaults_of_a_drop() -> None:
    assert drop() == schemas.NewDrop("Air One", 1, 1, "USD", None, None, None)


def test_faults_are_named_in_full_unknown_fields_first() -> None:
    assert list(refusal(schemas.NewDrop, {"colour": 1, "size": 2, "name": "A", "price": True}).items()) == [
        ("colour", "is not a field of this request"),
        ("size", "is not a field of this request"),
        ("name", "expected `str` of length >= 2"),
        ("price", "expected `int`, got `bool`"),
        ("total_stock", "is required"),
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"price": 1.0}, "expected `int`, got `float`"),
        ({"price": -1}, "expected `int` >= 0"),
        ({"name": "Air\x00One"}, "must not contain control characters"),
        ({"name": "Air\ud800One"}, "must be valid Unicode text"),
        ({"name": "   "}, "must not be blank"),
        ({"starts_at": "1969-12-31T23:59:59Z"}, "must be between the years 1970 and 2999"),
        ({"starts_at": "3000-01-01T00:00:00Z"}, "must be between the years 1970 and 2999"),
    ],
)
def test_what_is_wrong_is_said_in_words(fields: dict[str, object], message: str) -> None:
    assert list(refusal(schemas.NewDrop, {"name": "Air One", "price": 1, "total_stock": 1, **fields}).values()) == [
        message
    ]


def test_name_of_an_unknown_field_is_shown_in_ascii_and_cut() -> None:
    assert list(refusal(schemas.Nothing, {"é\ud800": 1, "x" * 200: 1})) == ["\\xe9\\ud800", "x" * 100]


@pytest.mark.parametrize("raw", [b"", b"{}", b" {} "])
def test_nothing_is_an_absent_body_or_an_empty_object(raw: bytes) -> None:
    assert schemas.body(schemas.Nothing, JSON, raw) == schemas.Nothing()


@pytest.mark.parametrize("raw", [b"[]", b"null", b'""', b" ", b"{", b"{} {}", b'{"a": 1, "a": 1}', b'{"a": NaN}'])
def test_nothing_is_nothing_else(raw: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        schemas.body(schemas.Nothing, JSON, raw)
    assert (caught.value.status_code, caught.value.code) == (400, "INVALID_JSON")


@pytest.mark.parametrize(("levels", "code"), [(32, "VALIDATION_ERROR"), (33, "INVALID_JSON"), (8_000, "INVALID_JSON")])
def test_nesting_has_a_bound_of_its_own_the_same_on_every_python(levels: int, code: str) -> None:
    arrays = levels - 1  # within the object that the body is
    raw = b'{"name": ' + b"[" * arrays + b"]" * arrays + b"}"
    with pytest.raises(ApiError) as caught:
        schemas.body(schemas.NewUser, JSON, raw)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("content_type", "is_json"),
    [
        ("application/json", True),
        ("Application/JSON ; charset=UTF-8", True),
        ("application/merge-patch+json", True),
        (None, False),
        ("", False),
        ("json", False),
        ("text/json", False),
        ("application/jsonx", False),
        ("text/plain; application/json", False),
        ("image/svg+json", False),
    ],
)
def test_json_is_what_says_that_it_is(content_type: str | None, is_json: bool) -> None:
    if is_json:
        assert schemas.body(schemas.Nothing, content_type, b"{}") == schemas.Nothing()
        return
    with pytest.raises(ApiError) as caught:
        schemas.body(schemas.Nothing, content_type, b"{}")
    assert (caught.value.status_code, caught.value.code) == (415, "UNSUPPORTED_MEDIA_TYPE")


# Windows and instants ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("starts_at", "status", "begins_as"),
    [
        (None, None, DropStatus.DRAFT),
        ("2026-01-07T09:59:59.999Z", None, DropStatus.LIVE),
        ("2026-01-07T10:00:00.000Z", None, DropStatus.LIVE),
        ("2026-01-07T10:00:00.001Z", None, DropStatus.SCHEDULED),
        ("2026-01-07T10:00:00.000Z", "live", DropStatus.LIVE),
        ("2026-01-07T10:00:00.001Z", "scheduled", DropStatus.SCHEDULED),
        ("2026-01-07T09:00:00.000Z", "scheduled", DropStatus.SCHEDULED),
        ("2026-01-07T10:00:00.001Z", "draft", DropStatus.DRAFT),
        (None, "live", DropStatus.LIVE),
    ],
)
def test_status_that_a_drop_begins_with(starts_at: str | None, status: str | None, begins_as: DropStatus) -> None:
    assert schemas.status_of(drop(starts_at=starts_at, status=status), NOW) is begins_as


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"status": "scheduled"}, ["starts_at"]),
        ({"status": "live", "starts_at": "2026-01-07T10:00:00.001Z"}, ["starts_at"]),
        ({"starts_at": "2026-01-07T10:00:00.000Z", "ends_at": "2026-01-07T10:00:00.000Z"}, ["ends_at"]),
        (
            {"status": "live", "starts_at": "2026-01-07T11:00:00Z", "ends_at": "2026-01-07T10:30:00Z"},
            ["ends_at", "starts_at"],
        ),
    ],
)
def test_window_and_status_that_contradict_each_other(fields: dict[str, str], wrong: list[str]) -> None:
    with pytest.raises(ApiError) as caught:
        schemas.status_of(drop(**fields), NOW)
    assert sendable(caught.value) == 422
    assert [detail.path for detail in caught.value.details or []] == wrong


zones = st.integers(-23 * 60 - 59, 23 * 60 + 59).map(lambda minutes: timezone(timedelta(minutes=minutes)))


@unhurried
@given(st.datetimes(datetime(1970, 1, 3), datetime(2999, 12, 29), timezones=zones))
def test_instant_is_shown_in_utc_and_whole_milliseconds_whatever_its_zone(moment: datetime) -> None:
    made = drop(starts_at=moment.isoformat()).starts_at
    assert made is not None

    shown = datetime.fromisoformat(answers.iso(schemas.instant(made)))

    assert timedelta(0) <= moment - shown < timedelta(milliseconds=1)


# Ids, pages, keys -------------------------------------------------------------------------------------


@unhurried
@given(st.uuids())
def test_every_uuid_is_its_canonical_self_in_either_case(made: uuid.UUID) -> None:
    assert schemas.path_id("id", str(made)) == str(made)
    assert schemas.path_id("id", str(made).upper()) == str(made)


@unhurried
@given(st.text() | st.from_regex(schemas.UUID) | st.uuids().map(lambda made: made.hex))
@example("0190a3c4-0000-7000-8000-000000000001\n")
@example("0190a3c4-0000-7000-8000-00000000000١")  # a digit of another script
@example("0190a3c4_0000_7000_8000_000000000001")
def test_any_text_is_a_canonical_uuid_or_422(text: str) -> None:
    made = attempt(lambda: schemas.path_id("id", text))

    if isinstance(made, ApiError):
        assert made.status_code == 422
        assert schemas.uuid_or_none(text) is None
    else:
        assert str(uuid.UUID(made)) == made == text.lower()


def test_page_by_default_and_at_its_limits() -> None:
    assert schemas.page({}) == schemas.Page(20, 0)
    assert schemas.page({"limit": "1", "offset": "1000000"}) == schemas.Page(1, 1_000_000)
    assert schemas.page({"limit": "100", "offset": "0"}) == schemas.Page(100, 0)


@unhurried
@given(st.dictionaries(st.sampled_from(["limit", "offset", "x"]), st.text() | st.integers().map(str)))
@example({"limit": "٣"})
@example({"limit": "²"})
@example({"offset": "9" * 10_000})
@example({"limit": "+1"})
@example({"limit": "1\n"})
def test_any_query_is_a_page_within_limits_or_422(query: dict[str, str]) -> None:
    page = attempt(lambda: schemas.page(query))

    if isinstance(page, ApiError):
        assert page.status_code == 422
        assert {detail.path for detail in page.details or []} <= {"limit", "offset"} & set(query)
    else:
        assert 1 <= page.limit <= 100
        assert 0 <= page.offset <= 1_000_000


@unhurried
@given(st.text(st.characters(max_codepoint=0xFF), max_size=200))
@example("")
@example("a\n")
@example("x" * 128)
@example("x" * 129)
def test_request_id_is_echoed_if_it_is_one_and_new_if_not(text: str) -> None:
    made = schemas.request_id(text)

    assert 1 <= len(made) <= 128
    assert made.isascii()
    assert made.isprintable()
    if 1 <= len(text) <= 128 and text.isascii() and text.isprintable():
        assert made == text
    else:
        assert uuid.UUID(made)


def test_no_request_id_is_a_new_one_each_time() -> None:
    assert schemas.request_id(None) != schemas.request_id(None)


@unhurried
@given(st.text(st.characters(max_codepoint=0xFF), max_size=300))
@example("x" * 255)
@example("x" * 256)
def test_idempotency_key_is_1_to_255_printable_characters_of_ascii(text: str) -> None:
    if 1 <= len(text) <= 255 and text.isascii() and text.isprintable():
        assert schemas.idempotency_key(text) == text
        return
    with pytest.raises(ApiError) as caught:
        schemas.idempotency_key(text)
    assert sendable(caught.value) == 422


def test_no_idempotency_key_is_none() -> None:
    assert schemas.idempotency_key(None) is None
