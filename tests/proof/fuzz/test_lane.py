"""Harmed requests: both lanes make the same of them, and nobody else notices."""

from tests.proof.fuzz import campaign, lane
from tests.proof.fuzz.arena import Arena
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
