"""The hot lane in this process, for what takes too long or goes unseen from outside: time limits, rude peers, kqueue.

Each test runs on epoll and on the plain path that other systems take. The gate is shut, so a hot request is answered
with 503 at once, and the cold lane is the real one: `/healthz` works without a service.
"""

import select
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace
from typing import Any, Final

import pytest
import trio
from msgspec import structs
from structlog.testing import capture_logs

from api import hotlane, http1, settings
from api.answers import Answer
from api.app import create_app
from api.cold import ColdLane
from api.errors import ApiError
from api.front import listen
from api.handlers import Gate, Request
from api.hotlane import HotLane
from api.http1 import Reader
from api.promises import Promise
from api.sockets import Sockets
from tests.ports import free_port

ID: Final = "0199c2f0-0000-7000-8000-000000000000"
HOT: Final = f"POST /api/drops/{ID}/reserve HTTP/1.1\r\nHost: h\r\n\r\n".encode()
LOOK: Final = f"GET /api/drops/{ID} HTTP/1.1\r\nHost: h\r\n\r\n".encode()
COLD: Final = b"GET /api/healthz HTTP/1.1\r\nHost: h\r\n\r\n"
SHORT_S: Final = 0.15


@pytest.fixture(params=[True, False], ids=["epoll", "tasks"])
def has_epoll(request: pytest.FixtureRequest) -> bool:
    if request.param and not hasattr(select, "epoll"):
        pytest.skip("this system has no epoll")
    return bool(request.param)


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hotlane, "SWEEP_S", 0.02)


class Lane:
    """A running lane and its port."""

    def __init__(self, hot: HotLane, gate: Gate, port: int) -> None:
        self.hot = hot
        self.gate = gate
        self.port = port

    async def connect(self, *, receive_buffer: int | None = None) -> "Peer":
        raw = socket.socket()
        raw.setblocking(False)
        sock = trio.socket.from_stdlib_socket(raw)
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        await sock.connect(("127.0.0.1", self.port))
        return Peer(trio.SocketStream(sock), raw)

    @property
    def connections(self) -> int:
        return len(self.hot._connections)


class Peer:
    def __init__(self, stream: trio.SocketStream, raw: socket.socket) -> None:
        self.stream = stream
        self._raw = raw
        self._read = b""

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    def send_at_once(self, data: bytes) -> None:
        """Without a turn for anybody else."""
        assert self._raw.send(data) == len(data)

    async def send_what_it_takes(self, data: bytes) -> None:
        with suppress(trio.BrokenResourceError):
            await self.stream.send_all(data)

    def reset(self) -> None:
        self.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.stream.socket.close()

    async def status(self) -> int:
        """The next answer's."""
        while b"\r\n\r\n" not in self._read:
            await self._receive()
        head, _, self._read = self._read.partition(b"\r\n\r\n")
        self.head = head.decode()
        status = int(head.split(b" ")[1])
        if status < 200:
            return status
        length = int(self.head.lower().split("content-length: ")[1].split("\r\n")[0])
        while len(self._read) < length:
            await self._receive()
        self.body, self._read = self._read[:length], self._read[length:]
        return status

    async def is_closed(self) -> bool:
        assert not self._read
        try:
            return await self.stream.receive_some() == b""
        except trio.BrokenResourceError:
            return True

    async def _receive(self) -> None:
        data = await self.stream.receive_some()
        assert data, f"closed after {self._read!r}"
        self._read += data


Running = Callable[..., Any]


@pytest.fixture
def running(has_epoll: bool) -> Running:
    """Runs a lane in a block, and sees to it that all of it ends within a few seconds."""

    @asynccontextmanager
    async def run(**given: str) -> AsyncIterator[Lane]:
        chosen, gate = settings.load(given, None), Gate()
        cold = ColdLane(create_app(chosen, gate), chosen, Sockets(chosen, gate))
        hot = HotLane(chosen, gate, cold, has_epoll=has_epoll)
        listening = listen("127.0.0.1", free_port())
        for one in listening:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8_192)  # soon full
        with trio.fail_after(10):
            async with cold.open(), trio.open_nursery() as lane:
                await lane.start(hot.run, listening)
                yield Lane(hot, gate, listening[0].getsockname()[1])
                lane.cancel_scope.cancel()
        assert not hot._connections

    return run


def as_from(request_id: str) -> bytes:
    return HOT[:-2] + f"X-Request-Id: {request_id}\r\n\r\n".encode()


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await trio.sleep(0.005)


