"""Joint mode: the clean gradient where the model stands, used twice, and one update."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from mlbseg.core.directional import (
    Direction,
    directional_derivative,
    loss_and_gradient,
    with_gradient,
)
from mlbseg.core.losses import widened
from mlbseg.core.optimisers import precondition
from mlbseg.core.shared_pass import output_and_tangent
from mlbseg.methods.base import inside_scan
from mlbseg.methods.mlb.sight import CLEAN_VIEWS, META_VIEWS, SIGHT, VIEWS, Sight
from mlbseg.types import Batch, Losses


class Joint(Sight):
    """The clean gradient v is the direction of the weights, and the clean part of one update."""

    def _joint(self, batch: Batch, image: Tensor, weigh: bool, step: int) -> Iterator[Losses]:
        clean, v = self._clean_gradient(batch.clean_image, batch.clean_label, batch.seed, CLEAN_VIEWS)
        guide = v  # the gradient that the weights are to serve
        asks = weigh and self.weighing.asks_direction
        if asks and batch.meta_image is not None and batch.meta_label is not None:
            _, guide = self._clean_gradient(batch.meta_image, batch.meta_label, batch.seed, META_VIEWS)
        views = self._draw(image, batch.seed, VIEWS)
        x, taught, pasted = self._see(views, image, batch, SIGHT, weak=batch.weak, mix=self.settings.mix)
        labels: dict[str, Tensor] = {}
        weights: dict[str, Tensor] = {}
        logits: Tensor | None = None
        tangent: Tensor | None = None
        # Weights and loss must mean the same network.
        with self.same_dropout(batch):
            if asks:
                direction = self._towards(self._preconditioned(guide, v), x, batch.seed)
                if self.settings.chunk is None:
                    logits, tangent = output_and_tangent(self.student, direction, x)
                else:
                    logits, tangent = directional_derivative(
                        self.student, direction, x, chunk=self.settings.chunk
                    )
            elif self.settings.chunk is None:
                logits = self.student(x)
            elif weigh:  # the labels of the student, should they be asked for
                logits = self._asked(x)
            if weigh and logits is not None:
                labels, weights = self._weigh(logits.detach(), tangent, taught, views, batch, pasted)

        inside = inside_scan(batch)

        def terms(logits: Tensor) -> Losses:
            logits = widened(logits)
            found = {
                **self._weighted(logits, labels, weights),
                **self._consistency(logits, taught, views, inside, pasted),
            }
            if pasted is not None:
                found["mixed"] = self.loss(logits, pasted.label)
            return found

        if self.settings.chunk is None and logits is not None:
            others = terms(logits)
        else:
            with self.same_dropout(batch):
                others, rest = _terms_and_gradient(self.student, x, terms, self.settings.chunk, logits)
            v = {name: v[name] + rest[name] for name in v}
        yield {"clean": with_gradient(clean, v, self.student), **others}

    def _preconditioned(self, guide: Direction, v: Direction) -> Direction:
        """Return the gradient that weights are to serve as the optimiser's step sees it: A v (see `precondition`).

        SGD's A is a number, the learning rate, which no weight depends on.
        """
        guide = self.ranks.sum_all(guide)
        if self.optimiser is None or isinstance(self.optimiser, torch.optim.SGD):
            return guide
        return precondition(guide, self.student, self.optimiser, self.ranks.sum_all(v))


def _terms_and_gradient(
    model: nn.Module, x: Tensor, terms: Callable[[Tensor], Losses], chunk: int | None, output: Tensor | None
) -> tuple[Losses, dict[str, Tensor]]:
    """Return loss terms, detached, and the gradient of their sum, a chunk at a time (see `loss_and_gradient`)."""
    found: Losses = {}

    def total(logits: Tensor) -> Tensor:
        found.update(terms(logits))
        return torch.stack([logits.sum() * 0, *found.values()]).sum()  # a step may have no terms

    _, grads = loss_and_gradient(model, x, total, chunk=chunk, output=output)
    return {name: term.detach() for name, term in found.items()}, grads
