"""The hot lane: every plain connection of the port, in one task over one epoll set.

    socket ──> Reader ──> a hot route?  its handler, here and now; the answer leaves when the engine has decided
                     └──> anything else: Hypercorn with the Quart application, one request at a time (`api.cold`)
                     └──> another protocol (HTTP/2, WebSocket): the whole connection, for good

A connection is never given away for a cold request: it is read here, whole and checked, before anybody else sees it,
and what answers it writes here. So hot and cold requests may come mixed on one connection, as a proxy's do, in any
order, and are answered in that order.

What a peer can make us keep is bounded: one read beyond the request that is being answered, and one answer that it has
not read. Nothing in here awaits but the poller, so nothing needs a lock.
"""

import errno
import os
import re
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final, Protocol
from wsgiref.handlers import format_date_time

import structlog
import trio

from api import answers, errors, handlers, http1, schemas
from api.answers import JSON, Answer
from api.errors import ApiError
from api.handlers import Gate, Request, Service
from api.http1 import Message, Reader
from api.polling import READ, WRITE, EpollPoller, Poller, Ready, TaskPoller
from api.promises import drive
from api.routes import BASE_PATHS, ROUTES, Route
from api.settings import Settings
from engine.ledger import Unavailable
from engine.model import FaultCode

log = structlog.get_logger()

# Bytes of one read: a request in most cases, and all that a peer which sends without reading can make us parse ahead.
# The kernel keeps the rest. With 64 KiB, 2,520 tiny requests of one peer took 2.7 MB.
RECEIVE_MAX: Final = 4_096
BATCH_MAX: Final = 128  # sockets served before other tasks get their turn: about 4 ms
# Of these, sockets that are read before the first of those is answered that could be answered at once. Then the
# answers leave one right after the other, and find most peers awake: half of what a `send` on loopback costs is waking
# somebody. 1.4 times the no-ops a second, 1.5 times the sold-out answers (64 connections, two cores).
GATHER_MAX: Final = 32
# While sockets stand in line for so long, who was granted a unit passes it with what they ask next: a sale that was
# promised must not wait behind those who want one. Two system calls each, so not in a quiet hour.
STOOD_S: Final = 0.02
LINES_MAX: Final = 20  # of the log, for failed requests, in a second
ACCEPT_MAX: Final = 64  # connections accepted before those that are there get theirs
SILENCE_S: Final = 75.0  # without a request; longer than any answer takes, shorter than NATs forget
WRITE_S: Final = 10.0  # that a peer may leave an answer unread
LINGER_S: Final = 2.0  # that a connection stays half open after its last answer, so that the answer is not lost
SWEEP_S: Final = 0.5  # between two looks at who is late
SWEEP_SLICE: Final = 500  # connections looked at before other tasks get their turn: less than a millisecond
REPORT_S: Final = 1.0  # between two lines of the log about what was answered
# Connections beyond `connections_max` that are told so, each for up to `LINGER_S`; the next are closed without a word,
# so that they leave the descriptors alone that `front` keeps for the database.
REFUSED_MAX: Final = 100
# Heads of answers remembered within a second; where every origin may read, origins are the clients' choice.
HEADS_MAX: Final = 1_000
KNOWN_MAX: Final = 10_000  # targets whose route is remembered
ID_LENGTH: Final = 36  # of a drop's id as it is shown; other targets are found anew, and may be 2,000 bytes long

# The headers that handlers read, as they come and as handlers know them.
HEADERS: Final = tuple(
    (name.encode(), name)
    for name in (
        "x-user-id",
        "x-request-id",
        "idempotency-key",
        "content-type",
        "authorization",
        "x-user-name",
        "origin",
        "sec-fetch-site",
    )
)


class Elsewhere(Protocol):
    """Where that goes which is not ours."""

    @property
    def taken(self) -> int:
        """How many connections it has of its own."""
        ...

    def answer(self, connection: "Connection", message: Message) -> None:
        """Have one request answered; it ends in `Connection.done`."""
        ...

    def take(self, sock: socket.socket, received: bytes) -> None:
        """Take a connection over for good, with the bytes that it has sent already."""
        ...


HAS_EPOLL: Final = hasattr(select, "epoll") and hasattr(os, "eventfd")
NO_DESCRIPTOR: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
CREATED: Final = 201
FAILURES: Final = ("INTERNAL_ERROR", FaultCode.UNKNOWN)
CLOSE: Final = "Connection: close\r\n"  # in h11's spelling
NOWHERE: Final = Route("", "(no request)", handlers.health)  # of what could not be read as a request

