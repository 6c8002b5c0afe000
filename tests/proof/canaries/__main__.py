"""Set canaries loose, print who catches them; exit code 1 if one survives.

python -m tests.proof.canaries [name …] [--json]   these, or all
python -m tests.proof.canaries serve               `holdfast serve` with the canary that the environment names
"""

import argparse
import json
import sys
from collections.abc import Sequence

import msgspec

from tests.proof import canaries


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["serve"]:
        canaries.arm()
        from api.cli import main as holdfast  # only now, with the bug planted

        return holdfast(list(arguments))
    from tests.proof.canaries import flock, hunt

    if arguments[:1] == ["seeds"]:
        canaries.arm()
        print(json.dumps(hunt.try_seeds(*arguments[1:])))
        return 0
    parser = argparse.ArgumentParser("python -m tests.proof.canaries", description="Deliberate bugs, and who sees one.")
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(flock.FLOCK)}; all without any")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    asked = parser.parse_args(arguments)
    unknown = set(asked.names) - set(flock.FLOCK)
    if unknown:
        parser.error(f"no canary is called {', '.join(sorted(unknown))}")

    def tell(flight: hunt.Flight) -> None:
        print(hunt.table([flight]), file=sys.stderr if asked.json else sys.stdout, flush=True)

    flights = hunt.hunt(asked.names or list(flock.FLOCK), on_flight=tell)
    if asked.json:
        outcome = [{**msgspec.to_builtins(flight), "is_caught": flight.is_caught} for flight in flights]
        print(json.dumps(outcome))
    return 0 if all(flight.is_caught for flight in flights) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
