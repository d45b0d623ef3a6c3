"""V-Net (Milletari et al. 2016), of MONAI's parts."""

from __future__ import annotations

from monai.networks.nets.vnet import (
    DownTransition,
    InputTransition,
    OutputTransition,
    UpTransition,
)
from monai.networks.nets.vnet import VNet as MonaiVNet
from torch import nn

from mlbseg.errors import UserError
from mlbseg.networks.builder import Strides


class VNet(MonaiVNet):
    """V-Net of any width; MONAI's own is fixed at 16 feature maps."""

    def __init__(
        self,
        ndim: int,
        in_channels: int,
        num_classes: int,
        channels: tuple[int, ...],
        strides: Strides,
        dropout: float,
    ) -> None:
        nn.Module.__init__(self)  # VNet's own would first build the network of width 16
        act = "elu"
        width = channels[0]
        if width % in_channels:  # the input is repeated and added to the first feature maps
            raise UserError(
                f"V-Net: {width} channels at the first level for an image of {in_channels} channels, "
                f"expected a multiple of {in_channels}"
            )
        down, up = dropout, (dropout, dropout)
        self.in_tr = InputTransition(ndim, in_channels, width, act)
        self.down_tr32 = DownTransition(ndim, width, 1, act)
        self.down_tr64 = DownTransition(ndim, 2 * width, 2, act)
        self.down_tr128 = DownTransition(ndim, 4 * width, 3, act, down, dropout_dim=ndim)
        self.down_tr256 = DownTransition(ndim, 8 * width, 2, act, down, dropout_dim=ndim)
        self.up_tr256 = UpTransition(ndim, 16 * width, 16 * width, 2, act, up, dropout_dim=ndim)
        self.up_tr128 = UpTransition(ndim, 16 * width, 8 * width, 2, act, up, dropout_dim=ndim)
        self.up_tr64 = UpTransition(ndim, 8 * width, 4 * width, 1, act, (None, dropout), dropout_dim=ndim)
        self.up_tr32 = UpTransition(ndim, 4 * width, 2 * width, 1, act, (None, dropout), dropout_dim=ndim)
        self.out_tr = OutputTransition(ndim, 2 * width, num_classes, act)


def with_small_kernels(
    ndim: int, in_channels: int, num_classes: int, channels: tuple[int, ...], strides: Strides, dropout: float
) -> nn.Module:
    """Return a V-Net with kernels of 3 in place of 5."""
    net = VNet(ndim, in_channels, num_classes, channels, strides, dropout)
    for parent in list(net.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Conv2d | nn.Conv3d) and child.kernel_size[0] == 5:
                bias = child.bias is not None
                smaller = type(child)(child.in_channels, child.out_channels, 3, padding=1, bias=bias)
                setattr(parent, name, smaller)
    return net
