"""The cold lane: Hypercorn with the Quart application, for all that is not hot.

Of a plain connection it gets one request at a time, read and checked by the hot lane, which keeps the socket: so that
connection is at once free for hot requests again. A connection that speaks another protocol (HTTP/2, TLS, WebSocket)
it gets whole.

Two things only the owner of the streams can do: a peer that does not read keeps Hypercorn in a shielded send, so at
the end the sockets are cut under it; and a connection that stays silent is closed by its `BegunStream`, since
Hypercorn's keep-alive time limit does not fire after the first answer of a Quart-Trio app.
"""

import logging
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import structlog
import trio
from h2.errors import ErrorCodes
from h2.events import DataReceived, PriorityUpdated, RequestReceived
from h2.events import Event as H2Event
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes
from h11 import Request
from hypercorn import protocol
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData
from hypercorn.protocol import h2, h11
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.events import StreamClosed
from hypercorn.trio.lifespan import Lifespan
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState, LifespanState
from hypercorn.typing import Event as IOEvent
from hypercorn.utils import wrap_app
from quart_trio import QuartTrio

from api import events, http1
from api.hotlane import Connection
from api.http1 import HEAD_MAX, HEAD_S, Message
from api.settings import Settings
from api.sockets import Sockets
from api.viewers import bound_unacked

log = structlog.get_logger()

STREAMS: Final = frozenset(path.encode() for path in events.PATHS)
SILENCE_S: Final = 75  # after which a connection is closed; longer than any answer takes, shorter than NATs forget
UNREAD_S: Final = 60.0  # after which a stream of HTTP/2 is reset of which the peer has taken less than `READ_LEAST`
READ_LEAST: Final = 1_024  # bytes, or all that there is: who takes a byte now and then is not reading
END_OF_HEAD: Final = re.compile(rb"\n\r?\n")  # as Hypercorn has it, which reads a bare LF, too
NOT_ASCII: Final = (
    b"HTTP/1.1 400 \r\ncontent-length: 0\r\nconnection: close\r\n\r\n"  # as Hypercorn refuses what is no request
)
# Of a head, what the hot lane has seen to: how long the body is, that the client has sent it, and that the request asks
# for no other protocol. Hypercorn looks for that in places where llhttp, the lane's parser, does not.
READ_BEFORE: Final = frozenset((b"content-length", b"transfer-encoding", b"expect", b"trailer", b"upgrade"))


class Unread(Exception):
    """The peer of an HTTP/2 stream takes nothing of what there is for it."""


class Http2(h2.H2Protocol):
    """Hypercorn's, but what befalls one stream is no matter of the others, and none is kept for as long as its peer
    likes.

    It does not offer WebSockets on streams (RFC 8441), since a viewer's needs a connection of its own: a browser that
    is offered them would take no other way, and find nothing there. A stream that its peer does not read is reset after
    `UNREAD_S`: it would be kept, with whoever answers it, for as long as the connection. So is one whose answer breaks
    off, which its peer would await for as long, and one that asks for what Hypercorn has no answer to. What was left to
    send on a stream goes with it; what comes on one that has been answered is passed over.

    Priorities are passed over too, as RFC 9113, 5.3.2 allows: Hypercorn's tree of them keeps a place for each stream
    that was ever named in one, and starves those that depend on a busy one.
    """

    stream_buffers: dict[int, "Backpressure"]  # type: ignore[assignment]

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        del self.connection.local_settings[SettingCodes.ENABLE_CONNECT_PROTOCOL]

    async def stream_send(self, event: StreamEvent) -> None:
        if isinstance(event, StreamClosed):
            await self._finish(event.stream_id)
        try:
            await super().stream_send(event)
        except Unread:
            await self._reset(event.stream_id, ErrorCodes.CANCEL)

    async def _handle_events(self, events: list[H2Event]) -> None:
        for event in events:  # one by one, since an answer may end before the next
            match event:
                case RequestReceived() if why := self._refusal(event):
                    self._refuse(event.stream_id, why)
                case DataReceived() if event.stream_id not in self.streams:
                    # The connection's window is for the others, too.
                    self.connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                case PriorityUpdated():
                    pass
                case _:
                    await super()._handle_events([event])
        await self._flush()

    def _refusal(self, event: RequestReceived) -> ErrorCodes | None:
        """Why a stream gets no answer."""
        if self.context.terminated.is_set():
            return ErrorCodes.REFUSED_STREAM  # it may be asked again, elsewhere
        asked = dict(event.headers)
        method, path = asked.get(b":method", b""), asked.get(b":path")
        # h2 lets tunnels through, whatever is offered, and any byte.
        is_answered = path is not None and method.upper() != b"CONNECT" and (method + path).isascii()
        return None if is_answered else ErrorCodes.PROTOCOL_ERROR

    def _refuse(self, stream_id: int, why: ErrorCodes) -> None:
        with suppress(ProtocolError):  # it is closed already
            self.connection.reset_stream(stream_id, why)

    async def _flush(self) -> None:
        with trio.CancelScope(shield=True):  # what h2 has given out is no longer there: of other streams, too
            await super()._flush()

    async def _send_data(self, stream_id: int) -> None:
        left = self.stream_buffers.get(stream_id)
        await super()._send_data(stream_id)
        if left is not None and stream_id not in self.stream_buffers:
            left.gone.set()

    async def _finish(self, stream_id: int) -> None:
        """Before a stream is closed: the end of its answer leaves, or it is reset where there was none."""
        left = self.stream_buffers.get(stream_id)
        if left is None:
            return
        if not left.complete:
            await self._reset(stream_id, ErrorCodes.INTERNAL_ERROR)
        with trio.move_on_after(UNREAD_S):
            await left.gone.wait()

    async def _reset(self, stream_id: int, why: ErrorCodes) -> None:
        self._refuse(stream_id, why)
        await self._flush()
        await self._close_stream(stream_id)
        await self._window_updated(stream_id)  # who sends finds it closed, and forgets it

    def take_apart(self) -> None:
        """Of a connection that has ended: what keeps itself."""
        vars(self.connection).clear()  # which has a table of its own methods
        for stream_id in self.stream_buffers:  # cut off; parents and children know each other
            self.priority.remove_stream(stream_id)

    async def _close_stream(self, stream_id: int) -> None:
        """As Hypercorn does it, which keeps what was left to send: after each reset of a peer's, too."""
        await super()._close_stream(stream_id)
        left = self.stream_buffers.get(stream_id)
        if left is not None:
            await left.close()


