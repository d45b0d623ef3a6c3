"""How long things take, shown: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from mlbseg.terminal import one_line, say

_LOG_EVERY = 30.0  # seconds between lines where there is no terminal


class _Bar(Progress):
    """A bar with the loop's values below it: beside it they would crowd it out of a narrow terminal."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        # Text, as the names of cases are not to be read as markup.
        yield from (Text(f"  {task.fields['values']}") for task in self.tasks if task.fields["values"])


class StepProgress:
    """Shows step, remaining time and the values of a loop.

    Args:
        console: Where; nothing is shown when None.
        title: What is going on.
        total: Number of steps.
        start: Steps that were done before.
    """

    def __init__(self, console: Console | None, title: str, total: int, start: int = 0) -> None:
        self.console = console
        self.title = title
        self.total = total
        self.start = start
        self.began = self.said = time.monotonic()
        self.bar: Progress | None = None
        if console is not None and console.is_terminal:
            self.bar = _Bar(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                console=console,
            )
            self.task = self.bar.add_task(title, total=total, completed=start, values="")

    def __enter__(self) -> Self:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(
        self, done: int, values: Mapping[str, float | str] | None = None, *, total: int | None = None
    ) -> None:
        """Say that `done` of the steps (now `total` in all) are done, and with what values."""
        if self.console is None:
            return
        self.total = self.total if total is None else total
        text = "  ".join(f"{k} {v if isinstance(v, str) else f'{v:.3g}'}" for k, v in (values or {}).items())
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=self.total, values=one_line(text))
            return
        now = time.monotonic()
        if now - self.said < _LOG_EVERY and done < self.total:
            return
        self.said = now
        rate = (now - self.began) / max(done - self.start, 1)
        eta = time.strftime("%H:%M:%S", time.gmtime(rate * (self.total - done)))
        line = f"{self.title}: {done}/{self.total}, eta {eta}  {text}".rstrip()
        say(self.console, line)
