"""Socket.IO 4 for the pages of the earlier systems: what a client may say on its session, and what it hears.

A client that connects to `/` hears of all drops, each event in both vocabularies. What it may ask, with an
acknowledgement if it wants one:

    drops:join  {dropId}     from the first one on it hears of the drops that it joined, and of no other
    drops:leave {dropId}     and of this one no more; of a drop that it has not joined: nothing to do
    acknowledged with        {ok: true}, or {ok: false, error: {code, message, details?}} as in the API's error bodies

Joining shows nothing by itself, as in a Node room: it misses no event and repeats none. Other events are not known
here: acknowledged as such, else ignored. Other namespaces are refused, and the connection stays.

Of a drop's stock a pass of the hub tells the newest, and of its activity the newest when a pass has many. A client that
took nothing for long hears the current stock and activity instead of what it missed.
"""

import secrets
from collections.abc import Callable
from typing import Any, Final

import msgspec
from engineio import packet as wire
from engineio.packet import Packet as Outer
from socketio import packet as inner
from socketio.packet import Packet

from api import errors, feed, handlers, schemas
from api.engineio import EngineIo, Session, Violation
from api.errors import ApiError, explained
from api.feed import Message
from api.handlers import Gate, Service
from api.promises import in_trio
from api.settings import Settings
from api.viewers import frame
from engine.drop import Drop
from engine.hub import Direct, News, Watch
from engine.model import DropId, UserId

DROPS_MAX: Final = 1_000  # that a client may join
ATTACHMENTS_MAX: Final = 10  # of one message; as in socket.io-parser
ACTIVITIES_MAX: Final = 20  # of one drop and one pass; each shows three purchases, so the last shows all that is shown
CONNECT_S: Final = 45.0  # that a session may be without a namespace, as in every Socket.IO server
TRY_AGAIN_LATER: Final = 1013

NAMES: Final = {  # beside the upper-case names, which all events have
    "STOCK_UPDATED": "drop:stock_updated",
    "ACTIVITY_UPDATED": "drop:activity_updated",
}
TOLD_TO_ALL: Final = ("RESERVATION_EXPIRED",)  # whomever it concerns: so did the earlier systems


class _Json:
    """What python-socketio codes with: faster than its own, and stricter."""

    @staticmethod
    def dumps(data: object, **_: object) -> str:
        return msgspec.json.encode(data).decode()

    @staticmethod
    def loads(text: str) -> Any:
        return msgspec.json.decode(text)


class _Packet(Packet):  # type: ignore[misc]  # the library has no types
    json = _Json


class Dialect:
    """How such a client is told. `wrap` makes a packet ready for its transport."""

    def __init__(self, wrap: Callable[[bytes], bytes]) -> None:
        self._wrap = wrap

    def news(self, news: News, user_id: UserId | None) -> bytes:
        told = [
            message
            for message in feed.messages(news)
            if message.only_for is None or message.only_for == user_id or message.name in TOLD_TO_ALL
        ]
        activities = [message for message in told if message.name == "ACTIVITY_UPDATED"]
        if len(activities) > ACTIVITIES_MAX:
            told = [message for message in told if message.name != "ACTIVITY_UPDATED" or message is activities[-1]]
        return b"".join(map(self._told, told))

    def snapshot(self, drop: Drop) -> bytes:
        stock = feed.stock_updated(drop, drop.seq, drop.terms.created_at, drop.available)
        latest = feed.activity(drop.terms.id, drop.latest_purchases)
        return self._told(stock) + self._told(Message("ACTIVITY_UPDATED", drop.seq, drop.terms.created_at, latest))

    def _told(self, message: Message) -> bytes:
        old = NAMES.get(message.name)
        names = (message.name,) if old is None else (old, message.name)
        return b"".join(
            self._wrap(_outer(_Packet(inner.EVENT, [name, message.data], binary=False)).encode().encode())
            for name in names
        )


def _outer(packet: Packet) -> Outer:
    return Outer(wire.MESSAGE, packet.encode())


IN_FRAMES: Final = Dialect(frame)
FOR_POLLS: Final = Dialect(lambda packet: packet + b"\x1e")


