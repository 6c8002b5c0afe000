"""A TCP proxy between the engine and PostgreSQL that breaks the connection where it hurts: at a batch's commit.

It understands as much of the protocol as that takes: where messages begin and end, and which `Bind` belongs to the
writer's statements `commit` and `birth` (`persistence.ledger`). A test queues strikes; each waits for the next such
statement on any connection, and then does what its `Fault` says. Everything else passes unchanged.

Threads and blocking sockets, on purpose: it goes on while the test's own loop is blocked.
"""

import contextlib
import random
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from enum import Enum, auto
from typing import Final, Self

from psycopg.conninfo import conninfo_to_dict

from persistence import batch_sql
from tests.ports import free_port

_STATEMENTS: Final = tuple(batch_sql.STATEMENTS)
_NO_ENCRYPTION: Final = b"N"
_SSL_REQUEST, _GSS_REQUEST, _CANCEL_REQUEST = 80877103, 80877104, 80877102
_FLUSH: Final = b"H\x00\x00\x00\x04"
_RST_ON_CLOSE: Final = struct.pack("ii", 1, 0)  # SO_LINGER for no seconds


class Fault(Enum):
    """What becomes of one commit. In those marked (open) the server's side of the connection stays as it is."""

    CUT_BEFORE = auto()  # nothing reaches the server
    CUT_AFTER = auto()  # the server has committed, its answer gets lost
    RESET_BEFORE = auto()  # the same two with a RST instead of a FIN
    RESET_AFTER = auto()
    SILENT_BEFORE = auto()  # (open) nothing reaches the server, and nobody is told
    SILENT_AFTER = auto()  # (open) committed, and nobody is told
    LATE = auto()  # (open) the engine is cut off; the server gets the batch `delay_s` later
    UNENDED = auto()  # (open) the server has run the batch and waits for its end; the engine is cut off
    LATE_END = auto()  # (open) the same, but the end comes `delay_s` later: only then it commits
    MID_BATCH = auto()  # the server gets the first bytes of the batch, and the connection's end
    MID_ANSWER = auto()  # the server has committed, the engine gets the first bytes of its answer
    FROZEN = auto()  # the batch, and all behind it, is held up for `delay_s`, and then passes
    DELAYED = auto()  # the answer comes, `delay_s` late
    SLICED = auto()  # both ways in pieces of a few bytes


class Strike:
    """One fault, waiting for its commit. `struck` is set when that came, `over` when nothing more will happen.

    `share` is how much of what is cut in the middle gets through, from 0 to 1.
    """

    def __init__(self, fault: Fault, delay_s: float, share: float) -> None:
        self.fault = fault
        self.delay_s = delay_s
        self.share = share
        self.struck = threading.Event()
        self.over = threading.Event()


class Proxy:
    """`with Proxy(port) as proxy:` listens on `proxy.port` and passes everything on to `port` of 127.0.0.1."""

    def __init__(self, to_port: int, listen: Callable[[int], socket.socket] | None = None) -> None:
        """`listen` makes a listener on a port; without it, one on 127.0.0.1."""
        self.port = free_port()
        self.to_port = to_port
        self._listen = listen or _listen_here
        self.commits = 0  # that came by, struck or not
        self._strikes: deque[Strike] = deque()
        self._links: set[_Link] = set()
        self._threads: list[threading.Thread] = []
        self._listener: socket.socket | None = None
        self._host = ""
        self._lock = threading.Lock()
        self._flows = threading.Event()
        self._flows.set()

    def dsn(self, direct: str) -> str:
        """The DSN of the same database through here."""
        database = conninfo_to_dict(direct)["dbname"]
        return f"postgresql://postgres@{self._host}:{self.port}/{database}?sslmode=disable&gssencmode=disable"

    def __enter__(self) -> Self:
        self.accept()
        return self

    def __exit__(self, *_: object) -> None:
        self.refuse()
        self._flows.set()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive(), "a thread of the proxy hangs"

    # What a test asks for ------------------------------------------------------------------------------

    def strike(self, fault: Fault, *, delay_s: float = 0.0, share: float = 0.5) -> Strike:
        """Let `fault` befall the next commit that no earlier strike takes."""
        strike = Strike(fault, delay_s, share)
        self._strikes.append(strike)
        return strike

    def refuse(self) -> None:
        """Cut every connection, both sides, and refuse new ones, as when the server is down."""
        with self._lock:
            listener, self._listener = self._listener, None
            links = list(self._links)
        if listener is not None:
            _end(listener)
        for link in links:
            link.end()

    def accept(self) -> None:
        """Listen, at the start and after `refuse`."""
        listener = self._listen(self.port)
        self._host = listener.getsockname()[0]
        with self._lock:
            self._listener = listener
        self.spawn(self._accept, listener)

    def freeze(self) -> None:
        """Pass nothing on any more and close nothing, as a network that swallows every packet."""
        self._flows.clear()

    def thaw(self) -> None:
        self._flows.set()

    # What its threads use ------------------------------------------------------------------------------

    def spawn(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        thread.start()
        with self._lock:
            self._threads = [one for one in self._threads if one.is_alive()] + [thread]

    def take_strike(self) -> Strike | None:
        with self._lock:
            self.commits += 1
            strike = self._strikes.popleft() if self._strikes else None
        if strike is not None:
            strike.struck.set()
        return strike

    def wait_for_flow(self) -> None:
        self._flows.wait()

    def forget(self, link: "_Link") -> None:
        with self._lock:
            self._links.discard(link)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                engine, _ = listener.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self.to_port), timeout=5)
                except OSError:
                    _end(engine)
                    continue
                server.settimeout(None)
                link = _Link(self, engine, server)
                with self._lock:
                    is_refused = self._listener is not listener
                    if not is_refused:
                        self._links.add(link)
                if is_refused:
                    link.end()
                    return
                self.spawn(link.forward)
                self.spawn(link.backward)


