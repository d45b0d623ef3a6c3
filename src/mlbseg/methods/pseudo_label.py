"""Pseudo-label: the student learns what it thinks already (Lee, ICML workshop 2013), at once or in rounds."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pydantic import Field
from torch import nn

from mlbseg.core.losses import confident_label, widened
from mlbseg.core.perturb import strongly_changed
from mlbseg.core.teacher import make_teacher, prediction
from mlbseg.methods.base import Context, Method, inside_scan, unlabelled_image, weak_image
from mlbseg.settings import Below1, Ramp, Section, Share, Weight
from mlbseg.types import IGNORE, Batch, Losses

_CHANGES = 0  # stream of random numbers


class PseudoLabel(Method):
    """Supervised loss of the clean batch, and the same loss of unlabelled images with the labels most likely there."""

    uses_unlabelled = True

    class Settings(Method.Settings):
        """What a user can set."""

        # 0: it is the paper's method, costs no further pass, and its labels get better with the student.
        rounds: int = Field(
            0,
            ge=0,
            le=1000,
            description="0: the student's own prediction of the moment is the label, as in the paper; n: "
            "self-training, the stage is n equal rounds, in each of which the student as it was at its "
            "beginning gives the labels",
        )
        # Labels begin lower than in FixMatch, as the student sees the very image that it labels: where p >= 0.95 the
        # cross-entropy is 0.05 at most, and there is little to learn.
        threshold: Share = Field(
            0.8,
            description="least probability of the likeliest class that makes a label (the paper: 0; Oliver et al., "
            "NeurIPS 2018: 0.95)",
        )
        strength: Below1 = Field(
            0.0,
            description="of the changes with which the student sees the unlabelled images; 0, as in the paper: as "
            "they are",
        )
        pseudo_weight: Weight = Field(
            1.0,
            description="factor of the pseudo labels' loss once the ramp is over (the paper: 3, from a linear ramp)",
        )
        ramp: Ramp = Field(0.4, description="share of the stage over which the factor rises")

    settings: Settings

    def __init__(
        self, student: nn.Module, settings: Section | None = None, context: Context | None = None
    ) -> None:
        super().__init__(student, settings, context)
        self.labeller = make_teacher(student) if self.settings.rounds else None

    def losses(self, batch: Batch, step: int) -> Iterator[Losses]:
        """Yield one loss."""
        image = unlabelled_image(batch)
        if self.labeller is not None and self._round_begins(step):
            self.labeller.load_state_dict(self.student.state_dict())
        seen = image
        if self.settings.strength:
            seen = strongly_changed(
                self.seeds(len(image), batch.seed, _CHANGES), image, self.settings.strength
            )
        count = len(batch.clean_image)
        clean, logits = widened(self.student(torch.cat([batch.clean_image, seen]))).tensor_split([count])
        if self.labeller is not None:
            label = confident_label(prediction(self.labeller, weak_image(batch)), self.settings.threshold)
        else:
            seen_as_is = prediction(self.student, weak_image(batch)) if self.settings.strength else logits
            label = confident_label(seen_as_is, self.settings.threshold)
        inside = inside_scan(batch)
        label = torch.where(inside, label, IGNORE)
        kept, pixels = self.ranks.sum_each((label >= 0).sum(), inside.sum())
        self.monitors["kept_pseudo"] = kept / pixels.clamp(min=1)
        factor = self.ramped(self.settings.pseudo_weight, self.settings.ramp, step)
        yield {
            "clean": self.loss(clean, batch.clean_label),
            "pseudo": factor * self.loss(logits, label),
        }

    def train(self, mode: bool = True) -> PseudoLabel:
        """Set the mode of the student; the labeller predicts as it would a new scan."""
        super().train(mode)
        if self.labeller is not None:
            self.labeller.eval()
        return self

    def _round_begins(self, step: int) -> bool:
        return self._round(step) > self._round(step - 1)  # step -1 is of no round: its number is negative

    def _round(self, step: int) -> int:
        return min(step * self.settings.rounds // self.length, self.settings.rounds - 1)
