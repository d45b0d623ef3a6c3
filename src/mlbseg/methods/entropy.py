"""Entropy minimisation: the student is to be certain (Grandvalet & Bengio, NeurIPS 2004; Vu et al., CVPR 2019)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from mlbseg.core.losses import entropy_map, supervised_loss, widened
from mlbseg.methods.base import Method, inside_scan, unlabelled_image
from mlbseg.types import Batch, Losses


class Entropy(Method):
    """Supervised loss of the clean batch, and the mean entropy of the student's prediction of unlabelled images.

    The entropy is divided by ln K, as by Vu et al. (ADVENT): it has the range of a loss, whatever the classes.

    Args:
        student: The network, with the weights of stage 1.
        entropy_weight: Factor of the entropy once the ramp is over. Far smaller than that of a mean teacher: its
            gradient is as large as that of a cross-entropy, and a student that is certain of background alone has
            none either (ADVENT: 0.001 for street scenes; SSL4MIS, a code for medical images: 0.1).
        ramp: Share of the stage over which the factor rises (`sigmoid_ramp`).
    """

    uses_unlabelled = True

    def __init__(self, student: nn.Module, *, entropy_weight: float = 0.1, ramp: float = 0.4) -> None:
        super().__init__(student)
        self.entropy_weight = entropy_weight
        self.ramp = ramp

    def losses(self, batch: Batch, step: int) -> Iterator[Losses]:
        """Yield one loss."""
        image = unlabelled_image(batch)
        count = len(batch.clean_image)
        clean, logits = widened(self.student(torch.cat([batch.clean_image, image]))).tensor_split([count])
        entropy = entropy_map(logits)
        inside = inside_scan(batch)
        total, pixels = self.ranks.sum_each((entropy * inside).sum(), inside.sum())
        factor = self.ramped(self.entropy_weight, self.ramp, step)
        yield {
            "clean": supervised_loss(clean, batch.clean_label, ranks=self.ranks),
            "entropy": factor * total / pixels.clamp(min=1),
        }
