"""How a term that cannot be trusted at first comes in."""

from __future__ import annotations

import math


def sigmoid_ramp(progress: float) -> float:
    """Return exp(-5 (1 - x)²) for the share x of the ramp that has passed, 1 after it.

    Source: Laine & Aila, Temporal Ensembling (ICLR 2017), section 3.
    """
    return math.exp(-5 * (1 - min(max(progress, 0.0), 1.0)) ** 2)
