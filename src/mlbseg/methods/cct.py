"""CCT: changed features are to give the same prediction (Ouali et al., CVPR 2020, arXiv 2003.09005)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from mlbseg.core.directional import copied_buffers
from mlbseg.core.features import (
    Level,
    active_dropped,
    changed_levels,
    channels_dropped,
    feature_levels,
    features_with_noise,
    parameters_after,
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

    The features of all levels (see `feature_levels`) are changed in three ways: by noise, without their most active
    places, without half of their channels. Each change has a decoder of its own, which begins as a copy of the
    student's; the encoder is the student's. Only the student predicts.
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
        # Which parameters are the decoder's is known with the first image; those of the encoders here stay unused.
        self.auxiliary = nn.ModuleList(copy.deepcopy(student) for _ in _CHANGES)
        self._levels: list[Level] = []
        self._decoder: frozenset[str] = frozenset()

    @classmethod
    def passes(cls, settings: Any) -> int:
        """Return one for each change of the features."""
        return len(_CHANGES)

    def losses(self, batch: Batch, step: int) -> Iterator[Losses]:
        """Yield one loss."""
        image = unlabelled_image(batch)
        if not self._levels:
            self._levels = feature_levels(self.student, image)
            self._decoder = parameters_after(self.student, image, self._levels[0].layer)
        target = prediction(self.student, image)
        clean = self.loss(widened(self.student(batch.clean_image)), batch.clean_label)
        changed = [self._changed(number, image, batch.seed) for number in range(len(_CHANGES))]
        factor = self.ramped(self.settings.consistency_weight, self.settings.ramp, step)
        valid = torch.cat([inside_scan(batch).unsqueeze(1)] * len(_CHANGES))
        distance = prediction_distance(
            torch.cat(changed), torch.cat([target] * len(_CHANGES)), valid, ranks=self.ranks
        )
        yield {"clean": clean, "features": factor * distance}

    def trained(self) -> Iterator[nn.Parameter]:
        """Return the parameters of the student and of the further decoders."""
        yield from self.student.parameters()
        yield from self.auxiliary.parameters()

    def _changed(self, number: int, image: Tensor, seed: int) -> Tensor:
        """Return what a further decoder predicts of images (U, C, *S) from changed features: logits (U, K, *S)."""
        change = _CHANGES[number]
        count = len(self._levels)
        seeds = [self.seeds(len(image), seed, count * number + level) for level in range(count)]
        own = dict(self.auxiliary[number].named_parameters())
        mixed = {n: own[n] if n in self._decoder else p for n, p in self.student.named_parameters()}
        with changed_levels(self.student, self._levels, lambda z, level: change(seeds[level], z)):
            logits = functional_call(self.student, {**mixed, **copied_buffers(self.student)}, (image,))
        return widened(logits)
