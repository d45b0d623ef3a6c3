"""CPS: two networks, each learns the classes that the other predicts (Chen et al., CVPR 2021, arXiv 2106.01226)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn

from mlbseg.core.losses import mean_cross_entropy, supervised_loss, widened
from mlbseg.core.scope import parameters_in_scope, redraw
from mlbseg.methods.base import Method, inside_scan, unlabelled_image
from mlbseg.types import IGNORE, Batch, Losses


class CPS(Method):
    """Supervised loss of both networks, and the cross-entropy of each on the other's classes of unlabelled images.

    Args:
        student: The first network, with the weights of stage 1.
        redrawn: The part of the second network that is drawn anew at the first step (see `parameters_in_scope`), lest
            both be the same; the rest has the weights of stage 1. The paper's share a trained backbone, as ``decoder``
            does; a network without coarser layers has ``head`` or ``all`` only.
        pseudo_weight: Factor of the unlabelled images' loss once the ramp is over (the paper: 1.5 on PASCAL VOC).
        ramp: Share of the stage over which the factor rises (`sigmoid_ramp`); what is drawn anew must learn first.
    """

    uses_unlabelled = True
    passes = 3  # the second network's clean pass among them

    def __init__(
        self,
        student: nn.Module,
        *,
        redrawn: Literal["decoder", "head", "all"] = "decoder",
        pseudo_weight: float = 1.5,
        ramp: float = 0.4,
    ) -> None:
        super().__init__(student)
        self.second = copy.deepcopy(student)
        self.redrawn = redrawn
        self.pseudo_weight = pseudo_weight
        self.ramp = ramp

    def losses(self, batch: Batch, step: int) -> Iterator[Losses]:
        """Yield one loss."""
        image = unlabelled_image(batch)
        if step == 0:
            # Where the layers lie is only known with an image; a run that goes on has them from its checkpoint.
            names = parameters_in_scope(self.second, batch.clean_image, self.redrawn)
            redraw(self.second, names, batch.seed)
        count = len(batch.clean_image)
        seen = torch.cat([batch.clean_image, image])
        one_clean, one = widened(self.student(seen)).tensor_split([count])
        two_clean, two = widened(self.second(seen)).tensor_split([count])
        inside = inside_scan(batch)
        ones, twos = (torch.where(inside, logits.argmax(1), IGNORE) for logits in (one, two))
        factor = self.ramped(self.pseudo_weight, self.ramp, step)
        yield {
            "clean": supervised_loss(one_clean, batch.clean_label, ranks=self.ranks)
            + supervised_loss(two_clean, batch.clean_label, ranks=self.ranks),
            "pseudo": factor
            * (
                mean_cross_entropy(one, twos, ranks=self.ranks)
                + mean_cross_entropy(two, ones, ranks=self.ranks)
            ),
        }

    def trained(self) -> Iterator[nn.Parameter]:
        """Return the parameters of both networks."""
        yield from self.student.parameters()
        yield from self.second.parameters()

    def networks(self) -> dict[str, nn.Module]:
        """Return both networks."""
        return {"student": self.student, "second": self.second}
