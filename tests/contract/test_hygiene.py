"""HTTP hygiene of the plain port, on raw sockets against a real server: limits, smuggling, rude and absent peers.

The hot lane refuses what a proxy in front could read differently than we do. Time limits that are too long to wait
for have their tests in `tests/api/test_hotlane.py`, with shorter ones.
"""

import re
import resource
import selectors
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import pytest

from tests.contract.shop import Shop, Wire, new_id, request
from tests.server import Server, serving

IDLE: Final = 10_000
IDLE_MEMORY_MAX: Final = 8_192  # bytes for each idle connection, all told
DEAF_MEMORY_MAX: Final = 50_000_000  # bytes for ten peers that do not read: each may have sent 64 KiB of requests

UNAUTHENTICATED: Final = (401, "AUTH_REQUIRED")
HEALTHZ: Final = request("GET", "/api/healthz")
HOT: Final = request("POST", f"/api/drops/{new_id()}/reserve")  # of nobody: 401, from the hot lane
OK: Final = (200, "SUCCESS")
ECHO: Final = b'{"email": "ann@shop.example"}'


@pytest.fixture
def base() -> str:
    return "/api/v1"  # alone: here it is about connections, not about addresses


def plus(request: bytes, *lines: bytes) -> bytes:
    head, end, body = request.partition(b"\r\n\r\n")
    return b"\r\n".join((head, *lines)) + end + body


def reserving(shop: Shop, drop_id: str) -> bytes:
    return request("POST", f"{shop.base}/drops/{drop_id}/reserve", x_user_id=new_id())


# Mixed connections ------------------------------------------------------------------------------------


def test_connection_that_mixes_hot_and_cold_requests_is_answered_in_order(shop: Shop) -> None:
    drop = shop.drop(total_stock=100)
    hot, cold = reserving(shop, drop["id"]), request("GET", f"{shop.base}/drops/{drop['id']}")
    with Wire(shop.server) as wire:
        for number in range(1, 11):  # one after the other
            wire.send(reserving(shop, drop["id"]))
            assert wire.answer().outcome == (201, "SUCCESS")
            wire.send(cold)
            assert b'"available_stock":%d' % (100 - number) in wire.answer().body
        wire.send(
            b"".join(  # and all at once
                plus(one, b"X-Request-Id: %d" % number)
                for number, one in enumerate((hot, cold, hot, cold, cold, HEALTHZ, HOT, hot))
            )
        )
        answers = [wire.answer() for _ in range(8)]
        assert [answer.headers["x-request-id"] for answer in answers] == [str(number) for number in range(8)]
        expected = [(201, "SUCCESS"), OK, (409, "ALREADY_RESERVED"), OK, OK, OK, UNAUTHENTICATED]
        assert [answer.outcome for answer in answers] == [*expected, (409, "ALREADY_RESERVED")]
        assert b'"available_stock":89' in answers[1].body


def test_thousand_pipelined_requests_of_both_kinds_are_answered_in_order(shop: Shop) -> None:
    with Wire(shop.server) as wire:
        sender = threading.Thread(
            target=wire.send,
            args=(
                b"".join(
                    plus(HEALTHZ if number % 10 == 0 else HOT, b"X-Request-Id: %d" % number) for number in range(1_000)
                ),
            ),
        )
        sender.start()
        for number in range(1_000):
            answer = wire.answer()
            assert answer.headers["x-request-id"] == str(number)
            assert answer.outcome == (OK if number % 10 == 0 else UNAUTHENTICATED)
        sender.join()


