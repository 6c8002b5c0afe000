"""Clients: they ask through the real handlers, with the habits that a seed gave them, and write down what they hear."""

from random import Random
from typing import Any, Final

import msgspec
import trio

from api import handlers
from api.answers import Answer, iso
from api.handlers import Request
from engine.model import DropId, Fault, FaultCode, Instant, Refused, Swept, UserId
from tests.proof.history import Ending, Kind, Operation
from tests.proof.simulation.engines import Life
from tests.proof.simulation.scenario import Habit, Scenario
from tests.proof.simulation.scheduling import Nap, sleep
from tests.proof.simulation.world import World

NO_BODY: Final = b""
REPLAYED: Final = ("Idempotency-Replayed", "true")
FOREVER_S: Final = 1e9
RETRIES: Final = 4
DROPS_MAX: Final = 9  # of which everybody asks; an engine's faults cost it a turn for each
STAMPEDE: Final = (8, 40)
WAIT_S: Final = 0.05  # beyond its deadline, that an answer may take to reach its client
# Around the instant of a deadline (s): a millisecond before, a hair before, at it, a millisecond after.
MOMENTS_S: Final = (-0.001, -0.00002, -0.00001, 0.0, 0.001)
NOT_A_DROP: Final = DropId("ffffffff-0000-7000-8000-000000000000")


