"""Writing files, tables among them, whole or not at all."""

from __future__ import annotations

import csv
import io
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mlbseg.errors import UserError
from mlbseg.temporaries import temporary_file, temporary_folder


def make_folder(folder: Path) -> None:
    """Make a folder, and those around it, unless it is there.

    Raises:
        UserError: if it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made a folder: {error.strerror}") from None


@contextmanager
def working_folder(parent: Path) -> Iterator[Path]:
    """Yield an empty folder that nobody else can look into; it is removed at the end.

    Args:
        parent: Where: made if need be, and swept of what killed processes left there.

    Raises:
        UserError: if it cannot be made.
    """
    make_folder(parent)
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(temporary_folder(parent))
        except OSError as error:
            raise UserError(
                f"{parent}: cannot be written: {error.strerror or error} (free some space or fix the rights)"
            ) from None
        yield folder


def machines_temporary_folder() -> Path:
    """Return the folder that this machine has for temporary files: $TMPDIR, else /tmp or the like.

    Raises:
        UserError: if none can be written.
    """
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:
        raise UserError(
            "no folder for temporary files can be written (set TMPDIR to one that can, such as TMPDIR=/scratch)"
        ) from None


def require_free(
    path: Path,
    *,
    overwrite: bool,
    suffixes: Sequence[str] = (),
    remedy: str = "pass --overwrite, or write elsewhere",
) -> None:
    """Refuse to write over a file without being told to, and to a name that another kind of file has.

    Args:
        path: The file to write.
        overwrite: It may be written over.
        suffixes: What its name may end in, such as ``.csv``; anything when empty.
        remedy: What to do if it is there.

    Raises:
        UserError: if it is there, is a folder, or has another name.
    """
    if suffixes and path.suffix.lower() not in suffixes:
        raise UserError(f"{path}: expected a name that ends in {' or '.join(suffixes)}")
    if path.is_dir():
        raise UserError(f"{path}: is a folder, expected the name of a file to write")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already ({remedy})")


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file under a temporary name beside it and rename it, so that no half-written file is ever found.

    Raises:
        UserError: if the disk is full or the folder cannot be written; what was there before is intact.
    """
    try:
        with temporary_file(path.parent) as temporary:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror or error} (free some space or fix the rights)"
        ) from None


def write_table(
    path: Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str], *, digits: int = 6
) -> None:
    """Write a CSV file, whole or not at all, and the folder for it.

    Text that a spreadsheet would run as a formula gets a leading apostrophe. None is an empty cell.

    Args:
        path: The file.
        rows: The value of each column, by name. What is in no column is left out.
        columns: The columns, in order.
        digits: Significant digits of a number with a fraction.

    Raises:
        UserError: if it cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([_cell(name, digits) for name in columns])
    writer.writerows([_cell(row.get(name), digits) for name in columns] for row in rows)
    make_folder(path.parent)
    write_atomic(path, text.getvalue().encode(errors="backslashreplace"))


def _cell(value: Any, digits: int) -> Any:
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    # OWASP, CSV injection
    formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if formula else value
