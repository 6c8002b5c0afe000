"""Answers, held to the contract after the window: each by itself, and all of them together.

A 201 must be whole, name the drop and the user that were asked for, a reservation that nobody got before, and a stock
that can be: below the drop's total, not lower than what was asked of it so far. A refusal must be the one that the
scenario expects. 429 and 503 are honest answers of a server that has too much to do: they are counted, they are not
done, and they are not wrong. Of a key's answers all must be the same bytes, and all but one a replay.
"""

import base64
import uuid
from collections import Counter
from collections.abc import Iterable
from datetime import datetime

import msgspec

from tests.bench.results import FAILURES_SHOWN_MAX

OVERLOAD = (429, 503)


class Reservation(msgspec.Struct):
    id: str
    drop_id: str
    user_id: str
    status: str
    expires_at: str
    created_at: str


class Stock(msgspec.Struct):
    id: str
    available_stock: int


class Reserved(msgspec.Struct):
    reservation: Reservation
    drop: Stock


class Purchase(msgspec.Struct):
    id: str
    drop_id: str
    user_id: str
    reservation_id: str
    qty: int
    status: str
    created_at: str


class Consumed(msgspec.Struct):
    id: str
    status: str


class Purchased(msgspec.Struct):
    purchase: Purchase
    reservation: Consumed


class Cancelled(msgspec.Struct):
    reservationId: str
    dropId: str
    availableStock: int
    status: str


class Refusal(msgspec.Struct):
    code: str
    message: str


class ReservedBody(msgspec.Struct):
    success: bool
    data: Reserved


class PurchasedBody(msgspec.Struct):
    success: bool
    data: Purchased


class CancelledBody(msgspec.Struct):
    success: bool
    data: Cancelled


class RefusedBody(msgspec.Struct):
    success: bool
    error: Refusal


class Wrong(Exception):
    """The answer is not what the contract says; its text says why."""


_reserved = msgspec.json.Decoder(ReservedBody).decode
_purchased = msgspec.json.Decoder(PurchasedBody).decode
_cancelled = msgspec.json.Decoder(CancelledBody).decode
_refused = msgspec.json.Decoder(RefusedBody).decode


class Request:
    """What was asked, read back from the bytes that were sent."""

    __slots__ = ("drop_id", "key", "operation", "user_id")

    def __init__(self, sent: bytes) -> None:
        head = sent.decode()
        segments = head.split(" ", 2)[1].split("/")
        self.operation = segments[-1]
        self.drop_id = segments[-2] if len(segments) > 1 else ""
        self.user_id = _header(head, "X-User-Id")
        self.key = _header(head, "Idempotency-Key")


