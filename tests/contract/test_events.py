"""The live feed as server-sent events: over HTTP/1.1 on a connection of its own, over TLS and HTTP/2 through Quart."""

import json
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, cast

import httpx
import pytest
import trio
from h2.config import H2Configuration
from h2.connection import H2Connection
from trio.testing import MockClock, memory_stream_pair

from api import events
from api.cold import SILENCE_S as SILENCE
from api.cold import BegunStream
from api.events import NAMED_MAX, PATHS
from persistence.embedded import EmbeddedServer
from tests.conftest import _new_database
from tests.contract.conftest import PAGE
from tests.contract.shop import INSTANT, PATIENCE_S, Shop, Wire, new_id, parsed, request
from tests.contract.test_http2 import H2Wire
from tests.contract.test_live import (
    SILENCE_S,
    STAGED,
    Stage,
    descriptors,
    eventually,
    memory,
    stage,
    until,
)
from tests.server import Server, serving

Json = dict[str, Any]
BY_NAME: Final = re.compile(r"[0-9a-f]{12}(\.\d+)+")


class Told:
    """One event as a browser would have it."""

    def __init__(self, block: str) -> None:
        self.fields: dict[str, str] = {}
        for line in block.split("\n"):
            name, colon, value = line.partition(": ")
            assert colon or line == ":", line
            assert name not in self.fields, block
            self.fields[name] = value

    @property
    def id(self) -> str | None:
        return self.fields.get("id")

    @property
    def message(self) -> Json:
        """What a WebSocket's frame says, too."""
        message: Json = json.loads(self.fields["data"])
        name = self.fields["event"]
        assert name == (message["event"] if message["type"] == "event" else message["type"])
        return message


class Page(Wire):
    """A page that listens. `last_id` is what it would send as `Last-Event-ID`."""

    def __init__(
        self, server: Server, drops: str, *, base: str = "/api/v1", receive_buffer: int | None = None, **headers: str
    ) -> None:
        super().__init__(server, receive_buffer=receive_buffer)
        self.last_id = headers.get("last_event_id", "")
        self.send(request("GET", f"{base}/live/events?drops={drops}", b"", **headers))
        self.answered = parsed(self._until(b"\r\n\r\n"), b"")
        if self.answered.status == 200:
            assert self.answered.headers["content-type"] == "text/event-stream; charset=utf-8"
            first = self.block()
            assert 500 <= int(first.fields["retry"]) <= 5_000

    def __enter__(self) -> "Page":
        return self

    def block(self) -> Told:
        text = ""
        while not text:
            text = self._until(b"\n\n").decode().strip("\n")
        told = Told(text)
        if told.id is not None:
            self.last_id = told.id
        return told

    def hear(self) -> Json:
        return self.block().message

    def event(self) -> tuple[str, int]:
        heard = self.hear()
        assert list(heard) == ["type", "event", "seq", "at", "data"], heard
        assert INSTANT.fullmatch(heard["at"])
        return heard["event"], heard["seq"]

    def hears_nothing(self) -> bool:
        self.socket.settimeout(SILENCE_S)
        try:
            told = self.block()
        except TimeoutError:
            return True
        finally:
            self.socket.settimeout(PATIENCE_S)
        raise AssertionError(f"heard {told.fields}")


@pytest.fixture
def base() -> str:
    return "/api/v1"


@pytest.fixture(scope="module")
def secure_server(server: EmbeddedServer, template: str, logs: Path, certificate: Path) -> Iterator[Server]:
    with (
        _new_database(server, template) as dsn,
        serving(dsn, logs / "events.log", TLS_CERTFILE=str(certificate)) as running,
    ):
        yield running


