"""Values that are yet to come, for handlers that must not cost a task.

A hot handler is a coroutine that awaits promises and nothing else, so it needs no event loop under it: `drive` runs
it on the spot, as far as it goes, and goes on with it from within whoever keeps the promise. A request that finds all
it needs in memory is asked, decided and answered without a task, an event or a turn of the scheduler of its own. Where
there is a Trio task anyway, `in_trio` waits for such a coroutine.
"""

from collections.abc import Awaitable, Callable, Coroutine, Generator
from functools import partial
from typing import Any, Generic, TypeVar

import trio

from engine.ledger import Unavailable

T = TypeVar("T")

ERRANDS_MAX = 1_000  # that run at once; each is a task and, mostly, a wait for a connection of the pool


class Promise(Generic[T]):
    """A value that one party keeps, once, and one coroutine awaits."""

    __slots__ = ("_error", "_is_settled", "_then", "_value")

    def __init__(self) -> None:
        self._is_settled = False
        self._value: T | None = None
        self._error: Exception | None = None
        self._then: Callable[[], None] | None = None

    def keep(self, value: T) -> None:
        self._value = value
        self._settle()

    def fail(self, error: Exception) -> None:
        """Raise `error` where the promise is awaited."""
        self._error = error
        self._settle()

    def _settle(self) -> None:
        assert not self._is_settled, "a promise is kept once"
        self._is_settled = True
        then, self._then = self._then, None
        if then is not None:
            then()

    def then(self, goes_on: Callable[[], None]) -> None:
        assert self._then is None, "one coroutine awaits a promise"
        self._then = goes_on

    def __await__(self) -> "Generator[Promise[Any], None, T]":
        if not self._is_settled:
            yield self
        assert self._is_settled, "somebody woke a coroutine whose promise was not kept"
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]  # it is a T, None where T says so


Handling = Coroutine[Any, Any, T]
"""A coroutine that awaits promises only."""


def drive(handling: Handling[T], done: Callable[[T], None], failed: Callable[[Exception], None]) -> None:
    """Run `handling` until it ends or waits; in the end call one of the two, maybe before this returns."""
    try:
        promise = handling.send(None)
    except StopIteration as end:
        value: T = end.value
    except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to the one who asked
        failed(error)
        return
    else:
        promise.then(partial(drive, handling, done, failed))
        return
    done(value)


async def in_trio(handling: Handling[T]) -> T:
    """Wait in a Trio task until `handling` has ended. Cancelling the wait does not end it: it goes on by itself."""
    ended: Promise[T] = Promise()
    event = trio.Event()
    ended.then(event.set)
    drive(handling, ended.keep, ended.fail)
    await event.wait()  # from here on the promise is kept, and awaiting it does not reach the event loop
    return await ended


class Errands:
    """What a handler can't do without a task: `run` it in one of this nursery's."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._running = 0

    def run(self, errand: Callable[[], Awaitable[T]]) -> Promise[T]:
        """What `errand` returns or raises; `Unavailable` at once when too many run."""
        promise: Promise[T] = Promise()
        if self._running >= ERRANDS_MAX:
            promise.fail(Unavailable("too many requests wait for the database"))
            return promise
        self._running += 1
        self._nursery.start_soon(self._run, errand, promise)
        return promise

    async def _run(self, errand: Callable[[], Awaitable[T]], promise: Promise[T]) -> None:
        try:
            value = await errand()
        except Exception as error:  # noqa: BLE001 - raised again where the promise is awaited
            promise.fail(error)
        else:
            promise.keep(value)
        finally:
            self._running -= 1
