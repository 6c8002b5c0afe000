"""Many cases, one after the other and a few at a time: what was found, and how to see it again.

Whatever is fuzzed is a `Target`: it makes a case from chance, and tries one. A case that fails is tried again, with
much more patience; it counts if it fails twice. Then it is made as short as its failing allows. In between an honest
client buys; at the end nothing may have grown, and no log may speak of a bug.
"""

import ast
import math
import random
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

import trio

from tests.proof.fuzz import mutation
from tests.proof.fuzz.arena import Arena
from tests.proof.fuzz.truth import watching
from tests.proof.fuzz.wire import QUIET_S, Ending, Probe, Script

WORKERS: Final = 8
ATTEMPTS_PER_CASE: Final = 1.3  # of which the first is one, and the rest goes to second looks
ATTEMPTS_MORE: Final = 1_000  # for making what was found short
CONFIRM_QUIET_S: Final = 0.5  # for a second look: no machine is as busy as that
SHORTENED_MAX: Final = 3  # cases; and for so many seconds each
SHORTEN_S: Final = 20
HONEST_EVERY: Final = 100  # cases
WARM_UP: Final = 0.25  # of the cases, after which nothing may grow any more
SHOWN_MAX: Final = 5
WRONGS_MAX: Final = 20  # found, after which it is enough
CORPUS: Final = Path(__file__).parent


class Tried(NamedTuple):
    """`label`: what kind of thing happened, for the figures."""

    label: str
    wrongs: list[str]
    answers: Counter[str]


Try = Callable[[Arena, Sequence[Probe], Script, float, random.Random], Awaitable[Tried]]


class Target(NamedTuple):
    name: str
    script: Callable[[random.Random], Script]
    attempt: Try
    always: tuple[tuple[str, Script], ...] = ()  # what is too large for a corpus, by its name


@dataclass
class Found:
    name: str
    case: Script
    wrongs: list[str]

    def told(self, target: str, seed: int) -> str:
        again = f"python -m tests.proof.fuzz {target} --seed {seed} --only {self.name}"
        return "\n".join([f"case {self.name} of seed {seed}; again: {again}", *self.wrongs, self.case.literal()])


@dataclass
class Report:
    target: str
    seed: int
    cases: int = 0
    seconds: float = 0.0
    second_looks: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    growth: dict[str, dict[str, int]] = field(default_factory=dict)
    found: list[Found] = field(default_factory=list)
    wrongs: list[str] = field(default_factory=list)  # of no case in particular

    @property
    def is_good(self) -> bool:
        return not self.found and not self.wrongs

    def told(self) -> str:
        """What was found, for people."""
        shown = [found.told(self.target, self.seed) for found in self.found[:SHOWN_MAX]]
        return "\n\n".join([f"HOLDFAST_SEED={self.seed}", *self.wrongs, *shown, f"{len(self.found)} cases failed"])

    def figures(self) -> dict[str, object]:
        """The same for machines."""
        return {
            "target": self.target,
            "seed": self.seed,
            "cases": self.cases,
            "seconds": round(self.seconds, 1),
            "second_looks": self.second_looks,
            "labels": dict(self.labels.most_common()),
            "answers": dict(self.answers.most_common()),
            "growth": self.growth,
            "failed": [found.told(self.target, self.seed) for found in self.found],
            "wrongs": self.wrongs,
        }


def attempts_for(cases: int) -> int:
    return int(cases * ATTEMPTS_PER_CASE) + ATTEMPTS_MORE


