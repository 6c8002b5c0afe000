"""Who waits for whom when there is more to do than fits: nobody for a hot drop, no sale for a reserve.

A commit takes 100 ms, so 200 ms are two commits: the one under way, and one's own.
"""

from itertools import pairwise

import pytest
import trio
from trio.testing import MockClock

from engine.model import (
    Cancelled,
    DropId,
    Expired,
    Fault,
    FaultCode,
    Purchased,
    RefusalCode,
    Refused,
    Reserved,
    Sweep,
    Swept,
    UserId,
)
from engine.registry import Limits
from tests.engine.making import ANN, BEN, CAT, DROP, cancel, purchase, reserve
from tests.engine.stage import Answer, PickyLedger, Stage, stage
from tests.fakes import Trouble

TWO_COMMITS_MS = 200
HOT = DropId("hot")


def stampede(on: Stage, count: int, drop_id: DropId = DROP, name: str = "user") -> list[Answer]:
    """So many strangers ask for one unit each, at once."""
    return [on.ask(reserve(UserId(f"{name}-{n}"), f"{drop_id}-{name}-{n}"), drop_id) for n in range(count)]


def waited_ms(answer: Answer, since: int) -> int:
    assert answer.at is not None, answer.command
    return answer.at - since


# A hot drop and the others --------------------------------------------------------------------------------


async def test_buyers_of_a_thousand_quiet_drops_wait_for_two_commits_beside_a_hot_one(
    autojump_clock: MockClock,
) -> None:
    async with stage(limits=Limits(mailbox_max=20_000)) as on:
        quiet = [DropId(f"quiet-{number}") for number in range(1_000)]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(on.make_drop, 100_000, HOT)
            for drop_id in quiet:
                nursery.start_soon(on.make_drop, 5, drop_id)
        stampede(on, 4_000, HOT)
        await trio.sleep(0.25)  # in the middle of a commit, with a full part of the hot drop waiting
        start = on.clock.now()
        answers = [on.ask(reserve(ANN, f"ann-{drop_id}"), drop_id) for drop_id in quiet]
        await trio.sleep(2)
        assert all(isinstance(answer.outcome, Reserved) for answer in answers)
        assert max(waited_ms(answer, start) for answer in answers) <= TWO_COMMITS_MS
        assert on.counts(HOT)[1] == 4_000  # and the hot drop has its part in every commit


async def test_a_drop_that_brings_most_is_passed_over_by_the_smaller_ones_but_once(
    autojump_clock: MockClock,
) -> None:
    async with stage(limits=Limits(part_max=8, batch_max=12)) as on:
        drops = [HOT, *(DropId(f"drop-{number}") for number in range(12))]
        for drop_id in drops:
            await on.make_drop(1_000, drop_id)
        on.ask(reserve(CAT, "first"), drops[1])  # a commit is under way
        await trio.sleep(0.01)
        for drop_id in drops[1:]:
            on.ask(reserve(ANN, f"ann-{drop_id}"), drop_id)
        await trio.sleep(0.001)
        stampede(on, 50, HOT)
        sent = len(on.ledger.commits)
        await trio.sleep(0.1)
        for number, drop_id in enumerate(drops[1:]):
            on.ask(reserve(BEN, f"ben-{drop_id}-{number}"), drop_id)
        await trio.sleep(2)
        with_hot = [HOT in {change.drop_id for change in batch} for batch in on.ledger.commits[sent:]]
        assert with_hot[:2] == [False, True]
        assert all(one or next_ for one, next_ in pairwise(with_hot))
        assert all(sum(len(change.events) for change in batch) <= 12 for batch in on.ledger.commits)


async def test_where_all_fits_nobody_is_passed_over(autojump_clock: MockClock) -> None:
    async with stage() as on:
        for name in ("a", "b", "c"):
            await on.make_drop(1_000, DropId(name))
        on.ask(reserve(CAT, "first"), DropId("a"))
        await trio.sleep(0.01)
        answers = [answer for name in ("a", "b", "c") for answer in stampede(on, 400, DropId(name))]
        start = on.clock.now()
        await trio.sleep(1)
        assert max(waited_ms(answer, start) for answer in answers) <= TWO_COMMITS_MS


# Reserves and the rest ------------------------------------------------------------------------------------


async def test_purchases_and_cancels_pass_the_reserves_of_a_saturated_drop(autojump_clock: MockClock) -> None:
    async with stage(limits=Limits(part_max=16)) as on:
        await on.make_drop(total=1_000)
        for user in (ANN, BEN):
            on.ask(reserve(user))
        await trio.sleep(1)
        late = stampede(on, 200)
        await trio.sleep(0.15)  # a commit is under way, and the next part is full of reserves
        start = on.clock.now()
        bought, given = on.ask(purchase(ANN)), on.ask(cancel(BEN))
        await trio.sleep(3)
        assert isinstance(bought.outcome, Purchased)
        assert isinstance(given.outcome, Cancelled)
        for answer in (bought, given):
            assert waited_ms(answer, start) <= TWO_COMMITS_MS
        assert all(isinstance(answer.outcome, Reserved) for answer in late)
        at = [answer.at for answer in late]
        assert at == sorted(at, key=lambda ms: ms or 0), "reserves keep their order"


