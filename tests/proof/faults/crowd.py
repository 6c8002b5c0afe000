"""A steady crowd: each shopper asks, hears, and asks the next thing at once, whatever happens to the server.

They do what people do: hold and buy, hold and give back, hold and forget, press the button twice, ask again under the
same key when no answer came, or give up. One of them founds new drops. Whoever hears a 503 takes a breath, so that an
outage does not fill the history with refusals. Everything goes into a `Recorder`.

One connection a shopper, and as little HTTP as it takes: the load should come out of the engine's hands, not ours.
"""

import random
import uuid
from collections.abc import Sequence
from typing import Final

import msgspec
import trio

from tests.proof.history import Ending, Kind, Operation
from tests.proof.recorder import NOT_SENT, Recorder, now

PATIENCE_S: Final = 20.0  # beyond every deadline of the engine: who waits longer has found a bug
BREATH_S: Final = 0.02  # after a 503
AWAY_S: Final = 0.1  # while nobody listens: an engine that starts needs the machine more than we do
RETRIES_MAX: Final = 400  # under one key, with a breath between two: 8 s
DROPS_MAX: Final = 12  # that are asked for at a time; older ones are left alone
FOUND_EVERY_S: Final = 0.3
USERS_EACH: Final = 24

# How often, of all occasions.
WITH_KEY: Final = 0.6
GIVE_UP: Final = 0.15  # of those whose answer is unknown
ASK_AGAIN: Final = 0.04  # of those who know the answer already
ASK_TWICE: Final = 0.04  # at once, on two connections
BUY, GIVE_BACK, FORGET = 0.55, 0.2, 0.25
LOOK: Final = 0.05

CHANGES: Final = (Kind.CREATE, Kind.RESERVE, Kind.PURCHASE, Kind.CANCEL)
STATUSES: Final = (200, 201, 404, 409, 503)  # whatever is done to the server


class NoAnswer(Exception):
    """The connection broke: nobody knows what was heard."""


class Hung(NoAnswer):
    """Nothing came within `PATIENCE_S`."""


class NotSent(Exception):
    """Nobody listens: for certain nothing was heard."""


class Line:
    """One keep-alive connection, opened when needed."""

    def __init__(self) -> None:
        self._port = 0
        self._socket: trio.socket.SocketType | None = None

    async def ask(self, port: int, request: bytes) -> tuple[int, bytes, bytes]:
        """Status, head in lower case, body.

        Raises:
            NotSent, NoAnswer: as they say.
        """
        if port != self._port:
            self.close()
        with trio.move_on_after(PATIENCE_S):
            return await self._exchange(port, request)
        self.close()
        raise Hung(f"nothing within {PATIENCE_S} s")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def _exchange(self, port: int, request: bytes) -> tuple[int, bytes, bytes]:
        try:
            if self._socket is None:
                await self._connect(port)
            assert self._socket is not None
            await self._socket.send(request)  # a few hundred bytes: the kernel takes them whole
            head, body = b"", b""
            while not head:
                body += await self._receive()
                head, end, rest = body.partition(b"\r\n\r\n")
                head, body = (head.lower(), rest) if end else (b"", body)
            length = int(head.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0])
            while len(body) < length:
                body += await self._receive()
        except (OSError, ValueError) as fault:
            self.close()
            raise NoAnswer(repr(fault)) from fault
        except BaseException:
            self.close()
            raise
        if b"\r\nconnection: close" in head:
            self.close()
        return int(head[9:12]), head, body

    async def _connect(self, port: int) -> None:
        connection = trio.socket.socket()
        try:
            await connection.connect(("127.0.0.1", port))
        except OSError as fault:
            connection.close()
            raise NotSent(repr(fault)) from fault
        except BaseException:
            connection.close()
            raise
        self._socket, self._port = connection, port

    async def _receive(self) -> bytes:
        assert self._socket is not None
        received = await self._socket.recv(65_536)
        if not received:
            raise ConnectionResetError("closed before the answer")
        return received


