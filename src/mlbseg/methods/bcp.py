"""BCP: clean and unlabelled images are pasted into each other, both ways (Bai et al., CVPR 2023, arXiv 2305.00673)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from mlbseg.components import largest_components
from mlbseg.core.losses import widened
from mlbseg.core.perturb import boxes
from mlbseg.core.teacher import update_teacher
from mlbseg.methods.base import Method, Taught, inside_scan, neighbours, unlabelled_image, weak_image
from mlbseg.settings import Weight
from mlbseg.types import IGNORE, Batch, Losses

_BOX = 0  # stream of random numbers


class Pasted(Method):
    """Stage 1 of BCP: supervised loss of clean images, each with a box of its neighbour's in it.

    The last of an odd number has no neighbour, and no box.
    """

    mixes_pairs = True

    settings: BCP.Settings

    def losses(self, batch: Batch, step: int) -> Iterator[Losses]:
        """Yield one loss."""
        image, label = batch.clean_image, batch.clean_label
        seeds = self.seeds(len(image), batch.seed, _BOX)
        box = boxes(seeds, image, self.settings.box ** (image.ndim - 2))
        neighbour = neighbours(len(image))
        logits = widened(self.student(torch.where(box, image[neighbour], image)))
        yield {"clean": self.loss(logits, torch.where(box.squeeze(1), label[neighbour], label))}


class BCP(Taught):
    """Supervised loss of mixed images: on their clean part against the label, on the rest against the teacher's.

    Each pair of a clean and an unlabelled image gives two images for the student: the clean one with a box of the
    unlabelled one in it, and the reverse. Where there are fewer of one kind, neighbours share one.
    """

    uses_unlabelled = True
    predicts = "student"  # docs/benchmarks.md has how it compares with its teacher

    class Settings(Taught.Settings):
        """What a user can set."""

        box: float = Field(
            2 / 3, gt=0, lt=1, description="sides of the box, as a share of the patch's (the paper: 2/3)"
        )
        pseudo_weight: Weight = Field(
            0.5, description="factor of the unlabelled parts' loss (the paper: 0.5)"
        )
        largest: bool = Field(
            True,
            description="keep only the largest component of each class of a pseudo label, as the paper does; this "
            "waits for the CPU at every step",
        )
        pretrain: bool = Field(
            False,
            description="learn images pasted into each other in stage 1 too, as the paper does; the default is the "
            "stage 1 of all methods",
        )

    settings: Settings

    @classmethod
    def stage1(cls, settings: Any) -> type[Method] | None:
        """Return what trains stage 1: images pasted into each other, if that is asked for."""
        return Pasted if settings.pretrain else None

    def losses(self, batch: Batch, step: int) -> Iterator[Losses]:
        """Yield one loss."""
        image = unlabelled_image(batch)
        pseudo = self._pseudo_label(batch)
        count = max(len(image), len(batch.clean_image))
        # Pairs in blocks, not in turn: so a rank's pairs are those that one rank with the whole batch would make.
        place = torch.arange(count, device=image.device)
        ours, theirs = (place * len(kind) // count for kind in (batch.clean_image, image))
        box = boxes(self.seeds(count, batch.seed, _BOX), image[theirs], self.settings.box ** (image.ndim - 2))
        clean = torch.cat([~box, box])  # (2 * pairs, 1, *S), True where the clean image shows
        ours, theirs = ours.repeat(2), theirs.repeat(2)
        mixed = torch.where(clean, batch.clean_image[ours], image[theirs])
        clean = clean.squeeze(1)
        label = torch.where(clean, batch.clean_label[ours], pseudo[theirs])
        logits = widened(self.student(mixed))
        yield {
            "clean": self.loss(logits, label, weight=clean.to(logits.dtype)),
            "pseudo": self.settings.pseudo_weight
            * self.loss(logits, label, weight=(~clean).to(logits.dtype)),
        }

    def after_step(self, step: int) -> None:
        """Move the teacher, with the same decay from the first step on, as in the authors' code."""
        update_teacher(self.teacher, self.student, math.inf, self.settings.teacher_decay)

    @torch.no_grad()
    def _pseudo_label(self, batch: Batch) -> Tensor:
        """Return the teacher's classes of the unlabelled images (U, *S), `IGNORE` beyond the scan."""
        inside = inside_scan(batch)
        label = self.teacher(weak_image(batch)).argmax(1)
        if self.settings.largest:
            # A component is as large as what the scan shows of it.
            kept = [torch.from_numpy(largest_components(each)) for each in (label * inside).cpu().numpy()]
            label = torch.stack(kept).to(label.device)
        return torch.where(inside, label, IGNORE)
