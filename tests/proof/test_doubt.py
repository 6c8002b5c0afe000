"""Commits whose answer gets lost: whoever waits is told the truth, or that it is not known, and never a guess.

A proxy breaks the connection at the commit itself, before and after and in between; then the server's own processes
are ended, killed, frozen and stopped under the engine. The short time limits are for the test's own good.
"""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable

import trio

from tests.proof import checks
from tests.proof.clients import Exchange, Shop, User, answered, new_key
from tests.proof.conftest import Postgres, StartEngine, bugs_in, wait_for
from tests.proof.proxy import Fault, Proxy

CUTS = {
    Fault.CUT_BEFORE: 16,
    Fault.CUT_AFTER: 16,
    Fault.RESET_BEFORE: 14,
    Fault.RESET_AFTER: 14,
    Fault.LATE: 9,
    Fault.UNENDED: 7,
    Fault.LATE_END: 7,
    Fault.SILENT_BEFORE: 5,
    Fault.SILENT_AFTER: 5,
    Fault.DELAYED: 5,
    Fault.SLICED: 2,
}
SHORT = {"COMMIT_STALL_MS": "150", "COMMIT_TIMEOUT_MS": "400", "ANSWER_TIMEOUT_MS": "300"}
SETTLED_S = 0.4 + 1.5  # a silent connection is given up after the commit's time limit, and then it is looked up
UNITS = 500


class Buyer:
    """A user who reserves, buys, reserves again, each under a key of its own."""

    def __init__(self, user: User, drop_id: str) -> None:
        self.user = user
        self._drop_id = drop_id
        self._holds = False

    async def ask(self, into: list[Exchange]) -> None:
        act = self.user.purchase if self._holds else self.user.reserve
        into.append(await act(self._drop_id, new_key()))

    async def settle(self, first: Exchange) -> None:
        """Ask again until it is decided; the answer must be yes, and the first one's if there was one."""
        last = await self.user.settled(first)
        assert last.status == 201, (first, last)
        if first.status == 201:
            assert last.answer is not None
            assert first.answer is not None
            assert last.answer.is_replayed
            assert last.answer.body == first.answer.body
        self._holds = last.operation == "reserve"


def is_truthful(exchange: Exchange) -> bool:
    """Nothing that was asked here has a reason to be refused."""
    if exchange.status == 201:
        return True
    assert exchange.answer is not None, exchange
    return (
        exchange.status == 503
        and exchange.code in ("DATABASE_UNAVAILABLE", "OUTCOME_UNKNOWN")
        and "retry-after" in exchange.answer.headers
    )


async def test_a_hundred_cuts_at_the_commit_leave_nobody_with_a_guess(
    postgres: Postgres,
    database: str,
    proxy: Proxy,
    engine: StartEngine,
    rng: random.Random,
    record_property: Callable[[str, object], None],
) -> None:
    server = engine(proxy.dsn(database), **SHORT)
    shop = Shop(server.port)
    drop_ids = [await shop.new_drop(UNITS) for _ in range(2)]
    buyers = [Buyer(user, drop_ids[number % 2]) for number, user in enumerate(await shop.users(4))]
    faults = [fault for fault, times in CUTS.items() for _ in range(times)]
    rng.shuffle(faults)
    heard: Counter[str] = Counter()
    took_s: dict[Fault, list[float]] = {}

    for fault in faults:
        first: list[Exchange] = []
        began = time.monotonic()
        strike = proxy.strike(fault, delay_s=rng.uniform(0.05, 0.3))
        async with trio.open_nursery() as nursery:
            for buyer in buyers:
                nursery.start_soon(buyer.ask, first)
        assert strike.struck.is_set(), fault
        assert all(is_truthful(exchange) for exchange in first), (fault, first)
        heard.update(f"{fault.name} {exchange.code or 201}" for exchange in first)
        if fault in (Fault.LATE, Fault.LATE_END) and rng.random() < 0.7:
            # What comes late comes before the retry, and finds the drop as the batch had left it.
            assert await trio.to_thread.run_sync(strike.over.wait, 5), fault
        nothing_happened = [exchange.key for exchange in first if exchange.is_fault]
        kept = "SELECT count(*) FROM idempotency_keys WHERE key = ANY(%s)"
        assert checks.number(database, kept, nothing_happened) == 0, (fault, first)
        by_id = {exchange.user_id: exchange for exchange in first}
        async with trio.open_nursery() as nursery:
            for buyer in buyers:
                nursery.start_soon(buyer.settle, by_id[buyer.user.id])
        took_s.setdefault(fault, []).append(time.monotonic() - began)
        assert await trio.to_thread.run_sync(strike.over.wait, 5), fault

    assert len(faults) == 100
    assert checks.violations(database) == []
    assert shop.history.unresolved() == []
    assert checks.lost_or_made_up(database, shop.history) == []
    assert checks.dishonest(database, shop.history) == []
    assert bugs_in(server) == []
    for fault, times in took_s.items():
        codes = {name.split()[1]: count for name, count in sorted(heard.items()) if name.split()[0] == fault.name}
        print(f"{fault.name:14} {codes}; settled after {max(times):.2f} s at most")
    slowest = max(map(max, took_s.values()))
    record_property("settled_max_s", round(slowest, 3))
    assert slowest < SETTLED_S
    assert any("OUTCOME_UNKNOWN" in name for name in heard), "nobody was told that it is not known"


