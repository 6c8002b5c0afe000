"""Pages of the earlier systems: the real socket.io-client 4 under Node, unchanged, against a real server."""

import json
import queue
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import httpx
import pytest

from persistence.embedded import EmbeddedServer
from tests.clients.conftest import NODE
from tests.conftest import _new_database
from tests.contract.shop import Shop, new_id
from tests.server import serving

PATIENCE_S = 20.0
TRANSPORTS: dict[str, dict[str, Any]] = {
    "default": {},
    "websocket": {"transports": ["websocket"]},
    "polling": {"transports": ["polling"]},
}
NAMES = {
    "DROP_CREATED",
    "STOCK_UPDATED",
    "drop:stock_updated",
    "ACTIVITY_UPDATED",
    "drop:activity_updated",
    "PURCHASE_COMPLETED",
    "RESERVATION_EXPIRED",
}


class Page:
    """One page, in a process of its own; what it heard, in order."""

    def __init__(self, node: str, url: str, **options: Any) -> None:
        self._process = subprocess.Popen(
            [node, "page.mjs", url, json.dumps(options)],
            cwd=NODE,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._queue: queue.Queue[dict[str, Any]] = queue.Queue()
        self.heard: list[dict[str, Any]] = []
        assert self._process.stdout is not None
        threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()

    def _read(self, lines: IO[str]) -> None:
        for line in lines:
            self._queue.put(json.loads(line))

    def __enter__(self) -> "Page":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def tell(self, **told: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(told) + "\n")
        self._process.stdin.flush()

    def next(self, **wanted: object) -> dict[str, Any]:
        """The next line that has these values; it and all before it are `heard`."""
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                line = self._queue.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"{wanted} was not heard, but {self.heard[-20:]}") from None
            self.heard.append(line)
            if all(line.get(name) == value for name, value in wanted.items()):
                return line

    def connected(self) -> "Page":
        """Where it is to stay: on a WebSocket, if that was to come."""
        if self.next(life="connect")["transport"] == "polling" and self._may_upgrade():
            assert self.next(life="upgrade")["transport"] == "websocket"
        return self

    def _may_upgrade(self) -> bool:
        options = json.loads(str(self._process.args[3]))  # type: ignore[index]
        return "transports" not in options

    def ask(self, name: str, *arguments: object) -> Any:
        self.tell(emit=[name, *arguments], ask=True)
        line = self.next(life="ack")
        assert "error" not in line, line
        return line["answer"]

    def stock(self, drop_id: str, available: int) -> None:
        """Wait until it knows that so many are available."""
        self.next(event="STOCK_UPDATED", data=[{"dropId": drop_id, "availableStock": available}])

    def told_of(self, drop_id: str) -> list[tuple[str, Any]]:
        """All events of a drop that it heard so far."""
        events = [(line["event"], line["data"]) for line in self.heard if "event" in line]
        assert all(len(data) == 1 for _, data in events)
        told = [(name, data[0]) for name, data in events]
        return [
            (name, payload)
            for name, payload in told
            if drop_id in (payload.get("dropId"), payload.get("drop", {}).get("id"))
        ]


