"""The PostgreSQL that comes with us: find its binaries, make its cluster, start it, stop it.

For when no database was configured. The cluster lives in `<data_dir>/postgres` and is kept between runs;
next to it are its log and the lock file that gives it one owner. Nothing here weakens durability by
itself, leaves a server behind, or takes a cluster that was only half made for a good one.

Read `EmbeddedPostgres.start` first: it is the whole story, and what it opens is closed in reverse. Then
come two chapters: one postmaster's life, and the files around it. `persistence.installation` says which
binaries run, and as which user.
Everything blocks and needs the standard library only; call it from a Trio program in a thread.
"""

import fcntl
import hashlib
import os
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import quote

from persistence.installation import (
    Account,
    EmbeddedServerError,
    choose_account,
    environment,
    find_binaries,
    major_of_cluster,
)

DATABASE: Final = "holdfast"
SUPERUSER: Final = "postgres"

SETTINGS: Final[Mapping[str, str]] = {
    # An acknowledged hold must survive a power cut. These are the defaults; on the command line they also
    # win over what a postgresql.conf or an ALTER SYSTEM left in the cluster.
    "fsync": "on",
    "full_page_writes": "on",
    "synchronous_commit": "on",
    # Log, audit and clients agree on one clock, wherever the machine stands.
    "timezone": "UTC",
    "log_timezone": "UTC",
    # The DETAIL of a unique violation quotes the row's values; no log carries a user's data.
    "log_error_verbosity": "terse",
    # A checkpoint is followed by full page images in the path of the commits. A reservation writes about
    # 1 KB of WAL, so with the default of 1 GB a storm would force one every ten seconds or so. The price is a
    # longer replay after a crash.
    "max_wal_size": "4GB",
    "checkpoint_timeout": "15min",
    # A new segment is zero-filled and synced while a commit waits for it, 25 ms each (measured). A quiet
    # night must not give the old ones back, just before the drop.
    "min_wal_size": "512MB",
    # As many readers as POOL_SIZE allows, the writer, the lock, errands, and an operator who looks.
    "max_connections": "250",
}

# The name of a socket goes below its directory, and macOS has room for 103 bytes, Linux for 107.
_SOCKET_DIR_BYTES_MAX: Final = 103 - len("/.s.PGSQL.65535")
# libpq, SQLAlchemy and the server would take these for lists, ports or quotes.
_UNSAFE_IN_SOCKET_DIR: Final = re.compile(r"[,:\"\\]")
_PORT_OF_SOCKET_ONLY: Final = 5432

_LOG_BYTES_MAX: Final = 16 * 2**20
_LOG_TAIL_BYTES: Final = 8192
_POLL_S: Final = 0.01
_RETRY_S: Final = 0.1
# The watchdog of a dead owner tells its server to stop within milliseconds. A server that is still ready
# after this long belongs to somebody.
_ORPHAN_GRACE_S: Final = 3.0
# After SIGQUIT a postmaster needs 5 s to lose patience with a child that hangs.
_IMMEDIATE_STOP_S: Final = 8.0
# A recovery ends with a checkpoint, of which the log tells the beginning and the end: up to `max_wal_size` of changes
# are flushed between them, onto a slow disk perhaps. Killed, it would begin again, and again.
_RECOVERY_SILENCE_S: Final = 600.0


@dataclass(frozen=True, slots=True)
class EmbeddedServer:
    """A server that accepts connections, as its clients need to know it.

    `pid` is the postmaster's, `port` the TCP port on 127.0.0.1 or None when only the socket listens.
    """

    pid: int
    major: int
    data_dir: Path
    log_path: Path
    socket_dir: Path
    port: int | None

    @property
    def dsn(self) -> str:
        """libpq URI of the product's database over the unix socket; the same after each restart."""
        return self.dsn_of(DATABASE)

    @property
    def url(self) -> str:
        """The same for SQLAlchemy, naming psycopg as its driver."""
        return self.dsn.replace("postgresql:", "postgresql+psycopg:", 1)

    def dsn_of(self, database: str) -> str:
        """libpq URI of another database of this server; `postgres` always exists."""
        host = quote(os.fsencode(self.socket_dir), safe="/")
        port = self.port or _PORT_OF_SOCKET_ONLY
        return f"postgresql://{SUPERUSER}@/{quote(database, safe='')}?host={host}&port={port}"


