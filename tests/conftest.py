"""One PostgreSQL a session, one database a test.

The server is the embedded one, in a temporary directory and without fsync: tests may lose their data in a
power cut. A test that asks for `database` gets a copy of a migrated template, in about 10 ms.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest
from psycopg import sql

from persistence.embedded import EmbeddedServer, forget_pg_variables, running
from tests.ports import free_port
from tests.proof import canaries

canaries.arm()  # before any test is imported; nothing, unless the environment names one

_TEMPLATE = "migrated"
_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """The session's server; with a TCP port too, for tests that put a proxy before it."""
    forget_pg_variables()
    data_dir = tmp_path_factory.mktemp("server")
    with running(data_dir, settings={"fsync": "off"}, port=free_port()) as server:
        yield server


@pytest.fixture
def database(server: EmbeddedServer, template: str) -> Iterator[str]:
    """DSN of a database of this test's own, migrated to head; it is gone after the test."""
    with _new_database(server, template) as dsn:
        yield dsn


@pytest.fixture
def empty_database(server: EmbeddedServer) -> Iterator[str]:
    """DSN of a database of this test's own without any table; it is gone after the test."""
    with _new_database(server, "template1") as dsn:
        yield dsn


@pytest.fixture(scope="session")
def template(server: EmbeddedServer) -> str:
    """Name of the migrated database that the others are copied from; nobody stays connected to it."""
    # Here, since only tests with a migrated database need Alembic.
    from persistence.migrate import upgrade

    _administer(server, sql.SQL("CREATE DATABASE {}").format(sql.Identifier(_TEMPLATE)))
    upgrade(server.dsn_of(_TEMPLATE))
    return _TEMPLATE


@contextmanager
def _new_database(server: EmbeddedServer, template: str) -> Iterator[str]:
    name = f"test_{next(_numbers)}"
    # file_copy: the default strategy writes every page of the template to the WAL, and takes longer.
    create = sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy")
    _administer(server, create.format(sql.Identifier(name), sql.Identifier(template)))
    try:
        yield server.dsn_of(name)
    finally:
        _administer(server, sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def _administer(server: EmbeddedServer, statement: sql.Composed) -> None:
    # A connection each time: tests of faults terminate every session of the server.
    with psycopg.connect(server.dsn_of("postgres"), autocommit=True) as connection:
        connection.execute(statement)