async def test_hot_and_cold_requests_of_one_connection_are_answered_in_order(running: Running) -> None:
    async with running() as lane:
        peer = await lane.connect()
        for _ in range(3):
            await peer.send(HOT + COLD + HOT + COLD)
            assert [await peer.status() for _ in range(4)] == [503, 200, 503, 200]
        for byte in HOT + COLD:
            await peer.send(bytes([byte]))
        assert [await peer.status() for _ in range(2)] == [503, 200]


async def test_many_peers_are_served_side_by_side(running: Running) -> None:
    async with running() as lane, trio.open_nursery() as nursery:

        async def talk() -> None:
            peer = await lane.connect()
            for _ in range(10):
                await peer.send(HOT + COLD)
                assert [await peer.status() for _ in range(2)] == [503, 200]
            await peer.stream.aclose()

        for _ in range(30):
            nursery.start_soon(talk)


async def test_only_targets_that_may_name_a_drop_are_remembered(running: Running) -> None:
    async with running() as lane:
        peer = await lane.connect()
        for id in ("a" * 1_900, ID[:-1], f"{ID}0", ID):
            await peer.send(f"GET /api/drops/{id} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
            assert await peer.status() == 503
        assert list(lane.hot._known) == [(b"GET", f"/api/drops/{ID}".encode())]


async def test_only_origins_that_may_read_an_answer_are_remembered(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.time", lambda: 1_790_000_000.0)  # heads are remembered for a second
    async with running(CORS_ORIGINS="https://shop.example") as lane:
        peer = await lane.connect()
        heads = []
        for origin in ("", "Origin: https://evil.example\r\n", "Origin: https://shop.example\r\n"):
            await peer.send(HOT[:-2] + f"X-Request-Id: one\r\n{origin}\r\n".encode())
            assert await peer.status() == 503
            heads.append(peer.head)
        assert {key[2] for key in lane.hot._heads} == {None, "https://shop.example"}
    assert heads[0] == heads[1]
    assert "access-control-allow-origin: https://shop.example\r\n" in heads[2]


@pytest.mark.parametrize("half", [b"P", b"POST /", HOT[:-2]], ids=["method", "line", "head"])
async def test_head_that_does_not_come_is_given_up(
    running: Running, monkeypatch: pytest.MonkeyPatch, half: bytes
) -> None:
    monkeypatch.setattr(http1, "HEAD_S", SHORT_S)
    async with running() as lane:
        peer = await lane.connect()
        await peer.send(half)
        assert await peer.status() == 400
        assert b"HEAD_TIMEOUT" in peer.body
        assert await peer.is_closed()


async def test_head_that_comes_by_the_byte_is_given_up_too(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http1, "HEAD_S", SHORT_S)
    async with running() as lane:
        peer = await lane.connect()
        await peer.send(HOT)  # the clock starts with each request
        await peer.status()
        for byte in HOT[:-2] + b"X: " + b"y" * 40:
            await peer.send_what_it_takes(bytes([byte]))
            await trio.sleep(0.005)
        assert await peer.status() == 400
        assert b"HEAD_TIMEOUT" in peer.body
        assert await peer.is_closed()


@pytest.mark.parametrize(
    "wrapping", [b"Content-Length: 9\r\n\r\n12345678", b"Transfer-Encoding: chunked\r\n\r\n1\r\nx"]
)
async def test_body_that_does_not_come_is_given_up(
    running: Running, monkeypatch: pytest.MonkeyPatch, wrapping: bytes
) -> None:
    monkeypatch.setattr(http1, "BODY_S", SHORT_S)
    async with running() as lane:
        peer = await lane.connect()
        await peer.send(COLD + HOT[:-2] + wrapping)
        assert await peer.status() == 200
        assert await peer.status() == 400
        assert b"BODY_TIMEOUT" in peer.body
        assert await peer.is_closed()


async def test_client_that_never_sends_its_body_after_100_continue_is_given_up(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http1, "BODY_S", SHORT_S)
    async with running() as lane:
        peer = await lane.connect()
        await peer.send(HOT[:-2] + b"Content-Length: 2\r\nExpect: 100-continue\r\n\r\n")
        assert await peer.status() == 100
        assert await peer.status() == 400
        assert await peer.is_closed()


@pytest.mark.parametrize("before", [b"", HOT, COLD], ids=["none", "hot", "cold"])
async def test_silent_connection_is_closed_without_a_word(
    running: Running, monkeypatch: pytest.MonkeyPatch, before: bytes
) -> None:
    monkeypatch.setattr(hotlane, "SILENCE_S", SHORT_S)
    async with running() as lane:
        peer = await lane.connect()
        if before:
            await peer.send(before)
            await peer.status()
        assert await peer.is_closed()


async def test_request_keeps_a_connection_from_being_silent(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hotlane, "SILENCE_S", 0.3)
    async with running() as lane:
        peer = await lane.connect()
        for _ in range(6):
            await trio.sleep(0.1)
            await peer.send(HOT)
            assert await peer.status() == 503
        assert await peer.is_closed()


@pytest.mark.parametrize("sent", [HOT, COLD, HOT + COLD], ids=["hot", "cold", "mixed"])
async def test_peer_that_does_not_read_is_cut_while_others_are_served(
    running: Running, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(hotlane, "WRITE_S", 0.3)
    async with running() as lane, trio.open_nursery() as nursery:
        deaf = await lane.connect(receive_buffer=4_096)
        nursery.start_soon(deaf.send_what_it_takes, sent * 20_000)
        await until(lambda: lane.connections == 1)
        (connection,) = lane.hot._connections.values()
        others = 0
        while not connection.is_closed:
            other = await lane.connect()
            await other.send(HOT)
            assert await other.status() == 503
            await other.stream.aclose()
            others += 1
            assert len(connection.out) + hotlane.RECEIVE_MAX < 500_000
        assert others > 5


async def test_peer_that_reads_slowly_gets_all_its_answers(running: Running) -> None:
    async with running() as lane, trio.open_nursery() as nursery:
        slow = await lane.connect(receive_buffer=4_096)
        nursery.start_soon(slow.send, (HOT + COLD) * 300)
        for _ in range(300):
            assert await slow.status() == 503
            assert await slow.status() == 200


async def test_last_answer_is_not_lost_when_the_peer_goes_on_sending(running: Running) -> None:
    async with running() as lane:
        peer = await lane.connect()
        await peer.send(b"G@RBAGE / HTTP/1.1\r\n\r\n" + b" " * 100_000)
        assert await peer.status() == 400
        await peer.send(b" " * 100_000)
        assert await peer.is_closed()


async def test_peer_that_does_not_close_after_the_last_answer_is_closed_upon(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hotlane, "LINGER_S", SHORT_S)
    async with running() as lane:
        peer = await lane.connect()
        await peer.send(HOT[:-2] + b"Connection: close\r\n\r\n")
        assert await peer.status() == 503
        assert await peer.is_closed()  # half of it
        assert lane.connections == 1
        await until(lambda: lane.connections == 0)


class Slow:
    """A hot handler whose answer comes when the test says so."""

    def __init__(self, lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Promise[Answer]] = []
        self.requests: list[Request] = []
        self.stood: list[float] = []
        registry = SimpleNamespace(stood=self.stood.append)
        lane.gate.service = SimpleNamespace(registry=registry)  # type: ignore[assignment]  # all that is looked at
        monkeypatch.setattr(
            hotlane,
            "HOT",
            tuple(
                (method, pattern, structs.replace(route, handler=self._handle))
                for method, pattern, route in hotlane.HOT
            ),
        )

    async def _handle(self, service: Any, request: Request) -> Answer:
        promise: Promise[Answer] = Promise()
        self.asked.append(promise)
        self.requests.append(request)
        return await promise


class Busy(Slow):
    """Answers at once, and takes its time for that."""

    EACH_S: Final = 0.000_2

    def __init__(self, lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(lane, monkeypatch)
        self.connections: list[int] = []  # that there are, by request
        self._lane = lane

    async def _handle(self, service: Any, request: Request) -> Answer:
        self.connections.append(self._lane.connections)
        time.sleep(self.EACH_S)  # noqa: ASYNC251 - it is the lane's whole work
        return Answer(200, b"")


@pytest.mark.parametrize(("request_", "code"), [(HOT, b"OUTCOME_UNKNOWN"), (LOOK, b"DATABASE_UNAVAILABLE")])
async def test_answer_that_takes_too_long_is_said_to_be_unknown_and_the_late_one_is_dropped(
    running: Running, monkeypatch: pytest.MonkeyPatch, request_: bytes, code: bytes
) -> None:
    async with running(ANSWER_TIMEOUT_MS="200", COMMIT_STALL_MS="100") as lane:
        slow, peer = Slow(lane, monkeypatch), await lane.connect()
        await peer.send(request_)
        assert await peer.status() == 503
        assert code in peer.body
        slow.asked[0].keep(Answer(200, b"late"))
        await peer.send(HOT)
        await until(lambda: len(slow.asked) == 2)
        slow.asked[1].keep(Answer(200, b"in time"))
        assert (await peer.status(), peer.body) == (200, b"in time")


async def test_who_was_granted_a_unit_passes_a_line_that_stands_once(
    running: Running, monkeypatch: pytest.MonkeyPatch, has_epoll: bool
) -> None:
    async with running() as lane:
        slow, holder = Slow(lane, monkeypatch), await lane.connect()
        crowd = [await lane.connect() for _ in range(2 * hotlane.BATCH_MAX)]
        passed = []
        for number in range(4):
            monkeypatch.setattr(hotlane, "STOOD_S", -1.0 if number % 2 == 0 else 1.0)  # a line stands, or none does
            slow.asked.clear()
            slow.requests.clear()
            await holder.send(HOT)
            await until(lambda: len(slow.asked) == 1)
            slow.asked[0].keep(Answer(201, b""))
            assert await holder.status() == 201
            for _ in range(2):
                slow.asked.clear()
                slow.requests.clear()
                for peer in (*crowd, holder):  # the lane has no turn meanwhile
                    peer.send_at_once(as_from("holder" if peer is holder else "crowd"))
                await until(lambda: len(slow.asked) == len(crowd) + 1)
                place = [request.request_id for request in slow.requests].index("holder")
                passed.append(place < hotlane.BATCH_MAX)
                for promise in slow.asked:
                    promise.keep(Answer(409, b""))
                for peer in (*crowd, holder):
                    assert await peer.status() == 409
        if has_epoll:  # elsewhere the order is nobody's
            # With what it asks next, and not again before the next grant.
            assert passed == [True, False, False, False] * 2


async def line_of(lane: Lane) -> list[Peer]:
    """Peers that have all asked before the lane had a turn: three slices of them."""
    crowd = [await lane.connect() for _ in range(3 * hotlane.BATCH_MAX)]
    for peer in crowd:
        peer.send_at_once(HOT)
    return crowd


async def test_line_before_the_door_is_measured_and_told(
    running: Running, monkeypatch: pytest.MonkeyPatch, has_epoll: bool
) -> None:
    async with running() as lane:
        busy = Busy(lane, monkeypatch)
        crowd = await line_of(lane)
        for peer in crowd:
            assert await peer.status() == 200
        if has_epoll:
            assert max(busy.stood) > hotlane.BATCH_MAX * Busy.EACH_S
            assert busy.stood[-1] == 0.0, "it is said when the line has gone"
        else:
            assert busy.stood == []


async def test_who_comes_while_a_line_stands_is_let_in_before_it(
    running: Running, monkeypatch: pytest.MonkeyPatch, has_epoll: bool
) -> None:
    async with running() as lane:
        busy = Busy(lane, monkeypatch)
        crowd = await line_of(lane)
        with socket.create_connection(("127.0.0.1", lane.port)):  # as far as the kernel is concerned
            for peer in crowd:
                assert await peer.status() == 200
            await until(lambda: lane.connections == len(crowd) + 1)
            if has_epoll:
                assert busy.connections[hotlane.BATCH_MAX] == len(crowd) + 1


async def test_second_request_waits_for_the_first(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as lane:
        slow, peer = Slow(lane, monkeypatch), await lane.connect()
        await peer.send(HOT + COLD + HOT)
        await until(lambda: len(slow.asked) == 1)
        with trio.move_on_after(0.05):
            await peer.status()
            raise AssertionError("the second overtook the first")
        slow.asked[0].keep(Answer(200, b"first"))
        assert (await peer.status(), peer.body) == (200, b"first")
        assert await peer.status() == 200
        await until(lambda: len(slow.asked) == 2)
        slow.asked[1].keep(Answer(200, b"third"))
        assert (await peer.status(), peer.body) == (200, b"third")


@pytest.mark.parametrize("pipelined", [b"", COLD * 2_000], ids=["alone", "pipelined"])
async def test_peer_that_goes_away_before_its_answer_is_forgotten(
    running: Running, monkeypatch: pytest.MonkeyPatch, pipelined: bytes
) -> None:
    # Without epoll nobody hears of it while more requests wait, until there is an answer to write: soon, here.
    async with running(ANSWER_TIMEOUT_MS="200", COMMIT_STALL_MS="100") as lane:
        slow, peer = Slow(lane, monkeypatch), await lane.connect()
        await peer.send(HOT + pipelined)
        await until(lambda: len(slow.asked) == 1)
        peer.reset()
        await until(lambda: lane.connections == 0)
        slow.asked[0].keep(Answer(200, b"nobody hears it"))
        other = await lane.connect()
        await other.send(COLD)
        assert await other.status() == 200


async def test_reset_behind_half_a_close_ends_the_connection_and_is_not_reported_for_ever(
    running: Running, monkeypatch: pytest.MonkeyPatch, has_epoll: bool
) -> None:
    async with running(ANSWER_TIMEOUT_MS="60000") as lane:
        slow, peer = Slow(lane, monkeypatch), await lane.connect()
        await peer.send(HOT)
        await peer.stream.send_eof()
        await until(lambda: len(slow.asked) == 1)
        await trio.sleep(0.05)  # the end of the peer's half has been read
        peer.reset()
        if not has_epoll:  # nobody hears of it before there is an answer to write
            slow.asked[0].keep(Answer(200, b"nobody hears it"))
        await until(lambda: lane.connections == 0)


async def test_who_comes_when_too_many_were_told_already_that_they_are_is_closed_upon(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hotlane, "REFUSED_MAX", 2)
    async with running(CONNECTIONS_MAX="1") as lane:
        served, *told, one_more = [await lane.connect() for _ in range(4)]
        assert [await peer.status() for peer in told] == [503, 503]
        assert await one_more.is_closed()
        await served.send(COLD)
        assert await served.status() == 200


async def test_small_answers_leave_at_once(running: Running) -> None:
    async with running() as lane:
        peer = await lane.connect()
        await peer.send(COLD)
        assert await peer.status() == 200
        (connection,) = lane.hot._connections.values()
        assert connection.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_half_closed_peer_gets_its_late_answer(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as lane:
        slow, peer = Slow(lane, monkeypatch), await lane.connect()
        await peer.send(HOT + HOT)
        await peer.stream.send_eof()
        for number in range(2):
            await until(lambda number=number: len(slow.asked) == number + 1)  # type: ignore[misc]
            slow.asked[number].keep(Answer(200, b"%d" % number))
            assert (await peer.status(), peer.body) == (200, b"%d" % number)
        assert await peer.is_closed()


async def test_drain_waits_for_answers_and_says_that_they_are_the_last(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running() as lane:
        slow, asking, idle = Slow(lane, monkeypatch), await lane.connect(), await lane.connect()
        await asking.send(HOT + HOT)
        await until(lambda: len(slow.asked) == 1)
        lane.hot.close_door()
        with pytest.raises(OSError, match="refused"):
            await lane.connect()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lane.hot.drain)
            assert await idle.is_closed()
            await idle.stream.aclose()
            slow.asked[0].keep(Answer(200, b"last"))
            assert await asking.status() == 200
            assert "\r\nconnection: close" in asking.head.lower()
            assert await asking.is_closed()
            await asking.stream.aclose()
        assert len(slow.asked) == 1


@pytest.mark.parametrize(
    "failure",
    [RuntimeError("a bug"), ApiError(422, "VALIDATION_ERROR", "half a surrogate pair: \ud800")],
    ids=["a bug", "one that cannot be told"],
)
async def test_exception_of_a_handler_is_500_and_the_lane_lives_on(
    running: Running, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    async with running() as lane:
        slow, peer = Slow(lane, monkeypatch), await lane.connect()
        await peer.send(HOT + COLD)
        await until(lambda: len(slow.asked) == 1)
        slow.asked[0].fail(failure)
        assert await peer.status() == 500
        assert b"INTERNAL_ERROR" in peer.body
        assert await peer.status() == 200


async def test_bug_of_the_lane_costs_one_connection(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as lane:
        peer, other = await lane.connect(), await lane.connect()
        await other.send(COLD)
        assert await other.status() == 200
        monkeypatch.setattr(Reader, "feed", lambda reader, data: 1 // 0)
        await peer.send(COLD)
        assert await peer.is_closed()
        monkeypatch.undo()
        await other.send(COLD)
        assert await other.status() == 200


def test_failures_have_a_line_each_up_to_a_bound_and_are_all_counted() -> None:
    failed = Answer(503, b"", code="OUTCOME_UNKNOWN")
    exchange: Any = SimpleNamespace(route=hotlane.HOT[0][2], request_id="one")
    report = hotlane._Report()
    for _ in range(2):
        with capture_logs() as lines:
            for _ in range(hotlane.LINES_MAX + 5):
                report.add(exchange, failed, 0.001)
            report.write()
        events = Counter(line["event"] for line in lines)
        assert events == {"request_failed": hotlane.LINES_MAX, "more_requests_failed": 1, "hot_requests": 1}
        (more,) = (line for line in lines if line["event"] == "more_requests_failed")
        assert more["without_a_line"] == 5
