"""What a server's process has, looked at twice a second from outside; and viewers who come and go meanwhile.

Resident memory, descriptors, threads and CPU are the kernel's word; the figures of `tests.proof.soak.server` the
server's own. The viewers of one drop each hear what happens for a while, and hang up without a word, in turns by
WebSocket and as a stream of server-sent events: what they leave behind would show.
"""

import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import msgspec

from tests.bench import usage
from tests.bench.frames import handshake, said
from tests.bench.job import Server
from tests.proof.soak.server import Statistics

LOOK_S: Final = 0.5
VISITORS: Final = 10  # there at the same time; one comes and one goes with each look
PATIENCE_S: Final = 5.0
RECEIVE_BYTES: Final = 65_536


class Sample(msgspec.Struct, frozen=True):
    at: float  # of the machine's monotonic clock
    rss_bytes: int
    descriptors: int
    threads: int
    cpu_s: float
    statistics: Statistics | None  # None: it did not answer


class Sampler:
    """Looks until its block ends; `samples` has what it saw, oldest first."""

    def __init__(self, pid: int, statistics_at: Path, server: Server, drop: str) -> None:
        self.samples: list[Sample] = []
        self.visitors = Visitors(server, drop)
        self.missed = 0  # looks without the server's own figures
        self._pid = pid
        self._statistics_at = statistics_at
        self._is_over = threading.Event()

    @contextmanager
    def looking(self) -> Iterator["Sampler"]:
        threads = [threading.Thread(target=self._often, args=(act,)) for act in (self._note, self.visitors.turn)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._is_over.set()
            for thread in threads:
                thread.join()
            self.visitors.close()

    def since(self, at: float, until: float = float("inf")) -> list[Sample]:
        return [sample for sample in list(self.samples) if at <= sample.at <= until]

    def look(self) -> Sample:
        pid = self._pid
        seen = None
        with suppress(OSError, msgspec.DecodeError):
            seen = self._ask()
        self.missed += seen is None
        return Sample(
            time.monotonic(),
            usage.rss_bytes(pid) or 0,
            usage.descriptors(pid),
            threads_of(pid),
            usage.cpu_s(pid),
            seen,
        )

    def _ask(self) -> Statistics | None:
        with socket.socket(socket.AF_UNIX) as asking:
            asking.settimeout(PATIENCE_S)
            asking.connect(str(self._statistics_at))
            said = b""
            while part := asking.recv(RECEIVE_BYTES):
                said += part
        return msgspec.json.decode(said, type=Statistics | None)

    def _note(self) -> None:
        self.samples.append(self.look())

    def _often(self, act: Callable[[], None]) -> None:
        due = time.monotonic()
        while not self._is_over.wait(max(0.0, due - time.monotonic())):
            act()
            due = max(due + LOOK_S, time.monotonic())


class Visitors:
    """Viewers, some of whom are always there; the oldest goes when the next comes."""

    def __init__(self, server: Server, drop: str) -> None:
        self.came = 0
        self.turned_out = 0  # who were not let in
        self._server = server
        self._drop = drop
        self._there: deque[socket.socket] = deque()

    def turn(self) -> None:
        for one in self._there:
            with suppress(OSError):
                one.recv(RECEIVE_BYTES)
        if len(self._there) >= VISITORS:
            self._there.popleft().close()
        try:
            self._there.append(self._come())
        except OSError:
            self.turned_out += 1

    def close(self) -> None:
        for one in self._there:
            one.close()
        self._there.clear()

    def _come(self) -> socket.socket:
        server, self.came = self._server, self.came + 1
        is_stream = self.came % 2 == 0
        coming = socket.create_connection((server.host, server.port), timeout=PATIENCE_S)
        try:
            if is_stream:
                target = f"{server.base}/live/events?drops={self._drop}"
                coming.sendall(f"GET {target} HTTP/1.1\r\nHost: {server.host}:{server.port}\r\n\r\n".encode())
            else:
                coming.sendall(handshake(server, f"{server.base}/live"))
            status = coming.recv(RECEIVE_BYTES)[:12]
            if status != (b"HTTP/1.1 200" if is_stream else b"HTTP/1.1 101"):
                raise ConnectionError(f"a visitor was not let in: {status!r}")
            if not is_stream:
                subscribing = msgspec.json.encode({"type": "subscribe", "drops": [self._drop]})
                coming.sendall(said(subscribing))
        except OSError:
            coming.close()
            raise
        coming.setblocking(False)
        return coming


def threads_of(pid: int) -> int:
    """Threads of one process; 0 where that is not known."""
    with suppress(OSError):
        return sum(1 for _ in Path(f"/proc/{pid}/task").iterdir())
    return 0
