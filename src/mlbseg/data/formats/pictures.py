"""PNG, TIFF and JPEG files: 2D images without a place in the patient."""

from __future__ import annotations

from pathlib import Path

from mlbseg.data.formats.itk import open_itk
from mlbseg.data.formats.opened import Opened, fail


def open_png(path: Path, *, label: bool = False) -> Opened:
    """Open a PNG file.

    Raises:
        ReadError: If it is not readable.
    """
    return open_itk(path, "PNG", picture=True)


def open_tiff(path: Path, *, label: bool = False) -> Opened:
    """Open a TIFF file.

    Raises:
        ReadError: If it is not readable.
    """
    return open_itk(path, "TIFF", picture=True)


def open_jpeg(path: Path, *, label: bool = False) -> Opened:
    """Open a JPEG file.

    Raises:
        ReadError: If it is not readable.
    """
    if b"\xff\xd9" not in path.read_bytes()[-64:]:
        fail(path, "truncated, or not a JPEG file", "a complete JPEG file", "copy it again")
    return open_itk(path, "JPEG", picture=True)
