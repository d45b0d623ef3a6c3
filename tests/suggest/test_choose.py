"""The greedy choice against brute force and on points whose right answer can be seen."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from mlbseg.apps.suggest.choose import RULES, Rule, choose, cover, find_rule, spread
from mlbseg.errors import UserError

ORIGIN = np.zeros((1, 2))
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def cloud(centre: tuple[float, float], count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(centre, 0.1, (count, 2))


def doubt_left(
    picked: tuple[int, ...], uncertainty: np.ndarray, points: np.ndarray, labelled: np.ndarray
) -> float:
    known = np.vstack([labelled, points[list(picked)]])
    return float(uncertainty @ cdist(points, known).min(1))


@every_rule
def test_the_order_of_the_picks_repeats_and_prefixes_agree(rule: Rule) -> None:
    points, doubt = np.random.default_rng(1).normal(size=(30, 4)), np.random.default_rng(2).uniform(size=30)
    labelled = np.zeros((2, 4))
    long = choose(doubt, points, labelled, 10, rule)
    assert choose(doubt, points, labelled, 10, rule) == long
    assert choose(doubt, points, labelled, 4, rule) == long[:4]
    assert len({pick.index for pick in long}) == 10
    scores = [pick.score for pick in long]
    assert scores == sorted(scores, reverse=True)  # later picks gain less


def test_cover_takes_what_lessens_the_doubt_most() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        points, doubt, labelled = rng.normal(size=(8, 3)), rng.uniform(size=8), rng.normal(size=(2, 3))
        before = doubt_left((), doubt, points, labelled)
        first, second, third = choose(doubt, points, labelled, 3, cover)
        left = {i: doubt_left((i,), doubt, points, labelled) for i in range(8)}
        assert first.index == min(left, key=left.__getitem__)
        assert first.score == pytest.approx((before - left[first.index]) / before)
        # Three greedy picks against the best three: within 1 - 1/e of them (Nemhauser 1978).
        gained = first.score + second.score + third.score
        best = max(
            before - doubt_left(three, doubt, points, labelled)
            for three in itertools.combinations(range(8), 3)
        )
        assert (1 - 1 / np.e) * best / before <= gained <= best / before + 1e-12


def test_spread_takes_the_greatest_doubt() -> None:
    points = np.array([[1.0, 0], [2, 0], [3, 0]])
    order = [pick.index for pick in choose(np.array([0.1, 0.9, 0.2]), points, ORIGIN, 3, spread)]
    assert order == [1, 2, 0]


@every_rule
def test_near_copies_are_not_picked_together(rule: Rule) -> None:
    points = np.vstack([np.repeat([[3.0, 0.0]], 5, axis=0), [[0.0, 2.0], [-1.0, -1.0]]])
    picks = choose(np.ones(7), points, ORIGIN, 3, rule)
    assert {pick.index for pick in picks} == {0, 5, 6}


@every_rule
def test_a_copy_of_a_labelled_scan_comes_last(rule: Rule) -> None:
    points = np.vstack([ORIGIN, cloud((2, 0), 3)])
    picks = choose(np.array([1.0, 0.1, 0.1, 0.1]), points, ORIGIN, 4, rule)
    assert (picks[-1].index, picks[-1].score, picks[-1].distance) == (0, 0.0, 0.0)


def test_cover_prefers_the_crowd_and_spread_the_stranger() -> None:
    crowd, stranger = cloud((2, 0), 20), np.array([[0.0, 5.0]])
    points = np.vstack([crowd, stranger])
    first = {name: choose(np.ones(21), points, ORIGIN, 2, rule) for name, rule in RULES.items()}
    assert first["cover"][0].index < 20
    assert first["cover"][0].closer == 19
    assert first["spread"][0].index == 20
    assert {pick.index == 20 for pick in first["cover"]} == {True, False}  # but the stranger is next


@every_rule
def test_of_equals_the_more_uncertain_is_taken(rule: Rule) -> None:
    picks = choose(np.array([0.1, 0.3, 0.2]), np.zeros((3, 2)), ORIGIN, 3, rule)
    assert [pick.index for pick in picks] == [1, 2, 0]
    assert [pick.score for pick in picks] == [0, 0, 0]


def test_neighbours_and_units() -> None:
    points = np.array([[1.0, 0], [3, 0], [7, 0]])  # 2, 4 and 6 apart: the unit is 4
    labelled = np.array([[0.0, 0], [8, 0]])
    picks = {p.index: p for p in choose(np.ones(3), points, labelled, 3, spread)}
    assert {i: (p.labelled, p.distance) for i, p in picks.items()} == {
        0: (0, 0.25),
        1: (0, 0.75),
        2: (1, 0.25),
    }
    order = [p.index for p in choose(np.ones(3), points, labelled, 3, spread)]
    assert order == [1, 0, 2]
    assert [picks[i].picked for i in order] == [None, 1, 1]


@every_rule
def test_one_candidate_and_too_many_asked(rule: Rule) -> None:
    (pick,) = choose(np.array([0.5]), np.array([[1.0, 1.0]]), ORIGIN, 10, rule)
    assert (pick.index, pick.picked, pick.closer) == (0, None, 0)
    assert pick.score == pytest.approx(1)
    assert pick.distance == pytest.approx(1)  # the one distance there is
    three = np.array([[0.0, 0], [0, 4], [3, 4]])
    (pick,) = choose(np.array([0.5]), three[:1], three[1:], 1, rule)
    assert pick.distance == pytest.approx(4 / 4)  # of 3, 4 and 5


def test_an_unknown_rule() -> None:
    with pytest.raises(UserError, match="unknown rule 'covr': did you mean 'cover'"):
        find_rule("covr")
