"""Log lines of the engine's tests are kept, not printed: a crash that a test provokes is not news.

And who has closed its watch is told nothing any more: the hub that tries fails its test.
"""

from collections.abc import Iterator, MutableMapping
from typing import Any

import pytest
from structlog.testing import capture_logs

from engine import hub


@pytest.fixture(autouse=True)
def logged() -> Iterator[list[MutableMapping[str, Any]]]:
    with capture_logs() as lines:
        yield lines


@pytest.fixture(autouse=True)
def _told_while_watching(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(*_: object) -> None:
        raise AssertionError("told after it was closed")

    for way in ("send", "keep", "send_away"):
        monkeypatch.setattr(hub._Gone, way, told)
