"""The user's folder for prepared scans and for what is known of scans that were read."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from stat import S_ISDIR

from mlbseg.errors import UserError


def default_cache_root() -> Path:
    """Return $MLBSEG_CACHE, else `mlbseg` in $XDG_CACHE_HOME, else in ~/.cache, else in the machine's temporary folder.

    The last is for users without a home that they can write to, in containers for instance.

    Raises:
        UserError: that folder cannot be made, or is another user's.
    """
    if own := os.environ.get("MLBSEG_CACHE"):
        return Path(own)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "mlbseg"
    try:
        home = Path.home()
    except RuntimeError:  # there is none
        return _temporary_root()
    root = home / ".cache" / "mlbseg"
    there = next(path for path in (root, *root.parents) if path.exists())
    return root if os.access(there, os.W_OK) else _temporary_root()


def _temporary_root() -> Path:
    """Return this user's folder among the temporary ones, made if need be, which nobody else can look into."""
    remedy = "(name a folder with --cache DIR or the environment variable MLBSEG_CACHE)"
    try:
        root = Path(tempfile.gettempdir()) / f"mlbseg-{os.getuid()}"
        root.mkdir(mode=0o700, exist_ok=True)
        found = root.lstat()
    except OSError as error:  # of the first it means that none of the usual places can be written
        raise UserError(
            "no folder for prepared scans: there is no home and no temporary folder that can be written: "
            f"{error.strerror or error} {remedy}"
        ) from None
    if not S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UserError(
            f"{root}: expected a folder of your own that nobody else can look into, as prepared scans go there {remedy}"
        )
    return root
