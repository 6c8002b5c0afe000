"""The door's own arithmetic; what comes through it is tests/contract's."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("hard", "connections_max", "pool_size", "kept", "served"),
    [
        (1_000, 20_000, 10, 200, 800),
        (1_000, 800, 10, 200, 800),
        (1_000, 500, 10, 200, 500),
        (150, 500, 10, 200, 1),
        (1_000, 20_000, 50, 200, 800),
        (1_000, 20_000, 51, 201, 799),  # of 201, 100 are for those who are refused
        (1_000, 20_000, 200, 350, 650),
        (1_000, 600, 200, 350, 600),
    ],
)
def test_no_more_connections_are_served_than_leave_descriptors_for_the_database(
    hard: int, connections_max: int, pool_size: int, kept: int, served: int
) -> None:
    program = (
        "import resource\n"
        "from api.front import make_room\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (100, {hard}))\n"
        f"print(make_room({connections_max}, {pool_size}), resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    room, soft = map(int, ran.stdout.splitlines()[-1].split())
    assert room == served
    assert soft == min(hard, connections_max + kept)
