"""One PostgreSQL, its engines, a crowd, and fault after fault at random moments; then everything comes to rest, and
the history is held to the tables, by the checker and by the SQL of `tests.proof.checks`.
"""

import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import trio

from tests.proof import checker, checks, recorder
from tests.proof.conftest import Postgres, bugs_in, until
from tests.proof.faults.crowd import Crowd, Shopper
from tests.proof.faults.tally import Tally
from tests.proof.faults.troubles import NotServed, Trouble, World
from tests.proof.history import Kind
from tests.proof.proxy import Proxy
from tests.proof.recorder import Recorder
from tests.server import Server

TTL_S: Final = 1
# Short, so that a silent connection is given up while the campaign still wants to go on; long enough that a busy
# machine is not taken for an outage at every second commit.
LIMITS: Final = {
    "COMMIT_STALL_MS": "250",
    "COMMIT_TIMEOUT_MS": "800",
    "ANSWER_TIMEOUT_MS": "700",
    "RESERVATION_TTL_SECONDS": str(TTL_S),
    "LOG_LEVEL": "WARNING",
}
BRIEF_S: Final = (0.0, 0.03)  # between two cuts: commits come faster than that
SERVED_MAX_S: Final = 30.0  # what fails, on a machine that has other things to do; what is promised: `tally.SERVED_S`
RUN_S: Final = 0.3  # of load before the first fault
JUST_BEFORE_S: Final = 0.1  # what falls due so short before a fault may meet it
CLOCK_SLACK_MS: Final = 100  # between the wall's clock and the monotonic one, in a campaign
LINE_MAX: Final = 400  # of a log; the rest is its traceback
STATEMENT_TIMED_OUT: Final = "57014"
CONTEST: Final = ('"drop_stopped"', '"part_rejected"')
STOCKS: Final = (5, 40, 1_000_000, 1_000_000)
SHOPPERS: Final = 32

Progress = Callable[[str], None]


@contextmanager
def world(
    postgres: Postgres,
    at: Path,
    seed: int,
    *,
    engines: int = 1,
    proxy: Proxy | None = None,
    tablespace: str = "pg_default",
    settings: Mapping[str, str] | None = None,
) -> Iterator[World]:
    """A database of its own, engines on it that are ready, and a crowd that has not begun."""
    rng = random.Random(seed)
    with ExitStack() as stack:
        dsn = postgres.server.dsn_of(stack.enter_context(postgres.new_database(tablespace)))
        seen = dsn if proxy is None else proxy.dsn(dsn)
        started: list[Server] = []
        for number in range(engines):
            server = Server(seen, at / f"engine_{seed}_{number}.log", None, **{**LIMITS, **(settings or {})})
            stack.callback(_end, server)
            started.append(server)
        started[0].start()
        crowd = Crowd(Recorder(), [server.port for server in started], rng, shoppers=SHOPPERS)
        yield World(postgres, dsn, started, crowd, rng, proxy)


async def campaign(
    world: World,
    troubles: Sequence[Trouble],
    *,
    seed: int,
    pause_s: tuple[float, float] = (0.0, 0.15),
    tally: Tally | None = None,
    on_fault: Progress | None = None,
    deadline: float = float("inf"),
    is_contested: bool = False,
    is_clock_true: bool = True,
) -> Tally:
    """Do all of these to the world, one by one, until Trio's clock says `deadline`; what came of it, the verdict too.

    `is_contested`: several engines serve, and one that was superseded may say what was true before. `is_clock_true`:
    the engine's clock is the server's, so that lateness can be told.

    Where it does not serve any more the campaign ends there, and that is part of the verdict.
    """
    tally = tally or Tally()
    tally.seeds.append(seed)
    began = time.monotonic()
    crowd, troubled = world.crowd, Troubled()
    async with trio.open_nursery() as nursery:
        enough = trio.Event()
        for stock in STOCKS:
            assert await crowd.found(stock) is not None, "it does not serve before the first fault"
        nursery.start_soon(lambda: crowd.run(until=enough))
        await trio.sleep(RUN_S)
        for trouble in troubles:
            if trio.current_time() > deadline:
                break
            await trio.sleep(world.rng.uniform(*pause_s))
            try:
                with troubled.noted():
                    await trouble.strike(world)
                    served_s = await _served(world, trouble.name)
            except NotServed as failure:
                tally.convict([f"I18: {failure}"])
                break
            tally.note(trouble.sort, trouble.name, served_s)
            if on_fault is not None:
                on_fault(trouble.name)
        enough.set()
    try:
        await rest(world)
    except NotServed as failure:
        tally.convict([f"I18: {failure}"])
    await trio.to_thread.run_sync(lambda: judge(world, tally, is_contested=is_contested, is_clock_true=is_clock_true))
    if is_clock_true:
        tally.late_ms += troubled.late_ms(world.dsn)
        tally.overdue_s += troubled.overdue_s(world.dsn)
    tally.seconds += time.monotonic() - began
    return tally


