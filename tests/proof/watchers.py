"""Hundreds of viewers in one process of its own: it reads, notes when, and decodes only when all is over.

    python -m tests.proof.watchers        a Job in JSON on the first line of stdin; then `return`, then `finish`
                                          `ready` on stdout when all are connected; at the end the Report, in msgpack

A raw socket each, and one `select`: a library and a task for each would take the processors that the server needs.
"""

import os
import selectors
import socket
import sys
import threading
import time
from typing import Final, Literal

import msgspec
import psycopg
from psycopg import sql

Kind = Literal["steady", "slow", "hopping", "away"]

HOP_S: Final = 1.2  # how long a hopping viewer stays connected
SLOW_S: Final = 0.25  # between two reads of a slow one
SLOW_BYTES: Final = 2_048
QUIET_S: Final = 1.0  # without a frame: all was told
READ_BYTES: Final = 65_536


class Wish(msgspec.Struct, frozen=True):
    """What one viewer does."""

    kind: Kind
    drops: list[str] | Literal["*"]
    user_id: str | None = None


class Job(msgspec.Struct, frozen=True):
    port: int
    dsn: str
    wishes: list[Wish]


class Frame(msgspec.Struct, frozen=True, array_like=True):
    heard_at: float  # wall time, s
    text: int  # its place in `texts`


class Visit(msgspec.Struct, array_like=True):
    """One connection of a viewer, and all that came on it."""

    resume: dict[str, int]
    frames: list[Frame]
    end: str = ""


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """Texts that came, and the drops' `seq` in the tables, looked up when they were there."""

    texts: list[int]
    seqs: dict[str, int]


class Report(msgspec.Struct):
    texts: list[bytes]
    visits: list[list[Visit]]  # of each wish
    samples: list[Sample]
    read_bytes: int


class Position(msgspec.Struct):
    """As much of a message as it takes to know where one is."""

    seq: int = 0
    drop: dict[str, object] | None = None
    data: dict[str, object] | None = None

    @property
    def drop_id(self) -> str:
        shape = self.drop or self.data or {}
        inner = shape.get("drop")
        return str(shape.get("id") or shape.get("dropId") or (inner["id"] if isinstance(inner, dict) else ""))


_position = msgspec.json.Decoder(Position)


class Texts:
    """Each text once: nearly all viewers hear the same."""

    def __init__(self) -> None:
        self.known: dict[bytes, int] = {}

    def number(self, text: bytes) -> int:
        return self.known.setdefault(text, len(self.known))


def split(data: bytes) -> tuple[list[bytes], int, str]:
    """The payloads of whole text frames, how many bytes they took, and why it was closed, if it was."""
    texts: list[bytes] = []
    at, end = 0, ""
    while len(data) >= at + 2:
        opcode, size, head = data[at] & 0x0F, data[at + 1], 2
        if size == 126:
            size, head = int.from_bytes(data[at + 2 : at + 4], "big"), 4
        elif size == 127:
            size, head = int.from_bytes(data[at + 2 : at + 10], "big"), 10
        if len(data) < at + head + size:
            break
        payload = data[at + head : at + head + size]
        at += head + size
        if opcode == 1:
            texts.append(payload)
        elif opcode == 8:
            end = f"{int.from_bytes(payload[:2], 'big')} {payload[2:].decode()}"
    return texts, at, end


def masked(text: bytes) -> bytes:
    """A client's text frame; the mask is all zeros."""
    size = len(text)
    head = bytes((0x81, 0x80 | size)) if size < 126 else bytes((0x81, 0xFE)) + size.to_bytes(2, "big")
    return head + bytes(4) + text


