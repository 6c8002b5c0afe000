"""The migrations make the tables that the code describes, go both ways, and keep out of each other's way."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from psycopg.conninfo import conninfo_to_dict, make_conninfo

import migrations
from persistence import migrate, schema, tables
from persistence.schema import SchemaOutdated

# What compare_metadata does not look at: checks, conditions of indexes, storage parameters. As text, from the server.
CATALOG = """
SELECT 'constraint', conrelid::regclass::text, conname::text, pg_get_constraintdef(oid) FROM pg_constraint
WHERE connamespace = 'public'::regnamespace
UNION ALL
SELECT 'index', tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'
UNION ALL
SELECT 'column', table_name, column_name,
       concat_ws(' ', ordinal_position, data_type, is_nullable, column_default,
                 col_description(format('%I', table_name)::regclass, ordinal_position))
FROM information_schema.columns WHERE table_schema = 'public'
UNION ALL
SELECT 'options', relname, '', reloptions::text FROM pg_class
WHERE relnamespace = 'public'::regnamespace AND reloptions IS NOT NULL
UNION ALL
SELECT 'trigger', tgrelid::regclass::text, tgname, pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal
UNION ALL
SELECT 'function', '', proname, '' FROM pg_proc WHERE pronamespace = 'public'::regnamespace
"""


def catalog(dsn: str) -> set[tuple[str, ...]]:
    """Everything in the database but Alembic's own table."""
    with psycopg.connect(dsn) as connection:
        rows = connection.execute(CATALOG.encode()).fetchall()
    return {row for row in rows if row[1] != "alembic_version"}


def engine(dsn: str) -> sa.Engine:
    return sa.create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(dsn), poolclass=sa.NullPool)


def test_the_migrations_make_what_the_tables_describe(database: str) -> None:
    with engine(database).connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, tables.metadata) == []


def test_checks_indexes_comments_and_options_are_the_same_too(database: str, empty_database: str) -> None:
    tables.metadata.create_all(engine(empty_database))
    described = catalog(empty_database)
    assert catalog(database) == described
    assert not {kind for kind, *_ in described} & {"trigger", "function"}


def test_down_leaves_nothing_and_up_again_makes_the_same(empty_database: str) -> None:
    migrate.upgrade(empty_database)
    first = catalog(empty_database)
    assert first
    migrate.downgrade(empty_database, "base")
    with psycopg.connect(empty_database) as connection:
        left = connection.execute("SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace").fetchall()
    assert left == []
    assert schema.current(empty_database) is None
    migrate.upgrade(empty_database)
    assert catalog(empty_database) == first


def test_each_revision_goes_down_and_up_by_itself(empty_database: str) -> None:
    scripts = ScriptDirectory.from_config(migrate._config())
    revisions = [script.revision for script in scripts.walk_revisions()][::-1]
    assert revisions[-1] == schema.REVISION
    assert revisions == sorted(revisions), "schema.require tells older from newer by their order"
    for before, revision in zip(["base", *revisions], revisions, strict=False):
        migrate.upgrade(empty_database, revision)
        there = catalog(empty_database)
        migrate.downgrade(empty_database, before)
        migrate.upgrade(empty_database, revision)
        assert schema.current(empty_database) == revision
        assert catalog(empty_database) == there


def test_an_upgrade_of_what_is_up_to_date_changes_nothing(database: str) -> None:
    before = catalog(database)
    migrate.upgrade(database)
    assert schema.current(database) == schema.REVISION
    assert catalog(database) == before


def test_upgrades_at_the_same_time_come_one_after_the_other(empty_database: str) -> None:
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(migrate.upgrade, [empty_database] * 4))
    assert schema.current(empty_database) == schema.REVISION


def test_a_failed_upgrade_leaves_nothing_behind(empty_database: str) -> None:
    with psycopg.connect(empty_database) as connection:
        # In the way of the last table that the migration makes.
        connection.execute("CREATE TABLE idempotency_keys (n int)")
    with pytest.raises(sa.exc.ProgrammingError, match="already exists"):
        migrate.upgrade(empty_database)
    assert {table for _, table, *_ in catalog(empty_database)} == {"idempotency_keys"}
    assert schema.current(empty_database) is None


def test_conninfo_in_words_works_as_well_as_a_uri(empty_database: str) -> None:
    words = make_conninfo("", **conninfo_to_dict(empty_database))
    assert "://" not in words
    migrate.upgrade(words)
    assert schema.current(empty_database) == schema.REVISION


def test_a_schema_that_is_not_ours_is_named_with_what_to_do() -> None:
    schema.require(schema.REVISION)
    with pytest.raises(SchemaOutdated, match=r"has schema \(none\), this version needs .*: run `holdfast migrate`"):
        schema.require(None)
    with pytest.raises(SchemaOutdated, match="newer than this version"):
        schema.require("9999")


def test_a_path_with_a_percent_sign_is_no_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrations, "__file__", "/somewhere/100%/migrations/__init__.py")
    location = migrate._config().get_main_option("script_location")
    assert location is not None
    assert Path(location) == Path("/somewhere/100%/migrations")
