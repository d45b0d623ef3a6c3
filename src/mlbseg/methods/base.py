"""The one interface between methods and training."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from mlbseg.core.directional import forked_random, seed_random
from mlbseg.core.losses import resolved
from mlbseg.core.ramps import sigmoid_ramp
from mlbseg.core.ranks import ALONE, Ranks
from mlbseg.core.sides import supervised_deeply
from mlbseg.core.teacher import make_teacher, update_teacher
from mlbseg.methods.losses import LOSSES, Loss
from mlbseg.settings import Below1, Section
from mlbseg.types import Batch, Losses


@dataclass(frozen=True)
class Context:
    """What a method is told of the run that it serves.

    Attributes:
        flip_axes: Axes of a patch whose flip keeps the anatomy valid; None for all.
        noisy: Whether some cases came with labels that nobody checked.
        loss: The loss of labelled pixels.
        crf: Factor of `gated_crf` in supervised training.
        started: Whether stage 1 begins with weights that the run was given.
    """

    flip_axes: tuple[int, ...] | None = None
    noisy: bool = False
    loss: Loss = LOSSES.own["dice-ce"]
    crf: float = 0.0
    started: bool = False


class Method(nn.Module, ABC):
    """A way of training: holds its networks and says what to minimise.

    Training draws a batch, and for each `Losses` that `losses` yields it backpropagates the sum of the terms,
    clips, and steps the optimiser; then it calls `after_step` once. A method that yields twice (MLB in paper
    mode) computes its second loss after the first step was taken.

    A method that uses unlabelled images is stage 2: its student comes trained on the clean cases alone, by stage 1.

    Its settings are the fields of its own class `Settings`; none is declared anywhere else. The command line, YAML
    files and the reference have them from there, in a section of the method's name.

    Args:
        student: The network, for stage 2 with the weights of stage 1.
        settings: What the user chose; the defaults when None.
        context: What the method must know of the run.

    Class attributes:
        uses_unlabelled: Batches carry `image`.
        needs_initial_labels: Batches carry `initial_label`: what noisy cases came with and, where `freezes_labels`
            says so, what stage 1's network predicted of the unlabelled ones.
        predicts: The network that predicts unless told otherwise.
        mixes_pairs: Neighbours in the batch (the first and the second, the third and the fourth ...) are mixed: a
            rank's share of a batch must be even.

    Attributes:
        student: The network that predicts, trained by the optimiser.
        relabel: How many times in a stage training is to predict all unlabelled and noisy scans, whole, by
            `scan_labeller`, the first time before the first step; batches then carry `pseudo_label`.
        length: Training steps of the whole stage, set by training; what ramps count by.
        epoch: Training steps in which as many patches are drawn as there are unlabelled slices (2D) or scans, set by
            training.
        optimiser: Set by training before the first step; read by methods that look one step ahead.
        sets: Set by training; of each set of classes that may hide in the background of a case, which they are (J, K)
            bool, for `loss`. None where every case has all classes labelled.
        ranks: Set by training; those that share the batch. A loss is that of the whole batch, with the gradient
            of this rank's part (see `mlbseg.core.losses`): training adds the gradients up.
        monitors: Scalars of the last step worth showing, by name; of the whole batch.
    """

    uses_unlabelled = False
    needs_initial_labels = False
    predicts = "student"
    mixes_pairs = False

    class Settings(Section):
        """What a user can set of the method."""

    settings: Settings

    def __init__(
        self, student: nn.Module, settings: Section | None = None, context: Context | None = None
    ) -> None:
        super().__init__()
        self.student = student
        self.settings = self.Settings() if settings is None else settings  # type: ignore[assignment]
        self.context = context or Context()
        self.relabel = 0
        self.length = 1
        self.epoch = 1
        self.optimiser: torch.optim.Optimizer | None = None
        self.sets: Tensor | None = None
        self.ranks: Ranks = ALONE
        self.monitors: dict[str, Tensor] = {}

    @classmethod
    def make(cls, student: nn.Module, context: Context | None = None, **settings: Any) -> Self:
        """Return the method with settings by name: ``BCP.make(network, box=0.5)``.

        Raises:
            ValueError: a setting is unknown, or its value is none that it takes (pydantic's ValidationError).
        """
        return cls(student, cls.Settings(**settings), context)

    # --- what training asks of a method before there is one --------------------------------------------------

    @classmethod
    def passes(cls, settings: Any) -> int:
        """Return how many copies of each unlabelled patch a step sends through a network with gradient.

        The plan needs memory for them.
        """
        return 1

    @classmethod
    def stage1(cls, settings: Any) -> type[Method] | None:
        """Return what trains stage 1, made with the method's settings; None for supervised training."""
        return None

    @classmethod
    def freezes_labels(cls, settings: Any) -> bool:
        """Return whether what stage 1 predicts of the unlabelled cases is kept, and learnt from throughout stage 2."""
        return False

    @classmethod
    def require_useful(cls, settings: Any, *, noisy: bool, meta_cases: int) -> None:
        """Refuse settings that would change nothing.

        Args:
            settings: Of the method.
            noisy: Whether labels that nobody checked come with cases.
            meta_cases: Clean cases that are to decide weights, and nothing else.

        Raises:
            UserError: naming the setting.
        """

    @classmethod
    def why_no_weights(cls, settings: Any, *, noisy: bool) -> str | None:
        """Return why a run has no weight maps, in a sentence; None for a method that never has any."""
        return None

    # --- what training does with it ---------------------------------------------------------------------------

    @abstractmethod
    def losses(self, batch: Batch, step: int) -> Iterator[Losses]:
        """Yield the named scalar terms of each optimiser step of training step `step` (counted from 0)."""

    def after_step(self, step: int) -> None:
        """Do what follows the last optimiser step of a training step, such as moving a teacher."""

    def trained(self) -> Iterator[nn.Parameter]:
        """Return the parameters that the optimiser moves: the student's, unless others learn beside it."""
        return self.student.parameters()

    def clipped(self) -> list[list[nn.Parameter]]:
        """Return the parameters that the optimiser moves, those whose gradient is clipped together in one list."""
        return [list(self.trained())]

    def begin(self, initialiser: Method) -> None:
        """Take over what stage 1 has trained beside the student."""

    def networks(self) -> dict[str, nn.Module]:
        """Return the networks that can predict, by name."""
        return {"student": self.student}

    def predictor(self) -> nn.Module:
        """Return the network that prediction uses unless told otherwise."""
        return self.networks()[self.predicts]

    def scan_labeller(self) -> nn.Module:
        """Return the network whose predictions are pseudo labels, where whole scans are predicted for these."""
        return self.predictor()

    def loss(self, logits: Tensor, label: Tensor, *, weight: Tensor | None = None) -> Tensor:
        """Return the loss of labelled pixels that the run has chosen (`train.loss`), a scalar of the whole batch.

        With side outputs (`train.deep_supervision`) it is taken at coarser resolutions too, of logits that come from
        the network's last pass: take it before the next one.

        Args:
            logits: (B, K, *S).
            label: (B, *S) class indices; negative ones are left out, but for those that name a set of classes
                (`resolved`).
            weight: (B, *S) how much each pixel counts; all alike when None.
        """

        def loss(logits: Tensor, label: Tensor, weight: Tensor | None) -> Tensor:
            logits, label = resolved(logits, label, self.sets)
            return self.context.loss(logits, label, weight=weight, ranks=self.ranks)

        return supervised_deeply(loss, self, logits, label, weight)

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
    """A method whose student has a mean teacher beside it, which predicts unless the method says otherwise."""

    predicts = "teacher"

    class Settings(Method.Settings):
        """What a user can set of every method with a teacher."""

        teacher_decay: Below1 = Field(
            0.99, description="share of itself that the mean teacher keeps at each step, once it has settled"
        )

    settings: Settings

    def __init__(
        self, student: nn.Module, settings: Section | None = None, context: Context | None = None
    ) -> None:
        super().__init__(student, settings, context)
        self.teacher = make_teacher(student)

    def after_step(self, step: int) -> None:
        """Move the teacher, by the step of the stage."""
        update_teacher(self.teacher, self.student, step, self.settings.teacher_decay)

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


def weak_image(batch: Batch) -> Tensor:
    """Return the unlabelled images as a network sees them that predicts pseudo labels: their grey values unchanged.

    Raises:
        ValueError: if there are none.
    """
    return unlabelled_image(batch) if batch.weak is None else batch.weak


def inside_scan(batch: Batch) -> Tensor:
    """Return where the unlabelled images of a batch show their scans, (U, *S) bool."""
    if batch.inside is not None:
        return batch.inside
    return torch.ones_like(unlabelled_image(batch)[:, 0], dtype=torch.bool)


def neighbours(count: int) -> list[int]:
    """Return whom each of so many images is paired with: 0 with 1, 2 with 3; the last of an odd number with itself."""
    return [min(i ^ 1, count - 1) for i in range(count)]
