"""Processes that simulate seeds, each one at a time.

A process that dies, or that does not come back in time, has shown a violation as much as a checker that objects: its
seed is convicted, and another process takes its place. What waits is bounded: a seed is handed out when somebody is
there to run it.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection, get_context, resource_tracker
from typing import Final, NamedTuple

from tests.proof.simulation.seeds import Result, run_seed

SEED_MAX_S: Final = 120.0  # the slowest takes some 2 s; on a machine with much else to do, several times that
# That a process simulates: an engine that was killed leaves what its own process would take along, some 250 KB a seed.
SEEDS_EACH: Final = 1_000
START_S: Final = 60.0  # that a process may take to start
READY: Final = None  # what it says then
END_S: Final = 5.0  # that a process may take to end when there is nothing left to do

Simulate = Callable[[int], Result]


class Done(NamedTuple):
    result: Result
    cpu_s: float


class Crew:
    """Its processes start when they are needed, and end with the block. `simulate` is a function of a module: it runs
    in other processes.
    """

    def __init__(
        self,
        jobs: int,
        *,
        simulate: Simulate = run_seed,
        seed_max_s: float = SEED_MAX_S,
        seeds_each: int = SEEDS_EACH,
    ) -> None:
        self._jobs = jobs
        self._simulate = simulate
        self._seed_max_s = seed_max_s
        self._seeds_each = seeds_each
        self._idle: list[_Worker] = []
        self._busy: list[_Worker] = []

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._idle:
            worker.dismiss()
        for worker in self._busy:
            worker.kill()
        self._idle, self._busy = [], []

    def results(self, seeds: Iterator[int]) -> Iterator[Done]:
        """As they come, each seed once. When the seeds end, those under way are waited for."""
        while True:
            while len(self._busy) < self._jobs and (seed := next(seeds, None)) is not None:
                worker = self._idle.pop() if self._idle else _Worker(self._simulate)
                self._busy.append(worker)
                worker.give(seed, self._seed_max_s)
            if not self._busy:
                return
            for worker in _ready(self._busy):
                done = worker.take()
                self._busy.remove(worker)
                if worker.is_well and worker.seeds < self._seeds_each:
                    self._idle.append(worker)
                elif worker.is_well:
                    worker.dismiss()
                yield done


class _Worker:
    def __init__(self, simulate: Simulate) -> None:
        # Spawned: nothing that this process did can leak into a history.
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, simulate), daemon=True)
        with _deaf():
            self._process.start()
        theirs.close()
        self.is_well = True
        self.seeds = 0  # that it was given
        # A seed's time begins when there is a process to run it: to start one may take longer than the seed.
        if not self.connection.poll(START_S) or self.connection.recv() is not READY:
            self.kill()
            raise RuntimeError(f"a process does not start within {START_S:.0f} s")
        self.until = 0.0  # when its seed must be done, on the monotonic clock
        self._seed = 0
        self._limit_s = 0.0

    def give(self, seed: int, limit_s: float) -> None:
        self._seed, self._limit_s = seed, limit_s
        self.seeds += 1
        self.until = time.monotonic() + limit_s
        with suppress(OSError):  # it has died; `take` says so
            self.connection.send(seed)

    def take(self) -> Done:
        """What came of its seed; after its time, or its death, the verdict on that."""
        if not self.connection.poll():
            self.kill()
            return self._convicted(f"I18: it hangs: not done after {self._limit_s:.0f} s")
        try:
            done: Done = self.connection.recv()
        except (EOFError, OSError):
            self._process.join(END_S)
            self.kill()
            return self._convicted(f"its process died, with exit code {self._process.exitcode}")
        return done

    def _convicted(self, told: str) -> Done:
        return Done(Result(self._seed, violations=[told]), 0.0)

    def dismiss(self) -> None:
        self.connection.close()  # which it takes for the end
        self._process.join(END_S)
        self.kill()

    def kill(self) -> None:
        self.is_well = False
        self.connection.close()
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join(END_S)


def _ready(busy: list[_Worker]) -> list[_Worker]:
    """Those that have something to say, or whose time is over; at least one."""
    while True:
        left_s = min(worker.until for worker in busy) - time.monotonic()
        spoken = connection.wait([worker.connection for worker in busy], timeout=max(0.0, left_s))
        now = time.monotonic()
        found = [worker for worker in busy if worker.connection in spoken or worker.until <= now]
        if found:
            return found


def _work(seeds: "connection.Connection[Done | None, int]", simulate: Simulate) -> None:
    with suppress(OSError):
        seeds.send(READY)
    while True:
        try:
            seed = seeds.recv()
        except (EOFError, OSError):
            return
        began = time.process_time()
        result = simulate(seed)
        try:
            seeds.send(Done(result, time.process_time() - began))
        except OSError:
            return  # nobody is interested any more


@contextmanager
def _deaf() -> Iterator[None]:
    """A process that is started meanwhile never hears Ctrl-C: who started it tells it when to end, and hears it later.

    Held back rather than ignored, since what is ignored here would be lost.
    """
    resource_tracker.ensure_running()  # or starting it would let the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
