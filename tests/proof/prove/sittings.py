"""Sittings on file, and which of them count.

A sitting is one line of `sittings.jsonl` when it is over. While it goes on it is `unfinished.json`, written anew every
few seconds: whatever ends it, what it had done by then is counted, as the next one finds that file and takes it over.
"""

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from tests.proof.prove.figures import Figures, Simulated

FORMAT: Final = 1


class Sitting(msgspec.Struct, kw_only=True):
    """The seeds of its simulation are `first` to `end` - 1; none where both are 0."""

    format: int = FORMAT
    began_at: str  # ISO 8601, UTC
    seconds: float = 0.0
    commit: str
    is_dirty: bool  # the source had changes that the commit has not
    machine: dict[str, str]
    command: str
    first: int = 0
    end: int = 0
    is_whole: bool = False  # it came to its end by itself
    figures: Figures = msgspec.field(default_factory=Figures)


class InUse(Exception):
    """Another sitting goes on there."""


class Shelf:
    """The directory where sittings are kept. Use it `held`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._finished = folder / "sittings.jsonl"
        self._unfinished = folder / "unfinished.json"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other sittings out; take over what one left behind that was killed.

        Raises:
            InUse: one is there.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as why:
                raise InUse(f"another sitting goes on in {self.folder}") from why
            if self._unfinished.exists():
                self.finish(msgspec.json.decode(self._unfinished.read_bytes(), type=Sitting))
            yield

    def keep(self, sitting: Sitting) -> None:
        """Write down how far it has come."""
        _write(self._unfinished, msgspec.json.encode(sitting))

    def finish(self, sitting: Sitting) -> None:
        """Add it to those that are over; one that is there already is not added again."""
        if all(one.began_at != sitting.began_at or one.command != sitting.command for one in self.sittings()):
            before = self._finished.read_bytes() if self._finished.exists() else b""
            _write(self._finished, before + msgspec.json.encode(sitting) + b"\n")
        self._unfinished.unlink(missing_ok=True)

    def sittings(self) -> list[Sitting]:
        """In the order in which they ended."""
        if not self._finished.exists():
            return []
        return [msgspec.json.decode(line, type=Sitting) for line in self._finished.read_bytes().splitlines() if line]


def _write(path: Path, text: bytes) -> None:
    """All of it, or nothing: a file of before is replaced by a whole one."""
    written = path.with_name(f"{path.name}.new")
    with written.open("wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    written.replace(path)


class Counted(msgspec.Struct):
    """What several sittings come to."""

    figures: Figures = msgspec.field(default_factory=Figures)
    sittings: list[Sitting] = []
    left_out: list[Sitting] = []  # of commits that do not count
    twice: list[Sitting] = []  # counted without their seeds: a later one ran some of them as well


def counted(sittings: Sequence[Sitting], commits: frozenset[str]) -> Counted:
    """Sum up those of `commits`. No seed counts twice: where two sittings share some, the later one has them."""
    total = Counted(left_out=[sitting for sitting in sittings if sitting.commit not in commits])
    total.sittings = [sitting for sitting in sittings if sitting.commit in commits]
    for number, sitting in enumerate(total.sittings):
        figures = sitting.figures
        if any(shares_seeds(sitting, later) for later in total.sittings[number + 1 :]):
            total.twice.append(sitting)
            figures = msgspec.structs.replace(figures, simulated=Simulated())
        total.figures.add(figures)
    return total


def shares_seeds(one: Sitting, other: Sitting) -> bool:
    return one.first < other.end and other.first < one.end


def next_seed(sittings: Sequence[Sitting]) -> int | None:
    """Where to go on so that no seed is run twice; None: nothing was run yet."""
    ends = [sitting.end for sitting in sittings if sitting.end > sitting.first]
    return max(ends, default=None)
