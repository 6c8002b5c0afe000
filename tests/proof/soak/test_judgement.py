"""The judgement of a soak: what it lets pass and what it does not, on both sides of each limit."""

import random
from collections.abc import Callable

import msgspec
import pytest

from tests.proof.soak import judgement
from tests.proof.soak.judgement import NOISE_BYTES, Verdict
from tests.proof.soak.people import Second, Seen
from tests.proof.soak.probe import Touch
from tests.proof.soak.sampling import Sample
from tests.proof.soak.server import Statistics

MIB = 2**20
LEVEL = 200 * MIB
HOUR = 3600


def statistics(**figures: int) -> Statistics:
    usual = {
        "drops": 30, "in_flight": 100, "mailboxes": 50, "parts": 40, "outbox": 10, "timer": 60, "deadlines": 9_000,
        "holds": 3_000, "endings": 60_000, "viewers": 210, "parked": 0, "feeds": 30, "ring": 100_000, "keys": 600,
        "users": 60_000, "blocks": 1_000_000, "heap_bytes": 30 * MIB,
    }  # fmt: skip
    return Statistics(**(usual | figures))


def sample(at: float, rss: float = LEVEL, descriptors: int = 2_000, threads: int = 4, **figures: int) -> Sample:
    return Sample(at, int(rss), descriptors, threads, 0.0, statistics(**figures))


def course(seconds: int, make: Callable[[int], Sample]) -> list[Sample]:
    return [make(at) for at in range(0, seconds + 1, 2)]


def broken(verdicts: list[Verdict]) -> set[str]:
    return {verdict.name for verdict in verdicts if not verdict.holds}


def seen(**more: object) -> Seen:
    """Ten seconds of 400 changes/s, nobody lost."""
    answers = {"reserve 201": 2_000, "purchase 201": 1_500, "cancel 200": 500, "reserve 409 OUT_OF_STOCK": 9_000}
    usual = {
        "began_at": 0.0, "seconds": 10.0, "next_person": 0, "came": 11_000, "turned_away": 0, "answers": answers,
        "in_time": answers, "gave_up": {}, "broken": {}, "all_answers": answers, "all_unanswered": {}, "wrong": 0,
        "wrongs": [], "latencies": {"purchase": {100: 1_500}}, "lateness": {5: 11_000}, "cpu_s": {}, "course": [],
    }  # fmt: skip
    return msgspec.convert(usual | more, Seen)


# --- lines -------------------------------------------------------------------------------------------


def test_slope_of_a_line_is_its_slope() -> None:
    assert judgement.slope([(0, 5), (1, 7), (2, 9), (3, 11)]) == 2
    assert judgement.slope([(0, 5)]) == 0


def test_slope_does_not_see_a_fifth_of_the_points_go_astray() -> None:
    points = [(float(at), 100.0 + at) for at in range(1_000)]
    astray = [(at, value + 10_000 if at % 5 == 0 else value) for at, value in points]
    assert judgement.slope(astray) == pytest.approx(1.0, rel=0.05)


def test_percentile_is_the_upper_end_of_its_bucket() -> None:
    assert judgement.percentile_ms({9: 98, 2_499: 1, 80_000: 1}, 0.99) == 250.0
    assert judgement.percentile_ms({9: 98, 2_500: 2}, 0.99) == 250.1
    assert judgement.percentile_ms({}, 0.99) == 0.0


# --- soak --------------------------------------------------------------------------------------------


def test_an_hour_without_growth_holds() -> None:
    chance = random.Random(1)
    flat = course(HOUR, lambda at: sample(at, LEVEL + chance.uniform(-MIB, MIB), descriptors=2_000 + at % 7))
    assert broken(judgement.of_soak(flat)) == set()


@pytest.mark.parametrize(("share", "holds"), [(0.0098, True), (0.0102, False)])
def test_memory_may_grow_by_one_percent_an_hour_and_no_more(share: float, holds: bool) -> None:
    growing = course(HOUR, lambda at: sample(at, LEVEL * (1 + share * at / HOUR)))
    assert broken(judgement.of_soak(growing)) == (set() if holds else {"memory of the soak"})


def test_a_kibibyte_a_request_is_seen_within_a_minute() -> None:
    leaking = course(60, lambda at: sample(at, LEVEL + at * 1_000 * 1_024))
    assert broken(judgement.of_soak(leaking)) == {"memory of the soak"}


def test_a_short_time_judges_no_less_than_an_arena() -> None:
    assert not broken(judgement.of_soak(course(60, lambda at: sample(at, LEVEL + NOISE_BYTES * 0.98 * at / 60))))
    assert broken(judgement.of_soak(course(60, lambda at: sample(at, LEVEL + NOISE_BYTES * 1.02 * at / 60))))


