"""The hub, a behaviour at a time; every viewer checks all that it hears, whatever a test is about (`watching`)."""

from itertools import pairwise
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from engine import hub as hub_module
from engine.hub import JOINING_S, MARKS_MAX, SLICE, SWEEP_S, Hub
from engine.model import DropId, DropStatus, UserId
from tests.engine.making import ANN, BEN, CAT
from tests.engine.watching import HOLD_MS, A, B, C, Listener, Memory, Plain, watched

# When -------------------------------------------------------------------------------------------------


async def test_first_event_after_silence_is_told_at_once(autojump_clock: MockClock) -> None:
    async with watched() as on:
        on.make(A)
        ann = on.viewer()
        ann.subscribe([A])
        await trio.sleep(10)
        began = trio.current_time()
        on.reserve(A, ANN)
        await wait_all_tasks_blocked()
        assert ann.heard[-1].at == began
        assert ann.said() == ["snapshot 1: 10", "stock 2: 9"]


async def test_nothing_is_told_before_the_hub_is_told_of_a_commit(autojump_clock: MockClock) -> None:
    async with watched() as on:
        on.make(A)
        ann = on.viewer()
        ann.subscribe([A])
        await trio.sleep(1)
        assert ann.said() == ["snapshot 1: 10"]
        assert on.hub.statistics().passes == 1, "for what was made; none for nothing"


async def test_a_storm_takes_at_most_twenty_passes_a_second_and_each_tells_the_newest_stock_alone(
    autojump_clock: MockClock,
) -> None:
    async with watched() as on:
        on.make(A, total=100_000)
        ann = on.viewer()
        ann.subscribe([A])
        await trio.sleep(1)
        passes = on.hub.statistics().passes
        for number in range(1_000):
            on.reserve(A, UserId(f"user-{number}"))
            await trio.sleep(0.001)
        assert 18 <= on.hub.statistics().passes - passes <= 21
        stocks = [message for message in ann.heard if message.what == "stock"]
        assert len(stocks) <= 21
        assert all(after.at - before.at >= 0.05 for before, after in pairwise(stocks))
        await trio.sleep(0.1)
        assert ann.said()[-1] == "stock 1001: 99000"


# What -------------------------------------------------------------------------------------------------


async def test_every_event_but_of_stock_alone_is_told_in_order_and_the_stock_in_its_place(
    autojump_clock: MockClock,
) -> None:
    async with watched() as on:
        on.make(A)
        ann = on.viewer()
        ann.subscribe([A])
        on.commit(A, on.wish(ANN), on.purchase(ANN), on.wish(BEN), on.wish(CAT), on.purchase(CAT), DropStatus.PAUSED)
        await trio.sleep(1)
        assert ann.said()[1:] == ["Purchased 3", "stock 5: 7", "Purchased 6", "DropUpdated 7"]


async def test_each_purchase_tells_the_three_newest_after_it(autojump_clock: MockClock) -> None:
    async with watched() as on:
        on.make(A)
        for user in (ANN, BEN):
            on.buy(A, user)
            on.now += 1
        ann = on.viewer()
        ann.subscribe([A])
        on.commit(A, on.wish(CAT), on.purchase(CAT), on.wish(ANN), on.purchase(ANN))
        await trio.sleep(1)
        told = [[line.user_id for line in message.latest or ()] for message in ann.heard if message.what == "Purchased"]
        assert told == [[CAT, BEN, ANN], [ANN, CAT, BEN]]


async def test_newest_purchases_are_not_guessed_where_the_first_that_is_told_comes_with_others(
    autojump_clock: MockClock,
) -> None:
    async with watched() as on:
        on.make(A)
        for user in (ANN, BEN, CAT):
            on.buy(A, user)
            on.now += 1
        on.hub = Hub(on.board, on._history)  # a server that has just started
        async with trio.open_nursery() as nursery:
            nursery.start_soon(on.hub.run)
            ann = on.viewer()
            ann.subscribe_all()
            on.commit(A, on.wish(CAT), on.purchase(CAT), on.wish(ANN), on.purchase(ANN))
            await trio.sleep(1)
            told = [message.latest for message in ann.heard if message.what == "Purchased"]
            assert told[0] is None
            assert [line.user_id for line in told[1] or ()] == [ANN, CAT, CAT]
            ann.is_up_to_date()
            nursery.cancel_scope.cancel()


