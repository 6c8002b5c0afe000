"""The live feed as server-sent events: `GET /api/v1/live/events?drops=<id>,<id>`, or `drops=*`.

    retry: 1731                   at which a page comes back, each at a time of its own
    event: snapshot               data: {"type": "snapshot", "seq", "drop"}, for each drop; then
    event: STOCK_UPDATED          data: {"type": "event", "event", "seq", "at", "data"}, in the order of `seq`
    id: 5d41402abc4b.17.4         how far this stream has heard: `Last-Event-ID` resumes there
    :                             now and then, so that nobody in between thinks us dead

What is told is encoded once for all streams; the id is each stream's own, so it stands after whatever left in one send,
with its last event. An event without one is followed by one that has it: a page whose connection breaks between the
two hears the first again. It is never ahead of what was sent.

    drops by name   a digest of the list, then in its order the `seq` up to which each drop was told; 0: not at all.
                    With another list the id means nothing, and every drop is shown anew
    all             "*", then id and `seq` of each drop of which the page has heard. That is bounded: with more than
                    `NAMED_MAX` of them the id is "**", and whoever resumes there, or at an id that we don't understand,
                    gets `event: reset` (forget what you know, some of it may have ended meanwhile) and then everything

A stream on a connection of HTTP/1.1 is one of the sockets of `api.sockets`: the hub's bytes go straight into it. It has
no length and no chunks; its end is the connection's. HTTP/2 (and a later request on a connection with TLS) comes
through Quart: there a `Pipe` keeps one send of the hub's until Hypercorn has taken it, and Hypercorn at most 32 KiB of
what the peer's window does not let out. Either way a reader that is too slow is conflated by the hub, and after its
time limit sent away.

A browser gives a stream up for good at any status but 200. So a page that comes while we cannot serve it, which
elsewhere is 503, gets a stream that ends after its `retry`: it comes again by itself, as after a break.
"""

import base64
import hashlib
import random
import re
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from typing import Final, Protocol
from urllib.parse import parse_qs

import msgspec
import trio
from quart import Response, request
from quart_trio import QuartTrio

from api import feed, handlers, opening, schemas
from api.errors import ApiError, Detail, explained, invalid
from api.handlers import Gate, Service
from api.live import DROPS_MAX
from api.opening import Opening
from api.promises import in_trio
from api.settings import Settings
from api.viewers import ViewerStream
from engine.drop import Drop
from engine.hub import News, Watch
from engine.model import DropId, UserId

PATHS: Final = ("/api/v1/live/events", "/api/live/events")
NAMED_MAX: Final = 32  # drops that the id of a stream of all drops names: about 1 KiB with each send
RETRY_MS: Final = (500, 5_000)
BEAT_S: Final = (15.0, 20.0)  # between two comments, and what a sweep may take more
SWEEP_S: Final = 5.0
UNASKED_MAX: Final = 65_536  # bytes that a client may say although it has nothing to say any more
EVENT_STREAM: Final = "text/event-stream"
HEADERS: Final = (("Content-Type", f"{EVENT_STREAM}; charset=utf-8"), ("X-Accel-Buffering", "no"))
BEAT: Final = b":\n\n"
RESET: Final = b'event: reset\ndata: {"type":"reset"}\n\n'
ALL: Final = "*"
TOO_MANY: Final = "**"
BY_NAME: Final = re.compile(r"([0-9a-f]{12})((?:\.[0-9]{1,15})+)")
OF_ALL: Final = re.compile(r"\*((?:[0-9A-Za-z_-]{22}\.[0-9]{1,15}(?:~[0-9A-Za-z_-]{22}\.[0-9]{1,15})*)?)")
MARK: Final = b"\0"  # before what the dialect says to the streams: nothing in JSON has this byte

_encode = msgspec.json.encode


