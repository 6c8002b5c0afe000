"""The rules of a drop, one sentence each, with both sides of every boundary."""

from collections.abc import Callable

import msgspec
import pytest

from engine.ahead import Ahead
from engine.drop import Drop, Rules
from engine.model import (
    Cancelled,
    Command,
    Create,
    DropCreated,
    DropRecord,
    DropStatus,
    DropUpdated,
    Expired,
    Hold,
    LatestPurchase,
    Purchased,
    PurchaseId,
    RefusalCode,
    Refused,
    ReservationId,
    ReservationStatus,
    Reserved,
    Sweep,
    Swept,
    UserId,
)
from tests.engine.making import (
    ANN,
    BEN,
    CAT,
    DROP,
    at,
    born,
    cancel,
    counts,
    live,
    play,
    purchase,
    record_of,
    reserve,
    sweep,
    terms,
)

ANNS_HOLD = Hold(ReservationId("ann"), DROP, ANN, 1, at(0), at(60_000))


def refusal(drop: Drop, command: Command, now: int) -> RefusalCode:
    """The code of a decision that must be a refusal, and must have changed nothing."""
    sweep(drop, now)
    before = record_of(drop)
    decision = drop.decide(command, at(now))
    assert isinstance(decision, Refused), decision
    assert decision.seq == drop.seq
    assert record_of(drop) == before
    return decision.code


# Birth --------------------------------------------------------------------------------------------------


def test_a_drop_is_born_with_seq_1_and_all_its_stock() -> None:
    drop = Drop(terms(100), DropStatus.LIVE)
    assert drop.decide(Create(terms(100), DropStatus.LIVE), at(5)) == DropCreated(1, at(5), terms(100), DropStatus.LIVE)
    drop.apply(DropCreated(1, at(5), terms(100), DropStatus.LIVE))
    assert drop.seq == 1
    assert counts(drop) == (100, 0, 0)


def test_a_drop_is_born_once() -> None:
    with pytest.raises(AssertionError, match="born once"):
        live().decide(Create(terms(), DropStatus.LIVE), at(0))


def test_deciding_alone_changes_nothing() -> None:
    drop = live(2)
    drop.decide(reserve(ANN), at(0))
    assert record_of(drop) == record_of(live(2))


@pytest.mark.parametrize(
    ("status", "starts_at", "ends_at"),
    [(DropStatus.SCHEDULED, 10, 100), (DropStatus.LIVE, None, 10)],
)
def test_the_clock_of_a_drop_does_not_run_before_its_birth(
    status: DropStatus, starts_at: int | None, ends_at: int
) -> None:
    # A start or end that passes between the request and the decision must not come before `DropCreated`.
    made = terms(starts_at=starts_at, ends_at=ends_at)
    drop = Drop(made, status)
    assert drop.next_deadline() is None
    assert drop.due(at(10)) is None
    assert play(drop, Create(made, status), 10) == DropCreated(1, at(10), made, status)
    assert drop.next_deadline() == 10
    assert [event.seq for event in sweep(drop, 10)] == [2]


# Reserve ------------------------------------------------------------------------------------------------


def test_a_reservation_takes_its_units_and_lasts_its_hold() -> None:
    drop = live(2)
    hold = Hold(ReservationId("ann"), DROP, ANN, 1, at(500), at(60_500))
    assert play(drop, reserve(ANN), 500) == Reserved(2, at(500), hold, 1)
    assert counts(drop) == (1, 1, 0)
    assert drop.next_deadline() == 60_500


def test_a_reservation_of_several_units_takes_them_all() -> None:
    drop = live(5)
    decision = play(drop, reserve(ANN, qty=3), 0)
    assert isinstance(decision, Reserved)
    assert decision.available_stock == 2
    assert counts(drop) == (2, 3, 0)


