"""log.csv: a row every few steps, in step with the checkpoints when a run is continued.

The columns are `FIRST` and then whatever the method names, loss terms and monitors alike, in the order in which each
comes first: the header grows with them.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlbseg.errors import brief
from mlbseg.files import write_atomic

FIRST = ("stage", "step", "lr")


def append_row(path: Path, row: Mapping[str, float]) -> None:
    """Add a row. A name that the log does not have yet becomes a column, empty in the rows before.

    Raises:
        UserError: if the log cannot be written anew.
        ValueError: for a name that is no word: it would be two columns, or a line.
    """
    if odd := [name for name in row if not name.replace("_", "").isalnum()]:
        raise ValueError(f"term or monitor {brief(odd[0])}: expected letters, digits and underscores")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    columns = lines[0].split(",") if lines else []
    new = [name for name in dict.fromkeys((*FIRST, *row)) if name not in columns]
    line = _line([row.get(name, "") for name in (*columns, *new)])
    if not new:
        with path.open("a", encoding="utf-8", newline="") as file:
            file.write(line)
        return
    rows = [f"{old}{',' * len(new)}\n" for old in lines[1:] if _place(old, len(columns))]
    write_atomic(path, "".join([_line([*columns, *new]), *rows, line]).encode())


def cut_log(path: Path, stage: int, step: int) -> None:
    """Keep the rows up to this step: those after it are of steps that will be done again.

    Raises:
        UserError: if the log cannot be written anew.
    """
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    header, *rows = text.splitlines() or [""]
    if not header.startswith(",".join(FIRST)):  # the rest of one that was torn before its first row
        path.unlink()
        return
    count = len(header.split(","))
    kept = [row for row in rows if (place := _place(row, count)) and place <= (stage, step)]
    if (cut := "".join(f"{line}\n" for line in (header, *kept))) != text:
        write_atomic(path, cut.encode())


def _line(cells: Sequence[object]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


def _place(row: str, columns: int) -> tuple[int, int] | None:
    """Return stage and step of a row of the log; None of one that a kill cut off."""
    cells = row.split(",")
    whole = len(cells) == columns and cells[0].isdecimal() and cells[1].isdecimal()
    return (int(cells[0]), int(cells[1])) if whole else None
