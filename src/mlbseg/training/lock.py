"""One process trains a run folder at a time."""

from __future__ import annotations

import fcntl
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlbseg.errors import UserError


@contextmanager
def sole_trainer(root: Path) -> Iterator[None]:
    """Keep other processes from training this run folder until the end of the block.

    The operating system frees the lock when the process ends, however it ends: a killed run can be continued at once.
    The file stays, as a lock on a file that is deleted would not be seen by all.

    Args:
        root: The run folder.

    Raises:
        UserError: if another process trains it, or the folder cannot be written.
    """
    path = root / ".lock"
    try:
        file = path.open("ab")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error} (fix the rights)") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{root}: another process is training this run (wait for its end, or stop it first)"
            ) from None
        except OSError as error:  # no reason not to train
            warnings.warn(
                f"{path}: cannot be locked ({error.strerror or error}); "
                "make sure that no other process trains this run",
                stacklevel=3,
            )
        yield
