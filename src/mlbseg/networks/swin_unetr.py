"""Swin UNETR (Hatamizadeh et al. 2022), MONAI's."""

from __future__ import annotations

from monai.networks.nets.swin_unetr import SwinUNETR
from torch import nn

from mlbseg.errors import UserError
from mlbseg.networks.builder import INSTANCE_NORM, Strides


def build(
    ndim: int, in_channels: int, num_classes: int, channels: tuple[int, ...], strides: Strides, dropout: float
) -> nn.Module:
    """Return a network of 1, 2, 4, 8, 16 times the first of `channels`, a multiple of 12."""
    if channels[0] % 12:
        raise UserError(
            f"network swin-unetr: {channels[0]} channels at the first level, expected a multiple of 12"
        )
    net: nn.Module = SwinUNETR(
        in_channels,
        num_classes,
        feature_size=channels[0],
        norm_name=INSTANCE_NORM,
        drop_rate=dropout,
        spatial_dims=ndim,
    )
    return net
