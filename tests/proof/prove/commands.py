"""A part of the proof that is a command of its own: run it, hear what it says meanwhile, end it when it must end."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Final, NamedTuple

from tests.proof.prove.checkout import ROOT

POLL_S: Final = 0.2
END_S: Final = 40.0  # that it may take to end after it was told to: it has servers of its own to stop
SAID_MAX: Final = 20_000  # characters of its standard error that are kept, the last ones


class Ended(NamedTuple):
    """`code` is None where it was ended: by us, as it was told (`was_stopped`), or since it took too long."""

    code: int | None
    was_stopped: bool
    out: str
    said: str
    seconds: float


def run(
    module: Sequence[str],
    *,
    limit_s: float,
    is_stopped: Callable[[], bool],
    on_line: Callable[[str], None] = lambda line: None,
    environment: Mapping[str, str] | None = None,
) -> Ended:
    """Run `python -m <module>` until it ends. `on_line` hears its standard error, line by line, in another thread."""
    began = time.monotonic()
    said: list[str] = []

    def hear(stream: IO[str]) -> None:
        for line in stream:
            said.append(line)
            while sum(map(len, said)) > SAID_MAX and len(said) > 1:
                said.pop(0)
            on_line(line.rstrip("\n"))

    # In a session of its own: Ctrl-C comes to us alone, and whatever it has started can be found and ended.
    with subprocess.Popen(
        [sys.executable, "-m", *module],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        out: list[str] = []
        readers = [
            threading.Thread(target=hear, args=(process.stderr,), daemon=True),
            threading.Thread(target=lambda stream: out.append(stream.read()), args=(process.stdout,), daemon=True),
        ]
        for reader in readers:
            reader.start()
        was_stopped = False
        code: int | None = None
        try:
            while (code := process.poll()) is None:
                was_stopped = is_stopped()
                if was_stopped or time.monotonic() - began > limit_s:
                    break
                time.sleep(POLL_S)
        finally:
            if process.poll() is None:
                _end(process)
            for reader in readers:
                reader.join(END_S)
    return Ended(code, was_stopped, "".join(out), "".join(said), time.monotonic() - began)


def _end(process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(END_S)
