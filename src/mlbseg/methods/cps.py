"""CPS: two networks, each learns the classes that the other predicts (Chen et al., CVPR 2021, arXiv 2106.01226)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from mlbseg.core.losses import mean_cross_entropy, widened
from mlbseg.core.scope import parameters_in_scope, redraw
from mlbseg.methods.base import Context, Method, inside_scan, unlabelled_image
from mlbseg.settings import Ramp, Section, Weight
from mlbseg.types import IGNORE, Batch, Losses


class CPS(Method):
    """Supervised loss of both networks, and the cross-entropy of each on the other's classes of unlabelled images."""

    uses_unlabelled = True

    class Settings(Method.Settings):
        """What a user can set."""

        # The paper's networks share a trained backbone, as ``decoder`` does.
        redrawn: Literal["decoder", "head", "all"] = Field(
            "decoder",
            description="part of the second network that is drawn anew at the first step, lest both be the same; "
            "the rest has the weights of stage 1. A network without coarser layers has head or all only",
        )
        pseudo_weight: Weight = Field(
            1.5,
            description="factor of the unlabelled images' loss once the ramp is over (the paper: 1.5 on PASCAL VOC)",
        )
        ramp: Ramp = Field(
            0.4,
            description="share of the stage over which the factor rises; what is drawn anew must learn first",
        )

    settings: Settings

    def __init__(
        self, student: nn.Module, settings: Section | None = None, context: Context | None = None
    ) -> None:
        super().__init__(student, settings, context)
        self.second = copy.deepcopy(student)

    @classmethod
    def passes(cls, settings: Any) -> int:
        """Return 3: those of both networks, and the second's of the clean images."""
        return 3

    def losses(self, batch: Batch, step: int) -> Iterator[Losses]:
        """Yield one loss."""
        image = unlabelled_image(batch)
        if step == 0:
            # Where the layers lie is only known with an image; a run that goes on has them from its checkpoint.
            names = parameters_in_scope(self.second, batch.clean_image, self.settings.redrawn)
            redraw(self.second, names, batch.seed)
        count = len(batch.clean_image)
        seen = torch.cat([batch.clean_image, image])
        one_clean, one = widened(self.student(seen)).tensor_split([count])
        two_clean, two = widened(self.second(seen)).tensor_split([count])
        inside = inside_scan(batch)
        ones, twos = (torch.where(inside, logits.argmax(1), IGNORE) for logits in (one, two))
        factor = self.ramped(self.settings.pseudo_weight, self.settings.ramp, step)
        yield {
            "clean": self.loss(one_clean, batch.clean_label) + self.loss(two_clean, batch.clean_label),
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
