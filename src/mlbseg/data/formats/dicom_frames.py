"""Where the frames of a DICOM image lie in the patient, by the header of the file or by its functional groups."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlbseg.data.formats.dicom_header import Header, header_errors
from mlbseg.data.formats.opened import fail, refuse_shear
from mlbseg.data.geometry import HALF, orthogonalised

_PLACES = {0x00182005, 0x00540080, 0x3004000C, 0x52009230}
"""SliceLocationVector, SliceVector, GridFrameOffsetVector, functional groups: what may tell a volume's frames apart."""

_MOST_SHEAR = 0.1  # cosine: nothing is rounded that far

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Frame:
    """One slice.

    Attributes:
        path: Its file.
        index: Its number in the file, from 0, in the order in which frames are stored.
        count: Of frames in the file.
        size: Columns, rows.
        spacing: mm along a row, along a column.
        measured: Whether the header says so; if not, a pixel is taken for 1 mm.
        thickness: mm to the next slice as the header says; 1 if it does not.
        position: (3,) of the middle of the first pixel, mm.
        axes: (3, 3), columns: along a row, along a column, and their normal, right-handed.
        moved: By how much making the axes straight has moved the pixel that it moved most, in pixels.
        slope, intercept: Stored values times slope plus intercept are those that are meant.
    """

    path: Path
    index: int
    count: int
    size: tuple[int, int]
    spacing: tuple[float, float]
    measured: bool
    thickness: float
    position: Vector
    axes: Vector
    moved: float
    slope: float
    intercept: float

    @property
    def name(self) -> str:
        """The file, and the frame of several."""
        return self.path.name + (f" frame {self.index + 1}" if self.count > 1 else "")


def flat_spacing(header: Header) -> tuple[float, float]:
    """Return mm along a row and along a column: in the patient, else on the detector; 1 if nothing says so."""
    with header_errors(header.path):
        given = header.data.get("PixelSpacing") or header.data.get("ImagerPixelSpacing")
        return _spacing(header.path, given) if given else (1.0, 1.0)


def read_frames(header: Header) -> list[Frame]:
    """Find where each frame lies, in the order in which they are stored.

    Raises:
        ReadError: If the header does not say so.
    """
    with header_errors(header.path):
        groups = _Groups(header)
        return [_frame(header, groups, index) for index in range(header.count)]


class _Groups:
    """Looks up what the header says of a frame: of this one, of all frames, or of the file."""

    def __init__(self, header: Header) -> None:
        data = header.data
        self.path, self.data = header.path, data
        self.each = data.get("PerFrameFunctionalGroupsSequence") or []
        self.shared = (data.get("SharedFunctionalGroupsSequence") or [None])[0]
        self.detector = (data.get("DetectorInformationSequence") or [None])[0]
        if self.each and len(self.each) != header.count:
            found = f"{header.count} frames, and the places of {len(self.each)}"
            fail(header.path, found, "one for each frame", "export the series again", "dicom")
        self.offsets = self._offsets(header)

    def find(self, index: int, sequence: str, keyword: str) -> Any:
        """Return the value of `keyword`, in a functional group's `sequence` or without; None if there is none."""
        own = self.each[index] if self.each else None
        for group in (own, self.shared):
            item = (group.get(sequence) or [None])[0] if group is not None else None
            if item is not None and item.get(keyword) is not None:
                return item.get(keyword)
        if self.data.get(keyword) is None and self.detector is not None:  # nuclear medicine
            return self.detector.get(keyword)
        return self.data.get(keyword)

    def _offsets(self, header: Header) -> list[float] | None:
        """Return how far each frame lies along the normal from the one position that the header has."""
        if self.each or header.count == 1:
            return [0.0] * header.count
        pointer = self.data.get("FrameIncrementPointer")
        if pointer is not None and not {int(tag) for tag in np.atleast_1d(pointer)} <= _PLACES:
            return None  # frames of a film, or several of each slice
        offsets = self.data.get("GridFrameOffsetVector")
        if offsets is not None:
            return [
                v - offsets[0] for v in _numbers(header.path, "GridFrameOffsetVector", offsets, header.count)
            ]
        gap = self.data.get("SpacingBetweenSlices")
        return None if gap is None else [float(gap) * index for index in range(header.count)]


