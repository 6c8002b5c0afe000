"""Requests that are not quite requests, to the hot lane and to Hypercorn with Quart: both must answer alike.

A case is what one connection is sent: a few requests, most of them harmed, and an honest one behind them, whose answer
says whether both lanes agree on where the ones before it end. The other lane is the oracle: the same number of answers,
the same bytes in each, the connection kept or closed. Where they differ by nature, `DIFFERENCES` says how and why; a
difference that nobody described is a failure, and so is one that h11 refuses and the hot lane takes.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

import trio

from api.hotlane import RECEIVE_MAX
from api.http1 import Reader
from tests.contract.shop import request
from tests.contract.test_lanes import NO_BODY, SOFT, STRICTER, chunked
from tests.proof.fuzz import mutation
from tests.proof.fuzz.arena import (
    DRAFT_DROP,
    EMPTY_DROP,
    HELD_DROP,
    HOLD,
    NO_DROP,
    OPEN_DROP,
    OTHER_USER,
    PAGE,
    USER,
    Arena,
)
from tests.proof.fuzz.campaign import Target, Tried
from tests.proof.fuzz.wire import Answer, Ending, Probe, Script, Transcript, exchange

BODY_MAX: Final = 16_384
HEAD_MAX: Final = 16_384
LAST_ID: Final = "the honest one"
KIND: Final = "requests"

Harm = Callable[[random.Random, bytes], bytes]

# What requests are made of ----------------------------------------------------------------------------


def _as_user(method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
    return request(method, path, body, x_user_id=USER, **headers)


_RESERVE: Final = f"/api/v1/drops/{OPEN_DROP}/reserve"
VALID: Final = (
    _as_user("POST", _RESERVE),
    _as_user("POST", _RESERVE, b"{}"),
    _as_user("POST", _RESERVE, idempotency_key="key", x_request_id="mine", origin=PAGE),
    chunked(_as_user("POST", _RESERVE), b"{", b" }"),
    _as_user("POST", f"/api/drops/{HELD_DROP}/purchase"),
    _as_user("POST", f"/api/v1/drops/{HELD_DROP}/purchase", b"{}", idempotency_key="key of another"),
    _as_user("DELETE", f"/api/v1/reservations/{HOLD}/cancel"),
    _as_user("POST", f"/api/v1/drops/{EMPTY_DROP}/reserve", connection="keep-alive"),
    _as_user("POST", f"/api/v1/drops/{DRAFT_DROP}/reserve"),
    _as_user("POST", f"/api/v1/drops/{NO_DROP}/reserve"),
    _as_user("GET", "/api/v1/me"),
    _as_user("GET", f"/api/drops/{DRAFT_DROP}"),
    _as_user("GET", "/api/v1/reservations/me"),
    request("GET", "/api/v1/healthz"),
    request("GET", "/api/v1/drops?limit=1&offset=1000"),
    request("POST", "/api/v1/demo/echo", b'{"email": "ann@shop.example", "name": "Ann"}'),
    chunked(request("POST", "/api/v1/demo/echo"), b'{"email": ', b'"ann@shop.example"}'),
    request("POST", "/api/v1/demo/echo", b'{"email": "ann@shop.example"}', expect="100-continue"),
    request("OPTIONS", _RESERVE, origin=PAGE, access_control_request_method="POST"),
    request("HEAD", "/api/v1/healthz"),
    request("GET", "/nothing"),
)
HONEST: Final = (
    request("POST", "/api/drops/7/reserve", x_request_id=LAST_ID, connection="close"),
    request("GET", "/api/healthz", x_request_id=LAST_ID, connection="close"),
)

# Lines of a head that somebody tries.
LINES: Final = (
    *(
        b"Content-Length: " + length
        for length in (
            b"0",
            b"1",
            b"2",
            b"3",
            b"4",
            b"-1",
            b"+2",
            b"2, 2",
            b"2,3",
            b"0x2",
            b"1e1",
            b"",
            b" ",
            b"\t2\t",
            b"00",
            b"02",
            b"\xb2",
            b"2 2",
            b"99",
            b"16384",
            b"16385",
            b"1064961",
            b"4294967296",
            b"18446744073709551616",
            b"9" * 40,
            b"2;",
            b"2\x0b",
            b"NaN",
        )
    ),
    *(
        b"Transfer-Encoding: " + coding
        for coding in (
            b"chunked",
            b"Chunked",
            b"chunked, chunked",
            b"identity",
            b"gzip, chunked",
            b"chunked, gzip",
            b"gzip",
            b"xchunked",
            b"chunked;q=1",
            b"\x0bchunked",
            b"\tchunked\t",
            b"",
            b",chunked",
            b"chunked,",
            b'"chunked"',
        )
    ),
    b"Transfer-Encoding : chunked",
    b"Transfer_Encoding: chunked",
    b"Content-Length : 2",
    b"Transfer-Encoding\t: chunked",
    *(
        b"Connection: " + word
        for word in (
            b"close",
            b"keep-alive",
            b"Close, Keep-Alive",
            b"upgrade",
            b"",
            b",",
            b"close,",
            b"X-User-Id",
            b"TE, close",
            b"\xffclose",
            b"close;",
            b"not-close",
            b"close\x0b",
        )
    ),
    b"Proxy-Connection: close",
    b"Keep-Alive: timeout=1",
    *(b"Expect: " + word for word in (b"100-continue", b"100-Continue", b"200-ok", b"", b"100-continue, 100-continue")),
    b"Host: 127.0.0.1",
    b"Host: other",
    b"Host:",
    b"host: a, b",
    b"Host: [::1",
    b"Host: a..b",
    b"Host: user@127.0.0.1",
    b"Upgrade: foo",
    b"Upgrade: HTTP/1.1",
    b"Upgrade: websocket",
    b"Upgrade: h2c",
    b"HTTP2-Settings: A",
    b"Connection: \xa0upgrade",
    b"TE: trailers",
    b"Trailer: X-User-Id",
    b"Content-Encoding: gzip",
    b"Content-Range: bytes 0-1/2",
    *(
        b"X-User-Id: " + word
        for word in (
            b"",
            b"seven",
            OTHER_USER.encode(),
            USER.upper().encode(),
            USER.encode() + b",",
            b"{" + USER.encode() + b"}",
            b"\xff",
            b"urn:uuid:" + USER.encode(),
            USER.replace("-", "").encode(),
            b"(" + USER.encode() + b")",
        )
    ),
    b"X-User-Name: x",
    b"X-User-Name: \xff\xfe\xfd",
    b"X-User-Name: " + b"a" * 51,
    b"X-User-Name: fuzz_owner",
    *(
        b"X-Request-Id: " + word
        for word in (b"", b"a" * 128, b"a" * 129, b"\xe9", b"a b", b"<script>", b'"', b"\\", b"%00")
    ),
    *(b"Idempotency-Key: " + word for word in (b"", b"k" * 255, b"k" * 256, b"\xe9", b"a b", b",", b'"k"')),
    *(
        b"Content-Type: " + kind
        for kind in (
            b"application/json",
            b"text/plain",
            b"",
            b"application/json; charset=utf-16",
            b"application/jsonx",
            b";",
            b"multipart/form-data",
            b"multipart/form-data; boundary=",
            b"application/x-www-form-urlencoded",
            b"\xff/\xff",
            b"application/json;" + b"a=b;" * 50,
        )
    ),
    b"Origin: " + PAGE.encode(),
    b"Origin: null",
    b"Origin: https://evil.example",
    b"Origin: \xff",
    b"Origin:",
    b"Authorization: Bearer x",
    b"Authorization:",
    b"Cookie: a=b",
    b"Cookie: \xff=;;=",
    b"Range: bytes=0-0",
    b"If-None-Match: *",
    b"If-Modified-Since: x",
    b"Accept: \xff",
    b"Accept-Encoding: gzip",
    b"X-HTTP-Method-Override: GET",
    b"X-Forwarded-For: \xff",
    b"X-Forwarded-Host: a..b",
    b"Forwarded: for=;",
    b"X-Original-URL: /nothing",
    b":method: GET",
    b": x",
    b"X-A",
    b" X-A: 1",
    b"X A: 1",
    b"X-A: \x01",
    b"X-A: \0",
    b"X-A: a\rb",
    b"\xff: x",
    b"X\x7f: 1",
    b"X-(): 1",
    b'"X": 1',
    b"X-A:",
    b"X-A: 1\r\n 2",
    b"X-A: 1\r\n\t2",
    b"X-A:\r\n 2",
)
METHODS: Final = (
    b"GET",
    b"HEAD",
    b"POST",
    b"PUT",
    b"PATCH",
    b"DELETE",
    b"OPTIONS",
    b"TRACE",
    b"CONNECT",
    b"PRI",
    b"BREW",
    b"get",
    b"Post",
    b"GET\t",
    b"",
    b"\xff",
    b"M" * 32,
    b"M" * 33,
    b"G@T",
    b"#!",
    b"PROPFIND",
    b"M-SEARCH",
    b"SOURCE",
    b"QUERY",
)
VERSIONS: Final = (
    b"HTTP/1.0",
    b"HTTP/1.1",
    b"HTTP/1.2",
    b"HTTP/0.9",
    b"HTTP/2.0",
    b"HTTP/2",
    b"HTTP/3.0",
    b"http/1.1",
    b"HTTP/1.1 ",
    b"HTTP/11",
    b"HTTP/01.1",
    b"HTTP/1.10",
    b"HTTP/1,1",
    b"ICE/1.0",
    b"RTSP/1.0",
    b"",
    b"HTP/1.1",
)
TARGETS: Final = (
    b"*",
    b"/",
    b"//",
    b"///api/v1/healthz",
    b"/api//v1/healthz",
    b"/%2e%2e/api/v1/healthz",
    b"/api/v1/healthz%00",
    b"/api/v1/healthz?" + b"a" * 2_100,
    b"http://127.0.0.1/api/v1/healthz",
    b"HTTP://127.0.0.1/api/healthz",
    b"https://127.0.0.1/api/healthz",
    b"http://[::1/",
    b"http://a..b/api/healthz",
    b"http:///api/healthz",
    b"http://u:p@127.0.0.1:x/api/healthz",
    b"ftp://x/",
    b"127.0.0.1:80",
    b"api/v1/healthz",
    b"?x",
    b"#x",
    b"/?x#y",
    b"/api/v1/healthz#x",
    b"/api/v1/healthz;x",
    b"/api/v1/h%65althz",
    b"/api/v1/healthz%",
    b"/api/v1/healthz%f",
    b"/api/v1/healthz%c0%ae",
    b"/api/v1/health%u007a",
    b"/api/v1/drops?limit=%00",
    b"/api/v1/drops?limit=1&limit=x",
    b"/api/v1/drops?limit=99999999999999999999",
    b"/api/v1/drops?offset=-1",
    b"/api/v1/drops?offset=9223372036854775808",
    b"/api/v1/drops?offset=%d9%a1&limit=1_0",
    b"/api/v1/drops?limit",
    b"/api/v1/drops?%ff=1",
    b"/api/v1/drops/" + b"0" * 1_990,
    b"/api/v1/drops/" + NO_DROP.encode() + b"%0d%0aX:y",
    b"/a b",
    b"/\\..\\",
    b"/api/v1/drops/{id}/reserve",
    b"/api/v1/drops/0199c2f00000700080000000000000a1/reserve",
)
BODIES: Final = (
    b"{",
    b"[]",
    b"null",
    b'""',
    b"0",
    b"{}{}",
    b"{} ",
    b'{"a":1}',
    b"\xff",
    b"\xef\xbb\xbf{}",
    b"[" * 5_000,
    b'{"a":' * 600,
    b'{"email": "\\ud800@x.y"}',
    b'{"email": "\\u0000@x.y"}',
    b'{"email": 1e999}',
    b'{"email": NaN}',
    b"1" * 5_000,
    b'{"email": "ann@shop.example", "email": "b@c.de"}',
    b"{}" + b" " * (BODY_MAX - 2),
    b"{}" + b" " * (BODY_MAX - 1),
    b" " * 40_000,
    b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n",
)
SIZES: Final = (
    b"0x2",
    b" 2",
    b"2 ",
    b"2\t",
    b"+2",
    b"-2",
    b"2;a",
    b"2;a=b",
    b'2;a="\r\n"',
    b"2;\n",
    b"",
    b"g",
    b"02",
    b"00000000000000002",
    b"ffffffffffffffff",
    b"10000000000000000",
    b"fffffffffffffffff2",
    b"2_",
    b"2,2",
    b"\xb2",
    b"2;" + b"x" * 5_000,
    b"2\r",
    b"1",
    b"3",
    b"22",
    b"2;a=b;c",
    b"2 ;a",
    b"2; a = b",
)


# Harm to what has a form ------------------------------------------------------------------------------


def _lines(data: bytes) -> tuple[list[bytes], bytes]:
    """Lines of the head, and the body."""
    head, _, body = data.partition(b"\r\n\r\n")
    return head.split(b"\r\n"), body


def _whole(lines: Sequence[bytes], body: bytes) -> bytes:
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def add_line(rng: random.Random, data: bytes) -> bytes:
    lines, body = _lines(data)
    lines.insert(rng.randrange(1, len(lines) + 1), rng.choice(LINES))
    return _whole(lines, body)


def repeat_line(rng: random.Random, data: bytes) -> bytes:
    lines, body = _lines(data)
    lines.insert(rng.randrange(1, len(lines) + 1), rng.choice(lines))
    return _whole(lines, body)


def drop_line(rng: random.Random, data: bytes) -> bytes:
    lines, body = _lines(data)
    del lines[rng.randrange(len(lines))]
    return _whole(lines, body)


def shuffle_lines(rng: random.Random, data: bytes) -> bytes:
    lines, body = _lines(data)
    rest = lines[1:]
    rng.shuffle(rest)
    return _whole([*lines[:1], *rest], body)


def fold_line(rng: random.Random, data: bytes) -> bytes:
    lines, body = _lines(data)
    at = rng.randrange(len(lines))
    cut = rng.randrange(len(lines[at]) + 1)
    fold = rng.choice((b"\r\n ", b"\r\n\t", b"\n ", b"\r\n \r\n "))
    lines[at] = lines[at][:cut] + fold + lines[at][cut:]
    return _whole(lines, body)


def enlarge(rng: random.Random, data: bytes) -> bytes:
    lines, body = _lines(data)
    at = rng.randrange(1, len(lines) + 1)
    match rng.randrange(4):
        case 0:
            lines.insert(at, b"X-Large: " + b"a" * rng.choice((1_000, 4_096, 8_000, 16_000)))
        case 1:
            lines.insert(at, b"X-Large: " + b"a" * (HEAD_MAX - len(_whole(lines, b"")) - 11 + rng.randrange(-3, 4)))
        case 2:
            lines[at:at] = [b"X-%d: y" % number for number in range(rng.choice((50, 300, 900)))]
        case _:
            lines.insert(at, b"x" * rng.choice((300, 5_000)) + b": y")
    return _whole(lines, body)


def other_spelling(rng: random.Random, data: bytes) -> bytes:
    lines, body = _lines(data)
    at = rng.randrange(len(lines))
    name, colon, value = lines[at].partition(b":")
    lines[at] = rng.choice(
        (
            name.upper() + colon + value,
            name + colon + value.upper(),
            name + colon + value.strip(),
            name + colon + b" \t" + value + b"\t ",
            name + b" " + colon + value,
            name.replace(b"-", b"_") + colon + value,
        )
    )
    return _whole(lines, body)


def other_end_of_line(rng: random.Random, data: bytes) -> bytes:
    ends = [found.start() for found in re.finditer(rb"\r\n", data)]
    if not ends:
        return data
    at = rng.choice(ends)
    return (
        data[:at]
        + rng.choice((b"\n", b"\r", b"\r\r\n", b"\n\r", b"\r\n\r\n", b"", b"\0\r\n", b" \r\n"))
        + data[at + 2 :]
    )


def _first_line(data: bytes, at: int, word: bytes) -> bytes:
    lines, body = _lines(data)
    words = lines[0].split(b" ")
    if len(words) > at:
        words[at] = word
    return _whole([b" ".join(words), *lines[1:]], body)


def other_method(rng: random.Random, data: bytes) -> bytes:
    return _first_line(data, 0, rng.choice(METHODS))


def other_target(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.5:
        return _first_line(data, 1, rng.choice(TARGETS))
    words = _lines(data)[0][0].split(b" ")
    return _first_line(data, 1, mutation.harmed(rng, words[1])) if len(words) > 1 else data


def other_version(rng: random.Random, data: bytes) -> bytes:
    return _first_line(data, 2, rng.choice(VERSIONS))


def other_length(rng: random.Random, data: bytes) -> bytes:
    """A body, and a length that is not its own."""
    lines, body = _lines(data)
    lines = [line for line in lines if not line.lower().startswith((b"content-length", b"transfer-encoding"))]
    body = body or rng.choice((b"{}", *BODIES))
    length = b"%d" % max(0, len(body) + rng.choice((-2, -1, 1, 2, 40)))
    lines.append(b"Content-Length: " + rng.choice((length, length, b"0" + length, length + b",", b"+" + length)))
    return _whole(lines, body)


def other_body(rng: random.Random, data: bytes) -> bytes:
    lines, _ = _lines(data)
    body = rng.choice(BODIES)
    lines = [line for line in lines if not line.lower().startswith((b"content-length", b"transfer-encoding"))]
    return _whole([*lines, b"Content-Type: application/json", b"Content-Length: %d" % len(body)], body)


def in_chunks(rng: random.Random, data: bytes) -> bytes:
    """A body in chunks that break their rules, or bend them."""
    lines, _ = _lines(data)
    lines = [line for line in lines if not line.lower().startswith((b"content-length", b"transfer-encoding"))]
    end = rng.choice((b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r", b""))
    chunks = rng.choice((rng.choice(SIZES), b"2")) + rng.choice((b"\r\n", b"\r\n", b"\n")) + b"{}" + end
    if rng.random() < 0.2:
        chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in b"{ }" + b" " * rng.choice((0, 300)))
    last = rng.choice(
        (
            b"0\r\n\r\n",
            b"0\r\n\r\n",
            b"0\r\n\r\n",
            b"0;x\r\n\r\n",
            b"000\r\n\r\n",
            b"0\r\n",
            b"\r\n\r\n",
            b"0\n\n",
            b"",
            b"0\r\nX-User-Id: x\r\n\r\n",
            b"0\r\nContent-Length: 5\r\n\r\n",
            b"0\r\nX\r\n\r\n",
            b"0\r\nX-A: \x01\r\n\r\n",
            b"0\r\n X: y\r\n\r\n",
            b"0\r\nX: " + b"y" * 20_000 + b"\r\n\r\n",
            b"0\r\nX: y\n\r\n",
            b"0\r\nTransfer-Encoding: chunked\r\n\r\n",
        )
    )
    return _whole([*lines, b"Content-Type: application/json", b"Transfer-Encoding: chunked"], chunks + last)


FORMS: Final = (
    add_line,
    add_line,
    add_line,
    repeat_line,
    drop_line,
    shuffle_lines,
    fold_line,
    enlarge,
    other_spelling,
    other_end_of_line,
    other_method,
    other_target,
    other_target,
    other_version,
    other_length,
    other_body,
    in_chunks,
    in_chunks,
)


def script(rng: random.Random) -> Script:
    """One case."""
    requests = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        sound = rng.choice(VALID)
        match rng.randrange(10):
            case 0 | 1 | 2:
                requests.append(sound)
            case 3 | 4:
                requests.append(mutation.harmed(rng, sound, most=1))
            case 5:
                requests.append(mutation.harmed(rng, mutation.harmed(rng, sound, FORMS)))
            case _:
                requests.append(mutation.harmed(rng, sound, FORMS, most=2))
    data = b"".join(requests)
    match rng.randrange(20):
        case 0:
            return Script(KIND, mutation.sliced(rng, mutation.truncate(rng, data)), Ending.HALF)
        case 1:
            return Script(KIND, mutation.sliced(rng, data), Ending.HALF)
        case 2:
            return Script(KIND, mutation.sliced(rng, mutation.truncate(rng, data)), Ending.CUT)
    return Script(KIND, mutation.sliced(rng, data + rng.choice(HONEST)))


# The judgement ----------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """What the hot lane refuses although h11 takes it: in which words, of requests with what in them, and why."""

    name: str
    says: str
    of: bytes
    because: str = STRICTER
    outcome: tuple[int, str] = (400, "BAD_REQUEST")


BARE_LF: Final = rb"(?<!\r)\n"
CONTROL: Final = rb"[\x00-\x08\x0b-\x1f\x7f]|\r(?!\n)|" + BARE_LF
HALF_READ_SAYS: Final = "it begins with no method"
HALF_READ: Final = (
    "httptools does not say where in a read it met a method that it does not know: behind another request in the same"
    " read nothing is left but to refuse it"
)
DIFFERENCES: Final = (
    Difference("length and chunks", "can't be present with", rb"(?i)transfer-encoding"),
    Difference("length beyond 64 bits, and chunks", "content-Length overflow", rb"(?i)transfer-encoding"),
    Difference("tab behind a coding", "has invalid `Transfer-Encoding`", rb"(?i)transfer-encoding:[^\r\n]*\t"),
    Difference("length that is given twice alike", "duplicate Content-Length", rb"(?is)content-length.*content-length"),
    Difference(
        "lengths in a list, alike", "invalid character in Content-Length", rb"(?i)content-length:[ \t]*\d+[ \t]*,"
    ),
    Difference(
        "coding in a trailer", "invalid `Transfer-Encoding` header value", rb"(?is)transfer-encoding.*transfer-"
    ),
    Difference("version", "invalid HTTP version", rb"HTTP/\d\.\d"),
    Difference("version", "only HTTP/1.0, HTTP/1.1", rb"HTTP/\d\.\d|RTSP|ICE"),
    Difference("version", "expected HTTP/2 Connection Preface", rb"PRI "),
    Difference("bare LF or CR", "expected CRLF after version", rb"HTTP/\d\.\d(?!\r\n)"),
    Difference("bare LF or CR", "expected LF after", CONTROL),
    Difference("bare LF or CR", "missing expected", CONTROL),
    Difference("control character", "invalid header field char", CONTROL),
    Difference("control character", "invalid header value char", CONTROL),
    Difference("control character", "invalid header token", CONTROL),
    Difference("fold", "unexpected whitespace after header value", rb"\n[ \t]"),
    Difference(
        "white space in a chunk's line", "invalid character in chunk", rb"[0-9a-fA-F][ \t]+[;\r\n]|; |" + CONTROL
    ),
    Difference("method in lower case", "its method is not in upper case", rb"[a-z]"),
    Difference("odd target", "unexpected char in url schema", rb"[!-~]+ [^/*]"),
    Difference("odd target", "unexpected start char in url", rb"[!-~]+ [^/*]"),
    Difference("odd target", "in url", rb"[A-Z]+ [^ ]*[^!-~]|[A-Z]+ [^/*]|#"),
    Difference("unknown method behind another request", HALF_READ_SAYS, rb"", HALF_READ),
    Difference("long target", "The address is longer", rb"[!-~]{2049}", STRICTER, (414, "URI_TOO_LONG")),
    Difference("large head", "The head of the request is larger", rb"", SOFT, (431, "HEADERS_TOO_LARGE")),
    Difference("CONNECT", "CONNECT is not for this address", rb"CONNECT", STRICTER, (405, "METHOD_NOT_ALLOWED")),
    Difference(
        "a body that is announced, and too large",
        "The body is larger than allowed",
        rb"(?i)expect",
        "who asks whether to send it is told before it is sent; the connection ends, since it may come all the same",
        (413, "PAYLOAD_TOO_LARGE"),
    ),
)
REFUSALS: Final = (400, 431, 501, 505)
# The other way round: what h11 refuses, and the hot lane takes. Each of them is harmless, and here is why.
EMPTY_LINE: Final = re.compile(
    rb"(?s)(\A|[^\r\n]\r\n|\r\n\r\n|[^\n])(\r?\n)+[!-~]"
)  # RFC 9112, 2.2: it should be ignored
LARGE_TRAILER: Final = re.compile(rb"0\r\n[!-~]+: .{16000}", re.DOTALL)  # read and forgotten
PROXY_CONNECTION: Final = re.compile(rb"(?i)proxy-connection:[ \t]*close")  # llhttp takes it for Connection


class Verdict(NamedTuple):
    """`differs`: the name of a described difference, empty where there is none; `wrongs`: what nobody described."""

    differs: str
    wrongs: list[str]


def judged(sent: bytes, ending: Ending, plain: Transcript, oracle: Transcript) -> Verdict:
    wrongs = [f"plain: {wrong}" for wrong in plain.wrongs] + [f"behind TLS: {wrong}" for wrong in oracle.wrongs]
    if wrongs or ending is Ending.CUT:
        return Verdict("", wrongs)
    ours, theirs = plain.answers, oracle.answers
    if plain.is_closed and ending is Ending.READ and not (ours and ours[-1].closes):
        wrongs.append("plain: it closed a connection without having said that it would")
    same = 0
    while same < min(len(ours), len(theirs)) and ours[same].like == theirs[same].like:
        same += 1
    our = ours[same] if same < len(ours) else None
    their = theirs[same] if same < len(theirs) else None
    if our is None and their is None:
        if ending is Ending.READ and plain.is_closed != oracle.is_closed:
            wrongs.append(f"after the same {same} answers: {_left(plain)} plain, {_left(oracle)} behind TLS")
        return Verdict("", wrongs)
    is_last = same == len(ours) - 1 and our is not None and our.closes
    is_their_last = same == len(theirs) - 1 and their is not None and their.closes and oracle.is_closed
    name = ""
    if our is not None and is_last and 400 <= our.status < 500:
        name = _refusal(sent, our, their, is_their_last=is_their_last, is_waiting=not oracle.is_closed)
    if not name and their is not None and is_their_last and their.status in REFUSALS and not their.body:
        name = _taken(sent, our, their, is_last=is_last, is_half=ending is Ending.HALF)
    if not name and is_last and their is not None and PROXY_CONNECTION.search(sent):
        name = "Proxy-Connection"
    if (
        not name
        and our is not None
        and their is not None
        and sent.count(b"OPTIONS ")
        and our.status == their.status == 413
    ):
        name = "preflight that is too large"  # it says so all the same, without the fields of a preflight
    if not name:
        wrongs.append(
            f"they differ in answer {same + 1}\n  plain:      {_shown(our)}, then {_left(plain)}"
            f"\n  behind TLS: {_shown(their)}, then {_left(oracle)}"
        )
    return Verdict(name, wrongs)


def _refusal(sent: bytes, our: Answer, their: Answer | None, *, is_their_last: bool, is_waiting: bool) -> str:
    """The name of the difference, where the hot lane refuses."""
    if their is not None and is_their_last and their.status in REFUSALS and not their.body:
        return NO_BODY
    if their is None and is_waiting and our.code == "BAD_REQUEST":
        return "refused before its end"
    for difference in DIFFERENCES:
        if difference.outcome == (our.status, our.code) and difference.says in our.message:
            return difference.name if re.search(difference.of, sent) else ""
    return ""


def _taken(sent: bytes, our: Answer | None, their: Answer, *, is_last: bool, is_half: bool) -> str:
    """The same, where h11 refuses what the hot lane has taken."""
    if our is None:
        if EMPTY_LINE.search(sent):
            return "empty line"
        return "refused before its end" if is_half else ""
    if is_last:
        return "bytes behind the last request"  # h11 refuses them, and Hypercorn drops the answer to the request
    if their.status == 431:
        return "large trailer" if LARGE_TRAILER.search(sent) else ""
    return "empty line" if EMPTY_LINE.search(sent) else ""


def _left(transcript: Transcript) -> str:
    return "closed" if transcript.is_closed else "open"


def _shown(answer: Answer | None) -> str:
    return "nothing" if answer is None else repr(answer.like[:60] + b" ... " + answer.body[:160])


def reads_alike(rng: random.Random, sent: bytes) -> list[str]:
    """The reader of the hot lane finds the same in the same bytes, however they are cut."""
    whole, told = _read(sent[at : at + RECEIVE_MAX] for at in range(0, len(sent), RECEIVE_MAX))
    for pieces in (mutation.sliced(rng, sent), mutation.sliced(rng, sent)):
        found, says = _read(pieces)
        if found == whole and bool(says) == bool(told):
            continue
        if (HALF_READ_SAYS in told and found[: len(whole)] == whole) or (
            HALF_READ_SAYS in says and whole[: len(found)] == found
        ):
            continue  # HALF_READ
        return [f"cut into {len(pieces)} pieces the reader finds {found} {says!r}, else {whole} {told!r}"]
    return []


def _read(pieces: Iterable[bytes]) -> tuple[list[object], str]:
    """The requests in there, and why there are no more."""
    reader = Reader(BODY_MAX)
    for piece in pieces:
        reader.feed(piece)
    found: list[object] = [
        (m.method, m.target, m.version, m.fields, m.keeps_alive, m.body, m.is_too_large, m.is_upgrade, m.rest)
        for m in reader.messages
    ]
    failure = reader.failure
    reader.close()
    return found, "" if failure is None else failure.message


async def attempt(arena: Arena, probes: Sequence[Probe], case: Script, quiet_s: float, rng: random.Random) -> Tried:
    """One case, as a user that nobody was before."""
    filled = case.filled(arena.attempt())
    heard: list[Transcript | None] = [None, None]

    async def ask(number: int) -> None:
        heard[number] = await exchange(arena.lanes[number], probes[number], filled, quiet_s)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, 0)
        nursery.start_soon(ask, 1)
    plain, oracle = heard
    assert plain is not None
    assert oracle is not None
    verdict = judged(filled.sent, case.ending, plain, oracle)
    alike = [] if verdict.wrongs else reads_alike(rng, filled.sent)
    answers = Counter(f"{answer.status} {answer.code}".strip() for answer in plain.answers)
    return Tried(verdict.differs or "alike", verdict.wrongs + alike, answers)


TARGET: Final = Target("lane", script, attempt)
