"""Where exports go: into a folder that appears when all of it is there; and what they need beyond the base install."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlbseg.errors import UserError
from mlbseg.files import write_atomic


def require_extra(what: str, *packages: str) -> None:
    """Make sure that the packages of the extra ``mlbseg[export]`` that a format needs can be imported.

    Raises:
        UserError: if one is missing.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{what}: found no package {' and none '.join(missing)}, which is not in the base install "
            "(pip install 'mlbseg[export]')"
        )


def require_new(out: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds something already, unless it may be replaced.

    Raises:
        UserError: if it does, or is no folder.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: a file, expected the name of a folder to make (choose another OUT)")
    try:
        used = out.is_dir() and any(out.iterdir())
    except OSError as error:
        raise UserError(f"{out}: cannot be looked into: {error.strerror}") from None
    if used and not overwrite:
        raise UserError(f"{out}: exists already and is not empty (pass --overwrite, or choose another OUT)")


@contextmanager
def staged(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder; what is written into it appears in `out` at the end, and not before.

    It lies in `out` where that exists, which may be another disk than the folder around it, else beside it.
    With `overwrite` files of the same names are replaced; others in `out` stay.

    Raises:
        UserError: if `out` is in use, or cannot be written.
    """
    require_new(out, overwrite=overwrite)
    temporary = (out if out.exists() else out.parent) / f".{out.name}.{uuid.uuid4().hex}"
    try:
        temporary.mkdir(parents=True)
        try:
            yield temporary
            _move(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        place = error.filename2 or error.filename or out  # of a copy the first is what was read
        raise UserError(
            f"{place}: cannot be written: {error.strerror or error} (free some space or fix the rights)"
        ) from None


def _move(source: Path, target: Path) -> None:
    """Move what lies in a folder; into a new one as a whole."""
    if not target.exists():
        source.rename(target)
        return
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)  # noqa: PTH105 - pathlib's replace is the same call


def files_in(folder: Path) -> list[Path]:
    """Return all files in a folder and the folders in it, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def write_json(path: Path, content: Any) -> None:
    """Write JSON as other programs read it, text in UTF-8."""
    write_atomic(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
