"""The native live feed: what viewers are told, what they may say, and what they can't do to the server.

`Viewer` is the `websockets` library's client; `RawViewer` writes and reads frames byte by byte, for what a library
would not do.
"""

import base64
import json
import re
import signal
import socket
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, cast

import httpx
import pytest
import trio
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Origin

from api import events, handlers, live
from api.auth import Caller
from api.handlers import Gate, Service
from api.promises import Errands
from api.settings import load
from api.sockets import Sockets
from engine.board import Board
from engine.drop import Drop
from engine.hub import Hub
from engine.ledger import Unavailable
from engine.model import DropId, Event, Reserved, UserId
from tests.contract.conftest import PAGE
from tests.contract.shop import INSTANT, PATIENCE_S, Shop, Wire, ahead, new_id, request
from tests.engine.making import at, born, reserve, terms
from tests.server import Server, serving

SILENCE_S: Final = 0.2  # four passes: what was to be told has been told
KEY: Final = base64.b64encode(b"0123456789abcdef").decode()
HANDSHAKE: Final = {
    "connection": "Upgrade",
    "upgrade": "websocket",
    "sec_websocket_version": "13",
    "sec_websocket_key": KEY,
}
TEXT, CLOSE, PING, PONG = 1, 8, 9, 10
CHANGES_MAX: Final = 3_000  # told one by one, some 600 KB: several times what a kernel and we keep for a viewer
STAGED: Final = DropId("0199c2f0-0000-7000-8000-000000000001")
Json = dict[str, Any]


class Viewer:
    """A client that speaks the feed."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket

    def say(self, type: str, **more: object) -> None:
        self.socket.send(json.dumps({"type": type, **more}))

    def hear(self) -> Json:
        heard: Json = json.loads(self.socket.recv(PATIENCE_S))
        return heard

    def snapshot(self) -> Json:
        """The next message, which must be a snapshot: its drop."""
        heard = self.hear()
        assert set(heard) == {"type", "seq", "drop"}, heard
        assert heard["type"] == "snapshot"
        drop: Json = heard["drop"]
        return drop | {"seq": heard["seq"]}

    def event(self) -> tuple[str, int, Json]:
        """The next message, which must be an event: its name, `seq` and data."""
        heard = self.hear()
        assert list(heard) == ["type", "event", "seq", "at", "data"], heard
        assert heard["type"] == "event"
        assert INSTANT.fullmatch(heard["at"])
        return heard["event"], heard["seq"], heard["data"]

    def error(self) -> str:
        heard = self.hear()
        assert heard["type"] == "error", heard
        assert heard["message"]
        assert set(heard) <= {"type", "code", "message", "dropId"}
        code: str = heard["code"]
        return code

    def hears_nothing(self) -> bool:
        try:
            heard = self.socket.recv(SILENCE_S)
        except TimeoutError:
            return True
        raise AssertionError(f"heard {heard!r}")

    def watch(self, *drops: Mapping[str, Any], **more: object) -> None:
        self.say("subscribe", drops=[drop["id"] for drop in drops], **more)

    def end(self) -> tuple[int, str]:
        """Hear everything to the end: its code and reason."""
        with suppress(ConnectionClosed):
            while True:
                self.socket.recv(PATIENCE_S)
        assert self.socket.close_code is not None, "no close frame came"
        return self.socket.close_code, self.socket.close_reason or ""


@contextmanager
def viewing(server: Server, base: str = "/api/v1", **headers: str) -> Iterator[Viewer]:
    scheme = "ws" if server.tls is None else "wss"
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    with connect(
        f"{scheme}://127.0.0.1:{server.port}{base}/live", additional_headers=named, ssl=server.tls, proxy=None
    ) as client:
        yield Viewer(client)


class RawViewer(Wire):
    """A client whose frames are made by hand."""

    def __enter__(self) -> "RawViewer":
        return self

    def __init__(self, server: Server, *, receive_buffer: int | None = None) -> None:
        super().__init__(server, receive_buffer=receive_buffer)
        self.send(handshake())
        head = self._until(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 "), head

    def say(self, **message: object) -> None:
        self.send(frame(TEXT, json.dumps(message).encode()))

    def hear(self) -> tuple[int, bytes]:
        """The next frame: opcode and payload. It is whole, and not masked."""
        first, size = self._exactly(2)
        assert first & 0xF0 == 0x80, "in pieces, or with reserved bits"
        assert size < 0x80, "masked"
        if size == 126:
            (size,) = struct.unpack("!H", self._exactly(2))
        elif size == 127:
            (size,) = struct.unpack("!Q", self._exactly(8))
        return first & 0x0F, self._exactly(size)

    def closing(self) -> int:
        """The code of the close frame, which must be next and last."""
        opcode, payload = self.hear()
        assert opcode == CLOSE, (opcode, payload)
        code: int = struct.unpack("!H", payload[:2])[0]
        return code


def handshake(path: str = "/api/v1/live", **headers: str) -> bytes:
    """A viewer's request; a header that is empty is left out."""
    return request("GET", path, b"", **{name: value for name, value in (HANDSHAKE | headers).items() if value})


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True, masked: bool = True, reserved: int = 0) -> bytes:
    size = len(payload)
    head = bytes([fin << 7 | reserved << 4 | opcode])
    mask_bit = masked << 7
    if size < 126:
        head += bytes([mask_bit | size])
    elif size < 65_536:
        head += bytes([mask_bit | 126]) + struct.pack("!H", size)
    else:
        head += bytes([mask_bit | 127]) + struct.pack("!Q", size)
    mask = b"\1\2\3\4"
    if not masked:
        return head + payload
    return head + mask + bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))


@pytest.fixture
def base() -> str:
    return "/api/v1"