def test_the_last_unit_goes_to_the_first_who_asks() -> None:
    drop = live(1)
    assert isinstance(play(drop, reserve(ANN), 0), Reserved)
    assert refusal(drop, reserve(BEN), 0) is RefusalCode.OUT_OF_STOCK
    assert counts(drop) == (0, 1, 0)


def test_the_stock_suffices_for_exactly_as_much_as_there_is() -> None:
    drop = live(3)
    assert refusal(drop, reserve(ANN, qty=4), 0) is RefusalCode.OUT_OF_STOCK
    assert isinstance(play(drop, reserve(ANN, qty=3), 0), Reserved)
    assert counts(drop) == (0, 3, 0)


def test_a_drop_without_stock_refuses_the_first() -> None:
    assert refusal(live(0), reserve(ANN), 0) is RefusalCode.OUT_OF_STOCK


def test_a_user_has_one_active_reservation_on_a_drop() -> None:
    drop = live(9)
    play(drop, reserve(ANN, "first"), 0)
    assert refusal(drop, reserve(ANN, "second"), 0) is RefusalCode.ALREADY_RESERVED
    assert counts(drop) == (8, 1, 0)


def test_already_reserved_comes_before_out_of_stock() -> None:
    drop = live(1)
    play(drop, reserve(ANN), 0)
    assert refusal(drop, reserve(ANN, "again"), 0) is RefusalCode.ALREADY_RESERVED
    assert refusal(drop, reserve(BEN), 0) is RefusalCode.OUT_OF_STOCK


def test_not_active_comes_before_already_reserved_and_out_of_stock() -> None:
    drop = live(1, ends_at=10)
    play(drop, reserve(ANN), 0)
    assert refusal(drop, reserve(ANN, "again"), 10) is RefusalCode.DROP_NOT_ACTIVE
    assert refusal(drop, reserve(BEN), 10) is RefusalCode.DROP_NOT_ACTIVE


@pytest.mark.parametrize("status", [status for status in DropStatus if status is not DropStatus.LIVE])
def test_only_a_live_drop_takes_reservations(status: DropStatus) -> None:
    assert refusal(born(terms(), status), reserve(ANN), 0) is RefusalCode.DROP_NOT_ACTIVE


@pytest.mark.parametrize("end", [purchase(ANN), cancel(ANN)])
def test_after_its_reservation_ended_a_user_may_reserve_again(end: Command) -> None:
    drop = live(2)
    play(drop, reserve(ANN), 0)
    play(drop, end, 1)
    assert isinstance(play(drop, reserve(ANN, "again"), 2), Reserved)


def test_after_an_expiry_the_same_user_may_reserve_at_that_very_instant() -> None:
    drop = live(1)
    play(drop, reserve(ANN), 0)
    assert refusal(drop, reserve(ANN, "again"), 59_999) is RefusalCode.ALREADY_RESERVED
    assert isinstance(play(drop, reserve(ANN, "again"), 60_000), Reserved)
    assert counts(drop) == (0, 1, 0)


@pytest.mark.parametrize("command", [reserve(ANN, qty=0), reserve(ANN, qty=-1), reserve(ANN, hold_ms=0)])
def test_a_reservation_of_nothing_or_for_no_time_is_a_bug_of_the_caller(command: Command) -> None:
    with pytest.raises(AssertionError):
        live().decide(command, at(0))


# The window ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "status"),
    [(999, DropStatus.SCHEDULED), (1_000, DropStatus.LIVE), (1_001, DropStatus.LIVE)],
)
def test_a_scheduled_drop_is_live_from_its_start_on(now: int, status: DropStatus) -> None:
    drop = born(terms(starts_at=1_000), DropStatus.SCHEDULED)
    assert drop.next_deadline() == 1_000
    swept = sweep(drop, now)
    assert drop.status is status
    assert swept == ([] if now < 1_000 else [DropUpdated(2, at(now), DropStatus.LIVE)])


