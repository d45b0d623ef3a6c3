"""Errors planted into correct labels, so that what finds errors can be measured: the mistakes that people make."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Label = npt.NDArray[np.int32]

TRIES = 20  # draws of an error before a label counts as too small for it
CHANGED = 0.05  # share of the structures' voxels that must differ, or nobody could call it an error


def plant_error(
    label: Label,
    kind: str,
    rng: np.random.Generator,
    *,
    spacing: tuple[float, ...],
    other: Label | None = None,
) -> Label:
    """Return a label with one error in it.

    Args:
        label: (*S) class values, 0 background.
        kind: A name in `KINDS`, or in `HABITS` for an error that goes one way in all cases. ``missing`` cuts a quarter
            to a half of a structure off by a plane; ``leak`` adds at its border a ball of a quarter to a half of
            its volume; ``shift`` moves the label by about a tenth of the structures' extent along each axis;
            ``swapped`` exchanges two classes; ``wrong-scan`` takes another scan's label, moved to where this one's
            lies. ``thin`` leaves out the outermost voxels of all structures together; ``short`` stops early on the
            first axis: the last slices, with up to a quarter of the voxels.
        rng: Decides all that is random.
        spacing: mm along each axis of the array.
        other: (*S') the other scan's label, for ``wrong-scan``.

    Returns:
        (*S) class values; it differs from `label` by at least 5 % of the structures' volume.

    Raises:
        ValueError: for an unknown kind, an empty label, one class to swap, no other scan, or a label that is too
            small for such an error.
    """
    known = {**KINDS, **HABITS}
    if kind not in known:
        raise ValueError(f"unknown kind of error {kind!r}: use one of {', '.join(known)}")
    if not label.any():
        raise ValueError("an empty label has no structure to make an error in")
    for _ in range(TRIES):
        changed = known[kind](label, rng, np.asarray(spacing, float), other)
        if (changed != label).sum() >= CHANGED * (label > 0).sum():
            return changed
    raise ValueError(f"the label is too small for an error of the kind {kind!r}")


def kinds_for(label: Label) -> list[str]:
    """Return the kinds of error that a label can be given: with one class there is nothing to swap."""
    several = len(np.unique(label[label > 0])) > 1
    return [kind for kind in KINDS if kind != "swapped" or several]


def _missing(label: Label, rng: np.random.Generator, spacing: npt.NDArray[np.float64], _: object) -> Label:
    value = _some_class(label, rng)
    voxels = np.argwhere(label == value)
    height = (voxels * spacing) @ _unit(rng, label.ndim)
    gone = voxels[height > np.quantile(height, 1 - rng.uniform(0.25, 0.5))]
    changed = label.copy()
    changed[tuple(gone.T)] = 0
    return changed


def _leak(label: Label, rng: np.random.Generator, spacing: npt.NDArray[np.float64], _: object) -> Label:
    value = _some_class(label, rng)
    part = label == value
    border = np.argwhere(part & ~ndimage.binary_erosion(part))
    centre = border[rng.integers(len(border))]
    outside = np.argwhere(label == 0)
    distance = np.linalg.norm((outside - centre) * spacing, axis=1)
    count = min(int(rng.uniform(0.25, 0.5) * part.sum()), len(outside))
    changed = label.copy()
    changed[tuple(outside[np.argsort(distance, kind="stable")[:count]].T)] = value
    return changed


def _shift(label: Label, rng: np.random.Generator, spacing: npt.NDArray[np.float64], _: object) -> Label:
    extent = np.ptp(np.argwhere(label), axis=0) + 1
    share = rng.uniform(0.1, 0.25, label.ndim) / np.sqrt(label.ndim)
    return _moved(label, np.rint(share * extent * rng.choice([-1, 1], label.ndim)).astype(int), label.shape)


def _swapped(label: Label, rng: np.random.Generator, spacing: object, _: object) -> Label:
    values = np.unique(label[label > 0])
    if len(values) < 2:
        raise ValueError("a label with one class has no two to swap")
    a, b = rng.choice(values, 2, replace=False)
    return np.where(label == a, b, np.where(label == b, a, label)).astype(label.dtype)


def _wrong_scan(label: Label, rng: object, spacing: object, other: Label | None) -> Label:
    if other is None or not other.any():
        raise ValueError("expected another scan's label, with a structure in it")
    here, there = (np.argwhere(array).mean(0) for array in (label, other))
    return _moved(other, np.rint(here - there).astype(int), label.shape)


def _thin(label: Label, rng: object, spacing: object, _: object) -> Label:
    return np.where(ndimage.binary_erosion(label > 0), label, 0).astype(label.dtype)


def _short(label: Label, rng: object, spacing: object, _: object) -> Label:
    slices = np.nonzero(label)[0]  # of each voxel of a structure
    changed = label.copy()
    changed[max(int(np.quantile(slices, 0.75)), slices.min()) + 1 :] = 0
    return changed


_Kind = Callable[[Label, np.random.Generator, npt.NDArray[np.float64], Label | None], Label]

KINDS: dict[str, _Kind] = {
    "missing": _missing,
    "leak": _leak,
    "shift": _shift,
    "swapped": _swapped,
    "wrong-scan": _wrong_scan,
}
"""Errors that differ from case to case."""

HABITS: dict[str, _Kind] = {"thin": _thin, "short": _short}
"""Errors that are the same in each case, as those of one annotator."""


def _some_class(label: Label, rng: np.random.Generator) -> int:
    return int(rng.choice(np.unique(label[label > 0])))


def _unit(rng: np.random.Generator, ndim: int) -> npt.NDArray[np.float64]:
    direction = rng.normal(size=ndim)
    return np.asarray(direction / np.linalg.norm(direction))


def _moved(label: Label, offset: npt.NDArray[np.int_], shape: tuple[int, ...]) -> Label:
    """Return a label moved by so many voxels into an array of `shape`; what leaves it is lost."""
    voxels = np.argwhere(label)
    values = label[tuple(voxels.T)]
    places = voxels + offset
    inside = ((places >= 0) & (places < shape)).all(1)
    moved = np.zeros(shape, label.dtype)
    moved[tuple(places[inside].T)] = values[inside]
    return moved
