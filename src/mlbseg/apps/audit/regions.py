"""Suspected regions of a label: where, how large, and what the networks say in its place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 - as its documentation does
from scipy import ndimage

from mlbseg.data.preprocess import Frame
from mlbseg.types import Geometry

LARGEST = 20  # regions listed of a case


@dataclass(frozen=True)
class Region:
    """Voxels that hang together and are not trusted.

    Attributes:
        label: The class value that most of them have in the label.
        suggested: The class value that most of them have in the prediction.
        voxels: Number of them.
        volume: mm³ (mm² in 2D).
        trust: Mean over the region.
        index: A voxel in the middle of it, in the scan's (x, y[, z]) order, from 0.
        position: Where that is in the patient, mm, LPS, in (x, y[, z]) order.
    """

    label: int
    suggested: int
    voxels: int
    volume: float
    trust: float
    index: tuple[int, ...]
    position: tuple[float, ...]


def find_regions(
    trust: npt.NDArray[np.float32],
    label: npt.NDArray[np.integer],
    predicted: npt.NDArray[np.integer],
    frame: Frame,
    *,
    threshold: float,
    smallest: float,
) -> tuple[list[Region], npt.NDArray[np.bool_], int]:
    """Return the `LARGEST` suspected regions of a label, the voxels that lie in any, and how many there are.

    A border that two people would draw a voxel apart is no error: a region must somewhere be thicker than two voxels.

    Args:
        trust: (*S) in [0, 1].
        label: (*S) class values as in the file.
        predicted: (*S) class values that the networks would give.
        frame: Its grid is that of all three.
        threshold: Voxels below it are not trusted.
        smallest: Volume of a region that is worth a look, mm³ (mm² in 2D).
    """
    doubted = trust < threshold
    # Padded, as what lies outside the scan must not count as trusted; then grown back within what is doubted.
    inner = ndimage.binary_erosion(np.pad(doubted, 1, mode="edge"))[(slice(1, -1),) * doubted.ndim]
    numbered, _ = ndimage.label(doubted, structure=np.ones((3,) * doubted.ndim))
    voxel = float(np.prod(frame.grid.spacing))
    voxels = np.bincount(numbered.ravel())
    thick = np.unique(numbered[inner & doubted])
    chosen = thick[voxels[thick] * voxel >= smallest]
    largest = chosen[np.argsort(-voxels[chosen], kind="stable")][:LARGEST]
    grid, native = _lattice(frame.grid), _lattice(frame.native)
    boxes = ndimage.find_objects(numbered)
    found = []
    for number in largest:
        box = boxes[number - 1]
        inside = numbered[box] == number
        deepest = ndimage.distance_transform_edt(np.pad(inside, 1))[(slice(1, -1),) * inside.ndim]
        middle = np.unravel_index(int(deepest.argmax()), inside.shape)
        on_grid = tuple(int(m + s.start) for m, s in zip(middle, box, strict=True))[::-1]
        position = grid.TransformIndexToPhysicalPoint(on_grid)
        found.append(
            Region(
                label=_commonest(label[box][inside]),
                suggested=_commonest(predicted[box][inside]),
                voxels=int(voxels[number]),
                volume=float(voxels[number]) * voxel,
                trust=float(trust[box][inside].mean()),
                index=tuple(native.TransformPhysicalPointToIndex(position)),
                position=tuple(position),
            )
        )
    return found, np.isin(numbered, chosen), len(chosen)


def stray_region(
    label: npt.NDArray[np.integer], stray: npt.NDArray[np.bool_], native: Geometry
) -> Region | None:
    """Return the region of labelled voxels that lie outside all that the networks were shown; None without any.

    Args:
        label: (*S) class values on the scan's own lattice.
        stray: (*S) which voxels.
        native: The lattice.
    """
    places = np.argwhere(stray)
    if not len(places):
        return None
    middle = places[np.abs(places - np.median(places, axis=0)).sum(1).argmin()]
    index = tuple(int(i) for i in middle[::-1])
    return Region(
        label=_commonest(label[stray]),
        suggested=0,
        voxels=len(places),
        volume=len(places) * float(np.prod(native.spacing)),
        trust=0.0,
        index=index,
        position=tuple(_lattice(native).TransformIndexToPhysicalPoint(index)),
    )


def _lattice(geometry: Geometry) -> sitk.Image:
    """Return an image, of one pixel, that knows where the lattice lies."""
    image = sitk.Image([1] * geometry.ndim, sitk.sitkUInt8)
    image.SetSpacing(geometry.spacing)
    image.SetOrigin(geometry.origin)
    image.SetDirection(geometry.direction)
    return image


def _commonest(values: npt.NDArray[np.integer]) -> int:
    found, counts = np.unique(values, return_counts=True)
    return int(found[counts.argmax()])
