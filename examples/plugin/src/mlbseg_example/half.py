"""Half: the student is to predict the same of a patch and of a copy with less contrast."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pydantic import Field

from mlbseg.core.losses import prediction_distance, widened
from mlbseg.core.teacher import prediction
from mlbseg.methods.base import Method, inside_scan, unlabelled_image
from mlbseg.settings import Weight
from mlbseg.types import Batch, Losses


class Half(Method):
    """Loss of the clean batch, and the distance between predictions of an unlabelled patch and of its pale copy."""

    uses_unlabelled = True

    class Settings(Method.Settings):
        """What a user can set."""

        strength: float = Field(
            0.5, gt=0, lt=1, description="contrast of the pale copy, as a share of the patch's"
        )
        pale_weight: Weight = Field(1.0, description="factor of the distance")

    settings: Settings

    def losses(self, batch: Batch, step: int) -> Iterator[Losses]:
        """Yield one loss."""
        image, count = unlabelled_image(batch), len(batch.clean_image)
        taught = prediction(self.student, image)
        seen = torch.cat([batch.clean_image, image * self.settings.strength])
        clean, pale = widened(self.student(seen)).tensor_split([count])
        distance = prediction_distance(pale, taught, inside_scan(batch).unsqueeze(1), ranks=self.ranks)
        # Any name will do: terms and monitors are columns of log.csv and curves of the report by themselves.
        self.monitors["paleness"] = distance.detach()
        yield {
            "clean": self.loss(clean, batch.clean_label),
            "pale": self.settings.pale_weight * distance,
        }
