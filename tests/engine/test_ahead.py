"""What runs ahead of the committed state, against a full copy of it: equal, whatever lands and whatever fails."""

import random

import pytest

from engine.ahead import Ahead
from engine.drop import Drop
from engine.model import Command, Event, Expired, Refused, ReservationStatus, Swept, UserId
from tests.engine.making import ANN, BEN, CAT, at, cancel, counts, live, play, purchase, record_of, reserve, sweep

USERS = [UserId(name) for name in ("ann", "ben", "cat", "dan", "eve")]


def test_what_is_on_its_way_is_seen_ahead_and_not_in_the_committed_state() -> None:
    committed = live(3)
    ahead = Ahead(committed)
    before = record_of(committed)
    play(ahead, reserve(ANN), 0)
    play(ahead, reserve(BEN), 0)
    play(ahead, purchase(BEN), 1)
    assert counts(ahead) == (1, 1, 1)
    assert (ahead.hold_of(ANN) is None, ahead.hold_of(BEN), ahead.hold_of(CAT)) == (False, None, None)
    assert ahead.ended_of(BEN) is ReservationStatus.CONSUMED
    assert record_of(committed) == before


def test_a_fall_back_forgets_what_was_on_its_way_and_nothing_else() -> None:
    committed = live(3)
    play(committed, reserve(ANN), 0)
    ahead = Ahead(committed)
    play(ahead, purchase(ANN), 1)
    play(ahead, reserve(BEN, hold_ms=5), 2)
    assert ahead.next_deadline() == 7
    ahead.fall_back()
    assert counts(ahead) == (2, 1, 0)
    assert ahead.hold_of(BEN) is None
    assert ahead.next_deadline() == 60_000
    assert [type(event) for event in sweep(ahead, 60_000)] == [Expired]


def test_an_expiry_that_does_not_land_is_due_again() -> None:
    committed = live(3)
    for user in (ANN, BEN, CAT):
        play(committed, reserve(user), 0)
    ahead = Ahead(committed)
    assert len(sweep(ahead, 60_000)) == 3
    ahead.fall_back()
    expired = sweep(ahead, 60_001)
    assert [event.hold.user_id for event in expired if isinstance(event, Expired)] == [ANN, BEN, CAT]


def test_a_hold_that_lands_after_its_end_was_decided_is_still_due_when_that_end_fails() -> None:
    committed = live(3)
    ahead = Ahead(committed)
    taken = play(ahead, reserve(ANN), 0)
    assert not isinstance(taken, Refused | Swept)
    play(ahead, purchase(ANN), 1)
    assert ahead.next_deadline() is None  # and it has left the deadlines
    committed.apply(taken)
    ahead.land([taken])
    ahead.fall_back()
    assert ahead.next_deadline() == 60_000


@pytest.mark.parametrize(("now", "is_settled"), [(59_999, True), (60_000, False)])
def test_the_committed_state_is_settled_until_the_first_of_its_deadlines(now: int, is_settled: bool) -> None:
    committed = live(3)
    play(committed, reserve(ANN), 0)
    play(committed, reserve(BEN), 1)
    ahead = Ahead(committed)
    assert ahead.is_settled(at(now)) is is_settled
    sweep(ahead, now)  # an expiry on its way has not happened yet
    assert ahead.is_settled(at(now)) is is_settled


def test_a_committed_state_that_has_one_ahead_of_it_does_not_say_what_is_due() -> None:
    committed = live(3)
    Ahead(committed)
    with pytest.raises(AssertionError, match="runs ahead"):
        committed.due(at(0))
    with pytest.raises(AssertionError, match="already"):
        Ahead(committed)


def test_entries_of_holds_that_ended_do_not_pile_up() -> None:
    committed = live(2)
    ahead = Ahead(committed)
    play(ahead, reserve(BEN, hold_ms=10**9), 0)
    for round_ in range(5_000):
        events = [play(ahead, reserve(ANN, hold_ms=10**9), round_), play(ahead, cancel(ANN), round_)]
        for event in events:
            assert not isinstance(event, Refused | Swept)
            if round_:
                committed.apply(event)
                ahead.land([event])
        if not round_:
            ahead.fall_back()
        assert ahead._deadlines is not None
        assert len(ahead._deadlines) <= 64 + 2 * 3
        assert not ahead._aside


