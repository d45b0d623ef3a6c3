"""Entropy minimisation: the student is to be certain (Grandvalet & Bengio, NeurIPS 2004; Vu et al., CVPR 2019)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pydantic import Field

from mlbseg.core.losses import entropy_map, widened
from mlbseg.methods.base import Method, inside_scan, unlabelled_image
from mlbseg.settings import Ramp, Weight
from mlbseg.types import Batch, Losses


class Entropy(Method):
    """Supervised loss of the clean batch, and the mean entropy of the student's prediction of unlabelled images.

    The entropy is divided by ln K, as by Vu et al. (ADVENT): it has the range of a loss, whatever the classes.
    """

    uses_unlabelled = True

    class Settings(Method.Settings):
        """What a user can set."""

        # Its gradient is as large as that of a cross-entropy, and a student that is certain of background alone has
        # none either: so it is far smaller than that of a mean teacher.
        entropy_weight: Weight = Field(
            0.1,
            description="factor of the entropy once the ramp is over (ADVENT: 0.001 for street scenes; SSL4MIS, a "
            "code for medical images: 0.1)",
        )
        ramp: Ramp = Field(0.4, description="share of the stage over which the factor rises")

    settings: Settings

    def losses(self, batch: Batch, step: int) -> Iterator[Losses]:
        """Yield one loss."""
        image = unlabelled_image(batch)
        count = len(batch.clean_image)
        clean, logits = widened(self.student(torch.cat([batch.clean_image, image]))).tensor_split([count])
        entropy = entropy_map(logits)
        inside = inside_scan(batch)
        total, pixels = self.ranks.sum_each((entropy * inside).sum(), inside.sum())
        factor = self.ramped(self.settings.entropy_weight, self.settings.ramp, step)
        yield {
            "clean": self.loss(clean, batch.clean_label),
            "entropy": factor * total / pixels.clamp(min=1),
        }
