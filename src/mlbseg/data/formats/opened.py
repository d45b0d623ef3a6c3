"""What every format gives: a file whose header is sound, and its pixels when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from mlbseg.data.geometry import HALF, listed, orthogonalised, shown
from mlbseg.data.placement import Placement
from mlbseg.errors import Fault, ReadError
from mlbseg.memory import require_memory
from mlbseg.types import Geometry

_FLOAT32 = 4  # bytes; every image becomes float32, every label int32
_NOTED = 1e-3  # voxels: less is what rounding does to a header
_LENGTH_ERROR = 0.01  # of a direction, whose length is 1


@dataclass(frozen=True)
class Opened:
    """A file whose header has been read and judged.

    Attributes:
        geometry: Where it lies.
        components: Numbers per pixel.
        read: Returns the pixels, (C, *S) with C components, in the type that holds them best. Raises a
            `ReadError` if they are not what the header says.
        notes: What was left out or done to the file, for the user to know.
    """

    geometry: Geometry
    components: int
    read: Callable[[], npt.NDArray[Any]]
    notes: tuple[str, ...] = ()


def fail(path: Path, found: str, expected: str = "", remedy: str = "", kind: str = "unreadable") -> NoReturn:
    """Raise a `ReadError` about `path`."""
    raise ReadError(Fault(str(path), found, expected, remedy, kind=kind))


def require_room(path: Path, size: Sequence[int], components: int, itemsize: int) -> None:
    """Refuse a file whose announced pixels do not fit into memory: as stored, and beside that as float32.

    Raises:
        ReadError: If they do not.
    """
    require_memory(path, math.prod(size) * components * (itemsize + _FLOAT32))


def require_axes(path: Path, size: Sequence[int]) -> int:
    """Return the number of axes without trailing ones of length 1: 2 or 3.

    Raises:
        ReadError: If there are others, or one has no pixels.
    """
    ndim = len(size)
    while ndim > 3 and size[ndim - 1] == 1:
        ndim -= 1
    if ndim < 2:
        fail(path, f"{ndim} axis", "2 or 3 axes")
    if min(size) < 1:
        fail(path, f"size {shown(size)}", "at least one pixel along each axis", "write the file again")
    if ndim > 3:
        found = f"{ndim}D image of {shown(size)}"
        fail(path, found, "2D or 3D", "split it into channels or time points", "4d")
    return ndim


def checked_geometry(
    path: Path,
    size: Sequence[int],
    spacing: Sequence[float],
    origin: Sequence[float],
    direction: npt.NDArray[np.float64],
) -> tuple[Geometry, tuple[str, ...]]:
    """Return where a scan lies, if that is a place that scans have; trailing axes of length 1 are dropped.

    Axes that are not quite at right angles are straightened.

    Args:
        path: The file.
        size: Pixels along each of n axes.
        spacing: mm, n numbers.
        origin: mm, n numbers.
        direction: (n, n), the direction of axis i in column i.

    Returns:
        The lattice, and what the user should know of it.

    Raises:
        ReadError: If it is none.
    """
    ndim = require_axes(path, size)
    spacing, origin = list(spacing[:ndim]), list(origin[:ndim])
    direction = np.asarray(direction, dtype=float)[:ndim, :ndim]
    if not (np.isfinite(spacing).all() and min(spacing) > 0):
        fail(path, f"spacing {shown(spacing)} mm", "finite spacing above 0", "correct the header", "spacing")
    if not np.isfinite(origin).all():
        fail(path, "origin is not a number", "finite numbers", "correct the header", "geometry")
    with np.errstate(over="ignore"):
        lengths = np.linalg.norm(direction, axis=0)
    if not np.allclose(lengths, 1, rtol=0, atol=_LENGTH_ERROR):
        found = f"directions of length {listed(lengths.tolist())}"
        fail(path, found, "length 1, and mm in the spacing", "correct the header", "direction")
    steps = direction * spacing
    lattice, moved = orthogonalised(size[:ndim], steps, origin, spacing)
    if not np.isfinite(moved):
        found = f"direction {listed(direction.ravel().tolist())}"
        fail(path, found, "axes at right angles", "correct the header", "direction")
    if moved >= HALF:
        refuse_shear(path, "sheared axes", moved)
    if not np.array_equal(np.reshape(lattice.direction, (ndim, ndim)), direction):
        lattice = replace(lattice, stored=Placement.of_steps(steps, origin).numbers)
    return lattice, shear_notes(moved)


def shear_notes(moved: float, *, masks: str = "; masks keep the axes of the file") -> tuple[str, ...]:
    """Say that axes were straightened, which moved voxels by up to `moved` of one; () if that is what rounding does."""
    if moved <= _NOTED:
        return ()
    most = next(bound for bound in (0.01, 0.1, HALF) if moved < bound)  # few words for many scans
    return (
        "its axes are not quite at right angles: they are straightened, which moves voxels by less than "
        f"{most:g} of one{masks}",
    )


def refuse_shear(path: Path, found: str, moved: float) -> NoReturn:
    """Refuse axes that straightening would take to another place."""
    found = f"{found}: at right angles, voxels would move by up to {moved:.2g} of one"
    remedy = "resample it onto a straight grid, with the label the same way"
    fail(path, found, "axes at right angles, within half a voxel", remedy, "geometry")
