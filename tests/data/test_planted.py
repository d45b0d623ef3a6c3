"""Planted errors are the errors they are called, repeatable, and never too small to be seen."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from blocks import blocks
from mlbseg.data.planted import CHANGED, HABITS, KINDS, kinds_for, plant_error

LABEL = blocks(0)[1].astype(np.int32)
OTHER = blocks(3, (14, 22, 19))[1].astype(np.int32)


def planted(kind: str, seed: int = 0, label: np.ndarray = LABEL) -> np.ndarray:
    other = OTHER if label.ndim == 3 else OTHER[7]
    return plant_error(
        label, kind, np.random.default_rng(seed), spacing=(2.0, 1.0, 1.0)[-label.ndim :], other=other
    )


@pytest.mark.parametrize("label", [LABEL, LABEL[5]], ids=["3D", "2D"])
@pytest.mark.parametrize("kind", [*KINDS, *HABITS])
def test_an_error_is_seen_and_repeats(kind: str, label: np.ndarray) -> None:
    before = label.copy()
    for seed in range(5):
        changed = planted(kind, seed, label)
        assert changed.shape == label.shape
        assert (changed != label).sum() >= CHANGED * (label > 0).sum()
        assert set(np.unique(changed)) <= {0, 1, 2}
        np.testing.assert_array_equal(changed, planted(kind, seed, label))
    np.testing.assert_array_equal(label, before)


def test_missing_takes_a_quarter_to_a_half_of_one_class() -> None:
    for seed in range(10):
        changed = planted("missing", seed)
        gone = [((k == LABEL) & (changed == 0)).sum() / (k == LABEL).sum() for k in (1, 2)]
        assert sorted(gone)[0] == 0
        assert 0.2 < sorted(gone)[1] < 0.55
        assert ((changed == LABEL) | (changed == 0)).all()


def test_a_leak_adds_one_piece_that_touches_its_class() -> None:
    for seed in range(10):
        changed = planted("leak", seed)
        added = changed != LABEL
        assert (LABEL[added] == 0).all()
        (value,) = np.unique(changed[added])
        assert 0.2 < added.sum() / (value == LABEL).sum() < 0.55
        assert (ndimage.binary_dilation(value == LABEL, iterations=2) & added).any()


def test_swapped_classes_keep_the_outline() -> None:
    changed = planted("swapped")
    np.testing.assert_array_equal(changed, np.array([0, 2, 1])[LABEL])
    assert kinds_for((LABEL > 0).astype(np.int32)) == [k for k in KINDS if k != "swapped"]
    assert kinds_for(LABEL) == list(KINDS)


def test_another_scans_label_lies_where_this_ones_did() -> None:
    changed = planted("wrong-scan")
    for axis in range(3):
        middles = [np.argwhere(array)[:, axis].mean() for array in (LABEL, changed)]
        assert abs(middles[0] - middles[1]) < 1


def test_habits_are_the_same_in_every_case() -> None:
    thin, short = planted("thin"), planted("short")
    np.testing.assert_array_equal(thin > 0, ndimage.binary_erosion(LABEL > 0))
    np.testing.assert_array_equal(thin[thin > 0], LABEL[thin > 0])
    kept = np.flatnonzero(short.any((1, 2)))
    np.testing.assert_array_equal(short[: kept[-1] + 1], LABEL[: kept[-1] + 1])
    assert 0.05 < 1 - (short > 0).sum() / (LABEL > 0).sum() <= 0.25


@pytest.mark.parametrize(
    ("kind", "label", "message"),
    [
        ("leek", LABEL, "unknown kind of error 'leek': use one of missing"),
        ("missing", np.zeros((4, 4), np.int32), "empty label"),
        ("swapped", (LABEL > 0).astype(np.int32), "no two to swap"),
        ("shift", np.ones((2, 2), np.int32), "too small"),
    ],
)
def test_what_cannot_be_planted_is_refused(kind: str, label: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planted(kind, label=label)
    with pytest.raises(ValueError, match="another scan's label"):
        plant_error(LABEL, "wrong-scan", np.random.default_rng(0), spacing=(1.0, 1.0, 1.0))