# Limits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/api/drops/7/reserve", "/api/demo/echo"], ids=["hot", "cold"])
def test_limits_are_the_same_for_hot_and_cold_requests(shop: Shop, path: str) -> None:
    bare = request("POST", path)
    for head_length, expected in ((16_384, None), (16_385, (431, "HEADERS_TOO_LARGE"))):
        head = plus(bare, b"X-A: ")
        check(shop, head.replace(b"X-A: ", b"X-A: " + b"a" * (head_length - len(head))), expected)
    for target_length, expected in ((2_048, None), (2_049, (414, "URI_TOO_LONG"))):
        long = path + "?" + "x" * (target_length - len(path) - 1)
        check(shop, request("POST", long), expected)
    for body_length in (16_385, 16_384 + 1_048_576):
        large = request("POST", path, b" " * body_length)
        with Wire(shop.server) as wire:
            wire.send(large)
            answer = wire.answer()
            assert answer.outcome == (413, "PAYLOAD_TOO_LARGE")
            assert "connection" not in answer.headers
            wire.send(HEALTHZ)  # what was too large was read to its end
            assert wire.answer().outcome == OK
    check(shop, request("POST", path, b" " * (16_384 + 1_048_577)), (413, "PAYLOAD_TOO_LARGE"))


def check(shop: Shop, sent: bytes, refusal: tuple[int, str] | None) -> None:
    """It is refused so, and the connection closed; or understood, and the connection stays."""
    with Wire(shop.server) as wire:
        wire.send_what_it_takes(sent)
        answer = wire.answer()
        if refusal is None:
            assert answer.status in (401, 415), answer.outcome
            wire.send(HEALTHZ)
            assert wire.answer().outcome == OK
        else:
            assert answer.outcome == refusal
            assert answer.headers["connection"] == "close"
            assert answer.headers["x-request-id"]
            assert wire.is_closed()


