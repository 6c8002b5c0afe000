"""Both servers of the arena, once for all that is fuzzed in a normal run."""

import os
import random
from collections.abc import Iterator

import pytest

from tests.proof.fuzz import campaign
from tests.proof.fuzz.arena import Arena, NoCertificate, arena

CASES = 1_500  # new ones of each target in a normal run, if there is time for them; the corpus comes first
AT_MOST_S = 18.0  # for each


@pytest.fixture(scope="package")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    try:
        with arena(2 * campaign.attempts_for(CASES), tmp_path_factory.mktemp("arena")) as stage:
            yield stage
    except NoCertificate as lacking:
        pytest.skip(f"nothing is fuzzed: {lacking}")


@pytest.fixture(scope="session")
def seed() -> int:
    """HOLDFAST_SEED, or a new one."""
    return int(os.environ.get("HOLDFAST_SEED") or random.SystemRandom().randrange(2**32))
