"""The cold lane in this process, under a clock of the test's: HTTP/2 peers that do not read what they asked for.

And how Hypercorn's buffer of a stream, as `api.cold` has it, tells a peer that reads slowly from one that does not.
"""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

import pytest
import trio
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import DataReceived, Event, ResponseReceived, StreamEnded, StreamReset
from h2.settings import SettingCodes
from hypercorn import protocol
from hypercorn.trio.worker_context import EventWrapper
from trio.testing import MockClock

from api import settings
from api.app import create_app
from api.cold import READ_LEAST, UNREAD_S, Backpressure, ColdLane, Http2, Unread
from api.handlers import Gate
from api.http1 import Message
from api.sockets import Sockets
from tests.ports import free_port

LARGE: Final = "/openapi.json"  # more than a stream's buffer holds
SMALL: Final = "/api/healthz"
STEP_BYTES: Final = 16_384
Told = TypeVar("Told", bound=Event)


@pytest.fixture
def clock() -> MockClock:
    """It jumps when nothing happens any more, on the sockets either."""
    return MockClock(autojump_threshold=0.05)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Http2]:
    """The server's ends of all HTTP/2 connections."""
    ends: list[Http2] = []

    class Noted(Http2):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            ends.append(self)

    monkeypatch.setattr(protocol, "H2Protocol", Noted)
    return ends


class Peer:
    """An HTTP/2 client whose streams have no window until it gives them one."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._events: list[Event] = []
        self.protocol = H2Connection(H2Configuration(client_side=True, validate_outbound_headers=False))
        self.protocol.local_settings[SettingCodes.INITIAL_WINDOW_SIZE] = 0
        self.protocol.local_settings.acknowledge()  # in force, since that is what the first frame states
        self.protocol.initiate_connection()
        self.protocol.increment_flow_control_window(1_000_000)  # of the connection

    async def ask(self, path: str | bytes, method: str = "GET", **pseudo: str) -> int:
        stream_id = self.protocol.get_next_available_stream_id()
        fields: list[tuple[str, str | bytes]] = [(":method", method), (":path", path), (":scheme", "http")]
        fields += [(":authority", "h"), *((f":{name}", value) for name, value in pseudo.items())]
        self.protocol.send_headers(stream_id, fields, end_stream=True)
        await self.flush()
        return stream_id

    async def take(self, stream_id: int, size: int) -> None:
        self.protocol.increment_flow_control_window(size, stream_id)
        await self.flush()

    async def flush(self) -> None:
        await self._stream.send_all(self.protocol.data_to_send())

    async def told(self, kind: type[Told], stream_id: int) -> Told:
        """The next that is told of a stream in this way."""
        while True:
            for event in self._events:
                if isinstance(event, kind) and getattr(event, "stream_id", None) == stream_id:
                    self._events.remove(event)
                    return event
            received = await self._stream.receive_some()
            assert received, "closed"
            self._events += self.protocol.receive_data(received)
            await self.flush()

    def size(self, stream_id: int) -> int:
        """Bytes that have come by now."""
        mine = (event for event in self._events if isinstance(event, DataReceived) and event.stream_id == stream_id)
        return sum(len(event.data) for event in mine)


@asynccontextmanager
async def connected(app: Any = None) -> AsyncIterator[tuple[ColdLane, Peer]]:
    """With the application, or another one."""
    chosen, gate = settings.load({}, None), Gate()
    lane = ColdLane(app or create_app(chosen, gate), chosen, Sockets(chosen, gate))
    async with lane.open():
        with socket.create_server(("127.0.0.1", free_port())) as listening:
            stream = await trio.open_tcp_stream(*listening.getsockname())
            accepted, _ = listening.accept()
        lane.take(accepted, b"")
        async with stream:
            yield lane, Peer(stream)


@pytest.mark.parametrize("path", [SMALL, LARGE])
async def test_stream_that_nobody_reads_is_reset_and_the_others_are_not(clock: MockClock, path: str) -> None:
    async with connected() as (lane, peer):
        began_at = trio.current_time()
        unread = await peer.ask(path)
        reset = await peer.told(StreamReset, unread)
        assert reset.error_code == ErrorCodes.CANCEL
        assert UNREAD_S <= trio.current_time() - began_at < 1.5 * UNREAD_S
        read = await peer.ask(path)
        await peer.take(read, 1_000_000)
        await peer.told(StreamEnded, read)
        assert peer.size(read) > 0
        with trio.fail_after(1):
            await lane.drain()  # nobody answers anything any more


@pytest.mark.parametrize("by_peer", [False, True], ids=["by us", "by the peer"])
async def test_stream_that_was_reset_leaves_nothing_behind(
    clock: MockClock, made: list[Http2], *, by_peer: bool
) -> None:
    async with connected() as (_, peer):
        unread = await peer.ask(LARGE)
        await peer.told(ResponseReceived, unread)
        if by_peer:
            peer.protocol.reset_stream(unread)
            await peer.flush()
        else:
            await peer.told(StreamReset, unread)
        await trio.sleep(1)
        (connection,) = made
        assert not connection.streams
        assert not connection.stream_buffers


async def test_answer_that_breaks_off_resets_its_stream(clock: MockClock) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"hel", "more_body": True})
        raise OSError("a bug")

    async with connected(app) as (_, peer):
        stream = await peer.ask("/")
        reset = await peer.told(StreamReset, stream)
        assert reset.error_code == ErrorCodes.INTERNAL_ERROR
        await peer.told(StreamReset, await peer.ask("/"))  # the connection goes on


@pytest.mark.parametrize(
    "asked",
    [
        {"path": "/", "method": "CONNECT", "protocol": "websocket"},
        {"path": "/", "method": "connect"},
        {"path": b"/\xff"},
        {"path": "/", "method": b"G\xc3\x89T"},
    ],
    ids=["websocket", "tunnel", "path", "method"],
)
async def test_request_that_hypercorn_has_no_answer_to_is_reset_and_forgotten(
    clock: MockClock, made: list[Http2], asked: dict[str, Any]
) -> None:
    async with connected() as (_, peer):
        for _ in range(3):
            reset = await peer.told(StreamReset, await peer.ask(**asked))
            assert reset.error_code == ErrorCodes.PROTOCOL_ERROR
        (connection,) = made
        assert not connection.streams
        assert not connection.stream_buffers
        await peer.told(ResponseReceived, await peer.ask(SMALL))


@pytest.mark.parametrize("attempt", range(10))
async def test_answer_of_a_server_that_stops_comes_to_its_end(clock: MockClock, attempt: int) -> None:
    may_answer = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise OSError("no lifespan")
        await may_answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"hello"})

    async with connected(app) as (lane, peer):
        asked = await peer.ask("/")
        await peer.take(asked, 100)
        await trio.sleep(1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lane.drain)
            await trio.sleep(1)
            refused = await peer.told(StreamReset, await peer.ask("/"))
            assert refused.error_code == ErrorCodes.REFUSED_STREAM
            may_answer.set()
            await peer.told(StreamEnded, asked)


async def test_answer_that_is_cancelled_takes_nothing_of_the_others_with_it(clock: MockClock) -> None:
    """Its head is in the table by which those of all later answers are read."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise OSError("no lifespan")

        async def answer() -> None:
            name = scope["path"].encode()
            await send({"type": "http.response.start", "status": 200, "headers": [(b"x-asked", name)]})
            await send({"type": "http.response.body", "body": bytes(20_000_000 if name == b"/large" else 0)})
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            while (await receive())["type"] != "http.disconnect":
                pass
            nursery.cancel_scope.cancel()

    async with connected(app) as (_, peer):
        peer.protocol.increment_flow_control_window(50_000_000)
        large = await peer.ask("/large")
        await peer.take(large, 50_000_000)
        await trio.sleep(1)  # until no more of it fits into the sockets
        cancelled = await peer.ask("/cancelled")
        await trio.sleep(1)
        peer.protocol.reset_stream(cancelled)
        await peer.flush()
        await trio.sleep(1)
        last = await peer.told(ResponseReceived, await peer.ask("/last"))
        assert dict(last.headers)[b"x-asked"] == b"/last"