class Clients:
    def __init__(self, world: World, nursery: trio.Nursery) -> None:
        self._world = world
        self._nursery = nursery
        self._scenario = world.scenario
        self._users = list(world.scenario.users)
        self._keys = 0
        self._taken: list[tuple[UserId, DropId, str]] = []  # reservations that somebody was told of
        self._used: list[str] = []  # keys

    async def one(self, number: int) -> None:
        """A client's whole life."""
        scenario, world = self._scenario, self._world
        chance = Random(f"{scenario.seed} client {number}")
        while not world.is_calm and len(world.book.operations) < scenario.operations_max:
            await sleep(chance.expovariate(1 / scenario.pause_s))
            await self._act(chance)

    async def _act(self, chance: Random) -> None:
        user, drop_id = chance.choice(self._users), self._world.some_drop(chance)
        draw = chance.random()
        looks_back = 0.4 if self._scenario.is_ending else 0.12
        if draw < looks_back:
            await self._look_back(chance, user)
        elif draw < looks_back + 0.06:
            await self._look_ahead(chance, user)
        else:
            await self._ask_what_is_usual(chance, user, drop_id)

    async def _ask_what_is_usual(self, chance: Random, user: UserId, drop_id: DropId) -> None:
        draw = chance.random()
        if draw < 0.50:
            await self._shop(chance, user, drop_id)
        elif draw < 0.57:
            await self._insist(chance, Kind.RESERVE, user, drop_id)
        elif draw < 0.65:
            await self._insist(chance, Kind.PURCHASE, user, drop_id)
        elif draw < 0.72:
            await self.ask(chance, Kind.SHOW, user, drop_id)
        elif draw < 0.75 and self._has(Habit.STAMPEDE):
            self._stampede(chance, drop_id)
        elif draw < 0.80 and self._has(Habit.CREATE) and len(self._world.drops) < DROPS_MAX:
            await self.create(chance, user)
        elif draw < 0.84 and self._has(Habit.SWEEP):
            await self.ask(chance, Kind.EXPIRE, user, drop_id)
        elif draw < 0.91 and self._has(Habit.CANCEL):
            await self._cancel_again(chance, drop_id)
        elif draw < 0.97 and self._has(Habit.STRANGE):
            await self._ask_strangely(chance, user)
        else:
            await self.ask(chance, Kind.SHOW, user, drop_id)

    def _has(self, habit: Habit) -> bool:
        return habit in self._scenario.habits

    # What they do ------------------------------------------------------------------------------------

    async def _shop(self, chance: Random, user: UserId, drop_id: DropId) -> None:
        """Reserve, think, and then buy, give back, or let it run out."""
        reserved = await self._insist(chance, Kind.RESERVE, user, drop_id)
        if reserved.ending is not Ending.OK or reserved.reservation_id is None:
            return
        draw = chance.random()
        if draw < 0.25 and self._has(Habit.LAST_MOMENT) and reserved.expires_at is not None:
            await self._wait_for(chance, drop_id, reserved.expires_at)
            kind = chance.choice([Kind.PURCHASE, Kind.PURCHASE, Kind.PURCHASE, Kind.CANCEL])
            await self._insist(chance, kind, user, drop_id, reserved.reservation_id)
            return
        await sleep(chance.random() * chance.choice([0.01, 0.1, 1.0]))
        if draw < (0.4 if self._scenario.is_ending else 0.70):
            await self._insist(chance, Kind.PURCHASE, user, drop_id)
        elif 0.70 <= draw < 0.85 and self._has(Habit.CANCEL):
            await self.ask(chance, Kind.CANCEL, user, drop_id, reserved.reservation_id)

    async def _wait_for(self, chance: Random, drop_id: DropId, deadline: int) -> None:
        life = self._world.reach(drop_id, chance)
        if life is not None:
            at = life.registry.clock.trio_time(Instant(deadline)) + chance.choice(MOMENTS_S)
            if at < trio.current_time() + self._scenario.storm_s / 4:
                await Nap().until(at)

    def _stampede(self, chance: Random, drop_id: DropId) -> None:
        for _ in range(chance.randint(*STAMPEDE)):
            self._nursery.start_soon(self._insist, chance, Kind.RESERVE, chance.choice(self._users), drop_id)

    async def _look_back(self, chance: Random, user: UserId) -> None:
        """Ask anything of a drop that one has had to do with, however that ended; or somebody else in one's place."""
        found = self._world.someone_with_a_past(chance)
        if found is None:
            return
        drop_id, owner = found
        user = owner if chance.random() < 0.8 else user
        kind = chance.choice(
            [Kind.RESERVE, Kind.RESERVE, Kind.PURCHASE, Kind.CANCEL, Kind.SHOW, Kind.EXPIRE, Kind.EXPIRE]
        )
        if kind is not Kind.CANCEL:
            await self.ask(chance, kind, user, drop_id)
            return
        told = [line[2] for line in self._taken if line[:2] == (owner, drop_id)]
        if told:
            await self.ask(chance, kind, user, drop_id, told[-1])

    async def _look_ahead(self, chance: Random, user: UserId) -> None:
        """Ask for what is not on sale yet."""
        drop_id = self._world.a_future_drop(chance)
        if drop_id is not None:
            kind = chance.choice([Kind.RESERVE, Kind.PURCHASE, Kind.SHOW, Kind.EXPIRE])
            await self.ask(chance, kind, user, drop_id)

    async def _cancel_again(self, chance: Random, drop_id: DropId) -> None:
        """One's own, whatever has become of it."""
        if self._taken:
            user, drop_id, reservation_id = chance.choice(self._taken[-40:])
            await self.ask(chance, Kind.CANCEL, user, drop_id, reservation_id)

    async def _ask_strangely(self, chance: Random, user: UserId) -> None:
        """A drop that is not there, a reservation of somebody else, a key that was used."""
        drop_id = chance.choice([NOT_A_DROP, self._world.some_drop(chance)])
        match chance.randrange(4):
            case 0:
                await self.ask(chance, chance.choice([Kind.RESERVE, Kind.PURCHASE, Kind.SHOW]), user, drop_id)
            case 1:
                taken = chance.choice(self._taken) if self._taken and drop_id != NOT_A_DROP else None
                _, drop_id, reservation_id = taken or (user, NOT_A_DROP, NOT_A_DROP)
                await self.ask(chance, Kind.CANCEL, user, drop_id, reservation_id)
            case 2 if self._used and self._has(Habit.REUSE):
                key = chance.choice(self._used)
                await self.ask(chance, chance.choice([Kind.RESERVE, Kind.PURCHASE]), user, drop_id, key=key)
            case _:
                await self.ask(chance, Kind.EXPIRE, user, drop_id)

    async def _insist(
        self, chance: Random, kind: Kind, user: UserId, drop_id: DropId, reservation_id: str | None = None
    ) -> Operation:
        """Ask; and again under the same key, for those who do that; and twice at once, for those."""
        has_key = chance.random() < self._scenario.keyed and kind is not Kind.CANCEL
        key = self._new_key() if has_key else None
        if self._has(Habit.TWINS) and chance.random() < 0.2:
            self._nursery.start_soon(self.ask, chance, kind, user, drop_id, reservation_id, key)
        for attempt in range(RETRIES):
            operation = await self.ask(chance, kind, user, drop_id, reservation_id, key)
            is_vague = operation.ending is Ending.UNKNOWN or operation.seq is None
            if operation.ending is Ending.OK or not is_vague or not self._has(Habit.RETRY):
                break
            if chance.random() < 0.3 or self._world.is_calm:
                break
            await sleep(chance.random() * 0.2 * 2**attempt)
        return operation

    def _new_key(self) -> str:
        self._keys += 1
        key = f"key-{self._keys}"
        self._used.append(key)
        return key

    # Asking ------------------------------------------------------------------------------------------

    async def ask(
        self,
        chance: Random,
        kind: Kind,
        user: UserId,
        drop_id: DropId,
        reservation_id: str | None = None,
        key: str | None = None,
    ) -> Operation:
        """Ask once, and wait as long as this client does."""
        world, book = self._world, self._world.book
        life = world.reach(drop_id, chance)
        is_on_board = life is not None and life.registry.board.drop(drop_id) is not None
        if kind is Kind.EXPIRE and life is not None and not is_on_board:
            kind = Kind.SHOW  # nothing of it is due here
        elif kind is Kind.EXPIRE and drop_id == NOT_A_DROP:
            kind = Kind.SHOW
        asked_for = reservation_id if kind is Kind.CANCEL else None
        operation = book.begin(kind, user, drop_id, key=key, reservation_id=asked_for)
        if life is None:
            book.not_sent(operation)
            return operation
        world.note(kind, drop_id, user)
        patience_s = FOREVER_S
        if self._has(Habit.GIVE_UP) and chance.random() < 0.1:
            patience_s = chance.choice([0.0005, 0.01, 0.2])
        began = trio.current_time()
        if kind is Kind.EXPIRE:
            await self._sweep(operation, life, patience_s)
        else:
            self._hear(operation, life, await _answer(life, operation, patience_s))
        waited_s = trio.current_time() - began
        if waited_s > life.answer_s + WAIT_S:
            world.object(f"I18: #{operation.number} {kind} waited {waited_s:.3f} s for its answer")
        return operation

    async def create(
        self,
        chance: Random,
        user: UserId,
        *,
        total_stock: int | None = None,
        status: str | None = None,
    ) -> Operation:
        world = self._world
        total_stock = chance.choice([0, 0, 1, 1, 2, 5, 40]) if total_stock is None else total_stock
        if self._scenario.is_ending:
            total_stock = min(total_stock, 2)
        key = self._new_key() if chance.random() < self._scenario.keyed else None
        operation = world.book.begin(Kind.CREATE, user, "", key=key, total_stock=total_stock)
        life = world.reach(NOT_A_DROP, chance)
        if life is None:
            world.book.not_sent(operation)
            return operation
        world.note(Kind.CREATE, NOT_A_DROP, user)
        body = _new_drop(chance, life, total_stock, status, self._scenario, f"drop {operation.number}")
        request = Request(_headers(user, key) | {"content-type": "application/json"}, {}, {}, body, "")
        service = life.service
        assert service is not None
        creating = handlers.create_drop(service, request)
        self._hear(operation, life, await life.answer_in_trio(request, creating, FOREVER_S))
        if operation.ending is Ending.OK:
            world.drops.append(DropId(operation.drop_id))
        return operation

    def _hear(self, operation: Operation, life: Life, answer: Answer | None) -> None:
        if answer is None:
            return
        book = self._world.book
        book.answered(operation, answer.status_code, answer.body, is_replayed=REPLAYED in answer.headers)
        if answer.status_code == 500:
            self._world.object(f"#{operation.number} {operation.kind} failed inside: {answer.body!r}")
        if operation.ending is Ending.OK and operation.kind is Kind.RESERVE and operation.reservation_id is not None:
            self._taken.append((UserId(operation.user_id), DropId(operation.drop_id), operation.reservation_id))
        elif operation.code == "DROP_OWNED_ELSEWHERE":
            self._world.lead_elsewhere(DropId(operation.drop_id), life)

    async def _sweep(self, operation: Operation, life: Life, patience_s: float) -> None:
        outcome = await life.sweep(DropId(operation.drop_id), patience_s)
        if outcome is None:
            return
        swept, operation.epoch = outcome
        if isinstance(swept, Swept):
            operation.ending, operation.seq, operation.code = Ending.OK, swept.seq, ""
        else:
            assert isinstance(swept, Fault | Refused), swept
            operation.code = swept.code.value
            is_unknown = operation.code == "OUTCOME_UNKNOWN"
            operation.ending = Ending.UNKNOWN if is_unknown else Ending.REFUSED
        self._world.book.ended(operation)


