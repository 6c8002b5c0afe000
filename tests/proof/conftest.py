"""A PostgreSQL of this package's own, since its tests stop it, kill it and fill it up; and engines on it.

It stamps commits (`track_commit_timestamp`), so that lateness can be measured from the outside.
"""

import itertools
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import psycopg
import pytest
import trio
from psycopg import sql

from persistence.embedded import EmbeddedPostgres, EmbeddedServer, forget_pg_variables
from persistence.migrate import upgrade
from tests.ports import free_port
from tests.proof.proxy import Proxy
from tests.server import Server

_TEMPLATE: Final = "migrated"
_SETTINGS: Final = {"fsync": "off", "track_commit_timestamp": "on"}
_numbers = itertools.count(1)


class Postgres:
    """A server over one directory that may be stopped and started again; its port stays the same."""

    def __init__(self, data_dir: Path, **settings: str) -> None:
        self.port = free_port()
        self._embedded = EmbeddedPostgres(data_dir, settings={**_SETTINGS, **settings}, port=self.port)
        self._server: EmbeddedServer | None = None

    @property
    def server(self) -> EmbeddedServer:
        assert self._server is not None, "not started"
        return self._server

    def start(self) -> None:
        self._server = self._embedded.start()

    def stop(self) -> None:
        self._embedded.stop()

    def stop_immediately(self) -> None:
        """As `pg_ctl stop -m immediate`: nobody is told, nothing is finished."""
        os.kill(self.server.pid, signal.SIGQUIT)
        wait_for(lambda: not self._embedded.is_running)
        self._embedded.stop()

    def kill(self) -> None:
        """SIGKILL the postmaster; its children notice by themselves."""
        os.kill(self.server.pid, signal.SIGKILL)
        wait_for(lambda: not self._embedded.is_running)
        self._embedded.stop()

    @property
    def is_running(self) -> bool:
        return self._embedded.is_running

    def administer(self, statement: sql.Composed) -> None:
        with psycopg.connect(self.server.dsn_of("postgres"), autocommit=True) as connection:
            connection.execute(statement)

    def make_template(self) -> None:
        self.administer(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(_TEMPLATE)))
        upgrade(self.server.dsn_of(_TEMPLATE))

    @contextmanager
    def new_database(self, tablespace: str = "pg_default") -> Iterator[str]:
        """Name of a migrated database that is gone after the block."""
        name = f"proof_{next(_numbers)}"
        create = sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy TABLESPACE {}")
        self.administer(create.format(*map(sql.Identifier, (name, _TEMPLATE, tablespace))))
        try:
            yield name
        finally:
            self.administer(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))

    def backends(self, dsn: str, application_name: str = "holdfast writer") -> list[int]:
        """Pids of the sessions on the DSN's database that carry this name."""
        query = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name = %s"
        with psycopg.connect(dsn, autocommit=True) as connection:
            return [pid for (pid,) in connection.execute(query, (application_name,)).fetchall()]

    def writer(self, dsn: str) -> int:
        """The pid of the backend that the engine's writer talks to, and no other."""
        (pid,) = self.backends(dsn)
        return pid

    def terminate(self, dsn: str, pid: int) -> None:
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("SELECT pg_terminate_backend(%s)", (pid,))


def wait_for(claim: Callable[[], bool], timeout_s: float = 20.0, poll_s: float = 0.01) -> float:
    """Block until `claim` holds; how long that took (s)."""
    began = time.monotonic()
    while not claim():
        assert time.monotonic() < began + timeout_s, "it did not come true in time"
        time.sleep(poll_s)
    return time.monotonic() - began


async def until(claim: Callable[[], bool], timeout_s: float = 20.0) -> float:
    """`wait_for`, while the test's other tasks go on."""
    began = trio.current_time()
    with trio.fail_after(timeout_s):
        while not await trio.to_thread.run_sync(claim):
            await trio.sleep(0.01)
    return trio.current_time() - began


@pytest.fixture(scope="package")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    forget_pg_variables()
    postgres = Postgres(tmp_path_factory.mktemp("proof"))
    postgres.start()
    try:
        postgres.make_template()
        yield postgres
    finally:
        postgres.stop()


@pytest.fixture
def database(postgres: Postgres) -> Iterator[str]:
    """DSN of a migrated database of this test's own; over the unix socket."""
    with postgres.new_database() as name:
        yield postgres.server.dsn_of(name)


@pytest.fixture
def proxy(postgres: Postgres) -> Iterator[Proxy]:
    with Proxy(postgres.port) as proxy:
        yield proxy


StartEngine = Callable[..., Server]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[StartEngine]:
    """Starts a `holdfast serve`: `engine(dsn, RESERVATION_TTL_SECONDS="1")`. All are ended with the test."""
    numbers = itertools.count(1)
    with ExitStack() as stack:

        def start(dsn: str, *, until: str = "/readyz", **settings: str) -> Server:
            settings.setdefault("LOG_LEVEL", "WARNING")
            port = int(settings.get("PORT", "0"))
            server = Server(dsn, tmp_path / f"engine_{next(numbers)}.log", port, **settings)
            stack.callback(_end, server)
            return server.start(until=until)

        yield start


def _end(server: Server) -> None:
    """Whatever a test has done to it."""
    process = server.process
    if process.poll() is None:
        process.send_signal(signal.SIGCONT)
        server.kill()


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Printed: HOLDFAST_SEED=<seed> replays its choices."""
    found = int(os.environ.get("HOLDFAST_SEED") or random.SystemRandom().getrandbits(32))
    print(f"HOLDFAST_SEED={found} pytest {request.node.nodeid}")
    return found


@pytest.fixture
def rng(seed: int) -> random.Random:
    """Chance, of that seed."""
    return random.Random(seed)


def bugs_in(server: Server) -> list[str]:
    """Lines of its log that say something that must not happen, whatever is done to the database."""
    signs = ("internal_error", "drop_stopped", "drop_broken", "Traceback", '"critical"', "part_rejected")
    return [line for line in server.log().splitlines() if any(sign in line for sign in signs)]
