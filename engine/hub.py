"""The hub: committed events, on their way to everybody who watches.

`committed` is synchronous and short: it notes the event and rings. A pass, at most 20 times a second, tells each
drop's viewers what has changed since the pass before: of its stock only the newest, of everything else each event.
What is told is encoded once for each kind of client, and leaves in slices, with other tasks between them.

    in step       a viewer has heard every pass so far: it costs one `send` a pass, and nothing is kept for it
    marked        for some drops it has heard less (it was busy, it has just come, it came back with a position):
                  per drop, the `seq` up to which it has heard. It is told the rest from the ring of newest events,
                  what is older than that from the tables, or it gets a snapshot: never a gap that goes unsaid
    parked        it did not read: nothing is tried before it has; after `stall_s` it is sent away

A viewer that reads slowly therefore costs a number for each drop that it watches, whatever happens there.
"""

from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Final, Protocol

import msgspec
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

PASS_S: Final = 0.05  # between two passes: 20 a second, as often as an eye can tell
SLICE: Final = 128  # viewers told before other tasks have their turn: half a millisecond
RING_MAX: Final = 100_000  # newest events kept in memory, over all drops: about 20 MB
EVENTS_MAX: Final = 256  # of one drop that a viewer is told after the fact; for more it gets a snapshot
MARKS_MAX: Final = 2_000  # drops of which a viewer has heard less than was told; with more it is sent away
STALL_S: Final = 20.0  # that a viewer may leave unread what it was sent
SWEEP_S: Final = 1.0
HISTORY_MAX: Final = 1_000  # changes that are read from the tables for a viewer that came back; beyond, a snapshot
HISTORIES_MAX: Final = 8  # such reads at once
BUNDLES_MAX: Final = 64  # drops in one send to those who watch all: some 16 KiB
GONE: Final = -1  # a mark: it has heard nothing of this drop


class Stock(msgspec.Struct, frozen=True, gc=False):
    """What is available after `seq`, decided at `at`."""

    seq: int
    at: Instant
    available: int


class Told(msgspec.Struct, frozen=True, gc=False):
    """An event, and the drop's newest purchases after it, newest first, if it is one."""

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

    def send_away(self) -> None:
        """It is too slow: close, and ask it to come again later."""
        ...


class HubStatistics(msgspec.Struct, frozen=True):
    viewers: int
    parked: int
    passes: int
    frames: int  # sends of news to viewers
    sent_away: int
    ring: int


class Watch:
    """A viewer, and what it watches. Made by `Hub.watch`; `close` it in the end."""

    __slots__ = ("_hub", "drops", "fetching", "is_all", "is_closed", "marks", "parked_at", "user_id", "viewer")

    def __init__(self, hub: "Hub", viewer: Viewer) -> None:
        self.viewer = viewer
        self.user_id: UserId | None = None
        self.drops: set[DropId] = set()
        self.is_all = False
        self.is_closed = False
        self.marks: dict[DropId, int] = {}
        self.fetching: set[DropId] = set()
        self.parked_at: float | None = None
        self._hub = hub

    def identify(self, user_id: UserId) -> None:
        """From now on it hears what concerns this user alone, too."""
        self._hub.identify(self, user_id)

    def subscribe(self, drops: Iterable[DropId], resume: Mapping[DropId, int] | None = None) -> None:
        """Watch these drops, which are on the board, too: each is shown, or what happened to it since `resume`.

        A drop that is watched already is shown again.
        """
        for drop_id in drops:
            if not self.is_all and drop_id not in self.drops:
                self.drops.add(drop_id)
                self._hub.join(self, drop_id)
            self._mark(drop_id, resume)
        self.go_on()

    def subscribe_all(self, resume: Mapping[DropId, int] | None = None, *, is_shown: bool = True) -> None:
        """Watch every drop, those to come too. With `is_shown` the listed ones are shown, and those of `resume`."""
        self.unsubscribe(list(self.drops))
        if not self.is_all:
            self.is_all = True
            self._hub.join_all(self)
        if is_shown:
            board = self._hub.board
            listed, _ = board.listed(MARKS_MAX, 0)
            known = [drop_id for drop_id in resume or {} if board.drop(drop_id) is not None]
            for drop_id in [*(drop.terms.id for drop in listed), *known][:MARKS_MAX]:
                self._mark(drop_id, resume)
        self.go_on()

    def unsubscribe(self, drops: Iterable[DropId]) -> None:
        for drop_id in drops:
            if drop_id in self.drops:
                self.drops.discard(drop_id)
                self.marks.pop(drop_id, None)
                self._hub.leave(self, drop_id)

    def unsubscribe_all(self) -> None:
        self.unsubscribe(list(self.drops))
        self.marks.clear()
        if self.is_all:
            self.is_all = False
            self._hub.leave_all(self)

    def go_on(self) -> None:
        """The viewer has room again: tell it what it has not heard, as far as it takes it."""
        if not self.is_closed:
            self._hub.catch_up(self)

    def close(self) -> None:
        if not self.is_closed:
            self.unsubscribe_all()
            self.is_closed = True
            self._hub.forget(self)

    def _mark(self, drop_id: DropId, resume: Mapping[DropId, int] | None) -> None:
        drop = self._hub.board.drop(drop_id)
        seq = (resume or {}).get(drop_id, GONE)
        # A position beyond what is committed is none of ours.
        self.marks[drop_id] = seq if drop is not None and 0 < seq <= drop.seq else GONE


