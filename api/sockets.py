"""Connections that become viewers' sockets: which requests ask for one, and who serves it.

They come from the hot lane, which has read the head, and from the cold lane's TLS connections. Each has a nursery of
its own, so that whatever goes wrong in one ends there.
"""

import re
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Final

import structlog
import trio
from quart_trio import QuartTrio

from api import engineio, events, live
from api.events import Events
from api.handlers import Gate
from api.live import Live
from api.settings import Settings
from api.socketio import SocketIo
from api.viewers import PlainViewer, StreamViewer, ViewerStream

log = structlog.get_logger()

UPGRADE: Final = re.compile(rb"\r\nupgrade:[ \t]*websocket[ \t]*(\r\n|$)", re.IGNORECASE)
GOODBYE_S: Final = 1.0  # that viewers have to take their leave when the server stops


class Sockets:
    """`run` it in a nursery; `stop` it before the nursery ends."""

    def __init__(self, settings: Settings, gate: Gate) -> None:
        self._live = Live(settings, gate)
        self._socketio = SocketIo(settings, gate)
        self._events = Events(settings, gate)
        self._serving = {
            **dict.fromkeys(live.PATHS, self._live.serve),
            **dict.fromkeys(engineio.PATHS, self._socketio.serve),
        }
        self._streaming = dict.fromkeys(events.PATHS, self._events.serve)  # without another protocol
        self._streams: set[ViewerStream] = set()
        self._nursery: trio.Nursery | None = None
        self._gone = trio.lowlevel.ParkingLot()

    @property
    def count(self) -> int:
        return len(self._streams)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._live.run)
            nursery.start_soon(self._socketio.run)
            nursery.start_soon(self._events.run)
            task_status.started()

    def register(self, app: QuartTrio) -> None:
        """What viewers do with requests of the application."""
        self._socketio.register(app)
        self._events.register(app)

    def wants(self, received: bytes) -> bool:
        """Whether the request whose head begins like this asks for a viewer's socket."""
        return self._server_of(received) is not None

    def take(self, sock: socket.socket, received: bytes) -> None:
        """Serve a plain connection to its end; `received`, with its head, has been read."""
        self._start(lambda nursery: PlainViewer(nursery, sock, received), received)

    async def serve_stream(self, stream: Any, transport: trio.SocketStream, received: bytes) -> None:
        """The same for any stream, such as one with TLS, in the caller's task."""
        await self._serve(lambda nursery: StreamViewer(nursery, stream, transport, received), received)

    def stop(self) -> None:
        """Tell all that we stop. Their connections end by themselves, or are cut by `cut`."""
        self._live.stop()
        self._socketio.stop()
        self._events.stop()

    async def drain(self) -> None:
        """Wait until all are gone, not for long."""
        with trio.move_on_after(GOODBYE_S):
            while self._streams:
                await self._gone.park()

    def cut(self) -> None:
        for stream in list(self._streams):
            stream.cut()

    def _server_of(self, received: bytes) -> Callable[[ViewerStream, trio.Nursery], Awaitable[None]] | None:
        head = received.partition(b"\r\n\r\n")[0]
        method, _, rest = head.partition(b" ")
        target = rest.partition(b" ")[0].partition(b"?")[0]
        if method != b"GET":
            return None
        serving = self._streaming if UPGRADE.search(head) is None else self._serving
        return serving.get(target.decode("latin-1"))

    def _start(self, viewer: Callable[[trio.Nursery], ViewerStream], received: bytes) -> None:
        assert self._nursery is not None, "sockets are not served yet"
        self._nursery.start_soon(self._serve, viewer, received)

    async def _serve(self, viewer: Callable[[trio.Nursery], ViewerStream], received: bytes) -> None:
        serve = self._server_of(received)
        assert serve is not None, "nobody serves this request"
        stream = None
        try:
            async with trio.open_nursery() as nursery:
                stream = viewer(nursery)
                self._streams.add(stream)
                await serve(stream, nursery)
                await stream.flush()
                nursery.cancel_scope.cancel()
            await stream.finish()
        except Exception as bug:
            log.error("viewer_failed", reason=repr(bug), exc_info=bug)
        finally:
            if stream is not None:
                stream.cut()
                self._streams.discard(stream)
            self._gone.unpark_all()
