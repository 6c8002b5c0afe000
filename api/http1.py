"""HTTP/1.1 as it comes in: bytes to whole requests, or to the one reason why they are none. No I/O in here.

Built on llhttp (httptools), which reads strictly: no bare LF, no obs-fold, no NUL, one Content-Length, never together
with Transfer-Encoding. Stricter still where a proxy in front might read something else than we do, or where somebody
might make us keep more than a request needs: the limits below, one Host, `chunked` as the only coding, trailers read
and forgotten.
"""

import re
from collections import deque
from collections.abc import Iterable
from typing import Final

import httptools
import msgspec

from api.errors import ApiError

HEAD_MAX: Final = 16_384  # bytes of request line and fields
TARGET_MAX: Final = 2_048  # bytes of the target: a stream of events names up to 54 drops in it, nothing else a tenth
# What a body may have beyond its limit, or in wrapping, and still be read to its end, so that the connection lives on.
DRAIN_MAX: Final = 1_048_576
HEAD_S: Final = 10.0  # to send a head
BODY_S: Final = 10  # to send a body; the slowest phone sends 16 KiB in less

H2_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

METHOD_MAX: Final = 32
METHOD: Final = re.compile(rb"[\r\n]*([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}) ")
HALF_METHOD: Final = re.compile(rb"[\r\n]*[!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}")
STAND_IN: Final = b"PURGE"  # a method that means nothing here, and that the parser knows

ONCE: Final = (b"host", b"transfer-encoding")  # of two a proxy may take the first, and the parser takes the last

Fields = list[tuple[bytes, bytes]]
"""Names in lower case, in the order in which they came."""


class Message(msgspec.Struct, gc=False):
    """One request, read to its end. `rest`: what follows the head of one that leaves HTTP/1.1 (`is_upgrade`)."""

    method: bytes
    target: bytes
    version: str  # 1.0 or 1.1
    fields: Fields
    headers: dict[bytes, bytes]  # the same; of those with one name the last
    keeps_alive: bool
    body: bytes = b""
    is_too_large: bool = False  # its body was read and dropped
    is_upgrade: bool = False
    rest: bytes = b""


