"""Per-pixel meta-weights by one forward-mode pass.

MLB-Seg (arXiv 2307.11604) asks of every pixel's cost c_i: if the next step followed it a little more, would
the loss on the clean batch fall? With the virtual step θ̂(w) = θ - A ∇[R + Σ w_i c_i](θ),

    g_i = -∂ L_clean(θ̂(w)) / ∂ w_i  at w = 0  =  < A ∇c_i(θ), v >,    v = ∇ L_clean(θ̂(0)),

because the step is linear in w. So all g_i are the derivative of the unreduced cost map in the single
direction A v: one Jacobian-vector product, exact, without a second-order graph. The learning rate scales every
g_i alike and falls out of the normalised weights; for SGD, momentum and weight decay add terms that do not
depend on w. So for SGD the direction is v itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, jvp

Direction = Mapping[str, Tensor]
"""One tensor per parameter name; parameters that are missing have a zero tangent."""


def gradient(loss: Tensor, model: nn.Module, *, retain_graph: bool = False) -> dict[str, Tensor]:
    """Return the gradient of a scalar with respect to the model's trainable parameters, by name.

    A parameter that the loss does not reach gets zeros.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), retain_graph=retain_graph, materialize_grads=True)
    return dict(zip(named, grads, strict=True))


def directional_derivative(
    model: nn.Module, direction: Direction, x: Tensor, *, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the model's output and its derivative along a direction of the parameters.

    Forward mode with dual numbers, under `no_grad`. `torch.func.jvp` does the same but fails under CPU autocast
    (torch 2.13), where `torch.autograd.forward_ad` works. Running statistics of the model are left alone.

    Args:
        model: A network in the mode (train or eval) in which the costs are taken.
        direction: The tangent of each parameter.
        x: (B, C, *S).
        chunk: Images per pass; all at once when None. With BatchNorm in train mode, whose statistics couple
            the images of a pass, chunks change the result.

    Returns:
        output: (B, K, *S).
        tangent: (B, K, *S), d output / dε along θ + ε direction.
    """
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    outputs, tangents = [], []
    for part in x.split(chunk or len(x)):
        # Copies, so that BatchNorm's running buffers do not move: this pass is only a measurement.
        buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        with torch.no_grad(), forward_ad.dual_level():
            duals = {
                name: forward_ad.make_dual(p, direction[name].detach().to(p.dtype))
                if name in direction
                else p
                for name, p in parameters.items()
            }
            dual = forward_ad.unpack_dual(functional_call(model, {**duals, **buffers}, (part,)))
            if dual.tangent is None:
                raise ValueError("the direction names no parameter that the model's output depends on")
            outputs.append(dual.primal)
            tangents.append(dual.tangent)
    return torch.cat(outputs), torch.cat(tangents)


def alignment(cost: Callable[[Tensor], Tensor], logits: Tensor, tangent: Tensor) -> Tensor:
    """Return g: the derivative of an unreduced cost map along the direction that gave `tangent`.

    Positive where following the pixel's cost lowers the clean loss.

    Args:
        cost: Maps logits (B, K, *S) to a cost of every pixel (B, *S).
        logits: (B, K, *S) of the model.
        tangent: (B, K, *S), their derivative along v.

    Raises:
        ValueError: if the cost is not one number per pixel.
    """
    value, derivative = jvp(cost, (logits,), (tangent,))[:2]
    expected = (logits.shape[0], *logits.shape[2:])
    if value.shape != expected:
        raise ValueError(
            f"the cost has shape {tuple(value.shape)}, expected one number per pixel {expected}: a cost that "
            "mixes pixels (such as soft Dice) has no pixel weights"
        )
    return derivative


def normalise(alignments: Sequence[Tensor], eps: float = 1e-12) -> list[Tensor]:
    """Return w = max(g, 0) / (Σ max(g, 0) + ε), the sum running over all pixels of all label sources.

    The scale of g is divided out before ε is added, so that neither the learning rate nor the size of the
    clean gradient changes the weights. All weights are 0 where no alignment is positive.
    """
    positive = [g.clamp(min=0) for g in alignments]
    peak = torch.stack([p.max() for p in positive]).max()
    scaled = [p / peak.clamp(min=torch.finfo(p.dtype).tiny) for p in positive]
    total = torch.stack([p.sum(dtype=torch.float64) for p in scaled]).sum()
    return [(p / (total + eps)).to(p.dtype) for p in scaled]


@torch.no_grad()
def virtual_step(model: nn.Module, grads: Direction, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the parameters that one SGD step along `grads` would give, without taking it.

    Args:
        model: The network whose parameters the optimiser holds.
        grads: The gradient of every trainable parameter, by name.
        optimiser: A `torch.optim.SGD` (momentum, dampening, Nesterov and weight decay are honoured).

    Raises:
        TypeError: for another optimiser.
    """
    if not isinstance(optimiser, torch.optim.SGD):
        raise TypeError(f"the virtual step is written for SGD, not {type(optimiser).__name__}")
    settings = {id(p): group for group in optimiser.param_groups for p in group["params"]}
    moved = {}
    for name, p in model.named_parameters():
        if name not in grads:
            continue
        group = settings[id(p)]
        step = grads[name] + group["weight_decay"] * p
        if group["momentum"]:
            buffer = optimiser.state.get(p, {}).get("momentum_buffer")
            velocity = (
                step if buffer is None else group["momentum"] * buffer + (1 - group["dampening"]) * step
            )
            step = step + group["momentum"] * velocity if group["nesterov"] else velocity
        moved[name] = p - group["lr"] * step
    return moved
