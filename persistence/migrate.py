"""Runs the migrations, up and down. Synchronous: it runs before the engine starts.

Any number of processes may upgrade one database at once: an advisory lock lets them in one after the other,
and whoever comes second finds nothing left to do. A run is one transaction: it happens as a whole or not at
all.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

import migrations

# "holdmigr" in ASCII; any number does that nobody else in the database uses.
_LOCK = int.from_bytes(b"holdmigr")
_LOCK_TIMEOUT = "2s"


def upgrade(dsn: str, revision: str = "head") -> None:
    """Bring the schema up to `revision`. Waits for another upgrade that is under way.

    Raises:
        psycopg.errors.LockNotAvailable, in a `DBAPIError`: others read or write the tables.
    """
    _run(dsn, lambda config: command.upgrade(config, revision))


def downgrade(dsn: str, revision: str) -> None:
    """Take the schema back to `revision`; "base" leaves nothing behind. Data goes with its tables."""

    def down(config: Config) -> None:
        command.downgrade(config, revision)
        if revision == "base":
            config.attributes["connection"].execute(sa.text("DROP TABLE IF EXISTS alembic_version"))

    _run(dsn, down)


def _run(dsn: str, work: Callable[[Config], None]) -> None:
    with _connection(dsn) as connection:
        # A session lock, so it is held past the transaction and released with the connection.
        connection.execute(sa.text("SELECT pg_advisory_lock(:key)"), {"key": _LOCK})
        # Who waits for a table stops all who come behind it, an engine's writes too, for as long as somebody's dump
        # reads.
        connection.execute(sa.text(f"SET lock_timeout = '{_LOCK_TIMEOUT}'"))
        connection.commit()
        config = _config()
        config.attributes["connection"] = connection
        work(config)
        connection.commit()


def _config() -> Config:
    config = Config()
    location = str(Path(migrations.__file__).parent)
    config.set_main_option("script_location", location.replace("%", "%%"))
    return config


@contextmanager
def _connection(dsn: str) -> Iterator[sa.Connection]:
    # creator: libpq reads the DSN itself, so every form it knows works, a socket directory as host too.
    engine = sa.create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(dsn), poolclass=sa.NullPool)
    with engine.connect() as connection:
        yield connection
