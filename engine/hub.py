"""The hub: committed events, on their way to everybody who watches.

`committed` is synchronous and short: it notes the event and rings. A pass, at most 20 times a second, tells each
drop's viewers what has changed since the pass before: of its stock only the newest, of everything else each event.
What is told is encoded once for each kind of client, and leaves in slices, with other tasks between them.

    in step       a viewer has heard every pass so far: it costs one `send` a pass, and nothing is kept for it. As long
                  as nothing is left to send either, that is the socket's own `send`, with no call of ours around it
    marked        for some drops it has heard less (it was busy, it has just come, it came back with a position):
                  per drop, the `seq` up to which it has heard. It is told the rest from the ring of newest events,
                  what is older than that from the tables, or it gets a snapshot: never a gap that goes unsaid
    parked        it did not read: nothing is tried before it has; after `stall_s` it is sent away

A viewer that reads slowly therefore costs a number for each drop that it watches, whatever happens there.
"""

from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Final, Protocol

import msgspec
import structlog
import trio

from engine.board import Board
from engine.drop import FEED_LENGTH, Drop
from engine.ledger import Unavailable
from engine.model import (
    Cancelled,
    DropId,
    Event,
    Expired,
    Instant,
    LatestPurchase,
    Purchased,
    Reserved,
    UserId,
)

log = structlog.get_logger()

PASS_S: Final = 0.05  # between two passes: 20 a second, as often as an eye can tell
SLICE: Final = 256  # viewers told before other tasks have their turn: about 1.5 ms
RING_MAX: Final = 100_000  # newest events kept in memory, over all drops: about 20 MB
EVENTS_MAX: Final = 128  # of one drop that are told at once, about 100 KB; more take several passes, or a snapshot
MARKS_MAX: Final = 2_000  # drops of which a viewer has heard less than was told; with more it is sent away
STALL_S: Final = 20.0  # that a viewer may leave unread what it was sent
SWEEP_S: Final = 1.0
HISTORY_MAX: Final = 1_000  # changes that a viewer may have missed and still be told one by one; beyond, a snapshot
HISTORIES_MAX: Final = 8  # reads of the tables at once
HISTORIES_WAITING_MAX: Final = 256  # and with those that wait for them; then a snapshot: after a restart all come back
BUNDLES_MAX: Final = 64  # drops that are told of together, in one send to those who watch all: some 16 KiB
DIRECT_MAX: Final = 8_192  # bytes that are told with no look at the viewer, which keeps what the kernel does not take
TOGETHER_MAX: Final = 65_536  # bytes of such a send: what is left of it when a viewer stalls is kept for it
CATCH_UP_S: Final = 0.002  # spent on viewers that have room again before other tasks have their turn
JOINING_S: Final = 20.0  # that who watched all may take to join all of its drops, and miss nothing of the later ones
KEPT_MAX: Final = 64  # encodings that are kept within a pass for viewers that are behind: most missed the same
GONE: Final = -1  # a mark: it has heard nothing of this drop


class Stock(msgspec.Struct, frozen=True, gc=False):
    """What is available after `seq`, decided at `at`."""

    seq: int
    at: Instant
    available: int


class Told(msgspec.Struct, frozen=True, gc=False):
    """An event, and the drop's newest purchases after it, newest first, if it is one.

    None, too, where they are not known: then a later purchase, which is, brings them.
    """

    event: Event
    latest: tuple[LatestPurchase, ...] | None = None


class News(msgspec.Struct, frozen=True):
    """What has happened to a drop: all events but such as change its stock alone, and its newest stock, if it changed.

    In the order of `seq`; `stock` belongs behind the last event whose `seq` is not above its own.
    """

    drop: Drop  # as it is committed now: maybe further than `events` say
    events: Sequence[Told]
    stock: Stock | None


class Dialect(Protocol):
    """One kind of client: how it is told. What comes out is ready for its wire."""

    def news(self, news: News, user_id: UserId | None) -> bytes:
        """What happened, in order; `user_id`: to a viewer who is that user, None: to all others."""
        ...

    def snapshot(self, drop: Drop) -> bytes: ...


class Viewer(Protocol):
    """One client's connection, as the hub needs it."""

    @property
    def dialect(self) -> Dialect: ...

    def send(self, data: bytes) -> bool:
        """Send, or keep what the kernel did not take; False: it has something left to send, and took nothing.

        In that case it calls its watch's `go_on` as soon as that is sent. Must not raise, must not block.
        """
        ...

    @property
    def direct(self) -> "Direct | None":
        """What tells it at once, while nothing is left to send; None: only `send` does.

        As soon as that changes it calls its watch's `hinder`.
        """
        ...

    def keep(self, rest: bytes) -> None:
        """Send this, which `direct` did not take, as soon as it can be."""
        ...

    def send_away(self) -> None:
        """It is too slow: close, and ask it to come again later."""
        ...


