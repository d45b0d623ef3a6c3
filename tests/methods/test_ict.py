"""Interpolation consistency: who is mixed with whom, how much, and towards what."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from methods.small import conv_net, make_batch
from mlbseg.core.losses import prediction_distance
from mlbseg.core.ranks import Ranks
from mlbseg.methods.ict import ICT

dimensions = pytest.mark.parametrize("ndim", [2, 3])


def make_method(ndim: int, share: list[float] | None = None) -> ICT:
    """Return the method, its teacher unlike the student, with these shares if any."""
    method = ICT.make(conv_net(ndim), consistency_weight=2.0)
    with torch.no_grad():
        for p in method.teacher.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    if share is not None:
        method._shares = lambda image, seed: image.new_tensor(share)  # type: ignore[method-assign]
    return method


def term(method: ICT, ndim: int, others: int = 3) -> tuple[float, Tensor]:
    batch = make_batch(ndim, others=others)
    [losses] = method.losses(batch, 5)
    assert batch.image is not None
    return losses["teacher"].item(), batch.image


@dimensions
@pytest.mark.parametrize(("share", "order"), [(1.0, [0, 1, 2]), (0.0, [1, 0, 2])])
def test_a_share_of_one_is_the_image_and_of_zero_its_neighbour(
    ndim: int, share: float, order: list[int]
) -> None:
    method = make_method(ndim, [share] * 3)
    seen: list[Tensor] = []
    method.student.register_forward_hook(lambda module, inputs, z: seen.append(inputs[0][-3:]))
    found, image = term(method, ndim)
    torch.testing.assert_close(seen[0], image[order], rtol=0, atol=0)
    logits, taught = (net(image[order]) for net in (method.student, method.teacher))
    expected = 2 * prediction_distance(logits, taught, torch.ones_like(logits[:, :1]))
    assert found == pytest.approx(expected.item(), rel=1e-9)


@dimensions
@pytest.mark.parametrize("others", [1, 4, 5])
def test_the_distance_equals_a_loop_over_images(ndim: int, others: int) -> None:
    method = make_method(ndim)
    found, image = term(method, ndim, others)
    total = count = 0.0
    for i in range(others):
        j = i + 1 if i % 2 == 0 else i - 1
        j = i if j == others else j
        share = float(method._shares(image, 3)[i])
        assert 0 <= share <= 1
        assert share == float(method._shares(image, 3)[i - i % 2])  # both of a pair alike
        mixed = share * image[i] + (1 - share) * image[j]
        p, q = (torch.softmax(method.teacher(x[None]), 1) for x in (image[i], image[j]))
        difference = torch.softmax(method.student(mixed[None]), 1) - (share * p + (1 - share) * q)
        total += difference.square().sum().item()
        count += difference.numel()
    assert found == pytest.approx(2 * total / count, rel=1e-9)


def test_pairs_draw_shares_of_their_own_by_their_place_in_the_whole_batch() -> None:
    method = make_method(2)
    image = torch.zeros(8, 1, 2, 2, dtype=torch.float64)
    whole = method._shares(image, 11)
    assert len(whole[::2].unique()) == 4
    assert not torch.equal(method._shares(image, 12), whole)
    parts = []
    for index in range(2):
        method.ranks = Ranks(index, 2)
        parts.append(method._shares(image[:4], 11))
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize(("alpha", "sd"), [(0.2, 0.423), (1.0, 0.289), (50.0, 0.0498)])
def test_shares_are_of_the_beta_distribution(alpha: float, sd: float) -> None:
    method = ICT.make(conv_net(2), alpha=alpha)
    drawn = method._shares(torch.zeros(2000, 1, 1, 1, dtype=torch.float64), 0)[::2]
    assert drawn.mean().item() == pytest.approx(0.5, abs=4 * sd / 1000**0.5)
    assert drawn.std().item() == pytest.approx(sd, rel=0.1)  # 1 / (2 sqrt(2 α + 1))


def test_no_gradient_reaches_the_teacher_and_its_statistics_stay() -> None:
    method = ICT.make(conv_net(2, batch_norm=True)).train()
    before = copy.deepcopy(method.teacher.state_dict())
    [losses] = method.losses(make_batch(2), 1)
    losses["teacher"].backward()
    assert all(p.grad is None for p in method.teacher.parameters())
    assert all(torch.equal(before[k], v) for k, v in method.teacher.state_dict().items())
