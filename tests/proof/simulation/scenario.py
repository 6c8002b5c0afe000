"""What a seed means: a world drawn from it, with some of all faults and some of all habits that clients have.

Every seed leaves out most of them: what hides behind one fault is found where that one is off.
"""

from enum import StrEnum
from random import Random
from typing import Any, Final

import msgspec

from api import settings
from api.settings import Settings
from engine.model import UserId

USUAL: Final = settings.load({}, dotenv=None)


class Fault(StrEnum):
    """What is wrong with the world for a while; several of these at once, or none."""

    LATENCY = "latency"
    REJECTED = "rejected"
    STORAGE_FULL = "storage full"
    UNAVAILABLE = "unavailable"
    LOST_BEFORE = "lost before"
    LOST_AFTER = "lost after"
    LATE = "late"
    FROZEN = "frozen"
    RIVAL = "rival"
    CRASH = "crash"
    CLOCK_STEP = "clock step"


class Habit(StrEnum):
    """What clients do beyond asking once and waiting."""

    RETRY = "retry"  # under the same key, when they don't know or were told to
    GIVE_UP = "give up"  # and go away before the answer
    TWINS = "twins"  # the same request twice at once
    STAMPEDE = "stampede"
    LAST_MOMENT = "last moment"  # buy at the very millisecond of the deadline
    CANCEL = "cancel"
    STRANGE = "strange"  # ask for what can't be
    CREATE = "create"
    SWEEP = "sweep"
    REUSE = "reuse"  # a key for another request


FAULT_ODDS: Final = 0.35
HABIT_ODDS: Final = 0.6
OFTEN: Final = 0.9  # a share of drops that end, above which nearly all of them do
KEYED: Final = (0.0, 0.3, 0.7, 1.0)  # shares of the requests that carry a key


class Scenario(msgspec.Struct, kw_only=True):
    """One world. Its sizes are small, so that what is rare in a big one happens all the time."""

    seed: int
    settings: Settings
    hub_limits: dict[str, Any]
    faults: frozenset[Fault]
    habits: frozenset[Habit]
    engines: int
    storm_s: float
    operations_max: int
    clients: int
    viewers: int
    users: dict[UserId, str]
    keyed: float
    ending: float  # share of the drops that end within the storm
    latency_s: float
    commit_timeout_s: float
    stocks: list[int]
    pause_s: float  # of a client between two things that it does, on average

    @property
    def is_ending(self) -> bool:
        """Whether nearly all drops end, with holds that outlast them: what is asked then is rare elsewhere."""
        return self.ending > OFTEN

    @property
    def ttl_ms(self) -> int:
        return self.settings.hold_ms


def scenario(seed: int) -> Scenario:
    chance = Random(f"{seed} scenario")
    pick = chance.choice
    storm_s = chance.uniform(30.0, 140.0)
    operations_max = chance.randint(220, 540)
    clients = chance.randint(3, 14)
    users = pick([2, 4, 8, 16])
    ending = pick([0.3, 0.5, 0.95])
    # Where nearly all drops end, holds outlast them, and some of these have no stock left.
    ttls_s, stocks = (
        ([15, 60, 60], [0, 1, 1, 2]) if ending > OFTEN else ([1, 1, 2, 5, 15, 60], [0, 1, 2, 3, 8, 40, 40, 200])
    )
    fault_odds = FAULT_ODDS * (1.6 if ending > OFTEN else 1.0)
    faults = frozenset(fault for fault in Fault if chance.random() < fault_odds)
    return Scenario(
        seed=seed,
        settings=msgspec.structs.replace(
            USUAL,
            reservation_ttl_seconds=pick(ttls_s),
            answer_timeout_ms=pick([500, 2_000, 5_000]),
            commit_stall_ms=pick([100, 900]),
            in_flight_max=pick([12, 60, 20_000]),
            mailbox_max=pick([4, 25, 8_192]),
            part_max=pick([2, 6, 512]),
            batch_max=pick([3, 10, 1_536]),
        ),
        hub_limits={
            "slice_": pick([1, 2, 128]),
            "bundles_max": pick([1, 2, 64]),
            "ring_max": pick([5, 20, 100_000]),
            "events_max": pick([2, 128]),
            "history_max": pick([3, 10, 1_000]),
            "histories_waiting_max": pick([0, 1, 256]),
            "marks_max": pick([2, 2_000]),
            "stall_s": pick([0.5, 20.0]),
        },
        faults=faults,
        habits=frozenset(habit for habit in Habit if chance.random() < HABIT_ODDS),
        engines=pick([1, 2]) if Fault.RIVAL in faults else 1,
        storm_s=storm_s,
        operations_max=operations_max,
        clients=clients,
        viewers=pick([0, 1, 3]),
        users={user_id(number): f"user-{number}" for number in range(users)},
        keyed=pick(KEYED),
        ending=ending,
        latency_s=pick([0.001, 0.005, 0.03]),
        commit_timeout_s=pick([1.0, 10.0]),
        stocks=[pick(stocks) for _ in range(pick([1, 2, 3, 4]))],
        pause_s=storm_s * clients / operations_max,
    )


def user_id(number: int) -> UserId:
    return UserId(f"{number:08x}-0000-7000-8000-000000000000")
