"""The two servers that are fuzzed, in equal state, and what must be true of them whatever they were sent.

One is plain: its hot lane reads every connection. The other speaks TLS: Hypercorn and Quart read every request. Users,
drops and holds are in both databases from the start, under the same ids, so a request is the same bytes for both. Each
attempt at a case is a user of its own: what one of them changes, no other one sees.
"""

import hashlib
import operator
import os
import re
import shutil
import ssl
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import httpx
import psycopg
from psycopg import sql

from persistence.embedded import forget_pg_variables, running
from persistence.migrate import upgrade
from tests.server import Server

# What requests are made of. Before they are sent, the first three become those of the attempt: see `identified`.
USER: Final = "fffffffe-f022-4000-8000-000000000000"
OTHER_USER: Final = "fffffffe-f022-7000-8000-000000000000"
HOLD: Final = "0199c2f0-0000-7000-8001-fffffffffffe"
OPEN_DROP: Final = "0199c2f0-0000-7000-8000-0000000000a1"
HELD_DROP: Final = "0199c2f0-0000-7000-8000-0000000000a2"  # of which every user has a hold
EMPTY_DROP: Final = "0199c2f0-0000-7000-8000-0000000000a3"
DRAFT_DROP: Final = "0199c2f0-0000-7000-8000-0000000000a4"
TRUTH_DROP: Final = "0199c2f0-5a3c-7000-9c3b-d1f2e3a4b5c6"  # that only the honest touch; no little harm leads there
NO_DROP: Final = "0199c2f0-0000-7000-8000-0000000000af"
OWNER: Final = "fffffffd-f022-4000-8000-000000000000"
SPELT: Final = re.compile(rb"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")  # every id that is read as one
HARMED_MAX: Final = 8  # digits of an id; a user and a drop differ in 12 at least
STOCK: Final = 9_000_000
PAGE: Final = "https://shop.example"
HOLD_S: Final = 86_400  # none ends meanwhile

PATIENCE_S: Final = 15.0
SETTLE_S: Final = (
    15.0  # that descriptors may take to come back: lingering connections have 2 s, bodies that never came 10 s
)
# Of growth after the first part of a run: what a cache may still take, and what an allocator does not give back.
GROWTH_MAX: Final = 48 * 1_048_576
SIGNS: Final = (
    "internal_error",
    "INTERNAL_ERROR",
    "Traceback",
    "viewer_failed",
    "drop_stopped",
    "drop_broken",
    '"critical"',
)

# What Hypercorn logs of two requests that h11 lets through and then fails over. Each ends its own connection, and no
# other one: `HeAD`, of which the application makes HEAD and h11 does not; and a handshake for a WebSocket at an address
# that has none, with more behind it in the same read.
KNOWN: Final = (
    "Too little data for declared Content-Length",
    "Can't send data when our state is ERROR",
    "when role=SERVER and state=SEND_BODY",
)
LOG_TAIL: Final = 12_000  # characters
LINES_MAX: Final = 3  # of a log, shown

_FILL: Final = (
    "INSERT INTO users SELECT md5('user ' || k)::uuid, 'fuzz_' || k, '2026-01-01Z'"
    " FROM generate_series(0, %(users)s - 1) k",
    "INSERT INTO users VALUES (%(owner)s, 'fuzz_owner', '2026-01-01Z')",
    "INSERT INTO drops (id, name, price, currency, total_stock, available_stock, held_count, sold_count, status,"
    " created_by, created_at, updated_at, epoch, seq) VALUES"
    " (%(open)s, 'Open', 1, 'USD', %(stock)s, %(stock)s, 0, 0, 'live', %(owner)s, '2026-01-01Z', '2026-01-01Z', 1, 1),"
    " (%(held)s, 'Held', 1, 'USD', %(stock)s + %(users)s, %(stock)s, %(users)s, 0, 'live', %(owner)s,"
    " '2026-01-01Z', '2026-01-01Z', 1, %(users)s + 1),"
    " (%(empty)s, 'Empty', 1, 'USD', 0, 0, 0, 0, 'live', %(owner)s, '2026-01-01Z', '2026-01-01Z', 1, 1),"
    " (%(draft)s, 'Draft', 1, 'USD', 5, 5, 0, 0, 'draft', %(owner)s, '2026-01-01Z', '2026-01-01Z', 1, 1),"
    " (%(truth)s, 'Truth', 1, 'USD', %(stock)s, %(stock)s, 0, 0, 'live', %(owner)s,"
    " '2026-01-01Z', '2026-01-01Z', 1, 1)",
    "INSERT INTO reservations (id, drop_id, user_id, qty, status, created_at, expires_at, seq)"
    " SELECT md5('hold ' || k)::uuid, %(held)s, md5('user ' || k)::uuid, 1, 'active',"
    " date_trunc('second', now()), date_trunc('second', now()) + interval '1 day', k + 2"
    " FROM generate_series(0, %(users)s - 1) k",
)