@pytest.fixture
def viewer(shop: Shop) -> Iterator[Viewer]:
    with viewing(shop.server) as viewer:
        yield viewer


# What is told -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["/api/v1", "/api"], indirect=False)
def test_viewer_is_shown_a_drop_and_then_told_what_happens_to_it(shop: Shop, base: str) -> None:
    drop, buyer = shop.drop(total_stock=5), shop.visitor(X_User_Name="Ann B")
    me = buyer.get("/me").data["user"]
    with viewing(shop.server, base) as viewer:
        viewer.watch(drop)
        assert viewer.hear() == {"type": "snapshot", "seq": 1, "drop": shop.show(drop)}
        reservation = buyer.holds(drop)
        assert viewer.event() == ("STOCK_UPDATED", 2, {"dropId": drop["id"], "availableStock": 4})
        bought = buyer.purchase(drop).data["purchase"]["created_at"]
        line = {"userId": buyer.id, "username": me["username"], "qty": 1, "createdAt": bought}
        assert viewer.event() == ("ACTIVITY_UPDATED", 3, {"dropId": drop["id"], "latestPurchasers": [line]})
        told = {"dropId": drop["id"], "username": me["username"], "purchasedAt": bought}
        assert viewer.event() == ("PURCHASE_COMPLETED", 3, told)
        reservation = buyer.holds(drop)
        assert viewer.event() == ("STOCK_UPDATED", 4, {"dropId": drop["id"], "availableStock": 3})
        buyer.cancel(reservation)
        assert viewer.event() == ("STOCK_UPDATED", 5, {"dropId": drop["id"], "availableStock": 4})
        viewer.watch(drop)
        assert viewer.hear() == {"type": "snapshot", "seq": 5, "drop": shop.show(drop)}
        assert viewer.hears_nothing()


def test_who_watches_all_is_told_of_new_drops_and_of_their_clock(shop: Shop, viewer: Viewer) -> None:
    shop.drop()
    viewer.say("subscribe", drops="*")
    listed = shop.anybody.get("/drops?limit=1").data["pagination"]["total"]
    shown = [viewer.snapshot() for _ in range(listed)]
    assert len({drop["id"] for drop in shown}) == listed

    drop = shop.drop(total_stock=3, status="scheduled", starts_at=ahead(0.3), ends_at=ahead(0.6))
    assert viewer.event() == ("DROP_CREATED", 1, {"drop": drop})
    assert viewer.event() == ("STOCK_UPDATED", 1, {"dropId": drop["id"], "availableStock": 3})
    for seq, status in ((2, "live"), (3, "ended")):
        name, at_seq, data = viewer.event()
        assert (name, at_seq) == ("DROP_UPDATED", seq)
        assert data == {"drop": drop | {"status": status, "activity_feed": {"latest_purchasers": []}}}

    viewer.say("unsubscribe", drops="*")
    shop.drop()
    assert viewer.hears_nothing()


def test_viewer_hears_of_what_it_subscribed_to_and_of_nothing_else(shop: Shop, viewer: Viewer) -> None:
    one, two, other = (shop.drop(total_stock=9) for _ in range(3))
    viewer.watch(one, two)
    assert [viewer.snapshot()["id"] for _ in range(2)] == [one["id"], two["id"]]
    for drop in (other, two, one):
        shop.visitor().holds(drop)
    assert {viewer.event()[2]["dropId"] for _ in range(2)} == {one["id"], two["id"]}
    viewer.say("unsubscribe", drops=[one["id"], other["id"]])
    for drop in (one, two):
        shop.visitor().holds(drop)
    assert viewer.event()[2] == {"dropId": two["id"], "availableStock": 7}
    assert viewer.hears_nothing()


def test_unknown_drop_is_an_error_and_the_others_are_shown(shop: Shop, viewer: Viewer) -> None:
    drop, nobodys = shop.drop(), new_id()
    viewer.say("subscribe", drops=[nobodys, drop["id"].upper(), drop["id"]])
    heard = viewer.hear()
    assert (heard["type"], heard["code"], heard["dropId"]) == ("error", "DROP_NOT_FOUND", nobodys)
    assert viewer.snapshot()["id"] == drop["id"]
    assert viewer.hears_nothing()


def test_no_more_than_a_thousand_drops_may_be_named(shop: Shop, viewer: Viewer) -> None:
    drop = shop.drop()
    viewer.say("subscribe", drops=[drop["id"], *(new_id() for _ in range(1_000))])
    assert viewer.error() == "TOO_MANY_DROPS"
    shop.visitor().holds(drop)
    assert viewer.hears_nothing()  # nothing of it was done


def test_seq_never_falls_and_the_last_stock_told_is_the_stock(shop: Shop, viewer: Viewer) -> None:
    drop = shop.drop(total_stock=200)
    with viewing(shop.server) as everything:
        everything.say("subscribe", drops="*")
        viewer.watch(drop)
        path = f"{shop.base}/drops/{drop['id']}/"
        for _ in range(5):  # 20 changes each, faster than a pass: conflated
            users = [new_id() for _ in range(10)]
            with Wire(shop.server) as wire:
                for user in users:
                    wire.send(request("POST", path + "reserve", x_user_id=user))
                assert [wire.answer().status for _ in users] == [201] * 10
                for user in users:
                    wire.send(request("POST", path + "purchase", x_user_id=user))
                assert [wire.answer().status for _ in users] == [201] * 10
        for who in (viewer, everything):
            seq, stock, bought = 0, -1, 0
            while bought < 50:  # not one of them is left out
                heard = who.hear()
                if drop["id"] not in (heard.get("drop", {}).get("id"), heard.get("data", {}).get("dropId")):
                    continue
                assert heard["seq"] >= seq
                seq = heard["seq"]
                bought += heard.get("event") == "PURCHASE_COMPLETED"
                if heard.get("event") == "STOCK_UPDATED":
                    stock = heard["data"]["availableStock"]
            assert (seq, stock) == (101, 150)


