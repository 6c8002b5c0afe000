"""Whoever has gone leaves nothing behind that only a collection of cycles would free.

Collections are rare, since each stops the loop, and objects that have outlived two of them are looked at once in hours:
what ends in a cycle after minutes of life would be memory that a busy server loses.
"""

import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from persistence.embedded import EmbeddedServer
from tests.conftest import _new_database
from tests.contract.shop import PATIENCE_S, Shop
from tests.contract.test_live import descriptors, eventually, viewing
from tests.contract.test_socketio import Polling, Socket, opened
from tests.server import Server

TIMES: Final = 20
# Of each request that Quart answers, in a function of the router that calls itself: as short-lived as the request, so
# the next collection of the youngest has them.
ROUTER_OBJECTS: Final = 8
Drop = Mapping[str, Any]


class Uncollected(Server):
    """`tests.uncollected`."""

    def __init__(self, dsn: str, folder: Path, **settings: str) -> None:
        self._window = folder / "window"
        super().__init__(dsn, folder / "log", None, UNCOLLECTED=str(self._window), **settings)

    def command(self) -> list[str]:
        return [sys.executable, "-m", "tests.uncollected", "serve"]

    def unreachable(self) -> int:
        """Objects that had become so since the last call."""
        with socket.socket(socket.AF_UNIX) as asking:
            asking.settimeout(PATIENCE_S)
            asking.connect(str(self._window))
            return int(asking.recv(64))


@pytest.fixture(scope="module", params=["plain", "TLS"])
def uncollected(
    request: pytest.FixtureRequest,
    server: EmbeddedServer,
    template: str,
    tmp_path_factory: pytest.TempPathFactory,
    certificate: Path,
) -> Iterator[Uncollected]:
    tls = {"TLS_CERTFILE": str(certificate)} if request.param == "TLS" else {}
    with _new_database(server, template) as dsn:
        running = Uncollected(dsn, tmp_path_factory.mktemp("uncollected"), **tls)
        try:
            running.start()
            yield running
        finally:
            running.stop()


def by_websocket(server: Server, drop: Drop) -> None:
    with viewing(server) as viewer:
        viewer.watch(drop)
        viewer.snapshot()


def by_websocket_without_good_bye(server: Server, drop: Drop) -> None:
    with viewing(server) as viewer:
        viewer.watch(drop)
        viewer.snapshot()
        viewer.socket.socket.shutdown(socket.SHUT_RDWR)


def by_events(server: Server, drop: Drop) -> None:
    with httpx.Client(verify=server.tls or True) as client:
        hear(client, server, drop)


def by_events_of_http_2(server: Server, drop: Drop) -> None:
    with httpx.Client(http1=server.tls is not None, http2=True, verify=server.tls or True) as client:
        assert hear(client, server, drop) == "HTTP/2"


def hear(client: httpx.Client, server: Server, drop: Drop) -> str:
    """What happens, up to the first of it; by which version of HTTP."""
    url = f"{server.url}/api/v1/live/events?drops={drop['id']}"
    with client.stream("GET", url, timeout=PATIENCE_S) as answer:
        assert any("snapshot" in text for text in answer.iter_text())
        return answer.http_version


def by_socket_io(server: Server, drop: Drop) -> None:
    Socket(server).connect()
    opened.pop_all().close()


def by_polling(server: Server, drop: Drop) -> None:
    polling = Polling(server).connect()
    polling.say("1")
    opened.pop_all().close()


def by_request(server: Server, drop: Drop) -> None:
    answer = httpx.get(f"{server.url}/api/v1/drops", verify=server.tls or True, timeout=PATIENCE_S)
    assert answer.status_code == 200


def by_request_of_http_2(server: Server, drop: Drop) -> None:
    with httpx.Client(http1=server.tls is not None, http2=True, verify=server.tls or True) as client:
        assert client.get(f"{server.url}/api/v1/drops", timeout=PATIENCE_S).http_version == "HTTP/2"


# And how many requests of each are Quart's to answer.
VISITS: Final[Mapping[Callable[[Server, Drop], None], int]] = {
    by_websocket: 0,
    by_websocket_without_good_bye: 0,
    by_events: 0,
    by_events_of_http_2: 1,
    by_socket_io: 0,
    by_polling: 4,
    by_request: 1,
    by_request_of_http_2: 1,
}


@pytest.mark.parametrize("visit", VISITS, ids=lambda visit: visit.__name__)
def test_visitors_who_have_gone_are_free_at_once(
    uncollected: Uncollected, visit: Callable[[Server, Drop], None]
) -> None:
    with httpx.Client(timeout=PATIENCE_S, verify=uncollected.tls or True) as client:
        drop = Shop(uncollected, "/api/v1", client).drop()
        before = descriptors(uncollected)
    visit(uncollected, drop)
    uncollected.unreachable()  # of what comes first, once
    for _ in range(TIMES):
        visit(uncollected, drop)
    eventually(lambda: descriptors(uncollected) <= before)
    assert uncollected.unreachable() < TIMES * (VISITS[visit] * ROUTER_OBJECTS + 1)