async def test_an_expiry_is_told_to_its_user_alone_and_its_stock_to_all(autojump_clock: MockClock) -> None:
    async with watched() as on:
        on.make(A)
        ann, twin, ben, nobody = (on.viewer() for _ in range(4))
        for viewer in (ann, twin, ben):
            viewer.subscribe([A])
        nobody.subscribe_all()
        ann.identify(ANN)
        twin.identify(ANN)
        ben.identify(BEN)
        on.reserve(A, ANN)
        await trio.sleep(1)
        on.now += HOLD_MS
        on.commit(A, on.wish(CAT))
        await trio.sleep(1)
        assert ann.said()[2:] == twin.said()[2:] == ["Expired 3", "stock 4: 9"]
        assert ben.said()[2:] == nobody.said()[2:] == ["stock 4: 9"]
        ann.identify(BEN)
        on.now += HOLD_MS
        on.commit(A, on.wish(BEN))
        on.now += HOLD_MS
        on.commit(A, on.wish(ANN))
        await trio.sleep(1)
        assert "Expired 7" in ann.said(), "it is Ben's now"
        assert "Expired 7" not in twin.said()


async def test_an_expiry_of_which_a_user_was_not_there_to_hear_is_told_after_the_fact(
    autojump_clock: MockClock,
) -> None:
    async with watched() as on:
        on.make(A)
        ann = on.viewer()
        ann.identify(ANN)
        ann.subscribe([A])
        ann.room = 0
        on.reserve(A, ANN)
        await trio.sleep(1)
        on.now += HOLD_MS
        on.commit(A, on.wish(BEN))
        await trio.sleep(1)
        ann.read()
        assert ann.said()[1:] == ["Expired 3", "stock 4: 9"]


async def test_who_watches_all_hears_of_drops_that_are_made_later(autojump_clock: MockClock) -> None:
    async with watched() as on:
        on.make(A)
        everything, one = on.viewer(), on.viewer()
        everything.subscribe_all()
        one.subscribe([A])
        await trio.sleep(1)
        on.make(B, total=3)
        on.make(C, total=4, status=DropStatus.DRAFT)
        on.reserve(B, ANN)
        await trio.sleep(1)
        assert everything.said(B) == ["DropCreated 1: 3", "stock 2: 2"]
        assert everything.said(C) == ["DropCreated 1: 4"]
        assert one.said(B) == []


async def test_news_of_many_drops_leave_in_one_send_to_who_watches_all(autojump_clock: MockClock) -> None:
    async with watched() as on:
        for number in range(20):
            on.make(DropId(f"drop-{number}"))
        viewer = on.viewer()
        viewer.subscribe_all()
        await trio.sleep(1)
        sends, frames = viewer.sends, on.hub.statistics().frames
        for number in range(20):
            on.reserve(DropId(f"drop-{number}"), ANN)
        await trio.sleep(1)
        assert viewer.sends - sends == 1
        assert on.hub.statistics().frames - frames == 1


async def test_what_is_too_much_for_one_send_leaves_drop_by_drop_and_no_more_than_the_viewer_takes(
    autojump_clock: MockClock,
) -> None:
    async with watched() as on:
        for number in range(20):
            on.make(DropId(f"drop-{number}"), total=100)
        ann, slow = on.viewer(), on.viewer()
        for viewer in (ann, slow):
            viewer.subscribe_all()
        await trio.sleep(1)
        sends, slow.room = ann.sends, 3
        for number in range(20):
            wanted = [command for _ in range(20) for command in (on.wish(ANN), on.purchase(ANN))]
            on.commit(DropId(f"drop-{number}"), *wanted)
        await trio.sleep(1)
        assert ann.sends - sends == 20
        assert (slow.room, slow.refused, len(slow.watch.marks)) == (0, 1, 17)


async def test_what_is_told_is_encoded_once_for_each_dialect(autojump_clock: MockClock) -> None:
    async with watched() as on:
        on.make(A)
        await trio.sleep(1)
        plain, other = Plain(), Plain()
        for dialect in (plain, other):
            for _ in range(50):
                on.viewer(dialect).subscribe([A])
                on.viewer(dialect).subscribe_all()
        plain.encoded.clear()
        other.encoded.clear()
        on.buy(A, ANN)
        await trio.sleep(1)
        assert plain.encoded == other.encoded == ["news of drop-a"]


async def test_more_events_than_are_told_at_once_take_several_passes_or_a_snapshot(autojump_clock: MockClock) -> None:
    async with watched(events_max=2, history_max=6) as on:
        on.make(A)
        ann = on.viewer()
        ann.subscribe([A])
        await trio.sleep(1)
        on.commit(A, *[command for user in (ANN, BEN) for command in (on.wish(user), on.purchase(user))])
        await trio.sleep(1)
        assert ann.said()[1:] == ["Purchased 3", "stock 4: 8", "Purchased 5"]
        on.commit(A, *[command for user in (ANN, BEN, CAT) for command in (on.wish(user), on.purchase(user))])
        await trio.sleep(1)
        assert ann.said()[4:] == ["Purchased 7", "Purchased 9", "stock 10: 5", "Purchased 11"]
        ben = on.viewer()
        ben.subscribe([A], a=5)
        assert ben.said() == ["snapshot 11: 5"], "who comes back is not kept waiting for passes"
        users = (ANN, BEN, CAT, ANN)
        on.commit(A, *[command for user in users for command in (on.wish(user), on.purchase(user))])
        await trio.sleep(1)
        assert ann.said()[8:] == ["snapshot 19: 1"], "nor is anybody for so many"


