"""The figures of a bench against naive computation."""

from __future__ import annotations

import statistics as naive

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from mlbseg.apps.bench.statistics import Gap, Spread, difference, gap_closed, of_runs, ratio, spread

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
    assert of_runs(table) == Spread(pytest.approx(naive.mean(means)), pytest.approx(naive.stdev(means)), 3)
    assert of_runs({}) is None


def test_a_difference_is_paired_over_cases_and_over_the_seeds_that_both_have() -> None:
    first, second = scores(1, (0, 1, 2)), scores(2, (1, 2, 5))
    found = difference(first, second)
    assert found is not None
    by_case = [naive.mean(first[s][case] - second[s][case] for s in (1, 2)) for case in CASES]
    assert (found.mean, found.cases, found.runs) == (pytest.approx(naive.mean(by_case)), 7, 2)
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.mean < found.high
    assert difference(second, first).mean == pytest.approx(-found.mean)  # type: ignore[union-attr]


def test_of_one_run_the_interval_is_that_of_t_over_cases() -> None:
    first, second = scores(1, (4,)), scores(2, (4,))
    found = difference(first, second)
    assert found is not None
    each = [first[4][case] - second[4][case] for case in CASES]
    expected = ttest_1samp(each, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_seeds_of_a_label_set_are_averaged() -> None:
    first, second = scores(1, (0, 1, 2, 3)), scores(2, (0, 1, 2, 3))

    def nested(table: dict[int, dict[str, float]]) -> dict[tuple[int, int], dict[str, float]]:
        return {(run // 2, run % 2): cases for run, cases in table.items()}

    def averaged(table: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
        return {s: {c: (table[2 * s][c] + table[2 * s + 1][c]) / 2 for c in CASES} for s in (0, 1)}

    found, two = difference(nested(first), nested(second)), difference(averaged(first), averaged(second))
    assert found is not None
    assert two is not None
    assert (found.mean, found.low, found.high) == pytest.approx((two.mean, two.low, two.high))
    assert (found.runs, found.label_sets, two.runs, two.label_sets) == (4, 2, 2, 1)


@pytest.mark.parametrize(("runs", "of_runs", "of_cases"), [(3, 0.02, 0.03), (4, 0.0, 0.03), (5, 0.03, 0.0)])
def test_intervals_hold_the_truth_about_as_often_as_they_say(
    runs: int, of_runs: float, of_cases: float
) -> None:
    draw = np.random.default_rng(0)
    held = 0
    for _ in range(600):
        effects = draw.normal(0, of_runs, (runs, 1)) + draw.normal(0, of_cases, 12)
        table = 0.01 + effects + draw.normal(0, 0.02, (runs, 12))
        row = {(0, r): {str(c): float(v) for c, v in enumerate(values)} for r, values in enumerate(table)}
        found = difference(row, {run: dict.fromkeys(cases, 0.0) for run, cases in row.items()})
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        held += found.low < 0.01 < found.high
    assert 0.93 < held / 600 < 0.99


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
    assert found == (None if expected is None else Gap(pytest.approx(expected), None, None))


def test_a_gap_counts_the_runs_that_all_have_and_the_upper_bound_has_no_label_sets() -> None:
    row = {(0, 0): {"a": 0.6}, (1, 0): {"a": 0.8}, (0, 1): {"a": 0.1}}
    few = {(0, 0): {"a": 0.5}, (1, 0): {"a": 0.7}}
    found = gap_closed(row, few, {(0, 0): {"a": 0.9}, (0, 1): {"a": 0.0}})
    assert found is not None
    assert found.share == pytest.approx(0.2 / 0.6)
    assert gap_closed(row, {2: {"a": 0.5}}, {0: {"a": 0.9}}) is None


def test_a_gap_has_the_interval_of_its_linearised_ratio() -> None:
    few = scores(1, (0,))
    draw = np.random.default_rng(5)
    every = {0: {case: value + 0.2 + draw.normal(0, 0.02) for case, value in few[0].items()}}
    row = {0: {case: value + 0.1 + draw.normal(0, 0.02) for case, value in few[0].items()}}
    found = gap_closed(row, few, every)
    assert found is not None
    won = np.array([row[0][case] - few[0][case] for case in CASES])
    gap = np.array([every[0][case] - few[0][case] for case in CASES])
    assert found.share == pytest.approx(won.mean() / gap.mean())
    assert found.low is not None
    assert found.high is not None
    expected = ttest_1samp((won - found.share * gap) / gap.mean(), 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((found.share + expected.low, found.share + expected.high))
    unsure = gap_closed(
        row, few, {0: {case: value + 0.01 + draw.normal(0, 0.2) for case, value in few[0].items()}}
    )
    assert unsure is None or unsure.low is None


def test_a_ratio_of_times() -> None:
    assert ratio({0: 3.0, 1: 5.0, 2: 100.0}, {0: 1.0, 1: 1.0}) == pytest.approx(4.0)
    assert ratio({0: 3.0}, {1: 1.0}) is None
