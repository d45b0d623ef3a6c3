"""Residual U-Net (Kerfoot et al. 2018), MONAI's."""

from __future__ import annotations

from monai.networks.nets.unet import UNet
from torch import nn

from mlbseg.networks.builder import INSTANCE_NORM, Strides


def build(
    ndim: int, in_channels: int, num_classes: int, channels: tuple[int, ...], strides: Strides, dropout: float
) -> nn.Module:
    """Return one level for each entry of `channels`; its first convolution already halves."""
    net: nn.Module = UNet(
        ndim,
        in_channels,
        num_classes,
        channels=channels,
        strides=strides,
        num_res_units=2,
        norm=INSTANCE_NORM,
        dropout=dropout,
    )
    return net