class Checker:
    """Judges the answers of one generator, in the order in which they came.

    `expected` are the names of the answers that may come, as in `Load.answers`; `total_stock` is that of each drop.
    """

    def __init__(self, expected: tuple[str, ...], total_stock: int) -> None:
        self._expected = expected
        self._total_stock = total_stock
        self.checked: Counter[str] = Counter()
        self.failures: list[str] = []
        self.failed = 0
        self.answers: Counter[str] = Counter()
        self.hold_s: float | None = None  # how long the first hold lasts
        self._holds: dict[str, tuple[str, str]] = {}  # reservation → (user, drop)
        self._held: dict[tuple[str, str], str] = {}  # (user, drop) → reservation
        self._purchases: set[str] = set()
        self._first: dict[tuple[str, str], bytes] = {}  # (user, key) → the body that was not a replay
        self._replays: list[tuple[Request, bytes]] = []
        # Of the answer that was judged last: what it said of the drop's stock, and the hold that it made.
        self.available: int | None = None
        self.hold: Reservation | None = None

    def check(self, sent: bytes, received: bytes) -> str:
        """Judge one answer; its name, as in `Load.answers`: "201", "409 OUT_OF_STOCK", …"""
        request = Request(sent)
        self.available = self.hold = None
        try:
            name = self._judge(request, received)
        except (Wrong, msgspec.DecodeError, ValueError) as fault:
            self.fail(f"{request.operation} of {request.user_id or 'nobody'}: {fault}")
            name = f"{received[9:12].decode('latin-1')} wrong"
        self.answers[name] += 1
        return name

    def fail(self, sentence: str) -> None:
        self.failed += 1
        if len(self.failures) < FAILURES_SHOWN_MAX:
            self.failures.append(sentence)

    def finish(self) -> None:
        """What can be said of all answers together only."""
        for request, body in self._replays:
            first = self._first.get((request.user_id, request.key))
            if first is None:
                self.fail(f"key {request.key}: only replays, and no first answer")
            elif first != body:
                self.fail(f"key {request.key}: the replay is not the first answer byte for byte")
            else:
                self.checked["replays are the first answer"] += 1

    @property
    def reservation_ids(self) -> str:
        return base64.b64encode(b"".join(uuid.UUID(id_).bytes for id_ in self._holds)).decode()

    def _judge(self, request: Request, received: bytes) -> str:
        status, headers, body = split(received)
        self.checked["whole"] += 1
        if status == 201:
            if request.key and "idempotency-replayed: true" in headers:
                self._replays.append((request, body))
            else:
                self._take(request, body)
            name = "201"
        elif status == 200 and request.operation == "cancel":
            self._take_cancel(request, _cancelled(body).data)
            name = "200"
        else:
            refused = _refused(body)
            if refused.success:
                raise Wrong(f"{status} says success")
            self.checked["refusals say why"] += 1
            name = f"{status} {refused.error.code}"
        if status not in OVERLOAD and name not in self._expected:
            raise Wrong(f"{name}, where {' or '.join(self._expected)} was expected")
        return name

    def _take(self, request: Request, body: bytes) -> None:
        if request.key:
            if (request.user_id, request.key) in self._first:
                raise Wrong(f"key {request.key} had two effects")
            self._first[request.user_id, request.key] = body
        if request.operation == "purchase":
            self._take_purchase(request, _purchased(body).data)
        else:
            self._take_hold(request, _reserved(body).data)

    def _take_hold(self, request: Request, made: Reserved) -> None:
        hold = made.reservation
        if (hold.drop_id, made.drop.id) != (request.drop_id, request.drop_id):
            raise Wrong(f"the answer names drop {hold.drop_id} / {made.drop.id}, not {request.drop_id}")
        if hold.user_id != request.user_id:
            raise Wrong(f"the answer names user {hold.user_id}")
        if hold.status != "active" or not hold.created_at < hold.expires_at:
            raise Wrong(f"the hold is {hold.status}, from {hold.created_at} to {hold.expires_at}")
        if hold.id in self._holds:
            raise Wrong(f"reservation {hold.id} was given before")
        if (request.user_id, request.drop_id) in self._held:
            raise Wrong("a second active reservation of the same drop")
        if not 0 <= made.drop.available_stock < self._total_stock:
            raise Wrong(f"{made.drop.available_stock} units available of {self._total_stock}, after one was taken")
        uuid.UUID(hold.id)
        self._holds[hold.id] = (request.user_id, request.drop_id)
        self._held[request.user_id, request.drop_id] = hold.id
        self.available, self.hold = made.drop.available_stock, hold
        if self.hold_s is None:
            lasts = datetime.fromisoformat(hold.expires_at) - datetime.fromisoformat(hold.created_at)
            self.hold_s = lasts.total_seconds()
        self.checked["holds name drop and user, and are new"] += 1

    def _take_purchase(self, request: Request, made: Purchased) -> None:
        bought = made.purchase
        held = self._held.get((request.user_id, request.drop_id))
        if held is None:
            raise Wrong("a purchase without a hold")
        if (bought.drop_id, bought.user_id) != (request.drop_id, request.user_id):
            raise Wrong(f"the answer names drop {bought.drop_id} and user {bought.user_id}")
        if not bought.reservation_id == made.reservation.id == held:
            raise Wrong(f"reservation {bought.reservation_id} was bought, {held} was held")
        if (bought.status, made.reservation.status, bought.qty) != ("paid", "consumed", 1):
            raise Wrong(f"the purchase is {bought.status}, its reservation {made.reservation.status}")
        if bought.id in self._purchases:
            raise Wrong(f"purchase {bought.id} was made before")
        self._purchases.add(bought.id)
        self.checked["purchases name what was held"] += 1

    def _take_cancel(self, request: Request, made: Cancelled) -> None:
        user_id, drop_id = self._holds.get(made.reservationId, ("", ""))
        if made.status != "cancelled" or (user_id, drop_id) != (request.user_id, made.dropId):
            raise Wrong(f"reservation {made.reservationId} of drop {made.dropId} is {made.status}")
        if not 0 < made.availableStock <= self._total_stock:
            raise Wrong(f"{made.availableStock} units available of {self._total_stock}, after one came back")
        self.available = made.availableStock
        self.checked["cancellations name what was held"] += 1


def split(received: bytes) -> tuple[int, str, bytes]:
    """Status, head in lower case, and body of one whole answer.

    Raises:
        Wrong: it is none, or its length is not the one that it states.
    """
    head, end, body = received.partition(b"\r\n\r\n")
    if not end or head[:9] != b"HTTP/1.1 " or not head[9:12].isdigit():
        raise Wrong(f"no HTTP answer: {received[:60]!r}")
    text = head.decode("latin-1").lower()
    if "\r\ntransfer-encoding: chunked" in text:
        body = b"".join(_chunks(body))
    elif len(body) != (length := int(_header(text, "content-length") or -1)):
        raise Wrong(f"the body has {len(body)} bytes, not {length}")
    return int(head[9:12]), text, body


def _header(head: str, name: str) -> str:
    _, found, rest = head.partition(f"\r\n{name}: ")
    return rest.partition("\r\n")[0] if found else ""


def _chunks(body: bytes) -> Iterable[bytes]:
    while True:
        size, _, body = body.partition(b"\r\n")
        length = int(size.partition(b";")[0], 16)
        if length == 0:
            return
        yield body[:length]
        body = body[length + 2 :]