class Reader:
    """Reads one connection's requests. `feed` it, then look at `messages`, and at `failure` when there are no more."""

    __slots__ = (
        "_body",
        "_body_max",
        "_body_size",
        "_chunk",
        "_fed",
        "_feed_data",
        "_fields",
        "_held",
        "_is_final",
        "_is_uncounted",
        "_message",
        "_method",
        "_target",
        "awaits_continue",
        "failure",
        "messages",
        "parser",
    )

    def __init__(self, body_max: int) -> None:
        self.messages: deque[Message] = deque()
        self.failure: ApiError | None = None
        self.awaits_continue = False  # the client sends its body once it hears `100 Continue`
        self._body_max = body_max
        self._message: Message | None = None  # the one whose head is complete
        self._fields: Fields | None = None  # of a message whose head is being read
        self._target = b""
        self._method = b""  # one that the parser does not know
        self._held = b""  # the beginning of a method
        self._body: list[bytes] = []
        self._body_size = 0
        self._fed = 0  # bytes of the head, or of the body with its wrapping, without those of the current read
        self._chunk = 0  # bytes of the current read
        self._is_uncounted = False  # bytes that are not in `_fed` belong to the head, too
        self._is_final = False  # nothing after the last message counts
        self._restart()

    @property
    def is_reading(self) -> bool:
        """Whether a part of a request has come, and not the rest."""
        return self._fields is not None or self._held != b""

    @property
    def is_in_head(self) -> bool:
        return self.is_reading and self._message is None

    def close(self) -> None:
        """Forget the parser: it and its reader hold each other, and there may be thousands of them."""
        self._is_final = True
        del self.parser, self._feed_data

    def feed(self, data: bytes) -> None:
        """Read on. After a failure, or the last request of a connection, what comes is dropped."""
        if self._is_final:
            return
        was_idle, before = self._fields is None, len(self.messages)
        if was_idle:
            data, self._held = self._held + data, b""
            if len(data) <= 2 * METHOD_MAX and HALF_METHOD.fullmatch(data) is not None:
                self._held = data  # a whole method at once, or the parser's word on a half one would depend on the cut
                return
        self._chunk = len(data)
        try:
            self._feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserInvalidMethodError:
            self._read_with_stand_in(data if was_idle and len(self.messages) == before else b"")
            return
        except httptools.HttpParserError as fault:
            if not self._is_final:
                self._fail(malformed(_reason(fault)))
        if self._fields is None:
            return
        if len(self.messages) == before:
            self._fed += len(data)
        else:
            self._is_uncounted = True  # most of these bytes were of other requests
        if self._message is None and self._fed > HEAD_MAX:
            self._fail(head_too_large())
        elif self._message is not None and self._fed > self._body_max + DRAIN_MAX:
            self._fail(body_too_large())

    def _restart(self) -> None:
        self.parser = httptools.HttpRequestParser(self)
        self._feed_data = self.parser.feed_data

    def _read_with_stand_in(self, data: bytes) -> None:
        """The parser has a list of methods. One that is not on it is no reason not to read the rest."""
        found = METHOD.match(data)
        if found is None:
            self._fail(malformed("it begins with no method"))
            return
        if found[1] != found[1].upper():  # methods are case-sensitive; a proxy's rules for them may be, too
            self._fail(malformed("its method is not in upper case"))
            return
        self._restart()
        self._method = found[1]
        self.feed(STAND_IN + data[found.end(1) :])

    def _fail(self, failure: ApiError) -> None:
        if self.failure is None:
            self.failure = failure
        self._is_final = True
        self._fields = self._message = None

    # What the parser calls ---------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._fields = None if self._is_final else []  # in the same read as the last request there may be more
        self._target = b""
        self._fed = 0
        self._is_uncounted = False

    def on_url(self, target: bytes) -> None:
        self._target = self._target + target if self._target else target  # it may come in pieces

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._message is None and self._fields is not None:  # else a trailer, or after a failure
            self._fields.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        fields = self._fields
        if fields is None:
            return
        parser = self.parser
        headers = dict(fields)
        message = Message(
            self._method or parser.get_method(),
            self._target,
            parser.get_http_version(),
            fields,
            headers,
            parser.should_keep_alive(),
        )
        failure = self._wrong_with(message)
        if failure is not None:
            self._fail(failure)
            return
        self._message = message
        self._fed = 0
        if parser.should_upgrade():
            message.is_upgrade = True
        if b"expect" in headers:
            self._expect(message)

    def on_body(self, data: bytes) -> None:
        message = self._message
        if message is None:
            return
        self.awaits_continue = False
        self._body_size += len(data)
        if self._body_size > self._body_max:
            message.is_too_large = True
            self._body.clear()
            if self._body_size > self._body_max + DRAIN_MAX:
                self._fail(body_too_large())
        elif not message.is_too_large:
            self._body.append(data)

    def on_message_complete(self) -> None:
        message = self._message
        if message is None:
            return
        if self._body_size:
            message.body = b"".join(self._body)
            self._body.clear()
            self._body_size = 0
        self.messages.append(message)
        self.awaits_continue = False
        self._message = self._fields = None
        self._fed = 0
        self._method = b""
        if not message.keeps_alive or message.version == "1.0":
            message.keeps_alive = False  # as h11 has it: who speaks 1.0 gets one answer
            self._is_final = True

    # Leaves ------------------------------------------------------------------------------------------

    def _wrong_with(self, message: Message) -> ApiError | None:
        """What the parser lets through and we don't."""
        fields, headers = message.fields, message.headers
        if len(message.target) > TARGET_MAX:
            return ApiError(414, "URI_TOO_LONG", f"The address is longer than {TARGET_MAX} bytes.")
        if (self._is_uncounted or self._fed + self._chunk > HEAD_MAX) and _size(message) > HEAD_MAX:
            return head_too_large()
        if message.version not in ("1.0", "1.1"):
            return malformed("only HTTP/1.0, HTTP/1.1 and HTTP/2 are spoken here")
        if b"host" not in headers and message.version != "1.0":
            return malformed("Host is missing")
        if len(headers) != len(fields):
            for name in ONCE:
                if sum(field[0] == name for field in fields) > 1:
                    return malformed(f"{name.decode().title()} stands in it twice")
        coding = headers.get(b"transfer-encoding")
        if coding is not None and (message.version == "1.0" or coding.strip(b" \t").lower() != b"chunked"):
            return malformed("chunked is the only Transfer-Encoding, and of HTTP/1.1")
        if message.method == b"CONNECT":
            return not_for_this_address("CONNECT")
        return None

    def _expect(self, message: Message) -> None:
        headers = message.headers
        if message.version == "1.0" or headers[b"expect"].strip(b" \t").lower() != b"100-continue":
            return
        length = int(headers.get(b"content-length", b"0"))
        if length > self._body_max:
            self._fail(body_too_large())  # before it is sent
        else:
            self.awaits_continue = length > 0 or b"transfer-encoding" in headers

    def _upgrade(self, rest: bytes) -> None:
        """A request that asks for another protocol: let it, where we speak that; else it is a request like others."""
        if self.failure is not None or not self.messages or not self.messages[-1].is_upgrade:
            # A CONNECT, or one after the last request that counts: what is before it in this read is whole, and none
            # of this.
            return
        message = self.messages[-1]
        wanted = message.headers.get(b"upgrade", b"").strip(b" \t").lower()
        # Not h2c: a proxy that lets WebSockets through would relay what follows unread, and with it who the caller says
        # that they are. RFC 9113, 3.1, has given it up; HTTP/2 begins with its preface, which no proxy relays.
        if message.method == b"GET" and wanted == b"websocket":
            message.rest = rest
            self._is_final = True
            return
        self.messages.pop()
        self._is_final = False
        self._restart()
        self.feed(serialized(message, (field for field in message.fields if field[0] != b"upgrade")) + rest)


