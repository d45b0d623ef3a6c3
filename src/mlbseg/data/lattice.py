"""Where the voxels of a scan lie, and where those of its prepared version shall lie.

A prepared scan lies on a *grid*: the native lattice with its axes turned to an anatomical orientation
(permuted and flipped, never rotated, so that nothing is interpolated for it), cropped, and given another
spacing. Boxes and spacings are in array order ([z,] y, x); `Geometry` itself is in SimpleITK's order
(x, y[, z]).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 - as its documentation does

from mlbseg.types import Geometry

Box = tuple[tuple[int, int], ...]
"""(start, stop) in voxels along each array axis."""

CROP_GAIN = 0.1
"""A crop that removes no more than this share of the voxels is not worth its trouble."""
CROP_MARGIN = 4
"""Voxels left around the content by a crop, so that a network sees where the body ends."""
SAME_SPACING = 0.01
"""Spacings that differ by less than this share count as equal: resampling would blur and move nothing."""

AXIS_PAIRS = ("SI", "PA", "LR")
"""The two ways in which each array axis of a scan in LPS orientation can run."""

_OPPOSITE = {"L": "R", "R": "L", "P": "A", "A": "P", "S": "I", "I": "S"}


def is_orientation(code: str) -> bool:
    """Say whether `code` has one letter of each of `AXIS_PAIRS`."""
    return len(code) == 3 and all(sum(letter in pair for letter in code) == 1 for pair in AXIS_PAIRS)


def orientation(geometry: Geometry) -> str:
    """Return the direction in which each axis runs, (x, y, z) order, such as ``LPS``."""
    return str(sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(geometry.direction))


def reorient(geometry: Geometry, code: str) -> Geometry:
    """Permute and flip the axes of a 3D lattice so that they run as `code` says; 2D ones stay."""
    if geometry.ndim != 3:
        return geometry
    native = orientation(geometry)
    axes, flips = [], []
    for letter in code:
        flip = letter not in native
        axes.append(native.index(_OPPOSITE[letter] if flip else letter))
        flips.append(flip)
    direction = np.reshape(geometry.direction, (3, 3))
    origin = np.asarray(geometry.origin)
    for axis, flip in zip(axes, flips, strict=True):
        if flip:
            origin = origin + direction[:, axis] * geometry.spacing[axis] * (geometry.size[axis] - 1)
    turned = direction[:, axes] * np.where(flips, -1.0, 1.0)
    return Geometry(
        size=tuple(geometry.size[a] for a in axes),
        spacing=tuple(geometry.spacing[a] for a in axes),
        origin=tuple(float(v) for v in origin),
        direction=tuple(float(v) for v in turned.ravel()),
    )


def crop(geometry: Geometry, box: Box) -> Geometry:
    """Return the part of the lattice inside `box`."""
    start = np.array([low for low, _ in reversed(box)])
    step = np.reshape(geometry.direction, (geometry.ndim, geometry.ndim)) * np.asarray(geometry.spacing)
    origin = np.asarray(geometry.origin) + step @ start
    size = tuple(high - low for low, high in reversed(box))
    return replace(geometry, size=size, origin=tuple(float(v) for v in origin), stored=())


def at_spacing(geometry: Geometry, spacing: Sequence[float]) -> Geometry:
    """Return a lattice over the same field of view with another spacing.

    Args:
        geometry: The lattice.
        spacing: mm, array order; 0 keeps the lattice's own along that axis, and so does one within 1 % of it.

    Returns:
        The concentric lattice of as many whole voxels as it takes to cover the field of view, so that no
        voxel of either lattice lies outside the other's field of view.
    """
    size, kept = [], []
    for count, own, wanted in zip(geometry.size, geometry.spacing, reversed(spacing), strict=True):
        same = wanted == 0 or abs(wanted - own) <= SAME_SPACING * own
        kept.append(own if same else wanted)
        # The allowance keeps 100 x 0.6 mm at 1.2 mm from becoming 51 voxels for want of a rounding error.
        size.append(count if same else max(1, int(np.ceil(count * own / wanted - 1e-3))))
    edges = (np.multiply(geometry.size, geometry.spacing) - np.multiply(size, kept)) / 2
    offset = edges + (np.asarray(kept) - np.asarray(geometry.spacing)) / 2
    direction = np.reshape(geometry.direction, (geometry.ndim, geometry.ndim))
    origin = np.asarray(geometry.origin) + direction @ offset
    return Geometry(tuple(size), tuple(kept), tuple(float(v) for v in origin), geometry.direction)


def content_box(array: npt.NDArray[np.float32]) -> Box:
    """Find the box of the voxels above the background, and a margin.

    Args:
        array: (C, *S). A channel's background is its smallest value, as scanners and masking tools write it.

    Returns:
        The box; the whole scan if there is no content.
    """
    shape = array.shape[1:]
    content = np.zeros(shape, bool)
    for channel in array:
        content |= channel > channel.min()
    box = []
    for axis, length in enumerate(shape):
        others = tuple(a for a in range(len(shape)) if a != axis)
        inside = np.flatnonzero(content.any(axis=others))
        if not inside.size:
            return tuple((0, n) for n in shape)
        box.append((max(0, int(inside[0]) - CROP_MARGIN), min(length, int(inside[-1]) + 1 + CROP_MARGIN)))
    return tuple(box)


def worth_cropping(box: Box, shape: Sequence[int]) -> bool:
    """Say whether cropping an array of `shape` to `box` removes more than `CROP_GAIN` of its voxels."""
    kept = np.prod([high - low for low, high in box]) / np.prod(shape)
    return bool(kept < 1 - CROP_GAIN)


def axis_map(native: Geometry, grid: Geometry) -> tuple[int, ...]:
    """Return, for each axis of the native lattice, the grid axis parallel to it ((x, y[, z]) order)."""
    n = native.ndim
    cosines = np.reshape(native.direction, (n, n)).T @ np.reshape(grid.direction, (n, n))
    return tuple(int(a) for a in np.abs(cosines).argmax(axis=1))


def array_shape(geometry: Geometry) -> tuple[int, ...]:
    """Return the shape of an array on the lattice: the reversed size."""
    return tuple(reversed(geometry.size))
