"""The `holdfast` command, as an operator runs it: the installed script, in a process and an environment of its own."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import psycopg
import pytest
import trio

from engine.model import DropStatus, ReservationStatus
from persistence.migrate import downgrade
from persistence.schema import current
from persistence.seed import seed
from persistence.startup import _ENGINE_LOCK
from tests.ports import free_port

HOLDFAST = Path(sys.executable).with_name("holdfast")
TABLES = ("users", "drops", "reservations", "purchases", "drop_events", "idempotency_keys")
SECRET = "0123456789abcdef0123456789abcdef"
NOWHERE = "postgresql://app:hunter2@127.0.0.1:1/shop"  # port 1: nobody listens


class Shell:
    """Runs the command in an empty directory, with nothing in its environment but what it is given."""

    def __init__(self, cwd: Path) -> None:
        self.cwd = cwd
        self.environ: dict[str, str] = {"PATH": os.environ["PATH"], "TMPDIR": os.environ.get("TMPDIR", "/tmp")}

    def run(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [HOLDFAST, *arguments],
            cwd=self.cwd,
            env={**self.environ, **environ},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def done(self, *arguments: str, **environ: str) -> str:
        """What a command that succeeds prints; it has nothing to complain about."""
        done = self.run(*arguments, **environ)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    def refused(self, *arguments: str, **environ: str) -> str:
        """The one sentence with which a command fails."""
        failed = self.run(*arguments, **environ)
        assert failed.returncode == (2 if arguments[0] == "audit" else 1)
        assert failed.stdout == ""
        assert "hunter2" not in failed.stderr
        assert re.fullmatch(r"holdfast: [^\n]+\.\n", failed.stderr), failed.stderr
        return failed.stderr


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


@pytest.fixture
def on_database(shell: Shell, database: str) -> Shell:
    """A shell whose DATABASE_URL is a migrated database of its own."""
    shell.environ["DATABASE_URL"] = database
    return shell


@pytest.fixture
def seeded(database: str) -> str:
    """DSN of a database with the sample in it."""
    trio.run(partial(seed, database, reset=True, now=datetime.now(UTC)))
    return database


@pytest.fixture
def running_engine(database: str) -> Iterator[None]:
    """Somebody who holds the engine's lock on the database."""
    with psycopg.connect(database, autocommit=True) as conn:
        conn.execute("SELECT pg_advisory_lock(%s)", (_ENGINE_LOCK,))
        yield


def counts(dsn: str) -> dict[str, int]:
    return {table: int(one(dsn, f"SELECT count(*) FROM {table}")) for table in TABLES}


def one(dsn: str, query: str) -> str:
    with psycopg.connect(dsn) as conn:
        row = conn.execute(query.encode()).fetchone()
    assert row is not None
    return str(row[0])


# The command line itself ------------------------------------------------------------------------------


def test_version(shell: Shell) -> None:
    assert re.fullmatch(r"holdfast \d+\.\d+\.\d+\n", shell.done("--version"))


@pytest.mark.parametrize("arguments", [(), ("sell",), ("seed", "--reset", "--append"), ("migrate", "--down")])
def test_a_command_line_that_makes_no_sense_is_a_usage_error(shell: Shell, arguments: tuple[str, ...]) -> None:
    failed = shell.run(*arguments)
    assert failed.returncode == 2
    assert failed.stderr.startswith("usage: holdfast")


def test_everything_that_is_wrong_with_the_settings_is_said_at_once(shell: Shell) -> None:
    failed = shell.run("serve", "--port", "http", RESERVATION_TTL_SECONDS="0")
    assert failed.returncode == 1
    assert [line.split(" is ")[0] for line in failed.stderr.splitlines()] == [
        "holdfast: PORT",
        "holdfast: RESERVATION_TTL_SECONDS",
    ]


@pytest.mark.parametrize("command", ["migrate", "seed", "audit"])
def test_a_database_out_of_reach_is_one_sentence(shell: Shell, command: str) -> None:
    assert "Connection refused" in shell.refused(command, DATABASE_URL=NOWHERE)


def test_a_data_directory_that_cannot_be_is_one_sentence(shell: Shell) -> None:
    (shell.cwd / "file").write_text("")
    assert "file/data" in shell.refused("migrate", HOLDFAST_DATA_DIR="file/data")


# migrate ----------------------------------------------------------------------------------------------


