"""The Autobahn test suite's fuzzing client, where there is one: what is ours on the wire, against five hundred odd cases.

It is a program for Python 2.7 (`pip install autobahntestsuite`), so it is no dependency of ours: `AUTOBAHN_WSTEST` names
its `wstest`, or one is on the PATH. It wants its messages echoed, which a feed does not do; so it runs twice:

- `echo`: the feed's own stack (handshake, viewer's stream, the library with our changes, our frames) around an echo.
  Every case must pass, but those whose messages are larger than a viewer's may be;
- `feed`: the feed itself. It answers what is not JSON with an error, so cases that wait for an echo can't pass; how it
  pings, how it closes, and what it makes of broken frames must be right all the same.
"""

import json
import os
import shutil
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from trio_websocket import ConnectionClosed

from api import live
from api.viewers import BINARY, TEXT, PlainViewer, ViewerStream, frame
from tests.server import serving

WSTEST: Final = os.environ.get("AUTOBAHN_WSTEST") or shutil.which("wstest")
RUN_S: Final = 240
# Messages over 64 KiB, which a viewer may not send; 1009 is the answer, as tests/contract/test_live has it.
TOO_LARGE: Final = ["9.1.2", "9.1.3", "9.1.4", "9.1.5", "9.1.6", "9.2.2", "9.2.3", "9.2.4", "9.2.5", "9.2.6"]
TOO_LARGE_TOO: Final = ["9.3.*", "9.4.*", "9.5.*", "9.6.*"]
# Compression, which is not offered: every case would be UNIMPLEMENTED, after half a minute.
COMPRESSION: Final = ["12.*", "13.*"]
# What is not a failure. NON-STRICT: right, but later than it might have been noticed. INFORMATIONAL: either will do.
GOOD: Final = {"OK", "NON-STRICT", "INFORMATIONAL", "UNIMPLEMENTED"}

Results = Mapping[str, Mapping[str, Any]]
pytestmark = pytest.mark.skipif(WSTEST is None, reason="no Autobahn test suite: AUTOBAHN_WSTEST names no wstest program")


async def run(port: int, path: str, cases: list[str], without: list[str], out: Path) -> Results:
    """What the fuzzing client thinks of the server: `behavior` and `behaviorClose` by case."""
    spec = {
        "outdir": str(out),
        "servers": [{"agent": "Holdfast", "url": f"ws://127.0.0.1:{port}{path}"}],
        "cases": cases,
        "exclude-cases": without,
        "exclude-agent-cases": {},
    }
    (out / "spec.json").write_text(json.dumps(spec))
    with trio.fail_after(RUN_S):
        command = [str(WSTEST), "--mode", "fuzzingclient", "--spec", str(out / "spec.json")]
        await trio.run_process(command, cwd=out, capture_stdout=True, capture_stderr=True)
    results: Results = json.loads((out / "index.json").read_text())["Holdfast"]
    assert results
    return results


def bad(results: Results, *, aspects: tuple[str, ...]) -> dict[str, list[str]]:
    return {
        case: found
        for case, result in results.items()
        if not {*(found := [result[aspect] for aspect in aspects])} <= GOOD
    }


@asynccontextmanager
async def echoing() -> AsyncIterator[int]:
    """The feed's stack around an echo; its port."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=100)
    listening.setblocking(False)

    async def echo(stream: ViewerStream, nursery: trio.Nursery) -> None:
        connection = await live.shake_hands(stream, nursery)
        with suppress(ConnectionClosed):
            while True:
                said = await connection.get_message()
                stream.write(frame(said.encode(), TEXT) if isinstance(said, str) else frame(said, BINARY))

    async def serve(sock: socket.socket) -> None:  # as api.sockets does it
        async with trio.open_nursery() as nursery:
            stream = PlainViewer(nursery, sock, b"")
            await echo(stream, nursery)
            await stream.flush()
            nursery.cancel_scope.cancel()
        await stream.finish()

    async def accept(nursery: trio.Nursery) -> None:
        while True:
            await trio.lowlevel.wait_readable(listening)
            sock, _ = listening.accept()
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            nursery.start_soon(serve, sock)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept, nursery)
        yield listening.getsockname()[1]
        nursery.cancel_scope.cancel()
    listening.close()


async def test_echo_around_our_stack_passes_every_case(tmp_path: Path) -> None:
    async with echoing() as port:
        results = await run(port, "/", ["*"], [*TOO_LARGE, *TOO_LARGE_TOO, *COMPRESSION], tmp_path)
    assert not bad(results, aspects=("behavior", "behaviorClose"))


async def test_feed_closes_as_it_should_and_survives_every_case(database: str, tmp_path: Path) -> None:
    with serving(database, tmp_path / "log") as server:
        results = await run(server.port, live.PATHS[0], ["*"], [*TOO_LARGE, *TOO_LARGE_TOO, *COMPRESSION], tmp_path)
        (tmp_path / "bad.json").write_text(json.dumps(results))
        import shutil as s
        s.copy(tmp_path / "bad.json", "/tmp/ab/feed.json")
        assert not bad(results, aspects=("behaviorClose",))
        assert "viewer_failed" not in server.log()
        assert "Traceback" not in server.log()
