"""What a body may be: JSON, an object, of the right type and size; and everything that is wrong with it, at once."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from tests.contract.shop import Shop, Wire, request, unique

SOME_ID = "0190a3c4-0000-7000-8000-000000000001"
GOOD = {"name": "Air One", "price": 12_900, "total_stock": 100}
JSON = {"Content-Type": "application/json"}
WITH_BODY = ["/drops", "/demo/echo", "/internal/users", f"/drops/{SOME_ID}/reserve", f"/drops/{SOME_ID}/purchase"]

# Sessions that wait for another one's transaction.
END_WHO_WAIT = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE datname = current_database() AND wait_event_type = 'Lock'
"""

NOT_JSON = {
    "nothing": b" ",
    "half": b'{"name": "Air',
    "no quotes": b"{name: 1}",
    "single quotes": b"{'name': 'Air One'}",
    "comma at the end": b'{"name": "Air One",}',
    "two": b"{} {}",
    "a comment": b'{} // "name"',
    "an array": b'[{"name": "Air One"}]',
    "a string": b'"Air One"',
    "a number": b"7",
    "null": b"null",
    "true": b"true",
    "NaN": b'{"name": "Air One", "price": NaN, "total_stock": 1}',
    "Infinity": b'{"name": "Air One", "price": Infinity, "total_stock": 1}',
    "minus Infinity": b'{"name": "Air One", "price": -Infinity, "total_stock": 1}',
    "a key twice": b'{"name": "Air One", "price": 1, "total_stock": 1, "price": 2}',
    "a key twice, deeper": b'{"name": {"a": 1, "a": 1}}',
    "not UTF-8": b'{"name": "Caf\xe9"}',
    "UTF-16": '{"name": "Air One"}'.encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf{}",
    "a raw control character": b'{"name": "Air\nOne"}',
    "a raw NUL": b'{"name": "Air\x00One"}',
    "a form": b"name=Air+One&price=12900",
    "nested too deeply": b'{"name": ' + b"[" * 8_000 + b"]" * 8_000 + b"}",
    "a number of 5,000 digits": b'{"price": ' + b"9" * 5_000 + b"}",
}


@pytest.mark.parametrize("raw", NOT_JSON.values(), ids=NOT_JSON.keys())
def test_body_that_is_no_json_object_is_400_invalid_json(shop: Shop, raw: bytes) -> None:
    for path in WITH_BODY:
        assert shop.visitor(SOME_ID).ask("POST", path, content=raw, headers=JSON).error == (400, "INVALID_JSON"), path


@pytest.mark.parametrize("path", ["/drops", "/demo/echo", "/internal/users"])
def test_body_that_is_needed_and_missing_is_400_or_415(shop: Shop, path: str) -> None:
    assert shop.visitor(SOME_ID).ask("POST", path, headers=JSON).error == (400, "INVALID_JSON")
    assert shop.visitor(SOME_ID).ask("POST", path).error == (415, "UNSUPPORTED_MEDIA_TYPE")


# Media types ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", WITH_BODY)
@pytest.mark.parametrize(
    "media_type",
    [
        "",
        "text/plain",
        "text/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/jsonp",
        "application/xml; q=application/json",
    ],
)
def test_body_of_another_media_type_is_415(shop: Shop, path: str, media_type: str) -> None:
    reply = shop.visitor(SOME_ID).ask("POST", path, content=b"{}", headers={"Content-Type": media_type})

    assert reply.error == (415, "UNSUPPORTED_MEDIA_TYPE")


@pytest.mark.parametrize(
    "media_type",
    ["application/json", "application/json; charset=utf-8", "APPLICATION/JSON", "application/vnd.api+json"],
)
def test_every_json_media_type_is_taken(shop: Shop, media_type: str) -> None:
    raw = json.dumps(GOOD).encode()

    reply = shop.visitor().ask("POST", "/drops", content=raw, headers={"Content-Type": media_type})

    assert reply.status == 201


