"""What happens on a connection: requests one after the other, pipelined, cut short, slow, or no HTTP at all."""

import socket
import time
from pathlib import Path

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, Event, ResponseReceived
from h2.settings import SettingCodes

from tests.contract.shop import PATIENCE_S, Shop, Wire, new_id, request
from tests.server import serving

LARGE = b'{"email": "' + b"a" * 15_000 + b'@shop.example"}'


def chunked(path: str) -> bytes:
    return request("POST", path, content_type="application/json", transfer_encoding="chunked")


# An early refusal, each with a body that its handler has no use for.
REFUSED_EARLY = {
    "401": (request("POST", "/api/drops", LARGE), (401, "AUTH_REQUIRED")),
    "404": (request("POST", "/api/nothing", LARGE), (404, "NOT_FOUND")),
    "405": (request("PUT", "/api/drops", LARGE), (405, "METHOD_NOT_ALLOWED")),
    "413": (request("POST", "/api/drops", b" " * 30_000), (413, "PAYLOAD_TOO_LARGE")),
    "415": (request("POST", "/api/demo/echo", LARGE, content_type="text/plain"), (415, "UNSUPPORTED_MEDIA_TYPE")),
    "422": (request("POST", "/api/drops/7/reserve", LARGE, x_user_id=new_id()), (422, "VALIDATION_ERROR")),
    "GET": (request("GET", "/api/healthz", LARGE), (200, "SUCCESS")),
    "DELETE": (request("DELETE", f"/api/reservations/{new_id()}/cancel", LARGE), (401, "AUTH_REQUIRED")),
    "OPTIONS": (request("OPTIONS", "/api/drops", LARGE), (204, "")),
    "HEAD": (request("HEAD", "/api/drops", LARGE), (200, "")),
    "HEAD, 413": (request("HEAD", "/api/drops", b" " * 30_000), (413, "")),
    "chunked": (
        chunked("/api/nothing") + b"a\r\n0123456789\r\n0\r\n\r\n",
        (404, "NOT_FOUND"),
    ),
}
THREE = [(200, "SUCCESS"), (404, "NOT_FOUND"), (401, "AUTH_REQUIRED")]


@pytest.fixture
def base() -> str:
    return "/api/v1"  # alone: here it is about connections, not about addresses


def outcome(wire: Wire, name: str) -> tuple[int, str]:
    answer = wire.answer(to="HEAD" if name.startswith("HEAD") else "any")
    return (answer.status, "") if name.startswith(("HEAD", "OPTIONS")) else answer.outcome


@pytest.mark.parametrize("name", REFUSED_EARLY)
def test_connection_is_usable_after_an_early_answer_to_a_request_with_a_body(shop: Shop, name: str) -> None:
    refused, expected = REFUSED_EARLY[name]
    with Wire(shop.server) as wire:
        for _ in range(3):
            wire.send(refused)
            assert outcome(wire, name) == expected
            wire.send(request("POST", "/api/demo/echo", b'{"email": "ann@shop.example"}'))
            assert wire.answer().outcome == (200, "SUCCESS")


@pytest.mark.parametrize("name", REFUSED_EARLY)
def test_connection_is_usable_when_the_refused_body_comes_late(shop: Shop, name: str) -> None:
    refused, expected = REFUSED_EARLY[name]
    end_of_head = refused.index(b"\r\n\r\n") + 4
    with Wire(shop.server) as wire:
        wire.send(refused[:end_of_head])
        time.sleep(0.05)
        wire.send(refused[end_of_head:-1])
        time.sleep(0.05)
        wire.send(refused[-1:] + request("GET", "/api/healthz"))
        assert outcome(wire, name) == expected
        assert wire.answer().outcome == (200, "SUCCESS")


def test_pipelined_requests_are_answered_in_order(shop: Shop) -> None:
    with Wire(shop.server) as wire:
        for _ in range(5):
            wire.send(
                request("GET", "/api/healthz", x_request_id="1")
                + request("POST", "/api/nothing", LARGE, x_request_id="2")
                + request("GET", "/api/me", x_request_id="3")
            )
            answers = [wire.answer() for _ in range(3)]
            assert [answer.outcome for answer in answers] == THREE
            assert [answer.headers["x-request-id"] for answer in answers] == ["1", "2", "3"]


