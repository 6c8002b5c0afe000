"""One connection, whatever is said on it: what came back, answer by answer, and how it ended.

It takes no word of a request for granted, so answers are told apart by how they begin. An end that does not come is
told from one that comes late by asking the same server something else on another connection: it has one thread, and
has heard us before.
"""

import re
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from enum import StrEnum
from itertools import accumulate, pairwise
from typing import Final, NamedTuple

import msgspec
import trio

from tests.contract.test_lanes import blanked
from tests.proof.fuzz.arena import OWNER, PATIENCE_S, Lane

ANSWER: Final = re.compile(rb"HTTP/1\.1 (\d{3}) [^\r\n]*\r\n")
PROBE: Final = b"GET /api/v1/reservations/me HTTP/1.1\r\nHost: 127.0.0.1\r\nX-User-Id: " + OWNER.encode() + b"\r\n\r\n"
PROBES: Final = 3  # one after the other: the longest way of a request has a few turns of the scheduler
QUIET_S: Final = 0.03  # without a byte, after which we ask whether there is more to come
IDLE_S: Final = 30.0  # after which a connection may be about to be closed
TALK_S: Final = 1.0  # that a feed may go on telling the news, before we stop waiting for what was to come
GOOD_BYE_S: Final = 10.0  # that an answer to a good-bye may take
GAP_S: Final = 0.001  # between two pieces, so that the server reads one before the other

# What the lanes' own counts and each attempt's history make different, beside what `blanked` takes out.
COUNTS: Final = (
    (rb'"(available_stock|availableStock|seq|epoch)":\d+', rb'"\1":<n>'),
    (rb'"(latest_purchasers|latestPurchasers)":\[[^\]]*\]', rb'"\1":[]'),
    (rb'"username":"(user_[0-9a-f]{12})[^"]*"', rb'"username":"\1"'),
    (rb"\r\ncontent-length: \d+", b"\r\ncontent-length: <n>"),  # which has been compared with the body
)


class Ending(StrEnum):
    """What is done when all has been sent."""

    READ = "read"  # until the server closes, or has no more to say
    HALF = "half"  # closed; then as before
    CUT = "cut"  # gone at once, without a look at what comes


class Script(NamedTuple):
    """What is sent on one connection. `kind` says to whom."""

    kind: str
    pieces: tuple[bytes, ...]
    ending: Ending = Ending.READ

    def filled(self, fill: Callable[[bytes], bytes]) -> "Script":
        whole = fill(self.sent)
        assert len(whole) == len(self.sent), "an id is as long as any other"
        ends = list(accumulate(map(len, self.pieces)))
        return self._replace(pieces=tuple(whole[begin:end] for begin, end in pairwise([0, *ends])))

    def literal(self) -> str:
        return repr((self.kind, self.pieces, str(self.ending)))

    @property
    def sent(self) -> bytes:
        return b"".join(self.pieces)


class Answer(NamedTuple):
    status: int
    head: bytes
    body: bytes
    like: bytes  # all of it, without what can't be equal

    @property
    def closes(self) -> bool:
        return b"\r\nconnection: close" in self.head.lower()

    @property
    def code(self) -> str:
        """An error's; empty where it has no body."""
        try:
            error = msgspec.json.decode(self.body).get("error", {})
        except (msgspec.DecodeError, AttributeError):
            return ""
        return str(error.get("code", ""))

    @property
    def message(self) -> str:
        return str(msgspec.json.decode(self.body)["error"]["message"]) if self.code else ""


class Transcript(NamedTuple):
    answers: list[Answer]
    is_closed: bool  # else the server waits for more
    wrongs: list[str]


