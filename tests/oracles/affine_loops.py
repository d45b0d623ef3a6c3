"""Slow, plain references for views: one pixel at a time, with the coordinates' definition written out."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

TOLERANCE = 1e-5  # of the edge at ±1, where a pixel centre of the identity must not be lost by rounding


def inverse(matrix: Array) -> Array:
    """Return the inverse of an affine map (n, n + 1), through homogeneous coordinates."""
    n = len(matrix)
    return np.linalg.inv(np.vstack([matrix, np.eye(n + 1)[-1]]))[:n]


def source(matrix: Array, index: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """Return where a pixel's centre comes from, in normalised coordinates, in array order.

    The first pixel's centre lies half a pixel from -1, the last one's half a pixel from 1.
    """
    place = [(2 * i + 1) / n - 1 for i, n in zip(index, shape, strict=True)]
    return (matrix[:, :-1] @ place[::-1] + matrix[:, -1])[::-1]


def is_inside(matrix: Array, index: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return bool(np.all(np.abs(source(matrix, index, shape)) <= 1 + TOLERANCE))


def inside(matrix: Array, shape: tuple[int, ...]) -> Array:
    """Return 1 where a pixel's source lies inside the image, else 0: (*S)."""
    return np.array([is_inside(matrix, i, shape) for i in np.ndindex(shape)], float).reshape(shape)


def linear(image: Array, matrix: Array) -> Array:
    """Sample (C, *S) through a map with linear interpolation; the border repeats outside."""
    shape = image.shape[1:]
    result = np.zeros_like(image)
    for index in np.ndindex(shape):
        place = _pixels(matrix, index, shape)
        low = np.floor(place).astype(int)
        for corner in itertools.product((0, 1), repeat=len(shape)):
            share = np.prod([f if c else 1 - f for c, f in zip(corner, place - low, strict=True)])
            at = tuple(min(int(i) + c, n - 1) for i, c, n in zip(low, corner, shape, strict=True))
            result[(slice(None), *index)] += share * image[(slice(None), *at)]
    return result


def nearest(label: npt.NDArray[np.int64], matrix: Array, outside: int) -> npt.NDArray[np.int64]:
    """Sample (*S) through a map, the nearest pixel's value; `outside` where the source lies off the image."""
    result = np.full_like(label, outside)
    for index in np.ndindex(label.shape):
        if is_inside(matrix, index, label.shape):
            place = _pixels(matrix, index, label.shape)
            result[index] = label[tuple(round(p) for p in place)]
    return result


def pseudo_label(predictions: Array, matrices: Array) -> npt.NDArray[np.int64]:
    """Return the class of the mean over the views that saw each pixel.

    Args:
        predictions: (V, K, *S) class probabilities of the views of one image.
        matrices: (V, n, n + 1) from view to image.
    """
    backs = [inverse(m) for m in matrices]
    shape = predictions.shape[2:]
    aligned = [linear(p, back) for p, back in zip(predictions, backs, strict=True)]
    result = np.zeros(shape, np.int64)
    for index in np.ndindex(shape):
        at = (slice(None), *index)
        seen = [a[at] for a, back in zip(aligned, backs, strict=True) if is_inside(back, index, shape)]
        result[index] = np.mean(seen, axis=0).argmax()
    return result


def _pixels(matrix: Array, index: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    sides = np.array(shape)
    return np.clip((source(matrix, index, shape) + 1) * sides / 2 - 0.5, 0, sides - 1)
