"""A real Holdfast server in a process of its own, for tests that talk to it over real sockets."""

import os
import signal
import ssl
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.ports import free_port
from tests.proof import canaries

START_S = 30.0  # generous: a loaded machine, not a benchmark
STOP_S = 20.0


class Server:
    """One `holdfast serve`. `url` is its root; the log it wrote so far is `log()`."""

    def __init__(self, dsn: str, log_path: Path, port: int | None = None, **settings: str) -> None:
        self.port = port or free_port()
        self._certfile = settings.get("TLS_CERTFILE")
        self.url = f"{'http' if self._certfile is None else 'https'}://127.0.0.1:{self.port}"
        self.dsn = dsn
        self._log_path = log_path
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, until: str = "/readyz") -> "Server":
        """Start it and wait until `until` answers 200; with an empty `until`, do not wait."""
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self.command(),
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        if until:
            self.wait_for(until)
        return self

    def command(self) -> list[str]:
        """What is run."""
        return canaries.command("serve")

    def wait_for(self, path: str, status: int = 200, timeout_s: float = START_S) -> float:
        """Wait until `path` answers `status`; how long that took (s)."""
        began = time.monotonic()
        while time.monotonic() < began + timeout_s:
            assert self.process.poll() is None, f"the server ended:\n{self.log()}"
            try:
                if httpx.get(self.url + path, timeout=5, verify=self.tls or True).status_code == status:
                    return time.monotonic() - began
            except httpx.TransportError:
                pass
            time.sleep(0.01)
        raise AssertionError(f"{path} did not answer {status} within {timeout_s} s:\n{self.log()}")

    @property
    def is_started(self) -> bool:
        return self._process is not None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "not started"
        return self._process

    @property
    def tls(self) -> ssl.SSLContext | None:
        """What trusts its certificate, each time a new one: clients change theirs. None where it speaks no TLS."""
        return None if self._certfile is None else ssl.create_default_context(cafile=self._certfile)

    def log(self) -> str:
        return self._log_path.read_text(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL: as a power cut would."""
        self.process.kill()
        self.process.wait(STOP_S)

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        if self._process is None:
            return 0
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def _environment(self) -> Mapping[str, str]:
        ours = {
            "DATABASE_URL": self.dsn,
            "PORT": str(self.port),
            "HOST": "127.0.0.1",
            "ALLOW_UNSAFE_DURABILITY": "true",  # the tests' PostgreSQL runs without fsync
            "LOG_FORMAT": "json",
            **self._settings,
        }
        kept = {
            name: os.environ[name]
            for name in ("PATH", "HOME", "LANG", "TMPDIR", *canaries.HELD_BY)
            if name in os.environ
        }
        return {**kept, **ours}


@contextmanager
def serving(dsn: str, log_path: Path, **settings: str) -> Iterator[Server]:
    """A server that is ready, and stopped at the end of the block."""
    server = Server(dsn, log_path, None, **settings)
    try:
        yield server.start()
    finally:
        server.stop()
