"""Five hundred viewers of a storm: whatever they hear is in the tables, in order, and what they don't hear is said.

The viewers are in a process of their own (`tests.proof.watchers`); some read slowly, some come and go, some were away.
Here everything that they heard is held against `drop_events` and `drops`, once all is over.
"""

import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import msgspec
import psycopg
import trio

from tests.proof import checks
from tests.proof.clients import Shop, User
from tests.proof.conftest import StartEngine, bugs_in, until
from tests.proof.watchers import Job, Report, Wish

TTL_S: Final = 2
STORM_S: Final = 7.0
SHOPPERS: Final = 120
STEADY, SLOW, HOPPING, AWAY = 475, 10, 10, 5
TELLING: Final = {"DROP_CREATED", "DROP_UPDATED", "PURCHASED"}  # what everybody must be told of, event by event
STOCK: Final = {"DROP_CREATED", "RESERVED", "CANCELLED", "EXPIRED"}
TYPES: Final = {
    "STOCK_UPDATED": STOCK,
    "ACTIVITY_UPDATED": {"PURCHASED"},
    "PURCHASE_COMPLETED": {"PURCHASED"},
    "RESERVATION_EXPIRED": {"EXPIRED"},
    "DROP_CREATED": {"DROP_CREATED"},
    "DROP_UPDATED": {"DROP_UPDATED"},
}


async def test_500_viewers_of_a_storm_hear_nothing_but_the_truth_in_order_and_all_of_it_or_a_snapshot(
    database: str, engine: StartEngine, rng: random.Random
) -> None:
    server = engine(database, RESERVATION_TTL_SECONDS=str(TTL_S))
    shop = Shop(server.port)
    drops = [await shop.new_drop(units) for units in (15, 60, 100_000)]
    drops.append(await shop.new_drop(500, status="scheduled", starts_at=_at(2), ends_at=_at(5)))
    users = await shop.users(SHOPPERS)
    wishes = _wishes(rng, drops, users)
    with watchers(Job(server.port, database, wishes)) as crowd:
        began = time.monotonic()
        async with trio.open_nursery() as nursery:
            for user in users:
                nursery.start_soon(_shop, shop, user, drops, rng, began + STORM_S)
            nursery.start_soon(_troubles, crowd, shop, drops)
            nursery.start_soon(trio.to_thread.run_sync, _slow_commits_down, database, drops[2], began + STORM_S)
        await until(lambda: checks.number(database, "SELECT sum(held_count) FROM drops") == 0)
        crowd.say("return finish")
        report = await trio.to_thread.run_sync(crowd.report)

    tables = Tables(database)
    print(shop.history.codes(), Counter(row["type"] for log in tables.logs.values() for row in log))
    print(_figures(report, tables))
    findings = [finding for number, wish in enumerate(wishes) for finding in _check(report, number, wish, tables)]
    assert findings == []
    assert _told_too_early(report) == []
    assert checks.violations(database) == []
    assert bugs_in(server) == []
    # It was what it is meant to be.
    assert len(report.samples) > 50
    assert tables.count("PURCHASED") > 50
    assert tables.count("EXPIRED") > 50
    assert tables.count("CANCELLED") > 50
    assert all(len(visits) > 3 for wish, visits in zip(wishes, report.visits, strict=True) if wish.kind == "hopping")
    assert all(len(visits) == 2 for wish, visits in zip(wishes, report.visits, strict=True) if wish.kind == "away")


