"""Networks and data small enough for float64 and double backward."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mlbseg.networks import make_network, required_multiple

WIDTHS = {
    "nnunet": (4, 5),
    "resenc": (4, 5),
    "unet": (4, 6, 8),
    "unet++": (4, 4, 8, 8, 8),
    "nested-unet": (4, 4, 8, 8, 8),
    "vnet": (3,),
    "vnet3": (3,),
    "dynunet": (4, 5, 6),
    "swin-unetr": (12,),
}


def conv_net(ndim: int, classes: int, norm: str = "instance", dropout: float = 0.0) -> nn.Module:
    """Return two convolutions with a norm and dropout between them, in float64."""
    conv = nn.Conv2d if ndim == 2 else nn.Conv3d
    norms = {
        "batch": nn.BatchNorm2d if ndim == 2 else nn.BatchNorm3d,
        "instance": lambda c: (nn.InstanceNorm2d if ndim == 2 else nn.InstanceNorm3d)(c, affine=True),
        "group": lambda c: nn.GroupNorm(2, c),
    }
    layers = [
        conv(2, 6, 3, padding=1),
        norms[norm](6),
        nn.SiLU(),
        nn.Dropout(dropout),
        conv(6, classes, 3, padding=1),
    ]
    return nn.Sequential(*layers).double()


def data(ndim: int, classes: int, batch: int = 2, side: int = 8) -> tuple[Tensor, ...]:
    """Return images, clean images, and three label maps, some of whose pixels are unknown."""
    shape = (side,) * ndim
    x = torch.randn(batch, 2, *shape, dtype=torch.float64)
    clean = torch.randn(batch, 2, *shape, dtype=torch.float64)
    return x, clean, *(torch.randint(-1, classes, (batch, *shape)) for _ in range(3))


def real_net(name: str, ndim: int, classes: int, norm: str = "instance", dropout: float = 0.0) -> nn.Module:
    """Return a network of the factory, in float64."""
    network = make_network(
        name, ndim=ndim, in_channels=1, num_classes=classes, channels=WIDTHS[name], norm=norm, dropout=dropout
    )
    return network.double()


def real_data(name: str, ndim: int, classes: int, batch: int = 1) -> tuple[Tensor, ...]:
    """Return images, clean images and three label maps of the least size that the network takes."""
    multiple = required_multiple(name, WIDTHS[name])
    shape = (2 * multiple, multiple, multiple)[:ndim]
    images = (torch.randn(batch, 1, *shape, dtype=torch.float64) for _ in range(2))
    return *images, *(torch.randint(0, classes, (batch, *shape)) for _ in range(3))
