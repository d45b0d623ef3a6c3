"""DICOM: a folder of slices or a file of many frames to one volume, a projection image to a 2D scan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlbseg.data.formats.dicom_frames import Frame, flat_spacing, read_frames
from mlbseg.data.formats.dicom_header import Header, read_header
from mlbseg.data.formats.dicom_pixels import read_flat, read_slices, read_stored
from mlbseg.data.formats.dicom_stack import stack
from mlbseg.data.formats.opened import Opened, fail, shear_notes
from mlbseg.data.places import is_file
from mlbseg.types import Geometry

SUFFIXES = (".dcm", ".dicom", ".ima")
"""Endings of names; many DICOM files have none, and are known by their magic word."""


@dataclass(frozen=True)
class Series:
    """The slices of one volume.

    Attributes:
        frames: In their order along the normal.
        geometry: Of the volume.
        components: Numbers per pixel.
        stored: Whether GDCM would not give the values that are meant.
    """

    frames: tuple[Frame, ...]
    geometry: Geometry
    components: int
    stored: bool


def open_dicom(path: Path, *, label: bool = False) -> Opened:
    """Open the one series in a folder, or a file: of one slice, of many frames, or a projection image.

    Raises:
        ReadError: As `series`; for a label, always.
    """
    if label:
        found = "a folder" if path.is_dir() else "a DICOM file"
        remedy = "save the label as .nii.gz, or as .png for 2D images; a DICOM segmentation can be converted"
        fail(path, found, "a label file", remedy, "label")
    headers, notes = _images(path)
    if headers[0].flat:
        return _open_flat(path, headers, notes)
    volume = _series(path, headers)
    if not all(frame.measured for frame in volume.frames):
        notes = (*notes, "no PixelSpacing: pixels are taken for 1 mm")
    notes = (*notes, *shear_notes(max(frame.moved for frame in volume.frames), masks=""))

    def read() -> np.ndarray:
        if volume.stored:
            return read_stored(volume.frames, volume.components)
        return read_slices(path, [frame.path for frame in volume.frames], volume.components)

    return Opened(volume.geometry, volume.components, read, notes)


def series(path: Path) -> Series:
    """Order the one series in a folder, or the frames of a file, along the slice normal, from the headers alone.

    Raises:
        ReadError: For no or several series, slices of different size or orientation, a slice twice, a missing
            slice, a sideways shift of the slices (gantry tilt), frames without a position, or an unreadable file.
    """
    headers, _ = _images(path)
    if headers[0].flat:
        fail(path, "an image without a position in the patient", "the slices of one series", kind="dicom")
    return _series(path, headers)


def slice_files(folder: Path) -> list[Path]:
    """Return the DICOM files directly in `folder`: by suffix, or by the magic word of DICOM part 10.

    Raises:
        OSError: If it is no folder that can be listed.
    """
    found = {p: _looks(p) for p in sorted(folder.iterdir()) if not p.name.startswith(".") and is_file(p)}
    # A file that may not be opened is a slice where others are: reading says what is wrong with it.
    return [p for p, dicom in found.items() if dicom is not False] if any(found.values()) else []


def announced_by_slice(folder: Path) -> int:
    """Return about how many numbers a series holds: those of one image, times the files; 0 without an image.

    Raises:
        ReadError: A file is not readable.
        OSError: The folder cannot be listed.
    """
    files = slice_files(folder)
    for file in files:
        header = read_header(file)
        if isinstance(header, Header):
            return header.size[0] * header.size[1] * header.components * header.count * len(files)
    return 0


def _looks(path: Path) -> bool | None:
    """Return whether a file is DICOM; None if it may not be opened."""
    try:
        return is_dicom(path)
    except OSError:
        return None


def is_dicom(path: Path) -> bool:
    """Say whether a file is DICOM, by its suffix or the magic word of part 10; a DICOMDIR only lists others."""
    if path.name == "DICOMDIR":
        return False
    if path.suffix.lower() in SUFFIXES:
        return True
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def is_flat(path: Path) -> bool:
    """Say whether a file is a projection image, which is 2D, or the images in a folder are.

    Raises:
        ReadError: A file is not readable.
        OSError: The folder cannot be listed.
    """
    found = False
    for file in slice_files(path) if path.is_dir() else [path]:
        header = read_header(file)
        if isinstance(header, Header):
            if not header.flat:
                return False
            found = True
    return found


def _images(path: Path) -> tuple[list[Header], tuple[str, ...]]:
    """Return the headers of the images that belong together at `path`, and a note on the files that are passed over."""
    try:
        files = slice_files(path) if path.is_dir() else [path]
    except OSError as error:
        fail(path, f"cannot be opened ({error.strerror})")
    if not files:
        held = sorted(p.name for p in path.iterdir() if not p.name.startswith("."))
        remedy = (
            f"it holds {held[0]}; move scans in it up, beside the others"
            if held
            else "it is empty: remove it"
        )
        fail(path, "a folder without DICOM files", "the slices of one series", remedy, "dicom")
    headers: list[Header] = []
    others: dict[Path, str] = {}
    for file in files:
        header = read_header(file)
        if isinstance(header, Header):
            headers.append(header)
        else:
            others[file] = header
    if not headers:
        kinds = ", ".join(sorted(set(others.values())))
        found = "no image in the file" if path.is_file() else "no image among its DICOM files"
        fail(path, f"{found} ({kinds})", "the slices of one series, or one image", kind="dicom")
    slices = {header.series for header in headers if not header.flat}
    if slices:  # a screenshot that the archive keeps beside the slices is none of them
        others |= {h.path: "no position in the patient" for h in headers if h.flat and h.series not in slices}
        headers = [header for header in headers if header.path not in others]
    headers.sort(key=lambda header: header.flat)
    return headers, _passed_over(others)


def _passed_over(others: dict[Path, str]) -> tuple[str, ...]:
    if not others:
        return ()
    listed = [f"{path.name} ({kind})" for path, kind in others.items()]
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return (f"passed over, as no slice: {', '.join(listed[:3])}{more}",)


def _open_flat(path: Path, headers: Sequence[Header], notes: tuple[str, ...]) -> Opened:
    if len(headers) > 1:
        found = f"{len(headers)} images without a position in the patient"
        remedy = "give each image a name of its own: images/NAME.dcm"
        fail(path, found, "the slices of one series, or one image", remedy, "dicom")
    header = headers[0]
    geometry = Geometry(header.size, flat_spacing(header), (0.0, 0.0), (1.0, 0.0, 0.0, 1.0))
    return Opened(geometry, header.components, lambda: read_flat(header), notes)


def _series(path: Path, headers: Sequence[Header]) -> Series:
    _require_one_series(path, headers)
    for header in headers[1:]:
        if header.components != headers[0].components:
            found = f"{header.components} components per pixel"
            fail(header.path, found, f"{headers[0].components} as in {headers[0].path.name}", kind="dicom")
    frames, geometry = stack(path, [frame for header in headers for frame in read_frames(header)])
    # GDCM knows one rescaling of a file, and turns MONOCHROME1 round for the eye, but values of slices have a meaning
    stored = any(header.inverted or header.grouped or header.count > 1 for header in headers)
    return Series(tuple(frames), geometry, headers[0].components, stored)


def _require_one_series(path: Path, headers: Sequence[Header]) -> None:
    counts = Counter(header.series for header in headers)
    if len(counts) > 1:
        names = {header.series: header.name for header in headers}
        listed = "; ".join(f"{names[uid] or uid} ({n} files)" for uid, n in sorted(counts.items()))
        found = f"{len(counts)} series: {listed}"
        fail(path, found, "one series", "give each series its own folder", "dicom")
