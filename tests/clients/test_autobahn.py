"""The Autobahn test suite's fuzzing client, where there is one: what is ours on the wire, against its 261 odd cases.

It is a program for Python 2.7 (the package is `autobahntestsuite`), so it is no dependency of ours: `AUTOBAHN_WSTEST`
names its `wstest`, or one is on the PATH. It wants its messages echoed, which a feed does not do; so it runs twice:

- around an echo on the feed's own stack (handshake, viewer's stream, the library with our changes, our frames): every
  case must pass, but those whose messages are larger than a viewer's may be;
- against the feed itself, which answers what is not JSON with an error. A case that waits for an echo is not a failure
  there, for so long as the close that ends it is right. All others must pass: how it pings, how it closes, and what it
  makes of broken frames.
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

from api import live, opening
from api.viewers import BINARY, TEXT, PlainViewer, ViewerStream, frame
from tests.server import serving

WSTEST: Final = os.environ.get("AUTOBAHN_WSTEST") or shutil.which("wstest")
RUN_S: Final = 240
LEFT_OUT: Final = [
    # Messages over 64 KiB, which a viewer may not send; 1009 is the answer, as tests/contract/test_live has it.
    *(f"9.{kind}.{size}" for kind in (1, 2) for size in (2, 3, 4, 5, 6)),
    *("9.3.*", "9.4.*", "9.5.*", "9.6.*"),
    # Compression, which is not offered: every case would be UNIMPLEMENTED.
    *("12.*", "13.*"),
]
ROUND_TRIPS: Final = ["9.*"]  # time messages to their echoes and back, and expect nothing else
# What is not a failure. NON-STRICT: right, but later than it might have been noticed. INFORMATIONAL: either will do.
GOOD: Final = {"OK", "NON-STRICT", "INFORMATIONAL"}
GIVEN_UP: Final = 1001  # with which the fuzzing client closes when no echo came, and which it hears again

Results = Mapping[str, Mapping[str, Any]]
pytestmark = pytest.mark.skipif(WSTEST is None, reason="no Autobahn test suite: AUTOBAHN_WSTEST names no wstest")


async def run(port: int, path: str, left_out: list[str], out: Path) -> Results:
    """What the fuzzing client thinks of the server, by case: the report of each."""
    spec = {
        "outdir": str(out),
        "servers": [{"agent": "Holdfast", "url": f"ws://127.0.0.1:{port}{path}"}],
        "cases": ["*"],
        "exclude-cases": left_out,
        "exclude-agent-cases": {},
    }
    (out / "spec.json").write_text(json.dumps(spec))
    with trio.fail_after(RUN_S):
        command = [str(WSTEST), "--mode", "fuzzingclient", "--spec", str(out / "spec.json")]
        await trio.run_process(command, cwd=out, capture_stdout=True, capture_stderr=True)
    index = json.loads((out / "index.json").read_text())["Holdfast"]
    results = {case: json.loads((out / found["reportfile"]).read_text()) for case, found in index.items()}
    assert len(results) > 200
    return results


def is_good(report: Mapping[str, Any]) -> bool:
    return {report["behavior"], report["behaviorClose"]} <= GOOD


def waits_for_echo(report: Mapping[str, Any]) -> bool:
    """Whether the case sends a whole message, and would have it back: the feed answers such with an error."""
    wanted = [events for verdict, events in report["expected"].items() if verdict in GOOD]
    return any(event[0] == "message" for events in wanted for event in events)


@asynccontextmanager
async def echoing() -> AsyncIterator[int]:
    """The feed's stack around an echo; its port."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=100)
    listening.setblocking(False)

    async def echo(stream: ViewerStream, nursery: trio.Nursery) -> None:
        connection = await opening.shake_hands(stream, nursery, live.MESSAGE_MAX)
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
        results = await run(port, "/", LEFT_OUT, tmp_path)
    assert [case for case, report in results.items() if not is_good(report)] == []


async def test_feed_closes_as_it_should_whatever_it_is_sent(database: str, tmp_path: Path) -> None:
    with serving(database, tmp_path / "log") as server:
        results = await run(server.port, live.PATHS[0], [*LEFT_OUT, *ROUND_TRIPS], tmp_path)
        bad = [case for case, report in results.items() if not (waits_for_echo(report) or is_good(report))]
        assert bad == []
        unclean = [
            case
            for case, report in results.items()
            if report["behaviorClose"] not in GOOD and report["remoteCloseCode"] != GIVEN_UP
        ]
        assert unclean == []
        assert "viewer_failed" not in server.log()
        assert "Traceback" not in server.log()
