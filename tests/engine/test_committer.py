"""What leaves the engine, when, and the truth of it: batches, their commits, and every way in which those fail.

A commit takes 100 ms: its effect is in the tables after 50, its answer is back after 100.
"""

import socket
import time
from collections.abc import MutableMapping
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from engine.clock import Clock
from engine.ledger import Batch, Change
from engine.model import (
    Create,
    Decision,
    DropId,
    DropStatus,
    Event,
    Expired,
    Fault,
    FaultCode,
    Hold,
    Outcome,
    Purchased,
    Receipt,
    RefusalCode,
    Refused,
    ReservationId,
    Reserved,
    StoredAnswer,
    UserId,
)
from engine.publisher import Publisher
from engine.registry import Limits, running
from tests.engine.making import ANN, BEN, CAT, DROP, at, cancel, purchase, reserve, terms
from tests.engine.stage import COMMIT_S, PickyLedger, Stage, has_no_room_for_rows, rejects_drop, stage
from tests.fakes import MemoryLedger, Trouble

OTHER = DropId("drop-2")


def batch_sizes(on: Stage, first: int = 0) -> list[list[int]]:
    """For each batch sent, how many events each of its drops had."""
    return [[len(change.events) for change in batch] for batch in on.ledger.commits[first:]]


# The commit ---------------------------------------------------------------------------------------------


async def test_nobody_sees_anything_before_its_commit_and_everybody_at_it(autojump_clock: MockClock) -> None:
    async with stage() as on:
        await on.make_drop(total=2)
        start = on.clock.now()
        ann = on.ask(reserve(ANN))
        await on.sleep_until(start + 99)  # it is in the tables since 50 ms, but we don't know yet
        assert on.stored_counts() == (1, 1, 0)
        assert ann.outcome is None
        assert on.counts() == (2, 0, 0)
        assert on.registry.board.holds_of(ANN) == ()
        assert on.published_of() == ["DropCreated"]
        await on.sleep_until(start + 100)
        assert ann.outcome == on.published[-1][1]
        assert on.counts() == (1, 1, 0)
        assert [hold.id for hold in on.registry.board.holds_of(ANN)] == ["ann"]


async def test_the_world_is_told_before_the_caller(autojump_clock: MockClock) -> None:
    async with stage() as on:
        await on.make_drop()
        seen: list[tuple[int, int]] = []
        on.registry.ask(DROP, reserve(ANN), lambda _: seen.append((len(on.published), on.counts()[1])))
        await trio.sleep(1)
        assert seen == [(2, 1)]


async def test_the_first_asker_gets_the_last_unit_and_all_are_answered_in_order(autojump_clock: MockClock) -> None:
    async with stage() as on:
        await on.make_drop(total=3)
        users = [UserId(f"user-{number}") for number in range(6)]
        answers = [on.ask(reserve(user)) for user in users]
        await trio.sleep(1)
        assert [type(answer.outcome) for answer in answers] == [Reserved] * 3 + [Refused] * 3
        assert [event.hold.user_id for _, event in on.published if isinstance(event, Reserved)] == users[:3]


async def test_one_caller_alone_waits_for_one_commit_only(autojump_clock: MockClock) -> None:
    async with stage() as on:
        await on.make_drop()
        start = on.clock.now()
        ann = on.ask(reserve(ANN))
        await trio.sleep(1)
        assert ann.at == start + 100


async def test_everything_that_arrives_during_a_commit_is_the_next_batch(autojump_clock: MockClock) -> None:
    async with stage() as on:
        await on.make_drop(total=50)
        await on.make_drop(50, OTHER)
        sent = len(on.ledger.commits)
        start = on.clock.now()
        on.ask(reserve(ANN))
        await trio.sleep(0.01)
        answers = [on.ask(reserve(UserId(f"user-{number}")), (DROP, OTHER)[number % 2]) for number in range(10)]
        await trio.sleep(0.05)
        answers.append(on.ask(reserve(BEN)))
        await trio.sleep(1)
        assert [sorted(sizes) for sizes in batch_sizes(on, sent)] == [[1], [5, 6]]
        (answered_at,) = {answer.at for answer in answers}
        assert answered_at in (start + 199, start + 200)  # 199: a sum of floats, rounded down


async def test_a_batch_is_capped_and_the_rest_comes_in_the_next(autojump_clock: MockClock) -> None:
    async with stage(limits=Limits(part_max=4, batch_max=5)) as on:
        await on.make_drop(total=50)
        await on.make_drop(50, OTHER)
        sent = len(on.ledger.commits)
        for number in range(12):
            on.ask(reserve(UserId(f"user-{number}")))
        for number in range(2):
            on.ask(reserve(UserId(f"user-{number}"), f"other-{number}"), OTHER)
        await trio.sleep(2)
        assert all(sum(batch) <= 5 for batch in batch_sizes(on, sent))
        assert sum(sum(batch) for batch in batch_sizes(on, sent)) == 14
        assert on.counts() == (38, 12, 0)


async def test_births_and_other_changes_are_never_in_one_batch(autojump_clock: MockClock) -> None:
    async with stage() as on:
        await on.make_drop(total=50)
        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(on.make_drop, 5, DropId(f"new-{number}"))
                await trio.sleep(0.03)
                on.ask(reserve(UserId(f"user-{number}")))
        await trio.sleep(1)
        assert all(len({change.is_birth for change in batch}) == 1 for batch in on.ledger.commits)
        assert on.registry.statistics().drops == 4


async def test_the_same_user_twenty_times_at_once_gets_one(autojump_clock: MockClock) -> None:
    async with stage() as on:
        await on.make_drop(total=50)
        answers = [on.ask(reserve(ANN, f"try-{number}")) for number in range(20)]
        await trio.sleep(1)
        assert isinstance(answers[0].outcome, Reserved)
        assert [answer.code for answer in answers[1:]] == ["ALREADY_RESERVED"] * 19
        assert on.counts() == (49, 1, 0)