def corpus(target: str) -> list[tuple[str, Script]]:
    """What was found before: a literal a line, behind its name."""
    cases = []
    for line in (CORPUS / f"{target}_corpus.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, literal = line.partition(": ")
            kind, pieces, ending = ast.literal_eval(literal)
            cases.append((name, Script(kind, pieces, Ending(ending))))
    return cases


def chance(seed: int, name: str) -> random.Random:
    return random.Random(f"{seed} {name}")


def run(
    arena: Arena, target: Target, seed: int, cases: int, only: str | None = None, at_most_s: float = math.inf
) -> Report:
    """The corpus, and so many new cases, or as many as there is time for; or one case alone, by its name."""
    return trio.run(_run, arena, target, seed, cases, only, at_most_s)


async def _run(arena: Arena, target: Target, seed: int, cases: int, only: str | None, at_most_s: float) -> Report:
    report = Report(target.name, seed)
    began = time.monotonic()
    known = [*target.always, *corpus(target.name)]
    if only is not None:
        planned = [(name, case) for name, case in known if name == only]
        planned = planned or [(only, target.script(chance(seed, only)))]
    else:
        planned = known + [(str(number), target.script(chance(seed, str(number)))) for number in range(cases)]
    probes = [Probe(lane) for lane in arena.lanes]
    warm = int(len(planned) * WARM_UP)
    async with watching(arena) as watch:
        await _rounds(arena, target, probes, report, planned, warm, began + at_most_s)
        report.wrongs += await watch.wrongs()
    for found in report.found[:SHORTENED_MAX]:
        await _make_short(arena, target, probes, found, seed)
    for probe in probes:
        await probe.aclose()
    report.seconds = time.monotonic() - began
    report.wrongs += await trio.to_thread.run_sync(arena.wrongs)
    report.growth = {lane.name: lane.growth() for lane in arena.lanes}
    return report


async def _rounds(
    arena: Arena,
    target: Target,
    probes: Sequence[Probe],
    report: Report,
    planned: list[tuple[str, Script]],
    warm: int,
    end: float,
) -> None:
    for begin in range(0, len(planned), HONEST_EVERY):
        if begin == 0 or begin >= warm > begin - HONEST_EVERY:
            arena.note()
        await _round(arena, target, probes, report, planned[begin : begin + HONEST_EVERY])
        report.wrongs += await trio.to_thread.run_sync(arena.cannot_sell)
        if len(report.found) + len(report.wrongs) > WRONGS_MAX or time.monotonic() > end:
            break


async def _round(
    arena: Arena, target: Target, probes: Sequence[Probe], report: Report, planned: list[tuple[str, Script]]
) -> None:
    left = iter(planned)

    async def work() -> None:
        for name, case in left:
            rng = chance(report.seed, f"{name} tried")
            tried = await _try(arena, target, probes, case, QUIET_S, rng)
            if tried.wrongs:
                report.second_looks += 1
                tried = await _try(arena, target, probes, case, CONFIRM_QUIET_S, rng)
            report.cases += 1
            report.labels[tried.label] += 1
            report.answers += tried.answers
            if tried.wrongs:
                report.found.append(Found(name, case, tried.wrongs))

    async with trio.open_nursery() as nursery:
        for _ in range(WORKERS):
            nursery.start_soon(work)


async def _try(
    arena: Arena, target: Target, probes: Sequence[Probe], case: Script, quiet_s: float, rng: random.Random
) -> Tried:
    try:
        return await target.attempt(arena, probes, case, quiet_s, rng)
    except Exception as failure:  # noqa: BLE001 - whatever a server did to its client, the case that did it is found
        return Tried("failed", ["".join(traceback.format_exception(failure))], Counter())


async def _make_short(arena: Arena, target: Target, probes: Sequence[Probe], found: Found, seed: int) -> None:
    async def fails(data: bytes) -> bool:
        case = found.case._replace(pieces=(data,))
        tried = await _try(arena, target, probes, case, QUIET_S, chance(seed, found.name))
        return bool(tried.wrongs)

    def keep(data: bytes) -> None:
        found.case = found.case._replace(pieces=(data,))

    whole = found.case.sent
    with trio.move_on_after(SHORTEN_S):
        if await fails(whole):  # in one piece, too
            await mutation.shorten(whole, fails, keep)
