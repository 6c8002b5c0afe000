"""What viewers say that no viewer should: frames, messages, packets, polls and the requests that open them.

A case goes to one of

    live        frames of a WebSocket on the native feed, as RFC 6455 reads them; an honest message behind them
    socketio    the same on a session of Socket.IO
    upgrade     the same on a WebSocket that a session on polling would move to
    polling     bodies of a session on polling
    opening     a request for any of them, or for a stream of events, to both lanes

The server may answer with an error and go on, or close with the code that the specification has for it; what it must
not do is fail, fall silent, or grow.
"""

import json
import random
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import msgspec
import trio

from api.engineio import MESSAGE_MAX as PACKET_MAX
from api.live import MESSAGE_MAX
from api.live import MESSAGES_AT_ONCE as MESSAGES_MAX
from tests.contract.shop import request
from tests.contract.test_lanes import plus
from tests.proof.fuzz import lane, mutation, rfc6455
from tests.proof.fuzz.arena import DRAFT_DROP, HELD_DROP, NO_DROP, OPEN_DROP, PATIENCE_S, USER, Arena, Lane
from tests.proof.fuzz.campaign import Target, Tried
from tests.proof.fuzz.rfc6455 import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, frame
from tests.proof.fuzz.truth import LIVE, SOCKET, upgrading
from tests.proof.fuzz.wire import ANSWER, Ending, Heard, Probe, Script, connect, head_of_answer, hear

NORMAL: Final = 1000
GONE: Final = (1000, 1005, 1008, 1013)  # with which a session may end over what was said
HONEST_MESSAGE: Final = b'{"type":"subscribe","drops":["%s"]}' % DRAFT_DROP.encode()
HONEST: Final = frame(TEXT, HONEST_MESSAGE)
SHOWN: Final = b'"drop":{"id":"%s"' % DRAFT_DROP.encode()
HONEST_EVENT: Final = b'42777["drops:leave",{"dropId":"%s"}]' % DRAFT_DROP.encode()
ACKNOWLEDGED: Final = b'43777[{"ok":true}]'
BEGUN: Final = b"\nretry: "  # a stream of events, which has no end
GOOD_BYE: Final = frame(CLOSE, NORMAL.to_bytes(2, "big"))

# What is said -----------------------------------------------------------------------------------------

