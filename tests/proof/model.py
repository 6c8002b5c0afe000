"""A drop as anybody would model it: a stock, who holds what, how each hold ended; one event after the other.

Nothing here is the engine's, and nothing is fast by cleverness. `replay` follows a drop's log by `seq`, says where an
event is not legal, and remembers the state after each event, so that every answer can be held to the state at which it
says it was true. Where an event is not legal the model goes on from what the log says: one fault, one finding.
"""

import heapq
from bisect import bisect_right
from collections.abc import Container, Iterable
from operator import attrgetter
from typing import Final

import msgspec

from tests.proof.history import DropRow, EventRow, PurchaseRow, ReservationRow
from tests.proof.violation import Findings

ACTIVE: Final = "active"
CONSUMED: Final = "consumed"
EXPIRED: Final = "expired"
CANCELLED: Final = "cancelled"
LIVE: Final = "live"
SCHEDULED: Final = "scheduled"
ENDED: Final = "ended"

# Numbers beyond the count of events that are still taken for a gap; a larger one is reported and left aside.
GAP_MAX: Final = 1_000

# Which status may follow which: the contract's.
STATUSES: Final = {
    "draft": {"scheduled", "live", "cancelled"},
    "scheduled": {"draft", "live", "cancelled", "ended"},
    "live": {"paused", "ended", "cancelled"},
    "paused": {"live", "ended", "cancelled"},
    "ended": set[str](),
    "cancelled": set[str](),
}
CLIENTS: Final = ("RESERVED", "PURCHASED", "CANCELLED")  # what they do
ENDS: Final = {"PURCHASED": CONSUMED, "CANCELLED": CANCELLED, "EXPIRED": EXPIRED}

UserLog = tuple[list[int], list[str], list[str]]
"""Of one user: the `seq` of each change, the status of the newest reservation after it, and that one's id."""


class Life(msgspec.Struct, gc=False):
    """A reservation, from the log; `ended_seq` is 0 while it is active."""

    id: str
    user_id: str
    qty: int
    seq: int
    created_at: int
    expires_at: int
    status: str = ACTIVE
    ended_seq: int = 0
    ended_at: int | None = None
    purchase_id: str | None = None


class DropModel:
    """A drop's states: index `s` of each list is the state after the event numbered `s`; 0 is before its birth."""

    __slots__ = ("drop_id", "epochs", "events", "lives", "row", "statuses", "stock", "users")

    def __init__(self, drop_id: str, row: DropRow | None = None) -> None:
        self.drop_id = drop_id
        self.row = row
        self.events: list[EventRow | None] = [None]
        self.stock = [0]
        self.statuses = [""]
        self.epochs = [0]
        self.lives: dict[str, Life] = {}
        self.users: dict[str, UserLog] = {}

    @property
    def seq(self) -> int:
        """Of the last event."""
        return len(self.events) - 1

    def newest_of(self, user_id: str, seq: int) -> str:
        """The status at `seq` of the newest reservation that the user had by then; "" for none."""
        log = self.users.get(user_id)
        if log is None:
            return ""
        position = bisect_right(log[0], seq)
        return log[1][position - 1] if position else ""

    def status_of(self, reservation_id: str | None, seq: int) -> str:
        """The status of a reservation at `seq`; "" for one that was not there yet."""
        life = self.lives.get(reservation_id or "")
        if life is None or life.seq > seq:
            return ""
        return life.status if 0 < life.ended_seq <= seq else ACTIVE


def replay(drop_id: str, row: DropRow | None, events: list[EventRow], ttl_ms: int | None, found: Findings) -> DropModel:
    """The drop's states by its log, which may come in any order; what breaks the rules is added to `found`."""
    return _Replay(DropModel(drop_id, row), ttl_ms, found).run(events)


