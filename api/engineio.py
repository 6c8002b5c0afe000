"""Engine.IO 4: sessions over long-polling, over WebSocket, and over the first until the second is there.

What travels is coded and decoded by python-engineio's packet classes; its server wants asyncio, so sessions are ours.

    GET  ?transport=polling               a session: `0{"sid": …}`
    GET  ?transport=polling&sid=…         waits until there is something to say; the server's stop ends it, too
    POST ?transport=polling&sid=…         what the client says
    WebSocket ?transport=websocket        a session from the start
    WebSocket ?transport=websocket&sid=…  `2probe`, `3probe`, then `5`: the session moves here, with all that waits

A session is sent to in the coding of the transport that it is on: WebSocket frames, or packets for polls, each with a
separator behind it. The bytes of the hub's news are kept by reference, whoever they wait for.

What one client can make us keep is bounded: a queue between two polls, a message, a body, a rate, and one poll at a
time. A client that does not answer pings, 45 s at most, is forgotten; so is one that polls no more.
"""

import math
import secrets
from collections.abc import Callable, Mapping
from enum import IntEnum
from json import dumps
from typing import Final, Protocol
from urllib.parse import parse_qsl

import trio
from engineio import packet as wire
from engineio.packet import Packet
from engineio.payload import Payload
from quart import Response, request
from quart_trio import QuartTrio
from trio_websocket import ConnectionClosed, HandshakeError, WebSocketConnection

from api import errors, opening
from api.answers import JSON
from api.errors import ApiError
from api.handlers import Gate, Service
from api.opening import Opening
from api.settings import Settings
from api.viewers import ViewerStream, frame
from engine.model import FaultCode

PATH: Final = "/socket.io/"
PATHS: Final = (PATH, "/socket.io")
TEXT: Final = "text/plain; charset=UTF-8"
SEPARATOR: Final = b"\x1e"  # between packets; JSON has no such character

PING_S: Final = 25.0  # between two pings, as in every Socket.IO server
PONG_S: Final = 20.0  # that an answer to one may take
MESSAGE_MAX: Final = 16_384  # bytes of a client's message, and of a body with several
PACKETS_MAX: Final = 1_000  # in one body
QUEUE_MAX: Final = 32_768  # bytes that wait for a poll before the hub is told to wait; one send may go beyond
REPLIES_MAX: Final = 65_536  # bytes that wait for a poll before a client that asks and does not listen is cut off
CHUNK: Final = 65_536  # bytes of news that a stream gets at once: half of what it may keep
# Between two answers with news to one client: a poll is a whole request of the cold lane, and with each pass of the hub
# every client would come for one.
GAP_S: Final = 0.2
MESSAGES_PER_S: Final = 20.0  # of a client, in the long run
MESSAGES_AT_ONCE: Final = 1_200.0  # a page joins each of up to 1,000 drops with one
HANDSHAKE_S: Final = 10.0
UPGRADE_S: Final = 10.0  # between a probe and its end
CLOSE_S: Final = 2.0  # that a client may take to answer our close
SWEEP_S: Final = 1.0
SWEEP_SLICE: Final = 500  # sessions looked at before other tasks get their turn

NORMAL: Final = 1000
GOING_AWAY: Final = 1001
POLICY: Final = 1008


class Code(IntEnum):
    """Why Engine.IO refuses a request; clients know these numbers."""

    TRANSPORT_UNKNOWN = 0
    UNKNOWN_SID = 1
    BAD_HANDSHAKE_METHOD = 2
    BAD_REQUEST = 3
    FORBIDDEN = 4
    UNSUPPORTED_PROTOCOL_VERSION = 5


MESSAGES: Final = {
    Code.TRANSPORT_UNKNOWN: "Transport unknown",
    Code.UNKNOWN_SID: "Session ID unknown",
    Code.BAD_HANDSHAKE_METHOD: "Bad handshake method",
    Code.BAD_REQUEST: "Bad request",
    Code.FORBIDDEN: "Forbidden",
    Code.UNSUPPORTED_PROTOCOL_VERSION: "Unsupported protocol version",
}


class Refused(Exception):
    """A request that Engine.IO does not take."""

    def __init__(self, code: Code, status_code: int = 400) -> None:
        super().__init__(MESSAGES[code])
        self.status_code = 403 if code is Code.FORBIDDEN else status_code
        self.body = dumps({"code": code, "message": MESSAGES[code]}, separators=(",", ":"))


