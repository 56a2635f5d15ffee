"""How long work shows itself: a bar on a terminal, one line a minute otherwise."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

INTERVAL = 60.0
"""Seconds between lines where there is no terminal."""


class Status:
    """Shows the epochs and the stage that is running. Callable as ``on_progress(stage, done, total)``."""

    def __init__(self, *, quiet: bool = False) -> None:
        """``quiet`` shows nothing: of several processes one speaks."""
        self.console = Console(stderr=True, quiet=quiet)
        self.live = sys.stderr.isatty() and not quiet
        self.bar = Progress(
            TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            console=self.console, transient=True, disable=not self.live,
        )  # fmt: skip
        self.tasks: dict[str, TaskID] = {}
        self.spoke = time.monotonic()
        self.prefix = ""

    def __enter__(self) -> Status:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """Shows that ``done`` of ``total`` of a stage are finished; the total may be unknown."""
        if self.live:
            if stage not in self.tasks:
                self.tasks[stage] = self.bar.add_task(stage, total=total)
            self.bar.update(self.tasks[stage], completed=done, total=total)
        elif time.monotonic() - self.spoke > INTERVAL:
            self.say(f"{self.prefix}{stage} {done}/{total or '?'}")

    def say(self, line: str) -> None:
        """Prints a line above the bars."""
        self.spoke = time.monotonic()
        self.console.print(line, highlight=False, soft_wrap=True)