class _Replay:
    def __init__(self, model: DropModel, ttl_ms: int | None, found: Findings) -> None:
        self.model = model
        self.ttl_ms = ttl_ms
        self.found = found
        self.free = 0
        self.status = ""
        self.active: dict[str, Life] = {}  # by user
        # A heap of (deadline, seq); those that ended otherwise are dropped when they come to the top.
        self.deadlines: list[tuple[int, int, Life]] = []

    def run(self, events: list[EventRow]) -> DropModel:
        model = self.model
        stock, statuses, epochs, states = model.stock, model.statuses, model.epochs, model.events
        reserve, end, check_settled = self.reserve, self.end, self.check_settled
        epoch = at = 0
        for event in self.numbered(events):
            seq, kind = event.seq, event.type
            if seq > len(states):
                missing = seq - len(states)
                self.report("I10", f"{missing} missing before it", event)
                stock += [self.free] * missing
                statuses += [self.status] * missing
                epochs += [epoch] * missing
                states += [None] * missing
            if event.epoch < epoch:
                self.report("I15", f"epoch {event.epoch} commits after epoch {epoch}", event)
            if event.at < at:
                self.report("I19", f"time runs back from {at} to {event.at}", event)
            epoch, at = max(epoch, event.epoch), max(at, event.at)
            if kind in CLIENTS or kind == "EXPIRED":
                self.check_clock(event)
            if kind == "RESERVED":
                reserve(event)
            elif kind in ENDS:
                end(event, ENDS[kind])
            else:
                self.move(event)
            if event.available_stock is not None and event.available_stock != self.free:
                self.report("I1", f"it says {event.available_stock} free, the model has {self.free}", event)
                self.free = event.available_stock
            if self.free < 0:
                self.report("I1", f"oversold: {self.free} free", event)
            deadlines = self.deadlines
            if deadlines and deadlines[0][0] <= at:
                check_settled(event)
            stock.append(self.free)
            statuses.append(self.status)
            epochs.append(epoch)
            states.append(event)
        return model

    def numbered(self, events: list[EventRow]) -> list[EventRow]:
        """By `seq`, each number once."""
        events.sort(key=attrgetter("seq"))
        count = len(events)
        if count and events[0].seq == 1 and events[-1].seq == count and len({event.seq for event in events}) == count:
            return events
        once: list[EventRow] = []
        for event in events:
            if once and once[-1].seq == event.seq:
                self.report("I10", "a number that was given before", event)
            elif not 1 <= event.seq <= count + GAP_MAX:
                self.report("I10", f"no number for one of {count} events", event)
            else:
                once.append(event)
        return once

    def report(self, invariant: str, sentence: str, event: EventRow) -> None:
        place = f"{event.type} at seq {event.seq}"
        self.found.add(invariant, f"{place}: {sentence}", self.model.drop_id, user_id=event.user_id, seq=event.seq)

    def reserve(self, event: EventRow) -> None:
        user_id, hold_id, qty = event.user_id or "", event.reservation_id or "", event.qty or 0
        expires_at, at = event.expires_at or 0, event.at
        if self.status != LIVE:
            self.report("I12", f"the drop is {self.status or 'not born'}", event)
        if user_id in self.active:
            self.report("I5", f"user {user_id} holds {self.active[user_id].id} already", event)
        if hold_id in self.model.lives:
            self.report("I9", f"reservation {hold_id} was made before", event)
        if self.ttl_ms is not None and expires_at != at + self.ttl_ms:
            self.report("I19", f"the hold lasts {expires_at - at} ms, not {self.ttl_ms}", event)
        elif expires_at <= at:
            self.report("I19", f"the hold ends {at - expires_at} ms before it begins", event)
        if qty < 1:
            self.report("I1", f"{qty} units", event)
        life = Life(hold_id, user_id, qty, event.seq, at, expires_at)
        self.model.lives[hold_id] = self.active[user_id] = life
        self.free -= qty
        heapq.heappush(self.deadlines, (expires_at, event.seq, life))
        log = self.model.users.get(user_id)
        if log is None:
            self.model.users[user_id] = ([event.seq], [ACTIVE], [hold_id])
        else:
            log[0].append(event.seq)
            log[1].append(ACTIVE)
            log[2].append(hold_id)

    def end(self, event: EventRow, status: str) -> None:
        user_id, hold_id = event.user_id or "", event.reservation_id or ""
        life = self.model.lives.get(hold_id)
        if life is None:
            self.report("I9", f"reservation {hold_id} was never made", event)
            self.free = self.free if event.available_stock is None else event.available_stock
            return
        if life.ended_seq:
            self.report("I9", f"reservation {hold_id} was {life.status} at seq {life.ended_seq}", event)
            self.free = self.free if event.available_stock is None else event.available_stock
            return
        if (life.user_id, life.qty, life.expires_at) != (user_id, event.qty, event.expires_at):
            self.report("I12", f"it is not as {hold_id} was made at seq {life.seq}", event)
        if status == EXPIRED:
            if event.at < life.expires_at:
                self.report("I7", f"expired {life.expires_at - event.at} ms before its deadline", event)
        elif event.at >= life.expires_at:
            # Of a purchase this is I6; of a cancellation the same rule, told apart: no unit is sold by it.
            invariant = "I6" if status == CONSUMED else "I12"
            self.report(invariant, f"{status} {event.at - life.expires_at} ms past its deadline, exclusive", event)
        if status != CONSUMED:
            self.free += life.qty
        life.status, life.ended_seq, life.ended_at = status, event.seq, event.at
        life.purchase_id = event.purchase_id
        if self.active.get(life.user_id) is life:
            del self.active[life.user_id]
        log = self.model.users[life.user_id]
        log[0].append(event.seq)
        # With two active ones, which is a finding already, the newest remains the one that was made last.
        log[1].append(status if log[2][-1] == hold_id else log[1][-1])
        log[2].append(log[2][-1])

    def move(self, event: EventRow) -> None:
        """The drop's birth, or its own clock."""
        status = event.status or ""
        if event.type == "DROP_CREATED":
            if event.seq != 1:
                self.report("I10", "a drop is born once, at seq 1", event)
            self.free = event.available_stock or 0
        elif event.type != "DROP_UPDATED":
            self.report("I12", "nobody knows such an event", event)
        elif status not in STATUSES.get(self.status, ()):
            self.report("I12", f"{self.status or 'unborn'} cannot become {status}", event)
        elif (self.status, status) == (SCHEDULED, LIVE) or status == ENDED:
            # By its own clock: nobody asks for that.
            row = self.model.row
            due = None if row is None else row.starts_at if status == LIVE else row.ends_at
            if row is not None and (due is None or event.at < due):
                self.report("I4", f"{status} at {event.at}, by its clock at {due}", event)
        self.status = status

    def check_clock(self, event: EventRow) -> None:
        """The drop's own clock moves it before anything else happens to it; before a hold that runs out with it."""
        row = self.model.row
        if row is None or self.status not in (SCHEDULED, LIVE):
            return
        due = row.starts_at if self.status == SCHEDULED else row.ends_at
        latest = (event.expires_at or 0) if event.type == "EXPIRED" else event.at
        if due is not None and due <= latest:
            self.report("I12", f"the drop is {self.status} still, by its clock until {due}", event)

    def check_settled(self, event: EventRow) -> None:
        """What had run out by an event's instant was settled before it, in the order of deadlines.

        The drop's own clock comes before holds that run out together with it.
        """
        deadlines = self.deadlines
        latest = event.at
        if event.type == "EXPIRED":
            latest = (event.expires_at or 0) - 1
        elif event.type == "DROP_UPDATED":
            return
        while deadlines and (deadlines[0][2].ended_seq or deadlines[0][0] <= latest):
            deadline, _, life = heapq.heappop(deadlines)  # told once
            if not life.ended_seq:
                self.report("I12", f"hold {life.id} of {life.user_id} had run out at {deadline}, unsettled", event)


