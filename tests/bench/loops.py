"""The closed and the open loop of a load generator: what happens while the clock runs.

Closed loop: each connection asks again as soon as it was answered. Open loop: each request has an instant at which it
is meant to be sent, and its latency counts from there, sent late or not, so that a server that stalls cannot make the
clock stand still for the requests that would have come meanwhile (coordinated omission).
"""

import time
from array import array
from typing import Final

from tests.bench import usage
from tests.bench.job import Job, schedule_of
from tests.bench.wire import PATIENCE_S, RECEIVE_BYTES, Connections, poll_exactly

LATE_S: Final = 0.001
TICK_S: Final = 0.25
LOST_MAX: Final = 1000  # a server that drops more is not worth waiting for

clock = time.monotonic


class Log:
    """What happened, in the order of the answers; filled by the loops, read afterwards."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self.answers: list[bytes] = []
        self.done_at = array("d")
        self.latencies_s = array("d")
        self.began_at = 0.0
        self.ended_at = 0.0
        self.cpu_s: dict[str, float] = {}
        self.sent = 0
        self.lost = 0
        self.late = 0
        self.lateness_max_s = 0.0
        self.connections_used = 0
        self.ran_out = False
        self.failures: list[str] = []


class Marks:
    """What is due now and then while a loop runs: the begin and end of the window, and a tick for the display."""

    def __init__(self, job: Job, log: Log, begins_at: float | None = None) -> None:
        """The window begins after the warm-up, or at an instant of its own."""
        self._log = log
        self._watched = {name: usage.family(pid) for name, pid in job.watched.items()}
        self._pids = job.watched
        self._before: dict[str, float] = {}
        self._began = self._ended = False
        log.began_at = clock() + job.warm_up_s if begins_at is None else begins_at
        log.ended_at = log.began_at + job.seconds
        self.next_at = clock()

    def pass_by(self, now: float) -> None:
        """Called once `next_at` is reached."""
        log = self._log
        if not self._began and now >= log.began_at:
            self._began = True
            self._before = self._used()
        if not self._ended and now >= log.ended_at:
            self.end(now)
        print(f'{{"answered":{len(log.answers)}}}', flush=True)
        due = [now + TICK_S]
        if not self._began:
            due.append(log.began_at)
        if not self._ended:
            due.append(log.ended_at)
        self.next_at = min(due)

    def end(self, now: float) -> None:
        if self._ended:
            return
        self._ended = True
        self._log.ended_at = min(self._log.ended_at, now)
        for name, pid in self._pids.items():
            self._watched[name] = usage.family(pid)  # with those that came meanwhile
        if self._before:
            self._log.cpu_s = {name: used - self._before[name] for name, used in self._used().items()}

    def _used(self) -> dict[str, float]:
        watched = {name: sum(map(usage.cpu_s, pids)) for name, pids in self._watched.items()}
        return {"generator": time.process_time(), **watched, "machine": usage.machine_cpu_s()}


def closed_loop(job: Job, requests: list[bytes], after: dict[bytes, bytes]) -> Log:
    connections = Connections(job.server, job.connections)
    log = Log()
    log.connections_used = job.connections
    fresh = iter(requests)
    request_of: dict[int, bytes] = {}
    sent_at: dict[int, float] = {}
    poll, receive, send, whole = connections.poller.poll, connections.receive, connections.send, connections.whole
    parts, following = connections.parts, after.get
    keep_asked, keep_answer = log.asked.append, log.answers.append
    keep_done_at, keep_latency = log.done_at.append, log.latencies_s.append

    def ask(fd: int, request: bytes, now: float) -> None:
        request_of[fd] = request
        sent_at[fd] = now
        send[fd](request)

    def lose(fd: int, fault: OSError, now: float) -> None:
        lost = request_of.pop(fd, None)
        if lost is None:
            connections.reopen(fd)  # it asked nothing: closing it is the server's right
            return
        log.lost += 1
        note_loss(log, lost, fault)
        fd = connections.reopen(fd)
        request = next(fresh, None)
        if request is not None and now < until:
            ask(fd, request, now)

    marks = Marks(job, log)
    until = log.ended_at
    for fd in connections.fds:
        ask(fd, next(fresh), clock())
    size = len(request_of)
    while request_of:
        now = clock()
        if now >= marks.next_at:
            marks.pass_by(now)
            until = log.ended_at
            if now > until + PATIENCE_S:
                break
        for fd, _ in poll(marks.next_at - now, size):
            try:
                data = receive[fd](RECEIVE_BYTES)
                if parts or len(data) not in whole or data[-2:] != b"}}":
                    answer = connections.received(fd, data)
                    if answer is None:
                        continue
                    data = answer
                now = clock()
                keep_done_at(now)
                keep_latency(now - sent_at[fd])
                keep_answer(data)
                request = request_of[fd]
                keep_asked(request)
                coming = (following(request) if after else None) or next(fresh, None)
                if coming is None or now >= until:
                    if coming is None and now < until:
                        log.ran_out = True
                        until = log.ended_at = marks.next_at = now
                    del request_of[fd]
                    continue
                request_of[fd] = coming
                sent_at[fd] = now
                send[fd](coming)
            except BlockingIOError:
                continue
            except OSError as fault:
                lose(fd, fault, clock())
                if log.lost > LOST_MAX:
                    request_of.clear()
                    break
    marks.end(clock())
    for request in request_of.values():
        log.lost += 1
        note_loss(log, request, TimeoutError(f"no answer within {PATIENCE_S:g} s"))
    log.sent = len(log.answers) + log.lost
    connections.close()
    return log


def open_loop(job: Job, requests: list[bytes]) -> Log:
    """The schedule begins with the warm-up. The connections that may be used stand before it, so that no handshake
    falls into the window; the one that was free last is used first, so most stay unused as long as the server is quick.
    """
    assert job.rate is not None
    connections = Connections(job.server, max(job.connections, job.connections_max))
    log = Log()
    free = connections.fds
    used: set[int] = set()
    request_of: dict[int, bytes] = {}
    meant_at: dict[int, float] = {}
    poller, receive, send = connections.poller, connections.receive, connections.send
    count = len(free)
    marks = Marks(job, log)
    began = log.began_at - job.warm_up_s
    schedule = [began + at for at in schedule_of(job.rate, job.warm_up_s + job.seconds, job.arrivals, job.plan.seed)]
    log.ran_out = len(schedule) > len(requests)
    schedule = schedule[: len(requests)]
    following, last = 0, len(schedule)
    give_up_at = schedule[-1] + PATIENCE_S
    while following < last or request_of:
        now = clock()
        if now >= marks.next_at:
            marks.pass_by(now)
        if now > give_up_at or log.lost > LOST_MAX:
            break
        while following < last and schedule[following] <= now and free:
            fd, meant = free.pop(), schedule[following]
            used.add(fd)
            request_of[fd] = requests[following]
            meant_at[fd] = meant
            following += 1
            if now - meant > LATE_S:
                log.late += 1
                log.lateness_max_s = max(log.lateness_max_s, now - meant)
            try:
                send[fd](request_of[fd])
            except OSError as fault:
                log.lost += 1
                note_loss(log, request_of.pop(fd), fault)
                free.append(connections.reopen(fd))
            now = clock()
        wait = schedule[following] - now if following < last and free else TICK_S
        for fd, _ in poll_exactly(poller, min(wait, max(0.0, marks.next_at - now)), count):
            try:
                answer = receive[fd](RECEIVE_BYTES)
                if connections.parts or len(answer) not in connections.whole or answer[-2:] != b"}}":
                    whole = connections.received(fd, answer)
                    if whole is None:
                        continue
                    answer = whole
                if fd not in request_of:
                    raise ConnectionResetError("bytes that belong to no answer")
                now = clock()
                log.asked.append(request_of.pop(fd))
                log.answers.append(answer)
                log.done_at.append(now)
                log.latencies_s.append(now - meant_at[fd])
                free.append(fd)
            except BlockingIOError:
                continue
            except OSError as fault:
                if fd not in request_of:
                    free.remove(fd)
                else:
                    log.lost += 1
                    note_loss(log, request_of.pop(fd), fault)
                free.append(connections.reopen(fd))
    marks.end(clock())
    for request in request_of.values():
        log.lost += 1
        note_loss(log, request, TimeoutError(f"no answer within {PATIENCE_S:g} s"))
    log.sent = len(log.answers) + log.lost
    log.connections_used = len(used)
    if following < last:
        log.failures.append(f"{last - following} requests of the schedule were never sent: no connection came free")
    connections.close()
    return log


def note_loss(log: Log, request: bytes, fault: OSError) -> None:
    if len(log.failures) < 5:
        line = request.partition(b"\r\n")[0].decode()
        log.failures.append(f"{line}: no answer ({fault})")