@contextmanager
def running(
    data_dir: Path,
    *,
    settings: Mapping[str, str] | None = None,
    port: int | None = None,
    start_timeout_s: float = 30.0,
    stop_timeout_s: float = 60.0,
) -> Iterator[EmbeddedServer]:
    """`EmbeddedPostgres` as a block: started at its head, stopped at its end."""
    postgres = EmbeddedPostgres(
        data_dir, settings=settings, port=port, start_timeout_s=start_timeout_s, stop_timeout_s=stop_timeout_s
    )
    server = postgres.start()
    try:
        yield server
    finally:
        postgres.stop()


def find_running(data_dir: Path) -> EmbeddedServer | None:
    """The server that somebody else runs on this directory and that is ready, to be used beside its owner; or None.

    Raises:
        EmbeddedServerError: the directory is not ours to look into.
    """
    data_dir = data_dir.absolute()
    cluster = data_dir / "postgres"
    with _os_errors_as_refusals(data_dir):
        named, major = _read_pid_file(cluster), major_of_cluster(cluster)
    if named is None or major is None or named.state != "ready":
        return None
    if not _is_alive(named.pid) or not _is_postgres(named.pid):
        return None
    return EmbeddedServer(named.pid, major, data_dir, data_dir / "postgres.log", Path(named.socket_dir), named.tcp_port)


def forget_pg_variables(environ: MutableMapping[str, str] = os.environ) -> None:
    """Take libpq's PG* variables out of this process, so that a DSN from here means what it says.

    libpq reads them for whatever a DSN leaves open: a PGOPTIONS, PGHOSTADDR or PGREQUIREAUTH meant for
    another server bends or breaks connections to this one. Call it once the embedded server was chosen,
    before the first connection.
    """
    for name in [name for name in environ if name.startswith("PG") and name != "PG_BIN"]:
        del environ[name]