class Violation(Exception):
    """A client said what this protocol has no meaning for, or too much: its session ends."""


class Talk(Protocol):
    """What goes on over one session, one floor up."""

    async def heard(self, message: str | bytes) -> None:
        """
        Raises:
            Violation: this is no talk.
        """
        ...

    def moved(self) -> None:
        """The session is on a WebSocket now; what is sent from here on is coded in frames."""
        ...

    def has_room(self) -> None:
        """All that was sent has left."""
        ...

    def hindered(self) -> None:
        """Something has not; or nothing more can be sent."""
        ...

    def ended(self) -> None: ...


class _Payload(Payload):  # type: ignore[misc]  # the library has no types
    max_decode_packets = PACKETS_MAX


class Session:
    """One client. On polling until it has a `_stream`."""

    def __init__(self, sessions: "EngineIo") -> None:
        self.sid = secrets.token_urlsafe(15)
        self.talk: Talk
        self.is_closed = False
        self.is_upgrading = False  # a WebSocket is on its way
        self._is_probed = False  # no poll shall wait any more: the client moves once it has none
        self._is_polling = False
        self._is_posting = False
        self._sessions = sessions
        self._queue: list[bytes] = []
        self._queued = 0
        self._is_urgent = False  # more than news waits for a poll
        self._answered_at = -math.inf  # the last poll
        self._wake = trio.Event()
        self._stream: ViewerStream | None = None
        self._socket: WebSocketConnection | None = None
        self._nursery: trio.Nursery | None = None
        self._goodbye = trio.Event()
        self._rest = b""  # of a large send: whole frames that the stream has not got yet
        self._rest_at = 0
        self._allowance = MESSAGES_AT_ONCE
        self._heard_at = trio.current_time()
        self._ping_at = self._heard_at + PING_S
        self._pong_by: float | None = None
        self._end_by: float | None = None

    @property
    def is_on_websocket(self) -> bool:
        return self._stream is not None

    @property
    def transport(self) -> str:
        return "polling" if self._stream is None else "websocket"

    # To the client -----------------------------------------------------------------------------------

    def send(self, data: bytes) -> bool:
        """Send packets in the coding of the transport; False: it has no room, and calls `Talk.has_room` once it has."""
        if self.is_closed:
            return True  # nobody is there to hear it
        if self._stream is None:
            if self._queue and self._queued + len(data) > QUEUE_MAX:
                return False
            self._enqueue(data)
            return True
        if self._rest:
            return False
        if len(data) <= CHUNK:
            return self._stream.send(data)
        self._push(self._stream, data, 0)
        if self._rest and self._rest_at == 0:
            self._rest = b""
            return False
        return True

    @property
    def direct(self) -> Callable[[bytes], int] | None:
        """As a stream's; while it is on one with nothing left to send. Then `Talk.hindered` says when that is over."""
        return None if self._stream is None or self._rest or self.is_closed else self._stream.direct

    def keep(self, rest: bytes) -> None:
        """As a stream's."""
        assert self._stream is not None
        self._stream.keep(rest)

    def write(self, packet: Packet) -> None:
        """Send one packet in any case, behind what waits. A client that does not listen is cut off."""
        if self.is_closed:
            return
        data = packet.encode().encode()
        if self._stream is not None:
            self._stream.write(frame(data))
        elif self._queued > REPLIES_MAX:
            self.close()
        else:
            self._is_urgent = True
            self._enqueue(data + SEPARATOR)

    def _enqueue(self, data: bytes) -> None:
        self._queue.append(data)
        self._queued += len(data)
        self._wake.set()

    def _push(self, stream: ViewerStream, data: bytes, at: int) -> None:
        """Send frames from `at` on in pieces that a stream may keep; the rest waits here, by reference."""
        while at < len(data):
            end = _end_of_frames(data, at, CHUNK)
            if not stream.send(data[at:end]):
                self._rest, self._rest_at = data, at
                return
            at = end
        self._rest = b""

    def _drained(self) -> None:
        """Nothing is left in the stream."""
        if self._stream is not None:
            self._push(self._stream, self._rest, self._rest_at)
        if not self._rest and not self.is_closed:
            self.talk.has_room()

    # From the client ---------------------------------------------------------------------------------

    async def heard(self, packet: Packet) -> None:
        """
        Raises:
            Violation: end it.
        """
        if self.is_closed:
            return
        now = trio.current_time()
        self._allowance = min(MESSAGES_AT_ONCE, self._allowance + (now - self._heard_at) * MESSAGES_PER_S) - 1
        self._heard_at = now
        if self._allowance < 0:
            raise Violation("Too many messages.")
        match packet.packet_type:
            case wire.MESSAGE:
                if not isinstance(packet.data, (str, bytes)):
                    raise Violation("This is no message.")  # JSON, which the library reads as such
                await self.talk.heard(packet.data)
            case wire.PONG:
                self._pong_by = None
                self._ping_at = now + PING_S
            case wire.CLOSE:
                self.close()
            case wire.OPEN | wire.UPGRADE | wire.NOOP:
                pass  # it means nothing here, and does no harm
            case _:
                raise Violation("This is no packet for a server.")

    def end_within(self, seconds: float | None) -> None:
        """End it then, unless this is taken back with None."""
        self._end_by = None if seconds is None else trio.current_time() + seconds

    def beat(self, now: float) -> None:
        """Ask whether it is there; end it if it did not say so in time."""
        if (self._pong_by is not None and now > self._pong_by) or (self._end_by is not None and now > self._end_by):
            self.close()
        elif self._pong_by is None and now >= self._ping_at:
            self._pong_by = now + PONG_S
            self.write(Packet(wire.PING))

    # Polling -----------------------------------------------------------------------------------------

    async def poll(self) -> bytes:
        """The answer to a poll, which has at least one packet.

        Raises:
            Refused: another one waits already. The session has ended: what one of them got, the other lacks.
        """
        if self._is_polling:
            self.close()
            raise Refused(Code.BAD_REQUEST)
        self._is_polling = True
        try:
            due = self._answered_at + GAP_S
            while not (self._is_urgent or self.is_closed or self._is_probed or self._stream is not None):
                if self._queue and trio.current_time() >= due:
                    break
                self._wake = trio.Event()
                with trio.CancelScope(deadline=due if self._queue else math.inf):
                    await self._wake.wait()
        except trio.Cancelled:
            self.close()  # the client is gone, or has given up its poll: it could not tell what it missed
            raise
        finally:
            self._is_polling = False
        answer = self._taken()
        self._answered_at = trio.current_time()
        if self.is_closed:
            return answer + Packet(wire.CLOSE).encode().encode()  # type: ignore[no-any-return]
        if not self.is_on_websocket:
            self.talk.has_room()  # for the next poll
        return answer.removesuffix(SEPARATOR) or Packet(wire.NOOP).encode().encode()

    async def post(self, body: bytes) -> None:
        """Hear what a client posts.

        Raises:
            Refused: the session has ended over it.
        """
        try:
            if self._is_posting:
                raise Violation("One body at a time.")
            self._is_posting = True
            try:
                for packet in _packets(body):
                    await self.heard(packet)
            finally:
                self._is_posting = False
        except Violation:
            self.close()
            raise Refused(Code.BAD_REQUEST) from None

    def _taken(self) -> bytes:
        data, self._queue, self._queued, self._is_urgent = b"".join(self._queue), [], 0, False
        return data

    # WebSocket ---------------------------------------------------------------------------------------

    async def listen(self, socket: WebSocketConnection, stream: ViewerStream, nursery: trio.Nursery) -> None:
        """Be on this WebSocket from now on, until it or the session ends. What waited for a poll comes first."""
        waiting = b"".join(frame(packet) for packet in self._taken().split(SEPARATOR) if packet)
        self._stream, self._socket, self._nursery = stream, socket, nursery
        self._rest, self._rest_at = waiting, 0
        self._wake.set()
        self.talk.moved()
        stream.drained = self._drained
        stream.hindered = self.talk.hindered
        self._drained()
        try:
            while True:
                await self.heard(_packet(await socket.get_message()))
        except ConnectionClosed:
            pass
        except Violation as violation:
            self.close(POLICY, str(violation))
        finally:
            self.close()
        await self._goodbye.wait()

    async def probe(self, socket: WebSocketConnection, stream: ViewerStream) -> bool:
        """See whether this WebSocket works; True: the session moves to it, with no await before that."""
        if self.is_upgrading or self.is_on_websocket or self.is_closed:
            return False  # since it was admitted another one was faster, or the session has ended
        self.is_upgrading = True
        try:
            with trio.move_on_after(UPGRADE_S):
                if await socket.get_message() != "2probe":
                    return False
                stream.write(frame(b"3probe"))
                self._is_probed = True
                self._wake.set()
                return await socket.get_message() == "5" and not self.is_closed
        finally:
            self.is_upgrading = self._is_probed = False
        return False

    # The end -----------------------------------------------------------------------------------------

    def close(self, code: int = NORMAL, reason: str = "") -> None:
        """End it, whatever its transport; once."""
        if self.is_closed:
            return
        self.is_closed = True
        self._sessions.forget(self)
        self.talk.ended()
        self.talk = _OVER  # nothing holds itself: the collector comes by rarely
        self._rest = b""
        self._wake.set()
        if self._nursery is not None:
            self._nursery.start_soon(self._say_goodbye, code, reason)

    async def _say_goodbye(self, code: int, reason: str) -> None:
        assert self._socket is not None
        assert self._stream is not None
        with trio.move_on_after(CLOSE_S) as patience:
            await self._socket.aclose(code, reason or None)
        if patience.cancelled_caught:
            self._stream.cut()
        self._stream.drained = self._stream.hindered = None
        self._goodbye.set()