# What is told -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["/api/v1", "/api"])
def test_page_is_shown_a_drop_and_then_told_what_happens_to_it(shop: Shop, base: str) -> None:
    drop, buyer = shop.drop(total_stock=5), shop.visitor()
    with Page(shop.server, drop["id"], base=base, x_request_id="mine") as page:
        headers = page.answered.headers
        assert headers["cache-control"] == "no-store"
        assert headers["x-accel-buffering"] == "no"
        assert headers["x-request-id"] == "mine"
        assert headers["connection"] == "close"
        shown = page.block()
        assert shown.message == {"type": "snapshot", "seq": 1, "drop": shop.show(drop)}
        assert BY_NAME.fullmatch(shown.id or "")
        buyer.holds(drop)
        assert page.hear()["data"] == {"dropId": drop["id"], "availableStock": 4}
        buyer.purchase(drop)
        assert page.event() == ("ACTIVITY_UPDATED", 3)
        assert page.last_id.endswith(".2")  # half of what has that seq is none of it
        assert page.event() == ("PURCHASE_COMPLETED", 3)
        assert page.last_id.endswith(".3")
        assert page.hears_nothing()


def test_page_of_several_drops_hears_of_those(shop: Shop) -> None:
    one, two, other = (shop.drop(total_stock=9) for _ in range(3))
    with Page(shop.server, f"{one['id']},{two['id'].upper()},{one['id']}") as page:
        assert [page.hear()["drop"]["id"] for _ in range(2)] == [one["id"], two["id"]]
        for drop in (other, two, one):
            shop.visitor().holds(drop)
        assert {page.hear()["data"]["dropId"] for _ in range(2)} == {one["id"], two["id"]}
        assert page.last_id.endswith(".2.2")


def test_expiry_is_told_to_its_user_alone(hasty: Shop) -> None:
    drop, user = hasty.drop(total_stock=5), hasty.visitor()
    with Page(hasty.server, drop["id"], x_user_id=user.id) as own, Page(hasty.server, drop["id"]) as other:
        reservation = user.holds(drop)
        for page in (own, other):
            page.hear()
        while (heard := own.hear())["event"] == "STOCK_UPDATED":
            pass
        assert heard["event"] == "RESERVATION_EXPIRED"
        assert heard["data"] == {"dropId": drop["id"], "reservationId": reservation}
        assert other.event()[0] == "STOCK_UPDATED"
        assert own.event() == ("STOCK_UPDATED", 3)


# Coming back ------------------------------------------------------------------------------------------


def test_page_that_comes_back_is_told_what_it_missed_of_each_drop(shop: Shop) -> None:
    one, two, three = (shop.drop(total_stock=9) for _ in range(3))
    drops = ",".join(drop["id"] for drop in (one, two, three))
    with Page(shop.server, drops) as page:
        for _ in range(3):
            page.hear()
        shop.visitor().holds(one)
        page.hear()
    buyer = shop.visitor()
    buyer.holds(two)
    buyer.purchase(two)
    with Page(shop.server, drops, last_event_id=page.last_id) as again:
        # The second's hold is told by its newest stock, before the purchase that did not change it.
        assert [again.event() for _ in range(3)] == [
            ("STOCK_UPDATED", 2),
            ("ACTIVITY_UPDATED", 3),
            ("PURCHASE_COMPLETED", 3),
        ]
        assert again.hears_nothing()
        assert again.last_id.endswith(".2.3.1")
        with Page(shop.server, drops, last_event_id=again.last_id) as third:
            shop.visitor().holds(three)
            assert third.event() == ("STOCK_UPDATED", 2)
            assert third.last_id == again.last_id[:-1] + "2"
            assert third.hears_nothing()


@pytest.mark.parametrize("last_id", ["{digest}.9", "{digest}.0", "{digest}.1.1", "000000000000.1", "7", "é", "*", "**"])
def test_id_that_means_nothing_here_gets_a_snapshot(shop: Shop, last_id: str) -> None:
    drop = shop.drop()
    with Page(shop.server, drop["id"]) as page:
        page.hear()
        last_id = last_id.replace("{digest}", page.last_id.partition(".")[0])
    with Page(shop.server, drop["id"], last_event_id=last_id) as again:
        assert again.hear() == {
            "type": "snapshot",
            "seq": 1,
            "drop": drop | {"activity_feed": {"latest_purchasers": []}},
        }
        assert again.last_id == page.last_id
        assert again.hears_nothing()


