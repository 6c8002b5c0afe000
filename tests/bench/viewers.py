"""Viewers: one process that is many clients of a live feed, and that asks for the updates which they are told.

One process, so that one clock times both the request and each viewer's frame. It shares the machine's cores with the
server, so it does as little as the generator: a poll, a receive and a clock for each frame, and a look at where the
frame ends; the rest is worked out afterwards.

    passes   one update at a time: the next is asked for when every viewer has the one before, and after a pause
    paced    updates at a rate, of whatever spacing; each counts for each viewer when it has that stock, or a newer one
    drain    it asks for nothing: it empties all sockets now and then, until its stdin ends

    python -m tests.bench.viewers <job.json     `{"ready":…}` once all are in, and at the end `{"load":…}`
"""

import gc
import random
import select
import socket
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import suppress
from statistics import median
from typing import Final, Literal

import msgspec

from tests.bench import usage
from tests.bench.frames import PING, PONG, TEXT, frames_in, handshake, payload_at, said
from tests.bench.generator import raise_descriptor_limit
from tests.bench.job import Server
from tests.bench.results import FAILURES_SHOWN_MAX, LATENCY_MAX_US, Load, latency_of, new_histogram
from tests.bench.wire import PATIENCE_S, Connections, new_poller, poll_exactly

AT_ONCE: Final = 64  # viewers that come in together
BUFFER_BYTES: Final = 262_144
EVENTS_AT_ONCE: Final = 512  # of one poll
# Between two looks while a pass arrives. To wake a sleeping client for each frame takes the sender as long again as to
# send it; where viewers have machines of their own, that is not the sender's to pay.
LOOK_S: Final = 0.0001
DRAIN_S: Final = 0.5  # between two times that all sockets are emptied
ALIVE_S: Final = 20.0  # in which a viewer whose frames are not read, nor its pings, says something of its own accord
SAMPLED: Final = 8  # viewers whose every frame is read while draining
TAIL_BYTES: Final = 512  # of what the others got last: more than one frame
QUIET_S: Final = 0.3  # without a byte: nothing more comes
HEAVY_KERNEL_BYTES: Final = 4_096  # receive buffer of the viewer that never reads
SETTLE_S: Final = 0.5  # for the server, once all are in

clock = time.monotonic


class Job(msgspec.Struct, frozen=True, kw_only=True):
    server: Server
    path: str  # of the WebSocket
    viewers: int
    hello: str = ""  # what each says when it is in
    is_greeted: bool = False  # whether each is shown something then; nothing begins before
    heavy: str = ""  # what one more viewer says, which does not read before the end; none without
    mode: Literal["passes", "paced", "drain"]
    trigger: Server
    updates: list[str] = []  # requests, one an update; the first `warm_up` ones do not count
    warm_up: int = 0
    expected: str = "201"
    pause_s: float = 0.1  # between passes
    rate: float = 20.0  # paced, per s
    seconds: float = 3.0  # at most, counted
    is_all_read: bool = False  # draining: read every viewer's frames, answer every ping; costs CPU
    watched: dict[str, int] = {}
    seed: int = 1


class Viewers:
    """Their sockets, by descriptor, in one epoll set."""

    def __init__(self, job: Job) -> None:
        self.poller = new_poller()
        self.sockets: dict[int, socket.socket] = {}
        self.receive: dict[int, Callable[[bytearray], int]] = {}
        self.rest: dict[int, bytes] = {}  # of a frame that is not whole
        self.buffer = bytearray(BUFFER_BYTES)
        self._job = job
        for first in range(0, job.viewers, AT_ONCE):
            self._come_in(min(AT_ONCE, job.viewers - first))

    def _come_in(self, count: int) -> None:
        asking: dict[int, bytes] = {}
        for _ in range(count):
            connected = connect(self._job.server, self._job.path)
            connected.setblocking(False)
            fd = connected.fileno()
            self.sockets[fd] = connected
            self.receive[fd] = connected.recv_into
            self.poller.register(fd, select.POLLIN)
            asking[fd] = b""
        give_up_at = clock() + PATIENCE_S
        greeted: set[int] = set()
        new = list(asking)
        while asking or (self._job.is_greeted and len(greeted) < count):
            if clock() > give_up_at:
                raise TimeoutError(f"{count - len(greeted)} viewers were not let in, or not greeted, in {PATIENCE_S} s")
            for fd, _ in self.poller.poll(0.1, EVENTS_AT_ONCE):
                data = self.sockets[fd].recv(65_536)
                if not data:
                    raise ConnectionError(f"a viewer was not let in: {asking.get(fd, b'')[:200]!r}")
                if fd in asking:
                    data = asking[fd] = asking[fd] + data
                    head, end, data = data.partition(b"\r\n\r\n")
                    if not end:
                        continue
                    if not head.startswith(b"HTTP/1.1 101 "):
                        raise ConnectionError(f"a viewer was not let in: {head[:200]!r}")
                    del asking[fd]
                    if self._job.hello:
                        self.sockets[fd].sendall(said(self._job.hello.encode()))
                if self.frames(fd, data) and fd in new:
                    greeted.add(fd)

    def frames(self, fd: int, data: bytes) -> list[tuple[int, bytes]]:
        """The frames that end with this; a ping is answered."""
        found, rest = frames_in(self.rest.pop(fd, b"") + data)
        if rest:
            self.rest[fd] = rest
        for opcode, payload in found:
            if opcode == PING:
                self.sockets[fd].send(said(payload, PONG))
        return found

    def close(self) -> None:
        for one in self.sockets.values():
            one.close()


