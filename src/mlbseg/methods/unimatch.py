"""UniMatch: FixMatch with two strong views, and one of changed features (Yang et al., CVPR 2023, arXiv 2208.09910)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from mlbseg.core.features import changed_features, channels_dropped, deepest_layer
from mlbseg.core.losses import mean_cross_entropy, widened
from mlbseg.core.perturb import boxes, uniform
from mlbseg.methods.base import Context, neighbours, unlabelled_image
from mlbseg.methods.fixmatch import FixMatch
from mlbseg.settings import Below1, Section, Share
from mlbseg.types import Batch, Losses

_FIRST, _SECOND, _FEATURES = range(3)  # streams of random numbers
_MIXING = 10  # plus these: those of the views' boxes
_BOX = (0.02, 0.4)  # share of the image that its neighbour takes, as in the authors' code


class UniMatch(FixMatch):
    """FixMatch of two strongly changed images, and of the image as it is with changed features.

    Either strongly changed image has a box of its neighbour's in it (CutMix), and the box's labels. The features are
    those of the deepest layer, whose channels are dropped (see `deepest_layer`); a U-Net's skip connections stay.
    The last of an odd number of images has no neighbour, and no box.
    """

    mixes_pairs = True

    class Settings(FixMatch.Settings):
        """What a user can set."""

        mix: Share = Field(
            0.5, description="probability that an image has a box of its neighbour (the paper: 0.5)"
        )
        drop: Below1 = Field(
            0.5, description="probability of dropping a channel of the features (the paper: 0.5)"
        )

    settings: Settings

    def __init__(
        self, student: nn.Module, settings: Section | None = None, context: Context | None = None
    ) -> None:
        super().__init__(student, settings, context)
        self._deepest: str | None = None

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
        if self._deepest is None:
            self._deepest = deepest_layer(self.student, image)
        seeds = self.seeds(len(image), batch.seed, _FEATURES)
        seen = torch.cat([batch.clean_image, *strong, image])
        ends = [len(batch.clean_image), len(seen) - len(image)]
        with changed_features(
            self.student,
            self._deepest,
            lambda z: channels_dropped(seeds, z, self.settings.drop),
            first=ends[1],
        ):
            clean, changed, dropped = widened(self.student(seen)).tensor_split(ends)
        factor = self.settings.pseudo_weight / 2
        yield {
            "clean": self.loss(clean, batch.clean_label),
            "pseudo": factor * mean_cross_entropy(changed, torch.cat(labels), ranks=self.ranks),
            "features": factor * mean_cross_entropy(dropped, label, ranks=self.ranks),
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