@pytest.mark.parametrize("watches_all", [False, True], ids=["by name", "all"])
def test_page_whose_connection_breaks_anywhere_misses_nothing(database: str, tmp_path: Path, watches_all: bool) -> None:
    with httpx.Client() as http, serving(database, tmp_path / "log") as server:
        shop = Shop(server, "/api/v1", http)
        sold, other = shop.drop(total_stock=80), shop.drop(total_stock=1_000)

        def sell() -> None:
            with httpx.Client() as own:
                counter = Shop(server, "/api/v1", own)
                for _ in range(80):
                    buyer = counter.visitor()
                    buyer.holds(sold)
                    counter.visitor().holds(other)
                    buyer.purchase(sold)

        drops = "*" if watches_all else f"{other['id']},{sold['id']}"
        seller = threading.Thread(target=sell)
        bought: dict[int, str] = {}
        snapshots, last_id, taken, connections = 0, "", 300, 0
        seller.start()
        until_s = time.monotonic() + 30
        while len(bought) < 80:
            assert time.monotonic() < until_s
            connections += 1
            with Page(server, drops, last_event_id=last_id) as page:
                page.socket.settimeout(1)
                with suppress(TimeoutError):
                    read = bytearray(page._read)
                    while len(read) < taken:
                        read += page.socket.recv(taken - len(read))
                taken = 300 + (taken * 7) % 2_500  # the end is anywhere, in the middle of a line too
            for block in read.decode(errors="replace").split("\n\n")[:-1]:
                if not (block := block.strip("\n")):
                    continue
                told = Told(block)
                last_id = told.id or last_id
                if "event" not in told.fields:
                    continue
                snapshots += told.message["type"] == "snapshot"
                if told.message.get("event") == "PURCHASE_COMPLETED":
                    bought[told.message["seq"]] = told.message["data"]["username"]
        seller.join()
        assert len(set(bought.values())) == 80
        assert connections > 10
        if not watches_all:
            assert snapshots <= 6  # while it had no id: then it is told what it missed, and not shown anew


def test_page_that_outlived_the_server_goes_on_where_it_was(database: str, tmp_path: Path) -> None:
    with httpx.Client() as http, serving(database, tmp_path / "log") as server:
        shop = Shop(server, "/api/v1", http)
        drop, buyer = shop.drop(total_stock=5), shop.visitor()
        with Page(server, drop["id"]) as page, Page(server, "*") as everything:
            for one in (page, everything):
                one.hear()
            buyer.holds(drop)
            assert page.event() == everything.event() == ("STOCK_UPDATED", 2)
            buyer.purchase(drop)
            assert page.event() == ("ACTIVITY_UPDATED", 3)
            began = time.monotonic()
            server.signal(signal.SIGTERM)
            page.hear()
            assert page.is_closed()
            assert server.process.wait(10) == 0
            assert time.monotonic() - began < 4
        server.start()
        shop.visitor().holds(drop)
        for drops, last_id in ((drop["id"], page.last_id[:-1] + "2"), ("*", everything.last_id)):
            with Page(server, drops, last_event_id=last_id) as again:
                assert [again.event() for _ in range(3)] == [
                    ("ACTIVITY_UPDATED", 3),
                    ("PURCHASE_COMPLETED", 3),
                    ("STOCK_UPDATED", 4),
                ]
                assert again.hears_nothing()