@pytest.mark.parametrize("media_type", ["application/json", "text/plain", "application/x-www-form-urlencoded"])
def test_empty_body_of_reserve_is_fine_whatever_it_is_called(shop: Shop, media_type: str) -> None:
    drop = shop.drop()

    reply = shop.visitor().ask("POST", f"/drops/{drop['id']}/reserve", headers={"Content-Type": media_type})

    assert reply.status == 201


def test_empty_object_is_fine_where_no_body_is_needed(shop: Shop) -> None:
    drop, visitor = shop.drop(), shop.visitor()

    assert visitor.post(f"/drops/{drop['id']}/reserve", {}).status == 201
    assert visitor.post(f"/drops/{drop['id']}/purchase", {}).status == 201


# Sizes ------------------------------------------------------------------------------------------------


def test_body_of_16_kib_is_read_and_one_byte_more_is_413(shop: Shop) -> None:
    raw = json.dumps(GOOD).encode()
    exactly, more = raw.ljust(16_384), raw.ljust(16_385)

    assert shop.visitor().ask("POST", "/drops", content=exactly, headers=JSON).status == 201
    assert shop.visitor().ask("POST", "/drops", content=more, headers=JSON).error == (413, "PAYLOAD_TOO_LARGE")


@pytest.mark.parametrize("path", [*WITH_BODY, "/internal/expire-now"])
@pytest.mark.parametrize("size", [20_000, 900_000])
def test_body_over_the_limit_is_413_and_changes_nothing(shop: Shop, path: str, size: int) -> None:
    reply = shop.visitor(SOME_ID).ask("POST", path, content=b"{" + b" " * size + b"}", headers=JSON)

    assert reply.error == (413, "PAYLOAD_TOO_LARGE")


def test_connection_lives_on_after_a_body_that_was_a_little_too_large(shop: Shop) -> None:
    with Wire(shop.server) as wire:
        for _ in range(3):
            wire.send(request("POST", f"{shop.base}/demo/echo", b" " * 20_000))
            assert wire.answer().outcome == (413, "PAYLOAD_TOO_LARGE")
        wire.send(request("GET", "/healthz"))
        assert wire.answer().outcome == (200, "SUCCESS")


def test_body_of_5_mb_is_413_and_the_last_on_its_connection(shop: Shop) -> None:
    with Wire(shop.server) as wire:
        wire.send_what_it_takes(request("POST", f"{shop.base}/demo/echo", b" " * 5_000_000))
        answer = wire.answer()
        assert answer.outcome == (413, "PAYLOAD_TOO_LARGE")
        assert answer.headers["connection"] == "close"
        assert wire.is_closed()


def test_client_that_reads_only_after_5_mb_are_sent_gets_its_413_too(shop: Shop) -> None:
    reply = shop.visitor(SOME_ID).ask("POST", "/drops", content=b" " * 5_000_000, headers=JSON)

    assert reply.error == (413, "PAYLOAD_TOO_LARGE")


