"""The crowd: a process of its own that is all the people, each on a connection, for as long as it is told.

    somebody comes ──> look? ──> reserve ──201──> thinks ──> purchase | cancel | forgets
                                         └─ anything else: goes

Open loop: people come at a rate, whatever the server does. Whoever finds no free connection is turned away unheard, as
a browser's own limit or a phone's network would; whoever hears nothing for `PATIENCE_S` hangs up and goes. A connection
belongs to one person from the first request to the last, so a holder never waits for one. Latencies count from the
instant at which something was meant to be sent. Closed loop: so many requests are under way all the time.

For hours, so nothing is kept of an answer but how it counts; one line of JSON a second (`Second`), one at the end
(`Seen`). It shares the cores with what it measures: its own share, and how late it was, stand in the result.

    python -m tests.proof.soak.people <job.json
"""

import gc
import heapq
import random
import sys
import time
from collections import Counter, deque
from typing import Final

import msgspec

from tests.bench import usage
from tests.bench.generator import raise_descriptor_limit
from tests.bench.job import Server
from tests.bench.wire import RECEIVE_BYTES, poll_exactly
from tests.proof.soak.cast import LOOKERS, THINKING_MAX_S, THINKING_S, Cast, Person, Step, next_step, people_of
from tests.proof.soak.pool import Pool

# People who want something wait so long; who has found a unit does not let go of it before the server itself would
# (ANSWER_TIMEOUT_MS).
PATIENCE_S: Final[dict[Step, float]] = {"look": 2.0, "reserve": 2.0, "purchase": 5.0, "cancel": 5.0}
ALLOWED: Final[dict[Step, frozenset[str]]] = {
    "look": frozenset({"200"}),
    # ALREADY_RESERVED: of somebody who gave up, and was served all the same.
    "reserve": frozenset({"201", "201 replayed", "409 OUT_OF_STOCK", "409 ALREADY_RESERVED"}),
    "purchase": frozenset({"201", "409 RESERVATION_EXPIRED"}),
    "cancel": frozenset({"200", "409 RESERVATION_EXPIRED"}),
}
REFUSED: Final = ("429", "503")
SECOND_S: Final = 1.0
AT_ONCE: Final = 256  # people who come in, answers that are read, before the other has its turn
BUCKETS_PER_S: Final = 10_000  # of latencies: 0.1 ms
WRONG_SHOWN_MAX: Final = 20
LONGEST_WAIT_S: Final = 0.05

_RESERVATION: Final = b'"reservation":{"id":"'
_ID_BYTES: Final = 36

clock = time.monotonic


class Job(msgspec.Struct, frozen=True, kw_only=True):
    server: Server
    cast: Cast
    first_person: int  # with whom the round begins
    connections: int  # people who are there at the same time, at most
    seconds: float  # counted
    warm_up_s: float
    rate: float | None = None  # people per s; None: closed loop
    at_once: int = 0  # closed loop: requests under way
    watched: dict[str, int] = {}  # who else uses CPU: a name, and a pid whose children count too
    seed: int = 1


class Second(msgspec.Struct):
    """What happened within one second; `answers` by step and name, such as "reserve 201"."""

    at_s: float = 0.0
    came: int = 0
    turned_away: int = 0
    answers: dict[str, int] = {}
    in_time: dict[str, int] = {}  # of these, within the step's patience from when they were meant to be sent
    gave_up: dict[str, int] = {}  # by step
    broken: dict[str, int] = {}  # the server hung up instead of answering
    latest_ms: float = 0.0  # how long after its instant the latest request was sent


class Seen(msgspec.Struct, kw_only=True):
    """Of the counted time; what begins with `all_` is of everything. Of latencies how many were in each 0.1 ms."""

    began_at: float
    seconds: float
    next_person: int
    came: int
    turned_away: int
    answers: dict[str, int]
    in_time: dict[str, int]
    gave_up: dict[str, int]
    broken: dict[str, int]
    all_answers: dict[str, int]
    all_unanswered: dict[str, int]  # given up, broken, or under way at the end
    wrong: int
    wrongs: list[str]  # the first ones
    latencies: dict[str, dict[int, int]]  # by step
    lateness: dict[int, int]
    cpu_s: dict[str, float]
    course: list[Second]


class Visit:
    """One person who is here: on which step, since when."""

    __slots__ = ("asked_at", "fd", "hold_id", "is_waiting", "meant_at", "person", "step")

    def __init__(self, person: Person, fd: int) -> None:
        self.person = person
        self.fd = fd
        self.step: Step = "reserve"
        self.meant_at = self.asked_at = 0.0
        self.is_waiting = False
        self.hold_id = b""