SAID: Final = tuple(
    text.replace("<open>", OPEN_DROP)
    .replace("<held>", HELD_DROP)
    .replace("<no>", NO_DROP)
    .replace("<user>", USER)
    .encode()
    for text in (
        '{"type":"subscribe","drops":["<open>"]}',
        '{"type":"subscribe","drops":["<open>","<held>","<no>"],"resume":{"<open>":1,"<held>":99}}',
        '{"type":"subscribe","drops":"*"}',
        '{"type":"subscribe","drops":"*","resume":{"<open>":2}}',
        '{"type":"unsubscribe","drops":["<open>"]}',
        '{"type":"unsubscribe","drops":"*"}',
        '{"type":"identify","userId":"<user>"}',
        '{"type":"identify","token":"a.b.c"}',
    )
)
ODD_TEXTS: Final = tuple(
    text.replace("<open>", OPEN_DROP).encode("utf-8", "surrogatepass")
    for text in (
        "",
        " ",
        "{",
        "[]",
        "null",
        "0",
        '""',
        "NaN",
        "{}",
        '{"type":null}',
        '{"type":"subscribe"}',
        '{"type":"die"}',
        '{"type":["subscribe"]}',
        '{"type":"subscribe","drops":null}',
        '{"type":"subscribe","drops":{}}',
        '{"type":"subscribe","drops":"<open>"}',
        '{"type":"subscribe","drops":[]}',
        '{"type":"subscribe","drops":[null]}',
        '{"type":"subscribe","drops":["*"]}',
        '{"type":"subscribe","drops":[""]}',
        '{"type":"subscribe","drops":["\\u0000"]}',
        '{"type":"subscribe","drops":["\\ud800"]}',
        '{"type":"subscribe","drops":["<open>\\u0000"]}',
        '{"type":"subscribe","drops":["<open>"],"resume":{"<open>":-1}}',
        '{"type":"subscribe","drops":["<open>"],"resume":{"<open>":9223372036854775807}}',
        '{"type":"subscribe","drops":["<open>"],"resume":{"<open>":9223372036854775808}}',
        '{"type":"subscribe","drops":["<open>"],"resume":{"<open>":18446744073709551616}}',
        '{"type":"subscribe","drops":["<open>"],"resume":{"<open>":1e308}}',
        '{"type":"subscribe","drops":["<open>"],"resume":{"<open>":1.5}}',
        '{"type":"subscribe","drops":["<open>"],"resume":{"<open>":null}}',
        '{"type":"subscribe","drops":["<open>"],"resume":{"x":1}}',
        '{"type":"subscribe","drops":["<open>"],"resume":[]}',
        '{"type":"subscribe","drops":"*","resume":{"<open>":9223372036854775807}}',
        '{"type":"subscribe","type":"identify","drops":"*"}',
        '{"type":"identify"}',
        '{"type":"identify","userId":7}',
        '{"type":"identify","userId":"\\u0000"}',
        '{"type":"identify","token":"\\u2028\\r\\n"}',
        '{"type":"identify","userId":"x","token":"' + "y" * 9_000 + '"}',
        '{"type":"unsubscribe","drops":["7"]}',
        "\ufeff{}",
        "[" * 5_000,
        '{"a":' * 5_000,
        '{"type":"subscribe","drops":' + "[" * 3_000,
    )
)
ODD: Final = (
    *ODD_TEXTS,
    b'{"type":"subscribe","drops":["%s"]}'
    % b'","'.join(b"0199c2f0-0000-7000-8000-%012x" % number for number in range(1_001)),
    b'{"type":"subscribe","drops":"*","resume":{%s}}'
    % b",".join(b'"0199c2f0-0000-7000-8000-%012x":%d' % (number, number) for number in range(60)),
    b'{"type":"subscribe","drops":["%s"]}' % b'","'.join([OPEN_DROP.encode()] * 1_500),
    b" " * MESSAGE_MAX,
    b" " * (MESSAGE_MAX + 1),
    b'{"type":"' + b"x" * 60_000 + b'"}',
    b"\xff\xfe",
    b"\xc3",
    b"\xed\xa0\x80",
)

