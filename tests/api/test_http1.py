"""The reader of the hot lane: what is a request, what is none, and that it never matters how the bytes were cut."""

from collections.abc import Iterable
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.http1 import DRAIN_MAX, HEAD_MAX, TARGET_MAX, Message, Reader, serialized

BODY_MAX: Final = 64

HEAD: Final = b"POST /a HTTP/1.1\r\nHost: h\r\n"
GET: Final = b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n"
CHUNKED: Final = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
WEBSOCKET: Final = b"GET /a HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: WebSocket\r\n\r\n"
H2C: Final = b"GET /a HTTP/1.1\r\nHost: h\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"


def read(*pieces: bytes) -> Reader:
    reader = Reader(BODY_MAX)
    for piece in pieces:
        reader.feed(piece)
    return reader


def told(reader: Reader) -> tuple[list[tuple[Any, ...]], str]:
    """All that a reader found out, as values that can be compared."""
    messages = [
        (m.method, m.target, m.version, m.fields, m.keeps_alive, m.body, m.is_too_large, m.is_upgrade, m.rest)
        for m in reader.messages
    ]
    return messages, "" if reader.failure is None else reader.failure.code


def only(*pieces: bytes) -> Message:
    """The one request in there."""
    reader = read(*pieces)
    assert reader.failure is None, str(reader.failure)
    (message,) = reader.messages
    assert not reader.is_reading
    return message


def failure(*pieces: bytes) -> tuple[int, str]:
    reader = read(*pieces)
    assert not reader.messages, "there is a request before the failure"
    assert reader.failure is not None
    return reader.failure.status_code, reader.failure.code


GOOD: Final = {
    "the least": (GET, [(b"GET", b"/a", b"")]),
    "with a body": (HEAD + b"Content-Length: 2\r\n\r\n{}", [(b"POST", b"/a", b"{}")]),
    "with an empty body": (HEAD + b"Content-Length: 0\r\n\r\n", [(b"POST", b"/a", b"")]),
    "with a length in spaces": (HEAD + b"Content-Length: \t 2 \r\n\r\n{}", [(b"POST", b"/a", b"{}")]),
    "with zeros before its length": (HEAD + b"Content-Length: 0002\r\n\r\n{}", [(b"POST", b"/a", b"{}")]),
    "in chunks": (CHUNKED + b"1\r\n{\r\n1\r\n}\r\n0\r\n\r\n", [(b"POST", b"/a", b"{}")]),
    "in chunks, none": (CHUNKED + b"0\r\n\r\n", [(b"POST", b"/a", b"")]),
    "in chunks, in upper case": (
        HEAD + b"Transfer-Encoding: \t Chunked \r\n\r\nA\r\n0123456789\r\n0\r\n\r\n",
        [(b"POST", b"/a", b"0123456789")],
    ),
    "in chunks with extensions": (CHUNKED + b'2;a=b;c="d;e"\r\n{}\r\n0;f\r\n\r\n', [(b"POST", b"/a", b"{}")]),
    "in chunks with zeros": (CHUNKED + b"0002\r\n{}\r\n000\r\n\r\n", [(b"POST", b"/a", b"{}")]),
    "in chunks with trailers": (CHUNKED + b"2\r\n{}\r\n0\r\nX-User-Id: x\r\n\r\n", [(b"POST", b"/a", b"{}")]),
    "after an empty line": (b"\r\n" + GET, [(b"GET", b"/a", b"")]),
    "after two empty lines": (b"\r\n\r\n" + GET, [(b"GET", b"/a", b"")]),
    "a pipeline": (
        GET + HEAD + b"Content-Length: 2\r\n\r\n{}" + GET,
        [(b"GET", b"/a", b""), (b"POST", b"/a", b"{}"), (b"GET", b"/a", b"")],
    ),
    "a pipeline of chunks": ((CHUNKED + b"2\r\n{}\r\n0\r\n\r\n") * 3, [(b"POST", b"/a", b"{}")] * 3),
    "an empty line between two": (GET + b"\r\n" + GET, [(b"GET", b"/a", b"")] * 2),
    "HTTP/1.0": (b"GET /a HTTP/1.0\r\n\r\n", [(b"GET", b"/a", b"")]),
    "absolute form": (b"GET http://h/a?b HTTP/1.1\r\nHost: h\r\n\r\n", [(b"GET", b"http://h/a?b", b"")]),
    "asterisk form": (b"OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n", [(b"OPTIONS", b"*", b"")]),
    "an empty host": (b"GET /a HTTP/1.1\r\nHost:\r\n\r\n", [(b"GET", b"/a", b"")]),
    "a method that nobody knows": (b"BREW /a HTTP/1.1\r\nHost: h\r\n\r\n", [(b"BREW", b"/a", b"")]),
    "a method that nobody knows, with a body": (
        b"BREW /a HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{}" + GET,
        [(b"BREW", b"/a", b"{}"), (b"GET", b"/a", b"")],
    ),
    "a method of 32 characters": (b"A" * 32 + b" /a HTTP/1.1\r\nHost: h\r\n\r\n", [(b"A" * 32, b"/a", b"")]),
    "an unknown upgrade": (
        HEAD + b"Connection: upgrade\r\nUpgrade: foo\r\n\r\n" + GET,
        [(b"POST", b"/a", b""), (b"GET", b"/a", b"")],
    ),
    "an unknown upgrade with a body": (
        HEAD + b"Connection: upgrade\r\nUpgrade: foo\r\nContent-Length: 2\r\n\r\n{}" + GET,
        [(b"POST", b"/a", b"{}"), (b"GET", b"/a", b"")],
    ),
    "an unknown upgrade in chunks": (
        HEAD + b"Connection: upgrade\r\nUpgrade: foo\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n" + GET,
        [(b"POST", b"/a", b"{}"), (b"GET", b"/a", b"")],
    ),
    "an upgrade to WebSocket by POST": (
        WEBSOCKET.replace(b"GET", b"POST", 1) + GET,
        [(b"POST", b"/a", b""), (b"GET", b"/a", b"")],
    ),
    "an upgrade to h2c": (
        H2C + b"\r\n" + GET,
        [(b"GET", b"/a", b"")] * 2,
    ),
    "an upgrade to h2c with a body": (
        H2C + b"Content-Length: 2\r\n\r\n{}" + GET,
        [(b"GET", b"/a", b"{}"), (b"GET", b"/a", b"")],
    ),
    "two upgrades that are none": (
        (HEAD + b"Connection: upgrade\r\nUpgrade: foo\r\nContent-Length: 2\r\n\r\n{}") * 2,
        [(b"POST", b"/a", b"{}")] * 2,
    ),
}