async def test_request_that_fails_beneath_the_application_gives_its_connection_back() -> None:
    """What llhttp lets through and h11 does not; none is known."""
    ended = trio.Event()

    class Kept:
        sock = socket.socket()
        out = b""
        written = b""
        is_closed = is_last = False

        def write(self, data: bytes) -> None:
            self.written += data

        def done(self, *, is_last: bool) -> None:
            assert is_last
            ended.set()

    async with connected() as (lane, _):
        kept: Any = Kept()
        with kept.sock, socket.create_server(("127.0.0.1", free_port())) as listening:
            kept.sock.connect(listening.getsockname())
            lane.answer(kept, Message(b"GET", b"/ \x00", "1.1", [(b"host", b"h")], {b"host": b"h"}, True))
            with trio.fail_after(5):
                await ended.wait()
        assert kept.written.startswith(b"HTTP/1.1 400 ")


async def test_stream_that_is_read_slowly_is_not_reset(clock: MockClock) -> None:
    async with connected() as (_, peer):
        began_at = trio.current_time()
        slowly = await peer.ask(LARGE)
        ended = None
        while ended is None:
            await trio.sleep(0.9 * UNREAD_S)
            await peer.take(slowly, STEP_BYTES)
            with trio.move_on_after(1):
                ended = await peer.told(StreamEnded, slowly)
        assert trio.current_time() - began_at > 3 * UNREAD_S
        fast = await peer.ask(LARGE)
        await peer.take(fast, 1_000_000)
        await peer.told(StreamEnded, fast)
        assert peer.size(slowly) == peer.size(fast)


# One stream's buffer -----------------------------------------------------------------------------------


async def test_who_reads_a_byte_now_and_then_is_not_reading(autojump_clock: MockClock) -> None:
    buffer = Backpressure(EventWrapper)

    async def read() -> None:
        while True:
            await trio.sleep(1)
            await buffer.pop((READ_LEAST - 1) // int(UNREAD_S))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        with pytest.raises(Unread):
            await buffer.push(bytes(1_000_000))
        assert trio.current_time() == pytest.approx(UNREAD_S, abs=2)
        nursery.cancel_scope.cancel()


async def test_small_things_that_nobody_reads_are_noticed_with_the_next(autojump_clock: MockClock) -> None:
    buffer = Backpressure(EventWrapper)

    async def beat() -> None:
        while True:
            await buffer.push(b":\n\n")
            await trio.sleep(UNREAD_S / 4)

    with pytest.raises(Unread):
        await beat()
    assert trio.current_time() == pytest.approx(UNREAD_S, abs=2)


async def test_stream_with_nothing_to_read_is_never_unread(autojump_clock: MockClock) -> None:
    buffer = Backpressure(EventWrapper)
    for _ in range(3):
        await trio.sleep(10 * UNREAD_S)
        await buffer.push(b":\n\n")
        await trio.sleep(0.9 * UNREAD_S)
        assert await buffer.pop(10) == b":\n\n"
    await trio.sleep(10 * UNREAD_S)
    await buffer.drain()
    silent = Backpressure(EventWrapper)
    await trio.sleep(10 * UNREAD_S)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(silent.drain)
        await trio.sleep(1)
        await silent.pop(10)
