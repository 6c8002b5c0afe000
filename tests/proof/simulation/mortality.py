"""How an engine dies: at once, anywhere, without a last word.

Between two awaits a task runs undisturbed, so an engine can stop in as many states as its tasks have steps; that is
what `Steps` counts. And a step that speaks to the world several times may be cut between two of these: at a *point*,
which whoever carries the words passes by.
"""

from collections.abc import Callable
from enum import StrEnum

import trio


class Point(StrEnum):
    """Where an engine can be told to die."""

    STEP = "step"  # between two steps of any task
    COMMIT_SENT = "commit sent"  # the batch is on its way
    COMMIT_DONE = "commit done"  # its effect is there, its answer is not
    PUBLISHED = "published"  # an event was told to subscribers, its caller is not answered
    REPLIED = "replied"  # one caller has its answer, the next one does not
    RESOLVE = "resolve"
    TAKE_OVER = "take over"
    RECLAIM = "reclaim"
    LOAD = "load"  # at its start, before it serves
    SWEEP = "sweep"  # a batch that expires something was sent
    DRAIN = "drain"


class Mortal:
    """One life. `dies` is called once, synchronously; from then on nothing that the engine does has an effect."""

    def __init__(self, dies: Callable[[Point], None]) -> None:
        self.is_dead = False
        self._dies = dies
        self._doom: Point | None = None
        self._left = 0
        self._steps: _Steps | None = None

    def doom(self, point: Point, times: int) -> None:
        """Die when `point` is passed for the `times`-th time from now on."""
        self.spare()
        self._doom, self._left = point, times
        if point is Point.STEP:
            self._steps = _Steps(self)
            trio.lowlevel.add_instrument(self._steps)

    def spare(self) -> None:
        self._doom = None
        if self._steps is not None:
            trio.lowlevel.remove_instrument(self._steps)
            self._steps = None

    def pass_by(self, point: Point) -> None:
        if point is self._doom and not self.is_dead:
            self._left -= 1
            if self._left <= 0:
                self.die(point)

    def die(self, point: Point) -> None:
        if not self.is_dead:
            self.spare()
            self.is_dead = True
            self._dies(point)

    def end(self) -> None:
        """A life that came to its end by itself has no effect any more, either."""
        self.spare()
        self.is_dead = True

    async def lives(self) -> None:
        """Go on, if alive; the dead wait here until they are cleared away."""
        if self.is_dead:
            await trio.sleep_forever()


class _Steps(trio.abc.Instrument):
    def __init__(self, mortal: Mortal) -> None:
        self._mortal = mortal

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._mortal.pass_by(Point.STEP)