class _Feed:
    """One drop's newest events, and who watches it."""

    __slots__ = ("events", "latest", "told", "watches")

    def __init__(self, told: int, latest: tuple[LatestPurchase, ...]) -> None:
        self.events: deque[Told] = deque()  # without a gap
        self.told = told  # the `seq` up to which every viewer in step has heard
        self.latest = latest
        self.watches: dict[Watch, None] = {}

    @property
    def newest(self) -> int:
        return self.events[-1].event.seq if self.events else self.told

    def between(self, after: int, up_to: int) -> list[Told] | None:
        """The events after one `seq`, up to another; None if not all of them are here."""
        if after >= up_to:
            return []
        if not self.events or self.events[0].event.seq > after + 1:
            return None
        first = self.events[0].event.seq
        return list(islice(self.events, after + 1 - first, up_to + 1 - first))


History = Callable[[DropId, int, int], Awaitable[Sequence[Event]]]
"""Events of a drop after a `seq`, at most so many, in order, from the tables; raises `Unavailable`."""


class Hub:
    """`run` it in a nursery. The publisher tells `committed` and `replaced`."""

    def __init__(self, board: Board, history: History, *, pass_s: float = PASS_S, stall_s: float = STALL_S) -> None:
        self.board = board
        self._history = history
        self._pass_s = pass_s
        self._stall_s = stall_s
        self._feeds: dict[DropId, _Feed] = {}
        self._ring: deque[DropId] = deque()  # whose event each one is, oldest first
        self._dirty: dict[DropId, None] = {}
        self._bell = trio.lowlevel.ParkingLot()
        self._watches: set[Watch] = set()
        self._all: dict[Watch, None] = {}
        self._users: dict[UserId, set[Watch]] = {}
        self._parked: set[Watch] = set()
        self._reading = trio.CapacityLimiter(HISTORIES_MAX)
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
            drop = self.board.drop(drop_id)
            latest = () if drop is None else drop.latest_purchases
            # The board is ahead of us by what this event was committed with.
            feed = _Feed(event.seq - 1, tuple(line for line in latest if line.created_at < event.at))
            self._feeds[drop_id] = feed
        told_latest = None
        if type(event) is Purchased:
            line = LatestPurchase(event.hold.user_id, event.username, event.hold.qty, event.at)
            told_latest = feed.latest = (line, *feed.latest[: FEED_LENGTH - 1])
        if feed.newest != event.seq - 1:
            self.replaced(drop_id)  # what lies between was not published: nobody may think that nothing does
            feed.told = event.seq - 1
        feed.events.append(Told(event, told_latest))
        self._ring.append(drop_id)
        if len(self._ring) > RING_MAX:
            self._forget_oldest()
        self._dirty[drop_id] = None
        if self._bell:
            self._bell.unpark()

    def replaced(self, drop_id: DropId) -> None:
        """The drop's state was loaded anew: whoever watches it needs to be shown it again."""
        feed = self._feeds.get(drop_id)
        if feed is None:
            return
        drop = self.board.drop(drop_id)
        feed.events.clear()
        feed.told = 0 if drop is None else drop.seq
        feed.latest = () if drop is None else drop.latest_purchases
        self._dirty.pop(drop_id, None)
        for watch in (*feed.watches, *self._all):
            watch.marks[drop_id] = GONE
            if watch.parked_at is None:
                self.catch_up(watch)

    def _forget_oldest(self) -> None:
        drop_id = self._ring.popleft()
        feed = self._feeds.get(drop_id)
        if feed is None or not feed.events:
            return
        oldest = feed.events.popleft().event.seq
        if oldest > feed.told:  # so far behind are the passes: those who watch are shown the drop instead
            for watch in (*feed.watches, *self._all):
                watch.marks[drop_id] = GONE
            feed.told = oldest
        self._tidy(drop_id, feed)

    # Viewers -----------------------------------------------------------------------------------------

    def watch(self, viewer: Viewer) -> Watch:
        watch = Watch(self, viewer)
        self._watches.add(watch)
        return watch

    def forget(self, watch: Watch) -> None:
        self._watches.discard(watch)
        self._parked.discard(watch)
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
        feed = self._feeds.get(drop_id)
        if feed is not None:
            feed.watches.pop(watch, None)
            self._tidy(drop_id, feed)

    def join_all(self, watch: Watch) -> None:
        self._all[watch] = None
        for drop_id in self._dirty:  # told in the next pass, to those who were here; it has not seen them at all
            watch.marks.setdefault(drop_id, GONE)

    def leave_all(self, watch: Watch) -> None:
        self._all.pop(watch, None)

    def _feed(self, drop_id: DropId) -> _Feed:
        feed = self._feeds.get(drop_id)
        if feed is None:
            drop = self.board.drop(drop_id)
            latest = () if drop is None else drop.latest_purchases
            feed = self._feeds[drop_id] = _Feed(0 if drop is None else drop.seq, latest)
        return feed

    def _tidy(self, drop_id: DropId, feed: _Feed) -> None:
        if not feed.events and not feed.watches:
            del self._feeds[drop_id]

    # Passes ------------------------------------------------------------------------------------------

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._sweep)
            while True:
                while not self._dirty:
                    await self._bell.park()
                began = trio.current_time()
                await self._pass()
                await trio.sleep_until(began + self._pass_s)

    async def _pass(self) -> None:
        self._passes += 1
        dirty, self._dirty = self._dirty, {}
        batch = [self._begin(drop_id) for drop_id in dirty]
        sent = 0
        watching_all = list(self._all)
        for bundle in batch:
            for watch in list(bundle.feed.watches):
                if bundle.drop_id in watch.drops:
                    self._tell_pass(watch, bundle)
                    sent += 1
                    if sent % SLICE == 0:
                        await trio.lowlevel.checkpoint()
        for bundles in _chunks(batch) if len(batch) > 1 else (batch,):
            together: dict[Dialect, bytes] = {}
            for watch in watching_all:
                if not watch.is_all:
                    continue
                if len(bundles) == 1 or watch.marks or watch.parked_at is not None:
                    for bundle in bundles:
                        self._tell_pass(watch, bundle)
                else:
                    self._tell_together(watch, bundles, together)
                sent += 1
                if sent % SLICE == 0:
                    await trio.lowlevel.checkpoint()

    def _begin(self, drop_id: DropId) -> "_Bundle":
        """What this pass tells of a drop; from here on, who is not marked counts as told."""
        feed = self._feeds[drop_id]
        before, feed.told = feed.told, feed.newest
        events = feed.between(before, feed.told) or []
        for told in events:
            event = told.event
            if type(event) is Expired and event.hold.user_id in self._users:
                for watch in self._users[event.hold.user_id]:
                    if watch.is_all or drop_id in watch.drops:
                        watch.marks.setdefault(drop_id, before)  # its news are not everybody's
        return _Bundle(drop_id, feed, before, self._news(drop_id, events))

    def _tell_pass(self, watch: Watch, bundle: "_Bundle") -> None:
        if watch.parked_at is not None:
            self._mark(watch, bundle)
            return
        if watch.marks and bundle.drop_id in watch.marks:
            is_taken = self._tell(watch, bundle.drop_id)
        else:
            self._frames += 1
            data = bundle.data(watch.viewer.dialect)
            is_taken = not data or watch.viewer.send(data)
            if not is_taken:
                self._mark(watch, bundle)
        if not is_taken:
            self._park(watch)

    def _tell_together(self, watch: Watch, bundles: Sequence["_Bundle"], together: dict[Dialect, bytes]) -> None:
        dialect = watch.viewer.dialect
        data = together.get(dialect)
        if data is None:
            data = together[dialect] = b"".join(bundle.data(dialect) for bundle in bundles)
        self._frames += 1
        if data and not watch.viewer.send(data):
            for bundle in bundles:
                self._mark(watch, bundle)
            self._park(watch)

    def _mark(self, watch: Watch, bundle: "_Bundle") -> None:
        watch.marks.setdefault(bundle.drop_id, bundle.before)
        if len(watch.marks) > MARKS_MAX and not watch.is_closed:
            self._send_away(watch)

    # One viewer --------------------------------------------------------------------------------------

    def catch_up(self, watch: Watch) -> None:
        """Tell a viewer what it has not heard of the drops that are marked for it, as far as it takes it."""
        if watch.parked_at is not None:
            watch.parked_at = None
            self._parked.discard(watch)
        for drop_id in list(watch.marks):
            if not self._tell(watch, drop_id):
                self._park(watch)
                return

    def _tell(self, watch: Watch, drop_id: DropId) -> bool:
        """Tell it what it has not heard of one drop; False: it has no room, and heard nothing."""
        if drop_id in watch.fetching:
            return True
        mark = watch.marks[drop_id]
        drop = self.board.drop(drop_id)
        if drop is None:
            del watch.marks[drop_id]  # another engine's now
            return True
        feed = self._feed(drop_id)
        if mark == GONE:
            return self._show(watch, drop, feed)
        if mark >= feed.told:
            if mark == feed.told:
                del watch.marks[drop_id]
            return True
        events = feed.between(mark, feed.told)
        if events is None:
            if feed.told - mark > HISTORY_MAX or self._nursery is None:
                return self._show(watch, drop, feed)
            watch.fetching.add(drop_id)
            self._nursery.start_soon(self._fetch, watch, drop_id, mark)
            return True
        return self._tell_events(watch, drop, feed, events)

    def _tell_events(self, watch: Watch, drop: Drop, feed: _Feed, events: Sequence[Told]) -> bool:
        """Events that end where the others who watch are, or before."""
        drop_id = drop.terms.id
        news = self._news(drop_id, events)
        if news is None:
            return True
        if len(news.events) > EVENTS_MAX:
            return self._show(watch, drop, feed)
        self._frames += 1
        data = watch.viewer.dialect.news(news, watch.user_id)
        if data and not watch.viewer.send(data):
            return False
        heard = events[-1].event.seq if events else feed.told
        if heard == feed.told:
            del watch.marks[drop_id]
        else:
            watch.marks[drop_id] = heard
        return True

    def _show(self, watch: Watch, drop: Drop, feed: _Feed) -> bool:
        self._frames += 1
        data = watch.viewer.dialect.snapshot(drop)
        if data and not watch.viewer.send(data):
            return False
        if drop.seq > feed.told:
            watch.marks[drop.terms.id] = drop.seq  # the next pass tells others what it knows already
        else:
            del watch.marks[drop.terms.id]
        return True

    async def _fetch(self, watch: Watch, drop_id: DropId, mark: int) -> None:
        """Tell it what happened from the tables, as far as those of memory do not reach."""
        try:
            async with self._reading:
                found = await self._history(drop_id, mark, HISTORY_MAX)
        except Unavailable:
            found = ()
        finally:
            watch.fetching.discard(drop_id)
        drop = self.board.drop(drop_id)
        if watch.is_closed or watch.marks.get(drop_id) != mark or drop is None:
            return
        feed = self._feed(drop_id)
        known = {told.event.seq: told for told in feed.events}
        events = [known.get(event.seq) or Told(event) for event in found if event.seq <= feed.told]
        is_whole = [told.event.seq for told in events] == list(range(mark + 1, mark + 1 + len(events)))
        if not events or not is_whole:
            watch.marks[drop_id] = GONE
        elif watch.parked_at is None and not self._tell_events(watch, drop, feed, events):
            self._park(watch)
        if watch.parked_at is None:
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
            late = trio.current_time() - self._stall_s
            for watch in [watch for watch in self._parked if watch.parked_at is not None and watch.parked_at < late]:
                self._send_away(watch)


STOCK_ONLY: Final = (Reserved, Cancelled)


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


def _chunks(batch: Sequence[_Bundle]) -> Iterable[Sequence[_Bundle]]:
    """Bundles that leave in one send: few enough that what is left of it when a viewer stalls is little."""
    for begin in range(0, len(batch), BUNDLES_MAX):
        yield batch[begin : begin + BUNDLES_MAX]
