"""Honest viewers and an honest buyer, while everybody else is none: they must go on being told the truth.

Nobody else touches their drop, and each of its changes takes one unit: so after change `seq` its stock is known.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

import msgspec
import trio

from tests.contract.shop import new_id, request
from tests.proof.fuzz import rfc6455
from tests.proof.fuzz.arena import PATIENCE_S, STOCK, TRUTH_DROP, Arena, Lane
from tests.proof.fuzz.wire import connect, head_of_answer

BUY_S: Final = 0.05  # between two reservations
UPGRADE: Final = {
    "connection": "Upgrade",
    "upgrade": "websocket",
    "sec_websocket_version": "13",
    "sec_websocket_key": "dGhlIHNhbXBsZSBub25jZQ==",
}


def upgrading(path: str, **more: str) -> bytes:
    """The request for a WebSocket there; `more` takes the place of the fields that it has."""
    return request("GET", path, b"", **{**UPGRADE, **more})


LIVE: Final = upgrading("/api/v1/live")
SOCKET: Final = upgrading("/socket.io/?EIO=4&transport=websocket")


class Viewer:
    """One that hears of the stock: `native`, or a page of the earlier systems."""

    def __init__(self, lane: Lane, name: str, opening: bytes, greeting: bytes, before: int) -> None:
        """`before`: the stock as it is now."""
        self.name = f"{name} on {lane.name}"
        self.stock: int | None = None
        self.wrongs: list[str] = []
        self._lane = lane
        self._opening = opening
        self._greeting = rfc6455.frame(rfc6455.TEXT, greeting)
        self._before = before
        self._seq = 0

    async def look(self, task_status: trio.TaskStatus[None]) -> None:
        """Until cancelled."""
        stream = await connect(self._lane)
        try:
            await stream.send_all(self._opening)
            received = (await head_of_answer(stream)).partition(b"\r\n\r\n")[2]
            await stream.send_all(self._greeting)
            while True:
                frames, _ = rfc6455.said(received)
                received = received[rfc6455.size(frames) :]
                for frame in frames:
                    if frame.payload == b"2":  # a ping of Engine.IO
                        await stream.send_all(rfc6455.frame(rfc6455.TEXT, b"3"))
                    elif frame.opcode == rfc6455.TEXT:
                        self._hear(frame.payload)
                    elif frame.opcode == rfc6455.PING:
                        await stream.send_all(rfc6455.frame(rfc6455.PONG, frame.payload))
                    elif frame.opcode == rfc6455.CLOSE:
                        self.wrongs.append(f"{self.name} was sent away: {frame.payload!r}")
                        return
                if self.stock is not None:
                    task_status.started()
                    task_status = trio.TASK_STATUS_IGNORED
                some = await stream.receive_some()
                if not some:
                    self.wrongs.append(f"{self.name} lost its connection")
                    return
                received += some
        finally:
            await trio.aclose_forcefully(stream)

    def _hear(self, payload: bytes) -> None:
        if payload.startswith(b"40"):
            self.stock = self._before  # connected; it is not shown what was before
        elif payload.startswith(b'42["STOCK_UPDATED"'):
            _, told = msgspec.json.decode(payload[2:])
            if told["dropId"] == TRUTH_DROP:
                self.stock = told["availableStock"]
        elif payload.startswith(b"{"):
            told = msgspec.json.decode(payload)
            stock = told["drop"]["available_stock"] if told["type"] == "snapshot" else None
            if told.get("event") == "STOCK_UPDATED":
                stock = told["data"]["availableStock"]
            if stock is None:
                return
            if told["seq"] <= self._seq:
                self.wrongs.append(f"{self.name} heard {told['seq']} after {self._seq}")
            if stock != STOCK - told["seq"] + 1:
                self.wrongs.append(f"{self.name} heard of {stock} units at {told['seq']}")
            self._seq, self.stock = told["seq"], stock


class Watch:
    """The viewers of both lanes, and how much stock there should be."""

    def __init__(self, arena: Arena) -> None:
        subscribe = b'{"type":"subscribe","drops":["%s"]}' % TRUTH_DROP.encode()
        self._arena = arena
        self._sold = arena.sold
        self._is_over = False
        self._buying = 0
        self.viewers = [
            [
                Viewer(lane, "a native viewer", LIVE, subscribe, STOCK - sold),
                Viewer(lane, "a page", SOCKET, b"40", STOCK - sold),
            ]
            for lane, sold in zip(arena.lanes, arena.sold, strict=True)
        ]
        self._wrongs: list[str] = []

    async def buy(self, number: int) -> None:
        lane = self._arena.lanes[number]
        self._buying += 1
        stream = await connect(lane)
        while not self._is_over:
            await stream.send_all(request("POST", f"/api/v1/drops/{TRUTH_DROP}/reserve", x_user_id=new_id()))
            answer = b""
            with trio.move_on_after(PATIENCE_S), suppress(trio.BrokenResourceError):
                while b'"meta"' not in answer and (some := await stream.receive_some()):
                    answer += some
            if not answer.startswith(b"HTTP/1.1 201"):
                self._wrongs.append(f"{lane.name}: the honest buyer got {answer!r}")
                break
            self._sold[number] += 1
            await trio.sleep(BUY_S)
        self._buying -= 1
        await trio.aclose_forcefully(stream)

    async def wrongs(self) -> list[str]:
        """What was not the truth; all of it must have arrived by now."""
        self._is_over = True
        with trio.move_on_after(PATIENCE_S):
            # What a buyer has asked for last is sold as well, and counts: with another campaign on this arena, too.
            while self._buying or not all(self._is_told(number) for number in (0, 1)):
                await trio.sleep(0.01)
        late = [
            f"{viewer.name} believes in {viewer.stock} units, not {STOCK - sold}"
            for viewers, sold in zip(self.viewers, self._sold, strict=True)
            for viewer in viewers
            if viewer.stock != STOCK - sold
        ]
        return (
            self._wrongs + [wrong for viewers in self.viewers for viewer in viewers for wrong in viewer.wrongs] + late
        )

    def _is_told(self, number: int) -> bool:
        return all(viewer.stock == STOCK - self._sold[number] for viewer in self.viewers[number])


@asynccontextmanager
async def watching(arena: Arena) -> AsyncIterator[Watch]:
    """Viewers that are connected, and buyers that buy, until the block ends."""
    watch = Watch(arena)
    with suppress(trio.Cancelled):
        async with trio.open_nursery() as nursery:
            with trio.fail_after(PATIENCE_S):
                for viewers in watch.viewers:
                    for viewer in viewers:
                        await nursery.start(viewer.look)
            for number in (0, 1):
                nursery.start_soon(watch.buy, number)
            yield watch
            nursery.cancel_scope.cancel()