class _Link:
    """One connection of the engine, and the one to the server that belongs to it."""

    def __init__(self, proxy: Proxy, engine: socket.socket, server: socket.socket) -> None:
        self._proxy = proxy
        self._engine = engine
        self._server = server
        self._strike: Strike | None = None  # one that acts on the server's answer
        self._late: Strike | None = None  # one that is over when the server has answered
        self._swallows = False  # nothing reaches the engine any more
        self._stays_open = False  # the server's side outlives the engine's
        for side in (engine, server):
            side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def end(self) -> None:
        self._stays_open = False
        _end(self._engine)
        _end(self._server)

    # From the engine to the server ---------------------------------------------------------------------

    def forward(self) -> None:
        try:
            self._start()
            messages = _messages(self._engine)
            for kind, message in messages:
                if kind == b"B" and _statement_of(message) in _STATEMENTS:
                    batch = [message]
                    while kind != b"S":
                        kind, message = next(messages)
                        batch.append(message)
                    self._pass_batch(batch)
                else:
                    self._to_server(message)
        except (OSError, StopIteration):
            pass
        finally:
            if not self._stays_open:
                self.end()

    def _start(self) -> None:
        """The first messages carry no type. Encryption is declined, in the server's name."""
        while True:
            length = _exactly(self._engine, 4)
            rest = _exactly(self._engine, int.from_bytes(length) - 4)
            if int.from_bytes(rest[:4]) not in (_SSL_REQUEST, _GSS_REQUEST):
                self._to_server(length + rest)
                return
            self._engine.sendall(_NO_ENCRYPTION)

    def _pass_batch(self, batch: list[bytes]) -> None:
        strike = self._proxy.take_strike()
        if strike is None:
            self._to_server(b"".join(batch))
            return
        match strike.fault:
            case Fault.CUT_BEFORE | Fault.RESET_BEFORE:
                _end(self._engine, reset=strike.fault is Fault.RESET_BEFORE)
                strike.over.set()
            case Fault.MID_BATCH:
                whole = b"".join(batch)
                self._to_server(whole[: _first(strike.share, len(whole))])
                self.end()
                strike.over.set()
            case Fault.FROZEN:
                self._later(strike, b"".join(batch))
            case Fault.CUT_AFTER | Fault.RESET_AFTER | Fault.MID_ANSWER | Fault.DELAYED:
                self._strike = strike
                self._to_server(b"".join(batch))
            case Fault.SILENT_BEFORE:
                self._swallows = self._stays_open = True
                strike.over.set()
                _drain(self._engine)
            case Fault.SILENT_AFTER:
                self._swallows = self._stays_open = True
                self._to_server(b"".join(batch))
                strike.over.set()
                _drain(self._engine)
            case Fault.LATE:
                self._lose_engine()
                self._later(strike, b"".join(batch))
            case Fault.UNENDED | Fault.LATE_END:
                self._strike = strike
                self._swallows = True
                self._to_server(b"".join(batch[:-1]) + _FLUSH)
                # `backward` cuts the engine off, once the server has run the statement.
                self._stays_open = True
                _drain(self._engine)
                if strike.fault is Fault.LATE_END:
                    self._later(strike, batch[-1])
            case Fault.SLICED:
                self._strike = strike
                for piece in _slices(b"".join(batch)):
                    self._to_server(piece)

    def _to_server(self, message: bytes) -> None:
        self._proxy.wait_for_flow()
        self._server.sendall(message)

    def _lose_engine(self) -> None:
        self._swallows = self._stays_open = True
        _end(self._engine)

    def _later(self, strike: Strike, message: bytes) -> None:
        time.sleep(strike.delay_s)
        self._late = strike
        try:
            self._server.sendall(message)
        except OSError:  # the engine had the session ended meanwhile
            strike.over.set()

    # From the server to the engine ---------------------------------------------------------------------

    def backward(self) -> None:
        try:
            for kind, message in _messages(self._server):
                self._pass_answer(kind, message)
                if kind == b"Z" and self._late is not None:
                    self._late.over.set()
        except OSError:
            pass
        finally:
            if self._late is not None:
                self._late.over.set()
            self.end()
            self._proxy.forget(self)

    def _pass_answer(self, kind: bytes, message: bytes) -> None:
        strike = self._strike
        if strike is None:
            self._to_engine(message)
            return
        match strike.fault:
            case Fault.CUT_AFTER | Fault.RESET_AFTER:
                if kind == b"Z":  # ready for the next statement: this one has ended, and so committed
                    _end(self._engine, reset=strike.fault is Fault.RESET_AFTER)
                    strike.over.set()
            case Fault.MID_ANSWER:
                if not self._swallows:
                    self._to_engine(message[: _first(strike.share, len(message))])
                    self._swallows = True
                if kind == b"Z":
                    _end(self._engine)
                    strike.over.set()
            case Fault.UNENDED | Fault.LATE_END:
                if kind in b"CE":  # it has run, or failed
                    self._strike = None
                    self._lose_engine()
                    if strike.fault is Fault.UNENDED:
                        strike.over.set()
            case Fault.DELAYED:
                time.sleep(strike.delay_s)
                self._strike = None
                self._to_engine(message)
                strike.over.set()
            case Fault.SLICED:
                for piece in _slices(message):
                    self._to_engine(piece)
                if kind == b"Z":
                    self._strike = None
                    strike.over.set()

    def _to_engine(self, message: bytes) -> None:
        self._proxy.wait_for_flow()
        if not self._swallows:
            self._engine.sendall(message)