def test_every_early_refusal_may_be_pipelined_with_any_other(shop: Shop) -> None:
    with Wire(shop.server) as wire:
        wire.send(b"".join(bytes_ for bytes_, _ in REFUSED_EARLY.values()) + request("GET", "/api/healthz"))
        for name, (_, expected) in REFUSED_EARLY.items():
            assert outcome(wire, name) == expected, name
        assert wire.answer().outcome == (200, "SUCCESS")


def test_request_that_comes_byte_by_byte_is_a_request(shop: Shop) -> None:
    with Wire(shop.server) as wire:
        for byte in request("POST", "/api/demo/echo", b'{"email": "ann@shop.example"}'):
            wire.send(bytes([byte]))
        assert wire.answer().outcome == (200, "SUCCESS")


@pytest.mark.parametrize(
    "last",
    [
        request("GET", "/api/healthz", connection="close"),
        request("POST", "/api/nothing", LARGE, connection="close"),
        b"GET /api/healthz HTTP/1.0\r\n\r\n",
    ],
    ids=["GET", "POST", "HTTP/1.0"],
)
def test_client_that_wants_the_connection_closed_sees_it_closed(shop: Shop, last: bytes) -> None:
    with Wire(shop.server) as wire:
        wire.send(request("GET", "/api/healthz"))
        wire.answer()
        wire.send(last)
        assert wire.answer().headers["connection"] == "close"
        assert wire.is_closed()


def test_client_that_waits_for_100_continue_is_told_to_go_on(shop: Shop) -> None:
    body = b'{"email": "ann@shop.example"}'
    head, _, _ = request("POST", "/api/demo/echo", body, expect="100-continue").partition(b"\r\n\r\n")
    with Wire(shop.server) as wire:
        wire.send(head + b"\r\n\r\n")
        assert wire.answer().status == 100
        wire.send(body)
        assert wire.answer().outcome == (200, "SUCCESS")


def test_client_that_goes_away_in_the_middle_of_a_body_leaves_nothing_behind(shop: Shop) -> None:
    for _ in range(20):
        with Wire(shop.server) as wire:
            wire.send(request("POST", "/api/demo/echo", LARGE)[:-1])

    assert shop.anybody.get("/healthz").status == 200


def test_client_that_does_not_wait_for_its_answer_has_reserved_all_the_same(shop: Shop) -> None:
    drop, visitor = shop.drop(total_stock=1), shop.visitor()
    with Wire(shop.server) as wire:
        wire.send(request("POST", f"{shop.base}/drops/{drop['id']}/reserve", x_user_id=visitor.id))
        wire.answer()  # so that the request was taken for certain
        wire.send(request("POST", f"{shop.base}/drops/{drop['id']}/purchase", x_user_id=visitor.id))

    # The purchase was decided before the end of the connection, after it, or never: no other way.
    time.sleep(0.2)
    again = visitor.purchase(drop)
    assert again.status == 201 or again.error == (409, "ALREADY_PURCHASED")
    assert visitor.get("/purchases/me").data["pagination"]["total"] == 1


@pytest.mark.parametrize(
    "garbage",
    [
        b"GARBAGE\r\n\r\n",
        b"GET /api/healthz HTTP/1.1\r\n\r\n",  # without a Host
        b"GET /api/healthz HTTP/1.1\r\nHost: a\r\nContent-Length: ten\r\n\r\n",
        b"GET /api/healthz HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
        b"GET /api/healthz HTTP/1.1\r\nHost: a\r\nno colon\r\n\r\n",
        b"GET /api/h\xff HTTP/1.1\r\nHost: a\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 this is TLS\r\n\r\n",
        b"POST /api/demo/echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    ],
)
def test_what_is_no_http_is_400_and_closes_the_connection(shop: Shop, garbage: bytes) -> None:
    with Wire(shop.server) as wire:
        wire.send(garbage)
        answer = wire.answer()
        assert answer.status == 400
        assert answer.headers["connection"] == "close"
        assert wire.is_closed()


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("?x=1", (400, "BAD_REQUEST")),
        ("http://127.0.0.1/api/healthz", (200, "SUCCESS")),
        ("/api/healthz?" + "x" * 1_500, (200, "SUCCESS")),
        ("/api/healthz?" + "x" * 4_000, (414, "URI_TOO_LONG")),
        ("/api/drops?limit=1&limit=0", (422, "VALIDATION_ERROR")),
        ("/api/healthz#here", (404, "NOT_FOUND")),
        ("/api/../api/healthz", (404, "NOT_FOUND")),
    ],
)
def test_odd_targets_get_answers_in_json(shop: Shop, target: str, expected: tuple[int, str]) -> None:
    with Wire(shop.server) as wire:
        wire.send(request("GET", target))
        assert wire.answer().outcome == expected


