"""The scenarios about viewers, and the rivals that they are measured beside.

    viewers N    N viewers of one drop; one update at a time, until the last has it
    watched N    hot, with N viewers who watch the hot drop
    wire R       100 viewers, R updates a second: from an update's answer to each viewer's frame
    stalled 0|1  wire 20, without and with one more viewer who watches 300 drops and never reads

In `viewers` each server is a new process each time, so that its memory is its viewers'. It is asked for an update by
an HTTP POST, Holdfast as its rivals. What Holdfast takes includes the commit (a reserve, durable) and the wait for its
place in a pass; a rival has nothing to do but to make a text and to send it.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Final

import msgspec

from tests.bench import viewers
from tests.bench.job import Server, Users
from tests.bench.results import Load
from tests.bench.targets import HERE, Target, Unusable, stopped, wait_for
from tests.ports import free_port

FAMILIES: Final = ("viewers", "watched", "wire", "stalled")
FRAME_BYTES: Final = 171  # of a text, until Holdfast's is known: that of a reserve
WARM_UP: Final = 5  # updates
FEW: Final = 100  # viewers of wire and stalled
USERS: Final = 5_000  # as many reserves may one run make
PACE: Final = 20.0  # updates per s there: as many as there are passes, which some of them must wait for
ALONE: Final = 5.0  # and in another run: none has another less than 100 ms before it
HEAVY_DROPS: Final = 300  # whose snapshots, some 170 KiB, no socket's buffers hold
STOCK: Final = 100_000_000
NODE_MODULES: Final = (
    Path(os.environ.get("BENCH_WS", "/nowhere")),
    HERE.parent / "clients" / "node" / "node_modules" / "ws",
    HERE / "node_modules" / "ws",
)
BARE: Final = "bare"
BROADCAST: Final = "broadcast"
WS: Final = "ws"
WS_FRAME: Final = "ws-frame"

Opening = Callable[[Path], AbstractContextManager[Target]]
"""Starts a rival that writes its log into a directory, and stops it."""


def expanded(family: str, counts: Sequence[int]) -> list[str]:
    """The scenarios of a family, for the numbers of viewers that were chosen."""
    if family == "viewers":
        return [f"viewers {count}" for count in counts]
    if family == "watched":
        return [f"watched {count}" for count in (0, *(one for one in counts if one >= 1_000 or len(counts) == 1))]
    return ["stalled 0", "stalled 1"] if family == "stalled" else [f"wire {PACE:g}", f"wire {ALONE:g}"]


# --- rivals ------------------------------------------------------------------------------------------


def rivals() -> tuple[dict[str, Opening], dict[str, str], list[str]]:
    """Those that can be started here, the versions of what they are made of, and why others are left out."""
    found: dict[str, Opening] = {BARE: _python(BARE), BROADCAST: _python(BROADCAST)}
    versions, notes = {"websockets": version("websockets")}, []
    node = shutil.which("node")
    folder = next((path.resolve() for path in NODE_MODULES if (path / "package.json").exists()), None)
    if node is None:
        notes.append("Node is not installed: the rival ws is left out.")
    elif folder is None:
        notes.append(
            "Node's ws is not installed, and left out: `npm ci` in tests/clients/node, or name its folder in BENCH_WS."
        )
    else:
        found[WS] = _node(node, folder, WS, "plain")
        found[WS_FRAME] = _node(node, folder, WS_FRAME, "frame")
        versions["node"] = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout[1:-1]
        versions["ws"] = json.loads((folder / "package.json").read_text())["version"]
    return found, versions, notes


def _python(name: str) -> Opening:
    @contextmanager
    def opening(directory: Path) -> Iterator[Target]:
        port, trigger_port = free_port(), free_port()
        command = [sys.executable, "-m", "tests.bench.broadcast", str(port), str(trigger_port)]
        with _rival(name, [*command, BARE] if name == BARE else command, directory, port, trigger_port) as target:
            yield target

    return opening


def _node(node: str, folder: Path, name: str, mode: str) -> Opening:
    @contextmanager
    def opening(directory: Path) -> Iterator[Target]:
        port = free_port()
        command = [node, str(HERE / "broadcast.cjs"), str(folder), str(port), mode]
        with _rival(name, command, directory, port, port) as target:
            yield target

    return opening


@contextmanager
def _rival(name: str, command: Sequence[str], directory: Path, port: int, trigger_port: int) -> Iterator[Target]:
    log = directory / f"{name}.log"
    with log.open("ab") as written:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=written, stderr=written)
    with stopped(process):
        for one in {port, trigger_port}:
            wait_for(one, name, process, log)
        yield Target(name, Server("127.0.0.1", port, ""), {"server": process.pid}, trigger=trigger_port)


# --- runs --------------------------------------------------------------------------------------------


@contextmanager
def _started(job: viewers.Job) -> Iterator[subprocess.Popen[bytes]]:
    """Viewers, all in. They end by themselves, or draining when their stdin is closed.

    Raises:
        Unusable: they broke off before.
    """
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-m", viewers.__name__], stdin=pipe, stdout=pipe, stderr=pipe)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(msgspec.json.encode(job) + b"\n")
        process.stdin.flush()
        if not process.stdout.readline().startswith(b'{"ready":'):
            raise _broke_off(process)
        yield process
    finally:
        process.kill()
        process.communicate()


def _finished(process: subprocess.Popen[bytes]) -> Load:
    assert process.stdout is not None
    load = viewers.load_in(process.stdout)
    if load is None:
        raise _broke_off(process)
    return load


def _broke_off(process: subprocess.Popen[bytes]) -> Unusable:
    _, errors = process.communicate()
    return Unusable(f"The viewers broke off: {errors.decode(errors='replace')[-2000:]}")


def _run(job: viewers.Job) -> Load:
    with _started(job) as process:
        return _finished(process)


def passes(target: Target, users: Users, count: int, seconds: float, frame_bytes: int) -> Load:
    """`viewers N`. A rival's texts are as long as `frame_bytes`."""
    pause_s = 0.1
    most = min(USERS, int(seconds / pause_s) + WARM_UP + 1)
    if target.trigger is None:
        job = _watching(target, target.new_drop(STOCK), users, count, most)
    else:
        trigger = Server(target.server.host, target.trigger, "")
        updates = [_post(trigger, f"/send?bytes={frame_bytes}", user) for user in users.ids(0, most)]
        job = viewers.Job(
            server=target.server,
            path="/",
            viewers=count,
            mode="passes",
            trigger=trigger,
            updates=updates,
            watched=target.watched,
        )
    return _run(msgspec.structs.replace(job, seconds=seconds, pause_s=pause_s, warm_up=WARM_UP))