def _headers(user: UserId, key: str | None) -> dict[str, str]:
    return {"x-user-id": user} if key is None else {"x-user-id": user, "idempotency-key": key}


async def _answer(life: Life, operation: Operation, patience_s: float) -> Answer | None:
    service = life.service
    assert service is not None
    request = Request(_headers(UserId(operation.user_id), operation.key), {}, {"id": operation.drop_id}, NO_BODY, "")
    match operation.kind:
        case Kind.RESERVE:
            return await life.answer(request, handlers.reserve(service, request), patience_s)
        case Kind.PURCHASE:
            return await life.answer(request, handlers.purchase(service, request), patience_s)
        case Kind.CANCEL:
            request.path = {"id": operation.reservation_id or ""}
            return await life.answer(request, handlers.cancel_reservation(service, request), patience_s)
        case _:
            assert operation.kind is Kind.SHOW, operation.kind
            showing = handlers.show_drop(service, request)
            return await life.answer(request, showing, patience_s, FaultCode.UNAVAILABLE)


def _new_drop(chance: Random, life: Life, total_stock: int, status: str | None, scenario: Scenario, name: str) -> bytes:
    """A drop of any status that can be asked for, some with a start or an end within the storm."""
    now = life.registry.clock.now()
    body: dict[str, Any] = {"name": name, "price": 100, "total_stock": total_stock}
    status = status or chance.choice(["live", "live", "scheduled", "draft"])
    if status == "scheduled":
        body["starts_at"] = iso(Instant(now + int(1000 * chance.uniform(0.5, 0.19 * scenario.storm_s))))
    else:
        body["status"] = status
    storm_s = scenario.storm_s
    if chance.random() < scenario.ending:
        body["ends_at"] = iso(Instant(now + int(1000 * storm_s * chance.choice([0.2, 0.2, 0.5, 0.8]))))
    return msgspec.json.encode(body)