def _at(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat(timespec="milliseconds")


def _wishes(rng: random.Random, drops: list[str], users: list[User]) -> list[Wish]:
    """Half of them watch everything, the others one or two drops; every tenth is one of the shoppers."""
    kinds = ["steady"] * STEADY + ["slow"] * SLOW + ["hopping"] * HOPPING + ["away"] * AWAY
    wishes = []
    for number, kind in enumerate(kinds):
        wanted: Any = "*" if number % 2 or kind == "slow" else rng.sample(drops, rng.choice([1, 2]))
        wishes.append(Wish(kind, wanted, users[number // 10].id if number % 10 == 0 else None))  # type: ignore[arg-type]
    return wishes


async def _shop(shop: Shop, user: User, drops: list[str], rng: random.Random, until_s: float) -> None:
    while time.monotonic() < until_s:
        held = await user.reserve(rng.choice(drops))
        await trio.sleep(rng.uniform(0.05, 0.25))
        if held.made is None:
            continue
        match rng.randrange(3):
            case 0:
                await user.purchase(held.drop_id)
            case 1:
                await user.send("DELETE", f"/reservations/{held.made}/cancel")


async def _troubles(crowd: "Watchers", shop: Shop, drops: list[str]) -> None:
    await trio.sleep(1.5)
    crowd.say("leave")
    drops.append(await shop.new_drop(80))  # those who watch all hear of it
    await trio.sleep(STORM_S - 1.5)


def _slow_commits_down(dsn: str, drop_id: str, until_s: float) -> None:
    """Hold the drop's row again and again, so that a commit takes long: what is told before it is seen to be."""
    with psycopg.connect(dsn) as connection:
        while time.monotonic() < until_s:
            connection.execute("SELECT 1 FROM drops WHERE id = %s FOR UPDATE", (drop_id,))
            time.sleep(0.06)
            connection.commit()
            time.sleep(0.06)


# The viewers ------------------------------------------------------------------------------------------


class Watchers:
    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process

    def say(self, words: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(words.encode())
        self._process.stdin.flush()

    def report(self) -> Report:
        assert self._process.stdout is not None
        return msgspec.msgpack.decode(self._process.stdout.read(), type=Report)


@contextmanager
def watchers(job: Job) -> Iterator[Watchers]:
    """Viewers that are connected and have subscribed."""
    command = [sys.executable, "-m", "tests.proof.watchers"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(msgspec.json.encode(job) + b"\n")
            process.stdin.flush()
            assert process.stdout.readline() == b"ready\n"
            yield Watchers(process)
        finally:
            process.kill()


# The judgement ----------------------------------------------------------------------------------------


class Tables:
    def __init__(self, dsn: str) -> None:
        query = "SELECT *, drop_id::text AS drop, date_part('epoch', at) AS at_s FROM drop_events ORDER BY drop_id, seq"
        self.logs: dict[str, list[checks.Row]] = {}
        for row in checks.rows(dsn, query):
            self.logs.setdefault(row["drop"], []).append(row)
        self.drops = {str(row["id"]): row for row in checks.rows(dsn, "SELECT * FROM drops")}
        self.available: dict[tuple[str, int], int] = {}
        for drop_id, log in self.logs.items():
            available = self.drops[drop_id]["total_stock"]
            for row in log:
                available = available if row["available_stock"] is None else row["available_stock"]
                self.available[drop_id, row["seq"]] = available

    def count(self, type_: str) -> int:
        return sum(row["type"] == type_ for log in self.logs.values() for row in log)


class Heard(msgspec.Struct):
    """One message, as the contract has it."""

    type: str
    seq: int = 0
    event: str = ""
    at: str = ""
    data: dict[str, Any] = {}
    drop: dict[str, Any] = {}

    @property
    def drop_id(self) -> str:
        shape = self.data.get("drop") or self.drop
        return str(self.data.get("dropId") or shape["id"])


_decode = msgspec.json.Decoder(Heard).decode


def _check(report: Report, number: int, wish: Wish, tables: Tables) -> list[str]:
    """What one viewer was told wrongly or not at all, over all its visits."""
    found: list[str] = []
    positions: dict[str, int] = {}
    available: dict[str, int] = {}
    completed: dict[str, int] = {}  # per drop the newest purchase whose PURCHASE_COMPLETED came
    for visit in report.visits[number]:
        who = f"viewer {number} ({wish.kind})"
        if visit.end:
            found.append(f"{who}: closed: {visit.end}")
        shown = dict.fromkeys(visit.resume, True)
        for drop_id, position in visit.resume.items():
            positions[drop_id] = position
        last: dict[tuple[str, str], int] = {}
        for frame in visit.frames:
            message = _decode(report.texts[frame.text])
            if message.type == "error":
                found.append(f"{who}: {message}")
                continue
            drop_id, seq = message.drop_id, message.seq
            where = f"{who}: {message.event or message.type} {seq} of {drop_id}"
            log, before = tables.logs[drop_id], positions.get(drop_id, 0)
            if seq > len(log):
                found.append(f"{where}: not in the table")
                continue
            if seq < before:
                found.append(f"{where}: falls behind {before}")
            if message.type == "snapshot":
                shown[drop_id] = True
                if message.drop["available_stock"] != tables.available[drop_id, seq]:
                    found.append(f"{where}: {message.drop['available_stock']} available")
                available[drop_id], positions[drop_id] = message.drop["available_stock"], seq
                completed[drop_id] = seq
                last = {key: at for key, at in last.items() if key[0] != drop_id}
                continue
            row = log[seq - 1]
            found += [f"{where}: {what}" for what in _untrue(message, row, wish, tables.available[drop_id, seq])]
            if drop_id not in shown and not (wish.drops == "*" and seq == 1):
                found.append(f"{where}: it was never shown the drop")
            shown[drop_id] = True
            if last.get((drop_id, message.event), 0) >= seq:
                found.append(f"{where}: told twice")
            last[drop_id, message.event] = seq
            for missed in log[before : seq - 1]:
                if missed["type"] in TELLING or _is_own(missed, wish):
                    found.append(f"{where}: {missed['type']} {missed['seq']} went unsaid")
            if _is_own(row, wish) and message.event == "STOCK_UPDATED" and (drop_id, "RESERVATION_EXPIRED") not in last:
                found.append(f"{where}: its own expiry went unsaid")
            positions[drop_id] = seq
            if message.event == "PURCHASE_COMPLETED":
                completed[drop_id] = seq
            if message.event == "STOCK_UPDATED":
                available[drop_id] = message.data["availableStock"]
    for drop_id in tables.logs if wish.drops == "*" else wish.drops:
        if positions.get(drop_id) != len(tables.logs[drop_id]):
            found.append(f"viewer {number} ({wish.kind}): ends at {positions.get(drop_id)} of {drop_id}")
        if available.get(drop_id) != tables.drops[drop_id]["available_stock"]:
            found.append(f"viewer {number} ({wish.kind}): ends with {available.get(drop_id)} available of {drop_id}")
        bought = max((row["seq"] for row in tables.logs[drop_id] if row["type"] == "PURCHASED"), default=0)
        if completed.get(drop_id, 0) < bought:
            found.append(f"viewer {number} ({wish.kind}): never heard of purchase {bought} of {drop_id}")
    return found


def _is_own(row: checks.Row, wish: Wish) -> bool:
    return row["type"] == "EXPIRED" and str(row["user_id"]) == wish.user_id


def _untrue(message: Heard, row: checks.Row, wish: Wish, available: int) -> list[str]:
    found = []
    if row["type"] not in TYPES[message.event]:
        found.append(f"it was {row['type']}")
    if abs(datetime.fromisoformat(message.at).timestamp() - row["at_s"]) > 0.0005:
        found.append(f"at {message.at}, not {row['at']}")
    if message.event == "STOCK_UPDATED" and message.data["availableStock"] != available:
        found.append(f"{message.data['availableStock']} available, not {available}")
    if message.event == "RESERVATION_EXPIRED":
        if not _is_own(row, wish):
            found.append("it is another user's alone")
        if message.data["reservationId"] != str(row["reservation_id"]):
            found.append("another reservation")
    if message.event == "ACTIVITY_UPDATED" and message.data["latestPurchasers"][0]["userId"] != str(row["user_id"]):
        found.append("another purchaser")
    return found


def _told_too_early(report: Report) -> list[str]:
    """I11: what a viewer had in its hands, and the tables, asked right then, did not have yet."""
    found = []
    for sample in report.samples:
        for text in sample.texts:
            message = _decode(report.texts[text])
            if message.type != "error" and message.seq > sample.seqs.get(message.drop_id, 0):
                found.append(f"{message} where the tables have {sample.seqs}")
    return found


def _figures(report: Report, tables: Tables) -> str:
    frames, lateness_ms, events = 0, list[float](), 0
    decoded = [_decode(text) for text in report.texts]
    for visits in report.visits[:STEADY]:
        for visit in visits:
            frames += len(visit.frames)
            for frame in visit.frames:
                message = decoded[frame.text]
                if message.type == "event" and not visit.resume:
                    lateness_ms.append((frame.heard_at - datetime.fromisoformat(message.at).timestamp()) * 1000)
    slow = [len(visit.frames) for visits in report.visits[STEADY : STEADY + SLOW] for visit in visits]
    snapshots = sum(
        decoded[frame.text].type == "snapshot"
        for visits in report.visits[STEADY : STEADY + SLOW]
        for visit in visits
        for frame in visit.frames
    )
    events = sum(len(log) for log in tables.logs.values())
    lateness_ms.sort()
    at = [round(lateness_ms[int(len(lateness_ms) * part)], 1) for part in (0.5, 0.99, 0.999)]
    stocks = sum(row["type"] in STOCK for log in tables.logs.values() for row in log)
    told = len({(message.drop_id, message.seq) for message in decoded if message.event == "STOCK_UPDATED"})
    return (
        f"{events} events; {frames} messages to {STEADY} steady viewers, {report.read_bytes / 1e6:.0f} MB in all; "
        f"{told} of {stocks} changes of stock were told, the others conflated; slow ones heard {min(slow)} to"
        f" {max(slow)} messages, {snapshots} of them snapshots; from the decision to the viewer p50 {at[0]} ms,"
        f" p99 {at[1]} ms, p99.9 {at[2]} ms; {len(report.samples)} looks into the tables"
    )
