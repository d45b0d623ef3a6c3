"""nnU-Net's own networks (Isensee et al. 2021, 2024), of dynamic-network-architectures: plain and residual.

The names of their weights are the library's, so that checkpoints of nnU-Net and nnssl fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mlbseg.core.sides import Sides
from mlbseg.errors import UserError
from mlbseg.networks.builder import Strides

try:
    from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
    from dynamic_network_architectures.building_blocks.residual import BasicBlockD
    from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
except ImportError as error:
    raise UserError(
        f"networks nnunet and resenc are those of dynamic-network-architectures, which cannot be imported: {error} "
        "(pip install 'mlbseg[nnunet]')"
    ) from None

RESIDUAL_BLOCKS = (1, 3, 4, 6)
"""Of the encoder's first stages; the deeper ones have as many as the last (nnU-Net's residual presets)."""


class _Deep:
    """Side outputs: logits of the coarser stages, but the coarsest, noted in each pass of training (see `Sides`)."""

    encoder: Any
    decoder: Any
    training: bool

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.sides = Sides()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of the finest stage."""
        noted = self.training and torch.is_grad_enabled()
        self.decoder.deep_supervision = noted
        found = self.decoder(self.encoder(x))
        full: torch.Tensor = found[0] if noted else found
        if noted:
            self.sides.note(full, found[1 : max(2, len(found) - 1)])
        return full


class _DeepPlain(_Deep, PlainConvUNet):
    """`PlainConvUNet` with side outputs."""


class _DeepResidual(_Deep, ResidualEncoderUNet):
    """`ResidualEncoderUNet` with side outputs."""


def plain(
    ndim: int,
    in_channels: int,
    num_classes: int,
    channels: tuple[int, ...],
    strides: Strides,
    dropout: float,
    *,
    kernels: Sequence[Sequence[int]] = (),
    blocks: Sequence[int] = (),
    decoder_blocks: Sequence[int] = (),
    deep: bool = False,
) -> nn.Module:
    """Return nnU-Net's plain U-Net: one stage for each entry of `channels`, of two convolutions each.

    Args:
        ndim: Number of spatial dimensions.
        in_channels: Channels of the image.
        num_classes: Classes, background among them.
        channels: Features of each stage.
        strides: By how much each axis is divided between each two stages.
        dropout: Probability of dropping a feature.
        kernels: Sides of each stage's kernels; 3 when empty.
        blocks: Convolutions of each stage of the encoder; 2 when empty.
        decoder_blocks: Convolutions of each stage of the decoder, deepest first; 2 when empty.
        deep: Whether coarser logits are noted for deep supervision.
    """
    own = {
        "n_conv_per_stage": list(blocks) or [2] * len(channels),
        "n_conv_per_stage_decoder": list(decoder_blocks) or [2] * (len(channels) - 1),
    }
    kind = _DeepPlain if deep else PlainConvUNet
    return _built(kind, ndim, in_channels, num_classes, channels, strides, dropout, kernels, own)


def residual(
    ndim: int,
    in_channels: int,
    num_classes: int,
    channels: tuple[int, ...],
    strides: Strides,
    dropout: float,
    *,
    kernels: Sequence[Sequence[int]] = (),
    blocks: Sequence[int] = (),
    decoder_blocks: Sequence[int] = (),
    deep: bool = False,
) -> nn.Module:
    """Return nnU-Net's U-Net with a residual encoder. Arguments as of `plain`.

    Args:
        ndim: Number of spatial dimensions.
        in_channels: Channels of the image.
        num_classes: Classes, background among them.
        channels: Features of each stage.
        strides: By how much each axis is divided between each two stages.
        dropout: Probability of dropping a feature.
        kernels: Sides of each stage's kernels; 3 when empty.
        blocks: Residual blocks of each stage of the encoder; 1, 3, 4, 6, 6 ... when empty.
        decoder_blocks: Convolutions of each stage of the decoder, deepest first; 1 when empty.
        deep: Whether coarser logits are noted for deep supervision.
    """
    counts = [RESIDUAL_BLOCKS[min(stage, len(RESIDUAL_BLOCKS) - 1)] for stage in range(len(channels))]
    own = {
        "n_blocks_per_stage": list(blocks) or counts,
        "n_conv_per_stage_decoder": list(decoder_blocks) or [1] * (len(channels) - 1),
    }
    kind = _DeepResidual if deep else ResidualEncoderUNet
    return _built(kind, ndim, in_channels, num_classes, channels, strides, dropout, kernels, own)


def _built(
    kind: Any,
    ndim: int,
    in_channels: int,
    num_classes: int,
    channels: tuple[int, ...],
    strides: Strides,
    dropout: float,
    kernels: Sequence[Sequence[int]],
    own: dict[str, list[int]],
) -> nn.Module:
    """Return a network as nnU-Net builds and draws it, each weight under one name and none that nothing needs."""
    stages = len(channels)
    kernels = [list(kernel) for kernel in kernels] or [[3] * ndim] * stages
    counts = {"kernels": len(kernels), **{name: len(values) for name, values in own.items()}}
    for name, found in counts.items():
        if found != (wanted := stages - ("decoder" in name)):
            raise UserError(f"plan.network_options: found {found} values of {name}, expected {wanted}")
    network: Any = kind(
        input_channels=in_channels,
        n_stages=stages,
        features_per_stage=list(channels),
        conv_op=nn.Conv3d if ndim == 3 else nn.Conv2d,
        kernel_sizes=kernels,
        strides=[[1] * ndim, *(list(stride) for stride in strides)],
        num_classes=num_classes,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d if ndim == 3 else nn.InstanceNorm2d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        dropout_op=(nn.Dropout3d if ndim == 3 else nn.Dropout2d) if dropout else None,
        dropout_op_kwargs={"p": dropout} if dropout else None,
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        **own,
    )
    network.apply(kind.initialize)
    del network.decoder.encoder
    heads = network.decoder.seg_layers
    used = len(heads) - 1 - (max(1, len(heads) - 2) if issubclass(kind, _Deep) else 0)
    network.decoder.seg_layers = nn.ModuleList([*(nn.Identity() for _ in heads[:used]), *heads[used:]])
    for module in network.modules():
        if isinstance(module, ConvDropoutNormReLU):  # what runs is `all_modules`
            for alias in ("conv", "dropout", "norm", "nonlin"):
                if hasattr(module, alias):
                    delattr(module, alias)
        if isinstance(module, BasicBlockD) and not isinstance(module.skip, nn.Module):
            module.skip = nn.Identity()  # a lambda, which cannot be sent to another process
    built: nn.Module = network
    return built
