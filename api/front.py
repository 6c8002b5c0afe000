"""The front end's door: one port, two lanes behind it, and an end that comes in bounded time.

Without TLS the hot lane reads every connection and passes on what is not hot; with it, every connection is the cold
lane's. In both cases the same handlers answer with the same bytes.
"""

import resource
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import structlog
import trio
from msgspec import structs
from quart_trio import QuartTrio

from api.cold import ColdLane
from api.handlers import Gate
from api.hotlane import REFUSED_MAX, HotLane
from api.settings import Settings
from api.sockets import Sockets

log = structlog.get_logger()

BACKLOG: Final = 4096  # connections that the kernel holds while we are busy: the burst of a drop's first instant
DESCRIPTORS_KEPT_MIN: Final = 200
# Beside the pool of reads and those who are told that there are too many of them: the writer, the lock and what takes
# their place after an outage, listening sockets, epoll sets, files. A server at work has about 20 of these.
DESCRIPTORS_OF_OURS: Final = 50


class PortTaken(Exception):
    """Nobody can listen there; the text says why."""


class CertificateUnusable(Exception):
    """TLS can't be served with these files; the text says why."""


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


def make_room(connections_max: int, pool_size: int) -> int:
    """Let this process open as many sockets as it may serve, as far as the system lets it; how many those are then.

    However many come, the database can still be reached.
    """
    kept = max(DESCRIPTORS_KEPT_MIN, pool_size + REFUSED_MAX + DESCRIPTORS_OF_OURS)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections_max + kept
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return connections_max
    soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft >= wanted:
        return connections_max
    room = max(1, soft - kept)
    log.warning("few_descriptors", connections_max=connections_max, descriptors=soft, served=room)
    return room


class Front:
    """Connections on their way to the handlers."""

    def __init__(self, app: QuartTrio, settings: Settings, gate: Gate) -> None:
        """
        Raises:
            CertificateUnusable: the files of TLS can't be read, or don't belong together.
        """
        served = make_room(settings.connections_max, settings.pool_size)
        settings = structs.replace(settings, connections_max=served)
        self._sockets = Sockets(settings, gate)
        self._sockets.register(app)
        self._cold = ColdLane(app, settings, self._sockets)
        self._hot = HotLane(settings, gate, self._cold)
        self._tls = None
        if settings.tls_certfile is not None:
            try:
                self._tls = self._cold.config.create_ssl_context()
            except (OSError, ValueError) as fault:  # ssl.SSLError is an OSError
                files = ", ".join(str(file) for file in (settings.tls_certfile, settings.tls_keyfile) if file)
                raise CertificateUnusable(f"cannot serve TLS with {files}: {fault}") from fault
        self._accepting = trio.CancelScope()

    @asynccontextmanager
    async def open(self, listening: list[socket.socket]) -> AsyncIterator[None]:
        """Serve `listening` until the block ends; end it with `drain`."""
        async with self._cold.open(), trio.open_nursery() as nursery:
            await nursery.start(self._sockets.run)
            if self._tls is None:
                await nursery.start(self._hot.run, listening)
            else:
                nursery.start_soon(self._accept_tls, listening)
            yield
            self.cut()
            nursery.cancel_scope.cancel()

    def close_door(self) -> None:
        """Accept no more connections."""
        self._hot.close_door()
        self._accepting.cancel()
        self._sockets.stop()

    async def drain(self, at_most_s: float) -> None:
        """Let what was asked be answered, and close; after `at_most_s` cut what is left."""
        self.close_door()
        with trio.move_on_after(at_most_s):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._hot.drain)
                nursery.start_soon(self._cold.drain)
                nursery.start_soon(self._sockets.drain)
        self.cut()

    def cut(self) -> None:
        """Close every connection under whoever is using it."""
        self._hot.cut()
        self._cold.cut()
        self._sockets.cut()

    async def _accept_tls(self, listening: list[socket.socket]) -> None:
        assert self._tls is not None
        listeners = [
            trio.SSLListener(trio.SocketListener(trio.socket.from_stdlib_socket(one)), self._tls, https_compatible=True)
            for one in listening
        ]
        with self._accepting:
            await self._cold.serve(listeners)
        for listener in listeners:
            await listener.aclose()