EVENTS: Final = tuple(
    text.replace("<open>", OPEN_DROP).replace("<no>", NO_DROP).encode("utf-8", "surrogatepass")
    for text in (
        '42["drops:join",{"dropId":"<open>"}]',
        '421["drops:join",{"dropId":"<open>"}]',
        '42["drops:leave",{"dropId":"<no>"}]',
        "3",
        "2",
        "6",
        "40",
        "40/other,",
        "41",
        "41/other,",
        "1",
        "5",
        "2probe",
        "0",
        "4",
        "44",
        "45",
        "46",
        "7",
        "9",
        "",
        " ",
        "x",
        "\u0664\u0660",
        "42",
        "42[]",
        "42{}",
        "42null",
        '42""',
        "42[1]",
        "42[null]",
        '42["drops:join"]',
        '42["drops:join",null]',
        '42["drops:join",{"dropId":7}]',
        '42["drops:join",{"dropId":"\\u0000"}]',
        '42["drops:join",{"dropId":"\\ud800"}]',
        '42["drops:join",[["<open>"]]]',
        '42["x",' + "[" * 2_000,
        '42["' + "x" * 15_000 + '"]',
        '42["connect"]',
        '42["__proto__",{}]',
        "43",
        "430",
        "43[1]",
        "437[]",
        "43-1[]",
        "42-1[]",
        '42999999999999999999999["drops:leave",{}]',
        "42" + "9" * 5_000 + '["x"]',
        '42\u0661["x"]',
        "42/",
        "42/,",
        '42/a?b=c,["x"]',
        '42/admin,7["x"]',
        '451-["drops:join",{"_placeholder":true,"num":0}]',
        '451-["x",{"_placeholder":true,"num":7}]',
        '451-["x",{"_placeholder":true,"num":-1}]',
        '4511-["x"]',
        '450-["x"]',
        "451-",
        "45-1-[]",
        "451",
        '45999999999999999999-["x"]',
        '461-7[{"_placeholder":true,"num":0}]',
        "48",
        "4a",
        "4",
        "40{",
        '40{"token":1}',
        "40/" + "n" * 5_000 + ",",
        "bAAAA",
        "b",
        "b!!!!",
        "bAA",
        "b" + "A" * 15_000,
        "4\ufeff2[]",
        '42["x",NaN]',
        '42["x",1e999]',
        "\ud800",
        '42["\ud800"]',
        "4" * PACKET_MAX,
        "4" * (PACKET_MAX + 1),
        "3probe",
        "22222",
    )
)
PAYLOADS: Final = (
    b"\x1e",
    b"\x1e\x1e",
    b"",
    b"d=4",
    b"d=40",
    b"2:40",
    b"\x00\x04\xff40",
    b"\xff",
    b"40\x1e" * 1_001,
    b"6\x1e" * 990,
    b"3\x1e" * 300,
)
IDS: Final = (
    "",
    "*",
    "**",
    "*~",
    "* ",
    "*.1",
    "~",
    "0.0",
    "x",
    "5d41402abc4b.17.4",
    "5d41402abc4b",
    "5d41402abc4b.-1",
    "5d41402abc4b." + "9" * 15,
    "5d41402abc4b." + "9" * 16,
    "*AZnC8AAAcACAAAAAAAAAoQ.1",
    "*AZnC8AAAcACAAAAAAAAAoQ.999999999999999",
    "*!!!!!!!!!!!!!!!!!!!!!!.1",
    "*AZnC8AAAcACAAAAAAAAAoQ.1~AZnC8AAAcACAAAAAAAAAog.2",
    "*" + "~".join(["AZnC8AAAcACAAAAAAAAAoQ.1"] * 100),
    "a" * 5_000,
    "\xff",
    "%00",
    "*AZnC8AAAcACAAAAAAAAAoR.1",
    "*----------------------.1",
)
DROPS: Final = (
    OPEN_DROP,
    f"{OPEN_DROP},{HELD_DROP}",
    "*",
    "",
    ",",
    "7",
    f"{OPEN_DROP},",
    f"{OPEN_DROP},{OPEN_DROP}",
    NO_DROP,
    "%00",
    "%ff",
    "%2a",
    "**",
    ",".join([OPEN_DROP] * 40),
    f"{OPEN_DROP}&drops=*",
    f"*&drops={OPEN_DROP}",
    OPEN_DROP.upper(),
    "+*+",
    f"{OPEN_DROP}%2C{HELD_DROP}",
    "[]",
)
QUERIES: Final = (
    "EIO=4&transport=polling",
    "EIO=4&transport=websocket",
    "EIO=3&transport=polling",
    "transport=polling",
    "",
    "EIO=4",
    "EIO=4&transport=x",
    "EIO=4&transport=polling&sid=x",
    "EIO=4&transport=websocket&sid=" + "x" * 1_500,
    "EIO=4&transport=polling&sid=%00",
    "EIO=4&transport=polling&sid=%ff",
    "EIO=4&transport=polling&transport=websocket",
    "EIO=4&transport=polling&sid=",
    "EIO=4&EIO=3&transport=websocket",
    "EIO=%34&transport=polling&j=0",
    "EIO=4&transport=websocket&sid=__proto__",
    "&&&=&",
    "EIO=4;transport=polling",
)


