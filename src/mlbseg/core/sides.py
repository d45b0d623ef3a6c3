"""Deep supervision: a network's coarser logits, found again from its full ones, so that no loss need know of them.

A network that has coarser logits notes them in each pass with gradient. A loss is given logits that came from such a
pass, often a part of the batch, or in another precision. The graph says which pass, the memory which images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FARTHEST = 4
"""Steps of the graph from what a loss is given to a network's output: another precision, a part of the batch."""


class Sides:
    """The coarser logits of a network's last pass with gradient; no part of its state, and empty in a copy."""

    def __init__(self) -> None:
        self._node: Any = None
        self._shape: torch.Size | None = None
        self._coarse: list[Tensor] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Sides:
        return Sides()

    def __reduce__(self) -> tuple[type[Sides], tuple[()]]:
        return Sides, ()

    def note(self, full: Tensor, coarse: Sequence[Tensor]) -> None:
        """Remember a pass.

        Args:
            full: (B, K, *S) the network's output.
            coarse: (B, K, *C) logits at coarser resolutions, the finest first.
        """
        self._node, self._shape, self._coarse = full.grad_fn, full.shape, list(coarse)

    def of(self, logits: Tensor) -> list[Tensor]:
        """Return the coarser logits (b, K, *C) of logits (b, K, *S); none if these are not from the last pass."""
        node = logits.grad_fn
        for _ in range(_FARTHEST):
            if node is None or self._node is None:
                return []
            if node is self._node:
                return self._rows(logits)
            node = node.next_functions[0][0] if len(node.next_functions) == 1 else None
        return []

    def _rows(self, logits: Tensor) -> list[Tensor]:
        base = logits if logits._base is None else logits._base
        if base.shape != self._shape or logits.shape[1:] != base.shape[1:]:
            return []
        first = (logits.storage_offset() - base.storage_offset()) // base.stride(0)
        return [z[first : first + len(logits)] for z in self._coarse]


def supervised_deeply(
    loss: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    model: nn.Module,
    logits: Tensor,
    label: Tensor,
    weight: Tensor | None,
) -> Tensor:
    """Return a loss averaged over the resolutions that a model has of these logits, each half as heavy as the last.

    Weights as nnU-Net's (Isensee et al. 2021): 1, 1/2, 1/4 ..., divided by their sum. Labels and weights of a coarser
    resolution are those of the nearest pixel.

    Args:
        loss: Maps logits (B, K, *S), label (B, *S) and weight (B, *S) to a scalar.
        model: Whose networks may have side outputs.
        logits: (B, K, *S).
        label: (B, *S) class indices, negative where unknown.
        weight: (B, *S) how much each pixel counts; all alike when None.
    """
    value = loss(logits, label, weight)
    every = [module.sides for module in model.modules() if isinstance(getattr(module, "sides", None), Sides)]
    coarse: list[Tensor] = next((found for sides in every if (found := sides.of(logits))), [])  # type: ignore[operator, union-attr]
    if not coarse:
        return value
    heaviness, total = 1.0, 1.0
    for z in coarse:
        heaviness /= 2
        total += heaviness
        z = z.to(logits.dtype)
        small = _nearest(label, z.shape[2:])
        value = value + heaviness * loss(z, small, None if weight is None else _nearest(weight, z.shape[2:]))
    return value / total


def _nearest(values: Tensor, size: torch.Size) -> Tensor:
    """Return (B, *S) values at a coarser size (B, *C)."""
    found: Tensor = F.interpolate(values.unsqueeze(1).double(), size=size, mode="nearest-exact").squeeze(1)
    return found.to(values.dtype)
