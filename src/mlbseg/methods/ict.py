"""Interpolation consistency: the prediction of a mix is to be the mix of predictions (Verma et al., IJCAI 2019)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mlbseg.core.losses import probability_distance, widened
from mlbseg.core.teacher import prediction
from mlbseg.methods.base import Taught, inside_scan, neighbours, unlabelled_image, weak_image
from mlbseg.settings import Ramp, Weight
from mlbseg.types import Batch, Losses

_SHARES = 0  # stream of random numbers


class ICT(Taught):
    """Supervised loss of the clean batch, and the squared distance of the student's prediction of mixed images.

    Neighbours in the batch are mixed, λ of the one with 1 - λ of the other and the other way round; the target is
    the teacher's predictions of both, mixed alike. The last of an odd number is mixed with itself: with a single
    unlabelled image in the batch nothing is interpolated.
    """

    uses_unlabelled = True
    mixes_pairs = True

    class Settings(Taught.Settings):
        """What a user can set."""

        alpha: float = Field(
            0.2,
            ge=1e-3,
            le=1e3,
            description="of λ ~ Beta(α, α), drawn for each pair: below 1, most mixes are nearly one of the two (the"
            " paper chose it by data set; SSL4MIS: 0.2)",
        )
        consistency_weight: Weight = Field(
            10.0,
            description="factor of the distance once the ramp is over (the paper chose it by data set; SSL4MIS: "
            "0.1, in 30,000 steps)",
        )
        ramp: Ramp = Field(0.4, description="share of the stage over which the factor rises")

    settings: Settings

    def losses(self, batch: Batch, step: int) -> Iterator[Losses]:
        """Yield one loss."""
        image = unlabelled_image(batch)
        share = self._shares(image, batch.seed)
        taught = _mixed(torch.softmax(prediction(self.teacher, weak_image(batch)), 1), share)
        count = len(batch.clean_image)
        seen = torch.cat([batch.clean_image, _mixed(image, share)])
        clean, logits = widened(self.student(seen)).tensor_split([count])
        inside = inside_scan(batch)
        valid = (inside & inside[neighbours(len(image))]).unsqueeze(1)
        distance = probability_distance(torch.softmax(logits, 1), taught, valid, ranks=self.ranks)
        yield {
            "clean": self.loss(clean, batch.clean_label),
            "teacher": self.ramped(self.settings.consistency_weight, self.settings.ramp, step) * distance,
        }

    def _shares(self, image: Tensor, seed: int) -> Tensor:
        """Return how much of itself each image keeps, (U): λ, the same for both of a pair."""
        # Ranks have even shares of the batch, so a pair's first image has one place in it, whoever draws.
        firsts = self.seeds(len(image), seed, _SHARES)[::2]
        drawn = [
            np.random.default_rng(first).beta(self.settings.alpha, self.settings.alpha) for first in firsts
        ]
        return image.new_tensor(drawn).repeat_interleave(2)[: len(image)]


def _mixed(x: Tensor, share: Tensor) -> Tensor:
    """Return `share` (U) of each of x (U, ...) and the rest of its neighbour."""
    kept = share.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
    return kept * x + (1 - kept) * x[neighbours(len(x))]
