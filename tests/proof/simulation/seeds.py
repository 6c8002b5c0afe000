"""One seed: run, judged, and summed up."""

import hashlib
import traceback
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, Final

import msgspec
import structlog

from tests.fakes import KEY_IS_USED, REJECTED
from tests.proof import checker
from tests.proof.history import EventRow, Recording
from tests.proof.recorder import NOT_SENT
from tests.proof.simulation.coverage import Cell
from tests.proof.simulation.scenario import Fault, scenario
from tests.proof.simulation.scheduling import replay
from tests.proof.simulation.storm import Storm


class Result(msgspec.Struct):
    """What came of a seed. `operations`: that somebody heard; `faults`: how often each struck; `digest` is the
    history's, to the byte.
    """

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
    result.operations = sum(operation.code != NOT_SENT for operation in recording.operations)
    result.simulated_s = storm.simulated_s
    result.faults = dict(world.faults)
    result.coverage = dict(world.coverage.cells)
    result.violations = [*world.objections, *judged(recording, storm)]
    result.digest = hashlib.sha256(msgspec.json.encode(recording)).hexdigest()
    return result


def judged(recording: Recording, storm: Storm) -> list[str]:
    faults = storm.scenario.faults
    found = checker.check(
        recording,
        may_read_stale=Fault.RIVAL in faults,
        viewers_have_all=storm.heard,
        clock_slack_ms=None if Fault.CLOCK_STEP in faults else CLOCK_SLACK_MS,
    )
    late = [] if faults else [event for event in recording.tables.events if late_ms(event) > LATE_MS]
    return [
        *map(str, found),
        *(f"I8: seq {event.seq} of {event.drop_id} comes {late_ms(event)} ms late, and all is well" for event in late),
    ]


def late_ms(event: EventRow) -> int:
    """Of a hold that expired; 0 of anything else."""
    return event.at - event.expires_at if event.type == "EXPIRED" and event.expires_at is not None else 0


# What an engine says of itself that is never a fault's doing; and what only another engine makes it say.
ALARMS: Final = frozenset({"reply_raised", "internal_error", "drop_broken"})
STOPPED: Final = ("Rejected(", "GuardMissed(")  # what stops a drop and is no bug, or is told of as such already
CONTEST: Final = frozenset({"guard_missed", "drop_owned_elsewhere"})

CLOCK_SLACK_MS: Final = 2  # of one engine's clock and the next one's: each begins with a whole millisecond
LATE_MS: Final = 250
FRAMES: Final = 6  # of a traceback


@contextmanager
def listening(storm: Storm) -> Iterator[None]:
    """Read the engine's log lines: of faults that a simulation makes they are no news, of bugs they are."""

    def hear(logger: Any, method: str, line: MutableMapping[str, Any]) -> Any:
        event, reason = line["event"], str(line.get("reason", ""))
        if is_alarm(event, reason, is_contested=Fault.RIVAL in storm.scenario.faults):
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


def is_alarm(event: str, reason: str, *, is_contested: bool) -> bool:
    """What the tables had to stop is a bug of the engine as well, though no harm came of it."""
    match event:
        case "drop_stopped":
            return not reason.startswith(STOPPED)
        case "part_rejected":
            return reason != REJECTED and not (is_contested and reason == KEY_IS_USED)
        case _:
            return event in ALARMS or (event in CONTEST and not is_contested)


def _told(error: BaseException) -> list[str]:
    """Each error of a group, with the place where it was raised."""
    if isinstance(error, BaseExceptionGroup):
        return [told for one in error.exceptions for told in _told(one)]
    return ["".join(traceback.format_exception(error)[-FRAMES:])]
