"""Clients of a real server: `Shop` and `Visitor` over httpx, `Wire` where the bytes on the socket matter.

Every answer that goes through `Reply` has its envelope checked, whatever the test is about.
"""

import itertools
import re
import socket
import struct
import uuid
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from json import dumps, loads
from typing import Any, Literal

import httpx

from tests.server import Server

PATIENCE_S = 15.0  # no answer may take longer, and a hanging one fails its test instead of the whole run

INSTANT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
UUID7 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

_numbers = itertools.count(1)


def new_id() -> str:
    return str(uuid.uuid4())


def unique(word: str) -> str:
    """A name that no other test uses."""
    return f"{word}-{next(_numbers)}"


def ahead(seconds: float) -> str:
    """The instant so many seconds from now, as a client writes it."""
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def seconds_of(instant: str) -> float:
    assert INSTANT.fullmatch(instant), instant
    return datetime.fromisoformat(instant).timestamp()


class Reply:
    """An answer in the contract's envelope; anything else fails here. `version`: `meta.seq` and `meta.epoch`, or ()."""

    def __init__(self, response: httpx.Response) -> None:
        self.status = response.status_code
        self.headers = response.headers
        self.raw = response.content
        assert response.headers["content-type"] == "application/json"
        body = response.json()
        self.is_replay = response.headers.get("idempotency-replayed") == "true"
        request_id, *version = body["meta"].items()
        assert request_id == ("requestId", response.headers["x-request-id"]) or self.is_replay
        assert [name for name, _ in version] in ([], ["seq", "epoch"])
        self.version = tuple(value for _, value in version)
        assert all(type(number) is int and number >= 1 for number in self.version)
        if response.is_success:
            assert set(body) == {"success", "data", "meta"}
            assert body["success"] is True
        else:
            assert set(body) == {"success", "error", "meta"}
            assert body["success"] is False
            assert set(body["error"]) in ({"code", "message"}, {"code", "message", "details"})
            assert body["error"]["message"]
            assert (self.status == 422) == (body["error"]["code"] in ("VALIDATION_ERROR", "IDEMPOTENCY_KEY_REUSED"))
            assert ("retry-after" in self.headers) == (self.status in (429, 503))
        self.body = body

    @property
    def data(self) -> Any:
        assert self.body["success"], self.body
        return self.body["data"]

    @property
    def error(self) -> tuple[int, str]:
        """Status and code of an error."""
        return self.status, self.body["error"]["code"]

    @property
    def wrong(self) -> list[str]:
        """The paths that a 422 complains about, in its order."""
        assert self.error == (422, "VALIDATION_ERROR"), self.body
        details = self.body["error"]["details"]
        assert all(set(detail) == {"path", "message"} and detail["message"] for detail in details)
        return [detail["path"] for detail in details]


class Visitor:
    """Somebody who talks to the shop: with `headers` in each request, so with an identity or without one."""

    def __init__(self, http: httpx.Client, root: str, headers: Mapping[str, str]) -> None:
        self._http = http
        self._root = root
        self.headers = dict(headers)

    @property
    def id(self) -> str:
        return self.headers["X-User-Id"]

    def ask(
        self,
        method: str,
        path: str,
        json: object = None,
        *,
        content: bytes | None = None,
        headers: Mapping[str, str | bytes] | None = None,
        key: str | None = None,
    ) -> Reply:
        """`json` is sent as a body of ASCII; `content` as it is, without a Content-Type of ours."""
        more: dict[str, str | bytes] = dict(self.headers)
        if key is not None:
            more["Idempotency-Key"] = key
        if json is not None:
            content = dumps(json).encode()
            more["Content-Type"] = "application/json"
        more |= headers or {}
        return Reply(self._http.request(method, self._root + path, content=content, headers=more))  # type: ignore[arg-type]

    def get(self, path: str) -> Reply:
        return self.ask("GET", path)

    def post(self, path: str, json: object = None, *, key: str | None = None) -> Reply:
        return self.ask("POST", path, json, key=key)

    def delete(self, path: str) -> Reply:
        return self.ask("DELETE", path)

    # The steps of the story that most tests tell.

    def reserve(self, drop: Mapping[str, Any], *, key: str | None = None) -> Reply:
        return self.post(f"/drops/{drop['id']}/reserve", key=key)

    def purchase(self, drop: Mapping[str, Any], *, key: str | None = None) -> Reply:
        return self.post(f"/drops/{drop['id']}/purchase", key=key)

    def cancel(self, reservation_id: str) -> Reply:
        return self.delete(f"/reservations/{reservation_id}/cancel")

    def holds(self, drop: Mapping[str, Any]) -> str:
        """Reserve, and the reservation's id."""
        reply = self.reserve(drop)
        assert reply.status == 201, reply.body
        reservation_id: str = reply.data["reservation"]["id"]
        return reservation_id


