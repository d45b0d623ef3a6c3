"""A scan with its masks and maps made small enough for a page: cropped, thinned, in few grey levels, compressed.

What comes out is one run of bytes: the length of a head (4 bytes, little endian), the head as JSON, and a zlib stream
of arrays in the order (z, y, x), x towards the patient's right, y towards the front, z upwards. `viewer.js` reads it.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 - as its documentation does

from mlbseg.pictures import COLOURS
from mlbseg.types import Geometry

MOST_VOXELS = 1_500_000
"""That a page holds of one scan. A larger one is cropped around what is drawn in it, then thinned."""

MARGIN = 0.25
"""Of a crop around what is drawn, as a share of its sides; at least 8 voxels."""

LEVELS = 1024
"""Grey levels of an image. Whole numbers with a range below it are kept as they are."""

MOST_CLASSES = 250
"""What a mask of one byte a voxel can tell apart, with room for background and unknown."""

DIFFERENCES = ("#ff4d6d", "#b8f53d", "#ffffff")
"""Where the second mask differs from the first: missing in it, only in it, another class."""

UNKNOWN_COLOUR = "#8a97a3"

CT_WINDOWS = (
    ("soft tissue", -160.0, 240.0),
    ("liver", -30.0, 150.0),
    ("lung", -1350.0, 150.0),
    ("bone", -500.0, 1300.0),
    ("brain", 0.0, 80.0),
)
"""Usual windows of CT, in HU, as (name, lowest, highest)."""

CT_AIR = -500
"""A scan whose darkest hundredth lies below it is taken for CT."""


@dataclass(frozen=True)
class Subject:
    """What a viewer shows.

    Attributes:
        name: Of the case.
        caption: What to know about it, such as its scores.
        image: (*S) intensities, 2D or 3D.
        geometry: Where the image lies; it has the image's reversed shape.
        masks: By name, (*S) class values, 0 is background. The first is filled, the second drawn as lines.
        maps: By name, (*S) in 0 ... 1; NaN is transparent.
        focus: (*S) bool, what to open at, where it is longest in a slice; the first mask that has any when None.
    """

    name: str
    caption: str
    image: npt.NDArray[Any]
    geometry: Geometry
    masks: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    maps: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    focus: npt.NDArray[np.bool_] | None = None


def pack(
    subject: Subject,
    class_names: Mapping[int, str],
    *,
    most: int = MOST_VOXELS,
    unknown: int | None = None,
    extra: Mapping[str, Any] | None = None,
    level: int = 6,
) -> bytes:
    """Return what `viewer.js` shows of a subject.

    Args:
        subject: What to show.
        class_names: Name of each class value; values of the masks that it lacks are named by their number.
        most: Voxels that are kept.
        unknown: The value that stands for "not known here".
        extra: More for the head.
        level: Of compression, 1 (fast) to 9 (small).

    Raises:
        ValueError: if an array is not of the image's shape, the image is neither 2D nor 3D, or there are more than
            `MOST_CLASSES` class values.
    """
    arrays = {**subject.masks, **subject.maps}
    if subject.image.ndim not in (2, 3) or subject.geometry.size != subject.image.shape[::-1]:
        raise ValueError(f"image {subject.image.shape}, lattice {subject.geometry.size}: expected 2D or 3D")
    for name, array in arrays.items():
        if array.shape != subject.image.shape:
            raise ValueError(f"{name} is {array.shape}, expected the image's shape {subject.image.shape}")
    flat = subject.image.ndim == 2
    image, lattice = towards_ras(subject.image, subject.geometry)
    masks = {name: towards_ras(mask, subject.geometry)[0] for name, mask in subject.masks.items()}
    maps = {name: towards_ras(values, subject.geometry)[0] for name, values in subject.maps.items()}
    values = sorted({v for mask in masks.values() for v in values_of(mask)} | set(class_names))
    values = [value for value in values if value != 0]
    if len(values) > MOST_CLASSES:
        raise ValueError(f"{len(values)} class values, expected at most {MOST_CLASSES}")
    box = _box(masks, image.shape, most)
    steps = _steps([b.stop - b.start for b in box], lattice.spacing[::-1], most)
    if subject.focus is None:
        marked = next((mask != 0 for mask in masks.values() if mask.any()), np.zeros(image.shape, bool))
    else:
        marked = towards_ras(subject.focus, subject.geometry)[0]
    focus = _focus(thinned(marked, box, steps))
    grey, low, step = _levels(_shrunk(image[box].astype(np.float32), steps))
    head = {
        "name": subject.name,
        "caption": subject.caption,
        "flat": flat,
        "size": list(grey.shape[::-1]),
        "affine": _affine(lattice, box, steps).tolist(),
        "low": low,
        "step": step,
        "windows": _windows(image[box]),
        "focus": focus[::-1],
        "note": _note(image.shape, box, steps, step),
        "classes": [
            {"value": value, "name": _class_name(value, class_names, unknown), "colour": colour_of(i, value, unknown)}
            for i, value in enumerate(values)
        ],
        "layers": [],
        **(extra or {}),
    }  # fmt: skip
    planes = [(grey & 255).astype(np.uint8), (grey >> 8).astype(np.uint8)]
    seen = {name: _indices(thinned(mask, box, steps), values) for name, mask in masks.items()}
    for number, (name, indices) in enumerate(seen.items()):
        # Lines of the second mask are white, so that they are seen on the first of the same class.
        style = {"line": True, "single": "#ffffff", "opacity": 100} if number == 1 else {"opacity": 45}
        kind = {"kind": "mask", "shown": number < 2, **style}
        head["layers"].append({"name": name, **kind})
        planes.append(indices)
    if len(seen) > 1:
        (first, expected), (second, found) = list(seen.items())[:2]
        kinds = [f"only in {first}", f"only in {second}", *(["another class"] if len(values) > 1 else [])]
        classes = [{"name": k, "colour": c} for k, c in zip(kinds, DIFFERENCES, strict=False)]
        head["layers"].append(
            {"name": "difference", "kind": "difference", "classes": classes, "shown": False, "opacity": 80}
        )
        planes.append(_differences(expected, found))
    for name, array in maps.items():
        head["layers"].append({"name": name, "kind": "map", "shown": False, "opacity": 60})
        planes.append(_map_levels(thinned(array, box, steps)))
    text = json.dumps(head).encode()
    body = zlib.compress(b"".join(np.ascontiguousarray(plane).tobytes() for plane in planes), level)
    return len(text).to_bytes(4, "little") + text + body


def towards_ras(array: npt.NDArray[Any], geometry: Geometry) -> tuple[npt.NDArray[Any], Geometry]:
    """Turn an array so that x runs to the patient's right, y to the front and z upwards, without interpolation.

    A 2D image becomes one slice whose first row is the lowest, as y runs upwards on a screen.

    Returns:
        (Z, Y, X) and where it lies.
    """
    if geometry.ndim == 2:
        turned = (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0)
        return array[None, ::-1], Geometry(
            (*geometry.size, 1), (*geometry.spacing, 1.0), (0.0, 0.0, 0.0), turned
        )
    kept = array.astype(np.uint8) if array.dtype == bool else array
    image = sitk.GetImageFromArray(kept)
    image.SetSpacing(geometry.spacing)
    image.SetOrigin(geometry.origin)
    image.SetDirection(geometry.direction)
    turned = sitk.DICOMOrient(image, "RAS")
    lattice = Geometry(turned.GetSize(), turned.GetSpacing(), turned.GetOrigin(), turned.GetDirection())
    return sitk.GetArrayFromImage(turned).astype(array.dtype, copy=False), lattice


def from_ras(array: npt.NDArray[Any], geometry: Geometry) -> npt.NDArray[Any]:
    """Undo `towards_ras`.

    Args:
        array: (Z, Y, X), as turned.
        geometry: Where the result lies.

    Returns:
        (*S) on `geometry`.
    """
    if geometry.ndim == 2:
        return np.ascontiguousarray(array[0, ::-1])
    lattice = towards_ras(np.zeros(geometry.size[::-1], np.uint8), geometry)[1]
    image = sitk.GetImageFromArray(array)
    image.SetDirection(lattice.direction)
    letters = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(geometry.direction)
    return sitk.GetArrayFromImage(sitk.DICOMOrient(image, letters))


def values_of(mask: npt.NDArray[Any]) -> list[int]:
    """Return the values of a mask; counted where they are small, as sorting takes seconds of large scans."""
    if mask.size and mask.min() >= 0 and mask.max() < 65_536:
        return [int(v) for v in np.flatnonzero(np.bincount(mask.ravel()))]
    return [int(v) for v in np.unique(mask)]


def colour_of(number: int, value: int, unknown: int | None) -> str:
    """Return the colour of a class.

    Args:
        number: Of the class, from 0.
        value: Its value.
        unknown: The value that stands for "not known here".
    """
    return UNKNOWN_COLOUR if value == unknown else COLOURS[number % len(COLOURS)]


def _class_name(value: int, names: Mapping[int, str], unknown: int | None) -> str:
    return names.get(value, "unknown" if value == unknown else f"label {value}")


def _box(masks: Mapping[str, npt.NDArray[Any]], shape: tuple[int, ...], most: int) -> tuple[slice, ...]:
    """Return what is shown of the array: all, or what lies around all that is drawn."""
    whole = tuple(slice(0, n) for n in shape)
    if math.prod(shape) <= most or not any(mask.any() for mask in masks.values()):
        return whole
    box = []
    for axis, size in enumerate(shape):
        others = tuple(a for a in range(3) if a != axis)
        where = np.flatnonzero(np.any([(mask != 0).any(axis=others) for mask in masks.values()], axis=0))
        first, last = int(where[0]), int(where[-1])
        margin = max(8, math.ceil(MARGIN * (last + 1 - first)))
        box.append(slice(max(0, first - margin), min(size, last + 1 + margin)))
    return tuple(box)


def _steps(shape: list[int], spacing: tuple[float, ...], most: int) -> tuple[int, ...]:
    """Return by how much each axis is thinned: always that of the finest voxels, until `most` are left."""
    steps = [1, 1, 1]
    while math.prod(n // s for n, s in zip(shape, steps, strict=True)) > most:
        axis = min(
            (a for a in range(3) if shape[a] // steps[a] > 1),
            key=lambda a: (spacing[a] * steps[a], -shape[a]),
        )
        steps[axis] += 1
    return tuple(steps)


def _shrunk(image: npt.NDArray[np.float32], steps: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Return the means over blocks of `steps` voxels."""
    if set(steps) == {1}:
        return image
    counts = [n // s for n, s in zip(image.shape, steps, strict=True)]
    kept = image[tuple(slice(0, n * s) for n, s in zip(counts, steps, strict=True))]
    blocks = kept.reshape([part for n, s in zip(counts, steps, strict=True) for part in (n, s)])
    return np.asarray(blocks.mean(axis=(1, 3, 5)), np.float32)


def thinned(array: npt.NDArray[Any], box: tuple[slice, ...], steps: tuple[int, ...]) -> npt.NDArray[Any]:
    """Return the voxel in the middle of each block: no class arises between two others."""
    cut = array[box]
    counts = [n // s for n, s in zip(cut.shape, steps, strict=True)]
    return cut[tuple(slice(s // 2, s // 2 + (n - 1) * s + 1, s) for n, s in zip(counts, steps, strict=True))]


def _focus(marked: npt.NDArray[Any]) -> list[int]:
    """Return a marked voxel (z, y, x) near the middle of the slice that has most of them; the middle without any."""
    filled = np.count_nonzero(marked, axis=(1, 2))
    if not filled.any():
        return [n // 2 for n in marked.shape]
    z = int(filled.argmax())
    places = np.argwhere(marked[z])
    y, x = places[np.abs(places - np.median(places, axis=0)).sum(1).argmin()]
    return [z, int(y), int(x)]


def _levels(image: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.uint16], float, float]:
    """Return grey levels, the value of level 0, and the values between two levels."""
    finite = np.nan_to_num(image)
    low, high = float(finite.min()), float(finite.max())
    if high - low < LEVELS and np.array_equal(finite, np.rint(finite)):
        return (finite - low).astype(np.uint16), low, 1.0
    low, high = (float(v) for v in np.percentile(_sample(finite), [0.05, 99.95]))
    step = (high - low) / (LEVELS - 1) or 1.0
    return np.clip(np.rint((finite - low) / step), 0, LEVELS - 1).astype(np.uint16), low, step


def _windows(image: npt.NDArray[Any]) -> list[dict[str, Any]]:
    """Return the presets, the one to open with first."""
    finite = np.nan_to_num(_sample(image).astype(np.float32))
    least, low, dark, bright, high, most = (
        float(v) for v in np.percentile(finite, [0, 0.5, 10, 90, 99.5, 100])
    )
    usual = [("0.5 to 99.5 %", low, high), ("10 to 90 %", dark, bright), ("whole range", least, most)]
    found = [*CT_WINDOWS, *usual] if np.percentile(finite, 1) < CT_AIR else usual
    return [{"name": name, "low": a, "high": b if b > a else a + 1} for name, a, b in found]


def _sample(image: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a million of the voxels, evenly spread, which are enough for percentiles."""
    return image.ravel()[:: max(1, image.size // 1_000_000)]


def _affine(lattice: Geometry, box: tuple[slice, ...], steps: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Return (4, 4): from a voxel (x, y, z) of what is shown to mm towards right, front and up."""
    direction = np.reshape(lattice.direction, (3, 3)) * np.asarray(lattice.spacing)
    first = np.array([b.start + (s - 1) / 2 for b, s in zip(box, steps, strict=True)])[::-1]
    affine = np.eye(4)
    affine[:3, :3] = direction * np.asarray(steps[::-1])
    affine[:3, 3] = np.asarray(lattice.origin) + direction @ first
    affine[:2] *= -1  # LPS, as SimpleITK has it, to RAS, as NIfTI has it
    return affine


def _note(shape: tuple[int, ...], box: tuple[slice, ...], steps: tuple[int, ...], step: float) -> str:
    parts = []
    shown = [b.stop - b.start for b in box]
    if tuple(shown) != shape:
        parts.append(
            f"the {'×'.join(map(str, shown[::-1]))} voxels around what is drawn, of {'×'.join(map(str, shape[::-1]))}"
        )
    if set(steps) != {1}:
        parts.append(f"every {'×'.join(map(str, steps[::-1]))} voxels as one")
    if step != 1.0:
        parts.append(f"{LEVELS} grey levels")
    return f"Reduced for display: {', '.join(parts)}." if parts else ""


def _indices(mask: npt.NDArray[Any], values: list[int]) -> npt.NDArray[np.uint8]:
    if mask.size and mask.min() >= 0 and mask.max() < 65_536:
        table = np.zeros(65_536, np.uint8)
        table[[v for v in values if 0 < v < 65_536]] = [i for i, v in enumerate(values, 1) if 0 < v < 65_536]
        return np.asarray(table[mask])
    indices = np.zeros(mask.shape, np.uint8)
    for i, value in enumerate(values, start=1):
        indices[mask == value] = i
    return indices


def _differences(expected: npt.NDArray[Any], found: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return np.select([expected == found, found == 0, expected == 0], [0, 1, 2], default=3).astype(np.uint8)


def _map_levels(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    levels = np.where(np.isnan(values), 0, 1 + np.clip(np.nan_to_num(values), 0, 1) * 254)
    return levels.round().astype(np.uint8)