ODD_HANDSHAKES: Final[tuple[dict[str, str], ...]] = (
    {"sec_websocket_version": "12"},
    {"sec_websocket_version": "13, 13"},
    {"sec_websocket_key": "x"},
    {"sec_websocket_key": ""},
    {"sec_websocket_protocol": "a, b"},
    {"sec_websocket_protocol": "é"},
    {"sec_websocket_extensions": "permessage-deflate"},
    {"sec_websocket_extensions": "ÿ;;="},
    {"connection": "keep-alive"},
    {"connection": "é, upgrade"},
    {"upgrade": "WebSocket"},
    {"origin": "https://evil.example"},
    {"origin": "http://["},
    {"host": "a..b"},
    {"content_length": "0"},
)


def _frames(rng: random.Random, said: bytes) -> bytes:
    """A message in frames that break a rule, in most cases."""
    opcode = rng.choice((TEXT, TEXT, TEXT, BINARY))
    match rng.randrange(16):
        case 0 | 1 | 2:
            return frame(opcode, said)
        case 3:
            cut = rng.randrange(len(said) + 1)
            between = rng.choice(
                (
                    b"",
                    frame(PING, b"between"),
                    frame(PONG),
                    frame(TEXT, b"{}"),
                    frame(CLOSE),
                    frame(CONTINUATION, b"", fin=False),
                )
            )
            return frame(opcode, said[:cut], fin=False) + between + frame(CONTINUATION, said[cut:])
        case 4:
            pieces = [frame(CONTINUATION, bytes((byte,)), fin=False) for byte in said[:300]]
            return frame(opcode, b"", fin=False) + b"".join(pieces) + frame(CONTINUATION, said[300:])
        case 5:
            return frame(rng.choice((3, 7, 11, 15, CONTINUATION, PONG)), said[: rng.choice((0, 125, 126))])
        case 6:
            return frame(opcode, said, reserved=rng.choice((1, 2, 4, 7)))
        case 7:
            return frame(opcode, said, mask=rng.choice((None, bytes(4), b"\xff\xff\xff\xff")))
        case 8:
            return frame(
                rng.choice((PING, PONG, CLOSE)), said[: rng.choice((0, 1, 2, 125, 126, 300))], fin=rng.random() < 0.8
            )
        case 9:
            code = rng.choice(
                (0, 999, 1000, 1001, 1004, 1005, 1006, 1011, 1014, 1015, 1016, 2999, 3000, 4999, 5000, 65_535)
            )
            return frame(
                CLOSE, code.to_bytes(2, "big") + rng.choice((b"", b"bye", b"\xff", b"\xc3", b"x" * 123, b"x" * 124))
            )
        case 10:
            return frame(opcode, said, size=rng.choice((16, 64)))
        case 11:
            length = rng.choice(
                (
                    0,
                    len(said) + 1,
                    max(0, len(said) - 1),
                    125,
                    65_535,
                    65_536,
                    MESSAGE_MAX + 1,
                    1 << 20,
                    1 << 31,
                    (1 << 63) - 1,
                    1 << 63,
                    (1 << 64) - 1,
                )
            )
            return frame(opcode, said, length=length)
        case 12:
            return frame(opcode, mutation.harmed(rng, said))
        case 13:
            return frame(
                TEXT,
                rng.choice((b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\xaf", b"ok\xe2\x82"))
                + said,
            )
        case 14:
            return frame(TEXT, b"\xe2\x82", fin=False) + frame(CONTINUATION, rng.choice((b"\xac", b"x", b"")))
        case _:
            return b"".join(frame(PING, bytes((number,)) * 5) for number in range(rng.choice((1, 20, 100))))


def _stream(rng: random.Random, said: Sequence[bytes], odd: Sequence[bytes]) -> bytes:
    parts = []
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        text = rng.choice(said if rng.random() < 0.4 else odd)
        parts.append(frame(TEXT, text) if rng.random() < 0.4 else _frames(rng, text))
    if rng.random() < 0.04:
        parts = [frame(TEXT, rng.choice(said))] * rng.choice((59, 61, 80, 250))
    data = b"".join(parts)
    return mutation.harmed(rng, data) if rng.random() < 0.15 else data


def _opening(rng: random.Random) -> bytes:
    socket = rng.choice(ODD_HANDSHAKES) if rng.random() < 0.7 else {}
    match rng.randrange(5):
        case 0:
            asked = upgrading(rng.choice(("/api/v1/live", "/api/live", "/api/v1/live?x=1", "/nothing")), **socket)
        case 1:
            asked = upgrading(f"/socket.io/?{rng.choice(QUERIES)}", **socket)
        case 2:
            method, body = rng.choice(
                (("GET", b""), ("GET", b""), ("POST", b"40"), ("PUT", b"40"), ("HEAD", b""), ("OPTIONS", b""))
            )
            asked = request(method, f"/socket.io/?{rng.choice(QUERIES)}", body)
        case _:
            path = rng.choice(("/api/v1/live/events", "/api/live/events"))
            asked = request("GET", f"{path}?drops={rng.choice(DROPS)}")
            if rng.random() < 0.6:
                asked = plus(asked, b"Last-Event-ID: " + rng.choice(IDS).encode("latin-1"))
            if rng.random() < 0.2:
                asked = plus(asked, b"X-User-Id: " + rng.choice((USER.encode(), b"x", b"\xff")))
    return (
        mutation.harmed(rng, asked, (*mutation.BYTES, lane.add_line, lane.other_target), most=1)
        if rng.random() < 0.3
        else asked
    )


def script(rng: random.Random) -> Script:
    """One case."""
    match rng.randrange(10):
        case 0 | 1 | 2 | 3:
            sent = _stream(rng, SAID, ODD)
            return Script("live", mutation.sliced(rng, sent) if sent else (b"",))
        case 4 | 5:
            return Script("socketio", mutation.sliced(rng, _stream(rng, EVENTS[:3], EVENTS) or b"\x81"))
        case 6:
            said = [frame(TEXT, b"2probe"), frame(TEXT, b"5"), frame(TEXT, b"40")]
            if rng.random() < 0.6:
                said[rng.randrange(3)] = rng.choice(
                    (b"", frame(TEXT, rng.choice(EVENTS)), _frames(rng, rng.choice(EVENTS)), frame(BINARY, b"5"))
                )
            if rng.random() < 0.3:
                rng.shuffle(said)
            return Script("upgrade", (b"".join(said) or b"\x81",))
        case 7 | 8:
            bodies = []
            for _ in range(rng.choice((1, 1, 2, 3))):
                packets = [rng.choice(EVENTS) for _ in range(rng.choice((1, 1, 2, 5)))]
                body = rng.choice(PAYLOADS) if rng.random() < 0.2 else b"\x1e".join(packets)
                bodies.append(mutation.harmed(rng, body) if rng.random() < 0.3 else body)
            return Script("polling", tuple(bodies))
    return Script("opening", (_opening(rng),))


# The judgement ----------------------------------------------------------------------------------------


async def attempt(arena: Arena, probes: Sequence[Probe], case: Script, quiet_s: float, rng: random.Random) -> Tried:
    """One case, on one of the lanes, or on both."""
    if case.kind == "opening":
        return await _open(arena, probes, case, quiet_s)
    number = 0 if zlib.crc32(case.pieces[0]) % 4 else 1  # as the case has it, so that it is the same again
    where = arena.lanes[number]
    match case.kind:
        case "live":
            heard = await hear(
                where, probes[number], _with(case, HONEST), quiet_s, opening=LIVE, until=SHOWN, last=GOOD_BYE
            )
            label, wrongs = _judged_live(case.sent + HONEST, heard)
        case "socketio":
            begin = frame(TEXT, b"40")
            honest = frame(TEXT, HONEST_EVENT)
            told = _with(case._replace(pieces=(begin, *case.pieces)), honest)
            heard = await hear(where, probes[number], told, quiet_s, opening=SOCKET, until=ACKNOWLEDGED, last=GOOD_BYE)
            label, wrongs = _judged_socketio(told.sent, heard, GONE)
        case "upgrade":
            label, wrongs = await _upgrade(where, probes[number], case, quiet_s)
        case _:
            label, wrongs = await _poll(where, case)
    return Tried(f"{case.kind}: {label}", [f"{where.name}: {wrong}" for wrong in wrongs], Counter())


def _with(case: Script, honest: bytes) -> Script:
    return case._replace(pieces=(*case.pieces, honest))


def _closing(frames: Sequence[rfc6455.Said]) -> tuple[int | None, list[str]]:
    """The code with which it closed, and what is wrong with that."""
    closes = [at for at, one in enumerate(frames) if one.opcode == CLOSE]
    if not closes:
        return None, []
    payload = frames[closes[0]].payload
    code = int.from_bytes(payload[:2], "big") if payload else rfc6455.NO_CODE
    return code, ["it spoke after it had closed"] if closes != [len(frames) - 1] else []


def _judged(
    sent: bytes, heard: Heard, message_max: int, may: Sequence[int], honest: bytes, shown: bytes
) -> tuple[str, list[str], list[bytes]]:
    """As RFC 6455 has it; the texts that the server said."""
    head, _, data = heard.received.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 101 "):
        return "", [f"an honest handshake got {head!r}"], []
    frames, odd = rfc6455.said(data)
    code, wrongs = _closing(frames)
    wrongs += heard.wrongs + ([odd] if odd else [])
    found = rfc6455.read(sent, message_max)
    texts = [one.payload for one in frames if one.opcode == TEXT]
    if code is None and heard.is_closed:
        wrongs.append("it went without a close frame")
    elif heard.is_told and honest in found.messages and not found.codes:
        if code != NORMAL and code not in may:
            wrongs.append(f"it answered an honest close with {code}")
    elif found.codes:
        if code not in found.codes and code not in may:
            wrongs.append(f"it ended with {code}, where it should with one of {sorted(found.codes)}")
    elif code is not None:
        if code not in found.may and code not in may:
            wrongs.append(f"it ended with {code}, for no reason")
    elif not found.may and shown not in data and honest in found.messages:
        wrongs.append("it did not hear what was honest")
    pongs = [one.payload for one in frames if one.opcode == PONG]
    if pongs != found.pings[: len(pongs)] or (code is None and len(pongs) != len(found.pings)):
        wrongs.append(f"{len(found.pings)} pings got {len(pongs)} pongs: {pongs[:3]}")
    return "open" if code is None else str(code), wrongs, texts


def _judged_live(sent: bytes, heard: Heard) -> tuple[str, list[str]]:
    found = rfc6455.read(sent, MESSAGE_MAX)
    may = (rfc6455.POLICY,) if len(found.messages) > MESSAGES_MAX else ()
    label, wrongs, texts = _judged(sent, heard, MESSAGE_MAX, may, HONEST_MESSAGE, SHOWN)
    errors = 0
    for text in texts:
        told = msgspec.json.decode(text)
        if told.get("type") not in ("snapshot", "event", "error"):
            wrongs.append(f"it said {text[:200]!r}")
        elif told["type"] == "error":
            errors += 1
            if told["code"] in ("INTERNAL_ERROR", "DATABASE_UNAVAILABLE"):
                wrongs.append(f"it failed: {text!r}")
    if SHOWN in heard.received and errors < sum(not _is_json(message) for message in found.messages):
        wrongs.append(f"{errors} errors for {[message[:40] for message in found.messages]}")
    return label, wrongs


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _judged_socketio(sent: bytes, heard: Heard, may: Sequence[int]) -> tuple[str, list[str]]:
    label, wrongs, texts = _judged(sent, heard, PACKET_MAX, may, HONEST_EVENT, ACKNOWLEDGED)
    for text in texts:
        if b"INTERNAL_ERROR" in text or not text[:1].isdigit():
            wrongs.append(f"it said {text[:200]!r}")
    return label, wrongs


# Polling ----------------------------------------------------------------------------------------------


class _Client:
    """Of one connection with HTTP, kept open."""

    def __init__(self, where: Lane, stream: trio.abc.Stream) -> None:
        self.sid = ""
        self._where = where
        self._stream = stream

    async def ask(self, method: str, body: bytes = b"") -> tuple[int, bytes]:
        sid = f"&sid={self.sid}" if self.sid else ""
        path = f"/socket.io/?EIO=4&transport=polling{sid}"
        await self._stream.send_all(
            request(method, path, body, content_type="text/plain", content_length=str(len(body)))
        )
        head, _, got = (await head_of_answer(self._stream)).partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        assert length is not None, head
        while len(got) < int(length[1]):
            got += await self._stream.receive_some()
        return int(head[9:12]), got

    async def open(self) -> None:
        status, body = await self.ask("GET")
        assert status == 200, body
        self.sid = msgspec.json.decode(body[1:])["sid"]


async def _poll(where: Lane, case: Script) -> tuple[str, list[str]]:
    wrongs: list[str] = []
    label = "open"
    with trio.move_on_after(PATIENCE_S) as patience:
        stream = await connect(where)
        try:
            client = _Client(where, stream)
            await client.open()
            for body in (b"40", *case.pieces, HONEST_EVENT):
                status, said = await client.ask("POST", body)
                if (status, said) != (200, b"ok"):
                    label = str(status)
                    wrongs += _refusal(status, said)
                    break
            status, said = await client.ask("GET")
            if label == "open" and status == 200 and ACKNOWLEDGED not in said and not said.endswith((b"1", b"1\x1e")):
                wrongs.append(f"it did not hear what was honest: {said[:300]!r}")
            if (
                label not in ("open", "413") and status == 200
            ):  # nobody but the application has seen a body over its limit
                wrongs.append(f"a session that was refused lives on: {said[:300]!r}")
            if status == 200 and b"INTERNAL_ERROR" in said:
                wrongs.append(f"it failed: {said[:300]!r}")
            if status != 200:
                wrongs += _refusal(status, said)
        finally:
            await trio.aclose_forcefully(stream)
    if patience.cancelled_caught:
        wrongs.append("it did not answer")
    return label, wrongs


def _refusal(status: int, said: bytes) -> list[str]:
    """Nothing, where a refusal is in the words of Engine.IO."""
    try:
        told: Any = msgspec.json.decode(said)
    except msgspec.DecodeError:
        return [f"{status}: {said[:200]!r}"]
    is_ours = status == 413 or (status == 400 and told.get("code") in (0, 1, 2, 3, 5))
    return [] if is_ours else [f"{status}: {said[:200]!r}"]


async def _upgrade(where: Lane, probe: Probe, case: Script, quiet_s: float) -> tuple[str, list[str]]:
    """A WebSocket that would take a session over; afterwards the session is there, or it is not, and says so."""
    stream = await connect(where)
    try:
        client = _Client(where, stream)
        await client.open()
        opening = upgrading(f"/socket.io/?EIO=4&transport=websocket&sid={client.sid}")
        told = _with(case, frame(TEXT, HONEST_EVENT))
        heard = await hear(where, probe, told, quiet_s, opening=opening, until=ACKNOWLEDGED, last=GOOD_BYE)
        label, wrongs, _ = _judged(told.sent, heard, PACKET_MAX, GONE, HONEST_EVENT, ACKNOWLEDGED)
        if label == "open":  # it waits for the rest of a probe
            wrongs = [wrong for wrong in wrongs if "honest" not in wrong]
        with trio.fail_after(PATIENCE_S):
            status, said = await client.ask("POST", b"40")
        if (status, said) != (200, b"ok"):
            wrongs += _refusal(status, said)
    finally:
        await trio.aclose_forcefully(stream)
    return label, wrongs


# Openings ---------------------------------------------------------------------------------------------


async def _open(arena: Arena, probes: Sequence[Probe], case: Script, quiet_s: float) -> Tried:
    """Both lanes say the same status and code to a request that would open something."""
    filled = case.filled(arena.attempt())
    firsts: list[str] = ["", ""]
    wrongs: list[str] = []

    async def ask(number: int) -> None:
        heard = await hear(
            arena.lanes[number], probes[number], filled._replace(ending=Ending.READ), quiet_s, until=BEGUN
        )
        begins = list(ANSWER.finditer(heard.received))
        finals = [begin for begin in begins if begin[1] != b"100"]  # which may be left out (RFC 9110, 10.1.1)
        found = finals[0] if finals else None
        first = b"" if found is None else heard.received[found.start() : finals[1].start() if finals[1:] else None]
        body = first.partition(b"\r\n\r\n")[2]
        code = re.search(rb'"code":"?([A-Z_0-9]+)', body)
        firsts[number] = "" if found is None else f"{found[1].decode()} {code[1].decode() if code else ''}".strip()
        if heard.received and (not begins or begins[0].start()):
            wrongs.append(f"{arena.lanes[number].name}: bytes that are no answer: {heard.received[:100]!r}")
        if firsts[number].startswith("5") and not firsts[number].startswith("501"):
            wrongs.append(f"{arena.lanes[number].name}: {heard.received[:400]!r}")
        wrongs.extend(f"{arena.lanes[number].name}: {wrong}" for wrong in heard.wrongs)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, 0)
        nursery.start_soon(ask, 1)
    plain, oracle = firsts
    is_strict = plain.startswith("4") and ("BAD_REQUEST" in plain or "TOO_LONG" in plain or "METHOD" in plain)
    # What asks for a WebSocket, but not in `Connection`, asks for it behind TLS alone: there nobody reads that first.
    is_half = re.search(rb"(?i)\r\nupgrade:[ \t]*websocket", case.sent) and not re.search(
        rb"(?i)\r\nconnection:[ \t]*upgrade", case.sent
    )
    # Who opens something has no body: behind TLS nobody waits for one.
    is_waited_for = not plain and re.search(rb"(?i)\r\n(content-length|transfer-encoding):", case.sent)
    if plain != oracle and not is_strict and not is_half and not is_waited_for:
        wrongs.append(f"plain answers {plain!r}, behind TLS {oracle!r}")
    return Tried(f"opening: {plain}", wrongs, Counter())


ALWAYS: Final = (
    ("message_as_large_as_may_be", Script("live", (frame(TEXT, b" " * MESSAGE_MAX),))),
    ("message_too_large", Script("live", (frame(TEXT, b" " * (MESSAGE_MAX + 1)),))),
    (
        "message_too_large_in_pieces",
        Script("live", (frame(TEXT, b" " * 40_000, fin=False), frame(CONTINUATION, b" " * 40_000))),
    ),
    ("packet_too_large", Script("socketio", (frame(TEXT, b"4" * (PACKET_MAX + 1)),))),
    ("ping_after_violation", Script("socketio", (frame(TEXT, b"zz"), *[frame(PING, b"p")] * 20))),
    ("ping_after_too_much", Script("live", (frame(TEXT, b"x") * 100, *[frame(PING, b"p")] * 20))),
    ("large_message_after_violation", Script("socketio", (frame(TEXT, b"zz"), *[frame(TEXT, b"4" * 17_000)] * 3))),
)

TARGET: Final = Target("frames", script, attempt, ALWAYS)
