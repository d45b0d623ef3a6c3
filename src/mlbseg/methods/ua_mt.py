"""Uncertainty-aware mean teacher: learn where the teacher is certain (Yu et al., MICCAI 2019, arXiv 1907.07034)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from mlbseg.core.losses import entropy_map
from mlbseg.core.teacher import prediction
from mlbseg.methods.base import inside_scan, unlabelled_image
from mlbseg.methods.mean_teacher import STREAMS, MeanTeacher
from mlbseg.settings import Share
from mlbseg.types import Batch


class UAMT(MeanTeacher):
    """The losses of a mean teacher, the distance to it only where its predictions under noise agree.

    The teacher predicts each unlabelled image several times, with noise and with the dropout that the network has
    (`train.dropout`; without any, the noise alone makes the passes differ). Where the mean of these predictions has
    too much entropy, a pixel counts nothing. What the student is to predict comes from one more pass, as in the
    authors' code.
    """

    class Settings(MeanTeacher.Settings):
        """What a user can set."""

        passes: int = Field(
            8, ge=1, le=1000, description="predictions that the entropy comes from (the paper: 8)"
        )
        threshold: Share = Field(
            0.75,
            description="the most entropy that counts at first, as a share of ln K; it rises to 1 over the whole "
            "stage (the paper: 3/4)",
        )

    settings: Settings

    def counted(self, batch: Batch, step: int) -> Tensor:
        """Return where in the scan the mean of the teacher's predictions has little entropy, (U, 1, *S) bool."""
        image = unlabelled_image(batch)
        passes = (
            torch.softmax(prediction(self.teacher, self.noisy(image, batch.seed, STREAMS + i)), 1)
            for i in range(self.settings.passes)
        )
        mean = sum(passes, start=image.new_zeros(())) / self.settings.passes
        entropy = entropy_map(mean.clamp(min=torch.finfo(mean.dtype).tiny).log())
        # The rest of the way to 1 is gone along the whole stage.
        most = self.settings.threshold + self.ramped(1 - self.settings.threshold, 1.0, step)
        inside = inside_scan(batch)
        certain = (entropy < most) & inside
        kept, pixels = self.ranks.sum_each(certain.sum(), inside.sum())
        self.monitors["kept_teacher"] = kept / pixels.clamp(min=1)
        return certain.unsqueeze(1)
