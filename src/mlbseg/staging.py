"""Folders that appear when all of their content is there, and not before."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlbseg.errors import UserError
from mlbseg.temporaries import is_temporary, sweep, temporary_folder, unless_held

_MOVING = ".mlbseg-moving"
"""In a folder that was there before: what is being moved into it, a name a line.

A folder that is there, a mount of a container for instance, cannot be replaced as a whole. So its files are moved one
by one, and a process that is killed in between leaves some of them. They do not count as the user's: the same command
can be given again.
"""


REPLACE = "pass --overwrite, or choose another OUT"
"""What to do about a folder that holds something, where a command may replace it."""


def contents(folder: Path) -> set[str]:
    """Return the names of what lies in a folder, remains of killed processes left out; none of a folder that is absent.

    Raises:
        UserError: if it is a file, or cannot be looked into.
    """
    try:
        if not folder.is_dir():
            if folder.exists():
                raise UserError(f"{folder}: is a file, expected a folder (choose another name)")
            return set()
        with unless_held(folder / _MOVING) as dead:
            return _names(folder) - (_noted(folder) if dead else set())
    except OSError as error:
        raise UserError(f"{folder}: cannot be looked into: {error.strerror}") from None


def require_new(out: Path, *, overwrite: bool, remedy: str = REPLACE) -> None:
    """Refuse a folder that holds something already, unless it may be replaced; sweep what killed processes left.

    Args:
        out: The folder to make.
        overwrite: It may hold something.
        remedy: What the user can do otherwise.

    Raises:
        UserError: if it holds something, or is no folder.
    """
    sweep_around(out)
    if contents(out) and not overwrite:
        raise UserError(f"{out}: exists already and is not empty ({remedy})")


@contextmanager
def staged(
    out: Path, *, overwrite: bool = False, last: str | None = None, remedy: str = REPLACE
) -> Iterator[Path]:
    """Yield an empty folder; what is written into it appears in `out` at the end, and not before.

    It lies in `out` where that exists, which may be another disk than the folder around it, else beside it.
    With `overwrite` files of the same names are replaced; others in `out` stay.

    Args:
        out: The folder to make.
        overwrite: It may hold something already.
        last: The file whose presence says that all of it is there.
        remedy: What the user can do if `out` holds something, and may not.

    Raises:
        UserError: if `out` is in use, or cannot be written.
    """
    require_new(out, overwrite=overwrite, remedy=remedy)
    try:
        parent = out if out.exists() else out.parent
        _make(parent)
        with temporary_folder(parent, mode=0o777) as temporary:
            yield temporary
            _move(temporary, out, overwrite=overwrite, last=last)
    except OSError as error:
        place = error.filename2 or error.filename or out  # of a copy the first is what was read
        raise UserError(
            f"{place}: cannot be written: {error.strerror or error} (free some space or fix the rights)"
        ) from None


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        place = error.filename or folder
        raise UserError(f"{place}: cannot be made a folder: Not a directory (name another)") from None


def sweep_around(out: Path) -> None:
    """Remove what processes that were killed while they made a folder left in it or beside it."""
    sweep(out)
    sweep(out.parent)


def finish_moving(out: Path) -> None:
    """Drop the note of a process that was killed after it had moved everything."""
    with unless_held(out / _MOVING) as dead:
        if dead:
            (out / _MOVING).unlink(missing_ok=True)


def _move(source: Path, target: Path, *, overwrite: bool, last: str | None) -> None:
    """Move what lies in a folder; into a new one as a whole."""
    if not target.exists():
        try:
            source.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise _met(target) from None
        return
    note = target / _MOVING
    with unless_held(note, make=True) as free:
        used = bool(
            _names(target) - _noted(target)
        )  # noted by a killed process, as this one holds the note now
        if free is False or (used and not overwrite):
            if free and not _noted(target):
                note.unlink(missing_ok=True)
            raise _met(target)
        if not used:
            _write_note(note, sorted(_noted(target) | {path.name for path in source.iterdir()}))
        for path in sorted(source.rglob("*"), key=lambda path: (path.name == last, path)):
            place = target / path.relative_to(source)
            if path.is_dir():
                place.mkdir(parents=True, exist_ok=True)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, place)  # noqa: PTH105 - pathlib's replace is the same call
        note.unlink(missing_ok=True)


def _met(target: Path) -> UserError:
    return UserError(f"{target}: another process has written there meanwhile (choose another folder)")


def _names(folder: Path) -> set[str]:
    """Return what lies in a folder, remains of killed processes left out."""
    names = {path.name for path in folder.iterdir()}
    return {name for name in names if name != _MOVING and not is_temporary(name)}


def _noted(folder: Path) -> set[str]:
    note = folder / _MOVING
    return set(note.read_text(encoding="utf-8", errors="replace").splitlines()) if note.is_file() else set()


def _write_note(note: Path, names: Iterable[str]) -> None:
    """Write the note into the file that is held; it must be on the disk before anything is moved."""
    with note.open("w", encoding="utf-8") as file:
        file.write("".join(f"{name}\n" for name in names))
        file.flush()
        os.fsync(file.fileno())
