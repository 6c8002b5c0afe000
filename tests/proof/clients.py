"""Shoppers in the test's own process, who write down what they asked and what they heard.

The history is the evidence: an answer is definite, or it is unknown (no answer at all, or 503 OUTCOME_UNKNOWN).
What an answer says must be found in the tables, and the tables must hold nothing that nobody asked for
(`tests.proof.checks`). One connection a user, kept open, over h11: light enough for hundreds at once.
"""

import itertools
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import h11
import msgspec
import trio

PATIENCE_S = 20.0  # beyond every deadline of the engine: who waits longer has found a bug

_keys = itertools.count(1)


class NoAnswer(Exception):
    """The connection was refused or broke, or nothing came in time."""


class NotSent(NoAnswer):
    """Nobody listens there: for certain nothing was heard."""


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: Mapping[str, str]  # lower-case names
    body: bytes

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)

    @property
    def data(self) -> Any:
        return self.json["data"]

    @property
    def code(self) -> str:
        """The error's code; empty for a success."""
        return "" if self.status < 400 else str(self.json["error"]["code"])

    @property
    def is_replayed(self) -> bool:
        return self.headers.get("idempotency-replayed") == "true"


@dataclass(frozen=True, slots=True)
class Exchange:
    """One invocation and what came of it; instants are wall time, s."""

    user_id: str
    operation: str
    drop_id: str
    key: str | None
    began_at: float
    ended_at: float
    answer: Answer | None
    was_sent: bool = True
    lost_because: str = ""

    @property
    def status(self) -> int:
        """0 without an answer."""
        return 0 if self.answer is None else self.answer.status

    @property
    def code(self) -> str:
        if self.answer is not None:
            return self.answer.code
        return "NO_ANSWER" if self.was_sent else "NOT_SENT"

    @property
    def is_unknown(self) -> bool:
        return self.code in ("NO_ANSWER", "OUTCOME_UNKNOWN")

    @property
    def is_fault(self) -> bool:
        """Whether it is certain that nothing was decided."""
        return self.code == "NOT_SENT" or (self.status == 503 and not self.is_unknown)

    @property
    def made(self) -> str | None:
        """The id of the reservation or purchase that this made, as far as its caller knows."""
        if self.answer is None or self.status != 201:
            return None
        return str(self.answer.data["reservation" if self.operation == "reserve" else "purchase"]["id"])

    @property
    def took_s(self) -> float:
        return self.ended_at - self.began_at


@dataclass
class History:
    exchanges: list[Exchange] = field(default_factory=list)

    def of(self, operation: str, status: int | None = None, code: str | None = None) -> list[Exchange]:
        return [
            exchange
            for exchange in self.exchanges
            if exchange.operation == operation and status in (None, exchange.status) and code in (None, exchange.code)
        ]

    def codes(self) -> dict[str, int]:
        """How often each came: for people to read."""
        counts: dict[str, int] = {}
        for exchange in self.exchanges:
            name = f"{exchange.operation} {exchange.code or exchange.status}"
            counts[name] = counts.get(name, 0) + 1
        return dict(sorted(counts.items()))

    def unresolved(self) -> list[Exchange]:
        """Unknown ones that no later answer under the same key has settled."""
        settled = {
            (exchange.user_id, exchange.operation, exchange.key)
            for exchange in self.exchanges
            if exchange.key is not None and not exchange.is_unknown and not exchange.is_fault
        }
        return [
            exchange
            for exchange in self.exchanges
            if exchange.is_unknown and (exchange.user_id, exchange.operation, exchange.key) not in settled
        ]


