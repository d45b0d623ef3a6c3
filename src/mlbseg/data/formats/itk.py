"""What ITK reads, judged before it is believed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 - as its documentation does

from mlbseg.data.formats.opened import Opened, checked_geometry, fail, require_axes, require_room
from mlbseg.data.geometry import shown
from mlbseg.types import Geometry

MOST_PIXELS = 1 << 28
"""Pixels of a picture; a damaged header may announce more than any memory holds, and the decoder would believe it."""


def open_itk(path: Path, kind: str, *, picture: bool = False) -> Opened:
    """Open a file that ITK reads; trailing axes of length 1 are dropped.

    Args:
        path: The file.
        kind: The name of its format, for messages.
        picture: It has no place in the patient, and one page.

    Raises:
        ReadError: If it is not readable, or its geometry is none that scans have.
    """
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    with itk_errors(path, kind):
        reader.ReadImageInformation()
    kind_of_number = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    if "complex" in kind_of_number:
        fail(path, "complex values", "real values", "save the magnitude", "complex")
    geometry = _geometry(path, reader, picture=picture)
    require_room(path, geometry.size, reader.GetNumberOfComponents(), _itemsize(kind_of_number))
    reader.SetExtractSize([*geometry.size, *[0] * (reader.GetDimension() - geometry.ndim)])

    def read() -> npt.NDArray[Any]:
        with itk_errors(path, kind):
            return channels(reader.Execute())

    return Opened(geometry, reader.GetNumberOfComponents(), read)


def channels(image: sitk.Image) -> npt.NDArray[Any]:
    """Return the pixels of an image as (C, *S), copied."""
    array = sitk.GetArrayViewFromImage(image)
    vector = image.GetNumberOfComponentsPerPixel() > 1
    return np.array(np.moveaxis(array, -1, 0) if vector else array[None], order="C")


def _itemsize(kind: str) -> int:
    """Return the bytes of a number of ITK's type, such as ``vector of 16-bit signed integer``."""
    bits = re.search(r"(\d+)-bit", kind)
    return int(bits[1]) // 8 if bits else 8


def _geometry(path: Path, reader: sitk.ImageFileReader, *, picture: bool) -> Geometry:
    size = reader.GetSize()
    if picture:
        if require_axes(path, size) == 3:
            fail(path, f"{size[2]} pages", "one page", "save a stack as NIfTI with its spacing", "pages")
        if math.prod(size) > MOST_PIXELS:
            found = f"a picture of {shown(size)} pixels"
            fail(path, found, f"at most {MOST_PIXELS}", "cut it into tiles", "size")
        # Dots per inch in a picture say nothing about mm in the patient, and differ between image and mask.
        return Geometry.identity(size)
    direction = np.reshape(reader.GetDirection(), (len(size), len(size)))
    return checked_geometry(path, size, reader.GetSpacing(), reader.GetOrigin(), direction)


@contextmanager
def itk_errors(path: Path, kind: str) -> Iterator[None]:
    """Turn ITK's exception, which quotes C++ sources, into one short line, and keep ITK's warnings off the terminal.

    They would run through the progress bar; what matters in them is checked by mlbseg and said once. The setting is
    ITK's own for the whole process, so it is put back.
    """
    displayed = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    except RuntimeError as error:
        lines = [re.sub(r".*(ERROR|\(0x[0-9a-f]+\)): ", "", line).strip() for line in str(error).splitlines()]
        lines = [s for s in lines if s and not s.startswith(("Exception thrown", "Reason:", "[nrrd] nrrd"))]
        reason = (lines[-1] if lines else "no reason given").replace(str(path), path.name)[:100]
        fail(path, f"cannot be read: {reason}", f"a complete {kind}", "copy or export it again")
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(displayed)