# Who does not read ------------------------------------------------------------------------------------


async def test_a_viewer_that_does_not_read_is_conflated_and_costs_the_others_nothing(autojump_clock: MockClock) -> None:
    async with watched() as on:
        on.make(A)
        slow, quick = on.viewer(), on.viewer()
        for viewer in (slow, quick):
            viewer.subscribe([A])
        slow.room = 1
        for _ in range(20):
            on.reserve(A, ANN)
            await trio.sleep(0.1)
            on.cancel(A, ANN)
            await trio.sleep(0.1)
        on.buy(A, BEN)
        await trio.sleep(0.1)
        assert len(quick.heard) == 43
        assert slow.said() == ["snapshot 1: 10", "stock 2: 9"]
        assert slow.refused == 1, "nothing is tried before it has read"
        assert slow.watch.marks == {A: 2}
        assert on.hub.statistics().parked == 1
        slow.read()
        assert slow.said()[2:] == ["stock 42: 9", "Purchased 43"]
        assert slow.watch.marks == {}
        assert on.hub.statistics().parked == 0


async def test_a_viewer_with_many_drops_hears_as_much_as_it_takes_and_the_rest_later(autojump_clock: MockClock) -> None:
    async with watched() as on:
        for drop_id in (A, B, C):
            on.make(drop_id)
        ann = on.viewer()
        ann.room = 1
        ann.subscribe([A, B, C])
        assert ann.said() == ["snapshot 1: 10"]
        ann.read(1)
        assert len(ann.heard) == 2
        ann.read()
        assert ann.said() == ["snapshot 1: 10"] * 3


async def test_who_reads_nothing_for_long_is_sent_away_whatever_it_asks_for(autojump_clock: MockClock) -> None:
    async with watched(stall_s=20.0) as on:
        on.make(A)
        ann, ben = on.viewer(), on.viewer()
        for viewer in (ann, ben):
            viewer.subscribe([A])
            viewer.room = 0
        on.reserve(A, ANN)
        for _ in range(18):
            await trio.sleep(1)
            ann.subscribe([A])  # that it wants more does not mean that it reads
        ben.read()
        assert not ann.is_away
        await trio.sleep(4)
        assert ann.is_away
        assert ann.watch.is_closed
        assert not ben.is_away
        statistics = on.hub.statistics()
        assert (statistics.viewers, statistics.parked, statistics.sent_away) == (1, 0, 1)


async def test_many_who_have_room_again_at_once_leave_others_their_turns(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "CATCH_UP_S", -1.0)  # the clock stands still: none may be told within a slice
    async with watched(stall_s=20.0) as on:
        on.make(A)
        crowd = [on.viewer() for _ in range(50)]
        for viewer in crowd:
            viewer.subscribe([A])
            viewer.room = 0
        on.buy(A, ANN)
        await trio.sleep(15)
        encoded = len(on.dialect.encoded)
        for viewer in crowd:
            viewer.read(in_turn=True)
        assert [len(viewer.heard) for viewer in crowd] == [1] * 50, "none is told before its turn"
        told, turns = 0, 0
        while told < 50:
            before, turns = told, turns + 1
            assert turns < 1_000
            await trio.lowlevel.checkpoint()
            told = sum(len(viewer.heard) > 1 for viewer in crowd)
            assert told - before <= 2, "others have a turn between them, be it last in one round and first in the next"
        assert {tuple(viewer.said()) for viewer in crowd} == {("snapshot 1: 10", "stock 2: 9", "Purchased 3")}
        assert len(on.dialect.encoded) <= encoded + 1, "what all of them missed is encoded once"
        assert on.hub.statistics().parked == 0


async def test_what_is_a_viewers_own_is_not_what_others_missed(autojump_clock: MockClock) -> None:
    async with watched() as on:
        on.make(A)
        ann, ben, cat = on.viewer(), on.viewer(), on.viewer()
        ann.identify(ANN)
        ben.identify(BEN)
        for viewer in (ann, ben, cat):
            viewer.subscribe([A])
            viewer.room = 0
        on.reserve(A, ANN)
        on.now += HOLD_MS
        on.commit(A, on.wish(CAT))
        await trio.sleep(1)
        for viewer in (cat, ann, ben):
            viewer.read(in_turn=True)
        await trio.sleep(1)
        assert "Expired 3" in ann.said()
        assert "Expired 3" not in (*ben.said(), *cat.said())


