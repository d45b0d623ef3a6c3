"""What mlbseg must know of a network: how it is built, what it asks of its arguments, what it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

INSTANCE_NORM = ("instance", {"affine": True})

Strides = tuple[tuple[int, ...], ...]
"""By how much each axis is divided between each two levels, 1 or 2."""

Build = Callable[..., nn.Module]
"""From (ndim, in_channels, num_classes, channels, strides, dropout), and options by name where a builder has any."""


@dataclass(frozen=True, slots=True)
class Builder:
    """How one network is built, and what it asks of its arguments.

    The network maps an image (B, in_channels, *S) to logits (B, num_classes, *S), in 2D and in 3D. `make_network` sets
    its norm and its activations; layers that work in place elsewhere do not mix with forward-mode differentiation.

    Attributes:
        build: Called with (ndim, in_channels, num_classes, channels, strides, dropout). Heavy imports stand in it.
        min_levels: The least number of `channels`.
        max_levels: The greatest number of `channels`; None for no bound.
        plan_levels: The number of `channels` that the plan gives it; None for as many as the patch allows.
        first_multiple: What the first of the `channels` is a multiple of.
        halvings: How often the network halves its input; None for once between each two levels, or as `strides` say.
        anisotropic: Whether the strides may differ between axes.
        saved_maps: Feature maps that it saves for its backward pass, per feature of each level: what the plan's
            estimate of memory rests on. The default is that of the hungriest known.
        counted_at: The first of the `channels` at which weights are counted, where a network cannot be built without
            memory; they grow with its square. None where it can.
        options: Names of further arguments that `build` takes: what a plan may say of this network alone.
        deep: Whether `build` takes ``deep=True`` for a network with side outputs (see `mlbseg.core.sides`).
    """

    build: Build
    min_levels: int = 1
    max_levels: int | None = None
    plan_levels: int | None = None
    first_multiple: int = 1
    halvings: int | None = None
    anisotropic: bool = False
    saved_maps: int = 48
    counted_at: int | None = None
    options: tuple[str, ...] = ()
    deep: bool = False
