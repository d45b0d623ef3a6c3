"""The losses of labelled pixels that a run can choose (`train.loss`), and those of confident pseudo labels."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from mlbseg.core.losses import cross_entropy_map, mean_cross_entropy, soft_dice_loss, supervised_loss
from mlbseg.core.ranks import ALONE, Ranks
from mlbseg.registry import Registry


class Loss(Protocol):
    """How far predictions are from labels.

    A loss is that of the whole batch, which `ranks` share: sums of pixels go through `ranks.sum`, so that its value is
    the same on all and its gradient is that of this rank's part.
    """

    def __call__(
        self, logits: Tensor, label: Tensor, *, weight: Tensor | None = None, ranks: Ranks = ALONE
    ) -> Tensor:
        """Return a scalar.

        Args:
            logits: (B, K, *S).
            label: (B, *S) class indices; negative ones are left out.
            weight: (B, *S) how much each pixel counts; all alike when None.
            ranks: Those that share the batch.
        """


def cross_entropy(
    logits: Tensor, label: Tensor, *, weight: Tensor | None = None, ranks: Ranks = ALONE
) -> Tensor:
    """Return the mean cross-entropy of the known pixels; see `Loss`."""
    known = (label >= 0).to(logits.dtype)
    counted = known if weight is None else known * weight
    cost, total = ranks.sum_each((counted * cross_entropy_map(logits, label)).sum(), counted.sum())
    # Fewer than one pixel is none: nothing may be divided by next to nothing.
    return cost / total.clamp(min=1e-6 if weight is not None else 1)


def dice(logits: Tensor, label: Tensor, *, weight: Tensor | None = None, ranks: Ranks = ALONE) -> Tensor:
    """Return `soft_dice_loss`; see `Loss`."""
    return soft_dice_loss(logits, label, weight=weight, ranks=ranks)


PseudoLoss = Literal["dice-ce", "ce", "dice"]
"""The losses of pseudo labels that a method can choose."""


def pseudo_label_loss(logits: Tensor, label: Tensor, kind: PseudoLoss, *, ranks: Ranks = ALONE) -> Tensor:
    """Return how far predictions are from pseudo labels that some pixels lack, a scalar.

    Args:
        logits: (B, K, *S).
        label: (B, *S) class indices, `UNLABELLED` where a pixel has none, `IGNORE` where it is not to be counted.
        kind: The cross-entropy (`mean_cross_entropy`: pixels without a label make it smaller), soft Dice of the pixels
            that have a label, or the sum of both.
        ranks: Those that share the batch.
    """
    loss = logits.new_zeros(())
    if kind != "dice":
        loss = loss + mean_cross_entropy(logits, label, ranks=ranks)
    if kind != "ce":
        loss = loss + soft_dice_loss(logits, label, ranks=ranks)
    return loss


LOSSES: Registry[Loss] = Registry(
    "loss",
    "mlbseg.losses",
    {"dice-ce": supervised_loss, "ce": cross_entropy, "dice": dice},
    callable,
)
"""``dice-ce``: mean cross-entropy plus soft Dice. ``ce``: the first alone. ``dice``: the second alone."""
