"""Augmentation: seeded by the call alone, image and label together, nothing moved that should stay."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from blocks import UNCHANGED
from mlbseg.data.augment import Augment

SHAPES = {2: (32, 40), 3: (20, 24, 28)}
dimensions = pytest.mark.parametrize("ndim", [2, 3])


def blobs(ndim: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a smooth image (2, *S) and what lies above its threshold (*S); channel 1 is channel 0 doubled."""
    noise = np.random.default_rng(ndim).normal(size=SHAPES[ndim])
    field = gaussian_filter(noise, 4)
    field = (field / np.abs(field).max()).astype(np.float32)
    return np.stack([field, 2 * field]), (field > 0.1).astype(np.int64)


@dimensions
def test_the_seed_alone_decides(ndim: int) -> None:
    image, label = blobs(ndim)
    every: dict[str, Any] = {**dict.fromkeys(UNCHANGED, 1.0), "elastic": 0.5}
    first, second = (Augment.make(ndim, flip_axes=range(ndim), **every) for _ in range(2))
    np.random.seed(0)
    torch.manual_seed(0)
    expected = [first(image, label, seed) for seed in (3, 4, 2**32 - 1)]
    np.random.seed(1)
    torch.manual_seed(1)
    states = np.random.get_state()[1].copy(), torch.get_rng_state()
    # The other instance, in the other order, after other calls.
    for seed, (x, y) in reversed(list(zip((3, 4, 2**32 - 1), expected, strict=True))):
        second(image, label, 17)
        again = second(image, label, seed)
        assert torch.equal(again[0], x)
        assert torch.equal(again[1], y)
    assert np.array_equal(np.random.get_state()[1], states[0])
    assert torch.equal(torch.get_rng_state(), states[1])
    for (x, _), (other, _) in itertools.combinations(expected, 2):
        assert not torch.equal(x, other)


@dimensions
def test_tensors_are_plain_and_inputs_untouched(ndim: int) -> None:
    image, label = blobs(ndim)
    kept = image.copy(), label.copy()
    for settings in (UNCHANGED, {**UNCHANGED, "affine": 1.0, "noise": 1.0, "intensity": 1.0}):
        x, y = Augment.make(ndim, flip_axes=(0,), **settings)(image, label, 5)
        assert type(x) is type(y) is torch.Tensor
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
        assert (x.shape, y.shape) == (image.shape, label.shape)
        assert np.array_equal(image, kept[0])
        assert np.array_equal(label, kept[1])


@dimensions
def test_with_everything_off_nothing_changes(ndim: int) -> None:
    image, label = blobs(ndim)
    x, y = Augment.make(ndim, **UNCHANGED)(image, label, 1)
    assert np.array_equal(x.numpy(), image)
    assert np.array_equal(y.numpy(), label)


@dimensions
@pytest.mark.parametrize("change", ["affine", "elastic", "flips"])
def test_image_label_and_channels_move_together(ndim: int, change: str) -> None:
    image, label = blobs(ndim)
    settings = UNCHANGED if change == "flips" else {**UNCHANGED, change: 1.0}
    augment = Augment.make(ndim, flip_axes=range(ndim) if change == "flips" else (), **settings)
    moved = 0.0
    for seed in range(6):
        x, y = augment(image, label, seed)
        # Where the image says so the label must say so, but for pixels that interpolation left on the fence.
        clear = (x[0] - 0.1).abs() > 0.05
        assert ((x[0] > 0.1) == (y == 1))[clear].float().mean() > 0.99
        torch.testing.assert_close(x[1], 2 * x[0], rtol=1e-4, atol=1e-4)
        assert set(y.unique().tolist()) <= {0, 1}
        moved = max(moved, float((y.numpy() != label).mean()))
    assert moved > 0.02


