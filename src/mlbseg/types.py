"""The data model that every room shares. No room defines these a second time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch  # `mlbseg check` does without, and its seconds

IGNORE = -1
"""The label of a pixel that no loss may look at (padding, outside a view)."""

UNLABELLED = -2
"""The initial label of a pixel that has none: what it is, pseudo labels may say."""

EITHER = -3
"""The first label of a pixel that is background or one of several classes: ``EITHER - j`` names the j-th such set (see
`mlbseg.core.losses.resolved`). What does not know of sets takes such a pixel as not labelled."""

NOT_KNOWN = -(2**31)
"""In a label as it has been read (`read_known`): a voxel whose class the label does not tell."""

Losses: TypeAlias = "dict[str, torch.Tensor]"
"""Named scalar loss terms of one optimiser step; what is minimised is their sum."""


class Role(StrEnum):
    """What a case's label is to training."""

    CLEAN = "clean"  # a careful label
    UNLABELLED = "unlabelled"  # no label
    NOISY = "noisy"  # an unverified label
    TEST = "test"  # never seen by training, whatever it carries


@dataclass(frozen=True)
class Geometry:
    """Where a scan lies in the patient, in SimpleITK's convention: (x, y[, z]) order, mm, LPS.

    Attributes:
        size: Number of pixels along each axis. The NumPy array of the scan has the reversed shape.
        spacing: mm between pixel centres along each axis.
        origin: Position of the first pixel's centre, mm.
        direction: Direction cosines, row-major, n*n numbers.
        stored: What a file itself says of its place (`Placement.numbers`), so that what is made of a scan lies where
            the scan does for every program: of NIfTI files, and of others whose axes are skewed; else (), as for all
            but the lattice of a file.
    """

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]
    stored: tuple[float, ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def identity(cls, size: tuple[int, ...], spacing: tuple[float, ...] | None = None) -> Geometry:
        """Return a geometry with unit spacing (unless given), zero origin and axes along the patient's."""
        n = len(size)
        direction = tuple(float(v) for v in np.eye(n).ravel())
        return cls(tuple(size), spacing or (1.0,) * n, (0.0,) * n, direction)

    @property
    def ndim(self) -> int:
        """Number of spatial dimensions: 2 or 3."""
        return len(self.size)


@dataclass(frozen=True)
class Scan:
    """An image in memory.

    Attributes:
        array: (C, *S), S in NumPy order ([z,] y, x).
        geometry: Where it lies.
        notes: What reading has left out or done to it.
    """

    array: npt.NDArray[np.float32]
    geometry: Geometry
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Known:
    """Which voxels of a label tell their class. By default all do.

    Attributes:
        ignore: The value in the file that stands for "not known here" (nnU-Net's *ignore*, "not drawn" of scribbles).
        sparse: Slices without a drawn voxel are not known: the label was drawn on some slices of the scan.
        cropped: What a cropped segmentation of 3D Slicer does not cover is not known; else it is background.
        classes: The label values that were drawn in this case, without 0; None: all. Background then means background
            or one of the other classes.
        every: For experiments: of a whole label only one slice in so many counts as drawn, the others as not looked at.
    """

    ignore: int | None = None
    sparse: bool = False
    cropped: bool = False
    classes: tuple[int, ...] | None = None
    every: int | None = None


ALL_KNOWN = Known()


@dataclass(frozen=True)
class Case:
    """One subject's scan as it lies on disk.

    Attributes:
        id: Unique name, used in logs and for output files. A plain file name: no separators.
        images: One file (or DICOM folder) per channel, or one multi-channel file.
        label: The label file; None where there is none. May equal the image file (HDF5 holds both).
        role: What the label is to training.
        patient: Cases of one patient are never split between training and validation; defaults to `id`.
        known: Which voxels of the label tell their class. The others count for nothing in a supervised loss and in a
            score; to a semi-supervised method they are unlabelled.
        may_be_empty: A label without any structure is meant: there is nothing to find in the scan.
    """

    id: str
    images: tuple[Path, ...]
    label: Path | None = None
    role: Role = Role.UNLABELLED
    patient: str = ""
    known: Known = ALL_KNOWN
    may_be_empty: bool = False

    def __post_init__(self) -> None:
        if not self.patient:
            object.__setattr__(self, "patient", self.id)

    def with_role(self, role: Role) -> Case:
        """Return the same case in another role."""
        return replace(self, role=role)


@dataclass
class Batch:
    """What one training step sees. S is the patch shape.

    Attributes:
        clean_image: (B, C, *S) float, patches of clean cases.
        clean_label: (B, *S) int64 class indices; `IGNORE` where a voxel is not known, ``EITHER - j`` where it is
            background or a class of set j.
        image: (U, C, *S) float, patches of unlabelled and noisy cases, and of clean cases whose label is not known
            everywhere; None for methods that use none.
        initial_label: (U, *S) int64, the frozen stage-1 prediction (or the noisy label); None before stage 2.
        pseudo_label: (U, *S) int64, of the last prediction of the whole scans; None where a method makes its own.
        meta_image: (B, C, *S) float, patches of clean cases that nothing is trained on: what the weights are to
            serve. None where no cases are set apart for it.
        meta_label: (B, *S) int64.
        case_ids: The cases drawn: clean first, then unlabelled, then those set apart.
        seed: Seeds every random draw that the method itself makes in this step (views, noise, dropout).
        inside: (U, *S) bool, True where `image` shows its scan, False where a patch that reaches beyond it repeats the
            scan's edge, and where the label of a clean case is known: an unlabelled loss learns nothing there. So the
            voxels of a clean scan that nobody labelled are unlabelled data, for every method. None: everywhere True.
        weak: (U, C, *S) float, `image` with the scans' own grey values: what a network sees that predicts pseudo
            labels. None: the same as `image`.
    """

    clean_image: torch.Tensor
    clean_label: torch.Tensor
    image: torch.Tensor | None = None
    initial_label: torch.Tensor | None = None
    pseudo_label: torch.Tensor | None = None
    meta_image: torch.Tensor | None = None
    meta_label: torch.Tensor | None = None
    case_ids: tuple[str, ...] = field(default=())
    seed: int = 0
    inside: torch.Tensor | None = None
    weak: torch.Tensor | None = None

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory, from which a GPU copies while it computes; DataLoader calls it."""
        pinned = {name: tensor.pin_memory() for name, tensor in self._tensors().items()}
        return replace(self, **pinned)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`."""
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self._tensors().items()}
        return replace(self, **moved)

    def _tensors(self) -> dict[str, Any]:
        import torch

        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