class Dialect:
    """How a stream is told. Before the events stands which drop they are of, and how far: that is for the stream."""

    def __init__(self) -> None:
        self._data = b""
        self._read: tuple[bytes, list[tuple[DropId, int]]] = b"", []

    def news(self, news: News, user_id: UserId | None) -> bytes:
        blocks = b"".join(
            _block(
                message.name,
                feed.as_event(message),
            )
            for message in feed.messages(news)
            if message.only_for is None or message.only_for == user_id
        )
        seqs = [told.event.seq for told in news.events[-1:]] + ([] if news.stock is None else [news.stock.seq])
        return blocks and _marked(news.drop, max(seqs), blocks)

    def snapshot(self, drop: Drop) -> bytes:
        block = _block("snapshot", feed.as_snapshot(drop))
        return _marked(drop, drop.seq, block)

    def read(self, data: bytes) -> tuple[bytes, list[tuple[DropId, int]]]:
        """What goes out of `data`, and up to where it tells which drops. The same bytes come for many streams."""
        if data is not self._data:
            texts: list[bytes] = []
            heard: list[tuple[DropId, int]] = []
            for part in data.split(MARK)[1:]:
                mark, _, text = part.partition(b"\n")
                drop_id, _, seq = mark.decode().partition(" ")
                texts.append(text)
                heard.append((DropId(drop_id), int(seq)))
            self._data, self._read = data, (b"".join(texts), heard)
        return self._read


def _block(name: str, message: Mapping[str, object]) -> bytes:
    """An event that the empty line at the beginning of the next one ends, or what a stream adds behind the last."""
    return b"\nevent: %s\ndata: %s\n" % (name.encode(), _encode(message))


def _marked(drop: Drop, seq: int, blocks: bytes) -> bytes:
    return b"%s%s %d\n%s" % (MARK, drop.terms.id.encode(), seq, blocks)


EVENTS: Final = Dialect()


# Positions --------------------------------------------------------------------------------------------


class Position(Protocol):
    """Up to where a stream has heard of its drops."""

    def heard(self, drop_id: DropId, seq: int) -> None: ...

    def id(self) -> str: ...


class PositionByName:
    def __init__(self, drop_ids: Sequence[DropId]) -> None:
        self._seqs = dict.fromkeys(drop_ids, 0)
        self._digest = hashlib.blake2b(",".join(drop_ids).encode(), digest_size=6).hexdigest()

    def resume(self, text: str) -> dict[DropId, int]:
        """Start where an id of the same list says; what it says."""
        found = BY_NAME.fullmatch(text)
        if found is None or found[1] != self._digest:
            return {}
        seqs = [int(seq) for seq in found[2][1:].split(".")]
        if len(seqs) != len(self._seqs):
            return {}
        told = {drop_id: seq for drop_id, seq in zip(self._seqs, seqs, strict=True) if seq > 0}
        self._seqs |= told
        return told

    def heard(self, drop_id: DropId, seq: int) -> None:
        if drop_id in self._seqs:
            self._seqs[drop_id] = seq

    def id(self) -> str:
        return ".".join((self._digest, *map(str, self._seqs.values())))


class PositionOfAll:
    def __init__(self) -> None:
        self._seqs: dict[DropId, int] = {}
        self._has_room = True

    def resume(self, text: str) -> dict[DropId, int] | None:
        """Start where an id says; what it says. None: it does not say everything that the page has heard of."""
        found = OF_ALL.fullmatch(text)
        if found is None:
            return None
        for word in found[1].split("~") if found[1] else ():
            short, _, seq = word.partition(".")
            self.heard(_long(short), int(seq))
        return dict(self._seqs) if self._has_room else None

    def heard(self, drop_id: DropId, seq: int) -> None:
        if not self._has_room:
            return
        self._seqs[drop_id] = seq
        if len(self._seqs) > NAMED_MAX:
            self._has_room = False
            self._seqs.clear()

    def id(self) -> str:
        if not self._has_room:
            return TOO_MANY
        return ALL + "~".join(f"{_short(drop_id)}.{seq}" for drop_id, seq in self._seqs.items())


def _short(drop_id: DropId) -> str:
    return base64.urlsafe_b64encode(uuid.UUID(drop_id).bytes)[:22].decode()


def _long(short: str) -> DropId:
    return DropId(str(uuid.UUID(bytes=base64.urlsafe_b64decode(short + "=="))))


# Streams ----------------------------------------------------------------------------------------------


class Wanted(msgspec.Struct, frozen=True):
    """What a request asks for; `drop_ids` None: all."""

    drop_ids: list[DropId] | None
    last_id: str
    user_id: UserId | None


