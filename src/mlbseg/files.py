"""Writing files whole or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from mlbseg.errors import UserError


def make_folder(folder: Path) -> None:
    """Make a folder, and those around it, unless it is there.

    Raises:
        UserError: if it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made a folder: {error.strerror}") from None


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file under a temporary name beside it and rename it, so that no half-written file is ever found.

    Raises:
        UserError: if the disk is full or the folder cannot be written; what was there before is intact.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror or error} (free some space or fix the rights)"
        ) from None