def test_page_of_all_drops_is_told_when_it_must_forget_what_it_knows(database: str, tmp_path: Path) -> None:
    with httpx.Client() as http, serving(database, tmp_path / "log") as server:
        shop = Shop(server, "/api/v1", http)
        drops = [shop.drop(total_stock=9) for _ in range(NAMED_MAX)]
        with Page(server, "*") as page:
            assert {page.hear()["drop"]["id"] for _ in drops} == {drop["id"] for drop in drops}
            whole = page.last_id
            assert len(whole) < 1_000
            more = shop.drop()
            assert [page.hear()["event"] for _ in range(2)] == ["DROP_CREATED", "STOCK_UPDATED"]
            assert page.last_id == "**"
        shop.visitor().holds(drops[3])
        with Page(server, "*", last_event_id=whole) as again:  # still known by name, all of them
            heard = [again.hear() for _ in range(2)]
            assert {message["type"] for message in heard} == {"snapshot", "event"}
            assert again.hears_nothing()
        with Page(server, "*", last_event_id="**") as again:
            assert again.block().fields == {"event": "reset", "data": '{"type":"reset"}'}
            shown = {again.hear()["drop"]["id"] for _ in range(NAMED_MAX + 1)}
            assert more["id"] in shown


# What is refused --------------------------------------------------------------------------------------


def refused(server: Server, query: str, **headers: str) -> tuple[int, str]:
    with Wire(server) as wire:
        wire.send(request("GET", f"/api/v1/live/events{query}", b"", **headers))
        answer = wire.answer()
        assert answer.headers["content-type"] == "application/json"
        assert json.loads(answer.body)["meta"] == {"requestId": answer.headers["x-request-id"]}
        return answer.outcome


def test_what_cannot_be_streamed_is_an_error_in_json(shop: Shop) -> None:
    drop = shop.drop()
    invalid = (422, "VALIDATION_ERROR")
    for query, outcome in {
        "": invalid,
        "?drops=": invalid,
        "?drops=,": invalid,
        "?drops=7": invalid,
        f"?drops=*,{drop['id']}": invalid,
        f"?drops={drop['id']},{new_id()}": (404, "DROP_NOT_FOUND"),
        "?drops=" + ",".join(new_id() for _ in range(60)): (414, "URI_TOO_LONG"),
    }.items():
        assert refused(shop.server, query) == outcome, query
    assert refused(shop.server, "?drops=*", x_user_id="ann") == (401, "INVALID_X_USER_ID")


@pytest.mark.parametrize("path", PATHS)
def test_other_methods_answer_as_elsewhere(shop: Shop, path: str) -> None:
    url = f"{shop.server.url}{path}?drops=*"
    head = shop.http.head(url)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert shop.http.head(url + "x").status_code == 422
    answer = shop.http.post(url)
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "METHOD_NOT_ALLOWED")
    assert "GET" in answer.headers["allow"]
    assert shop.http.options(url).status_code == 204


def test_pages_that_may_call_may_listen(strict_server: Server) -> None:
    with Page(strict_server, "*", origin=PAGE) as page:
        assert page.answered.headers["access-control-allow-origin"] == PAGE
        assert page.answered.headers["vary"] == "Origin"
    with Page(strict_server, "*", origin="https://evil.example") as page:
        assert "access-control-allow-origin" not in page.answered.headers
    with Wire(strict_server) as wire:
        wire.send(request("GET", "/api/live/events?drops=7", origin=PAGE))
        assert wire.answer().headers["access-control-allow-origin"] == PAGE


def test_stream_is_503_until_the_server_is_ready(tmp_path: Path) -> None:
    server = Server("postgresql://nobody@127.0.0.1:9/nowhere", tmp_path / "log")
    try:
        server.start(until="/healthz")
        assert refused(server, "?drops=*") == (503, "DATABASE_UNAVAILABLE")
    finally:
        server.stop()


ACCEPTS: Final = {"accept": "text/event-stream"}


