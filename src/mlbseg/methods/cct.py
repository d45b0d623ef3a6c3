"""CCT: changed features are to give the same prediction (Ouali et al., CVPR 2020, arXiv 2003.09005)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from mlbseg.core.features import (
    active_dropped,
    changed_features,
    channels_dropped,
    deepest_layer,
    features_with_noise,
)
from mlbseg.core.losses import prediction_distance, widened
from mlbseg.core.teacher import prediction
from mlbseg.methods.base import Context, Method, inside_scan, unlabelled_image
from mlbseg.settings import Ramp, Section, Weight
from mlbseg.types import Batch, Losses

# Each has a stream of random numbers.
_CHANGES: tuple[Callable[[Sequence[int], Tensor], Tensor], ...] = (
    features_with_noise,
    active_dropped,
    channels_dropped,
)


class CCT(Method):
    """Supervised loss, and the squared distance of predictions from changed features to that from the true ones.

    The features are those of the deepest layer (see `deepest_layer`), changed in three ways: by noise, without their
    most active places, without half of their channels. The paper has a decoder of its own for each change; here all
    share the student's, which therefore learns from these terms too.
    """

    uses_unlabelled = True

    class Settings(Method.Settings):
        """What a user can set."""

        consistency_weight: Weight = Field(
            30.0, description="factor of the distance once the ramp is over (the authors' code: 30)"
        )
        ramp: Ramp = Field(
            0.1, description="share of the stage over which the factor rises (the authors' code: 0.1)"
        )

    settings: Settings

    def __init__(
        self, student: nn.Module, settings: Section | None = None, context: Context | None = None
    ) -> None:
        super().__init__(student, settings, context)
        self._deepest: str | None = None

    @classmethod
    def passes(cls, settings: Any) -> int:
        """Return one for each change of the features."""
        return len(_CHANGES)

    def losses(self, batch: Batch, step: int) -> Iterator[Losses]:
        """Yield one loss."""
        image = unlabelled_image(batch)
        if self._deepest is None:
            self._deepest = deepest_layer(self.student, image)
        target = prediction(self.student, image)
        seeds = [self.seeds(len(image), batch.seed, stream) for stream in range(len(_CHANGES))]

        def change(features: Tensor) -> Tensor:
            parts = features.chunk(len(_CHANGES))
            return torch.cat([kind(own, z) for kind, own, z in zip(_CHANGES, seeds, parts, strict=True)])

        count = len(batch.clean_image)
        seen = torch.cat([batch.clean_image, *[image] * len(_CHANGES)])
        with changed_features(self.student, self._deepest, change, first=count):
            clean, logits = widened(self.student(seen)).tensor_split([count])
        target = torch.cat([target] * len(_CHANGES))
        factor = self.ramped(self.settings.consistency_weight, self.settings.ramp, step)
        valid = torch.cat([inside_scan(batch).unsqueeze(1)] * len(_CHANGES))
        yield {
            "clean": self.loss(clean, batch.clean_label),
            "features": factor * prediction_distance(logits, target, valid, ranks=self.ranks),
        }
