"""CPS: two networks, each learns the classes that the other predicts (Chen et al., CVPR 2021, arXiv 2106.01226)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from pydantic import Field
from torch import nn

from mlbseg.core.losses import widened
from mlbseg.core.scope import Scope, parameters_in_scope, redraw
from mlbseg.methods.base import Context, Method, inside_scan, unlabelled_image
from mlbseg.methods.losses import PseudoLoss, pseudo_label_loss
from mlbseg.settings import Ramp, Section, Weight
from mlbseg.types import IGNORE, Batch, Losses


class Twins(Method):
    """Two networks of one kind whose weights were drawn apart, each trained on the clean batch alone: CPS's stage 1.

    The first is trained as `Supervised` trains it.
    """

    def __init__(
        self, student: nn.Module, settings: Section | None = None, context: Context | None = None
    ) -> None:
        super().__init__(student, settings, context)
        self.second = copy.deepcopy(student)

    def losses(self, batch: Batch, step: int) -> Iterator[Losses]:
        """Yield one loss, of both."""
        if step == 0:  # a run that goes on has them from its checkpoint
            # Weights that the run was given are as good for both: then the heads alone tell the two apart.
            scope: Scope = "head" if self.context.started else "all"
            redraw(self.second, parameters_in_scope(self.second, batch.clean_image, scope), batch.seed)
        one, two = (widened(network(batch.clean_image)) for network in (self.student, self.second))
        yield {"clean": self.loss(one, batch.clean_label), "second": self.loss(two, batch.clean_label)}

    def trained(self) -> Iterator[nn.Parameter]:
        """Return the parameters of both networks."""
        yield from self.student.parameters()
        yield from self.second.parameters()

    def clipped(self) -> list[list[nn.Parameter]]:
        """Return the parameters of each network: neither's gradient makes the other's step smaller."""
        return [list(self.student.parameters()), list(self.second.parameters())]

    def networks(self) -> dict[str, nn.Module]:
        """Return both networks."""
        return {"student": self.student, "second": self.second}


class CPS(Twins):
    """Supervised loss of both networks, and the loss of each on the other's classes of unlabelled images."""

    uses_unlabelled = True

    class Settings(Method.Settings):
        """What a user can set."""

        pseudo_weight: Weight = Field(
            1.5,
            description="factor of the unlabelled images' loss once the ramp is over (the paper: 1.5 on PASCAL VOC)",
        )
        pseudo_loss: PseudoLoss = Field(
            "ce",
            description="loss of pseudo labels: ce, the paper's; dice, as SSL4MIS has it in 2D; dice-ce, both",
        )
        ramp: Ramp = Field(0.4, description="share of the stage over which the factor rises")

    settings: Settings

    @classmethod
    def passes(cls, settings: Any) -> int:
        """Return 3: those of both networks, and the second's of the clean images."""
        return 3

    @classmethod
    def stage1(cls, settings: Any) -> type[Method] | None:
        """Return what trains both networks on the clean images."""
        return Twins

    def begin(self, initialiser: Method) -> None:
        """Take over the second network."""
        self.second.load_state_dict(initialiser.networks()["second"].state_dict())

    def losses(self, batch: Batch, step: int) -> Iterator[Losses]:
        """Yield one loss."""
        image = unlabelled_image(batch)
        count = len(batch.clean_image)
        seen = torch.cat([batch.clean_image, image])
        one_clean, one = widened(self.student(seen)).tensor_split([count])
        two_clean, two = widened(self.second(seen)).tensor_split([count])
        inside = inside_scan(batch)
        ones, twos = (torch.where(inside, logits.argmax(1), IGNORE) for logits in (one, two))
        factor = self.ramped(self.settings.pseudo_weight, self.settings.ramp, step)
        kind = self.settings.pseudo_loss
        yield {
            "clean": self.loss(one_clean, batch.clean_label) + self.loss(two_clean, batch.clean_label),
            "pseudo": factor
            * (
                pseudo_label_loss(one, twos, kind, ranks=self.ranks)
                + pseudo_label_loss(two, ones, kind, ranks=self.ranks)
            ),
        }
