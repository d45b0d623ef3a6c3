"""The virtual step is the step that the optimiser takes, and A v is its derivative along v."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from core.small import conv_net, data
from mlbseg.core.directional import directional_derivative, gradient
from mlbseg.core.losses import cross_entropy_map, supervised_loss
from mlbseg.core.metaweights import alignment
from mlbseg.core.optimisers import precondition, virtual_step

OPTIMISERS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, "dampening": 0.2}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, "nesterov": True}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.5, "maximize": True}),
    (torch.optim.Adam, {"lr": 0.01}),
    (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95)}),
    (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    (torch.optim.AdamW, {"lr": 0.01, "maximize": True}),
]
every_optimiser = pytest.mark.parametrize(
    ("kind", "options"), OPTIMISERS, ids=lambda o: getattr(o, "__name__", str(o))
)


def trained(kind: type[torch.optim.Optimizer], options: dict[str, Any], steps: int) -> tuple[nn.Module, Any]:
    """Return a network after some steps, in two groups of different learning rates."""
    torch.manual_seed(2)
    model = conv_net(2, 3, "group")
    head = [p for n, p in model.named_parameters() if n.startswith("4.")]
    rest = [p for n, p in model.named_parameters() if not n.startswith("4.")]
    optimiser = kind([{"params": rest}, {"params": head, "lr": options["lr"] / 3}], **options)  # type: ignore[call-arg]
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    for _ in range(steps):
        optimiser.zero_grad()
        model(x).square().mean().backward()
        optimiser.step()
    return model, optimiser


def drawn(model: nn.Module, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {n: torch.randn_like(p) for n, p in model.named_parameters()}


@every_optimiser
@pytest.mark.parametrize("steps", [0, 3])
def test_virtual_step_is_the_step_that_the_optimiser_takes(
    kind: Any, options: dict[str, Any], steps: int
) -> None:
    model, optimiser = trained(kind, options, steps)
    grads = drawn(model, 3)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ahead = virtual_step(model, grads, optimiser)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name], rtol=0, atol=0)
        p.grad = grads[name]
    optimiser.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(ahead[name], p.detach(), rtol=1e-10, atol=1e-13)


@every_optimiser
@pytest.mark.parametrize("steps", [0, 3])
def test_precondition_is_the_derivative_of_the_step(kind: Any, options: dict[str, Any], steps: int) -> None:
    model, optimiser = trained(kind, options, steps)
    at, v, eps = drawn(model, 3), drawn(model, 4), 1e-6
    ends = [virtual_step(model, {n: at[n] + sign * eps * v[n] for n in at}, optimiser) for sign in (1, -1)]
    for name, found in precondition(v, model, optimiser, at).items():
        slow = (ends[1][name] - ends[0][name]) / (2 * eps)  # a step subtracts
        torch.testing.assert_close(found, slow, rtol=1e-6, atol=1e-8)


@every_optimiser
def test_weights_under_any_optimiser_equal_double_backward(kind: Any, options: dict[str, Any]) -> None:
    model, optimiser = trained(kind, options, 2)
    x, clean, clean_label, first, _ = data(2, 3)
    parameters = dict(model.named_parameters())
    at_zero = gradient(torch.softmax(model(x), 1).square().mean(), model)

    # The oracle: a real step along the weighted gradient, differentiated with respect to the weights numerically.
    weights = torch.zeros_like(first, dtype=torch.float64, requires_grad=True)
    cost = cross_entropy_map(model(x), first)
    weighted = torch.autograd.grad((weights * cost).sum(), list(parameters.values()), create_graph=True)
    ahead = virtual_step(model, at_zero, optimiser)
    leaves = {n: p.requires_grad_() for n, p in ahead.items()}
    loss = supervised_loss(functional_call(model, leaves, (clean,)), clean_label)
    v = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    moved = precondition(v, model, optimiser, at_zero)
    # d L(θ̂(w)) / dw = -Σ_p v_p A_p dG_p/dw, by double backward through the weighted gradient G
    pulled = sum((g * moved[n]).sum() for n, g in zip(parameters, weighted, strict=True))
    (slow,) = torch.autograd.grad(pulled, weights)

    logits, tangent = directional_derivative(model, moved, x)
    fast = alignment(lambda z: cross_entropy_map(z, first), logits, tangent)
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-13)

    # And by steps that are really taken, with a little weight on one pixel.
    eps = 1e-6
    for pixel in [(0, 1, 2), (1, 5, 3)]:
        values = []
        for sign in (1, -1):
            one = gradient(cross_entropy_map(model(x), first)[pixel], model)
            end = virtual_step(model, {n: at_zero[n] + sign * eps * one[n] for n in one}, optimiser)
            with torch.no_grad():
                values.append(supervised_loss(functional_call(model, end, (clean,)), clean_label))
        measured = -(values[0] - values[1]) / (2 * eps)
        torch.testing.assert_close(fast[pixel], measured, rtol=1e-4, atol=1e-9)


def test_adam_moves_where_no_gradient_was_yet() -> None:
    p = nn.Linear(1, 1).double()
    optimiser = torch.optim.Adam(p.parameters(), lr=0.1)
    v = {n: torch.ones_like(t) for n, t in p.named_parameters()}
    found = precondition(v, p, optimiser)
    assert all(torch.isfinite(t).all() and (t > 0).all() for t in found.values())


def test_what_is_not_written_is_refused() -> None:
    model = conv_net(2, 2)
    grads = drawn(model, 0)
    with pytest.raises(TypeError, match="SGD, Adam and AdamW, not RMSprop"):
        virtual_step(model, grads, torch.optim.RMSprop(model.parameters()))
    with pytest.raises(ValueError, match="AMSGrad"):
        virtual_step(model, grads, torch.optim.Adam(model.parameters(), amsgrad=True))
    with pytest.raises(ValueError, match=r"does not hold the parameter '0\.bias'"):
        precondition(grads, model, torch.optim.SGD([model[0].weight], lr=0.1))
