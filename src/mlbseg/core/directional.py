"""The derivative of a network's output along a direction of its parameters, and the gradients that give one.

Forward-mode differentiation carries a value and its derivative through the network side by side, under `no_grad`:
no graph, no second order. Networks with an operator that has no forward mode get a central difference instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

Direction = Mapping[str, Tensor]
"""One tensor per parameter name; parameters that are missing have a zero tangent."""

How = Literal["auto", "forward", "difference"]
"""How a directional derivative is computed; see `directional_derivative`."""

_DIFFERENCED: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
"""Models that have shown an operator without forward mode, and what torch said of it."""


def gradient(loss: Tensor, model: nn.Module, *, retain_graph: bool = False) -> dict[str, Tensor]:
    """Return the gradient of a scalar with respect to the model's trainable parameters, by name.

    A parameter that the loss does not reach gets zeros.
    """
    named = _trainable(model)
    grads = torch.autograd.grad(loss, list(named.values()), retain_graph=retain_graph, materialize_grads=True)
    return dict(zip(named, grads, strict=True))


@contextmanager
def forked_random(device: torch.device) -> Iterator[None]:
    """Let what is drawn in the block leave the streams of random numbers, the CPU's and the device's, as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def seed_random(seed: int, device: torch.device) -> None:
    """Seed the streams of the CPU and of the device; `torch.manual_seed` would seed those of all other devices too."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def loss_and_gradient(
    model: nn.Module,
    x: Tensor,
    loss: Callable[[Tensor], Tensor],
    *,
    chunk: int | None = None,
    output: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a loss of the model's output and its gradient, holding the graph of one chunk of images at a time.

    Any loss will do, also one that couples images: its derivative with respect to the output is taken first, and
    then sent back through the network chunk by chunk. That costs one more forward pass, unless the output is known.

    Args:
        model: A network that treats each image by itself: no BatchNorm in train mode where there are chunks.
        x: (B, C, *S).
        loss: Maps the output (B, K, *S) to a scalar.
        chunk: Images per pass; all at once when None.
        output: The model's output for `x`, if known, such as from `directional_derivative`; no gradient needed.

    Returns:
        The loss, detached, and the gradient of every trainable parameter by name.
    """
    if chunk is None or chunk >= len(x):
        value = loss(model(x))
        return value.detach(), gradient(value, model)
    if output is None:
        with forked_random(x.device), torch.no_grad():  # the second pass must draw the same dropout
            output = torch.cat([model(part) for part in x.split(chunk)])
    leaf = output.detach().requires_grad_()
    value = loss(leaf)
    (pull,) = torch.autograd.grad(value, leaf)
    named = _trainable(model)
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    for part, back in zip(x.split(chunk), pull.split(chunk), strict=True):
        out = model(part)
        grads = torch.autograd.grad(out, list(named.values()), back.to(out.dtype), materialize_grads=True)
        for name, g in zip(named, grads, strict=True):
            total[name] += g
    return value.detach(), total


def with_gradient(value: Tensor, grads: Direction, model: nn.Module) -> Tensor:
    """Return a scalar of this value whose backward pass only adds these gradients, for gradients known already."""
    parameters = dict(model.named_parameters())
    return cast(
        Tensor,
        _WithGradient.apply(value, len(grads), *(parameters[n] for n in grads), *grads.values()),
    )


def directional_derivative(
    model: nn.Module, direction: Direction, x: Tensor, *, chunk: int | None = None, how: How = "auto"
) -> tuple[Tensor, Tensor]:
    """Return the model's output and its derivative along a direction of the parameters.

    Dual numbers of `torch.autograd.forward_ad` do it: `torch.func.jvp` would be the same but fails under CPU autocast
    (torch 2.13). Running statistics of the model are left alone.

    Args:
        model: A network in the mode (train or eval) in which the costs are taken.
        direction: The tangent of each parameter.
        x: (B, C, *S).
        chunk: Images per pass; all at once when None. With BatchNorm in train mode, whose statistics couple
            the images of a pass, chunks change the result.
        how: ``forward``: forward mode, exact. ``difference``: a central difference, in float32 or better, whatever
            autocast says (see `central_difference`). ``auto``: forward mode, and the difference, with a warning that
            names the operator and measures the error, for a model with an operator that has no forward mode.

    Returns:
        output: (B, K, *S).
        tangent: (B, K, *S), d output / dε along θ + ε direction.

    Raises:
        ValueError: if the output depends on no parameter of the direction.
        TypeError: if the model does not return a single tensor.
        NotImplementedError: with ``forward``, if an operator has no forward mode; torch's message names it.
    """
    known = {name for name, _ in model.named_parameters()}
    if strangers := sorted(set(direction) - known):
        raise ValueError(f"the direction names {strangers[0]!r}, which is no parameter of the model")
    if not direction:
        raise ValueError("the direction names no parameter that the model's output depends on")
    if how == "auto" and model in _DIFFERENCED:
        how = "difference"
    pieces = []
    for part in x.split(chunk or len(x)):
        if how == "difference":
            pieces.append(central_difference(model, direction, part))
            continue
        try:
            pieces.append(_forward_mode(model, direction, part))
        except (NotImplementedError, RuntimeError) as error:
            if how == "forward" or not _lacks_forward_mode(error):
                raise
            _explain(model, direction, part, error)
            how = "difference"
            pieces.append(central_difference(model, direction, part))
    outputs, tangents = zip(*pieces, strict=True)
    return torch.cat(outputs), torch.cat(tangents)