SMUGGLED: Final = HEALTHZ
CHUNKED: Final = plus(HOT, b"Transfer-Encoding: chunked")
REFUSED: Final = {
    "length and chunks": plus(HOT, b"Content-Length: 5", b"Transfer-Encoding: chunked") + b"0\r\n\r\n",
    "chunks and length": plus(HOT, b"Transfer-Encoding: chunked", b"Content-Length: 5") + b"0\r\n\r\n",
    "two lengths": plus(HOT, b"Content-Length: 0", b"Content-Length: 5") + b"0\r\n\r\n",
    "two equal lengths": plus(HOT, b"Content-Length: 2", b"Content-Length: 2") + b"{}",
    "list of lengths": plus(HOT, b"Content-Length: 2, 2") + b"{}",
    "odd length": plus(HOT, b"Content-Length: +2") + b"{}",
    "two codings": plus(HOT, b"Transfer-Encoding: gzip, chunked") + b"0\r\n\r\n",
    "codings in two lines": plus(HOT, b"Transfer-Encoding: gzip", b"Transfer-Encoding: chunked") + b"0\r\n\r\n",
    "unknown coding": plus(HOT, b"Transfer-Encoding: xchunked") + b"0\r\n\r\n",
    "space before the colon": plus(HOT, b"Transfer-Encoding : chunked") + b"0\r\n\r\n",
    "chunks of HTTP/1.0": CHUNKED.replace(b"HTTP/1.1", b"HTTP/1.0") + b"0\r\n\r\n",
    "bare LF": HOT.replace(b"\r\n", b"\n"),
    "bare LF in the head": plus(HOT, b"X-A: 1\nX-B: 2"),
    "bare CR in the head": plus(HOT, b"X-A: 1\rX-B: 2"),
    "NUL": plus(HOT, b"X-A: \0"),
    "fold": plus(HOT, b"X-A: 1", b" Transfer-Encoding: chunked"),
    "two hosts": plus(HOT, b"Host: elsewhere"),
    "no host": HOT.replace(b"Host: 127.0.0.1\r\n", b""),
    "bad chunk size": CHUNKED + b"zz\r\n{}\r\n0\r\n\r\n",
    "empty chunk size": CHUNKED + b"\r\n{}\r\n0\r\n\r\n",
    "negative chunk size": CHUNKED + b"-2\r\n{}\r\n0\r\n\r\n",
    "chunk size with 0x": CHUNKED + b"0x2\r\n{}\r\n0\r\n\r\n",
    "huge chunk size": CHUNKED + b"fffffffffffffffff\r\n{}\r\n0\r\n\r\n",
    "chunk with bare LF": CHUNKED + b"2\n{}\n0\n\n",
    "HTTP/1.2": HOT.replace(b"HTTP/1.1", b"HTTP/1.2"),
    "HTTP/2.0": HOT.replace(b"HTTP/1.1", b"HTTP/2.0"),
    "HTTP/0.9": b"GET /api/healthz\r\n\r\n" + b" " * 40,
    "odd method": b"P(ST" + HOT[4:],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_proxy_may_read_differently_is_refused_and_nothing_after_it_is_read(shop: Shop, name: str) -> None:
    with Wire(shop.server) as wire:
        wire.send_what_it_takes(REFUSED[name] + SMUGGLED * 3)
        answer = wire.answer()
        assert answer.outcome == (400, "BAD_REQUEST")
        assert answer.headers["connection"] == "close"
        assert wire.is_closed()


def test_refusal_waits_for_the_answers_before_it(shop: Shop) -> None:
    with Wire(shop.server) as wire:
        wire.send(HEALTHZ + HOT + REFUSED["bare LF"])
        assert [wire.answer().outcome for _ in range(3)] == [OK, UNAUTHENTICATED, (400, "BAD_REQUEST")]
        assert wire.is_closed()


def test_unknown_methods_are_405_and_the_connection_stays(shop: Shop) -> None:
    with Wire(shop.server) as wire:
        for method in ("BREW", "PROPFIND", "PURGE", "X" * 32):
            wire.send(request(method, "/api/drops"))
            answer = wire.answer()
            assert answer.outcome == (405, "METHOD_NOT_ALLOWED")
            assert answer.headers["allow"] == "GET, HEAD, POST"
        wire.send(request("CONNECT", "127.0.0.1:80"))
        assert wire.answer().outcome == (405, "METHOD_NOT_ALLOWED")
        assert wire.is_closed()


@pytest.mark.parametrize(
    "bomb",
    [b"1\r\nx\r\n" * 400_000, b"1;" + b"e" * 2_000_000, b"0\r\n" + b"X-A: b\r\n" * 300_000, b"0" * 2_000_000],
    ids=["small chunks", "extension", "trailers", "zeros"],
)
def test_chunk_bomb_is_cut_off(shop: Shop, bomb: bytes) -> None:
    with Wire(shop.server) as wire:
        wire.send_what_it_takes(CHUNKED + bomb)
        assert wire.answer().outcome in ((413, "PAYLOAD_TOO_LARGE"), (400, "BAD_REQUEST"))
        assert wire.is_closed()
    assert shop.anybody.get("/healthz").status == 200


def test_trailer_is_no_header(shop: Shop) -> None:
    with Wire(shop.server) as wire:
        wire.send(CHUNKED + f"0\r\nX-User-Id: {new_id()}\r\n\r\n".encode())
        assert wire.answer().outcome == UNAUTHENTICATED
        wire.send(HOT)
        assert wire.answer().outcome == UNAUTHENTICATED


# Expect -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/api/drops/<drop>/reserve", "/api/demo/echo"], ids=["hot", "cold"])
@pytest.mark.parametrize("is_chunked", [False, True], ids=["length", "chunks"])
def test_client_that_expects_100_continue_is_told_once(shop: Shop, path: str, is_chunked: bool) -> None:
    path = path.replace("<drop>", shop.drop()["id"])
    body = b"{}" if "reserve" in path else ECHO
    length = b"Transfer-Encoding: chunked" if is_chunked else b"Content-Length: %d" % len(body)
    head = plus(request("POST", path, x_user_id=new_id(), content_type="application/json"), length)
    wrapped = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if is_chunked else body
    with Wire(shop.server) as wire:
        wire.send(HEALTHZ)
        wire.answer()
        wire.send(plus(head, b"Expect: 100-continue"))
        assert wire.answer().status == 100
        wire.send(wrapped)
        assert wire.answer().status in (200, 201)
        wire.send(plus(head, b"Expect: 100-continue") + wrapped)  # one that does not wait
        answer = wire.answer()
        assert (wire.answer() if answer.status == 100 else answer).status in (200, 409)
        wire.send(HEALTHZ)
        assert wire.answer().outcome == OK


def test_body_that_is_too_large_is_refused_before_it_is_sent(shop: Shop) -> None:
    with Wire(shop.server) as wire:
        wire.send(plus(HOT, b"Content-Length: 16385", b"Expect: 100-continue"))
        assert wire.answer().outcome == (413, "PAYLOAD_TOO_LARGE")
        assert wire.is_closed()


def test_pipelined_client_is_told_to_go_on_after_the_answers_before(shop: Shop) -> None:
    with Wire(shop.server) as wire:
        wire.send(HEALTHZ + HOT + plus(HOT, b"Content-Length: 2", b"Expect: 100-continue"))
        assert [wire.answer().status for _ in range(3)] == [200, 401, 100]
        wire.send(b"{}")
        assert wire.answer().outcome == UNAUTHENTICATED


# Slow and split ---------------------------------------------------------------------------------------


def test_hot_request_that_comes_byte_by_byte_is_a_request(shop: Shop) -> None:
    drop = shop.drop()
    with Wire(shop.server) as wire:
        for byte in reserving(shop, drop["id"]):
            wire.send(bytes([byte]))
        assert wire.answer().outcome == (201, "SUCCESS")
    assert shop.stock(drop) == 0


@pytest.mark.parametrize("at", [1, 3, 4, 5, 40, -5, -4, -3, -2, -1])
def test_pipeline_may_be_cut_anywhere(shop: Shop, at: int) -> None:
    data = HOT + HEALTHZ + HOT
    cut = len(HOT) + at
    with Wire(shop.server) as wire:
        wire.send(data[:cut])
        wire.answer() if at > 0 else None
        wire.send(data[cut:])
        rest = [wire.answer().outcome for _ in range(2 if at > 0 else 3)]
        assert rest == ([OK, UNAUTHENTICATED] if at > 0 else [UNAUTHENTICATED, OK, UNAUTHENTICATED])


# Ends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [HOT, HEALTHZ, HOT + HEALTHZ + HOT], ids=["hot", "cold", "pipeline"])
def test_half_closed_connection_gets_its_answers(shop: Shop, sent: bytes) -> None:
    with Wire(shop.server) as wire:
        wire.send(sent)
        wire.send_eof()
        for _ in range(sent.count(b"HTTP/1.1")):
            assert wire.answer().status in (200, 401)
        assert wire.is_closed()


@pytest.mark.parametrize("half", [b"", HOT[:20], plus(HOT, b"Content-Length: 2") + b"{"], ids=["idle", "head", "body"])
def test_half_closed_connection_without_a_whole_request_is_closed(shop: Shop, half: bytes) -> None:
    with Wire(shop.server) as wire:
        wire.send(half)
        wire.send_eof()
        assert wire.is_closed()


@pytest.mark.parametrize(
    "last", [plus(HOT, b"Connection: close"), HOT.replace(b"HTTP/1.1", b"HTTP/1.0")], ids=["close", "HTTP/1.0"]
)
def test_nothing_is_read_after_the_last_request(shop: Shop, last: bytes) -> None:
    with Wire(shop.server) as wire:
        wire.send(HOT + last + HEALTHZ * 5)
        assert [wire.answer().headers.get("connection") for _ in range(2)] == [None, "close"]
        assert wire.is_closed()


def test_peer_that_resets_in_mid_answer_has_reserved_and_no_error_is_logged(shop: Shop) -> None:
    drop = shop.drop(total_stock=50)
    before = len(shop.server.log())
    for _ in range(50):
        with Wire(shop.server) as wire:
            wire.send(reserving(shop, drop["id"]) + request("GET", "/api/drops") * 3)
            wire.reset()
    deadline = time.monotonic() + 10
    # What came with the reset may be lost with it; what was read is decided, and nothing else happens.
    while time.monotonic() < deadline and "hot_requests" not in shop.server.log()[before:]:
        time.sleep(0.05)
    log = shop.server.log()[before:]
    assert not re.search(r'"level": ?"(error|critical|warning)"', log), log
    assert "Traceback" not in log
    assert 0 <= shop.stock(drop) <= 50


def test_reset_peers_command_took_effect(shop: Shop) -> None:
    drop, visitor = shop.drop(), shop.visitor()
    with Wire(shop.server) as wire:
        wire.send(request("POST", f"{shop.base}/drops/{drop['id']}/reserve", x_user_id=visitor.id))
        wire.wait_readable()  # the answer is on its way, and is never read
        wire.reset()
    assert shop.stock(drop) == 0
    assert visitor.purchase(drop).status == 201


# Crowds -----------------------------------------------------------------------------------------------


@contextmanager
def descriptors(wanted: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"this needs {wanted} descriptors, and the system allows {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_ten_thousand_idle_connections_cost_little_and_nobody_waits_for_them(
    database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with descriptors(IDLE + 500), serving(database, tmp_path / "log") as server, ExitStack() as crowd:
        with Wire(server) as wire:
            wire.send(HOT)
            wire.answer()
        before = memory(server)
        idle = [crowd.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(IDLE)]
        with Wire(server) as wire:
            began = time.monotonic()
            wire.send(HOT + HEALTHZ)
            assert [wire.answer().outcome for _ in range(2)] == [UNAUTHENTICATED, OK]
            took_s = time.monotonic() - began
        each = (memory(server) - before) / IDLE
        with capsys.disabled():
            print(
                f"\n{IDLE} idle connections: {each:.0f} bytes each; a hot and a cold answer in {took_s * 1000:.1f} ms"
            )
        assert each < IDLE_MEMORY_MAX
        assert took_s < 1
        for sock in idle:  # they are alive; now each has a reader of its own
            sock.sendall(HOT)
        for sock in idle:
            assert sock.recv(1_000).startswith(b"HTTP/1.1 401")
        each = (memory(server) - before) / IDLE
        with capsys.disabled():
            print(f"the same after a request: {each:.0f} bytes each")
        assert each < IDLE_MEMORY_MAX
        assert server.stop() == 0


def test_connection_beyond_the_limit_is_told_so_and_closed(database: str, tmp_path: Path) -> None:
    with serving(database, tmp_path / "log", CONNECTIONS_MAX="5") as server, ExitStack() as crowd:
        time.sleep(0.1)  # the probes of `serving` must be gone, or they count
        wires = [crowd.enter_context(Wire(server)) for _ in range(5)]
        for wire in wires:
            wire.send(HOT)
            assert wire.answer().outcome == UNAUTHENTICATED
        for _ in range(20):
            with Wire(server) as one_more:
                answer = one_more.answer()
                assert answer.outcome == (503, "OVERLOADED")
                assert answer.headers["connection"] == "close"
                assert answer.headers["retry-after"] == "1"
                assert one_more.is_closed()
        wires[0].close()
        server.wait_for("/healthz")  # there is room again, as soon as the server has seen the end
        for wire in wires[1:]:
            wire.send(HOT)
            assert wire.answer().outcome == UNAUTHENTICATED


def memory(server: Server) -> int:
    """Resident bytes."""
    ps = subprocess.run(["ps", "-o", "rss=", "-p", str(server.process.pid)], check=True, capture_output=True)
    return int(ps.stdout) * 1_024


@pytest.mark.parametrize("sent", [HOT, HEALTHZ, HOT + HEALTHZ], ids=["hot", "cold", "mixed"])
def test_peers_that_do_not_read_cost_little_and_nobody_waits_for_them(shop: Shop, sent: bytes) -> None:
    with ExitStack() as crowd:
        deaf = [crowd.enter_context(Wire(shop.server, receive_buffer=4_096)) for _ in range(10)]
        before = memory(shop.server)
        stuff(deaf, sent * 2_000)
        with Wire(shop.server) as wire:
            wire.send(HOT + HEALTHZ)
            assert [wire.answer().outcome for _ in range(2)] == [UNAUTHENTICATED, OK]
        assert memory(shop.server) - before < DEAF_MEMORY_MAX


def stuff(wires: list[Wire], data: bytes) -> None:
    """Send to all until none of them has taken anything for a while."""
    with selectors.DefaultSelector() as selector:
        for wire in wires:
            selector.register(wire.socket, selectors.EVENT_WRITE)
            wire.socket.setblocking(False)
        until = time.monotonic() + 3
        while time.monotonic() < until and (ready := selector.select(0.3)):
            for key, _ in ready:
                key.fileobj.send(data)  # type: ignore[union-attr]


# SIGTERM ----------------------------------------------------------------------------------------------


def test_sigterm_answers_what_was_asked_and_closes_the_rest(database: str, tmp_path: Path) -> None:
    with serving(database, tmp_path / "log") as server, ExitStack() as crowd:
        idle = [crowd.enter_context(Wire(server)) for _ in range(20)]
        for wire in idle[:10]:  # half of them have asked before
            wire.send(HOT)
            wire.answer()
        body_to_come = [crowd.enter_context(Wire(server)) for _ in range(2)]
        for wire, path in zip(body_to_come, ("/api/drops/7/reserve", "/api/demo/echo"), strict=True):
            wire.send(plus(request("POST", path), b"Content-Length: 2") + b"{")
        with Wire(server) as last:
            last.send(HEALTHZ)
            last.answer()
        began = time.monotonic()
        server.signal(signal.SIGTERM)
        for wire in idle:
            assert wire.is_closed()
        for wire in body_to_come:
            wire.send(b"}")
            answer = wire.answer()
            assert answer.headers["connection"] == "close"
            assert wire.is_closed()
        assert refused(server)
        assert server.process.wait(10) == 0  # and not by a second signal, which would end it at once
        assert time.monotonic() - began < 4


def refused(server: Server) -> bool:
    try:
        socket.create_connection(("127.0.0.1", server.port), timeout=1).close()
    except ConnectionRefusedError:
        return True
    return False


def test_sigterm_amid_a_storm_leaves_no_answer_half(database: str, tmp_path: Path) -> None:
    with serving(database, tmp_path / "log") as server:
        shop_drop = Drop.make(server)
        stop, told = threading.Event(), []

        def storm() -> None:
            try:
                while not stop.is_set():
                    with Wire(server) as wire:
                        while True:
                            wire.send(request("POST", shop_drop, x_user_id=new_id()))
                            answer = wire.answer()
                            told.append(answer.outcome)
                            if answer.headers.get("connection") == "close":
                                assert wire.is_closed()
                                break
            except (AssertionError, OSError) as fault:
                ends.append(str(fault))

        ends: list[str] = []
        threads = [threading.Thread(target=storm) for _ in range(8)]
        for thread in threads:
            thread.start()
        while len(told) < 200:
            time.sleep(0.01)
        assert server.stop() == 0
        stop.set()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
    # A connection ends between two answers, or was refused; never within an answer.
    assert all("b''" in end or "refused" in end or "reset" in end or "Broken pipe" in end for end in ends), ends
    assert {status for status, _ in told} <= {201, 503}


class Drop:
    @staticmethod
    def make(server: Server) -> str:
        """The path that reserves on a new drop."""
        body = b'{"name": "Storm", "price": 1, "total_stock": 1000000, "status": "live"}'
        with Wire(server) as wire:
            wire.send(request("POST", "/api/drops", body, x_user_id=new_id()))
            found = re.search(rb'"id":"([0-9a-f-]{36})"', wire.answer().body)
        assert found is not None
        return f"/api/drops/{found[1].decode()}/reserve"