class Pair:
    """The same history on what runs ahead, and on a full copy that is made anew after each failure."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.now = 0
        self.ids = 0
        total, ends_at = chance.randint(1, 6), chance.choice([None, None, 60])
        self.committed, self.reference = live(total, ends_at=ends_at), live(total, ends_at=ends_at)
        self.ahead = Ahead(self.committed)
        self.copy = Drop.restored(record_of(self.reference))
        self.on_the_way: list[Event] = []

    def step(self) -> None:
        chance = self.chance
        user = chance.choice(USERS)
        self.ids += 1
        match chance.randrange(12):
            case 0 | 1 | 2 | 3:
                qty, hold_ms = chance.choice([1, 1, 2]), chance.choice([1, 2, 3, 5, 8, 20])
                self.play(reserve(user, f"id-{self.ids}", qty=qty, hold_ms=hold_ms))
            case 4 | 5:
                self.play(purchase(user, f"id-{self.ids}"))
            case 6:
                hold = self.ahead.hold_of(user)
                self.play(cancel(user, "none" if hold is None else hold.id))
            case 7 | 8:
                self.now += chance.randint(1, 5)
            case 9 | 10:
                self.land(chance.randint(0, len(self.on_the_way)))
            case _:
                self.fail(chance.randint(0, len(self.on_the_way)))
        self.compare()

    def play(self, command: Command) -> None:
        now = at(self.now)
        while (event := self.ahead.due(now)) is not None:
            # Equal deadlines may change places after a failure; anything else may not.
            if isinstance(event, Expired):
                assert event.hold.expires_at == self.copy.next_deadline()
            self.happen(event)
        assert self.copy.due(now) is None
        decision = self.ahead.decide(command, now)
        assert decision == self.copy.decide(command, now)
        if not isinstance(decision, Refused | Swept):
            self.happen(decision)

    def happen(self, event: Event) -> None:
        self.ahead.apply(event)
        self.copy.apply(event)
        self.on_the_way.append(event)

    def land(self, count: int) -> None:
        landed, self.on_the_way = self.on_the_way[:count], self.on_the_way[count:]
        for event in landed:
            self.committed.apply(event)
            self.reference.apply(event)
        self.ahead.land(landed)

    def fail(self, kept: int) -> None:
        """All but the first `kept` are withdrawn, as when a part waits behind one that is in flight."""
        del self.on_the_way[kept:]
        self.ahead.fall_back()
        self.copy = Drop.restored(record_of(self.reference))
        for event in self.on_the_way:
            self.ahead.apply(event)
            self.copy.apply(event)

    def compare(self) -> None:
        ahead, copy = self.ahead, self.copy
        assert (counts(ahead), ahead.seq, ahead.status) == (counts(copy), copy.seq, copy.status)
        assert ahead.latest_purchases == copy.latest_purchases
        assert ahead.next_deadline() == copy.next_deadline()
        for user in USERS:
            assert ahead.hold_of(user) == copy.hold_of(user)
            if ahead.hold_of(user) is None:
                assert ahead.ended_of(user) == copy.ended_of(user)
        assert record_of(self.committed) == record_of(self.reference)
        due_at = Drop.restored(record_of(self.reference)).next_deadline()
        assert not self.ahead.is_settled(at(self.now)) or due_at is None or due_at > self.now


def play_a_pair(seed: int) -> None:
    pair = Pair(random.Random(seed))
    for _ in range(60):
        pair.step()


def test_thousands_of_histories_with_failures_are_told_from_a_full_copy_by_nothing() -> None:
    first = random.randrange(10**9)
    for seed in range(first, first + 3_000):
        try:
            play_a_pair(seed)
        except Exception as error:
            error.add_note(f"replay: play_a_pair({seed})")
            raise