def paced(target: Target, users: Users, seconds: float, rate: float, heavies: int, seed: int) -> Load:
    """`wire` and `stalled`."""
    drop = target.new_drop(STOCK)
    most = min(USERS, int(2 * rate * seconds) + WARM_UP + 1)
    job = _watching(target, drop, users, FEW, most)
    drops = [target.new_drop(STOCK) for _ in range(HEAVY_DROPS - 1)] if heavies else []
    heavy = _subscribe(*drops, drop) if heavies else ""
    return _run(
        msgspec.structs.replace(job, mode="paced", rate=rate, seconds=seconds, warm_up=WARM_UP, heavy=heavy, seed=seed)
    )


@contextmanager
def draining(target: Target, drop: str, users: Users, count: int, *, is_all_read: bool = False) -> Iterator["Draining"]:
    """Viewers who only listen, while the block asks for whatever it wants. `Draining.load` is known after `end`."""
    job = msgspec.structs.replace(
        _watching(target, drop, users, count, 0), mode="drain", watched={}, is_all_read=is_all_read
    )
    with _started(job) as process:
        yield Draining(process)


class Draining:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.pid = process.pid
        self._process = process

    def end(self) -> Load:
        """They hear the last of it, say what they saw, and go."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.stdin = None
        return _finished(self._process)


def _watching(target: Target, drop: str, users: Users, count: int, updates: int) -> viewers.Job:
    """Viewers of one drop of Holdfast's, and that many reserves of it."""
    server = target.server
    if server.is_tls:
        raise Unusable("Viewers do not speak TLS here: name the server behind its proxy by http://.")
    return viewers.Job(
        server=server,
        path=f"{server.base}/live",
        viewers=count,
        hello=_subscribe(drop),
        is_greeted=True,
        mode="passes",
        trigger=server,
        updates=[_post(server, f"/drops/{drop}/reserve", user) for user in users.ids(0, updates)],
        watched=target.watched,
    )


def _subscribe(*drops: str) -> str:
    return json.dumps({"type": "subscribe", "drops": drops})


def _post(server: Server, path: str, user: str) -> str:
    head = f"POST {server.base}{path} HTTP/1.1\r\nHost: {server.host}:{server.port}"
    return f"{head}\r\nX-User-Id: {user}\r\nContent-Length: 0\r\n\r\n"


def settle() -> None:
    """Let what came before end: sockets that close, and what the server does for them."""
    time.sleep(0.2)
