"""Socket.IO for the pages of the earlier systems, byte by byte; real clients are in tests/clients."""

import json
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self, cast

import httpx
import pytest
import trio
from engineio import packet as wire
from engineio.packet import Packet
from trio.testing import MockClock
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from api import socketio
from api.engineio import CHUNK, GAP_S, MESSAGES_AT_ONCE, QUEUE_MAX, EngineIo, Refused, Session, _end_of_frames
from api.handlers import Gate, Service
from api.settings import load
from api.viewers import ViewerStream, frame
from engine.board import Board
from engine.hub import Hub
from tests.contract.conftest import PAGE
from tests.contract.shop import Shop, Wire, ahead, new_id, request
from tests.server import Server, serving

PATIENCE_S = 10.0
OPEN = {"EIO": "4", "transport": "polling"}
UPGRADE: dict[str, Any] = {
    "connection": "Upgrade",
    "upgrade": "websocket",
    "sec_websocket_version": "13",
    "sec_websocket_key": "dGhlIHNhbXBsZSBub25jZQ==",
}
Event = tuple[str, Any]


@pytest.fixture
def base() -> str:
    return "/api/v1"  # alone: this has an address of its own


opened = ExitStack()  # connections of the test that runs


@pytest.fixture(autouse=True)
def _close_connections() -> Iterator[None]:
    yield
    opened.pop_all().close()


class Client:
    """A session: what it says and hears, in packets; `wanted` and `until` read on until it is there."""

    def say(self, *packets: str) -> None:
        raise NotImplementedError

    def more(self) -> list[str]:
        raise NotImplementedError

    def __init__(self) -> None:
        self.packets: list[str] = []

    def next(self, beginning: str) -> str:
        """The next packet that begins like this; what comes before it stays."""
        end = time.monotonic() + PATIENCE_S
        while True:
            for packet in self.packets:
                if packet.startswith(beginning):
                    self.packets.remove(packet)
                    return packet
            assert time.monotonic() < end, (beginning, self.packets)
            self.packets += self.more()

    def connect(self) -> Self:
        self.say("40")
        assert set(json.loads(self.next("40")[2:])) == {"sid"}
        return self

    def ask(self, name: str, *arguments: object, number: int = 7) -> Any:
        """What an event is acknowledged with."""
        self.say(f"42{number}" + json.dumps([name, *arguments]))
        answer = json.loads(self.next(f"43{number}[")[len(f"43{number}") :])
        assert len(answer) == 1
        return answer[0]

    def heard(self, name: str, drop: object = None) -> Event:
        """The next event of this name, of this drop; what comes before it stays."""
        end = time.monotonic() + PATIENCE_S
        while True:
            for packet in self.packets:
                if packet.startswith("42["):
                    event, payload = json.loads(packet[2:])
                    if event == name and (drop is None or _drop_of(payload) == drop):
                        self.packets.remove(packet)
                        return event, payload
            assert time.monotonic() < end, (name, self.packets)
            self.packets += self.more()

    def events(self, drop: object) -> list[Event]:
        """All that it has heard of a drop by now; what is told after the last question shows that there is no more."""
        for _ in range(3):  # what a poll had no room for is there for the next
            self.ask("no such event", number=999)
        told = [json.loads(packet[2:]) for packet in self.packets if packet.startswith("42[")]
        return [(name, payload) for name, payload in told if _drop_of(payload) == drop]


class Polling(Client):
    def __init__(self, server: Server) -> None:
        super().__init__()
        self.http = opened.enter_context(httpx.Client(timeout=PATIENCE_S, verify=server.tls or True))
        self.url = server.url + "/socket.io/"
        answer = self.http.get(self.url, params=OPEN)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "text/plain; charset=UTF-8"
        self.greeting = json.loads(answer.text.removeprefix("0"))
        self.query = OPEN | {"sid": self.greeting["sid"]}

    def say(self, *packets: str) -> None:
        answer = self.post("\x1e".join(packets).encode())
        assert (answer.status_code, answer.text) == (200, "ok")

    def post(self, body: bytes) -> httpx.Response:
        return self.http.post(self.url, params=self.query, content=body)

    def poll(self) -> httpx.Response:
        return self.http.get(self.url, params=self.query)

    def more(self) -> list[str]:
        answer = self.poll()
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "text/plain; charset=UTF-8"
        return answer.text.split("\x1e")


class Socket(Client):
    def __init__(self, server: Server, *, sid: str = "", origin: str | None = None) -> None:
        super().__init__()
        url = f"{server.url.replace('http', 'ws')}/socket.io/?EIO=4&transport=websocket" + (
            f"&sid={sid}" if sid else ""
        )
        self.socket: ClientConnection = opened.enter_context(
            connect(url, ssl=server.tls, origin=cast(Any, origin), open_timeout=PATIENCE_S, proxy=None, max_queue=None)
        )
        if not sid:
            self.greeting = json.loads(self.next("0")[1:])

    def say(self, *packets: str) -> None:
        for packet in packets:
            self.socket.send(packet)

    def more(self) -> list[str]:
        return [str(self.socket.recv(PATIENCE_S))]

    def closed(self) -> int | None:
        """Read to the end, and the code that it ended with."""
        with suppress(ConnectionClosed):
            while True:
                self.socket.recv(PATIENCE_S)
        return self.socket.close_code