async def test_reserve_purchase_and_reserve_again_in_one_batch(autojump_clock: MockClock) -> None:
    async with stage() as on:
        await on.make_drop(total=2)
        first, bought, second = on.ask(reserve(ANN, "a")), on.ask(purchase(ANN)), on.ask(reserve(ANN, "b"))
        await trio.sleep(1)
        assert isinstance(first.outcome, Reserved)
        assert isinstance(bought.outcome, Purchased)
        assert isinstance(second.outcome, Reserved)
        assert on.counts() == (0, 1, 1)


# The answers --------------------------------------------------------------------------------------------


async def test_answers_leave_when_the_next_batch_is_sent(autojump_clock: MockClock) -> None:
    async with stage() as on:
        await on.make_drop(total=9)
        sent = len(on.ledger.commits)
        seen: list[int] = []
        on.registry.ask(DROP, reserve(ANN), lambda _: seen.append(len(on.ledger.commits) - sent))
        await trio.sleep(0.01)
        on.ask(reserve(BEN))  # waits while the first is committed
        await trio.sleep(0.1)
        assert seen == [2]


async def test_answers_leave_in_the_order_of_decisions_whatever_is_under_way(autojump_clock: MockClock) -> None:
    async with stage(limits=Limits(part_max=150)) as on:
        await on.make_drop(total=2_000)
        seqs: list[int] = []

        def answered(outcome: Outcome) -> None:
            assert isinstance(outcome, Reserved)
            seqs.append(outcome.seq)

        for number in range(1_000):
            on.registry.ask(DROP, reserve(UserId(f"user-{number}")), answered)
            if number % 70 == 0:
                await trio.sleep(0.03)
        await trio.sleep(2)
        assert seqs == list(range(2, 1_002))


async def test_an_engine_is_quiet_only_when_everybody_is_answered(autojump_clock: MockClock) -> None:
    async with stage() as on:
        await on.make_drop(total=2_000)
        answers = [on.ask(reserve(UserId(f"user-{number}"))) for number in range(1_000)]
        await on.registry.quiet()
        assert all(isinstance(answer.outcome, Reserved) for answer in answers)
        assert on.in_flight == 0


async def test_a_reply_that_raises_stops_nobody_and_is_logged(
    autojump_clock: MockClock, logged: list[MutableMapping[str, Any]]
) -> None:
    def broken(outcome: Outcome) -> None:
        raise RuntimeError("no such socket")

    async with stage() as on:
        await on.make_drop(total=9)
        on.registry.ask(DROP, reserve(ANN), broken)
        ben = on.ask(reserve(BEN))
        await trio.sleep(1)
        assert isinstance(ben.outcome, Reserved)
        cat = on.ask(reserve(CAT))
        await trio.sleep(1)
        assert isinstance(cat.outcome, Reserved)
        assert on.in_flight == 0
    assert [line["command"] for line in logged if line["event"] == "reply_raised"] == ["Reserve"]


@pytest.mark.parametrize("is_busy", [True, False], ids=["another batch waits", "nothing waits"])
async def test_who_was_committed_is_answered_though_the_engine_is_cancelled_at_that_instant(
    autojump_clock: MockClock, is_busy: bool
) -> None:
    ledger = MemoryLedger(latency_s=COMMIT_S)
    publisher = Publisher()
    outcomes: list[Outcome] = []
    told: list[Event] = []
    with trio.CancelScope() as scope:
        async with running(ledger, Clock(wall=lambda: 0.0), publisher) as registry:
            create = Create(terms(5_000), DropStatus.LIVE)
            await registry.wait_for(lambda reply: registry.create(create, reply))

            class Subscriber:
                def committed(self, drop_id: DropId, event: Event) -> None:
                    told.append(event)
                    scope.cancel()

                def replaced(self, drop_id: DropId) -> None:
                    raise AssertionError

            publisher.subscribe(Subscriber())
            for number in range(400):
                registry.ask(DROP, reserve(UserId(f"user-{number}")), outcomes.append)
            await trio.sleep(0.01)
            for number in range(400, 500 if is_busy else 400):
                registry.ask(DROP, reserve(UserId(f"user-{number}")), outcomes.append)
            await trio.sleep_forever()
    assert len(told) == 400
    assert outcomes == told


# Refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after_s", [0, 0.05], ids=["in the same part", "while it is in flight"])
async def test_a_refusal_that_rests_on_an_uncommitted_change_is_answered_after_its_commit(
    autojump_clock: MockClock, after_s: float
) -> None:
    async with stage() as on:
        await on.make_drop(total=1)
        start = on.clock.now()
        on.ask(reserve(ANN))
        await trio.sleep(after_s)
        ben = on.ask(reserve(BEN))
        await on.sleep_until(start + 99)
        assert ben.outcome is None
        await on.sleep_until(start + 100)
        assert ben.outcome == Refused(RefusalCode.OUT_OF_STOCK, 2)


async def test_a_refusal_on_committed_state_needs_no_commit(autojump_clock: MockClock) -> None:
    async with stage() as on:
        await on.make_drop(total=0)
        start, sent = on.clock.now(), len(on.ledger.commits)
        ann = on.ask(reserve(ANN))
        await on.sleep_until(start + 1)
        assert ann.outcome == Refused(RefusalCode.OUT_OF_STOCK, 1)
        assert len(on.ledger.commits) == sent


# Deadlines ----------------------------------------------------------------------------------------------


