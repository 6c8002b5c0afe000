"""A whole engine on the fake ledger, for tests: ask, look at everything, and be judged at the end.

    async with stage() as on:
        await on.make_drop(total=1)
        ann = on.ask(reserve(ANN))
        await trio.sleep(1)
        assert isinstance(ann.outcome, Reserved)

At the end of the block the engine is drained, and what must always hold is checked by `audit`, whatever the test did:
each ask answered exactly once, with the truth; nothing in flight; the tables conserve; the board shows the tables.
A commit takes 100 ms here, and the engine's clock is Trio's, from 0 on: a test's instants can be followed by eye.
"""

import copy
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise

import msgspec
import trio

from engine.clock import Clock
from engine.ledger import Batch
from engine.model import (
    Cancel,
    Cancelled,
    Command,
    Create,
    DropCreated,
    DropId,
    DropStatus,
    DropUpdated,
    Event,
    Expired,
    Fault,
    FaultCode,
    Outcome,
    Purchase,
    Purchased,
    Receipt,
    RefusalCode,
    Refused,
    ReservationId,
    ReservationStatus,
    Reserve,
    Reserved,
    Swept,
    UserId,
)
from engine.publisher import Publisher
from engine.registry import Limits, Registry, running
from tests.engine.making import DROP, terms
from tests.fakes import MemoryLedger, Trouble

COMMIT_S = 0.1


class PickyLedger(MemoryLedger):
    """A ledger that judges each batch that reaches it: `judge` says which trouble it meets."""

    def __init__(self, judge: Callable[[Batch], Trouble] | None = None, *, latency_s: float = COMMIT_S) -> None:
        super().__init__(latency_s=latency_s)
        self.judge = judge

    async def commit(self, batch: Batch) -> frozenset[DropId]:
        if self.judge is not None and (trouble := self.judge(batch)) is not Trouble.NONE:
            self.fail_next(trouble)
        return await super().commit(batch)


def rejects_drop(drop_id: DropId) -> Callable[[Batch], Trouble]:
    """A database that refuses whatever is written of one drop."""
    return lambda batch: Trouble.REJECTED if drop_id in {change.drop_id for change in batch} else Trouble.NONE


def has_no_room_for_rows(batch: Batch) -> Trouble:
    """A full disk: UPDATEs work, new reservations and drops don't."""
    is_growing = any(isinstance(event, Reserved | DropCreated) for change in batch for event in change.events)
    return Trouble.STORAGE_FULL if is_growing else Trouble.NONE


class Answer:
    """What an ask was answered, and when (ms of the engine's clock); it is answered once."""

    def __init__(self, command: Command, drop_id: DropId, receipt: Receipt | None, on: "Stage") -> None:
        self.command = command
        self.drop_id = drop_id
        self.receipt = receipt
        self.outcome: Outcome | None = None
        self.at: int | None = None
        self.seq_before = on.shown_seq(drop_id)
        self._on = on

    def __call__(self, outcome: Outcome) -> None:
        assert self.outcome is None, f"answered twice: {self.outcome}, then {outcome}"
        self.outcome = outcome
        self.at = self._on.clock.now()
        if not isinstance(outcome, Fault):
            assert outcome.seq <= self._on.shown_seq(self.drop_id), "answered before its commit"
            assert outcome.seq >= self.seq_before, "decided on a state older than what the asker could see"

    @property
    def code(self) -> str:
        assert isinstance(self.outcome, Refused | Fault), self.outcome
        return self.outcome.code.value