async def test_a_hold_expires_in_the_next_commit_though_the_part_is_full_of_reserves(
    autojump_clock: MockClock,
) -> None:
    async with stage(limits=Limits(part_max=16)) as on:
        await on.make_drop(total=1_000)
        ann = on.ask(reserve(ANN, hold_ms=1_000))
        await trio.sleep(0.75)
        assert isinstance(ann.outcome, Reserved)
        deadline = ann.outcome.hold.expires_at
        stampede(on, 200)
        await trio.sleep_until(on.clock.trio_time(deadline) + 0.25)
        expired = [event for _, event in on.published if isinstance(event, Expired)]
        assert [event.at for event in expired] == [deadline]


async def test_commands_that_all_fit_into_one_part_keep_their_order(autojump_clock: MockClock) -> None:
    async with stage(limits=Limits(part_max=16)) as on:
        await on.make_drop()
        on.ask(reserve(BEN))
        await trio.sleep(0.01)
        held, bought = on.ask(reserve(ANN)), on.ask(purchase(ANN))
        await trio.sleep(1)
        assert isinstance(held.outcome, Reserved)
        assert isinstance(bought.outcome, Purchased)


async def test_a_mailbox_full_of_reserves_still_takes_purchases_up_to_a_bound(autojump_clock: MockClock) -> None:
    async with stage(limits=Limits(mailbox_max=3, urgent_max=2)) as on:
        await on.make_drop(total=9)
        on.ask(reserve(ANN))
        await trio.sleep(1)
        reserves = stampede(on, 4)
        others = [on.ask(purchase(ANN)), on.ask(cancel(CAT)), on.ask(cancel(CAT))]
        assert [answer.outcome for answer in reserves] == [None, None, None, Fault(FaultCode.OVERLOADED)]
        assert [answer.outcome for answer in others] == [None, None, Fault(FaultCode.OVERLOADED)]
        await trio.sleep(1)
        assert isinstance(others[0].outcome, Purchased)
        assert on.in_flight == 0


async def test_a_tenth_of_what_may_be_in_flight_is_kept_from_reserves(autojump_clock: MockClock) -> None:
    async with stage(limits=Limits(in_flight_max=20)) as on:
        await on.make_drop(total=100)
        on.ask(reserve(ANN))
        await trio.sleep(1)
        reserves = stampede(on, 19)
        others = [on.ask(purchase(ANN)), on.ask(cancel(ANN)), on.ask(cancel(ANN))]
        overloaded = Fault(FaultCode.OVERLOADED)
        assert [answer.outcome for answer in reserves] == [None] * 18 + [overloaded]
        assert [answer.outcome for answer in others] == [None, None, overloaded]
        await trio.sleep(1)
        assert isinstance(others[0].outcome, Purchased)


async def test_expire_now_is_heard_in_a_saturated_drop(autojump_clock: MockClock) -> None:
    async with stage(limits=Limits(part_max=16)) as on:
        await on.make_drop(total=1_000)
        on.ask(reserve(ANN, hold_ms=1_000))
        await trio.sleep(0.5)
        stampede(on, 100)
        await trio.sleep(0.15)
        autojump_clock.jump(0.5)
        start = on.clock.now()
        assert await on.registry.expire_now() == {DROP: 1}
        assert on.clock.now() - start <= TWO_COMMITS_MS


@pytest.mark.parametrize("trouble", [Trouble.REJECTED, Trouble.LOST_BEFORE_COMMIT, Trouble.UNAVAILABLE])
async def test_a_drop_that_was_saturated_when_its_commit_failed_hears_the_next_reserve(
    autojump_clock: MockClock, trouble: Trouble
) -> None:
    async with stage(limits=Limits(part_max=16)) as on:
        await on.make_drop(total=1_000)
        on.ask(reserve(ANN))
        # A rejected batch is tried again, drop by drop.
        on.ledger.fail_next(*[trouble] * (2 if trouble is Trouble.REJECTED else 1))
        await trio.sleep(0.01)
        stampede(on, 16)
        await trio.sleep(3)
        again = on.ask(reserve(BEN))
        await trio.sleep(0.3)
        assert isinstance(again.outcome, Reserved)


async def test_overload_is_told_at_once_and_nothing_grows(autojump_clock: MockClock) -> None:
    limits = Limits(in_flight_max=500, mailbox_max=100, urgent_max=10, part_max=16, batch_max=20)
    async with stage(limits=limits) as on:
        await on.make_drop(total=100_000)
        await on.make_drop(100_000, HOT)
        for round_ in range(50):
            for drop_id in (DROP, HOT):
                answers = stampede(on, 300, drop_id, f"round-{round_}")
                refused = [answer for answer in answers if answer.outcome is not None]
                assert all(answer.at == on.clock.now() for answer in refused)
                assert {answer.code for answer in refused} == {"OVERLOADED"}
            assert on.in_flight <= 450
            await trio.sleep(0.05)


