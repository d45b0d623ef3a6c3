"""What is common to all that ITK reads: pixels as arrays, errors as faults."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 - as its documentation does

from mlbseg.data.formats.opened import fail


def channels(image: sitk.Image) -> npt.NDArray[Any]:
    """Return the pixels of an image as (C, *S), copied."""
    array = sitk.GetArrayViewFromImage(image)
    vector = image.GetNumberOfComponentsPerPixel() > 1
    return np.array(np.moveaxis(array, -1, 0) if vector else array[None], order="C")


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
