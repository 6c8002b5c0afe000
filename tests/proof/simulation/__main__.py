"""Run seeds, and end with 1 where one has a violation.

python -m tests.proof.simulation --seed 7 --trace       one, and all that happens in it
python -m tests.proof.simulation --seeds 1000 --first 0 many
python -m tests.proof.simulation --minutes 30 --jobs 2  as many as the time allows
"""

import argparse
import random
import sys
from collections.abc import Iterator, Sequence

from tests.proof.simulation.runs import Summary, covering, report, run_all, run_for
from tests.proof.simulation.seeds import Result, run_seed

FIRST_MAX = 10**9


def main(arguments: Sequence[str]) -> int:
    asked = _parser().parse_args(arguments)
    if asked.cover:
        for seed in covering(_results(asked)):
            print(f"{seed} covers")
        return 0
    summary = Summary()
    for result in _results(asked):
        summary.add(result)
        if result.violations:
            print(report(result.seed, result.violations), file=sys.stderr, flush=True)
        if asked.seed is not None:
            print(f"digest {result.digest}")
    print(summary.line().decode())
    return 1 if summary.failed else 0


def _results(asked: argparse.Namespace) -> Iterator[Result]:
    if asked.seed is not None:
        yield run_seed(asked.seed, print if asked.trace else None)
        return
    first = random.randrange(FIRST_MAX) if asked.first is None else asked.first
    if asked.minutes is not None:
        yield from run_for(first, asked.minutes, asked.jobs)
    else:
        yield from run_all(range(first, first + asked.seeds), asked.jobs)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m tests.proof.simulation", description="The simulation of the engine.")
    parser.add_argument("--seed", type=int, help="run this one")
    parser.add_argument("--trace", action="store_true", help="and print all that happens in it")
    parser.add_argument("--seeds", type=int, default=100, help="run so many (100)")
    parser.add_argument("--first", type=int, help="from this one on (a random one)")
    parser.add_argument("--minutes", type=float, help="run as many as the time allows instead")
    parser.add_argument("--cover", action="store_true", help="and print few that reach all that these do")
    parser.add_argument("--jobs", type=int, default=1, help="in so many processes (1)")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
