"""The native live feed: JSON over a WebSocket, `GET /api/v1/live`.

The handshake, the client's frames and the close are trio-websocket's; what the hub tells goes past it, straight into
the connection (`api.viewers`). A connection is one task of the library's that reads, and one of ours that obeys.

    client  {"type": "subscribe", "drops": "*" | ["<id>", …], "resume": {"<id>": seq}?}     and unsubscribe
            {"type": "identify", "userId": "<id>" | "token": "<jwt>"}      to hear of one's own holds, too
    server  {"type": "snapshot", "seq", "drop"}, {"type": "event", "event", "seq", "at", "data"}, {"type": "error", …}
"""

import base64
import binascii
import random
from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec
import trio
from trio_websocket import ConnectionClosed, HandshakeError, WebSocketConnection

from api import feed, handlers, opening, schemas
from api.errors import ApiError, explained
from api.handlers import Gate, Service
from api.opening import Opening
from api.promises import in_trio
from api.settings import AuthMode, Settings
from api.viewers import ViewerStream, frame
from engine.drop import Drop
from engine.hub import Direct, News, Watch
from engine.model import DropId, UserId

PATHS: Final = ("/api/v1/live", "/api/live")
MESSAGE_MAX: Final = 65_536  # bytes of a client's frame: a resume position for each of the drops that it may name
DROPS_MAX: Final = 1_000  # that a connection may watch by name; "*" is for more
HANDSHAKE_S: Final = 10.0
CLOSE_S: Final = 2.0  # that a viewer may take to answer our close
PING_S: Final = 25.0  # of silence, after which it is asked whether it is still there
SILENCE_S: Final = 60.0  # after which it is not
SWEEP_S: Final = 5.0
MESSAGES_PER_S: Final = 20.0  # of a client, in the long run
MESSAGES_AT_ONCE: Final = 60.0
VERSION: Final = "13"  # of the protocol
KEY_BYTES: Final = 16
PING: Final = b"\x89\x00"
RETRY_MS: Final = (500, 5_000)  # within which a stopping server's viewers come back, each at its own time
GOING_AWAY: Final = 1001
POLICY: Final = 1008
TRY_AGAIN_LATER: Final = 1013

_encode = msgspec.json.encode


class Dialect:
    """How a native client is told: a WebSocket message for each thing that happened."""

    def news(self, news: News, user_id: UserId | None) -> bytes:
        return b"".join(
            frame(_encode(feed.as_event(message)))
            for message in feed.messages(news)
            if message.only_for is None or message.only_for == user_id
        )

    def snapshot(self, drop: Drop) -> bytes:
        return frame(_encode(feed.as_snapshot(drop)))


NATIVE: Final = Dialect()


class Subscribe(msgspec.Struct, tag="subscribe", tag_field="type"):
    drops: Literal["*"] | list[str]
    resume: dict[str, int] = {}


class Unsubscribe(msgspec.Struct, tag="unsubscribe", tag_field="type"):
    drops: Literal["*"] | list[str]


class Identify(msgspec.Struct, tag="identify", tag_field="type", rename="camel"):
    user_id: str | None = None
    token: str | None = None


_decoder = msgspec.json.Decoder(Subscribe | Unsubscribe | Identify)


