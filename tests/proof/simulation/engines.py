"""One engine process: started, ended or killed, and started again on the same storage.

`Machine` is the place where it runs, `Life` one run of it, put together as `api.serve` does it: the registry with its
actors, committer and timer, the hub, the key book, and the handlers in front of them.
"""

from collections.abc import Callable, Coroutine, Mapping, Sequence
from random import Random
from typing import Any, Final, Protocol, cast

import trio

from api import errors
from api.answers import Answer
from api.auth import Authenticator, UserDirectory
from api.handlers import Request, Service, failed
from api.idempotency import KeyBook
from api.ids import IdSource
from api.promises import Errands, Handling, drive
from engine.clock import Clock
from engine.hub import Hub
from engine.ledger import Unavailable
from engine.model import DropId, Event, Fault, FaultCode, Outcome, Sweep, UserId
from engine.publisher import Publisher
from engine.registry import Registry, running
from persistence.reads import Reads
from tests.proof.simulation.mortality import Mortal, Point
from tests.proof.simulation.scenario import Scenario
from tests.proof.simulation.scheduling import Nap, sleep
from tests.proof.simulation.storage import Session, Storage

RESTARTS_S: Final = (0.01, 0.2, 0.5, 2.0)  # that it takes until a process runs again
DRAIN_S: Final = 10.0  # that an orderly end may take before it is cut short
KEEP_S: Final = 1e9  # idempotency keys: longer than any history


class Life:
    """One run of an engine, from its first look at the storage to its last breath."""

    def __init__(self, machine: "Machine") -> None:
        self.machine = machine
        self.mortal = Mortal(self._died)
        self.session = Session(machine.storage, self.mortal)
        self.scope = trio.CancelScope()
        self.stop = trio.Event()
        self.ended = trio.Event()
        self.service: Service | None = None  # once it serves
        self.has_served = False
        self.is_cut_short = False  # it ended before all was answered
        self.is_draining = False
        self.answer_s = machine.settings.answer_timeout_ms / 1000
        self._calls: dict[Nap, None] = {}  # those who wait for an answer
        self._handlings: dict[Handling[Answer], None] = {}  # that have not come to their end
        self._tasks: dict[trio.CancelScope, None] = {}  # the same, of handlers that need a task
        self.connections: dict[Callable[[], None], None] = {}

    @property
    def registry(self) -> Registry:
        assert self.service is not None
        return self.service.registry

    @property
    def hub(self) -> Hub:
        assert self.service is not None
        return self.service.hub

    @property
    def serves(self) -> bool:
        return self.service is not None and not self.mortal.is_dead

    @property
    def owed(self) -> int:
        """Answers that somebody waits for, be it in vain: commands of the registry, and requests above them."""
        return self.registry.statistics().in_flight + len(self._handlings)

    async def run(self) -> None:
        """Until `stop` is set, or it dies."""
        with self.scope:
            try:
                await self._run()
            finally:
                self.mortal.end()
                self.service = None
                for handling in list(self._handlings):
                    handling.close()
                self.ended.set()

    async def _run(self) -> None:
        machine, session, chance = self.machine, self.session, self.machine.chance
        clock = Clock(not_before=await session.newest_instant(), wall=machine.wall)
        publisher = Publisher()
        async with (
            running(session, clock, publisher, machine.settings.limits) as registry,
            trio.open_nursery() as nursery,
        ):
            hub = Hub(registry.board, session.history, **machine.hub_limits)
            publisher.subscribe(self)
            publisher.subscribe(hub)
            nursery.start_soon(hub.run)
            errands = Errands(nursery)
            keys = KeyBook(lambda *key: errands.run(lambda: session.find_receipt(*key)), KEEP_S)
            await session.tell_keys(keys.learn)
            users = UserDirectory(_nobody)
            for user_id, username in machine.users.items():
                users.learn(user_id, username)
            self.service = Service(
                settings=machine.settings,
                registry=registry,
                reads=cast(Reads, session),
                users=users,
                auth=Authenticator(machine.settings, users),
                keys=keys,
                ids=IdSource(clock.now, chance.getrandbits),
                errands=errands,
                hub=hub,
                started_at=trio.current_time(),
            )
            self.has_served = True
            machine.came_up(self)
            await self.stop.wait()
            self.is_draining = True
            self.mortal.pass_by(Point.DRAIN)
            with trio.move_on_after(DRAIN_S) as draining:
                await registry.drain()
            self.is_cut_short = draining.cancelled_caught
            self.mortal.end()  # as for its clients: the connections close
            self._hang_up()
            nursery.cancel_scope.cancel()

    # Its clients -------------------------------------------------------------------------------------

    async def answer(
        self, request: Request, handling: Handling[Answer], patience_s: float, late: FaultCode = FaultCode.UNKNOWN
    ) -> Answer | None:
        """What the handler answers, as the front end would; None: it died, or patience was over, before that."""
        service = self.service
        assert service is not None
        told: list[Answer] = []

        def done(answer: Answer) -> None:
            self._handlings.pop(handling, None)
            if not self.mortal.is_dead:
                told.append(answer)
                nap.wake()
                self.mortal.pass_by(Point.REPLIED)

        nap = self._call()
        self._handlings[handling] = None
        drive(handling, done, lambda bug: None if self.mortal.is_dead else done(failed(service, request, bug)))
        if not await self._told(nap, patience_s) and patience_s >= self.answer_s and not self.mortal.is_dead:
            told.append(failed(service, request, errors.fault(late)))
        return told[0] if told else None

    def _call(self) -> Nap:
        nap = Nap()
        self._calls[nap] = None
        return nap

    async def _told(self, nap: Nap, patience_s: float) -> bool:
        """Wait for an answer, as long as the front end and the client do; False: none came."""
        is_told = await nap.until(trio.current_time() + min(patience_s, self.answer_s))
        self._calls.pop(nap, None)
        return is_told

    async def answer_in_trio(
        self, request: Request, handling: Coroutine[Any, Any, Answer], patience_s: float
    ) -> Answer | None:
        """The same for a handler that needs a task."""
        service = self.service
        assert service is not None
        answer: Answer | None = None
        with trio.CancelScope(deadline=trio.current_time() + patience_s) as call:
            self._tasks[call] = None
            try:
                answer = await handling
            except Exception as bug:  # noqa: BLE001 - as the front end does
                answer = failed(service, request, bug)
        self._tasks.pop(call, None)
        return None if self.mortal.is_dead else answer

    async def sweep(self, drop_id: DropId, patience_s: float) -> tuple[Outcome, int | None] | None:
        """Have what is due settled; the outcome, and the drop's epoch. None as above."""
        registry = self.registry
        told: list[tuple[Outcome, int | None]] = []

        def reply(outcome: Outcome) -> None:
            if not self.mortal.is_dead:
                told.append((outcome, registry.epoch_of(drop_id)))
                nap.wake()

        nap = self._call()
        registry.ask(drop_id, Sweep(), reply)
        if not await self._told(nap, patience_s) and patience_s >= self.answer_s and not self.mortal.is_dead:
            told.append((Fault(FaultCode.UNKNOWN), None))
        return told[0] if told else None

    # For the publisher -------------------------------------------------------------------------------

    def committed(self, drop_id: DropId, event: Event) -> None:
        self.mortal.pass_by(Point.PUBLISHED)

    def replaced(self, drop_id: DropId) -> None:
        pass

    # Its end -----------------------------------------------------------------------------------------

    def _died(self, point: Point) -> None:
        self.session.die()
        self._hang_up()
        self.scope.cancel()
        self.machine.went_down(self, point)

    def _hang_up(self) -> None:
        calls, self._calls = self._calls, {}
        for call in calls:
            call.wake()
        tasks, self._tasks = self._tasks, {}
        for task in tasks:
            task.cancel()
        for hang_up in list(self.connections):
            hang_up()
        self.connections.clear()