# The rows ---------------------------------------------------------------------------------------------


def compare(
    model: DropModel,
    reservations: Iterable[ReservationRow],
    purchases: Iterable[PurchaseRow],
    acknowledged: Container[str],
    found: Findings,
) -> None:
    """The rows in the end are what the log adds up to. `acknowledged` has the ids that clients were told."""
    drop_id, lives = model.drop_id, model.lives
    kept: dict[str, ReservationRow] = {}
    held = 0
    for row in reservations:
        life = lives.get(row.id)
        if row.id in kept:
            found.add("I12", f"two rows of reservation {row.id}", drop_id, user_id=row.user_id, seq=row.seq)
        kept[row.id] = row
        if row.status == ACTIVE:
            held += row.qty
        if life is None:
            sentence = f"reservation {row.id} is in the rows, and no event made it"
            found.add("I4", sentence, drop_id, user_id=row.user_id, seq=row.seq)
        else:
            _compare_reservation(drop_id, row, life, found)
    bought: dict[str, PurchaseRow] = {}
    sold = 0
    for purchase in purchases:
        sold += purchase.qty
        life = lives.get(purchase.reservation_id)
        if purchase.reservation_id in bought:
            sentence = f"reservation {purchase.reservation_id} was bought twice"
            found.add("I9", sentence, drop_id, user_id=purchase.user_id, seq=purchase.seq)
            continue
        bought[purchase.reservation_id] = purchase
        if life is None or life.status != CONSUMED:
            sentence = f"purchase {purchase.id} of reservation {purchase.reservation_id}, which was not consumed"
            found.add("I9", sentence, drop_id, user_id=purchase.user_id, seq=purchase.seq)
        elif (purchase.id, purchase.user_id, purchase.qty, purchase.created_at, purchase.seq) != (
            *(life.purchase_id, life.user_id, life.qty, life.ended_at, life.ended_seq),
        ):
            sentence = f"purchase {purchase.id} is not as its event says"
            found.add("I12", sentence, drop_id, user_id=purchase.user_id, seq=purchase.seq)
    for life in lives.values():
        if life.id not in kept:
            is_told = life.id in acknowledged
            sentence = f"reservation {life.id} has an event, and no row" + (": it was acknowledged" if is_told else "")
            found.add("I3" if is_told else "I12", sentence, drop_id, user_id=life.user_id, seq=life.seq)
        if life.status == CONSUMED and life.id not in bought:
            sentence = f"reservation {life.id} was consumed, and there is no purchase of it"
            found.add("I9", sentence, drop_id, user_id=life.user_id, seq=life.ended_seq)
    _compare_drop(model, held, sold, found)


