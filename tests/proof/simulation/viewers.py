"""Viewers on the hub: they come, stall, come back to where they were, and leave; what each is shown is written down."""

from collections.abc import Callable
from random import Random
from typing import Final

import msgspec
import trio

from api import feed
from engine.drop import Drop
from engine.hub import News, Watch
from engine.model import DropId, UserId
from tests.proof.history import Delivery
from tests.proof.simulation.engines import Life
from tests.proof.simulation.scheduling import sleep
from tests.proof.simulation.world import World

PAUSE_S: Final = 4.0  # of a viewer between two whims
AWAY_S: Final = 0.2


class Line(msgspec.Struct, array_like=True, gc=False):
    """One message, as short as it can be."""

    drop_id: DropId
    seq: int
    type: str  # "" of a snapshot
    available_stock: int | None


_encode = msgspec.json.encode
_decode = msgspec.json.Decoder(Line).decode


class Dialect:
    """The contract's messages, without what nobody checks here."""

    def news(self, news: News, user_id: UserId | None) -> bytes:
        drop_id = news.drop.terms.id
        return b"".join(
            _encode(Line(drop_id, message.seq, message.name, message.data.get("availableStock"))) + b"\n"
            for message in feed.messages(news)
            if message.only_for is None or message.only_for == user_id
        )

    def snapshot(self, drop: Drop) -> bytes:
        return _encode(Line(drop.terms.id, drop.seq, "", drop.available)) + b"\n"


class Viewer:
    """One that comes again and again, mostly to go on where it was; else, and on another machine, as somebody new."""

    def __init__(self, world: World, number: int) -> None:
        self._world = world
        self._chance = Random(f"{world.scenario.seed} viewer {number}")
        self._numbers: dict[int, int] = {}  # what it is called on each machine
        self._positions: dict[int, dict[DropId, int]] = {}  # how far it has heard there
        self._life: Life | None = None
        self._watch: Watch | None = None
        self._gone = trio.Event()
        self._room: int | None = None  # bytes that it takes yet; None: any number
        self._rest = b""  # that it did not take
        self._begun = b""  # the first part of a line
        self.dialect = DIALECT

    # For the hub -------------------------------------------------------------------------------------

    def send(self, data: bytes) -> bool:
        if self._rest:
            return False
        try:
            taken = self._take(data)
        except BlockingIOError:
            taken = 0
        if taken < len(data):
            self.keep(data[taken:])
        return True

    @property
    def direct(self) -> Callable[[bytes], int] | None:
        return None if self._rest else self._take

    def keep(self, rest: bytes) -> None:
        self._rest += rest
        if self._watch is not None:
            self._watch.hinder()

    def send_away(self) -> None:
        self._gone.set()

    def _take(self, data: bytes) -> int:
        """As a socket does: at most what there is room for."""
        life = self._life
        if life is None or life.mortal.is_dead:
            return len(data)  # into the void
        taken = data if self._room is None else data[: self._room]
        if not taken:
            raise BlockingIOError
        if self._room is not None:
            self._room -= len(taken)
        self._hear(life, taken)
        return len(taken)

    def _hear(self, life: Life, data: bytes) -> None:
        machine, book = life.machine.number, self._world.book
        positions = self._positions[machine]
        *lines, self._begun = (self._begun + data).split(b"\n")
        for text in lines:
            line = _decode(text)
            positions[line.drop_id] = line.seq
            delivery = Delivery(
                self._numbers[machine],
                line.drop_id,
                line.seq,
                not line.type,
                book.stamp(),
                line.type,
                line.available_stock,
            )
            book.deliveries.append(delivery)

    def watched(self) -> dict[tuple[int, DropId], int]:
        """Of what it has heard of and watches now: by what it is called there and by drop, the newest `seq`."""
        watch, life = self._watch, self._life
        if watch is None or life is None or not life.serves:
            return {}
        machine, board = life.machine.number, life.registry.board
        # Who watches all is shown what is listed; of what is looked up later, and was over then, nobody tells.
        listed = {drop.terms.id for drop in board.listed(len(self._world.drops), 0)[0]} if watch.is_all else set()
        return {
            (self._numbers[machine], drop_id): drop.seq
            for drop_id in self._positions[machine]
            if (drop_id in listed or drop_id in watch.drops) and (drop := board.drop(drop_id)) is not None
        }

    # Its life ----------------------------------------------------------------------------------------

    async def live(self) -> None:
        """Until it is cancelled."""
        while True:
            serving = self._world.lives()
            if serving:
                await self._visit(self._chance.choice(serving))
            await sleep(self._chance.random() * AWAY_S)

    async def _visit(self, life: Life) -> None:
        chance, machine = self._chance, life.machine.number
        if machine not in self._numbers or chance.random() < 0.2:
            self._numbers[machine], self._positions[machine] = self._world.new_viewer(), {}
        positions = self._positions[machine]
        self._life, self._gone, self._room = life, trio.Event(), None
        self._rest = self._begun = b""
        watch = self._watch = life.hub.watch(self)
        life.connections[self._gone.set] = None
        try:
            if chance.random() < 0.5:
                watch.identify(chance.choice(list(self._world.scenario.users)))
            self._subscribe(watch, positions)
            while not self._gone.is_set():
                with trio.move_on_after(chance.expovariate(1 / PAUSE_S)):
                    await self._gone.wait()
                    break
                if self._world.is_calm:
                    self.read()
                elif not self._has_a_whim(watch, positions):
                    break
        finally:
            life.connections.pop(self._gone.set, None)
            if not life.mortal.is_dead:
                watch.close()
            self._life = self._watch = None

    def _has_a_whim(self, watch: Watch, positions: dict[DropId, int]) -> bool:
        """Stall, read on, look at something else; False: leave."""
        match self._chance.randrange(8):
            case 0:
                self._room = self._chance.choice([0, 20, 100, 700])
            case 1 | 2 | 3:
                self.read()
            case 4 | 5:
                self.read()  # else it would ask for what is on its way already
                self._subscribe(watch, positions)
            case 6:
                watch.unsubscribe(self._some())
            case _:
                return False
        return True

    def _subscribe(self, watch: Watch, positions: dict[DropId, int]) -> None:
        if self._chance.random() < 0.4:
            # Who watches all is not shown what is not listed.
            if watch.subscribe_all(dict(positions)) and self._life is not None:
                # There was no room for all of them, and it has been told so: of those it has missed what it has missed.
                self._numbers[self._life.machine.number] = self._world.new_viewer()
                positions.clear()
            return
        resume = positions if self._chance.random() < 0.7 else {}
        shown = [drop_id for drop_id in self._some() if watch._hub.board.drop(drop_id) is not None]
        watch.subscribe(shown, {drop_id: resume[drop_id] for drop_id in shown if drop_id in resume})

    def _some(self) -> list[DropId]:
        drops = self._world.drops
        return self._chance.sample(drops, self._chance.randint(1, len(drops)))

    def read(self) -> None:
        """Take everything that it has left, and whatever comes."""
        self._room = None
        if self._watch is not None and self._life is not None:
            rest, self._rest = self._rest, b""
            self._hear(self._life, rest)
            self._watch.drained()


DIALECT: Final = Dialect()
