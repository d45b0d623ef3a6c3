"""Slow, plain references: the weights by an unrolled step and double backward, and by finite differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

Costs = Callable[[Tensor], list[Tensor]]


def unrolled_alignments(
    model: nn.Module,
    x: Tensor,
    costs: Costs,
    clean_loss: Callable[[nn.Module, dict[str, Tensor]], Tensor],
    *,
    regulariser: Callable[[Tensor], Tensor] | None = None,
    lr: float,
    velocity: dict[str, Tensor] | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> list[Tensor]:
    """Return g = -∂ L_clean(θ̂(w)) / ∂w at w = 0 for each cost map, through the graph of the gradient."""
    parameters = dict(model.named_parameters())
    output = model(x)
    maps = costs(output)
    weights = [torch.zeros_like(m, requires_grad=True) for m in maps]
    loss = sum((w * m).sum() for w, m in zip(weights, maps, strict=True))
    if regulariser is not None:
        loss = loss + regulariser(output)
    grads = torch.autograd.grad(loss, list(parameters.values()), create_graph=True, materialize_grads=True)
    ahead = {}
    for (name, p), g in zip(parameters.items(), grads, strict=True):
        step = g + weight_decay * p
        if momentum and velocity is not None:
            step = momentum * velocity[name] + step
        ahead[name] = p - lr * step
    gs = torch.autograd.grad(clean_loss(model, ahead), weights)
    return [-g for g in gs]


def finite_difference(
    model: nn.Module, x: Tensor, cost: Callable[[Tensor], Tensor], direction: dict[str, Tensor], eps: float
) -> Tensor:
    """Return the central difference of a cost map along a direction of the parameters."""
    maps = []
    for sign in (1, -1):
        moved = {n: p.detach() + sign * eps * direction[n] for n, p in model.named_parameters()}
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        with torch.no_grad():
            maps.append(cost(functional_call(model, {**moved, **buffers}, (x,))))
    return (maps[0] - maps[1]) / (2 * eps)


def normalised(alignments: Sequence[Tensor]) -> list[Tensor]:
    """Return max(g, 0) / Σ max(g, 0), the paper's formula letter by letter."""
    positive = [g.clamp(min=0) for g in alignments]
    total = sum(p.sum() for p in positive)
    return [p / total for p in positive]
