"""Random changes of training patches: MONAI's transforms, seeded per patch; or those of a package."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from mlbseg.registry import Registry
from mlbseg.settings import Below1, Section, Share


class Augmentation(ABC):
    """Changes a patch and its label together; what happens depends only on the seed of the call.

    Args:
        ndim: 2 or 3.
        settings: What the user chose; the defaults when None.
        flip_axes: Spatial axes, in array order, whose flip keeps anatomy valid.
    """

    class Settings(Section):
        """What a user can set of the augmentation."""

    settings: Settings

    def __init__(self, ndim: int, settings: Section | None = None, *, flip_axes: Sequence[int] = ()) -> None:
        self.ndim = ndim
        self.settings = self.Settings() if settings is None else settings  # type: ignore[assignment]
        self.flip_axes = tuple(flip_axes)

    @classmethod
    def make(cls, ndim: int, *, flip_axes: Sequence[int] = (), **settings: Any) -> Self:
        """Return the augmentation with settings by name: ``Augment.make(3, rotate=30)``.

        Raises:
            ValueError: a setting is unknown, or its value is none that it takes (pydantic's ValidationError).
        """
        return cls(ndim, cls.Settings(**settings), flip_axes=flip_axes)

    @abstractmethod
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


class Augment(Augmentation):
    """Flips, affine and elastic deformations, changes of brightness, contrast and gamma, and noise.

    Each allowed axis is flipped half the time.
    """

    class Settings(Augmentation.Settings):
        """Random changes of the training patches; each probability is per patch."""

        rotate: float = Field(15.0, ge=0, le=180, description="largest rotation about each axis, degrees")
        scale: Below1 = Field(0.15, description="largest relative change of size")
        affine: Share = Field(0.5, description="probability of rotation and scaling")
        elastic: Share = Field(0.0, description="probability of an elastic deformation")
        intensity: Share = Field(
            0.5, description="probability of a change of brightness and, independently, of contrast"
        )
        gamma: Share = Field(0.3, description="probability of a change of gamma")
        noise: Share = Field(0.2, description="probability of Gaussian noise")

    settings: Settings

    def __init__(self, ndim: int, settings: Section | None = None, *, flip_axes: Sequence[int] = ()) -> None:
        super().__init__(ndim, settings, flip_axes=flip_axes)
        self._compose = self._transforms()

    def _transforms(self) -> Any:
        # Here, as `mlbseg.config` needs the settings alone, and MONAI takes seconds.
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

        settings, ndim, flip_axes = self.settings, self.ndim, self.flip_axes
        both, modes = ("image", "label"), ("bilinear", "nearest")
        angles = [math.radians(settings.rotate)] * (1 if ndim == 2 else 3)
        steps: list[Transform] = [RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in flip_axes]
        if settings.affine:
            steps.append(
                RandAffined(
                    both,
                    prob=settings.affine,
                    rotate_range=angles,
                    scale_range=[settings.scale] * ndim,
                    mode=modes,
                    padding_mode="border",
                )
            )
        if settings.elastic and ndim == 2:
            steps.append(
                Rand2DElasticd(
                    both, (16, 16), (1, 2), prob=settings.elastic, mode=modes, padding_mode="border"
                )
            )
        elif settings.elastic:
            steps.append(
                Rand3DElasticd(
                    both, (4, 6), (20, 60), prob=settings.elastic, mode=modes, padding_mode="border"
                )
            )
        if settings.intensity:
            steps.append(RandScaleIntensityd("image", factors=0.25, prob=settings.intensity))
            steps.append(RandShiftIntensityd("image", offsets=0.25, prob=settings.intensity))
        if settings.gamma:
            steps.append(
                RandAdjustContrastd("image", prob=settings.gamma, gamma=(0.7, 1.5), retain_stats=True)
            )
        if settings.noise:
            steps.append(RandGaussianNoised("image", prob=settings.noise, std=0.15))
        return Compose(steps)

    def __call__(
        self, image: npt.NDArray[np.float32], label: npt.NDArray[np.int64], seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the changed patch."""
        self._compose.set_random_state(seed=seed)
        maps = torch.from_numpy(label).reshape(-1, *image.shape[1:])
        changed = self._compose({"image": torch.from_numpy(image), "label": maps.float()})
        image_out = torch.as_tensor(changed["image"]).float()
        label_out = torch.as_tensor(changed["label"]).round().long().reshape(label.shape)
        # Plain tensors: MONAI's subclass would slow every operation that follows.
        return image_out.as_subclass(torch.Tensor), label_out.as_subclass(torch.Tensor)


AUGMENTATIONS: Registry[type[Augmentation]] = Registry(
    "augmentation",
    "mlbseg.augmentations",
    {"standard": Augment},
    lambda thing: isinstance(thing, type) and issubclass(thing, Augmentation),
)