class Crowd:
    """Shoppers before one engine or several: `ports` may change while they shop."""

    def __init__(self, recorder: Recorder, ports: Sequence[int], rng: random.Random, *, shoppers: int = 32) -> None:
        self.recorder = recorder
        self.ports = list(ports)
        self.drops: list[str] = []  # those that are asked for
        self.founded: list[str] = []  # all that were made, as far as we were told
        self.is_over = False
        self.unexpected: list[str] = []
        self.longest_s = 0.0  # that somebody waited for an answer which came
        self.name = rng.getrandbits(64)  # of its users: another crowd has others
        self._seeds = random.Random(rng.getrandbits(64))
        self._shoppers = [Shopper(self, index, self._seed()) for index in range(shoppers)]
        self._waiting: list[tuple[int, trio.Event]] = []

    async def run(self, *, until: trio.Event) -> None:
        """Shop until the event; returns when each has heard the answer to what it asked last."""
        async with trio.open_nursery() as nursery:
            for shopper in self._shoppers:
                nursery.start_soon(shopper.shop)
            nursery.start_soon(self._found)
            await until.wait()
            self.is_over = True

    async def serves(self, since: int) -> int:
        """When the first change was answered with yes that was asked at `since` or later (both µs of the history)."""
        served = trio.Event()
        self._waiting.append((since, served))
        await served.wait()
        return now()

    async def found(self, total_stock: int, *, shopper: int = 0) -> str | None:
        """Make a drop, however often that must be asked for; its id, or None where it was asked for long enough."""
        founder = Shopper(self, shopper, self._seed())
        try:
            operation = await founder.ask(Kind.CREATE, "", key=founder.new_key(), total_stock=total_stock, insists=True)
        finally:
            founder.close()
        if operation.ending is not Ending.OK:
            return None
        self.drops = [*self.drops, operation.drop_id][-DROPS_MAX:]
        self.founded.append(operation.drop_id)
        return operation.drop_id

    def heard(self, operation: Operation) -> None:
        """An answer came."""
        assert operation.ended is not None
        self.longest_s = max(self.longest_s, (operation.ended - operation.began) / 1e6)
        if operation.ending is not Ending.OK or operation.kind not in CHANGES or operation.is_replayed:
            return
        for waiting in list(self._waiting):
            since, served = waiting
            if operation.began >= since:
                self._waiting.remove(waiting)
                served.set()

    async def _found(self) -> None:
        while not self.is_over:
            await trio.sleep(FOUND_EVERY_S)
            # Few units, so that they run out, and come back by expiry while others wait for them.
            stock = self._seeds.choice((3, 10, 30, 10_000, 100_000))
            with trio.move_on_after(PATIENCE_S):
                await self.found(stock, shopper=self._seeds.randrange(len(self.ports)))

    def _seed(self) -> random.Random:
        return random.Random(self._seeds.getrandbits(64))