HOT: Final = tuple(
    (route.method.encode(), re.compile((base + route.path.replace("{id}", "([0-9A-Za-z-]+)")).encode()), route)
    for base in BASE_PATHS
    for route in ROUTES
    if route.is_hot
)


class Exchange:
    """One hot request, until it is answered."""

    __slots__ = ("connection", "due", "is_head", "is_over", "origin", "request", "request_id", "route", "started_at")

    def __init__(self, connection: "Connection", route: Route, request: Request) -> None:
        self.connection = connection
        self.route = route
        self.request: Request | None = request
        self.origin = request.headers.get("origin")
        self.request_id = request.request_id
        self.started_at = self.due = 0.0
        self.is_over = False
        self.is_head = False  # the answer has no body

    def done(self, answer: Answer) -> None:
        if not self.is_over:  # else it took too long, and that was the answer
            self.is_over = True
            self.request = None  # it may be a while until nobody looks at our deadline any more
            self.connection.lane.answer(self, answer)

    def failed(self, failure: Exception) -> None:
        request, lane = self.request, self.connection.lane
        if isinstance(failure, Unavailable):  # with the database all of them fail: the report says so once
            lane.unavailable(failure)
            failure = errors.fault(FaultCode.UNAVAILABLE)
        if request is None:
            errors.explained(failure)  # nobody waits for it any more, but a bug of ours is logged
        else:
            self.done(self._explained(request, failure))

    def _explained(self, request: Request, failure: Exception) -> Answer:
        """A failure that cannot be told is a bug like those of handlers, and ends as they do: not with the server."""
        try:
            return handlers.failed(self.connection.lane.service, request, failure)
        except Exception as bug:  # noqa: BLE001 - whatever it is, nobody but its caller is to notice
            return answers.error(errors.explained(bug), self.request_id)


