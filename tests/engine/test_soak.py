"""The whole engine under random faults, minutes of its time in a second of ours; judged by `stage` at the end.

Replay a failure with the line that it prints; one seed gives one history.
"""

from random import Random, randrange
from typing import Any

import trio
from trio.testing import MockClock

from engine.model import Command, Create, Decision, DropId, DropStatus, Fault, Receipt, Reserved, StoredAnswer, UserId
from engine.registry import Limits
from tests.engine.making import cancel, purchase, reserve, terms
from tests.engine.stage import PickyLedger, Stage, has_no_room_for_rows, stage
from tests.fakes import Trouble

SEEDS = 8
TROUBLED_S = 45.0
# The longest pause of a drop that restarts is 10 s; after that everything serves again.
RECOVERED_S = 12.0
DROPS = [DropId(f"drop-{number}") for number in range(4)]
USERS = [UserId(f"user-{number}") for number in range(12)]
CHANCES = {
    Trouble.REJECTED: 0.05,
    Trouble.STORAGE_FULL: 0.03,
    Trouble.UNAVAILABLE: 0.01,
    Trouble.LOST_AFTER_COMMIT: 0.01,
    Trouble.LOST_BEFORE_COMMIT: 0.01,
    Trouble.LOST_AND_LATE: 0.01,
}
# Small, so that all of them are met.
LIMITS = Limits(in_flight_max=60, mailbox_max=25, part_max=6, batch_max=10)


def test_under_random_faults_everything_stays_true() -> None:
    first = randrange(10**9)
    for seed in range(first, first + SEEDS):
        try:
            soak(seed)
        except BaseException as error:
            error.add_note(f"replay: python -c 'from tests.engine.test_soak import soak; soak({seed})'")
            raise


def soak(seed: int) -> None:
    # Without these Trio shuffles the tasks of each turn by an entropy of its own.
    scheduler: Any = trio._core._run
    was = scheduler._ALLOW_DETERMINISTIC_SCHEDULING
    scheduler._ALLOW_DETERMINISTIC_SCHEDULING = True
    scheduler._r.seed(seed)
    try:
        trio.run(Soak(seed).run, clock=MockClock(autojump_threshold=0))
    finally:
        scheduler._ALLOW_DETERMINISTIC_SCHEDULING = was


class Soak:
    def __init__(self, seed: int) -> None:
        self.chance = Random(seed)
        self.ids = 0
        self.lost: set[DropId] = set()
        self.is_troubled = True

    async def run(self) -> None:
        ledger = PickyLedger(latency_s=self.chance.choice([0.002, 0.02, 0.1]))
        ledger._random = Random(self.chance.random())
        async with stage(ledger, LIMITS) as on:
            for number, drop_id in enumerate(DROPS):
                await on.make_drop(self.chance.choice([1, 3, 40]), drop_id, ends_at=40_000 if number == 3 else None)
            ledger.chances = dict(CHANCES)
            async with trio.open_nursery() as nursery:
                for _ in range(15):
                    nursery.start_soon(self.client, on)
                nursery.start_soon(self.maker, on)
                await self.trouble(on, ledger)
                self.is_troubled = False
            ledger.chances = {}
            await trio.sleep(RECOVERED_S)
            await self.all_serve_again(on)

    async def client(self, on: Stage) -> None:
        chance = self.chance
        while self.is_troubled:
            for _ in range(50 if chance.random() < 0.01 else 1):  # now and then a stampede
                self.ask(on)
            await trio.sleep(chance.random() * chance.choice([0.01, 0.1, 1.0]))

    def ask(self, on: Stage) -> None:
        chance, user, drop_id = self.chance, self.chance.choice(USERS), self.chance.choice(DROPS)
        draw = chance.random()
        command: Command
        if draw < 0.6:
            qty, hold_ms = chance.choice([1, 1, 1, 2]), chance.choice([20, 100, 300, 2_000])
            command = reserve(user, self.new_id(), qty=qty, hold_ms=hold_ms)
        elif draw < 0.7:
            command = purchase(user, self.new_id())
        elif draw < 0.999:
            drop = on.registry.board.drop(drop_id)
            hold = None if drop is None else drop.holds.get(user)
            command = cancel(user, "none" if hold is None else hold.id)
        else:
            command = reserve(user, self.new_id(), qty=0)  # an assertion stops the drop
        receipt = Receipt(user, "any", self.new_id(), b"", rendered) if chance.random() < 0.3 else None
        on.ask(command, drop_id, receipt)

    async def maker(self, on: Stage) -> None:
        """New drops in the middle of it all."""
        while self.is_troubled:
            create = Create(terms(1, drop_id=DropId(self.new_id()), created_at=on.clock.now()), DropStatus.LIVE)
            await on.create(create)
            await trio.sleep(self.chance.random() * 3)

    async def trouble(self, on: Stage, ledger: PickyLedger) -> None:
        chance = self.chance
        until = trio.current_time() + TROUBLED_S
        while trio.current_time() < until:
            await trio.sleep(chance.random() * 4)
            match chance.randrange(5):
                case 0:
                    ledger.is_down = True
                case 1:
                    ledger.freeze()
                case 2:
                    ledger.judge = has_no_room_for_rows
                case 3 if chance.random() < 0.15:
                    self.lost.add(rivals := chance.choice(DROPS))
                    ledger.rival_takes(rivals)
            await trio.sleep(chance.choice([0.01, 0.5, 2.0, 7.0]) * chance.random())
            ledger.is_down = False
            ledger.thaw()
            ledger.judge = None

    async def all_serve_again(self, on: Stage) -> None:
        for drop in on.registry.board.drops():
            if drop.terms.id not in self.lost:
                overdue = [hold for hold in drop.holds.values() if hold.expires_at + 500 < on.clock.now()]
                assert not overdue, "due, and not expired"
        answers = [on.ask(reserve(UserId("last"), self.new_id()), id_) for id_ in DROPS if id_ not in self.lost]
        await trio.sleep(2)
        assert not any(isinstance(answer.outcome, Fault | None) for answer in answers), "not served within 2 s"
        assert any(isinstance(answer.outcome, Reserved) for answer in on.answers)

    def new_id(self) -> str:
        self.ids += 1
        return f"id-{self.ids}"


def rendered(decision: Decision) -> StoredAnswer:
    return StoredAnswer(200, repr(decision).encode())
