"""Random changes: each image's are its own, and each is what it says, against scipy and loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from mlbseg.core.perturb import blurred, boxes, jittered, noisy, normal, strongly_changed, uniform

SHAPES = [(9, 7), (5, 6, 4)]
both_shapes = pytest.mark.parametrize("shape", SHAPES)
CHANGES: dict[str, Callable[[Sequence[int], Tensor], Tensor]] = {
    "normal": lambda seeds, x: normal(seeds, x.shape[1:], x),
    "uniform": lambda seeds, x: uniform(seeds, x.shape[1:], x),
    "noisy": lambda seeds, x: noisy(seeds, x, 0.3),
    "jittered": lambda seeds, x: jittered(seeds, x, 0.6),
    "strongly changed": lambda seeds, x: strongly_changed(seeds, x, 0.6),
    "boxes": lambda seeds, x: boxes(seeds, x, (0.1, 0.5)),
}
changes = pytest.mark.parametrize("change", CHANGES)


def images(count: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 2, *shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


# --- seeds ------------------------------------------------------------------------------------------------


@both_shapes
@changes
def test_what_an_image_sees_does_not_depend_on_its_place_in_the_batch(
    change: str, shape: tuple[int, ...]
) -> None:
    image, seeds = images(5, shape), [31, 7, 400, 2**32 - 1, 8]
    whole = CHANGES[change](seeds, image)
    assert len(whole) == 5
    for i, seed in enumerate(seeds):
        assert torch.equal(CHANGES[change]([seed], image[i : i + 1])[0], whole[i])
    order = [3, 0, 4]
    torch.manual_seed(5)  # the global stream must not matter
    assert torch.equal(CHANGES[change]([seeds[i] for i in order], image[order]), whole[order])


@both_shapes
@changes
def test_another_seed_changes_another_way(change: str, shape: tuple[int, ...]) -> None:
    image = images(1, shape).expand(2, -1, *shape)
    one, other = CHANGES[change]([1, 4], image)
    assert not torch.equal(one, other)


@both_shapes
@pytest.mark.parametrize("change", [name for name in CHANGES if name != "boxes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_keep_their_type(change: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert CHANGES[change]([1, 2], images(2, shape, dtype)).dtype == dtype


# --- intensities ------------------------------------------------------------------------------------------


def test_noise_has_the_given_sd_and_uniform_numbers_their_range() -> None:
    image = images(2, (60, 60))
    noise = noisy([1, 2], image, 0.3) - image
    assert noise.std().item() == pytest.approx(0.3, rel=0.05)
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert torch.equal(noisy([1, 2], image, 0.0), image)
    drawn = uniform([1, 2], (60, 60), image)
    assert 0 <= drawn.min() < 0.01
    assert 0.99 < drawn.max() < 1


@both_shapes
def test_jitter_is_affine_in_each_channel_and_bounded(shape: tuple[int, ...]) -> None:
    seeds, strength = list(range(40)), 0.3
    image = images(40, shape)
    shift = jittered(seeds, torch.zeros_like(image), strength)
    factor = jittered(seeds, torch.ones_like(image), strength) - shift
    torch.testing.assert_close(jittered(seeds, image, strength), factor * image + shift)
    for drawn, centre in ((shift, 0.0), (factor, 1.0)):
        per_channel = drawn.flatten(2)
        torch.testing.assert_close(per_channel, per_channel[..., :1].expand_as(per_channel))
        values = per_channel[..., 0] - centre
        assert len(values.unique()) == values.numel()  # each channel has its own
        assert 0.8 * strength < values.abs().max() <= strength
        assert values.min() < 0 < values.max()
    assert torch.equal(jittered(seeds, image, 0.0), image)


@pytest.mark.parametrize("shape", [*SHAPES, (1, 1), (2, 3), (1, 5, 2), (20, 18)])
@pytest.mark.parametrize("sigma", [0.3, 0.7, 1.0, 2.0])
def test_blur_is_that_of_scipy(shape: tuple[int, ...], sigma: float) -> None:
    image = images(2, shape)
    found = blurred(image, image.new_tensor([sigma, sigma / 2]))
    for one, before, own in zip(found, image, (sigma, sigma / 2), strict=True):
        for channel, source in zip(one, before, strict=True):
            expected = gaussian_filter(source.numpy(), own, mode="nearest", radius=4)
            np.testing.assert_allclose(channel.numpy(), expected, rtol=1e-10, atol=1e-12)


@both_shapes
def test_no_blur_is_the_image(shape: tuple[int, ...]) -> None:
    image = images(2, shape)
    assert torch.equal(blurred(image, image.new_zeros(2)), image)
    half = blurred(image, image.new_tensor([0.0, 1.0]))
    assert torch.equal(half[0], image[0])
    assert not torch.allclose(half[1], image[1])


@both_shapes
def test_half_of_the_strongly_changed_images_are_blurred(shape: tuple[int, ...]) -> None:
    count = 200
    point = torch.zeros(count, 1, *shape, dtype=torch.float64)
    centre = (slice(None), 0, *(n // 2 for n in shape))
    point[centre] = 1e6  # next to which noise and shift are nothing
    seen = strongly_changed(list(range(count)), point, 0.0)
    kept = seen[centre] / 1e6
    sharp = (kept > 0.999).double().mean().item()
    # Next to half, and those that are blurred by a fraction of a pixel.
    assert 0.4 < sharp < 0.75
    assert kept.max() < 1 + 1e-5


# --- boxes ------------------------------------------------------------------------------------------------


def extent(mask: Tensor) -> tuple[list[int], list[int]]:
    """Return the first index and the length on each axis of the box that holds all that is True."""
    places = mask.nonzero()
    first = places.min(0).values
    return first.tolist(), (places.max(0).values - first + 1).tolist()


@pytest.mark.parametrize("shape", [(40, 30), (20, 16, 24)])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.9])
def test_a_box_is_one_box_of_the_share(shape: tuple[int, ...], share: float) -> None:
    masks = boxes(range(20), torch.zeros(20, 2, *shape), share)
    assert masks.shape == (20, 1, *shape)
    assert masks.dtype == torch.bool
    starts = []
    for mask in masks[:, 0]:
        start, lengths = extent(mask)
        assert mask.sum() == np.prod(lengths)  # no hole, and nothing outside
        assert lengths == [round(share ** (1 / len(shape)) * n) for n in shape]
        assert mask.double().mean().item() == pytest.approx(share, rel=0.15)
        starts.append(start)
    if share < 0.9:
        assert len({tuple(start) for start in starts}) > 10
    for axis, n in enumerate(shape):  # every place can be had, the first and the last too
        assert min(s[axis] for s in starts) <= (n - lengths[axis]) // 3
        assert max(s[axis] for s in starts) >= (n - lengths[axis]) * 2 // 3


def test_boxes_reach_both_ends_and_no_further() -> None:
    masks = boxes(range(300), torch.zeros(300, 1, 6, 6), 0.25)[:, 0]
    starts = {tuple(extent(mask)[0]) for mask in masks}
    assert starts == {(i, j) for i in range(4) for j in range(4)}


@both_shapes
def test_the_share_of_a_range_is_drawn_for_each_image(shape: tuple[int, ...]) -> None:
    big = tuple(6 * n for n in shape)
    shares = boxes(range(100), torch.zeros(100, 1, *big), (0.1, 0.5)).double().flatten(1).mean(1)
    assert 0.08 < shares.min() < 0.15
    assert 0.45 < shares.max() < 0.55
    assert shares.mean().item() == pytest.approx(0.3, abs=0.04)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 3, 2)])
def test_a_box_is_never_empty(shape: tuple[int, ...]) -> None:
    image = torch.zeros(3, 1, *shape)
    assert boxes([1, 2, 3], image, 0.001).flatten(1).sum(1).tolist() == [1, 1, 1]
    assert boxes([1, 2, 3], image, 1.0).all()
