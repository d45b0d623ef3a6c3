"""Mean teacher: the student is to predict what a moving average of it predicts (Tarvainen & Valpola, NeurIPS 2017)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor

from mlbseg.core.losses import prediction_distance, widened
from mlbseg.core.perturb import noisy
from mlbseg.core.teacher import prediction
from mlbseg.methods.base import Taught, inside_scan, unlabelled_image, weak_image
from mlbseg.settings import Noise, Ramp, Weight
from mlbseg.types import Batch, Losses

# Streams of random numbers; a method that builds on this one has its own from the last on.
_NOISE, _TEACHER_NOISE, STREAMS = range(3)


class MeanTeacher(Taught):
    """Supervised loss of the clean batch, and the squared distance to the teacher's prediction of unlabelled images."""

    uses_unlabelled = True

    class Settings(Taught.Settings):
        """What a user can set."""

        noise: Noise = Field(
            0.1,
            description="SD of the Gaussian noise on either network's input, in units of the normalised intensity",
        )
        consistency_weight: Weight = Field(10.0, description="factor of the distance once the ramp is over")
        ramp: Ramp = Field(0.4, description="share of the stage over which the factor rises")

    settings: Settings

    def losses(self, batch: Batch, step: int) -> Iterator[Losses]:
        """Yield one loss."""
        image = unlabelled_image(batch)
        with self.same_dropout(batch):
            counted = self.counted(batch, step)
            taught = self.taught(batch, _TEACHER_NOISE)
            seen = torch.cat([batch.clean_image, self.noisy(image, batch.seed, _NOISE)])
            clean, logits = widened(self.learnt(seen, batch)).tensor_split([len(batch.clean_image)])
        factor = self.ramped(self.settings.consistency_weight, self.settings.ramp, step)
        yield {
            "clean": self.loss(clean, batch.clean_label),
            "teacher": factor * prediction_distance(logits, taught, counted, ranks=self.ranks),
        }

    def counted(self, batch: Batch, step: int) -> Tensor:
        """Return where the distance counts, (U, 1, *S) bool. Here it counts wherever the scan is."""
        return inside_scan(batch).unsqueeze(1)

    def taught(self, batch: Batch, stream: int) -> Tensor:
        """Return the teacher's logits of the unlabelled images (U, K, *S), under the noise of a stream."""
        return prediction(self.teacher, self.noisy(weak_image(batch), batch.seed, stream))

    def learnt(self, seen: Tensor, batch: Batch) -> Tensor:
        """Return the student's logits of the batch's clean images and, behind them, of its unlabelled ones."""
        logits: Tensor = self.student(seen)
        return logits

    def noisy(self, image: Tensor, seed: int, stream: int) -> Tensor:
        """Return images (U, C, *S) under the noise of a stream."""
        return noisy(self.seeds(len(image), seed, stream), image, self.settings.noise)