class Shop:
    """One server under one base path."""

    def __init__(self, server: Server, base: str, http: httpx.Client) -> None:
        self.server = server
        self.base = base
        self.http = http
        self.root = server.url + base
        self.anybody = Visitor(http, self.root, {})

    def visitor(self, user_id: str | None = None, **headers: str) -> Visitor:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return Visitor(self.http, self.root, {"X-User-Id": user_id or new_id(), **named})

    def drop(self, total_stock: int = 1, **more: object) -> dict[str, Any]:
        """A new drop, live unless said otherwise."""
        wanted = {"name": unique("Drop"), "price": 12_900, "total_stock": total_stock, "status": "live", **more}
        reply = self.visitor().post("/drops", wanted)
        assert reply.status == 201, reply.body
        made: dict[str, Any] = reply.data
        return made

    def stock(self, drop: Mapping[str, Any]) -> int:
        stock: int = self.show(drop)["available_stock"]
        return stock

    def show(self, drop: Mapping[str, Any]) -> dict[str, Any]:
        shown: dict[str, Any] = self.anybody.get(f"/drops/{drop['id']}").data
        return shown


class WireAnswer:
    """An answer as it came over the socket."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    @property
    def code(self) -> str:
        """An error's code, or what makes a success one."""
        parsed = loads(self.body)
        return "SUCCESS" if parsed["success"] else str(parsed["error"]["code"])

    @property
    def outcome(self) -> tuple[int, str]:
        return self.status, self.code


def parsed(head: bytes, body: bytes) -> WireAnswer:
    status_line, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
    version, status, *_ = status_line.split(" ")
    assert version == "HTTP/1.1", head
    return WireAnswer(int(status), headers, body)


class Wire:
    """One connection, written to and read from byte by byte."""

    def __init__(self, server: Server, patience_s: float = PATIENCE_S, *, receive_buffer: int | None = None) -> None:
        plain = socket.socket()
        plain.settimeout(patience_s)
        if receive_buffer is not None:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        plain.connect(("127.0.0.1", server.port))
        tls = server.tls
        self.socket = plain if tls is None else tls.wrap_socket(plain, server_hostname="127.0.0.1")
        self._read = bytearray()

    def __enter__(self) -> "Wire":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    def reset(self) -> None:
        """Go as somebody does whose process was killed: with a reset."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def send_eof(self) -> None:
        self.socket.shutdown(socket.SHUT_WR)

    def wait_readable(self) -> None:
        """Wait for the next byte, and leave it there."""
        self.socket.recv(1, socket.MSG_PEEK)

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def send_what_it_takes(self, data: bytes) -> None:
        """Send as much as the server reads; it may answer and close before the end, or stop reading."""
        with suppress(BrokenPipeError, ConnectionResetError, TimeoutError):
            self.socket.sendall(data)

    def answer(self, *, to: Literal["HEAD", "any"] = "any") -> WireAnswer:
        return parsed(*self.raw_answer(to=to))

    def raw_answer(self, *, to: Literal["HEAD", "any"] = "any") -> tuple[bytes, bytes]:
        """The bytes of head and body."""
        head = self._until(b"\r\n\r\n")
        answer = parsed(head, b"")
        has_body = to != "HEAD" and answer.status >= 200 and answer.status != 204
        return head, self._exactly(int(answer.headers["content-length"])) if has_body else b""

    def is_closed(self) -> bool:
        """Wait for the server's next byte, which must be its end."""
        assert not self._read, f"bytes that belong to no answer: {bytes(self._read)!r}"
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True

    def _until(self, end: bytes) -> bytes:
        while end not in self._read:
            self._receive()
        at = self._read.index(end) + len(end)
        taken = bytes(self._read[:at])
        del self._read[:at]
        return taken[: -len(end)]

    def _exactly(self, count: int) -> bytes:
        while len(self._read) < count:
            self._receive()
        taken = bytes(self._read[:count])
        del self._read[:count]
        return taken

    def _receive(self) -> None:
        data = self.socket.recv(65_536)
        assert data, f"the server closed the connection after {bytes(self._read)!r}"
        self._read += data


def request(method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
    """The bytes of a request; its Content-Length is the body's unless `content_length` says otherwise."""
    lines = {"Host": "127.0.0.1"}
    if body:
        lines |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
    lines |= {name.replace("_", "-").title(): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body
