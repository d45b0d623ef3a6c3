"""Pseudo-label: the student learns what it thinks already (Lee, ICML workshop 2013), at once or in rounds."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from mlbseg.core.losses import confident_label, supervised_loss, widened
from mlbseg.core.perturb import strongly_changed
from mlbseg.core.teacher import make_teacher, prediction
from mlbseg.methods.base import Method, inside_scan, unlabelled_image
from mlbseg.types import IGNORE, Batch, Losses

_CHANGES = 0  # stream of random numbers


class PseudoLabel(Method):
    """Supervised loss of the clean batch, and the same loss of unlabelled images with the labels most likely there.

    Args:
        student: The network, with the weights of stage 1.
        rounds: 0: the student's own prediction of the moment is the label, as in the paper. n >= 1: self-training,
            the stage is n equal rounds, in each of which the student as it was at its beginning gives the labels.
            0 by default: it is the paper's method, costs no further pass, and its labels get better with the student.
        threshold: The least probability of the likeliest class that makes a label (the paper: 0; 0.95 in Oliver et
            al., NeurIPS 2018, and in FixMatch). Labels begin lower here, as the student sees the very image that it
            labels: where p >= 0.95 the cross-entropy is 0.05 at most, and there is little to learn.
        strength: Of the changes with which the student sees the unlabelled images (see `strongly_changed`); 0, as in
            the paper: as they are.
        pseudo_weight: Factor of the loss once the ramp is over: a pseudo label then counts like a clean one (the
            paper: 3, from a linear ramp).
        ramp: Share of the stage over which the factor rises (`sigmoid_ramp`).
    """

    uses_unlabelled = True

    def __init__(
        self,
        student: nn.Module,
        *,
        rounds: int = 0,
        threshold: float = 0.8,
        strength: float = 0.0,
        pseudo_weight: float = 1.0,
        ramp: float = 0.4,
    ) -> None:
        super().__init__(student)
        self.labeller = make_teacher(student) if rounds else None
        self.rounds = rounds
        self.threshold = threshold
        self.strength = strength
        self.pseudo_weight = pseudo_weight
        self.ramp = ramp

    def losses(self, batch: Batch, step: int) -> Iterator[Losses]:
        """Yield one loss."""
        image = unlabelled_image(batch)
        if self.labeller is not None and self._round_begins(step):
            self.labeller.load_state_dict(self.student.state_dict())
        seen = image
        if self.strength:
            seen = strongly_changed(self.seeds(len(image), batch.seed, _CHANGES), image, self.strength)
        count = len(batch.clean_image)
        clean, logits = widened(self.student(torch.cat([batch.clean_image, seen]))).tensor_split([count])
        if self.labeller is not None:
            label = confident_label(prediction(self.labeller, image), self.threshold)
        else:
            seen_as_is = prediction(self.student, image) if self.strength else logits
            label = confident_label(seen_as_is, self.threshold)
        inside = inside_scan(batch)
        label = torch.where(inside, label, IGNORE)
        kept, pixels = self.ranks.sum_each((label >= 0).sum(), inside.sum())
        self.monitors["kept_pseudo"] = kept / pixels.clamp(min=1)
        factor = self.ramped(self.pseudo_weight, self.ramp, step)
        yield {
            "clean": supervised_loss(clean, batch.clean_label, ranks=self.ranks),
            "pseudo": factor * supervised_loss(logits, label, ranks=self.ranks),
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
        return min(step * self.rounds // self.length, self.rounds - 1)
