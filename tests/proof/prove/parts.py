"""The parts of the proof: what each runs, piece by piece, and what it makes of the outcome.

A part goes on until there is enough of it, its time is over, or somebody stops it. A piece that was stopped counts for
nothing; those before it are kept.
"""

import itertools
import json
import random
import re
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from tests.proof.faults import special
from tests.proof.prove import commands
from tests.proof.prove.commands import Ended
from tests.proof.prove.coverage import on_file
from tests.proof.prove.crew import Crew, Done
from tests.proof.prove.figures import (
    LONG,
    Figures,
    Flown,
    Fuzzed,
    SlowSeed,
    Struck,
    Tried,
    Violation,
    add_counts,
)
from tests.proof.prove.screen import Screen
from tests.proof.simulation import corpus

# Of one piece: what a stop may cost. A round of the faults that need a place of their own belongs to each of the first.
FAULTS_EACH: Final = 200
CUTS_EACH: Final = 250
KILLS_EACH: Final = 20
CASES_EACH: Final = 5_000
CASES_LEAST: Final = 200
CASES_PER_S: Final = 20  # measured on two cores with three times as much to do
CANARIES_EACH: Final = 2  # so many are set loose at once
SECONDS_EACH: Final = 300  # of a run of schemathesis
SECONDS_LEAST: Final = 10  # in which it gets around once
RUNS_OF_SCHEMATHESIS: Final = 4  # that `tests.proof.test_schemathesis` makes at the most, about

GRACE_S: Final = 60.0  # beyond the time of its part, before a piece is cut short
LIMIT_LEAST_S: Final = 20.0  # of a piece that minds its time itself: it has servers to start
PIECE_MAX_S: Final = 3_600.0  # a piece takes minutes; one that takes an hour hangs
REPLAYED_EVERY: Final = 100  # seeds: then one is run a second time, and must be the same history to the byte
TOLD_MAX: Final = 2_000  # characters of what a part says when it breaks off

SIMULATION, FAULTS, FUZZ, CANARIES, SCHEMATHESIS = "simulation", "faults", "fuzz", "canaries", "schemathesis"
# In the order in which they run, and how much of a limited time each gets: what a part leaves, the later ones share.
WEIGHTS: Final = {CANARIES: 10, SCHEMATHESIS: 5, FUZZ: 10, FAULTS: 35, SIMULATION: 40}
FUZZERS: Final = ("lane", "frames")
AGAIN: Final = re.compile(r"again: (.+)")


class Wanted(msgspec.Struct, kw_only=True):
    """How much of everything; of what may be infinite, as much as the time allows."""

    seeds: float = 0.0
    operations: float = 0.0
    hours: float = 0.0
    faults: float = 0.0
    cuts: float = 0.0
    kills: float = 0.0
    cases: dict[str, float] = {}  # by fuzzer
    canaries: list[str] = []
    schemathesis_s: float = 0.0  # for each of its runs


class Turn:
    """What a part needs while it runs.

    `figures` grow with each piece. `until` is when its time is over, on the monotonic clock, or infinite.
    """

    def __init__(
        self,
        figures: Figures,
        screen: Screen,
        *,
        until: float = float("inf"),
        is_stopped: Callable[[], bool] = lambda: False,
        keep: Callable[[], None] = lambda: None,
    ) -> None:
        self.figures = figures
        self._screen = screen
        self._began = time.monotonic()
        self._until = until
        self.is_stopped = is_stopped
        self._keep = keep

    @property
    def is_over(self) -> bool:
        return self.is_stopped() or time.monotonic() >= self._until

    def must_stop(self) -> bool:
        """Of a piece under way."""
        return self.is_stopped() or time.monotonic() >= self._until + GRACE_S

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._began

    @property
    def left_s(self) -> float:
        return max(0.0, self._until - time.monotonic())

    def tick(self, done: float, wanted: float, note: str) -> None:
        """So much of it is done; or of its time, where that is what ends it."""
        of_time = self.elapsed_s / (self._until - self._began)
        self._screen.tick(min(1.0, max(of_time, done / wanted if wanted else 1.0)), note)
        self._keep()

    def convict(self, violation: Violation) -> None:
        """At once, with what replays it."""
        self.figures.convict(violation)
        of = "" if violation.seed is None else f", seed {violation.seed}"
        told = violation.told[:TOLD_MAX]
        self._screen.say(f"VIOLATION: {violation.part}{of}\n{told}\nreplay: {violation.replay}", style="bold red")

    def fail(self, problem: str) -> None:
        self.figures.problems.append(problem)
        self._screen.say(f"PROBLEM: {problem}", style="red")

    def say(self, text: str) -> None:
        self._screen.say(text)

    def hear(self, line: str) -> None:
        """Of a part that runs: what it found is told before it ends."""
        if "VIOLATION" in line:
            self._screen.say(line.strip(), style="bold red")