def _drop_of(payload: Any) -> object:
    return payload.get("dropId") or payload.get("drop", {}).get("id")


TRANSPORTS = [pytest.param(Polling, id="polling"), pytest.param(Socket, id="websocket")]


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> type[Polling] | type[Socket]:
    kind: type[Polling] | type[Socket] = request.param
    return kind


Transport = type[Polling] | type[Socket]

# What is told ----------------------------------------------------------------------------------------


def test_session_opens_with_what_a_client_needs_to_know(shop: Shop) -> None:
    polling, socket = Polling(shop.server), Socket(shop.server)

    for client, upgrades in ((polling, ["websocket"]), (socket, [])):
        assert client.greeting.pop("sid")
        assert client.greeting == {
            "upgrades": upgrades,
            "pingInterval": 25_000,
            "pingTimeout": 20_000,
            "maxPayload": 16_384,
        }


def test_every_change_is_told_in_both_vocabularies_as_it_is_in_the_contract(hasty: Shop, transport: Transport) -> None:
    client = transport(hasty.server).connect()
    name = f"buyer-{new_id()[:8]}"
    drop, buyer, loser = hasty.drop(total_stock=3), hasty.visitor(X_User_Name=name), hasty.visitor()
    drop_id = drop["id"]

    assert client.heard("DROP_CREATED", drop_id) == ("DROP_CREATED", {"drop": drop})
    stock = {"dropId": drop_id, "availableStock": 3}
    assert client.heard("drop:stock_updated", drop_id) == ("drop:stock_updated", stock)
    assert client.heard("STOCK_UPDATED", drop_id) == ("STOCK_UPDATED", stock)

    buyer.reserve(drop)
    stock = {"dropId": drop_id, "availableStock": 2}
    assert client.heard("drop:stock_updated", drop_id)[1] == client.heard("STOCK_UPDATED", drop_id)[1] == stock

    purchase = buyer.purchase(drop).data["purchase"]
    line = {"userId": buyer.id, "username": name, "qty": 1, "createdAt": purchase["created_at"]}
    activity = {"dropId": drop_id, "latestPurchasers": [line]}
    assert client.heard("drop:activity_updated", drop_id)[1] == activity
    assert client.heard("ACTIVITY_UPDATED", drop_id)[1] == activity
    bought = {"dropId": drop_id, "username": name, "purchasedAt": purchase["created_at"]}
    assert client.heard("PURCHASE_COMPLETED", drop_id)[1] == bought

    reservation_id = loser.holds(drop)
    assert client.heard("STOCK_UPDATED", drop_id)[1]["availableStock"] == 1
    assert client.heard("RESERVATION_EXPIRED", drop_id)[1] == {"dropId": drop_id, "reservationId": reservation_id}
    assert client.heard("STOCK_UPDATED", drop_id)[1]["availableStock"] == 2

    loser.cancel(loser.holds(drop))
    time.sleep(0.2)
    stocks = [payload["availableStock"] for name, payload in client.events(drop_id) if name == "STOCK_UPDATED"]
    assert stocks[-1] == 2


def test_drop_that_goes_live_by_its_clock_is_told(shop: Shop, transport: Transport) -> None:
    client = transport(shop.server).connect()
    drop = shop.drop(status="scheduled", starts_at=ahead(0.5))

    assert client.heard("DROP_UPDATED", drop["id"])[1]["drop"]["status"] == "live"


def test_client_hears_nothing_of_what_was_before_it_came(shop: Shop, transport: Transport) -> None:
    drop = shop.drop(total_stock=9)
    for _ in range(20):
        before, after = shop.visitor(), shop.visitor()
        before.holds(drop)  # maybe not told yet when the client comes
        client = transport(shop.server).connect()
        after.cancel(after.holds(drop))
        before.cancel(shop.visitor(before.id).get("/reservations/me").data["items"][0]["id"])
        assert client.heard("STOCK_UPDATED", drop["id"])
        assert not [name for name, _ in client.events(drop["id"]) if name == "ACTIVITY_UPDATED"]


def test_purchase_right_after_a_client_connects_is_not_lost_in_a_snapshot(shop: Shop, transport: Transport) -> None:
    drop = shop.drop(total_stock=20)
    for _ in range(10):
        buyer = shop.visitor()
        buyer.reserve(drop)
        client = transport(shop.server).connect()
        buyer.purchase(drop)
        assert client.heard("PURCHASE_COMPLETED", drop["id"])
        assert client.heard("ACTIVITY_UPDATED", drop["id"])[1]["latestPurchasers"][0]["userId"] == buyer.id
        assert [name for name, _ in client.events(drop["id"]) if name in ("PURCHASE_COMPLETED", "DROP_CREATED")] == []


