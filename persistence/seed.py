"""Sample data: a shop in the middle of its day, for people who want to see something and for tests that need rows.

Nothing is made up row by row. Each drop is a real `engine.drop.Drop` that is told a story with a clock in the past,
and what it decides is written by the real ledger; so rows, counters and events agree because nothing else is
possible. The same `now` gives the same rows, to the id.
"""

import hashlib
import heapq
import itertools
import json
import math
import random
from datetime import datetime
from typing import Final

import msgspec

from engine.drop import Drop
from engine.ledger import Change
from engine.model import (
    Cancel,
    Command,
    Create,
    Decision,
    DropId,
    DropStatus,
    Event,
    Instant,
    Purchase,
    Purchased,
    PurchaseId,
    Refused,
    ReservationId,
    Reserve,
    Reserved,
    StoredAnswer,
    StoredReceipt,
    Swept,
    Terms,
    UserId,
)
from persistence.encoding import FIRST_EPOCH
from persistence.ledger import LedgerOptions, open_ledger
from persistence.statements import as_datetime
from persistence.trio_pg import TrioConnection

TABLES: Final = ("users", "drops", "reservations", "purchases", "drop_events", "idempotency_keys")

_RANDOM_SEED: Final = 20260107
_MINUTE_MS: Final = 60_000
_HOUR_MS: Final = 60 * _MINUTE_MS
_HOLD_MS: Final = _MINUTE_MS
# Holds that are to be seen still running, by somebody who reads the README first.
_LONG_HOLD_MS: Final = 75 * _MINUTE_MS

_CONNECT_S: Final = 5.0
# What is written here can be written again: no server is too unsafe for it, no clock too wrong.
_OPTIONS: Final = LedgerOptions(connect_timeout_s=_CONNECT_S, clock_skew_max_s=math.inf, allow_unsafe_durability=True)

_NAMES: Final = (
    "ada", "amara", "bao", "carlos", "chioma", "dmitri", "elif", "fatima", "giulia", "hana", "ines", "jonas",
    "kofi", "lena", "mateo", "nadia", "omar", "priya", "quentin", "rosa", "sven", "tomoko", "umut", "yuki",
)  # fmt: skip


class Plan(msgspec.Struct, frozen=True):
    """One drop's story in numbers. Times are minutes from now, negative in the past; None in the window is open.

    `visitors` people reserve while it is live; of these `holding` still hold now.
    """

    name: str
    price: int
    currency: str
    stock: int
    created: int
    starts: int | None
    ends: int | None
    visitors: int = 0
    holding: int = 0
    born_as: DropStatus = DropStatus.SCHEDULED


_PLANS: Final = (
    # Live, with units left.
    Plan("Aero Runner 2 'Salt Lake'", 18_900, "USD", 40, -300, -180, 360, 18, 4),
    Plan("Nocturne Selvedge Denim Jacket", 24_500, "EUR", 25, -420, -120, None, 12, 3),
    Plan("Kyoto Matcha Stoneware Set", 9_800, "JPY", 60, -200, -90, 600, 16, 3),
    Plan("Handbook of Small Instruments, 1st print", 4_250, "GBP", 120, -90, None, 1_440, 10, 2, DropStatus.LIVE),
    Plan("Alpine Shell, Glacier Blue", 41_000, "CHF", 15, -60, -45, 120, 8, 2),
    # Live and sold out: everybody buys, those who come later go away empty-handed.
    Plan("Signal Orange Turntable", 64_900, "USD", 6, -240, -200, 300, 12),
    Plan("Midnight Oil Fountain Pen No. 7", 13_500, "EUR", 5, -150, -140, None, 11),
    # Scheduled.
    Plan("Orbit Mechanical Keyboard, Group Buy 3", 15_900, "USD", 200, -30, 90, 1_530),
    Plan("Sashiko Workshop Coat", 21_000, "GBP", 30, -600, 240, None),
    Plan("Festival Weekend Pass, Early Release", 8_900, "EUR", 500, -45, 1_440, 2_880),
    # Ended, by their own clock.
    Plan("Cloud Nine Hoodie, Charcoal", 7_500, "USD", 20, -2_000, -1_800, -1_500, 16),
    Plan("Limited Vinyl: Harbour Lights", 3_400, "GBP", 12, -1_500, -1_400, -1_340, 14),
    Plan("Tokyo Night Market Print", 12_000, "JPY", 8, -3_000, -2_900, -2_600, 9),
    # Drafts.
    Plan("Untitled Collaboration", 0, "USD", 0, -20, None, None, born_as=DropStatus.DRAFT),
    Plan("Winter Capsule: Wool Beanie", 3_900, "EUR", 80, -15, None, None, born_as=DropStatus.DRAFT),
    Plan("Archive Sale: Camera Strap", 5_600, "CHF", 45, -10, None, None, born_as=DropStatus.DRAFT),
)  # fmt: skip