async def rest(world: World) -> None:
    """Faults off: every drop serves, every hold ends, and nobody waits any more.

    Raises:
        NotServed: they do not.
    """
    crowd = world.crowd
    crowd.is_over = True

    async def ask(drop_id: str) -> None:
        stranger = Shopper(crowd, len(crowd.founded), random.Random(drop_id))
        await stranger.ask(Kind.RESERVE, drop_id, key=stranger.new_key(), insists=True)
        await stranger.ask(Kind.SHOW, drop_id)
        stranger.close()
        asked.discard(drop_id)

    asked = set(crowd.founded)
    with trio.move_on_after(SERVED_MAX_S):
        async with trio.open_nursery() as nursery:
            for drop_id in crowd.founded:
                nursery.start_soon(ask, drop_id)
    if asked:
        raise NotServed(f"with every fault over, {len(asked)} of {len(crowd.founded)} drops do not answer")
    try:
        await until(lambda: checks.number(world.dsn, "SELECT sum(held_count) FROM drops") == 0)
    except trio.TooSlowError as why:
        raise NotServed("with every fault over, holds do not end") from why


def judge(world: World, tally: Tally, *, is_contested: bool, is_clock_true: bool) -> None:
    """Hold what was told to what is stored."""
    recording = recorder.recording(world.crowd.recorder.operations, world.dsn, ttl_ms=TTL_S * 1000)
    tally.hear(recording.operations)
    found = checker.check(
        recording, may_read_stale=is_contested, clock_slack_ms=CLOCK_SLACK_MS if is_clock_true else None
    )
    tally.convict([str(violation) for violation in found])
    tally.convict(checks.violations(world.dsn))
    tally.convict(world.crowd.unexpected)
    tally.convict(world.notes)
    for engine in world.engines:
        bugs = [line for line in bugs_in(engine) if not _is_no_bug(line, is_contested=is_contested)]
        tally.convict([f"in its log: {line[:LINE_MAX]}" for line in bugs])
    tally.longest_s = max(tally.longest_s, world.crowd.longest_s)


def _is_no_bug(line: str, *, is_contested: bool) -> bool:
    """Of a log: a commit that a machine of this load did not get done in time; of two engines, a drop that the other
    one took, or a key that it knows.
    """
    is_contest = is_contested and any(sign in line for sign in CONTEST) and "AssertionError" not in line
    return STATEMENT_TIMED_OUT in line or is_contest


async def _served(world: World, after: str) -> float:
    """How long it took, from now on, until a change was served (s)."""
    began = recorder.now()
    with trio.move_on_after(SERVED_MAX_S):
        return (await world.crowd.serves(began) - began) / 1e6
    logs = "\n".join(engine.log()[-3000:] for engine in world.engines)
    raise NotServed(f"{SERVED_MAX_S} s after {after} nothing was served:\n{logs}")


class Troubled:
    """When something was wrong, on the wall's clock: the holds that ended meanwhile may well be late."""

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        began = time.time()
        try:
            yield
        finally:
            self._spans.append((began, time.time()))

    def late_ms(self, dsn: str) -> list[float]:
        """How late each hold's end was committed that fell due while all was well."""
        return [float(row["late_ms"]) for row in checks.rows(dsn, LATE, *self._ends())]

    def overdue_s(self, dsn: str) -> list[float]:
        """Of each fault in which holds fell due: how long after it their last end was committed."""
        return [float(row["overdue_s"]) for row in checks.rows(dsn, OVERDUE, *self._ends())]

    def _ends(self) -> tuple[list[float], list[float]]:
        return [began - JUST_BEFORE_S for began, _ in self._spans], [ended for _, ended in self._spans]


# The commit's own instant: the server stamps it when it writes the commit record, and loses some stamps in a crash.
SPANS: Final = "unnest(%s::float8[], %s::float8[]) AS span(began, ended)"
LATE: Final = f"""
SELECT date_part('epoch', pg_xact_commit_timestamp(e.xmin) - e.expires_at) * 1000 AS late_ms
FROM drop_events e
WHERE e.type = 'EXPIRED' AND pg_xact_commit_timestamp(e.xmin) IS NOT NULL AND NOT EXISTS (
    SELECT FROM {SPANS} WHERE date_part('epoch', e.expires_at) BETWEEN span.began AND span.ended
)
"""
OVERDUE: Final = f"""
SELECT max(date_part('epoch', pg_xact_commit_timestamp(e.xmin)) - span.ended) AS overdue_s
FROM drop_events e
JOIN {SPANS} ON date_part('epoch', e.expires_at) BETWEEN span.began AND span.ended
WHERE e.type = 'EXPIRED' AND pg_xact_commit_timestamp(e.xmin) IS NOT NULL
GROUP BY span.ended
"""


def _end(server: Server) -> None:
    """Whatever was done to it."""
    if server.is_started and server.process.poll() is None:
        server.signal(signal.SIGCONT)
        server.kill()