def connect(server: Server, path: str, kernel_bytes: int | None = None) -> socket.socket:
    """A socket that has asked to be a viewer's."""
    connected = socket.socket()
    if kernel_bytes is not None:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, kernel_bytes)
    connected.settimeout(PATIENCE_S)
    connected.connect((server.host, server.port))
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.sendall(handshake(server, path))
    return connected


class Window:
    """What the counted time cost, and whom."""

    def __init__(self, job: Job) -> None:
        self._watched = {name: usage.family(pid) for name, pid in job.watched.items()}
        self._before = self._used()
        self.began_at = clock()

    def cpu_s(self) -> dict[str, float]:
        return {name: used - self._before[name] for name, used in self._used().items()}

    def _used(self) -> dict[str, float]:
        watched = {name: sum(map(usage.cpu_s, pids)) for name, pids in self._watched.items()}
        return {"generator": time.process_time(), **watched, "machine": usage.machine_cpu_s()}


class Seen(msgspec.Struct):
    """What a mode leaves behind."""

    seconds: float
    updates: int
    frames: int
    latencies_s: array  # type: ignore[type-arg]  # of doubles
    cpu_s: dict[str, float]
    figures: dict[str, float]
    failures: list[str]
    checked: dict[str, int]


def run(job: Job, tell: Callable[[bytes], None]) -> Load:
    server_pid = job.watched.get("server")
    rss_before = usage.rss_bytes(server_pid) if server_pid else None
    began = clock()
    viewers = Viewers(job)
    heavy = _heavy(job) if job.heavy else None
    connect_s = clock() - began
    time.sleep(SETTLE_S)
    rss_in = usage.rss_bytes(server_pid) if server_pid else None
    tell(b'{"ready":true}\n')
    perform = {"passes": _passes, "paced": _paced, "drain": _drain}[job.mode]
    seen = perform(job, viewers)
    if heavy is not None:
        _read_at_last(heavy, seen)
    rss = usage.rss_bytes(server_pid) if server_pid else None
    viewers.close()
    figures = {"viewers": float(job.viewers), **seen.figures, "connect_s": connect_s}
    if rss_before is not None and rss_in is not None and rss is not None:
        if job.viewers:
            figures["rss_kib_per_viewer"] = (rss_in - rss_before) / job.viewers / 1024
        figures["rss_kib_grown"] = (rss - rss_in) / 1024
    histogram = new_histogram()
    for latency in seen.latencies_s:
        histogram.record_value(max(1, min(int(latency * 1e6), LATENCY_MAX_US)))
    return Load(
        began_at=began, seconds=max(seen.seconds, 1e-9), done=seen.updates, answers={job.expected: seen.updates},
        all_answers={job.expected: seen.updates}, sent=seen.updates, lost=0, late=0, lateness_max_ms=0.0,
        connections_used=job.viewers, ran_out=False, latency=latency_of(histogram), bucket_s=0.1, over_time=[],
        stock=[], cpu_s=seen.cpu_s, rss_bytes=None if rss_before is None or rss is None else (rss_before, rss),
        checked=seen.checked, failed=len(seen.failures), failures=seen.failures[:FAILURES_SHOWN_MAX], figures=figures,
    )  # fmt: skip


# --- one update at a time ----------------------------------------------------------------------------


