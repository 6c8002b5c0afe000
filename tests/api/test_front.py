"""The door's own arithmetic; what comes through it is tests/contract's."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("hard", "connections_max", "served"),
    [(1_000, 20_000, 800), (1_000, 800, 800), (1_000, 500, 500), (150, 500, 1)],
)
def test_no_more_connections_are_served_than_leave_descriptors_for_the_database(
    hard: int, connections_max: int, served: int
) -> None:
    program = (
        "import resource\n"
        "from api.front import make_room\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (100, {hard}))\n"
        f"print(make_room({connections_max}), resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    room, soft = map(int, ran.stdout.splitlines()[-1].split())
    assert room == served
    assert soft == min(hard, connections_max + 200)
