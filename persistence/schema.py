"""Which schema this code was written for, and what a database has; without Alembic, which takes long to import.

A server that finds its schema in place starts without it; `persistence.migrate` brings schemas up to date.
"""

from typing import Final

import psycopg

REVISION: Final = "0002"
"""The newest revision in `migrations/versions`, which are numbered in their order."""


class SchemaOutdated(Exception):
    """The database's schema is not the one that this code was written for. The message says what to do."""


def current(dsn: str) -> str | None:
    """The revision that the database has; None where it has no schema yet."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        has_any = connection.execute("SELECT to_regclass('alembic_version') IS NOT NULL").fetchone()
        if has_any is None or not has_any[0]:
            return None
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        return None if row is None else str(row[0])


def require(found: str | None) -> None:
    """Check the revision that a database has against the one this code needs.

    Raises:
        SchemaOutdated: they differ.
    """
    if found == REVISION:
        return
    if found is None or found < REVISION:
        raise SchemaOutdated(
            f"the database has schema {found or '(none)'}, this version needs {REVISION}: run `holdfast migrate`"
        )
    raise SchemaOutdated(
        f"the database has schema {found}, which is newer than this version's {REVISION}: run a newer holdfast"
    )
