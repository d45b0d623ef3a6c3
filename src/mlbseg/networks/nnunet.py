"""nnU-Net's own networks (Isensee et al. 2021, 2024), of dynamic-network-architectures: plain and residual.

The names of their weights are the library's, so that checkpoints of nnU-Net and nnssl fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class _Family:
    """Networks of one class of the library: called with what a network depends on, it builds one.

    Attributes:
        kind: The class.
        deep: The same with side outputs.
        of_encoder: What the class calls the blocks of the encoder's stages.
        blocks: Of the encoder's first stages, where none are given; the deeper ones have as many as the last.
        decoder_blocks: Convolutions of each stage of the decoder, where none are given.
    """

    kind: Any
    deep: Any
    of_encoder: str
    blocks: tuple[int, ...]
    decoder_blocks: int

    def __call__(
        self,
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
        """Return a network as nnU-Net builds and draws it, each weight under one name and none that nothing needs.

        Args:
            ndim: Number of spatial dimensions.
            in_channels: Channels of the image.
            num_classes: Classes, background among them.
            channels: Features of each stage.
            strides: By how much each axis is divided between each two stages.
            dropout: Probability of dropping a feature.
            kernels: Sides of each stage's kernels; 3 when empty.
            blocks: Of each stage of the encoder: convolutions, or residual blocks; nnU-Net's when empty.
            decoder_blocks: Convolutions of each stage of the decoder, deepest first; nnU-Net's when empty.
            deep: Whether coarser logits are noted for deep supervision.

        Raises:
            UserError: for another number of kernels or blocks than there are stages.
        """
        stages = len(channels)
        usual = [self.blocks[min(stage, len(self.blocks) - 1)] for stage in range(stages)]
        own = {
            self.of_encoder: list(blocks) or usual,
            "n_conv_per_stage_decoder": list(decoder_blocks) or [self.decoder_blocks] * (stages - 1),
        }
        kind = self.deep if deep else self.kind
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


plain = _Family(PlainConvUNet, _DeepPlain, "n_conv_per_stage", (2,), 2)
"""nnU-Net's plain U-Net."""
residual = _Family(ResidualEncoderUNet, _DeepResidual, "n_blocks_per_stage", (1, 3, 4, 6), 1)
"""nnU-Net's U-Net with a residual encoder; the blocks are those of its residual presets."""