class NoCertificate(Exception):
    """There is nothing here to make one with."""


class ServerEnded(Exception):
    """Of itself, and that is what its log says."""


class Exhausted(Exception):
    """More attempts than users."""


class Lane:
    """One server, and how it was when it was warm."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.tls: ssl.SSLContext | None = server.tls
        self.name = "plain" if self.tls is None else "behind TLS"
        self._memory = 0
        self._descriptors = 0
        self._log_read = 0

    def note(self) -> None:
        """From here on it may not grow."""
        self._memory, self._descriptors = self.memory(), self.descriptors()

    def memory(self) -> int:
        """Bytes that are resident; 0 where the system does not say so."""
        try:
            status = Path(f"/proc/{self.server.process.pid}/status").read_text()
        except FileNotFoundError:
            return 0
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")) * 1024

    def descriptors(self) -> int:
        try:
            return len(os.listdir(f"/proc/{self.server.process.pid}/fd"))  # noqa: PTH208 - Path makes one object for each
        except FileNotFoundError:
            return 0

    def growth(self) -> dict[str, int]:
        return {
            "memory_bytes": self.memory() - self._memory,
            "descriptors": self.descriptors() - self._descriptors,
        }

    def wrongs(self) -> list[str]:
        """What must not be, once nobody is connected any more."""
        assert self.server.process.poll() is None, f"the server ended:\n{self.server.log()}"
        end = time.monotonic() + SETTLE_S
        while self.growth()["descriptors"] > 0 and time.monotonic() < end:
            time.sleep(0.05)
        log = self.server.log()
        new, self._log_read = log[self._log_read :], len(log)
        lines = [line for line in new.splitlines() if _is_wrong(line)]
        found = [f"its log says: {line}" for line in lines[:LINES_MAX]]
        growth = self.growth()
        if growth["descriptors"] > 0:
            found.append(f"{growth['descriptors']} descriptors are left open")
        if growth["memory_bytes"] > GROWTH_MAX:
            found.append(f"it grew by {growth['memory_bytes'] / 1_048_576:.1f} MiB")
        return [f"{self.name}: {line}" for line in found]


class Arena:
    """Both, and identities for attempts."""

    def __init__(self, plain: Lane, oracle: Lane, users: int) -> None:
        self.plain = plain
        self.oracle = oracle
        self.lanes = (plain, oracle)
        self.sold = [0, 0]  # units of TRUTH_DROP, on each
        self._users = users
        self._used = 0
        self._lock = threading.Lock()

    def attempt(self) -> Callable[[bytes], bytes]:
        """What turns a case's bytes into those of an attempt, which no other one has."""
        with self._lock:
            number, self._used = self._used, self._used + 1
        if number >= self._users:
            raise Exhausted
        return partial(identified, number)

    def note(self) -> None:
        for lane in self.lanes:
            lane.note()

    def wrongs(self) -> list[str]:
        return [wrong for lane in self.lanes for wrong in lane.wrongs()]

    def cannot_sell(self) -> list[str]:
        """An honest reservation and its cancellation, on each; what was wrong with them."""
        wrongs = []
        for lane in self.lanes:
            if lane.server.process.poll() is not None:
                raise ServerEnded(f"{lane.name}: the server ended:\n{lane.server.log()[-LOG_TAIL:]}")
            headers = {"X-User-Id": str(uuid.uuid4())}
            with httpx.Client(
                base_url=f"{lane.server.url}/api/v1",
                headers=headers,
                verify=lane.server.tls or True,
                timeout=PATIENCE_S,
            ) as http:
                held = http.post(f"/drops/{OPEN_DROP}/reserve")
                if held.status_code != 201:
                    wrongs.append(f"{lane.name}: an honest reservation got {held.status_code}: {held.text}")
                    continue
                given_back = http.delete(f"/reservations/{held.json()['data']['reservation']['id']}/cancel")
                if given_back.status_code != 200:
                    wrongs.append(f"{lane.name}: its cancellation got {given_back.status_code}: {given_back.text}")
        return wrongs