class WouldDelete(Exception):
    """There is something in the tables, and nobody said that it may go."""


async def seed(dsn: str, *, reset: bool, now: datetime, may_delete: bool = True) -> dict[str, int]:
    """Fill the tables with sample data, and say how many rows each has afterwards.

    `reset` empties them first, and loses what is in them, if it `may_delete` anything; else the sample is added, under
    names of its own.

    Raises:
        WouldDelete: the tables are not empty, and `may_delete` is False.
        StartRefused: an engine serves from this database, or it is not fit for one.
        SchemaOutdated: its schema is not this version's.
        LedgerFault, psycopg.Error: the database failed.
    """
    now_ms = Instant(int(now.timestamp() * 1000))
    async with (
        # The ledger holds the engine's lock: no server can start meanwhile, and none is running.
        open_ledger(dsn, _OPTIONS) as ledger,
        await TrioConnection.connect(dsn, timeout_s=_CONNECT_S, application_name="holdfast seed") as conn,
    ):
        async with conn.transaction():
            if reset:
                if not may_delete:
                    await _refuse_to_delete(conn)
                await conn.execute(f"TRUNCATE {', '.join(TABLES)}")
            sample = await _unused_sample(conn, now_ms)
            await _insert_users(conn, sample.users, now_ms)
        births = sample.births()
        written = await ledger.commit(births)
        assert written == {birth.drop_id for birth in births}, "a sample drop was there already"
        return {table: await _count(conn, table) for table in TABLES}


async def _refuse_to_delete(conn: TrioConnection) -> None:
    for table in ("drops", "users"):
        if count := await _count(conn, table):
            raise WouldDelete(f"{count} {table} are there: seed --reset deletes them, seed --append adds to them")


async def _count(conn: TrioConnection, table: str) -> int:
    row = await (await conn.execute(f"SELECT count(*) FROM {table}")).fetchone()
    assert row is not None
    return int(row[0])


async def _unused_sample(conn: TrioConnection, now: Instant) -> "Sample":
    """The first sample whose people are not there yet."""
    for generation in itertools.count(1):
        sample = Sample(generation, now)
        names, ids = list(sample.users.values()), list(sample.users)
        taken = await conn.execute(
            "SELECT 1 FROM users WHERE username = ANY(%s) OR id = ANY(%s::uuid[]) LIMIT 1", (names, ids)
        )
        if await taken.fetchone() is None:
            return sample
    raise AssertionError("count has no end")


async def _insert_users(conn: TrioConnection, users: dict[UserId, str], now: Instant) -> None:
    # Before the oldest drop: nobody makes one before they exist.
    joined = as_datetime(Instant(now - 72 * _HOUR_MS))
    await conn.execute(
        "INSERT INTO users (id, username, created_at)"
        " SELECT id, username, %s FROM unnest(%s::uuid[], %s::text[]) AS wanted(id, username)",
        (joined, list(users), list(users.values())),
    )


