"""Costs and losses. Labels are class indices (B, *S); a negative label means "not known here" and costs nothing.

The losses are ratios of sums over pixels. With several `ranks` these sums run over the pixels of all of them: every
rank has the loss of the whole batch, with the gradient of its own part, and the gradients of the ranks add up.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mlbseg.core.ranks import ALONE, Ranks
from mlbseg.types import EITHER, UNLABELLED
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


def widened(t: Tensor) -> Tensor:
    """Return a tensor in float32 or better: sums of logits in half precision lose too many digits."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def confident_label(logits: Tensor, threshold: float) -> Tensor:
    """Return the likeliest class of every pixel (B, *S), `UNLABELLED` where its probability is below the threshold.

    Args:
        logits: (B, K, *S); no gradient flows back to them.
        threshold: In [0, 1].
    """
    probability, label = torch.softmax(logits.detach(), 1).max(1)
    return torch.where(probability < threshold, UNLABELLED, label)


def mean_cross_entropy(logits: Tensor, label: Tensor, *, ranks: Ranks = ALONE) -> Tensor:
    """Return the cross-entropy of the known pixels as a mean over all pixels, known or not, but `IGNORE`: a scalar.

    Few known pixels thus make a small loss, where `supervised_loss` would let them count as much as many.

    Args:
        logits: (B, K, *S).
        label: (B, *S) class indices, `UNLABELLED` where a pixel has none, and `IGNORE` where it is not to be counted.
        ranks: Those that share the batch.
    """
    cost = cross_entropy_map(logits, label).sum()
    total, count = ranks.sum_each(cost, (label != IGNORE).sum())
    return total / count.clamp(min=1)


