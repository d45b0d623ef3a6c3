"""Random changes of training patches, seeded per patch; or those of a package."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import combinations
from typing import Annotated, Any, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import Field

from mlbseg.errors import UserError
from mlbseg.registry import Registry
from mlbseg.settings import FEW, SINGLE, Below1, Section, Share

KNOTS = 16
"""Voxels between the points that an elastic deformation moves."""
BENT = 2.0
"""The farthest that it moves one of them along an axis, voxels."""


class Augmentation(ABC):
    """Changes a patch and its label together; what happens depends only on the seed of the call.

    A change has two parts. `moved` moves image and label; `greyed` then changes the image's grey values. Of unlabelled
    scans a method gets the patch after both, to learn from, and the patch moved alone, to predict its pseudo labels on.

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
    def moved(
        self, image: npt.NDArray[np.float32], label: npt.NDArray[np.int64], seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the patch moved: flipped, turned, scaled or bent, with the grey values that it has.

        Args:
            image: (C, *S), normalised intensities.
            label: (*S) class indices, or several maps of them (L, *S); negative ones (unknown) move along.
            seed: Decides everything random.

        Returns:
            image: (C, *S) float32.
            label: int64, of the shape that came.
        """

    def greyed(self, image: torch.Tensor, seed: int) -> torch.Tensor:
        """Return a moved image (C, *S) with other grey values, float32; the image that came stays as it is."""
        return image

    def __call__(
        self, image: npt.NDArray[np.float32], label: npt.NDArray[np.int64], seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return image and label after both parts of the change; see `moved`."""
        picture, maps = self.moved(image, label, seed)
        return self.greyed(picture, seed), maps


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
        mirror: Annotated[list[Annotated[int, Field(ge=0, le=2)]] | None, FEW, SINGLE] = Field(
            None,
            description="axes of a patch along which it is flipped half the time; empty: plan.flip_axes",
        )
        elastic: Share = Field(0.0, description="probability of an elastic deformation")
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

        self._greys = Compose(self._grey_steps())
        any_way_up = ndim == len(set(self.flip_axes)) == 2
        if self.settings.mirror is not None:
            self.flip_axes = tuple(dict.fromkeys(self.settings.mirror))
        if bad := [axis for axis in self.flip_axes if axis >= ndim]:
            raise UserError(
                f"augment.mirror: found axis {bad[0]}, expected axes of a {ndim}D patch, 0 to {ndim - 1}"
            )
        self._turn = self.settings.rotate if self.settings.rotate is not None else 180 if any_way_up else 30

    def _places(self, shape: Sequence[int], rng: np.random.Generator) -> torch.Tensor | None:
        """Draw where each voxel of the changed patch comes from, (1, *S, ndim) as `grid_sample` wants it; or None.

        One map for turning, scaling and bending, so that image and label are interpolated once.
        """
        settings, ndim = self.settings, self.ndim
        turned, bent = rng.random(2) < (settings.affine, settings.elastic)
        if not turned and not bent:
            return None
        matrix = np.eye(ndim)
        if turned:
            # Of the coordinates: a structure shrinks as much as it grows.
            scales = rng.uniform(1 / (1 + settings.scale), 1 + settings.scale, ndim)
            matrix = _rotation(math.radians(self._turn), ndim, rng) * scales
        half = (
            np.array(shape[::-1]) / 2
        )  # voxels from the middle to the edge, x first; the map is in shares of it
        theta = torch.from_numpy(np.c_[matrix * half / half[:, None], np.zeros(ndim)]).float()
        grid = F.affine_grid(theta[None], [1, 1, *shape], align_corners=False)
        return grid + _bend(shape, rng) / torch.from_numpy(half).float() if bent else grid

    def _grey_steps(self) -> list[Any]:
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

    def moved(
        self, image: npt.NDArray[np.float32], label: npt.NDArray[np.int64], seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the patch flipped, turned, scaled and bent."""
        picture, maps = torch.from_numpy(image), torch.from_numpy(label).reshape(-1, *image.shape[1:])
        rng = np.random.default_rng(seed)
        flipped = [axis - self.ndim for axis in self.flip_axes if rng.random() < 0.5]
        picture, maps = picture.flip(flipped), maps.flip(flipped)
        grid = self._places(image.shape[1:], rng)
        if grid is not None:
            picture = F.grid_sample(picture[None], grid, "bilinear", "border", align_corners=False)[0]
            # Nearest, and so exact for any label that float32 holds.
            maps = F.grid_sample(maps[None].float(), grid, "nearest", "border", align_corners=False)[0].long()
        return picture, maps.reshape(label.shape)

    def greyed(self, image: torch.Tensor, seed: int) -> torch.Tensor:
        """Return the image with changes of brightness, contrast, gamma, blur, resolution and noise."""
        self._greys.set_random_state(seed=seed)
        changed = torch.as_tensor(self._greys({"image": image})["image"]).float()
        # A plain tensor: MONAI's subclass would slow every operation that follows.
        return changed.as_subclass(torch.Tensor)


def _rotation(largest: float, ndim: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Draw a rotation of up to so many radians in each plane of two axes, (ndim, ndim)."""
    matrix = np.eye(ndim)
    for first, second in combinations(range(ndim), 2):
        angle = rng.uniform(-largest, largest)
        turn = np.eye(ndim)
        turn[[first, second], [first, second]] = math.cos(angle)
        turn[first, second], turn[second, first] = -math.sin(angle), math.sin(angle)
        matrix = turn @ matrix
    return matrix


def _bend(shape: Sequence[int], rng: np.random.Generator) -> torch.Tensor:
    """Draw a smooth displacement of every voxel (*S, ndim), voxels: of points `KNOTS` apart, linear in between."""
    ndim = len(shape)
    knots = [max(2, round(side / KNOTS) + 1) for side in shape]
    moves = rng.uniform(-1, 1, (1, ndim, *knots)) * rng.uniform(0, BENT)
    mode = "bilinear" if ndim == 2 else "trilinear"
    smooth = F.interpolate(torch.from_numpy(moves).float(), tuple(shape), mode=mode, align_corners=True)
    return smooth[0].movedim(0, -1)


AUGMENTATIONS: Registry[type[Augmentation]] = Registry(
    "augmentation",
    "mlbseg.augmentations",
    {"standard": Augment},
    lambda thing: isinstance(thing, type) and issubclass(thing, Augmentation),
)