# Coming back ------------------------------------------------------------------------------------------


def test_viewer_that_comes_back_is_told_what_it_missed_and_no_more(shop: Shop) -> None:
    drop, buyer = shop.drop(total_stock=5), shop.visitor()
    buyer.holds(drop)  # seq 2
    buyer.purchase(drop)  # 3
    shop.visitor().holds(drop)  # 4
    with viewing(shop.server) as viewer:
        viewer.watch(drop, resume={drop["id"]: 1})
        # Of the stock only what it is now, and in its place.
        assert [viewer.event()[:2] for _ in range(3)] == [
            ("ACTIVITY_UPDATED", 3),
            ("PURCHASE_COMPLETED", 3),
            ("STOCK_UPDATED", 4),
        ]
        assert viewer.hears_nothing()
    with viewing(shop.server) as viewer:
        viewer.watch(drop, resume={drop["id"]: 4})
        assert viewer.hears_nothing()  # it has missed nothing
        shop.visitor().holds(drop)
        assert viewer.event() == ("STOCK_UPDATED", 5, {"dropId": drop["id"], "availableStock": 2})


@pytest.mark.parametrize("position", [6, 10**15, 0, -5])
def test_position_that_is_none_of_ours_gets_a_snapshot(shop: Shop, viewer: Viewer, position: int) -> None:
    drop = shop.drop()
    viewer.watch(drop, resume={drop["id"]: position})
    assert viewer.snapshot()["seq"] == 1


def test_viewer_that_was_away_for_too_long_gets_a_snapshot(shop: Shop, viewer: Viewer) -> None:
    drop = shop.drop(total_stock=2_000)
    path = f"{shop.base}/drops/{drop['id']}/reserve"
    with Wire(shop.server) as wire:
        for _ in range(5):
            users = [new_id() for _ in range(220)]
            wire.send(b"".join(request("POST", path, x_user_id=user) for user in users))
            assert {wire.answer().status for _ in users} == {201}
    viewer.watch(drop, resume={drop["id"]: 1})
    assert viewer.snapshot()["available_stock"] == 900
    viewer.say("subscribe", drops="*", resume={drop["id"]: 1_000})
    told: Json = {}
    while told.get("seq") != 1_101:
        told = viewer.hear()
        assert told["type"] == "event" or told["drop"]["id"] != drop["id"]
    assert told["data"] == {"dropId": drop["id"], "availableStock": 900}


def test_viewer_that_outlived_the_server_is_told_what_it_missed_from_the_tables(database: str, tmp_path: Path) -> None:
    with httpx.Client() as http, serving(database, tmp_path / "log") as server:
        shop = Shop(server, "/api/v1", http)
        drop, buyer = shop.drop(total_stock=5), shop.visitor()
        quiet = shop.drop()
        with viewing(server) as viewer, viewing(server) as other:
            viewer.watch(drop)
            assert viewer.snapshot()["seq"] == 1
            buyer.holds(drop)
            assert viewer.event()[:2] == ("STOCK_UPDATED", 2)
            buyer.purchase(drop)
            buyer.holds(drop)
            server.signal(signal.SIGTERM)
            ends = [viewer.end(), other.end()]
            assert {code for code, _ in ends} == {1001}
            for _, reason in ends:
                assert 500 <= json.loads(reason)["retryInMs"] <= 5_000
                assert set(json.loads(reason)) == {"retryInMs"}
        assert server.process.wait(10) == 0
        server.start()
        with viewing(server) as viewer:
            viewer.watch(drop, quiet, resume={drop["id"]: 2, quiet["id"]: 99})
            told = [viewer.hear() for _ in range(4)]
            assert {(heard.get("event", heard["type"]), heard["seq"]) for heard in told} == {
                ("snapshot", 1),  # of the other
                ("ACTIVITY_UPDATED", 3),
                ("PURCHASE_COMPLETED", 3),
                ("STOCK_UPDATED", 4),
            }
            of_activity = next(heard for heard in told if heard.get("event") == "ACTIVITY_UPDATED")
            assert [line["userId"] for line in of_activity["data"]["latestPurchasers"]] == [buyer.id]
            shop.visitor().holds(drop)
            assert viewer.event() == ("STOCK_UPDATED", 5, {"dropId": drop["id"], "availableStock": 2})


# Who it is --------------------------------------------------------------------------------------------


def test_expiry_is_told_to_its_user_alone(hasty: Shop) -> None:
    drop, user = hasty.drop(total_stock=5), hasty.visitor()
    with (
        viewing(hasty.server, X_User_Id=user.id) as by_header,
        viewing(hasty.server) as by_message,
        viewing(hasty.server, X_User_Id=new_id()) as another,
        viewing(hasty.server, X_User_Id=user.id) as elsewhere,
        viewing(hasty.server) as nobody,
    ):
        by_message.say("identify", userId=user.id)
        elsewhere.say("identify", userId=new_id())  # it is somebody else from now on
        for viewer in (by_header, by_message, another, elsewhere, nobody):
            viewer.watch(drop)
            viewer.snapshot()
        reservation = user.holds(drop)
        for viewer in (by_header, by_message, another, elsewhere, nobody):
            assert viewer.event()[:2] == ("STOCK_UPDATED", 2)
        expired = ("RESERVATION_EXPIRED", 3, {"dropId": drop["id"], "reservationId": reservation})
        freed = ("STOCK_UPDATED", 3, {"dropId": drop["id"], "availableStock": 5})
        for viewer in (by_header, by_message):
            assert [viewer.event(), viewer.event()] == [expired, freed]
        for viewer in (another, elsewhere, nobody):
            assert viewer.event() == freed
            assert viewer.hears_nothing()


