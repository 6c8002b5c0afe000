"""A crowd at the opening of a drop: arrive around `starts_at`, reserve, think, then buy, cancel or forget.

Some wait at the door, the others come in a burst that ebbs away. Who comes too early is told DROP_NOT_ACTIVE and tries
again within some ms; who finds nothing looks again about once a second, since units come back. All dice are thrown from
the seed. Each answer is judged as it comes, because what a buyer does next depends on it.

Beside each answer by itself, this must hold: nothing was reserved before the instant at which the drop opens; at no
instant was more held and sold than there was; and once the last hold has run out, what is left is the stock less what
was bought (which whoever started us checks, as only the drop's owner knows when nothing else happens to it).
"""

import heapq
import random
import re
import time
from array import array
from datetime import datetime
from typing import Final, NamedTuple

from tests.bench.answers import Checker, Reservation, split
from tests.bench.job import Crowd, Job
from tests.bench.loops import Log, Marks, clock, note_loss
from tests.bench.results import LATENCY_MAX_US, Load, latency_of, new_histogram, over_time
from tests.bench.wire import PATIENCE_S, RECEIVE_BYTES, Connections, poll_exactly

ALLOWED: Final = ("201", "200", "409 DROP_NOT_ACTIVE", "409 OUT_OF_STOCK", "409 RESERVATION_EXPIRED")
EARLY: Final = 0.4  # of the buyers: they wait at the door
EARLY_MAX_S: Final = 1.0
ARRIVAL_S: Final = 0.6  # after the opening, on average; of those who come after it
LOOK_S: Final = 0.1  # between two looks at the stock
BUCKET_S: Final = 0.1
OPENING_LATE_MAX_S: Final = 1.0  # a drop that is still closed so long after its instant is wrong

_AVAILABLE: Final = re.compile(rb'"available_stock":(\d+)')


class Step(NamedTuple):
    """What is to be sent at an instant; `buyer` is -1 for the one who looks at the stock."""

    at: float
    buyer: int
    operation: str


class Buyer:
    """One person: what was thrown for them, and what they hold."""

    __slots__ = ("hold", "plan", "thinks_s", "user_id")

    def __init__(self, user_id: str, chosen: random.Random, crowd: Crowd) -> None:
        self.user_id = user_id
        thrown = chosen.random()
        self.plan = "purchase" if thrown < crowd.buying else "forget"
        if crowd.buying <= thrown < crowd.buying + crowd.cancelling:
            self.plan = "cancel"
        self.thinks_s = min(chosen.expovariate(1 / crowd.thinking_s), crowd.thinking_max_s)
        self.hold: Reservation | None = None


def run(job: Job, crowd: Crowd) -> Load:
    play = _Play(job, crowd)
    play.run()
    return play.load()


