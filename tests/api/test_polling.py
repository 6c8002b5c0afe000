"""One suite for both pollers: epoll's, and the plain one with a task for each socket."""

import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import trio

from api.polling import READ, WRITE, EpollPoller, Poller, TaskPoller

MOST = 100


@pytest.fixture(params=["epoll", "tasks"])
async def poller(request: pytest.FixtureRequest, nursery: trio.Nursery) -> Poller:
    if request.param == "tasks":
        return TaskPoller(nursery)
    if not hasattr(select, "epoll"):
        pytest.skip("this system has no epoll")
    return EpollPoller()


@pytest.fixture
def open_sockets() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def pair(open_sockets: ExitStack) -> tuple[socket.socket, socket.socket]:
    return new_pair(open_sockets)


def new_pair(open_sockets: ExitStack) -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setblocking(False)
        open_sockets.enter_context(sock)
    return ours, theirs


async def ready(poller: Poller) -> dict[int, int]:
    """What is ready, each once; waits for something."""
    with trio.fail_after(5):
        found: dict[int, int] = {}
        while not found:
            for fd, events in await poller.wait(MOST):
                found[fd] = found.get(fd, 0) | events
        return found


async def is_quiet(poller: Poller) -> bool:
    """Whether nothing is ready, and nothing becomes so."""
    with trio.move_on_after(0.05):
        while True:
            if await poller.wait(MOST):
                return False
    return True


def fill(sock: socket.socket) -> None:
    try:
        while True:
            sock.send(bytes(65_536))
    except BlockingIOError:
        pass


def drain(sock: socket.socket) -> None:
    try:
        while True:
            sock.recv(65_536)
    except BlockingIOError:
        pass


