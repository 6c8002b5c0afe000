"""HTTP/2, with TLS and without, and TLS itself: Hypercorn's part of the port."""

import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

import httpx
import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    ResponseReceived,
    SettingsAcknowledged,
    StreamEnded,
    StreamReset,
)

from persistence.embedded import EmbeddedServer
from tests.conftest import _new_database
from tests.contract.shop import PATIENCE_S, Shop, Wire, new_id, request
from tests.server import Server, serving

HEALTHZ: Final = request("GET", "/api/healthz")
OK: Final = (200, "SUCCESS")
WEBSOCKET: Final = {
    "connection": "Upgrade",
    "upgrade": "websocket",
    "sec_websocket_version": "13",
    "sec_websocket_key": "dGhlIHNhbXBsZSBub25jZQ==",
}


@pytest.fixture
def base() -> str:
    return "/api/v1"


@pytest.fixture(scope="module")
def secure_server(server: EmbeddedServer, template: str, logs: Path, certificate: Path) -> Iterator[Server]:
    with (
        _new_database(server, template) as dsn,
        serving(dsn, logs / "secure.log", TLS_CERTFILE=str(certificate)) as running,
    ):
        yield running


@pytest.fixture(params=[False, True], ids=["HTTP/1.1", "HTTP/2"])
def secure(secure_server: Server, base: str, request: pytest.FixtureRequest) -> Iterator[Shop]:
    with httpx.Client(timeout=PATIENCE_S, verify=secure_server.tls or True, http2=request.param) as client:
        version = client.get(secure_server.url + "/healthz").http_version
        assert version == ("HTTP/2" if request.param else "HTTP/1.1")
        yield Shop(secure_server, base, client)


class H2Wire:
    """An HTTP/2 client by hand, on a plain connection."""

    def __init__(self, sock: socket.socket, protocol: H2Connection) -> None:
        self._sock = sock
        self.protocol = protocol
        self.statuses: dict[int, int] = {}
        self.bodies: dict[int, bytes] = {}
        self.ended: set[int] = set()
        self.is_terminated = False

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> int:
        """Send a request; its stream."""
        stream = self.protocol.get_next_available_stream_id()
        fields = [(":method", method), (":path", path), (":scheme", "http"), (":authority", "127.0.0.1")]
        fields += [(name.replace("_", "-"), value) for name, value in headers.items()]
        self.protocol.send_headers(stream, fields, end_stream=not body)
        if body:
            self.protocol.send_data(stream, body, end_stream=True)
        self.flush()
        return stream

    def flush(self) -> None:
        self._sock.sendall(self.protocol.data_to_send())

    def status(self, stream: int) -> int:
        """Wait for the end of a stream."""
        while stream not in self.ended:
            assert self.receive(), "closed"
        return self.statuses[stream]

    def receive(self) -> bool:
        data = self._sock.recv(65_536)
        for event in self.protocol.receive_data(data):
            self._handle(event)
        self.flush()
        return bool(data)

    def _handle(self, event: Event) -> None:
        match event:
            case ResponseReceived(stream_id=stream, headers=headers):
                self.statuses[stream] = int(dict(headers)[b":status"])
            case DataReceived(stream_id=stream, data=data, flow_controlled_length=length):
                self.bodies[stream] = self.bodies.get(stream, b"") + data
                self.protocol.acknowledge_received_data(length, stream)
            case StreamEnded(stream_id=stream) | StreamReset(stream_id=stream):
                self.ended.add(stream)
            case ConnectionTerminated():
                self.is_terminated = True
            case SettingsAcknowledged() | _:
                pass


@pytest.fixture
def h2wire(shop: Shop) -> Iterator[H2Wire]:
    """With prior knowledge."""
    with socket.create_connection(("127.0.0.1", shop.server.port), timeout=PATIENCE_S) as sock:
        protocol = H2Connection(H2Configuration(client_side=True))
        protocol.initiate_connection()
        wire = H2Wire(sock, protocol)
        wire.flush()
        yield wire


