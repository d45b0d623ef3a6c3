"""Uncertainty-aware mean teacher: learn where the teacher is certain (Yu et al., MICCAI 2019, arXiv 1907.07034)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mlbseg.core.losses import entropy_map
from mlbseg.core.teacher import prediction
from mlbseg.methods.base import inside_scan, unlabelled_image
from mlbseg.methods.mean_teacher import STREAMS, MeanTeacher
from mlbseg.types import Batch


class UAMT(MeanTeacher):
    """The losses of a mean teacher, the distance to it only where its predictions under noise agree.

    The teacher predicts each unlabelled image several times, with noise and with the dropout that the network has
    (`train.dropout`; without any, the noise alone makes the passes differ). Where the mean of these predictions has
    too much entropy, a pixel counts nothing. What the student is to predict comes from one more pass, as in the
    authors' code.

    Args:
        student: The network, with the weights of stage 1.
        teacher_decay: a_max of the teacher (the paper: 0.99).
        noise: SD of the Gaussian noise on either network's input, in units of the normalised intensity (the
            authors' code: 0.1, cut off at 0.2, and none for the student).
        passes: T, predictions that the entropy comes from (the paper: 8).
        threshold: The most entropy that counts at first, as a share of ln K; it rises to 1 over the whole stage
            (`sigmoid_ramp`; the paper: 3/4).
        consistency_weight: Factor of the distance once the ramp is over, that of our mean teacher (the paper: 0.1,
            in 6000 steps).
        ramp: Share of the stage over which the factor rises (`sigmoid_ramp`).
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        teacher_decay: float = 0.99,
        noise: float = 0.1,
        passes: int = 8,
        threshold: float = 0.75,
        consistency_weight: float = 10.0,
        ramp: float = 0.4,
    ) -> None:
        super().__init__(
            student,
            teacher_decay=teacher_decay,
            noise=noise,
            consistency_weight=consistency_weight,
            ramp=ramp,
        )
        self.passes = passes
        self.threshold = threshold

    def counted(self, batch: Batch, step: int) -> Tensor:
        """Return where in the scan the mean of the teacher's predictions has little entropy, (U, 1, *S) bool."""
        image = unlabelled_image(batch)
        passes = (
            torch.softmax(prediction(self.teacher, self.noisy(image, batch.seed, STREAMS + i)), 1)
            for i in range(self.passes)
        )
        mean = sum(passes, start=image.new_zeros(())) / self.passes
        entropy = entropy_map(mean.clamp(min=torch.finfo(mean.dtype).tiny).log())
        # The rest of the way to 1 is gone along the whole stage.
        most = self.threshold + self.ramped(1 - self.threshold, 1.0, step)
        inside = inside_scan(batch)
        certain = (entropy < most) & inside
        kept, pixels = self.ranks.sum_each(certain.sum(), inside.sum())
        self.monitors["kept_teacher"] = kept / pixels.clamp(min=1)
        return certain.unsqueeze(1)