class Connection:
    """One HTTP/1.1 connection to a port of 127.0.0.1, opened when needed."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._stream: trio.SocketStream | None = None
        self._http = h11.Connection(h11.CLIENT)

    async def ask(
        self,
        method: str,
        path: str,
        headers: Iterable[tuple[str, str]] = (),
        body: bytes = b"",
        *,
        patience_s: float = PATIENCE_S,
    ) -> Answer:
        """Send one request and read its answer.

        Raises:
            NoAnswer: and it is not known whether the request was heard, unless it is `NotSent`.
        """
        try:
            with trio.fail_after(patience_s):
                stream = await self._connected()
                all_headers = [("Host", "127.0.0.1"), ("Content-Length", str(len(body))), *headers]
                head = h11.Request(method=method, target=path, headers=all_headers)
                bytes_out = self._http.send(head) or b""
                if body:
                    bytes_out += self._http.send(h11.Data(body)) or b""
                bytes_out += self._http.send(h11.EndOfMessage()) or b""
                await stream.send_all(bytes_out)
                return await self._answer(stream)
        except (OSError, trio.BrokenResourceError, h11.ProtocolError, trio.TooSlowError) as fault:
            self.close()
            raise NoAnswer(repr(fault)) from fault
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.socket.close()

    async def _connected(self) -> trio.SocketStream:
        if self._stream is None:
            try:
                self._stream = await trio.open_tcp_stream("127.0.0.1", self.port)
            except OSError as fault:
                raise NotSent(repr(fault)) from fault
            self._http = h11.Connection(h11.CLIENT)
        return self._stream

    async def _answer(self, stream: trio.SocketStream) -> Answer:
        status, headers, body = 0, {}, b""
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                self._http.receive_data(await stream.receive_some(65_536))
            elif isinstance(event, h11.Response):
                status = event.status_code
                headers = {name.decode(): value.decode() for name, value in event.headers}
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                break
            elif isinstance(event, h11.ConnectionClosed):
                raise trio.BrokenResourceError("closed before the answer")
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
        else:
            self.close()
        return Answer(status, headers, body)


class Shop:
    """The server as its users see it. `port` may change between two requests."""

    def __init__(self, port: int, history: History | None = None) -> None:
        self.port = port
        self.history = history or History()

    def user(self) -> "User":
        return User(self, str(uuid.uuid4()))

    async def users(self, count: int) -> list["User"]:
        """New users whom the server knows already."""
        users = [self.user() for _ in range(count)]
        async with trio.open_nursery() as nursery:
            for user in users:
                nursery.start_soon(user.get, "/me")
        return users

    async def get(self, path: str) -> Answer:
        """As a visitor, on a connection of its own; `path` from the root on."""
        connection = Connection(self.port)
        try:
            return await connection.ask("GET", path)
        finally:
            connection.close()

    async def new_drop(self, total_stock: int, **more: object) -> str:
        """A live drop; its id."""
        body = {"name": "Air", "price": 12_000, "total_stock": total_stock, "status": "live", **more}
        answer = await self.user().send("POST", "/drops", body=msgspec.json.encode(body))
        assert answer.status == 201, answer.body
        return str(answer.data["id"])

    async def available(self, drop_id: str) -> int:
        answer = await self.get(f"/api/v1/drops/{drop_id}")
        assert answer.status == 200, answer.body
        return int(answer.data["available_stock"])


class User:
    """One user with one connection; asks one thing at a time."""

    def __init__(self, shop: Shop, id_: str) -> None:
        self.id = id_
        self._shop = shop
        self._connection = Connection(shop.port)

    def twin(self) -> "User":
        """The same user on another connection."""
        return User(self._shop, self.id)

    def close(self) -> None:
        self._connection.close()

    async def reserve(self, drop_id: str, key: str | None = None) -> Exchange:
        return await self._record("reserve", drop_id, key)

    async def purchase(self, drop_id: str, key: str | None = None) -> Exchange:
        return await self._record("purchase", drop_id, key)

    async def again(self, exchange: Exchange) -> Exchange:
        """The same request under the same key."""
        assert exchange.key is not None
        assert exchange.user_id == self.id
        return await self._record(exchange.operation, exchange.drop_id, exchange.key)

    async def settled(self, exchange: Exchange, *, at_most_s: float = 20.0) -> Exchange:
        """Ask again and again until the server decides."""

        def is_decided(found: Exchange) -> bool:
            return not found.is_unknown and not found.is_fault

        return await answered(lambda: self.again(exchange), is_decided, at_most_s=at_most_s)

    async def get(self, path: str) -> Answer:
        return await self.send("GET", path)

    async def send(self, method: str, path: str, *, key: str | None = None, body: bytes = b"") -> Answer:
        """`path` below the base path."""
        headers = [("X-User-Id", self.id)]
        if key is not None:
            headers.append(("Idempotency-Key", key))
        if body:
            headers.append(("Content-Type", "application/json"))
        if self._connection.port != self._shop.port:
            self._connection.close()
            self._connection = Connection(self._shop.port)
        return await self._connection.ask(method, f"/api/v1{path}", headers, body)

    async def _record(self, operation: str, drop_id: str, key: str | None) -> Exchange:
        began_at, answer, was_sent, lost_because = time.time(), None, True, ""
        try:
            answer = await self.send("POST", f"/drops/{drop_id}/{operation}", key=key)
        except NoAnswer as fault:
            was_sent, lost_because = not isinstance(fault, NotSent), str(fault)
        except trio.Cancelled:
            lost_because = "we hung up"
            raise
        finally:
            exchange = Exchange(self.id, operation, drop_id, key, began_at, time.time(), answer, was_sent, lost_because)
            self._shop.history.exchanges.append(exchange)
        return exchange


async def answered(
    ask: Callable[[], Awaitable[Exchange]], is_wanted: Callable[[Exchange], bool], *, at_most_s: float = 20.0
) -> Exchange:
    """Ask again and again until the wanted answer comes."""
    with trio.fail_after(at_most_s):
        while True:
            exchange = await ask()
            if is_wanted(exchange):
                return exchange
            await trio.sleep(0.02)


def new_key() -> str:
    return f"key-{next(_keys)}-{uuid.uuid4().hex[:8]}"
