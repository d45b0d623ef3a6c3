"""The fast weights against the unrolled step, finite differences, and the properties they must have."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from mlbseg.core.losses import cross_entropy_map, supervised_loss
from mlbseg.core.metaweights import (
    alignment,
    directional_derivative,
    gradient,
    normalise,
    virtual_step,
)
from mlbseg.nets import make_network
from oracles.double_backward import finite_difference, normalised, unrolled_alignments


def conv_net(ndim: int, classes: int, norm: str) -> nn.Module:
    conv = nn.Conv2d if ndim == 2 else nn.Conv3d
    norms = {
        "batch": nn.BatchNorm2d if ndim == 2 else nn.BatchNorm3d,
        "instance": lambda c: (nn.InstanceNorm2d if ndim == 2 else nn.InstanceNorm3d)(c, affine=True),
        "group": lambda c: nn.GroupNorm(2, c),
    }
    return nn.Sequential(
        conv(2, 6, 3, padding=1), norms[norm](6), nn.SiLU(), conv(6, classes, 3, padding=1)
    ).double()


def data(ndim: int, classes: int, batch: int = 2, side: int = 8) -> tuple[torch.Tensor, ...]:
    shape = (side,) * ndim
    x = torch.randn(batch, 2, *shape, dtype=torch.float64)
    clean = torch.randn(batch, 2, *shape, dtype=torch.float64)
    labels = [torch.randint(-1, classes, (batch, *shape)) for _ in range(3)]
    return x, clean, *labels


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
def test_joint_weights_equal_double_backward(ndim: int, classes: int, norm: str) -> None:
    torch.manual_seed(0)
    model = conv_net(ndim, classes, norm)
    x, clean, clean_label, first, second = data(ndim, classes)
    sources = (first, second)

    def clean_loss(net: nn.Module, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return supervised_loss(functional_call(net, parameters, (clean,)), clean_label)

    slow = unrolled_alignments(
        model, x, lambda z: [cross_entropy_map(z, y) for y in sources], clean_loss, lr=1.0
    )
    v = gradient(supervised_loss(model(clean), clean_label), model)
    logits, tangent = directional_derivative(model, v, x)
    # The unrolled step ends at θ̂(0) = θ here: without other terms the virtual step at w = 0 moves nothing.
    fast = [alignment(lambda z, y=y: cross_entropy_map(z, y), logits, tangent) for y in sources]
    for f, s in zip(fast, slow, strict=True):
        torch.testing.assert_close(f, s, rtol=1e-10, atol=1e-12)
    for f, s in zip(normalise(fast), normalised(slow), strict=True):
        torch.testing.assert_close(f, s, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_paper_weights_equal_double_backward_through_the_virtual_step(momentum: float) -> None:
    torch.manual_seed(1)
    model = conv_net(2, 3, "instance")
    x, clean, clean_label, first, second = data(2, 3)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.3, momentum=momentum, weight_decay=5e-4)
    # One step first, so that there is a momentum buffer to honour.
    supervised_loss(model(clean), clean_label).backward()
    optimiser.step()
    optimiser.zero_grad()
    velocity = {n: optimiser.state[p].get("momentum_buffer") for n, p in model.named_parameters()}

    def regulariser(z: torch.Tensor) -> torch.Tensor:
        return torch.softmax(z, 1).square().mean()

    def clean_loss(net: nn.Module, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return supervised_loss(functional_call(net, parameters, (clean,)), clean_label)

    slow = unrolled_alignments(
        model, x, lambda z: [cross_entropy_map(z, first), cross_entropy_map(z, second)], clean_loss,
        regulariser=regulariser, lr=0.3, momentum=momentum, weight_decay=5e-4,
        velocity=velocity if momentum else None,
    )  # fmt: skip
    ahead = virtual_step(model, gradient(regulariser(model(x)), model), optimiser)
    leaves = {n: p.requires_grad_() for n, p in ahead.items()}
    grads = torch.autograd.grad(clean_loss(model, leaves), list(leaves.values()))
    v = dict(zip(leaves, grads, strict=True))
    logits, tangent = directional_derivative(model, v, x)
    fast = [alignment(lambda z, y=y: cross_entropy_map(z, y), logits, tangent) for y in (first, second)]
    for f, s in zip(fast, slow, strict=True):
        # The unrolled step carries the learning rate, ours leaves it out.
        torch.testing.assert_close(0.3 * f, s, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
def test_virtual_step_is_the_step_that_sgd_takes(nesterov: bool) -> None:
    torch.manual_seed(2)
    model = conv_net(2, 2, "group")
    optimiser = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=nesterov
    )
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    for _ in range(3):
        optimiser.zero_grad()
        model(x).square().mean().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        ahead = virtual_step(model, grads, optimiser)
        optimiser.step()
        for name, p in model.named_parameters():
            torch.testing.assert_close(ahead[name], p.detach(), rtol=1e-12, atol=1e-14)


def test_virtual_step_refuses_other_optimisers() -> None:
    model = conv_net(2, 2, "group")
    with pytest.raises(TypeError, match="AdamW"):
        virtual_step(model, {}, torch.optim.AdamW(model.parameters()))


@pytest.mark.parametrize("name", ["unet", "unet++"])
def test_weights_of_real_networks_equal_finite_differences(name: str) -> None:
    torch.manual_seed(3)
    channels = (4, 4, 8, 8) if name == "unet" else (4, 4, 8, 8, 8)
    model = make_network(name, ndim=2, in_channels=1, num_classes=2, channels=channels).double()
    x = torch.randn(2, 1, 32, 32, dtype=torch.float64)
    label = torch.randint(0, 2, (2, 32, 32))
    v = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    logits, tangent = directional_derivative(model, v, x)
    fast = alignment(lambda z: cross_entropy_map(z, label), logits, tangent)
    slow = finite_difference(model, x, lambda z: cross_entropy_map(z, label), v, eps=1e-7)
    assert torch.nn.functional.cosine_similarity(fast.flatten(), slow.flatten(), dim=0) > 0.9999


def test_chunks_change_nothing_without_batch_coupling() -> None:
    torch.manual_seed(4)
    model = conv_net(2, 3, "instance")
    x = torch.randn(5, 2, 8, 8, dtype=torch.float64)
    v = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    whole, parts = directional_derivative(model, v, x), directional_derivative(model, v, x, chunk=2)
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-12)


def test_running_statistics_and_gradients_are_left_alone() -> None:
    torch.manual_seed(5)
    model = conv_net(2, 2, "batch").train()
    before = {n: b.clone() for n, b in model.named_buffers()}
    v = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    output, tangent = directional_derivative(model, v, torch.randn(2, 2, 8, 8, dtype=torch.float64))
    assert not output.requires_grad
    assert not tangent.requires_grad
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


def test_a_part_of_the_parameters_may_be_the_direction() -> None:
    torch.manual_seed(6)
    model = conv_net(2, 2, "group")
    x = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    v = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    head = {n: t if n.startswith("3.") else torch.zeros_like(t) for n, t in v.items()}
    _, expected = directional_derivative(model, head, x)
    _, found = directional_derivative(model, {n: t for n, t in v.items() if n.startswith("3.")}, x)
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="no parameter"):
        directional_derivative(model, {}, x)


def test_bfloat16_autocast_stays_near_float32() -> None:
    torch.manual_seed(7)
    model = make_network("unet", ndim=3, in_channels=1, num_classes=3, channels=(8, 16, 32))
    x = torch.randn(2, 1, 16, 16, 16)
    v = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    _, exact = directional_derivative(model, v, x)
    with torch.autocast("cpu", torch.bfloat16):
        _, fast = directional_derivative(model, v, x)
    cosine = torch.nn.functional.cosine_similarity(exact.flatten(), fast.float().flatten(), dim=0)
    assert cosine > 0.98


def test_a_cost_that_mixes_pixels_is_refused() -> None:
    z = torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match="one number per pixel"):
        alignment(lambda logits: logits.mean(), z, z)


maps = st.lists(
    st.floats(-1e6, 1e6, allow_nan=False, width=32).filter(lambda v: v == 0 or abs(v) > 1e-20),
    min_size=4, max_size=24,
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(first=maps, second=maps, scale=st.floats(1e-8, 1e8))
def test_properties_of_the_weights(first: list[float], second: list[float], scale: float) -> None:
    gs = [torch.tensor(first, dtype=torch.float64), torch.tensor(second, dtype=torch.float64)]
    ws = normalise(gs)
    total = sum(float(w.sum()) for w in ws)
    assert all((w >= 0).all() for w in ws)
    assert all((w[g <= 0] == 0).all() for w, g in zip(ws, gs, strict=True))
    assert total == pytest.approx(1 if any((g > 0).any() for g in gs) else 0, abs=1e-9)
    # The learning rate scales every alignment alike and changes no weight.
    for w, s in zip(ws, normalise([scale * g for g in gs]), strict=True):
        torch.testing.assert_close(w, s, rtol=1e-9, atol=1e-12)
    order = torch.randperm(len(first))
    torch.testing.assert_close(normalise([gs[0][order], gs[1]])[0], ws[0][order])
