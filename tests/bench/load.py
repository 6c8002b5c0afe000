"""A closed-loop HTTP load: keep-alive connections, one request at a time on each, in a process of its own.

Plain sockets and one selector, so that the generator takes as little as it can of the cores that it shares with the
server. Every answer's status is counted; nothing else of it is looked at.

    python -m tests.bench.load HOST PORT CONNECTIONS SECONDS REQUESTS-FILE

The file holds one request a line, JSON: {"method": …, "path": …, "headers": {…}}; each is sent once, in order, and the
run ends early when none is left. Prints one line of JSON: answers by status, seconds, latencies' percentiles in ms.
"""

import json
import selectors
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

WARM_UP_S = 0.5  # at the start, not counted


class Connection:
    def __init__(self, host: str, port: int) -> None:
        self.socket = socket.create_connection((host, port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.received = b""
        self.sent_at = 0.0

    def ask(self, request: bytes) -> None:
        self.sent_at = time.perf_counter()
        self.socket.sendall(request)

    def answer(self) -> int | None:
        """The status of the answer, once it is complete."""
        data = self.socket.recv(65536)
        if not data:
            raise ConnectionError("the server closed a connection")
        self.received += data
        head, found, body = self.received.partition(b"\r\n\r\n")
        if not found:
            return None
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0])
        if len(body) < length:
            return None
        self.received = b""
        return int(head[9:12])


def encode(method: str, path: str, headers: dict[str, str]) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: bench", *(f"{name}: {value}" for name, value in headers.items())]
    if method != "GET":
        lines.append("Content-Length: 0")
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def run(host: str, port: int, connections: int, seconds: float, requests: Iterator[bytes]) -> dict[str, object]:
    selector = selectors.DefaultSelector()
    for _ in range(connections):
        connection = Connection(host, port)
        selector.register(connection.socket, selectors.EVENT_READ, connection)
        connection.ask(next(requests))
    began = time.perf_counter() + WARM_UP_S
    until = began + seconds
    statuses: Counter[int] = Counter()
    latencies: list[float] = []
    now = ended = time.perf_counter()
    while now < until:
        for key, _ in selector.select(0.1):
            connection = key.data
            status = connection.answer()
            if status is None:
                continue
            now = time.perf_counter()
            if now >= began:
                statuses[status] += 1
                latencies.append(now - connection.sent_at)
                ended = now
            request = next(requests, None)
            if request is None:
                until = now  # ran out: what was answered so far counts
                break
            connection.ask(request)
        now = time.perf_counter()
    return {"statuses": dict(statuses), "seconds": ended - began, "ms": _percentiles(latencies)}


def _percentiles(latencies: list[float]) -> dict[str, float]:
    ordered = sorted(latencies)
    if not ordered:
        return {}
    return {f"p{p}": round(ordered[int(len(ordered) * p / 100)] * 1000, 2) for p in (50, 90, 99)}


def main() -> None:
    host, port, connections, seconds, requests_file = sys.argv[1:]
    lines = Path(requests_file).read_text().splitlines()
    requests = [encode(asked["method"], asked["path"], asked["headers"]) for asked in map(json.loads, lines)]
    print(json.dumps(run(host, int(port), int(connections), float(seconds), iter(requests))))


if __name__ == "__main__":
    main()
