"""UniMatch: FixMatch with two strong views, and one of changed features (Yang et al., CVPR 2023, arXiv 2208.09910)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from mlbseg.core.features import Level, changed_levels, channels_dropped, feature_levels
from mlbseg.core.losses import widened
from mlbseg.core.perturb import boxes, uniform
from mlbseg.methods.base import Context, neighbours, unlabelled_image, weak_image
from mlbseg.methods.fixmatch import FixMatch
from mlbseg.settings import Below1, Section, Share
from mlbseg.types import Batch, Losses

_FIRST, _SECOND = range(2)  # streams of random numbers
_MIXING = 10  # plus these: those of the views' boxes
_FEATURES = 100  # plus a level's number, the deepest first
_BOX = (0.02, 0.4)  # share of the image that its neighbour takes, as in the authors' code


class UniMatch(FixMatch):
    """FixMatch of two strongly changed images, and of the weakly changed one with changed features.

    Either strongly changed image has a box of its neighbour's in it (CutMix), and the box's labels. Channels of the
    features of every level are dropped (see `feature_levels`). The last of an odd number of images has no neighbour,
    and no box.
    """

    mixes_pairs = True

    class Settings(FixMatch.Settings):
        """What a user can set."""

        mix: Share = Field(
            0.5, description="probability that an image has a box of its neighbour (the paper: 0.5)"
        )
        drop: Below1 = Field(
            0.5,
            description="probability of dropping a channel of the features, at every level (the paper: 0.5)",
        )

    settings: Settings

    def __init__(
        self, student: nn.Module, settings: Section | None = None, context: Context | None = None
    ) -> None:
        super().__init__(student, settings, context)
        self._levels: list[Level] = []

    @classmethod
    def passes(cls, settings: Any) -> int:
        """Return 3: two strongly changed images, and one with changed features."""
        return 3

    def losses(self, batch: Batch, step: int) -> Iterator[Losses]:
        """Yield one loss."""
        image = unlabelled_image(batch)
        label = self.label(batch)
        strong, labels = zip(
            *(self._mixed(image, label, batch.seed, stream) for stream in (_FIRST, _SECOND)), strict=True
        )
        if not self._levels:
            self._levels = feature_levels(self.student, image)
        seeds = [self.seeds(len(image), batch.seed, _FEATURES + n) for n in range(len(self._levels))]
        seen = torch.cat([batch.clean_image, *strong, weak_image(batch)])
        ends = [len(batch.clean_image), len(seen) - len(image)]
        with changed_levels(
            self.student,
            self._levels,
            lambda z, level: channels_dropped(seeds[level], z, self.settings.drop),
            first=ends[1],
        ):
            clean, changed, dropped = widened(self.student(seen)).tensor_split(ends)
        factor = self.settings.pseudo_weight / 2
        yield {
            "clean": self.loss(clean, batch.clean_label),
            "pseudo": factor * self.pseudo_loss(changed, torch.cat(labels)),
            "features": factor * self.pseudo_loss(dropped, label),
        }

    def _mixed(self, image: Tensor, label: Tensor, seed: int, stream: int) -> tuple[Tensor, Tensor]:
        """Return the images strongly changed, with a box of the neighbour's in some, and their labels (B, *S)."""
        strong = self.changed(image, seed, stream)
        seeds = self.seeds(len(image), seed, _MIXING + stream)
        box = boxes(seeds, image, _BOX)
        box &= uniform([s + 1 for s in seeds], (1,) * (image.ndim - 1), image) < self.settings.mix
        neighbour = neighbours(len(image))
        mixed = torch.where(box, strong[neighbour], strong)
        return mixed, torch.where(box.squeeze(1), label[neighbour], label)