class Http1(h11.H11Protocol):
    """Hypercorn's, without the upgrade to h2c, which ends in an exception where its settings are no base64."""

    async def _check_protocol(self, event: Request) -> None:
        if event.method == b"PRI" and not any(name == b"upgrade" for name, _ in event.headers):
            await super()._check_protocol(event)  # the preface of HTTP/2


# There is no setting for that either.
protocol.H11Protocol = Http1  # type: ignore[attr-defined]
protocol.H2Protocol = Http2  # type: ignore[assignment,attr-defined]


class ColdLane:
    """`open` it before it gets anything to do."""

    def __init__(self, app: QuartTrio, settings: Settings, sockets: Sockets) -> None:
        self._sockets = sockets
        self.config = config = Config()
        config.read_timeout = None  # `BegunStream` sees to it
        config.keep_alive_timeout = SILENCE_S
        config.keep_alive_max_requests = 1_000_000
        config.h11_max_incomplete_size = HEAD_MAX
        config.include_server_header = False
        config.accesslog = None  # the application writes its own
        config.errorlog = logging.getLogger("hypercorn.error")
        if settings.tls_certfile is not None:
            config.certfile = str(settings.tls_certfile)
            config.keyfile = str(settings.tls_keyfile or settings.tls_certfile)
        self._wrapped = wrap_app(app, config.wsgi_max_body_size, "asgi")
        self._context = WorkerContext(None)
        self._state: LifespanState = {}
        self._connections_max = settings.connections_max
        self._answering = 0
        self._idle = trio.lowlevel.ParkingLot()
        self._streams: set[trio.SocketStream] = set()
        self._nursery: trio.Nursery | None = None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Serve until the block ends; end it with `drain`."""
        lifespan = Lifespan(self._wrapped, self.config, self._state)
        async with trio.open_nursery() as outer:
            await outer.start(lifespan.handle_lifespan)
            await lifespan.wait_for_startup()
            async with trio.open_nursery() as connections:
                self._nursery = connections
                yield
                self.cut()
                connections.cancel_scope.cancel()
            await lifespan.wait_for_shutdown()
            outer.cancel_scope.cancel()

    # One request -------------------------------------------------------------------------------------

    def answer(self, connection: Connection, message: Message) -> None:
        """Have one request answered; `connection.done` follows."""
        assert self._nursery is not None, "the lane is not open"
        if message.target.partition(b"?")[0] in STREAMS and self._sockets.wants(begun := _head(message)):
            connection.leave(begun)  # and comes back to `take`: its answer has no end
            return
        self._nursery.start_soon(self._answer, connection, message)

    async def _answer(self, connection: Connection, message: Message) -> None:
        stream = OneRequest(connection, _whole(message, is_last=connection.is_last))
        state = ConnectionState(self._state.copy())
        with trio.CancelScope() as serving:

            async def app(*asgi: Any) -> None:
                await self._count(*asgi)
                # The last byte is written. Left alone, Hypercorn would now wait for a next request. After a failure
                # it has something to say, and then ends by itself.
                serving.cancel()

            try:
                # Its annotation knows sockets with TLS only, its code whatever receives and sends.
                await _run(Server(app, self.config, self._context, state, stream))  # type: ignore[arg-type]
            except Exception as bug:  # whatever goes wrong in one request ends its connection
                log.error("connection_failed", reason=repr(bug), exc_info=bug)
                stream.is_cut = True
        connection.done(is_last=stream.is_cut)

    # Whole connections -------------------------------------------------------------------------------

    def take(self, sock: socket.socket, received: bytes) -> None:
        """Serve a connection to its end, of which `received` has been read already."""
        assert self._nursery is not None, "the lane is not open"
        if self._sockets.wants(received):
            self._sockets.take(sock, received)
            return
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        bound_unacked(stream.setsockopt)
        self._streams.add(stream)  # from now on it counts
        self._nursery.start_soon(self._serve, stream, BegunStream(stream, received))

    async def serve(self, listening: list[trio.SSLListener[trio.SocketStream]]) -> None:
        """Accept connections with TLS, until cancelled."""
        await trio.serve_listeners(self._serve_tls, listening, handler_nursery=self._nursery)

    async def _serve_tls(self, stream: trio.SSLStream[trio.SocketStream]) -> None:
        transport = stream.transport_stream
        try:
            if self.taken >= self._connections_max:
                await trio.aclose_forcefully(stream)  # an answer would cost a handshake
                return
            bound_unacked(transport.setsockopt)
            self._streams.add(transport)
            received = await self._begin(stream)
            if received is None:
                await trio.aclose_forcefully(stream)
            elif self._sockets.wants(received):
                self._streams.discard(transport)  # it counts there
                await self._sockets.serve_stream(stream, transport, received)
            else:
                await self._serve(transport, BegunStream(stream, received))
        finally:
            self._streams.discard(transport)
            # Trio's stream keeps a method of its own, and with it OpenSSL's memory, as `_run` says of Hypercorn's.
            with suppress(AttributeError):  # it has no public name
                stream._handshook._afn = trio.lowlevel.checkpoint  # type: ignore[assignment]

    async def _begin(self, stream: trio.SSLStream[trio.SocketStream]) -> bytes | None:
        """What a peer says first, as far as it takes to see whether it asks for a viewer's socket."""
        received = b""
        with trio.move_on_after(HEAD_S), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await stream.do_handshake()
            while True:
                some = await stream.receive_some()
                received += some
                if not some or END_OF_HEAD.search(received) is not None or len(received) >= HEAD_MAX:
                    return received
        return None

    @property
    def taken(self) -> int:
        """How many connections there are, beside those that the hot lane keeps."""
        return len(self._streams) + self._sockets.count

    async def _serve(self, transport: trio.SocketStream, stream: "BegunStream") -> None:
        self._streams.add(transport)
        try:
            state = ConnectionState(self._state.copy())

            async def app(*asgi: Any) -> None:
                stream.answering += 1
                try:
                    await self._count(*asgi)
                finally:
                    stream.answering -= 1

            await _run(Server(app, self.config, self._context, state, stream))  # type: ignore[arg-type]
        except trio.ClosedResourceError:
            pass  # it was cut within its TLS handshake, where Hypercorn does not reckon with that
        except Exception as bug:  # whatever goes wrong on one connection ends there
            log.error("connection_failed", reason=repr(bug), exc_info=bug)
            await trio.aclose_forcefully(transport)
        finally:
            self._streams.discard(transport)

    async def _count(self, *asgi: Any) -> None:
        """The application, from a request's head to the last byte of its answer in the kernel's hands."""
        self._answering += 1
        try:
            await self._wrapped(*asgi)
        finally:
            self._answering -= 1
            if not self._answering:
                self._idle.unpark_all()

    # The end -----------------------------------------------------------------------------------------

    async def drain(self) -> None:
        """Wait until what was asked is answered; connections close after their answer."""
        await self._context.terminated.set()
        while self._answering:
            await self._idle.park()

    def cut(self) -> None:
        """Close every connection under whoever is using it."""
        for stream in list(self._streams):
            stream.socket.close()