BAD: Final = {
    "nothing of HTTP": b"GARBAGE\r\n\r\n",
    "a method in lower case": b"get /a HTTP/1.1\r\nHost: h\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40),
    "HTTP/0.9": b"GET /a\r\n\r\n" + b" " * 40,
    "HTTP/1.2": b"GET /a HTTP/1.2\r\nHost: h\r\n\r\n",
    "HTTP/2.0": b"GET /a HTTP/2.0\r\nHost: h\r\n\r\n",
    "HTTP/3.0": b"GET /a HTTP/3.0\r\nHost: h\r\n\r\n",
    "a version of letters": b"GET /a HTTP/1.x\r\nHost: h\r\n\r\n",
    "a version in lower case": b"GET /a http/1.1\r\nHost: h\r\n\r\n",
    "no host": b"GET /a HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /a HTTP/1.1\r\nHost: h\r\nhost: h\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}x",
    "two equal lengths": HEAD + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}",
    "two lengths in one": HEAD + b"Content-Length: 2, 2\r\n\r\n{}",
    "a length of words": HEAD + b"Content-Length: two\r\n\r\n{}",
    "a length with a sign": HEAD + b"Content-Length: +2\r\n\r\n{}",
    "a negative length": HEAD + b"Content-Length: -2\r\n\r\n{}",
    "a length in hex": HEAD + b"Content-Length: 0x2\r\n\r\n{}",
    "a length without a number": HEAD + b"Content-Length:\r\n\r\n{}",
    "a length with a space in it": HEAD + b"Content-Length: 1 2\r\n\r\n{}0123456789",
    "a length beyond 64 bits": HEAD + b"Content-Length: 18446744073709551618\r\n\r\n{}",
    "a length and chunks": HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "chunks and a length": HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "chunks of HTTP/1.0": b"POST /a HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "another coding": HEAD + b"Transfer-Encoding: gzip\r\n\r\n",
    "a coding before chunked": HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "a coding after chunked": HEAD + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "chunked twice": HEAD + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "chunked in two lines": HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a coding in two lines": HEAD + b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "identity": HEAD + b"Transfer-Encoding: identity\r\n\r\n",
    "chunked with a sign": HEAD + b"Transfer-Encoding: +chunked\r\n\r\n0\r\n\r\n",
    "xchunked": HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked with a parameter": HEAD + b"Transfer-Encoding: chunked;q=1\r\n\r\n0\r\n\r\n",
    "no coding": HEAD + b"Transfer-Encoding:\r\n\r\n0\r\n\r\n",
    "a space before the colon of the coding": HEAD + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "bare LF after the request line": b"GET /a HTTP/1.1\nHost: h\r\n\r\n",
    "bare LF after a header": b"GET /a HTTP/1.1\r\nHost: h\n\r\n",
    "bare LF at the end": b"GET /a HTTP/1.1\r\nHost: h\r\n\n" + GET,
    "bare LF all over": GET.replace(b"\r\n", b"\n"),
    "bare CR in a value": b"GET /a HTTP/1.1\r\nHost: h\rX-A: b\r\n\r\n",
    "CR CR LF": b"GET /a HTTP/1.1\r\r\nHost: h\r\n\r\n",
    "NUL in the target": b"GET /a\0b HTTP/1.1\r\nHost: h\r\n\r\n",
    "NUL in a name": b"GET /a HTTP/1.1\r\nHost: h\r\nX\0: b\r\n\r\n",
    "NUL in a value": b"GET /a HTTP/1.1\r\nHost: h\r\nX: \0\r\n\r\n",
    "a control character in a value": b"GET /a HTTP/1.1\r\nHost: h\r\nX: \x01\r\n\r\n",
    "DEL in a value": b"GET /a HTTP/1.1\r\nHost: h\r\nX: \x7f\r\n\r\n",
    "Latin-1 in the target": b"GET /\xff HTTP/1.1\r\nHost: h\r\n\r\n",
    "Latin-1 in a name": b"GET /a HTTP/1.1\r\nHost: h\r\nX\xe9: b\r\n\r\n",
    "a space in the target": b"GET /a b HTTP/1.1\r\nHost: h\r\n\r\n",
    "a tab in the request line": b"GET\t/a HTTP/1.1\r\nHost: h\r\n\r\n" + b" " * 40,
    "a space after the version": b"GET /a HTTP/1.1 \r\nHost: h\r\n\r\n",
    "no target": b"GET HTTP/1.1\r\nHost: h\r\n\r\n",
    "a target without a slash": b"GET a HTTP/1.1\r\nHost: h\r\n\r\n",
    "a fold": b"GET /a HTTP/1.1\r\nHost: h\r\nX: a\r\n b\r\n\r\n",
    "a fold with a tab": b"GET /a HTTP/1.1\r\nHost: h\r\nX: a\r\n\tb\r\n\r\n",
    "a fold of the first header": b"GET /a HTTP/1.1\r\n Host: h\r\nHost: h\r\n\r\n",
    "a space before the colon": b"GET /a HTTP/1.1\r\nHost: h\r\nX : b\r\n\r\n",
    "a space in a name": b"GET /a HTTP/1.1\r\nHost: h\r\nX Y: b\r\n\r\n",
    "no name": b"GET /a HTTP/1.1\r\nHost: h\r\n: b\r\n\r\n",
    "no colon": b"GET /a HTTP/1.1\r\nHost: h\r\nX\r\n\r\n",
    "a method with odd characters": b"G(T /a HTTP/1.1\r\nHost: h\r\n\r\n",
    "a method of 33 characters": b"A" * 33 + b" /a HTTP/1.1\r\nHost: h\r\n\r\n",
    "a space before the method": b" GET /a HTTP/1.1\r\nHost: h\r\n\r\n",
    "chunk size of none": CHUNKED + b"\r\n{}\r\n0\r\n\r\n",
    "chunk size of words": CHUNKED + b"zz\r\n{}\r\n0\r\n\r\n",
    "chunk size with 0x": CHUNKED + b"0x2\r\n{}\r\n0\r\n\r\n",
    "chunk size with a sign": CHUNKED + b"+2\r\n{}\r\n0\r\n\r\n",
    "chunk size below zero": CHUNKED + b"-2\r\n{}\r\n0\r\n\r\n",
    "chunk size with a space before": CHUNKED + b" 2\r\n{}\r\n0\r\n\r\n",
    "chunk size with a space after": CHUNKED + b"2 \r\n{}\r\n0\r\n\r\n",
    "chunk size with an underscore": CHUNKED + b"1_0\r\n0123456789abcdef\r\n0\r\n\r\n",
    "chunk size beyond 64 bits": CHUNKED + b"10000000000000002\r\n{}\r\n0\r\n\r\n",
    "chunk that is longer than it says": CHUNKED + b"1\r\n{}\r\n0\r\n\r\n",
    "chunk with a bare LF": CHUNKED + b"2\n{}\r\n0\r\n\r\n",
    "chunk whose data end in a bare LF": CHUNKED + b"2\r\n{}\n0\r\n\r\n",
    "extension with a bare LF": CHUNKED + b"2;a\n{}\r\n0\r\n\r\n",
    "extension with a bare CR": CHUNKED + b"2;a\rb\r\n{}\r\n0\r\n\r\n",
    "extension with NUL": CHUNKED + b"2;\0\r\n{}\r\n0\r\n\r\n",
    "trailer with a bare LF": CHUNKED + b"0\r\nX: a\n\r\n",
    "trailer without a colon": CHUNKED + b"0\r\nX\r\n\r\n",
    "last chunk with a bare LF": CHUNKED + b"0\r\n\n",
}  # fmt: skip


