"""What lies at a path, looked at before anything is opened: opening a FIFO would wait for ever."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from mlbseg.errors import UserError

_SPECIAL = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device file",
    stat.S_IFBLK: "a device file",
}
SYSTEM_FOLDERS = {
    "lost+found": "the file system's own folder",  # nobody else may look into it
    "System Volume Information": "the file system's own folder",
    "$RECYCLE.BIN": "a folder of deleted files",
    "#recycle": "a folder of deleted files",
    "@eaDir": "a folder of previews",  # a NAS makes them
    "__MACOSX": "a folder of a Mac's own files",  # in its ZIP files
}
"""Folders that systems add to those of users, and what they are: nobody has put scans there."""


def entries(folder: Path) -> list[Path]:
    """Return what lies in `folder`, sorted, without hidden files.

    Raises:
        UserError: If it is not a folder that can be listed.
    """
    try:
        return sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror})") from None


def is_file(path: Path) -> bool:
    """Say whether a regular file is there, or a link to one, that may be looked at."""
    return stat.S_ISREG(_mode(path))


def is_folder(path: Path) -> bool:
    """Say whether a folder is there, or a link to one, that may be looked at."""
    return stat.S_ISDIR(_mode(path))


def unusable(path: Path) -> str:
    """Return what makes a path one that is never to be opened, or "" if it may be.

    Returns:
        ``a FIFO``, ``a socket``, ``a device file``, ``a broken link``, ``a loop of links``, or, of a folder, that it
        cannot be listed and why. Whether a regular file can be read, only reading says.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "a loop of links"
        if error.errno == errno.ENOENT and path.is_symlink():
            return "a broken link"
        return f"cannot be looked at ({error.strerror})"
    if stat.S_ISDIR(mode):
        try:
            os.scandir(path).close()
        except OSError as error:
            return f"a folder that cannot be listed ({error.strerror})"
    return _SPECIAL.get(stat.S_IFMT(mode), "")


def is_special(path: Path) -> bool:
    """Say whether a path is a FIFO, a socket or a device file, which no scan ever is."""
    return stat.S_IFMT(_mode(path)) in _SPECIAL


def _mode(path: Path) -> int:
    """Return the mode of what is there; 0 where there is nothing, or nothing that may be looked at."""
    try:
        return path.stat().st_mode
    except (OSError, ValueError):  # ValueError: a name with a null character
        return 0
