"""Promises: handlers that cost no task, driven on the spot or waited for in Trio."""

from typing import Any

import pytest
import trio

from api.promises import ERRANDS_MAX, Errands, Promise, drive, in_trio
from engine.ledger import Unavailable


class Ended:
    """What became of a handling."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.failures: list[Exception] = []

    @property
    def so_far(self) -> tuple[list[Any], list[Exception]]:
        return self.values, self.failures


def driven(handling: Any) -> Ended:
    ended = Ended()
    drive(handling, ended.values.append, ended.failures.append)
    return ended


async def waits_for(*promises: Promise[int]) -> int:
    return sum([await promise for promise in promises])


async def just(value: int) -> int:
    return value


def test_coroutine_that_waits_for_nothing_ends_on_the_spot() -> None:
    assert driven(just(7)).so_far == ([7], [])


def test_kept_promise_is_not_waited_for() -> None:
    promise: Promise[int] = Promise()
    promise.keep(7)

    assert driven(waits_for(promise)).so_far == ([7], [])


def test_coroutine_goes_on_from_within_whoever_keeps_the_promise() -> None:
    first: Promise[int] = Promise()
    second: Promise[int] = Promise()
    ended = driven(waits_for(first, second))

    first.keep(1)
    assert ended.so_far == ([], [])
    second.keep(2)
    assert ended.so_far == ([3], [])


def test_promises_may_be_kept_in_another_order() -> None:
    first: Promise[int] = Promise()
    second: Promise[int] = Promise()
    ended = driven(waits_for(first, second))

    second.keep(2)
    assert ended.so_far == ([], [])
    first.keep(1)
    assert ended.so_far == ([3], [])


def test_promise_of_none_is_a_value() -> None:
    promise: Promise[None] = Promise()

    async def waits() -> str:
        assert await promise is None  # type: ignore[func-returns-value]
        return "went on"

    ended = driven(waits())
    promise.keep(None)
    assert ended.so_far == (["went on"], [])


def test_failed_promise_raises_where_it_is_awaited() -> None:
    promise: Promise[int] = Promise()

    async def catches() -> str:
        try:
            await promise
        except ValueError as error:
            return f"caught {error}"
        return "not caught"

    ended = driven(catches())
    promise.fail(ValueError("this"))
    assert ended.so_far == (["caught this"], [])


@pytest.mark.parametrize("is_kept_before", [True, False])
def test_exception_goes_to_the_one_who_asked_and_not_to_the_one_who_keeps(is_kept_before: bool) -> None:
    promise: Promise[int] = Promise()
    error = RuntimeError("a bug")

    async def breaks() -> int:
        await promise
        raise error

    if is_kept_before:
        promise.keep(1)
        ended = driven(breaks())
    else:
        ended = driven(breaks())
        promise.keep(1)  # raises nothing here
    assert ended.so_far == ([], [error])


def test_exception_in_what_is_done_with_the_answer_is_not_taken_for_the_handlings() -> None:
    def done(_: int) -> None:
        raise KeyError("of the one who asked")

    failures: list[Exception] = []
    with pytest.raises(KeyError):
        drive(just(1), done, failures.append)
    assert failures == []


def test_promise_is_kept_once() -> None:
    promise: Promise[int] = Promise()
    promise.keep(1)
    with pytest.raises(AssertionError, match="once"):
        promise.keep(2)
    with pytest.raises(AssertionError, match="once"):
        promise.fail(ValueError())


def test_promise_is_awaited_by_one() -> None:
    promise: Promise[int] = Promise()
    driven(waits_for(promise))
    with pytest.raises(AssertionError, match="one coroutine"):
        driven(waits_for(promise))


def test_thousand_kept_promises_in_a_row_need_no_stack() -> None:
    kept: list[Promise[int]] = [Promise() for _ in range(10_000)]
    for promise in kept:
        promise.keep(1)

    assert driven(waits_for(*kept)).so_far == ([10_000], [])


# In a task --------------------------------------------------------------------------------------------


async def test_task_waits_for_a_handling(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    promise: Promise[int] = Promise()

    async def keep_later() -> None:
        await trio.sleep(5)
        promise.keep(7)

    nursery.start_soon(keep_later)
    assert await in_trio(waits_for(promise)) == 7
    assert trio.current_time() == 5


async def test_task_gets_the_exception_of_a_handling(nursery: trio.Nursery) -> None:
    promise: Promise[int] = Promise()

    async def fail_later() -> None:
        promise.fail(ValueError("this"))

    nursery.start_soon(fail_later)
    with pytest.raises(ValueError, match="this"):
        await in_trio(waits_for(promise))


async def test_end_of_the_wait_is_not_the_end_of_what_was_asked(autojump_clock: trio.testing.MockClock) -> None:
    promise: Promise[int] = Promise()
    done: list[int] = []

    async def handling() -> int:
        done.append(await promise)
        return done[0]

    with trio.move_on_after(1) as patience:
        await in_trio(handling())
    assert patience.cancelled_caught
    assert done == []

    promise.keep(7)
    assert done == [7]


async def test_failure_after_the_end_of_the_wait_disturbs_nobody(autojump_clock: trio.testing.MockClock) -> None:
    promise: Promise[int] = Promise()
    with trio.move_on_after(1):
        await in_trio(waits_for(promise))

    promise.fail(ValueError("nobody hears it"))


# Errands ----------------------------------------------------------------------------------------------


async def test_errand_runs_in_a_task_and_keeps_its_promise(nursery: trio.Nursery) -> None:
    async def errand() -> int:
        await trio.lowlevel.checkpoint()
        return 7

    assert await in_trio(waits_for(Errands(nursery).run(errand))) == 7


async def test_errands_exception_is_raised_where_it_is_awaited_and_not_in_the_nursery(nursery: trio.Nursery) -> None:
    async def errand() -> int:
        raise Unavailable("gone")

    with pytest.raises(Unavailable, match="gone"):
        await in_trio(waits_for(Errands(nursery).run(errand)))
    assert not nursery.cancel_scope.cancel_called


async def test_thousand_errands_run_at_once_and_one_more_is_refused(nursery: trio.Nursery) -> None:
    errands, go = Errands(nursery), trio.Event()

    async def errand() -> int:
        await go.wait()
        return 1

    running = [errands.run(errand) for _ in range(ERRANDS_MAX)]
    refused = driven(waits_for(errands.run(errand)))
    (failure,) = refused.failures
    assert isinstance(failure, Unavailable)

    go.set()
    assert [await in_trio(waits_for(promise)) for promise in running] == [1] * ERRANDS_MAX
    assert await in_trio(waits_for(errands.run(errand))) == 1


async def test_failed_errands_make_room_too(nursery: trio.Nursery) -> None:
    errands = Errands(nursery)

    async def errand() -> int:
        raise ValueError("this")

    for _ in range(3):
        for ended in [driven(waits_for(errands.run(errand))) for _ in range(ERRANDS_MAX)]:
            while not ended.failures:
                await trio.lowlevel.checkpoint()
            assert isinstance(ended.failures[0], ValueError)