@pytest.mark.parametrize("size", [20_000, 900_000])
def test_body_in_chunks_is_measured_as_it_comes(shop: Shop, size: int) -> None:
    head = request("POST", f"{shop.base}/demo/echo", content_type="application/json", transfer_encoding="chunked")
    chunk = b"3e8\r\n" + b" " * 1_000 + b"\r\n"
    with Wire(shop.server) as wire:
        wire.send(head + chunk * (size // 1_000) + b"0\r\n\r\n")
        assert wire.answer().outcome == (413, "PAYLOAD_TOO_LARGE")
        wire.send(head + b'17\r\n{"email": "a@shop.org"}\r\n0\r\n\r\n')
        assert wire.answer().outcome == (200, "SUCCESS")


def test_endless_chunks_are_cut_off(shop: Shop) -> None:
    head = request("POST", f"{shop.base}/demo/echo", content_type="application/json", transfer_encoding="chunked")
    chunk = b"ffff\r\n" + b" " * 0xFFFF + b"\r\n"
    with Wire(shop.server) as wire:
        wire.send(head)
        for _ in range(100):
            wire.send_what_it_takes(chunk)
        assert wire.answer().outcome == (413, "PAYLOAD_TOO_LARGE")
        assert wire.is_closed()


# Validation -------------------------------------------------------------------------------------------


def test_every_fault_of_a_drop_is_named_at_once(shop: Shop) -> None:
    wrong = {
        "name": "A",
        "price": -1,
        "total_stock": 1.5,
        "currency": "usd",
        "starts_at": "tomorrow",
        "ends_at": "2031-01-07T10:00:00",
        "status": "ended",
        "colour": "red",
    }

    reply = shop.visitor().post("/drops", wrong)

    assert sorted(reply.wrong) == sorted(wrong)


def test_what_is_missing_is_named_at_once(shop: Shop) -> None:
    assert shop.visitor().post("/drops", {}).wrong == ["name", "price", "total_stock"]
    assert shop.anybody.post("/demo/echo", {}).wrong == ["email"]
    assert shop.anybody.post("/internal/users", {}).wrong == ["username"]


@pytest.mark.parametrize(
    ("field", "values"),
    [
        (
            "name",
            [None, 7, True, ["Air One"], "", "A", "  ", "A" * 201, "Air\nOne", "Air\x00One", "Air\x7fOne", "\ud800Air"],
        ),
        ("price", [None, -1, 1.0, 1.5, True, False, "1", "12.9", [1], 2**53, 10**30, -(10**30), 1e400]),
        ("total_stock", [None, -1, 1.0, 0.5, True, "100", {}, 1_000_000_001, 2**63, 2**64]),
        ("currency", [None, 840, "", "US", "USDX", "usd", "US$", "ÜSD", "USD\n", "\ud800SD"]),
        (
            "starts_at",
            [
                0,
                1_700_000_000,
                True,
                "",
                "now",
                "2031-01-07",
                "10:00:00Z",
                "2031-01-07T10:00:00",
                "2031-01-07 10:00",
                "2031-02-30T10:00:00Z",
                "2031-01-07T25:00:00Z",
                "1969-12-31T23:59:59.999Z",
                "3000-01-01T00:00:00Z",
                "9999-12-31T23:59:59Z",
                "9999-12-31T23:59:59-23:59",
                "0001-01-01T00:00:00+23:59",
                "0000-01-01T00:00:00Z",
                "+12031-01-07T10:00:00Z",
                "2031-01-07T10:00:00\ud800",
            ],
        ),
        ("status", ["", "Live", "ended", "paused", "cancelled", "sold", 1, True, [], "\ud800"]),
    ],
)
def test_field_that_is_wrong_is_422_and_the_only_one_named(shop: Shop, field: str, values: list[Any]) -> None:
    seller = shop.visitor()
    for value in values:
        raw = json.dumps({**GOOD, field: value}).replace("Infinity", "1e400").encode()
        reply = seller.ask("POST", "/drops", content=raw, headers=JSON)
        if value is None and field == "starts_at":
            continue
        assert reply.wrong == [field], (value, reply.body)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("name", ["AB", "A" * 200, "Zoë's №1 — 渋谷 👟", "a  b"]),
        ("price", [0, 1, 2**53 - 1]),
        ("total_stock", [0, 1, 1_000_000_000]),
        ("currency", ["USD", "EUR", "JPY"]),
    ],
)
def test_field_at_its_limits_is_taken_and_shown_as_it_came(shop: Shop, field: str, values: list[Any]) -> None:
    for value in values:
        reply = shop.visitor().post("/drops", {**GOOD, field: value})
        assert reply.status == 201, reply.body
        assert reply.data[field] == value


def test_bool_is_no_integer_and_says_so(shop: Shop) -> None:
    reply = shop.visitor().post("/drops", {**GOOD, "price": True})

    assert reply.body["error"]["details"] == [{"path": "price", "message": "expected `int`, got `bool`"}]


def test_whole_number_with_a_point_is_no_integer_and_says_so(shop: Shop) -> None:
    reply = shop.visitor().post("/drops", {**GOOD, "price": 1.0})

    assert reply.body["error"]["details"] == [{"path": "price", "message": "expected `int`, got `float`"}]


@pytest.mark.parametrize("path", [f"/drops/{SOME_ID}/reserve", f"/drops/{SOME_ID}/purchase"])
def test_field_that_nobody_asked_for_is_422(shop: Shop, path: str) -> None:
    assert shop.visitor().post(path, {"colour": "red", "é\ud800": 1}).wrong == ["colour", "\\xe9\\ud800"]