def serialized(message: Message, fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The head of `message` with `fields`, as every server reads it alike."""
    lines = [b"%s %s HTTP/%s" % (message.method, message.target, message.version.encode())]
    lines += [b"%s: %s" % field for field in fields]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def _size(message: Message) -> int:
    """Bytes of a head, without optional white space."""
    line = len(message.method) + len(message.target) + len("  HTTP/1.1\r\n")
    return line + sum(len(name) + len(value) + len(": \r\n") for name, value in message.fields) + len("\r\n")


def _reason(fault: Exception) -> str:
    text = str(fault)
    return text[:1].lower() + text[1:] if text else "it breaks the rules of HTTP"


def malformed(why: str) -> ApiError:
    return ApiError(400, "BAD_REQUEST", f"The request cannot be understood: {why}.")


def head_too_large() -> ApiError:
    return ApiError(431, "HEADERS_TOO_LARGE", f"The head of the request is larger than {HEAD_MAX} bytes.")


def head_timed_out() -> ApiError:
    return ApiError(400, "HEAD_TIMEOUT", f"The head of the request did not arrive within {HEAD_S:g} s.")


def body_too_large() -> ApiError:
    return ApiError(413, "PAYLOAD_TOO_LARGE", "The body is larger than allowed.")


def body_timed_out() -> ApiError:
    return ApiError(400, "BODY_TIMEOUT", f"The body did not arrive within {BODY_S} s.")


def not_for_this_address(method: str, allowed: str = "GET, POST, PATCH, DELETE") -> ApiError:
    message = f"{method} is not for this address."
    return ApiError(405, "METHOD_NOT_ALLOWED", message, headers=(("Allow", allowed),))