class _Play:
    def __init__(self, job: Job, crowd: Crowd) -> None:
        self.job, self.crowd = job, crowd
        self.chosen = random.Random(job.plan.seed)
        (self.drop,) = job.plan.drops
        ids = job.users.ids(job.plan.first_user, crowd.buyers)
        self.buyers = [Buyer(user_id, self.chosen, crowd) for user_id in ids]
        self.checker = Checker(ALLOWED, job.total_stock)
        self.log = Log()
        self.names: list[str] = []
        self.stock: list[tuple[float, int]] = []
        self.intervals: list[tuple[float, float]] = []  # wall time: a unit was held or sold for certain
        self.first_hold_at: float | None = None
        self.purchases = self.cancelled = self.early = self.empty_handed = 0
        self.sold_out_at: float | None = None
        # From here on everything is on the monotonic clock; the drop opens on the wall clock.
        self.opens_at = clock() + crowd.starts_at - time.time()
        self.leave_at = self.opens_at + crowd.patience_s
        self.due: list[Step] = []
        for number in range(len(self.buyers)):
            is_early = self.chosen.random() < EARLY
            at = -self.chosen.uniform(0.0, EARLY_MAX_S) if is_early else self.chosen.expovariate(1 / ARRIVAL_S)
            heapq.heappush(self.due, Step(self.opens_at + at, number, "reserve"))
        heapq.heappush(self.due, Step(clock(), -1, "look"))

    def run(self) -> None:
        connections = Connections(self.job.server, max(self.job.connections, self.job.connections_max))
        free = connections.fds
        used: set[int] = set()
        asked: dict[int, tuple[Step, bytes, float]] = {}
        marks = Marks(self.job, self.log, self.opens_at)
        log, count = self.log, len(free)
        give_up_at = self.leave_at + self.crowd.thinking_max_s + PATIENCE_S
        while (asked or any(step.buyer >= 0 for step in self.due[:2])) and clock() < give_up_at:
            now = clock()
            if now >= marks.next_at:
                marks.pass_by(now)
            while self.due and self.due[0].at <= now and free:
                step = heapq.heappop(self.due)
                request = self.request(step)
                fd = free.pop()
                used.add(fd)
                asked[fd] = (step, request, now)
                if now - step.at > 0.001:
                    log.late += 1
                    log.lateness_max_s = max(log.lateness_max_s, now - step.at)
                try:
                    connections.send[fd](request)
                except OSError as fault:
                    log.lost += 1
                    note_loss(log, asked.pop(fd)[1], fault)
                    free.append(connections.reopen(fd))
            wait = min(self.due[0].at if self.due and free else now + 0.25, marks.next_at) - now
            for fd, _ in poll_exactly(connections.poller, max(0.0, wait), count):
                try:
                    answer = connections.received(fd, connections.receive[fd](RECEIVE_BYTES))
                    if answer is None:
                        continue
                    if fd not in asked:
                        raise ConnectionResetError("bytes that belong to no answer")
                    self.hear(*asked.pop(fd), answer)
                    free.append(fd)
                except BlockingIOError:
                    continue
                except OSError as fault:
                    if fd in asked:
                        log.lost += 1
                        note_loss(log, asked.pop(fd)[1], fault)
                    else:
                        free.remove(fd)
                    free.append(connections.reopen(fd))
        marks.end(clock())
        for _, request, _ in asked.values():
            log.lost += 1
            note_loss(log, request, TimeoutError(f"no answer within {PATIENCE_S:g} s"))
        log.sent = len(self.names) + log.lost
        log.connections_used = len(used)
        connections.close()

    def request(self, step: Step) -> bytes:
        server = self.job.server
        host = f"Host: {server.host}:{server.port}"
        if step.buyer < 0:
            return f"GET {server.base}/drops/{self.drop} HTTP/1.1\r\n{host}\r\n\r\n".encode()
        buyer = self.buyers[step.buyer]
        line = f"POST {server.base}/drops/{self.drop}/{step.operation}"
        if step.operation == "cancel":
            assert buyer.hold is not None
            line = f"DELETE {server.base}/reservations/{buyer.hold.id}/cancel"
        return f"{line} HTTP/1.1\r\n{host}\r\nX-User-Id: {buyer.user_id}\r\nContent-Length: 0\r\n\r\n".encode()

    def hear(self, step: Step, request: bytes, sent_at: float, answer: bytes) -> None:
        now = clock()
        if step.buyer < 0:
            found = _AVAILABLE.search(split(answer)[2])
            if found:
                self.stock.append((now - self.opens_at, int(found[1])))
            if now < self.leave_at + self.crowd.thinking_max_s:
                heapq.heappush(self.due, Step(now + LOOK_S, -1, "look"))
            return
        name = self.checker.check(request, answer)
        self.names.append(name)
        self.log.done_at.append(now)
        self.log.latencies_s.append(now - sent_at)
        self.log.answers.append(b"")  # counted by the display; judged already
        self.go_on(step, name, now)

    def go_on(self, step: Step, name: str, now: float) -> None:
        """What this buyer does next."""
        buyer, opened = self.buyers[step.buyer], now - self.opens_at
        status = name[:3]
        if status in ("429", "503"):
            self.again(step, now + self.chosen.uniform(0.1, 0.5))
        elif step.operation == "reserve":
            if name == "201":
                self.holds(step, buyer, now)
            elif name == "409 DROP_NOT_ACTIVE":
                self.early += 1
                if opened > OPENING_LATE_MAX_S:
                    self.checker.fail(f"the drop was still closed {opened:.1f} s after its instant")
                self.again(step, now + self.chosen.uniform(0.02, 0.08))
            elif name == "409 OUT_OF_STOCK":
                if self.sold_out_at is None:
                    self.sold_out_at = now
                self.again(step, now + self.chosen.uniform(0.5, 1.5))
        elif name == "201":
            self.purchases += 1
            assert buyer.hold is not None
            self.intervals.append((_seconds(buyer.hold.created_at), float("inf")))
        elif name == "200":
            self.cancelled += 1
            assert buyer.hold is not None
            held_from = _seconds(buyer.hold.created_at)
            self.intervals.append((held_from, held_from + buyer.thinks_s))
        elif name == "409 RESERVATION_EXPIRED":
            self.forgets(buyer)

    def holds(self, step: Step, buyer: Buyer, now: float) -> None:
        buyer.hold = self.checker.hold
        assert buyer.hold is not None
        made_at = _seconds(buyer.hold.created_at)
        self.first_hold_at = min(made_at, self.first_hold_at or made_at)
        if buyer.plan == "forget":
            self.forgets(buyer)
        else:
            heapq.heappush(self.due, Step(now + buyer.thinks_s, step.buyer, buyer.plan))

    def forgets(self, buyer: Buyer) -> None:
        assert buyer.hold is not None
        self.intervals.append((_seconds(buyer.hold.created_at), _seconds(buyer.hold.expires_at)))

    def again(self, step: Step, at: float) -> None:
        if at < self.leave_at:
            heapq.heappush(self.due, Step(at, step.buyer, step.operation))
        elif step.operation == "reserve":
            self.empty_handed += 1

    def load(self) -> Load:
        checker, log = self.checker, self.log
        most = _most_at_once(self.intervals)
        if most > self.job.total_stock:
            checker.fail(f"{most} units were held or sold at one instant, of {self.job.total_stock}")
        opened_late_s = None if self.first_hold_at is None else self.first_hold_at - self.crowd.starts_at
        if opened_late_s is not None and opened_late_s < 0:
            checker.fail(f"a unit was reserved {-opened_late_s * 1000:.0f} ms before the drop opened")
        checker.checked["never more held and sold than there was"] += 1
        histogram = new_histogram()
        for latency in log.latencies_s:
            histogram.record_value(max(1, min(int(latency * 1e6), LATENCY_MAX_US)))
        seconds = max(log.done_at, default=self.opens_at) - self.opens_at
        done_at = array("d", [at - self.opens_at for at in log.done_at])
        held = checker.checked["holds name drop and user, and are new"]
        figures = {
            "buyers": float(len(self.buyers)),
            "held": float(held),
            "purchased": float(self.purchases),
            "cancelled": float(self.cancelled),
            "expired": float(held - self.purchases - self.cancelled),
            "empty_handed": float(self.empty_handed),
            "told_too_early": float(self.early),
            "opened_late_ms": (opened_late_s or 0.0) * 1000,
        }
        if self.sold_out_at is not None:
            figures["first_sold_out_ms"] = (self.sold_out_at - self.opens_at) * 1000
        return Load(
            began_at=self.opens_at,
            seconds=max(seconds, 1e-9),
            done=self.purchases,
            answers=dict(checker.answers),
            all_answers=dict(checker.answers),
            sent=log.sent,
            lost=log.lost,
            late=log.late,
            lateness_max_ms=log.lateness_max_s * 1000,
            connections_used=log.connections_used,
            ran_out=False,
            latency=latency_of(histogram),
            bucket_s=BUCKET_S,
            over_time=over_time(done_at, log.latencies_s, max(seconds, BUCKET_S), BUCKET_S),
            stock=self.stock,
            cpu_s=log.cpu_s,
            rss_bytes=None,
            checked=dict(checker.checked),
            failed=checker.failed + len(log.failures),
            failures=log.failures + checker.failures,
            figures=figures,
        )


def _most_at_once(intervals: list[tuple[float, float]]) -> int:
    """The largest number of intervals that share an instant; the end of one is not part of it."""
    changes = sorted([(begin, 1) for begin, _ in intervals] + [(end, -1) for _, end in intervals])
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def _seconds(instant: str) -> float:
    return datetime.fromisoformat(instant).timestamp()
