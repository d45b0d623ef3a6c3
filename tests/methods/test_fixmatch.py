"""FixMatch: only confident pixels count, and the strongly changed image is what learns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlbseg.core.losses import confident_label, mean_cross_entropy, soft_dice_loss
from mlbseg.core.perturb import strongly_changed
from mlbseg.methods.fixmatch import FixMatch
from mlbseg.types import IGNORE, UNLABELLED, Batch

SHAPES = {2: (7, 9), 3: (5, 4, 6)}

dimensions = pytest.mark.parametrize("ndim", [2, 3])


class Net(nn.Module):
    """A convolution that keeps the last logits that have a gradient."""

    def __init__(self, ndim: int) -> None:
        super().__init__()
        self.conv = (nn.Conv2d if ndim == 2 else nn.Conv3d)(1, 3, 3, padding=1).double()
        self.logits = torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.conv(x)
        if logits.requires_grad:
            logits.retain_grad()
            self.logits = logits
        return logits


def make_batch(ndim: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    clean, image = torch.randn(2, 3, 1, *SHAPES[ndim], generator=generator, dtype=torch.float64)
    return Batch(clean[:2], (clean[:2, 0] > 0).long(), image, seed=3)


@dimensions
def test_the_loss_is_that_of_confident_pixels_and_no_other_has_a_gradient(ndim: int) -> None:
    torch.manual_seed(0)
    batch = make_batch(ndim)
    assert batch.image is not None
    net = Net(ndim)
    method = FixMatch.make(net, threshold=0.5, pseudo_weight=0.7, pseudo_loss="ce")
    losses = next(method.losses(batch, 0))
    losses["pseudo"].backward()
    with torch.no_grad():
        probability, label = net.conv(batch.image).softmax(1).max(1)
        strong = net.conv(strongly_changed(method.seeds(3, 3, 0), batch.image, 0.6))
    kept = probability >= 0.5
    assert 0.1 < kept.double().mean() < 0.9
    cost = F.cross_entropy(strong, label, reduction="none")
    torch.testing.assert_close(losses["pseudo"].detach(), 0.7 * (cost * kept).mean())
    assert float(method.monitors["kept_pseudo"]) == pytest.approx(float(kept.double().mean()))
    grad = net.logits.grad
    assert grad is not None
    assert (grad[:2] == 0).all()  # of the clean images
    own = grad[2:].abs().sum(1)
    assert (own[~kept] == 0).all()
    assert (own[kept] > 0).all()


@dimensions
def test_the_weak_image_gives_the_label_and_the_other_learns_it(ndim: int) -> None:
    torch.manual_seed(0)
    batch = make_batch(ndim)
    assert batch.image is not None
    net = Net(ndim)
    method = FixMatch.make(net, threshold=0.5)
    batch.weak = batch.image.roll(1, 2)
    with torch.no_grad():
        probability, label = net.conv(batch.weak).softmax(1).max(1)
    label = torch.where(probability < 0.5, UNLABELLED, label)
    assert torch.equal(method.label(batch), label)
    losses = next(method.losses(batch, 0))
    strong = net.conv(strongly_changed(method.seeds(3, 3, 0), batch.image, 0.6))
    expected = mean_cross_entropy(strong, label) + soft_dice_loss(strong, label)
    torch.testing.assert_close(losses["pseudo"], expected)


def test_nobody_confident_costs_nothing() -> None:
    batch = make_batch(2)
    losses = next(FixMatch.make(Net(2), threshold=1.0).losses(batch, 0))
    assert losses["pseudo"] == 0
    assert losses["clean"] > 0


def test_confident_labels_and_their_mean_cost() -> None:
    logits = torch.log(torch.tensor([[0.9, 0.1], [0.3, 0.7], [0.5, 0.5]])).T.reshape(1, 2, 3)
    label = confident_label(logits, 0.7)
    assert label.tolist() == [[0, 1, UNLABELLED]]
    assert float(mean_cross_entropy(logits, label)) == pytest.approx(
        -float(torch.tensor(0.9 * 0.7).log()) / 3, rel=1e-6
    )
    # What is beyond the scan is no part of the mean.
    label[0, 0] = IGNORE
    assert float(mean_cross_entropy(logits, label)) == pytest.approx(
        -float(torch.tensor(0.7).log()) / 2, rel=1e-6
    )
