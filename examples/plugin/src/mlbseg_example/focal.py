"""Focal loss (Lin et al., ICCV 2017): pixels that are predicted well count little."""

from __future__ import annotations

import torch
from torch import Tensor

from mlbseg.core.losses import cross_entropy_map
from mlbseg.core.ranks import ALONE, Ranks


def focal(
    logits: Tensor, label: Tensor, *, weight: Tensor | None = None, ranks: Ranks = ALONE, gamma: float = 2.0
) -> Tensor:
    """Return the mean focal loss of the known pixels; see `mlbseg.methods.losses.Loss`."""
    cost = cross_entropy_map(logits, label)
    known = (label >= 0).to(cost.dtype) * (1 if weight is None else weight)
    total, count = ranks.sum_each(((1 - torch.exp(-cost)) ** gamma * cost * known).sum(), known.sum())
    return total / count.clamp(min=1e-6)
