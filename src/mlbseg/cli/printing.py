"""What the command line prints: results to stdout, progress to stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console

from mlbseg.errors import printable
from mlbseg.launch import speaks


def result_console() -> Console:
    """Return where tables go; a file or a pipe has room for their columns."""
    return Console(width=None if sys.stdout.isatty() else 120)


def progress_console(quiet: bool) -> Console | None:
    """Return where progress goes: stderr, so that stdout holds results only."""
    return None if quiet or not speaks() else Console(stderr=True)


@contextmanager
def case_progress(quiet: bool, title: str) -> Iterator[Callable[[int, int, str], None] | None]:
    """Yield what is told (done, all, case id) of a loop over cases, and shows it on stderr; None if it is quiet."""
    from mlbseg.progress import StepProgress

    console = progress_console(quiet)
    with StepProgress(console, title, 0) as progress:
        yield (
            None
            if console is None
            else (
                lambda done, total, case: progress.update(done, {"case": case} if case else None, total=total)
            )
        )


def print_line(text: str) -> None:
    """Print a line to stdout."""
    print(printable(text))


def names_note(names: Sequence[str], what: str) -> list[str]:
    """Return a note about cases, with the first three names; nothing if there are none."""
    shown = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
    return [f"note: {len(names)} {what}: {shown}"] if names else []
