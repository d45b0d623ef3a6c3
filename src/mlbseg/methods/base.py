"""The one interface between methods and training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mlbseg.core.ranks import ALONE, Ranks
from mlbseg.types import Batch, Losses


class Method(nn.Module, ABC):
    """A way of training: holds its networks and says what to minimise.

    Training draws a batch, and for each `Losses` that `losses` yields it backpropagates the sum of the terms,
    clips, and steps the optimiser; then it calls `after_step` once. A method that yields twice (MLB in paper
    mode) computes its second loss after the first step was taken.

    Class attributes:
        uses_unlabelled: Batches carry `image`.
        needs_initial_labels: Stage 1 trains on the clean cases alone and predicts the others once; batches
            carry `initial_label`.

    Attributes:
        student: The network that the optimiser moves.
        optimiser: Set by training before the first step; read by methods that look one step ahead.
        ranks: Set by training; those that share the batch. A loss is that of the whole batch, with the gradient
            of this rank's part (see `mlbseg.core.losses`): training adds the gradients up.
        monitors: Scalars of the last step worth showing, by name; of the whole batch.
    """

    uses_unlabelled = False
    needs_initial_labels = False

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student
        self.optimiser: torch.optim.Optimizer | None = None
        self.ranks: Ranks = ALONE
        self.monitors: dict[str, Tensor] = {}

    @abstractmethod
    def losses(self, batch: Batch, step: int) -> Iterator[Losses]:
        """Yield the named scalar terms of each optimiser step of training step `step` (counted from 0)."""

    def after_step(self, step: int) -> None:
        """Do what follows the last optimiser step of a training step, such as moving a teacher."""

    def networks(self) -> dict[str, nn.Module]:
        """Return the networks that can predict, the preferred one first."""
        return {"student": self.student}

    def predictor(self) -> nn.Module:
        """Return the network that prediction uses unless told otherwise."""
        return next(iter(self.networks().values()))
