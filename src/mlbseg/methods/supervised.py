"""Supervised training on the clean cases alone: stage 1 of MLB-Seg, and the baseline to beat."""

from __future__ import annotations

from collections.abc import Iterator

from mlbseg.core.losses import gated_crf, widened
from mlbseg.methods.base import Method
from mlbseg.types import Batch, Losses


class Supervised(Method):
    """The loss of the clean batch alone; with `train.crf`, and how its pixels go with their neighbours."""

    def losses(self, batch: Batch, step: int) -> Iterator[Losses]:
        """Yield one loss, of the clean batch."""
        logits = widened(self.student(batch.clean_image))
        terms = {"clean": self.loss(logits, batch.clean_label)}
        if self.context.crf:
            terms["crf"] = self.context.crf * gated_crf(logits, batch.clean_image, ranks=self.ranks)
        yield terms
