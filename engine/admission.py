"""How many reserves may be under way: as many as fit, unless they stand in line for too long.

A rush is let in whole: it is what a drop is, and over in seconds. A line that stands is another matter: more is asked
than can be done, and each reserve that is taken makes all others wait longer, until none is answered before its caller
has gone. So once the line has been longer than `LINE_S` for `RUSH_S`, only as many are taken as are done in `LINE_S`,
and the rest is refused at once, which costs a quarter of a reserve, until none had to be for `CALM_S`. What ends a hold
is never refused here. (CoDel, RFC 8289, has the idea: judge a queue by how long it stands, not by how long it is.)

The line begins where nobody has read yet what is asked: `Load.stood_s` of it is before our door, and counts.
"""

import trio

from engine.actor import CROWD, Load

TICK_S = 0.1
LINE_S = 1.5  # that a reserve may wait: who waits for longer asks again, or goes
RUSH_S = 1.0
CALM_S = 1.0
SMOOTHING = 0.3  # the share of the newest tick in the rate: some three ticks count


class Admission:
    """`run` in a nursery. It sleeps while little is in flight."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._reserve_max = load.reserve_max
        self._rate = 0.0  # answered per s
        self._in_line_s = 0.0  # for how long the line has been too long
        self._calm_s = 0.0  # since the last reserve was refused

    @property
    def is_shedding(self) -> bool:
        return self._load.reserve_max != self._reserve_max

    async def run(self) -> None:
        load = self._load
        while True:
            if load.in_flight < CROWD and not self.is_shedding:
                self._in_line_s = 0.0
                await load.crowded.park()
                self._rate = 0.0
            began, answered, refused = trio.current_time(), load.answered, load.reserves_refused
            await trio.sleep(TICK_S)
            self._look(trio.current_time() - began, load.answered - answered, load.reserves_refused - refused)

    def _look(self, passed_s: float, answered: int, refused: int) -> None:
        """What has happened since the last look."""
        load = self._load
        rate = answered / passed_s
        self._rate = rate if not self._rate else (1 - SMOOTHING) * self._rate + SMOOTHING * rate
        room = max(CROWD, int(self._rate * (LINE_S - load.stood_s)))
        self._in_line_s = self._in_line_s + passed_s if load.in_flight > room else 0.0
        self._calm_s = 0.0 if refused else self._calm_s + passed_s
        if self._in_line_s >= RUSH_S or (self.is_shedding and self._calm_s < CALM_S):
            load.reserve_max = min(room, self._reserve_max)
        else:
            load.reserve_max = self._reserve_max
