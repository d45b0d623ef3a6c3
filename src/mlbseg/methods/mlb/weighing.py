"""From what the clean gradient says of each pixel to how much each of its labels counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mlbseg.core.losses import cross_entropy_map, residual_map, widened
from mlbseg.core.metaweights import alignment, normalise
from mlbseg.core.ranks import Ranks

_RULES = {
    "residual": "share",
    "uniform": "sign",
    "confidence": "share",
}  # of weightings that are no rule of `normalise`


@dataclass(frozen=True)
class Weighing:
    """How the pixels of one or several sources of labels are weighed; the fields are arguments of `MLB`.

    Attributes:
        sources: The names of the sources.
        weighting: How an alignment becomes a weight.
        decides: ``everywhere``, or in ``disputes`` of the sources alone.
        per_source: Give each source the same total of weight.
        per_image: Give every view of every image the same total of weight.
    """

    sources: tuple[str, ...]
    weighting: str
    decides: str
    per_source: bool
    per_image: bool

    @property
    def may_differ(self) -> bool:
        """Whether any pixel may count more than another."""
        return self.weighting != "uniform" and (self.decides == "everywhere" or len(self.sources) > 1)

    @property
    def asks_direction(self) -> bool:
        """Whether it is a direction that decides."""
        return self.may_differ and self.weighting != "confidence"

    @torch.no_grad()
    def weigh(
        self,
        labels: Mapping[str, Tensor],
        logits: Tensor,
        tangent: Tensor | None,
        taught: Tensor | None,
        ranks: Ranks,
    ) -> dict[str, Tensor]:
        """Return the weight of each pixel of each source, (B, *S) by name; over all ranks they sum to 1.

        Args:
            labels: (B, *S) by source; negative where it has none.
            logits: (B, K, *S).
            tangent: Their derivative along the direction; None where none is asked.
            taught: The teacher's logits, (B, K, *S); needed for its confidence alone.
            ranks: Those that share the batch.
        """
        found = [self._counts(label, logits, tangent, taught) for label in labels.values()]
        if self.may_differ and self.decides == "disputes":
            first, *others = labels.values()
            # Where a source has no label there is nothing to dispute.
            agreed = torch.stack([(label == first) | (label < 0) | (first < 0) for label in others]).all(0)
            most = torch.stack([torch.where(agreed, 0, each).amax() for each in found]).amax()
            most = ranks.max(most).clamp(min=torch.finfo(logits.dtype).tiny)
            found = [torch.where(agreed, most, each) for each in found]
        weights = normalise(
            found,
            rule=_RULES.get(self.weighting, self.weighting),  # type: ignore[arg-type]
            known=[label >= 0 for label in labels.values()],
            per_source=self.per_source,
            per_image=self.per_image,
            ranks=ranks,
        )
        return dict(zip(labels, weights, strict=True))

    def _counts(self, label: Tensor, logits: Tensor, tangent: Tensor | None, taught: Tensor | None) -> Tensor:
        """Return what speaks for each pixel of a source (B, *S), before the pixels are compared."""
        if not self.may_differ:
            return torch.ones_like(logits[:, 0])
        if tangent is None:
            assert taught is not None  # noqa: S101 - nothing else is left to decide
            return 1 - residual_map(taught, label)
        along = alignment(lambda z: cross_entropy_map(z, label), logits, widened(tangent))
        if self.weighting == "residual":
            along = along / residual_map(logits, label).clamp(min=1e-3)
        return along
