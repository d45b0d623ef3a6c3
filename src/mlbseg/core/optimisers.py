"""One step of an optimiser as a function of the gradient: where it would lead, and how a gradient changes that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp

from mlbseg.core.directional import Direction

Settings = Mapping[str, Any]
"""A parameter group of the optimiser."""


@torch.no_grad()
def virtual_step(model: nn.Module, grads: Direction, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the parameters that one optimiser step along `grads` would give, without taking it.

    Args:
        model: The network whose parameters the optimiser holds.
        grads: The gradient of the trainable parameters, by name.
        optimiser: `torch.optim.SGD`, `Adam` or `AdamW`, with any of their options but AMSGrad.

    Raises:
        TypeError: for another optimiser.
        ValueError: for AMSGrad, or if the optimiser does not hold a parameter.
    """
    return {
        name: p - _update(p, grads[name], state, group, optimiser)
        for name, p, state, group in _held(model, grads, optimiser)
    }


@torch.no_grad()
def precondition(
    v: Direction, model: nn.Module, optimiser: torch.optim.Optimizer, grads: Direction | None = None
) -> dict[str, Tensor]:
    """Return A v, where A is the derivative of one optimiser step with respect to its gradient.

    The weights' identity g = <A ∇c, v> = <∇c, A v> asks for it: A is diagonal. For SGD it is each group's learning
    rate (and Nesterov's 1 + momentum), so with one group v itself gives the same weights. Adam's depends on where
    the gradient stands: its step is A's integral.

    Args:
        v: The clean gradient, by name.
        model: The network whose parameters the optimiser holds.
        optimiser: As for `virtual_step`.
        grads: The gradient at weights w = 0, at which A is taken; zero when None.

    Raises:
        TypeError, ValueError: as for `virtual_step`.
    """
    result = {}
    for name, p, state, group in _held(model, v, optimiser):
        at = torch.zeros_like(p) if grads is None else grads[name]
        step = lambda g, p=p, s=state, k=group: _update(p, g, s, k, optimiser)  # noqa: E731
        result[name] = jvp(step, (at,), (v[name],))[1]
    return result


def _held(
    model: nn.Module, names: Direction, optimiser: torch.optim.Optimizer
) -> list[tuple[str, Tensor, Mapping[str, Tensor], Settings]]:
    """Return name, value, optimiser state and group of each of the parameters named."""
    settings = {id(p): group for group in optimiser.param_groups for p in group["params"]}
    held: list[tuple[str, Tensor, Mapping[str, Tensor], Settings]] = []
    for name, p in model.named_parameters():
        if name not in names:
            continue
        if id(p) not in settings:
            raise ValueError(f"the optimiser does not hold the parameter {name!r}")
        held.append((name, p.detach(), optimiser.state.get(p, {}), settings[id(p)]))
    return held


def _update(
    p: Tensor, g: Tensor, state: Mapping[str, Tensor], group: Settings, optimiser: torch.optim.Optimizer
) -> Tensor:
    """Return what the step subtracts from a parameter: a function of the gradient that has every derivative."""
    kinds: dict[type, Callable[[Tensor, Tensor, Mapping[str, Tensor], Settings], Tensor]] = {
        torch.optim.SGD: _sgd,
        torch.optim.Adam: _adam,
        torch.optim.AdamW: _adam,
    }
    if type(optimiser) not in kinds:
        raise TypeError(
            f"the virtual step is written for SGD, Adam and AdamW, not {type(optimiser).__name__}"
        )
    return kinds[type(optimiser)](p, -g if group["maximize"] else g, state, group)


def _sgd(p: Tensor, g: Tensor, state: Mapping[str, Tensor], group: Settings) -> Tensor:
    step = g + group["weight_decay"] * p
    if momentum := group["momentum"]:
        buffer = state.get("momentum_buffer")
        velocity = step if buffer is None else momentum * buffer + (1 - group["dampening"]) * step
        step = step + momentum * velocity if group["nesterov"] else velocity
    return group["lr"] * step


def _adam(p: Tensor, g: Tensor, state: Mapping[str, Tensor], group: Settings) -> Tensor:
    if group["amsgrad"]:
        raise ValueError("the virtual step is not written for AMSGrad: use amsgrad=False")
    lr, decay, (beta1, beta2) = group["lr"], group["weight_decay"], group["betas"]
    decoupled = group["decoupled_weight_decay"]
    if not decoupled:
        g = g + decay * p
    zero = torch.zeros_like(p)
    count = float(state.get("step", 0)) + 1
    mean = beta1 * state.get("exp_avg", zero) + (1 - beta1) * g
    square = beta2 * state.get("exp_avg_sq", zero) + (1 - beta2) * g * g
    # √ has no derivative at 0; the step is linear in g there.
    safe = torch.where(square > 0, square, 1)
    scale = torch.where(square > 0, (safe / (1 - beta2**count)).sqrt(), 0)
    step = mean / (1 - beta1**count) / (scale + group["eps"])
    return lr * (step + decay * p) if decoupled else lr * step
