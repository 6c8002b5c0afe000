"""Many seeds: run in one process or several, added up, and the failures told so that each can be replayed."""

import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Final

import msgspec

from tests.proof.simulation.coverage import Cell
from tests.proof.simulation.seeds import Result, run_seed

AT_ONCE: Final = 20  # seeds that a process is given together
SHOWN_MAX: Final = 5  # violations of one seed that are printed
S_PER_HOUR: Final = 3_600


class Summary(msgspec.Struct):
    """Seeds added up. `failed`: the violations of each seed that has any."""

    seeds: int = 0
    operations: int = 0
    simulated_s: float = 0.0
    faults: Counter[str] = msgspec.field(default_factory=Counter)
    coverage: Counter[Cell] = msgspec.field(default_factory=Counter)
    failed: dict[int, list[str]] = {}

    def add(self, result: Result) -> None:
        self.seeds += 1
        self.operations += result.operations
        self.simulated_s += result.simulated_s
        self.faults.update(result.faults)
        self.coverage.update(result.coverage)
        if result.violations:
            self.failed[result.seed] = result.violations

    def line(self) -> bytes:
        """One line of JSON."""
        return msgspec.json.encode(
            {
                "seeds": self.seeds,
                "operations": self.operations,
                "simulated_hours": round(self.simulated_s / S_PER_HOUR, 2),
                "cells": len(self.coverage),
                "violations": sum(map(len, self.failed.values())),
                "failed": sorted(self.failed),
                "faults": dict(sorted(self.faults.items())),
            }
        )


def run_all(seeds: Iterable[int], jobs: int = 1) -> Iterator[Result]:
    """The results, in the order of the seeds. Stops when the iteration does."""
    if jobs == 1:
        yield from map(run_seed, seeds)
        return
    # Spawned, so that each begins as a process of its own does: nothing that the parent did can leak into a history.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(run_seed, seeds, chunksize=AT_ONCE)


def run_for(first: int, minutes: float, jobs: int = 1) -> Iterator[Result]:
    """Seeds from `first` on until the time is over."""
    until = time.monotonic() + 60 * minutes
    batch = AT_ONCE * jobs * 2
    while time.monotonic() < until:
        yield from run_all(range(first, first + batch), jobs)
        first += batch


def covering(results: Iterable[Result]) -> list[int]:
    """Few seeds that together reach all that these reach: again and again the one that adds the most."""
    reached = {result.seed: set(result.coverage) for result in results}
    chosen: list[int] = []
    while any(reached.values()):
        best = max(reached, key=lambda seed: len(reached[seed]))
        gained = reached.pop(best)
        chosen.append(best)
        for cells in reached.values():
            cells -= gained
    return sorted(chosen)


def report(seed: int, violations: list[str]) -> str:
    """What a failure says: what broke, and how to see it again."""
    shown = "\n".join(violations[:SHOWN_MAX])
    more = len(violations) - SHOWN_MAX
    return "\n".join(
        [
            f"seed {seed} of commit {commit()}: {len(violations)} violations",
            shown,
            *([f"… and {more} more"] if more > 0 else []),
            f"replay: python -m tests.proof.simulation --seed {seed} --trace",
            f'keep it: echo "{seed} <why>" >> tests/proof/simulation/corpus.txt',
        ]
    )


def commit() -> str:
    """The checkout's, or "unknown" where there is no git."""
    try:
        told = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return told.stdout.strip()
