"""HDF5 scans of the Left Atrium kind: data sets `image` and `label` with axes (x, y[, z])."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from mlbseg.data.formats.opened import Opened, checked_geometry, fail, require_axes, require_room
from mlbseg.data.geometry import shown
from mlbseg.memory import free_memory, require_memory
from mlbseg.types import Geometry

_DAMAGED = (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, zlib.error)
"""What h5py and zlib raise on a damaged file."""

_FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32, h5py.h5z.FILTER_LZF}
"""What chunks may be stored by. HDF5 would look for any other in libraries outside of this package."""

_MODEST_CHUNK = 1 << 26  # bytes; whatever a chunk of these holds, decoding it is no burden
_MOST_PADDING = 8  # times the data set: each of three axes may fill its last chunk by half only
_DEFLATE_MOST = 1032  # times that deflate makes its input larger, at most (zlib's documentation)


def open_hdf5(path: Path, *, label: bool = False) -> Opened:
    """Open the data set `image` of an HDF5 file, or `label`.

    Raises:
        ReadError: If it is not readable.
    """
    name = "label" if label else "image"
    with _dataset(path, name) as dataset:
        place = _geometry(path, dataset)
        require_room(path, place.size, 1, dataset.dtype.itemsize)
        _require_modest_chunks(path, dataset)

    def read() -> npt.NDArray[Any]:
        with _dataset(path, name) as dataset:
            array = dataset[()]
        if array.dtype == np.float16:  # too small to be compared with the bounds of other types
            array = array.astype(np.float32)
        return np.ascontiguousarray(array.T)[None]

    return Opened(place, 1, read)


@contextmanager
def _dataset(path: Path, name: str) -> Iterator[h5py.Dataset]:
    """Open a data set of an HDF5 file of the Left Atrium kind; links into other files are not followed."""
    try:
        with h5py.File(path) as file:
            dataset = file.get(name) if _is_own(file, name) else None
            if isinstance(dataset, h5py.Dataset) and (dataset.external or dataset.is_virtual):
                dataset = None
            if not isinstance(dataset, h5py.Dataset):
                held = ", ".join(list(file)[:12]) or "nothing"
                found = f"no data set {name!r} of its own (found: {held})"
                fail(path, found, f"{name!r}", kind="hdf5")
            if dataset.dtype.kind not in "buif":
                fail(path, f"data set {name!r} of type {dataset.dtype}", "real numbers", kind="hdf5")
            yield dataset
    except _DAMAGED as error:
        reason = str(error).split("(")[-1].rstrip(")")[:100]
        fail(path, f"cannot be read: {reason}", "a complete HDF5 file", "copy it again")


def _is_own(file: h5py.File, name: str) -> bool:
    """Say whether the name stands for something in this file; HDF5 would open the file that a link names."""
    return isinstance(file.get(name, getlink=True), h5py.HardLink)


def _geometry(path: Path, dataset: h5py.Dataset) -> Geometry:
    """Return the geometry of a data set: 1 mm unless an attribute `spacing` (x, y[, z]) says more."""
    if dataset.ndim not in (2, 3):
        fail(path, f"{dataset.ndim}D data set", "2D or 3D", "split it into channels or time points", "4d")
    require_axes(path, dataset.shape)
    given = next((a for a in (dataset.attrs, dataset.file.attrs) if "spacing" in a), None)
    if given is None:
        return Geometry.identity(dataset.shape)
    expected = f"{dataset.ndim} finite numbers above 0"
    if math.prod(given.get_id("spacing").shape) > dataset.ndim:  # it may announce any number of them
        fail(path, f"spacing {shown(given.get_id('spacing').shape)}", expected, kind="spacing")
    spacing = tuple(float(v) for v in np.ravel(given["spacing"]))
    if len(spacing) != dataset.ndim or not (np.isfinite(spacing).all() and min(spacing) > 0):
        fail(path, f"spacing {shown(spacing)}", expected, kind="spacing")
    origin = (0.0,) * dataset.ndim
    return checked_geometry(path, dataset.shape, spacing, origin, np.eye(dataset.ndim))[0]


def _require_modest_chunks(path: Path, dataset: h5py.Dataset) -> None:
    """Refuse chunks that take more memory than the data set announces: HDF5 decodes each whole, however large."""
    if dataset.chunks is None:
        return
    created = dataset.id.get_create_plist()
    filters = [created.get_filter(i) for i in range(created.get_nfilters())]
    for number, _, _, name in filters:
        if number not in _FILTERS:
            found = f"a data set compressed by {name.decode(errors='replace')[:40] or f'filter {number}'}"
            fail(path, found, "gzip, lzf or none", "convert it with h5repack -f GZIP=4", "hdf5")
    chunk = math.prod(dataset.chunks) * dataset.dtype.itemsize
    require_memory(path, chunk)
    if chunk > max(_MOST_PADDING * dataset.nbytes, _MODEST_CHUNK):
        found = f"chunks of {chunk} bytes for {dataset.nbytes} bytes of pixels"
        fail(path, found, "chunks no larger than the pixels", "write it again", "hdf5")
    if any(number == h5py.h5z.FILTER_DEFLATE for number, *_ in filters):
        _require_honest_deflate(path, dataset, chunk)


def _require_honest_deflate(path: Path, dataset: h5py.Dataset, chunk: int) -> None:
    """Inflate each chunk that could become larger than memory, no further than it may."""
    stored = [dataset.id.get_chunk_info(i) for i in range(dataset.id.get_num_chunks())]
    for info in stored:
        if info.size * _DEFLATE_MOST <= max(2 * chunk, free_memory() // 4):
            continue
        _, raw = dataset.id.read_direct_chunk(info.chunk_offset)
        if (
            len(zlib.decompressobj().decompress(raw, chunk + 8)) > chunk + 4
        ):  # a checksum may follow the pixels
            fail(path, "a chunk of more pixels than it announces", f"{chunk} bytes", "write it again", "hdf5")


def has_label(path: Path) -> bool:
    """Say whether the file holds a data set `label`; False if it cannot be opened (reading says why)."""
    try:
        with h5py.File(path) as file:
            return _is_own(file, "label")
    except _DAMAGED:
        return False
