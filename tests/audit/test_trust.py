"""Trust from probabilities, alignments and class thresholds, against slow versions."""

from __future__ import annotations

import numpy as np
import pytest

from mlbseg.apps.audit.trust import (
    WAYS,
    alignment_trust,
    class_thresholds,
    confident_trust,
    disagreement_trust,
    of_label,
    regional_trust,
)

RNG = np.random.default_rng(0)


def drawn(shape: tuple[int, ...] = (5, 6), classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    logits = RNG.normal(size=(classes, *shape))
    probability = np.exp(logits) / np.exp(logits).sum(0)
    return probability.astype(np.float32), RNG.integers(0, classes, shape)


def test_trust_equals_a_loop_over_voxels() -> None:
    probability, label = drawn()
    thresholds = np.array([0.9, 0.5, 0.3])
    plain, confident = disagreement_trust(probability, label), confident_trust(probability, label, thresholds)
    for place in np.ndindex(label.shape):
        for found, p in ((plain, probability[:, *place]), (confident, probability[:, *place] / thresholds)):
            own = p[label[place]]
            rival = max(p[k] for k in range(3) if k != label[place])
            assert found[place] == pytest.approx(own / (own + rival), rel=1e-5)
    assert ((plain < 0.5) == (probability.argmax(0) != label)).all()
    np.testing.assert_array_equal(of_label(probability, label).shape, label.shape)


def test_thresholds_are_the_mean_of_each_class_over_all_scans() -> None:
    scans = [drawn(), drawn((3, 3, 3))]
    found = class_thresholds(iter(scans), 4)
    for k in range(3):
        own = np.concatenate([p[k][y == k] for p, y in scans])
        assert found[k] == pytest.approx(own.mean(), rel=1e-5)
    assert found[3] == 1  # nowhere labelled


def test_regional_trust_forgives_a_voxel_and_keeps_a_region() -> None:
    probability = np.zeros((2, 15, 15), np.float32)
    probability[0] = 0.9
    probability[1] = 0.1
    label = np.zeros((15, 15), int)
    label[2, 2] = 1  # a lone voxel
    label[8:12, 8:12] = 1
    plain, regional = disagreement_trust(probability, label), regional_trust(probability, label)
    assert plain[2, 2] == pytest.approx(0.1, abs=1e-6)
    assert regional[2, 2] > 0.5
    assert (regional[9:11, 9:11] < 0.5).all()
    assert regional.min() >= plain.min()


def test_alignment_is_a_half_where_it_says_nothing() -> None:
    found = alignment_trust(np.array([0.0, 2.0, -2.0, 1e9, -1e9], np.float32), 2.0)
    np.testing.assert_allclose(found, [0.5, 0.7310586, 0.2689414, 1, 0], atol=1e-6)
    assert np.isfinite(alignment_trust(np.zeros(3, np.float32), 0.0)).all()


def test_the_default_comes_first() -> None:
    assert next(iter(WAYS)) == "regional"
