"""log.csv: a row every few steps, in step with the checkpoints when a run is continued."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from mlbseg.files import write_atomic

COLUMNS = (
    "stage", "step", "lr", "clean", "initial", "pseudo", "teacher", "views", "clean_teacher", "clean_views", "mixed",
    "features", "entropy", "kept_initial", "kept_pseudo", "kept_teacher", "mass_initial", "mass_pseudo",
    "validation_dice",
)  # fmt: skip


def append_row(path: Path, row: Mapping[str, float]) -> None:
    """Add a row; values that are no column are left out."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def cut_log(path: Path, stage: int, step: int) -> None:
    """Keep the rows up to this step: those after it are of steps that will be done again."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    rows = [row for row in text.splitlines() if (place := _place(row)) and place <= (stage, step)]
    kept = "".join(f"{line}\n" for line in (",".join(COLUMNS), *rows))
    if kept != text:
        write_atomic(path, kept.encode())


def _place(row: str) -> tuple[int, int] | None:
    """Return stage and step of a row of the log; None of the header, and of a row that a kill cut off."""
    cells = row.split(",")
    whole = len(cells) == len(COLUMNS) and cells[0].isdecimal() and cells[1].isdecimal()
    return (int(cells[0]), int(cells[1])) if whole else None
