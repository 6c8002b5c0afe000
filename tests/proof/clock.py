"""The engine's clock against real time: both pass as fast (I19).

A change is decided between the instants at which its operation began and ended, and the log says when, by the engine's
clock. So one difference between the two clocks must fit all changes: where it does not, the engine's has leapt, or
something was decided at an instant that was not the present. A leap ends everybody's holds early, and nothing else
shows it: the log agrees with itself.
"""

from collections.abc import Iterable

from tests.proof.history import Operation
from tests.proof.violation import Findings

US_PER_MS = 1_000

Dated = tuple[Operation, int]
"""A change that somebody waited for, and when the log says that it was decided (ms since 1970)."""


def check_clock(changes: Iterable[Dated], slack_ms: int, found: Findings) -> None:
    """`slack_ms`: by how much both may drift apart within the history, and the wall clock be set."""
    least: tuple[int, Dated] | None = None  # of the engine's clock - ours, in µs
    most: tuple[int, Dated] | None = None
    for operation, at in changes:
        if operation.ended is None:
            continue
        at_least, at_most = at * US_PER_MS - operation.ended, (at + 1) * US_PER_MS - operation.began
        if least is None or at_least > least[0]:
            least = at_least, (operation, at)
        if most is None or at_most < most[0]:
            most = at_most, (operation, at)
    if least is None or most is None or least[0] <= most[0] + slack_ms * US_PER_MS:
        return
    off_ms = (least[0] - most[0]) // US_PER_MS
    (late, late_at), (early, early_at) = least[1], most[1]
    sentence = (
        f"the engine's clock and real time are {off_ms} ms further apart when #{late.number} was decided, at {late_at},"
        f" than when #{early.number} was, at {early_at}"
    )
    found.add("I19", sentence, late.drop_id, late, early)
