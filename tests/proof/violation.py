"""What the checker found: a broken invariant, a sentence, and the shortest slice of history around it.

A violation is noted while millions of operations go by, so it costs a few fields then; its slice is cut only for the
first ones, in the end.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Final

import msgspec

from tests.proof.history import EventRow, Operation, Recording

LINES_MAX: Final = 20  # of a slice: what fits on a screen with the sentence above it
NEAR: Final = 3  # events before and after the place, whoever caused them
SLICES_MAX: Final = 20  # the first violations tell what broke; the rest mostly follows from them
FOUND_MAX: Final = 1_000  # a history that is broken throughout is not described to its end
HEAD: Final = ("", "seq", "epoch", "what", "who", "which", "when", "says")
ID_SHOWN: Final = 8  # last characters of an id: those made in one millisecond begin alike


class Violation(msgspec.Struct):
    """`about` are the operations that contradict, `seq` is where; `str` gives the sentence and the slice."""

    invariant: str
    sentence: str
    drop_id: str = ""
    user_id: str | None = None
    seq: int | None = None
    about: tuple[Operation, ...] = ()
    history: str = ""

    def __str__(self) -> str:
        where = f" (drop {self.drop_id})" if self.drop_id else ""
        return f"{self.invariant}: {self.sentence}{where}\n{self.history}".rstrip()


class Findings:
    """The violations so far, in the order in which they were found, up to `FOUND_MAX`."""

    def __init__(self) -> None:
        self.violations: list[Violation] = []

    def add(
        self,
        invariant: str,
        sentence: str,
        drop_id: str,
        *about: Operation,
        user_id: str | None = None,
        seq: int | None = None,
    ) -> None:
        if len(self.violations) == FOUND_MAX:
            return
        if about and user_id is None:
            user_id = about[0].user_id
        if about and seq is None:
            seq = about[0].seq
        self.violations.append(Violation(invariant, sentence, drop_id, user_id, seq, about))


def cut_slices(violations: Sequence[Violation], recording: Recording) -> None:
    """Give the first violations their slice of history: one pass over it, whatever their number."""
    shown = violations[:SLICES_MAX]
    wanted = {violation.drop_id for violation in shown}
    operations: dict[str, list[Operation]] = {drop_id: [] for drop_id in wanted}
    events: dict[str, list[EventRow]] = {drop_id: [] for drop_id in wanted}
    for operation in recording.operations if wanted else ():
        if operation.drop_id in wanted:
            operations[operation.drop_id].append(operation)
    for event in recording.tables.events if wanted else ():
        if event.drop_id in wanted:
            events[event.drop_id].append(event)
    known = {drop_id: _Known(of_drop) for drop_id, of_drop in operations.items()}
    for violation in shown:
        drop_id = violation.drop_id
        violation.history = _slice(violation, operations[drop_id], events[drop_id], known[drop_id])


class _Known:
    """What anybody had been told of a drop, at any instant."""

    def __init__(self, operations: list[Operation]) -> None:
        told = sorted((one.ended, one.seq) for one in operations if one.ended is not None and one.seq is not None)
        self._ended = [ended for ended, _ in told]
        self._newest = list(accumulate((seq for _, seq in told), max, initial=0))

    def at(self, instant: int) -> int:
        """The newest `seq` by then."""
        return self._newest[bisect_left(self._ended, instant)]


def _slice(violation: Violation, operations: list[Operation], events: list[EventRow], known: _Known) -> str:
    """The operations that contradict, what their user did, and the events around the place: nearest first, then sorted.

    An event stands where its `seq` puts it; an operation behind the event at which it says it was, or where it began.
    """
    seq, user_id = violation.seq, violation.user_id
    numbers = {operation.number for operation in violation.about}
    ranked: list[tuple[tuple[int, int], tuple[int, int, int], Operation | EventRow]] = []
    for operation in operations:
        is_meant = operation.number in numbers
        if not is_meant and operation.user_id != user_id:
            continue
        place = known.at(operation.began) if operation.seq is None else operation.seq
        distance = abs(place - seq) if seq is not None else place
        ranked.append(((0 if is_meant else 2, distance), (place, 1, operation.began), operation))
    for event in events:
        distance = abs(event.seq - seq) if seq is not None else event.seq
        is_own = user_id is not None and event.user_id == user_id
        rank = 1 if distance <= NEAR else 2 if is_own else 3
        if rank < 3 or user_id is None:
            ranked.append(((rank, distance), (event.seq, 0, 0), event))
    ranked.sort(key=lambda entry: entry[0])
    kept = sorted(ranked[: LINES_MAX - 2], key=lambda entry: entry[1])
    left_out = len(ranked) - len(kept)
    lines = _aligned([HEAD, *(_line(entry, numbers) for _, _, entry in kept)])
    return "\n".join([*lines, *([f"    … and {left_out} lines more of them"] if left_out else [])])


def _line(entry: Operation | EventRow, numbers: set[int]) -> tuple[str, ...]:
    return _event_line(entry) if isinstance(entry, EventRow) else _operation_line(entry, entry.number in numbers)


def _operation_line(operation: Operation, is_meant: bool) -> tuple[str, ...]:
    until = "…" if operation.ended is None else f"{operation.ended} µs"
    says = [operation.ending.upper(), operation.code]
    if operation.key is not None:
        says.append(f"key {operation.key}")
    says += ["replayed"] if operation.is_replayed else []
    says += _named(operation, "available_stock", "created_at", "expires_at", "status")
    return (
        ">" if is_meant else "",
        _text(operation.seq),
        _text(operation.epoch),
        f"#{operation.number} {operation.kind}",
        _short(operation.user_id),
        _short(operation.purchase_id or operation.reservation_id),
        f"{operation.began} – {until}",
        " ".join(filter(None, says)),
    )


def _event_line(event: EventRow) -> tuple[str, ...]:
    return (
        "",
        str(event.seq),
        str(event.epoch),
        event.type,
        _short(event.user_id),
        _short(event.purchase_id or event.reservation_id),
        f"at {event.at} ms",
        " ".join(_named(event, "available_stock", "expires_at", "status")),
    )


def _named(of: Operation | EventRow, *names: str) -> list[str]:
    return [f"{name} {getattr(of, name)}" for name in names if getattr(of, name) is not None]


def _aligned(rows: Iterable[tuple[str, ...]]) -> list[str]:
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "    " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
    ]


def _short(id_: str | None) -> str:
    if id_ is None:
        return ""
    return id_ if len(id_) <= ID_SHOWN else f"…{id_[-ID_SHOWN:]}"


def _text(value: object) -> str:
    return "" if value is None else str(value)
