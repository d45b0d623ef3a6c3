"""HDF5 scans of the Left Atrium kind: data sets `image` and `label` with axes (x, y[, z])."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from mlbseg.data.formats.opened import Opened, fail
from mlbseg.data.geometry import shown
from mlbseg.types import Geometry

_DAMAGED = (OSError, RuntimeError, KeyError, ValueError, TypeError)  # what h5py raises on a damaged file


def open_hdf5(path: Path, *, label: bool = False) -> Opened:
    """Open the data set `image` of an HDF5 file, or `label`.

    Raises:
        ReadError: If it is not readable.
    """
    name = "label" if label else "image"
    with _dataset(path, name) as dataset:
        place = _geometry(path, dataset)

    def read() -> npt.NDArray[Any]:
        with _dataset(path, name) as dataset:
            return np.ascontiguousarray(dataset[()].T)[None]

    return Opened(place, 1, read)


@contextmanager
def _dataset(path: Path, name: str) -> Iterator[h5py.Dataset]:
    """Open a data set of an HDF5 file of the Left Atrium kind; links into other files are not followed."""
    try:
        with h5py.File(path) as file:
            dataset = file.get(name) if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
            if isinstance(dataset, h5py.Dataset) and (dataset.external or dataset.is_virtual):
                dataset = None
            if not isinstance(dataset, h5py.Dataset):
                fail(
                    path,
                    f"no data set {name!r} of its own (found: {', '.join(file) or 'nothing'})",
                    f"{name!r}",
                    kind="hdf5",
                )
            if dataset.dtype.kind not in "buif":
                fail(path, f"data set {name!r} of type {dataset.dtype}", "real numbers", kind="hdf5")
            yield dataset
    except _DAMAGED as error:
        reason = str(error).split("(")[-1].rstrip(")")[:100]
        fail(path, f"cannot be read: {reason}", "a complete HDF5 file", "copy it again")


def _geometry(path: Path, dataset: h5py.Dataset) -> Geometry:
    """Return the geometry of a data set: 1 mm unless an attribute `spacing` (x, y[, z]) says more."""
    if dataset.ndim not in (2, 3):
        fail(path, f"{dataset.ndim}D data set", "2D or 3D", "split it into channels or time points", "4d")
    given = dataset.attrs.get("spacing", dataset.file.attrs.get("spacing"))
    if given is None:
        return Geometry.identity(dataset.shape)
    spacing = tuple(float(v) for v in np.ravel(given))
    if len(spacing) != dataset.ndim or not (np.isfinite(spacing).all() and min(spacing) > 0):
        fail(path, f"spacing {shown(spacing)}", f"{dataset.ndim} finite numbers above 0", kind="spacing")
    return Geometry.identity(dataset.shape, spacing)


def has_label(path: Path) -> bool:
    """Say whether the file holds a data set `label`; False if it cannot be opened (reading says why)."""
    try:
        with h5py.File(path) as file:
            return "label" in file
    except _DAMAGED:
        return False
