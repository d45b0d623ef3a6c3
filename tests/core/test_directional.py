"""Forward mode, the difference that stands in for it, and gradients that are put together from chunks."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.small import conv_net, real_data, real_net
from mlbseg.core.directional import (
    central_difference,
    directional_derivative,
    gradient,
    loss_and_gradient,
    with_gradient,
)
from mlbseg.core.losses import supervised_loss
from mlbseg.networks import make_network


def randn_like(model: nn.Module) -> dict[str, Tensor]:
    return {n: torch.randn_like(p) for n, p in model.named_parameters()}


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


class Cube(torch.autograd.Function):
    """An operator without forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class Cubed(nn.Module):
    """A network that torch cannot differentiate in forward mode, or, plainly written, can."""

    def __init__(self, *, opaque: bool) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.first, self.last = nn.Conv2d(2, 5, 3, padding=1), nn.Conv2d(5, 3, 3, padding=1)
        self.opaque = opaque

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sin(self.first(x))
        return self.last(Cube.apply(h) if self.opaque else h**3)


def test_chunks_change_nothing_without_batch_coupling() -> None:
    torch.manual_seed(4)
    model = conv_net(2, 3)
    x = torch.randn(5, 2, 8, 8, dtype=torch.float64)
    v = randn_like(model)
    whole, parts = directional_derivative(model, v, x), directional_derivative(model, v, x, chunk=2)
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", ["forward", "difference"])
def test_running_statistics_and_gradients_are_left_alone(how: Any) -> None:
    torch.manual_seed(5)
    model = conv_net(2, 2, "batch").train()
    before = {n: b.clone() for n, b in model.named_buffers()}
    v = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    output, tangent = directional_derivative(model, v, x, how=how)
    assert not output.requires_grad
    assert not tangent.requires_grad
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


def test_a_part_of_the_parameters_may_be_the_direction() -> None:
    torch.manual_seed(6)
    model = conv_net(2, 2, "group")
    x = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    v = randn_like(model)
    head = {n: t if n.startswith("4.") else torch.zeros_like(t) for n, t in v.items()}
    _, expected = directional_derivative(model, head, x)
    _, found = directional_derivative(model, {n: t for n, t in v.items() if n.startswith("4.")}, x)
    torch.testing.assert_close(found, expected)


def test_a_direction_that_does_not_fit_is_refused() -> None:
    model = conv_net(2, 2)
    x = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="names no parameter"):
        directional_derivative(model, {}, x)
    with pytest.raises(ValueError, match=r"'stranger', which is no parameter"):
        directional_derivative(model, {"stranger": torch.zeros(1)}, x)
    idle = nn.ModuleDict({"used": model, "idle": nn.Linear(2, 2)})
    idle.forward = model.forward  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="depends on"):
        directional_derivative(idle, {"idle.bias": torch.ones(2)}, x)


def test_a_model_of_several_outputs_is_refused() -> None:
    class Two(nn.Sequential):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [super().forward(x), x]

    model = Two(nn.Conv2d(1, 2, 1))
    with pytest.raises(TypeError, match="returns list, expected one tensor of logits"):
        directional_derivative(model, randn_like(model), torch.randn(1, 1, 4, 4))


@pytest.mark.parametrize(
    ("name", "ndim"), [("unet++", 2), ("vnet", 3), ("dynunet", 3), ("swin-unetr", 2), ("unet", 3)]
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_forward_mode_is_the_limit_of_the_central_difference(name: str, ndim: int, dropout: float) -> None:
    torch.manual_seed(12)
    # Group norm over few voxels bends less than instance norm does, so that a difference can be taken at all.
    model = real_net(name, ndim, 3, norm="group", dropout=dropout).train()
    x = real_data(name, ndim, 3)[0]
    v = randn_like(model)
    states = []
    for _ in range(2):
        torch.manual_seed(13)
        states.append(directional_derivative(model, v, x, how="forward"))
    torch.manual_seed(13)
    output, difference = central_difference(model, v, x, step=1e-6)
    (logits, exact), again = states
    torch.testing.assert_close(again[1], exact, rtol=0, atol=0)
    torch.testing.assert_close(output, logits, rtol=1e-10, atol=1e-12)
    # LeakyReLU and the like have corners: where one is crossed, a pixel's difference is off, not its limit.
    assert relative_error(difference, exact) < 2e-3


def test_an_operator_without_forward_mode_is_named_and_a_difference_taken() -> None:
    plain, opaque = Cubed(opaque=False), Cubed(opaque=True)
    x, v = torch.randn(3, 2, 9, 9), randn_like(plain)
    output, exact = directional_derivative(plain, v, x)
    with pytest.raises(RuntimeError, match="jvp"):
        directional_derivative(opaque, v, x, how="forward")
    with pytest.warns(
        UserWarning, match=r"no forward-mode derivative of this model \(.*jvp.*relative error of about"
    ):
        found = directional_derivative(opaque, v, x, chunk=2)
    torch.testing.assert_close(found[0], output)
    assert relative_error(found[1], exact) < 1e-3
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error")
        assert relative_error(directional_derivative(opaque, v, x)[1], exact) < 1e-3


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.float64, 1e-8)])
def test_error_of_the_central_difference(dtype: torch.dtype, bound: float) -> None:
    model = Cubed(opaque=False).to(dtype)
    x, v = torch.randn(2, 2, 9, 9, dtype=dtype), randn_like(model)
    exact = directional_derivative(model, v, x)[1]
    assert relative_error(central_difference(model, v, x)[1], exact) < bound
    # It does not depend on the length of v.
    long = {n: 1e6 * t for n, t in v.items()}
    assert relative_error(central_difference(model, long, x)[1], 1e6 * exact) < bound


