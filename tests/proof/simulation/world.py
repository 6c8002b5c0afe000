"""What everybody in a simulation shares: storage, engines, the wall clock, the book, and what is wrong right now."""

from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Final

import trio

from engine.model import DropId, DropStatus, ReservationStatus, UserId
from tests.proof.history import Kind
from tests.proof.simulation.book import Book
from tests.proof.simulation.coverage import UNSOLD, Coverage, state_of
from tests.proof.simulation.engines import Life, Machine
from tests.proof.simulation.mortality import Point
from tests.proof.simulation.scenario import Fault, Scenario
from tests.proof.simulation.storage import Storage

WALL_S: Final = 1_767_780_000.0  # 2026-01-07T10:00:00Z, where every history begins


class World:
    def __init__(self, scenario: Scenario, trace: Callable[[str], None] | None = None) -> None:
        self.scenario = scenario
        self.book = Book(trace)
        self.coverage = Coverage()
        self.faults: Counter[str] = Counter()  # how often each struck, or killed an engine
        self.objections: list[str] = []  # what nobody needs a checker to see
        self.drops: list[DropId] = []
        self.is_calm = False  # the storm is over
        self.wall_offset_s = 0.0
        self.storage = Storage(
            Random(f"{scenario.seed} storage"),
            latency_s=scenario.latency_s,
            commit_timeout_s=scenario.commit_timeout_s,
        )
        self.machines = [Machine(number, self.storage, scenario, self) for number in range(scenario.engines)]
        self._in_effect: dict[Fault, int] = {}
        self._viewers = 0
        self._leads: dict[DropId, int] = {}  # the machine that is asked for a drop first

    # Time --------------------------------------------------------------------------------------------

    def wall(self) -> float:
        return WALL_S + trio.current_time() + self.wall_offset_s

    # Engines -----------------------------------------------------------------------------------------

    def came_up(self, life: Life) -> None:
        self.book.say(f"engine {life.machine.number} is up, {life.registry.statistics().drops} drops")

    def went_down(self, life: Life, point: Point) -> None:
        if life.service is not None:
            self.look_at_bounds(life)
        self.faults[f"crash at {point.value}"] += 1
        self.book.say(f"engine {life.machine.number} dies: {point.value}")

    def lives(self) -> list[Life]:
        """The engines that serve."""
        return [machine.life for machine in self.machines if machine.life is not None and machine.life.serves]

    def reach(self, drop_id: DropId, chance: Random) -> Life | None:
        """Which engine a request goes to; None: nobody listens."""
        serving = self.lives()
        if not serving:
            return None
        if len(serving) == 1 or chance.random() < 0.1:
            return serving[0] if len(serving) == 1 else chance.choice(serving)
        return serving[self._leads.get(drop_id, int(drop_id[-1], 16)) % len(serving)]

    def lead_elsewhere(self, drop_id: DropId, life: Life) -> None:
        """An engine says that a drop is not its own."""
        self._leads[drop_id] = life.machine.number + 1

    # The weather -------------------------------------------------------------------------------------

    def begins(self, fault: Fault) -> None:
        self.faults[fault.value] += 1
        self._in_effect[fault] = self._in_effect.get(fault, 0) + 1
        self.book.say(f"{fault.value} begins")

    def ends(self, fault: Fault) -> None:
        self._in_effect[fault] -= 1
        if not self._in_effect[fault]:
            del self._in_effect[fault]
        self.book.say(f"{fault.value} ends")

    # What is asked -----------------------------------------------------------------------------------

    def some_drop(self, chance: Random) -> DropId:
        """The newest more often than the others, and one that is live more often than one that is not."""
        drops, rows = self.drops, self.storage.tables.drops
        drop_id = drops[-1] if chance.random() < 0.2 else chance.choice(drops)
        if rows[drop_id].status is not DropStatus.LIVE and chance.random() < 0.7:
            return chance.choice(drops)
        return drop_id

    def someone_with_a_past(self, chance: Random) -> tuple[DropId, UserId] | None:
        """A drop, and a user who has had a reservation on it; of an ended drop, still held, rather than any."""
        newest, rows = self.storage.newest, self.storage.tables.drops
        ended = [pair for pair in newest if rows[pair[0]].status is DropStatus.ENDED]
        held = [pair for pair in ended if newest[pair] is ReservationStatus.ACTIVE]
        for pairs, odds in ((held, 0.6), (ended, 0.8), (list(newest), 1.0)):
            if pairs and chance.random() < odds:
                return chance.choice(pairs)
        return None

    def a_future_drop(self, chance: Random) -> DropId | None:
        """One that is not on sale yet; of two, the one without stock."""
        rows = self.storage.tables.drops
        unsold = [drop_id for drop_id in self.drops if rows[drop_id].status in UNSOLD]
        empty = [drop_id for drop_id in unsold if not rows[drop_id].available_stock]
        return chance.choice(empty or unsold) if unsold else None

    def note(self, kind: Kind, drop_id: DropId, user_id: UserId) -> None:
        storage = self.storage
        row = storage.tables.drops.get(drop_id)
        state = state_of(row, storage.newest.get((drop_id, user_id)))
        self.coverage.note(kind, state, list(self._in_effect))

    def new_viewer(self) -> int:
        self._viewers += 1
        return self._viewers

    def look_at_bounds(self, life: Life) -> None:
        """Whether everything that waits in an engine waits within its limit (I17)."""
        limits, registry = self.scenario.settings.limits, life.registry
        statistics, hub = registry.statistics(), life.hub.statistics()
        found = [
            ("commands in flight", statistics.in_flight_peak, limits.in_flight_max),
            ("parts that wait", statistics.committer.waiting, statistics.drops),
            ("events of the hub", hub.ring, self.scenario.hub_limits["ring_max"]),
        ]
        for actor in registry._actors.values():
            found.append(("messages of a drop", actor.mailbox.statistics().waiting_peak, limits.mailbox_max))
        for what, measured, bound in found:
            if measured > bound:
                self.object(f"I17: {measured} {what}, at most {bound}")

    def object(self, sentence: str) -> None:
        self.objections.append(sentence)
        self.book.say(f"OBJECTION: {sentence}")
