"""The processes ("ranks") that train one model together, each on its share of the batch.

Sums over pixels run over the pixels of all ranks, so that any number of ranks computes what one rank would on
the whole batch. Where a function of this package takes `ranks`, the default `ALONE` communicates nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors


@dataclass(frozen=True)
class Ranks:
    """This process's place among those that train together.

    Attributes:
        index: This rank, from 0.
        count: Number of ranks.
        group: The process group of `torch.distributed`; the default one when None.
    """

    index: int = 0
    count: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def current(cls, group: dist.ProcessGroup | None = None) -> Ranks:
        """Return the ranks of `torch.distributed` where it has been initialised, else `ALONE`."""
        if not (dist.is_available() and dist.is_initialized()):
            return ALONE
        return cls(dist.get_rank(group), dist.get_world_size(group), group)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks, with the gradient of this rank's part alone.

        A loss of such sums has the same value on every rank, and the gradients of all ranks add up (they are not
        to be averaged) to the gradient of the loss of the whole batch.
        """
        if self.count == 1:
            return x
        total = x.detach().clone()
        dist.all_reduce(total, group=self.group)
        # Adding 0 to the value hands the gradient on to this rank's part.
        return total + (x - x.detach())

    def sum_each(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Return `sum` of each of a few small tensors, exchanged together in a type that holds all."""
        if self.count == 1:
            return parts
        whole = self.sum(torch.cat([part.flatten() for part in parts]))
        sums = whole.split([part.numel() for part in parts])
        return tuple(s.reshape(part.shape) for s, part in zip(sums, parts, strict=True))

    def max(self, x: Tensor) -> Tensor:
        """Return the elementwise maximum over all ranks, without gradient."""
        if self.count == 1:
            return x.detach()
        most = x.detach().clone()
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group)
        return most

    def sum_all(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the sum over all ranks of each of many tensors of one type, in one exchange; no gradient."""
        if self.count == 1 or not tensors:
            return dict(tensors)
        parts = [t.detach() for t in tensors.values()]
        flat = _flatten_dense_tensors(parts)
        dist.all_reduce(flat, group=self.group)
        return dict(zip(tensors, _unflatten_dense_tensors(flat, parts), strict=True))


ALONE = Ranks()
"""One process that trains by itself."""
