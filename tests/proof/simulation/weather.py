"""The faults of a seed, each in a task of its own: it strikes, lasts for a while, and ends."""

from random import Random
from typing import Final

import trio

from engine.drop import Drop
from engine.ledger import Change
from engine.model import DropId, Event, Refused, ReservationId, Reserve, Reserved, UserId
from tests.engine.making import play, sweep
from tests.fakes import Trouble
from tests.proof.history import Ending, Kind
from tests.proof.simulation.engines import Machine
from tests.proof.simulation.mortality import Point
from tests.proof.simulation.scenario import Fault
from tests.proof.simulation.scheduling import sleep
from tests.proof.simulation.world import World

CALM_S: Final = 6.0  # between two strikes of one fault, on average
LASTS_S: Final = (0.05, 0.4, 1.5, 4.0)
RECOVERY_S: Final = 1.0  # of an engine that is up again, which still counts as its crash's
RIVAL: Final = UserId("ffffffff-0000-7000-8000-00000000000f")
TROUBLES: Final = {
    Fault.REJECTED: Trouble.REJECTED,
    Fault.STORAGE_FULL: Trouble.STORAGE_FULL,
    Fault.LOST_BEFORE: Trouble.LOST_BEFORE_COMMIT,
    Fault.LOST_AFTER: Trouble.LOST_AFTER_COMMIT,
    Fault.LATE: Trouble.LOST_AND_LATE,
}
# How many times a point is passed before the engine dies there.
TIMES: Final = {Point.STEP: 100, Point.PUBLISHED: 4, Point.REPLIED: 5, Point.COMMIT_SENT: 3, Point.COMMIT_DONE: 3}
AT_START: Final = (Point.LOAD, Point.TAKE_OVER, Point.STEP, Point.COMMIT_SENT)
WHILE_RUNNING: Final = (
    *(Point.STEP, Point.STEP, Point.STEP),
    *(Point.COMMIT_SENT, Point.COMMIT_DONE, Point.PUBLISHED, Point.REPLIED, Point.RESOLVE, Point.RECLAIM, Point.SWEEP),
)
DOOM_S: Final = 6.0  # after which an engine that has not come to the point where it should die dies anyway
CLOCK_STEPS_S: Final = (-7_200.0, -60.0, -1.0, -0.02, 0.02, 1.0, 60.0, 10_800.0)


