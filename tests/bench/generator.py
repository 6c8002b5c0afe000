"""A load generator: a process of its own that makes requests, sends them, and judges the answers afterwards.

It shares the machine's cores with what it measures, so it does as little as it can while the clock runs: the requests
are bytes before it starts, each costs one send and one receive, an answer is only looked at for whether it is whole,
and garbage is not collected. What was asked, what came and when is kept (hence `job.REQUESTS_MAX`), and judged once the
time is over. `tests.bench.loops` is what runs in between.

    python -m tests.bench.generator <job.json     a line of JSON for each tick, and one with the result (`results.Load`)
"""

import gc
import resource
import sys
from array import array
from collections.abc import Iterator
from typing import Final

import msgspec

from tests.bench import journey, usage
from tests.bench.answers import Checker
from tests.bench.job import Job, requests_of
from tests.bench.loops import Log, closed_loop, open_loop
from tests.bench.results import LATENCY_MAX_US, Load, latency_of, new_histogram, over_time

BUCKET_S: Final = 0.1


def run(job: Job) -> Load:
    """Do the job, judge the answers. Says on stdout how far it is."""
    if job.crowd is not None:
        return journey.run(job, job.crowd)
    requests, after = requests_of(job)
    server_pid = job.watched.get("server")
    rss = usage.rss_bytes(server_pid) if server_pid else None
    log = open_loop(job, requests) if job.rate else closed_loop(job, requests, after)
    rss_after = usage.rss_bytes(server_pid) if server_pid else None
    return _judged(job, log, (rss, rss_after) if rss is not None and rss_after is not None else None)


def _judged(job: Job, log: Log, rss_bytes: tuple[int, int] | None) -> Load:
    checker = Checker((job.expected,), job.total_stock)
    in_window: dict[str, int] = {}
    done_at, latencies = array("d"), array("d")
    stock: dict[int, int] = {}
    histogram = new_histogram()
    for asked, answer, at, latency in zip(log.asked, log.answers, log.done_at, log.latencies_s, strict=True):
        name = checker.check(asked, answer)
        # Open loop: a request belongs to the window in which it was meant to be sent.
        moment = at - latency if job.rate else at
        if not log.began_at - 1e-6 <= moment <= log.ended_at:
            continue
        in_window[name] = in_window.get(name, 0) + 1
        done_at.append(at - log.began_at)
        latencies.append(latency)
        histogram.record_value(max(1, min(int(latency * 1e6), LATENCY_MAX_US)))
        if checker.available is not None:
            number = int((at - log.began_at) / BUCKET_S)
            stock[number] = min(stock.get(number, checker.available), checker.available)
    checker.finish()
    seconds = max(log.ended_at - log.began_at, 1e-9)
    is_one_drop = len(job.plan.drops) == 1
    return Load(
        began_at=log.began_at,
        seconds=seconds,
        done=in_window.get(job.expected, 0),
        answers=dict(sorted(in_window.items())),
        all_answers=dict(sorted(checker.answers.items())),
        sent=log.sent,
        lost=log.lost,
        late=log.late,
        lateness_max_ms=log.lateness_max_s * 1000,
        connections_used=log.connections_used,
        ran_out=log.ran_out,
        latency=latency_of(histogram),
        bucket_s=BUCKET_S,
        over_time=over_time(done_at, latencies, seconds, BUCKET_S),
        stock=[(number * BUCKET_S, units) for number, units in sorted(stock.items())] if is_one_drop else [],
        cpu_s=log.cpu_s,
        rss_bytes=rss_bytes,
        checked=dict(checker.checked),
        failed=checker.failed + len(log.failures),
        failures=log.failures + checker.failures,
        reservation_ids=checker.reservation_ids,
        figures={} if checker.hold_s is None else {"hold_s": checker.hold_s},
    )


def raise_descriptor_limit() -> None:
    """As many open sockets as this process may have."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 65_536) if most > 0 else 65_536, most))


def main() -> None:
    raise_descriptor_limit()
    gc.disable()
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    load = run(job)
    sys.stdout.buffer.write(b'{"load":' + msgspec.json.encode(load) + b"}\n")


def ticks(lines: Iterator[bytes]) -> Iterator[int | Load]:
    """What a generator's lines say, for whoever started it."""
    for line in lines:
        if line.startswith(b'{"answered":'):
            yield int(line[12:-2])
        elif line.startswith(b'{"load":'):
            yield msgspec.json.decode(line[8:-2], type=Load)


if __name__ == "__main__":
    main()