@pytest.mark.parametrize(
    ("now", "status"),
    [(999, DropStatus.LIVE), (1_000, DropStatus.ENDED), (1_001, DropStatus.ENDED)],
)
def test_a_live_drop_has_ended_from_its_end_on(now: int, status: DropStatus) -> None:
    drop = live(ends_at=1_000)
    assert drop.next_deadline() == 1_000
    sweep(drop, now)
    assert drop.status is status
    assert drop.next_deadline() == (1_000 if now < 1_000 else None)


def test_a_window_is_open_from_its_start_to_just_before_its_end() -> None:
    drop = born(terms(9, starts_at=10, ends_at=20), DropStatus.SCHEDULED)
    assert refusal(drop, reserve(ANN), 9) is RefusalCode.DROP_NOT_ACTIVE
    assert isinstance(play(drop, reserve(ANN), 10), Reserved)
    assert isinstance(play(drop, reserve(BEN), 19), Reserved)
    assert refusal(drop, reserve(CAT), 20) is RefusalCode.DROP_NOT_ACTIVE


def test_a_drop_nobody_looked_at_goes_through_its_whole_window_at_once() -> None:
    drop = born(terms(starts_at=10, ends_at=20), DropStatus.SCHEDULED)
    assert sweep(drop, 30) == [DropUpdated(2, at(30), DropStatus.LIVE), DropUpdated(3, at(30), DropStatus.ENDED)]


def test_a_paused_drop_ends_at_its_end_too() -> None:
    drop = born(terms(ends_at=20), DropStatus.PAUSED)
    assert sweep(drop, 20) == [DropUpdated(2, at(20), DropStatus.ENDED)]


@pytest.mark.parametrize("status", [DropStatus.DRAFT, DropStatus.ENDED, DropStatus.CANCELLED])
def test_a_drop_that_waits_for_its_owner_or_is_over_has_no_clock(status: DropStatus) -> None:
    drop = born(terms(starts_at=10, ends_at=20), status)
    assert drop.next_deadline() is None
    assert drop.due(at(1_000_000)) is None


def test_a_hold_outlives_the_end_of_its_drop_and_can_be_bought() -> None:
    drop = live(1, ends_at=10)
    play(drop, reserve(ANN), 5)
    assert isinstance(play(drop, purchase(ANN), 60_004), Purchased)
    assert drop.status is DropStatus.ENDED
    assert counts(drop) == (0, 0, 1)


# Purchase -----------------------------------------------------------------------------------------------


def test_a_purchase_turns_held_into_sold_and_leaves_the_stock() -> None:
    drop = live(3)
    play(drop, reserve(ANN, qty=2), 0)
    decision = play(drop, purchase(ANN, "p1"), 100)
    hold = Hold(ReservationId("ann"), DROP, ANN, 2, at(0), at(60_000))
    assert decision == Purchased(3, at(100), hold, PurchaseId("p1"), "ann-name", 1)
    assert counts(drop) == (1, 0, 2)
    assert drop.next_deadline() is None


@pytest.mark.parametrize(
    ("now", "is_bought"),
    [(59_999, True), (60_000, False), (60_001, False)],
)
def test_a_hold_is_bought_before_its_deadline_and_never_at_it(now: int, is_bought: bool) -> None:
    drop = live(1)
    play(drop, reserve(ANN), 0)
    decision = play(drop, purchase(ANN), now)
    if is_bought:
        assert isinstance(decision, Purchased)
        assert counts(drop) == (0, 0, 1)
    else:
        assert decision == Refused(RefusalCode.RESERVATION_EXPIRED, 3)  # 3: the expiry that was swept before it
        assert counts(drop) == (1, 0, 0)


@pytest.mark.parametrize("now", [60_000, 60_001])
@pytest.mark.parametrize("command", [purchase(ANN), cancel(ANN)])
def test_an_expired_hold_is_lost_even_if_nobody_swept(command: Command, now: int) -> None:
    drop = live(1)
    play(drop, reserve(ANN), 0)
    assert drop.decide(command, at(now)) == Refused(RefusalCode.RESERVATION_EXPIRED, 2)
    assert counts(drop) == (0, 1, 0)