def _listen_here(port: int) -> socket.socket:
    return socket.create_server(("127.0.0.1", port), backlog=128)


# The protocol and the sockets ---------------------------------------------------------------------------


def _messages(side: socket.socket) -> Iterator[tuple[bytes, bytes]]:
    """(type, the whole message) until the peer closes."""
    buffer = bytearray()
    while received := side.recv(65_536):
        buffer += received
        while len(buffer) >= 5:
            end = 1 + int.from_bytes(buffer[1:5])
            if len(buffer) < end:
                break
            message = bytes(buffer[:end])
            del buffer[:end]
            yield message[:1], message


def _statement_of(bind: bytes) -> bytes:
    portal_end = bind.index(b"\0", 5)
    return bind[portal_end + 1 : bind.index(b"\0", portal_end + 1)]


def _exactly(side: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        more = side.recv(size - len(received))
        if not more:
            raise ConnectionError("closed in the middle of a message")
        received += more
    return received


def _first(share: float, size: int) -> int:
    """So many bytes of `size`: at least one, and not all."""
    return min(max(1, int(share * size)), size - 1)


def _slices(message: bytes) -> Iterator[bytes]:
    start = 0
    while start < len(message):
        # Small ones first, where the headers are; a megabyte by the byte would take for ever.
        size = random.randint(1, 7) if start < 200 else random.randint(100, 1000)
        yield message[start : start + size]
        start += size


def _drain(side: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while side.recv(65_536):
            pass


def _end(side: socket.socket, *, reset: bool = False) -> None:
    with contextlib.suppress(OSError):
        if reset:
            side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST_ON_CLOSE)
            side.shutdown(socket.SHUT_RD)  # wakes the thread that reads, and sends nothing
        else:
            side.shutdown(socket.SHUT_RDWR)
    side.close()
