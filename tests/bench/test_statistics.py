"""The figures of a bench against naive computation."""

from __future__ import annotations

import statistics as naive

import numpy as np
import pytest

from mlbseg.apps.bench.statistics import Spread, difference, gap_closed, of_seeds, ratio, spread

CASES = ("a", "b", "c", "d", "e", "f", "g")


def scores(seed: int, seeds: tuple[int, ...] = (0, 1, 2), shift: float = 0.0) -> dict[int, dict[str, float]]:
    draw = np.random.default_rng(seed)
    return {s: {case: float(draw.uniform(0.2, 0.9)) + shift for case in CASES} for s in seeds}


def test_spread_is_mean_and_sample_sd() -> None:
    values = [0.5, 0.7, 0.9, 0.2]
    found = spread(values)
    assert found == Spread(pytest.approx(naive.mean(values)), pytest.approx(naive.stdev(values)), 4)
    assert spread([0.5]) == Spread(0.5, None, 1)
    assert spread([]) is None


def test_a_row_is_summarised_over_seeds_by_the_mean_over_cases() -> None:
    table = scores(1)
    means = [naive.mean(cases.values()) for cases in table.values()]
    assert of_seeds(table) == Spread(pytest.approx(naive.mean(means)), pytest.approx(naive.stdev(means)), 3)
    assert of_seeds({}) is None


def test_a_difference_is_paired_over_cases_and_over_the_seeds_that_both_have() -> None:
    first, second = scores(1, (0, 1, 2)), scores(2, (1, 2, 5))
    found = difference(first, second)
    assert found is not None
    by_case = [naive.mean(first[s][case] - second[s][case] for s in (1, 2)) for case in CASES]
    assert (found.mean, found.cases, found.seeds) == (pytest.approx(naive.mean(by_case)), 7, 2)

    draw = np.random.default_rng(1)
    resampled = sorted(sum(by_case[draw.integers(7)] for _ in CASES) / 7 for _ in range(4_000))
    # Two bootstraps with other draws: their quantiles agree within the draws' own error.
    assert found.low == pytest.approx(resampled[100], abs=0.02)
    assert found.high == pytest.approx(resampled[-100], abs=0.02)
    assert found.low < found.mean < found.high
    assert difference(first, second) == found  # the same draws each time
    assert difference(second, first).mean == pytest.approx(-found.mean)  # type: ignore[union-attr]


def test_an_equal_gain_on_each_case_is_certain() -> None:
    found = difference(scores(3, shift=0.1), scores(3))
    assert found is not None
    assert (found.low, found.mean, found.high) == pytest.approx((0.1, 0.1, 0.1))


def test_few_cases_have_no_interval() -> None:
    for count in (1, 5, 6):
        first, second = ({0: {str(i): value for i in range(count)}} for value in (0.75, 0.5))
        found = difference(first, second)
        assert found is not None
        assert (found.mean, found.cases) == (0.25, count)
        assert (found.low, found.high) == ((None, None) if count < 6 else (0.25, 0.25))


def test_only_cases_that_both_rows_have_are_compared() -> None:
    first, second = scores(1), scores(2)
    del second[1]["c"]
    found = difference(first, second)
    assert found is not None
    assert found.cases == 6


@pytest.mark.parametrize("second", [{}, {7: {"a": 0.5}}, {0: {"other": 0.5}}])
def test_without_anything_in_common_there_is_no_difference(second: dict[int, dict[str, float]]) -> None:
    assert difference({0: {"a": 0.5}}, second) is None


@pytest.mark.parametrize(
    ("row", "few", "every", "expected"),
    [(0.6, 0.5, 0.9, 0.25), (0.4, 0.5, 0.9, -0.25), (0.9, 0.5, 0.9, 1.0), (0.6, 0.5, 0.5, None)],
)
def test_the_share_of_the_gap(row: float, few: float, every: float, expected: float | None) -> None:
    found = gap_closed(*({0: {"a": value}} for value in (row, few, every)))
    assert found == (None if expected is None else pytest.approx(expected))


def test_a_gap_counts_the_seeds_that_all_have() -> None:
    row = {0: {"a": 0.6}, 1: {"a": 0.1}}
    assert gap_closed(row, {0: {"a": 0.5}}, {0: {"a": 0.9}, 1: {"a": 0.0}}) == pytest.approx(0.25)
    assert gap_closed(row, {2: {"a": 0.5}}, {0: {"a": 0.9}}) is None


def test_a_ratio_of_times() -> None:
    assert ratio({0: 3.0, 1: 5.0, 2: 100.0}, {0: 1.0, 1: 1.0}) == pytest.approx(4.0)
    assert ratio({0: 3.0}, {1: 1.0}) is None
