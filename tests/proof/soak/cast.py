"""Who comes, what each wants, and the requests of it: made before the clock starts, the same in every part of a run.

Memory must stay where it is although sales go on, so what grows with them by design is kept constant. The people are a
fixed number who come again and again, each to the same drop: how a user's newest reservation ended is kept for each
user and drop, so after everybody has been there once, nothing new is remembered. The drops are a fixed number, too, as
none that ended ever leaves memory: those that are sold have stock without end, and the scarce ones, at which nearly
everybody is sent away, are held and given back but never bought. Idempotency keys are kept for a day at least: those
who send one always send the same, and hear their first answer again.
"""

import random
from itertools import accumulate
from typing import Final, Literal

import msgspec

from tests.bench.job import Server, Users

RETRIERS: Final = 0.01  # of the people: each asks under one key for ever
SCARCE: Final = 0.10  # of the people: they want what is nearly always sold out
LOOKERS: Final = 0.01  # of the visits: a look at the drop first, which goes the slow way through the application
BUYING: Final = 0.70  # of those who hold; of these, at a scarce drop, nobody
CANCELLING: Final = 0.15
# Of those who hold what is scarce: nearly all, and soon, so that everybody's turn comes within some minutes, and how it
# ended is remembered of everybody from then on.
GIVING_BACK: Final = 0.95
THINKING_S: Final = 0.2  # on average
THINKING_MAX_S: Final = 1.0
KEY: Final = "again"

Step = Literal["look", "reserve", "purchase", "cancel"]


class Cast(msgspec.Struct, frozen=True, kw_only=True):
    """`people` users from number `first_user` on; the k-th of `drops` is wanted in proportion to 1/k."""

    users: Users
    first_user: int
    people: int
    drops: tuple[str, ...]
    scarce: tuple[str, ...]
    seed: int


class Person:
    """One user, the drop of their life, and the bytes of what they may ask."""

    __slots__ = ("cancel", "is_buyer", "is_retrier", "look", "purchase", "reserve", "user_id")

    def __init__(self, server: Server, user_id: str, drop: str, *, is_buyer: bool, is_retrier: bool) -> None:
        self.is_buyer = is_buyer
        self.is_retrier = is_retrier
        self.user_id = user_id.encode()
        of_user = f" HTTP/1.1\r\nHost: {server.host}:{server.port}\r\nX-User-Id: {user_id}\r\n"
        tail = f"{of_user}Content-Length: 0\r\n\r\n"
        key = f"Idempotency-Key: {KEY}\r\n" if is_retrier else ""
        post = f"POST {server.base}/drops/{drop}"
        self.look = f"GET {server.base}/drops/{drop}{of_user}\r\n".encode()
        self.reserve = f"{post}/reserve{of_user}{key}Content-Length: 0\r\n\r\n".encode()
        self.purchase = f"{post}/purchase{tail}".encode()
        self.cancel = f"DELETE {server.base}/reservations/%b/cancel{tail}".encode()


def people_of(cast: Cast, server: Server) -> list[Person]:
    """All of them, in the order in which they come."""
    chosen = random.Random(cast.seed)
    wanted = list(accumulate(1 / rank for rank in range(1, len(cast.drops) + 1)))
    people = []
    for user_id in cast.users.ids(cast.first_user, cast.people):
        draw = chosen.random()
        is_retrier, is_scarce = draw < RETRIERS, RETRIERS <= draw < RETRIERS + SCARCE
        drop = chosen.choice(cast.scarce) if is_scarce else chosen.choices(cast.drops, cum_weights=wanted)[0]
        people.append(Person(server, user_id, drop, is_buyer=not is_scarce, is_retrier=is_retrier))
    return people


def next_step(person: Person, chosen: random.Random) -> Step | None:
    """What somebody who holds a unit does with it once they have thought; None: nothing, they forget it."""
    if person.is_retrier:
        return None
    draw = chosen.random()
    if person.is_buyer:
        return "purchase" if draw < BUYING else "cancel" if draw < BUYING + CANCELLING else None
    return "cancel" if draw < GIVING_BACK else None
