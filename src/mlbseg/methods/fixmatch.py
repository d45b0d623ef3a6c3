"""FixMatch: confident predictions label the strongly changed image (Sohn et al., NeurIPS 2020, arXiv 2001.07685)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor

from mlbseg.core.losses import confident_label, widened
from mlbseg.core.perturb import strongly_changed
from mlbseg.core.teacher import prediction
from mlbseg.methods.base import Method, inside_scan, unlabelled_image, weak_image
from mlbseg.methods.losses import PseudoLoss, pseudo_label_loss
from mlbseg.settings import Below1, Share, Weight
from mlbseg.types import IGNORE, Batch, Losses

_STRONG = 0  # stream of random numbers


class FixMatch(Method):
    """Supervised loss, and the loss of unlabelled images, strongly changed, on what the student says of them.

    The weakly changed image, whose prediction is the label, has been moved alone (`Batch.weak`). The strongly changed
    one has the augmentation's other grey values, and those of `strength` on top of them.
    """

    uses_unlabelled = True

    class Settings(Method.Settings):
        """What a user can set."""

        threshold: Share = Field(
            0.95,
            description="least probability that makes a pixel's label; other pixels do not count (the paper: 0.95)",
        )
        strength: Below1 = Field(
            0.6,
            description="of the strong change of an image, in place of the paper's changes of photographs",
        )
        pseudo_weight: Weight = Field(1.0, description="factor of the unlabelled images' loss (the paper: 1)")
        pseudo_loss: PseudoLoss = Field(
            "dice-ce",
            description="loss of pseudo labels: dice-ce, as SSL4MIS has it; ce, the paper's; dice, as in UniMatch's "
            "code for medical images",
        )

    settings: Settings

    def losses(self, batch: Batch, step: int) -> Iterator[Losses]:
        """Yield one loss."""
        image = unlabelled_image(batch)
        label = self.label(batch)
        count = len(batch.clean_image)
        seen = torch.cat([batch.clean_image, self.changed(image, batch.seed, _STRONG)])
        clean, logits = widened(self.student(seen)).tensor_split([count])
        yield {
            "clean": self.loss(clean, batch.clean_label),
            "pseudo": self.settings.pseudo_weight * self.pseudo_loss(logits, label),
        }

    def label(self, batch: Batch) -> Tensor:
        """Return the student's classes (U, *S) of the weakly changed images.

        They are `UNLABELLED` where it is not confident, and `IGNORE` beyond the scan.
        """
        inside = inside_scan(batch)
        label = confident_label(prediction(self.student, weak_image(batch)), self.settings.threshold)
        label = torch.where(inside, label, IGNORE)
        kept, count = self.ranks.sum_each((label >= 0).sum(), inside.sum())
        self.monitors["kept_pseudo"] = kept / count.clamp(min=1)
        return label

    def pseudo_loss(self, logits: Tensor, label: Tensor) -> Tensor:
        """Return the loss of pseudo labels (B, *S), a scalar of the whole batch."""
        return pseudo_label_loss(logits, label, self.settings.pseudo_loss, ranks=self.ranks)

    def changed(self, image: Tensor, seed: int, stream: int) -> Tensor:
        """Return the images strongly changed."""
        return strongly_changed(self.seeds(len(image), seed, stream), image, self.settings.strength)