async def test_a_hold_expires_at_its_deadline_by_itself_and_its_unit_goes_to_the_next(
    autojump_clock: MockClock,
) -> None:
    async with stage() as on:
        await on.make_drop(total=1)
        ann = on.ask(reserve(ANN, hold_ms=1_000))
        await trio.sleep(0.5)
        assert isinstance(ann.outcome, Reserved)
        deadline = ann.outcome.hold.expires_at
        await on.sleep_until(deadline + 99)
        assert on.counts() == (0, 1, 0)
        await on.sleep_until(deadline + 100)
        assert on.counts() == (1, 0, 0)
        expired = on.published[-1][1]
        assert isinstance(expired, Expired)
        assert expired.at == deadline
        ben = on.ask(reserve(BEN))
        await trio.sleep(1)
        assert isinstance(ben.outcome, Reserved)


async def test_who_asks_at_the_deadline_gets_the_unit_in_the_same_batch(autojump_clock: MockClock) -> None:
    async with stage() as on:
        await on.make_drop(total=1)
        ann = on.ask(reserve(ANN, hold_ms=1_000))
        await trio.sleep(0.5)
        assert isinstance(ann.outcome, Reserved)
        sent = len(on.ledger.commits)
        await trio.sleep_until(on.clock.trio_time(ann.outcome.hold.expires_at))
        ben = on.ask(reserve(BEN))
        await trio.sleep(1)
        assert isinstance(ben.outcome, Reserved)
        assert ben.outcome.at == ann.outcome.hold.expires_at
        assert batch_sizes(on, sent) == [[2]]


async def test_a_purchase_decided_in_time_is_valid_though_its_commit_lands_late(autojump_clock: MockClock) -> None:
    async with stage() as on:
        await on.make_drop(total=1)
        ann = on.ask(reserve(ANN, hold_ms=1_000))
        await trio.sleep(0.5)
        assert isinstance(ann.outcome, Reserved)
        deadline = ann.outcome.hold.expires_at
        await trio.sleep_until(on.clock.trio_time(at(deadline - 1)))
        bought = on.ask(purchase(ANN))
        await trio.sleep(1)
        assert isinstance(bought.outcome, Purchased)
        assert bought.outcome.at == deadline - 1
        assert bought.at == deadline + 99
        assert on.counts() == (0, 0, 1)


async def test_a_purchase_at_the_deadline_is_refused_however_busy_the_ledger(autojump_clock: MockClock) -> None:
    async with stage() as on:
        await on.make_drop(total=2)
        ann = on.ask(reserve(ANN, hold_ms=1_000))
        await trio.sleep(0.5)
        assert isinstance(ann.outcome, Reserved)
        on.ask(reserve(BEN))
        await trio.sleep_until(on.clock.trio_time(ann.outcome.hold.expires_at))
        bought = on.ask(purchase(ANN))
        await trio.sleep(1)
        assert bought.code == "RESERVATION_EXPIRED"


async def test_a_purchase_whose_commit_fails_past_the_deadline_lets_the_hold_expire(autojump_clock: MockClock) -> None:
    async with stage() as on:
        await on.make_drop(total=1)
        ann = on.ask(reserve(ANN, hold_ms=1_000))
        await trio.sleep(0.5)
        assert isinstance(ann.outcome, Reserved)
        await trio.sleep_until(on.clock.trio_time(at(ann.outcome.hold.expires_at - 1)))
        on.ledger.fail_next(Trouble.LOST_BEFORE_COMMIT)
        bought = on.ask(purchase(ANN))
        await trio.sleep(2)
        assert bought.code == "DATABASE_UNAVAILABLE"
        assert on.counts() == (1, 0, 0)
        assert on.published_of()[-1] == "Expired"


async def test_many_holds_of_many_drops_expire_exactly(autojump_clock: MockClock) -> None:
    async with stage() as on:
        drops = [DropId(f"drop-{number}") for number in range(5)]
        for drop_id in drops:
            await on.make_drop(20, drop_id)
        for number in range(100):
            on.ask(reserve(UserId(f"user-{number}"), f"r-{number}", hold_ms=2_000 + 37 * number), drops[number % 5])
        await trio.sleep(10)
        expired = [event for _, event in on.published if isinstance(event, Expired)]
        assert len(expired) == 100
        # However busy the ledger: decided at the deadline itself, so that the very next batch has it.
        assert {event.at - event.hold.expires_at for event in expired} == {0}


async def test_a_scheduled_drop_goes_live_and_ends_by_itself(autojump_clock: MockClock) -> None:
    async with stage() as on:
        await on.make_drop(total=1, status=DropStatus.SCHEDULED, starts_at=1_000, ends_at=2_000)
        await on.sleep_until(999)
        early = on.ask(reserve(ANN))
        await on.sleep_until(1_000)
        assert early.code == "DROP_NOT_ACTIVE"
        in_time = on.ask(reserve(ANN, "in time"))
        await on.sleep_until(1_999)
        assert isinstance(in_time.outcome, Reserved)
        await on.sleep_until(2_100)
        assert on.published_of() == ["DropCreated", "DropUpdated", "Reserved", "DropUpdated"]


