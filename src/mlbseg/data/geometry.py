"""Do two files lie at the same place? Bringing one onto the other, and the words for where they lie."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from mlbseg.data.placement import Placement
from mlbseg.errors import Fault, ReadError
from mlbseg.types import Geometry

Number = TypeVar("Number", bound=np.generic)

SPACING_TOLERANCE = 1e-3  # relative
ORIGIN_TOLERANCE = 0.01  # mm, plus the same share of a voxel
DIRECTION_TOLERANCE = 1e-3  # of a direction cosine

_ROUNDED = 1e-6  # what single precision does to cosines

RESAMPLE = "resample it onto the image"
"""What a user can do about a label that lies elsewhere."""

HALF = 0.5
"""Voxels by which straightening may move the voxel that it moves most."""


class Incomplete(Geometry):
    """The geometry of a label whose file does not say all of it: the rest is its image's, or its mask's."""


class Unscaled(Incomplete):
    """The geometry of a label whose file does not say how far apart its voxels are: it fits an image of any spacing."""


class Part(Incomplete):
    """The geometry of a label that may cover a part of its image alone (3D Slicer's); `onto` fills the rest."""


def orthogonalised(
    size: Sequence[int],
    steps: npt.NDArray[np.float64],
    origin: npt.ArrayLike,
    spacing: npt.ArrayLike | None = None,
) -> tuple[Geometry, float]:
    """Return the lattice at right angles that is nearest to one whose axes are skewed or rounded.

    Args:
        size: Voxels along each axis, (x, y[, z]).
        steps: (n, n): column k leads from a voxel to the next one along axis k, mm, LPS.
        origin: Of the first voxel, mm, LPS.
        spacing: mm along each axis; the steps' lengths when None.

    Returns:
        The lattice, with the same middle and spacing; and by how much it moves the voxel that it moves most, in
        voxels: above `HALF` it is another place. Infinity if the steps span no volume or are not numbers.
    """
    n = len(size)
    spacing = np.linalg.norm(steps, axis=0) if spacing is None else np.asarray(spacing, float)
    unmoved = Geometry(
        tuple(size),
        tuple(spacing.tolist()),
        tuple(np.asarray(origin).tolist()),
        tuple(np.eye(n).ravel().tolist()),
    )
    if not (np.isfinite(spacing).all() and spacing.min() > 0):
        return unmoved, float("inf")
    cosines = steps / spacing
    if abs(np.linalg.det(cosines)) < 1e-6:
        return unmoved, float("inf")
    # The nearest orthonormal matrix: the polar decomposition (Higham, 1986).
    left, _, right = np.linalg.svd(cosines)
    # Axes that are at right angles but for rounding stay as they are written.
    nearest = cosines if np.allclose(cosines.T @ cosines, np.eye(n), rtol=0, atol=_ROUNDED) else left @ right
    middle = (np.asarray(size) - 1) / 2
    shift = (steps - nearest * spacing) @ middle if nearest is not cosines else np.zeros(n)
    corners = np.array(list(itertools.product(*((-m, m) for m in middle))))
    apart = np.linalg.solve(cosines, (nearest - cosines) @ (corners * spacing).T)  # mm along the axes
    moved = np.abs(apart / spacing[:, None]).max()
    place = tuple(float(v) for v in np.asarray(origin) + shift)
    return Geometry(tuple(size), unmoved.spacing, place, tuple(nearest.ravel().tolist())), float(moved)


def straight(geometry: Geometry) -> Geometry:
    """Return where a file is to lie for programs that take no skewed axes, which ITK's are: on the straight lattice."""
    return geometry if written(geometry) is geometry else replace(geometry, stored=())


def written(geometry: Geometry) -> Geometry:
    """Return the lattice that a scan's file states, with its skewed axes; itself if that is straight.

    What is to lie exactly where the scan does is written with it: ITK's filters compare directions to 1e-6.
    """
    n = geometry.ndim
    place = Placement.of_numbers(geometry.stored) if geometry.stored else None
    if place is None or place.has_qform or not place.has_sform:
        return geometry
    sform = place.sform
    if n == 2 and (sform[2, :2].any() or sform[:2, 2].any()):
        return geometry  # a plane that is not axial
    cosines = sform[:n, :n] / geometry.spacing
    if np.allclose(cosines.T @ cosines, np.eye(n), rtol=0, atol=_ROUNDED):
        return geometry
    origin, direction = tuple(sform[:n, 3].tolist()), tuple(cosines.ravel().tolist())
    return replace(geometry, origin=origin, direction=direction)


def onto(
    array: npt.NDArray[Number],
    found: Geometry,
    expected: Geometry,
    *,
    where: str,
    whose: str,
    remedy: str = "",
    case_id: str | None = None,
    outside: int = 0,
) -> npt.NDArray[Number]:
    """Bring an array onto the lattice of the image that it belongs to, without interpolation.

    Programs store the same voxels in different orders: axes are permuted and flipped as needed. A 2D array goes onto a
    volume of one slice, and the reverse.

    Args:
        array: ([C,] *S) on `found`.
        found: Where it lies. A NIfTI file that states several places fits if one of them does.
        expected: The image's lattice.
        where: The array's file, for the fault.
        whose: What it is to fit, for the fault, such as ``its image``.
        remedy: What the user can do if it does not.
        case_id: Of the fault.
        outside: The value where a label that covers a part of its image (`Part`) does not cover it.

    Returns:
        ([C,] *S) on `expected`.

    Raises:
        ReadError: If it lies elsewhere, with what differs.
    """
    start = _start(found, expected) if isinstance(found, Part) else None
    if start is not None:
        whole = np.full(
            (*array.shape[: array.ndim - found.ndim], *reversed(expected.size)), outside, array.dtype
        )
        box = [slice(a, a + n) for a, n in zip(reversed(start), reversed(found.size), strict=True)]
        index: tuple[Any, ...] = (..., *box)
        whole[index] = array
        return whole
    turn = _turn(found, expected)
    if turn is None:
        difference, wanted = geometry_difference(found, expected) or ("", "")
        raise ReadError(Fault(where, difference, f"{wanted} as {whose}", remedy, case_id, "geometry"))
    axes, flips = turn
    shape = (1,) * (len(axes) - found.ndim) + array.shape[
        array.ndim - found.ndim :
    ]  # z is the first of (z, y, x)
    lead = array.shape[: array.ndim - found.ndim]
    n, m = len(lead), len(axes)
    # In array order, the reverse of the geometry's.
    turned = array.reshape((*lead, *shape)).transpose(
        *range(n), *(n + m - 1 - axis for axis in reversed(axes))
    )
    turned = np.flip(turned, tuple(n + m - 1 - k for k in range(m) if flips[k]))
    return np.ascontiguousarray(turned.reshape((*lead, *reversed(expected.size))))


def geometry_difference(found: Geometry, expected: Geometry) -> tuple[str, str] | None:
    """Say why an array on one lattice does not fit another (`onto`).

    Returns:
        What differs first (size, spacing, origin, direction), in words: (found, expected); or None where it fits.
    """
    if _turn(found, expected) is not None:
        return None
    if isinstance(found, Part) and _start(found, expected) is not None:
        return None
    if (difference := _difference(found, expected)) is None:  # 2D pictures apart, equal lattices fit
        return f"size {shown(found.size)}", shown(expected.size)
    unplaced = found.stored and not Placement.of_numbers(found.stored).is_known
    if unplaced and difference[0].startswith(("origin", "direction")):
        return "place not stated in its header", "the place"
    return difference


def _difference(found: Geometry, expected: Geometry) -> tuple[str, str] | None:
    """Compare two lattices; tolerances: `SPACING_TOLERANCE`, `ORIGIN_TOLERANCE`, `DIRECTION_TOLERANCE`."""
    if found.size != expected.size:
        return f"size {shown(found.size)}", shown(expected.size)
    if found.ndim == 2 and Geometry.identity(found.size) in (found, expected):
        return None
    unscaled = isinstance(found, Unscaled) or isinstance(expected, Unscaled)
    if not unscaled and not np.allclose(found.spacing, expected.spacing, rtol=SPACING_TOLERANCE, atol=0):
        return f"spacing {shown(found.spacing)} mm", shown(expected.spacing)
    within = ORIGIN_TOLERANCE * (1 + min(expected.spacing))
    if not np.allclose(found.origin, expected.origin, rtol=0, atol=within):
        return f"origin {listed(found.origin)} mm", listed(expected.origin)
    if not np.allclose(found.direction, expected.direction, rtol=0, atol=DIRECTION_TOLERANCE):
        return f"direction {listed(found.direction)}", listed(expected.direction)
    return None


def _start(part: Geometry, whole: Geometry) -> tuple[int, ...] | None:
    """Return where the first voxel of a part lies in the whole, (x, y[, z]) from 0; None if it is no part of it."""
    part, whole = written(part), written(whole)  # a part of skewed axes is straightened about its own middle
    n = whole.ndim
    if part.ndim != n:
        return None
    direction = np.reshape(whole.direction, (n, n))
    places = np.linalg.solve(direction, np.asarray(part.origin) - whole.origin) / whole.spacing
    start = np.rint(places).astype(int)
    within = all(0 <= a <= size - own for a, own, size in zip(start, part.size, whole.size, strict=True))
    moved = np.asarray(whole.origin) + direction @ (start * whole.spacing)
    lattice = Geometry(part.size, whole.spacing, tuple(moved.tolist()), whole.direction)
    return tuple(start.tolist()) if within and _difference(part, lattice) is None else None


Turn = tuple[tuple[int, ...], tuple[bool, ...]]
"""For each axis of the image, (x, y[, z]): the array's axis that runs along it, and whether it runs the other way."""


def _turn(found: Geometry, expected: Geometry) -> Turn | None:
    """Find how to turn an array on `found` so that it lies on `expected`; None if it lies elsewhere."""
    if found.ndim == expected.ndim and _difference(found, expected) is None:
        return tuple(range(found.ndim)), (False,) * found.ndim
    for own, other in itertools.product(_places(found), _places(expected)):
        if own.ndim == other.ndim and (turn := _storage(own, other)):
            return turn
    return _flat_turn(found, expected)


def _places(geometry: Geometry) -> Iterator[Geometry]:
    """Yield the lattices that a file can be said to lie on; a 2D file that knows its place is a volume of one slice."""
    yield geometry
    if geometry.stored:
        size = (*geometry.size, 1)[:3]
        for affine in Placement.of_numbers(geometry.stored).affines(size):
            place, moved = orthogonalised(size, affine[:, :3], affine[:, 3])
            if moved < HALF:
                yield place
            if (
                0 < moved < HALF / 2
            ):  # programs that straighten, such as ITK, leave the first voxel where it is
                yield replace(place, origin=tuple(affine[:, 3].tolist()))


def _storage(found: Geometry, expected: Geometry) -> Turn | None:
    """Find the permutation and the flips between two lattices that hold the same voxels in another order."""
    n = found.ndim
    own = np.reshape(found.direction, (n, n))
    cosines = own.T @ np.reshape(expected.direction, (n, n))
    axes = tuple(int(a) for a in np.abs(cosines).argmax(axis=0))
    if len(set(axes)) < n:
        return None
    flips = tuple(bool(cosines[axis, k] < 0) for k, axis in enumerate(axes))
    steps = own * found.spacing
    origin = np.asarray(found.origin)
    for axis, flip in zip(axes, flips, strict=True):
        if flip:
            origin = origin + steps[:, axis] * (found.size[axis] - 1)
    turned = Geometry(
        tuple(found.size[a] for a in axes),
        tuple(found.spacing[a] for a in axes),
        tuple(origin.tolist()),
        tuple((own[:, axes] * np.where(flips, -1.0, 1.0)).ravel().tolist()),
    )
    return None if _difference(turned, expected) else (axes, flips)


def _flat_turn(found: Geometry, expected: Geometry) -> Turn | None:
    """Match what is flat by its pixels alone: a picture knows no place, and a volume of one slice has no other."""
    if found.ndim == expected.ndim == 3:
        return None
    pictures = any(g.ndim == 2 and g == Geometry.identity(g.size) for g in (found, expected))
    # Two files that know where they lie in the plane must agree on it.
    placed = found.ndim == expected.ndim and not pictures
    for (own_axes, own), (axes, other) in itertools.product(_flat(found), _flat(expected)):
        same = np.allclose(own.spacing, other.spacing, rtol=SPACING_TOLERANCE, atol=0)
        if own.size == other.size and (pictures or (same and not placed)):
            order = dict(zip(axes, own_axes, strict=True))
            n = max(found.ndim, expected.ndim)
            rest = next((a for a in range(n) if a not in own_axes), None)
            return tuple(order.get(k, rest) for k in range(n)), (False,) * n  # type: ignore[misc]
    return None


def _flat(geometry: Geometry) -> Iterator[tuple[tuple[int, ...], Geometry]]:
    """Yield the two axes that matter of a lattice of one slice, and their 2D lattice; nothing of a real volume."""
    if geometry.ndim == 2:
        yield (0, 1), Geometry(geometry.size, geometry.spacing, geometry.origin, geometry.direction)
        return
    for flat in (2, 1, 0):
        if geometry.size[flat] == 1:
            axes = tuple(a for a in range(3) if a != flat)
            size, spacing = tuple(geometry.size[a] for a in axes), tuple(geometry.spacing[a] for a in axes)
            yield axes, Geometry(size, spacing, (0.0, 0.0), (1.0, 0.0, 0.0, 1.0))


def shown(values: Sequence[float]) -> str:
    """Return a size or a spacing in words: ``320×320×20``."""
    return "×".join(f"{v:.5g}" for v in values)


def listed(values: Sequence[float]) -> str:
    """Return a position or a direction in words: ``(0, -1, 0)``."""
    return "(" + ", ".join(f"{v:.5g}" for v in values) + ")"