# What is asked ---------------------------------------------------------------------------------------


def test_client_that_joins_drops_hears_of_those_alone(shop: Shop, transport: Transport) -> None:
    joined, other, third = (shop.drop(total_stock=5) for _ in range(3))
    client = transport(shop.server).connect()

    assert client.ask("drops:join", {"dropId": joined["id"]}) == {"ok": True}
    for drop in (other, joined):
        shop.visitor().reserve(drop)
    assert client.heard("STOCK_UPDATED", joined["id"])[1]["availableStock"] == 4
    assert client.ask("drops:join", {"dropId": third["id"].upper()}) == {"ok": True}
    shop.visitor().reserve(third)
    assert client.heard("STOCK_UPDATED", third["id"])[1]["availableStock"] == 4

    assert client.ask("drops:leave", {"dropId": joined["id"]}) == {"ok": True}
    client.packets.clear()
    for drop in (joined, third):
        shop.visitor().reserve(drop)
    assert client.heard("STOCK_UPDATED", third["id"])[1]["availableStock"] == 3
    assert client.events(joined["id"]) == client.events(other["id"]) == []


def test_joining_misses_nothing_and_repeats_nothing(shop: Shop, transport: Transport) -> None:
    drop, noise = shop.drop(total_stock=500), shop.drop(total_stock=1)
    client = transport(shop.server).connect()
    bought = []

    def buy() -> None:
        for _ in range(60):
            buyer = shop.visitor()
            buyer.reserve(drop)
            bought.append(buyer.purchase(drop).data["purchase"]["created_at"])

    buying = threading.Thread(target=buy)
    buying.start()
    client.ask("drops:join", {"dropId": drop["id"]})
    client.ask("drops:join", {"dropId": noise["id"]})
    client.ask("drops:join", {"dropId": drop["id"]})  # again: nothing to do
    buying.join()
    time.sleep(0.2)

    told = [payload["purchasedAt"] for name, payload in client.events(drop["id"]) if name == "PURCHASE_COMPLETED"]
    assert told == bought


@pytest.mark.parametrize("event", ["drops:join", "drops:leave"])
@pytest.mark.parametrize("arguments", [[], [None], [{}], [{"dropId": 7}], [{"dropId": "seven"}], ["x"]])
def test_what_names_no_drop_is_acknowledged_as_such(shop: Shop, event: str, arguments: list[object]) -> None:
    answer = Socket(shop.server).connect().ask(event, *arguments)

    assert answer["ok"] is False
    assert answer["error"]["code"] == "VALIDATION_ERROR"
    assert answer["error"]["message"]


def test_drop_that_there_is_not_cannot_be_joined_and_changes_nothing(shop: Shop, transport: Transport) -> None:
    client, drop = transport(shop.server).connect(), shop.drop()

    assert client.ask("drops:join", {"dropId": new_id()})["error"]["code"] == "DROP_NOT_FOUND"
    assert client.ask("drops:leave", {"dropId": new_id()}) == {"ok": True}  # as a room that nobody joined
    shop.visitor().reserve(drop)
    assert client.heard("STOCK_UPDATED", drop["id"])


def test_unknown_events_are_acknowledged_as_such_or_ignored(shop: Shop, transport: Transport) -> None:
    client = transport(shop.server).connect()

    client.say('42["hello",{"a":[1]}]', '42["hello"]')
    assert client.ask("hello", number=123456789)["error"]["code"] == "UNKNOWN_EVENT"


def test_other_namespaces_are_refused_and_the_session_stays(shop: Shop, transport: Transport) -> None:
    client = transport(shop.server)

    client.say("40/admin,")
    assert client.next("44") == '44/admin,{"message":"Invalid namespace"}'
    client.connect()
    client.say("40/admin?token=x,{}")
    assert client.next("44") == '44/admin,{"message":"Invalid namespace"}'
    assert client.ask("hello")["ok"] is False


def test_client_that_leaves_the_namespace_hears_nothing_and_may_come_again(shop: Shop, transport: Transport) -> None:
    client, drop = transport(shop.server).connect(), shop.drop(total_stock=9)
    client.heard("STOCK_UPDATED", drop["id"])
    client.say("41")
    shop.visitor().reserve(drop)
    time.sleep(0.2)
    client.connect()
    shop.visitor().reserve(drop)

    assert client.heard("STOCK_UPDATED", drop["id"])[1]["availableStock"] == 7


def test_attachments_are_taken_though_they_mean_nothing(shop: Shop) -> None:
    client = Socket(shop.server).connect()
    client.socket.send('451-5["hello",{"_placeholder":true,"num":0}]')
    client.socket.send(b"\x00\x01")
    assert (
        client.next("435[")
        == '435[{"ok":false,"error":{"code":"UNKNOWN_EVENT","message":"There is no such event here."}}]'
    )

    polling = Polling(shop.server).connect()
    polling.say('451-5["hello",{"_placeholder":true,"num":0}]', "bAAE=")
    assert polling.next("435[")


