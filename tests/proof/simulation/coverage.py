"""How much of all that can be asked was asked: each command, in each state of drop and user, under each fault."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Final

from engine.model import DropStatus, ReservationStatus
from tests import fakes
from tests.proof.history import Kind
from tests.proof.simulation.scenario import Fault

State = tuple[str, str, str]
"""Status of the drop; how the user's newest reservation on it stands; whether there is stock."""
Cell = tuple[str, str, str, str, str]
"""Command, state, and what is wrong with the world."""

NONE: Final = "none"
STOCKS: Final = ("0", ">0")
NO_DROP: Final[State] = ("no drop", NONE, "0")
# A drop that is not on sale yet has no reservations. `paused` and `cancelled` are statuses that no route sets yet.
UNSOLD: Final = (DropStatus.DRAFT, DropStatus.SCHEDULED)
SOLD: Final = (DropStatus.LIVE, DropStatus.ENDED)


class Coverage:
    """Which commands were asked in which state under which fault."""

    def __init__(self) -> None:
        self.cells: Counter[Cell] = Counter()

    def note(self, kind: Kind, state: State, faults: Iterable[Fault]) -> None:
        command = kind.value
        for fault in faults:
            self.cells[(command, *state, fault.value)] += 1
        if not faults:
            self.cells[(command, *state, NONE)] += 1


def state_of(row: fakes.DropRow | None, newest: ReservationStatus | None) -> State:
    """By the tables, at the moment of asking."""
    if row is None:
        return NO_DROP
    return row.status.value, NONE if newest is None else newest.value, ">0" if row.available_stock else "0"


def feasible() -> Iterator[Cell]:
    """All that there is to reach."""
    for fault in (NONE, *(fault.value for fault in Fault)):
        yield (Kind.CREATE.value, *NO_DROP, fault)
        # What is due of a drop that does not exist: the route that settles names none.
        for kind in (Kind.RESERVE, Kind.PURCHASE, Kind.CANCEL, Kind.SHOW):
            yield (kind.value, *NO_DROP, fault)
        for kind in (Kind.RESERVE, Kind.PURCHASE, Kind.CANCEL, Kind.SHOW, Kind.EXPIRE):
            for status, newest, stock in _states():
                # A cancel names a reservation, and where nothing was sold yet there is none.
                if kind is not Kind.CANCEL or DropStatus(status) in SOLD:
                    yield kind.value, status, newest, stock, fault


def _states() -> Iterator[State]:
    for stock in STOCKS:
        for status in UNSOLD:
            yield status.value, NONE, stock
        for status in SOLD:
            for newest in (NONE, *(newest.value for newest in ReservationStatus)):
                yield status.value, newest, stock


def pairs(cell: Cell) -> Iterator[tuple[str, ...]]:
    """Command and state, command and fault, state and fault."""
    command, *state, fault = cell
    yield command, *state
    yield command, fault
    yield *state, fault


def missing(reached: Iterable[Cell]) -> list[Cell]:
    return sorted(set(feasible()) - set(reached))
