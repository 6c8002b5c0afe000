"""One drop's actor: drains its mailbox, settles what is due, decides, and hands its part to the committer.

It keeps two states. `committed` is what the ledger has said yes to, and the board shows it; `tentative` runs ahead by
the parts that are still on their way. A part that fails takes everything decided on top of it along: the tentative
state falls back to the committed one, and what was asked is decided again.

    mailbox ──turn──> part (waiting) ──taken by the committer──> part (in flight) ──> settle | fail | miss

Reserves are many and can be refused; what ends a hold is neither. So reserves leave a share of each part to expiries,
purchases and cancels, and where the line is longer than what fits into the part, those pass it.

No await between reading the state and changing it: `turn` and everything that the committer calls is synchronous.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Protocol

import msgspec
import structlog
import trio

from engine.ahead import Ahead
from engine.clock import Clock
from engine.drop import Drop
from engine.ledger import Change
from engine.mailbox import Mailbox
from engine.model import (
    Command,
    Create,
    Decision,
    DropId,
    Event,
    Expired,
    Fault,
    FaultCode,
    Instant,
    Outcome,
    Receipt,
    RefusalCode,
    Refused,
    Reply,
    Reserve,
    StoredReceipt,
    Swept,
)
from engine.timer import Alarm

log = structlog.get_logger()

UNCHANGING = (Refused, Swept)
GROWING = (Reserve, Create)  # commands that a database without room for new rows is not asked to take
# 1/8 of a part and 1/10 of what may be in flight are kept from reserves: a purchase that waits for those means a
# sale that was promised and is lost, a reserve that does is one among thousands that will be sold out anyway.
PART_SHARE = 8
IN_FLIGHT_SHARE = 10
CROWD = 512  # in flight: what a busy server does in some 50 ms; fewer make nobody wait


class Ask(msgspec.Struct, gc=False):  # nothing that it refers to refers back to it
    """A command on its way: who wants to know, under which key, and what was decided."""

    command: Command
    reply: Reply
    receipt: Receipt | None
    outcome: Outcome | None = None


class Part:
    """What one drop adds to a batch: events and receipts to write, and the asks to answer after the commit."""

    __slots__ = ("actor", "asks", "epoch", "events", "from_seq", "receipts")

    def __init__(self, actor: "DropActor", from_seq: int) -> None:
        self.actor = actor
        self.epoch = actor.epoch
        self.from_seq = from_seq
        self.events: list[Event] = []
        self.receipts: list[StoredReceipt] = []
        self.asks: list[Ask] = []

    @property
    def size(self) -> int:
        """What it adds to a batch."""
        return max(len(self.events), len(self.receipts))

    def change(self) -> Change:
        return Change(self.actor.drop_id, self.epoch, self.from_seq, self.events, self.receipts)


class Load:
    """How many commands were asked and not answered yet, over all drops; at most `in_flight_max`.

    Reserves are taken up to `reserve_max` only, which `engine.admission` lowers while they stand in line for too long.
    """

    __slots__ = (
        "answered",
        "crowded",
        "in_flight",
        "in_flight_max",
        "in_flight_peak",
        "reserve_max",
        "reserves_refused",
        "stood_s",
    )

    def __init__(self, in_flight_max: int) -> None:
        self.in_flight = 0
        self.in_flight_max = in_flight_max
        self.in_flight_peak = 0
        self.reserve_max = in_flight_max - in_flight_max // IN_FLIGHT_SHARE
        self.reserves_refused = 0  # for want of room
        self.answered = 0
        self.stood_s = 0.0  # how long what is asked now stood in line before it came to us: told by who brings it
        self.crowded = trio.lowlevel.ParkingLot()  # unparked when `CROWD` are in flight

    def take(self) -> None:
        """One more was asked."""
        self.in_flight += 1
        if self.in_flight > self.in_flight_peak:
            self.in_flight_peak = self.in_flight
        if self.in_flight == CROWD:
            self.crowded.unpark_all()

    def answer(self, ask: Ask, outcome: Outcome) -> None:
        """Give the ask's place back, and tell its caller. A reply must not raise; one that does stops nobody."""
        self.in_flight -= 1
        self.answered += 1
        try:
            ask.reply(outcome)
        except Exception as bug:
            log.error("reply_raised", command=type(ask.command).__name__, reason=repr(bug), exc_info=bug)


