"""One history from its first drop to its last event: a storm, calm, and a look at what is left."""

from collections.abc import Callable
from random import Random
from typing import Final

import trio

from engine.model import DropId, ReservationStatus, UserId
from tests.proof.history import Ending, Kind, Recording
from tests.proof.simulation.book import tables_of
from tests.proof.simulation.clients import Clients
from tests.proof.simulation.scenario import Fault, Scenario
from tests.proof.simulation.scheduling import sleep
from tests.proof.simulation.storage import LATENCY_S_MAX
from tests.proof.simulation.viewers import Viewer
from tests.proof.simulation.weather import Weather
from tests.proof.simulation.world import World

SERVED_S: Final = 2.0  # that changes may take to be served again once all is well
RELOADED_S: Final = 12.0  # of a drop that stopped several times; its longest rest is 10 s
LOOK_S: Final = 0.1
CAUGHT_UP_S: Final = 3.0  # that viewers need to know everything
HANG_S: Final = 100_000.0  # on the simulated clock: a hang becomes a failure
LAST: Final = UserId("ffffffff-0000-7000-8000-00000000000e")  # who asks when all is over


class Storm:
    def __init__(self, scenario: Scenario, trace: Callable[[str], None] | None = None) -> None:
        scenario.users[LAST] = "last"
        self.scenario = scenario
        self._trace = trace
        self.simulated_s = 0.0
        self.viewers: list[Viewer] = []
        self.heard: dict[tuple[int, str], int] = {}  # what viewers had time to hear: by viewer and drop, up to a `seq`

    async def run(self) -> World:
        world = self.world = World(self.scenario, self._trace)
        began = trio.current_time()
        with trio.fail_after(HANG_S):
            async with trio.open_nursery() as nursery:
                for machine in world.machines:
                    nursery.start_soon(machine.run)
                weather = Weather(world)
                nursery.start_soon(weather.haunt)
                await self._make_drops(nursery)
                await self._storm(weather, nursery)
                await self._calm(nursery)
                await self._end()
                nursery.cancel_scope.cancel()
        self.simulated_s = trio.current_time() - began
        return world

    def recording(self) -> Recording:
        world = self.world
        tables = tables_of(world.storage.tables)
        return Recording(world.book.operations, tables, world.book.deliveries, self.scenario.ttl_ms)

    async def _make_drops(self, nursery: trio.Nursery) -> None:
        """The first drops, before anything goes wrong; the very first is live."""
        world, chance = self.world, Random(f"{self.scenario.seed} drops")
        clients = Clients(world, nursery)
        while not world.lives():
            await sleep(LOOK_S)
        for stock in self.scenario.stocks:
            status = None if world.drops else "live"
            user = chance.choice(list(self.scenario.users))
            made = await clients.create(chance, user, total_stock=stock, status=status)
            assert made.ending is Ending.OK, made

    async def _storm(self, weather: Weather, around: trio.Nursery) -> None:
        world, scenario = self.world, self.scenario
        async with trio.open_nursery() as blowing:
            for fault in Fault:
                if fault in scenario.faults:
                    blowing.start_soon(weather.blow, fault)
            self.viewers = [Viewer(world, number) for number in range(scenario.viewers)]
            for viewer in self.viewers:
                around.start_soon(viewer.live)
            async with trio.open_nursery() as asking:
                clients = Clients(world, asking)
                for number in range(scenario.clients):
                    asking.start_soon(clients.one, number)
                await sleep(scenario.storm_s)
                world.is_calm = True
                blowing.cancel_scope.cancel()
        world.book.say("the storm is over")

    async def _calm(self, nursery: trio.Nursery) -> None:
        """Everything serves again, soon."""
        world = self.world
        first, *rivals = world.machines
        for machine in rivals:
            machine.want(False)
        for machine in rivals:  # one that is only starting takes every drop before it ends
            if machine.life is not None:
                await machine.life.ended.wait()
        if Fault.RIVAL in self.scenario.faults and first.life is not None:
            first.life.stop.set()  # what a rival has taken comes back with a new start
            await first.life.ended.wait()
        while not (first.life is not None and first.life.serves):
            await sleep(LOOK_S)
        await sleep(2 * LATENCY_S_MAX)  # what was under way is over
        if Random(f"{self.scenario.seed} calm").random() < 0.5:
            calm_since = trio.current_time()
            async with trio.open_nursery() as probing:
                for drop_id in world.drops:
                    probing.start_soon(self._probe, drop_id, calm_since, Clients(world, nursery))
            await sleep(CAUGHT_UP_S)
        else:  # nobody wakes a drop up: what is due is settled all the same
            await sleep(RELOADED_S)
        await self._let_viewers_hear()
        self._look_for_overdue()
        world.look_at_bounds(*world.lives())
        for life in world.lives():
            if life.owed:
                world.object(f"I18: {life.owed} answers are owed when nobody asks any more")

    async def _let_viewers_hear(self) -> None:
        """Those who watch take what there is, and have a moment for it."""
        watched: dict[tuple[int, DropId], int] = {}
        for viewer in self.viewers:
            viewer.read()
            watched |= viewer.watched()
        await sleep(CAUGHT_UP_S)
        still = {where for viewer in self.viewers for where in viewer.watched()}
        self.heard = {where: seq for where, seq in watched.items() if where in still}

    async def _probe(self, drop_id: DropId, since: float, clients: Clients) -> None:
        """A drop is served again within its time."""
        world, chance = self.world, Random(f"{self.scenario.seed} probe {drop_id}")
        is_reloading = False
        while True:
            asked = await clients.ask(chance, Kind.RESERVE, LAST, drop_id)
            waited_s = trio.current_time() - since
            if asked.seq is not None and not is_fault(asked.code):
                break
            is_reloading = is_reloading or asked.code == "DROP_RESTARTING"
            if waited_s > (RELOADED_S if is_reloading else SERVED_S):
                world.object(f"I18: drop {drop_id} is not served {waited_s:.1f} s after all was well: {asked.code}")
                return
            await sleep(LOOK_S)
        await clients.ask(chance, Kind.SHOW, LAST, drop_id)

    def _look_for_overdue(self) -> None:
        world = self.world
        (life,) = world.lives()
        now = life.registry.clock.now()
        # As the tables have it: the engine's own board lacks what it has let go.
        for row in world.storage.tables.reservations.values():
            hold = row.hold
            if row.status is ReservationStatus.ACTIVE and hold.expires_at + OVERDUE_MS < now:
                world.object(f"I18: {hold.id} of drop {hold.drop_id} is due since {now - hold.expires_at} ms")

    async def _end(self) -> None:
        """In good order; and whatever is still on its way to the tables gets there."""
        machine = self.world.machines[0]
        life = machine.life
        assert life is not None
        machine.want(False)
        await life.ended.wait()
        if life.is_cut_short:
            self.world.object("I18: an engine of which nobody asks anything does not end")
        self.world.storage.settle()


OVERDUE_MS: Final = 500
FAULTS: Final = frozenset(
    {
        "OVERLOADED",
        "DATABASE_UNAVAILABLE",
        "STORAGE_FULL",
        "OUTCOME_UNKNOWN",
        "SERVER_STOPPING",
        "DROP_RESTARTING",
        "DROP_OWNED_ELSEWHERE",
        "DROP_OUT_OF_SERVICE",
        "NOT_SENT",
        "NO_ANSWER",
    }
)


def is_fault(code: str) -> bool:
    return code in FAULTS