class Live:
    """Native viewers' connections. `run` it in a nursery."""

    def __init__(self, settings: Settings, gate: Gate) -> None:
        self._settings = settings
        self._gate = gate
        self._viewers: set[NativeViewer] = set()

    async def run(self) -> None:
        """Look after silent connections."""
        while True:
            await trio.sleep(SWEEP_S)
            now = trio.current_time()
            for viewer in list(self._viewers):
                viewer.stream.end_if_silent(now, PING_S, SILENCE_S, PING)

    async def serve(self, stream: ViewerStream, nursery: trio.Nursery) -> None:
        """One connection, from the request that it has sent to its end; `nursery` is its own."""
        asked: Opening | None = None
        received = await stream.receive_some()
        try:
            asked = opening.read(received)
            service = self._admitted(asked)
        except ApiError as failure:
            stream.write(opening.refusal(self._settings, failure, asked))
            return
        stream.unread(received)
        viewer: NativeViewer | None = None
        try:
            with trio.fail_after(HANDSHAKE_S):
                socket = await opening.shake_hands(stream, nursery, MESSAGE_MAX)
            viewer = NativeViewer(service, socket, stream, nursery)
            self._viewers.add(viewer)
            if await viewer.is_introduced(asked.headers):
                await viewer.obey()
        except (trio.TooSlowError, ConnectionClosed, HandshakeError):
            pass
        finally:
            if viewer is not None:
                self._viewers.discard(viewer)
                viewer.watch.close()

    def _admitted(self, asked: Opening) -> Service:
        """The service, for who may open a feed and knows how to.

        Raises:
            ApiError: who does not.
        """
        headers = asked.headers
        if not opening.may_open(self._settings, asked):
            raise ApiError(403, "ORIGIN_NOT_ALLOWED", "Pages of this origin may not open a live feed.")
        wanted = {word.strip().lower() for word in headers.get("connection", "").split(",")}
        if headers.get("sec-websocket-version") != VERSION or "upgrade" not in wanted:
            raise upgrade_required()
        if not _is_key(headers.get("sec-websocket-key", "")) or "host" not in headers:
            raise ApiError(400, "BAD_REQUEST", "The handshake has no Sec-WebSocket-Key, or one that is none.")
        return self._gate.enter()

    def stop(self) -> None:
        """Ask every viewer to come again, each at a time of its own."""
        for viewer in list(self._viewers):
            viewer.close(GOING_AWAY, _encode({"retryInMs": random.randint(*RETRY_MS)}).decode())


