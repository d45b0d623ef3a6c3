"""A plain network: convolutions at one resolution."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from mlbseg.networks import Builder, Strides


def build(
    ndim: int, in_channels: int, num_classes: int, channels: tuple[int, ...], strides: Strides, dropout: float
) -> nn.Module:
    """Return one convolution for each of `channels`, and one that makes logits of the last."""
    conv, norm = (nn.Conv2d, nn.InstanceNorm2d) if ndim == 2 else (nn.Conv3d, nn.InstanceNorm3d)
    layers: list[nn.Module] = []
    for before, after in pairwise((in_channels, *channels)):
        layers += [
            conv(before, after, 3, padding=1),
            norm(after, affine=True),
            nn.ReLU(),
            nn.Dropout(dropout),
        ]
    return nn.Sequential(*layers, conv(channels[-1], num_classes, 1))


PLAIN = Builder(build, halvings=0, plan_levels=2, saved_maps=3)