class Crowd:
    def __init__(self, job: Job) -> None:
        self.job = job
        self.chosen = random.Random(job.seed)
        self.people = people_of(job.cast, job.server)
        self.next_person = job.first_person % len(self.people)
        self.pool = Pool(job.server, job.connections)
        self.free = deque(self.pool.fds)
        self.visits: dict[int, Visit] = {}
        self.waiting = 0
        self.thinking: list[tuple[float, int, Visit]] = []
        self.thoughts = 0
        # Each in the order of its instants, since everybody of a kind is as patient.
        self.patience: dict[float, deque[tuple[float, float, Visit]]] = {s: deque() for s in set(PATIENCE_S.values())}
        self.second = Second()
        self.course: list[Second] = []
        self.counting = False
        self.latencies: dict[Step, Counter[int]] = {step: Counter() for step in PATIENCE_S}
        self.lateness: Counter[int] = Counter()
        self.all_answers: Counter[str] = Counter()
        self.all_unanswered: Counter[str] = Counter()
        self.wrong = 0
        self.wrongs: list[str] = []

    def run(self) -> Seen:
        job, pool = self.job, self.pool
        began = clock() + job.warm_up_s
        ends = began + job.seconds
        due = clock() if job.rate else float("inf")
        tick = began if job.warm_up_s else clock()
        used: dict[str, float] = {}
        while (now := clock()) < ends:
            if now >= tick:
                if not self.counting:
                    self.counting, used, began = True, self._used(), now
                    ends = began + job.seconds
                    self._start_second(0.0)
                else:
                    self._end_second(now - began)
                tick = now + SECOND_S
            self.free.extend(pool.opened())
            self._give_up(now)
            self._go_on(now)
            if job.rate:
                due = self._let_in(due, now, job.rate)
            else:
                self._fill(now)
            thought = self.thinking[0][0] if self.thinking else float("inf")
            wait = min(due, thought, tick, ends, now + LONGEST_WAIT_S) - clock()
            for fd, _ in poll_exactly(pool.poller, max(0.0, wait), AT_ONCE):
                self._receive(fd)
        ended = clock()
        cpu_s = {name: spent - used.get(name, 0.0) for name, spent in self._used().items()}
        self._end_second(ended - began)
        self.all_unanswered.update(visit.step for visit in self.visits.values() if visit.is_waiting)
        pool.close()
        return self._seen(began, ended - began, cpu_s)

    # Who comes, and what they ask --------------------------------------------------------------------

    def _let_in(self, due: float, now: float, rate: float) -> float:
        """Everybody who was to come by now, up to some; when the next is to come."""
        came = 0
        while due <= now and came < AT_ONCE:
            came += 1
            self.second.came += 1
            if self.free:
                self._come(self.free.popleft(), due)
            else:
                self.second.turned_away += 1
            due += self.chosen.expovariate(rate)
        return due

    def _fill(self, now: float) -> None:
        while self.waiting < self.job.at_once and self.free:
            self.second.came += 1
            self._come(self.free.popleft(), now)

    def _come(self, fd: int, meant_at: float) -> None:
        person = self.people[self.next_person]
        self.next_person = (self.next_person + 1) % len(self.people)
        visit = self.visits[fd] = Visit(person, fd)
        self._ask(visit, "look" if self.chosen.random() < LOOKERS else "reserve", meant_at)

    def _ask(self, visit: Visit, step: Step, meant_at: float) -> None:
        person = visit.person
        match step:
            case "reserve":
                request = person.reserve
            case "purchase":
                request = person.purchase
            case "look":
                request = person.look
            case "cancel":
                request = person.cancel % visit.hold_id
        visit.step, visit.meant_at, visit.is_waiting = step, meant_at, True
        self.waiting += 1
        visit.asked_at = now = clock()
        if self.counting:
            self.lateness[int((now - meant_at) * BUCKETS_PER_S)] += 1
        patience_s = PATIENCE_S[step]
        self.patience[patience_s].append((now + patience_s, now, visit))
        try:
            self.pool.send[visit.fd](request)
        except OSError:
            self._break(visit.fd)

    def _go_on(self, now: float) -> None:
        """Those who have thought."""
        thinking = self.thinking
        while thinking and thinking[0][0] <= now:
            at, _, visit = heapq.heappop(thinking)
            if self.visits.get(visit.fd) is visit:  # else the server hung up meanwhile
                self._ask(visit, visit.step, at)

    def _leave(self, visit: Visit) -> None:
        del self.visits[visit.fd]
        self.free.append(visit.fd)

    # Answers, and none -------------------------------------------------------------------------------

    def _receive(self, fd: int) -> None:
        pool = self.pool
        try:
            data = pool.receive[fd](RECEIVE_BYTES)
            if pool.parts or len(data) not in pool.whole or data[-2:] != b"}}":
                whole = pool.received(fd, data)
                if whole is None:
                    return
                data = whole
        except BlockingIOError:
            return
        except KeyError:  # it was replaced since the poll
            return
        except OSError:
            self._break(fd)
            return
        visit = self.visits.get(fd)
        if visit is None or not visit.is_waiting:
            self._fault(f"an answer that nobody waits for: {data[:200]!r}")
            return
        self._hear(visit, data, clock())

    def _hear(self, visit: Visit, answer: bytes, now: float) -> None:
        step, person = visit.step, visit.person
        visit.is_waiting = False
        self.waiting -= 1
        latency_s = now - visit.meant_at
        name = name_of(answer)
        said = f"{step} {name}"
        second = self.second
        second.answers[said] = second.answers.get(said, 0) + 1
        self.all_answers[said] += 1
        if latency_s <= PATIENCE_S[step]:
            second.in_time[said] = second.in_time.get(said, 0) + 1
        if name[:3] in REFUSED:
            self._leave(visit)
            return
        if self.counting:
            self.latencies[step][int(latency_s * BUCKETS_PER_S)] += 1
        is_anothers = name == "201" and person.user_id not in answer
        if name not in ALLOWED[step] or is_anothers:
            self._fault(f"{said} to {person.user_id.decode()}: {answer[-300:]!r}")
            self._leave(visit)
        elif step == "look":
            self._ask(visit, "reserve", now)
        elif step == "reserve" and name == "201" and (coming := next_step(person, self.chosen)) is not None:
            at = answer.find(_RESERVATION) + len(_RESERVATION)
            visit.hold_id, visit.step = answer[at : at + _ID_BYTES], coming
            self.thoughts += 1
            thinks_s = min(self.chosen.expovariate(1 / THINKING_S), THINKING_MAX_S)
            heapq.heappush(self.thinking, (now + thinks_s, self.thoughts, visit))
        else:
            self._leave(visit)

    def _give_up(self, now: float) -> None:
        for waiting in self.patience.values():
            while waiting and waiting[0][0] <= now:
                _, asked_at, visit = waiting.popleft()
                if visit.is_waiting and visit.asked_at == asked_at and self.visits.get(visit.fd) is visit:
                    self._lose(visit, self.second.gave_up)
                    self.pool.replace(visit.fd)

    def _break(self, fd: int) -> None:
        """The server hung up: on somebody who waits, or, as is its right, on somebody who does not."""
        visit = self.visits.get(fd)
        if visit is None:
            self.free.remove(fd)
        elif visit.is_waiting:
            self._lose(visit, self.second.broken)
        else:
            del self.visits[fd]
        self.pool.replace(fd)

    def _lose(self, visit: Visit, counts: dict[str, int]) -> None:
        counts[visit.step] = counts.get(visit.step, 0) + 1
        self.all_unanswered[visit.step] += 1
        visit.is_waiting = False
        self.waiting -= 1
        del self.visits[visit.fd]

    def _fault(self, sentence: str) -> None:
        self.wrong += 1
        if len(self.wrongs) < WRONG_SHOWN_MAX:
            self.wrongs.append(sentence)

    # Counting ----------------------------------------------------------------------------------------

    def _start_second(self, at_s: float) -> None:
        self.second = Second(at_s, answers={}, in_time={}, gave_up={}, broken={})

    def _end_second(self, at_s: float) -> None:
        self.course.append(self.second)
        sys.stdout.buffer.write(b'{"second":' + msgspec.json.encode(self.second) + b"}\n")
        sys.stdout.buffer.flush()
        self._start_second(at_s)

    def _used(self) -> dict[str, float]:
        watched = {name: sum(map(usage.cpu_s, usage.family(pid))) for name, pid in self.job.watched.items()}
        return {"people": time.process_time(), **watched, "machine": usage.machine_cpu_s()}

    def _seen(self, began: float, seconds: float, cpu_s: dict[str, float]) -> Seen:
        course = self.course
        return Seen(
            began_at=began,
            seconds=seconds,
            next_person=self.next_person,
            came=sum(one.came for one in course),
            turned_away=sum(one.turned_away for one in course),
            answers=_added([one.answers for one in course]),
            in_time=_added([one.in_time for one in course]),
            gave_up=_added([one.gave_up for one in course]),
            broken=_added([one.broken for one in course]),
            all_answers=dict(self.all_answers),
            all_unanswered=dict(self.all_unanswered),
            wrong=self.wrong,
            wrongs=self.wrongs,
            latencies={step: dict(counted) for step, counted in self.latencies.items()},
            lateness=dict(self.lateness),
            cpu_s=cpu_s,
            course=course,
        )


def name_of(answer: bytes) -> str:
    """As in "201", "201 replayed", "409 OUT_OF_STOCK"."""
    status = answer[9:12].decode("latin-1")
    if status[:1] == "2":
        return f"{status} replayed" if b"\r\nidempotency-replayed: true\r\n" in answer else status
    code = answer.partition(b'"code":"')[2].partition(b'"')[0]
    return f"{status} {code.decode('latin-1')}"


def _added(counts: list[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))


def main() -> None:
    raise_descriptor_limit()
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    crowd = Crowd(job)
    # What lives through the run is there by now; a visit leaves no cycle behind.
    gc.collect()
    gc.freeze()
    gc.disable()
    seen = crowd.run()
    sys.stdout.buffer.write(b'{"seen":' + msgspec.json.encode(seen) + b"}\n")


if __name__ == "__main__":
    main()
