"""What people see while it runs: a bar for each part; where nobody looks, a line now and then."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

LINE_EACH_S: Final = 30.0
PER_S: Final = 2.0  # it shares the cores with what it shows
NOTE_MAX: Final = 90  # characters


class Screen:
    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(soft_wrap=True)
        self._began = time.monotonic()
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._part = ""
        self._last_line = 0.0

    @contextmanager
    def showing(self, parts: Sequence[str]) -> Iterator[None]:
        if not self.console.is_terminal:
            yield
            return
        columns = (TextColumn("{task.description:<13}"), BarColumn(24), TaskProgressColumn(), TimeElapsedColumn())
        with Progress(
            *columns, TextColumn("{task.fields[note]}"), console=self.console, refresh_per_second=PER_S
        ) as progress:
            self._progress = progress
            self._tasks = {part: progress.add_task(part, total=1.0, start=False, note="") for part in parts}
            try:
                yield
            finally:
                self._progress = None

    def begin(self, part: str) -> None:
        self._part = part
        self._last_line = time.monotonic()
        if self._progress is not None:
            self._progress.start_task(self._tasks[part])
        else:
            self.say(f"{part} …")

    def tick(self, share: float, note: str) -> None:
        """How much of the part is done, from 0 to 1. May be called at any rate, and from any thread."""
        if self._progress is not None:
            self._progress.update(self._tasks[self._part], completed=share, note=note[:NOTE_MAX])
        elif time.monotonic() >= self._last_line + LINE_EACH_S:
            self._last_line = time.monotonic()
            self.say(f"{self._part} {share:4.0%}  {note}")

    def end(self, note: str) -> None:
        if self._progress is not None:
            self._progress.update(self._tasks[self._part], note=note[:NOTE_MAX])
            self._progress.stop_task(self._tasks[self._part])
        else:
            self.say(f"{self._part}: {note}")

    def say(self, text: str, style: str = "") -> None:
        at_s = time.monotonic() - self._began
        self.console.print(f"[{at_s:7.1f} s] {text}", style=style or None, highlight=False, markup=False)
