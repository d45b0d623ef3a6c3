"""What a clean label shows of its structures: how large they are, where, and how much of them coarser voxels keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from mlbseg.data.lattice import Box, at_spacing, axis_map, crop, reorient
from mlbseg.data.preprocess import likeliest
from mlbseg.types import Geometry

COARSER = (1.5, 2.0, 3.0, 4.0, 6.0)
"""Multiples of the finest spacing at which the loss of detail is measured."""


@dataclass(frozen=True)
class Structure:
    """One structure of one clean label.

    Attributes:
        value: Its label value.
        extent: mm along each axis of its largest component's box; array order, 3D scans turned to LPS.
        centre: Mean place of its voxels along each axis, as a share of the scan's length; axes as of `extent`.
        largest: Share of its voxels that its largest connected component (full connectivity) holds.
        detail: Pairs of a spacing (mm) and the Dice of the label with itself, brought to that spacing (axes that are
            coarser already keep theirs) and back. The first is the finest axis's own spacing, with 1.
    """

    value: int
    extent: tuple[float, ...]
    centre: tuple[float, ...]
    largest: float
    detail: tuple[tuple[float, float], ...]

    def kept(self, spacing: float) -> float:
        """Return the Dice that a spacing (mm) keeps, interpolated; 0 beyond the coarsest that was measured."""
        at, dice = zip(*self.detail, strict=True)
        return float(np.interp(spacing, at, dice, right=0.0))


def structures(label: npt.NDArray[np.integer[Any]], geometry: Geometry) -> tuple[Structure, ...]:
    """Measure every structure of a label.

    Args:
        label: (*S) values; 0 is background.
        geometry: The lattice that it lies on.

    Returns:
        One entry for each value, in their order.
    """
    values = [int(v) for v in np.unique(label) if v > 0]
    kept = _detail(label, geometry, values)
    return tuple(_structure(value, label == value, geometry, kept[value]) for value in values)


def _structure(
    value: int, mask: npt.NDArray[np.bool_], geometry: Geometry, detail: tuple[tuple[float, float], ...]
) -> Structure:
    """Measure the structure of a value, whose voxels `mask` (*S) holds."""
    order = _turned_axes(geometry)
    sizes, largest = _components(mask)
    extent = np.array([part.stop - part.start for part in largest]) * geometry.spacing[::-1]
    centre = (np.array(ndimage.center_of_mass(mask)) + 0.5) / mask.shape
    turned = reorient(geometry, "LPS")
    away = np.array([not _same_way(geometry, turned, axis) for axis in range(mask.ndim)])
    centre = np.where(away, 1 - centre, centre)
    return Structure(
        value=value,
        extent=tuple(float(v) for v in extent[order]),
        centre=tuple(float(v) for v in centre[order]),
        largest=float(sizes.max() / sizes.sum()),
        detail=detail,
    )


def _components(mask: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int64], tuple[slice, ...]]:
    """Return the voxels of each component (full connectivity), and the size of the box of the largest."""
    (box,) = ndimage.find_objects(
        mask.astype(np.uint8)
    )  # of all: a box costs less to look through than a scan
    numbered, _ = ndimage.label(mask[box], structure=np.ones((3,) * mask.ndim))
    sizes = np.bincount(numbered.ravel())[1:]
    return sizes, ndimage.find_objects(numbered)[int(sizes.argmax())]


def _turned_axes(geometry: Geometry) -> list[int]:
    """Return which array axis of the lattice each axis of the one turned to LPS is."""
    if geometry.ndim == 2:
        return [0, 1]
    parallel = axis_map(reorient(geometry, "LPS"), geometry)  # (x, y, z) order
    return [2 - axis for axis in reversed(parallel)]


def _same_way(geometry: Geometry, turned: Geometry, axis: int) -> bool:
    """Say whether an array axis of the lattice runs the way of the turned lattice's axis that is parallel to it."""
    n = geometry.ndim
    cosines = np.reshape(geometry.direction, (n, n)).T @ np.reshape(turned.direction, (n, n))
    own = n - 1 - axis
    return bool(cosines[own, axis_map(geometry, turned)[own]] > 0)


def _detail(
    label: npt.NDArray[np.integer[Any]], geometry: Geometry, values: Sequence[int]
) -> dict[int, tuple[tuple[float, float], ...]]:
    """Return `Structure.detail` of each value."""
    finest = min(geometry.spacing)
    detail = {value: [(finest, 1.0)] for value in values}
    if not values:
        return {}
    for spacing in (finest * factor for factor in COARSER):
        part, place = _around(label, geometry, 2 * spacing)
        grid = at_spacing(place, [max(spacing, own) for own in reversed(geometry.spacing)])
        coarse = _brought(part, values, place, grid)
        back = _brought(coarse, values, grid, place)
        for value in values:
            own, again = part == value, back == value
            dice = 2 * np.count_nonzero(own & again) / (np.count_nonzero(own) + np.count_nonzero(again))
            detail[value].append((spacing, float(dice)))
    return {value: tuple(pairs) for value, pairs in detail.items()}


def _around(
    label: npt.NDArray[np.integer[Any]], geometry: Geometry, margin: float
) -> tuple[npt.NDArray[np.integer[Any]], Geometry]:
    """Return the part of a label around what is not background, with a margin in mm, and where it lies."""
    box: list[tuple[int, int]] = []
    for axis, (length, step) in enumerate(zip(label.shape, reversed(geometry.spacing), strict=True)):
        inside = np.flatnonzero(label.any(axis=tuple(a for a in range(label.ndim) if a != axis)))
        spare = math.ceil(margin / step)
        box.append((max(0, int(inside[0]) - spare), min(length, int(inside[-1]) + 1 + spare)))
    place: Box = tuple(box)
    return label[tuple(slice(*side) for side in place)], crop(geometry, place)


def _brought(
    label: npt.NDArray[np.integer[Any]], values: Sequence[int], source: Geometry, target: Geometry
) -> npt.NDArray[np.int32]:
    """Bring a label onto another lattice as preparing and predicting do: class by class, the likeliest wins."""
    classes = [0, *values]
    return likeliest(
        [(lambda index, part: (label[part] == classes[index]).astype(np.float32), source)],
        classes,
        target,
        np.int32,
    )