# What llhttp takes, though it is not HTTP to the letter: no proxy passes it on, and none reads it differently.
LENIENT: Final = {
    "two spaces in the request line": b"GET  /a HTTP/1.1\r\nHost: h\r\n\r\n",
    "another protocol's name": b"GET /a RTSP/1.0\r\nHost: h\r\n\r\n",
}


def cuts_of(data: bytes) -> Iterable[list[bytes]]:
    """Byte by byte; and in two, at every position."""
    yield [bytes([byte]) for byte in data]
    for at in range(1, len(data)):
        yield [data[:at], data[at:]]


@pytest.mark.parametrize("name", GOOD)
def test_request_is_read_alike_however_it_was_cut(name: str) -> None:
    data, expected = GOOD[name]
    whole = read(data)
    assert whole.failure is None, str(whole.failure)
    assert [(message.method, message.target, message.body) for message in whole.messages] == expected
    assert not whole.is_reading
    for pieces in cuts_of(data):
        assert told(read(*pieces)) == told(whole), pieces


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_request_is_refused_however_it_was_cut(name: str) -> None:
    data = BAD[name]
    assert failure(data) == (400, "BAD_REQUEST")
    for pieces in cuts_of(data):
        assert failure(*pieces) == (400, "BAD_REQUEST"), pieces