def test_a_purchase_without_any_reservation_needs_one() -> None:
    drop = live(1)
    play(drop, reserve(BEN), 0)
    assert refusal(drop, purchase(ANN), 1) is RefusalCode.RESERVATION_REQUIRED


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (purchase(ANN), RefusalCode.ALREADY_PURCHASED),
        (cancel(ANN), RefusalCode.RESERVATION_NOT_ACTIVE),
        (Sweep(), RefusalCode.RESERVATION_EXPIRED),
    ],
)
def test_a_purchase_is_refused_by_how_the_newest_reservation_ended(end: Command, code: RefusalCode) -> None:
    drop = live(1)
    play(drop, reserve(ANN), 0)
    play(drop, end, 60_000 if isinstance(end, Sweep) else 1)
    assert refusal(drop, purchase(ANN), 60_001) is code


def test_only_the_newest_of_several_ended_reservations_counts() -> None:
    drop = live(3)
    play(drop, reserve(ANN, "a"), 0)
    play(drop, purchase(ANN), 1)
    assert refusal(drop, purchase(ANN), 2) is RefusalCode.ALREADY_PURCHASED
    play(drop, reserve(ANN, "b"), 3)
    play(drop, cancel(ANN, "b"), 4)
    assert refusal(drop, purchase(ANN), 5) is RefusalCode.RESERVATION_NOT_ACTIVE
    play(drop, reserve(ANN, "c"), 6)
    assert refusal(drop, purchase(ANN), 60_006) is RefusalCode.RESERVATION_EXPIRED
    assert drop.newest_ended == {ANN: ReservationStatus.EXPIRED}


def test_the_feed_shows_the_three_newest_purchases_newest_first() -> None:
    drop = live(4)
    for number, name in enumerate(["ann", "ben", "cat", "dan"]):
        play(drop, reserve(UserId(name)), number)
        play(drop, purchase(UserId(name)), 10 + number)
    assert drop.latest_purchases == (
        LatestPurchase(UserId("dan"), "dan-name", 1, at(13)),
        LatestPurchase(UserId("cat"), "cat-name", 1, at(12)),
        LatestPurchase(UserId("ben"), "ben-name", 1, at(11)),
    )


# Cancel -------------------------------------------------------------------------------------------------


def test_a_cancelled_hold_gives_its_units_back_at_once() -> None:
    drop = live(1)
    play(drop, reserve(ANN), 0)
    assert play(drop, cancel(ANN), 59_999) == Cancelled(3, at(59_999), ANNS_HOLD, 1)
    assert counts(drop) == (1, 0, 0)
    assert isinstance(play(drop, reserve(BEN), 59_999), Reserved)


def test_only_ones_own_active_reservation_can_be_cancelled() -> None:
    drop = live(2)
    play(drop, reserve(ANN), 0)
    assert refusal(drop, cancel(BEN, "ann"), 1) is RefusalCode.RESERVATION_NOT_FOUND
    assert refusal(drop, cancel(ANN, "another"), 1) is RefusalCode.RESERVATION_NOT_FOUND
    play(drop, purchase(ANN), 2)
    assert refusal(drop, cancel(ANN), 3) is RefusalCode.RESERVATION_NOT_FOUND


# What is due --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("now", "is_due"), [(59_999, False), (60_000, True), (60_001, True)])
def test_a_hold_expires_at_its_deadline_and_not_before(now: int, is_due: bool) -> None:
    drop = live(1)
    play(drop, reserve(ANN), 0)
    assert drop.due(at(now)) == (Expired(3, at(now), ANNS_HOLD, 1) if is_due else None)
    assert sweep(drop, now) == ([Expired(3, at(now), ANNS_HOLD, 1)] if is_due else [])
    assert counts(drop) == ((1, 0, 0) if is_due else (0, 1, 0))