@dimensions
def test_unknown_pixels_move_along_and_keep_their_mark(ndim: int) -> None:
    image, label = blobs(ndim)
    label[label == 1] = -1
    label[0] = 3
    for seed in range(4):
        x, y = Augment.make(ndim, **{**UNCHANGED, "affine": 1.0})(image, label, seed)
        assert set(y.unique().tolist()) <= {-1, 0, 3}
        inner = (y != 3) & ((x[0] - 0.1).abs() > 0.05)
        assert ((x[0] > 0.1) == (y == -1))[inner].float().mean() > 0.98


@dimensions
@pytest.mark.parametrize("change", ["intensity", "gamma", "invert", "blur", "low_resolution", "noise"])
def test_changes_of_grey_values_leave_the_label_alone(ndim: int, change: str) -> None:
    image, label = blobs(ndim)
    x, y = Augment.make(ndim, **{**UNCHANGED, change: 1.0})(image, label, 2)
    assert np.array_equal(y.numpy(), label)
    assert not np.allclose(x.numpy(), image, atol=1e-3)
    assert torch.isfinite(x).all()
    # The picture is still the same picture.
    assert np.corrcoef(x[0].numpy().ravel(), image[0].ravel())[0, 1] > 0.8


@pytest.mark.parametrize(("ndim", "axes"), [(2, (1,)), (3, (0, 2)), (3, ())])
def test_flips_happen_on_the_allowed_axes_only(ndim: int, axes: tuple[int, ...]) -> None:
    image, label = blobs(ndim)
    subsets = [s for n in range(len(axes) + 1) for s in itertools.combinations(axes, n)]
    seen = set()
    augment = Augment.make(ndim, flip_axes=axes, **UNCHANGED)
    for seed in range(30):
        x, y = augment(image, label, seed)
        (subset,) = (s for s in subsets if np.array_equal(x.numpy(), np.flip(image, [a + 1 for a in s])))
        assert np.array_equal(y.numpy(), np.flip(label, subset))
        seen.add(subset)
    assert seen == set(subsets)


@dimensions
def test_the_range_of_rotation_and_scale_is_kept(ndim: int) -> None:
    image, label = blobs(ndim)
    x, y = Augment.make(ndim, rotate=0.0, scale=0.0, **{**UNCHANGED, "affine": 1.0})(image, label, 3)
    np.testing.assert_allclose(x.numpy(), image, atol=1e-4)
    assert np.array_equal(y.numpy(), label)


def test_structures_shrink_as_much_as_they_grow() -> None:
    label = np.zeros((96, 96), np.int64)
    label[32:64, 32:64] = 1
    augment = Augment.make(2, rotate=0.0, scale=0.4, **{**UNCHANGED, "affine": 1.0})
    sides = []
    for seed in range(200):
        _, y = augment(label[None].astype(np.float32), label, seed)
        sides.append(int(y.any(1).sum()) / 32)
    assert 1 / 1.4 - 0.05 < min(sides) < 0.8
    assert 1.3 < max(sides) < 1.4 + 0.05


@pytest.mark.parametrize(
    ("ndim", "axes", "turned"), [(2, (0, 1), True), (2, (), False), (2, (1,), False), (3, (1, 2), False)]
)
def test_only_images_without_a_pose_are_turned_upside_down(
    ndim: int, axes: tuple[int, ...], turned: bool
) -> None:
    rod = np.zeros((48, 48) if ndim == 2 else (48, 48, 48), np.int64)
    rod[(slice(22, 26),) * (ndim - 1) + (slice(8, 40),)] = 1  # along the last axis
    augment = Augment.make(ndim, scale=0.0, flip_axes=axes, **{**UNCHANGED, "affine": 1.0})
    upright = False
    for seed in range(20):
        _, y = augment(rod[None].astype(np.float32), rod, seed)
        (upper, lower) = (np.ptp(np.nonzero(y.numpy())[axis]) for axis in (-1, -2))
        upright |= bool(lower > 2 * upper)
    assert upright == turned