def _frame(header: Header, groups: _Groups, index: int) -> Frame:
    path = header.path
    position = groups.find(index, "PlanePositionSequence", "ImagePositionPatient")
    if not position or groups.offsets is None:
        if header.count == 1:
            expected, remedy = "a slice with ImagePositionPatient", "export the series again"
            fail(path, "no position in the patient", expected, remedy, "dicom")
        found = f"{header.count} frames without a position in the patient: a film, or a capture"
        remedy = "save its frames as single images, or as NIfTI with their spacing if they are slices"
        fail(path, found, "the slices of a volume, or one image", remedy, "dicom")
    given = _axes(path, groups.find(index, "PlaneOrientationSequence", "ImageOrientationPatient"))
    spacing = groups.find(index, "PixelMeasuresSequence", "PixelSpacing") or header.data.get(
        "ImagerPixelSpacing"
    )
    thickness = groups.find(index, "PixelMeasuresSequence", "SpacingBetweenSlices") or groups.find(
        index, "PixelMeasuresSequence", "SliceThickness"
    )
    slope = groups.find(index, "PixelValueTransformationSequence", "RescaleSlope")
    intercept = groups.find(index, "PixelValueTransformationSequence", "RescaleIntercept")
    pixel = _spacing(path, spacing) if spacing else (1.0, 1.0)
    first = _numbers(path, "ImagePositionPatient", position, 3) + groups.offsets[index] * given[:, 2]
    sides = np.array([*pixel, 1.0])
    lattice, moved = orthogonalised((*header.size, 1), given * sides, first, sides)
    if not moved < HALF:
        refuse_shear(path, "ImageOrientationPatient", moved)
    return Frame(
        path,
        index,
        header.count,
        header.size,
        pixel,
        bool(spacing),
        _thickness(thickness),
        np.array(lattice.origin),
        np.reshape(lattice.direction, (3, 3)),
        moved,
        1.0 if slope is None else float(slope),
        0.0 if intercept is None else float(intercept),
    )


def _axes(path: Path, cosines: Any) -> Vector:
    """Return the (3, 3) axes of a slice, of length 1; how far the first two are from right angles is for others."""
    if not cosines:
        fail(
            path,
            "no ImageOrientationPatient",
            "the direction of its rows",
            "export the series again",
            "dicom",
        )
    given = _numbers(path, "ImageOrientationPatient", cosines, 6).reshape(2, 3)
    lengths = np.linalg.norm(given, axis=1)
    if not (np.abs(lengths - 1).max() <= 0.01 and abs(given[0] @ given[1]) <= _MOST_SHEAR):
        found = f"ImageOrientationPatient {[float(v) for v in given.ravel()]}"
        fail(path, found, "two directions at right angles, of length 1", "export the series again", "dicom")
    row, column = given / lengths[:, None]
    normal = np.cross(row, column)
    return np.stack([row, column, normal / np.linalg.norm(normal)], axis=1)


def _spacing(path: Path, given: Any) -> tuple[float, float]:
    down, along = _numbers(path, "PixelSpacing", given, 2)  # DICOM: between rows first
    if min(down, along) <= 0:
        fail(path, f"PixelSpacing {down:g}, {along:g}", "numbers above 0", "correct the header", "spacing")
    return float(along), float(down)


def _thickness(value: Any) -> float:
    thickness = abs(float(value or 1.0))
    return thickness if np.isfinite(thickness) and thickness > 0 else 1.0


def _numbers(path: Path, keyword: str, values: Any, count: int) -> Vector:
    numbers = np.array([float(v) for v in np.atleast_1d(values)], dtype=np.float64)
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        fail(
            path, f"{keyword} {numbers.tolist()[:9]}", f"{count} numbers", "export the series again", "dicom"
        )
    return numbers