class Connection:
    """One peer's socket. At most one request is being answered; what was sent after it waits."""

    __slots__ = (
        "_eof",
        "_interest",
        "_is_last",
        "_is_preferred",
        "_is_starting",
        "flushed",
        "is_busy",
        "is_closed",
        "is_lingering",
        "lane",
        "out",
        "reader",
        "since",
        "sock",
    )

    def __init__(self, lane: "HotLane", sock: socket.socket) -> None:
        self.lane = lane
        self.sock = sock
        self.reader: Reader | None = None  # until the first byte: most of ten thousand idle ones never need it
        self.out = b""
        self.since = lane.now  # it began to wait for what it waits for
        self.is_busy = False
        self.is_closed = False
        self.is_lingering = False
        self.flushed: Callable[[], None] | None = None  # told when `out` is empty, or the connection is gone
        self._interest = READ
        self._is_last = False  # no request after this one
        self._is_preferred = False
        self._is_starting = False
        self._eof = False

    # From the socket ---------------------------------------------------------------------------------

    def ready(self, events: int) -> None:
        if events & WRITE:
            self._flush()
            if self.is_closed:
                return
        if events & ~WRITE:
            self._receive()

    def _receive(self) -> None:
        try:
            data = self.sock.recv(RECEIVE_MAX)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        if not data:
            # Half a close: what was asked is answered. A second one is a reset behind it: we do not look for more to
            # read, and it would be reported again and again.
            if self._eof or not (self.is_busy or self.out):
                self.close()
            else:
                self._eof = True
                self._look_for()
            return
        if self.is_lingering:
            return
        reader = self.reader
        if reader is None:
            self._receive_first(data)
            return
        had_head = not reader.is_in_head and reader.is_reading
        if not self.is_busy and not reader.is_reading:
            self.since = self.lane.now
        reader.feed(data)
        if not had_head and reader.is_reading and not reader.is_in_head:
            self.since = self.lane.now  # a body has its own time
        if self.is_busy or self.out:
            if reader.messages or reader.failure is not None:
                self._look_for()
        else:
            self.next()

    def _receive_first(self, data: bytes) -> None:
        self.reader = reader = Reader(self.lane.body_max)
        self.since = self.lane.now
        if data.startswith(http1.H2_PREFACE[:18]):
            self.leave(data)
            return
        reader.feed(data)
        self.next()

    # Requests ----------------------------------------------------------------------------------------

    def next(self) -> None:
        """Start the next request, if one is complete and the peer has read the answers before it."""
        reader = self.reader
        if self._is_starting or self.is_closed or reader is None:
            return
        self._is_starting = True  # answers may come while we start: a loop, where recursion would have no bound
        while not self.is_busy and not self.out and not self.is_closed and not self._is_last:
            if reader.messages:
                message = reader.messages.popleft()
                self.is_busy = True
                self._is_last = not message.keeps_alive
                self.prefer(is_preferred=False)
                self.lane.start(self, message)
            elif reader.failure is not None:
                self.refuse(reader.failure)
            else:
                break
        self._is_starting = False
        if self.is_closed:
            return
        if reader.awaits_continue and not self.is_busy and not self.out:
            reader.awaits_continue = False
            self.write(b"HTTP/1.1 100 \r\n\r\n")
        if self._interest != READ or reader.messages or reader.failure is not None:
            self._look_for()

    def refuse(self, failure: ApiError) -> None:
        """Answer what is no request, and close."""
        self._is_last = True
        self.write(self.lane.refuse(failure))
        self.done()

    def done(self, *, is_last: bool = False) -> None:
        """The request is answered: go on with the next, or close."""
        self.is_busy = False
        self.since = self.lane.now
        self._is_last = self._is_last or is_last or self.lane.is_draining
        if not self.out:
            self._after_answer()

    def _after_answer(self) -> None:
        if self._is_last or (self._eof and not (self.reader and self.reader.messages)):
            self._linger()
        else:
            self.next()

    @property
    def is_last(self) -> bool:
        return self._is_last or self.lane.is_draining

    # Answers -----------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Send; what the kernel does not take waits in `out`, and nothing more is read or started until it is gone."""
        if self.is_closed:
            return
        if self.out:
            self.out += data
            return
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.close()
            return
        if sent != len(data):
            self.out = data[sent:]
            self.since = self.lane.now
            self._look_for()

    def _flush(self) -> None:
        if not self.out:
            return
        try:
            sent = self.sock.send(self.out)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        self.out = self.out[sent:]
        if self.out:
            return  # its time is not begun anew: who reads a byte now and then is not reading
        if self.flushed is not None:
            self.flushed()
        if not self.is_busy:
            self._after_answer()
        if not self.is_closed:
            self._look_for()

    def _look_for(self) -> None:
        """Tell the poller what we wait for: never for more requests than the one that is being answered."""
        reader = self.reader
        has_more = reader is not None and (bool(reader.messages) or reader.failure is not None)
        is_reading = not self._eof and not self.out and not (self.is_busy and has_more)
        interest = (READ if is_reading else 0) | (WRITE if self.out else 0)
        if interest != self._interest:
            self._interest = interest
            self.lane.poller.change(self.sock, interest)

    def prefer(self, *, is_preferred: bool) -> None:
        """Whether what is sent next is read before what others have sent."""
        if is_preferred != self._is_preferred and not self.is_closed:
            self._is_preferred = is_preferred
            self.lane.poller.prefer(self.sock, self._interest, is_preferred=is_preferred)

    # The end -----------------------------------------------------------------------------------------

    def leave(self, data: bytes) -> None:
        """Another protocol, another master."""
        self._forget()
        self.lane.let_go(self.sock, data)

    def _linger(self) -> None:
        """Say that this was all, and wait for the peer to say so too: closing at once may destroy the answer."""
        if self._eof or self.is_lingering:
            self.close()
            return
        self.is_lingering = True
        self.since = self.lane.now
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()
            return
        self._look_for()

    def close(self) -> None:
        if not self.is_closed:
            self._forget()
            self.sock.close()

    def _forget(self) -> None:
        self.is_closed = True
        self.out = b""
        self.lane.forget(self)
        if self.reader is not None:
            self.reader.close()
        if self.flushed is not None:
            self.flushed()

    def end_if_late(self, now: float) -> None:
        """End it if it has kept us waiting for too long."""
        waited_s = now - self.since
        reader = self.reader
        if self.is_lingering:
            if waited_s > LINGER_S:
                self.close()
        elif self.out:
            if waited_s > WRITE_S:
                self.close()
        elif self.is_busy:
            pass  # that is our doing
        elif reader is None or not reader.is_reading:
            if waited_s > SILENCE_S:
                self.close()
        elif reader.is_in_head:
            if waited_s > http1.HEAD_S:
                self.refuse(http1.head_timed_out())
        elif waited_s > http1.BODY_S:
            self.refuse(http1.body_timed_out())

    def end_if_idle(self) -> None:
        """Close it unless something was asked, or is being asked."""
        reader = self.reader
        if not self.is_busy and not self.out and (reader is None or not reader.is_reading):
            self._linger()