def identified(number: int, sent: bytes) -> bytes:
    """A case's bytes as those of attempt `number`, as long as before.

    `USER` and `HOLD` become the attempt's own, in upper case, too; and an id that harm has made of them becomes as
    near to these, which no other attempt has. Two attempts that were one user would see each other: one lane may have
    heard them in another order, or refused one of them.
    """
    return SPELT.sub(partial(_own, number), sent)


def _own(number: int, found: re.Match[bytes]) -> bytes:
    spelt = found[0].lower()
    for name, kind in ((USER, "user"), (HOLD, "hold")):
        if sum(map(operator.ne, spelt, name.encode())) <= HARMED_MAX:
            harm = uuid.UUID(spelt.decode()).int ^ uuid.UUID(name).int
            own = str(uuid.UUID(int=_id_of(kind, number).int ^ harm)).encode()
            return own if found[0] == spelt else own.upper()
    return found[0]


def _is_wrong(line: str) -> bool:
    plain = line.replace("\\", "")
    return any(sign in plain for sign in SIGNS) and not any(known in plain for known in KNOWN)


def _id_of(kind: str, number: int) -> uuid.UUID:
    """As `_FILL` makes it: far from every other one, whatever little harm is done to it."""
    return uuid.UUID(bytes=hashlib.md5(f"{kind} {number}".encode()).digest())


@contextmanager
def arena(attempts: int, directory: Path | None = None) -> Iterator[Arena]:
    """Both servers on an embedded PostgreSQL of their own, for at most so many attempts.

    Raises:
        NoCertificate: there is no `openssl` to make one with.
    """
    with ExitStack() as stack:
        folder = directory or Path(stack.enter_context(TemporaryDirectory()))
        certificate = _certificate(folder)
        forget_pg_variables()
        postgres = stack.enter_context(running(folder / "postgres", settings={"fsync": "off"}))
        lanes = []
        settings: dict[str, dict[str, str]] = {"plain": {}, "tls": {"TLS_CERTFILE": str(certificate)}}
        for name, more in settings.items():
            with psycopg.connect(postgres.dsn_of("postgres"), autocommit=True) as connection:
                connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
            dsn = postgres.dsn_of(name)
            upgrade(dsn)
            _fill(dsn, attempts)
            server = Server(
                dsn,
                folder / f"{name}.log",
                None,
                CORS_ORIGINS=PAGE,
                RESERVATION_TTL_SECONDS=str(HOLD_S),
                LOG_LEVEL="WARNING",
                **more,
            )
            stack.callback(server.stop)
            lanes.append(Lane(server.start()))
        plain, oracle = lanes
        yield Arena(plain, oracle, attempts)


def _fill(dsn: str, users: int) -> None:
    names = {
        "users": users,
        "stock": STOCK,
        "owner": OWNER,
        "open": OPEN_DROP,
        "held": HELD_DROP,
        "empty": EMPTY_DROP,
        "draft": DRAFT_DROP,
        "truth": TRUTH_DROP,
    }
    with psycopg.connect(dsn) as connection:
        for statement in _FILL:
            connection.execute(statement, names)


def _certificate(folder: Path) -> Path:
    """Self-signed, on a curve: a connection is made for each case, and RSA takes five times as long."""
    openssl = shutil.which("openssl")
    if openssl is None:
        raise NoCertificate("there is no openssl command to make a certificate with")
    pem = folder / "server.pem"
    command = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=127.0.0.1"
    subprocess.run(
        [
            openssl,
            *command.split(),
            "-addext",
            "subjectAltName=IP:127.0.0.1",
            "-keyout",
            pem,
            "-out",
            pem.with_suffix(".crt"),
        ],
        check=True,
        capture_output=True,
    )
    with pem.open("ab") as file:
        file.write(pem.with_suffix(".crt").read_bytes())
    return pem
