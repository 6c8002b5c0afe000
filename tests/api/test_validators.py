"""Every validator of what clients and operators say, under Hypothesis: what is valid is taken and keeps its meaning,
what is not is refused in the one way that its caller expects, and nothing else ever comes out.

Bodies are held to the OpenAPI document, too: what its schemas take is taken, what they refuse is refused.
`test_schemas` has the bounds of each field, `test_auth` identities and tokens.
"""

import json
import math
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, Final, TypeVar
from urllib.parse import urlencode

import jsonschema_rs
import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from api import answers, engineio, events, live, openapi, opening, schemas
from api.engineio import Violation
from api.errors import ApiError
from api.settings import SETTINGS, Setting, Settings, SettingsError, load
from api.shapes import DROPS_PATTERN, EMAIL_PATTERN
from engine.model import DropId, DropStatus, Instant

V = TypeVar("V")

unhurried = settings(deadline=None)  # a loaded machine is no finding
NOW: Final = Instant(1_767_780_000_000)  # 2026-01-07T10:00:00Z
COMPONENTS: Final = openapi.document()["components"]
DEVELOPMENT: Final = load({}, None)
PAGE: Final = "https://shop.example"
ONE_PAGE: Final = load({"CORS_ORIGINS": PAGE}, None)

latin_1 = st.text(st.characters(max_codepoint=0xFF), max_size=60)
any_text = st.text(st.characters(codec=None), max_size=30)
ids = st.uuids().map(str)
zones = st.integers(-23 * 60, 23 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
emails = st.from_regex(EMAIL_PATTERN)
moments = st.datetimes(datetime(1970, 1, 3), datetime(2999, 12, 29), timezones=zones)


def refused(make: Callable[[], V], *statuses: int) -> V | None:
    """What is made; None where it is refused with one of these, in an answer that can be sent."""
    try:
        return make()
    except ApiError as failure:
        told = failure
    assert told.status_code in statuses
    assert json.loads(answers.error(told, "7").body)["error"]["message"]
    return None


# Bodies, against the document -------------------------------------------------------------------------

odd_texts = st.sampled_from(["", " ", "a", "ab", "Air One", "USD", "usd", "live", "ended", "\x00ab", "\x85\x85"])
near_texts = st.one_of(
    odd_texts, st.text(max_size=12), st.integers(195, 205).map("x".__mul__), st.emails(), st.just("a\x7f")
)
near_numbers = st.sampled_from([-1, 0, 1, 10**9, 10**9 + 1, 2**53 - 1, 2**53, 10**30, 0.5, True])
near_instants = st.one_of(
    moments.map(datetime.isoformat),
    st.sampled_from(["1969-12-31T23:00:00Z", "3000-01-01T12:00:00Z", "2026-01-07", "2026-01-07T10:00:00", "now"]),
)
odd_characters = st.characters(codec="utf-8") | st.sampled_from("\t\x1c\x85\xa0\u180e\u200b\u2028\u3000\ufeff ")


def spliced(text: str) -> st.SearchStrategy[str]:
    """The text with one character more."""
    return st.tuples(odd_characters, st.integers(0, len(text))).map(lambda it: text[: it[1]] + it[0] + text[it[1] :])


near = st.one_of(
    spliced("ann@shop.example"),
    spliced("USD"),
    near_texts,
    near_numbers,
    near_instants,
    st.none(),
    st.just([]),
    st.just({}),
)


def bodies_of(kind: type[msgspec.Struct], good: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A good body with a few fields changed, left out or added."""
    names = st.sampled_from([*(field.name for field in msgspec.structs.fields(kind)), "more"])
    changes = st.dictionaries(names, near | st.just(...), max_size=3)
    return changes.map(lambda changed: {name: value for name, value in {**good, **changed}.items() if value is not ...})


def agrees_with_document(kind: type[msgspec.Struct], value: dict[str, Any]) -> bool:
    """Whether the body is taken, which the document must have said."""
    schema = {"$ref": f"#/components/schemas/{kind.__name__}", "components": COMPONENTS}
    validator = jsonschema_rs.Draft202012Validator(schema, validate_formats=True)
    raw = json.dumps(value).encode()
    made = refused(lambda: schemas.body(kind, "application/json", raw), 422)
    assert (made is not None) == validator.is_valid(value), value
    if made is not None:
        # It says the same again: nothing was changed on the way in.
        again = schemas.body(kind, "application/json", msgspec.json.encode(made))
        assert again == made
    return made is not None


@unhurried
@given(bodies_of(schemas.NewDrop, {"name": "Air One", "price": 1, "total_stock": 1}))
@example({"name": "Air One", "price": 2**53 - 1, "total_stock": 10**9, "ends_at": None})
@example({"name": "Air One", "price": 2**53, "total_stock": 1})
@example({"name": "\x85\u3000", "price": 1, "total_stock": 1})
@example({"name": "Air One", "price": 1, "total_stock": 1, "currency": "USD\n"})
def test_new_drop_is_taken_where_the_document_takes_it_and_nowhere_else(value: dict[str, Any]) -> None:
    agrees_with_document(schemas.NewDrop, value)


@unhurried
@given(bodies_of(schemas.NewUser, {"username": "ann"}))
@example({"username": "x" * 50})
@example({"username": "x" * 51})
@example({"username": "   "})
def test_new_user_is_taken_where_the_document_takes_it_and_nowhere_else(value: dict[str, Any]) -> None:
    agrees_with_document(schemas.NewUser, value)


@unhurried
@given(
    bodies_of(schemas.Echo, {"email": "ann@shop.example"}) | st.from_regex(EMAIL_PATTERN).map(lambda e: {"email": e})
)
@example({"email": "a@b"})
@example({"email": "a@b.c\n"})
@example({"email": "a@b..c"})
@example({"email": "a\x1fb@c.d"})
@example({"email": "a\x85b@c.d"})
@example({"email": "a\ufeffb@c.d"})
@example({"email": "a@b\u3000.c"})
def test_echo_is_taken_where_the_document_takes_it_and_nowhere_else(value: dict[str, Any]) -> None:
    agrees_with_document(schemas.Echo, value)


@unhurried
@given(
    st.none() | moments,
    st.none() | moments,
    st.sampled_from([None, "draft", "scheduled", "live"]),
)
def test_status_of_a_drop_follows_from_its_window_or_the_window_is_what_is_wrong(
    starts_at: datetime | None, ends_at: datetime | None, status: Any
) -> None:
    drop = schemas.NewDrop("Air One", 1, 1, starts_at=starts_at, ends_at=ends_at, status=status)
    begun = refused(lambda: schemas.status_of(drop, NOW), 422)
    if begun is None:
        assert starts_at is not None or ends_at is not None or status == "scheduled"
        return
    if status is not None:
        assert begun == status
    assert begun is not DropStatus.SCHEDULED or starts_at is not None
    assert begun is not DropStatus.LIVE or starts_at is None or schemas.instant(starts_at) <= NOW
    assert starts_at is None or ends_at is None or schemas.instant(starts_at) < schemas.instant(ends_at)


@unhurried
@given(moments)
def test_instant_of_a_moment_is_the_moment_again_to_the_millisecond(moment: datetime) -> None:
    told = answers.iso(schemas.instant(moment))

    back = datetime.fromisoformat(told)
    assert timedelta(0) <= moment.astimezone(UTC) - back < timedelta(milliseconds=1)
    assert schemas.instant(back) == schemas.instant(moment)


# Queries and positions of feeds -----------------------------------------------------------------------


@unhurried
@given(st.lists(ids, min_size=1, max_size=5, unique=True).flatmap(lambda own: st.tuples(st.just(own), st.data())))
def test_position_by_name_resumes_where_its_id_says(drawn: tuple[list[str], st.DataObject]) -> None:
    own, data = drawn
    drop_ids = [DropId(drop_id) for drop_id in own]
    heard = data.draw(st.dictionaries(st.sampled_from(drop_ids), st.integers(1, 10**15 - 1)))
    first = events.PositionByName(drop_ids)
    for drop_id, seq in heard.items():
        first.heard(drop_id, seq)

    second = events.PositionByName(drop_ids)
    assert second.resume(first.id()) == heard
    assert second.id() == first.id()
    assert len(drop_ids) == 1 or events.PositionByName(drop_ids[1:]).resume(first.id()) == {}


@unhurried
@given(st.dictionaries(ids, st.integers(0, 10**15 - 1), max_size=events.NAMED_MAX + 2))
def test_position_of_all_resumes_where_its_id_says_or_says_that_it_cannot(heard: dict[str, int]) -> None:
    first = events.PositionOfAll()
    for drop_id, seq in heard.items():
        first.heard(DropId(drop_id), seq)

    resumed = events.PositionOfAll().resume(first.id())
    assert resumed == (heard if len(heard) <= events.NAMED_MAX else None)


@unhurried
@given(latin_1 | st.from_regex(events.BY_NAME, fullmatch=True) | st.from_regex(events.OF_ALL, fullmatch=True))
@example("*~AAAAAAAAAAAAAAAAAAAAAA.1")
def test_any_last_event_id_is_a_position_or_none(text: str) -> None:
    drop_id = DropId(str(uuid.UUID(int=7)))
    by_name, of_all = events.PositionByName([drop_id]), events.PositionOfAll()

    assert set(by_name.resume(text)) <= {drop_id}
    told = of_all.resume(text)
    assert told is None or all(schemas.uuid_or_none(each) == each and seq >= 0 for each, seq in told.items())
    assert by_name.id().isascii()
    assert of_all.id().isascii()


@unhurried
@given(st.from_regex(DROPS_PATTERN, fullmatch=True))
def test_drops_that_the_document_takes_are_ids(text: str) -> None:
    words = [word.strip() for word in text.split(",") if word.strip()]

    assert words
    assert text == events.ALL or all(schemas.uuid_or_none(word) for word in words)


# Messages of viewers ----------------------------------------------------------------------------------


@unhurried
@given(
    st.dictionaries(ids | any_text, st.integers(-(2**70), 2**70), max_size=4),
    st.lists(ids | any_text, max_size=4) | st.just(events.ALL),
)
def test_positions_of_a_viewer_are_ids_with_numbers_or_a_refusal(resume: dict[str, int], drops: Any) -> None:
    try:
        raw = json.dumps({"type": "subscribe", "drops": drops, "resume": resume}).encode()
        asked = live._decoder.decode(raw)
    except msgspec.DecodeError:
        return
    assert isinstance(asked, live.Subscribe)
    found = refused(lambda: live._positions(asked.resume), 422)
    assert found is None or all(schemas.uuid_or_none(each) == each for each in found)


@unhurried
@given(st.text(max_size=80) | st.lists(st.text(max_size=10), max_size=4).map("\x1e".join))
@example("4" * 4_000)
@example("b!!!")
@example("451-[")
def test_any_payload_of_engine_io_is_packets_or_a_violation(text: str) -> None:
    try:
        packets = engineio._packets(text.encode(errors="surrogatepass"))
    except Violation:
        return
    assert len(packets) <= 1 + text.count("\x1e")


# Heads of sockets -------------------------------------------------------------------------------------


@unhurried
@given(st.binary(max_size=200) | st.binary(max_size=80).map(lambda more: b"GET /api/v1/live HTTP/1.1\r\n" + more))
@example(b"GET /api/v1/live HTTP/1.1\r\nHost: a\r\n\r\n")
def test_any_head_of_a_socket_is_an_opening_or_a_refusal(received: bytes) -> None:
    asked = refused(lambda: opening.read(received), 400, 405, 414, 431)

    if asked is not None:
        assert opening.may_open(DEVELOPMENT, asked) in (True, False)
        head = opening.head(DEVELOPMENT, 200, (), asked)
        assert head.endswith(b"\r\n\r\n")
        assert head.count(b"\r\n\r\n") == 1


@unhurried
@given(st.none() | st.just(PAGE) | latin_1 | st.from_regex(r"[a-z]+://[\[\]a-z0-9:.@/]*", fullmatch=True), latin_1)
@example("http://[", "x")
def test_any_origin_is_allowed_or_not(origin: str | None, host: str) -> None:
    headers = {"host": host} | ({} if origin is None else {"origin": origin})
    asked = opening.Opening("/", "", headers, "7")

    assert opening.may_open(DEVELOPMENT, asked) in (True, False)
    assert (answers.allowing(ONE_PAGE, origin) != ()) == (origin == PAGE)


# Settings ---------------------------------------------------------------------------------------------

no_nul = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=40)
near_settings = st.one_of(
    no_nul,
    st.integers(-5, 10**12).map(str),
    st.sampled_from(["true", "off", "*", "https://shop.example", "http://[", "postgresql://a@b/c", "0x10", "١", "1e3"]),
)


def loaded(setting: Setting, text: str) -> Settings | None:
    """The settings with this one; None where it is refused, in sentences that name it."""
    try:
        return load({setting.name: text}, None)
    except SettingsError as failure:
        problems = failure.problems
    assert any(setting.name in problem for problem in problems)
    return None


@pytest.mark.parametrize("setting", [one for one in SETTINGS if one.has_effect], ids=lambda one: one.name)
@settings(deadline=None, max_examples=50)
@given(text=near_settings)
@example(text="~nobody-of-this-name")
def test_any_text_of_a_setting_is_a_value_or_a_sentence_that_names_it(setting: Setting, text: str) -> None:
    made = loaded(setting, text)

    if made is None or not text.strip():
        return
    value = getattr(made, setting.field)
    if isinstance(value, int) and not isinstance(value, bool):
        assert loaded(setting, str(value)) == made  # what it says is read as the same
        assert math.isfinite(value)


@unhurried
@given(st.dictionaries(st.sampled_from(["limit", "offset", "more"]), st.integers(-5, 10**7).map(str) | latin_1))
def test_any_query_survives_the_way_through_a_url(query: dict[str, str]) -> None:
    page = refused(lambda: schemas.page(query), 422)

    if page is not None:
        again = dict(part.split("=", 1) for part in urlencode({"limit": page.limit, "offset": page.offset}).split("&"))
        assert schemas.page(again) == page
