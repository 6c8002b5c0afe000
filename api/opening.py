"""How a viewer's connection begins where no library answers: its request, read as strictly as everywhere, and our head.

What is refused is refused as on every other route: in JSON, with the same headers; after it the connection closes.
"""

import time
from collections.abc import Iterable
from wsgiref.handlers import format_date_time

import msgspec
import trio
from trio_websocket import CloseReason, WebSocketConnection
from wsproto import WSConnection
from wsproto.connection import ConnectionState, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Ping, TextMessage
from wsproto.utilities import RemoteProtocolError

from api import answers, http1, schemas
from api.answers import JSON
from api.errors import ApiError
from api.settings import Settings
from api.viewers import ViewerStream


class Opening(msgspec.Struct, frozen=True):
    """A request without a body. Header names are lower case; of those with one name the last counts."""

    path: str
    query: str
    headers: dict[str, str]
    request_id: str


def read(received: bytes) -> Opening:
    """The request that these bytes begin with.

    Raises:
        ApiError: they are none.
    """
    begun, end, _ = received.partition(b"\r\n\r\n")
    reader = http1.Reader(0)
    reader.feed(begun + end)
    failure, messages = reader.failure, reader.messages
    reader.close()
    if not messages:
        raise failure or http1.malformed("its head is not complete")
    message = messages[0]
    if message.is_upgrade:
        _try_handshake(begun + end)
    path, _, query = message.target.decode("latin-1").partition("?")
    headers = {name.decode("latin-1"): value.decode("latin-1").strip(" \t") for name, value in message.fields}
    return Opening(path, query, headers, schemas.request_id(headers.get("x-request-id")))


def _try_handshake(request: bytes) -> None:
    """See whether wsproto can read it: it fails on a `Host` or a protocol's name that is not what it should be.

    What it refuses by itself it answers by itself.

    Raises:
        ApiError: it cannot.
    """
    try:
        WSConnection(ConnectionType.SERVER).receive_data(request)
    except UnicodeError:
        raise http1.malformed("a field of its handshake is not ASCII, or no name of a host") from None
    except RemoteProtocolError:
        pass


def head(settings: Settings, status_code: int, headers: Iterable[tuple[str, str]], asked: Opening) -> bytes:
    """The head of an answer after which the connection closes, as the lanes write it."""
    lines = [
        f"HTTP/1.1 {status_code} ",
        *(f"{name.lower()}: {value}" for name, value in headers),
        f"x-request-id: {asked.request_id}",
        "x-content-type-options: nosniff",
        "cache-control: no-store",
        "vary: Origin",
        *(f"{name.lower()}: {value}" for name, value in answers.allowing(settings, asked.headers.get("origin"))),
        f"date: {format_date_time(time.time())}",
        "Connection: close",
    ]
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode("latin-1")


def refusal(settings: Settings, failure: ApiError, asked: Opening | None) -> bytes:
    """The whole of an answer in JSON."""
    asked = asked or Opening("", "", {}, schemas.request_id(None))
    answer = answers.error(failure, asked.request_id)
    fields = (("content-type", JSON), ("content-length", str(len(answer.body))), *answer.headers)
    return head(settings, failure.status_code, fields, asked) + answer.body


class Connection(WebSocketConnection):
    """The library's, with four changes.

    A message costs no more memory than its bytes, however many empty pieces it comes in. A peer that breaks the rules
    is told so before the connection ends. What it says once we have said good-bye is not heard: the library would fail
    over a ping, or over a message that is too large. And whoever closes while a last frame is on its way waits for it.
    """

    async def _handle_message_event(self, event: BytesMessage | TextMessage) -> None:
        if self._wsproto.state is ConnectionState.OPEN and (event.data or event.message_finished):
            await super()._handle_message_event(event)

    async def _handle_ping_event(self, event: Ping) -> None:
        if self._wsproto.state is ConnectionState.OPEN:
            await super()._handle_ping_event(event)

    async def aclose(self, code: int = 1000, reason: str | None = None) -> None:
        if self._close_reason is not None:
            await self._close_handshake.wait()
        await super().aclose(code, reason)

    async def _handle_close_connection_event(self, event: CloseConnection) -> None:
        # Open: it is not the peer who closes, but wsproto, which has read what breaks the rules.
        if self._wsproto.state is ConnectionState.OPEN:
            self._close_reason = CloseReason(event.code, event.reason)
            await self._send(CloseConnection(event.code, event.reason))
        async with self._stream_lock:
            pass  # our own last frame, which may be on its way: what follows closes the stream
        await super()._handle_close_connection_event(event)


async def shake_hands(stream: ViewerStream, nursery: trio.Nursery, message_max: int) -> WebSocketConnection:
    """As `trio_websocket.wrap_server_stream` does it, with a connection of our own kind.

    Raises:
        ConnectionClosed: the peer is gone, or its request is none for a WebSocket; then it has been told.
    """
    connection = Connection(
        stream, WSConnection(ConnectionType.SERVER), message_queue_size=1, max_message_size=message_max
    )
    nursery.start_soon(connection._reader_task)
    return await (await connection._get_request()).accept()


def may_open(settings: Settings, asked: Opening) -> bool:
    """Whether a page of this origin may open a socket; who comes from no page may."""
    try:
        return settings.allows_page(asked.headers.get("origin"), asked.headers.get("host", ""))
    except ValueError:  # what it says is no address
        return False
