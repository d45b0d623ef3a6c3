"""CPS: two networks that differ, each taught by the other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mlbseg.core.losses import supervised_loss
from mlbseg.core.scope import parameters_in_scope
from mlbseg.methods.cps import CPS
from mlbseg.networks import make_network
from mlbseg.types import Batch

SHAPES = {2: (8, 12), 3: (8, 4, 4)}

dimensions = pytest.mark.parametrize("ndim", [2, 3])


def unet(ndim: int) -> nn.Module:
    torch.manual_seed(0)
    return make_network("unet", ndim=ndim, in_channels=1, num_classes=3, channels=(4, 8)).double()


def make_batch(ndim: int, seed: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(1)
    clean, image = torch.randn(2, 2, 1, *SHAPES[ndim], generator=generator, dtype=torch.float64)
    return Batch(clean, (clean[:, 0] > 0).long() + (clean[:, 0] > 1), image, seed=seed)


@dimensions
@pytest.mark.parametrize("redrawn", ["decoder", "head", "all"])
def test_the_first_step_draws_a_part_of_the_second_network_anew(ndim: int, redrawn: Any) -> None:
    batch = make_batch(ndim)
    method = CPS.make(unet(ndim), redrawn=redrawn)
    before = copy.deepcopy(dict(method.second.named_parameters()))
    assert all(torch.equal(p, before[n]) for n, p in method.student.named_parameters())
    torch.manual_seed(77)
    state = torch.get_rng_state()
    next(method.losses(batch, 0))
    assert torch.equal(torch.get_rng_state(), state)  # the global stream was left alone
    names = parameters_in_scope(method.student, batch.clean_image, redrawn)
    assert all(torch.equal(p, before[n]) for n, p in method.student.named_parameters())
    for name, p in method.second.named_parameters():
        if name not in names:
            assert torch.equal(p, before[name]), name
        elif p.ndim > 1:  # scales and shifts start anew at 1 and 0, where they stand already
            assert (p != before[name]).all(), name
    again, other = CPS.make(unet(ndim), redrawn=redrawn), CPS.make(unet(ndim), redrawn=redrawn)
    torch.manual_seed(99)
    next(again.losses(batch, 0))
    next(other.losses(make_batch(ndim, seed=4), 0))
    for mine, same, different in zip(
        method.second.parameters(), again.second.parameters(), other.second.parameters(), strict=True
    ):
        assert torch.equal(mine, same)
        if mine.ndim > 1 and redrawn == "all":
            assert not torch.equal(mine, different)


@dimensions
def test_losses_are_those_of_the_formula_and_reach_both_networks(ndim: int) -> None:
    batch = make_batch(ndim)
    assert batch.image is not None
    method = CPS.make(unet(ndim))
    method.length = 10
    next(method.losses(batch, 0))
    second = copy.deepcopy(method.second.state_dict())
    losses = next(method.losses(batch, 4))  # the end of the ramp
    assert all(torch.equal(second[n], v) for n, v in method.second.state_dict().items())  # drawn once only
    one, two = method.student(batch.image), method.second(batch.image)
    torch.testing.assert_close(
        losses["pseudo"], 1.5 * (F.cross_entropy(one, two.argmax(1)) + F.cross_entropy(two, one.argmax(1)))
    )
    clean = [supervised_loss(n(batch.clean_image), batch.clean_label) for n in method.networks().values()]
    torch.testing.assert_close(losses["clean"], clean[0] + clean[1])
    losses["pseudo"].backward()
    assert len(list(method.trained())) == 2 * len(list(method.student.parameters()))
    assert all(p.grad is not None for p in method.trained())
    for network in method.networks().values():
        assert any((p.grad != 0).any() for p in network.parameters())


def test_the_ramp_is_low_at_first() -> None:
    batch = make_batch(2)
    method = CPS.make(unet(2))
    method.length = 10
    next(method.losses(batch, 0))
    first, last = (float(next(method.losses(batch, step))["pseudo"].detach()) for step in (1, 4))
    assert 0 < first < 0.1 * last


def test_bfloat16_sees_what_was_drawn_anew() -> None:
    batch, method = make_batch(2), CPS.make(unet(2).float())
    assert batch.image is not None
    batch.clean_image, batch.image = batch.clean_image.float(), batch.image.float()
    with torch.autocast("cpu", torch.bfloat16):
        first = next(method.losses(batch, 0))["clean"].detach()
    with torch.autocast("cpu", torch.bfloat16):
        again = next(method.losses(batch, 1))["clean"].detach()
    assert torch.equal(first, again)
