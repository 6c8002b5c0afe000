"""Which of the cells that there are the seeds of all sittings have reached: `simulation.coverage`, added up."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Final

from engine.model import DropStatus
from tests.proof.history import Kind
from tests.proof.simulation.coverage import NO_DROP, NONE, Cell, feasible, missing
from tests.proof.simulation.scenario import Fault

JOINT: Final = " | "  # between the words of a cell on file
FAULTS: Final = (NONE, *(fault.value for fault in Fault))
STATUSES: Final = (NO_DROP[0], *(status.value for status in DropStatus))


def on_file(cell: Cell) -> str:
    return JOINT.join(cell)


class Reached:
    """How often each cell was reached. One that was reached is feasible, whatever was thought of it."""

    def __init__(self, counts: Mapping[str, int]) -> None:
        self._counts = {_cell(name): count for name, count in counts.items() if count}
        self._feasible = {*feasible(), *self._counts}

    @property
    def feasible(self) -> int:
        return len(self._feasible)

    @property
    def reached(self) -> int:
        return len(self._counts)

    def missing(self) -> list[Cell]:
        return missing(self._counts)

    def by_status(self) -> list[tuple[str, str, dict[str, tuple[int, int, int]]]]:
        """A row for each command and status of a drop; in it, for each fault: times, cells reached, feasible cells."""
        rows = []
        for kind, status in itertools.product(Kind, STATUSES):
            of_row = [cell for cell in self._feasible if cell[:2] == (kind.value, status)]
            if of_row:
                figures = {fault: self._figures([cell for cell in of_row if cell[4] == fault]) for fault in FAULTS}
                rows.append((kind.value, status, figures))
        return rows

    def _figures(self, cells: Iterable[Cell]) -> tuple[int, int, int]:
        times = [self._counts.get(cell, 0) for cell in cells]
        return sum(times), sum(time > 0 for time in times), len(times)


def _cell(name: str) -> Cell:
    kind, status, newest, stock, fault = name.split(JOINT)
    return kind, status, newest, stock, fault