Direct = Callable[[bytes], int]
"""A socket's own `send`: how many bytes it took; raises OSError where that is none."""


class _Gone:
    """In place of a viewer who has closed its watch.

    A connection keeps its watch. If the watch kept the connection as well, neither would be free before a collection
    of cycles, and of viewers who stayed for longer than its younger generations last none is made for hours.
    """

    __slots__ = ("dialect",)

    direct = None

    def __init__(self, dialect: Dialect) -> None:
        self.dialect = dialect

    def send(self, data: bytes) -> bool:
        return False

    def keep(self, rest: bytes) -> None:
        pass

    def send_away(self) -> None:
        pass


class HubStatistics(msgspec.Struct, frozen=True):
    viewers: int
    parked: int
    passes: int
    frames: int  # sends of news to viewers
    sent_away: int
    ring: int


class Watch:
    """A viewer, and what it watches. Made by `Hub.watch`; `close` it in the end."""

    __slots__ = (
        "_hub",
        "dialect",
        "direct",
        "drops",
        "fetching",
        "is_all",
        "is_closed",
        "marks",
        "parked_at",
        "user_id",
        "viewer",
    )

    def __init__(self, hub: "Hub", viewer: Viewer) -> None:
        self.viewer: Viewer = viewer
        self.user_id: UserId | None = None
        self.drops: set[DropId] = set()
        self.is_all = False
        self.is_closed = False
        self.marks: dict[DropId, int] = {}
        self.fetching: set[DropId] = set()
        self.parked_at: float | None = None
        # While it is in step with everything that it watches: how it is told, as a send by way of the viewer found out.
        self.direct: Direct | None = None
        self.dialect: Dialect | None = None
        self._hub = hub

    def identify(self, user_id: UserId) -> None:
        """From now on it hears what concerns this user alone, too."""
        if not self.is_closed:
            self._hub.identify(self, user_id)

    def subscribe(self, drops: Iterable[DropId], resume: Mapping[DropId, int] | None = None) -> list[DropId]:
        """Watch these drops, which are on the board, too: each is shown, or what happened to it since `resume`.

        A drop that is watched already is shown again. Returned are the last ones, for which there is no room before it
        has read of others: with them nothing happened.
        """
        if self.is_closed:
            return []
        self._hub.forget_missed(self)
        left_out = []
        for drop_id in drops:
            if not self._mark_if_room(drop_id, resume):
                left_out.append(drop_id)
            elif not self.is_all and drop_id not in self.drops:
                self.drops.add(drop_id)
                self._hub.join(self, drop_id)
        self._hear()
        return left_out

    def subscribe_all(self, resume: Mapping[DropId, int] | None = None, *, is_shown: bool = True) -> list[DropId]:
        """Watch every drop, those to come too. With `is_shown` the listed ones are shown, and those of `resume`.

        So are those that it watches already, and they come first: with them and `resume`, it is as many as may be
        marked, and of those that are listed the newest. Returned is for what there was no room, of `resume` the last.
        """
        if self.is_closed:
            return []
        board = self._hub.board
        wanted = list(self.drops)
        if is_shown:
            wanted += [drop_id for drop_id in resume or {} if board.drop(drop_id) is not None]
        self.unsubscribe(list(self.drops))
        self._hub.forget_missed(self)
        left_out = [drop_id for drop_id in wanted if not self._mark_if_room(drop_id, resume)]
        if not self.is_all:
            self.is_all = True
            self._hub.join_all(self)
        for drop in board.listed(self._hub.marks_max, 0)[0] if is_shown else ():
            self._mark_if_room(drop.terms.id, resume)
        self._hear()
        return left_out

    def join(self, drop_id: DropId) -> None:
        """Watch this drop, which is on the board, from this instant on: it is not shown.

        Who watches all watches this one alone from now on, and those that it joins next. Of each of them it is told
        what it had not heard yet of what happened while it watched all, as long as they come within `JOINING_S`.
        After `Hub.until_told` nothing is missed by that, and nothing told again.
        """
        if self.is_closed or drop_id in self.drops:
            return
        hub = self._hub
        if self.is_all:
            missed = hub.missed_by(self, drop_id)
            self.unsubscribe_all()
            hub.keep_missed(self, missed)
        newest = hub.newest(drop_id)
        self.drops.add(drop_id)
        hub.join(self, drop_id)
        hub.mark(self, drop_id, min(hub.take_missed(self, drop_id, newest), newest))
        self._hear()

    def unsubscribe(self, drops: Iterable[DropId]) -> None:
        for drop_id in drops:
            if drop_id in self.drops:
                self.drops.discard(drop_id)
                self.marks.pop(drop_id, None)
                self._hub.leave(self, drop_id)

    def unsubscribe_all(self) -> None:
        self.unsubscribe(list(self.drops))
        self.marks.clear()
        self._hub.forget_missed(self)
        if self.is_all:
            self.is_all = False
            self._hub.leave_all(self)

    def go_on(self) -> None:
        """The viewer has room again: tell it what it has not heard, as far as it takes it."""
        if not self.is_closed:
            self._hub.catch_up(self)

    def drained(self) -> None:
        """The viewer has sent what was left: `go_on`, when its turn comes."""
        self._hub.drained(self)

    def hinder(self) -> None:
        """Ask the viewer again before it is told more."""
        self.direct = None

    def close(self) -> None:
        if not self.is_closed:
            self.hinder()
            self.unsubscribe_all()
            self.is_closed = True
            self.viewer = _Gone(self.viewer.dialect)
            self._hub.forget(self)

    def _mark(self, drop_id: DropId, resume: Mapping[DropId, int] | None) -> None:
        drop = self._hub.board.drop(drop_id)
        seq = (resume or {}).get(drop_id, GONE)
        # A position beyond what is committed is none of ours.
        self._hub.mark(self, drop_id, seq if drop is not None and 0 < seq <= drop.seq else GONE)

    def _mark_if_room(self, drop_id: DropId, resume: Mapping[DropId, int] | None) -> bool:
        has_room = drop_id in self.marks or len(self.marks) < self._hub.marks_max
        if has_room:
            self._mark(drop_id, resume)
        return has_room

    def _hear(self) -> None:
        """What is marked; who has not read what it was sent hears it when it has, however much it asks for."""
        if self.parked_at is None:
            self.go_on()


