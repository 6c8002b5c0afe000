"""Clients that are not ours, run by Node: what they need is installed once, beside their sources, and kept.

Skipped where there is no Node, or nowhere to install from.
"""

import hashlib
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

NODE: Final = Path(__file__).parent / "node"
INSTALL_S: Final = 120


@pytest.fixture(scope="session")
def node() -> str:
    """The interpreter."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no clients of Node: there is no node command")
    return node


@pytest.fixture(scope="session")
def node_modules(node: str) -> Path:
    """The folder with socket.io-client, ws, eventsource and axe-core, as `package-lock.json` has them.

    A script beside `package.json` finds them by their names.
    """
    modules = NODE / "node_modules"
    stamp = modules / ".installed"
    locked = hashlib.sha256((NODE / "package-lock.json").read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == locked:
        return modules
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("no clients of Node: there is no npm command to install them")
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline", "--loglevel=error"]
    try:
        done = subprocess.run(command, cwd=NODE, capture_output=True, text=True, timeout=INSTALL_S)
    except subprocess.TimeoutExpired:
        pytest.skip(f"no clients of Node: npm did not install them within {INSTALL_S} s")
    if done.returncode != 0:
        pytest.skip(f"no clients of Node: npm could not install them: {' '.join(done.stderr.split())[:200]}")
    stamp.write_text(locked)
    return modules