class Watcher(Protocol):
    """Who wants to know how the engines do, and says what time it is."""

    def wall(self) -> float: ...

    def came_up(self, life: Life) -> None: ...

    def went_down(self, life: Life, point: Point) -> None: ...

    def object(self, sentence: str) -> None: ...


class Machine:
    """Where an engine runs. `wall` is its wall clock (s)."""

    def __init__(self, number: int, storage: Storage, scenario: Scenario, watcher: Watcher) -> None:
        self.number = number
        self.storage = storage
        self.chance = Random(f"{scenario.seed} machine {number}")
        self.settings = scenario.settings
        self.hub_limits = scenario.hub_limits
        self.users = scenario.users
        self.wall = watcher.wall
        self.life: Life | None = None
        self.lives = 0
        self.is_wanted = True
        self.doom: tuple[Point, int] | None = None  # of the next life, from its first moment on
        self._watcher = watcher
        self._wanted = trio.Event()

    async def run(self) -> None:
        while True:
            if not self.is_wanted:
                self._wanted = trio.Event()
                await self._wanted.wait()
            life = self.life = Life(self)
            self.lives += 1
            if self.doom is not None:
                life.mortal.doom(*self.doom)
                self.doom = None
            try:
                await life.run()
            except* Unavailable as lost:
                if life.has_served:
                    self._watcher.object(f"I18: an engine that served ends without the database: {lost.exceptions!r}")
            life.mortal.spare()
            await sleep(self.chance.choice(RESTARTS_S))

    def want(self, is_wanted: bool) -> None:
        """Have it run, or have it end in good order."""
        self.is_wanted = is_wanted
        self._wanted.set()
        if not is_wanted and self.life is not None:
            self.life.stop.set()

    def spare(self) -> None:
        """Neither this life nor the next one is cut short."""
        self.doom = None
        if self.life is not None:
            self.life.mortal.spare()

    def came_up(self, life: Life) -> None:
        self._watcher.came_up(life)

    def went_down(self, life: Life, point: Point) -> None:
        self._watcher.went_down(life, point)


async def _nobody(strangers: Sequence[tuple[UserId, str | None]]) -> Mapping[UserId, str]:
    raise AssertionError("everybody is known")