# Upgrade ---------------------------------------------------------------------------------------------


@contextmanager
def pending_poll(client: Polling) -> Iterator[list[httpx.Response]]:
    """A poll that waits; its answer is there at the end of the block."""
    answers: list[httpx.Response] = []

    def poll() -> None:
        with httpx.Client(timeout=PATIENCE_S) as http:
            answers.append(http.get(client.url, params=client.query))

    thread = threading.Thread(target=poll)
    thread.start()
    time.sleep(0.2)
    yield answers
    thread.join(PATIENCE_S)
    assert answers, "the poll was not answered"


def test_session_moves_to_a_websocket_and_the_pending_poll_is_let_go(shop: Shop) -> None:
    drop = shop.drop(total_stock=2)
    polling = Polling(shop.server).connect()
    polling.ask("drops:join", {"dropId": drop["id"]})  # a hold of another test's that ends is news, too
    with pending_poll(polling) as answers:
        socket = Socket(shop.server, sid=polling.greeting["sid"])
        socket.say("2probe")
        assert socket.next("3") == "3probe"
    assert answers[0].text == "6"

    shop.visitor().reserve(drop)  # told while it is on neither: it waits
    time.sleep(0.2)
    assert polling.poll().text.startswith("42")  # whoever polls all the same is answered, and does not wait
    assert polling.poll().text == "6"
    shop.visitor().reserve(drop)
    time.sleep(0.2)
    socket.say("5")
    assert socket.heard("STOCK_UPDATED", drop["id"])[1]["availableStock"] == 0
    assert socket.ask("hello")["ok"] is False
    assert polling.poll().json() == {"code": 3, "message": "Bad request"}
    assert polling.post(b"3").json() == {"code": 3, "message": "Bad request"}
    assert socket.ask("hello")["ok"] is False


def test_moving_loses_nothing_and_repeats_nothing(shop: Shop) -> None:
    drop = shop.drop(total_stock=500)
    bought: list[str] = []

    def buy() -> None:
        for _ in range(100):
            buyer = shop.visitor()
            buyer.reserve(drop)
            bought.append(buyer.purchase(drop).data["purchase"]["created_at"])

    polling = Polling(shop.server)
    polling.connect()
    buying = threading.Thread(target=buy)
    buying.start()
    polling.heard("PURCHASE_COMPLETED", drop["id"])
    time.sleep(0.1)
    socket = Socket(shop.server, sid=polling.greeting["sid"])
    socket.say("2probe")
    socket.next("3probe")
    polling.packets += polling.more()
    socket.say("5")
    buying.join()
    time.sleep(0.2)
    told = [payload for name, payload in socket.events(drop["id"]) if name == "PURCHASE_COMPLETED"]
    before = [json.loads(packet[2:]) for packet in polling.packets if packet.startswith("42[")]
    told = [payload for name, payload in before if name == "PURCHASE_COMPLETED"] + told

    assert [payload["purchasedAt"] for payload in told] == bought[1:]


def test_websocket_that_is_no_good_leaves_the_session_where_it_is(shop: Shop) -> None:
    polling = Polling(shop.server)
    polling.connect()
    sid = polling.greeting["sid"]
    wrong = Socket(shop.server, sid=sid)
    with pytest.raises(InvalidStatus) as refused:
        Socket(shop.server, sid=sid)  # one at a time
    assert json.loads(refused.value.response.body) == {"code": 3, "message": "Bad request"}
    wrong.say("4hello")
    assert wrong.closed() == 1000
    half = Socket(shop.server, sid=sid)
    half.say("2probe")
    half.next("3probe")
    half.socket.close()
    time.sleep(0.1)

    assert polling.ask("hello")["ok"] is False
    good = Socket(shop.server, sid=sid)
    good.say("2probe")
    good.next("3probe")
    good.say("5")
    assert good.ask("hello")["ok"] is False


