"""Starts, finds, restarts and stops drop actors; the door through which commands come in.

`ask` is synchronous: it hands a command to its drop or answers at once why it can't. A crashed actor is reloaded from
the ledger and goes on, and no other drop notices; one that another engine took over is let go.
"""

import math
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager

import msgspec
import structlog
import trio

from engine.actor import Ask, DropActor, Load
from engine.admission import Admission
from engine.board import Board
from engine.clock import Clock
from engine.committer import Committer, CommitterStatistics
from engine.drop import Drop
from engine.ledger import Ledger, Unavailable
from engine.mailbox import MailboxFull
from engine.model import (
    Command,
    Create,
    DropCreated,
    DropId,
    DropRecord,
    Event,
    Fault,
    FaultCode,
    Outcome,
    Receipt,
    RefusalCode,
    Refused,
    Reply,
    Reserve,
    Sweep,
    Swept,
)
from engine.publisher import Publisher
from engine.timer import Timer, TimerStatistics
from engine.turns import Turns

log = structlog.get_logger()

RESTART_S = 0.05  # before the first reload of a crashed drop; doubles with each crash that follows soon
RESTART_MAX_S = 10.0
SEARCHES_MAX = 4  # drops that are loaded at once because somebody asks for them


class Limits(msgspec.Struct, frozen=True):
    """The engine's bounds.

    `in_flight_max`: commands asked and not answered, over all drops; reserves get 9/10 of it. `mailbox_max`: of these,
    waiting in line for one drop; `urgent_max`: and at its side door, where all but reserves pass a line that is too
    long. `part_max`: what one drop adds to one batch; reserves get 7/8 of it. `batch_max`: events or receipts of one
    commit. `stall_s`: a commit that takes longer counts as an outage. `answer_s`: how long `call` waits for an outcome.

    Beyond each of them a command is `OVERLOADED`, at once; nothing else queues anywhere in the engine: at most two
    parts of a drop exist, and an answer that waits to leave counts as in flight.
    """

    in_flight_max: int = 20_000
    mailbox_max: int = 8_192
    urgent_max: int = 1_024
    part_max: int = 512
    # 1,536 - 512: a thousand quiet drops with a buyer each never wait for a hot one (`Committer._take_batch`).
    batch_max: int = 1_536
    stall_s: float = 0.9
    answer_s: float = 5.0


class RegistryStatistics(msgspec.Struct, frozen=True):
    drops: int
    in_flight: int
    in_flight_max: int
    in_flight_peak: int
    restarts: int
    committer: CommitterStatistics
    timer: TimerStatistics