def test_a_hold_expires_once() -> None:
    drop = live(1)
    play(drop, reserve(ANN), 0)
    assert len(sweep(drop, 60_000)) == 1
    assert sweep(drop, 120_000) == []
    assert counts(drop) == (1, 0, 0)


def expired_users(events: list[Expired | DropUpdated]) -> list[str]:
    return [event.hold.user_id if isinstance(event, Expired) else event.status.value for event in events]


def due_order(drop: Rules, now: int) -> list[str]:
    return expired_users([event for event in sweep(drop, now) if isinstance(event, Expired | DropUpdated)])


def test_holds_expire_in_the_order_of_their_deadlines() -> None:
    drop = live(3)
    play(drop, reserve(ANN, hold_ms=30), 0)
    play(drop, reserve(BEN, hold_ms=10), 1)
    play(drop, reserve(CAT, hold_ms=20), 2)
    assert drop.next_deadline() == 11
    assert due_order(drop, 100) == ["ben", "cat", "ann"]


def taken_cat_ann_ben() -> Drop:
    drop = live(4, ends_at=100)
    play(drop, reserve(BEN, "given back"), 0)
    play(drop, reserve(CAT, hold_ms=100), 0)
    play(drop, cancel(BEN, "given back"), 0)
    play(drop, reserve(ANN, hold_ms=100), 0)
    play(drop, reserve(BEN, hold_ms=100), 0)
    return drop


@pytest.mark.parametrize(
    "remade",
    [lambda drop: drop, Ahead, lambda drop: Drop.restored(record_of(drop))],
    ids=["as it was", "ahead", "restored"],
)
def test_at_one_instant_the_drops_clock_comes_first_and_then_holds_as_they_were_taken(
    remade: Callable[[Drop], Rules],
) -> None:
    drop = remade(taken_cat_ann_ben())
    assert due_order(drop, 100) == ["ended", "cat", "ann", "ben"]


def test_a_hold_taken_ahead_expires_after_the_equal_ones_before_it() -> None:
    drop = Ahead(taken_cat_ann_ben())
    play(drop, reserve(UserId("dan"), hold_ms=100), 0)
    assert due_order(drop, 100) == ["ended", "cat", "ann", "ben", "dan"]


def test_a_hold_that_runs_out_before_the_end_comes_before_it() -> None:
    drop = live(1, ends_at=100)
    play(drop, reserve(ANN, hold_ms=99), 0)
    assert due_order(drop, 100) == ["ann", "ended"]


def test_the_next_deadline_is_the_earliest_of_holds_and_clock() -> None:
    drop = live(2, ends_at=50)
    assert drop.next_deadline() == 50
    play(drop, reserve(ANN, hold_ms=60), 0)
    assert drop.next_deadline() == 50
    play(drop, reserve(BEN, hold_ms=40), 0)
    assert drop.next_deadline() == 40
    play(drop, cancel(BEN), 1)
    assert drop.next_deadline() == 50
    sweep(drop, 50)
    assert drop.next_deadline() == 60
    sweep(drop, 60)
    assert drop.next_deadline() is None


def test_a_sweep_that_finds_nothing_says_so_and_changes_nothing() -> None:
    drop = live(1)
    assert play(drop, Sweep(), 0) == Swept(0, 1)
    assert drop.seq == 1


def test_deadlines_of_holds_that_ended_early_do_not_pile_up() -> None:
    drop = live(2)
    play(drop, reserve(BEN, hold_ms=10**9), 0)
    for round_ in range(10_000):
        play(drop, reserve(ANN, hold_ms=10**9), round_)
        play(drop, cancel(ANN), round_)
        assert drop._deadlines is not None
        assert len(drop._deadlines) <= 64 + 2 * 2
    assert drop.next_deadline() == 10**9


# What must never happen is an AssertionError ------------------------------------------------------------


