"""Nested U-Net (Zhou et al. 2018) as in MLB-Seg's public code: ReLU, linear upsampling, one output for two classes."""

from __future__ import annotations

import torch
from torch import nn

from mlbseg.networks.builder import Strides


class NestedUNet(nn.Module):
    """UNet++ of blocks of two convolutions, each with a norm and ReLU.

    Node (i, j) lies on level i; it sees all nodes (i, 0) to (i, j - 1) and the upsampled node (i + 1, j - 1). Two
    classes have one output z, the log-odds of the second: the logits are (0, z), whose softmax is the sigmoid of z.
    """

    def __init__(
        self,
        ndim: int,
        in_channels: int,
        num_classes: int,
        channels: tuple[int, ...],
        strides: Strides,
        dropout: float,
    ) -> None:
        super().__init__()
        levels = len(channels)
        self.pool = (nn.MaxPool2d if ndim == 2 else nn.MaxPool3d)(2)
        self.up = nn.Upsample(
            scale_factor=2, mode="bilinear" if ndim == 2 else "trilinear", align_corners=True
        )
        self.nodes = nn.ModuleDict()
        for j in range(levels):
            for i in range(levels - j):
                before = in_channels if i == 0 else channels[i - 1]
                seen = j * channels[i] + channels[i + 1] if j else before
                self.nodes[f"{i}_{j}"] = _block(ndim, seen, channels[i], dropout)
        conv = nn.Conv2d if ndim == 2 else nn.Conv3d
        self.head = conv(channels[0], 1 if num_classes == 2 else num_classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, num_classes, *S)."""
        levels = max(int(name[0]) for name in self.nodes) + 1
        found: list[list[torch.Tensor]] = [[] for _ in range(levels)]
        # Along the diagonals, so that the deepest features come before what is made of them alone.
        for depth in range(levels):
            seen = self.pool(found[depth - 1][0]) if depth else x
            found[depth].append(self.nodes[f"{depth}_0"](seen))
            for j in range(1, depth + 1):
                i = depth - j
                below = self.up(found[i + 1][j - 1])
                found[i].append(self.nodes[f"{i}_{j}"](torch.cat([*found[i], below], 1)))
        z: torch.Tensor = self.head(found[0][-1])
        return torch.cat([torch.zeros_like(z), z], 1) if z.shape[1] == 1 else z


def _block(ndim: int, before: int, after: int, dropout: float) -> nn.Module:
    conv, norm = (nn.Conv2d, nn.InstanceNorm2d) if ndim == 2 else (nn.Conv3d, nn.InstanceNorm3d)
    drop = nn.Dropout2d if ndim == 2 else nn.Dropout3d
    parts: list[nn.Module] = []
    for seen in (before, after):
        parts += [conv(seen, after, 3, padding=1), norm(after, affine=True), nn.ReLU()]
        if dropout:
            parts.append(drop(dropout))
    return nn.Sequential(*parts)