class Registry:
    """Made by `running`; every drop that can still change by itself has an actor from the start on."""

    def __init__(
        self,
        ledger: Ledger,
        clock: Clock,
        committer: Committer,
        timer: Timer,
        turns: Turns,
        publisher: Publisher,
        load: Load,
        limits: Limits,
    ) -> None:
        self.board = Board()
        self.clock = clock
        self.answer_s = limits.answer_s
        self.fault: FaultCode | None = None
        self._ledger = ledger
        self._committer = committer
        self._timer = timer
        self._turns = turns
        self._publisher = publisher
        self._limits = limits
        self._load = load
        self._actors: dict[DropId, DropActor] = {}
        # Of drops that crashed: how long they rested before the last reload, and when that was.
        self._rests: dict[DropId, tuple[float, float]] = {}
        self._out_of_service: dict[DropId, FaultCode] = {}
        self._last_epochs: dict[DropId, int] = {}  # of drops that another engine took over
        self._searches: dict[DropId, _Search] = {}
        self._searching = trio.CapacityLimiter(SEARCHES_MAX)
        self._restarts = 0
        self._nursery: trio.Nursery | None = None

    # Asking ------------------------------------------------------------------------------------------

    def ask(self, drop_id: DropId, command: Command, reply: Reply, receipt: Receipt | None = None) -> None:
        """Hand a command to its drop; `reply` is called once, maybe before this returns, maybe long after."""
        actor = self._actors.get(drop_id)
        if actor is None or self.fault or self._committer.fault or actor.fault:
            reply(self._refusal(drop_id, actor))
            return
        load = self._load
        in_flight_max = load.in_flight_max
        if type(command) is Reserve:
            if receipt is None and (refused := actor.refused_at_once(command)) is not None:
                reply(refused)
                return
            in_flight_max = load.reserve_max
        if load.in_flight >= in_flight_max:
            load.reserves_refused += type(command) is Reserve
            reply(Fault(FaultCode.OVERLOADED))
            return
        try:
            actor.ask(Ask(command, reply, receipt))
        except MailboxFull:
            reply(Fault(FaultCode.OVERLOADED))
            return
        load.take()

    def create(self, command: Create, reply: Reply, receipt: Receipt | None = None) -> None:
        """Bring a drop into the world; like `ask`. Nobody sees it before its commit."""
        fault = self.fault or self._committer.fault
        if fault is not None:
            reply(Fault(fault))
            return
        drop_id = command.terms.id
        assert drop_id not in self._actors, "a drop is born once"
        self._start(Drop(command.terms, command.status), epoch=1)

        def born(outcome: Outcome) -> None:
            if not isinstance(outcome, DropCreated):
                self._retire(drop_id)
            reply(outcome)

        self.ask(drop_id, command, born, receipt)

    async def call(self, drop_id: DropId, command: Command) -> Outcome:
        """`ask`, and wait for the outcome."""
        return await self.wait_for(lambda reply: self.ask(drop_id, command, reply))

    async def wait_for(self, ask: Callable[[Reply], None]) -> Outcome:
        """Wait for the outcome of what `ask` hands over, at most `answer_s`: then it is `OUTCOME_UNKNOWN`.

        Cancelling the caller does not cancel the command.
        """
        waiter = _Waiter()
        ask(waiter.deliver)
        with trio.move_on_after(self.answer_s):
            await waiter.event.wait()
        return waiter.outcome

    async def find(self, drop_id: DropId) -> Drop | Fault | None:
        """A drop's committed state, loaded from the ledger if it is not in memory; None: there is no such drop.

        A Fault for a drop that exists but is out of service here.

        Raises:
            Unavailable: it is not in memory, and the ledger is out of reach, or has so much of it to tell that the next
                one who asks will find it.
        """
        if not self._knows(drop_id):  # what is in memory never waits for the ledger
            assert self._nursery is not None, "the registry is not open"
            search = self._searches.get(drop_id)
            if search is None:
                search = self._searches[drop_id] = _Search()
                self._nursery.start_soon(self._search, drop_id, search)
            with trio.move_on_after(self.answer_s):
                await search.ended.wait()
            if search.failure is not None:
                raise Unavailable(search.failure)
        out = self._out_of_service.get(drop_id)
        return self.board.drop(drop_id) if out is None else Fault(out)

    async def _search(self, drop_id: DropId, search: "_Search") -> None:
        """Load a drop, for all who ask for it meanwhile, and to its end: a long history outlasts their patience."""
        try:
            async with self._searching:
                for record in await self._ledger.take_over([drop_id]):
                    self._adopt(record)
            search.failure = None
        except Unavailable as fault:
            search.failure = str(fault)
        except Exception as bug:  # a bug of one drop is nobody else's
            log.error("drop_not_loaded", drop_id=drop_id, reason=repr(bug), exc_info=bug)
            search.failure = "the drop could not be loaded"
        finally:
            del self._searches[drop_id]
            search.ended.set()

    def epoch_of(self, drop_id: DropId) -> int | None:
        """The epoch under which a drop is ours, or was until it was let go; None: it is not in memory.

        Called from within a reply, it is that of the outcome's event, or a newer one of ours.
        """
        actor = self._actors.get(drop_id)
        return self._last_epochs.get(drop_id) if actor is None else actor.epoch

    async def expire_now(self) -> dict[DropId, int]:
        """Settle everything that is due this instant; how many holds expired, by drop."""
        now = self.clock.now()
        expired: dict[DropId, int] = {}

        async def sweep(drop_id: DropId) -> None:
            outcome = await self.call(drop_id, Sweep())
            if isinstance(outcome, Swept) and outcome.expired:
                expired[drop_id] = outcome.expired

        async with trio.open_nursery() as nursery:
            for drop_id, actor in list(self._actors.items()):
                if actor.is_due(now):
                    nursery.start_soon(sweep, drop_id)
        return expired

    def stood(self, seconds: float) -> None:
        """Told by who brings commands: how long those that come now stood in line before anybody read them."""
        self._load.stood_s = seconds

    @property
    def is_faulty(self) -> bool:
        """Whether no command can be taken right now: the ledger is out of reach, or we are stopping."""
        return (self.fault or self._committer.fault) is not None

    def statistics(self) -> RegistryStatistics:
        load = self._load
        return RegistryStatistics(
            len(self._actors),
            load.in_flight,
            load.in_flight_max,
            load.in_flight_peak,
            self._restarts,
            self._committer.statistics(),
            self._timer.statistics(),
        )

    def _refusal(self, drop_id: DropId, actor: DropActor | None) -> Fault | Refused:
        """Why no command can be taken now."""
        fault = self.fault or self._committer.fault
        if fault is None:
            fault = self._out_of_service.get(drop_id) if actor is None else actor.fault
        return Refused(RefusalCode.DROP_NOT_FOUND, 0) if fault is None else Fault(fault)

    def _knows(self, drop_id: DropId) -> bool:
        return drop_id in self._actors or drop_id in self._out_of_service

    # The life of actors ------------------------------------------------------------------------------

    def open(self, nursery: trio.Nursery, records: Iterable[DropRecord]) -> None:
        """Start every drop that was taken over."""
        self._nursery = nursery
        for record in records:
            self._adopt(record)

    def _catch_up_with(self, record: DropRecord) -> None:
        """Whoever had the drop before us may have been ahead of us: its time must not run back (I19)."""
        if self.clock.catch_up(record.updated_at):
            log.warning("clock_caught_up", drop_id=record.terms.id, to=record.updated_at)
            self._timer.look_again()

    async def drain(self) -> None:
        """Take no more commands, and wait until all that were taken are answered."""
        self.fault = FaultCode.STOPPING
        await self.quiet()

    async def quiet(self) -> None:
        """Wait until all commands that were taken are answered, and the last batch is committed."""
        while self._load.in_flight:
            await self._committer.idle()
            await trio.sleep(0.001)
        await self._committer.idle()

    def _adopt(self, record: DropRecord) -> None:
        """Start a drop that was taken over; one whose state contradicts itself is left alone, loudly."""
        drop_id = record.terms.id
        self._catch_up_with(record)
        try:
            drop = Drop.restored(record)
        except AssertionError as bug:
            log.error("drop_broken", drop_id=drop_id, reason=str(bug))
            self._out_of_service[drop_id] = FaultCode.BROKEN
        else:
            self._start(drop, record.epoch)

    def _start(self, drop: Drop, epoch: int) -> None:
        drop_id = drop.terms.id
        actor = DropActor(
            drop,
            epoch,
            clock=self.clock,
            desk=self._committer,
            load=self._load,
            publish=self._publish,
            ask_for_turn=self._turns.ask,
            stopped=self._stopped,
            mailbox_max=self._limits.mailbox_max,
            urgent_max=self._limits.urgent_max,
            part_max=self._limits.part_max,
        )
        actor.alarm = self._timer.alarm(actor.mailbox.nudge)
        self._actors[drop_id] = actor
        if drop.seq:
            self.board.show(drop)
        actor.start()

    def _publish(self, drop_id: DropId, events: Sequence[Event]) -> None:
        """A part's events, all of which are in the drop's committed state already."""
        if events and isinstance(events[0], DropCreated):
            self.board.show(self._actors[drop_id].committed)
        else:
            for event in events:
                self.board.committed(drop_id, event)
        self._publisher.publish(drop_id, events)

    def _retire(self, drop_id: DropId) -> None:
        """End a drop's actor here: it was never born, or belongs to another engine."""
        actor = self._actors.pop(drop_id, None)
        if actor is not None:
            actor.retire()
        self.board.forget(drop_id)
        self._rests.pop(drop_id, None)

    def _stopped(self, actor: DropActor, bug: Exception) -> None:
        assert self._nursery is not None, "the registry is not open"
        log.error("drop_stopped", drop_id=actor.drop_id, reason=repr(bug), exc_info=bug)
        actor.stop_serving(FaultCode.RESTARTING)
        actor.restarts += 1
        self._restarts += 1
        self._nursery.start_soon(self._restart, actor)

    async def _restart(self, actor: DropActor) -> None:
        """Reload a crashed drop from the ledger, if it is still ours; recovery after a start is the same code."""
        rest_s, resumed_at = self._rests.get(actor.drop_id, (0.0, -math.inf))
        is_new = trio.current_time() - resumed_at > RESTART_MAX_S
        rest_s = RESTART_S if is_new else min(2 * rest_s, RESTART_MAX_S)
        await actor.landed()
        pause_s = rest_s
        while True:
            await trio.sleep(pause_s)
            if actor.is_retired:
                return
            self._rests[actor.drop_id] = rest_s, trio.current_time()
            try:
                await self._reload(actor)
                return
            except Unavailable:
                log.warning("drop_reload_waits", drop_id=actor.drop_id)
            except AssertionError as bug:
                log.error("drop_broken", drop_id=actor.drop_id, reason=str(bug))
                pause_s = RESTART_MAX_S

    async def _reload(self, actor: DropActor) -> None:
        drop_id = actor.drop_id
        record = await self._ledger.reclaim(drop_id, actor.epoch)
        if record is None:
            self.drop_lost(drop_id)
            return
        actor.epoch = record.epoch
        self._catch_up_with(record)
        drop = Drop.restored(record)
        self.board.show(drop)
        actor.resume(drop, record.epoch)
        self._publisher.replace(drop_id)
        log.warning("drop_restarted", drop_id=drop_id, epoch=record.epoch, seq=record.seq)

    # What the committer tells ------------------------------------------------------------------------

    def ledger_lost(self, code: FaultCode) -> None:
        for actor in list(self._actors.values()):  # a drop in the making goes when its maker is answered
            actor.void_waiting(code)

    def ledger_found(self) -> None:
        for actor in self._actors.values():
            actor.mailbox.nudge()

    def drop_lost(self, drop_id: DropId) -> None:
        log.error("drop_owned_elsewhere", drop_id=drop_id)
        self._out_of_service[drop_id] = FaultCode.FENCED
        actor = self._actors.get(drop_id)
        if actor is not None:
            self._last_epochs[drop_id] = actor.epoch  # what was committed under it may not be answered yet
            actor.stop_serving(FaultCode.FENCED)
            self._retire(drop_id)