def test_memory_that_falls_holds() -> None:
    assert not broken(judgement.of_soak(course(HOUR, lambda at: sample(at, LEVEL - at * 1_000))))


@pytest.mark.parametrize(("begin_s", "end_s"), [(1_800, 1_801), (2_800, HOUR)], ids=["a step", "near the end"])
def test_memory_that_grows_within_a_part_of_the_hour_is_seen(begin_s: int, end_s: int) -> None:
    growing = course(HOUR, lambda at: sample(at, LEVEL * (1 + min(max(0, at - begin_s) / (end_s - begin_s), 1))))
    assert broken(judgement.of_soak(growing)) == {"memory of the soak"}


def test_objects_that_fit_into_freed_pages_are_seen_all_the_same() -> None:
    hidden = course(HOUR, lambda at: sample(at, blocks=1_000_000 + 4 * at))
    assert broken(judgement.of_soak(hidden)) == {"blocks of Python's memory"}


@pytest.mark.parametrize(("per_s", "is_seen"), [(0.5, False), (0.65, True)])
def test_bytes_that_fit_into_freed_pages_of_the_heap_are_seen_all_the_same(per_s: float, is_seen: bool) -> None:
    hidden = course(HOUR, lambda at: sample(at, heap_bytes=30 * MIB + int(at * per_s * MIB / 1_000)))
    assert broken(judgement.of_soak(hidden)) == ({"bytes of the heap in use"} if is_seen else set())


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("descriptors", lambda at: sample(at, descriptors=2_000 + at // 60)),
        ("threads", lambda at: sample(at, threads=4 + at // 1_800)),
        ("timer", lambda at: sample(at, timer=60 + at)),
        ("feeds", lambda at: sample(at, feeds=30 + at)),
        ("deadlines", lambda at: sample(at, deadlines=9_000 + at)),
        ("viewers", lambda at: sample(at, viewers=210 + at)),
        ("keys", lambda at: sample(at, keys=600 + at)),
        ("in_flight", lambda at: sample(at, in_flight=100 + at)),
    ],
)
def test_whatever_there_is_more_of_in_the_end_is_named(name: str, make: Callable[[int], Sample]) -> None:
    assert broken(judgement.of_soak(course(HOUR, make))) == {name}


def test_nothing_seen_is_no_proof() -> None:
    assert len(broken(judgement.of_soak([]))) == len(judgement.of_soak([]))
    blind = [Sample(at, LEVEL, 10, 4, 0.0, None) for at in range(100)]
    assert {"timer", "ring", "blocks of Python's memory", "bytes of the heap in use"} <= broken(
        judgement.of_soak(blind)
    )


# --- overload ----------------------------------------------------------------------------------------


def flat_samples() -> list[Sample]:
    return [sample(at / 2) for at in range(21)]


def test_goodput_is_changes_that_were_made_in_time_and_nothing_else() -> None:
    assert judgement.changes_per_s(seen()) == 400
    assert judgement.decided_per_s(seen()) == 1_300


@pytest.mark.parametrize(("peak", "holds"), [(500.0, True), (501.0, False), (0.0, False)])
def test_goodput_is_held_against_the_peak(peak: float, holds: bool) -> None:
    verdicts = judgement.of_overload(seen(), 1_100, peak, flat_samples())
    assert broken(verdicts) == (set() if holds else {"goodput under overload"})


def test_changes_that_came_too_late_are_no_goodput() -> None:
    late = seen(in_time={"reserve 201": 1_900, "purchase 201": 1_500, "cancel 200": 500})
    assert broken(judgement.of_overload(late, 1_100, 500, flat_samples())) == {"goodput under overload"}


@pytest.mark.parametrize(("bucket", "holds"), [(2_499, True), (2_500, False)])
def test_purchases_have_a_quarter_of_a_second(bucket: int, holds: bool) -> None:
    slow = seen(latencies={"purchase": {100: 1_480, bucket: 20}})
    name = "purchases under overload, p99"
    assert broken(judgement.of_overload(slow, 1_100, 500, flat_samples())) == (set() if holds else {name})


@pytest.mark.parametrize(
    "lost",
    [
        {"gave_up": {"purchase": 20}},
        {"broken": {"purchase": 20}},
        {"answers": {"purchase 201": 1_480, "purchase 503 OVERLOADED": 20}},
        {"answers": {"purchase 201": 1_480, "purchase 409 RESERVATION_EXPIRED": 20}},
    ],
)
def test_a_purchase_that_is_lost_is_longer_than_any(lost: dict[str, dict[str, int]]) -> None:
    assert "purchases under overload, p99" in broken(judgement.of_overload(seen(**lost), 1_100, 500, flat_samples()))


def test_no_purchases_at_all_are_no_quick_ones() -> None:
    none = seen(answers={"reserve 201": 4_000}, latencies={})
    assert "purchases under overload, p99" in broken(judgement.of_overload(none, 1_100, 500, flat_samples()))


def test_memory_that_grows_under_overload_is_seen() -> None:
    growing = [sample(at, LEVEL + at * MIB) for at in range(11)]
    verdicts = judgement.of_overload(seen(), 1_100, 500, growing)
    assert broken(verdicts) == {"memory in the second half of the overload"}


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({"came": 10_000}, "the crowd of the overload came on time"),
        ({"lateness": {5: 980, 501: 20}}, "the crowd of the overload came on time"),
        ({"wrong": 1, "wrongs": ["an answer that nobody waits for"]}, "answers of the overload"),
    ],
)
def test_a_load_that_was_not_what_it_should_be_proves_nothing(more: dict[str, object], name: str) -> None:
    assert broken(judgement.of_overload(seen(**more), 1_100, 500, flat_samples())) == {name}