class Desk(Protocol):
    """What an actor needs of the committer: a place to hand parts to, and how the ledger does."""

    fault: FaultCode | None

    @property
    def storage_full(self) -> bool: ...

    def submit(self, part: Part) -> None: ...

    def withdraw(self, part: Part) -> None: ...


class GuardMissed(Exception):
    """The drop's row is not as this engine left it: somebody else wrote to it."""


class ActorStatistics(msgspec.Struct, frozen=True):
    seq: int
    epoch: int
    mailbox_waiting: int
    restarts: int


class DropActor:
    """The one writer of one drop. It lives from `start` to `retire`, in the turns that it asks for."""

    def __init__(
        self,
        drop: Drop,
        epoch: int,
        *,
        clock: Clock,
        desk: Desk,
        load: Load,
        publish: Callable[[DropId, Sequence[Event]], None],
        ask_for_turn: Callable[["DropActor"], None],
        stopped: Callable[["DropActor", Exception], None],
        mailbox_max: int,
        urgent_max: int,
        part_max: int,
    ) -> None:
        self.drop_id = drop.terms.id
        self.committed = drop
        self.epoch = epoch
        self.mailbox: Mailbox[Ask] = Mailbox(partial(ask_for_turn, self), mailbox_max, urgent_max)
        self.in_flight: Part | None = None
        self.fault: FaultCode | None = None  # set while this drop alone is out of service
        self.is_retired = False
        self.restarts = 0
        self.alarm: Alarm | None = None
        self._tentative = Ahead(drop)
        self._waiting: Part | None = None
        self._broken: Exception | None = None
        self._untold = 0  # holds expired since a `Sweep` waits that did not fit into the turn
        self._clock = clock
        self._desk = desk
        self._load = load
        self._publish = publish
        self._part_max = part_max
        self._reserve_max = part_max - part_max // PART_SHARE  # of a part, for what comes in line
        self._ask_for_turn = ask_for_turn
        self._stopped = stopped
        self._awaits_room = False  # its part is full: it takes no turn before that one is taken
        self._landed = trio.lowlevel.ParkingLot()

    # Its turns ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """Take a first turn, for what is due already, and from then on whenever there is something to do."""
        self.mailbox.nudge()
        self.mailbox.listen()

    def retire(self) -> None:
        """Take no more turns."""
        self.is_retired = True

    def take_turn(self) -> None:
        """Its turn has come. Where something has happened that must not, `stopped` is told, and no more is taken."""
        if self.is_retired:
            return
        try:
            if self._broken is not None:
                raise self._broken
            if self._is_full():
                self._awaits_room = True
                return
            self.mailbox.heard()
            self.turn()
        except Exception as bug:  # noqa: BLE001 - whatever it is, it stops this drop and no other
            self._stopped(self, bug)
        else:
            self.mailbox.listen(urgent_only=self._room_in_line() <= 0)

    def turn(self) -> None:
        """Settle what is due, then decide what was asked, as far as one part has room.

        One instant for the whole turn: what is due at it has been settled before the first decision.
        """
        fault = self._desk.fault
        if fault is not None:
            self._answer_all(self.mailbox.take_all(), Fault(fault))
            return
        now = self._clock.now()
        expired = self._untold + self._sweep(now)
        asks = self.mailbox.take_urgent(self._part_max - self._size())
        asks += self.mailbox.take(max(0, self._room_in_line() - len(asks)))
        has_no_storage = self._desk.storage_full
        decided = 0
        try:
            for ask in asks:
                if has_no_storage and isinstance(ask.command, GROWING):
                    self._load.answer(ask, Fault(FaultCode.STORAGE_FULL))
                elif isinstance(self._decide(ask, now, expired), Swept):
                    expired = 0  # told once
                decided += 1
        finally:  # a bug must not leave its callers waiting
            self._answer_all(asks[decided:], Fault(FaultCode.RESTARTING))
        # A `Sweep` that had no room in this turn is told in its own what was expired for it in this one.
        self._untold = expired if len(self.mailbox) else 0
        deadline = self._tentative.next_deadline()
        if deadline is not None and deadline <= now:
            self.mailbox.nudge()
        # Also while a part is on its way: what falls due meanwhile belongs in the very next batch.
        elif self.alarm is not None:
            self.alarm.set(deadline)

    def _sweep(self, now: Instant) -> int:
        """Apply what is due, as far as there is room; return how many holds expired."""
        expired = 0
        while not self._is_full():
            event = self._tentative.due(now)
            if event is None:
                break
            part = self._open_part()
            self._tentative.apply(event)
            part.events.append(event)
            expired += isinstance(event, Expired)
        return expired

    def _decide(self, ask: Ask, now: Instant, expired: int) -> Decision:
        decision = self._tentative.decide(ask.command, now)
        if isinstance(decision, Swept):
            decision = Swept(expired, decision.seq)
        ask.outcome = decision
        # Before anything is changed: an answer that can't be rendered must not leave half a command behind.
        stored = None if ask.receipt is None else _stored(ask.receipt, decision, now)
        if not isinstance(decision, UNCHANGING):
            part = self._waiting or self._open_part()
            self._tentative.apply(decision)
            part.events.append(decision)
            part.asks.append(ask)
        else:
            rests_on = self._waiting or self.in_flight
            if stored is not None:
                rests_on = self._open_part()
            # It changes nothing, but it may rest on what is not committed yet: then it is answered after that.
            if rests_on is None:
                self._load.answer(ask, decision)
            else:
                rests_on.asks.append(ask)
        if stored is not None:
            self._open_part().receipts.append(stored)
        return decision

    def _open_part(self) -> Part:
        if self._waiting is None:
            self._waiting = Part(self, self._tentative.seq)
            self._desk.submit(self._waiting)
        return self._waiting

    def _size(self) -> int:
        part = self._waiting
        return 0 if part is None else max(len(part.events), len(part.asks))

    def _is_full(self) -> bool:
        return self._size() >= self._part_max

    def _room_in_line(self) -> int:
        """How many more of the line the waiting part has room for."""
        return self._reserve_max - self._size()

    # Called by the committer -------------------------------------------------------------------------

    def take_part(self) -> Part:
        """The waiting part, now in flight. The next one starts where this one ends."""
        part = self._waiting
        assert part is not None, "there is no part to take"
        assert self.in_flight is None, "one part of a drop at a time"
        self.in_flight = part
        self._clear_waiting()
        return part

    def settle(self, part: Part) -> None:
        """The part is committed: make it so, and tell the world. Its callers are the committer's to answer."""
        self._land(part)
        try:
            for event in part.events:
                self.committed.apply(event)
            self._tentative.land(part.events)
            self._publish(self.drop_id, part.events)
        except Exception as bug:  # noqa: BLE001 - whatever it is, it is this drop's
            self.break_down(bug)

    def fail(self, part: Part, code: FaultCode) -> None:
        """Nothing of the part was written: say so, and decide again what was decided on top of it."""
        self._land(part)
        self._answer_all(part.asks, Fault(code))
        self._start_over()

    def retry_without_growth(self, part: Part) -> None:
        """There was no room for the part: refuse what needs room, and decide the rest again."""
        self._land(part)
        growing = [ask for ask in part.asks if isinstance(ask.command, GROWING)]
        rest = [ask for ask in part.asks if not isinstance(ask.command, GROWING)]
        self._answer_all(growing, Fault(FaultCode.STORAGE_FULL))
        self._start_over(rest)

    def void_waiting(self, code: FaultCode) -> None:
        """The ledger is out of reach: what was not sent has not happened, and is said so."""
        if self._waiting is not None:
            self._answer_all(self._drop_waiting(), Fault(code))
            self._reset_tentative()
        self._answer_all(self.mailbox.take_all(), Fault(code))

    def break_down(self, why: Exception) -> None:
        """Stop this drop, and no other: the registry reloads it from the ledger."""
        self._broken = why
        self._go_on()
        self.mailbox.nudge()

    def _land(self, part: Part) -> None:
        assert self.in_flight is part, "not the part that was sent"
        self.in_flight = None
        self._landed.unpark_all()

    def _start_over(self, first: Iterable[Ask] = ()) -> None:
        self.mailbox.put_back([*first, *self._drop_waiting()])
        self._reset_tentative()
        self.mailbox.nudge()

    def _drop_waiting(self) -> list[Ask]:
        part = self._waiting
        if part is None:
            return []
        self._desk.withdraw(part)
        self._clear_waiting()
        return part.asks

    def _clear_waiting(self) -> None:
        if self._room_in_line() <= 0:
            self.mailbox.nudge()  # it listens to its side door alone
        self._waiting = None
        self._go_on()

    def _go_on(self) -> None:
        if self._awaits_room:
            self._awaits_room = False
            self._ask_for_turn(self)

    def _reset_tentative(self) -> None:
        self._tentative.fall_back()
        if self.in_flight is not None:
            for event in self.in_flight.events:
                self._tentative.apply(event)

    # Called by the registry --------------------------------------------------------------------------

    def ask(self, ask: Ask) -> None:
        """Take a command. Anything but a reserve passes the line where that is longer than the part has room for.

        Raises:
            MailboxFull: and it was not taken.
        """
        mailbox = self.mailbox
        if type(ask.command) is Reserve or mailbox.in_line < min(self._room_in_line(), mailbox.waiting_max):
            mailbox.put_nowait(ask)
        else:
            mailbox.put_urgent_nowait(ask)

    def refused_at_once(self, command: Reserve) -> Refused | None:
        """`OUT_OF_STOCK` where the committed state alone says so: no place in the queue, no turn, no commit.

        True at the committed `seq`, at this instant, which lies between the question and its answer. Whatever anybody
        was told of this drop has happened before: it is in the committed state (a caller is answered after `settle`).
        What is on its way was told to nobody, so this refusal may come before it, whatever it does to the stock; but
        where the tentative state has units again, the buyer had better queue for them. The same where something is
        due: the sweep comes first.
        """
        qty = command.qty
        if self.committed.available >= qty or self._tentative.available >= qty or self._broken is not None:
            return None
        now = self._clock.now()
        if not self._tentative.is_settled(now):
            return None
        decision = self.committed.decide(command, now)
        if isinstance(decision, Refused) and decision.code is RefusalCode.OUT_OF_STOCK:
            return decision
        return None

    def stop_serving(self, code: FaultCode) -> None:
        """Answer everything that was not sent with `code`, and everything to come until `resume`."""
        self.fault = code
        self._answer_all(self._drop_waiting(), Fault(code))
        self._answer_all(self.mailbox.take_all(), Fault(code))

    async def landed(self) -> None:
        """Wait until no part of this drop is on its way."""
        while self.in_flight is not None:
            await self._landed.park()

    def resume(self, drop: Drop, epoch: int) -> None:
        """Go on from a state fresh from the ledger."""
        assert self.in_flight is None
        assert self._waiting is None
        self.committed, self.epoch = drop, epoch
        self._tentative = Ahead(drop)
        self._broken = self.fault = None
        self.start()

    def statistics(self) -> ActorStatistics:
        return ActorStatistics(self.committed.seq, self.epoch, len(self.mailbox), self.restarts)

    # Leaves ------------------------------------------------------------------------------------------

    def _answer_all(self, asks: Iterable[Ask], fault: Fault) -> None:
        for ask in asks:
            self._load.answer(ask, fault)

    def is_due(self, now: Instant) -> bool:
        deadline = self._tentative.next_deadline()
        return deadline is not None and deadline <= now


def _stored(receipt: Receipt, decision: Decision, now: Instant) -> StoredReceipt:
    answer = receipt.render(decision)
    return StoredReceipt(receipt.user_id, receipt.operation, receipt.key, receipt.fingerprint, answer, now)
