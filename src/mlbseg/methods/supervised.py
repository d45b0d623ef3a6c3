"""Supervised training on the clean cases alone: stage 1 of MLB-Seg, and the baseline to beat."""

from __future__ import annotations

from collections.abc import Iterator

from mlbseg.core.losses import supervised_loss, widened
from mlbseg.methods.base import Method
from mlbseg.types import Batch, Losses


class Supervised(Method):
    """Cross-entropy plus soft Dice on the clean batch."""

    def losses(self, batch: Batch, step: int) -> Iterator[Losses]:
        """Yield one loss, of the clean batch."""
        logits = widened(self.student(batch.clean_image))
        yield {"clean": supervised_loss(logits, batch.clean_label, ranks=self.ranks)}