def test_faults_of_a_huge_body_are_listed_in_a_bounded_answer(shop: Shop) -> None:
    raw = json.dumps({f"{n:04}": 1 for n in range(1_400)}).encode()
    assert len(raw) < 16_384

    reply = shop.visitor().ask("POST", "/drops", content=raw, headers=JSON)

    assert reply.error == (422, "VALIDATION_ERROR")
    assert len(reply.raw) < 200_000


# Echo and users ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [
        {"email": "ann@shop.example"},
        {"email": "ann@shop.example", "name": "Ann"},
        {"email": "a+b@x.co.uk", "name": "Zo"},
        {"email": "zoë@shop.example", "name": "x" * 60},
    ],
)
def test_echo_gives_back_what_it_received(shop: Shop, sent: dict[str, str]) -> None:
    reply = shop.anybody.post("/demo/echo", sent)

    assert (reply.status, reply.data) == (200, {"received": sent})


@pytest.mark.parametrize(
    ("sent", "wrong"),
    [
        ({"email": "ann"}, ["email"]),
        ({"email": "ann@"}, ["email"]),
        ({"email": "@shop.example"}, ["email"]),
        ({"email": "ann@shop"}, ["email"]),
        ({"email": "ann@shop..example"}, ["email"]),
        ({"email": "ann@a@shop.example"}, ["email"]),
        ({"email": "an n@shop.example"}, ["email"]),
        ({"email": "ann@shop.example\n"}, ["email"]),
        ({"email": "\ud800@shop.example"}, ["email"]),
        ({"email": "a" * 250 + "@b.cd"}, ["email"]),
        ({"email": None}, ["email"]),
        ({"email": "ann@shop.example", "name": "A"}, ["name"]),
        ({"email": "ann@shop.example", "name": "x" * 61}, ["name"]),
        ({"email": "ann@shop.example", "name": None}, ["name"]),
        ({"email": "ann", "name": 7, "age": 30}, ["age", "email", "name"]),
    ],
)
def test_echo_names_what_is_wrong(shop: Shop, sent: dict[str, Any], wrong: list[str]) -> None:
    raw = json.dumps(sent).encode()

    assert shop.anybody.ask("POST", "/demo/echo", content=raw, headers=JSON).wrong == wrong


@pytest.mark.parametrize("name", ["ab", "x" * 51, "", "   ", "a\nbc", "a\x00bc", "\ud800bcd", 7, None, True])
def test_user_needs_a_name_of_3_to_50_characters(shop: Shop, name: object) -> None:
    raw = json.dumps({"username": name}).encode()

    assert shop.anybody.ask("POST", "/internal/users", content=raw, headers=JSON).wrong == ["username"]


def test_made_user_may_ask_at_once_and_has_that_name(shop: Shop) -> None:
    name = unique("made")

    made = shop.anybody.post("/internal/users", {"username": name})

    assert made.status == 201
    assert made.data == {"id": made.data["id"], "username": name}
    assert shop.visitor(made.data["id"]).get("/me").data == {"user": made.data}


def test_user_who_may_have_been_made_is_503_outcome_unknown(shop: Shop) -> None:
    name = unique("made")
    with (
        psycopg.connect(shop.server.dsn) as rival,
        psycopg.connect(shop.server.dsn, autocommit=True) as operator,
        ThreadPoolExecutor(1) as asking,
    ):
        rival.execute("INSERT INTO users (id, username, created_at) VALUES (gen_random_uuid(), %s, now())", [name])
        reply = asking.submit(shop.anybody.post, "/internal/users", {"username": name})
        while not reply.done() and not operator.execute(END_WHO_WAIT).fetchall():
            time.sleep(0.01)
        assert reply.result(10).error == (503, "OUTCOME_UNKNOWN")


def test_second_user_of_a_name_is_409_username_taken(shop: Shop) -> None:
    name = unique("made")
    shop.anybody.post("/internal/users", {"username": name})

    assert shop.anybody.post("/internal/users", {"username": name}).error == (409, "USERNAME_TAKEN")