def test_who_identifies_before_it_resumes_is_told_of_its_own_that_it_missed(hasty: Shop) -> None:
    drop, user = hasty.drop(total_stock=5), hasty.visitor()
    user.holds(drop)
    with viewing(hasty.server) as watching:
        watching.watch(drop, resume={drop["id"]: 2})
        assert watching.event()[:2] == ("STOCK_UPDATED", 3)  # it has ended
    with viewing(hasty.server) as viewer:
        viewer.say("identify", userId=user.id)
        viewer.watch(drop, resume={drop["id"]: 2})
        assert [viewer.event()[:2] for _ in range(2)] == [("RESERVATION_EXPIRED", 3), ("STOCK_UPDATED", 3)]


def test_who_says_wrongly_who_it_is_is_told_so_and_may_watch(shop: Shop) -> None:
    drop = shop.drop()
    with viewing(shop.server, X_User_Id="ann") as viewer:
        assert viewer.error() == "INVALID_X_USER_ID"
        viewer.say("identify", userId="bob")
        assert viewer.error() == "INVALID_X_USER_ID"
        viewer.watch(drop)
        viewer.snapshot()


def test_token_identifies_where_tokens_do(tokens: Shop) -> None:
    with viewing(tokens.server) as viewer:
        viewer.say("identify", userId=new_id())
        assert viewer.error() == "VALIDATION_ERROR"
        viewer.say("identify", token="a.b.c")
        assert viewer.error() == "INVALID_TOKEN"


# What may be said -------------------------------------------------------------------------------------


ODD: Final[list[tuple[str | bytes, str]]] = [
    ("", "INVALID_JSON"),
    (b"", "INVALID_JSON"),
    ("{", "INVALID_JSON"),
    ("hello", "INVALID_JSON"),
    (b"\xff\xfe\x00", "INVALID_JSON"),
    (bytes(range(256)), "INVALID_JSON"),
    ("[" * 30_000, "VALIDATION_ERROR"),
    ('{"a":' * 12_000, "VALIDATION_ERROR"),
    ("null", "VALIDATION_ERROR"),
    ("[]", "VALIDATION_ERROR"),
    ("7", "VALIDATION_ERROR"),
    ("{}", "VALIDATION_ERROR"),
    ('{"type": "shout"}', "VALIDATION_ERROR"),
    ('{"type": 7}', "VALIDATION_ERROR"),
    ('{"type": "subscribe"}', "VALIDATION_ERROR"),
    ('{"type": "subscribe", "drops": 7}', "VALIDATION_ERROR"),
    ('{"type": "subscribe", "drops": "all"}', "VALIDATION_ERROR"),
    ('{"type": "subscribe", "drops": [7]}', "VALIDATION_ERROR"),
    ('{"type": "subscribe", "drops": ["7"]}', "VALIDATION_ERROR"),
    ('{"type": "subscribe", "drops": "*", "resume": {"7": 1}}', "VALIDATION_ERROR"),
    (f'{{"type": "subscribe", "drops": "*", "resume": {{"{new_id()}": "1"}}}}', "VALIDATION_ERROR"),
    (f'{{"type": "subscribe", "drops": "*", "resume": {{"{new_id()}": 1{"0" * 9_000}}}}}', "VALIDATION_ERROR"),
    ('{"type": "unsubscribe", "drops": ["7"]}', "VALIDATION_ERROR"),
    ('{"type": "identify"}', "VALIDATION_ERROR"),
    ('{"type": "identify", "userId": 7}', "VALIDATION_ERROR"),
    (" " * 65_536, "INVALID_JSON"),  # as long as a message may be
]


def test_what_is_not_understood_gets_an_error_and_the_socket_stays_open(shop: Shop, viewer: Viewer) -> None:
    drop = shop.drop()
    for said, code in ODD:
        viewer.socket.send(said)
        assert viewer.error() == code, said[:40]
    viewer.socket.send(json.dumps({"type": "subscribe", "drops": [drop["id"]]}).encode())  # bytes will do
    viewer.snapshot()


@pytest.mark.parametrize("size", [65_537, 3_000_000])
def test_message_over_the_limit_closes_with_1009(shop: Shop, viewer: Viewer, size: int) -> None:
    with suppress(ConnectionClosed):
        viewer.socket.send(" " * size)
    assert viewer.end()[0] == 1009


def test_who_says_too_much_is_closed_with_1008(shop: Shop, viewer: Viewer) -> None:
    with suppress(ConnectionClosed):
        for _ in range(200):
            viewer.say("unsubscribe", drops="*")
    assert viewer.end()[0] == 1008


# Frames -----------------------------------------------------------------------------------------------


def test_message_may_come_in_pieces_with_pings_between_them(shop: Shop) -> None:
    drop = shop.drop()
    said = json.dumps({"type": "subscribe", "drops": [drop["id"]]}).encode()
    with RawViewer(shop.server) as raw:
        raw.send(frame(TEXT, said[:10], fin=False))
        raw.send(frame(PING, b"there?"))
        assert raw.hear() == (PONG, b"there?")
        raw.send(frame(PONG, b"nobody asked"))
        raw.send(frame(0, said[10:11], fin=False) + frame(0, b"", fin=False) * 20_000 + frame(0, said[11:]))
        opcode, payload = raw.hear()
        assert (opcode, json.loads(payload)["type"]) == (TEXT, "snapshot")
        for byte in frame(PING, b"slow"):
            raw.send(bytes([byte]))
        assert raw.hear() == (PONG, b"slow")


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (frame(TEXT, b"{}", masked=False), 1002),
        (frame(TEXT, b"{}", reserved=4), 1002),
        (frame(0, b"{}"), 1002),
        (frame(TEXT, b"{", fin=False) + frame(TEXT, b"}"), 1002),
        (frame(3), 1002),
        (frame(PING, b"x" * 126), 1002),
        (frame(PING, b"x", fin=False), 1002),
        (frame(TEXT, b"\xff\xff"), 1007),
        (frame(CLOSE, b"\x03"), 1002),
        (frame(CLOSE, struct.pack("!H", 1005)), 1002),
        (frame(CLOSE, struct.pack("!H", 1000) + b"\xff"), 1007),
        (frame(CLOSE, struct.pack("!H", 1000)), 1000),
        (frame(CLOSE, struct.pack("!H", 3333) + b"bye"), 3333),
    ],
)
def test_frame_that_breaks_the_rules_or_says_good_bye_ends_it(shop: Shop, said: bytes, code: int) -> None:
    with RawViewer(shop.server) as raw:
        raw.send(said + b"whatever follows is not looked at" * 100)
        assert raw.closing() == code
        raw.send_eof()
        assert raw.is_closed()


