"""From evidence to trust: how far each voxel's label is to be believed, each case's, and each class's."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Map = npt.NDArray[np.float32]
Classes = npt.NDArray[np.integer]

METHODS = {
    "disagreement": "the probability of the label, averaged over networks and views",
    "confident": "confident learning: probabilities relative to the mean of their class's labelled voxels",
    "alignment": "the alignment of the label's cost with the gradient on the careful labels",
    "both": "the probability of the label, moved by its alignment",
}
"""How voxels are judged, and what each way goes by."""


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
        own = of_label(probability, label)
        sums += np.bincount(label.ravel(), own.ravel(), num_classes)
        counts += np.bincount(label.ravel(), minlength=num_classes)
    return np.where(counts > 0, sums / np.maximum(counts, 1), 1.0)


def disagreement_trust(probability: Map, label: Classes) -> Map:
    """Return p(label) / (p(label) + the largest p of another class): below 1/2 where another class is likelier."""
    own = of_label(probability, label)
    others = probability.copy()
    np.put_along_axis(others, label[None].astype(np.int64), 0, 0)
    rival = others.max(0)
    return (own / np.maximum(own + rival, 1e-12)).astype(np.float32)


def confident_trust(probability: Map, label: Classes, thresholds: npt.NDArray[np.float64]) -> Map:
    """Return `disagreement_trust` of p_k / t_k: below 1/2 where another class is likelier than is usual for it."""
    relative = probability / thresholds.astype(np.float32).reshape(-1, *(1,) * label.ndim).clip(1e-6)
    return disagreement_trust(relative, label)


def alignment_trust(alignment: Map, scale: float) -> Map:
    """Return 1 / (1 + exp(-g / scale)): below 1/2 where following the label would raise the careful labels' loss."""
    return (1 / (1 + np.exp(-np.clip(alignment / max(scale, 1e-30), -50, 50)))).astype(np.float32)
