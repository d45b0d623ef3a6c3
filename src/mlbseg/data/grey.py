"""Grey where classes should be: what interpolation and JPEG leave of a mask.

Both make many values that stand for nothing. They have few voxels each and no inside, as they lie at the edge between
two structures. Structures may be small, thin or many; what they are not is scattered along other structures' edges.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

# scipy takes half a second to import, and few labels make it necessary: it is imported where it is used.
from mlbseg.errors import Fault

_FEWEST = 4  # values without an inside; fewer may well be lesions
_INSIDE = 0.01  # share of a value's voxels that are surrounded by their like, below which it has no inside
_BETWEEN = (
    0.4  # share of their voxels that touch a lower and a higher value: noise at JPEG's edges is 0.54 and more
)
_SPECK = (
    3.0  # voxels that hang together, on average: scattered greys are 1 to 3, parcels of an atlas 7 and more
)
_SHELL = 0.95  # as `_BETWEEN`, of greys that form shells around a structure: few levels, rounded
_RANGE = 1 << 16
_SPREAD = (
    0.2  # of the box around all greys, the share that half of the values reach across: parcels stay below 0.1
)


@dataclass(frozen=True)
class Greys:
    """The values of a label that lie at edges only.

    Attributes:
        edge: These values, ascending.
        voxels: How many voxels hold them.
        inside: The other values, ascending.
    """

    edge: tuple[int, ...]
    voxels: int
    inside: tuple[int, ...]


def find_greys(label: npt.NDArray[np.int32], stated: Collection[int] = ()) -> Greys | None:
    """Return the values that interpolation or compression has made, or None: then all may be structures.

    Args:
        label: (*S).
        stated: Values that are known to be meant; where no other occurs there are no greys.
    """
    values, counts = value_counts(label)
    if len(values) <= _FEWEST or set(values.tolist()) <= {0, *stated}:
        return None
    index = _ranks(label, values)
    low, high = _over_neighbours(index, np.minimum), _over_neighbours(index, np.maximum)
    surrounded = np.bincount(index[low == high], minlength=len(values))
    edge = surrounded <= _INSIDE * counts
    if edge.sum() < max(_FEWEST, len(values) - edge.sum() + 1):
        return None
    at_edge = edge[index]
    between = float(np.mean(((low < index) & (index < high))[at_edge]))
    specks = between >= _BETWEEN and _mean_component(index, at_edge) <= _SPECK
    if not (specks or (between >= _SHELL and _spread(index, edge) >= _SPREAD)):
        return None
    return Greys(tuple(values[edge].tolist()), int(counts[edge].sum()), tuple(values[~edge].tolist()))


def value_counts(label: npt.NDArray[np.int32]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the values of a label, ascending, and how many voxels hold each."""
    least, most = int(label.min(initial=0)), int(label.max(initial=0))
    if most - least >= _RANGE:
        return np.unique(label, return_counts=True)
    counts = np.bincount((label - least).ravel())  # much faster than sorting
    held = np.flatnonzero(counts)
    return held + least, counts[held]


def grey_fault(
    where: str, greys: Greys, stating: str = "; if all are meant, state them with --labels"
) -> Fault:
    """Return the fault of a label that holds greys.

    Args:
        where: The file.
        greys: What it holds.
        stating: How the user can say that they are meant.
    """
    values = len(greys.edge) + len(greys.inside)
    found = (
        f"{values} label values, {len(greys.edge)} of which ({_first(greys.edge)}) lie only at the edges of others "
        f"({greys.voxels} voxels in all)"
    )
    expected = f"values of structures only, here {_first(greys.inside)}" if greys.inside else "a mask"
    remedy = (
        "resizing with interpolation and JPEG make such edges: resize the mask with nearest neighbour and save it "
        f"without loss{stating}"
    )
    return Fault(where, found, expected, remedy, kind="grey")


def _first(values: tuple[int, ...], most: int = 3) -> str:
    return ", ".join(map(str, values[:most])) + (", ..." if len(values) > most else "")


def _ranks(label: npt.NDArray[np.int32], values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the place of each voxel's value among `values`, which are all that occur, ascending."""
    least, kind = int(values[0]), np.min_scalar_type(len(values))
    if values[-1] - least >= _RANGE:
        return np.searchsorted(values, label).astype(kind)
    table = np.zeros(int(values[-1]) - least + 1, kind)
    table[values - least] = np.arange(len(values))
    return table[label - least]


def _over_neighbours(index: npt.NDArray[Any], which: np.ufunc) -> npt.NDArray[Any]:
    """Return the least or the largest of each voxel and those around it, corners included."""
    for axis, length in enumerate(index.shape):
        padded = np.moveaxis(
            np.pad(index, [(int(a == axis),) * 2 for a in range(index.ndim)], mode="edge"), axis, 0
        )
        before, here, after = (padded[start : start + length] for start in range(3))
        index = np.moveaxis(which(which(before, here), after), 0, axis)
    return index


def _mean_component(index: npt.NDArray[Any], among: npt.NDArray[np.bool_]) -> float:
    """Return how many of the voxels `among` hang together with one value, on average (corners count as touching)."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    count = int(among.sum())
    number = np.full(index.shape, -1)
    number[among] = np.arange(count)
    pairs = []
    for step in itertools.product((-1, 0, 1), repeat=index.ndim):
        if step <= (0,) * index.ndim:
            continue  # each pair once
        here = tuple(slice(max(0, -s), n - max(0, s)) for s, n in zip(step, index.shape, strict=True))
        there = tuple(slice(max(0, s), n - max(0, -s)) for s, n in zip(step, index.shape, strict=True))
        alike = among[here] & (index[here] == index[there])
        pairs.append(np.stack([number[here][alike], number[there][alike]]))
    first, second = np.concatenate(pairs, axis=1)
    graph = coo_matrix((np.ones(len(first), bool), (first, second)), (count, count))
    return count / int(connected_components(graph, directed=False)[0])


def _spread(index: npt.NDArray[Any], edge: npt.NDArray[np.bool_]) -> float:
    """Return the median, over the values at edges, of the share that a value's box takes of the box of all of them."""
    from scipy import ndimage

    ordinal = np.where(edge, np.cumsum(edge), 0)[index]
    (whole,) = ndimage.find_objects((ordinal > 0).astype(np.int8))
    boxes = [box for box in ndimage.find_objects(ordinal) if box is not None]
    return float(np.median([_size(box) for box in boxes])) / _size(whole)


def _size(box: tuple[slice, ...]) -> int:
    return int(np.prod([side.stop - side.start for side in box]))
