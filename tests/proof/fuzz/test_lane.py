"""Harmed requests: both lanes make the same of them, and nobody else notices."""

import hashlib
import uuid

import pytest

from tests.proof.fuzz import campaign, lane
from tests.proof.fuzz.arena import HOLD, OPEN_DROP, OTHER_USER, USER, Arena, identified
from tests.proof.fuzz.conftest import AT_MOST_S, CASES


def test_both_lanes_make_the_same_of_requests_that_are_none(stage: Arena, seed: int) -> None:
    report = campaign.run(stage, lane.TARGET, seed, CASES, at_most_s=AT_MOST_S)
    assert report.is_good, report.told()
    # It has met what it is there for: both sides of most rules.
    assert {"200", "201", "400 BAD_REQUEST", "401 AUTH_REQUIRED", "405 METHOD_NOT_ALLOWED"} <= set(report.answers)
    assert report.labels["alike"] > report.cases / 4


def test_case_of_a_seed_is_the_same_again() -> None:
    names = [str(number) for number in range(50)]
    first, again = ([lane.script(campaign.chance(7, name)) for name in names] for _ in range(2))
    assert first == again
    assert first != [lane.script(campaign.chance(8, name)) for name in names]


@pytest.mark.parametrize("spelt", [USER, USER.upper(), "F" + USER[1:], OTHER_USER, "e" + USER[1:], HOLD, HOLD.upper()])
def test_id_of_an_attempt_is_nobody_elses_however_it_is_spelt(spelt: str) -> None:
    one, other = (identified(number, spelt.encode()).decode() for number in (1, 2))
    assert len({one.lower(), other.lower(), spelt.lower()}) == 3
    assert one.islower() == other.islower() == spelt.islower()


def test_user_of_an_attempt_has_the_hold_of_its_number_in_the_tables() -> None:
    sent = f"X-User-Id: {USER}\r\n{HOLD}{OPEN_DROP}".encode()
    user, hold = (hashlib.md5(f"{kind} 7".encode()).hexdigest() for kind in ("user", "hold"))
    assert identified(7, sent) == f"X-User-Id: {uuid.UUID(user)}\r\n{uuid.UUID(hold)}{OPEN_DROP}".encode()