class EmbeddedPostgres:
    """One server over one data directory. Once stopped it may be started again."""

    def __init__(
        self,
        data_dir: Path,
        *,
        settings: Mapping[str, str] | None = None,
        port: int | None = None,
        start_timeout_s: float = 30.0,
        stop_timeout_s: float = 60.0,
    ) -> None:
        """Nothing happens yet.

        `settings` go over `SETTINGS`, under their names in postgresql.conf. With `port` the server also
        listens on 127.0.0.1, where every user of this machine may enter; else only on its private socket.
        `start_timeout_s` is the longest silence before it says that it starts, and ten minutes are from then on: a
        recovery that reports its progress in the log may take as long as it needs. `stop_timeout_s` is for a clean
        stop, then it is made to.
        """
        self._data_dir = data_dir.absolute()
        self._cluster = self._data_dir / "postgres"
        self._log_path = self._data_dir / "postgres.log"
        self._settings = {**SETTINGS, **(settings or {})}
        self._port = port
        self._start_timeout_s = start_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._is_given_up = threading.Event()
        self._postmaster: subprocess.Popen[bytes] | None = None
        self._undo = ExitStack()

    @property
    def is_running(self) -> bool:
        """Whether the server that was started still lives. It does not block, and may be asked at any time."""
        return self._postmaster is not None and self._postmaster.poll() is None

    def start(self, *, may_create: bool = True) -> EmbeddedServer:
        """Bring the server up, after making the cluster and the database when they do not exist.

        With `may_create` False a cluster that is gone is not made anew: what was in it has not gone with its mount.

        Raises:
            EmbeddedServerError: it cannot be had. Nothing is left running or locked.
        """
        self._is_given_up.clear()
        with ExitStack() as undo, _os_errors_as_refusals(self._data_dir):
            if not may_create and not (self._cluster / "PG_VERSION").exists():
                raise EmbeddedServerError(f"The cluster {self._cluster} is not there any more.")
            self._data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            undo.enter_context(_lock(self._data_dir))
            binaries = find_binaries(major_of_cluster(self._cluster))
            account = choose_account(binaries)
            _await_predecessor(self._cluster, self._start_timeout_s)
            if not (self._cluster / "PG_VERSION").exists():
                self._make_cluster(account)
            account.take_over(self._cluster)
            socket_dir = undo.enter_context(_socket_dir(self._cluster, account))
            postmaster = self._launch(account, socket_dir, undo)
            server = EmbeddedServer(
                postmaster.pid, binaries.major, self._data_dir, self._log_path, socket_dir, self._port
            )
            self._make_database(account, server)
            self._postmaster, self._undo = postmaster, undo.pop_all()
            return server

    def give_up(self) -> None:
        """Have a `start` that waits in another thread end, by its error. When there is none, nothing happens."""
        self._is_given_up.set()

    def stop(self) -> None:
        """Stop the server and let go of the directory. When it does not run, nothing happens."""
        self._undo.close()

    def _make_cluster(self, account: Account) -> None:
        """Make the cluster under another name, and give it its own only once it is whole.

        An initdb that died half-way has already written PG_VERSION; in place it would pass for good.
        """
        for leftover in self._data_dir.glob("postgres.new-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        unfinished = Path(tempfile.mkdtemp(prefix="postgres.new-", dir=self._data_dir))
        try:
            account.take_over(unfinished)
            self._initdb(account, unfinished)
            unfinished.rename(self._cluster)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        _sync_directory(self._data_dir)

    def _initdb(self, account: Account, cluster: Path) -> None:
        command = ["initdb", "-D", account.path_of(cluster), "-U", SUPERUSER, "-A", "trust"]
        # Locale C: text sorts by its bytes, and no upgrade of a library breaks an index.
        command += ["--encoding=UTF8", "--locale=C", "--data-checksums", "--no-instructions"]
        if self._settings["fsync"] == "off":
            command.append("--no-sync")
        done = account.run(command, cwd=cluster, timeout_s=self._start_timeout_s)
        if done.returncode != 0:
            raise EmbeddedServerError(f"initdb failed for {self._cluster}: {_verdict(done.stderr)}.")

    def _launch(self, account: Account, socket_dir: Path, undo: ExitStack) -> subprocess.Popen[bytes]:
        """Start a postmaster and wait until it is ready; its stop is left on `undo`."""
        command = ["postgres", "-D", account.path_of(self._cluster), "-k", str(socket_dir)]
        command += ["-h", "127.0.0.1" if self._port else "", "-p", str(self._port or _PORT_OF_SOCKET_ONLY)]
        for name, value in self._settings.items():
            command += ["-c", f"{name}={value}"]
        log = undo.enter_context(_open_log(self._log_path))
        give_up_at = time.monotonic() + self._start_timeout_s
        while True:
            log_start, left_behind = os.fstat(log).st_size, _read_pid_file(self._cluster)
            with ExitStack() as attempt:
                postmaster = attempt.enter_context(
                    _postmaster(account, command, self._cluster, log, self._stop_timeout_s)
                )
                if self._wait_until_ready(postmaster, log, left_behind):
                    undo.push(attempt.pop_all())
                    return postmaster
            said = _tail(self._log_path, log_start)
            # The children of a postmaster that was killed live for a moment longer than it.
            if not _STILL_IN_USE.search(said) or time.monotonic() > give_up_at:
                raise EmbeddedServerError(f"PostgreSQL did not start: {_verdict(said)} (its log is {self._log_path}).")
            time.sleep(_RETRY_S)

    def _wait_until_ready(self, postmaster: subprocess.Popen[bytes], log: int, left_behind: "_PidFile | None") -> bool:
        """True once it accepts connections, False when it ended instead.

        The file that a predecessor left behind may say "ready" of the very pid that is new now.

        Raises:
            EmbeddedServerError: it was silent for too long; see `__init__`.
        """
        log_size, heard_at = os.fstat(log).st_size, time.monotonic()
        patience_s = self._start_timeout_s
        while postmaster.poll() is None:
            named = _read_pid_file(self._cluster)
            if named and named != left_behind and named.pid == postmaster.pid:
                if named.state == "ready":
                    return True
                patience_s = max(patience_s, _RECOVERY_SILENCE_S)
            if (size := os.fstat(log).st_size) != log_size:
                log_size, heard_at = size, time.monotonic()
            if self._is_given_up.is_set():
                raise EmbeddedServerError("PostgreSQL was stopped before it was ready.")
            if time.monotonic() - heard_at > patience_s:
                raise EmbeddedServerError(
                    f"PostgreSQL did not get ready within {patience_s:g} s;"
                    f" the last line of its log {self._log_path} is: {_last_line(_tail(self._log_path))}."
                )
            time.sleep(_POLL_S)
        return False

    def _make_database(self, account: Account, server: EmbeddedServer) -> None:
        """Create the product's database when it is missing."""
        create_missing = (
            f"SELECT 'CREATE DATABASE {DATABASE}'"
            f" WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = '{DATABASE}') \\gexec\n"
        )
        command = ["psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", server.dsn_of("postgres")]
        done = account.run(command, cwd=self._cluster, timeout_s=self._start_timeout_s, stdin=create_missing)
        if done.returncode != 0:
            raise EmbeddedServerError(f"The database {DATABASE} could not be created: {_verdict(done.stderr)}.")


# --- one postmaster's life ---------------------------------------------------------------------------

# The second read ends with a line when we stand the watchdog down, and without one when we are gone.
# SIGINT is PostgreSQL's fast shutdown: clients are cut off, everything is written.
_WATCHDOG: Final = 'read -r server && if ! read -r _; then kill -INT "$server"; fi'
_STAND_DOWN: Final = b"stand down\n"

_STILL_IN_USE: Final = re.compile(r'lock file ".*" already exists|pre-existing shared memory block .* is still in use')


@contextmanager
def _postmaster(
    account: Account, command: Sequence[str], cluster: Path, log: int, stop_timeout_s: float
) -> Iterator[subprocess.Popen[bytes]]:
    """A postmaster that has just been started, and a watchdog that stops it should we be killed."""
    watched_end, lifeline = os.pipe()
    try:
        watchdog = subprocess.Popen(
            ["/bin/sh", "-c", _WATCHDOG],
            stdin=watched_end,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=environment(),
            start_new_session=True,
        )
    finally:
        os.close(watched_end)
    try:
        postmaster = account.spawn(command, cwd=cluster, stdout=lifeline, stderr=log)
        try:
            yield postmaster
        finally:
            _stop(postmaster, stop_timeout_s)
    finally:
        with suppress(BrokenPipeError):
            os.write(lifeline, _STAND_DOWN)
        os.close(lifeline)
        watchdog.wait()


def _stop(postmaster: subprocess.Popen[bytes], clean_stop_s: float) -> None:
    """Ask, insist, kill: fast shutdown, immediate shutdown, and what nobody can refuse."""
    steps = ((signal.SIGINT, clean_stop_s), (signal.SIGQUIT, _IMMEDIATE_STOP_S), (signal.SIGKILL, None))
    for step, patience_s in steps:
        postmaster.send_signal(step)
        with suppress(subprocess.TimeoutExpired):
            postmaster.wait(patience_s)
            return


def _await_predecessor(cluster: Path, patience_s: float) -> None:
    """Wait for the server of an owner that was killed to finish; clear away what it may have left.

    Raises:
        EmbeddedServerError: a server uses the cluster, and goes on using it.
    """
    began_at = time.monotonic()
    while (named := _read_pid_file(cluster)) and _is_alive(named.pid):
        if not _is_postgres(named.pid):
            # The number went to another process, in a container's next life for example. PostgreSQL looks
            # at the number alone, and would refuse to start for as long as that process lives.
            for lock_file in (cluster / "postmaster.pid", *cluster.glob(".s.PGSQL.*.lock")):
                lock_file.unlink(missing_ok=True)
            return
        wait_max_s = _ORPHAN_GRACE_S if named.state == "ready" else patience_s
        if time.monotonic() - began_at > wait_max_s:
            raise EmbeddedServerError(
                f"Another PostgreSQL server (process {named.pid}) uses {cluster}: stop it, or use another"
                " data directory."
            )
        time.sleep(_POLL_S)


class _PidFile(NamedTuple):
    """What a server writes of itself in postmaster.pid; its states are starting, ready and stopping."""

    pid: int
    started_at: str
    socket_dir: str
    tcp_port: int | None
    state: str


def _read_pid_file(cluster: Path) -> _PidFile | None:
    """None when there is none, or not yet a whole one."""
    try:
        lines = (cluster / "postmaster.pid").read_text().splitlines()
        # The second is the data directory, the seventh the shared memory. The last ones are added as they become
        # known; a server in single-user mode has none of them, and negates its pid.
        pid, _, started_at, port, socket_dir, address, _, state = [*lines, *[""] * 8][:8]
        return _PidFile(abs(int(pid)), started_at, socket_dir, int(port) if address else None, state.strip())
    except (FileNotFoundError, ValueError):
        return None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _is_postgres(pid: int) -> bool:
    """Whether this process can be a postmaster; yes when we cannot know. A zombie is none."""
    try:
        program = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
    except OSError:
        return True
    return b"postgres" in program


# --- the files around it -----------------------------------------------------------------------------


@contextmanager
def _os_errors_as_refusals(data_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EmbeddedServerError(
            f"The embedded PostgreSQL cannot run in {data_dir}: {error.strerror or error} ({error.filename})."
        ) from error


@contextmanager
def _lock(data_dir: Path) -> Iterator[None]:
    """Hold the data directory for this process; the kernel lets go when we die, however we die."""
    with (data_dir / "postgres.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as held:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise EmbeddedServerError(
                f"Another Holdfast (process {owner}) uses the data directory {data_dir}: stop it, or set"
                " HOLDFAST_DATA_DIR to another directory."
            ) from held
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


@contextmanager
def _socket_dir(cluster: Path, account: Account) -> Iterator[Path]:
    """A private directory for the unix socket: the cluster itself, or a short one when that cannot serve.

    The short one has the same name each time, so that a DSN outlives a restart.
    """
    if _can_hold_socket(cluster) and account.can_enter(cluster):
        yield cluster
        return
    digest = hashlib.sha256(os.fsencode(cluster)).hexdigest()[:12]
    short = Path(tempfile.gettempdir()) / f"holdfast-{os.geteuid()}-{digest}"
    if not _can_hold_socket(short):
        raise EmbeddedServerError(f"{short} is too long for a unix socket: set TMPDIR to a shorter path.")
    with suppress(FileNotFoundError):
        left = short.lstat()
        if not stat.S_ISDIR(left.st_mode) or left.st_uid not in (account.uid, os.geteuid()):
            raise EmbeddedServerError(f"{short} is in the way of our unix socket and not ours: remove it.")
        shutil.rmtree(short)
    short.mkdir(mode=0o700)
    try:
        account.take_over(short)
        yield short
    finally:
        shutil.rmtree(short, ignore_errors=True)


def _can_hold_socket(directory: Path) -> bool:
    name = os.fsencode(directory)
    return len(name) <= _SOCKET_DIR_BYTES_MAX and not _UNSAFE_IN_SOCKET_DIR.search(os.fsdecode(name))


@contextmanager
def _open_log(path: Path) -> Iterator[int]:
    """The log's descriptor, for appending. A log that has grown large becomes `.1`, in place of the last."""
    with suppress(FileNotFoundError):
        if path.stat().st_size > _LOG_BYTES_MAX:
            path.replace(path.with_name(f"{path.name}.1"))
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        yield log
    finally:
        os.close(log)


def _tail(log_path: Path, start: int = 0) -> str:
    """The end of the log, of what was written after `start`; bounded."""
    with log_path.open("rb") as log:
        size = log.seek(0, os.SEEK_END)
        log.seek(max(start, size - _LOG_TAIL_BYTES))
        return log.read().decode(errors="replace")


def _verdict(output: str) -> str:
    """What a tool or the server says went wrong: its first error, or its last line."""
    error = re.search(r"(?:could not bind|FATAL: |PANIC: |error: |ERROR: ).*", output)
    return error[0].rstrip(".") if error else _last_line(output)


def _last_line(output: str) -> str:
    lines = output.split("\n")
    return next((line.strip().rstrip(".") for line in reversed(lines) if line.strip()), "nothing")


def _sync_directory(directory: Path) -> None:
    """Make a rename in it survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