async def test_who_waits_for_its_turn_is_not_sent_away_and_who_left_has_none(autojump_clock: MockClock) -> None:
    async with watched(stall_s=20.0) as on:
        on.make(A)
        ann, ben = on.viewer(), on.viewer()
        for viewer in (ann, ben):
            viewer.subscribe([A])
            viewer.room = 0
        on.reserve(A, ANN)
        await trio.sleep(19)
        for viewer in (ann, ben):
            viewer.read(0, in_turn=True)  # it reads slowly, but it reads
            viewer.watch.drained()
        ben.watch.close()
        ben.watch.drained()
        await trio.sleep(19)
        assert not ann.is_away
        ann.read(in_turn=True)
        await trio.sleep(1)
        assert ann.said()[-1] == "stock 2: 9"
        assert ben.said() == ["snapshot 1: 10"]
        assert not on.hub._drained


async def test_what_is_remembered_of_a_viewer_is_bounded(autojump_clock: MockClock) -> None:
    async with watched(marks_max=5) as on:
        ann, ben = on.viewer(), on.viewer()
        ann.subscribe_all()
        ben.subscribe_all()
        ann.room = 0
        for number in range(5):
            on.make(DropId(f"drop-{number}"))
            await trio.sleep(0.1)
        assert len(ann.watch.marks) == 5
        assert not ann.is_away
        on.make(DropId("drop-5"))
        await trio.sleep(0.1)
        assert ann.is_away
        assert ann.watch.marks == {}
        assert len(ben.heard) == 6


async def test_who_watches_all_is_shown_no_more_drops_than_can_be_remembered(autojump_clock: MockClock) -> None:
    async with watched() as on:
        for number in range(MARKS_MAX + 10):
            on.make(DropId(f"drop-{number}"), total=1)
        await trio.sleep(1)
        ann = on.viewer()
        ann.room = 0
        ann.subscribe_all()
        assert len(ann.watch.marks) == MARKS_MAX
        ann.read()
        assert len(ann.heard) == MARKS_MAX


async def test_who_wants_more_than_can_be_remembered_is_told_for_what_there_was_no_room_and_stays(
    autojump_clock: MockClock,
) -> None:
    async with watched(marks_max=3) as on:
        drops = [DropId(f"drop-{number}") for number in range(6)]
        for drop_id in drops:
            on.make(drop_id)
        await trio.sleep(1)
        ann = on.viewer()
        ann.subscribe(drops[:2])
        on.reserve(drops[5], ANN)  # is to be told when it begins to watch all, and has to wait for its turn
        assert ann.subscribe_all(dict.fromkeys(drops[2:5], 1)) == drops[3:5]
        assert not ann.is_away
        assert ann.said() == ["snapshot 1: 10"] * 4
        await trio.sleep(1)
        ann.subscribe(drops[3:5])
        on.reserve(drops[3], ANN)
        await trio.sleep(1)
        assert ann.said(drops[3]) == ["snapshot 1: 10", "stock 2: 9"]


async def test_who_watches_all_and_names_more_before_it_has_read_is_told_for_what_there_was_no_room(
    autojump_clock: MockClock,
) -> None:
    async with watched(marks_max=3) as on:
        drops = [DropId(f"drop-{number}") for number in range(6)]
        for drop_id in drops:
            on.make(drop_id)
            on.now += 1
        await trio.sleep(1)
        ann = on.viewer()
        ann.room = 1
        ann.subscribe_all()  # the newest three, of which it takes one
        assert ann.subscribe(drops[:3]) == drops[1:3]
        assert not ann.is_away
        ann.read()
        assert ann.subscribe(drops[1:3]) == []
        assert sorted(message.drop_id for message in ann.heard) == sorted(drops)


# Who comes back ---------------------------------------------------------------------------------------


async def test_resume_tells_what_was_missed_from_memory(autojump_clock: MockClock) -> None:
    async with watched() as on:
        on.make(A)
        for user in (ANN, BEN, CAT):
            on.buy(A, user)
        await trio.sleep(1)
        ann = on.viewer()
        ann.subscribe([A], a=3)
        assert ann.said() == ["Purchased 5", "stock 6: 7", "Purchased 7"]
        assert on.histories == []


async def test_resume_at_the_newest_position_tells_nothing(autojump_clock: MockClock) -> None:
    async with watched() as on:
        on.make(A)
        on.buy(A, BEN)
        ann = on.viewer()
        ann.subscribe([A], a=3)
        await trio.sleep(1)
        assert ann.said() == []
        on.reserve(A, ANN)
        await trio.sleep(1)
        assert ann.said() == ["stock 4: 8"]