def central_difference(
    model: nn.Module, direction: Direction, x: Tensor, *, step: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return the model's output and its derivative along a direction, (f(θ + εv) - f(θ - εv)) / 2ε.

    Three forward passes. The error is that of the step, O(ε²), and that of rounding, O(1/ε); `step` balances them.

    Args:
        model: A network.
        direction: The tangent of each parameter.
        x: (B, C, *S).
        step: ε |v| / |θ|, the relative length of a step; the cube root of the type's precision when None.

    Returns:
        Output and tangent, each (B, K, *S); see `directional_derivative`.
    """
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    length = _norm({name: parameters[name] for name in direction})
    speed = _norm(direction)
    step = step or torch.finfo(length.dtype).eps ** (1 / 3)
    # Where v is zero or all parameters are, any ε will do.
    epsilon = step * torch.where(length > 0, length, 1) / torch.where(speed > 0, speed, 1)

    def at(epsilon: Tensor) -> Tensor:
        moved = {n: p + epsilon * direction[n] if n in direction else p for n, p in parameters.items()}
        # Every pass sees the same dropout.
        with forked_random(x.device):
            return _output(functional_call(model, {**moved, **copied_buffers(model)}, (x,)))

    # Half precision has too few digits for a difference.
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        ahead, behind = at(epsilon), at(-epsilon)
        tangent = (ahead - behind) / (2 * epsilon)
        return _output(functional_call(model, {**parameters, **copied_buffers(model)}, (x,))), tangent


class _WithGradient(torch.autograd.Function):
    """Hand a value on, and in the backward pass gradients that are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *tensors: Tensor) -> Tensor:
        """Take the value, the number of parameters, the parameters and as many gradients."""
        ctx.save_for_backward(*tensors[count:])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        """Return each gradient times what follows the value."""
        grads = ctx.saved_tensors
        return None, None, *(g * factor for g in grads), *(None for _ in grads)


def _forward_mode(model: nn.Module, direction: Direction, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), forward_ad.dual_level():
        duals = {}
        for name, p in model.named_parameters():
            value = p.detach()
            duals[name] = (
                forward_ad.make_dual(value, direction[name].detach().to(value.dtype))
                if name in direction
                else value
            )
        output = _output(functional_call(model, {**duals, **copied_buffers(model)}, (x,)))
        dual = forward_ad.unpack_dual(output)
        if dual.tangent is None:
            raise ValueError("the direction names no parameter that the model's output depends on")
        return dual.primal, dual.tangent


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def copied_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return copies, so that BatchNorm's running buffers do not move: these passes are only measurements."""
    return {name: b.detach().clone() for name, b in model.named_buffers()}


def _output(value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"the model returns {type(value).__name__}, expected one tensor of logits (B, K, *S): wrap it in a module "
            "that picks one"
        )
    return value


def _norm(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(t.detach()) for t in tensors.values()])
    )


def _lacks_forward_mode(error: BaseException) -> bool:
    """Return whether torch says that an operator, or a custom function, cannot carry dual numbers."""
    text = str(error).lower()
    return "forward ad" in text or "forward mode ad" in text or "jvp" in text


def _explain(model: nn.Module, direction: Direction, x: Tensor, error: BaseException) -> None:
    """Warn that a difference is taken instead, with its error as the change that a step of twice the length makes."""
    reason = str(error).partition("\n")[0].rstrip(".")
    _DIFFERENCED[model] = reason
    step = torch.finfo(x.dtype).eps ** (1 / 3)
    one, other = (central_difference(model, direction, x, step=k * step)[1] for k in (1, 2))
    # The error of the step is quadratic, so that of the shorter step is a third of the change.
    relative = (
        float(torch.linalg.vector_norm(other - one) / torch.linalg.vector_norm(one).clamp(min=1e-30)) / 3
    )
    warnings.warn(
        f"no forward-mode derivative of this model ({reason}): a central difference is taken instead, with a relative "
        f"error of about {relative:.0e}",
        stacklevel=4,
    )
