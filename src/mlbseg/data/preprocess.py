"""Scans to what a network sees, and back. Pure functions, the same for training and prediction."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 - as its documentation does

from mlbseg.components import largest_components
from mlbseg.data.lattice import (
    Box,
    array_shape,
    at_spacing,
    axis_map,
    content_box,
    crop,
    reorient,
    worth_cropping,
)
from mlbseg.errors import UserError
from mlbseg.types import NOT_KNOWN, Geometry, Scan

if TYPE_CHECKING:  # an exported bundle has this file, and not all that makes plans
    from mlbseg.data.plan import Plan

Label = TypeVar("Label", bound=np.integer[Any])
Source = tuple[Callable[[int, tuple[slice, ...]], npt.NDArray[np.float32]], Geometry]
"""Gives the share of a class, by its index, in a part of a lattice; and the lattice. The background's index is 0."""

UNKNOWN = 255
"""In a prepared label: a voxel whose class the label leaves open."""

SMOOTH_ABOVE = 1.5
"""Down-sampling by more than this factor would fold fine texture onto the grid: scans are smoothed first."""

SLAB_VOXELS = 4_000_000
"""Voxels that labels are brought onto at a time, so that few arrays as large as the scan exist at once."""


@dataclass(frozen=True)
class Frame:
    """Where a prepared scan lies.

    Attributes:
        native: The lattice of the scan as it came.
        grid: That of the prepared scan: oriented, cropped, at the plan's spacing.
    """

    native: Geometry
    grid: Geometry


def prepare_scan(scan: Scan, plan: Plan) -> tuple[npt.NDArray[np.float32], Frame]:
    """Orient, crop, resample and normalise a scan.

    Besides `scan` and the result at most two float32 copies of one channel are held at a time.

    Args:
        scan: (C, *S) on its native lattice.
        plan: What to do.

    Returns:
        (C, *S') float32 on the frame's grid, and the frame.

    Raises:
        UserError: The scan is not of the plan's dimension and channels, or holds NaN or infinity.
    """
    channels, ndim = len(scan.array), scan.geometry.ndim
    if (ndim, channels) != (plan.scan_ndim, plan.channels):
        raise UserError(
            f"the scan is {ndim}D with {channels} channel(s), "
            f"expected {plan.scan_ndim}D with {plan.channels} as in training "
            "(give scans of the kind that was trained on)"
        )
    if not all(np.isfinite(channel.min()) and np.isfinite(channel.max()) for channel in scan.array):
        raise UserError("the scan holds NaN or infinite values, expected numbers (replace them in the file)")
    frame = Frame(scan.geometry, _grid(scan, plan))
    prepared = np.empty((channels, *array_shape(frame.grid)), np.float32)
    for index, channel in enumerate(scan.array):
        resampled = _resample(channel, frame.native, frame.grid, smooth=True)
        prepared[index] = _view(resampled)
        del resampled
        if plan.normalisation[index] == "ct":
            window = plan.intensity[index]
            np.clip(prepared[index], window["lower"], window["upper"], out=prepared[index])
            offset, scale = window["mean"], window["std"]
        else:
            offset, scale = _content_statistics(channel)
        prepared[index] -= np.float32(offset)
        prepared[index] /= np.float32(scale)
    return prepared, frame


def prepare_label(
    label: npt.NDArray[np.integer[Any]],
    native: Geometry,
    frame_grid: Geometry,
    plan: Plan,
) -> npt.NDArray[np.uint8]:
    """Bring a label onto a prepared scan's grid.

    Classes are interpolated one by one and the likeliest is taken: no value arises between two others. On a coarser
    grid a voxel into which any known voxel falls is known, lest thin scribbles and single slices be lost.

    Args:
        label: (*S) values as in the file, `NOT_KNOWN` where a voxel does not tell its class.
        native: The label's lattice.
        frame_grid: The grid of the scan that it belongs to.
        plan: Says which value is which class.

    Returns:
        (*S') class indices, and `UNKNOWN` where the class is not known.

    Raises:
        UserError: The label's size is not the lattice's, or it holds a value that the plan does not know.
    """
    if label.shape != array_shape(native):
        raise UserError(f"the label has {label.shape} voxels, expected {array_shape(native)}")
    found = set(np.unique(label).tolist())
    unexpected = sorted(found - {*plan.label_values, NOT_KNOWN})
    if unexpected:
        raise UserError(
            f"label values {unexpected[:10]}, expected only {list(plan.label_values)} "
            "(correct the label, or name every value in plan.label_values)"
        )
    values = list(plan.label_values)
    stored = list(range(plan.num_classes))
    partly = NOT_KNOWN in found
    if partly:
        if UNKNOWN in stored:
            raise UserError(f"{len(values)} classes, expected at most {UNKNOWN} beside a value for not known")
        values.append(NOT_KNOWN)
        stored.append(UNKNOWN)
    prepared = likeliest(
        [(lambda index, part: (label[part] == values[index]).astype(np.float32), native)],
        stored,
        frame_grid,
        np.uint8,
    )
    if partly and any(step > 1.01 * min(native.spacing) for step in frame_grid.spacing):
        _keep_known(prepared, label, values[:-1], native, frame_grid)
    return prepared


