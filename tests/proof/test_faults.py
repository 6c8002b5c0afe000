"""Faults of every kind, on a real PostgreSQL, under load: no invariant breaks, and it serves again by itself.

A few of each, for every run of the tests; `python -m tests.proof.faults` runs the same by the thousand. The figures go
into the run's report as the property `faults`.
"""

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import psycopg
import pytest
import trio

from tests.proof.conftest import Postgres
from tests.proof.faults import special
from tests.proof.faults.campaign import BRIEF_S, LIMITS, campaign, judge, world
from tests.proof.faults.crowd import Shopper
from tests.proof.faults.places import Unable
from tests.proof.faults.tally import Sort, Tally
from tests.proof.faults.troubles import cuts, database_troubles, engine_troubles
from tests.proof.history import Ending, Kind
from tests.proof.proxy import Proxy

DATABASE_FAULTS: Final = 42
CUTS: Final = 210
KILLS: Final = 21

Verdict = Callable[[Tally], None]


@pytest.fixture
def verdict(record_property: Callable[[str, object], None]) -> Verdict:
    """Tells the figures, and fails where an invariant was broken."""

    def tell(tally: Tally) -> None:
        print(tally.text())
        record_property("faults", json.dumps(tally.summary()))
        assert tally.violation_count == 0, "\n".join(tally.violations)
        assert tally.endings[Ending.OK] > 0
        assert tally.longest_s < int(LIMITS["ANSWER_TIMEOUT_MS"]) / 1000 + 5, "somebody waited past his deadline (I18)"

    return tell


async def test_cuts_at_the_commit_lose_nothing_and_make_nothing_up(
    postgres: Postgres, proxy: Proxy, tmp_path: Path, seed: int, verdict: Verdict
) -> None:
    with world(postgres, tmp_path, seed, proxy=proxy) as found:
        tally = await campaign(found, cuts(CUTS, found.rng), seed=seed, pause_s=BRIEF_S)
    verdict(tally)
    assert tally.count(Sort.CUT) >= 200
    assert tally.codes["OUTCOME_UNKNOWN"] > 0, "nobody was told that it is not known"


async def test_faults_of_the_database_lose_nothing_and_make_nothing_up(
    postgres: Postgres, tmp_path: Path, seed: int, verdict: Verdict
) -> None:
    with world(postgres, tmp_path, seed) as found:
        tally = await campaign(found, database_troubles(DATABASE_FAULTS, found.rng), seed=seed)
    verdict(tally)
    assert tally.count(Sort.DATABASE) >= 40


async def test_killed_frozen_and_stopped_engines_lose_nothing_that_was_acknowledged(
    postgres: Postgres, tmp_path: Path, seed: int, verdict: Verdict
) -> None:
    with world(postgres, tmp_path, seed) as found:
        tally = await campaign(found, engine_troubles(KILLS, found.rng), seed=seed)
    verdict(tally)
    assert tally.faults[Sort.ENGINE]["kill"] >= 20


Act = Callable[[Postgres, Path, int, Tally], Awaitable[None]]


def _in_a_place_of_its_own(act: Act, postgres: Postgres, at: Path, seed: int, verdict: Verdict) -> Tally:
    tally = Tally()
    try:
        trio.run(act, postgres, at, seed, tally)  # not an asynchronous test: from one the reason of a skip gets lost
    except Unable as why:
        pytest.skip(str(why))
    verdict(tally)
    return tally


def test_full_disk_refuses_what_grows_and_recovers_when_there_is_room(
    postgres: Postgres, tmp_path: Path, seed: int, verdict: Verdict
) -> None:
    tally = _in_a_place_of_its_own(special.full_disk, postgres, tmp_path, seed, verdict)
    assert tally.codes["STORAGE_FULL"] > 0


def test_full_wal_disk_is_an_outage_and_nothing_more(
    postgres: Postgres, tmp_path: Path, seed: int, verdict: Verdict
) -> None:
    _in_a_place_of_its_own(special.full_wal, postgres, tmp_path, seed, verdict)


def test_torn_network_is_an_outage_and_nothing_more(
    postgres: Postgres, tmp_path: Path, seed: int, verdict: Verdict
) -> None:
    _in_a_place_of_its_own(special.partition, postgres, tmp_path, seed, verdict)


def test_steps_of_the_wall_clock_move_no_deadline(
    postgres: Postgres, tmp_path: Path, seed: int, verdict: Verdict
) -> None:
    _in_a_place_of_its_own(special.clock_steps, postgres, tmp_path, seed, verdict)


def test_two_engines_that_take_drops_from_each_other_never_both_write_one(
    postgres: Postgres, tmp_path: Path, seed: int, verdict: Verdict
) -> None:
    tally = _in_a_place_of_its_own(special.two_engines, postgres, tmp_path, seed, verdict)
    assert tally.codes["DROP_OWNED_ELSEWHERE"] > 0


async def test_loss_and_phantom_that_are_planted_are_found(postgres: Postgres, tmp_path: Path) -> None:
    """The campaign's own judgement, on what a broken ledger would leave."""
    with world(postgres, tmp_path, 1) as found:
        drop_id = await found.crowd.found(10)
        assert drop_id is not None
        shopper = Shopper(found.crowd, 0, found.rng)
        held = await shopper.ask(Kind.RESERVE, drop_id)
        shopper.close()
        assert held.ending is Ending.OK

        def broken() -> set[str]:
            tally = Tally()
            judge(found, tally, is_contested=False, is_clock_true=False)
            return {violation.split(":")[0] for violation in tally.violations}

        assert broken() == set()
        held.ending, held.code = Ending.REFUSED, "OVERLOADED"  # it was told that nothing happened
        assert broken() == {"I4"}
        held.ending, held.code = Ending.OK, ""
        with psycopg.connect(found.dsn, autocommit=True) as connection:  # all that it did is gone, without a trace
            connection.execute("DELETE FROM reservations")
            connection.execute("DELETE FROM drop_events WHERE seq > 1")
            connection.execute(
                "UPDATE drops SET seq = 1, held_count = 0, available_stock = 10, updated_at = created_at"
            )
        assert "I3" in broken()
        assert not {"I1", "I2", "I10"} & broken(), "the tables agree with each other"
