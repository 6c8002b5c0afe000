"""Many viewers on one process, for a while: does its memory stay where it was, does it lose any of them?

They watch one drop that changes at a steady rate, answer every ping, and read every frame. What the server's process
has of memory, descriptors and CPU is printed now and then; at the end it is said by how much the memory of the second
half went up, and whether each viewer has the newest stock.

    python -m tests.bench.hold [--viewers 10000] [--minutes 10] [--rate 2] [--every 10] [--flat-kib 4096]

Exits with 1 when a viewer was lost or left behind, or memory grew by more than --flat-kib in the second half.
"""

import argparse
import resource
import statistics
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from persistence import migrate
from persistence.embedded import forget_pg_variables, running
from tests.bench import audience, targets, usage
from tests.bench.generator import raise_descriptor_limit
from tests.bench.job import Users
from tests.bench.results import Load
from tests.bench.targets import Target

DESCRIPTORS_KEPT: Final = 200  # beyond one for each viewer


@dataclass
class Moment:
    at_s: float
    rss_kib: float
    descriptors: int
    cores: float
    updates: int


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.hold", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--viewers", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=2.0, help="updates per s")
    parser.add_argument("--every", type=float, default=10.0, help="s between two looks")
    parser.add_argument("--flat-kib", type=float, default=4_096, help="that memory may grow by in the second half")
    asked = parser.parse_args()
    raise_descriptor_limit()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if most < asked.viewers + DESCRIPTORS_KEPT:
        print(f"{asked.viewers} viewers need more descriptors than the {most} that a process may have: ulimit -n")
        return 2
    forget_pg_variables()
    users = Users(uuid.uuid4().hex[:20])
    with tempfile.TemporaryDirectory(prefix="holdfast-hold-") as name, running(Path(name)) as postgres:
        migrate.upgrade(postgres.dsn)
        targets.introduce(postgres.dsn, users, 0, 1 + int(asked.rate * asked.minutes * 60))
        (maker,) = users.ids(0, 1)
        with targets.holdfast(postgres.dsn, postgres.pid, Path(name) / "holdfast.log", maker) as target:
            return _held(asked, target, users)


def _held(asked: argparse.Namespace, target: Target, users: Users) -> int:
    pid = target.watched["server"]
    drop = target.new_drop(audience.STOCK)
    print(f"{'s':>6} {'RSS KiB':>9} {'descriptors':>12} {'cores':>6} {'updates':>8}")
    _show(_look(pid, 0.0, 0, 0.0))
    moments: list[Moment] = []
    with audience.draining(target, drop, users, asked.viewers, is_all_read=True) as watching:
        began = due = time.monotonic()
        ends_at, look_at = began + asked.minutes * 60, began
        buyers = iter(users.ids(0, 1 + int(asked.rate * asked.minutes * 60)))
        updates, cpu_s, looked_at = 0, usage.cpu_s(pid), began
        while (now := time.monotonic()) < ends_at:
            if now >= look_at:
                used = usage.cpu_s(pid)
                cores = (used - cpu_s) / max(now - looked_at, 1e-9)
                moments.append(_look(pid, now - began, updates, cores))
                _show(moments[-1])
                cpu_s, looked_at, look_at = used, now, look_at + asked.every
            target.ask("POST", f"/drops/{drop}/reserve", next(buyers))
            updates += 1
            due += 1 / asked.rate
            time.sleep(max(0.0, min(due, ends_at) - time.monotonic()))
        left = target.available(drop)
        moments.append(_look(pid, time.monotonic() - began, updates, 0.0))
        load = watching.end()
    return _said(asked, moments, load, left)


def _look(pid: int, at_s: float, updates: int, cores: float) -> Moment:
    rss = usage.rss_bytes(pid)
    return Moment(at_s, 0.0 if rss is None else rss / 1024, usage.descriptors(pid), cores, updates)


def _show(moment: Moment) -> None:
    line = f"{moment.at_s:>6.0f} {moment.rss_kib:>9,.0f} {moment.descriptors:>12,} {moment.cores:>6.2f}"
    print(f"{line} {moment.updates:>8,}", flush=True)


def _said(asked: argparse.Namespace, moments: list[Moment], load: Load, left: int) -> int:
    half = moments[len(moments) // 2 :]
    quarter = max(1, len(half) // 2)
    early, late = (statistics.median(one.rss_kib for one in part) for part in (half[:quarter], half[-quarter:]))
    frames = load.figures["frames_per_viewer"]
    told = load.figures["newest_stock"] == left
    print(
        f"{asked.viewers:,} viewers for {moments[-1].at_s:.0f} s: {frames:,.1f} frames each,"
        f" {load.figures['received_mib']:,.1f} MiB in all; all came in within {load.figures['connect_s']:.1f} s."
    )
    print(f"Memory in the second half: {late - early:+,.0f} KiB.")
    for failure in load.failures[:5]:
        print(failure)
    if not told:
        print(f"Viewers were told of {load.figures['newest_stock']:.0f} units last, of {left}.")
    is_good = told and not load.failed and late - early <= asked.flat_kib
    print("Held." if is_good else f"Not held: {load.failed} viewers lost or behind.")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