def _keep_known(
    prepared: npt.NDArray[np.uint8],
    label: npt.NDArray[np.integer[Any]],
    values: Sequence[int],
    native: Geometry,
    grid: Geometry,
) -> None:
    """Give voxels of a grid that are `UNKNOWN`, in place, the class that most known voxels in them have."""
    flat = prepared.reshape(-1)
    open_ = flat == UNKNOWN
    most = np.zeros(flat.shape, np.int64)
    for index, value in enumerate(values):
        voxels = np.argwhere(label == value)
        places = _places_on(voxels[:, ::-1], native, grid)[:, ::-1]
        within = np.all((places >= 0) & (places < prepared.shape), axis=1)
        votes = np.bincount(
            np.ravel_multi_index(tuple(places[within].T), prepared.shape), minlength=flat.size
        )
        flat[open_ & (votes > most)] = index
        np.maximum(most, votes, out=most)


def _places_on(indices: npt.NDArray[np.int64], source: Geometry, target: Geometry) -> npt.NDArray[np.int64]:
    """Return in which voxels of a lattice the voxels of another lie: (n, axes) indices in (x, y[, z]) order."""
    n = source.ndim
    to_mm = np.reshape(source.direction, (n, n)) * np.asarray(source.spacing)
    from_mm = np.linalg.inv(np.reshape(target.direction, (n, n)) * np.asarray(target.spacing))
    mm = indices @ to_mm.T + source.origin
    # The edge between two voxels belongs to the upper one, on either side of a rounding error.
    return np.floor((mm - target.origin) @ from_mm.T + 0.5 + 1e-6).astype(np.int64)


def restore_label(
    probabilities: npt.NDArray[np.float32], frame: Frame, plan: Plan, *, largest: bool | None = None
) -> npt.NDArray[np.int32]:
    """Bring class probabilities back to the native lattice and take the likeliest class.

    Args:
        probabilities: (K, *S') on the frame's grid.
        frame: From `prepare_scan`.
        plan: Says which class has which value, and of which classes the largest component is kept.
        largest: Keep the largest component of every class (True) or all components (False); as planned when None.

    Returns:
        (*S) label values as in the files. Voxels outside the grid are background.
    """
    return restore_mean([(probabilities, frame)], plan.label_values, plan.largest_component, largest=largest)


def restore_mean(
    maps: Sequence[tuple[npt.NDArray[np.float32], Frame]],
    values: Sequence[int],
    in_one_piece: Sequence[int] = (),
    *,
    largest: bool | None = None,
) -> npt.NDArray[np.int32]:
    """Return the likeliest class of the mean of several networks' probabilities, on the scan's own lattice.

    Args:
        maps: For each network (K, *S') on a grid of its own, and its frame; the native lattice is the same in all.
        values: What stands for each class in the result.
        in_one_piece: Of which values the largest component is kept where `largest` is None.
        largest: Keep the largest component of every class (True) or all components (False).

    Returns:
        (*S) label values. A network counts as sure of background outside its grid.
    """

    def source(probabilities: npt.NDArray[np.float32], frame: Frame) -> Source:
        return lambda index, part: probabilities[index][part], frame.grid

    label = likeliest([source(*each) for each in maps], values, maps[0][1].native, np.int32)
    if largest is None:
        return largest_components(label, in_one_piece)
    return largest_components(label) if largest else label


def restore_probability(
    probability: npt.NDArray[np.float32], frame: Frame, *, outside: float = 0.0
) -> npt.NDArray[np.float32]:
    """Bring one class's probability (*S') back to the native lattice (*S); `outside` is its value outside the grid."""
    return sitk.GetArrayFromImage(_resample(probability, frame.grid, frame.native, outside=outside))


def _grid(scan: Scan, plan: Plan) -> Geometry:
    geometry = scan.geometry
    if plan.crop:
        box = content_box(scan.array)
        if worth_cropping(box, scan.array.shape[1:]):
            geometry = crop(geometry, box)
    return at_spacing(reorient(geometry, plan.orientation), plan.spacing)