def test_story_of_a_sale_over_tls(secure: Shop) -> None:
    drop, visitor = secure.drop(total_stock=2), secure.visitor()
    assert visitor.reserve(drop, key="k").status == 201
    assert visitor.reserve(drop, key="k").is_replay
    assert visitor.reserve(drop).error == (409, "ALREADY_RESERVED")
    assert visitor.purchase(drop).status == 201
    other = secure.visitor()
    assert other.cancel(other.holds(drop)).status == 200
    assert secure.stock(drop) == 1


def test_limits_hold_over_tls_too(secure: Shop) -> None:
    drop = secure.drop()
    reply = secure.visitor().ask("POST", f"/drops/{drop['id']}/reserve", content=b" " * 16_385)
    assert reply.error == (413, "PAYLOAD_TOO_LARGE")
    assert secure.anybody.get("/healthz").status == 200


def test_stranger_who_speaks_no_tls_is_cut_off_and_nobody_else(secure: Shop) -> None:
    with socket.create_connection(("127.0.0.1", secure.server.port), timeout=PATIENCE_S) as plain:
        plain.sendall(HEALTHZ)
        try:
            while plain.recv(1_000):
                pass
        except ConnectionResetError:
            pass
    assert secure.anybody.get("/healthz").status == 200
    assert "Traceback" not in secure.server.log()


def test_server_with_tls_stops_in_time_whatever_its_peers_do(database: str, tmp_path: Path, certificate: Path) -> None:
    with serving(database, tmp_path / "log", TLS_CERTFILE=str(certificate)) as server:
        silent = socket.create_connection(("127.0.0.1", server.port))  # never says hello
        with Wire(server) as idle, Wire(server) as half:
            for wire in (idle, half):
                wire.send(HEALTHZ)
                wire.answer()
            half.send(HEALTHZ[:20])
            server.signal(signal.SIGTERM)
            assert server.process.wait(10) == 0, server.log()
        silent.close()


def test_connection_with_tls_ends_when_its_client_goes(secure_server: Server) -> None:
    descriptors = Path(f"/proc/{secure_server.process.pid}/fd")
    if not descriptors.exists():
        pytest.skip("this system does not say how many descriptors a process has")
    before = len(list(descriptors.iterdir()))
    for _ in range(20):
        with Wire(secure_server) as wire:
            wire.send(HEALTHZ)
            wire.answer()
    end = time.monotonic() + PATIENCE_S
    while len(list(descriptors.iterdir())) > before + 2:  # idle ones of other tests may end meanwhile, and begin
        assert time.monotonic() < end, "the server keeps connections whose clients are gone"
        time.sleep(0.05)


