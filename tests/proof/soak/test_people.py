"""The crowd itself: it counts rightly, gives up as people do, and sees what is wrong. Against a stub that errs."""

import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.bench.test_harness import DROP, USERS, Stub, http, refused, stub
from tests.proof.soak import people
from tests.proof.soak.cast import Cast, next_step, people_of
from tests.proof.soak.people import Crowd, Job, Seen

Answer = Callable[[int, str, str], bytes | None]


@pytest.fixture(autouse=True)
def _roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """All come at once: with the usual backlog of 5 the kernel would drop most of them, and have them try again."""
    monkeypatch.setattr(Stub, "request_queue_size", 256)


def shop(number: int, line: str, user: str) -> bytes:
    """As much of a shop as the crowd needs."""
    if "/cancel " in line:
        return http(200, {"success": True, "data": {"status": "cancelled"}, "meta": {}})
    if line.startswith("GET"):
        return http(200, {"success": True, "data": {"id": DROP}, "meta": {}})
    if "/purchase " in line:
        return http(201, {"success": True, "data": {"purchase": {"user_id": user}}, "meta": {}})
    hold = {"id": f"0190a5a0-0000-7000-8000-{number:012x}", "drop_id": DROP, "user_id": user}
    return http(201, {"success": True, "data": {"reservation": hold}, "meta": {}})


def cast(number: int = 200) -> Cast:
    return Cast(users=USERS, first_user=0, people=number, drops=(DROP,), scarce=(DROP,), seed=1)


def seen(running: Stub, **more: Any) -> Seen:
    usual = {"connections": 50, "seconds": 1.5, "warm_up_s": 0.0, "rate": 200.0}
    return Crowd(Job(**{"server": running.server, "cast": cast(), "first_person": 0, **usual, **more})).run()


def seen_of(answer: Answer, **more: Any) -> Seen:
    with stub(answer) as running:
        return seen(running, **more)


def test_everybody_who_came_is_accounted_for() -> None:
    saw = seen_of(shop)
    looked_away = saw.all_unanswered.get("look", 0) + saw.all_unanswered.get("reserve", 0)
    assert (
        saw.came == saw.turned_away + sum(n for name, n in saw.answers.items() if name[:7] == "reserve") + looked_away
    )
    assert saw.came == pytest.approx(300, abs=80)
    assert saw.wrong == 0
    assert not saw.gave_up
    assert not saw.broken
    assert saw.answers["purchase 201"] > saw.answers["cancel 200"] > 0
    assert sum(saw.latencies["purchase"].values()) == saw.answers["purchase 201"]
    assert len(saw.course) == 2


def test_a_closed_loop_has_so_many_under_way_and_no_more() -> None:
    running_now, most = [0], [0]

    def answer(number: int, line: str, user: str) -> bytes:
        running_now[0] += 1
        most[0] = max(most[0], running_now[0])
        time.sleep(0.005)
        running_now[0] -= 1
        return shop(number, line, user)

    saw = seen_of(answer, rate=None, at_once=4)
    assert 1 < most[0] <= 4 + 8  # those who have thought do not wait for their turn
    assert saw.answers["purchase 201"] > 0


def test_people_choose_as_often_as_is_said() -> None:
    chosen = random.Random(1)
    everybody = people_of(cast(20_000), Stub(shop).server)
    assert sum(one.is_retrier for one in everybody) == pytest.approx(200, abs=60)
    assert sum(not one.is_buyer for one in everybody) == pytest.approx(2_000, abs=200)
    buyer = next(one for one in everybody if one.is_buyer and not one.is_retrier)
    steps = [next_step(buyer, chosen) for _ in range(10_000)]
    assert steps.count("purchase") == pytest.approx(7_000, abs=200)
    assert steps.count("cancel") == pytest.approx(1_500, abs=200)
    at_scarce = next(one for one in everybody if not one.is_buyer)
    assert "purchase" not in {next_step(at_scarce, chosen) for _ in range(1_000)}


def test_who_hears_nothing_gives_up_on_a_new_connection_and_who_finds_none_is_turned_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(people, "PATIENCE_S", dict.fromkeys(people.PATIENCE_S, 0.3))

    def answer(number: int, line: str, user: str) -> bytes:
        time.sleep(0.7)
        return shop(number, line, user)

    saw = seen_of(answer, connections=8, rate=100.0)
    assert sum(saw.gave_up.values()) >= 8 * 2  # each connection again and again
    assert saw.turned_away > 50
    assert not saw.in_time
    assert saw.wrong == 0


def test_answers_that_come_too_late_are_not_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that waited for us longer than people do, although the server itself was quick."""
    monkeypatch.setattr(people, "PATIENCE_S", dict.fromkeys(people.PATIENCE_S, 10.0))
    saw = seen_of(shop)
    monkeypatch.setattr(people, "PATIENCE_S", dict.fromkeys(people.PATIENCE_S, 10.0) | {"purchase": -1.0})
    assert sum(saw.in_time.values()) == sum(saw.answers.values())
    late = seen_of(shop)
    assert not any(name.startswith("purchase") for name in late.in_time)


def test_hang_ups_are_counted_and_the_crowd_goes_on() -> None:
    saw = seen_of(lambda number, line, user: None if number % 3 == 0 else shop(number, line, user))
    assert sum(saw.broken.values()) > 20
    assert saw.answers["reserve 201"] > 50
    assert saw.wrong == 0


def test_another_users_hold_is_wrong() -> None:
    saw = seen_of(lambda number, line, user: shop(number, line, DROP))
    assert saw.wrong == sum(n for name, n in saw.all_answers.items() if name == "reserve 201") > 50
    assert saw.wrongs


def test_a_refusal_that_must_not_be_is_wrong_and_503_is_none() -> None:
    def answer(number: int, line: str, user: str) -> bytes:
        if "/purchase " in line:
            return refused(409, "RESERVATION_REQUIRED")
        return refused(503, "OVERLOADED") if number % 2 else shop(number, line, user)

    saw = seen_of(answer)
    assert saw.wrong == saw.all_answers["purchase 409 RESERVATION_REQUIRED"] > 0
    assert saw.answers["reserve 503 OVERLOADED"] > 50
    assert sum(saw.latencies["reserve"].values()) == saw.answers["reserve 201"]
