"""What only the ledger in memory can do: fail on demand, and by chance, the same way each time."""

from collections import Counter
from random import Random

import pytest
import trio
import trio.testing

from engine.ledger import InDoubt, LedgerFault, Rejected, Resolution, StorageFull, Unavailable
from tests.fakes import MemoryLedger, Trouble
from tests.persistence.scribe import Scribe, user


@pytest.fixture
def ledger() -> MemoryLedger:
    return MemoryLedger()


async def born(ledger: MemoryLedger) -> Scribe:
    scribe = Scribe()
    await ledger.commit([scribe.birth()])
    return scribe


@pytest.mark.parametrize(
    ("trouble", "fault"),
    [
        (Trouble.REJECTED, Rejected),
        (Trouble.STORAGE_FULL, StorageFull),
        (Trouble.UNAVAILABLE, Unavailable),
        (Trouble.LOST_BEFORE_COMMIT, InDoubt),
    ],
)
async def test_trouble_comes_once_and_changes_nothing(
    ledger: MemoryLedger, trouble: Trouble, fault: type[LedgerFault], autojump_clock: trio.testing.MockClock
) -> None:
    scribe = await born(ledger)
    scribe.reserves(user())
    batch = [scribe.change()]
    ledger.fail_next(trouble)
    with pytest.raises(fault):
        await ledger.commit(batch)
    assert ledger.tables.drops[scribe.drop_id].seq == 1
    assert await ledger.commit(batch) == {scribe.drop_id}


async def test_a_late_commit_lands_when_its_lock_is_waited_for(
    ledger: MemoryLedger, autojump_clock: trio.testing.MockClock
) -> None:
    scribe = await born(ledger)
    scribe.reserves(user())
    batch = [scribe.change()]
    ledger.fail_next(Trouble.LOST_AND_LATE)
    with pytest.raises(InDoubt):
        await ledger.commit(batch)
    assert ledger.tables.drops[scribe.drop_id].seq == 1, "whoever looks now is wrong"
    assert await ledger.resolve(batch) == {scribe.drop_id: Resolution(True, 2)}


async def test_while_it_is_down_nothing_gets_through(
    ledger: MemoryLedger, autojump_clock: trio.testing.MockClock
) -> None:
    scribe = await born(ledger)
    batch = [scribe.change()]
    ledger.is_down = True
    with pytest.raises(Unavailable):
        await ledger.commit(batch)
    with pytest.raises(Unavailable):
        await ledger.resolve(batch)
    with pytest.raises(Unavailable):
        await ledger.take_over(None)
    ledger.is_down = False
    assert len(await ledger.take_over(None)) == 1


async def test_while_it_is_frozen_nothing_returns(ledger: MemoryLedger, autojump_clock: trio.testing.MockClock) -> None:
    scribe = await born(ledger)
    scribe.reserves(user())
    ledger.freeze()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ledger.commit, [scribe.change()])
        await trio.sleep(1000)
        assert ledger.tables.drops[scribe.drop_id].seq == 1
        ledger.thaw()
    assert ledger.tables.drops[scribe.drop_id].seq == 2


async def troubles(seed: int) -> list[str]:
    chances: dict[Trouble, float] = {trouble: 0.1 for trouble in Trouble if trouble is not Trouble.NONE}
    ledger = MemoryLedger(random=Random(seed), chances=chances)
    met = []
    for _ in range(200):
        try:
            await ledger.commit([Scribe().birth()])
            met.append("committed")
        except LedgerFault as fault:
            met.append(type(fault).__name__)
    return met


async def test_chance_is_seeded(autojump_clock: trio.testing.MockClock) -> None:
    first = await troubles(seed=1)
    assert await troubles(seed=1) == first
    assert await troubles(seed=2) != first
    counted = Counter(first)
    assert counted.keys() == {"committed", "Rejected", "StorageFull", "Unavailable", "InDoubt"}
    assert counted["InDoubt"] > counted["Rejected"]
