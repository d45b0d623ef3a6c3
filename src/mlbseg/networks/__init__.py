"""One factory over the segmentation networks of MONAI and nnU-Net, with the same arguments for each.

Every network maps an image (B, in_channels, *S) to logits (B, num_classes, *S), in 2D and in 3D. Each side
of S must be a multiple of `required_multiple`; the caller crops or pads to that.

What is done to these networks so that they are alike:

* No activation works in place: in-place operations do not mix with forward-mode differentiation, by which the
  meta-learned weights are computed.
* Normalisation is chosen by name for all of them, always with learnt scale and shift.
* On a CPU, convolutions of maps thinner than their kernel leave bfloat16 for float32: see `_safe_in_bfloat16`.
* Only parameters that the output depends on are kept, each under one name: no unused heads, no aliases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from mlbseg.errors import UserError, nearest
from mlbseg.networks.builder import Build, Builder, Strides
from mlbseg.registry import Registry

__all__ = [
    "NETWORKS",
    "NORMS",
    "Builder",
    "Strides",
    "count_weights",
    "find_network",
    "make_network",
    "required_multiple",
    "side_multiples",
]

NORMS = ("instance", "group", "batch")
"""Names of the normalisations. Group norm has 8 groups, or fewer where 8 does not divide the channels."""


def make_network(
    name: str,
    *,
    ndim: int,
    in_channels: int,
    num_classes: int,
    channels: Sequence[int],
    strides: Sequence[Sequence[int]] = (),
    patch_size: Sequence[int] | None = None,
    norm: str = "instance",
    dropout: float = 0.0,
    options: Mapping[str, Any] | None = None,
    deep: bool = False,
) -> nn.Module:
    """Build a network with weights drawn from torch's global generator.

    Args:
        name: A key of `NETWORKS`, which says what each makes of `channels`.
        ndim: Number of spatial dimensions, 2 or 3.
        in_channels: Channels of the image.
        num_classes: Classes, background among them.
        channels: Feature maps at each level, full resolution first.
        strides: By how much each axis is divided between each two levels, 1 or 2; empty for 2 along every axis.
        patch_size: Sides of the patches to train on, voxels; checked where given.
        norm: One of `NORMS`.
        dropout: Probability of dropping a feature, in [0, 1).
        options: What this network alone can be told; see `Builder.options`.
        deep: Whether it has side outputs for deep supervision; it answers with its full logits all the same.

    Returns:
        A module from (B, in_channels, *S) to logits (B, num_classes, *S).

    Raises:
        UserError: A name is unknown, or the network cannot be built for these arguments.
    """
    builder = find_network(name)
    widths = tuple(channels)
    if ndim not in (2, 3):
        raise UserError(f"network {name}: {ndim} spatial dimensions, expected 2 or 3")
    if norm not in NORMS:
        raise UserError(f"unknown norm {norm!r}: {nearest(norm, NORMS)}")
    if min(in_channels, num_classes) < 1:
        raise UserError(
            f"network {name}: {in_channels} image channels, {num_classes} classes, expected 1 or more of each"
        )
    if not 0 <= dropout < 1:
        raise UserError(
            f"network {name}: dropout {dropout:g}, expected a probability of at least 0 and below 1"
        )
    _check_channels(name, builder, widths)
    _check_options(name, builder, options or {})
    if deep and not builder.deep:
        able = [other for other, its in NETWORKS.own.items() if its.deep]
        raise UserError(
            f"train.deep_supervision: found network {name}, which has no side outputs (choose {' or '.join(able)})"
        )
    multiples = side_multiples(name, ndim, widths, strides)
    if patch_size is not None:
        _check_patch(name, ndim, tuple(patch_size), multiples, norm)

    steps = tuple(tuple(stride) for stride in strides) or ((2,) * ndim,) * (len(widths) - 1)
    more = {**(options or {}), **({"deep": True} if deep else {})}
    network = builder.build(ndim, in_channels, num_classes, widths, steps, dropout, **more)
    _set_norm(network, norm, ndim)
    for module in network.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment]
        if type(module) in _SAFE:
            module.__class__ = _SAFE[type(module)]
    return network


def count_weights(
    name: str,
    *,
    ndim: int,
    in_channels: int,
    num_classes: int,
    channels: Sequence[int],
    options: Mapping[str, Any] | None = None,
) -> int:
    """Return how many weights a network would have, without the memory or the time to build it.

    Args:
        name: As for `make_network`, like the rest.
        ndim: Number of spatial dimensions.
        in_channels: Channels of the image.
        num_classes: Classes, background among them.
        channels: Feature maps at each level.
        options: As for `make_network`.

    Raises:
        UserError: The name is unknown, or the network cannot be built for these arguments.
    """
    builder = find_network(name)
    widths = tuple(channels)
    _check_channels(name, builder, widths)
    _check_options(name, builder, options or {})
    if builder.counted_at is None:
        with torch.device("meta"):  # shapes alone
            halved = ((2,) * ndim,) * (len(widths) - 1)  # the weights are the same for any strides
            network = builder.build(ndim, in_channels, num_classes, widths, halved, 0.0, **(options or {}))
            return _weights(network)
    with torch.random.fork_rng(devices=[]):
        small = builder.build(ndim, in_channels, num_classes, (builder.counted_at,), (), 0.0)
    return int(_weights(small) * (widths[0] / builder.counted_at) ** 2)


def _weights(network: nn.Module) -> int:
    return sum(tensor.numel() for tensor in network.parameters())


def required_multiple(name: str, channels: Sequence[int], strides: Sequence[Sequence[int]] = ()) -> int:
    """Return a number of voxels of which every side of the input may be a multiple.

    Args:
        name: A key of `NETWORKS`.
        channels: As for `make_network`.
        strides: As for `make_network`.

    Raises:
        UserError: The name is unknown, or the strides do not fit the network.
    """
    ndim = len(strides[0]) if strides else 1
    return max(side_multiples(name, ndim, channels, strides))


def side_multiples(
    name: str, ndim: int, channels: Sequence[int], strides: Sequence[Sequence[int]] = ()
) -> tuple[int, ...]:
    """Return what each side of the input must be a multiple of, in voxels.

    Args:
        name: A key of `NETWORKS`.
        ndim: Number of sides.
        channels: As for `make_network`.
        strides: As for `make_network`.

    Raises:
        UserError: The name is unknown, or the strides do not fit the network.
    """
    builder = find_network(name)
    halvings = builder.halvings
    if not strides:
        return (2 ** (len(channels) - 1 if halvings is None else halvings),) * ndim
    if not builder.anisotropic:
        able = [other for other, its in NETWORKS.own.items() if its.anisotropic]
        raise UserError(
            f"network {name}: halves every axis alike, found strides of its own (leave them out, or choose "
            f"{' or '.join(able)})"
        )
    shaped = len(strides) == len(channels) - 1 and all(len(stride) == ndim for stride in strides)
    if not shaped or any(step not in (1, 2) for stride in strides for step in stride):
        raise UserError(
            f"network {name}: strides {[list(stride) for stride in strides]}, expected {len(channels) - 1} times "
            f"{ndim} numbers, each 1 or 2"
        )
    return tuple(math.prod(axis) for axis in zip(*strides, strict=True))


def find_network(name: str) -> Builder:
    """Return the builder of that name.

    Raises:
        UserError: naming the nearest.
    """
    return NETWORKS.find(name)


def _check_channels(name: str, builder: Builder, channels: tuple[int, ...]) -> None:
    if any(width < 1 for width in channels):
        raise UserError(f"network {name}: channels {list(channels)}, expected positive numbers")
    if builder.max_levels == builder.min_levels and len(channels) != builder.min_levels:
        raise UserError(f"network {name}: {len(channels)} levels of channels, expected {builder.min_levels}")
    if len(channels) < builder.min_levels:
        raise UserError(
            f"network {name}: {len(channels)} levels of channels, expected at least {builder.min_levels}"
        )


def _check_options(name: str, builder: Builder, options: Mapping[str, Any]) -> None:
    if unknown := sorted(set(options) - set(builder.options)):
        raise UserError(
            f"network {name}: unknown option {unknown[0]!r}: {nearest(unknown[0], builder.options)}"
        )


def _check_patch(
    name: str, ndim: int, patch_size: tuple[int, ...], multiples: tuple[int, ...], norm: str
) -> None:
    shape = "×".join(map(str, patch_size))
    if len(patch_size) != ndim:
        raise UserError(f"network {name}: patch {shape}, expected {ndim} sides")
    if any(side < 1 or side % step for side, step in zip(patch_size, multiples, strict=True)):
        fits = "×".join(
            str(max(1, math.ceil(side / step)) * step)
            for side, step in zip(patch_size, multiples, strict=True)
        )
        of = multiples[0] if len(set(multiples)) == 1 else "×".join(map(str, multiples))
        raise UserError(
            f"network {name}: patch {shape}, expected sides that are multiples of {of}, such as {fits}"
        )
    if norm == "instance" and patch_size == multiples:
        # One voxel at the lowest level has no variance: its normalised value would be 0 whatever the image.
        raise UserError(
            f"network {name}: patch {shape} leaves one voxel at the lowest level, where instance norm "
            f"has nothing to normalise, expected a side of {2 * max(multiples)} or more (or norm: group)"
        )


class _GroupNorm(nn.GroupNorm):
    """Group norm for any memory layout; torch 2.13's forward-mode rule takes contiguous tensors only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.contiguous())