class Server(TCPServer):
    """Hypercorn's for one connection, which ends when its peer has gone.

    Left alone it goes on to wait for the next request, and keeps the socket for as long as of a peer that is silent.
    """

    _is_peer_gone = False

    async def _read_data(self) -> None:
        try:
            await super()._read_data()
        except UnicodeError:  # a handshake for a WebSocket with a field that is not ASCII
            await self.protocol_send(RawData(NOT_ASCII))
            await self.protocol.handle(Closed())
        self._is_peer_gone = True
        await self.idle_task.stop()

    async def protocol_send(self, event: Event) -> None:
        await super().protocol_send(event)
        if self._is_peer_gone:
            await self.idle_task.stop()


async def _run(server: TCPServer) -> None:
    """Serve its connection to the end; then take apart what Hypercorn and h2 leave of it.

    Their objects keep each other, so none would be free before a collection of cycles; and of connections that lasted
    for longer than its younger generations none is made for hours.
    """
    try:
        await server.run()
    finally:
        wrapper = vars(server).pop("protocol", None)
        if wrapper is not None and isinstance(wrapper.protocol, Http2):
            wrapper.protocol.take_apart()


class OneRequest:
    """What Hypercorn takes for a connection: one request to read, then the hot lane's connection to write to."""

    def __init__(self, connection: Connection, request: bytes) -> None:
        self.socket = connection.sock
        self.is_cut = False  # by Hypercorn, which wants the connection closed
        self._closed = trio.Event()
        self._connection = connection
        self._request = request

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        request, self._request = self._request, b""
        if not request:
            await self._closed.wait()  # or until it is cancelled: there is one request, and its answer is the end
            raise trio.ClosedResourceError
        return request

    async def send_all(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        connection = self._connection
        connection.write(data)
        if connection.out:
            flushed = trio.Event()
            connection.flushed = flushed.set
            try:
                await flushed.wait()
            finally:
                connection.flushed = None
        if connection.is_closed:
            raise trio.BrokenResourceError("the peer is gone")

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        self.is_cut = True
        self._closed.set()
        await trio.lowlevel.checkpoint()


class Backpressure(h2.StreamBuffer):
    """What an HTTP/2 stream has yet to send. Who fills it waits until the peer has taken of it, but not for ever.

    With Hypercorn's own that wait ends at once while the peer's window is shut: a reader of events that does not read
    had the server keep all of them.
    """

    def __init__(self, event_class: type[IOEvent]) -> None:
        super().__init__(event_class)
        self.gone = trio.Event()  # nothing more will be sent
        self._moved_at = trio.current_time()  # when there began to be something, or enough of it was taken
        self._taken = 0  # bytes since then

    async def push(self, data: bytes) -> None:
        """Add it.

        Raises:
            Unread: the peer does not take what there is, be there room for more or not.
        """
        if self._complete:
            raise h2.BufferCompleteError
        if not self.buffer:
            self._move()
        elif trio.current_time() >= self._moved_at + UNREAD_S:
            raise Unread
        self.buffer.extend(data)
        await self._is_empty.clear()
        while len(self.buffer) >= h2.BUFFER_HIGH_WATER and not self._complete:
            await self._paused.clear()
            await self._while_read(self._paused)

    async def drain(self) -> None:
        """Wait until all has left.

        Raises:
            Unread: the peer does not take it.
        """
        if not self.buffer:
            self._move()
        await self._while_read(self._is_empty)

    async def close(self) -> None:
        await super().close()
        self.gone.set()

    async def pop(self, max_length: int) -> bytes:
        data = bytes(self.buffer[:max_length])
        del self.buffer[: len(data)]
        self._taken += len(data)
        if self._taken >= READ_LEAST:
            self._move()
        if len(self.buffer) < h2.BUFFER_LOW_WATER:
            await self._paused.set()
        if not self.buffer:
            await self._is_empty.set()
        return data

    def _move(self) -> None:
        self._moved_at = trio.current_time()
        self._taken = 0

    async def _while_read(self, happened: IOEvent) -> None:
        while True:
            with trio.move_on_at(self._moved_at + UNREAD_S):
                await happened.wait()
                return
            if trio.current_time() >= self._moved_at + UNREAD_S:
                raise Unread


h2.StreamBuffer = Backpressure  # type: ignore[misc]  # it has no setting for that


class BegunStream:
    """A stream whose first bytes were read already. Trio's own are final, so this hands on to one.

    A peer may be silent for so long as it is being answered, by a stream of events for hours; else for `SILENCE_S`.
    """

    def __init__(self, stream: trio.SocketStream | trio.SSLStream[trio.SocketStream], received: bytes) -> None:
        self.answering = 0
        self._stream = stream
        self._received = received

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        received, self._received = self._received, b""
        if received:
            await trio.lowlevel.checkpoint()
            return received
        while True:
            with trio.move_on_after(SILENCE_S):
                return await self._stream.receive_some(max_bytes)
            if not self.answering:
                raise trio.TooSlowError


def _head(message: Message) -> bytes:
    return http1.serialized(message, message.fields)


def _whole(message: Message, *, is_last: bool) -> bytes:
    """The request as one piece whose length stands in its head; if it is the last, the answer shall say so."""
    fields = [field for field in message.fields if field[0] not in READ_BEFORE]
    if is_last:
        fields.append((b"connection", b"close"))
    if message.body or message.method in (b"POST", b"PUT", b"PATCH"):
        fields.append((b"content-length", b"%d" % len(message.body)))
    return http1.serialized(message, fields) + message.body
