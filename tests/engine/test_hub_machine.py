"""Random histories of drops and viewers, each message held against the tables (`tests.engine.watching`).

The limits are small, so that all of them are met; and a pass stops after each viewer, so that everything happens in the
middle of one, too. Replay a failure with the line that it prints; one seed gives one history.
"""

from random import Random, randrange
from typing import Any

import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from engine.drop import Drop
from engine.model import DropId, DropStatus, Sweep, UserId
from tests.engine.making import cancel, record_of
from tests.engine.watching import Listener, Watched, watched

SEEDS = 150
STEPS = 150
DROPS = [DropId(f"drop-{name}") for name in "abcd"]
USERS = [UserId(name) for name in ("ann", "ben", "cat")]
STATUSES = [DropStatus.LIVE, DropStatus.LIVE, DropStatus.PAUSED, DropStatus.ENDED]


def test_whatever_happens_viewers_hear_the_truth_in_order_and_end_up_to_date() -> None:
    first = randrange(10**9)
    for seed in range(first, first + SEEDS):
        try:
            soak(seed)
        except BaseException as error:
            error.add_note(f"replay: python -c 'from tests.engine.test_hub_machine import soak; soak({seed})'")
            raise


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=False))
def test_the_same_for_the_smallest_history_that_fails(chance: Random) -> None:
    play(chance, 0, 40)


def soak(seed: int) -> None:
    play(Random(seed), seed, STEPS)


def play(chance: Random, seed: int, steps: int) -> None:
    # Without these Trio shuffles the tasks of each turn by an entropy of its own.
    scheduler: Any = trio._core._run
    was = scheduler._ALLOW_DETERMINISTIC_SCHEDULING
    scheduler._ALLOW_DETERMINISTIC_SCHEDULING = True
    scheduler._r.seed(seed)
    try:
        trio.run(Play(chance, steps).run, clock=MockClock(autojump_threshold=0))
    finally:
        scheduler._ALLOW_DETERMINISTIC_SCHEDULING = was