# What is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "query", "code", "message"),
    [
        ("GET", {"EIO": "4", "transport": "carrier pigeon"}, 0, "Transport unknown"),
        ("GET", {}, 0, "Transport unknown"),
        ("GET", OPEN | {"sid": "nobody"}, 1, "Session ID unknown"),
        ("POST", OPEN | {"sid": "nobody"}, 1, "Session ID unknown"),
        ("POST", OPEN, 2, "Bad handshake method"),
        ("GET", {"EIO": "4", "transport": "websocket"}, 3, "Bad request"),
        ("GET", {"EIO": "3", "transport": "polling"}, 5, "Unsupported protocol version"),
        ("GET", {"transport": "polling"}, 5, "Unsupported protocol version"),
    ],
)
def test_requests_are_refused_in_the_words_of_engine_io(
    shop: Shop, method: str, query: dict[str, str], code: int, message: str
) -> None:
    answer = shop.http.request(method, shop.server.url + "/socket.io/", params=query)

    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {"code": code, "message": message}


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("EIO=4&transport=polling", 3),
        ("EIO=4&transport=other", 0),
        ("EIO=4&transport=websocket&sid=nobody", 1),
        ("EIO=3&transport=websocket", 5),
    ],
)
def test_websockets_are_refused_in_the_same_words(shop: Shop, query: str, code: int) -> None:
    with Wire(shop.server) as wire:
        wire.send(request("GET", f"/socket.io/?{query}", **UPGRADE))
        answer = wire.answer()
        assert answer.status == 400
        assert json.loads(answer.body)["code"] == code
        assert wire.is_closed()


def test_overlapping_polls_end_the_session(shop: Shop) -> None:
    polling = Polling(shop.server)
    with pending_poll(polling) as answers:
        second = polling.poll()
    assert (second.status_code, second.json()["code"]) == (400, 3)
    assert answers[0].text == "1"
    assert polling.poll().json()["code"] == 1


def test_head_takes_nothing_that_belongs_to_a_poll(shop: Shop) -> None:
    polling = Polling(shop.server)
    polling.say("40")
    assert polling.http.head(polling.url, params=polling.query).status_code == 400
    assert polling.poll().text.startswith("40{")


def test_body_over_the_limit_is_413(shop: Shop) -> None:
    polling = Polling(shop.server)
    polling.connect()
    largest = b'42["' + b"x" * (16_384 - 6) + b'"]'
    assert len(largest) == 16_384
    assert polling.post(largest).text == "ok"
    assert polling.post(largest + b" ").status_code == 413


def test_limit_holds_where_bodies_may_be_larger_too(database: str, tmp_path: Path) -> None:
    with serving(database, tmp_path / "log", BODY_MAX_BYTES="65536") as server:
        polling = Polling(server)
        assert polling.greeting["maxPayload"] == 16_384
        assert polling.post(b"6" * 16_385).status_code == 413
        assert polling.poll().json()["code"] == 1


def test_message_over_the_limit_closes_the_websocket(shop: Shop) -> None:
    client = Socket(shop.server).connect()
    client.say('42["' + "x" * (16_384 - 6) + '"]')
    assert client.ask("hello")["ok"] is False
    client.say('42["' + "x" * (16_384 - 5) + '"]')
    assert client.closed() == 1009


def test_websocket_that_breaks_the_rules_is_closed_with_a_reason(shop: Shop) -> None:
    with Wire(shop.server) as wire:
        wire.send(request("GET", "/socket.io/?EIO=4&transport=websocket", **UPGRADE))
        assert wire._until(b"\r\n\r\n").startswith(b"HTTP/1.1 101 ")
        greeting = wire._exactly(2)
        wire._exactly(greeting[1] if greeting[1] < 126 else int.from_bytes(wire._exactly(2), "big"))
        wire.send(b"\x81\x02hi")  # not masked
        assert wire._exactly(4)[::2] == b"\x88\x03"  # 1002


@pytest.mark.parametrize("more", [b"\x89\x80" + bytes(4), b"\x81\xfe\x42\x68" + bytes(4), b"\x83\x80" + bytes(4)])
def test_what_follows_a_violation_takes_nothing_from_the_good_bye(shop: Shop, more: bytes) -> None:
    with Wire(shop.server) as wire:
        wire.send(request("GET", "/socket.io/?EIO=4&transport=websocket", **UPGRADE))
        assert wire._until(b"\r\n\r\n").startswith(b"HTTP/1.1 101 ")
        greeting = wire._exactly(2)
        wire._exactly(greeting[1])
        body = b"" if more[1] == 0x80 else b"4" * 17_000
        wire.send(b"\x81\x82" + bytes(4) + b"zz" + more + body)
        while (opcode := wire._exactly(1)) == b"\x8a":  # a pong, if the ping was heard first
            wire._exactly(wire._exactly(1)[0])
        assert opcode == b"\x88"
    assert "viewer_failed" not in shop.server.log()


GARBAGE = [
    "",
    "9",
    "x",
    "2",  # only the server asks
    "4",
    "4x",
    "49",
    '4{"a": 1}',
    "42",
    "42{}",
    "42[]",
    "42[7]",
    '42["open"',
    "4" + "2" * 200 + '["x"]',
    "42" + "[" * 5_000,
    '42["a", NaN]',
    "40",  # once was enough
    '42/admin,["x"]',
    r'4"0/\ud800,"',  # a message in JSON, with half a surrogate pair in the name of a namespace
    r'4"2[\"\ud800\"]"',
    '4511-["x"]',
    '42999999-["x"]',
    '451-["x",{"_placeholder":true,"num":0}]\x1e42["no attachment"]',
    "bAAE=",
]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_what_is_no_packet_ends_the_session(shop: Shop, garbage: str) -> None:
    polling, socket = Polling(shop.server).connect(), Socket(shop.server).connect()
    assert isinstance(polling, Polling)
    assert isinstance(socket, Socket)
    if garbage:
        answer = polling.post(garbage.encode())
        assert (answer.status_code, answer.json()["code"]) == (400, 3)
        assert polling.poll().json()["code"] == 1
    if garbage != "bAAE=":
        socket.say(*garbage.split("\x1e"))
        assert socket.closed() == 1008
    assert "internal_error" not in shop.server.log()
    assert "viewer_failed" not in shop.server.log()


