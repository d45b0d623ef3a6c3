"""Dice, Jaccard, 95% Hausdorff distance and average symmetric surface distance, as the literature has them.

The definitions are MedPy's (`medpy.metric.binary` 0.5: `dc`, `jc`, `hd95`, `assd`), which published tables
rest on. A mask's surface is what an erosion by the face-connected cross removes, voxels on the image's edge
included. Distances run from each surface voxel to the nearest surface voxel of the other mask, and both
directions are pooled: 95HD is the pool's 95th percentile, ASSD its mean (MedPy 0.4 and older averaged the two
directions' means instead).

Rule for empty masks. Both empty: Dice and Jaccard are 1, distances are 0. One empty: Dice and Jaccard are 0
and the distances are missing (None), which a summary counts and never replaces by a number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
import numpy.typing as npt
from scipy.ndimage import binary_erosion, distance_transform_edt, generate_binary_structure

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Scores:
    """How well one mask agrees with its reference; a distance is None where one of the two is empty.

    Attributes:
        dice: 2 |A ∩ B| / (|A| + |B|).
        jaccard: |A ∩ B| / |A ∪ B|.
        hd95_mm: 95th percentile of the surface distances, mm.
        assd_mm: Average symmetric surface distance, mm.
        hd95_voxels: The same in voxels, every axis counted as 1.
        assd_voxels: The same in voxels.
    """

    dice: float
    jaccard: float
    hd95_mm: float | None
    assd_mm: float | None
    hd95_voxels: float | None
    assd_voxels: float | None

    def as_dict(self) -> dict[str, float | None]:
        """Return the scores by name."""
        return asdict(self)


SCORE_NAMES = tuple(field.name for field in fields(Scores))


@dataclass(frozen=True)
class Summary:
    """One score over many masks.

    Attributes:
        mean: Mean of the values there are; None if there is none.
        sd: Sample standard deviation (divisor n - 1); None below two values.
        count: Number of values that mean and SD are of.
        missing: Number of masks for which the score is missing.
    """

    mean: float | None
    sd: float | None
    count: int
    missing: int


def dice(prediction: npt.ArrayLike, reference: npt.ArrayLike) -> float:
    """Return the Dice overlap of two boolean masks (*S); 1 if both are empty.

    Raises:
        ValueError: If the shapes differ.
    """
    a, b = _pair(prediction, reference)
    return _dice(int(np.count_nonzero(a & b)), int(np.count_nonzero(a)) + int(np.count_nonzero(b)))


def score(prediction: npt.ArrayLike, reference: npt.ArrayLike, spacing: Sequence[float]) -> Scores:
    """Score one predicted mask.

    Args:
        prediction: (*S), non-zero is inside.
        reference: (*S), non-zero is inside.
        spacing: mm between voxels along each axis, in array order.

    Raises:
        ValueError: If the shapes differ, or `spacing` is not one positive number per axis.
    """
    a, b = _pair(prediction, reference)
    if len(spacing) != a.ndim or not all(np.isfinite(s) and s > 0 for s in spacing):
        raise ValueError(f"spacing is {tuple(spacing)}, expected {a.ndim} positive numbers (mm, array order)")
    box = _joint_box(a, b)
    a, b = a[box], b[box]
    common, total = int(np.count_nonzero(a & b)), int(np.count_nonzero(a)) + int(np.count_nonzero(b))
    jaccard = common / (total - common) if total else 1.0
    mm = _surface_distances(a, b, spacing)
    voxels = mm if all(s == 1 for s in spacing) else _surface_distances(a, b, (1.0,) * a.ndim)
    return Scores(_dice(common, total), jaccard, *mm, *voxels)


def score_classes(
    prediction: npt.NDArray[np.integer],
    reference: npt.NDArray[np.integer],
    spacing: Sequence[float],
    classes: Sequence[int],
) -> dict[int, Scores]:
    """Score each class of two label maps (*S) against the rest; see `score`."""
    return {c: score(prediction == c, reference == c, spacing) for c in classes}


def summarise(rows: Iterable[Mapping[int, Scores]]) -> dict[int | None, dict[str, Summary]]:
    """Summarise the cases' scores, each score by itself.

    Args:
        rows: One mapping of class to scores per case, as `score_classes` returns it.

    Returns:
        For each class, and for all under the key None, the summary of each score by name. The figure over all
        classes is taken over the cases' means over their classes, so that its SD is between cases; a case
        with a missing value in any class is missing there.
    """
    cases = [dict(row) for row in rows]
    classes = sorted({c for case in cases for c in case})
    summary: dict[int | None, dict[str, Summary]] = {}
    for c in classes:
        summary[c] = {
            n: summarise_values(getattr(case[c], n) for case in cases if c in case) for n in SCORE_NAMES
        }
    summary[None] = {n: summarise_values(_class_mean(case, n) for case in cases if case) for n in SCORE_NAMES}
    return summary


def summarise_values(values: Iterable[float | None]) -> Summary:
    """Return mean, SD and count of the values that are there, and the number of those that are missing."""
    every = list(values)
    there = [v for v in every if v is not None]
    return Summary(
        mean=float(np.mean(there)) if there else None,
        sd=float(np.std(there, ddof=1)) if len(there) > 1 else None,
        count=len(there),
        missing=len(every) - len(there),
    )


def _class_mean(case: Mapping[int, Scores], name: str) -> float | None:
    values = [getattr(scores, name) for scores in case.values()]
    return None if None in values else float(np.mean(values))


def _pair(prediction: npt.ArrayLike, reference: npt.ArrayLike) -> tuple[Mask, Mask]:
    a, b = np.asarray(prediction).astype(bool, copy=False), np.asarray(reference).astype(bool, copy=False)
    if a.shape != b.shape:
        raise ValueError(f"prediction is {a.shape} but reference {b.shape}, expected equal shapes")
    return a, b


def _dice(common: int, total: int) -> float:
    return 2 * common / total if total else 1.0


def _joint_box(a: Mask, b: Mask) -> tuple[slice, ...]:
    """Return the box around both masks.

    What lies outside changes nothing: distances are between voxels of the masks, and the erosion takes the
    outside of an array for background, so no margin is needed.
    """
    either = a | b
    box = []
    for axis in range(either.ndim):
        filled = np.flatnonzero(either.any(axis=tuple(i for i in range(either.ndim) if i != axis)))
        box.append(slice(filled[0], filled[-1] + 1) if filled.size else slice(0, 0))
    return tuple(box)


def _surface_distances(a: Mask, b: Mask, spacing: Sequence[float]) -> tuple[float | None, float | None]:
    """Return (95HD, ASSD) in the unit of `spacing`."""
    if not a.any() or not b.any():
        missing = None if a.any() or b.any() else 0.0
        return missing, missing
    cross = generate_binary_structure(a.ndim, 1)
    surface_a, surface_b = a & ~binary_erosion(a, cross), b & ~binary_erosion(b, cross)
    from_a = distance_transform_edt(~surface_b, sampling=spacing)[surface_a]
    from_b = distance_transform_edt(~surface_a, sampling=spacing)[surface_b]
    pool = np.concatenate([from_a, from_b])
    return float(np.percentile(pool, 95)), float(pool.mean())
