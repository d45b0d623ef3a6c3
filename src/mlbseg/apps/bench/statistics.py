"""What a table of cells says: means over seeds, paired differences over cases, the share of a gap.

A cell's Dice is the mean over cases of each case's mean over classes, as `mlbseg.evaluation` has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Scores = Mapping[int, Mapping[str, float]]
"""Of a row at one budget: seed -> case -> Dice."""

RESAMPLES = 10_000
LEVEL = 0.95
FEWEST = 6
"""Cases below which there is no interval: of five that all agree not even a sign test is sure at this level."""


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (divisor n - 1; None below two values) of `count` values."""

    mean: float
    sd: float | None
    count: int


@dataclass(frozen=True)
class Difference:
    """A paired difference over cases, with its confidence interval.

    Attributes:
        mean: Of the differences; positive where the first row is better.
        low: Lower end of the interval; None with fewer than `FEWEST` cases.
        high: Upper end of the interval.
        cases: Number of cases.
        seeds: Number of seeds that both rows have.
    """

    mean: float
    low: float | None
    high: float | None
    cases: int
    seeds: int


def spread(values: Sequence[float]) -> Spread | None:
    """Return mean and SD of the values; None of none."""
    if not values:
        return None
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Spread(float(np.mean(values)), sd, len(values))


def of_seeds(scores: Scores) -> Spread | None:
    """Return mean and SD over seeds of the mean over cases."""
    return spread([float(np.mean(list(cases.values()))) for cases in scores.values() if cases])


def difference(
    first: Scores, second: Scores, *, resamples: int = RESAMPLES, seed: int = 0
) -> Difference | None:
    """Return by how much the first row is better than the second, case by case.

    Each case's score is its mean over the seeds that both rows have. The interval is the percentile bootstrap's:
    cases are drawn with replacement, and both rows are scored on the same draw. It says what other cases would
    change, with these trainings; what other seeds would change is the SD over seeds.

    Args:
        first: A row.
        second: The row to compare it with.
        resamples: Draws of the bootstrap.
        seed: Of the draws.

    Returns:
        None if no seed or no case is common to both.
    """
    seeds = sorted(first.keys() & second.keys())
    cases = sorted(
        set.intersection(*(set(row[s]) for row in (first, second) for s in seeds)) if seeds else ()
    )
    if not cases:
        return None
    paired = np.array(
        [np.mean([first[s][case] - second[s][case] for s in seeds]) for case in cases], dtype=float
    )
    if len(paired) < FEWEST:
        return Difference(float(paired.mean()), None, None, len(cases), len(seeds))
    drawn = np.random.default_rng(seed).integers(0, len(paired), (resamples, len(paired)))
    means = paired[drawn].mean(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Difference(float(paired.mean()), float(low), float(high), len(cases), len(seeds))


def gap_closed(row: Scores, few: Scores, every: Scores) -> float | None:
    """Return the share of the gap between two rows that a third closes, over the seeds that all have.

    Args:
        row: The row in question.
        few: Supervised with few labels.
        every: Supervised with all labels.

    Returns:
        1 for a row as good as `every`, 0 for one as good as `few`; None without a common seed or a gap.
    """
    seeds = row.keys() & few.keys() & every.keys()
    values = [of_seeds({s: scores[s] for s in seeds}) for scores in (row, few, every)]
    here, low, high = (None if value is None else value.mean for value in values)
    if here is None or low is None or high is None or high <= low:
        return None
    return (here - low) / (high - low)


def ratio(row: Mapping[int, float], reference: Mapping[int, float]) -> float | None:
    """Return how many times as much a row takes as another, over the seeds that both have; None without any."""
    seeds = row.keys() & reference.keys()
    below = sum(reference[s] for s in seeds)
    return sum(row[s] for s in seeds) / below if below > 0 else None
