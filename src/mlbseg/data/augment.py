"""Random changes of training patches: MONAI's transforms, seeded per patch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from monai.transforms.compose import Compose
from monai.transforms.intensity.dictionary import (
    RandAdjustContrastd,
    RandGaussianNoised,
    RandScaleIntensityd,
    RandShiftIntensityd,
)
from monai.transforms.spatial.dictionary import (
    Rand2DElasticd,
    Rand3DElasticd,
    RandAffined,
    RandFlipd,
)
from monai.transforms.transform import Transform


class Augment:
    """Changes a patch and its label together; what happens depends only on the seed of the call.

    Args:
        ndim: 2 or 3.
        rotate: Largest rotation about each axis, degrees.
        scale: Largest relative change of size.
        affine: Probability of rotation and scaling.
        elastic: Probability of an elastic deformation.
        intensity: Probability of a change of brightness and, independently, of contrast.
        gamma: Probability of a change of gamma.
        noise: Probability of Gaussian noise.
        flip_axes: Spatial axes, in array order, whose flip keeps anatomy valid; each is flipped half the time.
    """

    def __init__(
        self,
        ndim: int,
        *,
        rotate: float = 15.0,
        scale: float = 0.15,
        affine: float = 0.5,
        elastic: float = 0.0,
        intensity: float = 0.5,
        gamma: float = 0.3,
        noise: float = 0.2,
        flip_axes: Sequence[int] = (),
    ) -> None:
        both, modes = ("image", "label"), ("bilinear", "nearest")
        angles = [math.radians(rotate)] * (1 if ndim == 2 else 3)
        steps: list[Transform] = [RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in flip_axes]
        if affine:
            steps.append(
                RandAffined(
                    both,
                    prob=affine,
                    rotate_range=angles,
                    scale_range=[scale] * ndim,
                    mode=modes,
                    padding_mode="border",
                )
            )
        if elastic and ndim == 2:
            steps.append(
                Rand2DElasticd(both, (16, 16), (1, 2), prob=elastic, mode=modes, padding_mode="border")
            )
        elif elastic:
            steps.append(
                Rand3DElasticd(both, (4, 6), (20, 60), prob=elastic, mode=modes, padding_mode="border")
            )
        if intensity:
            steps.append(RandScaleIntensityd("image", factors=0.25, prob=intensity))
            steps.append(RandShiftIntensityd("image", offsets=0.25, prob=intensity))
        if gamma:
            steps.append(RandAdjustContrastd("image", prob=gamma, gamma=(0.7, 1.5), retain_stats=True))
        if noise:
            steps.append(RandGaussianNoised("image", prob=noise, std=0.15))
        self._compose = Compose(steps)

    def __call__(
        self, image: npt.NDArray[np.float32], label: npt.NDArray[np.int64], seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the changed patch.

        Args:
            image: (C, *S), normalised intensities.
            label: (*S) class indices, or several maps of them (L, *S); negative ones (unknown) move along.
            seed: Decides everything random.

        Returns:
            image: (C, *S) float32.
            label: int64, of the shape that came.
        """
        self._compose.set_random_state(seed=seed)
        maps = torch.from_numpy(label).reshape(-1, *image.shape[1:])
        changed = self._compose({"image": torch.from_numpy(image), "label": maps.float()})
        image_out = torch.as_tensor(changed["image"]).float()
        label_out = torch.as_tensor(changed["label"]).round().long().reshape(label.shape)
        # Plain tensors: MONAI's subclass would slow every operation that follows.
        return image_out.as_subclass(torch.Tensor), label_out.as_subclass(torch.Tensor)