def _compare_reservation(drop_id: str, row: ReservationRow, life: Life, found: Findings) -> None:
    if (row.status, row.seq, row.qty, row.expires_at, row.resolved_at, row.created_at, row.user_id) == (
        *(life.status, life.seq, life.qty, life.expires_at, life.ended_at, life.created_at, life.user_id),
    ):
        return
    is_early = row.status == EXPIRED and row.resolved_at is not None and row.resolved_at < row.expires_at
    if row.status != life.status:
        invariant, sentence = "I9", f"is {row.status} in the rows, {life.status} by the log"
    elif is_early:
        invariant, sentence = "I7", f"expired at {row.resolved_at}, its deadline is {row.expires_at}"
    else:
        invariant, sentence = "I12", "is not as its events say"
    sentence = f"reservation {row.id} {sentence}"
    found.add(invariant, sentence, drop_id, user_id=row.user_id, seq=life.ended_seq or life.seq)


def _compare_drop(model: DropModel, held: int, sold: int, found: Findings) -> None:
    row, drop_id, seq = model.row, model.drop_id, model.seq
    if row is None:
        if seq:
            found.add("I12", f"{seq} events, and no drop", drop_id, seq=seq)
        return
    if row.available_stock + row.held_count + row.sold_count != row.total_stock:
        sentence = f"{row.available_stock} free, {row.held_count} held, {row.sold_count} sold of {row.total_stock}"
        found.add("I1", sentence, drop_id, seq=seq)
    if min(row.available_stock, row.held_count, row.sold_count) < 0:
        found.add("I1", "a count below zero", drop_id, seq=seq)
    if row.held_count != held:
        found.add("I2", f"held_count is {row.held_count}, active reservations hold {held}", drop_id, seq=seq)
    if row.sold_count != sold:
        found.add("I2", f"sold_count is {row.sold_count}, purchases are of {sold}", drop_id, seq=seq)
    if row.available_stock != model.stock[-1]:
        found.add("I1", f"{row.available_stock} free in the row, {model.stock[-1]} by the log", drop_id, seq=seq)
    born = model.events[1] if seq else None
    if born is not None and born.type == "DROP_CREATED" and born.available_stock != row.total_stock:
        found.add("I1", f"born with {born.available_stock} units, {row.total_stock} in the row", drop_id, seq=1)
    if row.seq != seq:
        found.add("I10", f"the row's seq is {row.seq}, the log's last {seq}", drop_id, seq=seq)
    if row.status != model.statuses[-1]:
        found.add("I12", f"the drop is {row.status}, {model.statuses[-1]} by the log", drop_id, seq=seq)
    if row.epoch < model.epochs[-1]:
        found.add("I15", f"the row's epoch is {row.epoch}, an event's {model.epochs[-1]}", drop_id, seq=seq)