Part = Callable[[Turn, Wanted], None]


# Simulation ---------------------------------------------------------------------------------------------


class Simulation:
    """Seeds from `first` on, in the crew's processes. `end`: one beyond the last seed that was run."""

    def __init__(self, crew: Crew, first: int, *, note_failing: Callable[[int, str], None]) -> None:
        self._crew = crew
        self._first = self.end = first
        self._note_failing = note_failing
        self._digests: dict[int, str] = {}  # of seeds that run twice: the first run's

    def run(self, turn: Turn, wanted: Wanted) -> None:
        simulated = turn.figures.simulated
        for done in self._crew.results(seed for seed in corpus.seeds() if not turn.is_over):
            simulated.corpus += 1
            self._judge(turn, done, is_known=True)
        before = simulated.seeds
        for done in self._crew.results(self._seeds(turn, wanted)):
            seed = done.result.seed
            if seed in self._digests:
                self._compare(turn, done)
                continue
            if is_replayed(seed):
                self._digests[seed] = done.result.digest
            self._add(turn, done)
            rate = (simulated.seeds - before) / max(0.001, turn.elapsed_s)
            turn.tick(
                simulated.seeds - before,
                wanted.seeds,
                f"{simulated.seeds:,} seeds, {rate:.1f}/s, {simulated.hours:.1f} h, {len(simulated.coverage):,} cells,"
                f" {turn.figures.violation_count} violations",
            )

    def _seeds(self, turn: Turn, wanted: Wanted) -> Iterator[int]:
        for seed in itertools.count(self._first):
            if turn.is_over or self._is_enough(seed - self._first, turn.figures, wanted):
                return
            self.end = seed + 1
            yield seed
            if is_replayed(seed):
                yield seed

    def _is_enough(self, given: int, figures: Figures, wanted: Wanted) -> bool:
        return (
            given >= wanted.seeds
            and figures.simulated.hours >= wanted.hours
            and figures.operations >= wanted.operations
        )

    def _add(self, turn: Turn, done: Done) -> None:
        result, simulated = done.result, turn.figures.simulated
        simulated.seeds += 1
        simulated.operations += result.operations
        simulated.simulated_s += result.simulated_s
        simulated.cpu_s += done.cpu_s
        add_counts(simulated.faults, result.faults)
        add_counts(simulated.coverage, {on_file(cell): count for cell, count in result.coverage.items()})
        simulated.add_slow(SlowSeed(done.cpu_s, result.seed, result.operations))
        self._judge(turn, done)

    def _judge(self, turn: Turn, done: Done, *, is_known: bool = False) -> None:
        result = done.result
        if result.violations:
            told = "\n".join(result.violations)
            turn.convict(Violation(SIMULATION, result.seed, told, replay_of(result.seed), len(result.violations)))
            if not is_known:
                self._note_failing(result.seed, result.violations[0])

    def _compare(self, turn: Turn, done: Done) -> None:
        """Two runs of a seed; of one that did not come to its end there is nothing to compare."""
        seed, digest = done.result.seed, self._digests.pop(done.result.seed)
        if not digest or not done.result.digest:
            self._judge(turn, done)
            return
        turn.figures.simulated.replayed += 1
        if digest != done.result.digest:
            told = f"two runs of it are two histories: {digest[:16]} and {done.result.digest[:16]}"
            turn.convict(Violation(SIMULATION, seed, told, replay_of(seed)))
            self._note_failing(seed, told)


def is_replayed(seed: int) -> bool:
    return seed % REPLAYED_EVERY == 0


def replay_of(seed: int) -> str:
    return f"python -m tests.proof.simulation --seed {seed} --trace"


# Faults -------------------------------------------------------------------------------------------------


