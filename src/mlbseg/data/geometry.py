"""Do two scans lie at the same place? And the words for where they lie."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlbseg.types import Geometry

SPACING_TOLERANCE = 1e-3  # relative
ORIGIN_TOLERANCE = 0.01  # mm, plus the same share of a voxel
DIRECTION_TOLERANCE = 1e-3  # of a direction cosine


class Unscaled(Geometry):
    """The geometry of a label whose file does not say how far apart its voxels are: it fits an image of any spacing."""


def geometry_difference(found: Geometry, expected: Geometry) -> tuple[str, str] | None:
    """Compare two geometries; tolerances: `SPACING_TOLERANCE`, `ORIGIN_TOLERANCE`, `DIRECTION_TOLERANCE`.

    Returns:
        What differs first (size, spacing, origin, direction), in words: (found, expected); or None.
    """
    if found.size != expected.size:
        return f"size {shown(found.size)}", shown(expected.size)
    unscaled = isinstance(found, Unscaled) or isinstance(expected, Unscaled)
    if not unscaled and not np.allclose(found.spacing, expected.spacing, rtol=SPACING_TOLERANCE, atol=0):
        return f"spacing {shown(found.spacing)} mm", shown(expected.spacing)
    within = ORIGIN_TOLERANCE * (1 + min(expected.spacing))
    if not np.allclose(found.origin, expected.origin, rtol=0, atol=within):
        return f"origin {listed(found.origin)} mm", listed(expected.origin)
    if not np.allclose(found.direction, expected.direction, rtol=0, atol=DIRECTION_TOLERANCE):
        return f"direction {listed(found.direction)}", listed(expected.direction)
    return None


def shown(values: Sequence[float]) -> str:
    """Return a size or a spacing in words: ``320×320×20``."""
    return "×".join(f"{v:.5g}" for v in values)


def listed(values: Sequence[float]) -> str:
    """Return a position or a direction in words: ``(0, -1, 0)``."""
    return "(" + ", ".join(f"{v:.5g}" for v in values) + ")"
