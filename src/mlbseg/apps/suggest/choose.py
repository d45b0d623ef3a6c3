"""Which scans to pick, one after the other, so that the first few are always a good choice.

Every scan has a *doubt*: its uncertainty times its distance to the nearest scan that has a label or was picked. A pick
lessens the doubt about all scans that are like it, so that near-copies are not picked together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import cdist, pdist

from mlbseg.errors import UserError, nearest

Floats = npt.NDArray[np.float64]
Rule = Callable[[Floats, Floats, Floats], Floats]


def cover(uncertainty: Floats, distance: Floats, between: Floats) -> Floats:
    """Return how much each pick would lessen the doubt about all scans: facility location, weighted by uncertainty.

    It prefers what many scans are like. Source of the greedy choice: Nemhauser et al., Mathematical Programming 14
    (1978), by which it is within 1 - 1/e of the best one.

    Args:
        uncertainty: (N,).
        distance: (N,) to the nearest labelled or picked scan.
        between: (N, N) distances between the candidates.
    """
    return uncertainty @ (distance[:, None] - between).clip(0)


def spread(uncertainty: Floats, distance: Floats, between: Floats) -> Floats:
    """Return the doubt about each scan itself: farthest first (k-centre), weighted by uncertainty.

    It prefers what is unlike all others. Source without the weight: Sener and Savarese, core-set (ICLR 2018).

    Args:
        uncertainty: (N,).
        distance: (N,) to the nearest labelled or picked scan.
        between: Not looked at.
    """
    return uncertainty * distance


RULES: dict[str, Rule] = {"spread": spread, "cover": cover}


def find_rule(name: str) -> Rule:
    """Return the rule of that name in `RULES`.

    Raises:
        UserError: if there is none.
    """
    if name not in RULES:
        raise UserError(f"unknown rule {name!r}: {nearest(name, RULES)}")
    return RULES[name]


@dataclass(frozen=True)
class Pick:
    """One picked scan.

    Attributes:
        index: Of the candidate.
        score: What it gains by the rule, as a share of the doubt about all candidates before the first pick.
        closer: Number of other candidates that it is nearer to than any scan with a label or picked before.
        labelled: Index of the nearest labelled scan.
        distance: To it; 1 is the median distance between two candidates (of a single one: between any two scans).
        picked: Index of the nearest candidate that was picked before; None for the first.
    """

    index: int
    score: float
    closer: int
    labelled: int
    distance: float
    picked: int | None


def choose(uncertainty: Floats, candidates: Floats, labelled: Floats, n: int, rule: Rule) -> list[Pick]:
    """Pick scans greedily. Of equals the more uncertain is taken, then the first.

    Args:
        uncertainty: (N,) of the candidates.
        candidates: (N, F) their descriptors.
        labelled: (L, F) those of the labelled scans, L at least 1.
        n: Number of picks; all candidates if there are fewer.
        rule: What a pick gains.
    """
    between, to_labelled = cdist(candidates, candidates), cdist(candidates, labelled)
    unit = _unit(candidates if len(candidates) > 1 else np.concatenate([candidates, labelled]))
    between, to_labelled = between / unit, to_labelled / unit
    distance = to_labelled.min(1)
    doubt = float(uncertainty @ distance) or 1.0  # nothing is unlike: no pick gains anything
    free = np.ones(len(candidates), bool)
    picks: list[Pick] = []
    for _ in range(min(n, len(candidates))):
        gain = np.where(free, rule(uncertainty, distance, between), -np.inf)
        index = int(np.lexsort((-uncertainty, -gain))[0])
        earlier = [pick.index for pick in picks]
        closer = free & (between[index] < distance)
        closer[index] = False
        picks.append(
            Pick(
                index,
                float(gain[index]) / doubt,
                int(closer.sum()),
                int(to_labelled[index].argmin()),
                float(to_labelled[index].min()),
                min(earlier, key=lambda other: float(between[index, other])) if earlier else None,
            )
        )
        free[index] = False
        distance = np.minimum(distance, between[index])
    return picks


def _unit(scans: Floats) -> float:
    """Return the median distance between two of the scans (N, F), N at least 2; 1 where they are all the same."""
    return float(np.median(pdist(scans))) or 1.0
