"""What the command line prints: results to stdout, progress to stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from mlbseg.errors import Fault, note_lines, printable
from mlbseg.launch import speaks
from mlbseg.terminal import plain


def result_console() -> Console:
    """Return where tables go; a file or a pipe has room for their columns."""
    return Console(width=None if sys.stdout.isatty() else 120)


def progress_console(quiet: bool) -> Console | None:
    """Return where progress goes: stderr, so that stdout holds results only."""
    return None if quiet or not speaks() else Console(stderr=True)


def print_line(text: str) -> None:
    """Print a line to stdout."""
    print(printable(text))


def print_names(names: Sequence[str], what: str) -> None:
    """Print a note on cases, naming the first three, if there are any."""
    if names:
        shown = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
        print_line(f"note: {len(names)} {what}: {shown}")


def print_notes(notes: Iterable[Fault]) -> None:
    """Print notes, those of one kind as one line."""
    for line in note_lines(notes):
        print_line(line)


def print_summary(summary: dict[str, Any], title: str) -> None:
    """Print what `mlbseg check` found as a table."""
    table = Table("", "", title=plain(title), show_header=False, title_justify="left")
    rows = {
        "layout": summary["layout"],
        "scans": f"{summary['cases']} ({_counts(summary['roles'])})",
        "patients": (summary["patients"] or {}).get("words"),
        "channels": ", ".join(map(str, summary["channels"])),
        "label values": ", ".join(f"{value} in {n} scans" for value, n in summary["labels"].items()),
        "not known": f"some voxels in {summary['unknown']} labels" if summary["unknown"] else "",
        "class names": ", ".join(f"{value}: {name}" for value, name in summary["class_names"].items()),
        "size (x, y, z)": _ranges(summary.get("size", {})),
        "spacing in mm": _ranges(summary.get("spacing", {})),
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, plain(value))
    result_console().print(table)


def _counts(numbers: dict[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in numbers.items() if n)


def _ranges(by_dimension: dict[str, dict[str, list[float]]]) -> str:
    def shown(values: list[float]) -> str:
        return " × ".join(f"{value:.4g}" for value in values)

    return "; ".join(
        f"{name} {shown(r['median'])}"
        + (f" ({shown(r['min'])} to {shown(r['max'])})" if r["min"] != r["max"] else "")
        for name, r in by_dimension.items()
    )