class Play:
    def __init__(self, chance: Random, steps: int) -> None:
        self.chance = chance
        self.steps = steps
        self.away: dict[DropId, Drop] = {}  # drops that another engine has

    async def run(self) -> None:
        chance = self.chance
        limits = {
            "slice_": chance.choice([1, 2, 128]),
            "bundles_max": chance.choice([1, 2, 64]),
            "ring_max": chance.choice([1, 5, 20, 100_000]),
            "events_max": chance.choice([2, 128]),
            "history_max": chance.choice([3, 10, 1_000]),
            "histories_waiting_max": chance.choice([0, 1, 256]),
            "marks_max": chance.choice([3, 2_000]),  # one less than there are drops
            "stall_s": chance.choice([0.5, 20.0, 20.0]),
        }
        async with watched(**limits) as on:
            for drop_id in DROPS[:3]:
                on.make(drop_id, chance.choice([2, 40]))
            for _ in range(self.steps):
                self.step(on)
                self.limits_hold(on, limits)
                match chance.randrange(4):
                    case 0:
                        await trio.lowlevel.checkpoint()
                    case 1:
                        pause_s = chance.choice([0.001, 0.05, 0.3])
                        await trio.sleep(pause_s)
                        on.now += int(pause_s * 1000)
            on.is_reachable = True
            on.pruned.clear()
            for drop_id in list(self.away):
                self.come_back(on, drop_id)
        for viewer in on.viewers:
            viewer.watch.close()
        assert not on.hub._users
        assert not on.hub._all
        assert not on.hub._parked
        assert not on.hub._watches
        assert all(feed.events and not feed.watches for feed in on.hub._feeds.values()), "feeds of nothing are kept"

    def limits_hold(self, on: Watched, limits: dict[str, Any]) -> None:
        assert sum(len(feed.events) for feed in on.hub._feeds.values()) <= limits["ring_max"]
        assert on.hub.statistics().ring <= limits["ring_max"]
        for viewer in on.viewers:
            assert len(viewer.watch.marks) <= limits["marks_max"]
            assert viewer.is_away <= viewer.watch.is_closed

    def step(self, on: Watched) -> None:
        chance = self.chance
        here = [drop.terms.id for drop in on.board.drops()]
        if chance.random() < 0.5:
            if here:
                self.happen(on, chance.choice(here))
            return
        if chance.random() < 0.12:
            self.upset(on, here)
            return
        viewers = [viewer for viewer in on.viewers if not viewer.watch.is_closed]
        if not viewers or (len(viewers) < 6 and chance.random() < 0.2):
            viewers.append(on.viewer())
            viewers[-1].is_halving = chance.random() < 0.5
        self.act(on, chance.choice(viewers), here)

    def happen(self, on: Watched, drop_id: DropId) -> None:
        """A batch of one drop."""
        chance, drop = self.chance, on.drop(drop_id)
        commands: list[Any] = []
        for _ in range(chance.choice([1, 1, 2, 5, 8])):
            user = chance.choice(USERS)
            hold = drop.holds.get(user)
            commands += chance.choice(
                [
                    [on.wish(user, chance.choice([1, 50, 1_000]))],
                    [on.wish(user), on.purchase(user)],
                    [on.purchase(user)],
                    [cancel(user, "none" if hold is None else hold.id)],
                    [Sweep()],
                    [chance.choice(STATUSES)] if chance.random() < 0.3 else [Sweep()],
                ]
            )
        on.commit(drop_id, *commands)
        on.now += chance.choice([0, 0, 1, 60])

    def upset(self, on: Watched, here: list[DropId]) -> None:
        chance = self.chance
        match chance.randrange(6):
            case 0 if DROPS[3] not in on.tables:
                on.make(DROPS[3], 5, chance.choice([DropStatus.LIVE, DropStatus.DRAFT]))
            case 1 if here:  # an actor crashed after a commit that was not told, and was loaded anew
                drop_id = chance.choice(here)
                if chance.random() < 0.5:
                    fresh = on.load_anew(drop_id)
                    on.commit(drop_id, *[on.wish(user, 1) for user in USERS], is_published=False)
                    on.board.show(fresh)
                on.hub.replaced(drop_id)
            case 2 if here:
                drop_id = chance.choice(here)
                self.away[drop_id] = on.drop(drop_id)
                on.board.forget(drop_id)
            case 3 if self.away:
                self.come_back(on, chance.choice(list(self.away)))
            case 4:
                on.is_reachable = not on.is_reachable
            case 5:
                on.pruned |= {(drop_id, chance.randint(1, 30)) for drop_id in here}
                on.history_s = chance.choice([0.0, 0.01, 0.2])

    def come_back(self, on: Watched, drop_id: DropId) -> None:
        """Another engine had it, and it may have gone on there."""
        on.board.show(Drop.restored(record_of(self.away.pop(drop_id))))
        if self.chance.random() < 0.7:
            on.commit(drop_id, on.wish(USERS[0], 1), is_published=False)
        on.board.show(on.drop(drop_id))
        on.hub.replaced(drop_id)

    def act(self, on: Watched, viewer: Listener, here: list[DropId]) -> None:
        chance = self.chance
        some = chance.sample(here, min(len(here), chance.choice([1, 1, 2, 3])))
        match chance.randrange(16):
            case 0 | 1:
                viewer.subscribe(some)
            case 2 | 3:
                positions = {drop_id[-1]: self.position(on, drop_id) for drop_id in some}
                viewer.subscribe(some, **positions)
            case 4:
                viewer.subscribe_all({drop_id: self.position(on, drop_id) for drop_id in some})
            case 5:
                viewer.unsubscribe(chance.choice(DROPS))
            case 6 if chance.random() < 0.3:
                viewer.unsubscribe_all()
            case 7:
                viewer.identify(chance.choice(USERS))
            case 8 if chance.random() < 0.3:
                viewer.watch.close()
            case 9:
                viewer.subscribe_all(is_shown=False)
            case 10:
                for drop_id in some:
                    if not on.hub.is_telling(viewer.watch, drop_id):
                        viewer.join(drop_id)
            case 11 | 12:
                viewer.room = chance.choice([0, 0, 1, 3])
            case _:
                viewer.read(chance.choice([None, None, 0, 1, 2]), in_turn=chance.random() < 0.5)

    def position(self, on: Watched, drop_id: DropId) -> int:
        return self.chance.randint(0, len(on.tables[drop_id]) + 1)