@pytest.mark.parametrize("position", [0, 4, -7, 2**70])
async def test_a_position_that_is_none_of_ours_gets_a_snapshot(position: int, autojump_clock: MockClock) -> None:
    async with watched() as on:
        on.make(A)
        on.buy(A, BEN)
        ann = on.viewer()
        ann.subscribe([A], a=position)
        assert ann.said() == ["snapshot 3: 9"]


async def test_positions_in_drops_that_there_are_not_are_not_remembered(autojump_clock: MockClock) -> None:
    async with watched(marks_max=5) as on:
        on.make(A)
        ann = on.viewer()
        ann.expect(A, 1)
        ann.watch.subscribe_all({A: 1} | {DropId(f"made-up-{number}"): 7 for number in range(100)})
        await trio.sleep(1)
        assert ann.watch.marks == {}
        assert not ann.is_away
        on.reserve(A, ANN)
        await trio.sleep(1)
        assert ann.said() == ["stock 2: 9"]


async def test_resume_beyond_memory_is_told_from_the_tables_with_the_newest_purchases(
    autojump_clock: MockClock,
) -> None:
    async with watched(ring_max=2) as on:
        on.make(A)
        for user in (ANN, BEN, CAT):
            on.buy(A, user)
        on.reserve(A, ANN)
        on.cancel(A, ANN)
        await trio.sleep(1)
        ann = on.viewer()
        ann.subscribe([A], a=1)
        assert ann.said() == []
        await trio.sleep(1)
        assert on.histories == [(A, 1)]
        assert ann.said() == ["Purchased 3", "Purchased 5", "Purchased 7", "stock 9: 7"]
        assert [line.user_id for line in ann.knows[A].latest or ()] == [CAT, BEN, ANN]


async def test_what_happens_while_the_tables_are_read_comes_behind(autojump_clock: MockClock) -> None:
    async with watched(ring_max=2) as on:
        on.make(A)
        on.buy(A, ANN)
        on.buy(A, BEN)
        await trio.sleep(1)
        on.history_s = 0.5
        ann = on.viewer()
        ann.subscribe([A], a=1)
        await trio.sleep(0.1)
        on.buy(A, CAT)
        await trio.sleep(1)
        # What the tables had, and what came meanwhile: in two sends or in one, as it happens.
        assert ann.said()[0] == "Purchased 3"
        assert ann.said()[-3:] == ["Purchased 5", "stock 6: 7", "Purchased 7"]


@pytest.mark.parametrize("trouble", ["unreachable", "a bug", "a gap", "nothing"])
async def test_a_snapshot_where_the_tables_do_not_help(trouble: str, autojump_clock: MockClock) -> None:
    async with watched(ring_max=1) as on:
        on.make(A)
        on.buy(A, ANN)
        on.buy(A, BEN)
        await trio.sleep(1)
        on.is_reachable = trouble != "unreachable"
        on.has_bug = trouble == "a bug"
        on.pruned = {"a gap": {(A, 3)}, "nothing": {(A, seq) for seq in range(9)}}.get(trouble, set())
        ann = on.viewer()
        ann.subscribe([A], a=1)
        await trio.sleep(1)
        assert on.histories
        assert ann.said() == ["snapshot 5: 8"]


async def test_too_much_missed_gets_a_snapshot(autojump_clock: MockClock) -> None:
    async with watched(history_max=4) as on:
        on.make(A)
        on.buy(A, ANN)
        on.buy(A, BEN)
        await trio.sleep(1)
        ann, ben = on.viewer(), on.viewer()
        ann.subscribe([A], a=1)
        assert len(ann.heard) == 3
        on.reserve(A, ANN)
        await trio.sleep(1)
        ben.subscribe([A], a=1)
        assert ben.said() == ["snapshot 6: 7"]
        assert on.histories == []


async def test_when_everybody_comes_back_at_once_the_tables_are_read_for_some_and_the_rest_get_snapshots(
    autojump_clock: MockClock,
) -> None:
    async with watched(ring_max=1, histories_waiting_max=10) as on:
        on.make(A)
        on.buy(A, ANN)
        await trio.sleep(1)
        viewers = [on.viewer() for _ in range(100)]
        for viewer in viewers:
            viewer.subscribe([A], a=1)
        await trio.sleep(1)
        assert len(on.histories) == 10
        assert sum(viewer.said() == ["snapshot 3: 9"] for viewer in viewers) == 90


async def test_what_becomes_of_a_drop_while_the_tables_are_read_for_it_is_shown(autojump_clock: MockClock) -> None:
    async with watched(ring_max=1) as on:
        on.make(A)
        on.buy(A, ANN)
        await trio.sleep(1)
        on.history_s = 5.0
        ann, ben = on.viewer(), on.viewer()
        ann.subscribe([A], a=1)
        ben.subscribe([A], a=1)
        await trio.sleep(1)
        on.load_anew(A)
        on.hub.replaced(A)
        ben.watch.close()
        await trio.sleep(10)
        assert ann.said() == ["snapshot 3: 9"], "though nothing more happens"
        assert ben.said() == []


