"""Drops whose events are committed by hand, and viewers that write down what they hear and object to what is wrong.

    async with watched() as on:
        on.make(A, total=2)
        ann = on.viewer()
        ann.watch.subscribe([A])
        on.reserve(A, ANN)
        await trio.sleep(1)
        assert ann.said(A) == ["snapshot 1: 2", "stock 2: 1"]

Whatever a test does, each viewer holds every message against the tables: nothing before its commit, nothing twice,
nothing out of order, no gap that goes unsaid, nothing that is another user's alone.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import trio

from engine.board import Board
from engine.drop import Drop
from engine.hub import JOINING_S, Direct, Hub, News, Watch
from engine.ledger import Unavailable
from engine.model import (
    Cancelled,
    Command,
    DropCreated,
    DropId,
    DropStatus,
    DropUpdated,
    Event,
    Expired,
    Instant,
    LatestPurchase,
    Purchase,
    Purchased,
    PurchaseId,
    Refused,
    ReservationId,
    Reserve,
    Reserved,
    Swept,
    UserId,
)
from tests.engine.making import cancel, play, record_of, terms

A, B, C = DropId("drop-a"), DropId("drop-b"), DropId("drop-c")
HOLD_MS = 1_000
UNSEEN = -1  # a viewer's position: it has to be shown the drop before it hears anything else
ANYWHERE = -2  # it was promised nothing yet: more drops are listed than are shown at once


class Message(msgspec.Struct, frozen=True):
    """What a viewer hears: a `snapshot`, the `stock`, or an event by its name."""

    what: str
    drop_id: DropId
    seq: int
    available: int | None = None
    latest: list[LatestPurchase] | None = None
    status: str | None = None
    at: float = 0.0  # when it was heard

    def __str__(self) -> str:
        return f"{self.what} {self.seq}" + ("" if self.available is None else f": {self.available}")


class Plain:
    """A dialect of lines; it counts what it was asked to encode."""

    def __init__(self) -> None:
        self.encoded: list[str] = []

    def news(self, news: News, user_id: UserId | None) -> bytes:
        drop_id = news.drop.terms.id
        self.encoded.append(f"news of {drop_id}")
        lines = []
        stock = None if news.stock is None else Message("stock", drop_id, news.stock.seq, news.stock.available)
        for told in news.events:
            event = told.event
            if stock is not None and event.seq > stock.seq:
                lines.append(stock)
                stock = None
            if isinstance(event, Expired) and event.hold.user_id != user_id:
                continue
            latest = None if told.latest is None else list(told.latest)
            available = event.terms.total_stock if isinstance(event, DropCreated) else None
            status = event.status.value if isinstance(event, DropCreated | DropUpdated) else None
            lines.append(Message(type(event).__name__, drop_id, event.seq, available, latest, status))
        if stock is not None:
            lines.append(stock)
        return b"".join(msgspec.json.encode(line) + b"\n" for line in lines)

    def snapshot(self, drop: Drop) -> bytes:
        self.encoded.append(f"snapshot of {drop.terms.id}")
        latest = list(drop.latest_purchases)
        message = Message("snapshot", drop.terms.id, drop.seq, drop.available, latest, drop.status.value)
        return msgspec.json.encode(message) + b"\n"


class Memory(msgspec.Struct):
    """What a viewer knows of a drop, by what it heard."""

    position: int  # it has heard everything up to here
    event: int = 0  # of the newest event that it heard
    stock: int = 0
    available: int | None = None
    latest: list[LatestPurchase] | None = None
    status: str | None = None


class Listener:
    """A viewer in memory. With `room` it takes so many sends, and then none before `read`.

    It can be told directly. One that `is_halving` takes half of what fills its room in that way, and has to be given
    the rest to keep.
    """

    def __init__(self, on: "Watched", dialect: Plain) -> None:
        self.dialect = dialect
        self.room: int | None = None
        self.heard: list[Message] = []
        self.sends = 0
        self.is_away = False
        self.knows: dict[DropId, Memory] = {}
        self.missed: dict[DropId, Memory] = {}  # of who watched all and joins now: what it knew of which it missed news
        self.joins_until = 0.0
        self.identified: dict[DropId, int] = {}  # the tables, by drop, when it said who it is
        self.refused = 0
        self._on = on
        self.is_halving = False
        self._rest = b""  # of a send that it took in part
        self.watch: Watch = on.hub.watch(self)

    # For the hub -------------------------------------------------------------------------------------

    def send(self, data: bytes) -> bool:
        assert data, "a send of nothing"
        if self.room == 0:
            self.refused += 1
            return False
        if self.room is not None:
            self.room -= 1
        self.sends += 1
        now = trio.current_time()
        for line in data.splitlines():
            message = msgspec.structs.replace(msgspec.json.decode(line, type=Message), at=now)
            self._check(message)
            self.heard.append(message)
        return True

    @property
    def direct(self) -> Direct | None:
        return None if self.room == 0 else self._send_directly

    def _send_directly(self, data: bytes) -> int:
        """As a socket would that has room for half of the last send."""
        if self.room == 0:
            raise BlockingIOError
        assert not self._rest, "the rest of what it took was forgotten"
        self.send(data)
        if self.room != 0 or not self.is_halving:
            return len(data)
        half = len(data) // 2
        self._rest = data[half:]
        return half

    def keep(self, rest: bytes) -> None:
        assert rest == self._rest
        self._rest = b""
        self.watch.hinder()

    def send_away(self) -> None:
        self.is_away = True

    # For tests ---------------------------------------------------------------------------------------

    def read(self, room: int | None = None, *, in_turn: bool = False) -> None:
        """It has read everything, and takes `room` sends more; None: any number. It is told at once, or in its turn."""
        assert not self._rest, "the rest of what it took was forgotten"
        self.room = room
        if in_turn:
            self.watch.drained()
        else:
            self.watch.go_on()

    def said(self, drop_id: DropId | None = None) -> list[str]:
        return [str(message) for message in self.heard if drop_id in (None, message.drop_id)]

    def subscribe(self, drops: Sequence[DropId], **resume: int) -> list[DropId]:
        """As the watch does; `resume` by the last letter of the drop's id."""
        self.missed = {}
        positions = {drop_id: resume[drop_id[-1]] for drop_id in drops if drop_id[-1] in resume}
        knew = dict(self.knows)
        for drop_id in drops:
            self.expect(drop_id, positions.get(drop_id))
        left_out = self.watch.subscribe(drops, positions)
        for drop_id in left_out:
            self.knows.pop(drop_id)
        self.knows |= {drop_id: knew[drop_id] for drop_id in left_out if drop_id in knew}
        return left_out

    def subscribe_all(self, positions: dict[DropId, int] | None = None, *, is_shown: bool = True) -> list[DropId]:
        self.missed = {}
        listed = {drop.terms.id for drop in self._on.board.listed(1_000, 0)[0]} if is_shown else set()
        for drop_id, events in self._on.tables.items():
            if drop_id in self.watch.drops or drop_id in (positions or {}):
                self.expect(drop_id, (positions or {}).get(drop_id))
            elif len(self._on.tables) > self._on.hub.marks_max:
                self.knows[drop_id] = Memory(ANYWHERE)
            elif drop_id in listed:
                self.expect(drop_id, None)
            elif drop_id not in self.knows and not self.watch.is_all:
                self.knows[drop_id] = Memory(len(events), event=len(events), stock=len(events))
        left_out = self.watch.subscribe_all(positions, is_shown=is_shown)
        for drop_id in left_out:
            self.knows[drop_id] = Memory(ANYWHERE)
        return left_out

    def join(self, drop_id: DropId) -> None:
        """After `Hub.until_told`. Of each drop that it joins it hears what happened while it watched all."""
        tables = self._on.tables
        if self.watch.is_all:
            knew = {other: self.knows.get(other, Memory(0)) for other in tables}
            self.missed = {other: memory for other, memory in knew.items() if memory.position != len(tables[other])}
            for other, memory in knew.items():
                if self._on.board.drop(other) is None:  # another engine's now: nobody knows what it missed
                    self.missed[other] = Memory(ANYWHERE, memory.event, memory.stock)
            self.joins_until = trio.current_time() + JOINING_S
            self.knows = {}
        if drop_id not in self.watch.drops:
            now = len(tables[drop_id])
            missed = self.missed.pop(drop_id, None) if trio.current_time() < self.joins_until else None
            self.knows[drop_id] = missed or Memory(now, event=now, stock=now)
        self.watch.join(drop_id)

    def expect(self, drop_id: DropId, position: int | None) -> None:
        """From now on it may rely on what comes after a position; without one, on a snapshot."""
        drop = self._on.board.drop(drop_id)
        known = drop is not None and position is not None and 0 < position <= drop.seq
        self.knows[drop_id] = Memory(position, position, position) if known and position else Memory(UNSEEN)

    def unsubscribe(self, drop_id: DropId) -> None:
        self.watch.unsubscribe([drop_id])
        if not self.watch.is_all:
            self.knows.pop(drop_id, None)

    def unsubscribe_all(self) -> None:
        self.watch.unsubscribe_all()
        self.knows.clear()
        self.missed = {}

    def identify(self, user_id: UserId) -> None:
        self.identified = {drop_id: len(events) for drop_id, events in self._on.tables.items()}
        self.watch.identify(user_id)

    def _check(self, message: Message) -> None:
        drop_id, seq = message.drop_id, message.seq
        table = self._on.tables[drop_id]
        where = f"{message} of {drop_id}"
        assert seq <= len(table), f"{where}: told before it was committed"
        assert self.watch.is_all or drop_id in self.watch.drops, f"{where}: nobody asked for it"
        knows = self.knows.setdefault(drop_id, Memory(0))
        if message.what == "snapshot":
            drop = self._on.board.drop(drop_id)
            assert drop is not None
            assert (seq, message.available) == (drop.seq, drop.available), where
            assert seq >= knows.position, f"{where}: falls behind {knows.position}"
            knows.position = knows.event = knows.stock = seq
            knows.available, knows.latest, knows.status = message.available, message.latest, message.status
            return
        assert knows.position != UNSEEN, f"{where}: it has not been shown the drop"
        assert seq >= knows.position, f"{where}: falls behind {knows.position}"
        event: Any = table[seq - 1]
        if message.what == "stock":
            assert seq > knows.stock, f"{where}: told twice"
            assert message.available == event.available_stock, where
            knows.stock = seq
        else:
            assert seq > knows.event, f"{where}: told twice"
            assert message.what == type(event).__name__, where
            assert not isinstance(event, Expired) or event.hold.user_id == self.watch.user_id, f"{where}: not for it"
            if message.latest is not None:
                assert message.latest == latest_at(self._on.bought[drop_id], seq), where
                knows.latest = message.latest
            knows.event = seq
        was_promised = knows.position != ANYWHERE
        for missed in table[knows.position : seq - 1] if was_promised else ():
            assert not self._may_rely_on(drop_id, missed), f"{where}: {missed} went unsaid"
        knows.position = seq
        knows.available = knows.available if message.available is None else message.available
        knows.status = message.status or knows.status
        if message.what == "stock" and knows.event < seq and was_promised:
            assert not self._may_rely_on(drop_id, event), f"{where}: the stock came, the event did not"

    def _may_rely_on(self, drop_id: DropId, event: Event) -> bool:
        """Whether it must be told of this event itself."""
        if isinstance(event, Expired):
            is_own = event.hold.user_id == self.watch.user_id
            return is_own and event.seq > self.identified.get(drop_id, 0)
        return not isinstance(event, Reserved | Cancelled)

    def is_up_to_date(self) -> None:
        """It takes everything, and a pass has gone by: what it knows is what is on the board."""
        for drop in self._on.board.drops():
            drop_id = drop.terms.id
            if not (self.watch.is_all or drop_id in self.watch.drops):
                continue
            knows = self.knows.setdefault(drop_id, Memory(0))
            assert knows.position in (drop.seq, ANYWHERE), f"{drop_id}: at {knows.position}, not at {drop.seq}"
            assert knows.available in (None, drop.available)
            assert knows.status in (None, drop.status)
            assert knows.latest is None or knows.latest == list(drop.latest_purchases), drop_id


