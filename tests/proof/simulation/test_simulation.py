"""The corpus, and new seeds on each run: no history breaks an invariant, and together they have been everywhere."""

import os
import subprocess
import sys
from collections.abc import Iterable
from random import randrange
from typing import Final

import pytest

from tests.proof.simulation import corpus
from tests.proof.simulation.coverage import feasible, missing, pairs
from tests.proof.simulation.runs import Summary, report, run_all
from tests.proof.simulation.seeds import run_seed

SEEDS: Final = int(os.environ.get("HOLDFAST_SEEDS", "1150"))
FIRST_MAX: Final = 10**9
JOBS: Final = 2
REPLAYED: Final = (3, 12, 77, 156)  # two engines, clock steps, crashes, rivals
HASH_SEEDS: Final = ("0", "1", "4711")
COVERING: Final = 1_000
# Of some 1,450 cells. The corpus reaches them all; but any change of the engine gives its seeds other histories, and
# then the rarest cells, which one seed in three hundred reaches, are a matter of luck until it is made anew.
MISSED_MAX: Final = 7


def judged(seeds: Iterable[int]) -> Summary:
    summary = Summary()
    for result in run_all(seeds, JOBS):
        summary.add(result)
    reports = [report(seed, violations) for seed, violations in summary.failed.items()]
    assert not reports, "\n\n".join(reports)
    return summary


def test_no_history_of_new_seeds_breaks_an_invariant_and_together_they_reach_every_state_under_every_fault() -> None:
    first = randrange(FIRST_MAX)
    summary = judged([*corpus.seeds(), *range(first, first + SEEDS)])
    print(summary.line().decode())
    if SEEDS >= COVERING:
        reached = {pair for cell in summary.coverage for pair in pairs(cell)}
        assert {pair for cell in feasible() for pair in pairs(cell)} <= reached
        left = missing(summary.coverage)
        assert len(left) <= MISSED_MAX, f"{left}: cover anew with python -m tests.proof.simulation --cover --seeds 1000"


def test_one_seed_is_one_history_to_the_byte_in_every_process() -> None:
    """Whatever order a process gives to its hashes."""
    assert len({digests(hash_seed) for hash_seed in HASH_SEEDS}) == 1


def digests(hash_seed: str) -> str:
    code = f"from tests.proof.simulation.seeds import run_seed\nfor seed in {REPLAYED}: print(run_seed(seed).digest)"
    environ = os.environ | {"PYTHONHASHSEED": hash_seed}
    told = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    return told.stdout


def test_the_digest_tells_histories_apart() -> None:
    assert run_seed(1).digest == run_seed(1).digest
    assert run_seed(1).digest != run_seed(2).digest


def test_a_failure_tells_how_to_see_it_again_and_how_to_keep_it(capsys: pytest.CaptureFixture[str]) -> None:
    told = report(42, ["I1: oversold"])
    assert "I1: oversold" in told
    assert "python -m tests.proof.simulation --seed 42 --trace" in told
    assert "corpus.txt" in told