# Who may come -----------------------------------------------------------------------------------------


def refused(server: Server, path: str = "/api/v1/live", **headers: str) -> tuple[int, str]:
    with Wire(server) as wire:
        wire.send(handshake(path, **headers))
        answer = wire.answer()
        assert answer.headers["content-type"] == "application/json"
        assert json.loads(answer.body)["meta"] == {"requestId": answer.headers["x-request-id"]}
        if answer.status in (429, 503):
            assert "retry-after" in answer.headers
        return answer.outcome


def test_pages_of_other_origins_may_not_open_a_feed(strict_server: Server, shop_server: Server) -> None:
    here = f"http://127.0.0.1:{strict_server.port}"
    for origin in ("https://evil.example", "null", "http://[", here + "0", PAGE + ".evil.example"):
        assert refused(strict_server, origin=origin) == (403, "ORIGIN_NOT_ALLOWED")
    for welcome in (Origin(PAGE), Origin(here), None):
        with connect(f"ws://127.0.0.1:{strict_server.port}/api/live", origin=welcome, proxy=None) as client:
            Viewer(client).say("subscribe", drops=[])


def test_refusal_is_in_json_with_the_id_that_was_asked_for(strict_server: Server) -> None:
    with Wire(strict_server) as wire:
        wire.send(handshake("/api/live", origin="https://evil.example", x_request_id="mine"))
        answer = wire.answer()
        assert answer.outcome == (403, "ORIGIN_NOT_ALLOWED")
        assert answer.headers["x-request-id"] == "mine"
        assert answer.headers["cache-control"] == "no-store"
        wire.send_eof()
        assert wire.is_closed()


@pytest.mark.parametrize("path", live.PATHS)
def test_without_upgrade_it_is_426(shop: Shop, path: str) -> None:
    for method, status in (("GET", 426), ("POST", 405), ("HEAD", 426), ("OPTIONS", 204)):
        response = shop.http.request(method, shop.server.url + path)
        assert response.status_code == status
    assert refused(shop.server, path, upgrade="", connection="") == (426, "UPGRADE_REQUIRED")
    answer = shop.http.get(shop.server.url + path)
    assert answer.json()["error"]["code"] == "UPGRADE_REQUIRED"
    assert answer.headers["upgrade"] == "websocket"


@pytest.mark.parametrize(
    ("headers", "outcome"),
    [
        ({"sec_websocket_version": "8"}, (426, "UPGRADE_REQUIRED")),
        ({"sec_websocket_version": ""}, (426, "UPGRADE_REQUIRED")),
        ({"connection": "keep-alive"}, (426, "UPGRADE_REQUIRED")),
        ({"sec_websocket_key": ""}, (400, "BAD_REQUEST")),
        ({"sec_websocket_key": "short"}, (400, "BAD_REQUEST")),
        ({"sec_websocket_key": "\u00e9" * 24}, (400, "BAD_REQUEST")),
        ({"upgrade": "websocket, h2c"}, (426, "UPGRADE_REQUIRED")),
    ],
)
def test_handshake_that_is_none_is_refused_in_json(
    shop: Shop, headers: dict[str, str], outcome: tuple[int, str]
) -> None:
    assert refused(shop.server, **headers) == outcome


def test_feed_is_503_until_the_server_is_ready(tmp_path: Path) -> None:
    server = Server("postgresql://nobody@127.0.0.1:9/nowhere", tmp_path / "log")
    try:
        server.start(until="/healthz")
        assert refused(server) == (503, "DATABASE_UNAVAILABLE")
        with pytest.raises(InvalidStatus), viewing(server):
            pass
    finally:
        server.stop()


def test_feed_works_over_tls(database: str, tmp_path: Path, certificate: Path) -> None:
    with serving(database, tmp_path / "log", TLS_CERTFILE=str(certificate), CORS_ORIGINS=PAGE) as server:
        tls = server.tls
        assert tls is not None
        with httpx.Client(verify=tls) as http:
            shop = Shop(server, "/api/v1", http)
            drop = shop.drop(total_stock=300)
            assert refused(server, origin="https://evil.example") == (403, "ORIGIN_NOT_ALLOWED")
            with ExitStack() as crowd:
                viewers = [crowd.enter_context(viewing(server)) for _ in range(5)]
                for viewer in viewers:
                    viewer.watch(drop)
                    viewer.snapshot()
                users = [shop.visitor() for _ in range(30)]
                for user in users:
                    user.holds(drop)
                    user.purchase(drop)
                for viewer in viewers:
                    bought = 0
                    while bought < 30:
                        bought += viewer.event()[0] == "PURCHASE_COMPLETED"
                viewers[0].socket.ping().wait(PATIENCE_S)
                with viewing(server) as again:  # all of it at once
                    again.watch(drop, resume={drop["id"]: 1})
                    names = [again.event()[0] for _ in range(61)]
                    assert names.count("PURCHASE_COMPLETED") == 30
                with RawViewer(server) as raw:
                    raw.send(frame(TEXT, b"{}", masked=False))
                    assert raw.closing() == 1002
                server.signal(signal.SIGTERM)
                assert {viewer.end()[0] for viewer in viewers} == {1001}
            assert server.process.wait(10) == 0