class Weather:
    def __init__(self, world: World) -> None:
        self._world = world
        self._storage = world.storage
        self._rivals = 0

    async def blow(self, fault: Fault) -> None:
        """Let a fault strike again and again, until cancelled; then it is over."""
        chance = Random(f"{self._world.scenario.seed} {fault.value}")
        while True:
            await sleep(chance.expovariate(1 / CALM_S))
            self._world.begins(fault)
            try:
                await self._strike(fault, chance)
            finally:
                self._world.ends(fault)

    async def _strike(self, fault: Fault, chance: Random) -> None:
        match fault:
            case Fault.LATENCY:
                await self._slow(chance)
            case Fault.UNAVAILABLE:
                await self._be_down(chance)
            case Fault.FROZEN:
                await self._freeze(chance)
            case Fault.RIVAL:
                await self._rival(chance)
            case Fault.CRASH:
                await self._crash(chance)
            case Fault.CLOCK_STEP:
                await self._step_clock(chance)
            case _:
                await self._trouble(TROUBLES[fault], chance)

    async def haunt(self) -> None:
        """Batches that were lost from sight come to their end by themselves, too."""
        chance = Random(f"{self._world.scenario.seed} ghosts")
        storage = self._storage
        while True:
            await storage.haunted()
            await sleep(chance.choice([0.001, 0.05, 0.3, 2.0]))
            if storage.ghosts:
                storage.appear(chance.choice(storage.ghosts))

    # The database ------------------------------------------------------------------------------------

    async def _slow(self, chance: Random) -> None:
        self._storage.slowness = chance.choice([5.0, 40.0, 300.0])
        try:
            await sleep(chance.choice(LASTS_S))
        finally:
            self._storage.slowness = 1.0

    async def _be_down(self, chance: Random) -> None:
        self._storage.is_down = True
        try:
            await sleep(chance.choice(LASTS_S))
        finally:
            self._storage.is_down = False

    async def _freeze(self, chance: Random) -> None:
        self._storage.freeze()
        try:
            await sleep(chance.choice(LASTS_S))
        finally:
            self._storage.thaw()

    async def _trouble(self, trouble: Trouble, chance: Random) -> None:
        self._storage.chances[trouble] = chance.choice([0.1, 0.4, 1.0])
        self._storage.has_room_for_updates = chance.random() < 0.7
        try:
            await sleep(chance.choice(LASTS_S))
        finally:
            self._storage.chances.pop(trouble, None)

    # Engines -----------------------------------------------------------------------------------------

    async def _crash(self, chance: Random) -> None:
        machine = chance.choice(self._world.machines)
        life = machine.life
        if life is None or not life.serves:
            await sleep(0.1)
            return
        try:
            if chance.random() < 0.3:
                machine.doom = self._doom(chance, AT_START)
            if chance.random() < 0.15:
                life.mortal.doom(Point.DRAIN, 1)
                life.stop.set()
            else:
                life.mortal.doom(*self._doom(chance, WHILE_RUNNING))
            with trio.move_on_after(DOOM_S):
                await life.ended.wait()
            life.mortal.die(Point.STEP)
            await self._recovered(machine)
        finally:
            machine.spare()

    def _doom(self, chance: Random, points: tuple[Point, ...]) -> tuple[Point, int]:
        point = chance.choice(points)
        return point, chance.randint(1, TIMES.get(point, 1))

    async def _recovered(self, machine: Machine) -> None:
        """An engine serves again, and has had a moment to catch up."""
        with trio.move_on_after(DOOM_S):
            while machine.life is None or not machine.life.serves:
                await sleep(0.1)
        await sleep(RECOVERY_S)

    async def _step_clock(self, chance: Random) -> None:
        """The wall clock jumps; an engine that starts after that must not follow it back."""
        world = self._world
        world.wall_offset_s += chance.choice(CLOCK_STEPS_S)
        machine = chance.choice(world.machines)
        life = machine.life
        if life is not None and life.serves and chance.random() < 0.7:
            if chance.random() < 0.5:
                life.mortal.die(Point.STEP)
            else:
                life.stop.set()
                await life.ended.wait()
            await self._recovered(machine)
        else:
            await sleep(chance.choice(LASTS_S))

    # Rivals ------------------------------------------------------------------------------------------

    async def _rival(self, chance: Random) -> None:
        """Another engine takes drops over: a whole one that starts anew, or one that only writes."""
        world = self._world
        if len(world.machines) > 1 and chance.random() < 0.5:
            machine = chance.choice(world.machines)
            if machine.life is not None and machine.life.serves:
                machine.life.stop.set()
                await machine.life.ended.wait()
        else:
            for drop_id in chance.sample(world.drops, chance.randint(1, len(world.drops))):
                self._take(drop_id, chance)
            await sleep(chance.choice(LASTS_S))
            machine = chance.choice(world.machines)
            if machine.life is not None:
                machine.life.mortal.die(Point.STEP)
        await self._recovered(machine)

    def _take(self, drop_id: DropId, chance: Random) -> None:
        """As an engine of our time does it, in one breath: raise the epoch, load, settle what is due, reserve."""
        world = self._world
        server = self._storage.server
        (record,) = server.taken_over(drop_id)
        world.book.say(f"a rival takes {drop_id[-8:]} at seq {record.seq}")
        if chance.random() < 0.3:
            return
        drop = Drop.restored(record)
        now = max([int(world.wall() * 1000), *(life.registry.clock.now() for life in world.lives())])
        now = max(now, self._storage.tables.drops[drop_id].updated_at)
        events: list[Event] = list(sweep(drop, now))
        self._rivals += 1
        hold_ms = world.scenario.ttl_ms
        command = Reserve(RIVAL, ReservationId(f"{self._rivals:08x}-0000-7000-8000-eeeeeeeeeeee"), hold_ms)
        reserved = play(drop, command, now)
        operation = world.book.begin(Kind.RESERVE, RIVAL, drop_id)
        if isinstance(reserved, Reserved):
            events.append(reserved)
            operation.reservation_id = reserved.hold.id
            operation.created_at, operation.expires_at = reserved.hold.created_at, reserved.hold.expires_at
            operation.available_stock = reserved.available_stock
            operation.ending, operation.code = Ending.OK, ""
        else:
            assert isinstance(reserved, Refused)
            operation.ending, operation.code = Ending.REFUSED, reserved.code.value
        if events:
            hit = server.write([Change(drop_id, record.epoch, record.seq, events, ())])
            assert hit, "a rival misses its own guard"
        operation.seq, operation.epoch = drop.seq, record.epoch
        world.book.ended(operation)