async def test_a_start_that_passes_while_the_drop_is_made_does_not_stop_it(autojump_clock: MockClock) -> None:
    async with stage() as on:
        made = terms(1, starts_at=on.clock.now() + 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(on.create, Create(made, DropStatus.SCHEDULED))
            await trio.lowlevel.checkpoint()
            autojump_clock.jump(0.005)
        await trio.sleep(1)
        assert on.published_of() == ["DropCreated", "DropUpdated"]


# Rejected: nothing happened, and one drop's poison is nobody else's ----------------------------------------


async def test_a_batch_rejected_once_is_committed_drop_by_drop_and_nobody_notices(autojump_clock: MockClock) -> None:
    async with stage() as on:
        await on.make_drop()
        await on.make_drop(2, OTHER)
        sent = len(on.ledger.commits)
        on.ledger.fail_next(Trouble.REJECTED)
        here, there = on.ask(reserve(ANN)), on.ask(reserve(ANN, "r2"), OTHER)
        await trio.sleep(1)
        assert batch_sizes(on, sent) == [[1, 1], [1], [1]]
        assert isinstance(here.outcome, Reserved)
        assert isinstance(there.outcome, Reserved)


async def test_the_drop_with_the_poison_pays_and_the_others_go_on(autojump_clock: MockClock) -> None:
    ledger = PickyLedger()
    async with stage(ledger) as on:
        await on.make_drop()
        await on.make_drop(2, OTHER)
        sent = len(ledger.commits)
        ledger.judge = rejects_drop(DROP)
        poisoned, other = on.ask(reserve(ANN)), on.ask(reserve(ANN, "r2"), OTHER)
        await trio.sleep(0.34)
        assert batch_sizes(on, sent) == [[1, 1], [1], [1]]
        assert poisoned.code == "DROP_RESTARTING"
        assert isinstance(other.outcome, Reserved)
        assert on.counts() == (2, 0, 0)
        ledger.judge = None
        await trio.sleep(1)
        again = on.ask(reserve(ANN, "again"))
        await trio.sleep(1)
        assert isinstance(again.outcome, Reserved)
        assert on.registry.statistics().restarts == 1


async def test_a_drop_that_nobody_can_be_told_of_is_loaded_anew_and_the_others_go_on(
    autojump_clock: MockClock,
) -> None:
    class Picky:
        def committed(self, drop_id: DropId, event: Event) -> None:
            if (drop_id, event.seq) == (DROP, 2):
                raise KeyError(drop_id)

        def replaced(self, drop_id: DropId) -> None:
            pass

    async with stage() as on:
        await on.make_drop()
        await on.make_drop(2, OTHER)
        on.publisher.subscribe(Picky())
        poisoned, other = on.ask(reserve(ANN)), on.ask(reserve(ANN, "r2"), OTHER)
        await trio.sleep(1)
        assert isinstance(poisoned.outcome, Reserved)  # it is committed
        assert isinstance(other.outcome, Reserved)
        assert on.registry.statistics().restarts == 1
        assert on.counts() == (1, 1, 0)
        again = on.ask(reserve(UserId("another"), "r3"))
        await trio.sleep(1)
        assert isinstance(again.outcome, Reserved)


async def test_a_drop_that_stays_poisoned_is_tried_ever_more_rarely_and_stops_nobody(autojump_clock: MockClock) -> None:
    ledger = PickyLedger()
    async with stage(ledger) as on:
        await on.make_drop()
        await on.make_drop(50, OTHER)
        on.ask(reserve(ANN, hold_ms=1_000))
        await trio.sleep(0.5)
        ledger.judge = rejects_drop(DROP)  # its expiry can't be written
        answers = []
        for number in range(30):
            answers.append(on.ask(reserve(UserId(f"user-{number}")), OTHER))
            await trio.sleep(1)
        assert all(isinstance(answer.outcome, Reserved) for answer in answers)
        assert on.registry.statistics().restarts <= 10  # after 0.05, 0.1, 0.2 … 6.4, 10, 10 s
        ledger.judge = None
        await trio.sleep(30)
        assert on.counts() == (2, 0, 0)


async def test_a_rejection_after_a_stall_is_an_answer_too(autojump_clock: MockClock) -> None:
    async with stage() as on:
        await on.make_drop()
        on.ledger.freeze()
        on.ledger.fail_next(Trouble.REJECTED)
        ann = on.ask(reserve(ANN))
        await trio.sleep(2)
        on.ledger.thaw()
        await trio.sleep(1)
        assert ann.outcome is not None
        ben = on.ask(reserve(BEN))
        await trio.sleep(1)
        assert isinstance(ben.outcome, Reserved)


# Out of reach: nothing happened, and nobody waits for it --------------------------------------------------


async def test_without_a_ledger_everybody_is_told_at_once_and_reads_go_on(autojump_clock: MockClock) -> None:
    async with stage() as on:
        await on.make_drop()
        on.ask(reserve(ANN))
        await trio.sleep(1)
        on.ledger.is_down = True
        start = on.clock.now()
        ben = on.ask(reserve(BEN))
        await on.sleep_until(start + 1)
        cat = on.ask(reserve(CAT))
        bought = on.ask(purchase(ANN))
        for answer in (ben, cat, bought):
            assert answer.code == "DATABASE_UNAVAILABLE"
            assert answer.at in (start, start + 1)
        assert on.counts() == (1, 1, 0)
        assert len(on.registry.board.holds_of(ANN)) == 1
        on.ledger.is_down = False
        await trio.sleep(1)
        again = on.ask(reserve(BEN, "again"))
        await trio.sleep(1)
        assert isinstance(again.outcome, Reserved)


async def test_what_falls_due_during_an_outage_expires_by_itself_after_it(autojump_clock: MockClock) -> None:
    async with stage() as on:
        await on.make_drop(total=5)
        for number in range(5):
            on.ask(reserve(UserId(f"user-{number}"), hold_ms=2_000 + number))
        await trio.sleep(1)
        on.ledger.is_down = True
        await trio.sleep(60)
        assert on.counts() == (0, 5, 0)
        on.ledger.is_down = False
        await trio.sleep(0.6)
        assert on.counts() == (5, 0, 0)


async def test_an_outage_is_not_a_busy_loop(autojump_clock: MockClock) -> None:
    async with stage() as on:
        await on.make_drop(total=1)
        on.ask(reserve(ANN, hold_ms=1_000))
        await trio.sleep(0.5)
        on.ledger.is_down = True
        looks = 0
        reach = on.ledger._reach

        async def counting() -> None:
            nonlocal looks
            looks += 1
            await reach()

        on.ledger._reach = counting  # type: ignore[method-assign]
        await trio.sleep(100)
        assert 100 < looks <= 500  # every 0.2 s and a round trip
        on.ledger.is_down = False
        await trio.sleep(1)
        assert on.counts() == (1, 0, 0)


async def test_what_waits_when_the_ledger_is_lost_is_told_so_drops_in_the_making_too(autojump_clock: MockClock) -> None:
    async with stage() as on:
        await on.make_drop()
        on.ledger.fail_next(Trouble.LOST_BEFORE_COMMIT)
        ann = on.ask(reserve(ANN))
        await trio.sleep(0.01)
        ben = on.ask(reserve(BEN))
        outcomes = []

        async def create(number: int) -> None:
            made = Create(terms(drop_id=DropId(f"new-{number}")), DropStatus.LIVE)
            outcomes.append(await on.create(made))

        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(create, number)
        assert outcomes == [Fault(FaultCode.UNAVAILABLE)] * 3
        await trio.sleep(1)
        assert ann.code == ben.code == "DATABASE_UNAVAILABLE"
        assert on.registry.statistics().drops == 1
        await on.make_drop(2, DropId("new-4"))


# In doubt: frozen until the truth is known ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("trouble", "is_there"),
    [(Trouble.LOST_AFTER_COMMIT, True), (Trouble.LOST_AND_LATE, True), (Trouble.LOST_BEFORE_COMMIT, False)],
)
@pytest.mark.parametrize("outage_s", [0, 3])
async def test_a_commit_in_doubt_is_resolved_and_its_waiter_told_the_truth(
    autojump_clock: MockClock, trouble: Trouble, is_there: bool, outage_s: float
) -> None:
    async with stage() as on:
        await on.make_drop(total=1)
        on.ledger.fail_next(trouble)
        start = on.clock.now()
        ann = on.ask(reserve(ANN))
        await trio.sleep(0.05)
        on.ledger.is_down = bool(outage_s)
        await on.sleep_until(start + 110)
        assert on.ask(reserve(BEN)).code == "DATABASE_UNAVAILABLE"  # frozen: neither sold nor returned
        assert ann.outcome is None
        assert on.counts() == (1, 0, 0)
        await trio.sleep(outage_s)
        on.ledger.is_down = False
        await trio.sleep(1)
        if is_there:
            assert isinstance(ann.outcome, Reserved)
            assert on.counts() == (0, 1, 0)
            assert on.ask(reserve(BEN, "ben-2")).code == "OUT_OF_STOCK"
        else:
            assert ann.code == "DATABASE_UNAVAILABLE"
            assert on.counts() == (1, 0, 0)
        await trio.sleep(1)
        bought = on.ask(purchase(ANN))
        await trio.sleep(1)
        assert isinstance(bought.outcome, Purchased) is is_there


