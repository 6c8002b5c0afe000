"""Viewers of the native feed that are not ours: npm's `ws`, and an `EventSource` as browsers have it, under Node.

Both live through a restart of the server, and hear what they missed meanwhile.
"""

import json
import queue
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import httpx
import pytest

from tests.clients.conftest import NODE
from tests.contract.shop import Shop
from tests.server import Server, serving

PATIENCE_S = 20.0
Json = dict[str, Any]


class Listener:
    """A client in a process of its own."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._lines: queue.Queue[Json] = queue.Queue()
        assert process.stdout is not None
        threading.Thread(target=self._read, args=(process.stdout,), daemon=True).start()

    def _read(self, lines: IO[str]) -> None:
        for line in lines:
            self._lines.put(json.loads(line))

    def next(self) -> Json:
        return self._lines.get(timeout=PATIENCE_S)

    def hear(self) -> tuple[str, int]:
        """The next message, which must be one: what it is, and its `seq`."""
        line = self.next()
        assert "heard" in line, line
        heard = line["heard"]
        return heard.get("event", heard["type"]), heard["seq"]

    def hear_in_the_end(self) -> tuple[str, int]:
        """The same, where it may have come before the server was ready: then it was sent away to come again."""
        while "life" in (line := self.next()):
            pass
        return line["heard"]["event"], line["heard"]["seq"]

    def live_through(self) -> Json:
        """Its connection ends, and some time later it has another one: how the first ended."""
        ended = self.next()
        assert ended["life"] == "close", ended
        while self.next()["life"] != "open":
            pass
        return ended


@contextmanager
def listener(node: str, *arguments: str) -> Iterator[Listener]:
    process = subprocess.Popen([node, "live.mjs", *arguments], cwd=NODE, stdout=subprocess.PIPE, text=True)
    try:
        listener = Listener(process)
        assert listener.next() == {"life": "open"}
        yield listener
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def shop(database: str, tmp_path: Path) -> Iterator[Shop]:
    with serving(database, tmp_path / "log") as server, httpx.Client() as http:
        yield Shop(server, "/api/v1", http)


def test_npm_ws_hears_everything_through_a_restart(node: str, node_modules: Path, shop: Shop) -> None:
    drop, buyer = shop.drop(total_stock=5), shop.visitor()
    with listener(node, "ws", f"ws://127.0.0.1:{shop.server.port}/api/v1/live", drop["id"]) as viewer:
        assert viewer.hear() == ("snapshot", 1)
        buyer.holds(drop)
        assert viewer.hear() == ("STOCK_UPDATED", 2)
        restart(shop.server)
        ended = viewer.live_through()
        assert ended["code"] == 1001
        assert 500 <= ended["retryInMs"] <= 5_000
        buyer.purchase(drop)
        assert [viewer.hear() for _ in range(2)] == [("ACTIVITY_UPDATED", 3), ("PURCHASE_COMPLETED", 3)]
        shop.server.kill()
        shop.server.start()
        assert viewer.live_through()["code"] == 1006
        shop.visitor().holds(drop)
        assert viewer.hear() == ("STOCK_UPDATED", 4)


@pytest.mark.parametrize("is_crash", [False, True], ids=["restart", "crash"])
def test_event_source_hears_everything_through_a_restart(
    node: str, node_modules: Path, shop: Shop, is_crash: bool
) -> None:
    one, two, buyer = shop.drop(total_stock=5), shop.drop(total_stock=5), shop.visitor()
    url = f"{shop.root}/live/events?drops={one['id']},{two['id']}"
    with listener(node, "eventsource", url) as page:
        assert [page.hear(), page.hear()] == [("snapshot", 1), ("snapshot", 1)]
        buyer.holds(one)
        line = page.next()
        assert line["heard"]["data"] == {"dropId": one["id"], "availableStock": 4}
        assert line["id"].endswith(".2.1")
        if is_crash:
            shop.server.kill()
            shop.server.start()
        else:
            restart(shop.server)
        buyer.purchase(one)  # while the page waits for its `retry`
        shop.visitor().holds(two)
        page.live_through()
        assert {page.hear_in_the_end() for _ in range(3)} == {
            ("ACTIVITY_UPDATED", 3),
            ("PURCHASE_COMPLETED", 3),
            ("STOCK_UPDATED", 2),
        }


def restart(server: Server) -> None:
    assert server.stop() == 0
    server.start()
