"""Networks and batches that the tests of single methods share, in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mlbseg.types import IGNORE, Batch

SHAPES = {2: (6, 7), 3: (4, 5, 3)}


def conv_net(ndim: int, classes: int = 3, *, dropout: float = 0.0, batch_norm: bool = False) -> nn.Module:
    """Return two convolutions on one channel, whose predictions are neither certain nor all alike."""
    conv = nn.Conv2d if ndim == 2 else nn.Conv3d
    norm = (nn.BatchNorm2d if ndim == 2 else nn.BatchNorm3d)(6) if batch_norm else nn.GroupNorm(2, 6)
    torch.manual_seed(ndim)
    net = nn.Sequential(
        conv(1, 6, 3, padding=1), norm, nn.SiLU(), nn.Dropout(dropout), conv(6, classes, 3, padding=1)
    )
    with torch.no_grad():
        net[-1].weight *= 3
    return net.double()


def make_batch(ndim: int, *, others: int = 3, seed: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(10 + ndim)

    def images(count: int) -> Tensor:
        return torch.randn(count, 1, *SHAPES[ndim], generator=generator, dtype=torch.float64)

    clean = images(2)
    return Batch(clean, (clean[:, 0] > 0).long() + (clean[:, 0] > 1), images(others), seed=seed)


class PerPixel(nn.Module):
    """Logits that are the image's channels, plus one parameter for each of them in each pixel of each image."""

    def __init__(self, clean: Tensor, others: Tensor) -> None:
        super().__init__()
        self.clean, self.others = (
            nn.Parameter(torch.zeros_like(clean)),
            nn.Parameter(torch.zeros_like(others)),
        )

    def forward(self, image: Tensor) -> Tensor:
        return image + torch.cat([self.clean, self.others])[-len(image) :]


def per_pixel(ndim: int, classes: int = 3, others: int = 2) -> tuple[PerPixel, Batch]:
    """Return such a network, and a batch of nothing known whose images are the logits."""
    generator = torch.Generator().manual_seed(ndim)
    clean, image = (
        torch.randn(count, classes, *SHAPES[ndim], generator=generator, dtype=torch.float64).mul(2)
        for count in (1, others)
    )
    label = torch.full((1, *SHAPES[ndim]), IGNORE)
    return PerPixel(clean, image), Batch(clean, label, image, seed=1)