def _content_statistics(channel: npt.NDArray[np.float32]) -> tuple[float, float]:
    """Return mean and SD of the voxels above the smallest value; (value, 1) of a constant channel.

    Slab by slab in float64: exact, and without a second copy of the scan.
    """
    lowest = channel.min()
    count, total, squares = 0, 0.0, 0.0
    for slab in channel:
        values = slab[slab > lowest].astype(np.float64) - float(lowest)
        count += values.size
        total += float(values.sum())
        squares += float(np.square(values).sum())
    if not count:
        return float(lowest), 1.0
    mean = total / count
    return mean + float(lowest), max(squares / count - mean**2, 0.0) ** 0.5 or 1.0


def likeliest(
    sources: Sequence[Source], values: Sequence[int], target: Geometry, dtype: type[Label]
) -> npt.NDArray[Label]:
    """Resample slab by slab, and class by class with a running maximum; only the result is as large as `target`.

    Args:
        sources: Shares of the classes, of which the mean counts.
        values: What stands for each class in the result.
        target: The lattice of the result. Outside a source it is background.
        dtype: Of the result.
    """
    shape = array_shape(target)
    result = np.zeros(shape, dtype)
    rows = max(1, SLAB_VOXELS // math.prod(shape[1:]))
    for start in range(0, shape[0], rows):
        slab = result[start : start + rows]
        here = crop(target, ((start, start + len(slab)), *((0, n) for n in shape[1:])))
        boxes = [_box_around(here, source) for _, source in sources]
        best = np.full(slab.shape, -np.inf, np.float32)
        for index, value in enumerate(values):
            total: npt.NDArray[np.float32] | None = None
            for (share, source), box in zip(sources, boxes, strict=True):
                part = share(index, tuple(slice(*side) for side in box))
                image = _resample(part, crop(source, box), here, outside=float(index == 0))
                if len(sources) == 1:
                    _take_better(best, slab, _view(image), value)
                elif total is None:
                    total = sitk.GetArrayFromImage(image)
                else:
                    total += _view(image)
            if total is not None:  # the largest sum is the largest mean
                _take_better(best, slab, total, value)
    return result


def _box_around(part: Geometry, source: Geometry) -> Box:
    """Return the box of `source` that interpolation on `part` reads, with a voxel to spare on each side."""
    n = source.ndim
    corners = np.array(list(itertools.product(*((0, size - 1) for size in part.size))))
    to_mm = np.reshape(part.direction, (n, n)) * np.asarray(part.spacing)
    from_mm = np.linalg.inv(np.reshape(source.direction, (n, n)) * np.asarray(source.spacing))
    places = (corners @ to_mm.T + part.origin - source.origin) @ from_mm.T
    box = []
    for low, high, size in zip(places.min(0), places.max(0), source.size, strict=True):
        # A part that lies beside the source still gets a voxel of it, next to which all is outside.
        start = min(max(math.floor(low) - 1, 0), size - 1)
        box.append((start, max(min(math.ceil(high) + 2, size), start + 1)))
    return tuple(reversed(box))


def _take_better(
    best: npt.NDArray[np.float32],
    result: npt.NDArray[Label],
    candidate: npt.NDArray[np.float32],
    value: int,
) -> None:
    better = candidate > best
    result[better] = value
    np.copyto(best, candidate, where=better)


def _resample(
    array: npt.NDArray[np.float32],
    source: Geometry,
    target: Geometry,
    *,
    smooth: bool = False,
    outside: float = 0.0,
) -> sitk.Image:
    """Resample (*S) from one lattice onto another; axes may be permuted and flipped between them.

    Between lattices of equal spacing voxels are copied, not interpolated.
    """
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(source.spacing)
    image.SetOrigin(source.origin)
    image.SetDirection(source.direction)
    steps = [target.spacing[axis] for axis in axis_map(source, target)]
    if smooth:
        for axis, (own, wanted) in enumerate(zip(source.spacing, steps, strict=True)):
            # The recursive filter needs four voxels; so short an axis has no fine texture to fold.
            if wanted > SMOOTH_ABOVE * own and source.size[axis] >= 4:
                image = sitk.RecursiveGaussian(
                    image, (wanted - own) / 2, False, sitk.RecursiveGaussianImageFilter.ZeroOrder, axis
                )
    copy = np.allclose(steps, source.spacing, rtol=1e-6, atol=0)
    return sitk.Resample(
        image,
        target.size,
        sitk.Transform(source.ndim, sitk.sitkIdentity),
        sitk.sitkNearestNeighbor if copy else sitk.sitkLinear,
        target.origin,
        target.spacing,
        target.direction,
        outside,
        sitk.sitkFloat32,
    )


def _view(image: sitk.Image) -> npt.NDArray[np.float32]:
    """Return the image's own memory: the caller must hold `image` for as long as it uses the view."""
    view: npt.NDArray[np.float32] = sitk.GetArrayViewFromImage(image)
    return view
