"""Views against per-pixel loops: what moves where, what was seen, and that the way back is the inverse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mlbseg.core.views import ZOOM, Views, draw_views
from mlbseg.types import IGNORE
from oracles import affine_loops

SHAPES = [(7, 10), (5, 4, 6)]  # non-cubic, odd and even
KINDS = ("zoom-in", "zoom-out", "zoom-out", "flip")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seeds(batch: int, seed: int) -> list[int]:
    return [1000 * seed + b for b in range(batch)]


def drawn(shape: tuple[int, ...], batch: int = 2, seed: int = 0) -> Views:
    """Return the paper's views, with zooms strong enough to matter on a small grid, in float64."""
    views = draw_views(seeds(batch, seed), len(shape), KINDS, zoom=(0.1, 0.3))
    return Views(views.matrix.double())


def skewed(shape: tuple[int, ...]) -> Views:
    """Return one image's identity and two maps that turn, shear and shift it, as no drawn view does."""
    n = len(shape)
    matrix = torch.zeros(3, 1, n, n + 1, dtype=torch.float64)
    matrix[..., range(n), range(n)] = 1
    matrix[1:, 0] += 0.4 * torch.randn(2, n, n + 1, generator=seeded(1), dtype=torch.float64)
    return Views(matrix)


def smooth_field(shape: tuple[int, ...]) -> Tensor:
    """Return (1, 1, *S), half a wave along each axis with another phase."""
    field = torch.zeros((), dtype=torch.float64)
    for axis, n in enumerate(shape):
        wave = torch.sin(math.pi * (torch.arange(n, dtype=torch.float64) + 0.5) / n + axis)
        field = field.unsqueeze(-1) + wave
    return field[None, None]


both_kinds = pytest.mark.parametrize("make", [drawn, skewed])
both_shapes = pytest.mark.parametrize("shape", SHAPES)


@both_shapes
def test_the_first_view_is_the_image_itself(shape: tuple[int, ...]) -> None:
    views = drawn(shape)
    image = torch.randn(2, 3, *shape, dtype=torch.float64)
    label = torch.randint(-1, 4, (2, *shape))
    assert torch.equal(views.expand(image)[:2], image)
    assert torch.equal(views.expand_label(label)[:2], label)
    aligned, seen = views.align(views.expand(image))
    assert torch.equal(aligned[0], image)
    assert torch.equal(seen[0], torch.ones_like(seen[0]))
    assert torch.equal(views.valid(shape)[:2], torch.ones(2, 1, *shape, dtype=torch.float64))


@both_kinds
@both_shapes
def test_images_move_as_the_loop_moves_them(make, shape: tuple[int, ...]) -> None:
    views = make(shape)
    batch = views.matrix.shape[1]
    image = torch.randn(batch, 2, *shape, dtype=torch.float64)
    found = views.expand(image).unflatten(0, (len(views), batch))
    for v in range(len(views)):
        for b in range(batch):
            slow = affine_loops.linear(image[b].numpy(), views.matrix[v, b].numpy())
            np.testing.assert_allclose(found[v, b].numpy(), slow, rtol=0, atol=1e-12)


@both_kinds
@both_shapes
def test_labels_take_the_nearest_pixel_and_are_ignored_outside(make, shape: tuple[int, ...]) -> None:
    views = make(shape)
    batch = views.matrix.shape[1]
    label = torch.randint(0, 5, (batch, *shape))
    found = views.expand_label(label)
    assert found.dtype == torch.int64
    # Where a view looks past the image, and only there, nothing is known.
    assert torch.equal(found == IGNORE, views.valid(shape).squeeze(1) == 0)
    assert (found == IGNORE).any()
    found = found.unflatten(0, (len(views), batch))
    for v in range(len(views)):
        for b in range(batch):
            slow = affine_loops.nearest(label[b].numpy(), views.matrix[v, b].numpy(), IGNORE)
            assert np.array_equal(found[v, b].numpy(), slow)