async def test_cuts_at_the_birth_of_a_drop_make_it_once_or_not_at_all(
    database: str, proxy: Proxy, engine: StartEngine
) -> None:
    server = engine(proxy.dsn(database), **SHORT)
    shop = Shop(server.port)
    (user,) = await shop.users(1)
    made: set[str] = set()
    for fault in Fault:
        strike = proxy.strike(fault, delay_s=0.1)
        key = new_key()
        body = b'{"name": "Air", "price": 1, "total_stock": 5, "status": "live"}'
        first = await user.send("POST", "/drops", key=key, body=body)
        assert strike.struck.is_set()
        assert first.code in ("", "DATABASE_UNAVAILABLE", "OUTCOME_UNKNOWN"), (fault, first)
        answer = first
        with trio.fail_after(20):
            while answer.status == 503 or answer is first:
                answer = await user.send("POST", "/drops", key=key, body=body)
        assert answer.status == 201
        if first.status == 201:
            assert answer.body == first.body
        made.add(answer.data["id"])
        assert await trio.to_thread.run_sync(strike.over.wait, 5), fault
    assert {str(row["id"]) for row in checks.rows(database, "SELECT id FROM drops")} == made
    assert checks.violations(database) == []
    assert bugs_in(server) == []


async def test_ended_killed_and_frozen_backends_and_a_stopped_server_lose_nothing(
    postgres: Postgres, database: str, engine: StartEngine, rng: random.Random
) -> None:
    server = engine(database, **SHORT)
    shop = Shop(server.port)
    drop_id = await shop.new_drop(1_000_000)
    users = await shop.users(20)

    def terminate() -> None:  # several times, since most hit between two commits
        for _ in range(8):
            postgres.terminate(database, postgres.writer(database))
            wait_for(lambda: len(postgres.backends(database)) == 1)
            time.sleep(rng.uniform(0, 0.02))

    def kill() -> None:  # the postmaster then restarts all of its processes
        os.kill(postgres.writer(database), signal.SIGKILL)

    def freeze() -> None:
        pid = postgres.writer(database)
        os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(rng.uniform(0.2, 1.0))  # past the stall in most cases, past the time limit in many
        finally:
            os.kill(pid, signal.SIGCONT)

    def stop_immediately() -> None:
        postgres.stop_immediately()
        postgres.start()

    async def shop_on(user: User) -> None:
        while not is_over.is_set():
            held = await user.settled(await user.reserve(drop_id, new_key()))
            assert held.status == 201, held
            bought = await user.settled(await user.purchase(drop_id, new_key()))
            assert bought.status == 201, bought

    for trouble in (terminate, freeze, kill, freeze, stop_immediately, kill, terminate):
        is_over = trio.Event()
        asked_before = len(shop.history.exchanges)
        async with trio.open_nursery() as nursery:
            for user in users:
                nursery.start_soon(shop_on, user)
            await trio.sleep(rng.uniform(0.05, 0.2))
            await trio.to_thread.run_sync(trouble)
            await _works(shop, drop_id)
            is_over.set()
        told = shop.history.exchanges[asked_before:]
        codes = dict(sorted(Counter(exchange.code or "201" for exchange in told).items()))
        print(f"{trouble.__name__:16} {codes}; longest answer {max(exchange.took_s for exchange in told):.2f} s")
        assert all(is_truthful(exchange) for exchange in told if exchange.status != 201), trouble.__name__

    assert shop.history.unresolved() == []
    assert checks.violations(database) == []
    assert checks.lost_or_made_up(database, shop.history) == []
    assert bugs_in(server) == []


async def _works(shop: Shop, drop_id: str) -> None:
    user = shop.user()
    await answered(lambda: user.reserve(drop_id, "works"), lambda exchange: exchange.status == 201)
