"""Random changes of training patches: MONAI's transforms, seeded per patch; or those of a package."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, Self

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
    """Flips, affine and elastic deformations; brightness, contrast, gamma, blur, low resolution and noise.

    The kinds of changes and their order follow nnU-Net (Isensee et al., Nature Methods 2021, supplementary note 4).
    Each allowed axis is flipped half the time.
    """

    class Settings(Augmentation.Settings):
        """Random changes of the training patches; each probability is per patch."""

        rotate: Annotated[float, Field(ge=0, le=180)] | None = Field(
            None,
            description="largest rotation about each axis, degrees; empty: 180 for images that may be flipped along "
            "both axes, else 30",
        )
        scale: Below1 = Field(
            0.4,
            description="largest relative change of size: 0.4 makes a structure up to 1.4 times smaller or larger",
        )
        affine: Share = Field(0.8, description="probability of rotation and scaling")
        elastic: Share = Field(0.2, description="probability of an elastic deformation")
        intensity: Share = Field(
            0.3, description="probability of a change of brightness and, independently, of contrast"
        )
        gamma: Share = Field(0.3, description="probability of a change of gamma")
        invert: Share = Field(0.1, description="probability of a change of gamma of the inverted image")
        blur: Share = Field(0.2, description="probability of a Gaussian blur")
        low_resolution: Share = Field(0.2, description="probability of a lower resolution of the image")
        noise: Share = Field(0.15, description="probability of Gaussian noise")

    settings: Settings

    def __init__(self, ndim: int, settings: Section | None = None, *, flip_axes: Sequence[int] = ()) -> None:
        super().__init__(ndim, settings, flip_axes=flip_axes)
        # Here, as `mlbseg.config` needs the settings alone, and MONAI takes seconds.
        from monai.transforms.compose import Compose

        self._compose = Compose([*self._moves(), *self._greys()])

    def _moves(self) -> list[Any]:
        """Return the changes of place, of image and label alike."""
        from monai.transforms.spatial.dictionary import (
            Rand2DElasticd,
            Rand3DElasticd,
            RandAffined,
            RandFlipd,
        )

        settings, ndim = self.settings, self.ndim
        both, how = ("image", "label"), {"mode": ("bilinear", "nearest"), "padding_mode": "border"}
        steps: list[Any] = [RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in self.flip_axes]
        if settings.affine:
            turn = settings.rotate
            if turn is None:
                turn = 180.0 if ndim == len(set(self.flip_axes)) == 2 else 30.0
            steps.append(
                RandAffined(
                    both,
                    prob=settings.affine,
                    rotate_range=[math.radians(turn)] * (1 if ndim == 2 else 3),
                    # Of the coordinates, less 1: a structure shrinks as much as it grows.
                    scale_range=[(1 / (1 + settings.scale) - 1, settings.scale)] * ndim,
                    **how,
                )
            )
        if settings.elastic and ndim == 2:
            steps.append(Rand2DElasticd(both, (16, 16), (0, 2), prob=settings.elastic, **how))
        elif settings.elastic:
            steps.append(Rand3DElasticd(both, (4, 6), (20, 60), prob=settings.elastic, **how))
        return steps

    def _greys(self) -> list[Any]:
        """Return the changes of the image's intensities."""
        from monai.transforms.intensity.dictionary import (
            RandAdjustContrastd,
            RandGaussianNoised,
            RandGaussianSmoothd,
            RandScaleIntensityd,
            RandShiftIntensityd,
        )
        from monai.transforms.spatial.dictionary import RandSimulateLowResolutiond

        settings, gamma, sigma = self.settings, (0.7, 1.5), (0.5, 1.5)
        steps: list[Any] = []
        if settings.blur:
            steps.append(RandGaussianSmoothd("image", sigma, sigma, sigma, prob=settings.blur))
        if settings.intensity:
            steps.append(RandScaleIntensityd("image", factors=0.25, prob=settings.intensity))
            steps.append(RandShiftIntensityd("image", offsets=0.25, prob=settings.intensity))
        if settings.low_resolution:
            upsample = "bilinear" if self.ndim == 2 else "trilinear"
            steps.append(
                RandSimulateLowResolutiond("image", prob=settings.low_resolution, upsample_mode=upsample)
            )
        if settings.invert:
            steps.append(
                RandAdjustContrastd(
                    "image", prob=settings.invert, gamma=gamma, invert_image=True, retain_stats=True
                )
            )
        if settings.gamma:
            steps.append(RandAdjustContrastd("image", prob=settings.gamma, gamma=gamma, retain_stats=True))
        if settings.noise:
            steps.append(RandGaussianNoised("image", prob=settings.noise, std=0.15))
        return steps

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