def connected(port: int, wish: Wish, resume: dict[str, int]) -> socket.socket:
    """On the live feed, with its wishes said."""
    sock = socket.socket()
    if wish.kind == "slow":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW_BYTES)
    sock.settimeout(20)
    sock.connect(("127.0.0.1", port))
    sock.sendall(
        b"GET /api/v1/live HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += sock.recv(1)
    assert head.startswith(b"HTTP/1.1 101"), head
    asks: list[dict[str, object]] = [{"type": "subscribe", "drops": wish.drops, "resume": resume}]
    if wish.user_id is not None:
        asks.insert(0, {"type": "identify", "userId": wish.user_id})
    for ask in asks:
        sock.sendall(masked(msgspec.json.encode(ask)))
    sock.setblocking(False)
    return sock


class Viewer:
    def __init__(self, wish: Wish) -> None:
        self.wish = wish
        self.sock: socket.socket | None = None
        self.visits: list[tuple[dict[str, int], list[tuple[float, bytes]]]] = []
        self.next_at = 0.0  # when a slow one reads, or a hopping one hops

    def positions(self) -> dict[str, int]:
        """Where it is, by all that it has read."""
        found: dict[str, int] = {}
        for resume, chunks in self.visits:
            found |= resume
            for text in split(b"".join(data for _, data in chunks))[0]:
                message = _position.decode(text)
                found[message.drop_id] = message.seq
        return found

    def visit(self, port: int) -> socket.socket:
        resume = self.positions()
        self.sock = connected(port, self.wish, resume)
        self.visits.append((resume, []))
        return self.sock

    def report(self, texts: Texts) -> list[Visit]:
        visits = []
        for resume, chunks in self.visits:
            visit, data = Visit(resume, []), b""
            for heard_at, chunk in chunks:
                found, used, end = split(data := data + chunk)
                data = data[used:]
                visit.frames += [Frame(heard_at, texts.number(text)) for text in found]
                visit.end = end or visit.end
            visits.append(visit)
        return visits


class Crowd:
    def __init__(self, job: Job) -> None:
        self.job = job
        self.viewers = [Viewer(wish) for wish in job.wishes]
        self.selector = selectors.DefaultSelector()
        self.is_over = False
        self.is_back = False
        self.heard_at = time.time()
        self.read_bytes = 0

    def run(self) -> Report:
        for viewer in self.viewers:
            self.enter(viewer)
        sampler = Sampler(self.job)
        sampler.start()
        print("ready", flush=True)
        os.set_blocking(0, False)
        self.selector.register(0, selectors.EVENT_READ)
        while not (self.is_over and time.time() > self.heard_at + QUIET_S):
            for key, _ in self.selector.select(0.02):
                if key.fd == 0:
                    self.obey(os.read(0, 100))
                elif key.data.sock is key.fileobj:  # else it was told to leave a moment ago
                    self.read(key.data)
            self.look_after_the_odd_ones()
        sampler.is_over = True
        sampler.join()
        texts = Texts()
        visits = [viewer.report(texts) for viewer in self.viewers]
        samples = sampler.report(texts)
        return Report(list(texts.known), visits, samples, self.read_bytes)

    def obey(self, words: bytes) -> None:
        if b"return" in words:
            for viewer in self.viewers:
                if viewer.wish.kind == "away":
                    self.enter(viewer)
        if b"leave" in words:
            for viewer in self.viewers:
                if viewer.wish.kind == "away":
                    self.leave(viewer)
        if b"finish" in words:
            self.is_over = True
            self.heard_at = time.time()
            for viewer in self.viewers:
                if viewer.wish.kind == "slow" and viewer.sock is not None:
                    self.selector.register(viewer.sock, selectors.EVENT_READ, viewer)

    def enter(self, viewer: Viewer) -> None:
        sock = viewer.visit(self.job.port)
        if viewer.wish.kind != "slow" or self.is_over:
            self.selector.register(sock, selectors.EVENT_READ, viewer)
        viewer.next_at = time.time() + HOP_S

    def leave(self, viewer: Viewer) -> None:
        if viewer.sock is not None:
            self.selector.unregister(viewer.sock)
            viewer.sock.close()
            viewer.sock = None

    def look_after_the_odd_ones(self) -> None:
        now = time.time()
        for viewer in self.viewers:
            if viewer.wish.kind in ("slow", "hopping") and now >= viewer.next_at and not self.is_over:
                if viewer.wish.kind == "slow":
                    viewer.next_at = now + SLOW_S
                    self.read(viewer, SLOW_BYTES)
                else:
                    self.leave(viewer)
                    self.enter(viewer)

    def read(self, viewer: Viewer, most: int = READ_BYTES) -> None:
        assert viewer.sock is not None
        try:
            data = viewer.sock.recv(most)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            if viewer.wish.kind != "slow" or self.is_over:
                self.leave(viewer)
            return
        self.heard_at = time.time()
        self.read_bytes += len(data)
        viewer.visits[-1][1].append((self.heard_at, data))


class Sampler(threading.Thread):
    """One viewer more, that asks the tables the moment it has heard something."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self._job = job
        self.is_over = False
        self._chunks: list[tuple[bytes, dict[str, int]]] = []

    def run(self) -> None:
        sock = connected(self._job.port, Wish("steady", "*"), {})
        sock.settimeout(0.1)
        look = sql.SQL("SELECT id::text, seq FROM drops")
        with psycopg.connect(self._job.dsn, autocommit=True) as connection:
            while not self.is_over:
                try:
                    data = sock.recv(READ_BYTES)
                except TimeoutError:
                    continue
                if not data:
                    break
                self._chunks.append((data, dict(connection.execute(look).fetchall())))
        sock.close()

    def report(self, texts: Texts) -> list[Sample]:
        samples, data = [], b""
        for chunk, seqs in self._chunks:
            found, used, _ = split(data := data + chunk)
            data = data[used:]
            samples.append(Sample([texts.number(text) for text in found], seqs))
        return samples


if __name__ == "__main__":
    report = Crowd(msgspec.json.decode(sys.stdin.buffer.readline(), type=Job)).run()
    sys.stdout.buffer.write(msgspec.msgpack.encode(report))