@pytest.mark.parametrize("trouble", [Trouble.LOST_AFTER_COMMIT, Trouble.LOST_AND_LATE, Trouble.LOST_BEFORE_COMMIT])
async def test_beyond_its_time_a_caller_gets_outcome_unknown_and_the_truth_comes_all_the_same(
    autojump_clock: MockClock,
    trouble: Trouble,
) -> None:
    async with stage() as on:
        await on.make_drop(total=1)
        on.ledger.fail_next(trouble)
        start = on.clock.now()
        told = on.ask(reserve(ANN))  # who waits longer
        on.ledger.is_down = False
        outcomes = []

        async def call() -> None:
            outcomes.append((await on.registry.call(DROP, reserve(BEN)), on.clock.now() - start))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await trio.sleep(0.05)
            on.ledger.is_down = True
        assert outcomes == [(Fault(FaultCode.UNKNOWN), 5_000)]
        assert told.outcome is None
        assert on.in_flight == 2
        on.ledger.is_down = False
        await trio.sleep(1)
        assert on.in_flight == 0
        assert isinstance(told.outcome, Reserved) == (trouble is not Trouble.LOST_BEFORE_COMMIT)


async def test_a_hold_that_falls_due_in_doubt_expires_only_when_it_is_known_to_exist(autojump_clock: MockClock) -> None:
    async with stage() as on:
        await on.make_drop(total=1)
        on.ledger.fail_next(Trouble.LOST_AFTER_COMMIT)
        on.ask(reserve(ANN, hold_ms=1_000))
        await trio.sleep(0.05)
        on.ledger.is_down = True
        await trio.sleep(30)
        assert on.published_of() == ["DropCreated"]
        on.ledger.is_down = False
        await trio.sleep(1)
        assert on.published_of() == ["DropCreated", "Reserved", "Expired"]
        assert on.counts() == (1, 0, 0)


async def test_a_drop_taken_by_a_rival_while_in_doubt_is_let_go_with_the_truth(autojump_clock: MockClock) -> None:
    async with stage() as on:
        await on.make_drop(total=1)
        on.ledger.fail_next(Trouble.LOST_AFTER_COMMIT)
        ann = on.ask(reserve(ANN))
        await trio.sleep(0.07)
        on.ledger.rival_takes(DROP)
        await trio.sleep(1)
        assert isinstance(ann.outcome, Reserved)
        assert on.ask(reserve(BEN)).code == "DROP_OWNED_ELSEWHERE"