# What viewers can't do --------------------------------------------------------------------------------


def descriptors(server: Server) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


def memory(server: Server) -> int:
    """Bytes that the process keeps in memory."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1_024


def eventually(holds: Callable[[], bool], within_s: float = PATIENCE_S) -> None:
    until = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < until, "it never came true"
        time.sleep(0.02)


def test_two_thousand_viewers_that_came_and_went_leave_nothing_behind(shop: Shop) -> None:
    drop = shop.drop()
    watch = frame(TEXT, json.dumps({"type": "subscribe", "drops": [drop["id"]]}).encode())
    shop.http.get(shop.server.url + "/healthz")
    before, said_before = descriptors(shop.server), len(shop.server.log())
    for turn in range(20):
        crowd = [RawViewer(shop.server) for _ in range(100)]
        for number, raw in enumerate(crowd):
            raw.send(watch)
            match (turn + number) % 4:
                case 0:
                    raw.close()
                case 1:
                    raw.reset()
                case 2:
                    raw.send(frame(CLOSE, struct.pack("!H", 1000)))
                    raw.close()
                case _:
                    raw.hear()
                    raw.send_eof()
                    raw.close()
    eventually(lambda: descriptors(shop.server) <= before)
    said = shop.server.log()[said_before:]
    assert "viewer_failed" not in said
    assert "Traceback" not in said


def test_viewers_that_never_read_cost_little_and_nobody_else_anything(database: str, tmp_path: Path) -> None:
    number = 150
    with httpx.Client() as http, serving(database, tmp_path / "log") as server, ExitStack() as crowd:
        shop = Shop(server, "/api/v1", http)
        drops = [shop.drop(total_stock=100_000) for _ in range(20)]
        viewer = crowd.enter_context(viewing(server))
        viewer.say("subscribe", drops="*")
        for _ in drops:
            viewer.snapshot()
        deaf = [crowd.enter_context(RawViewer(server, receive_buffer=4_096)) for _ in range(number)]
        for raw in deaf:
            raw.say(type="subscribe", drops="*")
        time.sleep(0.5)
        before = memory(server)
        # Each asks for more than its kernel and ours can keep, again and again.
        for _ in range(40):
            for raw in deaf:
                raw.send(frame(TEXT, b'{"type":"subscribe","drops":"*"}') + frame(PING, b"p" * 125))
            shop.visitor().holds(drops[0])
        last = shop.visitor()
        last.holds(drops[1])
        while True:  # who reads is told all the same
            heard = viewer.hear()
            if heard.get("event") == "STOCK_UPDATED" and heard["data"]["dropId"] == drops[1]["id"]:
                break
        grown = (memory(server) - before) / number
        assert grown < 192 * 1_024, grown
        assert max(kernel_bytes(server)) + grown <= 256 * 1_024


def kernel_bytes(server: Server) -> list[int]:
    """What the kernel keeps to be sent, for each connection of the server's."""
    command = ["ss", "-tmnH", "state", "established", "sport", "=", f":{server.port}"]
    try:
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError:
        return [0]  # there is no ss here
    return [int(size) for size in re.findall(r",w(\d+),", told)]


def test_server_stops_in_time_whatever_viewers_do(database: str, tmp_path: Path) -> None:
    with serving(database, tmp_path / "log") as server, ExitStack() as crowd:
        for number in range(60):
            raw = crowd.enter_context(RawViewer(server, receive_buffer=4_096))
            if number % 3 == 0:
                raw.say(type="subscribe", drops="*")
            elif number % 3 == 1:
                raw.send(frame(TEXT, b"half a message")[:9])
            # None of them answers the close frame, or reads anything at all.
        began = time.monotonic()
        server.signal(signal.SIGTERM)
        assert server.process.wait(10) == 0
        assert time.monotonic() - began < 4
        assert "Traceback" not in server.log()


# The stack in this process ----------------------------------------------------------------------------


class Stage:
    """Our sockets over a hub and a board, without engine and tables; its time limits are short."""

    def __init__(self, sockets: Sockets, service: Any, hub: Hub, board: Board, drop: Drop, port: int) -> None:
        self.sockets = sockets
        self.service = service
        self.hub = hub
        self.board = board
        self.drop = drop
        self.port = port

    def reserve(self) -> None:
        """One more unit is held, and that is committed."""
        event = self.drop.decide(reserve(UserId(new_id())), at(0))
        assert isinstance(event, Reserved)
        self.drop.apply(event)
        self.board.committed(STAGED, event)
        self.hub.committed(STAGED, event)

    async def client(self, receive_buffer: int = 4_096) -> trio.SocketStream:
        sock = trio.socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        await sock.connect(("127.0.0.1", self.port))
        return trio.SocketStream(sock)

    async def viewer(self, receive_buffer: int = 4_096, **headers: str) -> trio.SocketStream:
        stream = await self.client(receive_buffer)
        await stream.send_all(handshake(**headers))
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += await stream.receive_some(1)
        return stream


async def nothing_in_the_tables(drop_id: DropId, after: int, most: int) -> Sequence[Event]:
    return ()


