"""One process works on a folder at a time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import lock_descriptor

from mlbseg.errors import UserError
from mlbseg.staging import finish_moving
from mlbseg.temporaries import sweep, sweep_tree


@contextmanager
def sole_trainer(root: Path) -> Iterator[None]:
    """Keep other processes from training this run folder until the end of the block; sweep what killed ones left.

    The operating system frees the lock when the process ends, however it ends: a killed run can be continued at once.
    The file stays, as a lock on a file that is deleted would not be seen by all.

    Args:
        root: The run folder.

    Raises:
        UserError: if another process trains it, or the folder cannot be written.
    """
    busy = f"{root}: another process is training this run (wait for its end, or stop it first)"
    with locked(root / ".lock", busy):
        sweep(root.parent)
        sweep_tree(root)
        finish_moving(root)
        yield


class Busy(UserError):
    """Another process holds the lock."""


@contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Hold the lock on a file until the end of the block. The file is made if need be, and stays.

    Args:
        path: The file.
        busy: What to say if another process holds it.

    Raises:
        Busy: if another process holds it.
        UserError: if the file cannot be written.
    """
    try:
        file = path.open("ab")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error} (fix the rights)") from None
    with file:
        try:
            free = lock_descriptor(file.fileno(), blocking=False)
        except OSError as error:  # a file system without locks is no reason not to train
            warnings.warn(
                f"{path}: cannot be locked ({error.strerror or error}); "
                "make sure that no other process works there",
                stacklevel=5,
            )
            free = True
        if not free:
            raise Busy(busy)
        yield