class Probe:
    """A connection that is used for nothing but to see how far its server is."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._stream: trio.abc.Stream | None = None
        self._used_at = 0.0
        self._lock = trio.Lock()

    async def settle(self) -> None:
        """Until the server has done what it was asked before."""
        async with self._lock:
            if self._stream is None or trio.current_time() - self._used_at > IDLE_S:
                await self.aclose()
                self._stream = await connect(self._lane)
            for _ in range(PROBES):
                await self._stream.send_all(PROBE)
                answer = b""
                while b'"meta"' not in answer:
                    some = await self._stream.receive_some()
                    assert some, "the server closed an honest connection"
                    answer += some
            self._used_at = trio.current_time()

    async def aclose(self) -> None:
        if self._stream is not None:
            await trio.aclose_forcefully(self._stream)


async def connect(lane: Lane) -> trio.abc.Stream:
    stream = await trio.open_tcp_stream("127.0.0.1", lane.server.port)
    if lane.tls is None:
        return stream
    secure = trio.SSLStream(stream, lane.tls, server_hostname="127.0.0.1", https_compatible=True)
    await secure.do_handshake()
    return secure


class Heard(NamedTuple):
    """What came back on one connection."""

    received: bytes
    is_closed: bool
    wrongs: list[str]
    is_told: bool = False  # the last word


async def exchange(lane: Lane, probe: Probe, script: Script, quiet_s: float = QUIET_S) -> Transcript:
    """What a server makes of requests, within `PATIENCE_S`."""
    heard = await hear(lane, probe, script, quiet_s)
    answers, more = told_apart(heard.received, script.sent)
    return Transcript(answers, heard.is_closed, heard.wrongs + more)


async def hear(
    lane: Lane,
    probe: Probe,
    script: Script,
    quiet_s: float = QUIET_S,
    *,
    opening: bytes = b"",
    until: bytes = b"",
    last: bytes = b"",
) -> Heard:
    """What a server says to a script, within `PATIENCE_S`.

    With `opening` it has answered that before; once it has said `until` it is told `last`, and heard out.
    """
    received = bytearray()
    is_closed = is_told = False
    wrongs: list[str] = []
    try:
        with trio.fail_after(PATIENCE_S):
            async with AsyncExitStack() as stack:
                stream = await connect(lane)
                stack.push_async_callback(trio.aclose_forcefully, stream)
                if opening:
                    await stream.send_all(opening)
                    received += await head_of_answer(stream)
                is_closed = await _converse(lane, stream, probe, script, received, quiet_s, until)
                if until and until in received and not is_closed:
                    if last:
                        is_told = True
                        await _send(stream, (last,), trio.Event())
                        with trio.move_on_after(GOOD_BYE_S) as patience, suppress(trio.BrokenResourceError):
                            await _read(stream, received)
                        is_closed = not patience.cancelled_caught
                elif not is_closed and isinstance(stream, trio.SocketStream) and script.ending is Ending.READ:
                    with suppress(trio.BrokenResourceError):
                        await stream.send_eof()
                        before = len(received)
                        await _read(stream, received)
                        if len(received) != before and not until:
                            wrongs.append("it had more to say once we had closed our half")
    except trio.TooSlowError:
        wrongs.append(f"after {PATIENCE_S} s the exchange was not over")
    return Heard(bytes(received), is_closed, wrongs, is_told)


async def _converse(
    lane: Lane,
    stream: trio.abc.Stream,
    probe: Probe,
    script: Script,
    received: bytearray,
    quiet_s: float,
    until: bytes,
) -> bool:
    """Send and read; whether the server closed."""
    async with trio.open_nursery() as nursery:
        sent = trio.Event()
        # What it makes of the bytes is asked of both; how they are cut matters to the lane that is ours. And a stream
        # with TLS that cannot send is not read any more.
        nursery.start_soon(_send, stream, script.pieces if lane.tls is None else (script.sent,), sent)
        if script.ending is Ending.CUT:
            await sent.wait()
            return False
        is_settled = False
        end = trio.current_time() + TALK_S + 10 * quiet_s
        while not (until and until in received and sent.is_set()) and (not until or trio.current_time() < end):
            with trio.move_on_after(quiet_s):
                try:
                    some = await stream.receive_some()
                except trio.BrokenResourceError:
                    some = b""
                if not some:
                    nursery.cancel_scope.cancel()
                    return True
                received += some
                is_settled = False
                if not sent.is_set():
                    end = trio.current_time() + TALK_S + 10 * quiet_s
                continue
            if not sent.is_set():
                end = trio.current_time() + TALK_S + 10 * quiet_s
                continue
            if is_settled:
                break
            await probe.settle()
            is_settled = True
        nursery.cancel_scope.cancel()
    if script.ending is Ending.HALF and isinstance(stream, trio.SocketStream):
        with suppress(trio.BrokenResourceError):
            await stream.send_eof()
            await _read(stream, received)
    return False


async def head_of_answer(stream: trio.abc.Stream) -> bytes:
    """And what came with it."""
    received = b""
    while b"\r\n\r\n" not in received:
        some = await stream.receive_some()
        assert some, f"the server closed an honest connection after {received!r}"
        received += some
    return received


async def _send(stream: trio.abc.Stream, pieces: tuple[bytes, ...], sent: trio.Event) -> None:
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        for number, piece in enumerate(pieces):
            if number:
                await trio.sleep(GAP_S)
            await stream.send_all(piece)
    sent.set()


async def _read(stream: trio.abc.Stream, received: bytearray) -> None:
    """To the end."""
    while some := await stream.receive_some():
        received += some


def told_apart(received: bytes, sent: bytes) -> tuple[list[Answer], list[str]]:
    """The answers in there, but those that are not final; and what is wrong with them on the face of it."""
    answers: list[Answer] = []
    wrongs: list[str] = []
    begins = [found.start() for found in ANSWER.finditer(received)]
    if received and begins[:1] != [0]:
        wrongs.append(f"bytes that belong to no answer: {received[:200]!r}")
    for begin, end in zip(begins, [*begins[1:], len(received)], strict=False):
        whole = received[begin:end]
        head, found, body = whole.partition(b"\r\n\r\n")
        status = int(whole[9:12])
        if status < 200:
            if body:
                wrongs.append(f"bytes that belong to no answer: {body[:200]!r}")
            continue
        like = blanked(whole, sent)
        for pattern, blank in COUNTS:
            like = re.sub(pattern, blank, like)
        answers.append(Answer(status, head, body, like))
        length = re.search(rb"\r\ncontent-length: (\d+)", head.lower())
        if not found:
            wrongs.append(f"half a head: {whole[:200]!r}")
        elif body and (length is None or int(length[1]) != len(body)):
            wrongs.append(f"{len(body)} bytes follow a head that says otherwise: {whole[:300]!r}")
        if status >= 500 and status not in (501, 503, 505):
            wrongs.append(f"{status}: {body[:300]!r}")
    for answer in answers[:-1]:
        if answer.closes:
            wrongs.append("it went on after the answer that was to be its last")
            break
    return answers, wrongs