class NativeViewer:
    """One connection: what it asked for, and the way to it."""

    dialect = NATIVE

    def __init__(
        self, service: Service, socket: WebSocketConnection, stream: ViewerStream, nursery: trio.Nursery
    ) -> None:
        self.stream = stream
        self.send = stream.send
        self.keep = stream.keep
        self.watch: Watch = service.hub.watch(self)
        stream.drained = self.watch.drained
        stream.hindered = self.watch.hinder
        self._service = service
        self._socket = socket
        self._nursery = nursery
        self._allowance = MESSAGES_AT_ONCE
        self._heard_at = trio.current_time()
        self._is_closing = False

    # What it is told ---------------------------------------------------------------------------------

    @property
    def direct(self) -> Direct | None:
        return self.stream.direct

    def send_away(self) -> None:
        self.close(TRY_AGAIN_LATER, "You read too slowly.")

    def close(self, code: int, reason: str) -> None:
        self.watch.close()
        self._nursery.start_soon(self._close, code, reason)

    async def _close(self, code: int, reason: str) -> None:
        if self._is_closing:
            return
        self._is_closing = True
        with trio.move_on_after(CLOSE_S) as patience:
            await self._socket.aclose(code, reason)
        if patience.cancelled_caught:
            self.stream.cut()

    def _say(self, message: dict[str, Any]) -> None:
        self.stream.write(frame(_encode(message)))

    def _complain(self, failure: ApiError, **more: str) -> None:
        self._say({"type": "error", "code": failure.code, "message": failure.message, **more})

    # What it asks ------------------------------------------------------------------------------------

    async def is_introduced(self, headers: Mapping[str, str]) -> bool:
        """Take what the handshake says of the user. False: we could not, and it has been asked to come again.

        It may have no other way to say who it is, and would never hear of its own holds.
        """
        if not ("x-user-id" in headers or "authorization" in headers):
            return True
        try:
            await self._identify_by(headers)
        except Exception as failure:  # noqa: BLE001 - explained to whom it concerns, and logged there
            told = explained(failure)
            self._complain(told)
            if told.status_code >= 500:
                self.watch.close()
                await self._close(TRY_AGAIN_LATER, told.message)
                return False
        return True

    async def obey(self) -> None:
        """Do what it asks, until it is gone."""
        while True:
            text = await self._socket.get_message()
            if not self._may_ask():
                self.watch.close()
                await self._close(POLICY, "Too many messages.")
                return
            try:
                await self._do(text)
            except ApiError as failure:
                self._complain(failure)
            except Exception as failure:  # noqa: BLE001 - explained to whom it concerns, and logged there
                self._complain(explained(failure))

    def _may_ask(self) -> bool:
        now = trio.current_time()
        self._allowance = min(MESSAGES_AT_ONCE, self._allowance + (now - self._heard_at) * MESSAGES_PER_S) - 1
        self._heard_at = now
        return self._allowance >= 0

    async def _do(self, text: str | bytes) -> None:
        try:
            asked = _decoder.decode(text)
        except (msgspec.ValidationError, RecursionError) as fault:
            raise ApiError(422, "VALIDATION_ERROR", f"The message is not understood: {fault}.") from None
        except (msgspec.DecodeError, UnicodeError):
            raise ApiError(400, "INVALID_JSON", "The message is not JSON.") from None
        match asked:
            case Subscribe(drops="*", resume=resume):
                positions = _positions(resume)
                await handlers.try_to_find_drops(self._service, positions)
                self._has_room_for_all_but(self.watch.subscribe_all(positions))
            case Subscribe(drops=drops, resume=resume):
                await self._subscribe([_id(text) for text in drops], _positions(resume))
            case Unsubscribe(drops="*"):
                self.watch.unsubscribe_all()
            case Unsubscribe(drops=drops):
                drop_ids = [_id(text) for text in drops]
                if drop_ids and self.watch.is_all:
                    raise ApiError(
                        422, "VALIDATION_ERROR", 'You watch all drops: unsubscribe "*", and name what to keep.'
                    )
                self.watch.unsubscribe(drop_ids)
            case Identify():
                await self._identify(asked)

    async def _subscribe(self, drop_ids: list[DropId], resume: Mapping[DropId, int]) -> None:
        if len(self.watch.drops.union(drop_ids)) > DROPS_MAX:
            raise ApiError(422, "TOO_MANY_DROPS", f'No more than {DROPS_MAX} drops by name; "*" watches all.')
        known = []
        with handlers.finding():
            for drop_id in dict.fromkeys(drop_ids):
                try:
                    await in_trio(handlers.find_drop(self._service, drop_id))
                    known.append(drop_id)
                except ApiError as failure:
                    self._complain(failure, dropId=drop_id)
        self._has_room_for_all_but(self.watch.subscribe(known, resume))

    def _has_room_for_all_but(self, left_out: list[DropId]) -> None:
        if left_out:
            told = f"There was no room for the last {len(left_out)} drops that you named: read on, and name them again."
            raise ApiError(422, "TOO_MANY_DROPS", told)

    async def _identify(self, asked: Identify) -> None:
        settings = self._service.settings
        if settings.auth_mode is AuthMode.HEADER and settings.is_production:
            # Who a user is says the proxy, in the header of the handshake; what a client says here passes it by.
            raise ApiError(403, "NOT_ALLOWED", "The proxy of this server says who you are.")
        if settings.auth_mode is AuthMode.HEADER and asked.user_id is not None:
            await self._identify_by({"x-user-id": asked.user_id})
        elif asked.token is not None:
            await self._identify_by({"authorization": f"Bearer {asked.token}"})
        else:
            raise ApiError(422, "VALIDATION_ERROR", "Say userId or token, as this server's AUTH_MODE wants it.")

    async def _identify_by(self, headers: Mapping[str, str]) -> None:
        caller = await in_trio(self._service.auth.caller(headers))
        self.watch.identify(caller.user_id)


def _is_key(text: str) -> bool:
    """Sixteen bytes in Base64 (RFC 6455, 4.2.1)."""
    try:
        return len(base64.b64decode(text, validate=True)) == KEY_BYTES
    except (binascii.Error, ValueError):
        return False


def upgrade_required() -> ApiError:
    message = f"This address speaks WebSocket (version {VERSION}); {PATHS[0]}/events speaks HTTP."
    headers = (("Upgrade", "websocket"), ("Sec-WebSocket-Version", VERSION))
    return ApiError(426, "UPGRADE_REQUIRED", message, headers=headers)


def _id(text: str) -> DropId:
    return DropId(schemas.path_id("drops", text))


def _positions(resume: Mapping[str, int]) -> dict[DropId, int]:
    return {_id(text): seq for text, seq in resume.items()}
