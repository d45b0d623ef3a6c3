"""A folder of DICOM slices to one volume. Anything that would put a slice in a wrong place is a fault."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 - as its documentation does

from mlbseg.data.headers import fail
from mlbseg.data.places import is_file
from mlbseg.types import Geometry

_SERIES_UID = "0020|000e"
_SERIES_NAME = "0008|103e"
_GAP_TOLERANCE = (
    0.05  # share of the slice distance; scanners round positions, a missing slice doubles the distance
)


@dataclass(frozen=True)
class _Slice:
    path: Path
    series: str
    name: str
    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: npt.NDArray[np.float64]
    direction: npt.NDArray[np.float64]
    components: int


def slice_files(folder: Path) -> list[Path]:
    """Return the DICOM files directly in `folder`: by suffix, or by the magic word of DICOM part 10.

    Raises:
        OSError: If it is no folder that can be listed.
    """
    found = {p: _is_dicom(p) for p in sorted(folder.iterdir()) if not p.name.startswith(".") and is_file(p)}
    # A file that may not be opened is a slice where others are: reading says what is wrong with it.
    return [p for p, dicom in found.items() if dicom is not False] if any(found.values()) else []


def _is_dicom(path: Path) -> bool | None:
    """Return whether a file is DICOM; None if it may not be opened."""
    if path.name == "DICOMDIR":
        return False
    if path.suffix.lower() in (".dcm", ".ima"):
        return True
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return None


def series(folder: Path) -> tuple[list[Path], Geometry, int]:
    """Order the one series in `folder` along its slice normal, from the headers alone.

    Returns:
        The files in order, the geometry of the volume, the number of components per pixel.

    Raises:
        ReadError: For no or several series, slices of different size or orientation, a slice twice, a missing
            slice, a sideways shift of the slices (gantry tilt), or an unreadable file.
    """
    try:
        files = slice_files(folder)
    except OSError as error:
        fail(folder, f"cannot be opened ({error.strerror})")
    if not files:
        fail(folder, "a folder without DICOM files", "the slices of one series", kind="dicom")
    slices = [_read_header(file) for file in files]
    _require_one_series(folder, slices)
    first = slices[0]
    for other in slices[1:]:
        if other.size != first.size or not np.allclose(other.spacing, first.spacing, rtol=1e-3):
            fail(
                other.path,
                f"slice of {_shown(other)}",
                f"{_shown(first)} as in {first.path.name}",
                kind="dicom",
            )
        if not np.allclose(other.direction, first.direction, atol=1e-3):
            fail(
                other.path,
                "another orientation",
                f"that of {first.path.name}",
                "one series a folder",
                "dicom",
            )
    if len(slices) == 1:  # one slice, or a multi-frame file
        return files, _geometry(first, first.size[2], first.spacing[2]), first.components
    normal = first.direction[:, 2]
    slices.sort(key=lambda s: float(s.origin @ normal))
    if first.size[2] != 1:
        fail(
            folder, f"{len(slices)} multi-frame files", "one multi-frame file or single slices", kind="dicom"
        )
    gap = _slice_distance(folder, slices, normal)
    return [s.path for s in slices], _geometry(slices[0], len(slices), gap), first.components


def _read_header(path: Path) -> _Slice:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("GDCMImageIO")
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        fail(path, "not a readable DICOM file", "a DICOM slice", "copy the series again")

    def tag(key: str) -> str:
        return reader.GetMetaData(key).strip("\0 ") if reader.HasMetaDataKey(key) else ""

    if len(reader.GetSize()) != 3:
        fail(path, f"{len(reader.GetSize())} dimensions", "an image slice", kind="dicom")
    return _Slice(
        path,
        tag(_SERIES_UID),
        tag(_SERIES_NAME),
        reader.GetSize(),
        reader.GetSpacing(),
        np.array(reader.GetOrigin()),
        np.array(reader.GetDirection()).reshape(3, 3),
        reader.GetNumberOfComponents(),
    )


def _shown(s: _Slice) -> str:
    return f"{s.size[0]}×{s.size[1]} pixels of {s.spacing[0]:.4g}×{s.spacing[1]:.4g} mm"


def _require_one_series(folder: Path, slices: list[_Slice]) -> None:
    counts = Counter(s.series for s in slices)
    if len(counts) > 1:
        names = {s.series: s.name for s in slices}
        listed = "; ".join(f"{names[uid] or uid} ({n} files)" for uid, n in sorted(counts.items()))
        fail(
            folder,
            f"{len(counts)} series: {listed}",
            "one series",
            "give each series its own folder",
            "dicom",
        )


def _slice_distance(folder: Path, slices: list[_Slice], normal: npt.NDArray[np.float64]) -> float:
    """Return the distance of neighbouring slices in mm; raise unless the slices form a regular grid."""
    offsets = np.array([s.origin - slices[0].origin for s in slices])
    along = offsets @ normal
    gaps = np.diff(along)
    gap = float(np.median(gaps))
    for index in np.flatnonzero(gaps < 1e-3):
        pair = f"{slices[index].path.name} and {slices[index + 1].path.name}"
        fail(
            folder, f"{pair} lie at the same position", "one slice a position", "keep one time point", "dicom"
        )
    for index in np.flatnonzero(np.abs(gaps - gap) > max(_GAP_TOLERANCE * gap, 0.01)):
        pair = f"between {slices[index].path.name} and {slices[index + 1].path.name}"
        fail(
            folder,
            f"{gaps[index]:.4g} mm {pair}",
            f"{gap:.4g} mm",
            "a slice is missing: export it again",
            "dicom",
        )
    sideways = np.linalg.norm(offsets - along[:, None] * normal, axis=1)
    worst = float(sideways.max())
    if worst > min(slices[0].spacing[:2]) / 2:  # less than half a pixel moves no voxel
        angle = np.degrees(np.arctan2(sideways[-1], along[-1]))
        found = f"slices shift sideways by {worst:.3g} mm (gantry tilt of {angle:.2g}°)"
        fail(
            folder,
            found,
            "slices straight above each other",
            "correct the tilt with a DICOM converter",
            "dicom",
        )
    return float(along[-1] / (len(slices) - 1))


def _geometry(first: _Slice, depth: int, gap: float) -> Geometry:
    size = (*first.size[:2], depth)
    spacing = (*first.spacing[:2], gap)
    return Geometry(size, spacing, tuple(first.origin.tolist()), tuple(first.direction.ravel().tolist()))
