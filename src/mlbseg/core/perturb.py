"""Random changes of images on their device, and masks to mix images by.

Every image has a seed of its own (`Method.seeds`), so that what it sees does not depend on the rest of the batch.
Intensities are normalised: their SD over a scan is about 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def normal(seeds: Sequence[int], shape: Sequence[int], like: Tensor) -> Tensor:
    """Return standard normal numbers, (B, *shape) for B seeds, in type and place of `like`."""
    return torch.stack([torch.randn(*shape, generator=_of(seed, like), **_as(like)) for seed in seeds])


def uniform(seeds: Sequence[int], shape: Sequence[int], like: Tensor) -> Tensor:
    """Return numbers uniform in [0, 1), (B, *shape) for B seeds, in type and place of `like`."""
    return torch.stack([torch.rand(*shape, generator=_of(seed, like), **_as(like)) for seed in seeds])


def noisy(seeds: Sequence[int], image: Tensor, sd: float) -> Tensor:
    """Return the images (B, C, *S) with Gaussian noise of this SD, in units of intensity; one seed per image."""
    return image + sd * normal(seeds, image.shape[1:], image)


def jittered(seeds: Sequence[int], image: Tensor, strength: float) -> Tensor:
    """Return the images (B, C, *S) with contrast and brightness of every channel changed.

    Args:
        seeds: One per image.
        image: (B, C, *S).
        strength: Largest relative change of contrast, and shift of brightness in units of intensity.
    """
    drawn = (2 * uniform(seeds, (2, image.shape[1]), image) - 1) * strength
    contrast, shift = drawn.reshape(len(image), 2, -1, *(1,) * (image.ndim - 2)).unbind(1)
    return image * (1 + contrast) + shift


def blurred(image: Tensor, sigma: Tensor) -> Tensor:
    """Return the images (B, C, *S), each blurred by a Gaussian with its own SD of `sigma` (B) pixels, up to 2."""
    radius = 4
    offsets = torch.arange(-radius, radius + 1, **_as(image))
    kernel = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-3).unsqueeze(1)).square())
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(image.shape[1], 0)
    ndim, maps = image.ndim - 2, image.flatten(0, 1).unsqueeze(0)
    conv = F.conv2d if ndim == 2 else F.conv3d
    # Half precision would add errors of its own to the picture.
    with torch.autocast(image.device.type, enabled=False):
        for axis, length in enumerate(image.shape[2:]):
            size = [1] * ndim
            size[axis] = 2 * radius + 1
            # Borders repeat their last pixel, however small the image is.
            index = torch.arange(-radius, length + radius, device=image.device).clamp(0, length - 1)
            padded = maps.index_select(2 + axis, index)
            maps = conv(padded, kernel.reshape(-1, 1, *size), groups=maps.shape[1])
    return maps.reshape(image.shape)


def strongly_changed(seeds: Sequence[int], image: Tensor, strength: float = 0.6) -> Tensor:
    """Return the images (B, C, *S) as a student of strong augmentation sees them: contrast, brightness, blur, noise.

    Args:
        seeds: One per image.
        image: (B, C, *S).
        strength: Of contrast and brightness (see `jittered`); half of the images are blurred by up to 1 pixel, and
            all get noise with an SD of up to 0.15.
    """
    drawn = uniform(seeds, (3,), image)
    sigma = torch.where(drawn[:, 0] < 0.5, drawn[:, 1], torch.zeros_like(drawn[:, 1]))
    noise = normal([seed + 1 for seed in seeds], image.shape[1:], image)
    level = 0.15 * drawn[:, 2].reshape(-1, *(1,) * (image.ndim - 1))
    return blurred(jittered([seed + 2 for seed in seeds], image, strength), sigma) + level * noise


def boxes(seeds: Sequence[int], image: Tensor, share: float | tuple[float, float]) -> Tensor:
    """Return masks (B, 1, *S), True in a box at a random place in each image.

    Args:
        seeds: One per image.
        image: (B, C, *S).
        share: Of the image's volume, the same for all sides; or its range, from which each image draws.
    """
    ndim, low, high = image.ndim - 2, *(share if isinstance(share, tuple) else (share, share))
    drawn = uniform(
        seeds, (1 + ndim,), torch.zeros((), dtype=torch.float64)
    ).tolist()  # on the CPU, wherever images are
    mask = torch.zeros((len(image), 1, *image.shape[2:]), dtype=torch.bool, device=image.device)
    for own, (amount, *places) in zip(mask, drawn, strict=True):
        side = (low + (high - low) * amount) ** (1 / ndim)
        cut = [slice(None)]
        for length, place in zip(image.shape[2:], places, strict=True):
            size = min(length, max(1, round(side * length)))
            start = int(place * (length - size + 1))
            cut.append(slice(start, start + size))
        own[tuple(cut)] = True
    return mask


def _of(seed: int, like: Tensor) -> torch.Generator:
    return torch.Generator(like.device).manual_seed(seed)


def _as(like: Tensor) -> dict[str, Any]:
    return {"device": like.device, "dtype": like.dtype}
