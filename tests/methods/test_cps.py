"""CPS: two networks that differ, each taught by the other."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mlbseg.core.losses import supervised_loss
from mlbseg.methods.base import Context
from mlbseg.methods.cps import CPS, Twins
from mlbseg.methods.supervised import Supervised
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


def twins(ndim: int, batch: Batch) -> Twins:
    """Return networks drawn apart, as stage 1's first step leaves them."""
    method = Twins(unet(ndim), CPS.Settings())
    next(method.losses(batch, 0))
    return method


@dimensions
def test_stage_1_draws_the_second_network_apart_and_trains_the_first_as_ever(ndim: int) -> None:
    batch = make_batch(ndim)
    assert CPS.stage1(CPS.Settings()) is Twins
    method = Twins(unet(ndim), CPS.Settings())
    torch.manual_seed(77)
    state = torch.get_rng_state()
    next(method.losses(batch, 0))
    assert torch.equal(torch.get_rng_state(), state)  # the global stream was left alone
    first = dict(method.student.named_parameters())
    for name, p in method.second.named_parameters():
        if p.ndim > 1:  # scales and shifts begin at 1 and 0
            assert (p != first[name]).all(), name
    losses = next(method.losses(batch, 1))
    alone = next(Supervised(unet(ndim)).losses(batch, 1))
    torch.testing.assert_close(losses["clean"], alone["clean"])
    torch.testing.assert_close(
        losses["second"], supervised_loss(method.second(batch.clean_image), batch.clean_label)
    )
    drawn = [next(p for p in twins(ndim, make_batch(ndim, seed=s)).second.parameters()) for s in (3, 3, 4)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_weights_that_a_run_was_given_are_kept_by_both_but_for_the_head() -> None:
    method = Twins(unet(2), CPS.Settings(), Context(started=True))
    next(method.losses(make_batch(2), 0))
    first = dict(method.student.named_parameters())
    apart = {name for name, p in method.second.named_parameters() if not torch.equal(p, first[name])}
    assert apart
    assert len({name.rpartition(".")[0] for name in apart}) == 1  # one layer


def test_each_network_is_clipped_for_itself() -> None:
    batch = make_batch(2)
    method = twins(2, batch)
    groups = method.clipped()
    assert [id(p) for group in groups for p in group] == [id(p) for p in method.trained()]
    losses = next(method.losses(batch, 1))
    (losses["clean"] + 1000 * losses["second"]).backward()
    norms = [torch.nn.utils.clip_grad_norm_(group, 1e9) for group in groups]
    alone = Supervised(unet(2))
    next(alone.losses(batch, 1))["clean"].backward()
    torch.testing.assert_close(norms[0], torch.nn.utils.clip_grad_norm_(alone.trained(), 1e9))
    assert norms[1] > 100 * norms[0]


@dimensions
def test_losses_are_those_of_the_formula_and_reach_both_networks(ndim: int) -> None:
    batch = make_batch(ndim)
    assert batch.image is not None
    method = CPS.make(unet(ndim))
    method.length = 10
    method.begin(twins(ndim, batch))
    second = copy.deepcopy(method.second.state_dict())
    losses = next(method.losses(batch, 4))  # the end of the ramp
    assert all(torch.equal(second[n], v) for n, v in method.second.state_dict().items())
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
    method.begin(twins(2, batch))
    first, last = (float(next(method.losses(batch, step))["pseudo"].detach()) for step in (1, 4))
    assert 0 < first < 0.1 * last


def test_bfloat16_sees_what_was_drawn_anew() -> None:
    batch = make_batch(2)
    assert batch.image is not None
    method = Twins(unet(2).float(), CPS.Settings())
    batch.clean_image = batch.clean_image.float()
    with torch.autocast("cpu", torch.bfloat16):
        first = next(method.losses(batch, 0))["second"].detach()
    with torch.autocast("cpu", torch.bfloat16):
        again = next(method.losses(batch, 1))["second"].detach()
    assert torch.equal(first, again)
