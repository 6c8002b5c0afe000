"""Each check is quiet on what the ledger writes, and fires on what it must never write."""

from random import Random

import psycopg
import pytest

from engine.ledger import Change
from engine.model import Hold, UserId
from persistence import audit
from persistence.ledger import open_ledger
from tests.persistence.scribe import HOLD_MS, Scribe, receipt, user
from tests.persistence.subjects import TEST_OPTIONS

# What somebody must have done to the database for the check to fire, on the history that `written` leaves.
# The constraints that would have refused it are dropped first.
VIOLATIONS: dict[str, tuple[str, ...]] = {
    "conservation": ("UPDATE drops SET available_stock = available_stock + 1",),
    "held_count": ("UPDATE drops SET held_count = held_count - 1, available_stock = available_stock + 1",),
    "sold_count": ("UPDATE drops SET sold_count = sold_count - 1, held_count = held_count + 1",),
    "one_active_reservation": (
        "INSERT INTO reservations SELECT gen_random_uuid(), drop_id, user_id, qty, status, created_at, expires_at,"
        " resolved_at, seq FROM reservations WHERE status = 'active'",
    ),
    "purchased_in_time": ("UPDATE purchases SET created_at = created_at + interval '1 hour'",),
    "never_expired_early": ("UPDATE reservations SET resolved_at = created_at WHERE status = 'expired'",),
    "consumed_means_purchased": ("DELETE FROM purchases",),
    "purchased_means_consumed": ("UPDATE reservations SET status = 'cancelled' WHERE status = 'consumed'",),
    "ends_once": (
        "INSERT INTO drop_events SELECT drop_id, seq + 100, epoch, 'CANCELLED', at, reservation_id, user_id, qty,"
        " expires_at, NULL, available_stock, NULL, NULL FROM drop_events WHERE type = 'PURCHASED'",
    ),
    "numbered_without_gap": ("DELETE FROM drop_events WHERE seq = 2",),
    "one_effect_a_key": ("INSERT INTO idempotency_keys SELECT * FROM idempotency_keys",),
    "epochs_never_fall": ("UPDATE drop_events SET epoch = 2 WHERE seq = 2",),
    "time_never_runs_back": ("UPDATE drop_events SET at = at + interval '1 hour' WHERE seq = 2",),
    "stock_replays": ("UPDATE drop_events SET available_stock = available_stock + 1 WHERE seq = 2",),
    "status_replays": ("UPDATE drops SET status = 'paused'",),
    "reservations_replay": ("DELETE FROM reservations WHERE status = 'active'",),
    "ends_replay": ("UPDATE reservations SET status = 'active', resolved_at = NULL WHERE status = 'cancelled'",),
    "purchases_replay": ("UPDATE drop_events SET purchase_id = gen_random_uuid() WHERE type = 'PURCHASED'",),
    "no_orphans": ("DELETE FROM drops",),
}


@pytest.fixture
async def written(database: str) -> str:
    """A database with one drop: one reservation of each fate, one of them kept under a key."""
    scribe, ann = Scribe(), user()
    async with open_ledger(database, TEST_OPTIONS) as ledger:
        await ledger.commit([scribe.birth()])
        active, consumed, cancelled, expired = (scribe.reserves(user()) for _ in range(4))
        await ledger.commit([scribe.change(receipt(ann, "key"))])
        scribe.purchases(consumed)
        scribe.cancels(cancelled)
        scribe.expires(expired)
        assert active
        await ledger.commit([scribe.change()])
    return database


def found(dsn: str) -> set[str]:
    return {result.check.name for result in audit.run(dsn) if not result.holds}


async def test_what_the_ledger_writes_is_clean(written: str) -> None:
    assert found(written) == set()


def test_an_empty_database_is_clean(database: str) -> None:
    assert found(database) == set()


def test_every_check_has_a_violation_to_prove_it() -> None:
    assert VIOLATIONS.keys() == {check.name for check in audit.CHECKS}


@pytest.mark.parametrize("name", VIOLATIONS)
async def test_the_check_fires(written: str, name: str) -> None:
    with psycopg.connect(written) as connection:
        drop_constraints(connection)
        for statement in VIOLATIONS[name]:
            assert connection.execute(statement.encode()).rowcount > 0
    results = {result.check.name: result for result in audit.run(written)}
    assert results[name].count > 0
    assert results[name].rows