def _passes(job: Job, viewers: Viewers) -> Seen:
    asking = Connections(job.trigger, 1)
    (asker,) = asking.fds
    poll, receive, buffer, rest = viewers.poller.poll, viewers.receive, viewers.buffer, viewers.rest
    viewers.poller.register(asker, select.POLLIN)
    send = asking.send[asker]
    everybody = set(viewers.sockets)
    lasts, middles, spreads, answers = array("d"), array("d"), array("d"), array("d")
    latencies, failures = array("d"), list[str]()
    head, whole = b"", 0  # of the frame that was looked at last: each viewer's of one pass is as long
    window: Window | None = None
    counted = frames = 0
    for number, update in enumerate(job.updates):
        if number == job.warm_up:
            window = Window(job)
        if window is not None and clock() > window.began_at + job.seconds:
            break
        got, at = list[int](), array("d")
        answered_at, missing = 0.0, len(everybody)
        request = update.encode()
        sent_at = now = clock()
        send(request)
        while (missing or not answered_at) and now < sent_at + PATIENCE_S:
            if got and missing:
                time.sleep(LOOK_S)
            for fd, _ in poll(0.0 if got and missing else 0.05, EVENTS_AT_ONCE):
                if fd == asker:
                    answer = asking.received(fd, asking.receive[fd](4096))
                    if answer is not None:
                        answered_at = clock()
                        if answer[9:12].decode() != job.expected[:3]:
                            failures.append(f"an update was answered {answer[:40]!r}")
                    continue
                count = receive[fd](buffer)
                now = clock()
                if count == whole and not rest and buffer.startswith(head):
                    missing -= 1
                    got.append(fd)
                    at.append(now)
                    continue
                if not count:
                    raise ConnectionError("the server closed a viewer's connection")
                data = bytes(buffer[:count])
                texts = sum(opcode == TEXT for opcode, _ in viewers.frames(fd, data))
                if texts:
                    payload = payload_at(data, 0, count)
                    if payload is not None and payload[1] == count and fd not in rest:
                        head, whole = data[: payload[0]], count
                missing -= texts
                got += [fd] * texts
                at.extend([now] * texts)
            now = clock()
        if missing or len(got) != len(everybody) or set(got) != everybody:
            failures.append(f"update {number}: {len(set(got))} of {len(everybody)} viewers had it, {len(got)} frames")
        if window is not None and at:
            counted += 1
            frames += len(at)
            lasts.append(at[-1] - sent_at)
            middles.append(at[len(at) // 2] - sent_at)
            spreads.append(at[-1] - at[0])
            answers.append(answered_at - sent_at)
            latencies.extend([one - sent_at for one in at])
        if missing:
            break
        time.sleep(job.pause_s)
    window = window or Window(job)
    cpu_s = window.cpu_s()
    seconds = clock() - window.began_at
    asking.close()
    figures = {"text_bytes": float(whole - len(head))}
    if counted:
        figures |= {
            "last_ms": median(lasts) * 1000,
            "middle_ms": median(middles) * 1000,
            "first_to_last_ms": median(spreads) * 1000,
            "answered_ms": median(answers) * 1000,
            "client_cpu_us_per_frame": cpu_s["generator"] / frames * 1e6,
        }
        if "server" in cpu_s:
            figures["server_cpu_us_per_frame"] = cpu_s["server"] / frames * 1e6
    else:
        failures.append("no update was counted")
    return Seen(seconds, counted, frames, latencies, cpu_s, figures, failures, {"each viewer had it, once": frames})


# --- at a rate ---------------------------------------------------------------------------------------


def _paced(job: Job, viewers: Viewers) -> Seen:
    """Updates at intervals between a half and one and a half of what the rate says: in step with nobody."""
    asking = Connections(job.trigger, 1)
    (asker,) = asking.fds
    viewers.poller.register(asker, select.POLLIN)
    chosen = random.Random(job.seed)
    kept: list[tuple[int, float, bytes]] = []  # who received what, and when
    sent_at, answered_at, answers = array("d"), array("d"), list[bytes]()
    window: Window | None = None
    due, ends_at, is_waiting = clock(), 0.0, False
    updates = iter(job.updates)
    while True:
        now = clock()
        if window is None and len(sent_at) == job.warm_up and not is_waiting:
            window = Window(job)
            ends_at = window.began_at + job.seconds
        is_over = window is not None and now > ends_at
        if is_over and (now > ends_at + QUIET_S) and not is_waiting:
            break
        if not is_over and not is_waiting and now >= due:
            update = next(updates, None)
            if update is None:
                window = window or Window(job)
                ends_at = now
                continue
            request = update.encode()
            due = max(now, due + chosen.uniform(0.5, 1.5) / job.rate)
            is_waiting = True
            sent_at.append(clock())
            asking.send[asker](request)
        wait = 0.05 if is_waiting or is_over else max(0.0, due - now)
        for fd, _ in poll_exactly(viewers.poller, wait, EVENTS_AT_ONCE):
            if fd == asker:
                answer = asking.received(fd, asking.receive[fd](4096))
                if answer is not None:
                    answered_at.append(clock())
                    answers.append(answer)
                    is_waiting = False
                continue
            data = viewers.sockets[fd].recv(4096)
            kept.append((fd, clock(), data))
            if not data:
                raise ConnectionError("the server closed a viewer's connection")
        if is_waiting and now > sent_at[-1] + PATIENCE_S:
            raise TimeoutError(f"an update was not answered within {PATIENCE_S} s")
    cpu_s = window.cpu_s() if window is not None else {}
    asking.close()
    return _heard(job, viewers, kept, sent_at, answered_at, answers, cpu_s)


def _heard(
    job: Job,
    viewers: Viewers,
    kept: list[tuple[int, float, bytes]],
    sent_at: "array[float]",
    answered_at: "array[float]",
    answers: list[bytes],
    cpu_s: dict[str, float],
) -> Seen:
    """From its answer to its frame, for each update and viewer. A frame with a newer stock tells older ones, too."""
    failures = [f"an update was answered {one[:40]!r}" for one in answers if one[9:12].decode() != job.expected[:3]]
    stocks = [number_after(answer, b'"available_stock":') for answer in answers]
    told: dict[int, list[tuple[float, int]]] = {fd: [] for fd in viewers.sockets}
    frames = 0
    for fd, at, data in kept:
        for opcode, payload in viewers.frames(fd, data):
            stock = number_after(payload, b'"availableStock":') if opcode == TEXT else None
            if stock is not None:
                told[fd].append((at, stock))
                frames += 1
    after_answer, after_request = array("d"), array("d")
    first = min(job.warm_up, len(stocks))
    unheard = 0
    for mine in told.values():
        place = 0
        for number in range(first, len(stocks)):
            wanted = stocks[number]
            while place < len(mine) and (wanted is None or mine[place][1] > wanted):
                place += 1
            if place == len(mine):
                unheard += 1
                continue
            at = mine[place][0]
            after_answer.append(max(0.0, at - answered_at[number]))
            after_request.append(at - sent_at[number])
    if unheard:
        failures.append(f"{unheard} times a viewer did not hear of an update")
    figures = {
        "updates": float(len(stocks) - first),
        "frames_per_viewer": frames / max(1, len(told)),
        **_percentiles("answer_to_frame", after_answer),
        **_percentiles("request_to_frame", after_request),
    }
    seconds = answered_at[-1] - sent_at[first] if first < len(answered_at) else 0.0
    checked = {"each viewer heard of each update": len(after_answer)}
    return Seen(seconds, len(stocks) - first, frames, after_answer, cpu_s, figures, failures, checked)


def _percentiles(name: str, values_s: "array[float]") -> dict[str, float]:
    ordered = sorted(values_s)
    if not ordered:
        return {}
    p50, p99 = (ordered[int(len(ordered) * share)] * 1000 for share in (0.5, 0.99))
    return {f"{name}_p50_ms": p50, f"{name}_p99_ms": p99}


def number_after(data: bytes, name: bytes) -> int | None:
    """The whole number behind a field's name in JSON without spaces; None if it is not there."""
    at = data.find(name)
    if at < 0:
        return None
    begin = end = at + len(name)
    while data[end : end + 1].isdigit():
        end += 1
    return int(data[begin:end]) if end > begin else None


# --- draining ----------------------------------------------------------------------------------------


def _drain(job: Job, viewers: Viewers) -> Seen:
    """Empty each socket now and then, with one big receive; not by poll, which costs each frame a wake-up."""
    drained = _Drained(viewers, len(viewers.sockets) if job.is_all_read else SAMPLED)
    window = Window(job)
    alive_at = clock() + ALIVE_S
    while not select.select([0], [], [], DRAIN_S)[0]:
        drained.empty()
        if clock() > alive_at:
            drained.say_alive()
            alive_at += ALIVE_S
    cpu_s, seconds = window.cpu_s(), clock() - window.began_at
    while drained.empty():
        time.sleep(QUIET_S)
    failures = drained.behind()
    figures = {
        "frames_per_viewer": drained.frames / max(1, len(drained.sampled)),
        "received_mib": drained.bytes / 2**20,
        "newest_stock": float(drained.newest_stock or 0),
    }
    checked = {"viewers in step at the end": len(viewers.sockets) - len(failures)}
    return Seen(seconds, 0, drained.frames, array("d"), cpu_s, figures, failures, checked)


class _Drained:
    def __init__(self, viewers: Viewers, sampled: int) -> None:
        self.sampled = set(list(viewers.sockets)[:sampled])
        self.frames = self.bytes = 0
        self.newest_stock: int | None = None
        self._viewers = viewers
        self._last: dict[int, bytes] = {}  # payload of a sampled viewer's last text
        self._tails = dict.fromkeys(viewers.sockets, b"")
        self._gone: set[int] = set()

    def empty(self) -> int:
        """Receive what is there; bytes."""
        viewers, buffer = self._viewers, self._viewers.buffer
        before = self.bytes
        for fd, receive in viewers.receive.items():
            try:
                count = receive(buffer)
            except BlockingIOError:
                continue
            except OSError:
                count = 0
            if not count:
                self._gone.add(fd)
                continue
            self.bytes += count
            if fd in self.sampled:
                self._read(fd, bytes(buffer[:count]))
            else:
                self._tails[fd] = (self._tails[fd] + bytes(buffer[max(0, count - TAIL_BYTES) : count]))[-TAIL_BYTES:]
        return self.bytes - before

    def say_alive(self) -> None:
        for fd, one in self._viewers.sockets.items():
            if fd not in self.sampled and fd not in self._gone:
                with suppress(OSError):  # seen at the next receive
                    one.send(said(b"", PONG))

    def _read(self, fd: int, data: bytes) -> None:
        for opcode, payload in self._viewers.frames(fd, data):
            if opcode == TEXT:
                self.frames += 1
                self._last[fd] = payload
                stock = number_after(payload, b'"availableStock":')
                self.newest_stock = self.newest_stock if stock is None else stock

    def behind(self) -> list[str]:
        """A sentence for each viewer that is gone, or did not get last what the first sampled one did."""
        failures = ["a viewer's connection was closed"] * len(self._gone)
        newest = next(iter(self._last.values()), b"")
        for fd, tail in self._tails.items():
            got = self._last.get(fd, b"") if fd in self.sampled else tail
            if fd not in self._gone and not got.endswith(newest):
                failures.append(f"a viewer's newest frame is not that of the others: {got[-100:]!r}")
        return failures


# --- one that never reads ----------------------------------------------------------------------------


def _heavy(job: Job) -> socket.socket:
    """In, and silent: what it asked for is more than the kernel keeps for it."""
    connected = connect(job.server, job.path, HEAVY_KERNEL_BYTES)
    received = b""
    while b"\r\n\r\n" not in received:
        data = connected.recv(1)
        if not data:
            raise ConnectionError(f"the viewer that never reads was not let in: {received[:200]!r}")
        received += data
    connected.sendall(said(job.heavy.encode()))
    return connected


def _read_at_last(heavy: socket.socket, seen: Seen) -> None:
    """Once everything is over it reads after all: it must be told what it missed, and where things stand now."""
    heavy.settimeout(QUIET_S)
    received = b""
    try:
        while data := heavy.recv(65_536):
            received += data
        seen.failures.append("the viewer that never read was cut off")
    except TimeoutError:
        pass
    finally:
        heavy.close()
    seen.figures["unread_kib"] = len(received) / 1024
    frames = frames_in(received)[0]
    events = sum(b'"availableStock":' in payload for _, payload in frames)
    seen.checked["the one that never read is told all when it does"] = len(frames)
    if events >= seen.figures["frames_per_viewer"]:
        seen.failures.append(f"the viewer that never read got {events} updates one by one: it was never full")


# --- the process -------------------------------------------------------------------------------------


def main() -> None:
    raise_descriptor_limit()
    gc.disable()
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=Job)

    def tell(line: bytes) -> None:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()

    tell(b'{"load":' + msgspec.json.encode(run(job, tell)) + b"}\n")


def load_in(lines: Iterator[bytes]) -> Load | None:
    """The result among what such a process said; None if it broke off."""
    for line in lines:
        if line.startswith(b'{"load":'):
            return msgspec.json.decode(line[8:-2], type=Load)
    return None


if __name__ == "__main__":
    main()
