"""How long a run will take: two steps of each stage, taken on noise of the plan's size before there is a run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlbseg.core.directional import forked_random, seed_random
from mlbseg.data.augment import Augmentation
from mlbseg.device import autocast
from mlbseg.errors import UserError, out_of_memory
from mlbseg.methods import Method, find_method
from mlbseg.runs import Run, augmentation_of, make_initialiser, make_method, make_student
from mlbseg.training.optimising import make_optimiser
from mlbseg.training.prepare import Planned, first_steps, second_steps
from mlbseg.types import Batch

MEASURED = 2
"""Steps that are timed, after one that is not: the first one also sets the convolutions up."""
TIMING = "timing a few steps of each stage"


@dataclass(frozen=True)
class StageTime:
    """One stage of a run, and how long it will take.

    Attributes:
        stage: 1 or 2.
        method: What trains in it.
        steps: Training steps.
        seconds_per_step: Measured. The patches of a step are augmented within this time where the process that trains
            draws them.
    """

    stage: int
    method: str
    steps: int
    seconds_per_step: float

    @property
    def minutes(self) -> float:
        """Of the whole stage."""
        return self.steps * self.seconds_per_step / 60

    def as_dict(self) -> dict[str, Any]:
        """Return the fields and the minutes, for `--json`."""
        return {**asdict(self), "minutes": self.minutes}


def time_stages(planned: Planned, device: torch.device) -> tuple[StageTime, ...]:
    """Time the steps of every stage that a plan leads to.

    Left out are what comes before the first step and between steps: scans that are prepared, predicted or validated,
    and checkpoints.

    Args:
        planned: From `plan_run`.
        device: Where the run would be trained.

    Raises:
        UserError: if the network cannot be built, or a step takes more memory than there is.
    """
    plan, config = planned.plan, planned.config
    # No folder is there: nothing is read from it or written to it.
    run = Run(Path(), config, plan, planned.split)
    two = find_method(config.method).uses_unlabelled
    first = first_steps(plan, config) if two else plan.steps
    try:
        with forked_random(device):
            seed_random(config.seed, device)
            student = make_student(plan, config)
            method = make_method(student, run)
            if not two:
                return (_timed(method, config.method, run, 1, first, device),)
            initialiser = make_initialiser(student, run)
            return (
                _timed(initialiser, "supervised", run, 1, first, device),
                _timed(method, config.method, run, 2, second_steps(plan, config), device),
            )
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(
            "not enough memory for one training step (choose a smaller plan.patch_size or plan.batch_size)"
        ) from error


def _timed(method: Method, name: str, run: Run, stage: int, steps: int, device: torch.device) -> StageTime:
    """Take a few steps of a stage, in its middle, where every term has come in."""
    train = run.config.train
    method.to(device).train()
    method.length = steps
    method.optimiser = make_optimiser(method.trained(), train, lr=1e-6)
    draws = train.workers == 0 or (train.workers is None and device.type == "cpu")
    augment = augmentation_of(run) if draws else None
    began = 0.0
    for turn in range(MEASURED + 1):
        if turn == 1:
            began = _now(device)
        _take_step(method, _noise(run, stage, augment, turn).to(device), steps // 2, run, device)
    return StageTime(stage, name, steps, (_now(device) - began) / MEASURED)


def _now(device: torch.device) -> float:
    """Return the time in seconds once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _take_step(method: Method, batch: Batch, step: int, run: Run, device: torch.device) -> None:
    """Do the work of one training step; the learning rate is so small that it changes next to nothing."""
    assert method.optimiser is not None  # noqa: S101 - `_timed` has set it
    losses = method.losses(batch, step)
    while True:
        with autocast(run.config.train.precision, device):
            terms = next(losses, None)
        if terms is None:
            break
        method.optimiser.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        for together in method.clipped():
            torch.nn.utils.clip_grad_norm_(together, run.config.train.clip)
        method.optimiser.step()
    method.after_step(step)


def _noise(run: Run, stage: int, augment: Augmentation | None, seed: int) -> Batch:
    """Return a batch of noise; half of each patch is background, half the last class."""
    plan, rng = run.plan, np.random.default_rng(seed)
    label = np.zeros(plan.patch_size, np.int64)
    label[: len(label) // 2] = plan.num_classes - 1

    def patches(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = [], []
        for index in range(count):
            image = rng.standard_normal((plan.channels, *plan.patch_size), np.float32)
            pair = torch.from_numpy(image), torch.from_numpy(label)
            pair = pair if augment is None else augment(image, label, seed + index)
            images.append(pair[0])
            labels.append(pair[1])
        return torch.stack(images), torch.stack(labels)

    batch = Batch(*patches(plan.batch_size), seed=seed)
    if stage == 2:
        batch.image, labels = patches(plan.unlabelled_batch_size)
        batch.inside = torch.ones_like(labels, dtype=torch.bool)
        batch.initial_label = batch.pseudo_label = labels
        if run.config.train.meta_cases:
            batch.meta_image, batch.meta_label = patches(plan.batch_size)
    return batch


def time_lines(stages: Sequence[StageTime]) -> list[str]:
    """Return how long training takes, a line for the whole and one for each stage."""
    total = sum(stage.minutes for stage in stages)
    return [
        f"training takes about {_minutes(total)} on this machine as busy as it is now, measured on a few steps "
        "(scans that are read and predicted are not counted):",
        *(
            f"  stage {stage.stage}, {stage.method}: {stage.steps} steps of {stage.seconds_per_step:.3g} s, "
            f"{_minutes(stage.minutes)}"
            for stage in stages
        ),
    ]


def _minutes(value: float) -> str:
    return f"{value:.1f} minutes" if value < 10 else f"{value:.0f} minutes"