class Shopper:
    """One at a time of a few users, each of whom another shopper may be, too."""

    def __init__(self, crowd: Crowd, index: int, rng: random.Random) -> None:
        self._crowd = crowd
        self._index = index
        self._rng = rng
        self._line, self._other_line = Line(), Line()
        # Pairs of shoppers share their users: two devices, one person.
        people = random.Random(f"{crowd.name} {index // 2}")
        self._users = [str(uuid.UUID(int=people.getrandbits(128), version=4)) for _ in range(USERS_EACH)]

    def new_key(self) -> str:
        return f"{self._rng.getrandbits(96):024x}"

    def close(self) -> None:
        self._line.close()
        self._other_line.close()

    async def shop(self) -> None:
        crowd, rng = self._crowd, self._rng
        try:
            while not crowd.is_over:
                user_id, drop_id = rng.choice(self._users), rng.choice(crowd.drops)
                if rng.random() < LOOK:
                    await self.ask(Kind.SHOW, drop_id, user_id)
                key = self.new_key() if rng.random() < WITH_KEY else None
                held = await self.ask(Kind.RESERVE, drop_id, user_id, key=key)
                if held.ending is not Ending.REFUSED:
                    await self._go_on(held)
        finally:
            self.close()

    async def _go_on(self, held: Operation) -> None:
        rng = self._rng
        if rng.random() < 0.3:
            await trio.sleep(rng.uniform(0, 0.2))
        wish = rng.random()
        if wish < BUY:
            key = self.new_key() if rng.random() < WITH_KEY else None
            await self.ask(Kind.PURCHASE, held.drop_id, held.user_id, key=key)
        elif wish < BUY + GIVE_BACK and held.reservation_id is not None:
            await self.ask(Kind.CANCEL, held.drop_id, held.user_id, reservation_id=held.reservation_id)

    async def ask(
        self,
        kind: Kind,
        drop_id: str,
        user_id: str = "",
        *,
        key: str | None = None,
        reservation_id: str | None = None,
        total_stock: int | None = None,
        insists: bool = False,
    ) -> Operation:
        """Ask, and under a key, where it is worth it or insisted on, until it is decided."""
        rng, user_id = self._rng, user_id or self._users[0]

        async def once(line: Line) -> Operation:
            operation = self._crowd.recorder.begin(
                kind, user_id, drop_id, key=key, reservation_id=reservation_id, total_stock=total_stock
            )
            await self._send(line, operation)
            return operation

        async with trio.open_nursery() as nursery:
            if key is not None and rng.random() < ASK_TWICE:
                nursery.start_soon(once, self._other_line)
            operation = await once(self._line)
        if key is None or (not insists and rng.random() < GIVE_UP):
            return operation
        for _ in range(RETRIES_MAX):
            is_open = operation.ending is Ending.UNKNOWN or (insists and is_fault(operation))
            if not is_open:
                break
            if insists:
                self._index += 1  # where there are several engines, another may own the drop
            operation = await once(self._line)
        if rng.random() < ASK_AGAIN:
            await once(self._line)
        return operation

    async def _send(self, line: Line, operation: Operation) -> None:
        crowd = self._crowd
        port = crowd.ports[self._index % len(crowd.ports)]
        try:
            status, head, body = await line.ask(port, request_of(operation))
        except NotSent:
            crowd.recorder.not_sent(operation)
        except NoAnswer as fault:  # it stays in the book as it is
            if isinstance(fault, Hung):
                crowd.unexpected.append(f"I18: {operation.kind}: {fault}")
        else:
            try:
                is_replayed = b"\r\nidempotency-replayed: true" in head
                crowd.recorder.answered(operation, status, body, is_replayed=is_replayed)
            except msgspec.DecodeError as fault:
                crowd.unexpected.append(f"{operation.kind} {status}: {fault}: {body[:300]!r}")
                return
            if status not in STATUSES or (status == 503 and b"\r\nretry-after:" not in head):
                crowd.unexpected.append(f"{operation.kind} {status}: {body[:300]!r}")
            crowd.heard(operation)
        if operation.code == NOT_SENT:
            await trio.sleep(AWAY_S)
        elif is_fault(operation) or operation.ending is Ending.UNKNOWN:
            await trio.sleep(BREATH_S)


DECIDED: Final = frozenset(
    {
        "DROP_NOT_FOUND",
        "DROP_NOT_ACTIVE",
        "OUT_OF_STOCK",
        "ALREADY_RESERVED",
        "RESERVATION_REQUIRED",
        "RESERVATION_EXPIRED",
        "RESERVATION_NOT_ACTIVE",
        "RESERVATION_NOT_FOUND",
        "ALREADY_PURCHASED",
    }
)


def is_fault(operation: Operation) -> bool:
    """Whether it is certain that nothing was decided: another try may end otherwise."""
    return operation.ending is Ending.REFUSED and (operation.code == NOT_SENT or operation.code not in DECIDED)


def request_of(operation: Operation) -> bytes:
    match operation.kind:
        case Kind.CREATE:
            line, body = "POST /api/v1/drops", _new_drop(operation)
        case Kind.SHOW:
            line, body = f"GET /api/v1/drops/{operation.drop_id}", b""
        case Kind.CANCEL:
            line, body = f"DELETE /api/v1/reservations/{operation.reservation_id}/cancel", b""
        case _:
            line, body = f"POST /api/v1/drops/{operation.drop_id}/{operation.kind}", b""
    head = f"{line} HTTP/1.1\r\nHost: 127.0.0.1\r\nX-User-Id: {operation.user_id}\r\nContent-Length: {len(body)}\r\n"
    if body:
        head += "Content-Type: application/json\r\n"
    if operation.key is not None:
        head += f"Idempotency-Key: {operation.key}\r\n"
    return f"{head}\r\n".encode() + body


def _new_drop(operation: Operation) -> bytes:
    wanted = {"name": "Air One", "price": 12_000, "total_stock": operation.total_stock, "status": "live"}
    return msgspec.json.encode(wanted)