async def test_from_some_drops_to_all_nothing_of_those_is_lost(autojump_clock: MockClock) -> None:
    async with watched() as on:
        on.make(A)
        ann = on.viewer()
        ann.subscribe([A])
        ann.room = 0
        on.commit(A, on.wish(ANN), on.purchase(ANN), DropStatus.ENDED)
        await trio.sleep(1)
        ann.subscribe_all()  # which does not list what has ended
        ann.read()
        await trio.sleep(1)
        assert ann.said(A)[-1] == "snapshot 4: 9"


# Whose drop is not ours -------------------------------------------------------------------------------


@pytest.mark.parametrize("is_all", [False, True])
async def test_a_drop_that_was_loaded_anew_is_shown_again(is_all: bool, autojump_clock: MockClock) -> None:
    async with watched(ring_max=1) as on:
        on.make(A)
        on.make(B)  # so that nothing is in memory of the first
        await trio.sleep(1)
        ann = on.viewer()
        if is_all:
            ann.subscribe_all()
        else:
            ann.subscribe([A])
        fresh = on.load_anew(A)
        on.commit(A, on.wish(ANN), on.purchase(ANN), is_published=False)
        on.board.show(fresh)
        on.hub.replaced(A)
        await trio.sleep(1)
        assert ann.said(A) == ["snapshot 1: 10", "snapshot 3: 9"]


async def test_a_gap_in_what_is_published_is_said(autojump_clock: MockClock) -> None:
    async with watched() as on:
        on.make(A)
        ann = on.viewer()
        ann.subscribe([A])
        await trio.sleep(1)
        on.commit(A, on.wish(ANN), on.purchase(ANN), is_published=False)
        on.commit(A, on.wish(BEN), on.wish(CAT))
        await trio.sleep(1)
        assert ann.said() == ["snapshot 1: 10", "snapshot 5: 7"]
        on.cancel(A, CAT)
        await trio.sleep(1)
        assert ann.said()[2:] == ["stock 6: 8"]


async def test_a_drop_that_another_engine_took_is_shown_when_it_comes_back(autojump_clock: MockClock) -> None:
    async with watched() as on:
        on.make(A)
        ann, all_ = on.viewer(), on.viewer()
        ann.subscribe([A])
        all_.subscribe_all()
        await trio.sleep(1)
        on.buy(A, ANN)
        drop = on.drop(A)
        on.board.forget(A)
        await trio.sleep(1)
        assert ann.said() == all_.said() == ["snapshot 1: 10"]
        ann.subscribe([A])
        on.board.show(drop)
        on.hub.replaced(A)
        await trio.sleep(1)
        assert ann.said() == all_.said() == ["snapshot 1: 10", "snapshot 3: 9"]


# In the middle of a pass ------------------------------------------------------------------------------


class Pausing(Listener):
    """Whatever the test wants to happen right after this viewer is told."""

    then: Any = None

    def send(self, data: bytes) -> bool:
        is_taken = super().send(data)
        if self.then is not None:
            then, self.then = self.then, None
            then()
        return is_taken


@pytest.mark.parametrize("is_all", [False, True])
@pytest.mark.parametrize("what", ["subscribe", "subscribe all", "resume", "go on", "reload", "leave and come", "close"])
async def test_what_happens_in_the_middle_of_a_pass_makes_nobody_hear_a_thing_twice(
    what: str, is_all: bool, autojump_clock: MockClock
) -> None:
    async with watched() as on:
        on.make(A)
        first, second = Pausing(on, on.dialect), on.viewer()
        second.identify(ANN)
        for viewer in (first, second):
            if is_all:
                viewer.subscribe_all()
            else:
                viewer.subscribe([A])
        late = on.viewer()
        on.buy(A, ANN)
        await trio.sleep(1)
        if what == "go on":
            second.room = 0
            on.buy(A, BEN)
            await trio.sleep(1)

        def happen() -> None:
            match what:
                case "subscribe":
                    second.subscribe([A])
                    late.subscribe([A])
                case "subscribe all":
                    second.subscribe_all()
                    late.subscribe_all()
                case "resume":
                    second.subscribe([A], a=2)
                    late.subscribe([A], a=2)
                case "go on":
                    second.read()
                case "reload":
                    on.load_anew(A)
                    on.hub.replaced(A)
                case "leave and come":
                    second.unsubscribe_all()
                    second.subscribe([A])
                case "close":
                    second.watch.close()

        first.then = happen
        on.buy(A, CAT)
        await trio.sleep(1)
        on.buy(A, CAT)
        await trio.sleep(1)
        assert first.then is None
        assert first.said()[-1] in ("Purchased 7", "Purchased 9")
        assert second.watch.is_closed or second.said()[-1] == first.said()[-1]


