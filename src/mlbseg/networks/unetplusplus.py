"""Nested U-Net (Zhou et al. 2018), MONAI's."""

from __future__ import annotations

import torch
from monai.networks.nets.basic_unetplusplus import BasicUNetPlusPlus
from torch import nn

from mlbseg.networks.builder import INSTANCE_NORM, Strides


class UNetPlusPlus(BasicUNetPlusPlus):
    """UNet++ that answers with the logits of its last node alone."""

    def __init__(
        self,
        ndim: int,
        in_channels: int,
        num_classes: int,
        channels: tuple[int, ...],
        strides: Strides,
        dropout: float,
    ) -> None:
        super().__init__(
            ndim,
            in_channels,
            num_classes,
            features=(*channels, channels[0]),
            norm=INSTANCE_NORM,
            dropout=dropout,
        )
        # The heads of deep supervision: computed by MONAI's forward, then thrown away.
        self.final_conv_0_1 = self.final_conv_0_2 = self.final_conv_0_3 = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of the last node."""
        logits: torch.Tensor = super().forward(x)[0]
        return logits