@both_kinds
@both_shapes
def test_what_is_valid_and_what_was_seen(make, shape: tuple[int, ...]) -> None:
    views = make(shape)
    batch = views.matrix.shape[1]
    valid = views.valid(shape).unflatten(0, (len(views), batch))
    _, seen = views.align(torch.zeros(len(views) * batch, 1, *shape, dtype=torch.float64))
    assert valid.shape == seen.shape == (len(views), batch, 1, *shape)
    assert not valid.all()
    assert not seen.all()
    for v in range(len(views)):
        for b in range(batch):
            matrix = views.matrix[v, b].numpy()
            assert np.array_equal(valid[v, b, 0].numpy(), affine_loops.inside(matrix, shape))
            back = affine_loops.inverse(matrix)
            assert np.array_equal(seen[v, b, 0].numpy(), affine_loops.inside(back, shape))


@both_kinds
@both_shapes
def test_predictions_come_back_as_the_loop_brings_them(make, shape: tuple[int, ...]) -> None:
    views = make(shape)
    batch = views.matrix.shape[1]
    prediction = torch.randn(len(views) * batch, 2, *shape, dtype=torch.float64)
    aligned, _ = views.align(prediction)
    prediction = prediction.unflatten(0, (len(views), batch))
    for v in range(len(views)):
        for b in range(batch):
            back = affine_loops.inverse(views.matrix[v, b].numpy())
            slow = affine_loops.linear(prediction[v, b].numpy(), back)
            np.testing.assert_allclose(aligned[v, b].numpy(), slow, rtol=0, atol=1e-11)


@both_shapes
def test_a_flip_turns_the_axis_asked_for_and_comes_back_exactly(shape: tuple[int, ...]) -> None:
    image = torch.randn(2, 2, *shape)
    label = torch.randint(-1, 3, (2, *shape))
    for axis in range(len(shape)):
        views = draw_views(seeds(2, 0), len(shape), ("flip",), flip_axes=(axis,))
        moved = views.expand(image)
        torch.testing.assert_close(moved[2:], image.flip(axis + 2), rtol=0, atol=1e-5)
        assert torch.equal(views.expand_label(label)[2:], label.flip(axis + 1))
        aligned, seen = views.align(moved)
        torch.testing.assert_close(aligned[1], image, rtol=0, atol=1e-5)
        assert seen.all()
        assert views.valid(shape).all()