@asynccontextmanager
async def stage(*, stall_s: float = 0.3, total: int = 100_000) -> AsyncIterator[Stage]:
    board, drop = Board(), born(terms(total, drop_id=STAGED))
    board.show(drop)
    hub = Hub(board, nothing_in_the_tables, pass_s=0.001, stall_s=stall_s)
    settings, gate = load({}, None), Gate()
    sockets = Sockets(settings, gate)
    service = SimpleNamespace(settings=settings, registry=SimpleNamespace(board=board), hub=hub)
    gate.service = cast(Service, service)
    listening = socket.create_server(("127.0.0.1", 0), backlog=1_000)
    listening.setblocking(False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hub.run)
        await nursery.start(sockets.run)
        nursery.start_soon(accept, listening, sockets, nursery)
        yield Stage(sockets, service, hub, board, drop, listening.getsockname()[1])
        sockets.cut()
        nursery.cancel_scope.cancel()
    listening.close()


async def accept(listening: socket.socket, sockets: Sockets, nursery: trio.Nursery) -> None:
    async def serve(sock: socket.socket) -> None:
        await trio.lowlevel.wait_readable(sock)
        sockets.take(sock, sock.recv(4_096))

    while True:
        await trio.lowlevel.wait_readable(listening)
        sock, _ = listening.accept()
        sock.setblocking(False)
        nursery.start_soon(serve, sock)


def subscribing() -> bytes:
    return frame(TEXT, json.dumps({"type": "subscribe", "drops": [STAGED]}).encode())


async def until(holds: Callable[[], bool]) -> None:
    with trio.fail_after(PATIENCE_S):
        while not holds():
            await trio.sleep(0.005)


async def read_all(stream: trio.SocketStream, already: bytes = b"") -> bytes:
    data = bytearray(already)
    with trio.fail_after(PATIENCE_S), suppress(trio.BrokenResourceError):
        while some := await stream.receive_some(65_536):
            data += some
    return bytes(data)


def payloads(data: bytes) -> list[tuple[int, bytes]]:
    found, position = [], 0
    while position < len(data):
        opcode, size = data[position] & 0x0F, data[position + 1]
        position += 2
        if size == 126:
            size = int.from_bytes(data[position : position + 2], "big")
            position += 2
        assert len(data) >= position + size, "cut within a frame"
        found.append((opcode, data[position : position + size]))
        position += size
    return found


async def test_viewer_that_does_not_read_is_conflated_and_then_sent_away() -> None:
    async with stage() as on, await on.viewer() as slow, await on.viewer(65_536) as quick:
        await slow.send_all(subscribing() + frame(PING, b"p"))
        await quick.send_all(subscribing())
        changes = 0
        while not on.hub.statistics().parked:
            on.reserve()
            changes += 1
            assert changes < CHANGES_MAX, "whatever it does not read is kept for it"
            await trio.sleep(0.0015)
            with trio.move_on_after(0):
                await quick.receive_some(65_536)
        at_parking = changes
        for _ in range(100):
            on.reserve()
            await trio.sleep(0.0015)
            with trio.move_on_after(0):
                await quick.receive_some(65_536)
        await until(lambda: on.hub.statistics().sent_away == 1)
        assert on.sockets.count == 2  # it is being told so
        heard = payloads(await read_all(slow, b""))
        assert heard[-1][0] == CLOSE
        assert int.from_bytes(heard[-1][1][:2], "big") == 1013
        seqs = [json.loads(payload)["seq"] for opcode, payload in heard if opcode == TEXT]
        assert seqs == sorted(seqs)
        assert seqs[-1] <= at_parking + 1  # what came while it was parked was not kept
        await until(lambda: on.sockets.count == 1)


async def test_viewer_that_reads_again_in_time_hears_how_it_stands() -> None:
    async with stage(stall_s=60) as on, await on.viewer() as slow:
        await slow.send_all(subscribing())
        while not on.hub.statistics().parked:
            on.reserve()
            await trio.sleep(0.0015)
        for _ in range(50):
            on.reserve()
            await trio.sleep(0.0015)
        data = b""
        with trio.fail_after(PATIENCE_S):
            while b'"seq":%d,' % on.drop.seq not in data:
                data += await slow.receive_some(65_536)
        events = [json.loads(payload) for opcode, payload in payloads(data) if opcode == TEXT]
        assert events[-1]["data"]["availableStock"] == on.drop.available
        seqs = [event["seq"] for event in events]
        assert seqs == sorted(seqs)
        assert seqs[-1] - seqs[-2] > 40  # one for all of them


async def test_viewer_that_never_reads_again_is_cut() -> None:
    async with stage() as on, await on.viewer() as deaf:
        await deaf.send_all(subscribing())
        while not on.hub.statistics().sent_away:
            on.reserve()
            await trio.sleep(0.0015)
        await until(lambda: on.sockets.count == 0)


async def test_viewers_that_are_gone_leave_no_task_behind() -> None:
    async with stage() as on:
        before = trio.lowlevel.current_statistics().tasks_living
        for _ in range(10):
            crowd = [await on.viewer() for _ in range(20)]
            for stream in crowd:
                await stream.send_all(subscribing())
            on.reserve()
            for number, stream in enumerate(crowd):
                if number % 2:
                    await stream.send_all(frame(CLOSE, struct.pack("!H", 1000)))
                await stream.aclose()
        await until(lambda: on.sockets.count == 0)
        await until(lambda: trio.lowlevel.current_statistics().tasks_living <= before)
        assert on.hub.statistics().viewers == 0


async def test_silent_viewer_is_asked_and_then_cut_and_one_that_answers_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "SWEEP_S", 0.02)
    monkeypatch.setattr(live, "PING_S", 0.1)
    monkeypatch.setattr(live, "SILENCE_S", 0.5)
    async with stage() as on, await on.viewer() as silent, await on.viewer() as quiet:
        answered = 0
        with trio.fail_after(PATIENCE_S):
            while answered < 8:  # longer than a silent one may be
                data = await quiet.receive_some(2)
                assert data == live.PING
                answered += 1
                await quiet.send_all(frame(PONG))
        assert on.sockets.count == 1
        assert set(payloads(await read_all(silent))) == {(PING, b"")}


