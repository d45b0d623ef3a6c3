"""What ITK reads, judged before it is believed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 - as its documentation does

from mlbseg.data.formats.opened import Opened, fail
from mlbseg.data.geometry import DIRECTION_TOLERANCE, listed, shown
from mlbseg.types import Geometry


def open_itk(path: Path, kind: str) -> Opened:
    """Open a file that ITK reads; trailing axes of length 1 are dropped.

    Args:
        path: The file.
        kind: The name of its format, for messages.

    Raises:
        ReadError: If it is not readable, or its geometry is none that scans have.
    """
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    with itk_errors(path, kind):
        reader.ReadImageInformation()
    if "complex" in sitk.GetPixelIDValueAsString(reader.GetPixelID()):
        fail(path, "complex values", "real values", "save the magnitude", "complex")
    geometry = _geometry(path, reader)
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


def _geometry(path: Path, reader: sitk.ImageFileReader) -> Geometry:
    size, total = reader.GetSize(), reader.GetDimension()
    if total < 2:
        fail(path, f"{total} axis", "2 or 3 axes")
    ndim = total
    while ndim > 3 and size[ndim - 1] == 1:
        ndim -= 1
    if ndim > 3:
        fail(
            path, f"{ndim}D image of {shown(size)}", "2D or 3D", "split it into channels or time points", "4d"
        )
    spacing, direction = (
        reader.GetSpacing()[:ndim],
        np.reshape(reader.GetDirection(), (total, total))[:ndim, :ndim],
    )
    if not (np.isfinite(spacing).all() and min(spacing) > 0):
        fail(path, f"spacing {shown(spacing)} mm", "finite spacing above 0", "correct the header", "spacing")
    if not np.allclose(direction @ direction.T, np.eye(ndim), atol=DIRECTION_TOLERANCE):
        found = f"direction {listed(direction.ravel().tolist())}"
        fail(path, found, "axes at right angles", "resample it onto a straight grid", "direction")
    if not np.isfinite(reader.GetOrigin()).all():
        fail(path, "origin is not a number", "finite numbers", "correct the header", "geometry")
    return Geometry(size[:ndim], spacing, reader.GetOrigin()[:ndim], tuple(direction.ravel().tolist()))


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
