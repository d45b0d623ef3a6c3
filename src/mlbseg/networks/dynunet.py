"""nnU-Net's plain U-Net (Isensee et al. 2021), MONAI's."""

from __future__ import annotations

from monai.networks.blocks.convolutions import Convolution
from monai.networks.nets.dynunet import DynUNet
from torch import nn

from mlbseg.networks.builder import INSTANCE_NORM, Strides


def build(
    ndim: int, in_channels: int, num_classes: int, channels: tuple[int, ...], strides: Strides, dropout: float
) -> nn.Module:
    """Return one level for each entry of `channels`."""
    net = DynUNet(
        ndim,
        in_channels,
        num_classes,
        kernel_size=(3,) * len(channels),
        strides=((1,) * ndim, *strides),
        upsample_kernel_size=strides,
        filters=channels,
        dropout=dropout or None,
        norm_name=INSTANCE_NORM,
    )
    # The same blocks hang in `skip_layers`, which is what runs; safetensors refuses a tensor of two names.
    del net.input_block, net.downsamples, net.bottleneck, net.upsamples
    for module in net.output_block.modules():
        if isinstance(module, Convolution) and hasattr(module, "adn"):
            del module.adn  # MONAI would drop logits, not features
    network: nn.Module = net
    return network