class Watched:
    """A board, tables, a hub; the engine's part is played by hand. `now` is the engine's clock, ms."""

    def __init__(self, **limits: Any) -> None:
        self.board = Board()
        self.tables: dict[DropId, list[Event]] = {}
        self.bought: dict[DropId, list[tuple[int, LatestPurchase]]] = {}
        self.dialect = Plain()
        self.viewers: list[Listener] = []
        self.now = 0
        self.history_s = 0.01
        self.histories: list[tuple[DropId, int]] = []
        self.is_reachable = True
        self.has_bug = False
        self.pruned: set[tuple[DropId, int]] = set()
        self.hub = Hub(self.board, self._history, **limits)
        self._ids = 0

    def viewer(self, dialect: Plain | None = None) -> Listener:
        viewer = Listener(self, dialect or self.dialect)
        self.viewers.append(viewer)
        return viewer

    async def _history(self, drop_id: DropId, after_seq: int, most: int) -> Sequence[Event]:
        self.histories.append((drop_id, after_seq))
        await trio.sleep(self.history_s)
        if self.has_bug:
            raise ValueError("what the tables hold is not understood")
        if not self.is_reachable:
            raise Unavailable
        events = self.tables[drop_id][after_seq : after_seq + most]
        return [event for event in events if (drop_id, event.seq) not in self.pruned]

    # The engine --------------------------------------------------------------------------------------

    def make(self, drop_id: DropId, total: int = 10, status: DropStatus = DropStatus.LIVE) -> None:
        born = terms(total, drop_id=drop_id, created_at=self.now)
        drop = Drop(born, status)
        self.tables[drop_id] = []
        self.bought[drop_id] = []
        event = DropCreated(1, born.created_at, born, status)
        self.decided(drop, event)
        self.board.show(drop)
        self.hub.committed(drop_id, event)

    def drop(self, drop_id: DropId) -> Drop:
        drop = self.board.drop(drop_id)
        assert drop is not None
        return drop

    def decided(self, drop: Drop, event: Event) -> None:
        """Durable, as far as anybody can know."""
        if event.seq > drop.seq:
            drop.apply(event)
        self.tables[drop.terms.id].append(event)
        if isinstance(event, Purchased):
            line = LatestPurchase(event.hold.user_id, event.username, event.hold.qty, event.at)
            self.bought[drop.terms.id].append((event.seq, line))

    def commit(self, drop_id: DropId, *commands: Command | DropStatus, is_published: bool = True) -> list[Event]:
        """One batch: whatever the commands do now, and what is due before."""
        drop, events = self.drop(drop_id), list[Event]()
        for command in commands:
            while (due := drop.due(Instant(self.now))) is not None:
                self.decided(drop, due)
                events.append(due)
            if isinstance(command, DropStatus):
                event: Any = DropUpdated(drop.seq + 1, Instant(self.now), command)
                drop.apply(event)
            else:
                event = play(drop, command, self.now)
            if not isinstance(event, Refused | Swept):
                self.decided(drop, event)
                events.append(event)
        if is_published:
            for event in events:
                self.board.committed(drop_id, event)
            for event in events:
                self.hub.committed(drop_id, event)
        return events

    def reserve(self, drop_id: DropId, user: UserId) -> list[Event]:
        return self.commit(drop_id, self.wish(user))

    def wish(self, user: UserId, hold_ms: int = HOLD_MS) -> Reserve:
        self._ids += 1
        return Reserve(user, ReservationId(f"{user}-{self._ids}"), hold_ms)

    def purchase(self, user: UserId) -> Purchase:
        self._ids += 1
        return Purchase(user, f"{user}-{self._ids}", PurchaseId(f"bought-{self._ids}"))

    def buy(self, drop_id: DropId, user: UserId) -> list[Event]:
        return self.commit(drop_id, self.wish(user), self.purchase(user))

    def cancel(self, drop_id: DropId, user: UserId) -> list[Event]:
        return self.commit(drop_id, cancel(user, self.drop(drop_id).holds[user].id))

    def load_anew(self, drop_id: DropId) -> Drop:
        """A fresh state, as from the ledger."""
        drop = Drop.restored(record_of(self.drop(drop_id)))
        self.board.show(drop)
        return drop


def latest_at(bought: list[tuple[int, LatestPurchase]], seq: int) -> list[LatestPurchase]:
    return [line for at, line in bought if at <= seq][-3:][::-1]


@asynccontextmanager
async def watched(**limits: Any) -> AsyncIterator[Watched]:
    """A hub that runs, and in the end, with everything read, viewers that know what there is to know."""
    on = Watched(**limits)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(on.hub.run)
        yield on
        for viewer in on.viewers:
            if not viewer.watch.is_closed:
                viewer.read()
        await trio.sleep(1)
        for viewer in on.viewers:
            if not viewer.watch.is_closed:
                viewer.is_up_to_date()
                assert viewer.watch.parked_at is None
        nursery.cancel_scope.cancel()
