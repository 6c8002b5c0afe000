"""One seed: run, judged, and summed up."""

import hashlib
import traceback
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, Final

import msgspec
import structlog

from tests.proof import checker
from tests.proof.history import Recording
from tests.proof.simulation.coverage import Cell
from tests.proof.simulation.scenario import scenario
from tests.proof.simulation.scheduling import replay
from tests.proof.simulation.storm import Storm


class Result(msgspec.Struct):
    """What came of a seed. `faults`: how often each struck; `digest` is the history's, to the byte."""

    seed: int
    operations: int = 0
    simulated_s: float = 0.0
    faults: dict[str, int] = {}
    coverage: dict[Cell, int] = {}
    violations: list[str] = []
    digest: str = ""


def run_seed(seed: int, trace: Callable[[str], None] | None = None) -> Result:
    """Simulate a seed and judge its history."""
    storm = Storm(scenario(seed), trace)
    result = Result(seed)
    try:
        with listening(storm):
            world = replay(seed, storm.run)
    except Exception as error:  # noqa: BLE001 - an engine that falls over is a finding
        result.violations = [f"it fell over: {told}" for told in _told(error)]
        return result
    recording = storm.recording()
    result.operations = len(recording.operations)
    result.simulated_s = storm.simulated_s
    result.faults = dict(world.faults)
    result.coverage = dict(world.coverage.cells)
    result.violations = [*world.objections, *judged(recording, storm)]
    result.digest = hashlib.sha256(msgspec.json.encode(recording)).hexdigest()
    return result


def judged(recording: Recording, storm: Storm) -> list[str]:
    has_rivals = "rival" in storm.scenario.faults
    return [str(violation) for violation in checker.check(recording, may_read_stale=has_rivals, viewers_have_all=False)]


# What an engine says of itself that is never a fault's doing.
ALARMS: Final = frozenset({"reply_raised", "internal_error", "drop_broken", "seq_contradicts_log"})

FRAMES: Final = 6  # of a traceback


@contextmanager
def listening(storm: Storm) -> Iterator[None]:
    """Read the engine's log lines: of faults that a simulation makes they are no news, of bugs they are."""

    def hear(logger: Any, method: str, line: MutableMapping[str, Any]) -> Any:
        event, reason = line["event"], str(line.get("reason", ""))
        if event in ALARMS or (event == "drop_stopped" and reason.startswith("AssertionError")):
            storm.world.object(f"an engine says: {event} {reason}")
        elif storm.world.book.is_traced:
            storm.world.book.say(f"log: {line}")
        raise structlog.DropEvent

    was = structlog.get_config()
    structlog.configure(processors=[hear], wrapper_class=structlog.BoundLogger, cache_logger_on_first_use=False)
    try:
        yield
    finally:
        structlog.configure(**was)


def _told(error: BaseException) -> list[str]:
    """Each error of a group, with the place where it was raised."""
    if isinstance(error, BaseExceptionGroup):
        return [told for one in error.exceptions for told in _told(one)]
    return ["".join(traceback.format_exception(error)[-FRAMES:])]