def drop_constraints(connection: psycopg.Connection[tuple[object, ...]]) -> None:
    """All of them, so that the audit is all that is left."""
    constraints = connection.execute(
        "SELECT format('ALTER TABLE %s DROP CONSTRAINT IF EXISTS %I CASCADE', conrelid::regclass, conname)"
        " FROM pg_constraint WHERE connamespace = 'public'::regnamespace AND contype <> 'n'"
    ).fetchall()
    for (statement,) in constraints:
        connection.execute(str(statement).encode())
    connection.execute("DROP INDEX uq_reservations_active")


async def test_many_violations_are_counted_and_few_are_shown(database: str) -> None:
    scribes = [Scribe() for _ in range(audit.ROWS_SHOWN_MAX + 5)]
    async with open_ledger(database, TEST_OPTIONS) as ledger:
        await ledger.commit([scribe.birth() for scribe in scribes])
    with psycopg.connect(database) as connection:
        connection.execute("UPDATE drops SET status = 'paused'")
    (result,) = [result for result in audit.run(database) if not result.holds]
    assert result.check.name == "status_replays"
    assert result.count == audit.ROWS_SHOWN_MAX + 5
    assert len(result.rows) == audit.ROWS_SHOWN_MAX


@pytest.mark.parametrize("seed", range(3))
async def test_a_random_history_is_clean(database: str, seed: int) -> None:
    random = Random(seed)
    scribes = [Scribe(total=20) for _ in range(4)]
    players = [Player(random, scribe) for scribe in scribes]
    async with open_ledger(database, TEST_OPTIONS) as ledger:
        await ledger.commit([scribe.birth() for scribe in scribes])
        for step in range(60):
            batch = [player.plays(step * 1000) for player in players if random.random() < 0.7]
            random.shuffle(batch)
            hit = await ledger.commit(batch)
            assert hit == {change.drop_id for change in batch}, f"seed {seed}"
            if random.random() < 0.1:
                for record in await ledger.take_over(None):
                    scribe = next(scribe for scribe in scribes if scribe.drop_id == record.terms.id)
                    scribe.epoch = record.epoch
                    holds = next(player.holds for player in players if player.scribe is scribe)
                    assert sorted(record.holds, key=id_of) == sorted(holds.values(), key=id_of), f"seed {seed}"
                    assert record.available_stock == scribe.available, f"seed {seed}"
    assert found(database) == set(), f"seed {seed}"


def id_of(hold: Hold) -> str:
    return hold.id


class Player:
    """Makes random changes of one drop that its rules allow."""

    def __init__(self, random: Random, scribe: Scribe) -> None:
        self.random = random
        self.scribe = scribe
        self.users = [user() for _ in range(15)]
        self.holds: dict[UserId, Hold] = {}
        self.keys = 0

    def plays(self, ms: int) -> Change:
        for _ in range(self.random.randrange(8)):
            self.play_once(ms)
        if self.random.random() < 0.3:
            self.keys += 1
            return self.scribe.change(receipt(self.users[0], f"key {self.keys}"))
        return self.scribe.change()

    def play_once(self, ms: int) -> None:
        due = [hold for hold in self.holds.values() if hold.expires_at - hold.created_at <= ms - self.began(hold)]
        if due:
            self.scribe.expires(self.forget(due[0]), ms=ms)
            return
        who = self.random.choice(self.users)
        if who in self.holds:
            hold = self.forget(self.holds[who])
            if self.random.random() < 0.5:
                self.scribe.purchases(hold, ms=ms)
            else:
                self.scribe.cancels(hold, ms=ms)
        elif self.scribe.available >= 2:
            hold_ms = self.random.choice([1000, 5000, HOLD_MS])
            self.holds[who] = self.scribe.reserves(who, ms=ms, qty=self.random.choice([1, 2]), hold_ms=hold_ms)

    def began(self, hold: Hold) -> int:
        return hold.created_at - self.scribe.terms.created_at

    def forget(self, hold: Hold) -> Hold:
        return self.holds.pop(hold.user_id)
