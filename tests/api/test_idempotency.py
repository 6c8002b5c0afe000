"""The book of keys by itself: the ledger and the engine behind it are played by the test."""

import random

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from api import idempotency
from api.errors import ApiError
from api.idempotency import HashFilter, KeyBook, KeyId, Replayed
from api.promises import Errands, Promise, in_trio
from engine.ledger import Unavailable
from engine.model import (
    Decision,
    Fault,
    FaultCode,
    Outcome,
    Receipt,
    RefusalCode,
    Refused,
    Reply,
    StoredAnswer,
    StoredReceipt,
    Swept,
    UserId,
)

ANN, BEN = UserId("ann"), UserId("ben")
KEY: KeyId = (ANN, "reserve", "k")
ONE, OTHER = idempotency.fingerprint(b"drop-1"), idempotency.fingerprint(b"drop-2")
OUT_OF_STOCK = Refused(RefusalCode.OUT_OF_STOCK, 7)
DONE = Swept(1, 8)
PATIENCE_S = 5.0
KEEP_S = 86_400.0

Result = Outcome | Replayed | StoredAnswer


def render(decision: Decision) -> StoredAnswer:
    return StoredAnswer(409 if isinstance(decision, Refused) else 201, repr(decision).encode())


class Ledger:
    """Receipts by key; `looked` is what was asked for. While `is_down` it is out of reach, until `open` it is slow."""

    def __init__(self) -> None:
        self.receipts: dict[KeyId, StoredReceipt] = {}
        self.looked: list[KeyId] = []
        self.is_down = False
        self.open = trio.Event()
        self.open.set()

    async def find(self, user_id: UserId, operation: str, key: str) -> StoredReceipt | None:
        self.looked.append((user_id, operation, key))
        await self.open.wait()
        await trio.lowlevel.checkpoint()
        if self.is_down:
            raise Unavailable("the test took it away")
        return self.receipts.get((user_id, operation, key))

    def store(self, key: KeyId, fingerprint: bytes, answer: StoredAnswer) -> None:
        self.receipts[key] = StoredReceipt(*key, fingerprint, answer, created_at=0)  # type: ignore[arg-type]


class Engine:
    """Takes commands and decides when the test says so."""

    def __init__(self, ledger: Ledger) -> None:
        self.asked: list[tuple[Reply, Receipt]] = []
        self._ledger = ledger

    def ask(self, reply: Reply, receipt: Receipt | None) -> None:
        assert receipt is not None
        self.asked.append((reply, receipt))

    def decide(self, decision: Decision) -> None:
        """As an actor does: render and store with the decision, answer after the commit."""
        reply, receipt = self.asked.pop(0)
        key = (receipt.user_id, receipt.operation, receipt.key)
        self._ledger.store(key, receipt.fingerprint, receipt.render(decision))
        reply(decision)

    def refuse(self, outcome: Outcome) -> None:
        """Answer without having decided."""
        reply, _ = self.asked.pop(0)
        reply(outcome)

    def decide_and_fail(self, decision: Decision, code: FaultCode) -> None:
        """Decide, and fail to commit."""
        reply, receipt = self.asked.pop(0)
        receipt.render(decision)
        reply(Fault(code))