class _Search:
    """A drop that is being loaded; why it was not, once that has `ended`."""

    __slots__ = ("ended", "failure")

    def __init__(self) -> None:
        self.ended = trio.Event()
        self.failure: str | None = "it is still being loaded"


class _Waiter:
    """One caller waiting for one outcome."""

    __slots__ = ("event", "outcome")

    def __init__(self) -> None:
        self.event = trio.Event()
        self.outcome: Outcome = Fault(FaultCode.UNKNOWN)

    def deliver(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.event.set()


@asynccontextmanager
async def running(
    ledger: Ledger, clock: Clock, publisher: Publisher, limits: Limits | None = None
) -> AsyncIterator[Registry]:
    """The engine: committer around registry around actors and timer, ended in the reverse order.

    Raises:
        Unavailable: the ledger is out of reach; ask again.
    """
    limits = limits or Limits()
    load = Load(limits.in_flight_max)
    committer = Committer(ledger, load, batch_max=limits.batch_max, stall_s=limits.stall_s)
    timer = Timer(clock)
    turns = Turns()
    registry = Registry(ledger, clock, committer, timer, turns, publisher, load, limits)
    committer.outage = registry
    # Every drop that can still change by itself. Before the nurseries: a failure comes out as it is, not in a group.
    records = await ledger.take_over(None)
    async with trio.open_nursery() as committing:
        committing.start_soon(committer.run)
        async with trio.open_nursery() as acting:
            acting.start_soon(timer.run)
            acting.start_soon(turns.run)
            acting.start_soon(Admission(load).run)
            registry.open(acting, records)
            del records  # this frame lives as long as the engine, and a million holds are 8 MB of list
            try:
                yield registry
            finally:
                acting.cancel_scope.cancel()
        committing.cancel_scope.cancel()