@pytest.mark.parametrize("body", [b"\xff", b"d=4", b"6\x1e\x1e6", b"6" + b"\x1e6" * 1_000])
def test_what_is_no_payload_ends_the_session(shop: Shop, body: bytes) -> None:
    polling = Polling(shop.server)
    assert polling.post(body).json() == {"code": 3, "message": "Bad request"}
    assert polling.poll().json()["code"] == 1


def test_page_that_joins_each_of_its_drops_as_it_connects_stays_connected(shop: Shop, transport: Transport) -> None:
    drop = shop.drop()
    client = transport(shop.server).connect()
    for begin in range(0, 990, 110):
        client.say(*[f'42["drops:join",{{"dropId":"{drop["id"]}"}}]' for _ in range(begin, begin + 110)])
    assert client.ask("hello")["ok"] is False


def test_client_that_talks_too_much_is_cut_off(shop: Shop, transport: Transport) -> None:
    client = transport(shop.server).connect()
    for _ in range(4):  # a body has room for a thousand
        client.say(*["6"] * (int(MESSAGES_AT_ONCE) // 4 - 5))
    assert client.ask("hello")["ok"] is False
    if isinstance(client, Socket):
        with suppress(ConnectionClosed):
            client.say(*["6"] * 200)
        assert client.closed() == 1008
    else:
        assert isinstance(client, Polling)
        assert client.post(b"\x1e".join([b"6"] * 200)).status_code == 400
        assert client.poll().json()["code"] == 1


def test_polling_sessions_are_bounded(database: str, tmp_path: Path) -> None:
    with serving(database, tmp_path / "log", CONNECTIONS_MAX="20") as server, httpx.Client() as http:
        url = server.url + "/socket.io/"
        for _ in range(20):
            assert http.get(url, params=OPEN).status_code == 200
        refused = http.get(url, params=OPEN)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "OVERLOADED")
        assert "retry-after" in refused.headers
        with Wire(server) as wire:
            wire.send(request("GET", "/socket.io/?EIO=4&transport=websocket", **UPGRADE))
            assert wire.answer().outcome == (503, "OVERLOADED")


def test_client_that_does_not_poll_hears_where_things_stand_when_it_does(shop: Shop) -> None:
    drops = [shop.drop(total_stock=100) for _ in range(3)]
    polling = Polling(shop.server)
    polling.connect()
    last: dict[str, str] = {}  # buyer, by drop
    for _ in range(40):
        for drop in drops:
            buyer = shop.visitor()
            buyer.reserve(drop)
            buyer.purchase(drop)
            last[drop["id"]] = buyer.id
    answer = polling.poll()
    assert len(answer.content) < 2 * QUEUE_MAX
    polling.packets += answer.text.split("\x1e")
    end = time.monotonic() + PATIENCE_S
    while not all(any(buyer in packet for packet in polling.packets) for buyer in last.values()):
        assert time.monotonic() < end, "the last purchases were never told"
        polling.packets += polling.more()  # their pass had not come when we first asked

    for drop in drops:
        stocks = [payload["availableStock"] for name, payload in polling.events(drop["id"]) if name == "STOCK_UPDATED"]
        assert stocks == sorted(stocks, reverse=True)
        assert stocks[-1] == 60
        latest = [payload for name, payload in polling.events(drop["id"]) if name == "drop:activity_updated"]
        feed = shop.show(drop)["activity_feed"]["latest_purchasers"]
        assert [line["userId"] for line in latest[-1]["latestPurchasers"]] == [line["user_id"] for line in feed]


# Origins, TLS, the end -------------------------------------------------------------------------------


def test_allowed_page_may_poll_with_credentials(strict: Shop) -> None:
    url = strict.server.url + "/socket.io/"
    preflight = strict.http.options(
        url, headers={"Origin": PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-a"}
    )
    assert preflight.status_code == 204
    for answer in (preflight, strict.http.get(url, params=OPEN, headers={"Origin": PAGE})):
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert answer.headers["access-control-allow-credentials"] == "true"
        assert "Origin" in answer.headers["vary"]
    refused = strict.http.get(url, params={"EIO": "3"}, headers={"Origin": PAGE})
    assert refused.headers["access-control-allow-origin"] == PAGE
    stranger = strict.http.get(url, params=OPEN, headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in stranger.headers


def test_websocket_is_open_to_allowed_pages_and_our_own(strict: Shop) -> None:
    for origin in (PAGE, strict.server.url, None):
        assert Socket(strict.server, origin=origin).connect()
    for origin in ("https://evil.example", "null", "http://[", "http://127.0.0.1:1"):
        with pytest.raises(InvalidStatus) as refused:
            Socket(strict.server, origin=origin)
        assert refused.value.response.status_code == 403
        assert json.loads(refused.value.response.body) == {"code": 4, "message": "Forbidden"}


def test_tls_is_spoken_on_both_transports(database: str, tmp_path: Path, certificate: Path) -> None:
    with serving(database, tmp_path / "log", TLS_CERTFILE=str(certificate), SHUTDOWN_TIMEOUT_MS="1000") as server:
        polling = Polling(server)
        polling.connect()
        moved = Socket(server, sid=polling.greeting["sid"])
        moved.say("2probe")
        moved.next("3probe")
        moved.say("5")
        clients: list[Client] = [moved, Socket(server).connect(), Polling(server).connect()]
        shop = Shop(server, "/api", opened.enter_context(httpx.Client(verify=server.tls or True)))
        drop = shop.drop(total_stock=4)
        shop.visitor().reserve(drop)
        for client in clients:
            assert client.heard("DROP_CREATED", drop["id"])
            stocks = [client.heard("STOCK_UPDATED", drop["id"])[1]["availableStock"]]
            if stocks == [4]:
                assert client.heard("STOCK_UPDATED", drop["id"])[1]["availableStock"] == 3
        assert server.stop() == 0


def test_server_that_stops_says_so_to_everybody_and_waits_for_nobody(database: str, tmp_path: Path) -> None:
    with serving(database, tmp_path / "log", SHUTDOWN_TIMEOUT_MS="1000") as server:
        polling, deaf, socket = Polling(server), Polling(server), Socket(server).connect()
        polling.connect()
        deaf.connect()
        assert isinstance(socket, Socket)
        half = Socket(server, sid=deaf.greeting["sid"])  # a WebSocket on its way
        half.say("2probe")
        half.next("3probe")
        with Wire(server) as silent:  # one that does not answer a close
            silent.send(request("GET", "/socket.io/?EIO=4&transport=websocket", **UPGRADE))
            silent.wait_readable()
            with pending_poll(polling) as answers:
                began = time.monotonic()
                assert server.stop() == 0
            assert time.monotonic() - began < 3
            assert answers[0].text == "1"
            assert socket.closed() == 1001


# In process, where time can be skipped ---------------------------------------------------------------


class Nothing:
    """A talk that notes what it hears."""

    def __init__(self) -> None:
        self.messages: list[str | bytes] = []
        self.has_ended = False

    async def heard(self, message: str | bytes) -> None:
        self.messages.append(message)

    def moved(self) -> None: ...

    def has_room(self) -> None: ...

    def hindered(self) -> None: ...

    def ended(self) -> None:
        self.has_ended = True


@pytest.fixture
async def sessions(nursery: trio.Nursery) -> EngineIo:
    gate = Gate()
    gate.service = cast(Service, object())
    made = EngineIo(load({}, None), gate, lambda session, service: Nothing())
    nursery.start_soon(made.run)
    return made


async def test_client_that_answers_pings_stays_and_one_that_does_not_is_gone_after_45_s(
    sessions: EngineIo, autojump_clock: MockClock
) -> None:
    good, bad = sessions._open(), sessions._open()
    began = trio.current_time()
    for number in range(1, 5):
        assert await good.poll() == b"2"
        assert 25 * number <= trio.current_time() - began <= 27 * number
        await good.post(b"3")
    assert not good.is_closed
    assert bad.is_closed
    await trio.sleep(45 - 25)
    assert not good.is_closed
    await trio.sleep(30)
    assert good.is_closed


async def test_talk_that_does_not_begin_in_its_time_ends(sessions: EngineIo, autojump_clock: MockClock) -> None:
    session = sessions._open()
    session.end_within(10)
    await trio.sleep(9)
    assert not session.is_closed
    await trio.sleep(3)
    assert session.is_closed
    with pytest.raises(Refused):
        sessions._checked("GET", {**OPEN, "sid": session.sid}, is_upgrade=False)


async def test_queue_of_a_polling_session_is_bounded_and_one_send_is_always_taken(sessions: EngineIo) -> None:
    session = sessions._open()
    huge = b"4x\x1e" * QUEUE_MAX

    assert session.send(huge)
    assert not session.send(b"4x\x1e")
    assert await session.poll() == huge[:-1]
    assert session.send(b"4" + b"x" * (QUEUE_MAX - 2) + b"\x1e")
    assert not session.send(b"4\x1e")
    for _ in range(100):
        session.write(Packet(4, "x" * 1_000))
    assert session.is_closed


async def test_news_are_answered_at_once_and_then_no_more_than_five_times_a_second(
    sessions: EngineIo, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    session = sessions._open()
    session.send(b"4a\x1e")
    assert await session.poll() == b"4a"
    began = trio.current_time()
    session.send(b"4b\x1e")

    async def more() -> None:
        await trio.sleep(0.1)
        session.send(b"4c\x1e")

    nursery.start_soon(more)
    assert await session.poll() == b"4b\x1e4c"
    assert trio.current_time() - began == pytest.approx(GAP_S)

    session.write(Packet(wire.MESSAGE, "reply"))  # what it asked for is there at once
    assert await session.poll() == b"4reply"
    assert trio.current_time() - began == pytest.approx(GAP_S)


async def test_poll_that_is_given_up_ends_the_session(sessions: EngineIo, autojump_clock: MockClock) -> None:
    session = sessions._open()
    with trio.move_on_after(1):
        await session.poll()
    assert session.is_closed


async def test_session_that_has_ended_is_gone_without_the_collector(sessions: EngineIo) -> None:
    hub = Hub(Board(), cast(Any, None))
    session = Session(sessions)
    session.talk = client = socketio.Client(session, cast(Service, SimpleNamespace(hub=hub)))
    await session.post(b"40")
    gone = weakref.ref(session), weakref.ref(client)
    session.close()
    del session, client

    assert [reference() for reference in gone] == [None, None]
    assert hub.statistics().viewers == 0


class Upgrading:
    """A WebSocket whose client does what it should."""

    def __init__(self) -> None:
        self.says = ["2probe", "5"]

    async def get_message(self) -> str:
        await trio.sleep(1)
        if not self.says:
            await trio.sleep_forever()
        return self.says.pop(0)

    async def aclose(self, code: int, reason: str | None) -> None: ...


async def test_of_two_websockets_that_are_admitted_at_once_one_takes_the_session(
    sessions: EngineIo, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    session = sessions._open()
    for _ in range(2):  # before either has shaken hands
        assert sessions._checked("GET", OPEN | {"transport": "websocket", "sid": session.sid}, is_upgrade=True)
    first, second, third = (cast(Any, Upgrading()) for _ in range(3))
    stream = Slow(nursery)

    async def move() -> None:
        assert await session.probe(first, stream)
        await session.listen(first, stream, nursery)

    nursery.start_soon(move)
    await trio.sleep(0.5)
    assert not await session.probe(second, Slow(nursery))
    await trio.sleep(2)
    assert session._stream is stream
    assert not await session.probe(third, Slow(nursery)), "it has moved"
    assert second.says == third.says == ["2probe", "5"], "nobody listens to them"
    assert session._stream is stream


async def test_session_that_ended_while_its_websocket_shook_hands_does_not_move(sessions: EngineIo) -> None:
    session = sessions._open()
    session.close()
    assert not await session.probe(cast(Any, Upgrading()), cast(Any, None))


class Slow(ViewerStream):
    """Takes so many bytes at once, then waits."""

    def __init__(self, nursery: trio.Nursery) -> None:
        super().__init__(nursery, b"")
        self.room = 100
        self.sent = bytearray()

    def _send(self, data: bytes) -> int:
        taken = min(self.room, len(data))
        self.sent += data[:taken]
        self.room -= taken
        return taken

    async def _wait_writable(self) -> None:
        await trio.sleep(0.01)
        self.room = 40_000

    async def _send_some(self, data: bytearray) -> int:
        return self._send(bytes(data))

    async def _receive(self, most: int) -> bytes:
        await trio.sleep_forever()
        return b""

    def _close(self) -> None: ...

    async def send_eof(self) -> None: ...


async def test_large_news_leave_in_pieces_and_replies_go_between_whole_frames(
    sessions: EngineIo, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    session, stream = Session(sessions), Slow(nursery)
    session.talk = Nothing()
    session._stream = stream
    stream.drained = session._drained
    frames = [frame(b"4" + b"x" * size) for size in (10, 200, 70_000, 3, 125, 126, 60_000, 5_000) * 3]
    news = b"".join(frames)
    assert len(news) > 5 * CHUNK

    assert session.send(news)
    assert not session.send(b"not now")
    reply = frame(b"reply")
    await trio.sleep(0.02)
    stream.write(reply)
    await trio.sleep(5)

    at = bytes(stream.sent).index(reply)
    assert bytes(stream.sent).replace(reply, b"") == news
    assert at in [sum(map(len, frames[:count])) for count in range(len(frames) + 1)]
    assert session.send(reply)


def test_frames_are_cut_where_they_end() -> None:
    data = frame(b"a") + frame(b"b" * 200) + frame(b"c" * 70_000)

    assert _end_of_frames(data, 0, 3) == 3
    assert _end_of_frames(data, 0, 206) == 3
    assert _end_of_frames(data, 0, 207) == 207
    assert _end_of_frames(data, 207, 10) == len(data)
