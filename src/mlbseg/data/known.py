"""Labels as people have them: which voxels of a label tell their class, in one place.

Wherever a label is read to be learnt from or to be scored against, `read_known` reads it: a voxel that does not tell
its class has the value `NOT_KNOWN`. What "not known" comes from, `Known` says.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlbseg.data.geometry import RESAMPLE, Part, onto
from mlbseg.data.readers import read_label
from mlbseg.types import NOT_KNOWN, Case, Geometry, Known

LabelMap = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Slices:
    """On how many slices of a label something is drawn, along the axis that it seems to be drawn along.

    Attributes:
        axis: In array order.
        drawn: Slices with a drawn voxel.
        total: Slices along the axis.
        apart: Whether every drawn slice lies between slices without any: then some slices were drawn, or what is
            drawn is a single slice thick.
    """

    axis: int
    drawn: int
    total: int
    apart: bool


def slices_of(label: npt.NDArray[np.integer[Any]]) -> Slices | None:
    """Say on which slices of a volume (z, y, x) something is drawn; None of a picture, and of an empty label.

    The axis is the one with the most gaps between drawn slices; of equals, the one with the smaller share of drawn
    slices.
    """
    if label.ndim != 3 or not label.any():
        return None
    found = []
    for axis in range(3):
        drawn = _drawn(label, axis)
        # Runs of drawn slices begin where one follows a slice without any.
        runs = int(np.count_nonzero(np.diff(np.r_[0, drawn.astype(int)]) == 1))
        found.append((runs, -float(drawn.mean()), axis, int(drawn.sum())))
    runs, _, axis, count = max(found)
    return Slices(axis, count, label.shape[axis], runs == count)


def looks_sparse(slices: Slices | None) -> bool:
    """Say whether a label looks as if some slices had been drawn and the others had not been looked at."""
    return slices is not None and slices.apart and (slices.drawn > 1 or slices.total >= 8)


def mark_unknown(label: LabelMap, known: Known) -> LabelMap:
    """Return a label with `NOT_KNOWN` where a voxel does not tell its class; the array itself if all do.

    Args:
        label: (*S) values as in the file.
        known: What is known of it.
    """
    unknown: npt.NDArray[np.bool_] | None = None
    if known.ignore is not None:
        unknown = label == known.ignore
    if known.every is not None and label.ndim == 3:
        kept = np.arange(len(label)) % known.every == known.every // 2
        hides = ~(kept & _drawn(label, 0)).reshape(-1, 1, 1)
        unknown = np.broadcast_to(hides, label.shape) if unknown is None else unknown | hides
    if known.sparse:
        marked = label if unknown is None else np.where(unknown, 0, label)
        if (slices := slices_of(marked)) is not None:
            shape = [1] * label.ndim
            shape[slices.axis] = -1
            empty = ~_drawn(marked, slices.axis).reshape(shape)
            unknown = np.broadcast_to(empty, label.shape) if unknown is None else unknown | empty
    return label if unknown is None else np.where(unknown, NOT_KNOWN, label).astype(np.int32)


def read_known(path: Path, known: Known) -> tuple[LabelMap, Geometry]:
    """Read a label on its own lattice; see `mlbseg.data.readers.read_label`.

    Returns:
        The values (*S), `NOT_KNOWN` where a voxel does not tell its class, and the geometry.

    Raises:
        ReadError: As `read_label`.
    """
    label, geometry = read_label(path)
    return mark_unknown(label, known), geometry


def placed(
    label: LabelMap,
    geometry: Geometry,
    lattice: Geometry,
    known: Known,
    *,
    where: str,
    whose: str,
    remedy: str = "",
    case_id: str | None = None,
) -> LabelMap:
    """Bring a label that `read_known` has read onto its scan's lattice; see `onto`.

    Raises:
        ReadError: If it lies elsewhere.
    """
    outside = NOT_KNOWN if known.cropped else 0
    return onto(
        label, geometry, lattice, where=where, whose=whose, remedy=remedy, case_id=case_id, outside=outside
    )


def label_on(case: Case, lattice: Geometry, *, whose: str = "its image", remedy: str = RESAMPLE) -> LabelMap:
    """Return the label of a case on its scan's lattice, `NOT_KNOWN` where a voxel does not tell its class.

    Raises:
        ReadError: If the label cannot be read, or lies elsewhere.
        ValueError: If the case has none.
    """
    if case.label is None:
        raise ValueError(f"{case.id} has no label")
    label, geometry = read_known(case.label, case.known)
    return placed(
        label,
        geometry,
        lattice,
        case.known,
        where=str(case.label),
        whose=whose,
        remedy=remedy,
        case_id=case.id,
    )


def count_unknown(values: dict[int, int], slices: Slices | None, known: Known) -> int:
    """Return how many voxels of a label do not tell their class, from what is remembered of it (`LabelFacts`).

    What lies outside a cropped segmentation is not counted, and what `Known.every` hides about.

    Args:
        values: Voxels of each value in the file.
        slices: Of the file.
        known: What is known of the label.
    """
    unknown = values.get(known.ignore, 0) if known.ignore is not None else 0
    if known.every is not None and slices is not None:
        return sum(values.values()) * (known.every - 1) // known.every
    if known.sparse and slices is not None and not unknown:
        unknown = sum(values.values()) * (slices.total - slices.drawn) // slices.total
    return unknown


def leaves_classes(drawn: Collection[int] | None, values: Collection[int]) -> bool:
    """Say whether some classes were not drawn in a case.

    Args:
        drawn: The label values that were; None: all.
        values: Those of all classes.
    """
    return drawn is not None and not {*drawn, 0}.issuperset(values)


def hidden(known: Known, values: Sequence[int]) -> tuple[int, ...]:
    """Return the indices of the classes that may hide in the background of a label.

    Args:
        known: What is known of the label.
        values: The value of each class; the first is the background's.
    """
    if known.classes is None:
        return ()
    return tuple(index for index, value in enumerate(values) if index and value not in known.classes)


def is_part(geometry: Geometry) -> bool:
    """Say whether a label covers a part of its image alone."""
    return isinstance(geometry, Part)


def _drawn(label: npt.NDArray[np.integer[Any]], axis: int) -> npt.NDArray[np.bool_]:
    return np.asarray(label.any(axis=tuple(a for a in range(label.ndim) if a != axis)))