@pytest.mark.parametrize("protocol", ["HTTP/1.1", "HTTP/1.1 over TLS", "HTTP/2"])
def test_page_that_comes_before_the_server_is_ready_comes_again(
    tmp_path: Path, certificate: Path, protocol: str
) -> None:
    """An EventSource takes any other status for the end, for good."""
    tls = {} if protocol == "HTTP/1.1" else {"TLS_CERTFILE": str(certificate)}
    server = Server("postgresql://nobody@127.0.0.1:9/nowhere", tmp_path / "log", None, CORS_ORIGINS=PAGE, **tls)
    url = f"{server.url}/api/v1/live/events?drops=*"
    try:
        server.start(until="/healthz")
        with httpx.Client(verify=server.tls or True, http2=protocol == "HTTP/2", headers={"Origin": PAGE}) as http:
            for is_later in (False, True):  # requests on one connection, which go different ways
                if is_later:
                    http.get(f"{server.url}/healthz")
                answer = http.get(url, headers=ACCEPTS)
                assert answer.status_code == 200
                assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
                assert answer.headers["cache-control"] == "no-store"
                assert answer.headers["access-control-allow-origin"] == PAGE
                found = re.fullmatch(r"retry: (\d+)\n\n", answer.text)
                assert found is not None
                assert 500 <= int(found[1]) <= 5_000
            for method, accept in (("GET", "*/*"), ("GET", "application/json"), ("HEAD", "text/event-stream")):
                answer = http.request(method, url, headers={"accept": accept})
                assert answer.status_code == 503
                assert "retry-after" in answer.headers
    finally:
        server.stop()
    assert "Traceback" not in server.log()


def test_page_that_asks_for_what_there_is_not_is_told_so(shop: Shop) -> None:
    for query, outcome in {
        "?drops=7": (422, "VALIDATION_ERROR"),
        f"?drops={new_id()}": (404, "DROP_NOT_FOUND"),
    }.items():
        assert refused(shop.server, query, **ACCEPTS) == outcome


def test_stream_may_follow_other_requests_on_its_connection(shop: Shop) -> None:
    drop = shop.drop(total_stock=9)
    with Wire(shop.server) as wire:
        wire.send(
            request("POST", "/api/drops/7/reserve")
            + request("GET", "/api/healthz")
            + request("GET", f"/api/live/events?drops={drop['id']}")
            + request("GET", "/api/healthz")  # never answered: the stream has no end
        )
        assert [wire.answer().status for _ in range(2)] == [401, 200]
        assert wire._until(b"\r\n\r\n").startswith(b"HTTP/1.1 200 ")
        assert b"snapshot" in wire._until(b"id: ")
        shop.visitor().holds(drop)
        assert b"STOCK_UPDATED" in wire._until(b"id: ")


# Whoever does not read, or goes away ------------------------------------------------------------------


def test_pages_that_came_and_went_leave_nothing_behind(shop: Shop) -> None:
    drop = shop.drop()
    before = descriptors(shop.server)
    for _ in range(5):
        pages = [Page(shop.server, drop["id"]) for _ in range(60)]
        for number, page in enumerate(pages):
            page.hear()
            page.reset() if number % 2 else page.close()
    eventually(lambda: descriptors(shop.server) <= before)
    assert "viewer_failed" not in shop.server.log()


async def listening(on: Stage, receive_buffer: int = 4_096) -> trio.SocketStream:
    stream = await on.client(receive_buffer)
    await stream.send_all(request("GET", f"/api/live/events?drops={STAGED}"))
    return stream


async def test_page_that_does_not_read_is_conflated_and_then_cut() -> None:
    async with stage() as on, await listening(on) as deaf:
        while not on.hub.statistics().sent_away:
            if on.hub.statistics().viewers:
                on.reserve()
            await trio.sleep(0.0015)
        await until(lambda: on.sockets.count == 0)
        assert on.hub.statistics().viewers == 0
        assert len(await read_to_the_end(deaf)) < 300_000


async def test_page_that_reads_again_in_time_hears_how_it_stands() -> None:
    async with stage(stall_s=60) as on, await listening(on) as slow:
        await until(lambda: on.hub.statistics().viewers == 1)
        while not on.hub.statistics().parked:
            on.reserve()
            await trio.sleep(0.0015)
        for _ in range(50):
            on.reserve()
            await trio.sleep(0.0015)
        data = b""
        with trio.fail_after(PATIENCE_S):
            while b".%d\n\n" % on.drop.seq not in data:
                data += await slow.receive_some(65_536)
        blocks = [block.strip("\n") for block in data.decode().split("\r\n\r\n")[1].split("\n\n") if block.strip("\n")]
        messages = [Told(block).message for block in blocks[1:]]
        assert messages[-1]["data"]["availableStock"] == on.drop.available
        seqs = [message["seq"] for message in messages]
        assert seqs == sorted(seqs)
        assert seqs[-1] - seqs[-2] > 40
        assert all(Told(block).id for block in blocks[1:])