@pytest.fixture(scope="module")
def shop(server: EmbeddedServer, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    with (
        _new_database(server, template) as dsn,
        serving(dsn, tmp_path_factory.mktemp("clients") / "log", RESERVATION_TTL_SECONDS="2") as running,
        httpx.Client(timeout=PATIENCE_S) as http,
    ):
        yield Shop(running, "/api", http)


@pytest.fixture(params=TRANSPORTS)
def page(request: pytest.FixtureRequest, node: str, node_modules: Path, shop: Shop) -> Iterator[Page]:
    with Page(node, shop.server.url, **TRANSPORTS[request.param]) as page:
        yield page.connected()


def test_page_hears_every_event_in_both_vocabularies(page: Page, shop: Shop) -> None:
    buyer, loser = shop.visitor(X_User_Name=f"buyer-{new_id()[:8]}"), shop.visitor()
    drop = shop.drop(total_stock=3)
    page.stock(drop["id"], 3)
    buyer.reserve(drop)
    page.stock(drop["id"], 2)
    purchase = buyer.purchase(drop).data["purchase"]
    page.next(event="PURCHASE_COMPLETED")
    reservation_id = loser.holds(drop)
    page.stock(drop["id"], 1)
    page.stock(drop["id"], 2)  # it has expired

    told = page.told_of(drop["id"])
    payloads = dict(told)
    assert payloads.keys() == NAMES
    assert payloads["DROP_CREATED"] == {"drop": drop}
    assert payloads["drop:activity_updated"] == payloads["ACTIVITY_UPDATED"]
    line = {
        "userId": buyer.id,
        "username": buyer.headers["X-User-Name"],
        "qty": 1,
        "createdAt": purchase["created_at"],
    }
    assert payloads["ACTIVITY_UPDATED"] == {"dropId": drop["id"], "latestPurchasers": [line]}
    assert payloads["PURCHASE_COMPLETED"] == {
        "dropId": drop["id"],
        "username": line["username"],
        "purchasedAt": purchase["created_at"],
    }
    assert payloads["RESERVATION_EXPIRED"] == {"dropId": drop["id"], "reservationId": reservation_id}
    for old, new in (("drop:stock_updated", "STOCK_UPDATED"), ("drop:activity_updated", "ACTIVITY_UPDATED")):
        assert [payload for name, payload in told if name == old] == [payload for name, payload in told if name == new]


def test_page_joins_and_leaves_drops(page: Page, shop: Shop) -> None:
    joined, other = shop.drop(total_stock=5), shop.drop(total_stock=5)

    assert page.ask("drops:join", {"dropId": joined["id"]}) == {"ok": True}
    page.heard.clear()
    shop.visitor().purchase(other)
    shop.visitor().reserve(other)
    shop.visitor().reserve(joined)
    page.stock(joined["id"], 4)
    assert page.told_of(other["id"]) == []

    page.tell(emit=["drops:join", {"dropId": other["id"]}])  # without an acknowledgement
    assert page.ask("drops:leave", {"dropId": joined["id"]}) == {"ok": True}
    page.heard.clear()
    shop.visitor().reserve(joined)
    shop.visitor().reserve(other)
    page.next(event="STOCK_UPDATED")
    assert page.told_of(joined["id"]) == []

    assert page.ask("drops:join", {"dropId": new_id()})["error"]["code"] == "DROP_NOT_FOUND"
    assert page.ask("drops:join", "something else")["error"]["code"] == "VALIDATION_ERROR"
    assert page.ask("no such event")["error"]["code"] == "UNKNOWN_EVENT"


def test_page_may_try_another_namespace_and_keeps_this_one(page: Page, shop: Shop) -> None:
    page.tell(namespace="/admin")

    assert page.next(life="connect_error")["message"] == "Invalid namespace"
    drop = shop.drop(total_stock=7)
    page.stock(drop["id"], 7)


def test_page_disconnects_and_connects_again(page: Page, shop: Shop) -> None:
    page.tell(disconnect=True)
    assert page.next(life="disconnect")["reason"] == "io client disconnect"
    page.tell(connect=True)
    page.next(life="connect")
    drop = shop.drop(total_stock=6)
    page.stock(drop["id"], 6)


def test_pages_come_back_after_a_crash_in_the_middle_of_a_storm_and_after_a_restart(
    database: str, tmp_path: Path, node: str, node_modules: Path
) -> None:
    with serving(database, tmp_path / "log") as server, ExitStack() as stack:
        http = stack.enter_context(httpx.Client(timeout=PATIENCE_S))
        shop = Shop(server, "/api", http)
        pages = {name: stack.enter_context(Page(node, server.url, **more)) for name, more in TRANSPORTS.items()}
        for page in pages.values():
            page.connected()
        drop = shop.drop(total_stock=2_000)
        storm = _Storm(shop, drop)
        for page in pages.values():
            page.next(event="PURCHASE_COMPLETED")
        server.kill()
        for page in pages.values():
            assert page.next(life="disconnect")["reason"] in ("transport close", "transport error")
        server.start()
        for page in pages.values():
            page.next(life="connect")
            page.next(event="PURCHASE_COMPLETED")  # the storm goes on
        storm.stop()
        shop.visitor().reserve(drop)
        for page in pages.values():
            page.stock(drop["id"], shop.stock(drop))

        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < 4
        for page in pages.values():
            assert page.next(life="disconnect")["reason"] in ("transport close", "transport error")
        server.start()
        shop.visitor().reserve(drop)
        for page in pages.values():
            page.next(life="connect")
        shop.visitor().reserve(drop)
        for page in pages.values():
            page.stock(drop["id"], shop.stock(drop))


class _Storm:
    """People who reserve and buy, whatever happens to the server."""

    def __init__(self, shop: Shop, drop: dict[str, Any]) -> None:
        self._url = f"{shop.root}/drops/{drop['id']}"
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._buy) for _ in range(2)]
        for thread in self._threads:
            thread.start()

    def _buy(self) -> None:
        with httpx.Client(timeout=PATIENCE_S) as http:
            while not self._is_over.wait(0.01):
                headers = {"X-User-Id": new_id()}
                try:
                    http.post(f"{self._url}/reserve", headers=headers)
                    http.post(f"{self._url}/purchase", headers=headers)
                except httpx.TransportError:
                    time.sleep(0.05)

    def stop(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()
