"""The views of MLB-Seg's public code: what a view shows beyond the image is background, and counts.

Where `mlbseg.core.views.Views` leaves out what a view did not see, these views

* are 0 beyond the image, and their labels and pseudo labels are background there;
* are averaged over all views: where a zoomed-in view saw nothing it votes for the background;
* are compared in pairs, each in the frame of its first view.

Labels are interpolated linearly and thresholded, as there. Maps are diagonal: zooms and flips.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mlbseg.core.ranks import ALONE, Ranks
from mlbseg.core.views import Views, draw_maps, inverted, places, sample, within


@dataclass(frozen=True)
class PaddedViews(Views):
    """V recorded views of B images; see `Views` for the shapes of what its methods take and give."""

    def expand(self, image: Tensor) -> Tensor:
        """Return the views of a batch of images, 0 beyond them."""
        return self._forth(image).flatten(0, 1)

    def expand_label(self, label: Tensor) -> Tensor:
        """Return the labels seen by the views, background beyond the image; what is unknown in it stays so."""
        count, codes = (
            max(int(label.max()) + 1, 1),
            max(-int(label.min()), 0),
        )  # negative labels mean no class
        shares = F.one_hot(torch.where(label >= 0, label, count - 1 - label).long(), count + codes).movedim(
            -1, 1
        )
        moved = _likeliest(_or_background(self._forth(shares.to(self.matrix.dtype))))
        return torch.where(moved < count, moved, count - 1 - moved).flatten(0, 1).to(label.dtype)

    def valid(self, shape: Sequence[int]) -> Tensor:
        """Return (V * B, 1, *shape): 1 everywhere."""
        V, B = self.matrix.shape[:2]
        return torch.ones(V * B, 1, *shape, dtype=self.matrix.dtype, device=self.matrix.device)

    def align(self, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """Map class probabilities of the views back to the identity frame: background where a view saw nothing."""
        V, B = self.matrix.shape[:2]
        aligned = self._back(prediction.unflatten(0, (V, B)))
        return aligned, torch.ones_like(aligned[:, :, :1])

    def pseudo_labels(self, prediction: Tensor) -> Tensor:
        """Return the class (V * B, *S) that the mean over all views gives, as each view sees that mean."""
        mean = self.align(prediction)[0].mean(0)
        return _likeliest(_or_background(self._forth(mean))).flatten(0, 1)

    def pair_distance(self, prediction: Tensor, *, detached: bool, ranks: Ranks = ALONE) -> Tensor:
        """Return the mean squared difference over pairs of views, each in the frame of its first view: a scalar.

        Args:
            prediction: (V * B, K, *S) class probabilities.
            detached: Let gradients flow into the first view of each pair alone, as in the public code.
            ranks: Those that share the batch.
        """
        V, B = self.matrix.shape[:2]
        own = prediction.unflatten(0, (V, B))
        aligned = self._back(own.detach() if detached else own)
        total = prediction.new_zeros(())
        for i, j in itertools.combinations(range(V), 2):
            seen = aligned[j] if i == 0 else _or_background(_onto(self.matrix[i : i + 1], aligned[j]))[0]
            total = total + (own[i] - seen).square().sum()
        count = prediction.new_tensor(V * (V - 1) / 2 * own[0].numel())
        total, count = ranks.sum_each(total, count)
        return total / count.clamp(min=1)

    def _forth(self, x: Tensor) -> Tensor:
        """Let the views (V, B, C, *S) see images (B, C, *S): 0 beyond them."""
        return torch.cat([x.unsqueeze(0), _onto(self.matrix[1:], x)])  # the identity is never resampled

    def _back(self, p: Tensor) -> Tensor:
        """Map class probabilities (V, B, K, *S) of the views to the image's frame.

        Of a zoomed-out view the part that shows the image is cut out and enlarged; a zoomed-in view continues as 0.
        """
        back = inverted(self.matrix)
        V, B = back.shape[:2]
        ndim = back.shape[2]
        shape = p.shape[3:]
        grid = places(back.to(p.dtype), p.shape)
        sides = torch.tensor(shape[::-1], dtype=p.dtype, device=p.device)  # x first, as the grid has it
        scale = (
            torch.diagonal(back[..., :-1], dim1=-2, dim2=-1).abs().to(p.dtype)
        )  # (V, B, n); below 1: zoomed out
        # The centre of the last pixel that shows the image.
        most = torch.where(scale < 1, scale - 1 / sides, torch.full_like(scale, torch.inf))
        most = most.reshape(V * B, *(1,) * ndim, ndim)
        grid = torch.maximum(torch.minimum(grid, most), -most)
        moved = F.grid_sample(p.flatten(0, 1), grid, "bilinear", "zeros", align_corners=False).unflatten(
            0, (V, B)
        )
        return _or_background(torch.cat([p[:1], moved[1:]]))


def draw_padded_views(
    seeds: Sequence[int],
    ndim: int,
    kinds: Sequence[str],
    *,
    device: torch.device | str = "cpu",
    flip_axes: Sequence[int] | None = None,
) -> PaddedViews:
    """Draw the views of a batch, with the public code's zooms.

    There an image of 144 pixels is resized by twice a pad of 4, 6, ... 30 pixels: a zoomed-in view shows it 1.056 to
    1.417 times as large, a zoomed-out one 0.944 to 0.583 times. See `mlbseg.core.views.draw_views` for the arguments.
    """

    def scale(kind: str, generator: torch.Generator) -> float:
        pad = 2 * int(torch.randint(2, 16, (), generator=generator))
        return 144 / (144 + 2 * pad) if kind == "zoom-in" else 144 / (144 - 2 * pad)

    return PaddedViews(draw_maps(seeds, ndim, kinds, scale, flip_axes).to(device, non_blocking=True))


def _onto(matrix: Tensor, x: Tensor) -> Tensor:
    """Sample images (B, C, *S) by maps (V, B, n, n + 1): (V, B, C, *S), 0 beyond the images."""
    return sample(x, matrix, "bilinear") * within(matrix, x.shape[2:]).to(x.dtype)


def _likeliest(p: Tensor) -> Tensor:
    """Return the class of shares (V, B, K, *S); the background wins a tie, however it is rounded."""
    return torch.cat([p[:, :, :1] + 1e-6, p[:, :, 1:]], 2).argmax(2)


def _or_background(p: Tensor) -> Tensor:
    """Return shares of classes (V, B, K, *S) whose first is what the others leave of 1."""
    return torch.cat([1 - p[:, :, 1:].sum(2, keepdim=True), p[:, :, 1:]], 2)
