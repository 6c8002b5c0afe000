"""The committed picture: who holds what, and which drops are listed in which order."""

from engine.board import Board
from engine.drop import Drop
from engine.model import DropCreated, DropId, DropStatus, DropUpdated, Refused, ReservationId, Swept, UserId
from tests.engine.making import ANN, BEN, at, born, cancel, live, play, purchase, reserve, sweep, terms


def made(name: str, created_at: int, status: DropStatus = DropStatus.LIVE, ends_at: int | None = None) -> Drop:
    return born(terms(drop_id=DropId(name), created_at=created_at, ends_at=ends_at), status)


def names(board: Board, limit: int = 20, offset: int = 0) -> tuple[list[str], int]:
    page, total = board.listed(limit, offset)
    return [drop.terms.id for drop in page], total


def held_ids(board: Board, user: UserId) -> list[str]:
    return [hold.id for hold in board.holds_of(user)]


def play_on(board: Board, drop: Drop, command: object, now: int) -> None:
    """Play a command and let the board follow, as an actor does after a commit."""
    for event in sweep(drop, now):
        board.committed(drop.terms.id, event)
    decision = play(drop, command, now)  # type: ignore[arg-type]
    assert not isinstance(decision, Refused | Swept)
    board.committed(drop.terms.id, decision)


def test_drops_are_listed_newest_first_in_pages() -> None:
    board = Board()
    for name, created_at in [("b", 2), ("d", 4), ("a", 1), ("c", 3)]:
        board.show(made(name, created_at))
    assert names(board) == (["d", "c", "b", "a"], 4)
    assert names(board, limit=2, offset=1) == (["c", "b"], 4)
    assert names(board, limit=2, offset=9) == ([], 4)


def test_drops_of_one_instant_are_all_listed() -> None:
    board = Board()
    for name in ("b", "a", "c"):
        board.show(made(name, 7))
    assert names(board) == (["a", "b", "c"], 3)


def test_only_scheduled_and_live_drops_are_listed_but_all_are_found() -> None:
    board = Board()
    for number, status in enumerate(DropStatus):
        board.show(born(terms(drop_id=DropId(status), created_at=number, starts_at=99), status))
    assert names(board) == (["live", "scheduled"], 2)
    assert board.drop(DropId("draft")) is not None
    assert len(list(board.drops())) == 6
    assert board.drop(DropId("none")) is None


def test_a_drop_leaves_the_list_when_it_ends_and_comes_when_it_starts() -> None:
    board = Board()
    drop = born(terms(starts_at=10, ends_at=20), DropStatus.DRAFT)
    board.show(drop)
    assert names(board) == ([], 0)
    for seq, status, listed in [(2, "scheduled", 1), (3, "live", 1), (4, "ended", 0)]:
        event = DropUpdated(seq, at(0), DropStatus(status))
        drop.apply(event)
        board.committed(drop.terms.id, event)
        assert names(board)[1] == listed


def test_a_hold_is_on_the_board_until_it_ends() -> None:
    board, drop = Board(), live(5)
    board.show(drop)
    play_on(board, drop, reserve(ANN), 0)
    play_on(board, drop, reserve(BEN), 0)
    assert held_ids(board, ANN) == ["ann"]
    play_on(board, drop, purchase(ANN), 1)
    assert held_ids(board, ANN) == []
    assert held_ids(board, BEN) == ["ben"]
    play_on(board, drop, cancel(BEN), 1)
    play_on(board, drop, reserve(ANN, "again"), 1)
    for event in sweep(drop, 60_001):
        board.committed(drop.terms.id, event)
    assert held_ids(board, ANN) == held_ids(board, BEN) == []


def test_a_user_holds_in_several_drops() -> None:
    board, one, two = Board(), made("one", 1), made("two", 2)
    board.show(one)
    board.show(two)
    play_on(board, one, reserve(ANN, "first"), 10)
    play_on(board, two, reserve(ANN, "second"), 20)
    assert held_ids(board, ANN) == ["first", "second"]
    play_on(board, one, purchase(ANN), 30)
    assert held_ids(board, ANN) == ["second"]


def test_holds_are_told_oldest_first_in_whatever_order_their_drops_were_loaded() -> None:
    board, one, two = Board(), made("one", 1), made("two", 2)
    play(one, reserve(ANN, "first"), 10)
    play(two, reserve(ANN, "second"), 20)
    board.show(two)
    board.show(one)
    assert held_ids(board, ANN) == ["first", "second"]


def test_showing_a_drop_again_replaces_all_of_it() -> None:
    board, drop = Board(), live(5)
    board.show(drop)
    play_on(board, drop, reserve(ANN), 0)
    fresh = live(5)
    play(fresh, reserve(BEN), 0)
    board.show(fresh)
    assert board.holds_of(ANN) == ()
    assert [hold.id for hold in board.holds_of(BEN)] == [ReservationId("ben")]
    assert names(board) == (["drop-1"], 1)
    assert board.drop(drop.terms.id) is fresh


def test_a_forgotten_drop_leaves_nothing_behind() -> None:
    board, drop = Board(), live(5)
    board.show(drop)
    play_on(board, drop, reserve(ANN), 0)
    board.forget(drop.terms.id)
    board.forget(drop.terms.id)
    assert board.drop(drop.terms.id) is None
    assert board.holds_of(ANN) == ()
    assert names(board) == ([], 0)


def test_a_birth_is_shown_by_the_registry_and_changes_nothing_here() -> None:
    board, drop = Board(), live(5)
    board.show(drop)
    board.committed(drop.terms.id, DropCreated(1, at(0), drop.terms, DropStatus.LIVE))
    assert names(board) == (["drop-1"], 1)