def test_a_difference_is_taken_in_full_precision_under_autocast() -> None:
    model = Cubed(opaque=False)
    x, v = torch.randn(2, 2, 9, 9), randn_like(model)
    exact = directional_derivative(model, v, x)[1]
    with torch.autocast("cpu", torch.bfloat16):
        _, found = directional_derivative(model, v, x, how="difference")
    assert found.dtype == torch.float32
    assert relative_error(found, exact) < 1e-3


@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SiLU])
def test_activations_may_work_in_place(activation: type[nn.Module]) -> None:
    torch.manual_seed(14)
    first, norm, last = nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4), nn.Conv2d(4, 2, 3)
    plain, in_place = (
        nn.Sequential(first, norm, activation(inplace=flag), last).double() for flag in (False, True)
    )
    v, x = randn_like(plain), torch.randn(2, 1, 9, 9, dtype=torch.float64)
    expected = directional_derivative(plain, v, x)
    torch.testing.assert_close(directional_derivative(in_place, v, x), expected, rtol=1e-10, atol=1e-12)


def test_the_other_errors_of_a_model_come_through() -> None:
    model = nn.Conv2d(2, 3, 3)
    with pytest.raises(RuntimeError, match="to have 2 channels"):
        directional_derivative(model, randn_like(model), torch.randn(1, 1, 8, 8))


@pytest.mark.parametrize(("name", "ndim"), [("unet", 3), ("unet++", 2), ("vnet", 3)])
def test_bfloat16_autocast_stays_near_float32(name: str, ndim: int) -> None:
    torch.manual_seed(7)
    channels = {"unet": (8, 16, 32), "unet++": (8, 8, 16, 16, 32), "vnet": (8,)}[name]
    model = make_network(name, ndim=ndim, in_channels=1, num_classes=3, channels=channels)
    shape = (32,) * ndim
    x, label = torch.randn(2, 1, *shape), torch.randint(0, 3, (2, *shape))
    v = gradient(supervised_loss(model(x), label), model)
    _, exact = directional_derivative(model, v, x)
    with torch.autocast("cpu", torch.bfloat16):
        _, fast = directional_derivative(model, v, x)
    assert torch.cosine_similarity(exact.flatten(), fast.float().flatten(), dim=0) > 0.99


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_gradient_in_chunks_is_that_of_the_whole(known: bool, dropout: float) -> None:
    torch.manual_seed(8)
    model = conv_net(2, 3, dropout=dropout).train()
    x, label = torch.randn(5, 2, 8, 8, dtype=torch.float64), torch.randint(0, 3, (5, 8, 8))

    def loss(z: Tensor) -> Tensor:  # batch Dice and the variance over images couple the chunks
        return supervised_loss(z, label) + z.var(0).mean()

    torch.manual_seed(9)
    masks = torch.cat([model(part) for part in x.split(2)])  # draws the dropout of a pass in chunks
    expected = loss(masks)
    expected_gradient = gradient(expected, model)
    torch.manual_seed(9)
    value, found = loss_and_gradient(model, x, loss, chunk=2, output=masks.detach() if known else None)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=0)
    assert not value.requires_grad
    for name, g in expected_gradient.items():
        torch.testing.assert_close(found[name], g, rtol=1e-10, atol=1e-14)
    if not dropout:
        whole = loss_and_gradient(model, x, loss)[1]
        torch.testing.assert_close(whole, expected_gradient, rtol=1e-10, atol=1e-14)


def test_a_chunked_gradient_holds_the_graph_of_one_chunk() -> None:
    model = conv_net(2, 3)
    x, label = torch.randn(6, 2, 8, 8, dtype=torch.float64), torch.randint(0, 3, (6, 8, 8))

    def saved(chunk: int | None) -> int:
        """Return the most images whose features were alive at a time for a backward pass."""
        most = 0

        def pack(t: Tensor) -> Tensor:
            nonlocal most
            if t.shape[1:] == (6, 8, 8):  # the hidden features
                most = max(most, len(t))
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss_and_gradient(model, x, lambda z: supervised_loss(z, label), chunk=chunk)
        return most

    assert (saved(None), saved(2)) == (6, 2)


def test_a_gradient_that_is_known_is_handed_on() -> None:
    torch.manual_seed(10)
    model = conv_net(2, 2)
    v = randn_like(model)
    value = torch.tensor(3.0, dtype=torch.float64)
    part = {n: t for n, t in v.items() if n.startswith("0.")}
    scalar = with_gradient(value, part, model)
    assert scalar == value
    (2 * scalar).backward()
    for name, p in model.named_parameters():
        assert p.grad is None if name not in part else torch.equal(p.grad, 2 * v[name])