def resolved(logits: Tensor, label: Tensor, sets: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return logits and labels that any loss takes, of pixels of which some are background or one of several classes.

    Where a case has not all classes labelled, its background is the background or one of the others. There the
    probability of the background becomes the sum over all classes that may hide in it, and theirs becomes 0: the
    marginal loss, for every loss of probabilities alike. In soft Dice such a pixel counts as background for the classes
    that were labelled, and for those that may hide there not at all.

    Source: Fang & Yan, PIPO-FAN (IEEE TMI 2020), section III-D; Shi et al., Marginal loss and exclusion loss (Medical
    Image Analysis 2021), eq. 1 to 4.

    Args:
        logits: (B, K, *S).
        label: (B, *S) class indices; ``EITHER - j`` means background or a class of set j; other negative ones are as
            they are.
        sets: (J, K) bool, the classes of each set; True for the background too. None: there are none.

    Returns:
        (B, K, *S) logits and (B, *S) labels without such values.
    """
    if sets is None or not len(sets):
        return logits, label
    either = label <= EITHER
    of_pixel = sets.to(logits.device)[(EITHER - label).clamp(0, len(sets) - 1)]  # (B, *S, K)
    within = (of_pixel & either.unsqueeze(-1)).movedim(-1, 1)
    lowest = torch.finfo(logits.dtype).min / 8
    joined = logits.masked_fill(~within, lowest).logsumexp(1, keepdim=True)
    first = torch.zeros_like(within)
    first[:, 0] = either
    merged = torch.where(first, joined, logits.masked_fill(within & ~first, lowest))
    return merged, torch.where(either, 0, label)


def residual_map(logits: Tensor, label: Tensor) -> Tensor:
    """Return 1 - p(label) of every pixel (B, *S): how far the prediction is from the label, in [0, 1]."""
    return 1 - torch.exp(-cross_entropy_map(logits, label))


def entropy_map(logits: Tensor) -> Tensor:
    """Return the entropy of every pixel's prediction as a share of ln K, that of knowing nothing: (B, *S) in [0, 1].

    Source: Vu et al., ADVENT (CVPR 2019), eq. 2.

    Args:
        logits: (B, K, *S); the logarithm of probabilities will do as well.
    """
    log_p = F.log_softmax(logits, dim=1)
    return -(log_p.exp() * log_p).sum(1) / math.log(logits.shape[1])


def soft_dice_loss(
    logits: Tensor,
    label: Tensor,
    smooth: float = 1e-5,
    *,
    weight: Tensor | None = None,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Return 1 - soft Dice, averaged over the foreground classes, the batch taken as one volume.

    Source: Milletari et al., V-Net (3DV 2016), eq. 2 without the squares; sums over the whole batch as in
    nnU-Net's "batch Dice", which is steadier for small patches. Classes absent from the batch's label count
    as well (their Dice falls with every false positive).

    Args:
        logits: (B, K, *S).
        label: (B, *S) class indices; negative ones are left out.
        smooth: Keeps 0/0 defined.
        weight: (B, *S) how much each pixel counts in the sums; all alike when None.
        ranks: Those that share the batch.

    Returns:
        A scalar.
    """
    counted = None if weight is None else weight * (label >= 0)
    overlap, total = ranks.sum_each(*_overlap_and_total(logits, label, counted))
    return _dice_loss(overlap, total, smooth)


def supervised_loss(
    logits: Tensor, label: Tensor, *, weight: Tensor | None = None, ranks: Ranks = ALONE
) -> Tensor:
    """Return mean cross-entropy over the known pixels plus `soft_dice_loss`: a scalar.

    Args:
        logits: (B, K, *S).
        label: (B, *S) class indices; negative ones are left out.
        weight: (B, *S) how much each pixel counts, in the mean and in the sums of Dice; all alike when None.
        ranks: Those that share the batch.
    """
    known = (label >= 0).to(logits.dtype)
    counted = known if weight is None else known * weight
    cost = (counted * cross_entropy_map(logits, label)).sum()
    cost, total, overlap, both = ranks.sum_each(
        cost, counted.sum(), *_overlap_and_total(logits, label, counted)
    )
    # Fewer than one pixel is none: nothing may be divided by next to nothing.
    return cost / total.clamp(min=1e-6 if weight is not None else 1) + _dice_loss(overlap, both)


def _overlap_and_total(logits: Tensor, label: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return, each (K,), the sum of p y and of p + y over the known pixels, each counted as `counted` (B, *S) says."""
    known = ((label >= 0) if counted is None else counted).unsqueeze(1)
    probability = torch.softmax(logits, dim=1)
    target = F.one_hot(label.clamp(min=0).long(), logits.shape[1]).movedim(-1, 1).to(logits.dtype) * known
    axes = [0, *range(2, logits.ndim)]
    return (probability * target).sum(axes), (probability * known).sum(axes) + target.sum(axes)


def _dice_loss(overlap: Tensor, total: Tensor, smooth: float = 1e-5) -> Tensor:
    dice = (2 * overlap + smooth) / (total + smooth)
    return 1 - dice[1:].mean()


def pairwise_consistency(aligned: Tensor, seen: Tensor, *, ranks: Ranks = ALONE) -> Tensor:
    """Return the mean squared difference over all pairs of aligned views: the PLE consistency.

    The sum over pairs is K times the spread around the mean, so it costs O(K) and not O(K²):
    sum_{i<j} m_i m_j |p_i - p_j|² = M sum_i m_i |p_i - p̄|² with M = sum_i m_i and p̄ the mean over the views
    that saw the pixel. Gradients flow into every view.

    Args:
        aligned: (V, B, K, *S) predictions of V views in the identity frame.
        seen: (V, B, 1, *S) 1 where the view saw the pixel, else 0.
        ranks: Those that share the batch.

    Returns:
        A scalar: the mean over pairs of views, pixels that both saw, and classes.
    """
    count = seen.sum(0)
    mean = (aligned * seen).sum(0) / count.clamp(min=1)
    spread = (seen * (aligned - mean).square()).sum(0)
    pairs = (count * (count - 1) / 2).sum() * aligned.shape[2]
    spread, pairs = ranks.sum_each((count * spread).sum(), pairs)
    return spread / pairs.clamp(min=1)


def gated_crf(
    logits: Tensor,
    image: Tensor,
    *,
    contrast: float = 0.3,
    distances: Sequence[int] = (1, 2, 4),
    ranks: Ranks = ALONE,
) -> Tensor:
    """Return how often neighbours of like intensity are predicted apart: a scalar from 0 to 1.

    Every pixel is compared with its 8 (in 3D 26) neighbours at each distance. A pair counts
    k (1 - sum_c p_c q_c) with k = exp(-|I - J|² / (2 contrast²)), the mean over all pairs. It spreads what scribbles
    say up to the next edge of the image, and shortens the outlines of structures.

    Source: Obukhov et al., Gated CRF loss (NeurIPS workshop 2019, arXiv 1906.04651), eq. 4 with the Potts model and a
    kernel of intensity alone; the neighbours are those of dilated convolutions, which costs less than a full window.

    Args:
        logits: (B, K, *S).
        image: (B, C, *S), normalised intensities.
        contrast: Difference of intensity that is an edge, in standard deviations of the scan.
        distances: Of the neighbours, pixels.
        ranks: Those that share the batch.
    """
    probability = torch.softmax(logits, dim=1)
    ndim = image.ndim - 2
    # Of two opposite neighbours one is enough.
    ways = [way for way in itertools.product((-1, 0, 1), repeat=ndim) if way > (0,) * ndim]
    energy, pairs = logits.sum() * 0, logits.new_zeros(())
    for way in ways:
        for distance in distances:
            one, other = _shifted([step * distance for step in way])
            if not image[one].numel():
                continue  # the patch is too small
            alike = torch.exp((image[one] - image[other]).square().sum(1) / (-2 * contrast**2))
            apart = 1 - (probability[one] * probability[other]).sum(1)
            energy = energy + (alike * apart).sum()
            pairs = pairs + alike.numel()
    energy, pairs = ranks.sum_each(energy, pairs)
    return energy / pairs.clamp(min=1)


def _shifted(steps: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Return where pixels are, and where those that lie so many steps on, along the axes after (B, C)."""
    every = (slice(None), slice(None))
    one = tuple(slice(max(0, -step), -step if step > 0 else None) for step in steps)
    other = tuple(slice(max(0, step), step if step < 0 else None) for step in steps)
    return every + one, every + other


def prediction_distance(logits: Tensor, other: Tensor, valid: Tensor, *, ranks: Ranks = ALONE) -> Tensor:
    """Return the mean squared difference of two predictions' class probabilities where `valid`: a scalar.

    Args:
        logits: (B, K, *S).
        other: (B, K, *S) logits of the other network; gradients flow into it only if it carries any.
        valid: (B, 1, *S) 1 where a pixel counts.
        ranks: Those that share the batch.
    """
    return probability_distance(torch.softmax(logits, 1), torch.softmax(other, 1), valid, ranks=ranks)


def probability_distance(p: Tensor, other: Tensor, valid: Tensor, *, ranks: Ranks = ALONE) -> Tensor:
    """Return `prediction_distance` of class probabilities (B, K, *S)."""
    difference = (p - other).square() * valid
    total, count = ranks.sum_each(difference.sum(), valid.sum() * p.shape[1])
    return total / count.clamp(min=1)
