"""What a load generator is told, and the requests and instants that it makes of it before its clock starts."""

import random
from itertools import accumulate, islice
from pathlib import Path
from typing import Final, Literal

import msgspec

REQUESTS_MAX: Final = 400_000  # of one generator: about 400 MB with their answers


class Server(msgspec.Struct, frozen=True):
    host: str
    port: int
    base: str = "/api/v1"
    is_tls: bool = False


class Users(msgspec.Struct, frozen=True):
    """Ids by number. Their first digits differ, since a server may make a user's name of them."""

    tag: str  # 20 hex digits: this benchmark run's own
    file: str | None = None  # one id a line, instead

    def ids(self, first: int, count: int) -> list[str]:
        if self.file is not None:
            with Path(self.file).open() as file:
                return [line.strip() for line in islice(file, first, first + count)]
        start, second, rest = int(self.tag[:8], 16), self.tag[:4], self.tag[8:20]
        return [f"{(start + n) & 0xFFFFFFFF:08x}-{second}-4000-8000-{rest}" for n in range(first, first + count)]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked: `requests` (or visits), by one user of the pool after the other, each of a drop.

    Past the end of the pool its users come again: where that would change the answer, ask no more than there are
    users. With several drops, the k-th most wanted one is asked for in proportion to 1/k (Zipf). `path` is asked
    instead of any drop's. `twice` is the share of requests that are sent a second time under their key, a little later.
    """

    first_user: int
    users: int
    requests: int
    part: tuple[int, int] = (0, 1)  # of several generators: this one's number, and how many there are
    drops: tuple[str, ...] = ()
    path: str = ""
    is_bought: bool = False  # each hold is bought on the same connection, at once
    keys: str = ""  # prefix of the Idempotency-Keys; none without it
    twice: float = 0.0
    seed: int = 1


class Crowd(msgspec.Struct, frozen=True, kw_only=True):
    """Buyers who come around an instant, think, and buy, cancel or forget; shares of one, times in s."""

    buyers: int
    starts_at: float  # wall time: the drop's own
    buying: float = 0.7
    cancelling: float = 0.1
    thinking_s: float = 0.4  # on average
    thinking_max_s: float = 1.5
    patience_s: float  # those who find nothing look again for so long


class Job(msgspec.Struct, frozen=True, kw_only=True):
    server: Server
    users: Users
    plan: Plan
    connections: int
    seconds: float
    expected: str  # the answer that is wanted, as in Load.answers
    warm_up_s: float = 0.5
    rate: float | None = None  # open loop, per second; else closed
    arrivals: Literal["constant", "poisson"] = "poisson"
    connections_max: int = 0  # open loop: as many may be used
    total_stock: int = 1
    watched: dict[str, int] = {}  # who else uses CPU: a name, and a pid whose children count too
    crowd: Crowd | None = None  # a journey, see tests.bench.journey; of the plan its users and its drop count


def requests_of(job: Job) -> tuple[list[bytes], dict[bytes, bytes]]:
    """The requests in order, and what follows on the same connection after some of them."""
    plan, server = job.plan, job.server
    chosen = random.Random(plan.seed)
    number, parts = plan.part
    users = job.users.ids(plan.first_user, plan.users)[number::parts]
    count = min(REQUESTS_MAX, plan.requests // parts)
    users = (users * (count // len(users) + 1))[:count]
    tail = "\r\nContent-Length: 0\r\n\r\n"

    def head(path: str) -> str:
        return f"POST {server.base}{path} HTTP/1.1\r\nHost: {server.host}:{server.port}\r\nX-User-Id: "

    if plan.path:
        return [f"{head(plan.path)}{user}{tail}".encode() for user in users], {}
    heads = [head(f"/drops/{drop}/reserve") for drop in plan.drops]
    wanted = list(accumulate(1 / rank for rank in range(1, len(heads) + 1)))
    of_users = chosen.choices(heads, cum_weights=wanted, k=len(users)) if len(heads) > 1 else heads * len(users)
    if plan.keys:
        key = f"\r\nIdempotency-Key: {plan.keys}-"
        asked = [f"{h}{user}{key}{n}{tail}".encode() for n, (h, user) in enumerate(zip(of_users, users, strict=True))]
        return _some_twice(asked, plan.twice, chosen), {}
    asked = [f"{h}{user}{tail}".encode() for h, user in zip(of_users, users, strict=True)]
    return asked, {one: one.replace(b"/reserve ", b"/purchase ", 1) for one in asked} if plan.is_bought else {}


def _some_twice(asked: list[bytes], share: float, chosen: random.Random) -> list[bytes]:
    """Half of the repeated ones come next, on another connection and at once; the others up to 200 requests later."""
    places = [(float(number), one) for number, one in enumerate(asked)]
    for number, one in enumerate(asked):
        if chosen.random() < share:
            later = 0.5 if chosen.random() < 0.5 else chosen.uniform(1, 200)
            places.append((number + later, one))
    places.sort(key=lambda place: place[0])
    return [one for _, one in places]


def schedule_of(rate: float, seconds: float, arrivals: str, seed: int) -> list[float]:
    """Instants from 0 on at which requests are meant to be sent; a Poisson process, or evenly spaced."""
    if arrivals == "constant":
        return [number / rate for number in range(int(rate * seconds))]
    chosen = random.Random(seed)
    instants, at = [], chosen.expovariate(rate)
    while at < seconds:
        instants.append(at)
        at += chosen.expovariate(rate)
    return instants
