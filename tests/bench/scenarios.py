"""The scenarios: what is asked of one target in one round, and what must be true of it afterwards.

    hot        one live drop with more stock than anybody can take; each request by another, known user
    noop       what a request costs that is refused at once: reserve on a path id that is no UUID, 422
    strangers  hot, by users whom the server's memory has never seen; its database has them
    many       1,000 drops, the k-th most wanted one in proportion to 1/k
    soldout    a drop whose last unit is bought: each answer is 409 OUT_OF_STOCK
    pairs      journeys without a thought: reserve, then at once purchase, on the same connection
    rate       hot, open loop, latency from the intended start
    retry      hot with an Idempotency-Key each; a fifth is sent twice, half of these at the same time
    viewers, watched, wire, stalled   with viewers who watch it live; see `tests.bench.audience`
    journey    a crowd at `starts_at`; see `tests.bench.journey`

A crowd reserves what it can at full speed in all others, on the same number of connections.
"""

import dataclasses
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Literal

import httpx
import msgspec

from tests.bench import audience, generator, targets
from tests.bench.job import REQUESTS_MAX, Crowd, Job, Plan, Users
from tests.bench.results import Load, Run, together
from tests.bench.screen import Screen
from tests.bench.targets import Target, Unusable

SCENARIOS: Final = (
    "hot",
    "noop",
    "strangers",
    "many",
    "soldout",
    "pairs",
    "rate",
    "retry",
    *audience.FAMILIES,
    "journey",
)
BASELINE_SCENARIOS: Final = ("hot", "many", "soldout")  # what the baselines are measured with too
STOCK: Final = 100_000_000
DROPS: Final = 1_000
WARM_UP_S: Final = 0.5
LEAD_S: Final = 1.5  # between the making of a journey's drop and its opening
STOCK_SHARE: Final = 0.6  # of a journey's buyers: so many find a unit, before any comes back
HOLD_MAX_S: Final = 90.0  # for the last hold of a journey to run out
TWICE: Final = 0.2
MARGIN: Final = 2.0  # more requests are prepared than a run should need: a server may be faster than it was before


@dataclass
class Options:
    """What the command line chose; units in the names."""

    scenarios: tuple[str, ...] = SCENARIOS
    rounds: int = 5
    seconds: float = 3.0
    connections: int = 64
    processes: int = 1
    rate: float | None = None
    arrivals: Literal["constant", "poisson"] = "poisson"
    connections_max: int = 512
    buyers: int = 2_000
    patience_s: float = 6.0
    users_max: int = 150_000
    seed: int = 1
    viewers: tuple[int, ...] = (200, 1_000, 4_000)


