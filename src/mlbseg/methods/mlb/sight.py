"""What the networks see of unlabelled images, and what the labels of their pixels are worth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlbseg.core.directional import Direction, loss_and_gradient
from mlbseg.core.losses import (
    cross_entropy_map,
    pairwise_consistency,
    prediction_distance,
    soft_dice_loss,
    widened,
)
from mlbseg.core.padded_views import PaddedViews, draw_padded_views
from mlbseg.core.perturb import boxes, jittered, normal
from mlbseg.core.scope import parameters_in_scope
from mlbseg.core.teacher import prediction, update_teacher
from mlbseg.core.views import Views, draw_views
from mlbseg.methods.base import Context, Taught
from mlbseg.methods.mlb.settings import MLBSettings
from mlbseg.methods.mlb.weighing import Weighing
from mlbseg.settings import Section
from mlbseg.types import IGNORE, Batch, Losses

VIEWS, SIGHT, CLEAN_VIEWS, CLEAN_SIGHT, META_VIEWS, _BOX = range(6)  # streams of random numbers
_JITTER = 100  # times these: those of the views' jitter


@dataclass(frozen=True)
class Pasted:
    """Clean pixels that are in the views of unlabelled images.

    Attributes:
        covered: (V * B, *S) bool, True where they are.
        label: (V * B, *S) their own labels, `IGNORE` where they have none, and elsewhere.
        bare: (V * B, K, *S) the student's logits of the views without them; None where these make no pseudo label.
    """

    covered: Tensor
    label: Tensor
    bare: Tensor | None


class Sight(Taught):
    """The parts of MLB that both of its modes are made of: views, pasting, weights, and the terms of the loss."""

    Settings = MLBSettings
    settings: MLBSettings

    def __init__(
        self, student: nn.Module, settings: Section | None = None, context: Context | None = None
    ) -> None:
        super().__init__(student, settings, context)
        self.relabel = self.settings.relabel
        self.weighing: Weighing = self.settings.weighing(noisy=self.context.noisy)
        self._in_scope: frozenset[str] | None = None

    def _draw(self, image: Tensor, seed: int, stream: int) -> Views:
        draw = draw_padded_views if self.settings.padding == "background" else draw_views
        return draw(
            self.seeds(len(image), seed, stream),
            image.ndim - 2,
            self.settings.views,
            device=image.device,
            flip_axes=self.context.flip_axes,
        )

    def _see(
        self,
        views: Views,
        image: Tensor,
        batch: Batch,
        stream: int,
        *,
        weak: Tensor | None = None,
        mix: float = 0.0,
    ) -> tuple[Tensor, Tensor | None, Pasted | None]:
        """Return what the networks see of an image's views.

        Args:
            views: The views.
            image: (B, C, *S).
            batch: What the images are of.
            stream: Of random numbers.
            weak: (B, C, *S) the images as the teacher sees them; `image` when None.
            mix: Sides of the boxes by which clean images are pasted; 0 for none.

        Returns:
            x: (V * B, C, *S) for the student.
            taught: (V * B, K, *S) the teacher's logits of the views as they are; None if nothing needs them.
            pasted: The clean pixels in `x`; None without any.
        """
        x = views.expand(image)
        taught = self._taught(x if weak is None else views.expand(weak), len(image), batch, stream)
        pasted: Pasted | None = None
        if mix:
            x, pasted = self._mix(x, image, batch)
        return self._jittered(x, len(image), batch, stream), taught, pasted

    def _shown(self, views: Views, image: Tensor, batch: Batch, stream: int) -> Tensor:
        """Return what the student sees of an image's views, with nothing pasted: (V * B, C, *S)."""
        return self._jittered(views.expand(image), len(image), batch, stream)

    def _jittered(self, x: Tensor, count: int, batch: Batch, stream: int) -> Tensor:
        if not self.settings.jitter:
            return x
        streams = [_JITTER * (1 + stream) + v for v in range(len(x) // count)]
        return jittered(
            [s for v in streams for s in self.seeds(count, batch.seed, v)], x, self.settings.jitter
        )

    def _taught(self, x: Tensor, count: int, batch: Batch, stream: int) -> Tensor | None:
        """Return the teacher's logits (V * B, K, *S) of the views (V * B, C, *S) of so many images, under noise.

        None if nothing needs them.
        """
        if not self._asks_teacher(batch):
            return None
        seeds, shape = self.seeds(count, batch.seed, stream), (len(x) // count, *x.shape[1:])
        noise = normal(seeds, shape, x).transpose(0, 1).flatten(0, 1)
        with torch.no_grad():
            return widened(self.teacher(x + self.settings.teacher_noise * noise))

    def move_teacher(self, step: int) -> None:
        """Move the teacher once."""
        counted = step % self.epoch if self.settings.teacher_counts == "epoch" else step
        update_teacher(self.teacher, self.student, counted, self.settings.teacher_decay)

    def after_step(self, step: int) -> None:
        """Move the teacher."""
        self.move_teacher(step)

    def _asks_teacher(self, batch: Batch) -> bool:
        """Return whether anything depends on what the teacher predicts of the views."""
        labels = batch.pseudo_label is None and self.settings.pseudo_from == "teacher"
        return labels or bool(self.settings.teacher_weight) or self.weighing.weighting == "confidence"

    def _asked(self, x: Tensor) -> Tensor:
        """Return the student's logits, a chunk at a time and without gradient."""
        return torch.cat([prediction(self.student, part) for part in x.split(self.settings.chunk or len(x))])

    def scan_labeller(self) -> nn.Module:
        """Return the network that makes pseudo labels."""
        return self.teacher if self.settings.pseudo_from == "teacher" else self.student

    def _mix(self, x: Tensor, image: Tensor, batch: Batch) -> tuple[Tensor, Pasted]:
        """Return views (V * B, C, *S) of B images with clean ones pasted in a box or around it, and what was pasted.

        Source: Bai et al., BCP (CVPR 2023, arXiv 2305.00673). The views of an image take the two ways in turn, and
        so do images: a box is covered in one view and bare in the next.
        """
        count = len(image)
        place = torch.arange(count, device=x.device)
        box = boxes(self.seeds(count, batch.seed, _BOX), image, self.settings.mix ** (x.ndim - 2))
        turn = torch.arange(len(x) // count, device=x.device)[:, None] + place + self.ranks.index * count
        inside = turn.reshape(-1, *(1,) * (x.ndim - 1)) % 2 == 0
        covered = box.repeat(len(turn), *(1,) * (x.ndim - 1)) == inside
        partner = (place * len(batch.clean_image) // count).repeat(len(turn))
        mixed = torch.where(covered, batch.clean_image[partner], x)
        covered = covered.squeeze(1)
        own = batch.pseudo_label is None and self.settings.pseudo_from == "student"
        bare = self._asked(x) if own else None
        return mixed, Pasted(covered, torch.where(covered, batch.clean_label[partner], IGNORE), bare)

    def _towards(self, v: Direction, x: Tensor, seed: int) -> Direction:
        """Return the direction of the weights: the part of v, or of noise in its place, that the scope moves."""
        if self.settings.direction == "random":
            noise = {name: normal([seed + i], t.shape, t)[0] for i, (name, t) in enumerate(v.items())}
            v = {name: z * (v[name].norm() / z.norm().clamp(min=1e-12)) for name, z in noise.items()}
        if self.settings.scope == "all":
            return v
        if self._in_scope is None:
            self._in_scope = parameters_in_scope(self.student, x, self.settings.scope)
        return {name: t for name, t in v.items() if name in self._in_scope}

    @torch.no_grad()
    def _weigh(
        self,
        logits: Tensor,
        tangent: Tensor | None,
        taught: Tensor | None,
        views: Views,
        batch: Batch,
        pasted: Pasted | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return labels and weights of the sources, each (V * B, *S), by name.

        Args:
            logits: (V * B, K, *S).
            tangent: Their derivative along the direction; None for weights that ask none.
            taught: The teacher's logits, where they are needed.
            views: The views.
            batch: With initial labels, `UNLABELLED` where there is none, and perhaps pseudo labels of whole scans.
            pasted: Clean pixels in the views, which these labels are not about.
        """
        logits = widened(logits)
        initial, pseudo = batch.initial_label, batch.pseudo_label
        assert initial is not None  # noqa: S101 - `losses` has looked
        if pseudo is None:
            own = logits if pasted is None else pasted.bare
            seen = taught if self.settings.pseudo_from == "teacher" else own
            assert seen is not None  # noqa: S101 - `_asks_teacher`
            pseudo = views.pseudo_labels(torch.softmax(seen, 1))
        else:
            pseudo = views.expand_label(pseudo)
        initial = views.expand_label(initial)
        # What is padding in the scan has no pseudo label either.
        both = {"initial": initial, "pseudo": torch.where(initial == IGNORE, IGNORE, pseudo)}
        labels = {name: both[name] for name in self.weighing.sources}
        if pasted is not None:
            labels = {name: torch.where(pasted.covered, IGNORE, label) for name, label in labels.items()}
        weights = self.weighing.weigh(labels, logits, tangent, taught, self.ranks)
        for name, label in labels.items():
            mask = label >= 0
            kept, all_known, mass = self.ranks.sum_each(
                (weights[name] > 0).sum(), mask.sum(), weights[name].sum()
            )
            self.monitors[f"kept_{name}"] = kept / all_known.clamp(min=1)
            self.monitors[f"mass_{name}"] = mass
        return labels, weights

    def _weighted(self, logits: Tensor, labels: dict[str, Tensor], weights: dict[str, Tensor]) -> Losses:
        """Return Σ w c for each label source; the weights of both sources sum to 1 over all ranks.

        With `pseudo_dice` each source's soft Dice loss is added, of pixels that count by their weight, as much as the
        source has of all weight.
        """
        factor = self.settings.pseudo_weight * self.settings.every
        terms = {}
        for name, label in labels.items():
            weight = weights[name]
            term = self.ranks.sum((weight * cross_entropy_map(logits, label)).sum())
            if self.settings.pseudo_dice:
                mass, known = self.ranks.sum_each(weight.sum(), (label >= 0).sum())
                term = term + mass * soft_dice_loss(logits, label, weight=weight * known, ranks=self.ranks)
            terms[name] = factor * term
        return terms

    def _consistency(
        self,
        logits: Tensor,
        taught: Tensor | None,
        views: Views,
        inside: Tensor,
        pasted: Pasted | None = None,
    ) -> Losses:
        """Return L_ple and L_mt, where they have a weight, of pixels that `pasted` clean ones do not cover.

        `inside` (B, *S) is True where the images show their scans.
        """
        uncovered = None if pasted is None else (~pasted.covered).unsqueeze(1).to(logits.dtype)
        terms = {}
        if self.settings.teacher_weight and taught is not None:
            beyond = torch.where(inside, 0, IGNORE)
            valid = (views.expand_label(beyond) != IGNORE).unsqueeze(1).to(logits.dtype)
            valid = valid if uncovered is None else valid * uncovered
            distance = prediction_distance(logits, taught, valid, ranks=self.ranks)
            terms["teacher"] = self.settings.teacher_weight * distance
        if self.settings.ple_weight and isinstance(views, PaddedViews):
            distance = views.pair_distance(
                torch.softmax(logits, 1), detached=self.settings.ple_detached, ranks=self.ranks
            )
            terms["views"] = self.settings.ple_weight * distance
        elif self.settings.views and self.settings.ple_weight:
            aligned, seen = views.align(torch.softmax(logits, 1))
            seen = seen * inside.unsqueeze(1)
            if uncovered is not None:
                seen = seen * (views.align(uncovered)[0] > 0.999)  # interpolated: no part of it covered
            terms["views"] = self.settings.ple_weight * pairwise_consistency(aligned, seen, ranks=self.ranks)
        return terms

    def _clean_gradient(
        self, image: Tensor, label: Tensor, seed: int, stream: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the supervised loss, over all ranks, and this rank's part of its gradient."""
        if self.settings.clean_views:
            views = self._draw(image, seed, stream)
            image, label = views.expand(image), views.expand_label(label)
        return loss_and_gradient(
            self.student,
            image,
            lambda z: self.loss(widened(z), label),
            chunk=self.settings.chunk,
        )