class HotLane:
    """`run` it in a nursery; `cold` takes what is not ours."""

    def __init__(self, settings: Settings, gate: Gate, cold: Elsewhere, *, has_epoll: bool = HAS_EPOLL) -> None:
        self.body_max = settings.body_max_bytes
        self.now = 0.0
        self.is_draining = False
        self.poller: Poller
        self._settings = settings
        self._gate = gate
        self._cold = cold
        self._has_epoll = has_epoll
        self._answer_s = settings.answer_timeout_ms / 1000
        self._connections: dict[int, Connection] = {}
        self._deadlines: deque[Exchange] = deque()  # in the order of their `due`, since all wait equally long
        self._known: dict[tuple[bytes, bytes], tuple[Route, dict[str, str]]] = {}
        self._listening: dict[int, socket.socket] = {}
        self._is_accepting = False
        self._stood_s = 0.0
        self._gathered: list[tuple[Exchange, Answer]] | None = None  # answers that were there at once, in a slice
        self._gone = trio.lowlevel.ParkingLot()  # for one that waits until connections are
        self._report = _Report()
        self._heads: dict[tuple[int, tuple[tuple[str, str], ...], str | None, bool], tuple[str, str, str]] = {}
        self._heads_of = 0  # the second whose date they show

    # The loop ----------------------------------------------------------------------------------------

    async def run(self, listening: Iterable[socket.socket], task_status: trio.TaskStatus[None]) -> None:
        """Serve until cancelled; then cut what is left."""
        self.now = trio.current_time()
        async with trio.open_nursery() as nursery:
            self.poller = EpollPoller() if self._has_epoll else TaskPoller(nursery)
            try:
                for sock in listening:
                    sock.setblocking(False)
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # those that it accepts have it, too
                    self._listening[sock.fileno()] = sock
                self._accept_again()
                nursery.start_soon(self._sweep)
                nursery.start_soon(self._watch_deadlines)
                nursery.start_soon(self._keep_report)
                task_status.started()
                while True:
                    ready = await self.poller.wait(BATCH_MAX)
                    served = 0
                    while ready:  # what came meanwhile is worth a look: it costs a tenth of a turn of the scheduler
                        self._serve(ready)
                        served += len(ready)
                        ready = self.poller.more(BATCH_MAX - served) if served < BATCH_MAX else []
                    self._note_line()
            finally:
                self.close_door()
                self.cut()
                self.poller.close()

    def _note_line(self) -> None:
        stood_s = self.poller.stood_s
        if stood_s != self._stood_s and self.service is not None:
            self._stood_s = stood_s
            self.service.registry.stood(stood_s)

    def _serve(self, ready: Ready) -> None:
        self.now = trio.current_time()
        for begin in range(0, len(ready), GATHER_MAX):
            gathered: list[tuple[Exchange, Answer]] = []
            self._gathered = gathered
            for fd, events in ready[begin : begin + GATHER_MAX]:
                connection = self._connections.get(fd)
                if connection is not None:
                    try:
                        connection.ready(events)
                    except Exception as bug:
                        log.error("connection_failed", reason=repr(bug), exc_info=bug)
                        connection.close()
                elif fd in self._listening:
                    self._accept(self._listening[fd])
            self._gathered = None
            for exchange, answer in gathered:
                self.answer(exchange, answer)

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(ACCEPT_MAX):
            try:
                sock, _ = listening.accept()
            except BlockingIOError:
                return
            except OSError as fault:
                if fault.errno in NO_DESCRIPTOR:
                    log.error("no_descriptor_free", connections=len(self._connections))
                    self._stop_accepting()  # else we would be told of it again and again; the sweep goes on with it
                    return
                continue  # it was gone before we came
            too_many = len(self._connections) + self._cold.taken + 1 - self._settings.connections_max
            if too_many > REFUSED_MAX:
                sock.close()
                continue
            sock.setblocking(False)
            connection = Connection(self, sock)
            self._connections[sock.fileno()] = connection
            self.poller.add(sock, READ)
            if too_many > 0:
                connection.refuse(errors.fault(FaultCode.OVERLOADED))

    def _accept_again(self) -> None:
        if not self._is_accepting:
            self._is_accepting = True
            for sock in self._listening.values():
                self.poller.add(sock, READ)
                # Before all others: else those who come in while a line stands wait until they are told of, a few of
                # them, and then once more until they are read.
                self.poller.prefer(sock, READ, is_preferred=True)

    def _stop_accepting(self) -> None:
        if self._is_accepting:
            self._is_accepting = False
            for sock in self._listening.values():
                self.poller.remove(sock)

    def let_go(self, sock: socket.socket, received: bytes) -> None:
        self._cold.take(sock, received)

    def forget(self, connection: Connection) -> None:
        self.poller.remove(connection.sock)
        del self._connections[connection.sock.fileno()]
        if self.is_draining:
            self._gone.unpark_all()

    # Requests and answers ----------------------------------------------------------------------------

    def start(self, connection: Connection, message: Message) -> None:
        """Have a request answered; `connection.done` follows, maybe before this returns."""
        if message.is_upgrade:
            connection.leave(http1.serialized(message, message.fields) + message.rest)
            return
        found = self._known.get((message.method, message.target)) or self._find(message)
        if message.is_too_large:
            found = found or (NOWHERE, {})
        if found is None:
            self._cold.answer(connection, message)
            return
        route, path = found
        raw = message.headers
        headers = {name: raw[key].decode("latin-1").strip(" \t") for key, name in HEADERS if key in raw}
        request_id = schemas.request_id(headers.get("x-request-id"))
        request = Request(headers, {}, path, message.body, request_id)
        exchange = Exchange(connection, route, request)
        exchange.started_at = self.now
        exchange.due = self.now + self._answer_s
        if message.is_too_large:
            exchange.is_head = message.method == b"HEAD"
            exchange.failed(http1.body_too_large())
            return
        try:
            service = self._gate.enter()
        except ApiError as refusal:
            exchange.failed(refusal)
            return
        drive(route.handler(service, request), exchange.done, exchange.failed)
        if not exchange.is_over:
            deadlines = self._deadlines
            while deadlines and deadlines[0].is_over:
                deadlines.popleft()
            deadlines.append(exchange)

    def answer(self, exchange: Exchange, answer: Answer) -> None:
        """Send what came of a request, and go on with its connection."""
        if self._gathered is not None:
            self._gathered.append((exchange, answer))
            return
        self._report.add(exchange, answer, trio.current_time() - exchange.started_at)
        connection = exchange.connection
        if connection.is_closed:
            return
        head = self.head(answer, exchange.origin, exchange.request_id, is_last=connection.is_last)
        connection.write(head if exchange.is_head else head + answer.body)
        if exchange.route.grants and answer.status_code == CREATED and self._stood_s > STOOD_S:
            connection.prefer(is_preferred=True)
        connection.done()

    @property
    def service(self) -> Service | None:
        return self._gate.service

    def unavailable(self, fault: Unavailable) -> None:
        self._report.unavailable = str(fault)

    def head(self, answer: Answer, origin: str | None, request_id: str, *, is_last: bool) -> bytes:
        """The head of a response, to the byte as the cold lane writes it."""
        second = int(time.time())
        if second != self._heads_of or len(self._heads) > HEADS_MAX:
            self._heads_of = second
            self._heads.clear()
        if origin is not None and not self._settings.allows_origin(origin):
            origin = None  # it would be the same head, under a name of the client's choice and of any length
        key = answer.status_code, answer.headers, origin, is_last
        head = self._heads.get(key)
        if head is None:
            head = self._heads[key] = self._new_head(*key)
        before, between, after = head
        return f"{before}{len(answer.body)}{between}{request_id}{after}".encode("latin-1")

    def _new_head(
        self, status_code: int, headers: tuple[tuple[str, str], ...], origin: str | None, is_last: bool
    ) -> tuple[str, str, str]:
        """The head of this second, without the length of the body and without the request's id."""
        more = "".join(f"{name.lower()}: {value}\r\n" for name, value in headers)
        cors = "".join(f"{name.lower()}: {value}\r\n" for name, value in answers.allowing(self._settings, origin))
        return (
            f"HTTP/1.1 {status_code} \r\ncontent-type: {JSON}\r\ncontent-length: ",
            f"\r\n{more}x-request-id: ",
            "\r\nx-content-type-options: nosniff\r\ncache-control: no-store\r\nvary: Origin\r\n"
            f"{cors}date: {format_date_time(self._heads_of)}\r\n{CLOSE if is_last else ''}\r\n",
        )

    def refuse(self, failure: ApiError) -> bytes:
        """What is said to a peer whose bytes are no request: the last that it hears."""
        request_id = schemas.request_id(None)
        answer = answers.error(failure, request_id)
        self._report.count(NOWHERE.path, answer)
        return self.head(answer, None, request_id, is_last=True) + answer.body

    def _find(self, message: Message) -> tuple[Route, dict[str, str]] | None:
        """The hot route of a request, if it has one; anything odd about its target makes it cold."""
        for method, pattern, route in HOT:
            if method == message.method and (match := pattern.fullmatch(message.target)) is not None:
                found = route, {"id": match[1].decode()}
                # The same few drops, over and over; a reservation is cancelled once.
                if method != b"DELETE" and len(match[1]) == ID_LENGTH:
                    if len(self._known) >= KNOWN_MAX:
                        self._known.clear()
                    self._known[method, message.target] = found
                return found
        return None

    # Who is late -------------------------------------------------------------------------------------

    async def _watch_deadlines(self) -> None:
        """Tell callers that it is not known what became of their request, when that has taken too long."""
        deadlines = self._deadlines
        while True:
            while deadlines and (deadlines[0].is_over or deadlines[0].due <= trio.current_time()):
                exchange = deadlines.popleft()
                exchange.failed(errors.fault(exchange.route.late))
            due = deadlines[0].due if deadlines else trio.current_time() + self._answer_s
            await trio.sleep_until(due)

    async def _sweep(self) -> None:
        while True:
            await trio.sleep(SWEEP_S)
            if not self.is_draining:
                self._accept_again()
            connections = list(self._connections.values())
            for begin in range(0, len(connections), SWEEP_SLICE):
                self.now = trio.current_time()
                for connection in connections[begin : begin + SWEEP_SLICE]:
                    if not connection.is_closed:
                        connection.end_if_late(self.now)
                await trio.lowlevel.checkpoint()

    async def _keep_report(self) -> None:
        while True:
            await trio.sleep(REPORT_S)
            self._report.write()

    # The end -----------------------------------------------------------------------------------------

    def close_door(self) -> None:
        """Accept no more connections."""
        self.is_draining = True
        self._stop_accepting()
        for sock in self._listening.values():
            sock.close()
        self._listening.clear()

    async def drain(self) -> None:
        """Wait until every connection has had its answers and is closed; each gets no more than those."""
        for connection in list(self._connections.values()):
            connection.end_if_idle()
        while self._connections:
            await self._gone.park()

    def cut(self) -> None:
        """Close every connection, whatever it waits for."""
        for connection in list(self._connections.values()):
            connection.close()
        self._report.write()