@pytest.mark.parametrize("troubles", [[Trouble.REJECTED, trouble] for trouble in Trouble if trouble.value >= 4])
async def test_a_part_that_is_retried_alone_may_fail_in_every_other_way(
    autojump_clock: MockClock, troubles: list[Trouble]
) -> None:
    async with stage() as on:
        await on.make_drop()
        await on.make_drop(2, OTHER)
        on.ledger.fail_next(*troubles)
        here, there = on.ask(reserve(ANN)), on.ask(reserve(ANN, "r2"), OTHER)
        await trio.sleep(2)
        # What comes behind it was not sent again: it is refused as all are that wait when the ledger is lost.
        is_there = troubles[1] in (Trouble.LOST_AFTER_COMMIT, Trouble.LOST_AND_LATE)
        served = [answer for answer in (here, there) if isinstance(answer.outcome, Reserved)]
        assert len(served) == (1 if is_there else 0)
        assert {answer.code for answer in (here, there) if answer not in served} == {"DATABASE_UNAVAILABLE"}
        ben = on.ask(reserve(BEN))
        await trio.sleep(1)
        assert isinstance(ben.outcome, Reserved)


async def test_parts_that_wait_for_their_turn_alone_do_not_wait_for_an_outage_to_end(
    autojump_clock: MockClock,
) -> None:
    async with stage() as on:
        await on.make_drop()
        await on.make_drop(2, OTHER)
        on.ledger.fail_next(Trouble.REJECTED, Trouble.LOST_BEFORE_COMMIT)
        here, there = on.ask(reserve(ANN)), on.ask(reserve(ANN, "r2"), OTHER)
        await trio.sleep(0.11)
        on.ledger.is_down = True
        await trio.sleep(1)
        assert here.outcome is None  # in doubt
        assert there.code == "DATABASE_UNAVAILABLE"
        await trio.sleep(60)
        on.ledger.is_down = False
        await trio.sleep(1)
        assert here.code == "DATABASE_UNAVAILABLE"
        assert on.counts(OTHER) == (2, 0, 0)


# No answer for long ---------------------------------------------------------------------------------------


