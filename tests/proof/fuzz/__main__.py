"""`python -m tests.proof.fuzz`: the long run, or one case again. What was found goes to stdout, in JSON."""

import argparse
import json
import os
import random
import sys

from tests.proof.fuzz import campaign, frames, lane
from tests.proof.fuzz.arena import NoCertificate, arena

TARGETS = {target.name: target for target in (lane.TARGET, frames.TARGET)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.proof.fuzz", description=__doc__)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=int(os.environ.get("HOLDFAST_SEED") or random.randrange(2**32)))
    parser.add_argument("--only", help="one case: its number, or its name in the corpus")
    asked = parser.parse_args()
    cases = 1 if asked.only else asked.cases
    try:
        with arena(campaign.attempts_for(cases)) as stage:
            report = campaign.run(stage, TARGETS[asked.target], asked.seed, cases, asked.only)
    except NoCertificate as lacking:
        print(f"cannot fuzz: {lacking}", file=sys.stderr)
        return 2
    print(json.dumps(report.figures(), indent=2))
    if not report.is_good:
        print(report.told(), file=sys.stderr)
    return 0 if report.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