class _Report:
    """What was answered since the last line of the log: one line a second for all, one more for each that failed.

    A request that failed for no reason of its own is not lost in a sum: `INTERNAL_ERROR` and `OUTCOME_UNKNOWN` have a
    line each, up to `LINES_MAX` a second: writing one costs as much as serving two requests. Of refusals with 503
    nothing happened, and there may be as many of them as requests.
    """

    def __init__(self) -> None:
        self.unavailable: str | None = None  # why the database could not be asked
        self._counts: dict[tuple[str, int, str], int] = {}
        self._failed = 0
        self._spent_s = 0.0
        self._slowest_s = 0.0

    def add(self, exchange: Exchange, answer: Answer, spent_s: float) -> None:
        key = exchange.route.path, answer.status_code, answer.code
        self._counts[key] = self._counts.get(key, 0) + 1
        self._spent_s += spent_s
        if spent_s > self._slowest_s:
            self._slowest_s = spent_s
        if answer.code in FAILURES:
            self._failed += 1
            if self._failed > LINES_MAX:
                return
            log.error(
                "request_failed",
                method=exchange.route.method,
                route=exchange.route.path,
                code=answer.code,
                ms=round(spent_s * 1000, 3),
                request_id=exchange.request_id,
            )

    def count(self, path: str, answer: Answer) -> None:
        key = path, answer.status_code, answer.code
        self._counts[key] = self._counts.get(key, 0) + 1

    def write(self) -> None:
        """Say what there is to say, and begin anew."""
        if self.unavailable is not None:
            log.warning("database_unavailable", reason=self.unavailable)
        if self._failed > LINES_MAX:
            log.error("more_requests_failed", without_a_line=self._failed - LINES_MAX)
        if self._counts:
            requests = sum(self._counts.values())
            counts = sorted(self._counts.items())
            log.info(
                "hot_requests",
                requests=requests,
                mean_ms=round(self._spent_s / requests * 1000, 3),
                slowest_ms=round(self._slowest_s * 1000, 3),
                answers={f"{path} {status} {code}".strip(): number for (path, status, code), number in counts},
            )
        self.unavailable = None
        self._counts = {}
        self._failed = 0
        self._spent_s = self._slowest_s = 0.0
