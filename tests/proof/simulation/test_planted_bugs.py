"""Bugs that the simulation must find: each is planted into the engine, and some seed soon objects.

What is planted is what has gone wrong in systems of this kind: an answer before its commit, a guard that guards
nothing, a deadline that is off by one, a guess where only the database knows.
"""

import gc
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest

from engine.actor import DropActor, Part
from engine.clock import Clock
from engine.committer import Committer
from engine.drop import Rules
from engine.hub import Hub
from engine.ledger import Batch, Change, Resolution
from engine.mailbox import Mailbox
from engine.model import (
    Decision,
    DropId,
    Expired,
    FaultCode,
    Instant,
    Purchase,
    Purchased,
    RefusalCode,
    Refused,
)
from engine.timer import Alarm
from tests import fakes
from tests.proof.simulation.mortality import Point
from tests.proof.simulation.seeds import run_seed
from tests.proof.simulation.storage import Session

FIRST: Final = 0
SEEDS_MAX: Final = 200

Plant = Callable[[pytest.MonkeyPatch], None]


def no_epoch_in_guard(patch: pytest.MonkeyPatch) -> None:
    def hits(writing: Any, change: Change) -> bool:
        row = writing._drops.get(change.drop_id)
        return row is None if change.is_birth else row is not None and row.seq == change.from_seq

    patch.setattr(fakes._Writing, "_guard_hits", hits)


def ignored_guard_misses(patch: pytest.MonkeyPatch) -> None:
    commit = Session.commit

    async def all_hit(session: Session, batch: Batch) -> frozenset[DropId]:
        await commit(session, batch)
        return frozenset(change.drop_id for change in batch)

    patch.setattr(Session, "commit", all_hit)


def bought_at_the_deadline(patch: pytest.MonkeyPatch) -> None:
    """`<=` for `<`, in the decision, in the sweep, and in every check that would notice at once."""

    def decide(rules: Rules, command: Purchase, now: Instant) -> Purchased | Refused:
        hold = rules.hold_of(command.user_id)
        if hold is None or now > hold.expires_at:
            return Refused(RefusalCode.RESERVATION_EXPIRED if hold else RefusalCode.RESERVATION_REQUIRED, rules.seq)
        return Purchased(rules.seq + 1, now, hold, command.purchase_id, command.username, rules.available)

    due = Rules.due

    def due_later(rules: Rules, now: Instant) -> Any:
        event = due(rules, now)
        return None if isinstance(event, Expired) and event.hold.expires_at == now else event

    patch.setattr(Rules, "_decide_purchase", decide)
    patch.setattr(Rules, "due", due_later)


def reply_before_commit(patch: pytest.MonkeyPatch) -> None:
    take_part = DropActor.take_part

    def take_and_tell(actor: DropActor) -> Part:
        part = take_part(actor)
        for ask in part.asks:
            assert ask.outcome is not None
            actor._load.answer(ask, ask.outcome)
        part.asks = []
        return part

    patch.setattr(DropActor, "take_part", take_and_tell)


def emit_before_commit(patch: pytest.MonkeyPatch) -> None:
    take_part = DropActor.take_part

    def take_and_publish(actor: DropActor) -> Part:
        part = take_part(actor)
        registry: Any = actor._publish.__self__  # type: ignore[attr-defined]
        registry._publisher.publish(actor.drop_id, part.events)
        return part

    patch.setattr(DropActor, "take_part", take_and_publish)


def no_sweep_at_start(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DropActor, "start", lambda actor: actor.mailbox.listen())


def no_alarm(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Alarm, "set", lambda alarm, deadline: None)


def naive_look(patch: pytest.MonkeyPatch) -> None:
    """In doubt it looks for the change without waiting for whoever may still bring it."""

    async def look(session: Session, batch: Batch) -> dict[DropId, Resolution]:
        def found(change: Change) -> Resolution:
            last = change.events[-1].seq if change.events else 0
            written = session.tables.events.get((change.drop_id, last))
            is_there = written == fakes.EventRow(change.epoch, change.events[-1]) if change.events else False
            return Resolution(is_there, change.epoch)

        return await session._call(Point.RESOLVE, lambda: {change.drop_id: found(change) for change in batch})

    patch.setattr(Session, "resolve", look)


def doubt_taken_for_failure(patch: pytest.MonkeyPatch) -> None:
    async def give_up(committer: Committer, parts: list[Part], doubt: Exception) -> None:
        for part in parts:
            part.actor.fail(part, FaultCode.UNAVAILABLE)

    patch.setattr(Committer, "_resolve", give_up)


def doubt_taken_for_success(patch: pytest.MonkeyPatch) -> None:
    async def settle(committer: Committer, parts: list[Part], doubt: Exception) -> None:
        committer._settle(parts, frozenset(part.actor.drop_id for part in parts))

    patch.setattr(Committer, "_resolve", settle)


