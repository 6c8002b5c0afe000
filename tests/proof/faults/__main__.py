"""`python -m tests.proof.faults`: as many faults as are asked for, in campaigns of a size that a machine can check.

    --faults N    of the database: processes ended, killed and frozen, disks filled, networks torn, clocks set
    --cuts N      commits whose connection breaks
    --kills N     engines killed, and frozen and stopped in proportion
    --minutes M   begin nothing after so long
    --seed S      replay the choices of a run; the moments are the machine's

Progress goes to standard error, a few lines a campaign; the last line of standard output is the summary, as JSON. The
exit code is 1 where an invariant was broken, 2 where the run itself failed.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final

import trio

from persistence.embedded import forget_pg_variables
from tests.proof.conftest import Postgres
from tests.proof.faults import campaign, special
from tests.proof.faults.places import Unable
from tests.proof.faults.tally import Tally
from tests.proof.faults.troubles import Trouble, cuts, database_troubles, engine_troubles
from tests.proof.proxy import Proxy

# Of one campaign: its history stays below some 200,000 operations.
FAULTS_EACH: Final = 60
CUTS_EACH: Final = 250
KILLS_EACH: Final = 20
PROGRESS_EVERY: Final = 50
SPECIAL_EACH: Final = 200  # database faults for each round of those that need a place of their own

Act = Callable[[Tally], Awaitable[None]]


class Run:
    """What is asked for, in campaigns; each has a seed of its own, which is printed."""

    def __init__(self, wanted: argparse.Namespace, postgres: Postgres, at: Path) -> None:
        self._wanted = wanted
        self._postgres = postgres
        self._at = at
        self._began = time.monotonic()
        self._deadline = float("inf") if wanted.minutes is None else wanted.minutes * 60
        self._no_fault_after = float("inf")  # on Trio's clock
        self._struck = 0
        self.total = Tally()

    async def run(self) -> None:
        self._no_fault_after = trio.current_time() + self._deadline
        for number, (name, act) in enumerate(self._acts()):
            if time.monotonic() - self._began > self._deadline:
                self.say("the time is up")
                return
            tally = Tally()
            try:
                await act(tally)
            except Unable as why:
                tally.skipped[name] = str(why)
            finally:
                self.total.add(tally)
            self.say(f"campaign {number + 1}, {name}:\n{tally.text()}")

    def say(self, line: str) -> None:
        print(f"[{time.monotonic() - self._began:6.0f} s] {line}", file=sys.stderr, flush=True)

    def _count(self, name: str) -> None:
        self._struck += 1
        if self._struck % PROGRESS_EVERY == 0:
            self.say(f"{self._struck} faults, the last one: {name}")

    def _acts(self) -> Iterator[tuple[str, Act]]:
        """In turn, so that a run that is cut short has done some of each."""
        wanted, seeds = self._wanted, random.Random(self._wanted.seed)
        faults, severed, kills = wanted.faults, wanted.cuts, wanted.kills
        until_special = 0
        while faults > 0 or severed > 0 or kills > 0:
            if faults > 0 and until_special <= 0:
                until_special = SPECIAL_EACH
                for place in special.ALL:
                    yield place.name, self._special(place, seeds.getrandbits(32))
                    faults -= 0 if place.name in self.total.skipped else place.faults
            if faults > 0:
                now = min(faults, FAULTS_EACH)
                seed = seeds.getrandbits(32)
                yield "database", self._on_postgres(database_troubles(now, random.Random(seed)), seed)
                faults, until_special = faults - now, until_special - now
            if severed > 0:
                now = min(severed, CUTS_EACH)
                yield "cuts", self._cuts(now, seeds.getrandbits(32))
                severed -= now
            if kills > 0:
                now = min(kills, KILLS_EACH)
                seed = seeds.getrandbits(32)
                yield "engine", self._on_postgres(engine_troubles(now, random.Random(seed)), seed)
                kills -= now

    def _on_postgres(self, troubles: list[Trouble], seed: int) -> Act:
        async def act(tally: Tally) -> None:
            with campaign.world(self._postgres, self._at, seed) as world:
                await campaign.campaign(
                    world, troubles, seed=seed, tally=tally, deadline=self._no_fault_after, on_fault=self._count
                )

        return act

    def _cuts(self, count: int, seed: int) -> Act:
        async def act(tally: Tally) -> None:
            with (
                Proxy(self._postgres.port) as proxy,
                campaign.world(self._postgres, self._at, seed, proxy=proxy) as world,
            ):
                await campaign.campaign(
                    world,
                    cuts(count, random.Random(seed)),
                    seed=seed,
                    tally=tally,
                    pause_s=campaign.BRIEF_S,
                    deadline=self._no_fault_after,
                    on_fault=self._count,
                )

        return act

    def _special(self, place: special.Place, seed: int) -> Act:
        async def act(tally: Tally) -> None:
            with tempfile.TemporaryDirectory(prefix="holdfast-") as at:
                await place.act(self._postgres, Path(at), seed, tally)

        return act


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.proof.faults", description="Real faults under load.")
    parser.add_argument("--faults", type=int, default=40)
    parser.add_argument("--cuts", type=int, default=200)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32))
    wanted = parser.parse_args()
    forget_pg_variables()
    failure: BaseException | None = None
    with tempfile.TemporaryDirectory(prefix="holdfast-") as at:
        Path(at).chmod(0o755)  # the server's account passes through
        postgres = Postgres(Path(at) / "postgres")
        postgres.start()
        run = Run(wanted, postgres, Path(at))
        run.say(f"replay with --seed {wanted.seed}")
        try:
            postgres.make_template()
            trio.run(run.run)
        except Exception as fault:  # noqa: BLE001 - a run that breaks off still tells what it has found
            failure = fault
            run.say(f"the run broke off: {fault!r}")
        finally:
            postgres.stop()
    summary = run.total.summary() | {"seed": wanted.seed, "broke_off": None if failure is None else repr(failure)}
    print(json.dumps(summary))
    if failure is not None:
        return 2
    return 1 if run.total.violation_count else 0


if __name__ == "__main__":
    sys.exit(main())
