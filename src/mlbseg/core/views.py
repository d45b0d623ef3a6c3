"""Augmented views for pseudo-label ensembling (PLE): drawn once, recorded, inverted exactly.

A view is an affine map in the normalised coordinates of `torch.nn.functional.grid_sample`
(``align_corners=False``): every axis runs from -1 to 1, whatever the image's size, and the last image axis
comes first. All views of all images are sampled in one batched call on the images' device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mlbseg.types import IGNORE

ZOOM = (4 / 144, 30 / 144)
"""The public code pads or crops 4 to 30 of 144 pixels per side; here as a share of the side."""


@dataclass(frozen=True)
class Views:
    """V recorded views of B images. View 0 is the identity and is never resampled.

    Attributes:
        matrix: (V, B, n, n + 1) maps from a view's coordinates to the image's coordinates.
    """

    matrix: Tensor

    def __len__(self) -> int:
        return self.matrix.shape[0]

    def expand(self, image: Tensor) -> Tensor:
        """Return the views of a batch of images.

        Args:
            image: (B, C, *S).

        Returns:
            (V * B, C, *S), view-major: entry v * B + b is view v of image b. Pixels from outside the image
            repeat its border.
        """
        rest = sample(image, self.matrix[1:], "bilinear")
        return torch.cat([image, rest.flatten(0, 1)])

    def expand_label(self, label: Tensor) -> Tensor:
        """Return the labels seen by the views: (B, *S) → (V * B, *S); `IGNORE` outside the image."""
        moved = sample(label.unsqueeze(1).float(), self.matrix[1:], "nearest").squeeze(2)
        moved = moved.round().to(label.dtype)
        inside = within(self.matrix, label.shape[1:])[1:]
        moved = torch.where(inside.squeeze(2) > 0, moved, torch.full_like(moved, IGNORE))
        return torch.cat([label, moved.flatten(0, 1)])

    def valid(self, shape: Sequence[int]) -> Tensor:
        """Return (V * B, 1, *shape): 1 where a view's pixel lies inside the image, else 0."""
        return within(self.matrix, shape).flatten(0, 1)

    def align(self, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """Map predictions of the views back to the identity frame; gradients flow through.

        Args:
            prediction: (V * B, K, *S).

        Returns:
            aligned: (V, B, K, *S).
            seen: (V, B, 1, *S), 1 where the view saw the pixel, else 0.
        """
        V, B = self.matrix.shape[:2]
        first, rest = prediction[:B], prediction[B:].unflatten(0, (V - 1, B))
        back = inverted(self.matrix)
        moved = sample(rest, back[1:], "bilinear")
        return torch.cat([first.unsqueeze(0), moved]), within(back, prediction.shape[2:])

    def pseudo_label(self, prediction: Tensor) -> Tensor:
        """Return the label that the views' mean prediction gives: the pseudo label of PLE.

        Args:
            prediction: (V * B, K, *S) class probabilities.

        Returns:
            (B, *S) int64: the most probable class of the mean, each pixel averaged over the views that saw it.
        """
        aligned, seen = self.align(prediction)
        # The sum has the same argmax as the mean over the views that saw the pixel.
        return (aligned * seen).sum(0).argmax(1)

    def pseudo_labels(self, prediction: Tensor) -> Tensor:
        """Return `pseudo_label` as each view sees it: (V * B, *S)."""
        return self.expand_label(self.pseudo_label(prediction))


def draw_views(
    seeds: Sequence[int],
    ndim: int,
    kinds: Sequence[str],
    *,
    device: torch.device | str = "cpu",
    flip_axes: Sequence[int] | None = None,
    zoom: tuple[float, float] = ZOOM,
) -> Views:
    """Draw the views of a batch.

    Args:
        seeds: One for each of the B images: its zooms and flips depend on it alone, whatever the batch.
        ndim: 2 or 3.
        kinds: What the views after the identity are: ``zoom-in``, ``zoom-out`` or ``flip``. The paper's PLE
            has one zoom-in, two zoom-outs and one flip.
        device: Where the maps live.
        flip_axes: Axes (of S, in array order) among which a flip view chooses a non-empty subset; all when None.
        zoom: The range of the share of the side that is cropped (in) or padded (out) per side.

    Returns:
        `Views` with V = 1 + len(kinds).

    Raises:
        ValueError: for an unknown kind.
    """

    def scale(kind: str, generator: torch.Generator) -> float:
        share = zoom[0] + (zoom[1] - zoom[0]) * float(torch.rand((), generator=generator))
        return 1 - 2 * share if kind == "zoom-in" else 1 + 2 * share

    # Not waiting: else it would wait for all that a GPU has to do.
    return Views(draw_maps(seeds, ndim, kinds, scale, flip_axes).to(device, non_blocking=True))


def draw_maps(
    seeds: Sequence[int],
    ndim: int,
    kinds: Sequence[str],
    scale: Callable[[str, torch.Generator], float],
    flip_axes: Sequence[int] | None = None,
) -> Tensor:
    """Draw the maps (1 + len(kinds), B, n, n + 1) of views, on the CPU; see `draw_views` for the other arguments.

    Args:
        seeds: One for each image.
        ndim: 2 or 3.
        kinds: See `draw_views`.
        scale: What a zoom multiplies a view's coordinates by; called for every view, flips too.
        flip_axes: See `draw_views`.

    Raises:
        ValueError: for an unknown kind.
    """
    axes = list(range(ndim)) if flip_axes is None else list(flip_axes)
    matrix = torch.zeros(1 + len(kinds), len(seeds), ndim, ndim + 1)
    matrix[..., range(ndim), range(ndim)] = 1
    for b, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        for v, kind in enumerate(kinds, start=1):
            drawn = scale(kind, generator)
            if kind in ("zoom-in", "zoom-out"):
                matrix[v, b] *= drawn
            elif kind == "flip":
                subset = int(torch.randint(1, 2 ** max(len(axes), 1), (), generator=generator))
                for bit, axis in enumerate(axes):
                    if subset >> bit & 1:
                        # grid_sample's coordinates run x, y, z: the reverse of the array's axes
                        matrix[v, b, ndim - 1 - axis] *= -1
            else:
                raise ValueError(f"unknown view {kind!r}: use zoom-in, zoom-out or flip")
    return matrix


def sample(image: Tensor, matrix: Tensor, mode: str) -> Tensor:
    """Sample images through maps: (B, C, *S) or (V, B, C, *S), (V, B, n, n + 1) → (V, B, C, *S)."""
    V, B = matrix.shape[:2]
    if image.ndim == matrix.shape[2] + 2:
        image = image.expand(V, *image.shape)
    shape = image.shape[2:]
    if V == 0:
        return image.new_empty(0, *image.shape[1:])
    grid = places(matrix.to(image.dtype), shape)
    moved = F.grid_sample(image.flatten(0, 1), grid, mode=mode, padding_mode="border", align_corners=False)
    return moved.unflatten(0, (V, B))


def within(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """Return (V, B, 1, *shape): 1 where the map's source lies inside [-1, 1] on every axis."""
    V, B = matrix.shape[:2]
    grid = places(matrix, shape)
    # A hair of tolerance: the identity's outermost centres must not fall outside by rounding.
    inside = (grid.abs() <= 1 + 1e-5).all(-1)
    return inside.unflatten(0, (V, B)).unsqueeze(2).to(matrix.dtype)


def places(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the places that maps (V, B, n, n + 1) sample, (V * B, *S, n); `shape` ends with S."""
    spatial = shape[len(shape) - matrix.shape[2] :]
    # affine_grid multiplies matrices: under autocast it would place pixels with bfloat16's three digits.
    with torch.autocast(matrix.device.type, enabled=False):
        flat = matrix.flatten(0, 1)
        return F.affine_grid(flat, [len(flat), 1, *spatial], align_corners=False)


def inverted(matrix: Tensor) -> Tensor:
    """Return the inverse affine maps, (..., n, n + 1)."""
    linear, shift = matrix[..., :-1], matrix[..., -1:]
    with torch.autocast(matrix.device.type, enabled=False):
        inverse = torch.linalg.inv_ex(linear).inverse  # `inv` would wait for a GPU to say that it could
        return torch.cat([inverse, -inverse @ shift], dim=-1)
