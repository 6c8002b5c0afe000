"""A few faults of one kind each, chosen so that what they could break is broken within seconds.

`test_faults` draws from all kinds, at random and by the hundred; here a bug has nowhere else to go. What each of these
catches is shown by setting it loose (`tests.proof.canaries`).
"""

import random
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final

import pytest
import trio

from tests.proof.conftest import Postgres
from tests.proof.faults.campaign import BRIEF_S, campaign, world
from tests.proof.faults.tally import Sort, Tally
from tests.proof.faults.troubles import Trouble, World, cut, freeze_backend, stop_immediately
from tests.proof.history import Ending
from tests.proof.proxy import Fault, Proxy

# The WAL writer sleeps for ten seconds, and is woken by nothing that these tests write: what is in the log's file
# after an immediate stop is what a commit has put there itself.
LAZY: Final = {"wal_writer_delay": "10s", "wal_writer_flush_after": "1GB"}

SLOW_S: Final = (0.3, 0.45)  # past the stall, and within the time limit of a commit: `campaign.LIMITS`
LEARNT_MAX_S: Final = 5.0  # that an engine may take to learn what it has lost, with buyers at its door


def judge(tally: Tally) -> None:
    print(tally.text())
    assert tally.violation_count == 0, "\n".join(tally.violations)
    assert tally.endings[Ending.OK] > 0


def cuts(faults: dict[Fault, int], rng: random.Random) -> list[Trouble]:
    drawn = [fault for fault, times in faults.items() for _ in range(times)]
    rng.shuffle(drawn)
    return [Trouble(Sort.CUT, fault.name, partial(cut, fault)) for fault in drawn]


async def test_commits_that_come_late_are_known_before_anybody_is_answered(
    postgres: Postgres, proxy: Proxy, tmp_path: Path, seed: int
) -> None:
    """The batch, or its end, reaches the server when the engine has asked already what became of it."""
    with world(postgres, tmp_path, seed, proxy=proxy) as found:
        late = cuts({Fault.LATE: 4, Fault.LATE_END: 4}, found.rng)
        judge(await campaign(found, late, seed=seed, pause_s=BRIEF_S))


async def test_a_key_and_its_effect_come_and_go_together(
    postgres: Postgres, proxy: Proxy, tmp_path: Path, seed: int
) -> None:
    """Whichever commit it is whose connection breaks."""
    with world(postgres, tmp_path, seed, proxy=proxy) as found:
        broken = cuts({Fault.CUT_BEFORE: 6, Fault.RESET_BEFORE: 4}, found.rng)
        judge(await campaign(found, broken, seed=seed, pause_s=BRIEF_S))


async def test_commits_that_take_long_happen_once_or_are_said_not_to_be_known(
    postgres: Postgres, proxy: Proxy, tmp_path: Path, seed: int
) -> None:
    """Longer than a stall, shorter or longer than the time limit; some have happened before the engine hears of it."""
    with world(postgres, tmp_path, seed, proxy=proxy) as found:
        slow = partial(cut, Fault.DELAYED, delay_s=SLOW_S)
        troubles = [
            *[Trouble(Sort.DATABASE, "freeze_backend", freeze_backend)] * 3,
            *[Trouble(Sort.DELAY, Fault.DELAYED.name, slow)] * 4,
        ]
        judge(await campaign(found, troubles, seed=seed))


async def usurp_while_frozen(world: World) -> None:
    """An engine stands still, loses its lock, and another one takes every drop over; then it goes on, and learns it."""
    frozen, other = world.engines
    heard = world.crowd.recorder.operations
    before = len(heard)
    frozen.signal(signal.SIGSTOP)
    try:
        holder = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted"
        await world.query(f"SELECT pg_terminate_backend(pid) FROM ({holder}) AS lock")
        await trio.to_thread.run_sync(other.start)
    finally:
        frozen.signal(signal.SIGCONT)
    with trio.move_on_after(LEARNT_MAX_S):
        while not any(operation.code == "DROP_OWNED_ELSEWHERE" for operation in heard[before:]):
            await trio.sleep(0.02)
    await world.pause(0.5, 1.0)


async def test_an_engine_that_slept_while_another_took_its_drops_lets_them_go(
    postgres: Postgres, tmp_path: Path, seed: int
) -> None:
    with world(postgres, tmp_path, seed, engines=2) as found:
        trouble = Trouble(Sort.ENGINE, "usurp_while_frozen", usurp_while_frozen)
        tally = await campaign(found, [trouble], seed=seed, is_contested=True, is_clock_true=False)
    judge(tally)
    assert tally.codes["DROP_OWNED_ELSEWHERE"] > 0


@pytest.fixture
def lazy_postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    own = Postgres(tmp_path_factory.mktemp("lazy"), **LAZY)
    own.start()
    try:
        own.make_template()
        yield own
    finally:
        own.stop()


async def test_a_server_that_writes_lazily_and_is_restarted_loses_nothing(
    lazy_postgres: Postgres, tmp_path: Path, seed: int
) -> None:
    """Every commit has written its own WAL before it is acknowledged, and the answer comes after that."""
    with world(lazy_postgres, tmp_path, seed) as found:
        stops = [Trouble(Sort.DATABASE, "stop_immediately", stop_immediately)] * 2
        judge(await campaign(found, stops, seed=seed))
