"""CCT: three changes of the features, and a target that no gradient reaches."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from mlbseg.core.features import (
    active_dropped,
    changed_levels,
    channels_dropped,
    feature_levels,
    features_with_noise,
)
from mlbseg.core.losses import supervised_loss
from mlbseg.methods.cct import CCT
from mlbseg.networks import make_network
from mlbseg.types import Batch

SHAPES = {2: (6, 8), 3: (4, 5, 6)}


@pytest.mark.parametrize("ndim", [2, 3])
def test_losses_and_gradient_are_those_of_four_passes(ndim: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d if ndim == 2 else nn.Conv3d
    student = nn.Sequential(conv(1, 6, 3, padding=1), nn.SiLU(), conv(6, 3, 1)).double()
    clean, image = torch.randn(2, 3, 1, *SHAPES[ndim], dtype=torch.float64)
    label = (clean[:2, 0] > 0).long()
    method = CCT.make(student, consistency_weight=7.0, ramp=0.5)
    method.length = 10
    losses = next(method.losses(Batch(clean[:2], label, image, seed=3), 5))

    target = student(image).softmax(1).detach()
    deep = student[1](student[0](image))
    distances = []
    for stream, change in enumerate((features_with_noise, active_dropped, channels_dropped)):
        own = method.auxiliary[stream][2]
        assert torch.equal(own.weight, student[2].weight)  # a decoder begins as a copy of the student's
        changed = own(change(method.seeds(3, 3, stream), deep))
        distances.append((changed.softmax(1) - target).square().mean())
        assert float(distances[-1].detach()) > 0
    expected = 7 * torch.stack(distances).mean()
    torch.testing.assert_close(losses["features"], expected)
    torch.testing.assert_close(losses["clean"], supervised_loss(student(clean[:2]), label))
    encoders = re.compile(r"auxiliary\.\d\.0\.")  # of the further decoders: the student's stands in for them
    learning = {n: p for n, p in method.named_parameters() if not encoders.match(n)}
    found = torch.autograd.grad(losses["features"], list(learning.values()), allow_unused=True)
    others = torch.autograd.grad(expected, list(learning.values()), allow_unused=True)
    for name, mine, other in zip(learning, found, others, strict=True):
        assert (mine is None) == name.startswith(
            "student.2."
        )  # the student's decoder learns from labels alone
        if mine is not None:
            torch.testing.assert_close(mine, other)


def test_every_level_is_changed_and_the_encoder_goes_on_with_its_own() -> None:
    torch.manual_seed(0)
    student = make_network("unet", ndim=2, in_channels=1, num_classes=2, channels=(4, 8, 8))
    levels = feature_levels(student, torch.randn(1, 1, 16, 16))
    assert [level.layer for level in levels[1:]] == ["model.1.submodule.0", "model.0"][-len(levels) + 1 :]
    deep: list[torch.Tensor] = []
    student.get_submodule(levels[0].layer).register_forward_hook(lambda m, i, z: deep.append(z))
    image = torch.randn(2, 1, 16, 16)
    plain = student(image)
    with changed_levels(student, levels[1:], lambda z, number: z * 0, first=1):
        changed = student(image)
    assert torch.equal(deep[0], deep[1])
    assert torch.equal(plain[0], changed[0])
    assert not torch.equal(plain[1], changed[1])
    assert torch.equal(student(image), plain)  # and afterwards nothing is


def test_the_ramp_is_low_at_first() -> None:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 2, 1))
    clean, image = torch.randn(2, 2, 1, 6, 6)
    method = CCT.make(student)
    method.length = 100
    batch = Batch(clean, (clean[:, 0] > 0).long(), image, seed=3)
    first, end, later = (float(next(method.losses(batch, s))["features"].detach()) for s in (0, 10, 50))
    assert 0 < first < 0.01 * end
    assert end == later
