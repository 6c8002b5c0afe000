"""What grows with sales by design, in bytes for each: what a soak keeps constant is measured here by itself.

    a user       whose name is kept once they have asked for anything; a million of them at most
    a key        whose hash is kept as long as its answer is, a day at least and two at most
    an ending    how a user's newest reservation of a drop ended: as long as the drop is in memory
    a drop       that has ended: until the server is started again

Each is asked for by as many users as there are, on a server of its own, whose resident memory is read before and after.
"""

import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import msgspec
import psycopg

from persistence.embedded import EmbeddedServer
from tests.bench import generator, targets, usage
from tests.bench.job import Job, Plan, Users
from tests.bench.results import Load
from tests.bench.targets import Target, Unusable
from tests.proof.soak.stage import FIRST_PERSON, STOCK, Say, new_database, observed

PEOPLE: Final = 100_000
DROPS: Final = 1_000
CONNECTIONS: Final = 64
SECONDS_MAX: Final = 300.0
SETTLE_S: Final = 1.5  # until what was freed is given back


class Growth(msgspec.Struct, frozen=True):
    """Bytes of resident memory for each, and how many of them were made."""

    what: str
    bytes_each: float
    made: int


def measured(postgres: EmbeddedServer, directory: Path, users: Users, say: Say) -> list[Growth]:
    dsn = new_database(postgres, "growth")
    targets.introduce(dsn, users, 0, FIRST_PERSON + PEOPLE)
    with observed(postgres, dsn, directory, "growth", users) as (target, _):
        grown = _Growing(target, users)
        sold_out = target.new_drop(1)
        for step in ("reserve", "purchase"):
            target.ask("POST", f"/drops/{sold_out}/{step}", users.ids(FIRST_PERSON, 1)[0])
        found = [
            grown.by("a user who has asked for anything", _by_all(sold_out), "409 OUT_OF_STOCK"),
        ]
        # The first sales fill what is bounded: the hub's ring of newest events, the buffers of a busy server.
        grown.by("", _by_all(target.new_drop(STOCK), is_bought=True), "201")
        bought = _by_all(target.new_drop(STOCK), is_bought=True)
        found += [grown.by("a user's last reservation of a drop", bought, "201"), grown.by_drops()]
    for one in found:
        say(f"{one.what}: {one.bytes_each:,.0f} B each, of {one.made:,}")
    return found


def _by_all(drop: str, *, is_bought: bool = False) -> Plan:
    return Plan(first_user=FIRST_PERSON, users=PEOPLE, requests=PEOPLE, drops=(drop,), is_bought=is_bought)


class _Growing:
    def __init__(self, target: Target, users: Users) -> None:
        self._target = target
        self._users = users

    def by(self, what: str, plan: Plan, expected: str) -> Growth:
        job = Job(
            server=self._target.server,
            users=self._users,
            plan=plan,
            connections=CONNECTIONS,
            seconds=SECONDS_MAX,
            warm_up_s=0.0,
            expected=expected,
            total_stock=STOCK,
        )
        before = self._resident()
        said = subprocess.run(
            [sys.executable, "-m", generator.__name__], input=msgspec.json.encode(job), capture_output=True, check=True
        )
        (load,) = (one for one in generator.ticks(iter(said.stdout.splitlines(keepends=True))) if isinstance(one, Load))
        if load.failed:
            raise Unusable(f"{load.failed} answers are wrong or missing: {load.failures[:3]}")
        return Growth(what, (self._resident() - before) / PEOPLE, PEOPLE)

    def by_drops(self) -> Growth:
        """Of a thousand that are made and end at once."""
        before = self._resident()
        for _ in range(DROPS):
            ends_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 2))
            self._target.new_drop(1, ends_at=ends_at)
        assert self._target.dsn is not None
        give_up_at = time.monotonic() + 20
        with psycopg.connect(self._target.dsn, autocommit=True) as connection:
            while time.monotonic() < give_up_at:
                row = connection.execute("SELECT count(*) FROM drops WHERE status = 'ended'").fetchone()
                if row is not None and row[0] == DROPS:
                    return Growth("a drop that has ended", (self._resident() - before) / DROPS, DROPS)
                time.sleep(0.1)
        raise Unusable("Drops did not end at their instant.")

    def _resident(self) -> int:
        time.sleep(SETTLE_S)
        return usage.rss_bytes(self._target.watched["server"]) or 0
