"""The memory of an active hold: what a started engine holds of a million of them, in few drops and in many.

A ledger that makes its records up hands them over, and the process's resident memory is read before and after. Each
measurement has a process of its own: freed memory does not go back to the system, and would hide what comes next.

    python -m tests.bench.memory [--holds 1000000] [--drops 10 10000]
"""

import argparse
import gc
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import trio

from api.ids import IdSource
from engine.clock import Clock
from engine.model import DropId, DropRecord, DropStatus, Hold, Instant, ReservationId, Terms, UserId
from engine.publisher import Publisher
from engine.registry import running
from tests.bench.engine import YesLedger

HOLD_MS = 3_600_000  # none runs out while we look


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--holds", type=int, default=1_000_000)
    options.add_argument("--drops", type=int, nargs="+", default=[10, 10_000])
    options.add_argument("--here", action="store_true", help="measure in this process")
    asked = options.parse_args()
    for drops in asked.drops:
        if asked.here:
            trio.run(_measure, asked.holds, drops)
        else:
            again = [sys.executable, "-m", "tests.bench.memory", "--here"]
            subprocess.run([*again, "--holds", str(asked.holds), "--drops", str(drops)], check=True)


class FullLedger(YesLedger):
    """Holds `holds` units of `drops` drops, each by somebody else."""

    def __init__(self, holds: int, drops: int, now: Instant) -> None:
        self._each = holds // drops
        self._drops = drops
        self._now = now
        self._ids = IdSource(lambda: now)

    async def take_over(self, drop_ids: Sequence[DropId] | None) -> list[DropRecord]:
        return [self._record(number) for number in range(self._drops)]

    def _record(self, number: int) -> DropRecord:
        drop_id = DropId(self._ids.new())
        terms = Terms(drop_id, "Bench", 1, "USD", 2 * self._each, None, None, None, self._now)
        holds = [self._hold(drop_id, number * self._each + place) for place in range(self._each)]
        status = DropStatus.LIVE
        return DropRecord(terms, status, self._each, self._each, 0, 2, self._each + 1, holds, {}, (), self._now)

    def _hold(self, drop_id: DropId, number: int) -> Hold:
        taken = Instant(self._now + number)  # instants are objects too, and rarely shared in life
        until = Instant(taken + HOLD_MS)
        return Hold(ReservationId(self._ids.new()), drop_id, UserId(self._ids.new()), 1, taken, until)


async def _measure(holds: int, drops: int) -> None:
    clock = Clock()
    ledger = FullLedger(holds, drops, clock.now())
    before = _resident()
    async with running(ledger, clock, Publisher()) as registry:
        await trio.sleep(1)  # every actor has had its turn
        gc.collect()
        each = (_resident() - before) / holds
        held = sum(drop.held for drop in registry.board.drops())
    assert held == holds // drops * drops
    print(f"{held:,} holds in {drops:,} drops: {each:,.0f} B each, at most {_peak() / 2**20:,.0f} MiB in all")


def _resident() -> int:
    """Resident memory (B); Linux."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