def test_migrate_goes_up_and_down_and_says_so(shell: Shell, empty_database: str) -> None:
    shell.environ["DATABASE_URL"] = empty_database
    assert shell.done("migrate") == "schema (none) -> 0002\n"
    assert shell.done("migrate") == "schema 0002: nothing to do\n"
    assert shell.done("migrate", "--down", "base") == "schema 0002 -> (none)\n"
    assert one(empty_database, "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == "0"
    assert shell.done("migrate") == "schema (none) -> 0002\n"


def test_migrate_knows_only_its_own_revisions(on_database: Shell) -> None:
    assert "nonsense" in on_database.refused("migrate", "--down", "nonsense")


@pytest.mark.usefixtures("running_engine")
def test_tables_do_not_go_away_under_an_engine(on_database: Shell, database: str) -> None:
    assert "another engine serves from this database" in on_database.refused("migrate", "--down", "base")
    assert counts(database)["drops"] == 0  # the table is there


def test_migrate_does_not_stand_in_the_way_of_others_behind_a_lock(on_database: Shell, database: str) -> None:
    on_database.done("migrate", "--down", "0001")
    with psycopg.connect(database) as reading:
        reading.execute("SELECT count(*) FROM reservations")  # as a dump does, to its end
        assert "Somebody else uses a table" in on_database.refused("migrate")
    assert "0001" in on_database.done("migrate")


# seed -------------------------------------------------------------------------------------------------


def test_seed_fills_every_table_with_all_kinds_of_rows(on_database: Shell, database: str) -> None:
    said = dict(line.split() for line in on_database.done("seed").splitlines())
    filled = counts(database)
    assert {table: int(count) for table, count in said.items()} == filled
    assert min(filled.values()) >= 15
    statuses = json.loads(one(database, "SELECT json_agg(DISTINCT status)::text FROM drops"))
    assert set(statuses) == {DropStatus.DRAFT, DropStatus.SCHEDULED, DropStatus.LIVE, DropStatus.ENDED}
    assert int(one(database, "SELECT count(*) FROM drops WHERE status = 'live' AND available_stock = 0")) >= 1
    assert int(one(database, "SELECT count(DISTINCT currency) FROM drops")) >= 3
    ended = json.loads(one(database, "SELECT json_agg(DISTINCT status)::text FROM reservations"))
    assert set(ended) == set(ReservationStatus)
    assert one(database, "SELECT min(expires_at) > now() + interval '55 minutes' FROM reservations"
                         " WHERE status = 'active'") == "True"  # fmt: skip


def test_seed_leaves_no_trace_of_the_future(seeded: str) -> None:
    assert one(seeded, "SELECT max(at) <= now() FROM drop_events") == "True"
    assert one(seeded, "SELECT max(created_at) <= now() FROM reservations") == "True"


async def test_the_same_instant_gives_the_same_rows(database: str) -> None:
    now = datetime(2026, 1, 7, 10, tzinfo=UTC)
    digest = "SELECT md5(string_agg(e::text, '' ORDER BY drop_id, seq)) FROM drop_events e"
    await seed(database, reset=True, now=now)
    first = one(database, digest)
    await seed(database, reset=True, now=now)
    assert one(database, digest) == first


def test_seed_begins_anew_each_time_and_appends_on_request(on_database: Shell, database: str) -> None:
    on_database.done("seed")
    once = counts(database)
    on_database.done("seed", "--reset")
    assert counts(database) == once
    on_database.done("seed", "--append")
    on_database.done("seed", "--append")
    assert counts(database)["drops"] == 3 * once["drops"]
    assert counts(database)["users"] == 3 * once["users"]
    on_database.done("audit")


@pytest.mark.parametrize("option", [(), ("--reset",)])
def test_seed_deletes_nothing_in_production(on_database: Shell, seeded: str, option: tuple[str, ...]) -> None:
    before = counts(seeded)
    production = {"APP_ENV": "production", "AUTH_MODE": "jwt", "JWT_SECRET": SECRET}
    assert "APP_ENV=development" in on_database.refused("seed", *option, **production)
    assert counts(seeded) == before


@pytest.mark.usefixtures("running_engine")
@pytest.mark.parametrize("option", ["--reset", "--append"])
def test_seed_keeps_out_of_a_running_engines_way(on_database: Shell, database: str, option: str) -> None:
    with psycopg.connect(database) as conn:
        conn.execute("INSERT INTO users (id, username, created_at) VALUES (gen_random_uuid(), 'somebody', now())")
    assert "another engine serves from this database" in on_database.refused("seed", option)
    downgrade(database, "0001")
    assert "another engine serves from this database" in on_database.refused("seed", option)
    assert current(database) == "0001"  # nor is the schema changed under it
    assert counts(database)["users"] == 1


def test_seed_deletes_drops_of_an_operators_database_only_when_told_to(on_database: Shell, seeded: str) -> None:
    before = one(seeded, "SELECT string_agg(id::text, ',' ORDER BY id) FROM drops")
    assert "seed --reset deletes them" in on_database.refused("seed")
    assert one(seeded, "SELECT string_agg(id::text, ',' ORDER BY id) FROM drops") == before
    on_database.done("seed", "--reset")
    assert one(seeded, "SELECT string_agg(id::text, ',' ORDER BY id) FROM drops") != before


def test_seed_brings_the_schema_with_it(shell: Shell, empty_database: str) -> None:
    shell.done("seed", DATABASE_URL=empty_database)
    assert counts(empty_database)["drops"] >= 15


# audit ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("seeded", "running_engine")
def test_audit_is_clean_on_the_sample_data_beside_an_engine_too(on_database: Shell) -> None:
    said = on_database.done("audit")
    for invariant in ("I1", "I2", "I5", "I6", "I7", "I9", "I10", "I14", "I15", "I19"):
        assert re.search(rf"{invariant} .* 0 .* holds", said), invariant
    assert "all hold" in said
    assert "BROKEN" not in said


def test_audit_shows_the_first_violating_rows(on_database: Shell, seeded: str) -> None:
    with psycopg.connect(seeded) as conn:
        conn.execute("DELETE FROM purchases")
    found = on_database.run("audit")
    assert (found.returncode, found.stderr) == (1, "")
    assert re.search(r"I9 .* [1-9][0-9]* .* BROKEN", found.stdout)
    assert re.search(r"^I9 consumed_means_purchased, 20 of \d+:\n  id=[0-9a-f-]{36}, ", found.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("damage", "invariant"),
    [
        ("UPDATE drops SET available_stock = available_stock - 1, held_count = held_count + 1"
         " WHERE status = 'draft' AND total_stock > 0", "I2"),
        ("DELETE FROM purchases", "I9"),
        ("UPDATE drops SET seq = seq + 1", "I10"),
        ("DELETE FROM drop_events WHERE seq = 2", "I10"),
        ("UPDATE drop_events SET at = at - interval '1 year' WHERE seq > 1", "I19"),
    ],
)  # fmt: skip
def test_audit_finds_damage_and_fails(on_database: Shell, seeded: str, damage: str, invariant: str) -> None:
    with psycopg.connect(seeded) as conn:
        assert conn.execute(damage.encode()).rowcount > 0
    found = on_database.run("audit", "--json")
    assert (found.returncode, found.stderr) == (1, "")
    broken = [finding for finding in json.loads(found.stdout) if not finding["holds"]]
    (first, *_) = [finding for finding in broken if finding["invariant"] == invariant]
    assert first["violations"] >= len(first["rows"]) >= 1


def test_audit_of_a_database_without_our_schema_says_what_to_do(shell: Shell, empty_database: str) -> None:
    assert "run `holdfast migrate`" in shell.refused("audit", DATABASE_URL=empty_database)


# check-config -----------------------------------------------------------------------------------------


def test_check_config_shows_what_is_in_effect_and_no_secret(shell: Shell) -> None:
    (shell.cwd / ".env").write_text(f"PORT=5000\nJWT_SECRET={SECRET}\nRESERVATION_TTL_SECOND=5\n")
    shown = shell.done("check-config", DATABASE_URL=NOWHERE, AUTH_MODE="jwt")
    assert re.search(r"^PORT +5000 +\(\.env\)$", shown, re.MULTILINE)
    assert re.search(r"^AUTH_MODE +jwt +\(environment\)$", shown, re.MULTILINE)
    assert re.search(r"^RESERVATION_TTL_SECONDS +60 +\(default\)$", shown, re.MULTILINE)
    assert re.search(r"^RESERVATION_TTL_SECOND +is no setting", shown, re.MULTILINE)
    assert "postgresql://app:***@127.0.0.1:1/shop" in shown
    assert "hunter2" not in shown
    assert SECRET not in shown


def test_check_config_says_what_is_wrong_and_shows_the_rest(shell: Shell) -> None:
    failed = shell.run("check-config", PORT="http", DATABASE_URL="mysql://app:hunter2@db/shop")
    assert failed.returncode == 1
    assert failed.stderr.splitlines() == [
        "holdfast: DATABASE_URL is ***: it must be a PostgreSQL URL: postgresql://user:password@host:5432/database.",
        'holdfast: PORT is "http": it must be a whole number from 0 to 65535.',
    ]
    assert "hunter2" not in failed.stdout
    assert re.search(r"^HOST +127\.0\.0\.1 ", failed.stdout, re.MULTILINE)


# The embedded server, and serve -----------------------------------------------------------------------


def test_commands_find_the_embedded_server_that_serve_runs(shell: Shell) -> None:
    port = str(free_port())
    seeded = shell.done("seed")
    serving = subprocess.Popen(
        [HOLDFAST, "serve", "--port", port], cwd=shell.cwd, env=shell.environ, stderr=subprocess.PIPE, text=True
    )
    try:
        assert serving.stderr is not None
        said = ""
        while "ready" not in said:
            said = serving.stderr.readline()
            assert said, "serve ended before it was ready"
        assert shell.done("migrate") == "schema 0002: nothing to do\n"
        assert "another engine serves" in shell.refused("seed")
        shell.done("audit")
        assert "cannot listen" in shell.refused("serve", "--port", port, HOLDFAST_DATA_DIR="elsewhere")
    finally:
        serving.send_signal(signal.SIGTERM)
        _, rest = serving.communicate(timeout=30)
    assert serving.returncode == 0
    assert "Traceback" not in rest
    assert shell.done("seed") == seeded  # with a server of its own again


def test_a_reader_who_has_seen_enough_is_no_error(shell: Shell) -> None:
    listing = subprocess.Popen(
        [HOLDFAST, "check-config"], cwd=shell.cwd, env=shell.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert listing.stdout is not None
    listing.stdout.close()
    assert listing.stderr is not None
    assert listing.stderr.read() == b""
    listing.wait(30)
