"""What a NIfTI header says of the place of its voxels, to be kept as it is and to be understood.

A header has two places: the qform (a rotation and an offset) and the sform (any affine), each with a code that says
which coordinate system is meant, 0 for none. They may differ, as co-registration leaves them, and programs follow
different ones: nibabel, FSL and SPM the sform, ITK the qform unless the sform is the scanner's. So what is made
of a scan takes over both.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Affine = npt.NDArray[np.float64]
"""(3, 4): from the indices of a voxel (x, y, z) to mm."""

SCANNER = 1
"""The code of the scanner's own coordinates."""

_FIELDS = {"codes": 3, "pixdim": 4, "quaternion": 3, "offset": 3, "srow": 12}
_MM = {1: 1000.0, 3: 0.001}  # metres and micrometres; else mm, which a header without units is taken to mean
_IN_MM = 2  # the code of the unit
_LPS = np.array([-1.0, -1.0, 1.0])[:, None]


@dataclass(frozen=True)
class Placement:
    """The numbers of a header that say where its voxels lie, in the header's own units.

    Attributes:
        codes: qform_code, sform_code, xyzt_units.
        pixdim: The handedness of the qform (-1 or 1), and the spacing along x, y and z.
        quaternion: b, c and d.
        offset: Where the qform has the first voxel.
        srow: The sform, row by row.
    """

    codes: tuple[float, ...]
    pixdim: tuple[float, ...]
    quaternion: tuple[float, ...]
    offset: tuple[float, ...]
    srow: tuple[float, ...]

    @classmethod
    def of_header(cls, header: Mapping[str, Any]) -> Placement:
        """Take the numbers from a NIfTI header."""

        def numbers(*names: str) -> tuple[float, ...]:
            return tuple(float(v) for name in names for v in np.ravel(header[name]))

        return cls(
            # NIfTI-2 has room for codes that NIfTI-1 has not, and none of them means anything.
            (
                *np.clip(numbers("qform_code", "sform_code"), -1, 32767).tolist(),
                numbers("xyzt_units")[0] % 256,
            ),
            tuple(float(v) for v in header["pixdim"][:4]),
            numbers("quatern_b", "quatern_c", "quatern_d"),
            numbers("qoffset_x", "qoffset_y", "qoffset_z"),
            numbers("srow_x", "srow_y", "srow_z"),
        )

    @classmethod
    def of_steps(cls, steps: npt.NDArray[np.float64], origin: Sequence[float]) -> Placement:
        """Say in a NIfTI header's numbers what another format states.

        Args:
            steps: (n, n) of 2 or 3: column k leads from a voxel to the next one along axis k, mm, LPS.
            origin: Of the first voxel, mm, LPS.
        """
        n = len(steps)
        affine = np.eye(3, 4)
        affine[:n, :n], affine[:n, 3] = steps, origin
        spacing = np.linalg.norm(affine[:, :3], axis=0)
        srow = tuple((_LPS * affine).ravel().tolist())
        return cls((0, SCANNER, _IN_MM), (1.0, *spacing.tolist()), (0.0,) * 3, (0.0,) * 3, srow)

    @classmethod
    def of_numbers(cls, numbers: Sequence[float]) -> Placement:
        """Take what `numbers` gave."""
        ends = np.cumsum([0, *_FIELDS.values()])
        return cls(*(tuple(numbers[a:b]) for a, b in itertools.pairwise(ends)))

    @property
    def numbers(self) -> tuple[float, ...]:
        """All numbers in a row, as `Geometry.stored` has them; what is no number in a part that does not count is 0."""
        return tuple(v if math.isfinite(v) else 0.0 for part in astuple(self) for v in part)

    def fill(self, header: Any) -> None:
        """Write the numbers into a NIfTI header."""
        header["qform_code"], header["sform_code"], header["xyzt_units"] = (int(v) for v in self.codes)
        header["pixdim"][:4] = self.pixdim
        for name, values in (("quatern", self.quaternion), ("qoffset", self.offset)):
            for axis, value in zip("bcd" if name == "quatern" else "xyz", values, strict=True):
                header[f"{name}_{axis}"] = value
        for axis, row in zip("xyz", np.reshape(self.srow, (3, 4)), strict=True):
            header[f"srow_{axis}"] = row

    @property
    def has_qform(self) -> bool:
        """Whether the qform counts."""
        return self.codes[0] > 0

    @property
    def has_sform(self) -> bool:
        """Whether the sform counts."""
        return self.codes[1] > 0

    @property
    def is_known(self) -> bool:
        """Whether the header states a place at all."""
        return self.has_qform or self.has_sform

    @property
    def mm(self) -> float:
        """Millimetres in the header's unit of length."""
        return _MM.get(int(self.codes[2]) & 7, 1.0)

    @property
    def spacing(self) -> npt.NDArray[np.float64]:
        """(3,), mm, as pixdim has it; 2D files may leave the third out."""
        spacing = np.abs(self.pixdim[1:])
        return np.where(spacing > 0, spacing, 1.0) * self.mm

    @property
    def qform(self) -> Affine:
        """The qform (nifti1.h, method 2), LPS, mm."""
        b, c, d = self.quaternion
        length = b * b + c * c + d * d
        if length > 1:  # rounded: the real part is 0
            b, c, d = (v / math.sqrt(length) for v in (b, c, d))
        a = math.sqrt(max(0.0, 1 - b * b - c * c - d * d)) if math.isfinite(length) else math.nan
        rotation = np.array(
            [
                [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
                [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
                [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
            ]
        )
        handed = -1.0 if self.pixdim[0] < 0 else 1.0
        offset = np.array(self.offset) * self.mm
        return _LPS * np.column_stack([rotation * self.spacing * (1, 1, handed), offset])

    @property
    def sform(self) -> Affine:
        """The sform (nifti1.h, method 3), LPS, mm."""
        return _LPS * np.reshape(self.srow, (3, 4)) * self.mm

    def affines(self, size: Sequence[int]) -> list[Affine]:
        """Return the places that programs believe in, LPS, mm: first the one that this one does, which is ITK's.

        Args:
            size: Voxels along x, y and z: without a place, nibabel has the middle at 0, and x run to the left.
        """
        known = [self.sform] if self.has_sform else []
        if self.has_qform:
            known.insert(1 if self.codes[1] == SCANNER else 0, self.qform)
        if known:
            return known
        middle = (np.asarray(size) - 1) / 2
        steps = np.diag(self.spacing * (1, -1, 1))
        return [
            np.column_stack([np.diag(self.spacing), np.zeros(3)]),
            np.column_stack([steps, -steps @ middle]),
        ]
