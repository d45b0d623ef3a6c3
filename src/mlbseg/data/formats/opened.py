"""What every format gives: a file whose header is sound, and its pixels when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from mlbseg.data.geometry import DIRECTION_TOLERANCE, listed, shown
from mlbseg.errors import Fault, ReadError
from mlbseg.memory import require_memory
from mlbseg.types import Geometry

_FLOAT32 = 4  # bytes; every image becomes float32, every label int32


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
) -> Geometry:
    """Return where a scan lies, if that is a place that scans have; trailing axes of length 1 are dropped.

    Args:
        path: The file.
        size: Pixels along each of n axes.
        spacing: mm, n numbers.
        origin: mm, n numbers.
        direction: (n, n), the direction of axis i in column i.

    Raises:
        ReadError: If it is none.
    """
    ndim = require_axes(path, size)
    spacing, origin = list(spacing[:ndim]), list(origin[:ndim])
    direction = np.asarray(direction, dtype=float)[:ndim, :ndim]
    if not (np.isfinite(spacing).all() and min(spacing) > 0):
        fail(path, f"spacing {shown(spacing)} mm", "finite spacing above 0", "correct the header", "spacing")
    if not np.allclose(direction.T @ direction, np.eye(ndim), atol=DIRECTION_TOLERANCE):
        found = f"direction {listed(direction.ravel().tolist())}"
        fail(path, found, "axes at right angles", "resample it onto a straight grid", "direction")
    if not np.isfinite(origin).all():
        fail(path, "origin is not a number", "finite numbers", "correct the header", "geometry")
    return Geometry(tuple(size[:ndim]), tuple(spacing), tuple(origin), tuple(direction.ravel().tolist()))