class _Feed:
    """One drop's newest events, and who watches it."""

    __slots__ = ("events", "latest", "told", "watches")

    def __init__(self, told: int, drop: Drop | None, before: Event | None = None) -> None:
        self.events: deque[Told] = deque()  # without a gap
        self.latest: tuple[LatestPurchase, ...] | None
        self.watches: dict[Watch, None] = {}
        self.reset(told, drop, before)

    def reset(self, told: int, drop: Drop | None, before: Event | None = None) -> None:
        """Forget what happened, and go on from `told`: where the drop is now, or was `before` this event."""
        self.events.clear()
        self.told = told  # the `seq` up to which every viewer in step has heard
        # The newest purchases; not known where the drop is ahead of us by purchases of its own.
        self.latest = None if drop is None else drop.latest_purchases
        if before is not None and self.latest and self.latest[0].created_at >= before.at:
            self.latest = None

    @property
    def newest(self) -> int:
        return self.events[-1].event.seq if self.events else self.told

    def add(self, event: Event, board: Board) -> None:
        told = Told(event)
        if type(event) is Purchased:
            told = _with_latest(event, board.drop(event.hold.drop_id))
            if told.latest is None and self.latest is not None:
                told = Told(event, (_line(event), *self.latest[: FEED_LENGTH - 1]))
            self.latest = told.latest
        self.events.append(told)

    def between(self, after: int, up_to: int) -> list[Told] | None:
        """The events after one `seq`, up to another; None if not all of them are here."""
        if after >= up_to:
            return []
        if not self.events or self.events[0].event.seq > after + 1:
            return None
        newest = self.events[-1].event.seq
        # From the end: nearly always it is the newest few of thousands, and a deque is walked, not indexed.
        found = list(islice(reversed(self.events), newest - up_to, newest - after))
        found.reverse()
        return found


History = Callable[[DropId, int, int], Awaitable[Sequence[Event]]]
"""Events of a drop after a `seq`, at most so many, in order, from the tables; raises `Unavailable`."""