async def test_idle_stream_says_now_and_then_that_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "BEAT_S", (0.0, 0.01))
    monkeypatch.setattr(events, "SWEEP_S", 0.01)
    async with stage() as on, await listening(on) as quiet:
        data = b""
        with trio.fail_after(PATIENCE_S):
            while data.count(b"\n\n:\n\n:\n\n") < 1:
                data += await quiet.receive_some(65_536)


async def test_streams_end_when_the_server_stops() -> None:
    async with stage() as on, await listening(on) as page:
        await until(lambda: on.hub.statistics().viewers == 1)
        on.sockets.stop()
        assert (await read_to_the_end(page)).endswith(b"\n\n")
        await page.aclose()
        await until(lambda: on.sockets.count == 0)


async def test_connection_may_be_silent_for_as_long_as_it_is_being_answered(autojump_clock: MockClock) -> None:
    ours, peers = memory_stream_pair()
    stream = BegunStream(cast(trio.SocketStream, ours), b"")
    stream.answering = 1
    began = trio.current_time()
    with trio.move_on_after(10 * SILENCE):
        await stream.receive_some()
    assert trio.current_time() - began >= 10 * SILENCE
    stream.answering = 0
    with pytest.raises(trio.TooSlowError):
        await stream.receive_some()
    await peers.send_all(b"still there")
    assert await stream.receive_some() == b"still there"


async def read_to_the_end(stream: trio.SocketStream) -> bytes:
    data = bytearray()
    try:
        with trio.fail_after(PATIENCE_S):
            while some := await stream.receive_some(65_536):
                data += some
    except trio.BrokenResourceError:
        pass
    return bytes(data)


# TLS and HTTP/2 ---------------------------------------------------------------------------------------


class Stream:
    """A stream of events in httpx' hands."""

    def __init__(self, response: httpx.Response) -> None:
        self._texts = response.iter_text()
        self._read = ""
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["x-accel-buffering"] == "no"
        assert response.headers["cache-control"] == "no-store"
        assert self.block().fields["retry"]

    def block(self) -> Told:
        while True:
            found, end, rest = self._read.lstrip("\n").partition("\n\n")
            if end:
                self._read = rest
                return Told(found)
            self._read += next(self._texts)


@pytest.mark.parametrize("is_later", [False, True], ids=["first request", "later request"])
@pytest.mark.parametrize("has_http2", [False, True], ids=["HTTP/1.1", "HTTP/2"])
def test_stream_works_over_tls(secure_server: Server, has_http2: bool, is_later: bool) -> None:
    tls = secure_server.tls
    assert tls is not None
    with (
        httpx.Client(verify=tls) as calm,
        httpx.Client(verify=tls, http2=has_http2, timeout=PATIENCE_S) as client,
    ):
        shop = Shop(secure_server, "/api/v1", calm)
        drop = shop.drop(total_stock=9)
        if is_later:
            client.get(secure_server.url + "/healthz")
        url = f"{shop.root}/live/events?drops={drop['id']}"
        with client.stream("GET", url) as response:
            assert response.http_version == ("HTTP/2" if has_http2 else "HTTP/1.1")
            stream = Stream(response)
            assert stream.block().message["seq"] == 1
            buyer = shop.visitor()
            buyer.holds(drop)
            told = stream.block()
            assert told.message["data"] == {"dropId": drop["id"], "availableStock": 8}
            assert told.id is not None
        buyer.purchase(drop)
        with client.stream("GET", url, headers={"Last-Event-ID": told.id}) as response:
            stream = Stream(response)
            assert [stream.block().message["event"] for _ in range(2)] == ["ACTIVITY_UPDATED", "PURCHASE_COMPLETED"]
        answer = client.get(f"{shop.root}/live/events?drops=7")
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "VALIDATION_ERROR")
        assert client.head(url).status_code == 200


