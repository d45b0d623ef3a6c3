"""The one interface between methods and training."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from mlbseg.core.directional import forked_random, seed_random
from mlbseg.core.ramps import sigmoid_ramp
from mlbseg.core.ranks import ALONE, Ranks
from mlbseg.core.teacher import make_teacher, update_teacher
from mlbseg.types import Batch, Losses


class Method(nn.Module, ABC):
    """A way of training: holds its networks and says what to minimise.

    Training draws a batch, and for each `Losses` that `losses` yields it backpropagates the sum of the terms,
    clips, and steps the optimiser; then it calls `after_step` once. A method that yields twice (MLB in paper
    mode) computes its second loss after the first step was taken.

    A method that uses unlabelled images is stage 2: its student comes trained on the clean cases alone, by stage 1.

    Class attributes:
        uses_unlabelled: Batches carry `image`.
        needs_initial_labels: Batches carry `initial_label`: what noisy cases came with and, where the settings ask for
            it, what stage 1's network predicted of the unlabelled ones.
        passes: Copies of each unlabelled patch that a step sends through a network with gradient, which the plan
            needs memory for.
        predicts: The network that predicts unless told otherwise.
        mixes_pairs: Neighbours in the batch (the first and the second, the third and the fourth ...) are mixed: a
            rank's share of a batch must be even.

    Attributes:
        student: The network that predicts, trained by the optimiser.
        relabel: How many times in a stage training is to predict all unlabelled and noisy scans, whole, by
            `scan_labeller`, the first time before the first step; batches then carry `pseudo_label`.
        length: Training steps of the whole stage, set by training; what ramps count by.
        optimiser: Set by training before the first step; read by methods that look one step ahead.
        ranks: Set by training; those that share the batch. A loss is that of the whole batch, with the gradient
            of this rank's part (see `mlbseg.core.losses`): training adds the gradients up.
        monitors: Scalars of the last step worth showing, by name; of the whole batch.
    """

    uses_unlabelled = False
    needs_initial_labels = False
    passes = 1
    predicts = "student"
    mixes_pairs = False

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student
        self.relabel = 0
        self.length = 1
        self.optimiser: torch.optim.Optimizer | None = None
        self.ranks: Ranks = ALONE
        self.monitors: dict[str, Tensor] = {}

    @abstractmethod
    def losses(self, batch: Batch, step: int) -> Iterator[Losses]:
        """Yield the named scalar terms of each optimiser step of training step `step` (counted from 0)."""

    def after_step(self, step: int) -> None:
        """Do what follows the last optimiser step of a training step, such as moving a teacher."""

    def trained(self) -> Iterator[nn.Parameter]:
        """Return the parameters that the optimiser moves: the student's, unless others learn beside it."""
        return self.student.parameters()

    def networks(self) -> dict[str, nn.Module]:
        """Return the networks that can predict, by name."""
        return {"student": self.student}

    def predictor(self) -> nn.Module:
        """Return the network that prediction uses unless told otherwise."""
        return self.networks()[self.predicts]

    def scan_labeller(self) -> nn.Module:
        """Return the network whose predictions are pseudo labels, where whole scans are predicted for these."""
        return self.predictor()

    def ramped(self, weight: float, ramp: float, step: int) -> float:
        """Return the factor of a term that comes in over the first part of the stage.

        Args:
            weight: The factor once the ramp is over.
            ramp: Share of the stage over which it rises (`sigmoid_ramp`).
            step: Of the stage, from 0.
        """
        return weight * sigmoid_ramp(step / (ramp * self.length))

    def weight_maps(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Return how the method, as it stands, would weigh the pixels of the unlabelled images: to be looked at.

        Nothing that training depends on is changed.

        Returns:
            Label (U, *S) and weight (U, *S) by the name of the labels' source; empty where no weight is decided.
        """
        return {}

    def seeds(self, count: int, seed: int, stream: int) -> list[int]:
        """Return a seed for each image of this rank: its own, wherever in the global batch the rank's part begins.

        Args:
            count: Images of this rank.
            seed: Of the batch.
            stream: Different streams give different numbers to one image.
        """
        first = self.ranks.index * count
        return [
            int(np.random.SeedSequence([seed, stream, first + i]).generate_state(1)[0]) for i in range(count)
        ]

    @contextlib.contextmanager
    def same_dropout(self, batch: Batch) -> Iterator[None]:
        """Draw the masks of dropout from the batch's seed alone: two passes of one network can be given the same."""
        with forked_random(batch.clean_image.device):
            seed_random(batch.seed + self.ranks.index, batch.clean_image.device)
            yield


class Taught(Method):
    """A method whose student has a mean teacher beside it, which predicts unless the method says otherwise.

    Args:
        student: The network.
        teacher_decay: a_max of the teacher (see `update_teacher`).
    """

    predicts = "teacher"

    def __init__(self, student: nn.Module, teacher_decay: float = 0.99) -> None:
        super().__init__(student)
        self.teacher = make_teacher(student)
        self.teacher_decay = teacher_decay

    def after_step(self, step: int) -> None:
        """Move the teacher, by the step of the stage."""
        update_teacher(self.teacher, self.student, step, self.teacher_decay)

    def networks(self) -> dict[str, nn.Module]:
        """Return teacher and student."""
        return {"teacher": self.teacher, "student": self.student}


def unlabelled_image(batch: Batch) -> Tensor:
    """Return the unlabelled images of a batch.

    Raises:
        ValueError: if there are none.
    """
    if batch.image is None:
        raise ValueError("this method needs unlabelled images in every batch")
    return batch.image


def inside_scan(batch: Batch) -> Tensor:
    """Return where the unlabelled images of a batch show their scans, (U, *S) bool."""
    if batch.inside is not None:
        return batch.inside
    return torch.ones_like(unlabelled_image(batch)[:, 0], dtype=torch.bool)


def neighbours(count: int) -> list[int]:
    """Return whom each of so many images is paired with: 0 with 1, 2 with 3; the last of an odd number with itself."""
    return [min(i ^ 1, count - 1) for i in range(count)]