# --- an hour's service -------------------------------------------------------------------------------


def served(changes: Callable[[int], int], **more: object) -> Seen:
    return seen(course=[Second(at, in_time={"reserve 201": changes(at)}) for at in range(40)], **more)


@pytest.mark.parametrize(("least", "holds"), [(320, True), (319, False)])
def test_each_quarter_of_a_soak_is_served(least: int, holds: bool) -> None:
    verdicts = judgement.of_service(served(lambda at: least if at >= 30 else 500), 400)
    assert broken(verdicts) == (set() if holds else {"changes in each quarter of the soak"})


def test_purchases_of_a_soak_have_a_quarter_of_a_second_too() -> None:
    verdicts = judgement.of_service(served(lambda at: 400, gave_up={"purchase": 20}), 400)
    assert broken(verdicts) == {"purchases of the soak, p99"}


def test_a_soak_of_which_nothing_was_seen_is_no_proof() -> None:
    assert len(broken(judgement.of_service(seen(latencies={}, answers={}), 400))) == 2


# --- recovery ----------------------------------------------------------------------------------------

BEFORE = [Touch(at / 20, 5.0, True) for at in range(100)]


def touches(*, slow_until: float = 0.0, unserved_until: float = 0.0) -> list[Touch]:
    """From the load's end at 100 on, twenty a second for 20 s."""
    instants = [100 + number / 20 for number in range(1, 400)]
    return [Touch(at, 50.0 if at < slow_until else 6.0, at >= unserved_until) for at in instants]


def quiet_from(at: float) -> list[Sample]:
    return [
        sample(100 + n / 2, in_flight=0 if 100 + n / 2 >= at else 500, mailboxes=0 if 100 + n / 2 >= at else 400)
        for n in range(40)
    ]


def test_recovery_is_when_the_probe_is_served_as_before_and_nothing_waits() -> None:
    assert judgement.recovery_s(BEFORE, touches(), quiet_from(100), 100) == pytest.approx(0.05, abs=0.1)
    assert judgement.recovery_s(BEFORE, touches(slow_until=103), quiet_from(100), 100) == pytest.approx(3, abs=0.5)
    assert judgement.recovery_s(BEFORE, touches(), quiet_from(104), 100) == pytest.approx(4, abs=0.5)
    assert judgement.recovery_s(BEFORE, touches(unserved_until=106), quiet_from(100), 100) == pytest.approx(6, abs=0.5)


def test_what_was_not_seen_to_recover_has_not() -> None:
    assert judgement.recovery_s(BEFORE, touches(slow_until=999), quiet_from(100), 100) is None
    assert judgement.recovery_s(BEFORE, touches(), quiet_from(999), 100) is None
    assert judgement.recovery_s(BEFORE, [], quiet_from(100), 100) is None
    assert judgement.recovery_s([], touches(), quiet_from(100), 100) is None


@pytest.mark.parametrize(("recovered_s", "holds"), [(5.0, True), (5.1, False), (None, False)])
def test_recovery_has_five_seconds(recovered_s: float | None, holds: bool) -> None:
    assert judgement.of_recovery(BEFORE, recovered_s).holds is holds


# --- tables ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("purchases", "unknown", "holds"), [(1_500, 0, True), (1_499, 9, False), (1_501, 0, False), (1_509, 9, True)]
)
def test_purchases_in_the_tables_are_those_that_were_told(purchases: int, unknown: int, holds: bool) -> None:
    told = seen(all_unanswered={"purchase": unknown})
    assert broken(judgement.of_tables(purchases, [told], 0, [], 19)) == (
        set() if holds else {"purchases in the tables"}
    )


def test_a_hold_without_end_and_a_violation_are_named() -> None:
    assert broken(judgement.of_tables(1_500, [seen()], 1, ["conservation: 1 (units)"], 19)) == {
        "holds at the end",
        "audit",
    }