def faults(turn: Turn, wanted: Wanted) -> None:
    """Pieces of one sort each, so that all three come forward at one pace."""
    struck = turn.figures.struck
    before = {"faults": struck.database, "cuts": struck.cuts, "kills": struck.kills}
    goals = {"faults": LONG.faults, "cuts": LONG.cuts, "kills": LONG.kills}
    sizes = {"faults": FAULTS_EACH, "cuts": CUTS_EACH, "kills": KILLS_EACH}
    amounts = {"faults": wanted.faults, "cuts": wanted.cuts, "kills": wanted.kills}

    def done(sort: str) -> int:
        return {"faults": struck.database, "cuts": struck.cuts, "kills": struck.kills}[sort] - before[sort]

    broken: set[str] = set()
    while not turn.is_over:
        lacking = [sort for sort, amount in amounts.items() if done(sort) < amount and sort not in broken]
        if not lacking:
            break
        sort = min(lacking, key=lambda sort: done(sort) / goals[sort])
        count = int(min(sizes[sort], amounts[sort] - done(sort)))
        if sort == "faults":  # asked for, and not to be had here
            count += sum(place.faults for place in special.ALL if place.name in struck.skipped)
        seed = random.SystemRandom().getrandbits(32)
        arguments = [f"--{one}={count if one == sort else 0}" for one in amounts] + [f"--seed={seed}"]
        said = f"{struck.database:,} faults, {struck.cuts:,} cuts, {struck.kills:,} kills"

        def hear(line: str, said: str = said) -> None:
            turn.hear(line)
            if line.startswith("["):
                share = sum(done(one) for one in amounts)
                turn.tick(share, sum(amounts.values()), f"{said}; {line}")

        turn.tick(sum(map(done, amounts)), sum(amounts.values()), f"{said}; {count} {sort}")
        module = ["tests.proof.faults", *arguments]
        share_s = max(LIMIT_LEAST_S, turn.left_s / len(lacking))
        limit = [] if share_s == float("inf") else [f"--minutes={share_s / 60:.2f}"]
        ended = commands.run([*module, *limit], limit_s=PIECE_MAX_S, is_stopped=turn.must_stop, on_line=hear)
        was = done(sort)
        if not absorb_faults(turn, ended, "python -m " + " ".join(module)) or done(sort) == was:
            broken.add(sort)


def absorb_faults(turn: Turn, ended: Ended, replay: str) -> bool:
    """Whether it went well enough to go on."""
    summary = _outcome(turn, FAULTS, ended, (0, 1, 2), last_line=True)
    if summary is None:
        return False
    turn.figures.struck.add(
        Struck(
            database=summary["database_faults"],
            cuts=summary["commits_cut"],
            kills=summary["engine_kills"],
            operations=summary["operations"],
            by_name=summary["faults"],
            served_late=summary["served_late"],
            served_max_s={name: spread["max"] for name, spread in summary["served_again_s"].items() if spread},
            late_max_ms=summary["expiry_late_ms"].get("max", 0.0),
            longest_answer_s=summary["longest_answer_s"],
            skipped=summary["skipped"],
            seconds=summary["seconds"],
        )
    )
    found = summary["violations"]
    if found:
        turn.convict(Violation(FAULTS, summary["seed"], "\n".join(summary["found"]), replay, found))
    if summary["broke_off"] is not None:
        turn.fail(f"faults: broke off: {summary['broke_off']}; again: {replay}")
        return False
    return True


# Fuzzing ------------------------------------------------------------------------------------------------


def fuzz(turn: Turn, wanted: Wanted) -> None:
    fuzzed = turn.figures.fuzzed
    before = fuzzed.cases.copy()
    broken: set[str] = set()

    def lack(target: str) -> float:
        return wanted.cases[target] - (fuzzed.cases.get(target, 0) - before.get(target, 0))

    while not turn.is_over:
        lacking = [target for target in wanted.cases if lack(target) > 0 and target not in broken]
        if not lacking:
            break
        target = max(lacking, key=lambda target: (lack(target), -fuzzed.cases.get(target, 0)))
        in_time = max(CASES_LEAST, turn.left_s * CASES_PER_S / len(lacking))
        count = int(min(CASES_EACH, lack(target), in_time))
        seed = random.SystemRandom().getrandbits(32)
        done, amount = sum(fuzzed.cases.values()) - sum(before.values()), sum(wanted.cases.values())
        turn.tick(done, amount, f"{done:,} cases; {count:,} of {target}")
        module = ["tests.proof.fuzz", target, f"--cases={count}", f"--seed={seed}"]
        ended = commands.run(module, limit_s=PIECE_MAX_S, is_stopped=turn.must_stop, on_line=turn.hear)
        if not absorb_fuzz(turn, ended, "python -m " + " ".join(module)):
            broken.add(target)


def absorb_fuzz(turn: Turn, ended: Ended, replay: str) -> bool:
    report = _outcome(turn, FUZZ, ended, (0, 1))
    if report is None:
        return False
    target = report["target"]
    turn.figures.fuzzed.add(Fuzzed({target: report["cases"]}, report["answers"], report["seconds"]))
    for told in report["failed"]:
        again = AGAIN.search(told)
        turn.convict(Violation(f"fuzz {target}", report["seed"], told, again[1] if again else replay))
    if report["wrongs"]:
        told = "\n".join(report["wrongs"])
        turn.convict(Violation(f"fuzz {target}", report["seed"], told, replay, len(report["wrongs"])))
    return True