@pytest.mark.parametrize("name", LENIENT)
def test_what_the_parser_is_lenient_about_is_known(name: str) -> None:
    for pieces in ([LENIENT[name]], *cuts_of(LENIENT[name])):
        message = only(*pieces)
        assert (message.method, message.target) == (b"GET", b"/a")


# Without methods that nobody knows, which have a test of their own below.
PARTS: Final = st.sampled_from(
    [data for name, (data, _) in GOOD.items() if not name.startswith("a method")]
    + [data for data in BAD.values() if data.startswith((b"GET", b"POST"))]
    + [WEBSOCKET]
)


@given(st.lists(PARTS, min_size=1, max_size=3).map(b"".join), st.data())
def test_result_does_not_depend_on_the_cuts(stream: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, len(stream) - 1), max_size=6)))
    pieces = [stream[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    whole, cut = told(read(stream)), told(read(*pieces))
    # What follows an upgrade comes to the new master, with the head or after it.
    assert [message[:-1] for message in cut[0]] == [message[:-1] for message in whole[0]]
    assert cut[1] == whole[1]


@given(st.binary(max_size=200), st.integers(1, 50))
def test_no_bytes_make_it_raise(noise: bytes, size: int) -> None:
    for data in (noise, GET[:20] + noise, CHUNKED + noise):
        told(read(*(data[at : at + size] for at in range(0, len(data), size))))


def test_unknown_method_in_the_middle_of_a_pipeline_is_read_or_refused_but_never_misread() -> None:
    data = GET + b"BREW /b HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{}" + GET.replace(b"/a", b"/c")

    for pieces in ([data], *cuts_of(data)):  # the parser does not say where it stopped, so one read is not enough
        messages, code = told(read(*pieces))
        assert [message[:2] for message in messages] == [(b"GET", b"/a"), (b"BREW", b"/b"), (b"GET", b"/c")][
            : 3 if not code else 1
        ]
        assert code in ("", "BAD_REQUEST")


def test_request_before_a_bad_one_is_answered_first() -> None:
    reader = read(GET + b"GARBAGE\r\n\r\n" + b" " * 40)

    assert [message.target for message in reader.messages] == [b"/a"]
    assert reader.failure is not None
    assert reader.failure.code == "BAD_REQUEST"


# What is in a message ---------------------------------------------------------------------------------


def test_header_names_are_lower_case_and_the_last_of_two_counts() -> None:
    message = only(HEAD + b"X-User-Id: first\r\nx-user-ID: last\r\n\r\n")

    assert message.headers[b"x-user-id"] == b"last"
    assert message.fields == [(b"host", b"h"), (b"x-user-id", b"first"), (b"x-user-id", b"last")]


def test_trailer_is_no_header() -> None:
    data = CHUNKED + b"2\r\n{}\r\n0\r\nX-User-Id: evil\r\nContent-Type: text/plain\r\nHost: other\r\n\r\n"

    for pieces in ([data], *cuts_of(data)):
        message = only(*pieces)
        assert message.headers == {b"host": b"h", b"transfer-encoding": b"chunked"}
        assert message.fields == [(b"host", b"h"), (b"transfer-encoding", b"chunked")]


def test_header_of_one_request_is_not_the_next_ones() -> None:
    reader = read(HEAD + b"X-User-Id: ann\r\n\r\n" + GET)

    assert [message.headers.get(b"x-user-id") for message in reader.messages] == [b"ann", None]


@pytest.mark.parametrize(
    ("last", "keeps_alive"),
    [
        (GET, True),
        (HEAD + b"Connection: keep-alive\r\n\r\n", True),
        (HEAD + b"Connection: close\r\n\r\n", False),
        (HEAD + b"Connection: Close\r\n\r\n", False),
        (HEAD + b"Connection: keep-alive, close\r\n\r\n", False),
        (HEAD + b"Connection: keep-alive\r\nConnection: close\r\n\r\n", False),
        (b"GET /a HTTP/1.0\r\n\r\n", False),
        (b"GET /a HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", False),
    ],
)
def test_what_follows_the_last_request_of_a_connection_does_not_count(last: bytes, keeps_alive: bool) -> None:
    for pieces in ([last + GET], [last, GET], *([*pieces, GET] for pieces in cuts_of(last))):
        reader = read(*pieces)
        assert [message.keeps_alive for message in reader.messages] == ([True, True] if keeps_alive else [False])
        assert reader.failure is None


@pytest.mark.parametrize("second", [WEBSOCKET, H2C + b"\r\n", b"CONNECT h:80 HTTP/1.1\r\nHost: h\r\n\r\n"])
def test_other_protocol_after_the_last_request_of_a_connection_is_none_of_that_request(second: bytes) -> None:
    # The parser reads on after a request in 1.0 that says keep-alive; we don't.
    first = b'POST /a HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: 7\r\n\r\n{"a":1}'
    data = first + second + b'{"b":2}'

    for pieces in ([data], *cuts_of(data)):
        message = only(*pieces)
        assert (message.method, message.body, message.rest) == (b"POST", b'{"a":1}', b"")
        assert not message.keeps_alive


def test_garbage_after_the_last_request_is_no_failure() -> None:
    reader = read(HEAD + b"Connection: close\r\n\r\n" + b"\0" * 100)

    assert len(reader.messages) == 1
    assert reader.failure is None


def test_other_protocol_gets_what_follows_the_head() -> None:
    reader = read(GET + WEBSOCKET + b"\0the rest")

    first, other = reader.messages
    assert not first.is_upgrade
    assert (other.is_upgrade, other.rest) == (True, b"\0the rest")
    reader.feed(b"more, which its new master reads")
    assert reader.failure is None
    assert len(reader.messages) == 2


def test_connect_is_for_no_address() -> None:
    data = b"CONNECT h:80 HTTP/1.1\r\nHost: h\r\n\r\n"

    for pieces in ([data], *cuts_of(data)):
        assert failure(*pieces) == (405, "METHOD_NOT_ALLOWED")


def test_serialised_head_is_read_as_the_same_request() -> None:
    message = only(HEAD + b"X-A:  b \r\nX-A: \xe9\r\nX-Empty:\r\nX-User-Id: ann\r\n\r\n")

    again = only(serialized(message, message.fields))
    assert (again.method, again.target, again.version) == (b"POST", b"/a", "1.1")
    assert {name: value.strip() for name, value in again.fields} == {
        name: value.strip() for name, value in message.fields
    }


# Limits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 1_000, 65_536])
def test_target_may_have_2048_bytes(size: int) -> None:
    for length, expected in ((TARGET_MAX, ""), (TARGET_MAX + 1, "URI_TOO_LONG")):
        data = b"GET /" + b"a" * (length - 1) + b" HTTP/1.1\r\nHost: h\r\n\r\n"
        reader = read(*(data[at : at + size] for at in range(0, len(data), size)))
        assert told(reader)[1] == expected
        assert len(reader.messages) == (0 if expected else 1)


@pytest.mark.parametrize("size", [1, 7, 1_000, 65_536])
@pytest.mark.parametrize("before", [b"", GET * 3])
def test_head_may_have_16_kib(size: int, before: bytes) -> None:
    for length, expected in ((HEAD_MAX, ""), (HEAD_MAX + 1, "HEADERS_TOO_LARGE")):
        bare = HEAD + b"X: " + b"\r\n\r\n"
        data = before + bare.replace(b"X: ", b"X: " + b"a" * (length - len(bare)))
        reader = read(*(data[at : at + size] for at in range(0, len(data), size)))
        assert told(reader)[1] == expected, length
        assert len(reader.messages) == len(before) // len(GET) + (0 if expected else 1)


@pytest.mark.parametrize(
    "endless", [b"X: y\r\n", b"X: " + b"y" * 999, b"X:" + b" " * 998], ids=["lines", "value", "spaces"]
)
def test_head_without_an_end_is_refused_after_16_kib(endless: bytes) -> None:
    reader = read(HEAD)
    if endless.startswith(b"X:") and not endless.endswith(b"\n"):
        reader.feed(b"X:")
        endless = endless[2:]
    fed = len(HEAD)
    while reader.failure is None:
        reader.feed(endless)
        fed += len(endless)
        assert fed < HEAD_MAX + 2_000
    assert reader.failure.code == "HEADERS_TOO_LARGE"


def test_target_without_an_end_is_refused_after_16_kib() -> None:
    reader = read(b"GET /")
    for _ in range(20):
        reader.feed(b"a" * 1_000)
    assert reader.failure is not None
    assert reader.failure.status_code in (414, 431)


def test_empty_lines_between_requests_are_no_request() -> None:
    reader = read(GET)
    for _ in range(1_000):
        reader.feed(b"\r\n")
        assert not reader.is_reading
    reader.feed(GET)
    assert len(reader.messages) == 2


@pytest.mark.parametrize("size", [1, 7, 65_536])
def test_body_may_be_as_large_as_its_limit(size: int) -> None:
    for length in (BODY_MAX, BODY_MAX + 1):
        body = b"a" * length
        plain = HEAD + b"Content-Length: %d\r\n\r\n" % length + body
        wrapped = CHUNKED + b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
        for data in (plain, wrapped):
            reader = read(*(data[at : at + size] for at in range(0, len(data + GET), size)), GET)
            message, after = reader.messages
            assert message.is_too_large == (length > BODY_MAX)
            assert message.body == (b"" if message.is_too_large else body)
            assert after.target == b"/a"


@pytest.mark.parametrize("size", [1_000, 65_536])
def test_body_is_dropped_to_its_end_up_to_one_mebibyte_more(size: int) -> None:
    for length, expected in ((BODY_MAX + DRAIN_MAX, ""), (BODY_MAX + DRAIN_MAX + 1, "PAYLOAD_TOO_LARGE")):
        reader = read(HEAD + b"Content-Length: %d\r\n\r\n" % length)
        for at in range(0, length, size):
            reader.feed(b"a" * min(size, length - at))
        assert (told(reader)[1], len(reader.messages)) == (expected, 0 if expected else 1)


def test_chunks_of_one_byte_are_cut_off_when_their_wrapping_is_a_mebibyte() -> None:
    reader = read(CHUNKED)
    fed = 0
    while reader.failure is None:
        reader.feed(b"1;" + b"e" * 1_000 + b"\r\na\r\n")
        fed += 1_009
        assert fed < DRAIN_MAX + BODY_MAX + 70_000
    assert reader.failure.code == "PAYLOAD_TOO_LARGE"


@pytest.mark.parametrize(
    ("begin", "more"),
    [(b"1;", b"e" * 1_000), (b"0\r\n", b"X: y\r\n"), (b"0\r\nX: ", b"y" * 1_000), (b"0" * 10, b"0" * 1_000)],
    ids=["extension", "trailers", "trailer", "zeros"],
)
def test_wrapping_of_a_body_without_an_end_is_cut_off(begin: bytes, more: bytes) -> None:
    reader, fed = read(CHUNKED + begin), 0
    while reader.failure is None:
        reader.feed(more)
        fed += len(more)
        assert fed < DRAIN_MAX + BODY_MAX + 70_000
    assert reader.failure.code in ("PAYLOAD_TOO_LARGE", "BAD_REQUEST")


def test_nothing_is_kept_of_a_body_that_is_too_large() -> None:
    reader = read(HEAD + b"Content-Length: 100000\r\n\r\n")
    for _ in range(1_000):
        reader.feed(b"a" * 99)
    assert reader._body == []


# Expect -----------------------------------------------------------------------------------------------


def test_client_that_expects_100_continue_waits_until_its_body_begins() -> None:
    reader = read(HEAD + b"Content-Length: 2\r\nExpect: 100-Continue\r\n\r\n")
    assert reader.awaits_continue
    reader.feed(b"{")
    assert not reader.awaits_continue
    reader.feed(b"}")
    assert len(reader.messages) == 1


@pytest.mark.parametrize(
    "head",
    [
        HEAD + b"Expect: 100-continue\r\n\r\n",
        HEAD + b"Content-Length: 0\r\nExpect: 100-continue\r\n\r\n",
        HEAD + b"Content-Length: 2\r\nExpect: tea\r\n\r\n",
        b"POST /a HTTP/1.0\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n",
    ],
    ids=["no body", "empty body", "another expectation", "HTTP/1.0"],
)
def test_who_sends_nothing_or_speaks_no_1_1_awaits_nothing(head: bytes) -> None:
    assert not read(head).awaits_continue


def test_body_that_is_announced_too_large_is_refused_before_it_is_sent() -> None:
    expects = b"\r\nExpect: 100-continue\r\n\r\n"

    assert failure(HEAD + b"Content-Length: %d" % (BODY_MAX + 1) + expects) == (413, "PAYLOAD_TOO_LARGE")
    assert read(HEAD + b"Content-Length: %d" % BODY_MAX + expects).awaits_continue


# The state of the connection --------------------------------------------------------------------------


def test_reader_says_what_it_waits_for() -> None:
    reader = read()
    assert (reader.is_reading, reader.is_in_head) == (False, False)
    reader.feed(b"G")
    assert (reader.is_reading, reader.is_in_head) == (True, True)
    reader.feed(HEAD[1:].replace(b"OST", b"ET"))
    assert (reader.is_reading, reader.is_in_head) == (True, True)
    reader.feed(b"Content-Length: 2\r\n\r\n{")
    assert (reader.is_reading, reader.is_in_head) == (True, False)
    reader.feed(b"}")
    assert (reader.is_reading, reader.is_in_head) == (False, False)
    reader.feed(b"GE")
    assert (reader.is_reading, reader.is_in_head) == (True, True)


def test_closed_reader_takes_no_more() -> None:
    reader = read(GET)
    reader.close()
    reader.feed(GET)
    assert len(reader.messages) == 1


def test_connect_ends_the_reading_and_leaves_the_request_before_it_alone() -> None:
    reader = read(HEAD + b"Content-Length: 2\r\n\r\n{}" + b"CONNECT a HTTP/1.1\r\nHost: h\r\n\r\n" + GET)
    messages, code = told(reader)
    assert [(message[0], message[5]) for message in messages] == [(b"POST", b"{}")]
    assert code == "METHOD_NOT_ALLOWED"