def _set_norm(network: nn.Module, norm: str, ndim: int) -> None:
    """Replace every instance and batch norm by `norm`, with its scale and shift; a transformer's layer norms stay."""
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _InstanceNorm | _BatchNorm):
                layer = _norm_layer(norm, child.num_features, ndim, child.eps)
                if child.affine:
                    layer.weight, layer.bias = child.weight, child.bias
                setattr(parent, name, layer)


_NORMS: dict[tuple[str, int], type[_InstanceNorm] | type[_BatchNorm]] = {
    ("instance", 2): nn.InstanceNorm2d,
    ("instance", 3): nn.InstanceNorm3d,
    ("batch", 2): nn.BatchNorm2d,
    ("batch", 3): nn.BatchNorm3d,
}


def _norm_layer(norm: str, width: int, ndim: int, eps: float) -> nn.Module:
    if norm == "group":
        return _GroupNorm(math.gcd(8, width), width, eps=eps)
    return _NORMS[norm, ndim](width, eps=eps, affine=True)


def _safe_in_bfloat16(module: nn.Conv2d | nn.Conv3d, x: torch.Tensor) -> torch.Tensor:
    """Return the convolution, in float32 where bfloat16 would give a wrong gradient.

    torch 2.13 on a CPU with AVX-512 bf16: the weight's gradient is off or infinite where the map has fewer voxels
    along an axis than the kernel (measured: 3x3x3 on 2 voxels, 5x5x5 on 1 to 4). Such maps are small.
    """
    thin = any(n < k for n, k in zip(x.shape[2:], module.kernel_size, strict=True))
    if not thin or x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return module._conv_forward(x, module.weight, module.bias)
    with torch.autocast("cpu", enabled=False):
        return module._conv_forward(x.float(), module.weight, module.bias)