class Client:
    """One session's talk, and the hub's viewer while it is connected to `/`."""

    def __init__(self, session: Session, service: Service) -> None:
        self.dialect = FOR_POLLS
        self.send = session.send
        self.keep = session.keep
        self._session = session
        self._service = service
        self._watch: Watch | None = None  # while it is connected
        self._pending: Packet | None = None  # a message whose attachments are on their way
        self._missing = 0  # of them
        session.end_within(CONNECT_S)

    # From below --------------------------------------------------------------------------------------

    def moved(self) -> None:
        self.dialect = IN_FRAMES

    def has_room(self) -> None:
        if self._watch is not None:
            self._watch.drained()

    def hindered(self) -> None:
        if self._watch is not None:
            self._watch.hinder()

    def ended(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    @property
    def direct(self) -> Direct | None:
        return self._session.direct

    def send_away(self) -> None:
        self._session.close(TRY_AGAIN_LATER, "You read too slowly.")

    async def heard(self, message: str | bytes) -> None:
        if isinstance(message, bytes):
            if self._pending is None:
                raise Violation("An attachment of nothing.")
            self._missing -= 1  # what is in it means nothing here
            if self._missing == 0:
                packet, self._pending = self._pending, None
                await self._do(packet)
            return
        if self._pending is not None:
            raise Violation("An attachment was to follow.")
        packet = _packet(message)
        if packet.attachment_count:
            self._pending, self._missing = packet, packet.attachment_count
        else:
            await self._do(packet)

    # What it says ------------------------------------------------------------------------------------

    async def _do(self, packet: Packet) -> None:
        name = packet.namespace or "/"
        match packet.packet_type:
            case inner.CONNECT if name != "/":
                self._say(_Packet(inner.CONNECT_ERROR, {"message": "Invalid namespace"}, namespace=name))
            case inner.CONNECT if self._watch is None:
                self._connect()
            case inner.DISCONNECT:
                if name == "/" and self._watch is not None:
                    self.ended()
                    self._session.end_within(CONNECT_S)
            case inner.EVENT | inner.BINARY_EVENT if name == "/" and self._watch is not None:
                await self._hear_event(packet, self._watch)
            case inner.ACK | inner.BINARY_ACK if name == "/" and self._watch is not None:
                pass  # we ask for none
            case _:
                raise Violation("There is no such namespace on this session.")

    def _connect(self) -> None:
        self._session.end_within(None)
        self._watch = self._service.hub.watch(self)
        self._say(_Packet(inner.CONNECT, {"sid": secrets.token_urlsafe(15)}))
        self._watch.subscribe_all(is_shown=False)

    async def _hear_event(self, packet: Packet, watch: Watch) -> None:
        if not isinstance(packet.data, list) or not packet.data or not isinstance(packet.data[0], str):
            raise Violation("This is no event.")
        try:
            await self._obey(watch, packet.data[0], packet.data[1:])
            answer: dict[str, Any] = {"ok": True}
        except Exception as failure:  # noqa: BLE001 - explained to whom it concerns, and logged there
            answer = {"ok": False, "error": errors.to_dict(explained(failure))}
        if packet.id is not None:
            self._say(_Packet(inner.ACK, [answer], id=packet.id))

    async def _obey(self, watch: Watch, name: str, arguments: list[Any]) -> None:
        match name:
            case "drops:join":
                await self._join(watch, _drop_id(arguments))
            case "drops:leave":
                drop_id = _drop_id(arguments)
                await self._service.hub.until_told(watch, drop_id)
                watch.unsubscribe([drop_id])
            case _:
                raise ApiError(404, "UNKNOWN_EVENT", "There is no such event here.")

    async def _join(self, watch: Watch, drop_id: DropId) -> None:
        if drop_id not in watch.drops and len(watch.drops) >= DROPS_MAX:
            raise ApiError(422, "TOO_MANY_DROPS", f"No more than {DROPS_MAX} drops; who joins none hears all.")
        await in_trio(handlers.find_drop(self._service, drop_id))
        await self._service.hub.until_told(watch, drop_id)
        if not watch.is_closed:
            watch.join(drop_id)

    def _say(self, packet: Packet) -> None:
        self._session.write(_outer(packet))


def _packet(message: str) -> Packet:
    try:
        message.encode()  # half a surrogate pair cannot be sent back; JSON, which python-engineio reads, can name it
        packet = _Packet(encoded_packet=message)
    except (ValueError, TypeError, RecursionError, msgspec.DecodeError):
        raise Violation("This is no message.") from None
    may_be_binary = packet.packet_type in (inner.BINARY_EVENT, inner.BINARY_ACK)
    if not message or packet.attachment_count > (ATTACHMENTS_MAX if may_be_binary else 0):
        raise Violation("This is no message.")
    return packet


def _drop_id(arguments: list[Any]) -> DropId:
    wanted = arguments[0] if arguments else None
    text = wanted.get("dropId") if isinstance(wanted, dict) else None
    return DropId(schemas.path_id("dropId", text if isinstance(text, str) else ""))


class SocketIo(EngineIo):
    """All such clients."""

    def __init__(self, settings: Settings, gate: Gate) -> None:
        super().__init__(settings, gate, Client)
