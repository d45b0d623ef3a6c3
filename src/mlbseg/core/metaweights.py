"""Per-pixel meta-weights by one forward-mode pass.

MLB-Seg (arXiv 2307.11604) asks of every pixel's cost c_i: if the next step followed it a little more, would
the loss on the clean batch fall? With the virtual step θ̂(w) = θ - A ∇[R + Σ w_i c_i](θ),

    g_i = -∂ L_clean(θ̂(w)) / ∂ w_i  at w = 0  =  < A ∇c_i(θ), v >,    v = ∇ L_clean(θ̂(0)),

because the step is linear in w (to first order for adaptive optimisers). So all g_i are the derivative of the
unreduced cost map in the single direction A v: one Jacobian-vector product, exact, without a second-order graph.
For SGD, A is the learning rate, which scales every g_i alike and falls out of the normalised weights: the
direction is v itself. `mlbseg.core.optimisers` has the virtual step and A for SGD, Adam and AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import jvp

from mlbseg.core.directional import Direction, How, directional_derivative
from mlbseg.core.losses import widened
from mlbseg.core.ranks import ALONE, Ranks
from mlbseg.core.scope import Scope, parameters_in_scope

Cost = Callable[[Tensor], Tensor]
"""Maps logits (B, K, *S) to a cost of every pixel (B, *S)."""

Rule = Literal["share", "sign", "softmax", "sigmoid"]
"""How alignments become weights; see `normalise`."""


@dataclass(frozen=True)
class PixelWeights:
    """What `pixel_weights` found; maps are (B, *S), by the name of their cost.

    Attributes:
        weights: Non-negative; all of them together sum to 1.
        alignments: g, before any rule.
        logits: (B, K, *S) of the model, without gradient.
    """

    weights: dict[str, Tensor]
    alignments: dict[str, Tensor]
    logits: Tensor


def pixel_weights(
    model: nn.Module,
    x: Tensor,
    costs: Mapping[str, Cost],
    direction: Direction,
    *,
    scope: Scope = "all",
    rule: Rule = "share",
    per_source: bool = False,
    per_image: bool = False,
    chunk: int | None = None,
    how: How = "auto",
    ranks: Ranks = ALONE,
) -> PixelWeights:
    """Weigh every pixel's costs by what following them would do to the loss whose gradient is `direction`.

    Args:
        model: Maps images to logits; in the mode (train or eval) in which the costs are taken.
        x: (B, C, *S).
        costs: One per label source. Any cost that is differentiable and has a value for each pixel.
        direction: A v (see the module): with SGD the clean gradient, such as `gradient` returns. Under data
            parallelism the sum over all ranks.
        scope: The parameters that the direction moves; the others stand still.
        rule: See `normalise`, also for `per_source` and `per_image`.
        per_source: Give every source the same total.
        per_image: Give every image the same total.
        chunk: Images per pass of the network; all at once when None.
        how: See `directional_derivative`.
        ranks: Those that hold the other images of the batch.

    Raises:
        ValueError: if a cost is not one number per pixel, or the direction or scope does not fit the model.
        TypeError: if the model does not return a single tensor.
    """
    if scope != "all":
        inside = parameters_in_scope(model, x, scope)
        direction = {name: t for name, t in direction.items() if name in inside}
    logits, tangent = directional_derivative(model, direction, x, chunk=chunk, how=how)
    logits, tangent = widened(logits), widened(tangent)
    alignments = {name: alignment(cost, logits, tangent) for name, cost in costs.items()}
    weights = normalise(
        list(alignments.values()), rule=rule, per_source=per_source, per_image=per_image, ranks=ranks
    )
    return PixelWeights(dict(zip(costs, weights, strict=True)), alignments, logits)


def alignment(cost: Cost, logits: Tensor, tangent: Tensor) -> Tensor:
    """Return g (B, *S): the derivative of an unreduced cost map along the direction that gave `tangent`.

    Positive where following the pixel's cost lowers the clean loss.

    Args:
        cost: Differentiable.
        logits: (B, K, *S) of the model.
        tangent: (B, K, *S), their derivative along v.

    Raises:
        ValueError: if the cost is not one number per pixel.
    """
    with torch.no_grad():
        value, derivative = jvp(cost, (logits,), (tangent,))[:2]
    expected = (logits.shape[0], *logits.shape[2:])
    if value.shape != expected:
        raise ValueError(
            f"the cost has shape {tuple(value.shape)}, expected one number per pixel {expected}: a cost that "
            "mixes pixels (such as soft Dice) has no pixel weights"
        )
    return derivative


def normalise(
    alignments: Sequence[Tensor],
    *,
    rule: Rule = "share",
    known: Sequence[Tensor] | None = None,
    per_source: bool = False,
    per_image: bool = False,
    ranks: Ranks = ALONE,
) -> list[Tensor]:
    """Turn alignments into weights that sum to 1 over all pixels, images, label sources and ranks.

    The scale of g is divided out first, so that neither the learning rate nor the size of the clean gradient changes
    the weights. Where nothing is positive, all weights are 0 (``share``, ``sign``).

    Args:
        alignments: g of each label source, (B, *S).
        rule: ``share`` is the paper's, max(g, 0) / Σ max(g, 0). ``sign`` lets every pixel with g > 0 count alike.
            ``softmax`` and ``sigmoid`` take exp(g / s) and 1 / (1 + exp(-g / s)), s being the root mean square of g:
            a pixel that disagrees then counts for little instead of nothing.
        known: For each source, (B, *S), where a pixel has a label; the others get weight 0. With ``share`` and
            ``sign`` a cost that is constantly 0 there does the same.
        per_source: Let each source's weights sum to 1 / number of sources; one without any label is not counted.
        per_image: Let each image's weights sum to 1 / number of images; one without any label is not counted.
        ranks: Those that hold the other images; sums run over all of them.
    """
    g = torch.stack(list(alignments))  # (sources, B, *S)
    mask = torch.ones_like(g) if known is None else torch.stack([k.to(g.dtype) for k in known])
    raw = _raw(g, rule, mask, ranks)
    # In double precision: a float32 sum over millions of pixels loses the small ones.
    sums = raw.reshape(*g.shape[:2], -1).sum(-1, dtype=torch.float64)  # (sources, B)
    has_labels = (mask > 0).flatten(2).any(2)  # (sources, B)
    if per_image:
        total = sums if per_source else sums.sum(0, keepdim=True)
        parts = ranks.sum((has_labels if per_source else has_labels.any(0)).sum())
    else:
        total = ranks.sum(sums.sum(1, keepdim=True) if per_source else sums.sum().reshape(1, 1))
        parts = (ranks.sum(has_labels.sum(1)) > 0).sum() if per_source else torch.ones_like(total)
    total = total.expand_as(sums).reshape(*sums.shape, *(1,) * (g.ndim - 2))
    # Raw numbers are not negative, so where the total is 0 all of them are.
    return list((raw / (parts.clamp(min=1) * total.clamp(min=torch.finfo(torch.float64).tiny))).to(g.dtype))


def _raw(g: Tensor, rule: Rule, mask: Tensor, ranks: Ranks) -> Tensor:
    """Return non-negative numbers of order 1, in proportion to the weights; 0 where the mask is."""
    tiny = torch.finfo(g.dtype).tiny
    if rule == "share":
        positive = g.clamp(min=0) * mask
        return positive / ranks.max(positive.max()).clamp(min=tiny)
    if rule == "sign":
        return (g > 0) * mask
    if rule not in ("softmax", "sigmoid"):
        raise ValueError(f"unknown rule {rule!r}: use share, sign, softmax or sigmoid")
    peak = ranks.max((g.abs() * mask).max()).clamp(min=tiny)
    scaled = g / peak  # squares of g itself may underflow
    moments = ranks.sum(
        torch.stack([(scaled.square() * mask).sum(dtype=torch.float64), mask.sum(dtype=torch.float64)])
    )
    rms = (moments[0] / moments[1].clamp(min=1)).sqrt().to(g.dtype).clamp(min=tiny)
    z = scaled / rms
    if rule == "sigmoid":
        return torch.sigmoid(z) * mask
    z = torch.where(mask > 0, z, -torch.inf)
    return torch.exp(z - ranks.max(z.max()).clamp(min=torch.finfo(z.dtype).min))