class Hub:
    """`run` it in a nursery. The publisher tells `committed` and `replaced`."""

    def __init__(
        self,
        board: Board,
        history: History,
        *,
        pass_s: float = PASS_S,
        stall_s: float = STALL_S,
        slice_: int = SLICE,
        ring_max: int = RING_MAX,
        marks_max: int = MARKS_MAX,
        events_max: int = EVENTS_MAX,
        history_max: int = HISTORY_MAX,
        histories_waiting_max: int = HISTORIES_WAITING_MAX,
        bundles_max: int = BUNDLES_MAX,
    ) -> None:
        self.board = board
        self.marks_max = marks_max
        self._history = history
        self._pass_s = pass_s
        self._stall_s = stall_s
        self._slice = slice_
        self._ring_max = ring_max
        self._events_max = events_max
        self._history_max = history_max
        self._histories_waiting_max = histories_waiting_max
        self._bundles_max = bundles_max
        self._feeds: dict[DropId, _Feed] = {}
        self._ring: deque[DropId] = deque()  # whose event each one is, oldest first
        self._dirty: dict[DropId, None] = {}
        self._telling: set[DropId] = set()  # of which some viewers in step have heard the newest already, and some not
        self._bell = trio.lowlevel.ParkingLot()
        self._told_bell = trio.lowlevel.ParkingLot()
        self._unrested = 0  # sends since other tasks had their turn
        self._watches: set[Watch] = set()
        self._all: dict[Watch, None] = {}
        self._users: dict[UserId, set[Watch]] = {}
        self._parked: set[Watch] = set()
        # Of who watched all and now joins drop by drop: until when it may, and up to where it had heard of which drops.
        self._missed: dict[Watch, tuple[float, dict[DropId, int]]] = {}
        self._drained: dict[Watch, None] = {}  # that have room again, and were not told yet what they missed
        self._drained_bell = trio.lowlevel.ParkingLot()
        self._kept: dict[tuple[object, ...], bytes] = {}
        self._reading = trio.CapacityLimiter(HISTORIES_MAX)
        self._histories = 0
        self._nursery: trio.Nursery | None = None
        self._passes = self._frames = self._sent_away = 0

    def statistics(self) -> HubStatistics:
        return HubStatistics(
            len(self._watches), len(self._parked), self._passes, self._frames, self._sent_away, len(self._ring)
        )

    # From the engine ---------------------------------------------------------------------------------

    def committed(self, drop_id: DropId, event: Event) -> None:
        """Note an event. Called between a commit and its answers."""
        feed = self._feeds.get(drop_id)
        if feed is None:
            feed = self._feeds[drop_id] = _Feed(event.seq - 1, self.board.drop(drop_id), event)
        elif feed.newest != event.seq - 1:  # what lies between was not published: nobody may think that nothing does
            feed.reset(event.seq - 1, self.board.drop(drop_id), event)
            self._show_all(drop_id, feed)
        feed.add(event, self.board)
        self._ring.append(drop_id)
        if len(self._ring) > self._ring_max:
            self._forget_oldest()
        self._note(drop_id)

    def replaced(self, drop_id: DropId) -> None:
        """The drop's state was loaded anew: whoever watches it needs to be shown it again."""
        self._kept.clear()
        feed = self._feed(drop_id)
        drop = self.board.drop(drop_id)
        feed.reset(0 if drop is None else drop.seq, drop)
        self._show_all(drop_id, feed)

    def _note(self, drop_id: DropId) -> None:
        self._dirty[drop_id] = None
        if self._bell:
            self._bell.unpark()

    def _show_all(self, drop_id: DropId, feed: _Feed) -> None:
        """Have everybody who watches the drop be shown it, in the next pass."""
        self._mark_all(drop_id, feed)
        self._note(drop_id)

    def _mark_all(self, drop_id: DropId, feed: _Feed) -> None:
        for watch in (*feed.watches, *self._all):
            self.mark(watch, drop_id, GONE)

    def _forget_oldest(self) -> None:
        drop_id = self._ring.popleft()
        feed = self._feeds.get(drop_id)
        if feed is None or not feed.events:
            return
        oldest = feed.events.popleft().event.seq
        if oldest > feed.told:  # so far behind are the passes
            feed.told = feed.events[-1].event.seq if feed.events else oldest
            self._show_all(drop_id, feed)
        self._tidy(drop_id, feed)

    # Viewers -----------------------------------------------------------------------------------------

    def watch(self, viewer: Viewer) -> Watch:
        watch = Watch(self, viewer)
        self._watches.add(watch)
        return watch

    def forget(self, watch: Watch) -> None:
        self._watches.discard(watch)
        self._parked.discard(watch)
        self._drained.pop(watch, None)
        if watch.user_id is not None:
            self._forget_user(watch, watch.user_id)

    def identify(self, watch: Watch, user_id: UserId) -> None:
        if watch.user_id is not None:
            self._forget_user(watch, watch.user_id)
        watch.user_id = user_id
        self._users.setdefault(user_id, set()).add(watch)

    def _forget_user(self, watch: Watch, user_id: UserId) -> None:
        others = self._users[user_id]
        others.discard(watch)
        if not others:
            del self._users[user_id]

    def join(self, watch: Watch, drop_id: DropId) -> None:
        self._feed(drop_id).watches[watch] = None

    def leave(self, watch: Watch, drop_id: DropId) -> None:
        watch.hinder()  # a pass may be under way, and have it on its list
        feed = self._feeds.get(drop_id)
        if feed is not None:
            feed.watches.pop(watch, None)
            self._tidy(drop_id, feed)

    def mark(self, watch: Watch, drop_id: DropId, seq: int) -> None:
        """The viewer has heard of this drop up to `seq`, which is not where the others are."""
        if watch.is_closed:
            return
        watch.hinder()
        watch.marks[drop_id] = seq
        if len(watch.marks) > self.marks_max:
            self._send_away(watch)

    def join_all(self, watch: Watch) -> None:
        watch.hinder()
        self._all[watch] = None
        for drop_id in (*self._dirty, *self._telling):  # it watches from this instant on
            if len(watch.marks) < self.marks_max:
                watch.marks.setdefault(drop_id, self.newest(drop_id))

    def leave_all(self, watch: Watch) -> None:
        watch.hinder()
        self._all.pop(watch, None)

    def missed_by(self, watch: Watch, first: DropId) -> dict[DropId, int]:
        """Of who watches all: up to where it has heard of each drop of which it has not heard everything.

        As many as may be marked, and in any case the `first` one.
        """
        heard = dict(watch.marks)
        for drop_id in (first, *self._dirty):
            feed = self._feeds.get(drop_id)
            if feed is not None and len(heard) <= self.marks_max:
                heard.setdefault(drop_id, feed.told)
        return {drop_id: seq for drop_id, seq in heard.items() if seq != self.newest(drop_id)}

    def keep_missed(self, watch: Watch, missed: dict[DropId, int]) -> None:
        """For `JOINING_S`, and not for as long as the connection: it is as much as the marks are."""
        if missed:
            self._missed[watch] = trio.current_time() + JOINING_S, missed

    def take_missed(self, watch: Watch, drop_id: DropId, otherwise: int) -> int:
        """Up to where it had heard of this drop; `otherwise` if that was everything, or it is too long ago."""
        until, missed = self._missed.get(watch, (0.0, {}))
        return missed.pop(drop_id, otherwise) if trio.current_time() < until else otherwise

    def forget_missed(self, watch: Watch) -> None:
        self._missed.pop(watch, None)

    def newest(self, drop_id: DropId) -> int:
        """The `seq` of a drop's newest event that was committed, told or not."""
        feed = self._feeds.get(drop_id)
        drop = self.board.drop(drop_id)
        return feed.newest if feed is not None else 0 if drop is None else drop.seq

    async def until_told(self, watch: Watch, drop_id: DropId) -> None:
        """Wait while some of those who watch this drop have heard its news, and some not yet.

        Who joins or leaves it then may miss them or hear them twice; a snapshot makes up for both. What is told of
        other drops matters to who watches all, and leaves those by joining this one.
        """
        while self.is_telling(watch, drop_id):
            await self._told_bell.park()

    def is_telling(self, watch: Watch, drop_id: DropId) -> bool:
        return bool(self._telling) if watch.is_all else drop_id in self._telling

    def _feed(self, drop_id: DropId) -> _Feed:
        feed = self._feeds.get(drop_id)
        if feed is None:
            drop = self.board.drop(drop_id)
            feed = self._feeds[drop_id] = _Feed(0 if drop is None else drop.seq, drop)
        return feed

    def _tidy(self, drop_id: DropId, feed: _Feed) -> None:
        if not feed.events and not feed.watches and self._feeds.get(drop_id) is feed:
            del self._feeds[drop_id]

    # Passes ------------------------------------------------------------------------------------------

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._sweep)
            nursery.start_soon(self._catch_up_in_slices)
            while True:
                while not self._dirty:
                    await self._bell.park()
                began = trio.current_time()
                await self._pass()
                await trio.sleep_until(began + self._pass_s)

    async def _pass(self) -> None:
        """Tell what there is of every drop that has news now, some drops at a time."""
        self._passes += 1
        left = len(self._dirty)  # what comes meanwhile, of others or of these again, is the next pass's
        while left > 0:
            drop_ids = list(islice(self._dirty, min(left, self._bundles_max)))
            left -= len(drop_ids)
            await self._tell_of(drop_ids)

    async def _tell_of(self, drop_ids: Sequence[DropId]) -> None:
        self._telling.update(drop_ids)
        bundles = [self._begin(drop_id) for drop_id in drop_ids]
        for bundle in bundles:
            await self._tell_all(list(bundle.feed.watches), bundle.data, partial(self._tell_one, bundle))
        together = bundles[0] if len(bundles) == 1 else _Together(bundles)
        await self._tell_all(list(self._all), together.data, partial(self._tell_together, bundles, together))
        self._telling.clear()
        for bundle in bundles:
            self._tidy(bundle.drop_id, bundle.feed)
        if self._told_bell:
            self._told_bell.unpark_all()
            await trio.lowlevel.checkpoint()  # with the next one: they run before anything more is told
        await trio.lowlevel.checkpoint()

    async def _tell_all(
        self, watches: Sequence[Watch], data_of: Callable[[Dialect], bytes], otherwise: Callable[[Watch], None]
    ) -> None:
        """Tell those who are in step at once, and everybody else in its own way; other tasks have turns between."""
        for first in range(0, len(watches), self._slice):
            some = watches[first : first + self._slice]
            await self._rest_before(len(some))
            dialect, data, size = None, b"", 0
            for watch in some:
                direct = watch.direct
                if direct is not None:
                    if watch.dialect is not dialect:
                        assert watch.dialect is not None
                        dialect = watch.dialect
                        data = data_of(dialect)
                        size = len(data)
                    if 0 < size <= DIRECT_MAX:
                        try:
                            sent = direct(data)
                        except OSError:
                            pass  # no room, or nobody there: the viewer finds out which
                        else:
                            self._frames += 1
                            if sent != size:
                                watch.viewer.keep(data[sent:])
                            continue
                otherwise(watch)
                await self._rest_before(0)

    async def _rest_before(self, sends: int) -> None:
        """Let other tasks have their turn before so many sends, if with those since the last time it is a slice."""
        self._unrested += sends
        if self._unrested > self._slice:
            self._unrested = sends
            await trio.lowlevel.checkpoint()

    def _begin(self, drop_id: DropId) -> "_Bundle":
        """What is told of a drop now; from here on, who is not marked has heard what came before, until it is told."""
        del self._dirty[drop_id]
        self._kept.clear()
        feed = self._feed(drop_id)
        before, newest = feed.told, feed.newest
        events = feed.between(before, newest) if newest - before <= self._history_max else None
        if events is not None and len(events) > self._events_max:
            events = _fitting(events, self._events_max)
        feed.told = newest if not events else events[-1].event.seq
        if feed.told < newest:
            self._note(drop_id)  # the rest in the next pass
        news = self._news(drop_id, events) if events else None
        if before != feed.told and news is None:
            self._mark_all(drop_id, feed)
        if news is not None and self._users:
            self._mark_users(news, before)
        return _Bundle(drop_id, feed, before, news)

    def _mark_users(self, news: News, before: int) -> None:
        """Those whom news concern that are not everybody's: each of them is told for itself."""
        drop_id = news.drop.terms.id
        for told in news.events:
            if isinstance(told.event, Expired):
                for watch in list(self._users.get(told.event.hold.user_id, ())):
                    if watch.is_all or drop_id in watch.drops:
                        self._mark(watch, drop_id, before)

    def _tell_one(self, bundle: "_Bundle", watch: Watch) -> None:
        if bundle.drop_id in watch.drops:
            self._tell_pass(watch, bundle)

    def _tell_pass(self, watch: Watch, bundle: "_Bundle") -> None:
        if watch.is_closed:
            return
        drop_id = bundle.drop_id
        if watch.parked_at is not None:
            self._mark(watch, drop_id, bundle.before)
        elif drop_id in watch.marks:
            if not self._tell(watch, drop_id):
                self._park(watch)
            elif watch.marks.get(drop_id) == bundle.feed.told:
                del watch.marks[drop_id]  # in step again
        elif self._send(watch, bundle.data(watch.viewer.dialect)):
            self._told(watch)
        else:
            self._mark(watch, drop_id, bundle.before)
            self._park(watch)

    def _tell_together(self, bundles: Sequence["_Bundle"], together: "_Bundle | _Together", watch: Watch) -> None:
        if not watch.is_all:
            return
        is_behind = watch.marks or watch.parked_at is not None
        data = b"" if is_behind else together.data(watch.viewer.dialect)
        if is_behind or len(data) > TOGETHER_MAX:
            self._unrested += len(bundles) - 1
            for bundle in bundles:
                self._tell_pass(watch, bundle)
        elif self._send(watch, data):
            self._told(watch)
        else:
            for bundle in bundles:
                self._mark(watch, bundle.drop_id, bundle.before)
            self._park(watch)

    def _told(self, watch: Watch) -> None:
        """It has heard what everybody has: the next pass may tell it at once, if nothing speaks against it."""
        if not watch.marks and not watch.is_closed:
            viewer = watch.viewer
            watch.direct, watch.dialect = viewer.direct, viewer.dialect

    def _send(self, watch: Watch, data: bytes) -> bool:
        if not data:
            return True
        self._frames += 1
        return watch.viewer.send(data)

    def _mark(self, watch: Watch, drop_id: DropId, seq: int) -> None:
        """Unless it has heard even less."""
        if drop_id not in watch.marks:
            self.mark(watch, drop_id, seq)

    # One viewer --------------------------------------------------------------------------------------

    def drained(self, watch: Watch) -> None:
        """It has read what it was sent. When hundreds have at once, others have their turns between them."""
        if watch.is_closed:
            return
        if watch.parked_at is not None:
            watch.parked_at = trio.current_time()  # what it waits for now is us
        self._drained[watch] = None
        self._drained_bell.unpark()

    async def _catch_up_in_slices(self) -> None:
        drained = self._drained
        while True:
            while not drained:
                await self._drained_bell.park()
            until = trio.current_time() + CATCH_UP_S
            while drained:
                watch = next(iter(drained))
                del drained[watch]
                watch.go_on()
                if trio.current_time() > until:
                    break
            await trio.lowlevel.checkpoint()

    def catch_up(self, watch: Watch) -> None:
        """Tell a viewer what it has not heard of the drops that are marked for it, as far as it takes it."""
        if watch.parked_at is not None:
            watch.parked_at = None
            self._parked.discard(watch)
        for drop_id in list(watch.marks):
            if drop_id in watch.marks and not self._tell(watch, drop_id):
                self._park(watch)
                return

    def _tell(self, watch: Watch, drop_id: DropId) -> bool:
        """Tell it what it has not heard of one drop; False: it has no room, and heard nothing."""
        drop = self.board.drop(drop_id)
        if drop_id in watch.fetching or drop is None:  # None: another engine's now; should it come back, it is shown
            return True
        mark = watch.marks[drop_id]
        feed = self._feeds.get(drop_id) or _Feed(drop.seq, drop)
        if mark == GONE or feed.told - mark > self._history_max:
            return self._show(watch, drop, feed)
        events = feed.between(mark, feed.told)
        if events is not None:
            return self._tell_events(watch, drop, feed, events)
        if self._nursery is None or self._histories >= self._histories_waiting_max:
            return self._show(watch, drop, feed)
        self._histories += 1
        watch.fetching.add(drop_id)
        self._nursery.start_soon(self._fetch, watch, drop_id, mark)
        return True

    def _tell_events(self, watch: Watch, drop: Drop, feed: _Feed, events: Sequence[Told]) -> bool:
        """Events that end where the others who watch are, or before; none: it has heard as much as they, or more."""
        drop_id = drop.terms.id
        heard = watch.marks[drop_id]
        if events:
            news = self._news(drop_id, events)
            if news is None or len(news.events) > self._events_max:
                return self._show(watch, drop, feed)
            up_to = events[-1].event.seq
            if not self._send(watch, self._encoded_news(watch, news, heard, up_to)):
                return False
            heard = up_to
        self._heard(watch, drop_id, feed, heard)
        return True

    def _encoded_news(self, watch: Watch, news: News, after: int, up_to: int) -> bytes:
        dialect = watch.viewer.dialect
        if watch.user_id is not None:
            return dialect.news(news, watch.user_id)
        return self._encoded((dialect, news.drop.terms.id, after, up_to), lambda: dialect.news(news, None))

    def _encoded(self, key: tuple[object, ...], encode: Callable[[], bytes]) -> bytes:
        data = self._kept.get(key)
        if data is None:
            if len(self._kept) >= KEPT_MAX:
                self._kept.clear()
            data = self._kept[key] = encode()
        return data

    def _show(self, watch: Watch, drop: Drop, feed: _Feed) -> bool:
        dialect = watch.viewer.dialect
        data = self._encoded((dialect, drop.terms.id, drop.seq), lambda: dialect.snapshot(drop))
        if not self._send(watch, data):
            return False
        self._heard(watch, drop.terms.id, feed, drop.seq)  # maybe more than the others know
        return True

    def _heard(self, watch: Watch, drop_id: DropId, feed: _Feed, seq: int) -> None:
        """In step, if that is where the others are; but not while they are being told: it would be told again."""
        if seq == feed.told and drop_id not in self._telling:
            watch.marks.pop(drop_id, None)
        else:
            watch.marks[drop_id] = seq

    async def _fetch(self, watch: Watch, drop_id: DropId, mark: int) -> None:
        """Tell it what happened from the tables, as far as those of memory do not reach."""
        try:
            async with self._reading:
                found = await self._history(drop_id, mark, self._history_max)
        except Unavailable:
            found = ()
        except Exception as bug:  # a viewer can be shown the drop instead, and everybody else goes on
            log.error("history_failed", drop_id=drop_id, exc_info=bug)
            found = ()
        finally:
            self._histories -= 1
            watch.fetching.discard(drop_id)
        if watch.parked_at is not None or watch.is_closed:
            return
        drop = self.board.drop(drop_id)
        if watch.marks.get(drop_id) == mark and drop is not None:  # else it wants something else by now
            feed = self._feeds.get(drop_id) or _Feed(drop.seq, drop)
            events = [_with_latest(event, drop) for event in found if event.seq <= feed.told]
            if not events or [told.event.seq for told in events] != list(range(mark + 1, mark + 1 + len(events))):
                watch.marks[drop_id] = GONE
            elif not self._tell_events(watch, drop, feed, events):
                self._park(watch)
                return
        self.catch_up(watch)

    def _news(self, drop_id: DropId, events: Sequence[Told]) -> News | None:
        drop = self.board.drop(drop_id)
        if drop is None:
            return None
        stock = None
        for told in reversed(events):
            event = told.event
            if isinstance(event, (Reserved, Cancelled, Expired)):
                stock = Stock(event.seq, event.at, event.available_stock)
                break
        return News(drop, [told for told in events if type(told.event) not in STOCK_ONLY], stock)

    def _park(self, watch: Watch) -> None:
        watch.hinder()
        if watch.parked_at is None and not watch.is_closed:
            watch.parked_at = trio.current_time()
            self._parked.add(watch)

    def _send_away(self, watch: Watch) -> None:
        self._sent_away += 1
        viewer = watch.viewer
        watch.close()
        viewer.send_away()

    async def _sweep(self) -> None:
        while True:
            await trio.sleep(SWEEP_S)
            now = trio.current_time()
            for watch in [watch for watch, (until, _) in self._missed.items() if until <= now]:
                self.forget_missed(watch)
            late = now - self._stall_s
            for watch in [watch for watch in self._parked if watch.parked_at is not None and watch.parked_at < late]:
                self._send_away(watch)