async def wanted(service: Service, query: str, headers: Mapping[str, str]) -> Wanted:
    """Read a request; the drops that it names are on the board afterwards.

    Raises:
        ApiError: it asks for what is not there, or in a way that is not understood.
    """
    user_id: UserId | None = None
    if "x-user-id" in headers or "authorization" in headers:
        user_id = (await in_trio(service.auth.caller(headers))).user_id
    asked = parse_qs(query, keep_blank_values=True, max_num_fields=None).get("drops", [""])[-1]
    last_id = headers.get("last-event-id", "")
    if asked == ALL:
        return Wanted(None, last_id, user_id)
    words = [word.strip() for word in asked.split(",") if word.strip()]
    if not words:
        raise invalid([Detail("drops", 'must name drops, with commas between them, or be "*" for all')])
    if len(words) > DROPS_MAX:
        raise invalid([Detail("drops", f'must not name more than {DROPS_MAX} drops; "*" is for all')])
    drop_ids = list(dict.fromkeys(DropId(schemas.path_id("drops", word)) for word in words))
    with handlers.finding():
        for drop_id in drop_ids:
            await in_trio(handlers.find_drop(service, drop_id))
    return Wanted(drop_ids, last_id, user_id)


def retry() -> bytes:
    """At which a page comes back, each at a time of its own."""
    return b"retry: %d\n\n" % random.randint(*RETRY_MS)


def is_to_come_again(failure: ApiError, headers: Mapping[str, str]) -> bool:
    """Whether a page failed that would not come again by itself, and it is we who cannot serve it now."""
    return failure.status_code == 503 and EVENT_STREAM in headers.get("accept", "").lower()


class Sink(Protocol):
    """Where a stream's bytes go."""

    drained: Callable[[], None] | None  # called when it has room again

    @property
    def has_room(self) -> bool: ...

    def send(self, data: bytes) -> bool: ...


class Stream:
    """One client's stream of events, from `begin` on."""

    dialect = EVENTS
    direct = None  # each stream's text has an id of its own

    def __init__(self, service: Service, asked: Wanted, sink: Sink, end: Callable[[], None]) -> None:
        """`end` has the connection, or the answer, come to its end."""
        self.watch: Watch = service.hub.watch(self)
        self.opening = retry()  # what the client hears before anything else
        self._service = service
        self._drop_ids = asked.drop_ids
        self._sink = sink
        self._end = end
        self._beat_at = _next_beat()
        self._position: Position
        self._resume: dict[DropId, int] = {}
        if asked.user_id is not None:
            self.watch.identify(asked.user_id)
        if asked.drop_ids is not None:
            by_name = self._position = PositionByName(asked.drop_ids)
            self._resume = by_name.resume(asked.last_id)
        else:
            of_all = self._position = PositionOfAll()
            resume = of_all.resume(asked.last_id) if asked.last_id else {}
            if resume is None:
                self.opening += RESET
                self._position = PositionOfAll()
            else:
                self._resume = resume

    async def begin(self) -> None:
        """Subscribe; what there is to be said comes at once."""
        self._sink.drained = self.watch.drained
        if self._drop_ids is not None:
            self.watch.subscribe(self._drop_ids, self._resume)
            return
        # One that has ended meanwhile may be in the tables alone.
        await handlers.try_to_find_drops(self._service, self._resume)
        self.watch.subscribe_all(self._resume)

    def send(self, data: bytes) -> bool:
        if not self._sink.has_room:
            return False
        text, heard = EVENTS.read(data)
        for drop_id, seq in heard:
            self._position.heard(drop_id, seq)
        return self._sink.send(b"%sid: %s\n\n" % (text, self._position.id().encode()))

    def keep(self, rest: bytes) -> None:
        raise AssertionError("nothing was sent past us")

    def send_away(self) -> None:
        self.end()

    def beat(self, now: float) -> None:
        if now >= self._beat_at:
            self._beat_at = _next_beat()
            if self._sink.has_room:
                self._sink.send(BEAT)

    def end(self) -> None:
        self.watch.close()
        self._end()


def _next_beat() -> float:
    return trio.current_time() + random.uniform(*BEAT_S)