def own_drop_taken_for_anothers(patch: pytest.MonkeyPatch) -> None:
    """A drop that stopped is let go, though nobody else has raised its epoch."""

    async def nobody_s(session: Session, drop_id: DropId, epoch: int) -> None:
        return await session._call(Point.RECLAIM, lambda: None)

    patch.setattr(Session, "reclaim", nobody_s)


def own_raise_taken_for_anothers(patch: pytest.MonkeyPatch) -> None:
    """Whoever resolved a doubt lets the drops go that it has just fenced."""
    resolution = Session._resolution

    def let_go(session: Session, change: Change) -> Resolution:
        return Resolution(resolution(session, change).committed, None)

    patch.setattr(Session, "_resolution", let_go)


def clamp(patch: pytest.MonkeyPatch) -> None:
    """A returned unit that would go beyond what is on sale is silently left out."""
    apply = Rules.apply

    def clamped(rules: Rules, event: Any) -> None:
        apply(rules, event)
        if isinstance(event, Expired):
            rules.available = min(rules.available, rules.terms.total_stock - 1)

    patch.setattr(Rules, "apply", clamped)
    patch.setattr(Rules, "_assert_conserved", lambda rules: None)


def timer_on_the_wall_clock(patch: pytest.MonkeyPatch) -> None:
    init = Clock.__init__

    def keep_wall(clock: Any, not_before: Instant | None = None, wall: Any = None) -> None:
        init(clock, not_before, wall)
        walls[clock] = wall

    walls: dict[Clock, Callable[[], float]] = {}
    patch.setattr(Clock, "__init__", keep_wall)
    patch.setattr(Clock, "now", lambda clock: Instant(int(walls[clock]() * 1000)))


def clock_forgets_across_restarts(patch: pytest.MonkeyPatch) -> None:
    init = Clock.__init__
    patch.setattr(Clock, "__init__", lambda clock, not_before=None, wall=None: init(clock, None, wall))
    clock_behind_another_stays_behind(patch)


def clock_behind_another_stays_behind(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Clock, "catch_up", lambda clock, instant: False)


def receipts_in_another_transaction(patch: pytest.MonkeyPatch) -> None:
    commit = Session._commit

    def without(session: Session, batch: Batch) -> frozenset[DropId]:
        hit = commit(session, [Change(one.drop_id, one.epoch, one.from_seq, one.events, ()) for one in batch])
        if session.storage.chance.random() < 0.9:  # the second transaction fails now and then
            for change in batch:
                for receipt in change.receipts if change.drop_id in hit else ():
                    session.tables.receipts[fakes._key(receipt)] = (change.drop_id, receipt)
        return hit

    patch.setattr(Session, "_commit", without)


def viewers_not_marked(patch: pytest.MonkeyPatch) -> None:
    """Who had no room for the news is not told later what it was."""
    patch.setattr(Hub, "_mark", lambda hub, watch, drop_id, seq: None)


def refused_without_asking(patch: pytest.MonkeyPatch) -> None:
    """Sold out, says the stock of the changes that are still on their way."""

    def refused(actor: DropActor, command: Any) -> Decision | None:
        tentative = actor._tentative
        if tentative.available < command.qty:
            return Refused(RefusalCode.OUT_OF_STOCK, actor.committed.seq)
        return None

    patch.setattr(DropActor, "refused_at_once", refused)


def mailbox_without_bound(patch: pytest.MonkeyPatch) -> None:
    def put(mailbox: Any, message: Any) -> None:
        mailbox._line.append(message)
        mailbox._waiting_peak = max(mailbox._waiting_peak, len(mailbox._line))
        if mailbox._hears_line:
            mailbox._call()

    patch.setattr(Mailbox, "put_nowait", put)


# A run that does not end by itself is given up, with whatever hangs in it.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine .* was never awaited:RuntimeWarning"
)

BUGS: Final[list[Plant]] = [
    no_epoch_in_guard,
    ignored_guard_misses,
    bought_at_the_deadline,
    reply_before_commit,
    emit_before_commit,
    no_sweep_at_start,
    no_alarm,
    naive_look,
    doubt_taken_for_failure,
    doubt_taken_for_success,
    own_drop_taken_for_anothers,
    own_raise_taken_for_anothers,
    clamp,
    timer_on_the_wall_clock,
    clock_forgets_across_restarts,
    clock_behind_another_stays_behind,
    receipts_in_another_transaction,
    viewers_not_marked,
    refused_without_asking,
    mailbox_without_bound,
]


@pytest.fixture(autouse=True)
def what_hangs_is_collected_here() -> Iterator[None]:
    """Its complaints belong to this test, not to whichever is running when the collector comes to it."""
    yield
    gc.collect()


@pytest.mark.parametrize("plant", BUGS, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    for seed in range(FIRST, FIRST + SEEDS_MAX):
        violations = run_seed(seed).violations
        if violations:
            print(f"found by seed {seed}, the {seed - FIRST + 1}th: {violations[0].splitlines()[0]}")
            return
    pytest.fail(f"{SEEDS_MAX} seeds did not see it")