class _Conv2d(nn.Conv2d):
    forward = _safe_in_bfloat16  # type: ignore[assignment]


class _Conv3d(nn.Conv3d):
    forward = _safe_in_bfloat16  # type: ignore[assignment]


_SAFE: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: _Conv2d, nn.Conv3d: _Conv3d}


def _of(module: str, function: str = "build") -> Build:
    """Return what imports a network's module when it is built: its library takes seconds.

    The module is looked for beside this one, as it lies in an exported bundle too.
    """

    def build(
        ndim: int,
        in_channels: int,
        num_classes: int,
        channels: tuple[int, ...],
        strides: Strides,
        dropout: float,
        **options: Any,
    ) -> nn.Module:
        build: Build = getattr(import_module(f".{module}", __package__), function)
        return build(ndim, in_channels, num_classes, channels, strides, dropout, **options)

    return build


_NNUNET_OPTIONS = ("kernels", "blocks", "decoder_blocks")

# Saved maps: measured with autograd's saved-tensor hooks; assumed for swin-unetr.
NETWORKS: Registry[Builder] = Registry(
    "network",
    "mlbseg.networks",
    {
        "unet": Builder(_of("unet"), min_levels=2, anisotropic=True, saved_maps=4),
        "unet++": Builder(_of("unetplusplus", "UNetPlusPlus"), min_levels=5, max_levels=5, plan_levels=5),
        "nested-unet": Builder(_of("nested_unet", "NestedUNet"), min_levels=5, max_levels=5, plan_levels=5),
        "vnet": Builder(_of("vnet", "VNet"), halvings=4, plan_levels=5, saved_maps=19),
        "vnet3": Builder(_of("vnet", "with_small_kernels"), halvings=4, plan_levels=5, saved_maps=19),
        "dynunet": Builder(_of("dynunet"), min_levels=3, anisotropic=True, saved_maps=14),
        "nnunet": Builder(
            _of("nnunet", "plain"),
            min_levels=2,
            anisotropic=True,
            saved_maps=14,
            options=_NNUNET_OPTIONS,
            deep=True,
        ),
        "resenc": Builder(
            _of("nnunet", "residual"),
            min_levels=2,
            anisotropic=True,
            saved_maps=21,
            options=_NNUNET_OPTIONS,
            deep=True,
        ),
        "swin-unetr": Builder(_of("swin_unetr"), halvings=5, plan_levels=5, first_multiple=12, counted_at=12),
    },
    lambda thing: isinstance(thing, Builder),
)
"""The networks, and what each makes of `channels`:

* ``unet``: residual U-Net (Kerfoot et al. 2018), one level per entry; its first convolution already halves,
  which makes it the fastest.
* ``unet++``: nested U-Net (Zhou et al. 2018), MONAI's, five levels.
* ``nested-unet``: the same as in MLB-Seg's public code, with (64, 128, 256, 512, 1024) there: ReLU, linear upsampling,
  and a single output for two classes.
* ``vnet``: V-Net (Milletari et al. 2016), always five levels of 1, 2, 4, 8, 16 times the first entry (16 in
  the original); the other entries are not used.
* ``vnet3``: the same with kernels of 3 in place of 5, close to what UA-MT (Yu et al. 2019) and the papers after it
  train on the left atrium: a quarter of the weights.
* ``dynunet``: nnU-Net's plain U-Net (Isensee et al. 2021) as MONAI has it, one level per entry.
* ``nnunet``: the same as nnU-Net itself has it, so that its weights fit; one level per entry.
* ``resenc``: nnU-Net's U-Net with a residual encoder (Isensee et al. 2024), so that its weights and those of nnssl fit;
  one level per entry.
* ``swin-unetr``: Swin UNETR (Hatamizadeh et al. 2022), always 1, 2, 4, 8, 16 times the first entry, a
  multiple of 12; the other entries are not used.
"""
