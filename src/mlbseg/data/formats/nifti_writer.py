"""Writing NIfTI files that lie where the scan lies that they were made of."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt

from mlbseg.data.placement import SCANNER, Placement
from mlbseg.types import Geometry

_MOST_NIFTI1 = 32767  # voxels along an axis
_VECTOR = 1007  # the intent code of several components per voxel
_MM = 2  # the code of the unit


def save_nifti(path: Path, array: npt.NDArray[Any], geometry: Geometry) -> None:
    """Write ([C,] *S), unscaled, with the place that the scan's own file states, if that was one.

    Qform, sform, their codes and the unit of length are taken over as they are: which of them is followed depends on
    the program, so each of them must be the scan's.

    Raises:
        OSError: If the file cannot be written.
    """
    kind = nibabel.Nifti1Header if max(geometry.size) <= _MOST_NIFTI1 else nibabel.Nifti2Header
    header = kind()
    voxels = array.T  # x first, as it is stored
    header.set_data_dtype(array.dtype)
    if array.ndim > geometry.ndim:  # components are the fifth axis
        between = (1,) * (4 - geometry.ndim)
        voxels = voxels.reshape((*geometry.size, *between, len(array)))
        header["intent_code"] = _VECTOR
    header.set_data_shape(voxels.shape)
    image = (nibabel.Nifti1Image if kind is nibabel.Nifti1Header else nibabel.Nifti2Image)(
        voxels, None, header
    )
    _place(image.header, geometry)  # of a header that it is given, nibabel mends codes that it does not know
    with path.open("wb") as raw:
        if not path.name.lower().endswith(".gz"):
            image.to_stream(raw)
            return
        # Without a name and a time, equal masks are equal files.
        with gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as file:
            image.to_stream(file)


def _place(header: Any, geometry: Geometry) -> None:
    if geometry.stored:
        Placement.of_numbers(geometry.stored).fill(header)
        return
    n = geometry.ndim
    flips = np.array([-1.0, -1.0, 1.0])
    affine = np.eye(4)
    affine[:n, :n] = np.reshape(geometry.direction, (n, n)) * geometry.spacing
    affine[:n, 3] = geometry.origin
    affine[:3] *= flips[:, None]
    header["pixdim"][1 : n + 1] = geometry.spacing
    header["xyzt_units"] = _MM
    header.set_sform(affine, SCANNER)
    # A qform holds no shear; what single precision leaves of one is not worth an error.
    header.set_qform(affine, SCANNER, strip_shears=True)
