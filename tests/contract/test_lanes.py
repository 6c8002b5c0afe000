"""One table of requests, sent byte for byte to both lanes; the answers must be the same bytes.

Two servers with equal state: a plain one, whose hot lane reads every connection and answers what is hot by itself,
and one with TLS, where Hypercorn and Quart do all of it. What can't be equal is blanked: the date, generated ids,
instants, the uptime. Where the lanes differ by nature, `Difference` says how and why, and both answers are pinned.
"""

import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx
import psycopg
import pytest

from persistence.embedded import EmbeddedServer
from tests.conftest import _new_database
from tests.contract.conftest import PAGE
from tests.contract.shop import PATIENCE_S, Shop, Wire, WireAnswer, ahead, parsed, request
from tests.server import Server, serving

HOLD_S: Final = "86400"  # none ends in the middle of a case
NOBODYS: Final = "0199c2f0-0000-7000-8000-000000000000"  # an id that nothing has
BODY_MAX: Final = 16_384

CREATED, OK = (201, "SUCCESS"), (200, "SUCCESS")
NO_CONTENT = (204, "")
UNAUTHENTICATED, ODD_USER = (401, "AUTH_REQUIRED"), (401, "INVALID_X_USER_ID")
MISSING, FORBIDDEN_METHOD = (404, "NOT_FOUND"), (405, "METHOD_NOT_ALLOWED")
INVALID, NO_JSON, NOT_OURS = (422, "VALIDATION_ERROR"), (400, "INVALID_JSON"), (415, "UNSUPPORTED_MEDIA_TYPE")
BAD = (400, "BAD_REQUEST")
TOO_LARGE = (413, "PAYLOAD_TOO_LARGE")
REUSED = (422, "IDEMPOTENCY_KEY_REUSED")

Outcome = tuple[int, str]

# A hold that expired before the servers started. What a request means by <past …>.
PAST: Final = {
    b"<past drop>": "0199c2f0-0000-7000-8000-00000000000a",
    b"<past reservation>": "0199c2f0-0000-7000-8000-00000000000b",
    b"<past user>": "00000000-0000-4000-8000-00000000000c",
}
WRITE_PAST: Final = (
    "INSERT INTO users VALUES (%(user)s, 'late', '2026-01-01Z')",
    "INSERT INTO drops (id, name, price, currency, total_stock, available_stock, held_count, sold_count, status,"
    " created_by, created_at, updated_at, epoch, seq)"
    " VALUES (%(drop)s, 'Past', 1, 'USD', 1, 1, 0, 0, 'live', %(user)s, '2026-01-01Z', '2026-01-01 00:01Z', 1, 3)",
    "INSERT INTO reservations (id, drop_id, user_id, qty, status, created_at, expires_at, resolved_at, seq) VALUES"
    " (%(reservation)s, %(drop)s, %(user)s, 1, 'expired', '2026-01-01Z', '2026-01-01 00:01Z', '2026-01-01 00:01Z', 2)",
)


@dataclass(frozen=True, slots=True)
class Case:
    """A request with <names> in it, for which `Stage` makes what they stand for, and what both lanes answer."""

    name: str
    request: bytes
    expected: Outcome
    before: tuple[bytes, ...] = ()  # requests that are sent first, on a connection of their own


@dataclass(frozen=True, slots=True)
class Difference:
    """A request that the lanes answer differently; `code` is empty where h11 answers without a body."""

    name: str
    request: bytes
    plain: Outcome
    behind_tls: Outcome
    because: str