# Sold out -------------------------------------------------------------------------------------------------


async def sold_out(on: Stage) -> None:
    """ANN has the only unit."""
    await on.make_drop(total=1)
    on.ask(reserve(ANN, hold_ms=10_000))
    await trio.sleep(1)


async def test_who_asks_for_what_is_sold_out_is_refused_at_once_without_a_place_in_the_queue(
    autojump_clock: MockClock,
) -> None:
    async with stage(limits=Limits(in_flight_max=1)) as on:
        await sold_out(on)
        on.ask(purchase(ANN))  # fills what may be in flight
        assert on.ask(reserve(BEN)).outcome == Refused(RefusalCode.OUT_OF_STOCK, 2)
        assert on.in_flight == 1


async def test_who_wants_more_than_is_left_is_refused_at_once_and_who_wants_less_is_not(
    autojump_clock: MockClock,
) -> None:
    async with stage() as on:
        await on.make_drop(total=2)
        assert on.ask(reserve(BEN, "three", qty=3)).outcome == Refused(RefusalCode.OUT_OF_STOCK, 1)
        assert on.ask(reserve(BEN, qty=2)).outcome is None


async def test_a_holder_is_told_that_he_holds_not_that_it_is_sold_out(autojump_clock: MockClock) -> None:
    async with stage() as on:
        await sold_out(on)
        again = on.ask(reserve(ANN, "again"))
        await trio.sleep(1)
        assert again.code == "ALREADY_RESERVED"


async def test_at_the_deadline_of_a_hold_nobody_is_refused_before_it_is_settled(autojump_clock: MockClock) -> None:
    async with stage() as on:
        await sold_out(on)
        autojump_clock.jump(20)  # before any timer can ring
        ben = on.ask(reserve(BEN))
        assert ben.outcome is None
        await trio.sleep(1)
        assert isinstance(ben.outcome, Reserved)


async def test_who_asks_while_the_unit_is_on_its_way_back_queues_and_gets_it(autojump_clock: MockClock) -> None:
    async with stage() as on:
        await sold_out(on)
        on.ask(cancel(ANN))
        await trio.sleep(0.01)
        ben = on.ask(reserve(BEN))
        assert ben.outcome is None
        await trio.sleep(1)
        assert isinstance(ben.outcome, Reserved)


async def test_who_asks_while_an_expired_unit_is_on_its_way_to_another_is_not_refused_too_early(
    autojump_clock: MockClock,
) -> None:
    async with stage() as on:
        await sold_out(on)
        autojump_clock.jump(20)
        on.ask(reserve(BEN))
        await trio.sleep(0.01)
        cat = on.ask(reserve(CAT))  # nothing is left of it, but the shown state has ANN's hold, and that is due
        assert cat.outcome is None
        await trio.sleep(1)
        assert cat.outcome == Refused(RefusalCode.OUT_OF_STOCK, 4)


async def test_a_sold_out_drop_that_ends_is_not_active_from_that_instant_on(autojump_clock: MockClock) -> None:
    async with stage() as on:
        await on.make_drop(total=0, ends_at=1_000)
        await on.sleep_until(999)
        assert on.ask(reserve(BEN)).code == "OUT_OF_STOCK"
        autojump_clock.jump(0.001)
        late = on.ask(reserve(BEN, "late"))
        await trio.sleep(1)
        assert late.code == "DROP_NOT_ACTIVE"


async def test_a_sold_out_drop_out_of_service_says_just_that(autojump_clock: MockClock) -> None:
    ledger = PickyLedger()
    async with stage(ledger) as on:
        await sold_out(on)
        on.ask(reserve(BEN, qty=0))  # an assertion stops the drop
        await trio.sleep(0.001)
        assert on.ask(reserve(CAT)).code == "DROP_RESTARTING"
        await trio.sleep(1)
        ledger.is_down = True
        on.ask(cancel(ANN))
        await trio.sleep(1)
        assert on.ask(reserve(CAT, "again")).code == "DATABASE_UNAVAILABLE"
        ledger.is_down = False


async def test_a_sweep_asked_for_by_hand_counts_what_it_expired(autojump_clock: MockClock) -> None:
    async with stage(limits=Limits(part_max=2, mailbox_max=1)) as on:
        await on.make_drop(total=9)
        for number in range(3):
            on.ask(reserve(UserId(f"user-{number}"), hold_ms=10_000))
            await trio.sleep(0.3)
        autojump_clock.jump(15)
        on.ask(reserve(ANN))
        outcomes = await on.registry.expire_now()
        assert outcomes == {DROP: 3}
        assert isinstance(await on.registry.call(DROP, Sweep()), Swept)
