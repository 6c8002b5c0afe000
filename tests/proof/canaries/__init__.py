"""Canaries: deliberate bugs, each of which some test must catch. A suite that misses one is red.

    python -m tests.proof.canaries [name …]            set each loose, see who catches it, print the table
    HOLDFAST_CANARY=clamp python -m pytest tests/…     what a test says of one

The product knows nothing of them: each is an edit of its source or its SQL, made in memory, in test processes alone
(`surgery`, `bugs_*`). `arm` does that at a process's start, before anything runs: `tests/conftest.py` calls it for
tests, `python -m tests.proof.canaries serve` for a server that a test starts (`command`).

A canary proves first that it sings: what it replaces must still be there, to the letter, else nothing starts; and each
time that the bug is really met it adds a byte to the file SONGS, whatever then becomes of the process.
"""

import os
import sys
from typing import Final

SWITCH: Final = "HOLDFAST_CANARY"  # the name of the bug that this process, and those that it starts, shall have
SONGS: Final = "HOLDFAST_CANARY_SONGS"  # path of a file that grows by a byte whenever the bug is met
HELD_BY: Final = (SWITCH, SONGS)


def arm() -> None:
    """Plant the bug that the environment names, if it names one.

    Raises:
        KeyError: no canary has that name.
        Moved: the product is not as the canary expects it.
    """
    name = os.environ.get(SWITCH)
    if name:
        from tests.proof.canaries.flock import plant  # only now: a run without a canary must not import them

        plant(name)


def command(*arguments: str) -> list[str]:
    """The command line of `holdfast`: with a canary in the environment, one that has it."""
    module = "tests.proof.canaries" if os.environ.get(SWITCH) else "api.cli"
    return [sys.executable, "-m", module, *arguments]