def with_anns_hold() -> Drop:
    drop = live(2)
    play(drop, reserve(ANN), 0)
    return drop


def test_an_event_applied_twice_is_a_bug() -> None:
    drop = live(2)
    reserved = play(drop, reserve(ANN), 0)
    assert isinstance(reserved, Reserved)
    with pytest.raises(AssertionError, match="event 2 does not follow 2"):
        drop.apply(reserved)
    with pytest.raises(AssertionError, match="second active hold"):
        drop.apply(msgspec.structs.replace(reserved, seq=3))


def test_an_event_that_skips_a_number_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="event 4 does not follow 2"):
        with_anns_hold().apply(Cancelled(4, at(1), ANNS_HOLD, 2))


def test_an_expiry_before_its_deadline_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="before its deadline"):
        with_anns_hold().apply(Expired(3, at(59_999), ANNS_HOLD, 2))
    with_anns_hold().apply(Expired(3, at(60_000), ANNS_HOLD, 2))


def test_a_purchase_at_its_deadline_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="at or after its deadline"):
        with_anns_hold().apply(Purchased(3, at(60_000), ANNS_HOLD, PurchaseId("p"), "ann", 1))
    with_anns_hold().apply(Purchased(3, at(59_999), ANNS_HOLD, PurchaseId("p"), "ann", 1))


@pytest.mark.parametrize(
    "end",
    [
        Purchased(4, at(2), ANNS_HOLD, PurchaseId("p"), "ann", 1),
        Cancelled(4, at(2), ANNS_HOLD, 2),
        Expired(4, at(60_000), ANNS_HOLD, 2),
    ],
)
def test_a_hold_that_ended_cannot_end_again(end: Purchased | Cancelled | Expired) -> None:
    drop = with_anns_hold()
    play(drop, cancel(ANN), 1)
    with pytest.raises(AssertionError, match="no such active hold"):
        drop.apply(end)


def test_taking_more_than_there_is_is_a_bug() -> None:
    too_much = Hold(ReservationId("x"), DROP, BEN, 3, at(0), at(10))
    with pytest.raises(AssertionError, match="negative stock"):
        live(2).apply(Reserved(2, at(0), too_much, -1))


# Restoring ----------------------------------------------------------------------------------------------


def test_a_restored_drop_is_the_drop_that_was_stored() -> None:
    drop = live(5)
    play(drop, reserve(ANN), 0)
    play(drop, reserve(BEN, qty=2), 1)
    play(drop, purchase(ANN), 2)
    twin = Drop.restored(record_of(drop))
    assert record_of(twin) == record_of(drop)
    assert twin.next_deadline() == 60_001
    assert refusal(twin, purchase(ANN), 3) is RefusalCode.ALREADY_PURCHASED
    assert isinstance(play(twin, purchase(BEN), 3), Purchased)


def consistent() -> DropRecord:
    drop = live(5)
    play(drop, reserve(ANN), 0)
    play(drop, reserve(BEN, qty=2), 0)
    return record_of(drop)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"available_stock": 3}, "appeared or vanished"),
        ({"available_stock": 1}, "appeared or vanished"),
        ({"sold_count": 1}, "appeared or vanished"),
        ({"held_count": 2, "available_stock": 3}, "not the sum"),
        ({"holds": []}, "not the sum"),
        ({"holds": consistent().holds * 2, "held_count": 6}, "two active holds"),
        ({"available_stock": -1, "sold_count": 3}, "negative stock"),
    ],
)
def test_a_record_whose_counts_contradict_its_rows_is_not_restored(changed: dict[str, object], why: str) -> None:
    Drop.restored(consistent())
    with pytest.raises(AssertionError, match=why):
        Drop.restored(msgspec.structs.replace(consistent(), **changed))


def test_a_restored_drop_and_its_record_change_apart() -> None:
    record = consistent()
    play(Drop.restored(record), purchase(ANN), 1)
    assert record == consistent()