async def test_who_resumes_more_than_there_is_room_for_is_told_so_and_may_name_the_rest() -> None:
    async with stage() as on, await on.viewer() as viewer:
        on.hub.marks_max = 1
        other = DropId("0199c2f0-0000-7000-8000-000000000002")
        on.board.show(born(terms(5, drop_id=other)))
        said: list[Json] = [
            {"type": "subscribe", "drops": "*", "resume": {STAGED: 1, other: 1}},
            {"type": "subscribe", "drops": [other]},
        ]
        for message in said:
            await viewer.send_all(frame(TEXT, json.dumps(message).encode()))
        data = b""
        with trio.fail_after(PATIENCE_S):
            while b"snapshot" not in data:
                data += await viewer.receive_some(65_536)
        error, shown = (json.loads(payload) for _, payload in payloads(data))
        assert (error["type"], error["code"]) == ("error", "TOO_MANY_DROPS")
        assert "the last 1 drops" in error["message"]
        assert shown["drop"]["id"] == other


async def test_who_watches_all_cannot_leave_some_and_is_told_so() -> None:
    async with stage() as on, await on.viewer() as viewer:

        async def say(type: str, drops: object) -> None:
            await viewer.send_all(frame(TEXT, json.dumps({"type": type, "drops": drops}).encode()))

        async def hear() -> Json:
            with trio.fail_after(PATIENCE_S):
                (_, told), *more = payloads(await viewer.receive_some(65_536))
            assert not more
            heard: Json = json.loads(told)
            return heard

        await say("unsubscribe", [STAGED])  # which it does not watch: nothing to do
        await say("subscribe", "*")
        assert (await hear())["type"] == "snapshot"
        await say("unsubscribe", [])
        await say("unsubscribe", [STAGED])
        assert (await hear())["code"] == "VALIDATION_ERROR"
        on.reserve()
        assert (await hear())["event"] == "STOCK_UPDATED", "nothing has changed"
        await say("unsubscribe", "*")
        await say("unsubscribe", [STAGED])
        await say("subscribe", [STAGED])
        assert (await hear())["type"] == "snapshot"


class SilentTables:
    """They answer nothing before `patience_s` is over, as a pool whose database is silent."""

    def __init__(self, patience_s: float) -> None:
        self.asked = 0
        self.patience_s = patience_s

    async def has_drop(self, drop_id: DropId) -> bool:
        self.asked += 1
        await trio.sleep(self.patience_s)
        raise Unavailable("it did not answer")


@pytest.mark.parametrize("has_sse", [False, True], ids=["WebSocket", "server-sent events"])
@pytest.mark.parametrize(("patience_s", "find_s"), [(0.3, 60.0), (60.0, 0.3)], ids=["fails", "takes too long"])
async def test_who_resumes_many_drops_that_are_not_in_memory_does_not_wait_for_each(
    monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery, patience_s: float, find_s: float, has_sse: bool
) -> None:
    monkeypatch.setattr(handlers, "FIND_S", find_s)
    async with stage() as on:
        on.service.reads = tables = SilentTables(patience_s)
        on.service.errands = Errands(nursery)
        positions = {new_id(): 1 for _ in range(30)} | {STAGED: on.drop.seq}
        on.reserve()
        began = trio.current_time()
        if has_sse:
            viewer = await on.client()
            last_id = "*" + "~".join(f"{events._short(DropId(drop_id))}.{seq}" for drop_id, seq in positions.items())
            await viewer.send_all(request("GET", "/api/live/events?drops=*", last_event_id=last_id))
        else:
            viewer = await on.viewer()
            asked = {"type": "subscribe", "drops": "*", "resume": positions}
            await viewer.send_all(frame(TEXT, json.dumps(asked).encode()))
        data = b""
        async with viewer:
            with trio.fail_after(PATIENCE_S):
                while b'"STOCK_UPDATED"' not in data:
                    data += await viewer.receive_some(65_536)
        assert b"snapshot" not in data, "what the board has goes on where it was"
        assert trio.current_time() - began < 2
        assert tables.asked == 1


async def test_who_names_drops_that_cannot_be_looked_up_is_told_so_in_time(
    monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    monkeypatch.setattr(handlers, "FIND_S", 0.2)
    async with stage() as on, await on.viewer() as viewer:
        on.service.reads, on.service.errands = SilentTables(60.0), Errands(nursery)
        asked = {"type": "subscribe", "drops": [STAGED, new_id()]}
        await viewer.send_all(frame(TEXT, json.dumps(asked).encode()))
        with trio.fail_after(PATIENCE_S):
            (_, told), *more = payloads(await viewer.receive_some(65_536))
        assert json.loads(told)["code"] == "DATABASE_UNAVAILABLE"
        assert not more


class UnreachableUsers:
    async def caller(self, headers: Mapping[str, str]) -> Caller:
        raise Unavailable("the connection was refused")


async def test_who_cannot_be_looked_up_is_told_so_and_asked_to_come_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with stage() as on:
        on.service.auth = UnreachableUsers()
        async with await on.viewer(x_user_id=new_id()) as viewer:
            (_, told), (opcode, closing) = payloads(await read_all(viewer))
            assert json.loads(told)["code"] == "DATABASE_UNAVAILABLE"
            assert (opcode, int.from_bytes(closing[:2], "big")) == (CLOSE, 1013)
            assert closing[2:].decode() == json.loads(told)["message"]
        async with await on.viewer() as nobody:  # who says nothing of itself waits for nothing
            await nobody.send_all(subscribing())
            assert await nobody.receive_some(1)
    assert "viewer_failed" not in capsys.readouterr().out
