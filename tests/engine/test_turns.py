"""Turns: in the order in which they were asked for, and never all of them before somebody else has one."""

from itertools import pairwise

import trio
from trio.testing import wait_all_tasks_blocked

from engine.turns import TURNS_AT_ONCE, Turns


class Player:
    def __init__(self, turns: Turns, played: list[str], name: str, times: int = 1) -> None:
        self._turns, self._played, self._name, self._left = turns, played, name, times

    def take_turn(self) -> None:
        self._played.append(self._name)
        self._left -= 1
        if self._left:
            self._turns.ask(self)


async def test_turns_come_in_order_and_again_behind_the_others() -> None:
    turns, played = Turns(), list[str]()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(turns.run)
        await wait_all_tasks_blocked()
        for name, times in (("a", 2), ("b", 1), ("c", 3)):
            turns.ask(Player(turns, played, name, times))
        await wait_all_tasks_blocked()
        assert "".join(played) == "abcacc"
        turns.ask(Player(turns, played, "d"))
        await wait_all_tasks_blocked()
        assert played[-1] == "d"
        nursery.cancel_scope.cancel()


async def test_turns_let_other_tasks_run_in_between() -> None:
    turns, played = Turns(), list[str]()
    seen: list[int] = []

    async def look() -> None:
        while len(played) < 10 * TURNS_AT_ONCE:
            seen.append(len(played))
            await trio.lowlevel.checkpoint()

    for _ in range(10 * TURNS_AT_ONCE):
        turns.ask(Player(turns, played, "x"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(turns.run)
        await look()
        nursery.cancel_scope.cancel()
    # Trio runs the tasks of one pass in either order: so two slices may come one after the other.
    assert max(later - earlier for earlier, later in pairwise(seen)) <= 2 * TURNS_AT_ONCE
