"""UniMatch: labels move with the boxes, and each kind of change has its share of the loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlbseg.core.features import channels_dropped
from mlbseg.core.losses import supervised_loss
from mlbseg.core.perturb import boxes
from mlbseg.methods.unimatch import UniMatch
from mlbseg.types import Batch

SHAPES = {2: (10, 12), 3: (6, 8, 7)}

dimensions = pytest.mark.parametrize("ndim", [2, 3])
counts = pytest.mark.parametrize("count", [1, 2, 3, 4])


def net(ndim: int) -> nn.Sequential:
    conv = nn.Conv2d if ndim == 2 else nn.Conv3d
    torch.manual_seed(0)
    return nn.Sequential(conv(1, 6, 3, padding=1), nn.SiLU(), conv(6, 3, 1)).double()


def make_batch(ndim: int, count: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    clean, image = (
        torch.randn(n, 1, *SHAPES[ndim], generator=generator, dtype=torch.float64) for n in (2, count)
    )
    return Batch(clean, (clean[:, 0] > 0).long(), image, seed=3)


@dimensions
@counts
@pytest.mark.parametrize("mix", [0.0, 0.5, 1.0])
def test_a_box_takes_its_labels_with_it(ndim: int, count: int, mix: float) -> None:
    batch = make_batch(ndim, count)
    assert batch.image is not None
    method = UniMatch.make(net(ndim), mix=mix, strength=0.3)
    label = torch.randint(-1, 3, (count, *SHAPES[ndim]), generator=torch.Generator().manual_seed(2))
    mixed, labels = method._mixed(batch.image, label, 3, 1)
    strong = method.changed(batch.image, 3, 1)
    box = boxes(method.seeds(count, 3, 11), batch.image, (0.02, 0.4))
    with_box = 0
    for image in range(count):
        neighbour = min(image ^ 1, count - 1)
        own = torch.equal(mixed[image], strong[image])
        with_box += not own
        for i in np.ndindex(*SHAPES[ndim]):
            source = image if own or not box[(image, 0, *i)] else neighbour
            assert mixed[(image, 0, *i)] == strong[(source, 0, *i)]
            if source != image or neighbour != image:
                assert labels[(image, *i)] == label[(source, *i)]
    expected = count - count % 2  # the last of an odd number is mixed with itself
    assert with_box == {0.0: 0, 1.0: expected}.get(mix, with_box)
    assert with_box <= expected


@dimensions
def test_losses_are_those_of_four_passes(ndim: int) -> None:
    batch = make_batch(ndim, 4)
    assert batch.image is not None
    student = net(ndim)
    method = UniMatch.make(student, threshold=0.4, pseudo_weight=0.8, pseudo_loss="ce")
    losses = next(method.losses(batch, 0))
    with torch.no_grad():
        probability, label = student(batch.image).softmax(1).max(1)
        label = torch.where(probability < 0.4, -1, label)

    def cost(logits: Tensor, label: Tensor) -> Tensor:
        known = label >= 0
        return (F.cross_entropy(logits, label.clamp(min=0), reduction="none") * known).mean()

    assert 0.1 < (label >= 0).double().mean() < 0.99
    views = [method._mixed(batch.image, label, 3, stream) for stream in (0, 1)]
    assert not torch.equal(views[0][0], views[1][0])
    # The middle of convolution and activation is the activation.
    dropped = student[2](channels_dropped(method.seeds(4, 3, 100), student[1](student[0](batch.image))))
    torch.testing.assert_close(
        losses["pseudo"], 0.8 * sum(0.25 * cost(student(x), y) for x, y in views), check_dtype=False
    )
    torch.testing.assert_close(losses["features"], 0.8 * 0.5 * cost(dropped, label))
    torch.testing.assert_close(
        losses["clean"], supervised_loss(student(batch.clean_image), batch.clean_label)
    )


def test_pairs_are_mixed() -> None:
    assert UniMatch.mixes_pairs