async def test_who_joins_waits_for_its_drop_to_be_told_and_not_for_the_whole_pass(autojump_clock: MockClock) -> None:
    async with watched(slice_=1, bundles_max=1) as on, trio.open_nursery() as nursery:
        for drop_id in (A, B, C):
            on.make(drop_id)
        await trio.sleep(1)
        first, *others = [Pausing(on, on.dialect) for _ in range(5)]
        for watching in (first, *others):
            watching.subscribe([A])
        named, late, page = on.viewer(), on.viewer(), on.viewer()
        page.subscribe_all(is_shown=False)
        for viewer in (named, late):
            viewer.join(B)
        joined: dict[Listener, tuple[bool, int]] = {}

        async def join(viewer: Listener, drop_id: DropId) -> None:
            await on.hub.until_told(viewer.watch, drop_id)
            viewer.join(drop_id)
            joined[viewer] = bool(on.hub._telling), len(on.hub._dirty)

        def happen() -> None:
            for viewer, drop_id in ((named, C), (late, A), (page, C)):
                nursery.start_soon(join, viewer, drop_id)

        first.then = happen
        for drop_id in (A, B, C):
            on.buy(drop_id, ANN)
        await trio.sleep(1)
        assert joined == {
            named: (True, 2),  # another drop is being told
            late: (False, 2),  # its own: the pass goes on after it
            page: (False, 2),  # it hears all, so any would be its own
        }
        assert page.said(C) == ["stock 2: 9", "Purchased 3"]
        assert named.said(C) == late.said(A) == []


async def test_a_pass_to_ten_thousand_viewers_lets_the_others_run_after_each_slice(autojump_clock: MockClock) -> None:
    async with watched() as on:
        on.make(A)
        viewers = [on.viewer() for _ in range(10_000)]
        for number, viewer in enumerate(viewers):
            if number % 2:
                viewer.watch.subscribe_all()
            else:
                viewer.watch.subscribe([A])
        await trio.sleep(1)
        seen: list[int] = []

        async def other() -> None:
            while True:
                seen.append(on.hub.statistics().frames)
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            await trio.lowlevel.checkpoint()
            before = on.hub.statistics().frames
            on.reserve(A, ANN)
            while on.hub.statistics().frames < before + 10_000:
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        steps = [after - before for before, after in pairwise(seen)]
        assert sum(steps) > 9_000, "it saw nearly all of the pass"
        # One slice before the other task's turn in a round of Trio's, and one after it in the round before.
        assert max(steps) <= 2 * SLICE
        on.viewers = viewers[:10]


async def test_a_pass_of_ten_thousand_drops_lets_the_others_run(autojump_clock: MockClock) -> None:
    async with watched() as on:
        await trio.sleep(1)
        for number in range(10_000):
            on.make(DropId(f"drop-{number}"))
        turns = 0
        while on.hub._dirty:
            await trio.lowlevel.checkpoint()
            turns += 1
        assert turns >= 10_000 / hub_module.BUNDLES_MAX


# Memory -----------------------------------------------------------------------------------------------


async def test_memory_of_events_is_bounded_over_all_drops(autojump_clock: MockClock) -> None:
    async with watched(ring_max=100) as on:
        for drop_id in (A, B, C):
            on.make(drop_id, total=1_000)
        ann = on.viewer()
        ann.subscribe([A])
        for number in range(200):
            on.reserve((A, B)[number % 2], UserId(f"user-{number}"))
            if number % 3 == 0:
                await trio.sleep(0.02)
        feeds = on.hub._feeds
        assert sum(len(feed.events) for feed in feeds.values()) == on.hub.statistics().ring == 100
        assert set(feeds) == {A, B}, "nothing is kept of a drop that is quiet and that nobody watches"


async def test_events_that_fall_out_of_memory_before_their_pass_are_said_with_a_snapshot(
    autojump_clock: MockClock,
) -> None:
    async with watched(ring_max=3) as on:
        on.make(A)
        on.make(B)
        ann, ben, all_ = on.viewer(), on.viewer(), on.viewer()
        ann.subscribe([A])
        ben.subscribe([B])
        all_.subscribe_all()
        await trio.sleep(1)
        on.buy(B, ANN)
        await trio.lowlevel.checkpoint()
        on.commit(A, on.wish(ANN), on.purchase(ANN), on.wish(BEN), on.purchase(BEN), on.wish(CAT), on.purchase(CAT))
        await trio.sleep(1)
        assert ann.said() == ["snapshot 1: 10", "snapshot 7: 7"]
        assert all_.said(A) == ann.said()
        assert ben.said()[-1] in ("Purchased 3", "snapshot 3: 9")


