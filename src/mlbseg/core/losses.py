"""Costs and losses. Labels are class indices (B, *S); a negative label means "not known here" and costs nothing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mlbseg.types import IGNORE as IGNORE  # for users of the losses


def cross_entropy_map(logits: Tensor, label: Tensor) -> Tensor:
    """Return the unreduced cross-entropy of every pixel; 0 where the label is negative.

    Args:
        logits: (B, K, *S).
        label: (B, *S) integer class indices.

    Returns:
        (B, *S), in the type of `logits`.
    """
    known = label >= 0
    # `gather` on log-softmax has every AD mode on every device; cross_entropy's ignore_index lacks some.
    index = label.clamp(min=0).unsqueeze(1).long()
    cost = -F.log_softmax(logits, dim=1).gather(1, index).squeeze(1)
    return cost * known


def residual_map(logits: Tensor, label: Tensor) -> Tensor:
    """Return 1 - p(label) of every pixel (B, *S): how far the prediction is from the label, in [0, 1]."""
    return 1 - torch.exp(-cross_entropy_map(logits, label))


def soft_dice_loss(logits: Tensor, label: Tensor, smooth: float = 1e-5) -> Tensor:
    """Return 1 - soft Dice, averaged over the foreground classes, the batch taken as one volume.

    Source: Milletari et al., V-Net (3DV 2016), eq. 2 without the squares; sums over the whole batch as in
    nnU-Net's "batch Dice", which is steadier for small patches. Classes absent from the batch's label count
    as well (their Dice falls with every false positive).

    Args:
        logits: (B, K, *S).
        label: (B, *S) class indices; negative ones are left out.
        smooth: Keeps 0/0 defined.

    Returns:
        A scalar.
    """
    known = (label >= 0).unsqueeze(1)
    probability = torch.softmax(logits, dim=1) * known
    target = F.one_hot(label.clamp(min=0).long(), logits.shape[1]).movedim(-1, 1).to(logits.dtype) * known
    axes = [0, *range(2, logits.ndim)]
    overlap = (probability * target).sum(axes)
    total = probability.sum(axes) + target.sum(axes)
    dice = (2 * overlap + smooth) / (total + smooth)
    return 1 - dice[1:].mean()


def supervised_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Return mean cross-entropy over the known pixels plus `soft_dice_loss`: a scalar."""
    known = (label >= 0).sum().clamp(min=1)
    return cross_entropy_map(logits, label).sum() / known + soft_dice_loss(logits, label)


def pairwise_consistency(aligned: Tensor, seen: Tensor) -> Tensor:
    """Return the mean squared difference over all pairs of aligned views: the PLE consistency.

    The sum over pairs is K times the spread around the mean, so it costs O(K) and not O(K²):
    sum_{i<j} m_i m_j |p_i - p_j|² = M sum_i m_i |p_i - p̄|² with M = sum_i m_i and p̄ the mean over the views
    that saw the pixel. Gradients flow into every view.

    Args:
        aligned: (V, B, K, *S) predictions of V views in the identity frame.
        seen: (V, B, 1, *S) 1 where the view saw the pixel, else 0.

    Returns:
        A scalar: the mean over pairs of views, pixels that both saw, and classes.
    """
    count = seen.sum(0)
    mean = (aligned * seen).sum(0) / count.clamp(min=1)
    spread = (seen * (aligned - mean).square()).sum(0)
    pairs = (count * (count - 1) / 2).sum() * aligned.shape[2]
    return (count * spread).sum() / pairs.clamp(min=1)


def prediction_distance(logits: Tensor, other: Tensor, valid: Tensor) -> Tensor:
    """Return the mean squared difference of two predictions' class probabilities where `valid`: a scalar.

    Args:
        logits: (B, K, *S).
        other: (B, K, *S) logits of the other network; gradients flow into it only if it carries any.
        valid: (B, 1, *S) 1 where a pixel counts.
    """
    difference = (torch.softmax(logits, 1) - torch.softmax(other, 1)).square() * valid
    return difference.sum() / (valid.sum() * logits.shape[1]).clamp(min=1)
