"""The rules by which the data decide a plan: from facts to a value and the reason for it, in a sentence.

The table in `mlbseg.data.plan` states them all; those that weigh the data against a device are in `mlbseg.data.budget`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from mlbseg.data.fingerprint import ONE_PIECE, Fingerprint
from mlbseg.data.geometry import shown
from mlbseg.data.lattice import AXIS_PAIRS, CROP_GAIN
from mlbseg.errors import UserError

T = TypeVar("T")

THICK_SLICES = 3.5
FEW_SLICES = 8
COARSE_AXIS = 3.0
LABELLED = "under the clean labels"
CONTENT = "above each scan's minimum (no clean label has this channel's)"

Reasoned = tuple[T, str]
"""A value, and why."""


def decide_ndim(facts: Fingerprint) -> Reasoned[int]:
    """2 for 2D scans, thick slices and few slices; else 3."""
    if facts.scan_ndim == 2:
        return 2, "The scans are 2D."
    spacing, size = facts.median_spacing, facts.median_size
    ratio = sorted(spacing)[-1] / sorted(spacing)[-2]
    if ratio > THICK_SLICES:
        return 2, f"Slices lie {ratio:.1f} times as far apart as their pixels (more than {THICK_SLICES})."
    if min(size) < FEW_SLICES:
        return 2, f"The median scan has only {min(size):g} slices (fewer than {FEW_SLICES})."
    return 3, f"The coarsest axis has {ratio:.1f} times the spacing of the next (at most {THICK_SLICES})."


def decide_orientation(facts: Fingerprint, ndim: int) -> Reasoned[str]:
    """LPS, or slices first for a 2D network."""
    if facts.scan_ndim == 2:
        return "LPS", "2D scans are left as they lie."
    spacing, size = facts.median_spacing, facts.median_size
    ratio = sorted(spacing)[-1] / sorted(spacing)[-2]
    across = int(np.argmax(spacing)) if ratio > THICK_SLICES else int(np.argmin(size))
    thick = ratio > THICK_SLICES or min(size) < FEW_SLICES
    if ndim == 3 or not thick or across == 0:
        return "LPS", "Axes run to the patient's left, posterior and superior."
    return {1: "LSP", 2: "PSL"}[across], "The array's first axis runs across the slices, for a 2D network."


def array_axes(orientation: str, ndim: int) -> list[int]:
    """Return which of the LPS array axes (z, y, x) each axis of the prepared array is."""
    if ndim == 2:
        return [0, 1]
    return [
        next(i for i, pair in enumerate(AXIS_PAIRS) if letter in pair) for letter in reversed(orientation)
    ]


def decide_label_values(facts: Fingerprint, class_names: Mapping[int, str]) -> Reasoned[tuple[int, ...]]:
    """Take the values that the data declares, else those in the labels."""
    if class_names:
        return tuple(sorted({0, *class_names})), "Background and the values that the data declares."
    found = facts.label_values()
    if not set(found) - {0}:
        raise UserError(
            "no case has a label with anything in it, expected at least one clean case (add labels)"
        )
    return tuple(sorted({0, *found})), "Background and the values in the labels."


def decide_class_names(values: tuple[int, ...], class_names: Mapping[int, str]) -> Reasoned[tuple[str, ...]]:
    """As the data has it, else by value; of two with one name the later is told by its value."""
    names = {0: "background", **class_names}
    reason = "As the data names them." if class_names else "The data names no classes: called by their value."
    chosen: list[str] = []
    for value in values:
        name = names.get(value, f"label {value}")
        chosen.append(f"{name} ({value})" if name in chosen else name)
    return tuple(chosen), reason


def own_spacing(spacings: npt.NDArray[np.float64], ndim: int) -> Reasoned[tuple[float, ...]]:
    """Take the median over (cases, axes), axes in the prepared order."""
    target = np.median(spacings, axis=0)
    reason = f"Median of {len(spacings)} cases"
    if spacings.shape[1] == 3 and ndim == 2:
        target[0] = 0.0
        reason += "; 0: across slices each scan keeps its own"
    elif spacings.shape[1] == 3 and np.sort(target)[-1] > COARSE_AXIS * np.sort(target)[-2]:
        axis = int(target.argmax())
        target[axis] = np.percentile(spacings[:, axis], 10)
        reason += f"; the 10th percentile along axis {axis}, more than {COARSE_AXIS:g} times coarser"
    return tuple(round(float(v), 6) for v in target), reason


def decide_crop(facts: Fingerprint) -> Reasoned[bool]:
    """Crop where that saves more than `CROP_GAIN` in the median case."""
    saved = 1 - float(np.median(np.prod(facts.box_sizes / facts.sizes, axis=1)))
    return saved > CROP_GAIN, f"The non-background box saves {saved:.0%} of the median scan."


def decide_normalisation(facts: Fingerprint) -> Reasoned[tuple[str, ...]]:
    """``ct`` for channels in Hounsfield units, else ``zscore``."""
    kinds = []
    for channel in range(facts.channels):
        lowest = float(np.median([case.minimum[channel] for case in facts.cases]))
        whole = all(case.integers[channel] for case in facts.cases)
        kinds.append("ct" if whole and -3100 <= lowest <= -500 else "zscore")
    if "ct" in kinds:
        return tuple(kinds), "Whole numbers that reach down to air: Hounsfield units, alike in all scans."
    return tuple(kinds), "Intensities are in no common unit: each scan is brought to mean 0 and SD 1."


def decide_intensity(
    facts: Fingerprint, normalisation: tuple[str, ...]
) -> Reasoned[tuple[dict[str, float], ...]]:
    """Window, mean and SD of the ``ct`` channels, from clean labels where there are any."""
    if "ct" not in normalisation:
        return (), "z-scores need none."
    result: list[dict[str, float]] = []
    sources: list[str] = []
    for channel, kind in enumerate(normalisation):
        if kind != "ct":
            result.append({})
            continue
        parts = [part for case in facts.cases if case.foreground and (part := case.foreground[channel])]
        sources.append(LABELLED if parts else CONTENT)
        parts = parts or [part for case in facts.cases if (part := case.content[channel])]
        if not parts:
            raise UserError(
                f"plan.normalisation: channel {channel} is constant in every scan, expected an image"
            )
        mean = float(np.mean([part.mean for part in parts]))
        # Within and between scans: the variance of all voxels, each scan counting the same.
        variance = np.mean([part.std**2 + (part.mean - mean) ** 2 for part in parts])
        result.append(
            {
                "lower": float(np.median([part.low for part in parts])),
                "upper": float(np.median([part.high for part in parts])),
                "mean": mean,
                "std": float(max(math.sqrt(variance), 1e-6)),
            }
        )
    return tuple(result), f"Percentiles 0.5 and 99.5, mean and SD {'; '.join(dict.fromkeys(sources))}."


def require_holdable(
    sizes: npt.NDArray[np.float64],
    spacings: npt.NDArray[np.float64],
    target: tuple[float, ...],
    channels: int,
    memory_bytes: int,
) -> None:
    """Refuse a spacing that no memory holds a scan at; (cases, axes) arguments.

    Raises:
        UserError: The largest prepared scan alone, in float32, is more than all memory, and more than the scan was.
    """
    wanted = np.where(np.asarray(target) == 0, spacings, target)
    prepared = np.maximum(sizes * spacings / wanted, 1)
    voxels = prepared.prod(axis=1)
    largest = int(voxels.argmax())
    if 4 * channels * voxels[largest] > memory_bytes and voxels[largest] > sizes[largest].prod():
        raise UserError(
            f"plan.spacing: found {shown(target)} mm, at which a scan has {shown(prepared[largest].tolist())} voxels "
            f"and takes {4 * channels * voxels[largest] / 2**30:.3g} GiB, expected at most "
            f"{memory_bytes / 2**30:.3g} GiB (such as {shown(np.median(spacings, axis=0).tolist())})"
        )


def decide_flip_axes(facts: Fingerprint) -> Reasoned[tuple[int, ...]]:
    """None in 3D; in 2D those along which the clean labels show no pose."""
    if facts.scan_ndim == 3:
        return (), "A flip would exchange left and right organs; set axes if yours are symmetric."
    posed = facts.posed_axes()
    free = tuple(axis for axis in (0, 1) if axis not in posed)
    if not posed:
        return free, "2D images carry no left or right, and the clean labels show none; set [] if yours do."
    return free, f"Structures lie alike in all clean labels along axis {shown(posed)} of the images (y, x)."


def decide_largest_component(facts: Fingerprint, values: tuple[int, ...]) -> Reasoned[tuple[int, ...]]:
    """The values of structures that are in one piece in all clean labels."""
    single = tuple(value for value in facts.in_one_piece() if value in values)
    if not single:
        return (
            (),
            f"No structure has {ONE_PIECE:.0%} of its voxels in one piece in each of 3 clean labels or more: masks "
            "keep all.",
        )
    names = ", ".join(map(str, single))
    return single, (
        f"One piece holds {ONE_PIECE:.0%} or more in every clean label: {names}. Masks keep their largest component; "
        "set [] to keep all."
    )