class Events:
    """All streams. `run` it in a nursery."""

    def __init__(self, settings: Settings, gate: Gate) -> None:
        self._settings = settings
        self._gate = gate
        self._streams: set[Stream] = set()

    async def run(self) -> None:
        """Keep the streams alive."""
        while True:
            await trio.sleep(SWEEP_S)
            now = trio.current_time()
            for stream in list(self._streams):
                stream.beat(now)

    def stop(self) -> None:
        """End every stream; the pages come again, each when its `retry` says."""
        for stream in list(self._streams):
            stream.end()

    @contextmanager
    def _open(self, service: Service, asked: Wanted, sink: Sink, end: Callable[[], None]) -> Iterator[Stream]:
        stream = Stream(service, asked, sink, end)
        self._streams.add(stream)
        try:
            yield stream
        finally:
            self._streams.discard(stream)
            stream.watch.close()

    # On a connection of its own ----------------------------------------------------------------------

    async def serve(self, connection: ViewerStream, nursery: trio.Nursery) -> None:
        """One connection, from the request that it has sent to its end."""
        begun: Opening | None = None
        try:
            begun = opening.read(await connection.receive_some())
            service = self._gate.enter()
            asked = await wanted(service, begun.query, begun.headers)
        except Exception as failure:  # noqa: BLE001 - explained to whom it concerns, and logged there
            told = explained(failure)
            if begun is not None and is_to_come_again(told, begun.headers):
                connection.write(opening.head(self._settings, 200, HEADERS, begun) + retry())
            else:
                connection.write(opening.refusal(self._settings, told, begun))
            return

        with trio.CancelScope() as serving:

            def end() -> None:
                # What is left for a reader that does not read would have its end wait for it.
                serving.cancel() if connection.has_room else connection.cut()

            with self._open(service, asked, connection, end) as stream:
                connection.write(opening.head(self._settings, 200, HEADERS, begun) + stream.opening)
                await stream.begin()
                await _hear_out(connection)

    # Through Quart -----------------------------------------------------------------------------------

    def register(self, app: QuartTrio) -> None:
        for path in PATHS:
            app.add_url_rule(path, path, self._answer, methods=["GET"])

    async def _answer(self) -> Response:
        headers = {name.lower(): value for name, value in request.headers.items()}
        try:
            service = self._gate.enter()
            asked = await wanted(service, request.scope["query_string"].decode("latin-1"), headers)
        except Exception as failure:  # noqa: BLE001 - raised again, or told and logged as everywhere
            told = explained(failure)
            if request.method == "HEAD" or not is_to_come_again(told, headers):
                raise told from None
            return _streaming(Response(retry()))
        pipe = Pipe()
        response = EventsResponse(pipe)

        @asynccontextmanager
        async def streaming() -> AsyncIterator[None]:
            with self._open(service, asked, pipe, pipe.end) as stream:
                pipe.send(stream.opening)
                await stream.begin()
                yield

        if request.method == "HEAD":
            pipe.end()
        else:
            response.streaming = streaming
        return _streaming(response)


def _streaming(response: Response) -> Response:
    for name, value in HEADERS:
        response.headers[name] = value
    return response


class Pipe:
    """The body of an answer: one send of the hub's, until Hypercorn has taken it."""

    def __init__(self) -> None:
        self.drained: Callable[[], None] | None = None
        self._data = b""
        self._is_taking = False
        self._is_over = False
        self._bell = trio.lowlevel.ParkingLot()

    @property
    def has_room(self) -> bool:
        return not self._data and not self._is_over

    def send(self, data: bytes) -> bool:
        if not self.has_room:
            return False
        self._data = data
        self._bell.unpark_all()
        return True

    def end(self) -> None:
        self._is_over = True
        self._bell.unpark_all()

    def __aiter__(self) -> "Pipe":
        return self

    async def __anext__(self) -> bytes:
        if self._is_taking:
            self._is_taking = False
            self._data = b""
            if self.drained is not None:
                self.drained()
        while not self._data:
            if self._is_over:
                raise StopAsyncIteration
            await self._bell.park()
        self._is_taking = True
        return self._data


class EventsResponse(Response):
    """An answer without an end; what sends it has `streaming` around that."""

    streaming: Callable[[], AbstractAsyncContextManager[None]] | None = None

    def __init__(self, pipe: Pipe) -> None:
        super().__init__(pipe)
        self.timeout = None


async def _hear_out(connection: ViewerStream) -> None:
    """Read until the client is gone. It has nothing to say."""
    left = UNASKED_MAX
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        while left > 0:
            said = await connection.receive_some()
            if not said:
                return
            left -= len(said)