async def test_nothing_is_kept_of_who_left_and_nothing_that_it_still_asks_for(autojump_clock: MockClock) -> None:
    async with watched() as on:
        on.make(A)
        ann = on.viewer()
        ann.identify(ANN)
        ann.subscribe([A])
        ann.watch.close()
        ann.watch.close()
        ann.watch.identify(BEN)  # what it asked for before, and what took its time
        ann.watch.subscribe([A])
        ann.watch.subscribe_all()
        ann.watch.join(A)
        ann.watch.go_on()
        on.reserve(A, ANN)
        await trio.sleep(1)
        assert ann.said() == ["snapshot 1: 10"]
        hub: Hub = on.hub
        assert not [*hub._users, *hub._all, *hub._watches, *hub._parked, *hub._feeds[A].watches]
        assert hub.statistics().viewers == 0


async def test_unsubscribed_is_told_no_more(autojump_clock: MockClock) -> None:
    async with watched() as on:
        on.make(A)
        on.make(B)
        ann, all_ = on.viewer(), on.viewer()
        ann.subscribe([A, B])
        all_.subscribe_all()
        await trio.sleep(1)
        ann.unsubscribe(A)
        all_.unsubscribe_all()
        on.reserve(A, ANN)
        on.reserve(B, ANN)
        await trio.sleep(1)
        assert ann.said(A) == ["snapshot 1: 10"]
        assert ann.said(B) == ["snapshot 1: 10", "stock 2: 9"]
        assert len(all_.heard) == 2


async def test_expiries_of_a_batch_are_told_in_order(autojump_clock: MockClock) -> None:
    async with watched() as on:
        on.make(A)
        ann = on.viewer()
        ann.identify(ANN)
        ann.subscribe([A])
        on.commit(A, on.wish(ANN), on.wish(BEN))
        await trio.sleep(1)
        on.now += HOLD_MS
        on.commit(A, on.wish(CAT))
        await trio.sleep(1)
        assert ann.said()[1:] == ["stock 3: 8", "Expired 4", "stock 6: 9"]


async def test_who_joins_without_being_shown_hears_what_comes_from_then_on(autojump_clock: MockClock) -> None:
    async with watched() as on:
        on.make(A)
        on.reserve(A, ANN)
        ann, all_ = on.viewer(), on.viewer()
        ann.knows[A], all_.knows[A] = Memory(2), Memory(2)
        all_.watch.subscribe_all(is_shown=False)
        ann.watch.join(A)
        await trio.sleep(1)
        assert ann.said() == all_.said() == []
        on.reserve(A, BEN)
        await trio.sleep(1)
        assert ann.said() == all_.said() == ["stock 3: 8"]


async def test_who_joins_its_drops_one_by_one_misses_nothing_of_the_later_ones(autojump_clock: MockClock) -> None:
    async with watched() as on:
        for drop_id in (A, B, C):
            on.make(drop_id)
        await trio.sleep(1)
        quick, slow = on.viewer(), on.viewer()
        for viewer in (quick, slow):
            viewer.subscribe_all(is_shown=False)
        slow.room = 0
        on.buy(B, ANN)
        await trio.sleep(1)
        on.buy(B, BEN)  # while they watch all; the pass that tells it is yet to come
        for viewer in (quick, slow):
            viewer.join(A)
        await trio.sleep(1)
        for viewer in (quick, slow):
            viewer.join(B)
            viewer.join(C)
        slow.read()
        await trio.sleep(1)
        assert quick.said(B) == ["stock 2: 9", "Purchased 3", "stock 4: 8", "Purchased 5"]
        assert slow.said(B) == quick.said(B)[1:], "of the stock, as ever, the newest"
        assert quick.said(A) == slow.said(A) == quick.said(C) == slow.said(C) == []
        assert not on.hub._missed[quick.watch][1], "each is told once"


async def test_what_was_missed_before_joining_is_not_kept_for_as_long_as_the_connection(
    autojump_clock: MockClock,
) -> None:
    async with watched() as on:
        on.make(A)
        on.make(B)
        await trio.sleep(1)
        ann, ben = on.viewer(), on.viewer()
        for viewer in (ann, ben):
            viewer.subscribe_all(is_shown=False)
        on.buy(B, ANN)
        for viewer in (ann, ben):
            viewer.join(A)
        assert set(on.hub._missed) == {ann.watch, ben.watch}
        ben.watch.close()
        assert set(on.hub._missed) == {ann.watch}
        await trio.sleep(JOINING_S + SWEEP_S)
        assert not on.hub._missed
        ann.join(B)
        await trio.sleep(1)
        assert ann.said(B) == []
        on.reserve(B, BEN)
        await trio.sleep(1)
        assert ann.said(B) == ["stock 4: 8"]