@pytest.mark.parametrize("shape", [(40, 56), (24, 32, 28)])
def test_align_undoes_expand_on_smooth_fields_where_seen(shape: tuple[int, ...]) -> None:
    field = smooth_field(shape)
    for seed in range(4):
        views = draw_views(seeds(1, seed), len(shape), KINDS)
        aligned, seen = views.align(views.expand(field))
        error = ((aligned - field) * seen).abs().amax()
        # At the rim of a view the border repeats: half a pixel of the steepest slope, π / 24 per axis.
        assert error < 0.5 * len(shape) * math.pi / min(shape)
        inner = (slice(None),) * 3 + tuple(slice(n // 4, -(n // 4)) for n in shape)
        assert ((aligned - field) * seen)[inner].abs().amax() < 0.01
        # Left where they are, the views differ by far more.
        assert (views.expand(field) - field)[1:][inner[1:]].abs().amax() > 0.1


def test_draws_depend_on_the_generator_alone() -> None:
    torch.manual_seed(0)
    first = draw_views(seeds(3, 5), 3, KINDS).matrix
    state = torch.get_rng_state()
    torch.manual_seed(1)
    second = draw_views(seeds(3, 5), 3, KINDS).matrix
    assert torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)  # the global stream was not touched
    assert not torch.equal(first, draw_views(seeds(3, 6), 3, KINDS).matrix)
    # Each image of the batch draws its own.
    assert not torch.equal(first[1, 0], first[1, 1])


def test_zooms_stay_in_their_range_and_flips_on_their_axes() -> None:
    views = draw_views(seeds(200, 0), 3, KINDS, flip_axes=(0, 2))
    scales = views.matrix[..., range(3), range(3)]
    low, high = ZOOM
    assert ((scales[1] >= 1 - 2 * high) & (scales[1] <= 1 - 2 * low)).all()
    assert ((scales[2:4] >= 1 + 2 * low) & (scales[2:4] <= 1 + 2 * high)).all()
    assert scales[1].amax() - scales[1].amin() > 0.8 * 2 * (high - low)
    # Coordinates run x, y, z: array axes 0 and 2 are the last and the first; axis 1 is never turned.
    subsets = {tuple(s) for s in scales[4].tolist()}
    assert subsets == {(1.0, 1.0, -1.0), (-1.0, 1.0, 1.0), (-1.0, 1.0, -1.0)}
    everywhere = draw_views(seeds(200, 0), 2, ("flip",)).matrix[1][:, range(2), range(2)]
    assert {tuple(s) for s in everywhere.tolist()} == {(1.0, -1.0), (-1.0, 1.0), (-1.0, -1.0)}


@both_shapes
def test_a_batch_is_the_same_as_its_images_one_by_one(shape: tuple[int, ...]) -> None:
    views = drawn(shape, batch=3)
    image = torch.randn(3, 2, *shape, dtype=torch.float64)
    label = torch.randint(-1, 3, (3, *shape))
    prediction = torch.rand(len(views) * 3, 4, *shape, dtype=torch.float64)
    by_view = prediction.unflatten(0, (len(views), 3))
    aligned, seen = views.align(prediction)
    for b in range(3):
        alone = Views(views.matrix[:, b : b + 1])
        mine = slice(b, None, 3)  # view-major: entry v * B + b
        torch.testing.assert_close(views.expand(image)[mine], alone.expand(image[b : b + 1]))
        assert torch.equal(views.expand_label(label)[mine], alone.expand_label(label[b : b + 1]))
        assert torch.equal(views.valid(shape)[mine], alone.valid(shape))
        one, one_seen = alone.align(by_view[:, b])
        torch.testing.assert_close(aligned[:, b : b + 1], one)
        assert torch.equal(seen[:, b : b + 1], one_seen)
        assert torch.equal(views.pseudo_label(prediction)[b : b + 1], alone.pseudo_label(by_view[:, b]))


@both_shapes
def test_without_further_views_all_is_left_as_it_is(shape: tuple[int, ...]) -> None:
    views = draw_views(seeds(2, 0), len(shape), ())
    assert len(views) == 1
    image = torch.randn(2, 3, *shape)
    assert torch.equal(views.expand(image), image)
    aligned, seen = views.align(image)
    assert torch.equal(aligned, image.unsqueeze(0))
    assert seen.all()
    assert torch.equal(views.pseudo_label(image), image.argmax(1))


@both_shapes
def test_without_further_views_labels_are_left_as_they_are(shape: tuple[int, ...]) -> None:
    views = draw_views(seeds(2, 0), len(shape), ())
    label = torch.randint(-1, 3, (2, *shape))
    assert torch.equal(views.expand_label(label), label)


@both_shapes
def test_gradients_flow_through_align(shape: tuple[int, ...]) -> None:
    small = tuple(n - 2 for n in shape)
    views = drawn(small, batch=1)
    prediction = torch.randn(len(views), 1, *small, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: views.align(p)[0], prediction)
    aligned, seen = views.align(prediction)
    (aligned * seen).square().sum().backward()
    # Every view has its say.
    assert (prediction.grad.flatten(1).abs().sum(1) > 0).all()


@both_kinds
@both_shapes
def test_pseudo_labels_equal_the_loop(make, shape: tuple[int, ...]) -> None:
    views = make(shape)
    batch = views.matrix.shape[1]
    prediction = torch.rand(len(views) * batch, 4, *shape, generator=seeded(2), dtype=torch.float64)
    found = views.pseudo_label(torch.softmax(5 * prediction, 1))
    assert found.dtype == torch.int64
    by_view = torch.softmax(5 * prediction, 1).unflatten(0, (len(views), batch))
    for b in range(batch):
        slow = affine_loops.pseudo_label(by_view[:, b].numpy(), views.matrix[:, b].numpy())
        assert np.array_equal(found[b].numpy(), slow)
    assert not torch.equal(found, by_view[0].argmax(1))  # the other views did change something


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="'rotate': use zoom-in, zoom-out or flip"):
        draw_views(seeds(1, 0), 2, ("rotate",))


@both_shapes
def test_autocast_moves_no_pixel(shape: tuple[int, ...]) -> None:
    views = drawn(shape, batch=2)
    image, label = torch.randn(2, 3, *shape), torch.randint(0, 3, (2, *shape))

    def everything() -> list[torch.Tensor]:
        x = views.expand(image)
        return [x, views.expand_label(label), views.valid(shape), *views.align(x)]

    exact = everything()
    with torch.autocast("cpu", torch.bfloat16):
        fast = everything()
    for a, b in zip(exact, fast, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