STOCK_ONLY: Final = (Reserved, Cancelled)


def _line(event: Purchased) -> LatestPurchase:
    return LatestPurchase(event.hold.user_id, event.username, event.hold.qty, event.at)


def _with_latest(event: Event, drop: Drop | None) -> Told:
    """With what the drop says, if it has seen no later purchase; else that one brings them."""
    if type(event) is Purchased and drop is not None and drop.latest_purchases[:1] == (_line(event),):
        return Told(event, drop.latest_purchases)
    return Told(event)


def _fitting(events: list[Told], events_max: int) -> list[Told]:
    """The first events, up to as many as may be told at once; such as change the stock alone don't count."""
    count = 0
    for number, told in enumerate(events):
        count += type(told.event) not in STOCK_ONLY
        if count > events_max:
            return events[:number]
    return events


class _Bundle:
    """What one pass tells of one drop, encoded for each dialect once, when the first viewer of that kind comes."""

    __slots__ = ("_encoded", "_news", "before", "drop_id", "feed")

    def __init__(self, drop_id: DropId, feed: _Feed, before: int, news: News | None) -> None:
        self.drop_id = drop_id
        self.feed = feed
        self.before = before
        self._news = news
        self._encoded: dict[Dialect, bytes] = {}

    def data(self, dialect: Dialect) -> bytes:
        data = self._encoded.get(dialect)
        if data is None:
            data = self._encoded[dialect] = b"" if self._news is None else dialect.news(self._news, None)
        return data


class _Together:
    """What one pass tells of several drops, to those who watch all."""

    def __init__(self, bundles: Sequence[_Bundle]) -> None:
        self._bundles = bundles
        self._encoded: dict[Dialect, bytes] = {}

    def data(self, dialect: Dialect) -> bytes:
        data = self._encoded.get(dialect)
        if data is None:
            data = self._encoded[dialect] = b"".join(bundle.data(dialect) for bundle in self._bundles)
        return data
