"""What a trained network says of a scan without a label: how sure it is of its mask, and what the scan is like."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from mlbseg.core.features import deepest_layer
from mlbseg.data.plan import Plan
from mlbseg.types import Case
from mlbseg.windows import case_probability

BACKGROUND_WEIGHT = 1e-6
"""Of a place without foreground: a scan in which the network finds nothing is described by all of it."""


@dataclass(frozen=True)
class Look:
    """What one look at a scan gave.

    Attributes:
        uncertainty: 1 minus the Dice that the network expects of its own mask; see `expected_dice`.
        descriptor: (F,) float64, the mean of the network's deepest features over what it takes for foreground.
    """

    uncertainty: float
    descriptor: npt.NDArray[np.float64]


def expected_dice(probability: npt.NDArray[np.float32]) -> float:
    """Return the Dice that class probabilities promise for the mask of the likeliest classes; mean over classes.

    Of a class with probability p and mask m it is (2 sum(p m) + 1) / (sum(p) + sum(m) + 1), in voxels. This is
    Borges et al., *Soft Dice Confidence* (arXiv 2402.10665), a close bound of the expected Dice; the added voxel
    makes a class that is surely absent 1, as `mlbseg.metrics` scores it. A network that is too sure of itself
    promises too much, but the order of the scans is kept.

    Args:
        probability: (K, *S), background first.
    """
    likeliest = probability.argmax(0)
    values = []
    for index in range(1, len(probability)):
        p, mask = probability[index], likeliest == index
        inside = p.sum(where=mask, dtype=np.float64)
        values.append((2 * inside + 1) / (p.sum(dtype=np.float64) + np.count_nonzero(mask) + 1))
    return float(np.mean(values))


class Looker:
    """Looks at scans with the network of a run.

    Args:
        network: In evaluation mode, on `device`.
        plan: Of the run that the network is from.
        device: Where windows are computed.
    """

    def __init__(self, network: nn.Module, plan: Plan, device: torch.device) -> None:
        self.network, self.plan, self.device = network, plan, device
        patch = torch.zeros(1, plan.channels, *plan.patch_size, device=device)
        self.layer = deepest_layer(network, patch)

    def look(self, case: Case) -> Look:
        """Segment a scan, in one pass and without writing anything.

        Args:
            case: Its label is not looked at.

        Raises:
            UserError: if the scan cannot be read, or is not of the plan's dimension and channels.
        """
        pool = _Pool()
        handles = [
            self.network.get_submodule(self.layer).register_forward_hook(pool.keep),
            self.network.register_forward_hook(pool.add),
        ]
        try:
            probability, _ = case_probability(case, self.network, self.plan, self.device)
        finally:
            for handle in handles:
                handle.remove()
        return Look(1 - expected_dice(probability), pool.mean())


class _Pool:
    """The weighted mean of features over all windows of a scan, as a network's forward hooks fill it."""

    def __init__(self) -> None:
        self.features: Tensor | None = None
        self.total: Tensor | float = 0.0
        self.weight: Tensor | float = 0.0

    def keep(self, _: nn.Module, __: object, features: Tensor) -> None:
        """Keep the features (B, F, *s) until it is known where the foreground is."""
        self.features = features.double()

    def add(self, _: nn.Module, __: object, logits: Tensor) -> None:
        """Add windows, of which these are the logits (B, K, *S)."""
        assert self.features is not None  # noqa: S101 - the layer runs before the network's end
        foreground = 1 - torch.softmax(logits.double(), 1)[:, :1]
        size = self.features.shape[2:]
        weight = functional.interpolate(foreground, size=size, mode="area") + BACKGROUND_WEIGHT
        over = (0, *range(2, weight.ndim))
        self.total = self.total + (self.features * weight).sum(over)
        self.weight = self.weight + weight.sum()

    def mean(self) -> npt.NDArray[np.float64]:
        """Return the mean, (F,)."""
        mean = self.total / self.weight
        assert isinstance(mean, Tensor)  # noqa: S101 - a scan has a window
        result: npt.NDArray[np.float64] = mean.cpu().numpy()
        return result
