"""The front end's door: one port, Hypercorn's protocols behind it, and an end that comes in bounded time.

Hypercorn's own `serve` would do, but for two things that only the owner of the streams can: a peer that does not read
keeps Hypercorn in a shielded send, so at the end the sockets are cut under it; and a connection that stays silent is
closed here, since Hypercorn's keep-alive time limit does not fire after the first answer of a Quart-Trio app.
"""

import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio
from hypercorn.config import Config
from hypercorn.trio.lifespan import Lifespan
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState, LifespanState
from hypercorn.utils import wrap_app
from quart_trio import QuartTrio

BACKLOG = 4096  # connections that the kernel holds while we are busy: the burst of a drop's first instant
SILENCE_S = 75  # after which a connection is closed; longer than any answer takes, shorter than NATs forget
HEAD_MAX = 16_384  # bytes of a request's head


class PortTaken(Exception):
    """Nobody can listen there; the text says why."""


def listen(host: str, port: int) -> list[socket.socket]:
    """Listening sockets on every address of `host`; with port 0 all on the same free port.

    Raises:
        PortTaken: another process listens there, or the address is not ours.
    """
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        listening: list[socket.socket] = []
        for family, *_, address in addresses:
            at_port = listening[0].getsockname()[1] if listening else port
            one = socket.create_server((address[0], at_port), family=family, backlog=BACKLOG)
            listening.append(one)
    except OSError as fault:
        raise PortTaken(f"cannot listen on {host}, port {port}: {fault.strerror or fault}") from fault
    return listening


class Front:
    """Connections on their way through Hypercorn to the application."""

    def __init__(self, app: QuartTrio) -> None:
        self._config = Config()
        self._config.read_timeout = SILENCE_S
        self._config.keep_alive_timeout = SILENCE_S
        self._config.keep_alive_max_requests = 1_000_000
        self._config.h11_max_incomplete_size = HEAD_MAX
        self._config.include_server_header = False
        self._config.accesslog = None  # the application writes its own
        self._config.errorlog = logging.getLogger("hypercorn.error")
        self._wrapped = wrap_app(app, self._config.wsgi_max_body_size, "asgi")
        self._answering = 0
        self._idle = trio.lowlevel.ParkingLot()
        self._context = WorkerContext(None)
        self._state: LifespanState = {}
        self._streams: set[trio.SocketStream] = set()
        self._nursery: trio.Nursery | None = None
        self._accepting = trio.CancelScope()

    @asynccontextmanager
    async def open(self, listening: list[socket.socket]) -> AsyncIterator[None]:
        """Serve `listening` until the block ends; end it with `drain`."""
        lifespan = Lifespan(self._wrapped, self._config, self._state)
        async with trio.open_nursery() as outer:
            await outer.start(lifespan.handle_lifespan)
            await lifespan.wait_for_startup()
            async with trio.open_nursery() as connections:
                self._nursery = connections
                outer.start_soon(self._accept, listening)
                yield
                self.cut()
                connections.cancel_scope.cancel()
            await lifespan.wait_for_shutdown()
            outer.cancel_scope.cancel()

    def close_door(self) -> None:
        """Accept no more connections."""
        self._accepting.cancel()

    async def drain(self, at_most_s: float) -> None:
        """Let what was asked be answered, and close; after `at_most_s` cut what is left."""
        self.close_door()
        await self._context.terminated.set()  # connections close after their answer
        with trio.move_on_after(at_most_s):
            while self._answering:
                await self._idle.park()
        self.cut()

    def cut(self) -> None:
        """Close every connection under whoever is using it."""
        for stream in list(self._streams):
            stream.socket.close()

    async def _accept(self, listening: list[socket.socket]) -> None:
        listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(one)) for one in listening]
        with self._accepting:
            await trio.serve_listeners(self._serve, listeners, handler_nursery=self._nursery)
        for listener in listeners:
            await listener.aclose()

    async def _serve(self, stream: trio.SocketStream) -> None:
        self._streams.add(stream)
        try:
            state = ConnectionState(self._state.copy())
            # Its annotation knows TLS only, its code plain streams too.
            await TCPServer(self._answer, self._config, self._context, state, stream).run()  # type: ignore[arg-type]
        finally:
            self._streams.discard(stream)

    async def _answer(self, *asgi: Any) -> None:
        """The application, from a request's head to the last byte of its answer in the kernel's hands."""
        self._answering += 1
        try:
            await self._wrapped(*asgi)
        finally:
            self._answering -= 1
            if not self._answering:
                self._idle.unpark_all()
