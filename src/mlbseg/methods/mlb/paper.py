"""Paper mode: a virtual step ahead, the weighted step, then a step on the clean batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.func import functional_call

from mlbseg.core.directional import directional_derivative, gradient
from mlbseg.core.losses import widened
from mlbseg.core.optimisers import precondition, virtual_step
from mlbseg.methods.base import inside_scan
from mlbseg.methods.mlb.sight import (
    CLEAN_SIGHT,
    CLEAN_VIEWS,
    META_VIEWS,
    SIGHT,
    VIEWS,
    Sight,
)
from mlbseg.types import IGNORE, Batch, Losses


class Paper(Sight):
    """The clean gradient v is taken after a virtual step on the consistency terms alone (Wei et al., 2023)."""

    def _paper(self, batch: Batch, image: Tensor, weigh: bool, step: int) -> Iterator[Losses]:
        if self.optimiser is None:
            raise ValueError("paper mode looks one optimiser step ahead: set `optimiser` first")
        asks = weigh and self.weighing.asks_direction
        views = self._draw(image, batch.seed, VIEWS)
        x, taught, _ = self._see(views, image, batch, SIGHT, weak=batch.weak)
        with self.same_dropout(batch):
            # In the chunks of the pass that the weights come from: so dropout draws the same masks in both.
            logits = widened(
                torch.cat([self.student(part) for part in x.split(self.settings.chunk or len(x))])
            )
        consistency = self._consistency(logits, taught, views, inside_scan(batch))
        clean_views = self._draw(batch.clean_image, batch.seed, CLEAN_VIEWS)
        clean_x = self._shown(clean_views, batch.clean_image, batch, CLEAN_SIGHT)
        clean_label = clean_views.expand_label(batch.clean_label)
        labels: dict[str, Tensor] = {}
        weights: dict[str, Tensor] = {}
        if weigh:
            seen, tangent = logits.detach(), None
        if asks:
            # The virtual step at w = 0 follows the consistency terms alone; v is the clean gradient there.
            together = torch.stack([logits.sum() * 0, *consistency.values()]).sum()
            regulariser = self.ranks.sum_all(gradient(together, self.student, retain_graph=True))
            ahead = virtual_step(self.student, regulariser, self.optimiser)
            meta_x, meta_label = clean_x, clean_label
            if batch.meta_image is not None and batch.meta_label is not None:
                meta_views = self._draw(batch.meta_image, batch.seed, META_VIEWS)
                meta_x, meta_label = (
                    meta_views.expand(batch.meta_image),
                    meta_views.expand_label(batch.meta_label),
                )
            v = self.ranks.sum_all(self._gradient_at(ahead, meta_x, meta_label))
            v = precondition(v, self.student, self.optimiser, regulariser)
            with self.same_dropout(batch):
                seen, tangent = directional_derivative(
                    self.student, self._towards(v, x, batch.seed), x, chunk=self.settings.chunk
                )
        if weigh:
            labels, weights = self._weigh(seen, tangent, taught, views, batch)
        if terms := {**self._weighted(logits, labels, weights), **consistency}:
            yield terms
            if self.settings.teacher_twice:
                self.move_teacher(step)

        calm = clean_views.expand(batch.clean_image)
        clean_taught = self._taught(calm, len(batch.clean_image), batch, CLEAN_SIGHT)
        logits = widened(self.student(clean_x))
        terms = self._consistency(logits, clean_taught, clean_views, batch.clean_label != IGNORE)
        yield {
            "clean": self.loss(logits, clean_label),
            **{f"clean_{name}": term for name, term in terms.items()},
        }

    def _gradient_at(self, ahead: dict[str, Tensor], x: Tensor, label: Tensor) -> dict[str, Tensor]:
        """Return the supervised loss's gradient at the parameters `ahead`, leaving the student as it is."""
        ahead = {name: p.detach().requires_grad_() for name, p in ahead.items()}
        buffers = {name: b.detach().clone() for name, b in self.student.named_buffers()}
        logits = widened(functional_call(self.student, {**ahead, **buffers}, (x,)))
        loss = self.loss(logits, label)
        grads = torch.autograd.grad(loss, list(ahead.values()), materialize_grads=True)
        return dict(zip(ahead, grads, strict=True))
