"""Temporary files and folders: renamed when they are complete, removed at the end, swept if their process was killed.

A killed process cannot tidy up. So every temporary has a name of one pattern and is locked by the process that writes
it; the operating system frees the lock when that process ends, however it ends. What has such a name and no lock is a
remain, and the next process that writes there removes it. A folder is locked through a file beside it, which is made
before it and removed after it, as not every file system locks folders. Where a file system has no locks nothing is
swept: nothing is known to be a remain there. So it is on Windows, which renames no file that is held.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

_NAME = re.compile(r"\.mlbseg-[0-9a-f]{32}(\.[A-Za-z.]+)?")
_LOCK = ".lock"
_WINDOWS = os.name == "nt"
_CAUTIOUS = getattr(os, "O_NOFOLLOW", 0) | getattr(
    os, "O_NONBLOCK", 0
)  # neither follows a link nor waits for a pipe


def is_temporary(name: str) -> bool:
    """Return whether a file or folder of this name is a temporary of this package."""
    return _NAME.fullmatch(name) is not None


@contextmanager
def temporary_file(folder: Path, suffix: str = "") -> Iterator[Path]:
    """Make an empty file, to be written and renamed; if it was not renamed, it is removed at the end.

    Args:
        folder: Where; remains in it are swept first, once per process.
        suffix: What its name is to end in, such as ``.nii.gz``.

    Raises:
        OSError: if it cannot be made.
    """
    _sweep_once(folder.absolute())
    path, handle = _locked_file(folder, suffix)
    try:
        yield path
    finally:
        try:
            path.unlink(missing_ok=True)
        finally:
            if handle is not None:
                os.close(handle)


@contextmanager
def temporary_folder(parent: Path, *, mode: int = 0o700) -> Iterator[Path]:
    """Make an empty folder; if it was not renamed, it is removed at the end with all that is in it.

    Args:
        parent: Where; remains in it are swept first.
        mode: Rights, less those that the umask takes. By default nobody else can look into it: there may be masks.

    Raises:
        OSError: if it cannot be made.
    """
    sweep(parent)
    with temporary_file(parent, _LOCK) as lock:
        folder = lock.with_name(lock.name.removesuffix(_LOCK))
        try:
            folder.mkdir(mode=mode)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what killed processes left in a folder."""
    try:
        found = sorted(path for path in folder.iterdir() if is_temporary(path.name))
    except OSError:  # not there, or not to be looked into: nothing depends on it
        return
    for path in found:
        _remove_remain(path)


def sweep_tree(root: Path) -> None:
    """Remove what killed processes left in a folder and in all folders under it."""
    for folder, _, _ in os.walk(root):
        sweep(Path(folder))


@contextmanager
def unless_held(path: Path, *, make: bool = False) -> Iterator[bool | None]:
    """Yield whether no process holds a file; if so, no other can hold it until the end of the block.

    A file that is not there is held by no process. What cannot be known, on a file system without locks, on Windows or
    of another user's file, is None.

    Args:
        path: The file.
        make: Make it, if it is not there.

    Raises:
        OSError: if it cannot be made.
    """
    try:
        handle = os.open(path, os.O_RDWR | _CAUTIOUS | (os.O_CREAT if make else 0), 0o666)
    except OSError as error:
        if make:
            raise
        yield True if isinstance(error, FileNotFoundError) else None
        return
    if _WINDOWS:
        os.close(handle)
        yield None
        return
    try:
        yield _lock(handle)
    finally:
        os.close(handle)


@cache
def _sweep_once(folder: Path) -> None:
    """Sweep a folder at the first file that this process writes there: at each, many files would take long."""
    sweep(folder)


def _locked_file(folder: Path, suffix: str) -> tuple[Path, int | None]:
    """Make a new file and hold it; return it with what holds it until it is closed, None on Windows."""
    while True:
        path = folder / f".mlbseg-{uuid.uuid4().hex}{suffix}"
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if _WINDOWS:
            os.close(handle)
            return path, None
        if _lock(handle) is not False and path.exists():
            return path, handle
        os.close(handle)  # another process took it for a remain before it was held, and removes it


def _lock(handle: int) -> bool | None:
    """Hold an open file, and return whether that went: False if another process holds it, None without locks."""
    # Here, as every command pays for an import at the top, and few write.
    from filelock import lock_descriptor

    try:
        return lock_descriptor(handle, blocking=False)
    except OSError:  # a file system without locks
        return None


def _remove_remain(path: Path) -> None:
    is_folder = path.is_dir() and not path.is_symlink()
    with unless_held(path.with_name(f"{path.name}{_LOCK}") if is_folder else path) as dead:
        if not dead:
            return
        if is_folder:
            shutil.rmtree(path, ignore_errors=True)
            return
        try:
            path.unlink(missing_ok=True)
        except OSError:  # another user's folder: whoever may remove it will
            return