@pytest.mark.parametrize("host", ["exa mple", "a/b?c", "[::1", "x" * 300, "a..b", ".", "\u00ff"])
def test_odd_hosts_are_no_concern_of_ours(shop: Shop, host: str) -> None:
    with Wire(shop.server) as wire:
        wire.send(request("GET", "/api/healthz", host=host))
        assert wire.answer().outcome == (200, "SUCCESS")


@pytest.mark.parametrize(("path", "status"), [("/api/me", 400), ("/api/drops", 400), ("/nothing", 404)])
def test_websocket_to_a_route_that_is_none_is_refused_in_json(shop: Shop, path: str, status: int) -> None:
    with Wire(shop.server) as wire:
        wire.send(
            request(
                "GET",
                path,
                connection="Upgrade",
                upgrade="websocket",
                sec_websocket_version="13",
                sec_websocket_key="dGhlIHNhbXBsZSBub25jZQ==",
            )
        )
        answer = wire.answer()
        assert answer.outcome == (status, "BAD_REQUEST" if status == 400 else "NOT_FOUND")
        assert wire.is_closed()
    assert "Exception on websocket" not in shop.server.log()


def test_header_that_comes_twice_counts_as_its_last_value(shop: Shop) -> None:
    first, last = shop.visitor(), shop.visitor()
    with Wire(shop.server) as wire:
        twice = request("GET", "/api/me", x_user_id=first.id).replace(
            b"\r\n\r\n", b"\r\nX-User-Id: " + last.id.encode() + b"\r\n\r\n"
        )
        wire.send(twice)
        assert last.id.encode() in wire.answer().body


def test_body_that_does_not_come_is_given_up_with_a_clear_error(shop: Shop) -> None:
    half = request("POST", "/api/demo/echo", b'{"email": "ann@shop.example"}')[:-5]
    endless = chunked("/api/demo/echo") + b"2\r\n{}\r\n"
    with Wire(shop.server) as slow, Wire(shop.server) as slower, Wire(shop.server) as quick:
        slow.send(half)
        slower.send(endless)
        for _ in range(3):  # nobody else waits meanwhile
            quick.send(request("GET", "/api/healthz"))
            assert quick.answer().outcome == (200, "SUCCESS")
        for wire in (slow, slower):
            answer = wire.answer()
            assert answer.outcome == (400, "BODY_TIMEOUT")
            assert wire.is_closed()


def test_http_2_client_that_takes_nothing_does_not_keep_the_server_from_stopping(database: str, tmp_path: Path) -> None:
    fields = [(":method", "GET"), (":path", "/api/healthz"), (":scheme", "http"), (":authority", "h")]
    with (
        serving(database, tmp_path / "log", SHUTDOWN_TIMEOUT_MS="300") as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as gone,
        socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as there,
    ):
        for sock in (gone, there):
            protocol = H2Connection(H2Configuration(client_side=True))
            protocol.local_settings[SettingCodes.INITIAL_WINDOW_SIZE] = 0
            protocol.local_settings.acknowledge()  # its first frame states what is in force, so put it in force
            protocol.initiate_connection()
            protocol.send_headers(1, fields, end_stream=True)
            sock.sendall(protocol.data_to_send())
            events: list[Event] = []
            while not any(isinstance(event, ResponseReceived) for event in events):
                events += protocol.receive_data(sock.recv(65_536))
            assert not any(isinstance(event, DataReceived) for event in events)
        gone.close()
        time.sleep(0.1)
        assert server.stop() == 0


def test_client_that_never_reads_does_not_keep_the_server_from_answering_or_stopping(
    database: str, tmp_path: Path
) -> None:
    with (
        serving(database, tmp_path / "log", SHUTDOWN_TIMEOUT_MS="300") as server,
        Wire(server, patience_s=0.5) as deaf,
        Wire(server) as other,
    ):
        deaf.send_what_it_takes(request("GET", "/api/healthz") * 100_000)
        other.send(request("GET", "/api/healthz"))
        assert other.answer().outcome == (200, "SUCCESS")
        assert server.stop() == 0
