"""NRRD files: .nrrd, and .nhdr with its pixels in a file beside it."""

from __future__ import annotations

from pathlib import Path

from mlbseg.data.formats.detached import beside
from mlbseg.data.formats.itk import open_itk
from mlbseg.data.formats.opened import Opened, fail

_HEAD = 1 << 20


def open_nrrd(path: Path, *, label: bool = False) -> Opened:
    """Open an NRRD file.

    Raises:
        ReadError: If it is not readable.
    """
    verify(path)
    return open_itk(path, "NRRD")


def verify(path: Path) -> None:
    """See that a detached NRRD header names a file beside it (https://teem.sourceforge.net/nrrd/format.html)."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not head.startswith(b"NRRD"):
        fail(path, "not an NRRD file", "a header that starts with NRRD", "replace it")
    for line in head.split(b"\n\n")[0].decode("latin-1").splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in ("data file", "datafile"):
            beside(path, value.strip())
