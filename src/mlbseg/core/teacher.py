"""The mean teacher: an exponential moving average of the student (Tarvainen & Valpola, NeurIPS 2017)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mlbseg.core.directional import copied_buffers
from mlbseg.core.losses import widened


def make_teacher(student: nn.Module) -> nn.Module:
    """Return a copy of the student that no gradient ever reaches."""
    teacher = copy.deepcopy(student)
    return teacher.requires_grad_(requires_grad=False)


@torch.no_grad()
def prediction(network: nn.Module, image: Tensor) -> Tensor:
    """Return the logits (B, K, *S), float32 or better, of a network that is only asked.

    No gradient flows, and BatchNorm in train mode leaves its running statistics as they are.
    """
    return widened(functional_call(network, copied_buffers(network), (image,)))


def decay_at(step: float, max_decay: float) -> float:
    """Return the decay a = min(1 - 1/(step + 1), max_decay); `step` is the global step, counted from 0.

    The public MLB-Seg code counts within the epoch, so that the teacher turns into the student at every
    epoch's start; the global step is what the mean teacher's paper means.
    """
    return min(1 - 1 / (step + 1), max_decay)


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, step: float, max_decay: float) -> None:
    """Move the teacher towards the student in place: θ' ← a θ' + (1 - a) θ; buffers are copied.

    Args:
        teacher: Moved.
        student: Of the same parameters.
        step: See `decay_at`; infinite for a decay that is `max_decay` from the first step on.
        max_decay: In [0, 1].
    """
    weight = 1 - decay_at(step, max_decay)
    for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        mine.lerp_(theirs, weight)
    for buffer, source in zip(teacher.buffers(), student.buffers(), strict=True):
        buffer.copy_(source)