class _Over:
    """The talk of a session that has ended."""

    async def heard(self, message: str | bytes) -> None: ...

    def moved(self) -> None: ...

    def has_room(self) -> None: ...

    def hindered(self) -> None: ...

    def ended(self) -> None: ...


_OVER: Final = _Over()


class EngineIo:
    """All sessions. `run` it in a nursery; `talks` makes the talk of a new one."""

    def __init__(self, settings: Settings, gate: Gate, talks: Callable[[Session, Service], Talk]) -> None:
        self._settings = settings
        self._gate = gate
        self._talks = talks
        self._sessions: dict[str, Session] = {}
        self._payload_max = min(MESSAGE_MAX, settings.body_max_bytes)

    async def run(self) -> None:
        """The heartbeat of all."""
        while True:
            await trio.sleep(SWEEP_S)
            sessions = list(self._sessions.values())
            for begin in range(0, len(sessions), SWEEP_SLICE):
                now = trio.current_time()
                for session in sessions[begin : begin + SWEEP_SLICE]:
                    if not session.is_closed:
                        session.beat(now)
                await trio.lowlevel.checkpoint()

    def stop(self) -> None:
        """End all; their clients come again, each at a time of its own."""
        for session in list(self._sessions.values()):
            session.close(GOING_AWAY)

    def forget(self, session: Session) -> None:
        self._sessions.pop(session.sid, None)

    def _open(self) -> Session:
        """
        Raises:
            ApiError: 503.
        """
        service = self._enter()
        session = Session(self)
        session.talk = self._talks(session, service)
        self._sessions[session.sid] = session
        return session

    def _enter(self) -> Service:
        """
        Raises:
            ApiError: 503.
        """
        if len(self._sessions) >= self._settings.connections_max:
            raise errors.fault(FaultCode.OVERLOADED)
        return self._gate.enter()

    def _greeting(self, session: Session, upgrades: list[str]) -> Packet:
        return Packet(
            wire.OPEN,
            {
                "sid": session.sid,
                "upgrades": upgrades,
                "pingInterval": int(PING_S * 1000),
                "pingTimeout": int(PONG_S * 1000),
                "maxPayload": self._payload_max,
            },
        )

    def _checked(self, method: str, query: Mapping[str, str], *, is_upgrade: bool) -> Session | None:
        """The session that a request names, None if it asks for one.

        Raises:
            Refused: it may do neither.
        """
        transport, sid = query.get("transport"), query.get("sid")
        if transport not in ("polling", "websocket"):
            raise Refused(Code.TRANSPORT_UNKNOWN)
        if sid:
            session = self._sessions.get(sid)
            if session is None:
                raise Refused(Code.UNKNOWN_SID)
            is_taken = session.is_on_websocket or (is_upgrade and session.is_upgrading)
            if is_taken or is_upgrade != (transport == "websocket"):
                raise Refused(Code.BAD_REQUEST)
            return session
        if method != "GET":
            raise Refused(Code.BAD_HANDSHAKE_METHOD)
        if is_upgrade != (transport == "websocket"):
            raise Refused(Code.BAD_REQUEST)
        if query.get("EIO") != "4":
            raise Refused(Code.UNSUPPORTED_PROTOCOL_VERSION)
        return None

    # Requests, from the cold lane --------------------------------------------------------------------

    def register(self, app: QuartTrio) -> None:
        app.add_url_rule(PATH, PATH, self._polled, methods=["GET", "POST"])

    async def _polled(self) -> Response:
        body = await request.get_data(cache=True, as_text=False, parse_form_data=False)
        try:
            said = await self._answer(request.method, request.args, body)
        except Refused as refusal:
            return Response(refusal.body, refusal.status_code, content_type=JSON)
        return Response(said, 200, content_type=TEXT)

    async def _answer(self, method: str, query: Mapping[str, str], body: bytes) -> bytes:
        session = self._checked(method, query, is_upgrade=False)
        if session is None:
            new = self._open()
            return self._greeting(new, ["websocket"]).encode().encode()  # type: ignore[no-any-return]
        if method == "GET":
            return await session.poll()
        if method != "POST":
            raise Refused(Code.BAD_REQUEST)  # HEAD would take what the next poll lacks
        if len(body) > self._payload_max:
            session.close()
            raise Refused(Code.BAD_REQUEST, 413)
        await session.post(body)
        return b"ok"

    # Connections, from `api.sockets` -----------------------------------------------------------------

    async def serve(self, stream: ViewerStream, nursery: trio.Nursery) -> None:
        """One WebSocket, from the request that it has sent to its end; `nursery` is its own."""
        received = await stream.receive_some()
        try:
            asked = opening.read(received)
        except ApiError as failure:
            stream.write(opening.refusal(self._settings, failure, None))
            return
        try:
            session = self._admitted(asked)
        except Refused as refusal:
            fields = (("content-type", JSON), ("content-length", str(len(refusal.body))))
            stream.write(opening.head(self._settings, refusal.status_code, fields, asked) + refusal.body.encode())
            return
        except ApiError as failure:
            stream.write(opening.refusal(self._settings, failure, asked))
            return
        stream.unread(received)
        try:
            with trio.fail_after(HANDSHAKE_S):
                socket = await opening.shake_hands(stream, nursery, self._payload_max)
            if session is None:
                session = self._open()
                session.write(self._greeting(session, []))
            elif not await session.probe(socket, stream):
                with trio.move_on_after(CLOSE_S):
                    await socket.aclose(NORMAL)
                return
        except (trio.TooSlowError, ConnectionClosed, HandshakeError, ApiError):
            return  # it went away, or we did
        await session.listen(socket, stream, nursery)

    def _admitted(self, asked: Opening) -> Session | None:
        """The session that a WebSocket names, None if it asks for one.

        Raises:
            Refused: it may do neither.
            ApiError: 503.
        """
        if not opening.may_open(self._settings, asked):
            raise Refused(Code.FORBIDDEN)
        session = self._checked("GET", dict(parse_qsl(asked.query)), is_upgrade=True)
        if session is None:
            self._enter()
        return session


def _packets(body: bytes) -> list[Packet]:
    try:
        text = body.decode()
        if text.startswith("d="):  # the library would take it for a form, of a transport that went with Engine.IO 3
            raise Violation("This is no payload.")
        return _Payload(encoded_payload=text).packets  # type: ignore[no-any-return]
    except (ValueError, RecursionError):
        raise Violation("This is no payload.") from None


def _packet(message: str | bytes) -> Packet:
    try:
        return Packet(encoded_packet=message)
    except (ValueError, RecursionError):
        raise Violation("This is no packet.") from None


def _end_of_frames(data: bytes, begin: int, most: int) -> int:
    """Where the last of our frames ends that is within so many bytes from `begin`; the first one's end in any case."""
    end = begin
    while end < len(data):
        size = data[end + 1]
        if size < 126:
            after = end + 2 + size
        elif size == 126:
            after = end + 4 + int.from_bytes(data[end + 2 : end + 4], "big")
        else:
            after = end + 10 + int.from_bytes(data[end + 2 : end + 10], "big")
        if after - begin > most and end > begin:
            break
        end = after
    return end
