"""One step of the paper's method as its public code takes it, slowly: 2D, one channel, two classes, float64.

Views are made by resizing, cropping and padding, pixels of a resize by a matrix written out entry by entry; the weights
come from the unrolled virtual step, through the graph of its gradient.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Parameters = dict[str, Tensor]
Network = Callable[[Parameters, Tensor], Tensor]
"""From parameters and images (N, 1, H, W) to log-odds (N, H, W)."""


@dataclass(frozen=True)
class View:
    """How one view is made: resized by twice a pad (cropped or padded to its size), or flipped along axes."""

    pad: int = 0
    flipped: tuple[int, ...] = ()

    @classmethod
    def of(cls, matrix: Tensor, side: int) -> View:
        """Read it off an affine map (2, 3) from a view's coordinates, x first, to the image's."""
        x, y = float(matrix[0, 0]), float(matrix[1, 1])
        pad = (side / abs(x) - side) / 2
        assert abs(pad - round(pad)) < 1e-9
        return cls(round(pad), tuple(axis for axis, sign in ((0, y), (1, x)) if sign < 0))

    def forth(self, image: Tensor) -> Tensor:
        """Return the view (H, W) of an image."""
        side = len(image)
        if self.flipped:
            return image.flip(self.flipped)
        larger = resized(image, side + 2 * self.pad)
        if self.pad >= 0:
            return larger[self.pad : self.pad + side, self.pad : self.pad + side]
        return padded(larger, -self.pad)

    def back(self, view: Tensor) -> Tensor:
        """Return what a view (H, W) says of the image."""
        side = len(view)
        if self.flipped:
            return view.flip(self.flipped)
        if self.pad >= 0:
            return resized(padded(view, self.pad), side)
        return resized(view[-self.pad : side + self.pad, -self.pad : side + self.pad], side)


def padded(image: Tensor, pad: int) -> Tensor:
    """Return an image with so many rows and columns of 0 around it."""
    side = len(image) + 2 * pad
    result = image.new_zeros(side, side)
    result[pad : side - pad, pad : side - pad] = image
    return result


def resized(image: Tensor, side: int) -> Tensor:
    """Return an image (H, H) in another size: linear between pixel centres, the border repeated."""
    old = len(image)
    if side == old:
        return image
    matrix = resizing(old, side)
    return matrix @ image @ matrix.T


@functools.cache
def resizing(old: int, side: int) -> Tensor:
    """Return the matrix (side, old) that resizes a row."""
    matrix = torch.zeros(side, old, dtype=torch.float64)
    for i in range(side):
        place = min(max((i + 0.5) * old / side - 0.5, 0), old - 1)
        low = int(place)
        matrix[i, low] += 1 - (place - low)
        if place > low:
            matrix[i, low + 1] += place - low
    return matrix


def costs(z: Tensor, label: Tensor) -> Tensor:
    """Return the binary cross-entropy of each pixel, from its log-odds."""
    return -(label * logsigmoid(z) + (1 - label) * logsigmoid(-z))


def consistency(p: Tensor, views: Sequence[Sequence[View]], *, detached: bool) -> Tensor:
    """Return the mean over images and pairs of views of the mean squared difference, in the first view's frame.

    Args:
        p: (B, V, H, W) probabilities.
        views: V of each of the B images.
        detached: No gradient flows into the second view of a pair.
    """
    terms = []
    for own, made in zip(p, views, strict=True):
        aligned = [
            view.back(seen.detach() if detached else seen) for view, seen in zip(made, own, strict=True)
        ]
        for i, j in itertools.combinations(range(len(made)), 2):
            terms.append((own[i] - made[i].forth(aligned[j])).square().mean())
    return torch.stack(terms).mean()


def pseudo_labels(p: Tensor, views: Sequence[Sequence[View]]) -> Tensor:
    """Return the labels (B, V, H, W) that the mean over all views gives."""
    result = []
    for own, made in zip(p.detach(), views, strict=True):
        mean = torch.stack([view.back(seen) for view, seen in zip(made, own, strict=True)]).mean(0)
        result.append(torch.stack([view.forth(mean) for view in made]))
    return thresholded(torch.stack(result))


def thresholded(share: Tensor) -> Tensor:
    """Return 1 where a share is above a half; a half, however it is rounded, is not."""
    return (share > 0.5 + 5e-7).double()


def seen_by(views: Sequence[Sequence[View]], images: Tensor) -> Tensor:
    """Return (B, V, H, W): the views of images (B, H, W)."""
    return torch.stack(
        [torch.stack([v.forth(image) for v in made]) for made, image in zip(views, images, strict=True)]
    )


@dataclass
class Step:
    """The public code's step, and all that it changes.

    Attributes:
        network: See `Network`.
        student: Parameters.
        teacher: Parameters.
        velocity: Of SGD with momentum; empty before the first update.
        lr, momentum, decay, clip: Of the optimiser.
        teacher_decay: Of the teacher once it has settled.
        detached: See `consistency`.
    """

    network: Network
    student: Parameters
    teacher: Parameters
    velocity: Parameters
    lr: float
    momentum: float
    decay: float
    clip: float
    teacher_decay: float
    detached: bool = True

    def take(
        self,
        image: Tensor,
        initial: Tensor,
        views: Sequence[Sequence[View]],
        noise: Tensor,
        clean: Tensor,
        label: Tensor,
        clean_views: Sequence[Sequence[View]],
        clean_noise: Tensor,
        turn: int,
    ) -> Tensor:
        """Take a step; return the weights of initial and pseudo labels, (2, B, V, H, W).

        Args:
            image: (B, H, W) unlabelled.
            initial: (B, H, W) their labels.
            views: Of each.
            noise: (B, V, H, W) on the teacher's input.
            clean: (C, H, W).
            label: (C, H, W).
            clean_views: Of each.
            clean_noise: (C, V, H, W).
            turn: Number of the step in its epoch.
        """
        seen = seen_by(views, image)
        known = thresholded(seen_by(views, initial))
        clean_seen = seen_by(clean_views, clean)
        clean_known = thresholded(seen_by(clean_views, label))
        with torch.no_grad():
            taught = self.run(self.teacher, seen + noise).sigmoid()

        z = self.run(self.student, seen)
        learnt = torch.stack([costs(z, known), costs(z, pseudo_labels(z.sigmoid(), views))])
        rest = (
            consistency(z.sigmoid(), views, detached=self.detached) + (z.sigmoid() - taught).square().mean()
        )
        weights = torch.zeros_like(learnt, requires_grad=True)
        slopes = torch.autograd.grad(
            (learnt * weights).sum() + rest, list(self.student.values()), create_graph=True
        )
        ahead = {
            name: p - self.lr * self.pushed(name, g + self.decay * p)
            for (name, p), g in zip(self.student.items(), slopes, strict=True)
        }
        clean_loss = costs(self.run(ahead, clean_seen), clean_known).mean()
        positive = (-torch.autograd.grad(clean_loss, weights)[0]).clamp(min=0)
        found = positive / (positive.sum() + 1e-10)

        z = self.run(self.student, seen)
        learnt = torch.stack([costs(z, known), costs(z, pseudo_labels(z.sigmoid(), views))])
        self.update(
            (learnt * found).sum()
            + consistency(z.sigmoid(), views, detached=self.detached)
            + (z.sigmoid() - taught).square().mean()
        )
        self.follow(turn)
        with torch.no_grad():
            taught = self.run(self.teacher, clean_seen + clean_noise).sigmoid()
        z = self.run(self.student, clean_seen)
        self.update(
            costs(z, clean_known).mean()
            + consistency(z.sigmoid(), clean_views, detached=self.detached)
            + (z.sigmoid() - taught).square().mean()
        )
        self.follow(turn)
        return found

    def run(self, parameters: Parameters, images: Tensor) -> Tensor:
        """Return the log-odds (B, V, H, W) of views."""
        return self.network(parameters, images.flatten(0, 1).unsqueeze(1)).unflatten(0, images.shape[:2])

    def pushed(self, name: str, slope: Tensor) -> Tensor:
        """Return the velocity after a slope."""
        return self.momentum * self.velocity[name] + slope if self.velocity else slope

    def update(self, loss: Tensor) -> None:
        """Take one update of SGD, its gradient clipped."""
        slopes = torch.autograd.grad(loss, list(self.student.values()))
        norm = torch.sqrt(sum((g.square().sum() for g in slopes), start=loss.new_zeros(())))
        factor = min(1.0, self.clip / (float(norm) + 1e-6))
        self.velocity = {
            name: self.pushed(name, factor * g + self.decay * p).detach()
            for (name, p), g in zip(self.student.items(), slopes, strict=True)
        }
        self.student = {
            name: (p - self.lr * self.velocity[name]).detach().requires_grad_()
            for name, p in self.student.items()
        }

    def follow(self, turn: int) -> None:
        """Move the teacher."""
        kept = min(1 - 1 / (turn + 1), self.teacher_decay)
        self.teacher = {n: kept * t + (1 - kept) * self.student[n].detach() for n, t in self.teacher.items()}