class Stage:
    def __init__(self, registry: Registry, ledger: MemoryLedger, clock: Clock, publisher: Publisher) -> None:
        self.registry = registry
        self.ledger = ledger
        self.clock = clock
        self.answers: list[Answer] = []
        self.published: list[tuple[DropId, Event]] = []
        self.replaced_drops: list[DropId] = []
        self.publisher = publisher
        publisher.subscribe(self)

    def committed(self, drop_id: DropId, event: Event) -> None:
        self.published.append((drop_id, event))

    def replaced(self, drop_id: DropId) -> None:
        self.replaced_drops.append(drop_id)

    def ask(self, command: Command, drop_id: DropId = DROP, receipt: Receipt | None = None) -> Answer:
        answer = Answer(command, drop_id, receipt, self)
        self.answers.append(answer)
        self.registry.ask(drop_id, command, answer, receipt)
        return answer

    async def create(self, command: Create) -> Outcome:
        return await self.registry.wait_for(lambda reply: self.registry.create(command, reply))

    async def make_drop(
        self,
        total: int = 2,
        drop_id: DropId = DROP,
        *,
        status: DropStatus = DropStatus.LIVE,
        starts_at: int | None = None,
        ends_at: int | None = None,
    ) -> None:
        made = terms(total, drop_id=drop_id, starts_at=starts_at, ends_at=ends_at, created_at=self.clock.now())
        outcome = await self.create(Create(made, status))
        assert isinstance(outcome, DropCreated), outcome

    def shown_seq(self, drop_id: DropId) -> int:
        drop = self.registry.board.drop(drop_id)
        return 0 if drop is None else drop.seq

    def counts(self, drop_id: DropId = DROP) -> tuple[int, int, int]:
        """(available, held, sold) as the board shows them."""
        drop = self.registry.board.drop(drop_id)
        assert drop is not None
        return drop.available, drop.held, drop.sold

    def stored_counts(self, drop_id: DropId = DROP) -> tuple[int, int, int]:
        row = self.ledger.tables.drops[drop_id]
        return row.available_stock, row.held_count, row.sold_count

    def published_of(self, drop_id: DropId = DROP) -> list[str]:
        return [type(event).__name__ for id_, event in self.published if id_ == drop_id]

    @property
    def in_flight(self) -> int:
        return self.registry.statistics().in_flight

    async def sleep_until(self, ms: int) -> None:
        """Until the engine's clock says so, and everything that happens at that instant has happened."""
        await trio.sleep_until(self.clock.trio_time(terms(created_at=ms).created_at))
        await trio.testing.wait_all_tasks_blocked()


@asynccontextmanager
async def stage(ledger: MemoryLedger | None = None, limits: Limits | None = None) -> AsyncIterator[Stage]:
    ledger = ledger or MemoryLedger(latency_s=COMMIT_S)
    clock = Clock(wall=trio.current_time)
    publisher = Publisher()
    with trio.fail_after(100_000):  # on the mock clock: a hang becomes a failure
        async with running(ledger, clock, publisher, limits) as registry:
            on = Stage(registry, ledger, clock, publisher)
            yield on
            await registry.drain()
            audit_answers(on)
            audit_refusals(on)
            audit_board(on)
        audit_tables(ledger)


# What must always hold ----------------------------------------------------------------------------------


def audit_answers(on: Stage) -> None:
    """Every ask has its one answer, and the tables know every effect that was told and none that was denied."""
    assert on.in_flight == 0
    tables = on.ledger.tables
    written = {(drop_id, seq): row.event for (drop_id, seq), row in tables.events.items()}
    for answer in on.answers:
        match answer.outcome:
            case None:
                raise AssertionError(f"never answered: {answer.command}")
            case DropCreated() as created:
                assert written[created.terms.id, created.seq] == created
            case Reserved() | Purchased() | Cancelled() | Expired() as done:
                assert written[done.hold.drop_id, done.seq] == done
            case Fault(code=FaultCode.UNKNOWN):
                pass
            case Refused() | Fault():
                if isinstance(answer.command, Reserve):
                    assert answer.command.reservation_id not in tables.reservations, "a phantom"
                if isinstance(answer.command, Create):
                    assert answer.command.terms.id not in tables.drops, "a phantom"
            case Swept() | DropUpdated():
                pass
        if answer.receipt is not None:
            key = (answer.receipt.user_id, answer.receipt.operation, answer.receipt.key)
            is_decided = not isinstance(answer.outcome, Fault)
            assert (key in tables.receipts) == is_decided, "a receipt without its effect, or the reverse"
            if not isinstance(answer.outcome, Fault):
                assert tables.receipts[key][1].answer == answer.receipt.render(answer.outcome)
    seqs = defaultdict(list)
    for drop_id, event in on.published:
        assert written[drop_id, event.seq] == event, "told what was not committed"
        seqs[drop_id].append(event.seq)
    for of_drop in seqs.values():
        assert all(before < after for before, after in pairwise(of_drop)), "told out of order"


class Moment(msgspec.Struct):
    """A drop as it was after one of its events."""

    status: DropStatus
    available: int
    active: dict[UserId, ReservationId]
    ended: dict[UserId, str]


def moments(ledger: MemoryLedger, drop_id: DropId) -> list[Moment]:
    """The drop after each of its events, by `seq`; at 0 there is none."""
    history = [Moment(DropStatus.DRAFT, 0, {}, {})]
    for seq in range(1, ledger.tables.drops[drop_id].seq + 1):
        now = copy.deepcopy(history[-1])
        match ledger.tables.events[drop_id, seq].event:
            case DropCreated(terms=made, status=status):
                now.status, now.available = status, made.total_stock
            case DropUpdated(status=status):
                now.status = status
            case Reserved(hold=hold):
                now.active[hold.user_id] = hold.id
                now.available -= hold.qty
            case Purchased(hold=hold) as end:
                del now.active[hold.user_id]
                now.ended[hold.user_id] = type(end).__name__
            case Cancelled(hold=hold) | Expired(hold=hold) as end:
                del now.active[hold.user_id]
                now.ended[hold.user_id] = type(end).__name__
                now.available += hold.qty
        history.append(now)
    return history


