"""The scores equal MedPy's on random and hand-made masks, and empty masks follow the stated rule."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from medpy.metric import binary

from mlbseg.metrics import Scores, Summary, dice, score, score_classes, summarise, summarise_values

Mask = npt.NDArray[np.bool_]


def medpy_scores(a: Mask, b: Mask, spacing: tuple[float, ...]) -> Scores:
    return Scores(
        dice=float(binary.dc(a, b)),
        jaccard=float(binary.jc(a, b)),
        hd95_mm=float(binary.hd95(a, b, spacing)),
        assd_mm=float(binary.assd(a, b, spacing)),
        hd95_voxels=float(binary.hd95(a, b)),
        assd_voxels=float(binary.assd(a, b)),
    )


def assert_equal(ours: Scores, theirs: Scores) -> None:
    assert ours.as_dict() == pytest.approx(theirs.as_dict(), abs=1e-9)


def ball(shape: tuple[int, ...], centre: tuple[float, ...], radius: float) -> Mask:
    grid = np.indices(shape).astype(float)
    return ((grid - np.reshape(centre, (-1,) + (1,) * len(shape))) ** 2).sum(0) <= radius**2


def cube(shape: tuple[int, ...], *box: slice) -> Mask:
    mask = np.zeros(shape, bool)
    mask[box] = True
    return mask


HAND_MADE = {
    "equal": (ball((12, 12, 12), (6, 6, 6), 4), ball((12, 12, 12), (6, 6, 6), 4)),
    "shifted": (ball((16, 18, 20), (7, 8, 9), 5), ball((16, 18, 20), (9, 8, 12), 4)),
    "disjoint at opposite corners": (
        cube((9, 10, 11), slice(0, 2), slice(0, 2), slice(0, 2)),
        cube((9, 10, 11), slice(7, 9), slice(8, 10), slice(9, 11)),
    ),
    "one within the other": (ball((15, 15), (7, 7), 2), ball((15, 15), (7, 7), 6)),
    "single voxels": (cube((5, 6), slice(1, 2), slice(1, 2)), cube((5, 6), slice(4, 5), slice(5, 6))),
    "the whole image": (np.ones((4, 5, 6), bool), ball((4, 5, 6), (2, 2, 2), 1)),
    "thin line": (cube((8, 9), slice(3, 4), slice(None)), cube((8, 9), slice(5, 6), slice(2, 7))),
    "scattered specks": (np.arange(120).reshape(10, 12) % 7 == 0, np.arange(120).reshape(10, 12) % 11 == 0),
}


@pytest.mark.parametrize("name", HAND_MADE)
@pytest.mark.parametrize("spacing", [(1, 1, 1), (2.5, 0.7, 0.9)])
def test_equals_medpy_on_hand_made_masks(name: str, spacing: tuple[float, ...]) -> None:
    a, b = HAND_MADE[name]
    assert_equal(score(a, b, spacing[: a.ndim]), medpy_scores(a, b, spacing[: a.ndim]))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_equals_medpy_on_random_masks(data: st.DataObject) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=7))
    a, b = (data.draw(hnp.arrays(bool, shape)) for _ in range(2))
    spacing = tuple(data.draw(st.floats(0.2, 6)) for _ in shape)
    ours = score(a, b, spacing)
    if a.any() and b.any():
        assert_equal(ours, medpy_scores(a, b, spacing))
    else:
        assert ours.dice == ours.jaccard == float(not a.any() and not b.any())
    assert_equal(score(b, a, spacing), ours)  # all four are symmetric
    assert dice(a, b) == ours.dice


def test_equals_medpy_on_a_large_noisy_volume() -> None:
    rng = np.random.default_rng(3)
    a = ball((40, 50, 60), (18, 20, 25), 12) ^ (rng.random((40, 50, 60)) < 0.01)
    b = ball((40, 50, 60), (20, 22, 25), 11) ^ (rng.random((40, 50, 60)) < 0.01)
    assert_equal(score(a, b, (3, 1, 0.5)), medpy_scores(a, b, (3, 1, 0.5)))


@given(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4))
def test_empty_space_around_the_masks_changes_nothing(before: int, after: int, aside: int) -> None:
    a, b = HAND_MADE["shifted"]
    pad = ((before, after), (aside, 0), (after, before))
    assert score(np.pad(a, pad), np.pad(b, pad), (2, 1, 1)) == score(a, b, (2, 1, 1))


def test_a_known_figure_in_mm_and_voxels() -> None:
    a, b = cube((1, 12), slice(None), slice(2, 3)), cube((1, 12), slice(None), slice(6, 7))
    scores = score(a, b, (1, 2.5))
    assert (scores.hd95_voxels, scores.hd95_mm) == (4, 10)
    assert (scores.assd_voxels, scores.assd_mm) == (4, 10)
    assert (scores.dice, scores.jaccard) == (0, 0)


def test_both_masks_empty_agree() -> None:
    nothing = np.zeros((3, 4, 5), bool)
    assert score(nothing, nothing, (1, 1, 1)) == Scores(1, 1, 0, 0, 0, 0)
    assert dice(nothing, nothing) == 1


@pytest.mark.parametrize("empty_first", [True, False])
def test_one_empty_mask_has_no_distance(empty_first: bool) -> None:
    masks = [np.zeros((5, 5), bool), ball((5, 5), (2, 2), 1)]
    a, b = masks if empty_first else masks[::-1]
    assert score(a, b, (1, 2)) == Scores(0, 0, None, None, None, None)


def test_masks_of_any_type_are_taken() -> None:
    a, b = HAND_MADE["shifted"]
    assert score(a.astype(np.uint8) * 255, b.astype(float), (1, 1, 1)) == score(a, b, (1, 1, 1))


def test_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 4\) but reference \(4, 3\)"):
        score(np.zeros((3, 4)), np.zeros((4, 3)), (1, 1))
    with pytest.raises(ValueError, match="equal shapes"):
        dice(np.zeros(3), np.zeros(4))


@pytest.mark.parametrize("spacing", [(1.0,), (1.0, 0.0), (1.0, -2.0), (1.0, math.nan), (1.0, 1.0, 1.0)])
def test_an_impossible_spacing_is_refused(spacing: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="expected 2 positive numbers"):
        score(np.ones((3, 3)), np.ones((3, 3)), spacing)


def test_classes_are_scored_one_against_the_rest() -> None:
    reference = np.array([[0, 1, 1], [2, 2, 0], [2, 0, 0]])
    prediction = np.array([[0, 1, 2], [2, 2, 0], [2, 0, 0]])
    scores = score_classes(prediction, reference, (1, 1), [1, 2, 3])
    assert scores[1] == score(prediction == 1, reference == 1, (1, 1))
    assert scores[1].dice == pytest.approx(2 / 3)
    assert scores[2].dice == pytest.approx(6 / 7)
    assert scores[3] == Scores(1, 1, 0, 0, 0, 0)


def test_summary_is_mean_and_sample_deviation_and_counts_what_is_missing() -> None:
    assert summarise_values([1.0, None, 3.0, 5.0]) == Summary(mean=3, sd=2, count=3, missing=1)
    assert summarise_values([4.0]) == Summary(mean=4, sd=None, count=1, missing=0)
    assert summarise_values([None]) == Summary(mean=None, sd=None, count=0, missing=1)
    assert summarise_values([]) == Summary(mean=None, sd=None, count=0, missing=0)


def test_summary_over_classes_is_between_cases() -> None:
    def scored(value: float, distance: float | None) -> Scores:
        return Scores(value, value / 2, distance, distance, distance, distance)

    rows = [{1: scored(0.8, 2), 2: scored(0.6, 4)}, {1: scored(0.9, 1), 2: scored(0.0, None)}]
    summary = summarise(rows)
    assert list(summary) == [1, 2, None]
    assert summary[1]["dice"].mean == pytest.approx(0.85)
    assert summary[2]["dice"].mean == pytest.approx(0.3)
    assert summary[2]["hd95_mm"] == Summary(mean=4, sd=None, count=1, missing=1)
    assert summary[None]["dice"].mean == pytest.approx((0.7 + 0.45) / 2)
    assert summary[None]["dice"].sd == pytest.approx(float(np.std([0.7, 0.45], ddof=1)))
    assert summary[None]["assd_mm"] == Summary(mean=3, sd=None, count=1, missing=1)


def test_summary_of_a_class_that_only_some_cases_have() -> None:
    same = Scores(1, 1, 0, 0, 0, 0)
    summary = summarise([{1: same}, {1: same, 2: same}, {}])
    assert summary[1]["dice"].count == 2
    assert summary[2]["dice"].count == 1
    assert summary[None]["dice"].count == 2