@pytest.mark.parametrize("path", ["/nothing", "/api/v1/live", "/socket.io/?EIO=4&transport=websocket"])
def test_handshake_that_is_not_ascii_is_refused_and_ends_nothing_else(secure_server: Server, path: str) -> None:
    asked = request("GET", path, b"", **WEBSOCKET, sec_websocket_extensions="<odd>").replace(b"<odd>", b"\xff")
    with Wire(secure_server) as wire:
        wire.send(asked)
        assert wire._until(b"\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    with Wire(secure_server) as wire:
        wire.send(HEALTHZ)
        assert wire.answer().status == 200
    assert "Traceback" not in secure_server.log()


def test_target_that_is_half_an_address_is_refused(secure_server: Server) -> None:
    with Wire(secure_server) as wire:
        wire.send(request("GET", "http://[::1/"))
        assert wire.answer().outcome == (404, "NOT_FOUND")


@pytest.mark.parametrize("host", ["127.0.0.1", "a..b"])
@pytest.mark.parametrize("path", ["/api/me", "/socket.io/", "http://[::1/", "?x"])
def test_websocket_over_tls_is_refused(secure_server: Server, path: str, host: str) -> None:
    with Wire(secure_server) as wire:
        wire.send(request("GET", path, b"", **{**WEBSOCKET, "host": host}))
        assert wire.answer().status in (400, 404)
        assert wire.is_closed()


def test_websocket_after_other_requests_on_a_plain_connection_is_refused(shop: Shop) -> None:
    with Wire(shop.server) as wire:
        wire.send(request("POST", "/api/drops/7/reserve") + HEALTHZ + request("GET", "/api/me", b"", **WEBSOCKET))
        assert [wire.answer().status for _ in range(3)] == [401, 200, 400]
        assert wire.is_closed()


# HTTP/2 without TLS -----------------------------------------------------------------------------------


def test_http_2_with_prior_knowledge_works_on_the_plain_port(shop: Shop, h2wire: H2Wire) -> None:
    drop, user = shop.drop(total_stock=1), new_id()
    reserved = h2wire.ask("POST", f"/api/drops/{drop['id']}/reserve", x_user_id=user)
    assert h2wire.status(reserved) == 201
    bought = h2wire.ask(
        "POST", f"/api/drops/{drop['id']}/purchase", b"{}", x_user_id=user, content_type="application/json"
    )
    assert h2wire.status(bought) == 201
    assert shop.stock(drop) == 0
    assert h2wire.status(h2wire.ask("GET", "/api/nothing")) == 404


def test_many_streams_of_one_http_2_connection_are_answered(shop: Shop, h2wire: H2Wire) -> None:
    drop = shop.drop(total_stock=10)
    path = f"/api/drops/{drop['id']}/reserve"
    streams = [h2wire.ask("POST", path, x_user_id=new_id()) for _ in range(30)]
    assert sorted(h2wire.status(stream) for stream in streams) == [201] * 10 + [409] * 20
    assert shop.stock(drop) == 0


@pytest.mark.parametrize("path", ["/api/nothing", "/api/drops/7/reserve", "/api/healthz"])
def test_body_that_comes_after_its_answer_ends_no_other_stream(shop: Shop, h2wire: H2Wire, path: str) -> None:
    early = h2wire.protocol.get_next_available_stream_id()
    fields = [(":method", "POST"), (":path", path), (":scheme", "http"), (":authority", "127.0.0.1")]
    h2wire.protocol.send_headers(early, [*fields, ("content-length", "1000000")])
    h2wire.flush()
    assert h2wire.status(early) >= 400
    for _ in range(10):  # more than the window of the connection and of the stream, were nothing of it given back
        while h2wire.protocol.local_flow_control_window(early) < 10_000:
            assert h2wire.receive(), "closed"
        h2wire.protocol.send_data(early, bytes(10_000))
        h2wire.flush()
    assert h2wire.status(h2wire.ask("GET", "/api/healthz")) == 200
    assert "connection_failed" not in shop.server.log()


def test_tunnel_is_refused_and_ends_no_other_stream(shop: Shop, h2wire: H2Wire) -> None:
    tunnel = h2wire.protocol.get_next_available_stream_id()
    h2wire.protocol.send_headers(tunnel, [(":method", "CONNECT"), (":authority", "127.0.0.1:80")])
    h2wire.flush()
    while tunnel not in h2wire.ended:
        assert h2wire.receive(), "closed"
    assert tunnel not in h2wire.statuses or h2wire.statuses[tunnel] >= 400
    assert h2wire.status(h2wire.ask("GET", "/api/healthz")) == 200
    assert "connection_failed" not in shop.server.log()


def test_priorities_of_any_number_of_streams_are_passed_over(shop: Shop, h2wire: H2Wire) -> None:
    for stream in range(3, 5_000, 2):
        h2wire.protocol.prioritize(stream, depends_on=stream - 2)  # a chain
    h2wire.flush()
    assert h2wire.status(h2wire.ask("GET", "/api/healthz")) == 200
    assert "connection_failed" not in shop.server.log()


def test_preface_that_is_cut_is_http_2_all_the_same(shop: Shop) -> None:
    with socket.create_connection(("127.0.0.1", shop.server.port), timeout=PATIENCE_S) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        protocol = H2Connection(H2Configuration(client_side=True))
        protocol.initiate_connection()
        opening = protocol.data_to_send()
        sock.sendall(opening[:20])
        with Wire(shop.server) as other:  # so much time passes
            other.send(HEALTHZ)
            other.answer()
        sock.sendall(opening[20:])
        wire = H2Wire(sock, protocol)
        assert wire.status(wire.ask("GET", "/api/healthz")) == 200


@pytest.mark.parametrize("has_tls", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize(
    "asked",
    [
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n",
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: A\r\n",
        b"Upgrade: h2c\r\nHTTP2-Settings: A\r\n",
        b"Upgrade: h2c\r\n",
        b"Upgrade: h2c\r\nConnection: close, upgrade\r\n",
    ],
)
def test_upgrade_to_h2c_is_no_way_past_a_proxy(
    shop: Shop, secure_server: Server, asked: bytes, *, has_tls: bool
) -> None:
    server = secure_server if has_tls else shop.server
    for path in ("/api/healthz", "/api/v1/live", "/api/drops/7/reserve"):
        with Wire(server) as wire:
            wire.send(b"GET %s HTTP/1.1\r\nHost: h\r\n%s\r\n" % (path.encode(), asked))
            assert wire.answer().status in (200, 405, 426)
            if b"close" not in asked:
                wire.send(HEALTHZ)
                assert wire.answer().outcome == OK
    assert "connection_failed" not in server.log()


@pytest.mark.parametrize("odd", [b"\xa0upgrade", b"upgrade\x85", b"\x1cupgrade"])
def test_word_that_hypercorn_alone_takes_for_upgrade_ends_no_server(shop: Shop, odd: bytes) -> None:
    handshake = b"GET /api/healthz HTTP/1.1\r\nHost: h\r\nConnection: %s\r\nUpgrade: websocket\r\n\r\n" % odd
    with Wire(shop.server) as wire, Wire(shop.server) as other:
        wire.send(handshake)
        assert wire.answer().status in (200, 400)
        other.send(HEALTHZ)
        assert other.answer().outcome == OK
    assert "connection_failed" not in shop.server.log()


def test_upgrade_to_h2c_with_a_body_is_answered_in_http_1(shop: Shop) -> None:
    drop, user = shop.drop(), new_id()
    upgrade = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2_settings": "AAMAAABkAAQAAP__"}
    with Wire(shop.server) as wire:
        wire.send(request("POST", f"/api/drops/{drop['id']}/reserve", b"{}", x_user_id=user, **upgrade))
        assert wire.answer().outcome == (201, "SUCCESS")
        wire.send(HEALTHZ)
        assert wire.answer().outcome == OK


@pytest.mark.parametrize("has_tls", [False, True], ids=["HTTP/2", "TLS"])
def test_limit_of_connections_holds_for_every_protocol(
    database: str, tmp_path: Path, certificate: Path, has_tls: bool
) -> None:
    tls = {"TLS_CERTFILE": str(certificate)} if has_tls else {}
    with serving(database, tmp_path / "log", CONNECTIONS_MAX="5", **tls) as server, ExitStack() as crowd:
        served = 0
        for _ in range(20):
            if has_tls:
                with suppress(OSError, AssertionError):
                    secure = crowd.enter_context(Wire(server))
                    secure.send(HEALTHZ)
                    served += secure.answer().status == 200
            else:
                sock = crowd.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S))
                protocol = H2Connection(H2Configuration(client_side=True))
                protocol.initiate_connection()
                sock.sendall(protocol.data_to_send())
                served += not sock.recv(9).startswith(b"HTTP/1.1")
        assert served <= 5


def test_server_with_open_http_2_connections_stops_in_time(database: str, tmp_path: Path) -> None:
    with (
        serving(database, tmp_path / "log") as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as sock,
    ):
        protocol = H2Connection(H2Configuration(client_side=True))
        protocol.initiate_connection()
        wire = H2Wire(sock, protocol)
        assert wire.status(wire.ask("GET", "/api/healthz")) == 200
        server.signal(signal.SIGTERM)
        assert server.process.wait(10) == 0
        while wire.receive():  # its end is an end, not a reset
            pass
