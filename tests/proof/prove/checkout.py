"""Which source is proved, and on which machine."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Final

import msgspec

ROOT: Final = Path(__file__).parents[3]
UNKNOWN: Final = "unknown"  # the commit, where there is no git
GIT_S: Final = 30.0


class Checkout(msgspec.Struct, frozen=True):
    """`is_dirty`: something in it is not as the commit has it."""

    commit: str
    is_dirty: bool


class NoSuchCommit(Exception):
    """Its words are for people."""


def here() -> Checkout:
    told = _git("status", "--porcelain=v2", "--branch")
    if told is None:
        return Checkout(UNKNOWN, is_dirty=False)
    commit = UNKNOWN
    is_dirty = False
    for line in told.splitlines():
        if line.startswith("# branch.oid "):
            commit = line.split()[2]
        elif not line.startswith("#"):
            is_dirty = True
    return Checkout(commit, is_dirty)


def since(first: str) -> frozenset[str]:
    """The commits from `first` up to the one that is checked out, both included.

    Raises:
        NoSuchCommit: it is none that this one comes from.
    """
    oldest = _git("rev-parse", "--verify", "--quiet", f"{first}^{{commit}}")
    if oldest is None or _git("merge-base", "--is-ancestor", oldest.strip(), "HEAD") is None:
        raise NoSuchCommit(f"{first} is no commit that this one comes from")
    later = _git("rev-list", "--ancestry-path", f"{oldest.strip()}..HEAD") or ""
    return frozenset([oldest.strip(), *later.split()])


def machine() -> dict[str, str]:
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": model,
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
    }


def _git(*arguments: str) -> str | None:
    """What it said; None: there is no git, no repository, or its answer is no."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=GIT_S)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
