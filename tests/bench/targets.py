"""What is measured: Holdfast and the two baselines, all on one PostgreSQL of our own; or any server, by its URL.

Each runs in processes of its own and is left alone while another one is measured: it stays up, and idle.
"""

import os
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import psycopg

from tests.bench.job import Server, Users
from tests.ports import free_port
from tests.server import START_S, STOP_S, serving

HERE: Final = Path(__file__).parent
BASELINE_PYTHON: Final = HERE.parents[1] / ".venv-baseline" / "bin" / "python"

# So that the holds of one round do not run out, all at once, in the middle of another server's round.
LONG_HOLD_S: Final = 86_400


class Unusable(Exception):
    """The server cannot be measured; the text says why, as a sentence."""


@dataclass
class Target:
    """A server with the contract's routes. `watched` are the pids whose CPU counts: "server" and "postgres"."""

    name: str
    server: Server
    watched: dict[str, int] = field(default_factory=dict)
    dsn: str | None = None
    maker: str = ""  # the user who makes drops
    trigger: int | None = None  # of a rival that knows viewers alone: the port at which it is asked for an update
    client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=30))

    @property
    def root(self) -> str:
        scheme = "https" if self.server.is_tls else "http"
        return f"{scheme}://{self.server.host}:{self.server.port}{self.server.base}"

    def new_drop(self, total_stock: int, **more: object) -> str:
        """Id of a new drop, live unless said otherwise."""
        wanted = {"name": "Bench", "price": 12_900, "total_stock": total_stock, "status": "live", **more}
        return str(self.ask("POST", "/drops", self.maker, wanted)["id"])

    def available(self, drop_id: str) -> int:
        return int(self.ask("GET", f"/drops/{drop_id}", "")["available_stock"])

    def ask(self, method: str, path: str, user: str, json: object = None) -> dict[str, Any]:
        """The data of a success.

        Raises:
            Unusable: any other answer, or none.
        """
        headers = {"X-User-Id": user} if user else {}
        try:
            answer = self.client.request(method, self.root + path, json=json, headers=headers)
            if not answer.is_success:
                raise Unusable(f"{method} {path} was answered {answer.status_code}: {answer.text[:200]}")
            data: dict[str, Any] = answer.json()["data"]
        except (httpx.TransportError, ValueError, KeyError) as fault:
            raise Unusable(f"{method} {path} got no usable answer from {self.root}: {fault!r}.") from fault
        return data


def at_url(url: str) -> Target:
    """Any server: nothing of it is known but its answers."""
    parts = urlsplit(url if "//" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise Unusable(f"{url} is no URL of a server, such as https://shop.example or http://127.0.0.1:4000.")
    is_tls = parts.scheme == "https"
    base = parts.path.rstrip("/")
    if not base.endswith(("/api", "/api/v1")):
        base += "/api/v1"
    return Target("server", Server(parts.hostname, parts.port or (443 if is_tls else 80), base, is_tls))


@contextmanager
def holdfast(dsn: str, postgres_pid: int, log: Path, maker: str, hold_s: int = LONG_HOLD_S) -> Iterator[Target]:
    """`holdfast serve` as it comes, on a database that is durable."""
    settings = {"LOG_LEVEL": "WARNING", "RESERVATION_TTL_SECONDS": str(hold_s), "ALLOW_UNSAFE_DURABILITY": "false"}
    with serving(dsn, log, **settings) as server:
        watched = {"server": server.process.pid, "postgres": postgres_pid}
        yield Target("holdfast", Server("127.0.0.1", server.port), watched, dsn, maker)


@contextmanager
def baseline(mode: str, dsn: str, postgres_pid: int, log: Path, pool: int) -> Iterator[Target]:
    """`baseline.py` on uvicorn, one worker as Holdfast has one process."""
    if not BASELINE_PYTHON.exists():
        raise Unusable("The baseline is not installed: `make bench` does that; or leave it out with --no-baseline.")
    port = free_port()
    command = [BASELINE_PYTHON, "-m", "uvicorn", "baseline:app", "--app-dir", HERE, "--host", "127.0.0.1"]
    command += ["--port", port, "--loop", "uvloop", "--http", "httptools", "--workers", 1]
    command += ["--no-access-log", "--log-level", "warning", "--timeout-keep-alive", 600]
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    ours = {"BASELINE_MODE": mode, "BASELINE_DSN": dsn, "BASELINE_POOL": str(pool)}
    with log.open("ab") as written:
        process = subprocess.Popen(
            list(map(str, command)), env=kept | ours, stdin=subprocess.DEVNULL, stdout=written, stderr=written
        )
    with stopped(process):
        _wait_for(f"http://127.0.0.1:{port}/healthz", process, log)
        watched = {"server": process.pid, "postgres": postgres_pid}
        yield Target(mode, Server("127.0.0.1", port), watched, dsn, str(uuid.uuid4()))


@contextmanager
def stopped(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Whatever the block does, the process ends with it."""
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(port: int, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until something listens there.

    Raises:
        Unusable: the process ended before, or took too long.
    """
    give_up_at = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < give_up_at:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.02)
    raise Unusable(f"{name} did not start: {log.read_text(errors='replace')[-2000:]}")


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    began = time.monotonic()
    while process.poll() is None and time.monotonic() < began + START_S:
        try:
            if httpx.get(url, timeout=5).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.02)
    raise Unusable(f"The baseline did not start: {log.read_text(errors='replace')[-2000:]}")


def introduce(dsn: str, users: Users, first: int, count: int) -> None:
    """Put users into Holdfast's table, as if they had signed up before the launch."""
    copying = "COPY users (id, username, created_at) FROM STDIN"
    with psycopg.connect(dsn) as connection, connection.cursor() as cursor, cursor.copy(copying) as copy:
        for user in users.ids(first, count):
            copy.write_row((user, f"bench_{user[:13]}{user[24:]}", "2026-01-01T00:00:00Z"))
