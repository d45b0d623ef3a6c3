"""BCP: clean and unlabelled images are pasted into each other, both ways (Bai et al., CVPR 2023, arXiv 2305.00673)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mlbseg.components import largest_components
from mlbseg.core.losses import supervised_loss, widened
from mlbseg.core.perturb import boxes
from mlbseg.methods.base import Taught, inside_scan, unlabelled_image
from mlbseg.types import IGNORE, Batch, Losses

_BOX = 0  # stream of random numbers


class BCP(Taught):
    """Supervised loss of mixed images: on their clean part against the label, on the rest against the teacher's.

    Each pair of a clean and an unlabelled image gives two images for the student: the clean one with a box of the
    unlabelled one in it, and the reverse. Where there are fewer of one kind, neighbours share one.

    Args:
        student: The network, with the weights of stage 1 (the paper pastes clean images into each other there).
        teacher_decay: a_max of the teacher (the paper: 0.99).
        box: Sides of the box, as share of the patch's (the paper: 2/3).
        pseudo_weight: Factor of the unlabelled parts' loss (the paper: 0.5).
        largest: Keep only the largest component of each class of a pseudo label, as the paper does; this waits for
            the CPU at every step.
    """

    uses_unlabelled = True
    predicts = "student"  # docs/benchmarks.md has how it compares with its teacher

    def __init__(
        self,
        student: nn.Module,
        *,
        teacher_decay: float = 0.99,
        box: float = 2 / 3,
        pseudo_weight: float = 0.5,
        largest: bool = True,
    ) -> None:
        super().__init__(student, teacher_decay)
        self.box = box
        self.pseudo_weight = pseudo_weight
        self.largest = largest

    def losses(self, batch: Batch, step: int) -> Iterator[Losses]:
        """Yield one loss."""
        image = unlabelled_image(batch)
        pseudo = self._pseudo_label(batch)
        count = max(len(image), len(batch.clean_image))
        # Pairs in blocks, not in turn: so a rank's pairs are those that one rank with the whole batch would make.
        place = torch.arange(count, device=image.device)
        ours, theirs = (place * len(kind) // count for kind in (batch.clean_image, image))
        box = boxes(self.seeds(count, batch.seed, _BOX), image[theirs], self.box ** (image.ndim - 2))
        clean = torch.cat([~box, box])  # (2 * pairs, 1, *S), True where the clean image shows
        ours, theirs = ours.repeat(2), theirs.repeat(2)
        mixed = torch.where(clean, batch.clean_image[ours], image[theirs])
        clean = clean.squeeze(1)
        label = torch.where(clean, batch.clean_label[ours], pseudo[theirs])
        logits = widened(self.student(mixed))
        yield {
            "clean": supervised_loss(logits, label, weight=clean.to(logits.dtype), ranks=self.ranks),
            "pseudo": self.pseudo_weight
            * supervised_loss(logits, label, weight=(~clean).to(logits.dtype), ranks=self.ranks),
        }

    @torch.no_grad()
    def _pseudo_label(self, batch: Batch) -> Tensor:
        """Return the teacher's classes of the unlabelled images (U, *S), `IGNORE` beyond the scan."""
        inside = inside_scan(batch)
        label = self.teacher(unlabelled_image(batch)).argmax(1)
        if self.largest:
            # A component is as large as what the scan shows of it.
            kept = [torch.from_numpy(largest_components(each)) for each in (label * inside).cpu().numpy()]
            label = torch.stack(kept).to(label.device)
        return torch.where(inside, label, IGNORE)