def as_user(method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
    return request(method, path, body, x_user_id="<user>", **headers)


def plus(request: bytes, *lines: bytes) -> bytes:
    """The request with more lines in its head."""
    head, end, body = request.partition(b"\r\n\r\n")
    return b"\r\n".join((head, *lines)) + end + body


def chunked(request: bytes, *chunks: bytes, trailer: bytes = b"", extension: bytes = b"") -> bytes:
    head, _, _ = request.partition(b"\r\n\r\n")
    wrapped = b"".join(b"%x%s\r\n%s\r\n" % (len(chunk), extension, chunk) for chunk in chunks)
    lines = b"\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + lines + wrapped + b"0\r\n" + trailer + b"\r\n"


# The table --------------------------------------------------------------------------------------------

RESERVE: Final = "/api/v1/drops/<drop>/reserve"
PURCHASE: Final = "/api/v1/drops/<held>/purchase"
CANCEL: Final = "/api/v1/reservations/<reservation>/cancel"
HOT: Final = (
    ("reserve", "POST", RESERVE, CREATED),
    ("purchase", "POST", PURCHASE, CREATED),
    ("cancel", "DELETE", CANCEL, OK),
)


def outcomes_of_hot_routes() -> Iterator[Case]:
    def reserve(drop: str) -> bytes:
        return as_user("POST", f"/api/v1/drops/{drop}/reserve")

    def purchase(drop: str) -> bytes:
        return as_user("POST", f"/api/v1/drops/{drop}/purchase")

    def cancel(reservation: str) -> bytes:
        return as_user("DELETE", f"/api/v1/reservations/{reservation}/cancel")

    for base in ("/api/v1", "/api"):
        for name, method, path, expected in HOT:
            yield Case(f"{name} under {base}", as_user(method, path.replace("/api/v1", base)), expected)
    yield Case("reserve on a drop that is none", reserve(NOBODYS), (404, "DROP_NOT_FOUND"))
    yield Case("reserve on a draft", reserve("<draft>"), (409, "DROP_NOT_ACTIVE"))
    yield Case("reserve on a scheduled drop", reserve("<scheduled>"), (409, "DROP_NOT_ACTIVE"))
    yield Case("reserve without stock", reserve("<empty>"), (409, "OUT_OF_STOCK"))
    yield Case("reserve twice", reserve("<held>"), (409, "ALREADY_RESERVED"))
    yield Case("purchase on a drop that is none", purchase(NOBODYS), (404, "DROP_NOT_FOUND"))
    yield Case("purchase without a hold", purchase("<drop>"), (409, "RESERVATION_REQUIRED"))
    yield Case("purchase of what was cancelled", purchase("<returned>"), (409, "RESERVATION_NOT_ACTIVE"))
    yield Case("purchase twice", purchase("<bought>"), (409, "ALREADY_PURCHASED"))
    yield Case("cancel what is none", cancel(NOBODYS), (404, "RESERVATION_NOT_FOUND"))
    yield Case("cancel another's", cancel("<theirs>"), (404, "RESERVATION_NOT_FOUND"))
    yield Case("cancel twice", cancel("<cancelled>"), (409, "RESERVATION_NOT_ACTIVE"))
    yield Case("cancel what was bought", cancel("<consumed>"), (409, "RESERVATION_NOT_ACTIVE"))


def identities() -> Iterator[Case]:
    for name, method, path, good in (*HOT, ("me", "GET", "/api/v1/me", OK)):
        bare = request(method, path)
        for odd, line, expected in (
            ("none", (), UNAUTHENTICATED),
            ("empty", (b"X-User-Id:",), UNAUTHENTICATED),
            ("of spaces", (b"X-User-Id:   \t ",), UNAUTHENTICATED),
            ("no UUID", (b"X-User-Id: seven",), ODD_USER),
            ("in braces", (b"X-User-Id: {<user>}",), ODD_USER),
            ("without dashes", (b"X-User-Id: 00000000000040008000000000000000",), ODD_USER),
            ("of Latin-1", (b"X-User-Id: \xe9\xff",), ODD_USER),
            ("with a comma", (b"X-User-Id: <user>, <user>",), ODD_USER),
            ("of other digits", ("X-User-Id: \u0661\u0661".encode(),), ODD_USER),
            ("in spaces", (b"X-User-Id: \t <user> \t ",), good),
            ("without a space", (b"x-user-id:<user>",), good),
            ("in upper case", (b"X-USER-ID: <USER>",), good),
            ("twice, the last is good", (b"X-User-Id: seven", b"X-User-Id: <user>"), good),
            ("twice, the last is odd", (b"X-User-Id: <user>", b"X-User-Id: seven"), ODD_USER),
            ("twice, the last is empty", (b"X-User-Id: <user>", b"X-User-Id:"), UNAUTHENTICATED),
            ("with an odd name", (b"X-User-Id: <user>", b"X-User-Name: a"), INVALID),
            ("with a name of bytes", (b"X-User-Id: <user>", b"X-User-Name: \xff\xfe\xfd <word>"), good),
            ("with a name in UTF-8", (b"X-User-Id: <user>", "X-User-Name: J\u00fcrgen <word>".encode()), good),
            ("with an underscore", (b"X_User_Id: <user>",), UNAUTHENTICATED),
        ):
            yield Case(f"{name}: user id {odd}", plus(bare, *line), expected)


def request_ids() -> Iterator[Case]:
    for name, method, path, expected in (*HOT, ("health", "GET", "/api/v1/health", OK)):
        for odd, lines in (
            ("none", ()),
            ("given", (b"X-Request-Id: abc 123",)),
            ("empty", (b"X-Request-Id:",)),
            ("of 128", (b"X-Request-Id: " + b"x" * 128,)),
            ("of 129", (b"X-Request-Id: " + b"x" * 129,)),
            ("of Latin-1", (b"X-Request-Id: caf\xe9",)),
            ("with a tab", (b"X-Request-Id: a\tb",)),
            ("with quotes", (b'X-Request-Id: "<a>&\\',)),
            ("in spaces", (b"X-Request-Id: \t abc \t",)),
            ("twice", (b"X-Request-Id: first", b"X-Request-Id: last")),
            ("twice, the last is empty", (b"X-Request-Id: first", b"X-Request-Id:")),
        ):
            yield Case(f"{name}: request id {odd}", plus(as_user(method, path), *lines), expected)


def origins() -> Iterator[Case]:
    page = PAGE.encode()
    for name, method, path, expected in (*HOT, ("drops", "GET", "/api/v1/drops?limit=1", OK)):
        for odd, lines in (
            ("allowed", (b"Origin: " + page,)),
            ("of a stranger", (b"Origin: https://evil.example",)),
            ("null", (b"Origin: null",)),
            ("empty", (b"Origin:",)),
            ("odd", (b"Origin: \xe9\xff",)),
            ("of upper case", (b"Origin: " + page.upper(),)),
            ("with a slash", (b"Origin: " + page + b"/",)),
            ("twice, the last is a stranger", (b"Origin: " + page, b"Origin: https://evil.example")),
            ("twice, the first is a stranger", (b"Origin: https://evil.example", b"Origin: " + page)),
        ):
            yield Case(f"{name}: origin {odd}", plus(as_user(method, path), *lines), expected)
    for name, path in (("reserve", RESERVE), ("cancel", CANCEL), ("drops", "/api/v1/drops"), ("nothing", "/api/no")):
        preflight = request("OPTIONS", path, access_control_request_method="POST")
        yield Case(f"{name}: preflight of our page", plus(preflight, b"Origin: " + page), NO_CONTENT)
        yield Case(f"{name}: preflight of a stranger", plus(preflight, b"Origin: https://evil.example"), NO_CONTENT)
        yield Case(f"{name}: OPTIONS", request("OPTIONS", path), NO_CONTENT)
    yield Case("refusal to our page", plus(request("POST", RESERVE), b"Origin: " + page), UNAUTHENTICATED)


def keys() -> Iterator[Case]:
    elsewhere = RESERVE.replace("<drop>", "<empty>")
    for name, method, path, expected in HOT:
        bare = as_user(method, path)
        odd_is = expected if name == "cancel" else INVALID
        key = plus(bare, b"Idempotency-Key: key of <user>")
        yield Case(f"{name}: key", key, expected)
        yield Case(f"{name}: key of 255", plus(bare, b"Idempotency-Key: " + b"k" * 255), expected)
        yield Case(f"{name}: key of 256", plus(bare, b"Idempotency-Key: " + b"k" * 256), odd_is)
        yield Case(f"{name}: key empty", plus(bare, b"Idempotency-Key:"), odd_is)
        yield Case(f"{name}: key of Latin-1", plus(bare, b"Idempotency-Key: \xe9"), odd_is)
        yield Case(f"{name}: key twice", plus(bare, b"Idempotency-Key: \xe9", b"Idempotency-Key: k"), expected)
        again = (409, "RESERVATION_NOT_ACTIVE") if name == "cancel" else expected
        yield Case(f"{name}: key replayed", plus(key, b"X-Request-Id: again"), again, before=(key,))
    for name, path in (("reserve", elsewhere), ("purchase", "/api/v1/drops/<drop>/purchase")):
        key = plus(as_user("POST", path), b"Idempotency-Key: key of <user>")
        refusal = (409, "OUT_OF_STOCK") if name == "reserve" else (409, "RESERVATION_REQUIRED")
        yield Case(f"{name}: key of a refusal replayed", key, refusal, before=(key,))
        other = plus(as_user("POST", f"/api/v1/drops/<scheduled>/{name}"), b"Idempotency-Key: key of <user>")
        yield Case(f"{name}: key reused", other, REUSED, before=(key,))
    drop = b'{"name": "Key", "price": 1, "total_stock": 1}'
    key = as_user("POST", "/api/v1/drops", drop, idempotency_key="key of <user>")
    yield Case("new drop: key replayed", key, CREATED, before=(key,))
    other = as_user("POST", "/api/v1/drops", drop.replace(b"1}", b"2}"), idempotency_key="key of <user>")
    yield Case("new drop: key reused", other, REUSED, before=(key,))


def bodies() -> Iterator[Case]:
    echo = b'{"email": "ann@shop.example"}'
    for name, method, path, good in (*HOT, ("echo", "POST", "/api/v1/demo/echo", OK)):
        full = echo if name == "echo" else b"{}"
        bare = as_user(method, path)

        def sized(body: bytes, *lines: bytes, bare: bytes = bare) -> bytes:
            return plus(bare, *lines, b"Content-Length: %d" % len(body)) + body

        def typed(body: bytes, bare: bytes = bare) -> bytes:
            return sized(body, b"Content-Type: application/json", bare=bare)

        empty = NOT_OURS if name == "echo" else good
        yield Case(f"{name}: empty body", sized(b""), empty)
        yield Case(f"{name}: empty body as text", sized(b"", b"Content-Type: text/plain"), empty)
        yield Case(f"{name}: full body", typed(full), good)
        yield Case(f"{name}: body with white space", typed(b" \r\n\t" + full + b" \n"), good)
        for odd, content_type, is_good in (
            ("none", None, False),
            ("empty", b"", False),
            ("text", b"text/plain", False),
            ("of a form", b"application/x-www-form-urlencoded", False),
            ("of an upload", b"multipart/form-data; boundary=x", False),
            ("in upper case", b"Application/JSON", True),
            ("with a charset", b"application/json; charset=utf-8", True),
            ("of a kind of JSON", b"application/merge-patch+json", True),
            ("of Latin-1", b"application/\xe9", False),
        ):
            line = () if content_type is None else (b"Content-Type: " + content_type,)
            yield Case(f"{name}: content type {odd}", sized(full, *line), good if is_good else NOT_OURS)
        twice = sized(full, b"Content-Type: text/plain", b"Content-Type: application/json")
        yield Case(f"{name}: content type twice, the last is JSON", twice, good)
        twice = sized(full, b"Content-Type: application/json", b"Content-Type: text/plain")
        yield Case(f"{name}: content type twice, the last is text", twice, NOT_OURS)
        yield Case(
            f"{name}: unknown field", typed(full[:-1] + (b", " if name == "echo" else b"") + b'"x": 1}'), INVALID
        )
        for odd, body in (
            ("broken", b"{"),
            ("of white space", b"  "),
            ("an array", b"[]"),
            ("null", b"null"),
            ("NaN", b'{"x": NaN}'),
            ("a key twice", b'{"x": 1, "x": 1}'),
            ("not UTF-8", b'{"x": "\xff"}'),
            ("a BOM", b"\xef\xbb\xbf{}"),
            ("nested deeply", b'{"x": ' + b"[" * 40 + b"]" * 40 + b"}"),
            ("two", b"{}{}"),
        ):
            yield Case(f"{name}: body {odd}", typed(body), NO_JSON)
        yield Case(f"{name}: body as large as may be", typed(full + b" " * (BODY_MAX - len(full))), good)
        yield Case(f"{name}: body one byte too large", typed(full + b" " * (BODY_MAX - len(full) + 1)), TOO_LARGE)
        yield Case(f"{name}: body much too large", typed(b"x" * 200_000), TOO_LARGE)
        yield Case(f"{name}: body too large, of nobody", sized(b"x" * 20_000, bare=request(method, path)), TOO_LARGE)
        large = plus(typed(b" " * 20_000), b"X-Request-Id: large", b"Origin: " + PAGE.encode())
        yield Case(f"{name}: body too large, of our page", large, TOO_LARGE)
        yield Case(f"{name}: chunked", chunked(bare, full), good)
        yield Case(f"{name}: chunked by the byte", chunked(bare, *(bytes([byte]) for byte in full)), good)
        yield Case(f"{name}: chunked and empty", chunked(bare), NO_JSON if name == "echo" else good)
        yield Case(f"{name}: chunked with extensions", chunked(bare, full, extension=b';a=b;c="d"'), good)
        trailer = b"X-User-Id: seven\r\nContent-Type: text/plain\r\nX-Request-Id: trailer\r\n"
        yield Case(f"{name}: chunked with trailers", chunked(bare, full, trailer=trailer), good)
        yield Case(f"{name}: chunked and too large", chunked(bare, *[b" " * 4_096] * 5), TOO_LARGE)
        yield Case(f"{name}: chunked, as large as may be", chunked(bare, full, b" " * (BODY_MAX - len(full))), good)


def targets() -> Iterator[Case]:
    for name, method, path, good in HOT:
        thing = "<reservation>" if name == "cancel" else path.split("/")[4]
        upper = thing.upper()
        for odd, target, expected in (
            ("with a query", path + "?x=1", good),
            ("with an empty query", path + "?", good),
            ("with a trailing slash", path + "/", good),
            ("with a fragment", path + "#here", MISSING),
            ("with two slashes", path.replace("/api", "//api"), MISSING),
            ("with two slashes inside", path.replace("/v1/", "/v1//"), MISSING),
            ("in upper case", path.upper().replace(upper, thing), MISSING),
            ("with an id in upper case", path.replace(thing, upper), good),
            ("with an id that is none", path.replace(thing, "7"), INVALID),
            ("with an id of dashes", path.replace(thing, "-"), INVALID),
            ("with an id and a dot", path.replace(thing, thing + "."), INVALID),
            ("with an underscore", path.replace(thing, thing + "_"), INVALID),
            ("without an id", path.replace(thing, ""), MISSING),
            ("with an id of one byte more", path.replace(thing, thing + "0"), INVALID),
            ("with a percent in the path", path.replace("/v1", "/%761"), good),
            ("with a percent in the id", path.replace(thing, "%2d".join(thing.split("-")) + "%20"), INVALID),
            ("with a slash in the id", path.replace(thing, thing + "%2f"), MISSING),
            ("with a percent that is none", path.replace(thing, thing + "%zz"), INVALID),
            ("with a percent of Latin-1", path.replace(thing, thing + "%ff"), INVALID),
            ("with a semicolon", path + ";x", MISSING),
            ("with dots", path.replace("/v1", "/v1/./"), MISSING),
            ("with a way up", "/api/../" + path[1:], MISSING),
            ("in absolute form", "http://127.0.0.1" + path, good),
            ("in absolute form, of another host", "http://elsewhere.example" + path, good),
            ("in absolute form, without a path", "http://127.0.0.1", FORBIDDEN_METHOD),
        ):
            yield Case(f"{name}: target {odd}", as_user(method, target), expected)
    yield Case("OPTIONS *", request("OPTIONS", "*"), NO_CONTENT)
    yield Case("target of 2,048 bytes", request("GET", "/api/v1/drops?limit=1&" + "x" * 2_026), OK)


def methods() -> Iterator[Case]:
    for name, right, path, _ in HOT:
        for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"):
            if method != right:
                yield Case(f"{name}: {method}", as_user(method, path), FORBIDDEN_METHOD)
    for method in ("PUT", "PATCH", "DELETE", "TRACE", "PROPFIND", "SEARCH", "PURGE", "BREW", "#!"):
        yield Case(f"drops: {method}", as_user(method, "/api/v1/drops"), FORBIDDEN_METHOD)
        yield Case(f"nothing: {method}", as_user(method, "/api/v1/nothing"), MISSING)
    for path, status in (("/api/v1/drops?limit=1", 200), ("/api/v1/me", 401), ("/api/nothing", 404), ("/healthz", 200)):
        yield Case(f"HEAD {path}", request("HEAD", path), (status, ""))


def connections() -> Iterator[Case]:
    for name, method, path, good in (*HOT, ("healthz", "GET", "/api/v1/healthz", OK)):
        bare = as_user(method, path)
        for odd, lines in (
            ("close", (b"Connection: close",)),
            ("Close", (b"connection: Close",)),
            ("keep-alive", (b"Connection: keep-alive",)),
            ("close in a list", (b"Connection: keep-alive, close",)),
            ("close in a second line", (b"Connection: keep-alive", b"Connection: close")),
            ("of another name", (b"Connection: X-User-Id",)),
        ):
            yield Case(f"{name}: connection {odd}", plus(bare, *lines), good)
        old = bare.replace(b"HTTP/1.1", b"HTTP/1.0")
        yield Case(f"{name}: HTTP/1.0", old, good)
        yield Case(f"{name}: HTTP/1.0 that wants to stay", plus(old, b"Connection: keep-alive"), good)
        yield Case(f"{name}: HTTP/1.0 without a host", old.replace(b"Host: 127.0.0.1\r\n", b""), good)
        refused = plus(request(method, path), b"Connection: close")
        yield Case(f"{name}: refused and closed", refused, OK if name == "healthz" else UNAUTHENTICATED)
    for odd, host in (("empty", b""), ("with a space", b"exa mple"), ("of dots", b"a..b"), ("of Latin-1", b"\xff")):
        case = request("POST", RESERVE, x_user_id="<user>").replace(b"127.0.0.1", host)
        yield Case(f"reserve: host {odd}", case, CREATED)
    many = plus(as_user("POST", RESERVE), *(b"X-%d: %d" % (number, number) for number in range(300)))
    yield Case("reserve: three hundred headers", many, CREATED)
    yield Case("reserve: a header without a value", plus(as_user("POST", RESERVE), b"X-Nothing:"), CREATED)
    yield Case(
        "reserve: an unknown upgrade", plus(as_user("POST", RESERVE), b"Connection: upgrade", b"Upgrade: foo"), CREATED
    )


def cold_routes() -> Iterator[Case]:
    good = b'{"name": "Cold", "price": 100, "total_stock": 1}'
    for base in ("/api/v1", "/api"):
        for path in ("/health", "/healthz", "/readyz", "/drops?limit=2", "/drops?limit=2&offset=1"):
            yield Case(f"GET {base}{path}", request("GET", base + path), OK)
        for path in ("/me", "/reservations/me", "/purchases/me"):
            yield Case(f"GET {base}{path}", as_user("GET", base + path), OK)
            yield Case(f"GET {base}{path} of nobody", request("GET", base + path), UNAUTHENTICATED)
    yield Case("GET /healthz", request("GET", "/healthz"), OK)
    yield Case("GET /readyz", request("GET", "/readyz"), OK)
    yield Case("GET /nothing", request("GET", "/nothing"), MISSING)
    yield Case("drops: limit that is none", request("GET", "/api/drops?limit=0&offset=x"), INVALID)
    yield Case("drop", request("GET", "/api/drops/<drop>"), OK)
    yield Case("drop with a purchase", request("GET", "/api/drops/<bought>"), OK)
    yield Case("drop that is none", request("GET", f"/api/drops/{NOBODYS}"), (404, "DROP_NOT_FOUND"))
    yield Case("drop with an odd id", request("GET", "/api/drops/7"), INVALID)
    yield Case("my reservations", plus(as_user("GET", "/api/reservations/me"), b"X-For: <held>"), OK)
    yield Case("my purchases", plus(as_user("GET", "/api/purchases/me"), b"X-For: <bought>"), OK)
    yield Case("my purchases, odd page", as_user("GET", "/api/purchases/me?limit=1000"), INVALID)
    yield Case("new drop", as_user("POST", "/api/drops", good), CREATED)
    yield Case("new drop of nobody", request("POST", "/api/drops", good), UNAUTHENTICATED)
    yield Case("new drop that is none", as_user("POST", "/api/drops", b'{"name": "x", "price": -1}'), INVALID)
    yield Case("new drop without a body", as_user("POST", "/api/drops"), NOT_OURS)
    yield Case("echo", request("POST", "/api/demo/echo", b'{"email": "a@b.example", "name": "Ann"}'), OK)
    yield Case("new user", request("POST", "/api/internal/users", b'{"username": "<word>"}'), CREATED)
    twice = request("POST", "/api/internal/users", b'{"username": "<word>"}')
    yield Case("new user twice", twice, (409, "USERNAME_TAKEN"), before=(twice,))
    for name, path in (("unknown", "/api/v1/unknown"), ("outside", "/unknown"), ("sub", "/api/v1/drops/<drop>/no")):
        for method in ("GET", "POST", "DELETE"):
            yield Case(f"{method} {name} address", as_user(method, path), MISSING)
        yield Case(f"POST {name} address with a body", as_user("POST", path, b'{"x": 1}'), MISSING)

    purchase = request("POST", "/api/v1/drops/<past drop>/purchase", x_user_id="<past user>")
    yield Case("purchase of what has expired", purchase, (409, "RESERVATION_EXPIRED"))
    cancel = request("DELETE", "/api/v1/reservations/<past reservation>/cancel", x_user_id="<past user>")
    yield Case("cancel what has expired", cancel, (409, "RESERVATION_EXPIRED"))
    yield Case("expire now", request("POST", "/api/internal/expire-now"), OK)


TABLE: Final = [
    *outcomes_of_hot_routes(),
    *identities(),
    *request_ids(),
    *origins(),
    *keys(),
    *bodies(),
    *targets(),
    *methods(),
    *connections(),
    *cold_routes(),
]


STRICTER: Final = "the hot lane refuses what a proxy in front may read differently; h11 takes it"
NO_BODY: Final = "h11 refuses it before there is a request, and Hypercorn has no words for that"
SOFT: Final = "h11 looks at its limit only when a head is incomplete, and this one comes in a single read"
BARE: Final = as_user("POST", RESERVE)
EMPTY: Final = (400, "")

DIFFERENCES: Final = [
    Difference(name, sent, plain, behind_tls, because)
    for name, sent, plain, behind_tls, because in (
        ("no host", BARE.replace(b"Host: 127.0.0.1\r\n", b""), BAD, EMPTY, NO_BODY),
        ("two hosts", plus(BARE, b"Host: other"), BAD, EMPTY, NO_BODY),
        ("two lengths", plus(BARE, b"Content-Length: 2", b"Content-Length: 3") + b"{}", BAD, EMPTY, NO_BODY),
        ("length that is none", plus(BARE, b"Content-Length: +2") + b"{}", BAD, EMPTY, NO_BODY),
        ("white space before a colon", plus(BARE, b"X-A : 1"), BAD, EMPTY, NO_BODY),
        ("a line without a colon", plus(BARE, b"X-A"), BAD, EMPTY, NO_BODY),
        ("NUL in a value", plus(BARE, b"X-A: \0"), BAD, EMPTY, NO_BODY),
        ("NUL in the target", BARE.replace(b"/v1", b"/v1\0"), BAD, EMPTY, NO_BODY),
        ("Latin-1 in the target", BARE.replace(b"/v1", b"/v1\xff"), BAD, EMPTY, NO_BODY),
        ("coding that is not chunked", plus(BARE, b"Transfer-Encoding: gzip"), BAD, (501, ""), NO_BODY),
        (
            "length that is given twice alike",
            plus(BARE, b"Content-Length: 0", b"Content-Length: 0"),
            BAD,
            CREATED,
            STRICTER,
        ),
        ("fold", plus(BARE, b"X-A: 1", b" 2"), BAD, CREATED, STRICTER),
        ("bare LF", BARE.replace(b"\r\n", b"\n"), BAD, CREATED, STRICTER),
        ("length and chunks", chunked(plus(BARE, b"Content-Length: 2"), b"{}"), BAD, CREATED, STRICTER),
        ("control character in a value", plus(BARE, b"X-A: \x01"), BAD, CREATED, STRICTER),
        ("HTTP/1.0 with chunks", chunked(BARE.replace(b"HTTP/1.1", b"HTTP/1.0"), b"{}"), BAD, CREATED, STRICTER),
        ("method in lower case", as_user("post", RESERVE), BAD, CREATED, STRICTER),
        ("HTTP/1.2", BARE.replace(b"HTTP/1.1", b"HTTP/1.2"), BAD, CREATED, STRICTER),
        (
            "target of 2,049 bytes",
            request("GET", "/api/v1/drops?limit=1&" + "x" * 2_027),
            (414, "URI_TOO_LONG"),
            OK,
            STRICTER,
        ),
        ("CONNECT", request("CONNECT", "127.0.0.1:80"), FORBIDDEN_METHOD, MISSING, STRICTER),
        ("head of more than 16 KiB", plus(BARE, b"X-A: " + b"a" * 16_384), (431, "HEADERS_TOO_LARGE"), CREATED, SOFT),
    )
]


# Two stages with the same play ------------------------------------------------------------------------


class Stage:
    """One lane's server, and what the requests that are sent to it are about: the same on both stages."""

    def __init__(self, server: Server, http: httpx.Client) -> None:
        self.server = server
        self.shop = shop = Shop(server, "/api/v1", http)
        self._wire: Wire | None = None
        drops = {
            "drop": shop.drop(100_000, name="Drop"),
            "empty": shop.drop(0, name="Empty"),
            "draft": shop.drop(5, name="Draft", status="draft"),
            "scheduled": shop.drop(5, name="Scheduled", status="scheduled", starts_at=ahead(100_000)),
        }
        self._names = {f"<{name}>".encode(): drop["id"] for name, drop in drops.items()}
        self._names[b"<theirs>"] = shop.visitor().holds(drops["drop"])
        self._names |= PAST
        self._drop = drops["drop"]

    def play(self, case: Case, user_id: str) -> bytes:
        """Send what comes before, then the request; the answer's bytes."""
        names = self._named(b"".join((*case.before, case.request)), user_id)
        for before in case.before:
            self._ask(_filled(before, names))
        return self._ask(_filled(case.request, names))

    def first_answer(self, asked: bytes, user_id: str) -> WireAnswer:
        """What is answered on a connection of its own, whatever becomes of it."""
        with Wire(self.server) as wire:
            wire.send(_filled(asked, self._named(asked, user_id)))
            return parsed(*wire.raw_answer())

    def _ask(self, sent: bytes) -> bytes:
        """The answer, which says the truth about the connection, and leaves it as it should."""
        wire, self._wire = self._wire, None
        if wire is None:
            wire = Wire(self.server)
        wire.send(sent)
        head, body = wire.raw_answer(to="HEAD" if sent.startswith(b"HEAD") else "any")
        if parsed(head, body).headers.get("connection") == "close":
            assert wire.is_closed()
            wire.close()
        else:
            wire.send(request("POST", "/api/drops/7/reserve"))
            assert wire.answer().outcome == UNAUTHENTICATED, "the answer spoiled its connection"
            self._wire = wire
        return head + body

    def _named(self, asked: bytes, user_id: str) -> dict[bytes, str]:
        """What the <names> in a request stand for."""
        names = self._names | {b"<user>": user_id, b"<word>": user_id[:6]}
        user, drop = self.shop.visitor(user_id), self._drop
        for held, reservation, then in (
            (b"<held>", b"<reservation>", None),
            (b"<returned>", b"<cancelled>", user.cancel),
            (b"<bought>", b"<consumed>", lambda _: user.purchase(drop)),
        ):
            if held in asked.lower() or reservation in asked.lower():
                names[held], names[reservation] = drop["id"], user.holds(drop)
                if then is not None:
                    assert then(names[reservation]).status in (200, 201)
        return names | {name.upper(): value.upper() for name, value in names.items()}


def _filled(asked: bytes, names: dict[bytes, str]) -> bytes:
    filled = asked
    for name, value in names.items():
        filled = filled.replace(name, value.encode())
    return filled


# What can't be equal: when it was, and the names that the servers gave. All but the uptime are of one length.
BLANKS: Final = (
    (rb"\r\ndate: [^\r]{29}", b"\r\ndate: <date>"),
    (rb"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-7[0-9a-fA-F]{3}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}", b"<id>"),
    (rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", b"<instant>"),
)
BLANKED_IN_BODY: Final = rb'"(requestId|created_by)":"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f-]{21}"'
UPTIME: Final = rb'"uptime":[0-9.]+'


def blanked(answer: bytes, sent: bytes) -> bytes:
    for pattern, blank in BLANKS:
        answer = re.sub(pattern, blank, answer)
    found = re.search(rb"x-request-id: ([0-9a-f-]{36})\r\n", answer)
    if found is not None and found[1] not in sent:
        answer = answer.replace(found[1], b"<request id>")
    if b'"uptime"' in answer:
        answer = re.sub(UPTIME, b'"uptime":<s>', answer)
        answer = re.sub(rb"content-length: \d+", b"content-length: <n>", answer)
    return re.sub(BLANKED_IN_BODY, rb'"\1":"<\1>"', answer)


@contextmanager
def _past_in(dsn: str) -> Iterator[None]:
    named = {name.decode()[6:-1]: value for name, value in PAST.items()}
    with psycopg.connect(dsn) as connection:
        for statement in WRITE_PAST:
            connection.execute(statement, named)
    yield


@pytest.fixture(scope="module")
def stages(
    server: EmbeddedServer, template: str, logs: Path, certificate: Path, http: httpx.Client
) -> Iterator[tuple[Stage, Stage]]:
    """The hot lane's and Hypercorn's."""
    common = {"CORS_ORIGINS": PAGE, "RESERVATION_TTL_SECONDS": HOLD_S}
    with (
        _new_database(server, template) as one,
        _new_database(server, template) as other,
        _past_in(one),
        _past_in(other),
        serving(one, logs / "plain.log", **common) as plain,
        serving(other, logs / "tls.log", TLS_CERTFILE=str(certificate), **common) as secure,
        httpx.Client(timeout=PATIENCE_S, verify=secure.tls or True) as https,
    ):
        yield Stage(plain, http), Stage(secure, https)


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_both_lanes_answer_with_the_same_bytes(stages: tuple[Stage, Stage], case: Case) -> None:
    user_id = str(uuid.uuid4())
    plain, behind_tls = (blanked(stage.play(case, user_id), case.request) for stage in stages)
    assert plain == behind_tls
    head, _, body = plain.partition(b"\r\n\r\n")
    answer = parsed(head, body)
    assert (answer.status, answer.code if body else "") == (case.expected if body else (case.expected[0], ""))


@pytest.mark.parametrize("difference", DIFFERENCES, ids=lambda difference: difference.name)
def test_lanes_differ_only_where_it_is_said_why(stages: tuple[Stage, Stage], difference: Difference) -> None:
    user_id = str(uuid.uuid4())
    answers = [stage.first_answer(difference.request, user_id) for stage in stages]
    assert [(answer.status, answer.code if answer.body else "") for answer in answers] == [
        difference.plain,
        difference.behind_tls,
    ]


def test_names_of_the_table_are_unique() -> None:
    names = [case.name for case in TABLE]
    assert sorted(set(names)) == sorted(names)
