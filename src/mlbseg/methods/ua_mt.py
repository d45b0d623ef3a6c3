"""Uncertainty-aware mean teacher: learn where the teacher is certain (Yu et al., MICCAI 2019, arXiv 1907.07034)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from mlbseg.core.features import changed_features, channels_dropped, deepest_layer
from mlbseg.core.losses import entropy_map
from mlbseg.methods.base import Context, inside_scan, unlabelled_image
from mlbseg.methods.mean_teacher import STREAMS, MeanTeacher
from mlbseg.settings import Below1, Section, Share
from mlbseg.types import Batch

_DROPPED = 1000  # plus the stream of a pass's noise: that of the channels that it drops


class UAMT(MeanTeacher):
    """The losses of a mean teacher, the distance to it only where its predictions under noise agree.

    The teacher predicts each unlabelled image several times, with noise and with dropout. Where the mean of these
    predictions has too much entropy, a pixel counts nothing. What the student is to predict comes from one more pass,
    as in the authors' code, and the student learns with dropout too.
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
        dropout: Below1 = Field(
            0.5,
            description="probability of dropping a channel of the deepest features, of student and teacher, beside "
            "the dropout that the network has (the paper: 0.5)",
        )

    settings: Settings

    def __init__(
        self, student: nn.Module, settings: Section | None = None, context: Context | None = None
    ) -> None:
        super().__init__(student, settings, context)
        self._deepest: str | None = None

    def counted(self, batch: Batch, step: int) -> Tensor:
        """Return where in the scan the mean of the teacher's predictions has little entropy, (U, 1, *S) bool."""
        image = unlabelled_image(batch)
        passes = (torch.softmax(self.taught(batch, STREAMS + i), 1) for i in range(self.settings.passes))
        mean = sum(passes, start=image.new_zeros(())) / self.settings.passes
        entropy = entropy_map(mean.clamp(min=torch.finfo(mean.dtype).tiny).log())
        # The rest of the way to 1 is gone along the whole stage.
        most = self.settings.threshold + self.ramped(1 - self.settings.threshold, 1.0, step)
        inside = inside_scan(batch)
        certain = (entropy < most) & inside
        kept, pixels = self.ranks.sum_each(certain.sum(), inside.sum())
        self.monitors["kept_teacher"] = kept / pixels.clamp(min=1)
        return certain.unsqueeze(1)

    def taught(self, batch: Batch, stream: int) -> Tensor:
        """Return the teacher's logits (U, K, *S), under the noise and the dropout of a stream."""
        image = unlabelled_image(batch)
        with self._dropping(self.teacher, image, self.seeds(len(image), batch.seed, _DROPPED + stream)):
            return super().taught(batch, stream)

    def learnt(self, seen: Tensor, batch: Batch) -> Tensor:
        """Return the student's logits, each image with its own dropout."""
        counts = len(batch.clean_image), len(seen) - len(batch.clean_image)
        seeds = [
            s for kind, count in enumerate(counts) for s in self.seeds(count, batch.seed, _DROPPED - 1 - kind)
        ]
        with self._dropping(self.student, seen, seeds):
            return super().learnt(seen, batch)

    @contextlib.contextmanager
    def _dropping(self, network: nn.Module, image: Tensor, seeds: Sequence[int]) -> Iterator[None]:
        """Let a network drop channels of the deepest features of images (B, C, *S), by a seed for each."""
        if not self.settings.dropout:
            yield
            return
        if self._deepest is None:
            self._deepest = deepest_layer(self.student, image)
        with changed_features(
            network, self._deepest, lambda z: channels_dropped(seeds, z, self.settings.dropout)
        ):
            yield