# Canaries -----------------------------------------------------------------------------------------------


def canaries(turn: Turn, wanted: Wanted) -> None:
    names = wanted.canaries
    for begin in range(0, len(names), CANARIES_EACH):
        if turn.is_over:
            break
        some = names[begin : begin + CANARIES_EACH]
        turn.tick(begin, len(names), f"{turn.figures.caught} caught; {', '.join(some)}")
        ended = commands.run(["tests.proof.canaries", *some, "--json"], limit_s=PIECE_MAX_S, is_stopped=turn.must_stop)
        if not absorb_canaries(turn, ended):
            break


def absorb_canaries(turn: Turn, ended: Ended) -> bool:
    flights = _outcome(turn, CANARIES, ended, (0, 1), last_line=True)
    if flights is None:
        return False
    for flight in flights:
        name = flight["name"]
        by = [catch["where"] for catch in flight["catches"]]
        turn.figures.canaries[name] = Flown(flight["is_caught"], by, flight["seconds"])
        if not flight["is_caught"]:
            asleep = [f"{catch['where']}: {catch['said']}" for catch in flight["catches"] if not catch["is_caught"]]
            met = "" if flight["songs"] else "its bug was never met"
            told = "\n".join([f"the canary {name} survives", *([met] if met else []), *asleep])
            turn.convict(Violation(CANARIES, None, told, f"python -m tests.proof.canaries {name}"))
    return True


# Schemathesis -------------------------------------------------------------------------------------------


def schemathesis(turn: Turn, wanted: Wanted) -> None:
    each_s = int(min(SECONDS_EACH, wanted.schemathesis_s, max(SECONDS_LEAST, turn.left_s / RUNS_OF_SCHEMATHESIS)))
    if each_s <= 0 or turn.is_over:
        return
    turn.tick(0, each_s, f"{each_s} s for each run")
    with tempfile.TemporaryDirectory(prefix="holdfast-") as at:
        report = Path(at) / "report.xml"
        options = ["-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}", f"--basetemp={at}/tests"]
        ended = commands.run(
            ["pytest", "tests/proof/test_schemathesis.py", *options],
            limit_s=PIECE_MAX_S,
            is_stopped=turn.must_stop,
            on_line=turn.hear,
            environment={"HOLDFAST_SCHEMATHESIS_S": str(each_s)},
        )
        absorb_schemathesis(turn, ended, report, each_s)


def absorb_schemathesis(turn: Turn, ended: Ended, report: Path, each_s: int) -> None:
    if ended.was_stopped:
        turn.say("schemathesis: it was cut short, and does not count")
        return
    if ended.code not in (0, 1) or not report.exists():
        turn.fail(_broke_off(SCHEMATHESIS, ended))
        return
    replay = f"HOLDFAST_SCHEMATHESIS_S={each_s} python -m pytest tests/proof/test_schemathesis.py"
    cases = list(ElementTree.parse(report).iter("testcase"))
    for case in cases:
        for kind in ("failure", "error"):
            if (found := case.find(kind)) is not None:
                told = f"{case.get('name')}\n{found.get('message')}\n{found.text}"
                turn.convict(Violation(SCHEMATHESIS, None, told, replay))
        if (skipped := case.find("skipped")) is not None:
            turn.fail(f"schemathesis: {case.get('name')} was skipped: {skipped.get('message')}")
    turn.figures.tried.add(Tried(len(cases), each_s, ended.seconds))


# --------------------------------------------------------------------------------------------------------


def _outcome(turn: Turn, part: str, ended: Ended, codes: Sequence[int], *, last_line: bool = False) -> Any:
    """The JSON that it printed; None where it was stopped, or broke off without any."""
    if ended.was_stopped:
        turn.say(f"{part}: a piece was cut short, and does not count")
        return None
    if ended.code in codes:
        lines = ended.out.splitlines()
        try:
            return json.loads(lines[-1] if last_line and lines else ended.out)
        except ValueError:
            pass
    turn.fail(_broke_off(part, ended))
    return None


def _broke_off(part: str, ended: Ended) -> str:
    how = f"did not end within {ended.seconds:.0f} s" if ended.code is None else f"ended with {ended.code}"
    return f"{part}: {how}:\n{(ended.said or ended.out)[-TOLD_MAX:]}"
