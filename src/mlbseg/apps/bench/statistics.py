"""What a table of cells says: means over runs, paired differences over cases and runs, the share of a gap.

A run is a training: a label set (which scans are labelled) and a seed. A cell's Dice is the mean over cases of each
case's mean over classes, as `mlbseg.evaluation` has it.

Intervals are t intervals of a mixed model in which cases and runs are drawn at random and crossed: every run is scored
on the same cases. The variance of the grand mean of R runs and C cases is estimated by (MS_runs + MS_cases - MS_rest) /
(R C), its degrees of freedom by Satterthwaite (1946). Where there are several label sets, these are the runs: seeds
within one are averaged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student

Run = int | tuple[int, int]
"""A seed, or a label set and a seed."""
Scores = Mapping[Run, Mapping[str, float]]
"""Of a row at one budget: run -> case -> Dice."""

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
    """A paired difference, with its confidence interval over cases and runs.

    Attributes:
        mean: Of the differences; positive where the first row is better.
        low: Lower end of the interval; None with fewer than `FEWEST` cases.
        high: Upper end of the interval.
        cases: Number of cases.
        runs: Number of runs that both rows have.
        label_sets: Number of label sets among them.
    """

    mean: float
    low: float | None
    high: float | None
    cases: int
    runs: int
    label_sets: int


@dataclass(frozen=True)
class Gap:
    """The share of a gap that a row closes, with its interval (see `Difference`); None where the gap is not sure."""

    share: float
    low: float | None
    high: float | None


def spread(values: Sequence[float]) -> Spread | None:
    """Return mean and SD of the values; None of none."""
    if not values:
        return None
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Spread(float(np.mean(values)), sd, len(values))


def of_runs(scores: Scores) -> Spread | None:
    """Return mean and SD over runs of the mean over cases."""
    return spread([float(np.mean(list(cases.values()))) for cases in scores.values() if cases])


def difference(first: Scores, second: Scores) -> Difference | None:
    """Return by how much the first row is better than the second, case by case and run by run.

    With a single run the interval is over cases alone: it says what other cases would change, with these trainings.

    Args:
        first: A row.
        second: The row to compare it with.

    Returns:
        None if no run or no case is common to both.
    """
    runs = _common(first, second)
    cases = _cases(runs, first, second)
    if not cases:
        return None
    each = _table(first, runs, cases) - _table(second, runs, cases)
    mean, half = float(_by_set(each, runs).mean()), _half_width(_by_set(each, runs))
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return Difference(mean, low, high, len(cases), len(runs), len({_set(run) for run in runs}))


def gap_closed(row: Scores, few: Scores, every: Scores) -> Gap | None:
    """Return the share of the gap between two rows that a third closes, over the runs that all have.

    The interval is that of the linearised ratio; there is none where the gap's own interval holds 0.

    Args:
        row: The row in question.
        few: Supervised with few labels.
        every: Supervised with all labels: its runs are told by their seed alone.

    Returns:
        1 for a row as good as `every`, 0 for one as good as `few`; None without a common run or a gap.
    """
    by_seed = {_seed(run): cases for run, cases in every.items()}
    runs = [run for run in _common(row, few) if _seed(run) in by_seed]
    best = {run: by_seed[_seed(run)] for run in runs}
    cases = _cases(runs, row, few, best)
    if not cases:
        return None
    below = _table(few, runs, cases)
    won = _by_set(_table(row, runs, cases) - below, runs)
    gap = _by_set(_table(best, runs, cases) - below, runs)
    if gap.mean() <= 0:
        return None
    share = float(won.mean() / gap.mean())
    sure, half = _half_width(gap), _half_width((won - share * gap) / gap.mean())
    if sure is None or half is None or sure >= gap.mean():
        return Gap(share, None, None)
    return Gap(share, share - half, share + half)


def _half_width(values: npt.NDArray[np.float64]) -> float | None:
    """Return half the width of the interval of the mean of values (R, C) of runs and cases; None of few cases."""
    runs, cases = values.shape
    if cases < FEWEST:
        return None
    grand = values.mean()
    of_cases = runs * np.square(values.mean(0) - grand).sum() / (cases - 1)
    if runs == 1:
        variance, freedom = of_cases / cases, cases - 1.0
    else:
        of_runs = cases * np.square(values.mean(1) - grand).sum() / (runs - 1)
        rest = values - values.mean(0) - values.mean(1, keepdims=True) + grand
        of_rest = np.square(rest).sum() / ((runs - 1) * (cases - 1))
        parts = np.array([of_runs, of_cases, -of_rest])
        freedoms = np.array([runs - 1, cases - 1, (runs - 1) * (cases - 1)])
        if parts.sum() < max(of_runs, of_cases):  # a component of variance below 0 is 0
            larger = int(of_cases > of_runs)
            parts, freedoms = parts[larger : larger + 1], freedoms[larger : larger + 1]
        variance = parts.sum() / (runs * cases)
        squares = (np.square(parts) / freedoms).sum()
        freedom = float(parts.sum() ** 2 / squares) if squares > 0 else float(runs - 1)
    return float(student.ppf((1 + LEVEL) / 2, freedom) * np.sqrt(variance))


def _common(first: Scores, second: Scores) -> list[Run]:
    return sorted(first.keys() & second.keys(), key=lambda run: (_set(run), _seed(run)))


def _cases(runs: Sequence[Run], *rows: Scores) -> list[str]:
    """Return the cases that all rows have in all of the runs."""
    return sorted(set.intersection(*(set(row[run]) for row in rows for run in runs)) if runs else ())


def _table(row: Scores, runs: Sequence[Run], cases: Sequence[str]) -> npt.NDArray[np.float64]:
    return np.array([[row[run][case] for case in cases] for run in runs], dtype=float)


def _by_set(values: npt.NDArray[np.float64], runs: Sequence[Run]) -> npt.NDArray[np.float64]:
    """Return values (R, C) averaged over the seeds of each label set, where there are several sets."""
    sets = [_set(run) for run in runs]
    if len(set(sets)) == 1:
        return values
    return np.stack([values[[own == one for own in sets]].mean(0) for one in sorted(set(sets))])


def _set(run: Run) -> int:
    return run[0] if isinstance(run, tuple) else 0


def _seed(run: Run) -> int:
    return run[1] if isinstance(run, tuple) else run


def ratio(row: Mapping[Run, float], reference: Mapping[Run, float]) -> float | None:
    """Return how many times as much a row takes as another, over the runs that both have; None without any."""
    runs = row.keys() & reference.keys()
    below = sum(reference[run] for run in runs)
    return sum(row[run] for run in runs) / below if below > 0 else None