def audit_refusals(on: Stage) -> None:
    """Each refusal was true at the moment of the drop's history that it names."""
    histories = {drop_id: moments(on.ledger, drop_id) for drop_id in on.ledger.tables.drops}
    for answer in on.answers:
        if isinstance(answer.outcome, Refused) and answer.outcome.code is not RefusalCode.DROP_NOT_FOUND:
            then = histories[answer.drop_id][answer.outcome.seq]
            assert is_honest(answer.outcome.code, answer.command, then), (answer.command, answer.outcome, then)


def is_honest(code: RefusalCode, command: Command, then: Moment) -> bool:
    is_live = then.status is DropStatus.LIVE
    match command:
        case Reserve(user_id=user, qty=qty):
            return {
                RefusalCode.DROP_NOT_ACTIVE: not is_live,
                RefusalCode.ALREADY_RESERVED: is_live and user in then.active,
                RefusalCode.OUT_OF_STOCK: is_live and user not in then.active and then.available < qty,
            }[code]
        case Purchase(user_id=user):
            ended = {
                RefusalCode.RESERVATION_REQUIRED: None,
                RefusalCode.RESERVATION_EXPIRED: "Expired",
                RefusalCode.RESERVATION_NOT_ACTIVE: "Cancelled",
                RefusalCode.ALREADY_PURCHASED: "Purchased",
            }
            return user not in then.active and then.ended.get(user) == ended[code]
        case Cancel(user_id=user, reservation_id=reservation_id):
            return code is RefusalCode.RESERVATION_NOT_FOUND and then.active.get(user) != reservation_id
        case _:
            return False


def audit_board(on: Stage) -> None:
    tables = on.ledger.tables
    held = {row.hold for row in tables.reservations.values() if row.status is ReservationStatus.ACTIVE}
    for drop in on.registry.board.drops():
        row = tables.drops[drop.terms.id]
        shown = (drop.status, drop.available, drop.held, drop.sold, drop.seq)
        assert shown == (row.status, row.available_stock, row.held_count, row.sold_count, row.seq)
        assert set(drop.holds.values()) == {hold for hold in held if hold.drop_id == drop.terms.id}
        for hold in drop.holds.values():
            assert hold in on.registry.board.holds_of(hold.user_id)


def audit_tables(ledger: MemoryLedger) -> None:
    """Replay each drop's events, with arithmetic of its own, and compare with the rows."""
    tables = ledger.tables
    histories: dict[DropId, list[Event]] = defaultdict(list)
    for (drop_id, _), row in sorted(tables.events.items(), key=lambda item: item[0][1]):
        histories[drop_id].append(row.event)
    assert set(histories) == set(tables.drops)
    for drop_id, events in histories.items():
        drop = tables.drops[drop_id]
        assert [event.seq for event in events] == list(range(1, drop.seq + 1)), "a gap"
        assert isinstance(events[0], DropCreated)
        available, held, sold = events[0].terms.total_stock, 0, 0
        active: dict[str, str] = {}
        for before, event in pairwise(events):
            assert event.at >= before.at, "time ran back"
            match event:
                case Reserved(hold=hold):
                    assert hold.user_id not in active
                    active[hold.user_id] = hold.id
                    available, held = available - hold.qty, held + hold.qty
                case Purchased(hold=hold):
                    assert active.pop(hold.user_id) == hold.id
                    assert event.at < hold.expires_at
                    held, sold = held - hold.qty, sold + hold.qty
                case Cancelled(hold=hold):
                    assert active.pop(hold.user_id) == hold.id
                    assert event.at < hold.expires_at
                    available, held = available + hold.qty, held - hold.qty
                case Expired(hold=hold):
                    assert active.pop(hold.user_id) == hold.id
                    assert event.at >= hold.expires_at
                    available, held = available + hold.qty, held - hold.qty
                case DropCreated():
                    raise AssertionError("born twice")
                case DropUpdated():
                    pass
            assert available >= 0, "sold more than there is"
            assert not hasattr(event, "available_stock") or event.available_stock == available
        assert (available, held, sold) == (drop.available_stock, drop.held_count, drop.sold_count)
        bought = sum(row.qty for row in tables.purchases.values() if row.drop_id == drop_id)
        assert bought == sold
