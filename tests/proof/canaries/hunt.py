"""Set a canary loose, and see who catches it.

Its traps run in processes of their own, all tests of one canary in one: they are red there, and each for its reason,
or the canary has survived.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import msgspec

from tests.proof.canaries import SONGS, SWITCH
from tests.proof.canaries.flock import FLOCK, SEEDS, Trap

AT_ONCE: Final = 2  # canaries: most of what they do is wait, and a machine of two cores has more to do than this
TIMEOUT_S: Final = 150.0  # of one canary's tests; a trap that hangs has caught nothing
TRIES: Final = 2  # of a test that was content: where chance has a hand in it, the moment may not have come
STOP_S: Final = 20.0  # for it to end its servers
SEEDS_MAX: Final = 60  # that are tried: so many are simulated in half a minute
FIRST_SEED: Final = 1
SHOWN: Final = 160  # characters of what was said, in the table
ROOT: Final = Path(__file__).parents[3]


class Catch(msgspec.Struct):
    """What one trap said. `is_caught`: it was red, and for its reason."""

    where: str
    is_caught: bool
    said: str
    seconds: float


class Flight(msgspec.Struct):
    """One canary, set loose. `songs`: how often its bug was met."""

    name: str
    catches: list[Catch]
    songs: int
    seconds: float

    @property
    def is_caught(self) -> bool:
        return self.songs > 0 and bool(self.catches) and all(catch.is_caught for catch in self.catches)


class Said(msgspec.Struct):
    """What a trap said, and how long it took; None: it was content. `has_run`: that is its verdict, no accident."""

    text: str | None
    seconds: float
    has_run: bool = True


def hunt(names: Sequence[str], *, on_flight: Callable[[Flight], None] = lambda flight: None) -> list[Flight]:
    """Set these loose, some at a time; what came of each, in the order of their names."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        flights = []
        for flight in pool.map(lambda name: hunt_one(name, FLOCK[name].traps), names):
            on_flight(flight)
            flights.append(flight)
    return flights


def table(flights: Iterable[Flight]) -> str:
    """For people: each canary, who caught it, what was said first, how long it took."""
    return "\n".join(line for flight in flights for line in _lines(flight))


def _lines(flight: Flight) -> Iterator[str]:
    fate = "caught" if flight.is_caught else "SURVIVED" if flight.songs else "DID NOT SING"
    yield f"{flight.name}: {fate}, {flight.songs} times met, {flight.seconds:.1f} s"
    for catch in flight.catches:
        verdict = "→" if catch.is_caught else "✗"
        said = " ".join(catch.said.split())
        yield f"    {verdict} {catch.where} ({catch.seconds:.1f} s)\n          {said[:SHOWN]}"


def hunt_one(name: str, traps: Sequence[Trap]) -> Flight:
    """Set one loose before these traps."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="canary-") as at:
        songs = Path(at) / "songs"
        songs.touch()
        environment = {**os.environ, SWITCH: name, SONGS: str(songs)}
        tests = [trap.where for trap in traps if trap.where != SEEDS]
        said: dict[str, Said] = {}
        for _ in range(TRIES):
            content = [test for test in tests if test not in said or said[test].text is None]
            if content:
                said |= _try_tests(content, Path(at), environment)
        for trap in traps:
            if trap.where == SEEDS:
                said[SEEDS] = _try_seeds(trap.sign, environment)
        catches = [_judged(trap, said[trap.where]) for trap in traps]
        return Flight(name, catches, songs.stat().st_size, time.monotonic() - began)


def _judged(trap: Trap, said: Said) -> Catch:
    if said.text is None:
        return Catch(trap.where, False, "noticed nothing", said.seconds)
    if not said.has_run:
        return Catch(trap.where, False, f"it did not run: {said.text}", said.seconds)
    found = re.search(trap.sign, said.text)
    if found is None:
        return Catch(trap.where, False, f"red, but not for {trap.sign!r}: {said.text}", said.seconds)
    begin = said.text.rfind("\n", 0, found.start()) + 1
    return Catch(trap.where, True, said.text[begin:].partition("\n")[0].strip("E| "), said.seconds)


# Tests --------------------------------------------------------------------------------------------------


def _try_tests(tests: Sequence[str], at: Path, environment: dict[str, str]) -> dict[str, Said]:
    report = at / "report.xml"
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}", f"--basetemp={at / 'tests'}"]
    ended = _run(["pytest", *options, *tests], environment)
    if ended is None or not report.exists():
        why = f"not within {TIMEOUT_S:.0f} s" if ended is None else ended
        return {test: Said(why, TIMEOUT_S, has_run=False) for test in tests}
    said = dict(_read(report))
    return {test: said.get(test) or Said("there is no such test", 0.0, has_run=False) for test in tests}


def _read(report: Path) -> Iterator[tuple[str, Said]]:
    for case in ElementTree.parse(report).iter("testcase"):
        where = case.get("classname", "").replace(".", "/") + ".py::" + case.get("name", "")
        verdicts = [found for kind in ("failure", "error") if (found := case.find(kind)) is not None]
        text = "\n".join(f"{verdict.get('message')}\n{verdict.text}" for verdict in verdicts) if verdicts else None
        yield where, Said(text, float(case.get("time", 0)))


# Seeds --------------------------------------------------------------------------------------------------


def _try_seeds(sign: str, environment: dict[str, str]) -> Said:
    began = time.monotonic()
    told = _run(["tests.proof.canaries", "seeds", sign], environment)
    took_s = time.monotonic() - began
    if told is None:
        return Said("the simulation hangs", took_s, has_run=False)
    try:
        found: str | None = json.loads(told.splitlines()[-1])
    except (ValueError, IndexError):
        return Said(told, took_s, has_run=False)
    return Said(found, took_s)


def try_seeds(sign: str) -> str | None:
    """In the process that has the bug: seed after seed, until one says what it should; else what the first one said."""
    from tests.proof.simulation.seeds import run_seed

    first: str | None = None
    for seed in range(FIRST_SEED, FIRST_SEED + SEEDS_MAX):
        violations = run_seed(seed).violations
        if violations:
            said = f"seed {seed}: " + "\n".join(violations)
            if re.search(sign, said):
                return said
            first = first or said
    return first


def _run(module: Sequence[str], environment: dict[str, str]) -> str | None:
    """All that it said; None: it did not end in time, and was ended."""
    with subprocess.Popen(
        [sys.executable, "-m", *module],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            return process.communicate(timeout=TIMEOUT_S)[0]
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # at which pytest ends what it has started, and itself
            try:
                process.communicate(timeout=STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
            return None