@dataclass
class Stage:
    """Where the runs happen: who is asked, by whom, and who looks on."""

    options: Options
    users: Users
    screen: Screen
    peaks: dict[str, float] = field(default_factory=dict)  # answers per s, the best seen so far, by target
    pool: int = 0  # users whom Holdfast knows
    strangers_from: int = 0
    frame_bytes: int = audience.FRAME_BYTES  # of Holdfast's newest text for one reserve

    # --- one run -------------------------------------------------------------------------------------

    def measure(self, scenario: str, target: Target, number: int) -> Run:
        """One scenario on one target in round `number`; behind some names stands a number of viewers."""
        name, _, count = scenario.partition(" ")
        perform: Callable[[Target, int], Load] = {
            "hot": self._hot,
            "noop": self._noop,
            "strangers": self._strangers,
            "many": self._many,
            "soldout": self._soldout,
            "pairs": self._pairs,
            "rate": self._rate,
            "retry": self._retry,
            "viewers": lambda target, number: self._viewers(target, int(count)),
            "watched": lambda target, number: self._watched(target, number, int(count)),
            "wire": lambda target, number: self._paced(target, number, float(count), 0),
            "stalled": lambda target, number: self._paced(target, number, audience.PACE, int(count)),
            "journey": self._journey,
        }[name]
        load = perform(target, number)
        if scenario == "hot":
            self.peaks[target.name] = load.done / load.seconds
        run = Run(
            scenario=scenario,
            target=target.name,
            round=number,
            connections=self.options.connections,
            processes=self.options.processes,
            load=load,
        )
        self.screen.end(run)
        return run

    def _hot(self, target: Target, number: int) -> Load:
        drop = target.new_drop(STOCK)
        return self._stock_holds(target, drop, self._run(target, number, self._by_all((drop,)), "201"))

    def _noop(self, target: Target, number: int) -> Load:
        plan = msgspec.structs.replace(self._by_all(()), path="/drops/not-a-uuid/reserve", requests=REQUESTS_MAX)
        return self._run(target, number, plan, "422 VALIDATION_ERROR")

    def _strangers(self, target: Target, number: int) -> Load:
        first, count = self.strangers_from, self._enough(target, self.options.users_max)
        self.strangers_from += count
        if target.dsn is not None:
            targets.introduce(target.dsn, self.users, first, count)
        drop = target.new_drop(STOCK)
        plan = Plan(first_user=first, users=count, requests=count, drops=(drop,))
        return self._stock_holds(target, drop, self._run(target, number, plan, "201"))

    def _many(self, target: Target, number: int) -> Load:
        drops = tuple(target.new_drop(STOCK) for _ in range(DROPS))
        return self._run(target, number, self._by_all(drops), "201")

    def _soldout(self, target: Target, number: int) -> Load:
        drop, (buyer,) = target.new_drop(1), self.users.ids(0, 1)
        for step in ("reserve", "purchase"):
            target.ask("POST", f"/drops/{drop}/{step}", buyer)
        plan = msgspec.structs.replace(self._by_all((drop,)), requests=REQUESTS_MAX)
        load = self._run(target, number, plan, "409 OUT_OF_STOCK")
        return _with_failure(load, None if target.available(drop) == 0 else "the sold-out drop has stock again")

    def _pairs(self, target: Target, number: int) -> Load:
        drop = target.new_drop(STOCK)
        plan = msgspec.structs.replace(self._by_all((drop,)), is_bought=True)
        load = self._run(target, number, plan, "201")
        return msgspec.structs.replace(load, figures=load.figures | {"journeys_per_s": load.done / load.seconds / 2})

    def _rate(self, target: Target, number: int) -> Load:
        rate = self.options.rate or self.peaks.get(target.name, 0) / 2
        if not rate:
            raise Unusable("The scenario `rate` needs --rate, or `hot` before it, half of whose peak it takes.")
        drop = target.new_drop(STOCK)
        load = self._run(target, number, self._by_all((drop,)), "201", rate=rate)
        return msgspec.structs.replace(self._stock_holds(target, drop, load), figures=load.figures | {"rate": rate})

    def _retry(self, target: Target, number: int) -> Load:
        drop = target.new_drop(STOCK)
        plan = msgspec.structs.replace(self._by_all((drop,)), keys=f"{self.users.tag}-{number}", twice=TWICE)
        load = self._run(target, number, plan, "201")
        replays = load.checked.get("replays are the first answer", 0)
        return self._stock_holds(target, drop, load, replays)

    def _viewers(self, target: Target, count: int) -> Load:
        load = audience.passes(target, self.users, count, self.options.seconds, self.frame_bytes)
        if target.trigger is None:
            self.frame_bytes = round(load.figures["text_bytes"]) or self.frame_bytes
        return load

    def _watched(self, target: Target, number: int, count: int) -> Load:
        drop = target.new_drop(STOCK)
        plan = self._by_all((drop,))
        if not count:
            load = self._stock_holds(target, drop, self._run(target, number, plan, "201"))
            return msgspec.structs.replace(load, figures=load.figures | {"reserves_per_s": load.done / load.seconds})
        with audience.draining(target, drop, self.users, count) as watching:
            seen = dataclasses.replace(target, watched={**target.watched, "viewers": watching.pid})
            load = self._run(seen, number, plan, "201")
            left = target.available(drop)
            watched = watching.end()
        audience.settle()
        failures = list(watched.failures)
        if not failures and watched.figures["newest_stock"] != left:
            failures.append(f"viewers were told of {watched.figures['newest_stock']:.0f} units last, of {left}")
        load = self._stock_holds(target, drop, load)
        load = msgspec.structs.replace(
            load,
            checked=load.checked | watched.checked,
            figures=load.figures
            | {
                "reserves_per_s": load.done / load.seconds,
                "viewers": float(count),
                "share_of_cpu_of_viewers": load.cpu_s["viewers"] / used if (used := _of_all(load)) else 0.0,
                "frames_per_viewer_per_s": watched.figures["frames_per_viewer"] / watched.seconds,
            },
        )
        for failure in failures:
            load = _with_failure(load, failure)
        return load

    def _paced(self, target: Target, number: int, rate: float, heavies: int) -> Load:
        seed = self.options.seed * 1_000 + number
        return audience.paced(target, self.users, self.options.seconds, rate, heavies, seed)

    def _journey(self, target: Target, number: int) -> Load:
        options = self.options
        total, starts_at = max(1, int(options.buyers * STOCK_SHARE)), round(time.time() + LEAD_S, 3)
        drop = target.new_drop(total, status="scheduled", starts_at=_iso(starts_at))
        crowd = Crowd(buyers=options.buyers, starts_at=starts_at, patience_s=options.patience_s)
        plan = Plan(first_user=0, users=options.buyers, requests=0, drops=(drop,), seed=options.seed * 1_000 + number)
        seconds = LEAD_S + crowd.patience_s
        job = self._job(target, plan, "201", seconds=seconds, total_stock=total, crowd=crowd)
        load = self._load(target, [job], drop)
        if load.lost or any("OUTCOME_UNKNOWN" in name for name in load.all_answers):
            return load
        wanted = total - int(load.figures["purchased"])
        left = _settled(target, drop, wanted, HOLD_MAX_S)
        load.checked["what was not bought is there again"] = 1
        return _with_failure(load, None if left == wanted else f"{left} units are left, and {wanted} were not bought")

    # --- before it all -------------------------------------------------------------------------------

    def familiarise(self, target: Target) -> None:
        """Make as many users known to the server as a run will need; nothing of this is counted."""
        self.screen.begin(f"{target.name}: warming up", 0)
        brief_s = min(1.0, self.options.seconds)
        first = self._warm(target, 0, self.options.users_max, brief_s)
        known = first.all_answers.get("201", 0)
        if first.failed or not known:
            shown = "; ".join(first.failures[:3]) or first.all_answers
            raise Unusable(
                f"The warm-up of {target.name} failed, {first.failed} answers are wrong or missing: {shown}."
            )
        again = self._warm(target, 0, known, brief_s)
        self.peaks[target.name] = again.done / again.seconds
        self.pool = self._enough(target, self.options.users_max)
        if self.pool > known:
            self._warm(target, known, self.pool - known, 60.0)
        self.strangers_from = self.options.users_max

    def _warm(self, target: Target, first: int, count: int, seconds: float) -> Load:
        drop = target.new_drop(STOCK)
        plan = Plan(first_user=first, users=count, requests=count, drops=(drop,))
        job = self._job(target, plan, "201", warm_up_s=0.0, seconds=seconds)
        return self._load(target, [job], drop)

    # --- the generators ------------------------------------------------------------------------------

    def _by_all(self, drops: tuple[str, ...]) -> Plan:
        users = self.pool or self.options.users_max
        return Plan(first_user=0, users=users, requests=users, drops=drops)

    def _enough(self, target: Target, most: int) -> int:
        seconds = self.options.seconds + WARM_UP_S
        return min(most, int(self.peaks[target.name] * seconds * MARGIN) + 10 * self.options.connections)

    def _job(self, target: Target, plan: Plan, expected: str, **more: Any) -> Job:
        options = self.options
        wanted = {
            "server": target.server,
            "users": self.users,
            "plan": plan,
            "connections": options.connections,
            "connections_max": options.connections_max,
            "seconds": options.seconds,
            "warm_up_s": WARM_UP_S,
            "expected": expected,
            "total_stock": STOCK,
            "watched": target.watched,
            "arrivals": options.arrivals,
        }
        return Job(**{**wanted, **more})

    def _run(self, target: Target, number: int, plan: Plan, expected: str, rate: float | None = None) -> Load:
        parts = self.options.processes
        plan = msgspec.structs.replace(plan, seed=self.options.seed * 1_000 + number)
        jobs = [
            self._job(
                target,
                msgspec.structs.replace(plan, part=(part, parts)),
                expected,
                connections=max(1, self.options.connections // parts),
                connections_max=max(1, self.options.connections_max // parts),
                rate=None if rate is None else rate / parts,
            )
            for part in range(parts)
        ]
        return self._load(target, jobs, plan.drops[0] if len(plan.drops) == 1 else None)

    def _load(self, target: Target, jobs: list[Job], drop: str | None) -> Load:
        """Start the generators and wait; meanwhile show what they say.

        Raises:
            Unusable: a generator broke off.
        """
        heard: queue.Queue[tuple[int, int | Load | None]] = queue.Queue()
        began = time.monotonic()
        processes = [_start(job, number, heard) for number, job in enumerate(jobs)]
        loads: list[Load] = []
        answered = [0] * len(jobs)
        last_at, last = began, 0
        try:
            open_pipes = len(jobs)
            while open_pipes:
                number, said = heard.get(timeout=jobs[0].seconds + 120)
                if said is None:
                    open_pipes -= 1
                elif isinstance(said, Load):
                    loads.append(said)
                else:
                    answered[number] = said
                    now = time.monotonic()
                    if number == 0 and now > last_at:
                        self.screen.tick(now - began, (sum(answered) - last) / (now - last_at))
                        last_at, last = now, sum(answered)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if len(loads) < len(jobs):
            errors = b"".join(process.stderr.read() for process in processes if process.stderr)
            raise Unusable(f"A load generator broke off: {errors.decode(errors='replace')[-2000:]}")
        return together(loads)

    def _stock_holds(self, target: Target, drop: str, load: Load, replays: int = 0) -> Load:
        """The drop's stock is what it was less what was acknowledged: where each answer is known, and no hold ended."""
        taken = load.all_answers.get("201", 0) - replays
        left = target.available(drop)
        is_certain = not load.lost and not any("OUTCOME_UNKNOWN" in name for name in load.all_answers)
        if load.figures.get("hold_s", 0) <= time.monotonic() - load.began_at + WARM_UP_S:
            is_certain = False
        if is_certain and left != STOCK - taken:
            return _with_failure(load, f"{taken} units were given out, and {STOCK - left} are gone")
        if is_certain:
            load.checked["stock is what was not given out"] = 1
        return load


def _of_all(load: Load) -> float:
    return sum(used for name, used in load.cpu_s.items() if name != "machine")


def _settled(target: Target, drop: str, wanted: int, patience_s: float) -> int:
    """The drop's stock, once the holds that nobody bought have run out: at the latest when our patience has."""
    give_up_at = time.monotonic() + patience_s
    while (left := target.available(drop)) != wanted and time.monotonic() < give_up_at:
        time.sleep(0.1)
    return left


def _iso(instant_s: float) -> str:
    return datetime.fromtimestamp(instant_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _with_failure(load: Load, failure: str | None) -> Load:
    if failure is None:
        return load
    return msgspec.structs.replace(load, failed=load.failed + 1, failures=[*load.failures, failure])


def _start(job: Job, number: int, heard: "queue.Queue[tuple[int, int | Load | None]]") -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-m", generator.__name__], stdin=pipe, stdout=pipe, stderr=pipe)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(msgspec.json.encode(job))
    process.stdin.close()
    lines = process.stdout

    def listen() -> None:
        for said in generator.ticks(iter(lines)):
            heard.put((number, said))
        heard.put((number, None))

    threading.Thread(target=listen, daemon=True).start()
    return process


def is_up(target: Target) -> None:
    """Refuse a URL behind which nobody answers, before anything else is done.

    Raises:
        Unusable: nobody listens there.
    """
    try:
        target.client.get(f"{target.root}/drops?limit=1")
    except httpx.TransportError as fault:
        raise Unusable(f"Nobody answers at {target.root}: {fault}.") from fault
