"""Stripes: slices of a patch get brighter or darker, each by its own amount, as in scans taken slice by slice."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from mlbseg.data.augment import Augmentation


class Stripes(Augmentation):
    """Changes the brightness of each slice along the first axis; labels stay."""

    class Settings(Augmentation.Settings):
        """What a user can set."""

        depth: float = Field(
            0.2, ge=0, le=10, description="SD of the change, in units of the normalised intensity"
        )

    settings: Settings

    def moved(
        self, image: npt.NDArray[np.float32], label: npt.NDArray[np.int64], seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the patch as it is: nothing is moved."""
        return torch.from_numpy(image), torch.from_numpy(label)

    def greyed(self, image: torch.Tensor, seed: int) -> torch.Tensor:
        """Return the image with its stripes."""
        slices = (1, image.shape[1], *(1,) * (image.ndim - 2))
        change = np.random.default_rng(seed).normal(0, self.settings.depth, slices).astype(np.float32)
        return image + torch.from_numpy(change)
