"""How far each voxel's label is to be believed: the ways that an audit judges by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter

Map = npt.NDArray[np.float32]
Classes = npt.NDArray[np.integer]

SMOOTHING = 1.0
"""SD, in voxels of the prepared grid, of the Gaussian by which ``regional`` averages trust."""


@dataclass(frozen=True)
class Way:
    """A way of judging.

    Attributes:
        about: What it goes by, for readers.
        ensemble: Whether the students of the run's checkpoints judge beside its model, each in several views.
        aligned: Whether the derivative along the clean gradient is asked for.
        relative: Whether it needs a first look at all labels.
    """

    about: str
    ensemble: bool = False
    aligned: bool = False
    relative: bool = False


WAYS = {
    "regional": Way(
        "the label's probability against the likeliest other class, averaged over neighbouring voxels"
    ),
    "disagreement": Way("the label's probability against the likeliest other class"),
    "confident": Way(
        "the label's probability against the likeliest other class, each relative to what is usual for it "
        "(confident learning)",
        relative=True,
    ),
    "alignment": Way(
        "the alignment of the label's cost with the gradient on the careful labels, averaged over networks and views",
        ensemble=True,
        aligned=True,
        relative=True,
    ),
}
"""The ways by name, the default first. docs/audit.md says how they compare."""


def of_label(probability: Map, label: Classes) -> Map:
    """Return p(label) of every voxel: (K, *S), (*S) → (*S)."""
    return np.take_along_axis(probability, label[None].astype(np.int64), 0)[0]


def class_thresholds(pairs: Iterable[tuple[Map, Classes]], num_classes: int) -> npt.NDArray[np.float64]:
    """Return t (K,): the mean p_k over all voxels that are labelled k; 1 for a class that is nowhere labelled.

    Source: Northcutt et al., Confident Learning (JAIR 2021), eq. 2.

    Args:
        pairs: Probabilities (K, *S) and label (*S) of each scan.
        num_classes: K.
    """
    sums, counts = np.zeros(num_classes), np.zeros(num_classes)
    for probability, label in pairs:
        sums += np.bincount(label.ravel(), of_label(probability, label).ravel(), num_classes)
        counts += np.bincount(label.ravel(), minlength=num_classes)
    return np.where(counts > 0, sums / np.maximum(counts, 1), 1.0)


def disagreement_trust(probability: Map, label: Classes) -> Map:
    """Return p(label) / (p(label) + the largest p of another class): below 1/2 where another class is likelier."""
    own = of_label(probability, label)
    others = probability.copy()
    np.put_along_axis(others, label[None].astype(np.int64), 0, 0)
    return (own / np.maximum(own + others.max(0), 1e-12)).astype(np.float32)


def regional_trust(probability: Map, label: Classes) -> Map:
    """Return `disagreement_trust`, averaged over neighbours: people err by regions, networks waver at borders."""
    return np.asarray(gaussian_filter(disagreement_trust(probability, label), SMOOTHING), np.float32)


def confident_trust(probability: Map, label: Classes, thresholds: npt.NDArray[np.float64]) -> Map:
    """Return `disagreement_trust` of p_k / t_k: below 1/2 where another class is likelier than is usual for it."""
    relative = probability / thresholds.astype(np.float32).clip(1e-6).reshape(-1, *(1,) * label.ndim)
    return disagreement_trust(relative, label)


def alignment_trust(alignment: Map, scale: float) -> Map:
    """Return 1 / (1 + exp(-g / scale)): below 1/2 where following the label would raise the careful labels' loss."""
    return (1 / (1 + np.exp(-np.clip(alignment / max(scale, 1e-30), -50, 50)))).astype(np.float32)
