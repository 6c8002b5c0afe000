"""What some faults need of the machine, and not every machine gives: a disk of a few megabytes, a network of its own
that can be torn, a clock that can be set. Where one cannot be had, `Unable` says why, in a sentence for people.
"""

import ctypes
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from psycopg import sql

from tests.proof.conftest import Postgres

FAKETIME: Final = ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/opt")
CLONE_NEWNET: Final = 0x40000000  # of <sched.h>


class Unable(Exception):
    """This machine, or our right on it, does not go that far."""


# A small disk -------------------------------------------------------------------------------------------


@contextmanager
def small_disk(at: Path, *, megabytes: int) -> Iterator[Path]:
    """A tmpfs of that size.

    Raises:
        Unable: we may not mount one.
    """
    at.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "holdfast-test", str(at)]
    try:
        _run(command, "a small disk needs the right to mount one")
    except Unable:
        at.rmdir()
        raise
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


@contextmanager
def tablespace_on(postgres: Postgres, disk: Path) -> Iterator[str]:
    """Data on the small disk and the WAL elsewhere: a full WAL disk is a PANIC, and another story."""
    place = disk / "tables"
    place.mkdir()
    _give_to_server(postgres, place)
    name = sql.Identifier("small")
    postgres.administer(sql.SQL("CREATE TABLESPACE {} LOCATION {}").format(name, sql.Literal(str(place))))
    try:
        yield "small"
    finally:
        postgres.administer(sql.SQL("DROP TABLESPACE {}").format(name))


def move_wal(postgres: Postgres, disk: Path) -> None:
    """Put the WAL of a server that is stopped on the small disk."""
    wal = postgres.server.data_dir / "postgres" / "pg_wal"
    place = disk / "wal"
    shutil.copytree(wal, place)
    for directory, _, files in os.walk(place):
        for name in (".", *files):
            _give_to_server(postgres, Path(directory) / name)
    place.chmod(0o700)
    shutil.rmtree(wal)
    wal.symlink_to(place)


def fill(file: Path) -> None:
    """Write to it until its disk is full."""
    with suppress(OSError), file.open("ab") as ballast:
        while True:
            ballast.write(bytes(4096))
            ballast.flush()


def remove(file: Path) -> None:
    file.unlink(missing_ok=True)


def _give_to_server(postgres: Postgres, path: Path) -> None:
    owner = (postgres.server.data_dir / "postgres").stat()
    shutil.chown(path, owner.st_uid, owner.st_gid)


# A network of its own -----------------------------------------------------------------------------------


class Network:
    """A network namespace that one cable joins to ours; what listens in it is out of reach when that is cut.

    Nobody is told: packets are lost, as when a switch dies.
    """

    def __init__(self, name: str) -> None:
        number = os.getpid() % 60_000
        self._name = name
        self._here, self._there = f"hfa{number}", f"hfb{number}"
        # Of 198.18.0.0/15, set aside for tests of networks: nobody's real addresses.
        subnet = f"198.18.{number // 250}.{number % 250 // 4 * 4}"
        prefix, last = subnet.rsplit(".", 1)
        self.address = f"{prefix}.{int(last) + 2}"
        self._our_address = f"{prefix}.{int(last) + 1}"

    def cut(self) -> None:
        # The far end: seen from here the cable is there still, and nothing comes through.
        _run(["ip", "-n", self._name, "link", "set", self._there, "down"], "the cable cannot be cut")

    def mend(self) -> None:
        _run(["ip", "-n", self._name, "link", "set", self._there, "up"], "the cable cannot be mended")

    def listen(self, port: int) -> socket.socket:
        """A listener in there. A socket stays in the network in which it was made, whoever uses it."""
        made: list[socket.socket] = []

        def make() -> None:
            libc = ctypes.CDLL(None, use_errno=True)
            with Path("/run/netns", self._name).open("rb") as namespace:
                if libc.setns(namespace.fileno(), CLONE_NEWNET) == 0:  # of this thread alone
                    made.append(socket.create_server((self.address, port), backlog=128))

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        if not made:
            raise Unable("a thread may not enter the network namespace")
        return made[0]

    def lay(self) -> None:
        for command in (
            ["ip", "netns", "add", self._name],
            ["ip", "link", "add", self._here, "type", "veth", "peer", "name", self._there, "netns", self._name],
            ["ip", "addr", "add", f"{self._our_address}/30", "dev", self._here],
            ["ip", "-n", self._name, "addr", "add", f"{self.address}/30", "dev", self._there],
            ["ip", "link", "set", self._here, "up"],
            ["ip", "-n", self._name, "link", "set", self._there, "up"],
        ):
            _run(command, "a network of its own needs the right to make one")

    def remove(self) -> None:
        for command in (["ip", "link", "del", self._here], ["ip", "netns", "del", self._name]):
            with suppress(OSError):
                subprocess.run(command, capture_output=True)


@contextmanager
def network() -> Iterator[Network]:
    """A network that is gone after the block.

    Raises:
        Unable: we may not make one.
    """
    found = Network(f"holdfast-{os.getpid()}")
    try:
        found.lay()
        yield found
    finally:
        found.remove()


# A clock that can be set --------------------------------------------------------------------------------


class WallClock:
    """The wall clock of processes that are started with `environment`; their monotonic clock goes on undisturbed."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.set(0)
        self.environment = {
            "LD_PRELOAD": str(_faketime()),
            "FAKETIME_TIMESTAMP_FILE": str(file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            # Its fix for old C libraries bends waits on the monotonic clock: Python's threads stood still for seconds.
            "FAKETIME_FORCE_MONOTONIC_FIX": "0",
            "NO_FAKE_STAT": "1",  # else the times of files lie, too
        }

    def set(self, ahead_s: float) -> None:
        """From now on it is so far ahead of the true time, or behind it."""
        fresh = self._file.with_suffix(".new")
        fresh.write_text(f"{ahead_s:+.3f}\n")
        fresh.rename(self._file)  # nobody reads half of it

    def forget(self, pid: int) -> None:
        """Remove what the library keeps for a process, which one that was killed leaves behind."""
        for name in (f"faketime_shm_{pid}", f"sem.faketime_sem_{pid}"):
            Path("/dev/shm", name).unlink(missing_ok=True)


def _faketime() -> Path:
    for place in FAKETIME:
        for library in sorted(Path(place).glob("**/faketime/libfaketime*.so.1")):
            if "MT" in library.name:  # the one for programs with threads
                return library
    raise Unable("setting a clock needs libfaketime (Debian, Ubuntu: apt install libfaketime)")


def _run(command: list[str], why: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as fault:
        raise Unable(f"{why}: {fault}") from fault
    if done.returncode != 0:
        raise Unable(f"{why}: {done.stderr.strip()}")