async def test_socket_is_reported_when_there_is_something_to_read(
    poller: Poller, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = pair
    poller.add(ours, READ)
    assert await is_quiet(poller)
    theirs.send(b"x")
    assert await ready(poller) == {ours.fileno(): READ}
    poller.close()


async def test_wait_ends_when_something_comes_later(
    poller: Poller, pair: tuple[socket.socket, socket.socket], nursery: trio.Nursery
) -> None:
    ours, theirs = pair
    poller.add(ours, READ)

    async def send_later() -> None:
        await trio.sleep(0.02)
        theirs.send(b"x")

    nursery.start_soon(send_later)
    assert await ready(poller) == {ours.fileno(): READ}
    poller.close()


async def test_socket_is_reported_until_it_was_read(poller: Poller, pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    poller.add(ours, READ)
    theirs.send(b"xy")
    for _ in range(3):
        assert await ready(poller) == {ours.fileno(): READ}
    ours.recv(1)
    assert await ready(poller) == {ours.fileno(): READ}
    ours.recv(1)
    assert await is_quiet(poller)
    theirs.send(b"z")
    assert await ready(poller) == {ours.fileno(): READ}
    poller.close()


async def test_end_of_the_peer_is_something_to_read(poller: Poller, pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    poller.add(ours, READ)
    theirs.close()
    found = await ready(poller)
    assert found[ours.fileno()] & ~WRITE
    assert ours.recv(1) == b""
    poller.close()


async def test_socket_is_reported_when_there_is_room_to_write(
    poller: Poller, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = pair
    fill(ours)
    poller.add(ours, WRITE)
    assert await is_quiet(poller)
    drain(theirs)
    assert await ready(poller) == {ours.fileno(): WRITE}
    poller.close()


async def test_both_directions_are_watched_at_once(poller: Poller, pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    fill(ours)
    poller.add(ours, READ | WRITE)
    theirs.send(b"x")
    assert await ready(poller) == {ours.fileno(): READ}
    drain(theirs)
    found = 0
    while found != READ | WRITE:  # together or one after the other
        found |= (await ready(poller))[ours.fileno()]
    poller.close()


async def test_change_of_interest_counts_at_once(poller: Poller, pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    poller.add(ours, READ)
    theirs.send(b"x")
    assert await ready(poller) == {ours.fileno(): READ}
    poller.change(ours, WRITE)
    assert await ready(poller) == {ours.fileno(): WRITE}
    poller.change(ours, 0)
    assert await is_quiet(poller)
    poller.change(ours, READ)
    assert await ready(poller) == {ours.fileno(): READ}
    poller.close()


async def test_interest_may_change_to_and_fro_while_nobody_waits(
    poller: Poller, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = pair
    poller.add(ours, READ)
    for _ in range(10):
        poller.change(ours, 0)
        poller.change(ours, READ)
        await trio.lowlevel.checkpoint()
    theirs.send(b"x")
    assert await ready(poller) == {ours.fileno(): READ}
    poller.change(ours, 0)
    poller.change(ours, READ)
    ours.recv(1)
    await is_quiet(poller)  # one last report of what has been read meanwhile does no harm
    assert await is_quiet(poller)
    poller.close()


async def test_removed_socket_is_not_reported(poller: Poller, pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    poller.add(ours, READ)
    theirs.send(b"x")
    assert await ready(poller) == {ours.fileno(): READ}
    poller.remove(ours)
    assert await is_quiet(poller)
    poller.add(ours, READ)
    assert await ready(poller) == {ours.fileno(): READ}
    poller.close()


async def test_socket_may_be_removed_and_closed_while_it_is_watched(
    poller: Poller, open_sockets: ExitStack, nursery: trio.Nursery
) -> None:
    (gone, _), (ours, theirs) = new_pair(open_sockets), new_pair(open_sockets)
    poller.add(gone, READ | WRITE)
    poller.add(ours, READ)

    async def go_then_send() -> None:
        await trio.sleep(0.02)
        poller.remove(gone)
        gone.close()
        await trio.sleep(0.02)
        theirs.send(b"x")

    nursery.start_soon(go_then_send)
    with trio.fail_after(5):
        while True:
            found = await poller.wait(MOST)
            if (ours.fileno(), READ) in found:
                break
    poller.close()


async def test_descriptor_of_a_closed_socket_may_be_used_again(poller: Poller, open_sockets: ExitStack) -> None:
    for _ in range(20):
        ours, theirs = new_pair(open_sockets)
        fd = ours.fileno()
        poller.add(ours, READ)
        theirs.send(b"x")
        assert await ready(poller) == {fd: READ}
        poller.remove(ours)
        ours.close()
        again, peer = new_pair(open_sockets)
        assert again.fileno() == fd
        poller.add(again, READ)
        assert await is_quiet(poller)
        peer.send(b"y")
        assert await ready(poller) == {fd: READ}
        poller.remove(again)
        again.close()
        theirs.close()
        peer.close()
    poller.close()


async def test_at_most_so_many_are_reported_and_none_is_forgotten(poller: Poller, open_sockets: ExitStack) -> None:
    waiting = set()
    for _ in range(30):
        ours, theirs = new_pair(open_sockets)
        poller.add(ours, READ)
        theirs.send(b"x")
        waiting.add(ours.fileno())
    by_fd = {fd: fd for fd in waiting}
    with trio.fail_after(5):
        while waiting:
            found = await poller.wait(4)
            assert len(found) <= 4
            for fd, _ in found:
                socket_of = by_fd[fd]
                with socket.socket(fileno=socket.dup(socket_of)) as sock:
                    drain(sock)
                waiting.discard(fd)
    assert await is_quiet(poller)
    poller.close()


@pytest.mark.skipif(not hasattr(select, "epoll"), reason="the order of tasks is the scheduler's")
async def test_what_became_ready_first_is_reported_first(open_sockets: ExitStack) -> None:
    poller = EpollPoller()
    pairs = [new_pair(open_sockets) for _ in range(12)]
    for ours, _ in pairs:
        poller.add(ours, READ)
    for _, theirs in reversed(pairs):
        theirs.send(b"xy")
    found: list[int] = []
    while len(found) < 2 * len(pairs):  # each is read by half
        for fd, _ in await poller.wait(4):
            found.append(fd)
            next(ours for ours, _ in pairs if ours.fileno() == fd).recv(1)
    assert found == [ours.fileno() for ours, _ in reversed(pairs)] * 2
    poller.close()


async def test_preferred_socket_is_reported_before_others_or_as_any_other_again(
    poller: Poller, open_sockets: ExitStack
) -> None:
    pairs = [new_pair(open_sockets) for _ in range(10)]
    for ours, theirs in pairs:
        poller.add(ours, READ)
        theirs.send(b"x")
    last, last_peer = pairs[-1]
    poller.prefer(last, READ, is_preferred=True)
    if isinstance(poller, EpollPoller):
        assert await poller.wait(1) == [(last.fileno(), READ)]
        assert (await poller.wait(4))[0] == (last.fileno(), READ)
        assert [fd for fd, _ in await poller.wait(MOST)].count(last.fileno()) == 1
    assert set(await ready(poller)) <= {ours.fileno() for ours, _ in pairs}
    for ours, _ in pairs:
        drain(ours)
    await is_quiet(poller)  # without epoll: what was found before
    assert await is_quiet(poller)

    last_peer.send(b"y")  # alone, it wakes whoever waits
    assert await ready(poller) == {last.fileno(): READ}
    poller.change(last, 0)
    assert await is_quiet(poller)
    poller.change(last, READ)
    poller.prefer(last, READ, is_preferred=False)
    assert await ready(poller) == {last.fileno(): READ}
    poller.prefer(last, READ, is_preferred=True)
    poller.remove(last)
    assert await is_quiet(poller)
    poller.add(last, READ)  # another one, with its descriptor
    assert await ready(poller) == {last.fileno(): READ}
    poller.close()


async def test_others_have_their_turn_however_many_are_preferred(poller: Poller, open_sockets: ExitStack) -> None:
    pairs = [new_pair(open_sockets) for _ in range(20)]
    for ours, theirs in pairs:
        poller.add(ours, READ)
        theirs.send(b"x")
    others = {ours.fileno() for ours, _ in pairs[:4]}
    for ours, _ in pairs[4:]:
        poller.prefer(ours, READ, is_preferred=True)  # and nobody reads: they stay ready
    met: set[int] = set()
    for _ in range(20):
        met |= {fd for fd, _ in await poller.wait(8)}
    assert others <= met
    poller.close()


async def test_line_is_as_long_as_it_takes_to_come_up(poller: Poller, open_sockets: ExitStack) -> None:
    pairs = [new_pair(open_sockets) for _ in range(16)]
    for ours, theirs in pairs:
        poller.add(ours, READ)
        theirs.send(b"x")
    began = trio.current_time()
    assert poller.stood_s == 0.0
    seen = []
    for _ in range(12):  # nobody reads: each goes to the end of the line again
        assert len([one for one in await poller.wait(4) if one[1] != READ]) == 0
        await trio.sleep(0.02)
        seen.append(poller.stood_s)
    if isinstance(poller, EpollPoller):
        assert seen[0] >= 0.02, "as long as it stands by now"
        assert 0.06 <= seen[-1] < trio.current_time() - began, "four times four, each 20 ms"
    else:
        assert set(seen) == {0.0}
    for ours, _ in pairs:
        drain(ours)
    poller.more(MOST)
    assert poller.stood_s == 0.0
    poller.close()