class Desk:
    """A book, what it works with, and callers of it."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.engine = Engine(self.ledger)
        self.book = KeyBook(self._find, KEEP_S)
        self._errands: Errands | None = None

    def work_in(self, nursery: trio.Nursery) -> None:
        self._errands = Errands(nursery)

    def _find(self, *key: *KeyId) -> Promise[StoredReceipt | None]:
        assert self._errands is not None, "no nursery yet"
        return self._errands.run(lambda: self.ledger.find(*key))

    async def once(self, key: KeyId = KEY, fingerprint: bytes = ONE) -> Result:
        """As a handler in a Trio task asks: with an end to its patience."""
        with trio.move_on_after(PATIENCE_S):
            return await in_trio(self.book.once(key, fingerprint, self.engine.ask, render))
        return Fault(FaultCode.UNKNOWN)

    async def call(self, into: list[Result | str], key: KeyId = KEY, fingerprint: bytes = ONE) -> None:
        """`once` in a task of its own; an error is put down by its code."""
        try:
            into.append(await self.once(key, fingerprint))
        except ApiError as failure:
            into.append(failure.code)
        except Unavailable:
            into.append("Unavailable")

    async def ask_and_decide(self, decision: Decision, key: KeyId = KEY) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.call, [], key)
            await wait_all_tasks_blocked()
            self.engine.decide(decision)


@pytest.fixture
async def desk(nursery: trio.Nursery) -> Desk:
    desk = Desk()
    desk.work_in(nursery)
    return desk


# The first ----------------------------------------------------------------------------------------------


async def test_first_use_of_a_key_asks_the_engine_and_no_ledger(desk: Desk) -> None:
    results: list[Result | str] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(desk.call, results)
        await wait_all_tasks_blocked()
        _, receipt = desk.engine.asked[0]
        assert (receipt.user_id, receipt.operation, receipt.key, receipt.fingerprint) == (ANN, "reserve", "k", ONE)
        desk.engine.decide(DONE)

    assert results == [render(DONE)]
    assert desk.ledger.looked == []


async def test_retry_gets_the_stored_answer_again(desk: Desk) -> None:
    await desk.ask_and_decide(DONE)

    assert await desk.once() == Replayed(render(DONE))
    assert desk.engine.asked == []
    assert desk.ledger.looked == [KEY]


async def test_refusal_that_the_engine_decided_is_an_answer_too(desk: Desk) -> None:
    await desk.ask_and_decide(OUT_OF_STOCK)

    assert await desk.once() == Replayed(render(OUT_OF_STOCK))


async def test_other_users_operations_and_keys_are_other_keys(desk: Desk) -> None:
    results: list[Result | str] = []
    keys = [KEY, (BEN, "reserve", "k"), (ANN, "purchase", "k"), (ANN, "reserve", "K")]
    async with trio.open_nursery() as nursery:
        for key in keys:
            nursery.start_soon(desk.call, results, key, OTHER if key[0] is BEN else ONE)
        await wait_all_tasks_blocked()
        assert len(desk.engine.asked) == 4
        for _ in keys:
            desk.engine.decide(DONE)

    assert results == [render(DONE)] * 4


# Retries at the same time -------------------------------------------------------------------------------


async def test_retries_wait_for_the_first_and_get_its_answer(desk: Desk) -> None:
    results: list[Result | str] = []
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(desk.call, results)
        await wait_all_tasks_blocked()
        assert len(desk.engine.asked) == 1
        assert results == []
        desk.engine.decide(DONE)

    assert sorted(map(repr, results)) == sorted(map(repr, [render(DONE), *[Replayed(render(DONE))] * 2]))


async def test_other_request_with_the_key_of_a_running_one_is_refused_at_once(desk: Desk) -> None:
    results: list[Result | str] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(desk.call, results)
        await wait_all_tasks_blocked()
        nursery.start_soon(desk.call, results, KEY, OTHER)
        await wait_all_tasks_blocked()
        assert results == ["IDEMPOTENCY_KEY_REUSED"]
        desk.engine.decide(DONE)

    assert results[1:] == [render(DONE)]


async def test_other_request_with_a_used_key_is_refused(desk: Desk) -> None:
    await desk.ask_and_decide(DONE)

    with pytest.raises(ApiError) as caught:
        await desk.once(fingerprint=OTHER)
    assert (caught.value.status_code, caught.value.code) == (422, "IDEMPOTENCY_KEY_REUSED")
    assert await desk.once() == Replayed(render(DONE))


async def test_retry_is_not_refused_because_of_a_wrong_request_that_is_looking_at_the_same_time(desk: Desk) -> None:
    await desk.ask_and_decide(DONE)
    desk.ledger.open = trio.Event()
    wrong: list[Result | str] = []
    right: list[Result | str] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(desk.call, wrong, KEY, OTHER)
        await wait_all_tasks_blocked()
        nursery.start_soon(desk.call, right, KEY, ONE)
        await wait_all_tasks_blocked()
        desk.ledger.open.set()

    assert (wrong, right) == (["IDEMPOTENCY_KEY_REUSED"], [Replayed(render(DONE))])


async def test_other_request_that_waited_for_a_look_up_is_refused_by_what_became_of_it(desk: Desk) -> None:
    desk.book.learn([KEY])  # by a hash that means nothing: the ledger has no such key
    desk.ledger.open = trio.Event()
    results: list[Result | str] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(desk.call, results, KEY, ONE)
        await wait_all_tasks_blocked()
        nursery.start_soon(desk.call, results, KEY, OTHER)
        await wait_all_tasks_blocked()
        desk.ledger.open.set()
        await wait_all_tasks_blocked()
        assert len(desk.engine.asked) == 1
        desk.engine.decide(DONE)

    assert sorted(map(repr, results)) == sorted(map(repr, [render(DONE), "IDEMPOTENCY_KEY_REUSED"]))


async def test_many_retries_of_an_old_key_all_get_its_answer(desk: Desk) -> None:
    await desk.ask_and_decide(DONE)
    results: list[Result | str] = []
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(desk.call, results)

    assert results == [Replayed(render(DONE))] * 5
    assert desk.engine.asked == []
    assert desk.ledger.looked == [KEY], "one look is for all"


async def test_retries_beyond_a_bound_do_not_wait(desk: Desk) -> None:
    results: list[Result | str] = []
    async with trio.open_nursery() as nursery:
        for _ in range(1 + idempotency.RETRIES_MAX):
            nursery.start_soon(desk.call, results)
        await wait_all_tasks_blocked()
        for _ in range(2):
            nursery.start_soon(desk.call, results)
        await wait_all_tasks_blocked()
        assert results == ["OUTCOME_UNKNOWN"] * 2
        desk.engine.decide(DONE)

    assert results.count(Replayed(render(DONE))) == idempotency.RETRIES_MAX


# Faults -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [FaultCode.OVERLOADED, FaultCode.UNAVAILABLE, FaultCode.RESTARTING])
async def test_fault_is_told_and_not_kept(desk: Desk, code: FaultCode) -> None:
    results: list[Result | str] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(desk.call, results)
        await wait_all_tasks_blocked()
        desk.engine.refuse(Fault(code))
        await wait_all_tasks_blocked()
        nursery.start_soon(desk.call, results)
        await wait_all_tasks_blocked()
        desk.engine.decide(DONE)

    assert results == [Fault(code), render(DONE)]
    # A refusal for want of room must not make its retry dearer than it was.
    assert desk.ledger.looked == ([KEY] if code in idempotency.STUMBLED else [])


async def test_decision_whose_commit_failed_is_a_fault_and_not_an_answer(desk: Desk) -> None:
    results: list[Result | str] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(desk.call, results)
        await wait_all_tasks_blocked()
        desk.engine.decide_and_fail(DONE, FaultCode.UNAVAILABLE)

    assert results == [Fault(FaultCode.UNAVAILABLE)]


async def test_retry_that_waited_for_a_fault_becomes_the_first(desk: Desk) -> None:
    results: list[Result | str] = []
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(desk.call, results)
        await wait_all_tasks_blocked()
        desk.engine.refuse(Fault(FaultCode.OVERLOADED))
        await wait_all_tasks_blocked()
        assert len(desk.engine.asked) == 1
        desk.engine.decide(DONE)

    assert results[0] == Fault(FaultCode.OVERLOADED)
    assert sorted(map(repr, results[1:])) == sorted(map(repr, [render(DONE), Replayed(render(DONE))]))


async def test_unknown_drop_is_told_and_not_kept(desk: Desk) -> None:
    not_found = Refused(RefusalCode.DROP_NOT_FOUND, 0)
    results: list[Result | str] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(desk.call, results)
        await wait_all_tasks_blocked()
        desk.engine.refuse(not_found)
        await wait_all_tasks_blocked()
        nursery.start_soon(desk.call, results)
        await wait_all_tasks_blocked()
        desk.engine.decide(DONE)

    assert results == [not_found, render(DONE)]
    assert desk.ledger.looked == []


async def test_key_that_made_a_drop_stumble_is_looked_up_next_time(desk: Desk) -> None:
    # The ledger has it, from another server: we did not know, and the drop's part was rejected.
    desk.ledger.store(KEY, ONE, render(DONE))
    results: list[Result | str] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(desk.call, results)
        await wait_all_tasks_blocked()
        desk.engine.refuse(Fault(FaultCode.RESTARTING))

    assert results == [Fault(FaultCode.RESTARTING)]
    assert await desk.once() == Replayed(render(DONE))


# Doubt --------------------------------------------------------------------------------------------------


async def test_outcome_that_does_not_come_is_unknown_and_the_key_stays_taken(
    desk: Desk, autojump_clock: MockClock
) -> None:
    began = trio.current_time()
    assert await desk.once() == Fault(FaultCode.UNKNOWN)
    assert trio.current_time() - began == pytest.approx(PATIENCE_S)

    # The retry does not ask again, and waits as long as anybody.
    assert await desk.once() == Fault(FaultCode.UNKNOWN)
    assert len(desk.engine.asked) == 1


async def test_retry_after_an_unknown_outcome_gets_the_answer_once_the_engine_tells_it(
    desk: Desk, autojump_clock: MockClock
) -> None:
    assert await desk.once() == Fault(FaultCode.UNKNOWN)
    results: list[Result | str] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(desk.call, results)
        await wait_all_tasks_blocked()
        desk.engine.decide(DONE)

    assert results == [Replayed(render(DONE))]
    assert await desk.once() == Replayed(render(DONE))


async def test_retry_after_an_unknown_outcome_that_did_not_happen_is_the_first(
    desk: Desk, autojump_clock: MockClock
) -> None:
    assert await desk.once() == Fault(FaultCode.UNKNOWN)
    desk.engine.refuse(Fault(FaultCode.UNAVAILABLE))

    async with trio.open_nursery() as nursery:
        results: list[Result | str] = []
        nursery.start_soon(desk.call, results)
        await wait_all_tasks_blocked()
        desk.engine.decide(DONE)

    assert results == [render(DONE)]


async def test_caller_that_goes_away_takes_nothing_back(desk: Desk, autojump_clock: MockClock) -> None:
    with trio.move_on_after(1) as gone:
        await desk.once()
    assert gone.cancelled_caught

    desk.engine.decide(DONE)

    assert await desk.once() == Replayed(render(DONE))


# Looking up ---------------------------------------------------------------------------------------------


async def test_key_of_an_earlier_run_is_found_in_the_ledger(desk: Desk) -> None:
    desk.ledger.store(KEY, ONE, render(DONE))
    desk.book.learn([KEY])

    assert await desk.once() == Replayed(render(DONE))


async def test_key_that_is_known_but_not_in_the_ledger_is_used_for_the_first_time(desk: Desk) -> None:
    desk.book.learn([KEY])
    results: list[Result | str] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(desk.call, results)
        await wait_all_tasks_blocked()
        desk.engine.decide(DONE)

    assert results == [render(DONE)]
    assert desk.ledger.looked == [KEY]


async def test_when_the_ledger_cannot_be_asked_nothing_happens_and_the_key_is_free_again(desk: Desk) -> None:
    await desk.ask_and_decide(DONE)
    desk.ledger.is_down = True
    results: list[Result | str] = []
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(desk.call, results)
    assert results == ["Unavailable", "Unavailable"]
    assert desk.engine.asked == []

    desk.ledger.is_down = False
    assert await desk.once() == Replayed(render(DONE))


async def test_look_up_that_hangs_is_given_up_and_the_key_is_free_again(desk: Desk, autojump_clock: MockClock) -> None:
    await desk.ask_and_decide(DONE)
    desk.ledger.open = trio.Event()

    assert await desk.once() == Fault(FaultCode.UNKNOWN)

    desk.ledger.open.set()
    assert await desk.once() == Replayed(render(DONE))
    assert desk.engine.asked == []


async def test_caller_that_goes_away_while_looking_leaves_the_key_to_the_next(
    desk: Desk, autojump_clock: MockClock
) -> None:
    await desk.ask_and_decide(DONE)
    desk.ledger.open = trio.Event()
    results: list[Result | str] = []
    async with trio.open_nursery() as nursery:
        with trio.move_on_after(1):
            nursery.start_soon(desk.call, results)
            await trio.sleep_forever()
        with trio.move_on_after(1) as gone:
            await desk.once()
        assert gone.cancelled_caught
        desk.ledger.open.set()

    assert results == [Replayed(render(DONE))]


# Generations --------------------------------------------------------------------------------------------


async def test_key_is_remembered_for_at_least_its_time_and_forgotten_after_twice_that(
    desk: Desk, autojump_clock: MockClock
) -> None:
    desk.book.learn([KEY])
    desk.ledger.store(KEY, ONE, render(DONE))

    await trio.sleep(KEEP_S + 1)
    desk.book.learn([(BEN, "reserve", "1")])
    assert await desk.once() == Replayed(render(DONE))

    await trio.sleep(KEEP_S - 10)
    desk.book.learn([(BEN, "reserve", "2")])
    assert await desk.once() == Replayed(render(DONE))
    assert desk.ledger.looked == [KEY, KEY]


async def test_forgotten_key_is_a_new_key_to_the_book(desk: Desk, autojump_clock: MockClock) -> None:
    desk.book.learn([KEY])
    for number in range(2):
        await trio.sleep(KEEP_S + 1)
        desk.book.learn([(BEN, "reserve", str(number))])

    await desk.ask_and_decide(DONE)

    assert desk.ledger.looked == []


async def test_key_learned_late_in_a_generation_outlives_it(desk: Desk, autojump_clock: MockClock) -> None:
    await trio.sleep(KEEP_S - 1)
    desk.book.learn([KEY])
    await trio.sleep(2)
    desk.book.learn([(BEN, "reserve", "1")])
    await trio.sleep(KEEP_S - 5)
    desk.book.learn([(BEN, "reserve", "2")])

    desk.ledger.store(KEY, ONE, render(DONE))
    assert await desk.once() == Replayed(render(DONE))


# Fingerprints -------------------------------------------------------------------------------------------


def test_fingerprint_depends_on_every_part_and_on_where_it_ends() -> None:
    prints = [
        idempotency.fingerprint(*parts)
        for parts in [(), (b"",), (b"ab",), (b"a", b"b"), (b"", b"ab"), (b"ab", b""), (b"ba",)]
    ]

    assert len(set(prints)) == 7
    assert idempotency.fingerprint(b"ab") == idempotency.fingerprint(b"ab")
    assert {len(made) for made in prints} == {32}


def test_hashes_that_were_seen_are_known_for_certain_and_others_hardly_ever() -> None:
    chance = random.Random(7)
    hashes = [chance.getrandbits(64) - 2**63 for _ in range(40_000)]
    hashes += [0, -1, 2**63 - 1, -(2**63)]
    seen = HashFilter()
    before = sum(one in seen for one in hashes)
    for one in hashes:
        seen.add(one)
    assert before == 0
    assert all(one in seen for one in hashes)
    assert sum(chance.getrandbits(64) - 2**63 in seen for _ in range(100_000)) < 20


def test_what_is_remembered_of_keys_takes_the_same_room_however_many() -> None:
    seen = HashFilter()
    room = len(seen._bits)
    for number in range(1_000):
        seen.add(hash(("user", "reserve", str(number))))
    assert len(seen._bits) == room == 2**24