@contextmanager
def http2(server: Server) -> Iterator[H2Wire]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as sock:
        protocol = H2Connection(H2Configuration(client_side=True))
        protocol.initiate_connection()
        wire = H2Wire(sock, protocol)
        wire.flush()
        yield wire


def heard(wire: H2Wire, stream: int, text: bytes) -> None:
    while text not in wire.bodies.get(stream, b""):
        assert wire.receive()


def test_more_than_a_thousand_drops_are_refused(shop: Shop) -> None:
    with http2(shop.server) as wire:  # where an address may be that long
        stream = wire.ask("GET", "/api/live/events?drops=" + ",".join(new_id() for _ in range(1_001)))
        assert wire.status(stream) == 422
        assert b"1000 drops" in wire.bodies[stream]


def test_streams_of_one_http_2_connection_do_not_hold_each_other_up(shop: Shop) -> None:
    one, two = shop.drop(total_stock=99), shop.drop(total_stock=99)
    with http2(shop.server) as wire:
        streams = [wire.ask("GET", f"/api/live/events?drops={drop['id']}") for drop in (one, two, one)]
        for stream in streams:
            heard(wire, stream, b"snapshot")
        assert wire.status(wire.ask("GET", "/api/healthz")) == 200
        shop.visitor().holds(one)
        for stream in (streams[0], streams[2]):
            heard(wire, stream, b"STOCK_UPDATED")
        assert b"STOCK_UPDATED" not in wire.bodies[streams[1]]
        wire.protocol.reset_stream(streams[0])
        wire.flush()
        shop.visitor().holds(two)
        heard(wire, streams[1], b"STOCK_UPDATED")


@pytest.mark.parametrize("is_secure", [False, True], ids=["plain", "TLS"])
def test_server_with_open_streams_stops_in_time(
    database: str, tmp_path: Path, certificate: Path, is_secure: bool
) -> None:
    tls = {"TLS_CERTFILE": str(certificate)} if is_secure else {}
    with serving(database, tmp_path / "log", **tls) as server, ExitStack() as crowd:
        for number in range(10):
            page = crowd.enter_context(Page(server, "*", receive_buffer=4_096 if number % 2 else None))
            assert page.answered.status == 200
        if is_secure:
            client = crowd.enter_context(httpx.Client(verify=server.tls or True, http2=True))
            response = crowd.enter_context(client.stream("GET", server.url + "/api/live/events?drops=*"))
            assert response.http_version == "HTTP/2"
        else:
            wire = crowd.enter_context(http2(server))
            heard(wire, wire.ask("GET", "/api/live/events?drops=*"), b"retry")
        began = time.monotonic()
        server.signal(signal.SIGTERM)
        assert server.process.wait(10) == 0
        assert time.monotonic() - began < 3
        assert "Traceback" not in server.log()


def test_http_2_reader_that_never_reads_costs_little(shop: Shop) -> None:
    drop = shop.drop(total_stock=9_999)
    number, told = 40, 300  # of 900 bytes each; a window is of 65,535
    with ExitStack() as crowd:
        for _ in range(number):
            wire = crowd.enter_context(http2(shop.server))
            heard(wire, wire.ask("GET", f"/api/live/events?drops={drop['id']}"), b"snapshot")
        buyers = [shop.visitor() for _ in range(5)]
        grown = 0
        for turn in range(2):  # the first fills what may be filled
            before = memory(shop.server)
            for _ in range(told // len(buyers)):
                for buyer in buyers:
                    buyer.holds(drop)
                    buyer.purchase(drop)
            grown = memory(shop.server) - before
            assert grown / number < 256 * 1_024, turn
        assert grown / number < 32 * 1_024
