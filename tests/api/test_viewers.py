"""What is kept for a viewer that does not read: the rest of one send of the hub's, and of ours no more than a bound."""

import socket
from collections.abc import Iterator

import pytest
import trio

from api.viewers import LEFT_MAX, PlainViewer

SAID = b"x" * 1_000
TAKEN_MAX = 1_000  # times `SAID`: several times what the kernel takes
Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Ours, and that of a viewer that reads when the test does."""
    with socket.create_server(("127.0.0.1", 0)) as listening:  # of TCP: some options are its own
        theirs = socket.create_connection(listening.getsockname())
        ours, _ = listening.accept()
    ours.setblocking(False)
    yield ours, theirs
    ours.close()
    theirs.close()


def fill(viewer: PlainViewer) -> int:
    """Tell it until it takes no more; how many times it took what it was told."""
    for times in range(TAKEN_MAX):
        if not viewer.send(SAID):
            return times
    raise AssertionError("whatever it does not read is kept for it")


async def test_rest_of_one_send_is_kept_and_nothing_that_follows(pair: Pair, nursery: trio.Nursery) -> None:
    viewer = PlainViewer(nursery, pair[0], b"")
    told = fill(viewer)
    assert len(viewer._left) <= len(SAID)
    before = bytes(viewer._left)
    assert not any(viewer.send(SAID) for _ in range(100))
    assert viewer._left == before
    assert viewer.direct is None

    drained = trio.Event()
    viewer.drained = drained.set
    heard = 0
    with trio.fail_after(10):
        while heard < told * len(SAID):
            heard += len(await trio.to_thread.run_sync(pair[1].recv, 65_536))
        await drained.wait()
    assert heard == told * len(SAID)
    assert viewer.send(SAID)
    viewer.cut()


async def test_viewer_for_whom_too_much_is_left_is_cut_off(pair: Pair, nursery: trio.Nursery) -> None:
    viewer = PlainViewer(nursery, pair[0], b"")
    fill(viewer)
    for _ in range(LEFT_MAX // len(SAID) - 1):
        viewer.write(SAID)
        assert len(viewer._left) <= LEFT_MAX
    assert not viewer.is_closed
    viewer.write(SAID)
    viewer.write(SAID)
    assert viewer.is_closed
    assert not viewer._left
