"""An actor's inbox: bounded, in order, and never deaf to a nudge."""

import pytest

from engine.mailbox import Mailbox, MailboxFull, MailboxStatistics


class Rung:
    """A mailbox, and how often its reader was rung for."""

    def __init__(self, waiting_max: int = 9, urgent_max: int = 9) -> None:
        self.times = 0
        self.mailbox: Mailbox[int] = Mailbox(self._ring, waiting_max, urgent_max)

    def _ring(self) -> None:
        self.times += 1


def filled(waiting_max: int, *messages: int) -> Mailbox[int]:
    mailbox = Rung(waiting_max).mailbox
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
    mailbox = Rung(1, urgent_max=2).mailbox
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


def test_reader_that_listens_is_rung_for_once() -> None:
    rung = Rung()
    rung.mailbox.listen()
    assert rung.times == 0
    rung.mailbox.put_nowait(1)
    rung.mailbox.put_nowait(2)
    rung.mailbox.put_urgent_nowait(3)
    rung.mailbox.nudge()
    assert rung.times == 1


def test_reader_that_comes_late_is_rung_for_at_once() -> None:
    rung = Rung()
    rung.mailbox.put_nowait(1)
    assert rung.times == 0
    rung.mailbox.listen()
    assert rung.times == 1
    rung.mailbox.take(9)
    rung.mailbox.listen()
    assert rung.times == 1


def test_nudge_rings_without_a_message_and_is_heard_once() -> None:
    rung = Rung()
    rung.mailbox.nudge()
    rung.mailbox.listen()
    assert rung.times == 1
    rung.mailbox.heard()
    rung.mailbox.listen()
    assert rung.times == 1
    rung.mailbox.nudge()
    assert rung.times == 2


def test_nudge_after_the_reader_came_is_not_lost() -> None:
    rung = Rung()
    rung.mailbox.heard()
    rung.mailbox.nudge()  # by the reader itself, for instance
    rung.mailbox.listen()
    assert rung.times == 1


def test_reader_that_listens_to_the_side_door_alone_lets_the_line_wait() -> None:
    rung = Rung()
    rung.mailbox.put_nowait(1)
    rung.mailbox.listen(urgent_only=True)
    rung.mailbox.put_nowait(2)
    assert rung.times == 0
    rung.mailbox.put_urgent_nowait(3)
    assert rung.times == 1
    rung.mailbox.take_urgent(9)
    rung.mailbox.listen(urgent_only=True)
    rung.mailbox.nudge()
    assert rung.times == 2
    rung.mailbox.heard()
    rung.mailbox.listen()  # and the line is still there
    assert rung.times == 3


def test_what_is_put_back_rings() -> None:
    rung = Rung()
    rung.mailbox.listen()
    rung.mailbox.put_back([1])
    assert rung.times == 1
