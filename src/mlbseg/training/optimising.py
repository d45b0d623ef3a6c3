"""The optimiser of a stage, and how its learning rate goes."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mlbseg.config import TrainSettings
from mlbseg.data.batches import StepDataset


def make_optimiser(
    parameters: Iterable[nn.Parameter], settings: TrainSettings, lr: float
) -> torch.optim.Optimizer:
    """Return the optimiser of those parameters that are to move."""
    moved = [p for p in parameters if p.requires_grad]
    decay, momentum = settings.weight_decay, settings.momentum
    if settings.optimiser == "adamw":
        return torch.optim.AdamW(moved, lr=lr, betas=(momentum, 0.999), weight_decay=decay)
    return torch.optim.SGD(moved, lr=lr, momentum=momentum, weight_decay=decay)


def lr_factor(step: int, settings: TrainSettings, dataset: StepDataset) -> float:
    """Return what the learning rate is multiplied by at a step of the stage, counted from 0."""
    warm = min(1.0, (step + 1) / (_warmup(settings, dataset) + 1))
    if settings.schedule == "poly":
        return warm * (1 - step / len(dataset)) ** 0.9
    if settings.schedule == "cosine":
        return warm * (1 + math.cos(math.pi * step / len(dataset))) / 2
    if settings.schedule == "paper":
        return warm * 20 / (step // dataset.epoch + 20)
    return warm


def _warmup(settings: TrainSettings, dataset: StepDataset) -> int:
    """Return the steps over which the rate rises: weights from elsewhere would be lost in the first full steps."""
    if settings.warmup is not None:
        return settings.warmup
    return len(dataset) // 20 if settings.init is not None and dataset.key[1] == 1 else 0


def require_fitting(optimiser: torch.optim.Optimizer) -> None:
    """Refuse a state that would fail in the middle of a step.

    Raises:
        ValueError: a tensor has another shape than its parameter, or a setting is no number.
    """
    for parameter, state in optimiser.state.items():
        for value in state.values():  # a momentum, or a count of steps; SGD has None before its first step
            if value is not None and (
                not isinstance(value, Tensor) or value.shape not in ((), parameter.shape)
            ):
                raise ValueError
    for group in optimiser.param_groups:
        for name, usual in optimiser.defaults.items():
            pairs = zip(_flat(group[name]), _flat(usual), strict=True)
            if any(
                isinstance(own, int | float) and not isinstance(found, int | float) for found, own in pairs
            ):
                raise ValueError


def _flat(value: object) -> tuple[object, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)
