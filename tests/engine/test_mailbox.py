"""An actor's inbox: bounded, in order, and never deaf to a nudge."""

from collections.abc import Callable
from functools import partial

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from engine.mailbox import Mailbox, MailboxFull, MailboxStatistics


def filled(waiting_max: int, *messages: int) -> Mailbox[int]:
    mailbox: Mailbox[int] = Mailbox(waiting_max)
    for message in messages:
        mailbox.put_nowait(message)
    return mailbox


def test_messages_come_out_in_the_order_in_which_they_went_in() -> None:
    mailbox = filled(9, 1, 2, 3)
    assert mailbox.take(2) == [1, 2]
    mailbox.put_nowait(4)
    assert mailbox.take(9) == [3, 4]
    assert mailbox.take(9) == []


def test_taking_none_takes_none() -> None:
    mailbox = filled(9, 1)
    assert mailbox.take(0) == []
    assert len(mailbox) == 1


def test_a_full_mailbox_refuses_at_once_and_loses_nothing() -> None:
    mailbox = filled(2, 1, 2)
    with pytest.raises(MailboxFull):
        mailbox.put_nowait(3)
    assert mailbox.take(1) == [1]
    mailbox.put_nowait(3)
    assert mailbox.take(9) == [2, 3]


def test_what_is_put_back_comes_first_and_always_has_room() -> None:
    mailbox = filled(3, 1, 2, 3)
    taken = mailbox.take(2)
    mailbox.put_nowait(4)
    mailbox.put_nowait(5)
    mailbox.put_back(taken)
    assert mailbox.take(9) == [1, 2, 3, 4, 5]


def test_the_side_door_is_taken_first_and_has_a_bound_of_its_own() -> None:
    mailbox: Mailbox[int] = Mailbox(1, urgent_max=2)
    mailbox.put_nowait(1)
    mailbox.put_urgent_nowait(2)
    mailbox.put_urgent_nowait(3)
    with pytest.raises(MailboxFull):
        mailbox.put_nowait(4)
    with pytest.raises(MailboxFull):
        mailbox.put_urgent_nowait(5)
    assert (len(mailbox), mailbox.in_line) == (3, 1)
    assert mailbox.take_urgent(1) == [2]
    assert mailbox.take_all() == [3, 1]
    assert len(mailbox) == 0


def test_statistics_remember_the_peak() -> None:
    mailbox = filled(5, 1, 2, 3)
    mailbox.take(2)
    assert mailbox.statistics() == MailboxStatistics(waiting=1, waiting_max=5, waiting_peak=3)


async def test_a_message_wakes_the_reader(autojump_clock: MockClock) -> None:
    mailbox: Mailbox[int] = Mailbox(9)
    got: list[int] = []

    async def read() -> None:
        await mailbox.ready()
        got.extend(mailbox.take(9))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        assert got == []
        mailbox.put_nowait(1)
        mailbox.put_nowait(2)
    assert got == [1, 2]


@pytest.mark.parametrize("is_early", [True, False], ids=["before the reader waits", "while the reader waits"])
async def test_a_nudge_wakes_the_reader_without_a_message_and_once(autojump_clock: MockClock, is_early: bool) -> None:
    mailbox: Mailbox[int] = Mailbox(9)
    if is_early:
        mailbox.nudge()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mailbox.ready)
        await wait_all_tasks_blocked()
        if not is_early:
            mailbox.nudge()
    with trio.move_on_after(1) as waiting:
        await mailbox.ready()
    assert waiting.cancelled_caught


async def test_a_reader_that_listens_to_the_side_door_alone_lets_the_line_wait(autojump_clock: MockClock) -> None:
    mailbox: Mailbox[int] = Mailbox(9, urgent_max=9)
    with trio.move_on_after(1) as waiting:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(mailbox.ready, urgent_only=True))
            await wait_all_tasks_blocked()
            mailbox.put_nowait(1)
    assert waiting.cancelled_caught
    wakes: list[Callable[[], None]] = [partial(mailbox.put_urgent_nowait, 2), mailbox.nudge]
    for wake in wakes:
        with trio.fail_after(1):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(mailbox.ready, urgent_only=True))
                await wait_all_tasks_blocked()
                wake()
        mailbox.take_urgent(9)
    with trio.fail_after(1):
        await mailbox.ready()  # and the line is still there


async def test_a_reader_that_never_waits_still_lets_others_run(autojump_clock: MockClock) -> None:
    mailbox = filled(9, 1)
    turns: list[str] = []

    async def read() -> None:
        for _ in range(3):
            await mailbox.ready()
            turns.append("read")

    async def other() -> None:
        for _ in range(3):
            await trio.lowlevel.checkpoint()
            turns.append("other")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        nursery.start_soon(other)
    assert sorted(turns[:2]) == ["other", "read"]


async def test_a_cancelled_reader_leaves_its_messages(autojump_clock: MockClock) -> None:
    mailbox = filled(9, 1)
    with trio.move_on_after(0) as scope:
        scope.cancel()
        await mailbox.ready()
    assert scope.cancelled_caught
    assert mailbox.take(9) == [1]