async def test_a_machine_that_pauses_is_no_outage() -> None:
    """The answer came while nothing of ours ran; it is read before anybody counts how long that was."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)

    class Remote(MemoryLedger):
        is_remote = False

        async def commit(self, batch: Batch) -> frozenset[DropId]:
            hit = await super().commit(batch)
            if self.is_remote:
                await trio.lowlevel.wait_readable(ours)
                ours.recv(1)
            return hit

    ledger = Remote(latency_s=0.0)
    with ours, theirs, capture_logs() as said:
        async with stage(ledger, Limits(stall_s=0.1)) as on:
            await on.make_drop(total=5)
            ledger.is_remote = True
            for number in range(5):
                asked = on.ask(reserve(UserId(f"user-{number}"), f"r{number}"))
                await trio.sleep(0.02)
                theirs.send(b"!")
                time.sleep(0.3)  # noqa: ASYNC251 - that is what is tested
                with trio.fail_after(5):
                    while asked.outcome is None:
                        await trio.sleep(0.01)
                assert isinstance(asked.outcome, Reserved)
            ledger.is_remote = False
    assert not [line for line in said if line["log_level"] != "info"]


async def test_a_commit_that_stalls_keeps_nobody_else_waiting_and_its_late_success_is_told(
    autojump_clock: MockClock,
) -> None:
    async with stage() as on:
        await on.make_drop()
        start = on.clock.now()
        on.ledger.freeze()
        ann = on.ask(reserve(ANN))
        await trio.sleep(0.2)
        ben = on.ask(reserve(BEN))
        await on.sleep_until(start + 899)
        assert ben.outcome is None
        await on.sleep_until(start + 900)
        assert (ben.code, ben.at) == ("DATABASE_UNAVAILABLE", start + 900)
        cat = on.ask(reserve(CAT))
        assert (cat.code, cat.at) == ("DATABASE_UNAVAILABLE", start + 900)
        await trio.sleep(3)
        assert ann.outcome is None
        on.ledger.thaw()
        await trio.sleep(0.2)
        assert isinstance(ann.outcome, Reserved)
        again = on.ask(reserve(BEN, "again"))
        await trio.sleep(1)
        assert isinstance(again.outcome, Reserved)


@pytest.mark.parametrize("trouble", [trouble for trouble in Trouble if trouble is not Trouble.NONE])
async def test_after_a_stall_of_any_end_the_engine_serves_again(autojump_clock: MockClock, trouble: Trouble) -> None:
    async with stage() as on:
        await on.make_drop()
        on.ledger.freeze()
        on.ledger.fail_next(trouble)
        on.ask(reserve(ANN))
        await trio.sleep(2)
        on.ledger.thaw()
        await trio.sleep(3)
        ben = on.ask(reserve(BEN))
        await trio.sleep(1)
        assert isinstance(ben.outcome, Reserved)


async def test_a_stall_is_seen_in_a_later_commit_too(autojump_clock: MockClock) -> None:
    async with stage() as on:
        await on.make_drop(total=9)
        for number in range(5):
            on.ask(reserve(UserId(f"user-{number}")))
            await trio.sleep(0.15)
        on.ledger.freeze()
        start = on.clock.now()
        on.ask(reserve(ANN))
        await on.sleep_until(start + 899)
        assert on.ask(reserve(BEN)).outcome is None
        await on.sleep_until(start + 900)
        assert on.ask(reserve(CAT)).code == "DATABASE_UNAVAILABLE"
        on.ledger.thaw()
        await trio.sleep(1)


# No room ------------------------------------------------------------------------------------------------


async def test_with_a_full_disk_reserves_are_refused_and_all_else_goes_on(autojump_clock: MockClock) -> None:
    ledger = PickyLedger()
    async with stage(ledger) as on:
        await on.make_drop(total=5)
        for user in (ANN, BEN, CAT):
            on.ask(reserve(user, hold_ms=4_000))
        await trio.sleep(1)
        ledger.judge = has_no_room_for_rows
        new, bought, given = on.ask(reserve(UserId("dan"))), on.ask(purchase(ANN)), on.ask(cancel(BEN))
        await trio.sleep(1)
        assert new.code == "STORAGE_FULL"
        assert isinstance(bought.outcome, Purchased)
        assert given.outcome is not None
        assert on.counts() == (3, 1, 1)
        await trio.sleep(4)
        assert on.counts() == (4, 0, 1)  # and what was due has expired
        ledger.judge = None
        await trio.sleep(1)
        again = on.ask(reserve(UserId("dan"), "again"))
        await trio.sleep(1)
        assert isinstance(again.outcome, Reserved)


async def test_a_full_disk_is_asked_again_once_a_second_at_most(autojump_clock: MockClock) -> None:
    ledger = PickyLedger()
    async with stage(ledger) as on:
        await on.make_drop(total=50)
        ledger.judge = has_no_room_for_rows
        sent = len(ledger.commits)
        answers = []
        for number in range(1_000):
            answers.append(on.ask(reserve(UserId(f"user-{number}"))))
            await trio.sleep(0.01)
        await trio.sleep(1)
        assert {answer.code for answer in answers} == {"STORAGE_FULL"}
        assert 10 <= len(ledger.commits) - sent <= 20  # in 10 s; a batch, and its part alone
        assert on.counts() == (50, 0, 0)


async def test_what_was_decided_on_a_hold_that_found_no_room_is_decided_again(autojump_clock: MockClock) -> None:
    ledger = PickyLedger()
    async with stage(ledger) as on:
        await on.make_drop(total=1)
        ledger.judge = has_no_room_for_rows
        ann = on.ask(reserve(ANN))
        await trio.sleep(0.01)
        bought = on.ask(purchase(ANN))  # decided on top of a hold that will not be
        await trio.sleep(2)
        assert ann.code == "STORAGE_FULL"
        assert bought.code == "RESERVATION_REQUIRED"
        assert on.counts() == (1, 0, 0)


async def test_an_expiry_that_finds_no_room_is_tried_again_not_in_a_busy_loop(autojump_clock: MockClock) -> None:
    ledger = PickyLedger()
    async with stage(ledger) as on:
        await on.make_drop(total=1)
        on.ask(reserve(ANN, hold_ms=1_000))
        await trio.sleep(0.5)
        ledger.judge = lambda batch: Trouble.STORAGE_FULL
        sent = len(ledger.commits)
        await trio.sleep(20)
        assert 20 <= len(ledger.commits) - sent <= 200
        ledger.judge = None
        await trio.sleep(1)
        assert on.counts() == (1, 0, 0)


async def test_a_full_disk_does_not_make_fifty_drops_wait_for_each_other(autojump_clock: MockClock) -> None:
    ledger = PickyLedger(latency_s=0.001)
    async with stage(ledger) as on:
        drops = [DropId(f"drop-{number}") for number in range(50)]
        for drop_id in drops:
            await on.make_drop(5, drop_id)
            on.ask(reserve(ANN, f"ann-{drop_id}"), drop_id)
        await trio.sleep(1)
        ledger.judge = has_no_room_for_rows
        for drop_id in drops:
            on.ask(reserve(BEN, f"ben-{drop_id}"), drop_id)
        await trio.sleep(0.01)
        start = on.clock.now()
        bought = on.ask(purchase(ANN), drops[0])
        await trio.sleep(5)
        assert isinstance(bought.outcome, Purchased)
        assert bought.at is not None
        assert bought.at - start < 1_000


# Somebody else wrote --------------------------------------------------------------------------------------


async def test_a_drop_that_a_rival_took_is_let_go_without_a_fight_and_the_others_go_on(
    autojump_clock: MockClock,
) -> None:
    async with stage() as on:
        await on.make_drop()
        await on.make_drop(2, OTHER)
        on.ledger.rival_takes(DROP)
        epoch = on.ledger.tables.drops[DROP].epoch
        ours, other = on.ask(reserve(ANN)), on.ask(reserve(ANN, "r2"), OTHER)
        await trio.sleep(1)
        assert ours.code == "DROP_RESTARTING"
        assert isinstance(other.outcome, Reserved)
        assert on.ask(reserve(ANN, "r3")).code == "DROP_OWNED_ELSEWHERE"
        await trio.sleep(60)
        assert on.ledger.tables.drops[DROP].epoch == epoch
        assert on.registry.board.drop(DROP) is None
        assert on.registry.statistics().drops == 1


async def test_a_hold_that_falls_due_after_a_rival_took_its_drop_is_the_rivals(autojump_clock: MockClock) -> None:
    async with stage() as on:
        await on.make_drop()
        on.ask(reserve(ANN, hold_ms=1_000))
        await trio.sleep(0.5)
        on.ledger.rival_takes(DROP)
        await trio.sleep(5)
        assert on.ledger.tables.drops[DROP].held_count == 1
        assert on.published_of() == ["DropCreated", "Reserved"]
        assert on.ask(purchase(ANN)).code == "DROP_OWNED_ELSEWHERE"


async def test_a_drop_that_somebody_wrote_to_is_reloaded_and_goes_on(autojump_clock: MockClock) -> None:
    async with stage() as on:
        await on.make_drop(total=5)
        await on.make_drop(2, OTHER)
        hold = Hold(ReservationId("foreign"), DROP, CAT, 1, on.clock.now(), at(60_000))
        foreign: list[Event] = [Reserved(2, on.clock.now(), hold, 4)]
        assert await on.ledger.commit([Change(DROP, 1, 1, foreign, ())]) == {DROP}
        ours, other = on.ask(reserve(ANN)), on.ask(reserve(ANN, "r2"), OTHER)
        await trio.sleep(1)
        assert ours.code == "DROP_RESTARTING"
        assert isinstance(other.outcome, Reserved)
        assert on.counts() == (4, 1, 0)
        again, foreigner = on.ask(reserve(ANN, "again")), on.ask(purchase(CAT))
        await trio.sleep(1)
        assert isinstance(again.outcome, Reserved)
        assert isinstance(foreigner.outcome, Purchased)


# Receipts -------------------------------------------------------------------------------------------------


def rendered(decision: Decision) -> StoredAnswer:
    return StoredAnswer(201 if isinstance(decision, Reserved) else 409, type(decision).__name__.encode())


def receipt(user: UserId, key: str) -> Receipt:
    return Receipt(user, "reserve", key, b"fingerprint", rendered)


async def test_a_receipt_is_stored_in_the_batch_of_its_effect(autojump_clock: MockClock) -> None:
    async with stage() as on:
        await on.make_drop()
        ann = on.ask(reserve(ANN), receipt=receipt(ANN, "k1"))
        await trio.sleep(1)
        assert isinstance(ann.outcome, Reserved)
        (change,) = on.ledger.commits[-1]
        assert change.events == [ann.outcome]
        (stored,) = change.receipts
        assert (stored.user_id, stored.operation, stored.key, stored.fingerprint, stored.answer) == (
            ANN,
            "reserve",
            "k1",
            b"fingerprint",
            StoredAnswer(201, b"Reserved"),
        )
        assert stored.created_at == ann.outcome.at
        assert on.ledger.tables.receipts == {(ANN, "reserve", "k1"): (DROP, stored)}


async def test_a_refusal_under_a_key_is_stored_too_and_answered_after_that(autojump_clock: MockClock) -> None:
    async with stage() as on:
        await on.make_drop(total=0)
        start = on.clock.now()
        ann = on.ask(reserve(ANN), receipt=receipt(ANN, "k1"))
        await trio.sleep(1)
        assert (ann.code, ann.at) == ("OUT_OF_STOCK", start + 100)
        (change,) = on.ledger.commits[-1]
        assert change.events == []
        assert [stored.answer for stored in change.receipts] == [StoredAnswer(409, b"Refused")]


@pytest.mark.parametrize(
    ("trouble", "is_stored"),
    [(Trouble.LOST_AFTER_COMMIT, True), (Trouble.LOST_AND_LATE, True), (Trouble.LOST_BEFORE_COMMIT, False)],
)
async def test_a_lone_receipt_in_doubt_is_resolved_too(
    autojump_clock: MockClock, trouble: Trouble, is_stored: bool
) -> None:
    async with stage() as on:
        await on.make_drop(total=0)
        on.ledger.fail_next(trouble)
        ann = on.ask(reserve(ANN), receipt=receipt(ANN, "k1"))
        await trio.sleep(2)
        assert ann.code == ("OUT_OF_STOCK" if is_stored else "DATABASE_UNAVAILABLE")
        assert len(on.ledger.tables.receipts) == is_stored


async def test_an_answer_that_cannot_be_rendered_stops_its_drop_and_is_told_once(autojump_clock: MockClock) -> None:
    def broken(decision: Decision) -> StoredAnswer:
        raise ValueError("no such template")

    async with stage() as on:
        await on.make_drop()
        ann = on.ask(reserve(ANN), receipt=Receipt(ANN, "reserve", "k1", b"", broken))
        await trio.sleep(1)
        assert ann.code == "DROP_RESTARTING"
        assert on.in_flight == 0
        again = on.ask(reserve(ANN, "again"))
        await trio.sleep(1)
        assert isinstance(again.outcome, Reserved)


# The statistics -------------------------------------------------------------------------------------------


async def test_batches_are_sent_one_after_the_other(autojump_clock: MockClock) -> None:
    ledger = PickyLedger()
    spans: list[tuple[float, float]] = []
    commit = ledger.commit

    async def timed(batch: list[Change]) -> frozenset[DropId]:
        start = trio.current_time()
        hit = await commit(batch)
        spans.append((start, trio.current_time()))
        return hit

    ledger.commit = timed  # type: ignore[method-assign, assignment]
    async with stage(ledger) as on:
        await on.make_drop(total=100)
        for number in range(40):
            on.ask(reserve(UserId(f"user-{number}")))
            await trio.sleep(0.03)
    assert len(spans) > 5
    assert all(before[1] <= after[0] for before, after in pairwise(spans))


async def test_an_ask_is_decided_in_the_next_turn_of_the_scheduler(autojump_clock: MockClock) -> None:
    async with stage() as on:
        await on.make_drop(total=1)
        on.ask(reserve(ANN))
        await wait_all_tasks_blocked()
        await trio.sleep(0.0999)
        assert on.stored_counts() == (0, 1, 0)


async def test_who_holds_a_unit_is_answered_before_those_who_want_one(autojump_clock: MockClock) -> None:
    async with stage() as on:
        await on.make_drop(500)
        on.ask(reserve(ANN))
        await trio.sleep(1)
        answered: list[str] = []
        for number in range(300):
            user = UserId(f"user-{number}")
            on.registry.ask(DROP, reserve(user, f"{user}-hold"), partial(_note, answered, user))
        on.registry.ask(DROP, purchase(ANN, "bought"), partial(_note, answered, ANN))
        await trio.sleep(1)
        assert len(answered) == 301
        assert answered[0] == ANN
        assert answered[1:] == [f"user-{number}" for number in range(300)], "the others in their order"


def _note(answered: list[str], user: str, outcome: Outcome) -> None:
    answered.append(user)