class Sample:
    """People and drops; `generation` 2, 3 … are further samples beside the first."""

    def __init__(self, generation: int, now: Instant) -> None:
        self._now = now
        self._random = random.Random(_RANDOM_SEED + generation)
        suffix = "" if generation == 1 else f"_{generation}"
        self.users = {UserId(self._id(Instant(now - 72 * _HOUR_MS))): name + suffix for name in _NAMES}

    def births(self) -> list[Change]:
        """Every drop with all that happened to it until now."""
        return [self._story(plan).told() for plan in _PLANS]

    def _story(self, plan: Plan) -> "_Story":
        owner, *others = self._random.sample(list(self.users), k=len(self.users))
        created_at = self._at(plan.created)
        terms = Terms(
            DropId(self._id(created_at)),
            plan.name,
            plan.price,
            plan.currency,
            plan.stock,
            None if plan.starts is None else self._at(plan.starts),
            None if plan.ends is None else self._at(plan.ends),
            owner,
            created_at,
        )
        story = _Story(terms, plan.born_as, self._now)
        if plan.visitors:
            self._let_visit(story, plan, others[: plan.visitors])
        return story

    def _let_visit(self, story: "_Story", plan: Plan, visitors: list[UserId]) -> None:
        """Everybody reserves once: some buy, some give back, some forget, the last ones still hold."""
        opens = self._at(plan.created if plan.starts is None else plan.starts)
        closes = min(self._now, self._at(plan.ends or 0)) - _LONG_HOLD_MS // 3
        is_sold_out = plan.stock < plan.visitors and not plan.holding
        for number, user in enumerate(visitors):
            if number >= len(visitors) - plan.holding:
                at = Instant(self._now - self._random.randrange(_MINUTE_MS, 15 * _MINUTE_MS))
                story.plan(at, self._reserve(user, at, _LONG_HOLD_MS), key=self._key("reserve"))
                continue
            at = Instant(self._random.randrange(opens, max(closes, opens + _MINUTE_MS)))
            story.plan(at, self._reserve(user, at, _HOLD_MS), key=self._key("reserve"))
            later = Instant(at + self._random.randrange(2_000, _HOLD_MS - 1_000))
            fate = "buys" if is_sold_out else self._random.choice(("buys", "buys", "buys", "gives back", "forgets"))
            if fate == "buys":
                purchase = Purchase(user, self.users[user], PurchaseId(self._id(later)))
                story.plan(later, purchase, key=self._key("purchase"))
            elif fate == "gives back":
                story.plan(later, Cancel(user, story.reservation_of(user)))

    def _reserve(self, user: UserId, at: Instant, hold_ms: int) -> Reserve:
        return Reserve(user, ReservationId(self._id(at)), hold_ms)

    def _key(self, operation: str) -> tuple[str, str]:
        return operation, f"sample-{self._random.getrandbits(64):016x}"

    def _at(self, minutes: int) -> Instant:
        """So many minutes from now; what is to come begins at a full minute, as people set it."""
        if minutes >= 0:
            return Instant((self._now // _MINUTE_MS + minutes) * _MINUTE_MS)
        return Instant(self._now + minutes * _MINUTE_MS)

    def _id(self, at: Instant) -> str:
        """A UUIDv7 of that instant."""
        bits = self._random.getrandbits(74)
        text = f"{at:012x}7{bits >> 62:03x}{0x8 << 60 | bits & 0x3FFF_FFFF_FFFF_FFFF:016x}"
        return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


Key = tuple[str, str]
"""Operation and idempotency key."""


class _Story:
    """A drop, what will be asked of it in order of time, and what it made of that."""

    def __init__(self, terms: Terms, status: DropStatus, now: Instant) -> None:
        self._drop = Drop(terms, status)
        self._now = now
        self._status = status
        self._events: list[Event] = []
        self._receipts: list[StoredReceipt] = []
        self._agenda: list[tuple[Instant, int, Command, Key | None]] = []
        self._tie = itertools.count()

    def plan(self, at: Instant, command: Command, key: Key | None = None) -> None:
        heapq.heappush(self._agenda, (at, next(self._tie), command, key))

    def reservation_of(self, user: UserId) -> ReservationId:
        """The reservation that the user is going to ask for."""
        return next(
            command.reservation_id
            for _, _, command, _ in self._agenda
            if isinstance(command, Reserve) and command.user_id == user
        )

    def told(self) -> Change:
        """Everything that happens until now, as one change."""
        terms = self._drop.terms
        self._decide(Create(terms, self._status), terms.created_at, None)
        while self._agenda and self._agenda[0][0] <= self._now:
            at, _, command, key = heapq.heappop(self._agenda)
            self._sweep(at)
            self._decide(command, at, key)
        self._sweep(self._now)
        return Change(terms.id, FIRST_EPOCH, 0, self._events, self._receipts)

    def _sweep(self, until: Instant) -> None:
        """What is due by itself, each at its own instant."""
        while (deadline := self._drop.next_deadline()) is not None and deadline <= until:
            event = self._drop.due(deadline)
            assert event is not None
            self._apply(event)

    def _decide(self, command: Command, at: Instant, key: Key | None) -> None:
        decision = self._drop.decide(command, at)
        if key is not None and isinstance(command, Reserve | Purchase):
            self._receipts.append(_receipt(command.user_id, key, decision, self._drop.terms.id, at))
        if not isinstance(decision, Refused | Swept):
            self._apply(decision)

    def _apply(self, event: Event) -> None:
        self._drop.apply(event)
        self._events.append(event)


def _receipt(user: UserId, key: Key, decision: Decision, drop_id: DropId, at: Instant) -> StoredReceipt:
    operation, name = key
    digest = hashlib.sha256(f"{operation} {drop_id}".encode()).digest()
    return StoredReceipt(user, operation, name, digest, _answer(decision, drop_id), at)


def _answer(decision: Decision, drop_id: DropId) -> StoredAnswer:
    """The answer in outline. The real ones are rendered by `api`, which nothing here may know."""
    match decision:
        case Reserved(hold=hold, available_stock=available_stock):
            drop = {"id": drop_id, "available_stock": available_stock}
            data = {"reservation": {"id": hold.id, "drop_id": drop_id, "status": "active"}, "drop": drop}
            return _json(201, {"success": True, "data": data})
        case Purchased(purchase_id=purchase_id, hold=hold):
            purchase = {"id": purchase_id, "drop_id": drop_id, "reservation_id": hold.id, "status": "paid"}
            return _json(201, {"success": True, "data": {"purchase": purchase}})
        case Refused(code=code):
            return _json(409, {"success": False, "error": {"code": code.value}})
        case _:
            raise AssertionError(f"nobody asked for {decision}")


def _json(status_code: int, body: dict[str, object]) -> StoredAnswer:
    return StoredAnswer(status_code, json.dumps(body).encode())
