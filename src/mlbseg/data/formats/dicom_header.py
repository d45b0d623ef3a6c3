"""The header of a DICOM file: whether it holds an image, and of what size and series."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydicom import Dataset, dcmread
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.uid import UID

from mlbseg.data.formats.opened import fail
from mlbseg.memory import require_memory

_NOT_IMAGES = {
    "1.2.840.10008.5.1.4.1.1.66.4": "segmentation",
    "1.2.840.10008.5.1.4.1.1.66.7": "segmentation",
    "1.2.840.10008.5.1.4.1.1.481.2": "dose",
}
"""SOP classes that have pixels, but none of a scan; all that has no pixels is not in question."""
_KEYWORDS = [
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "SeriesDescription", "ConcatenationUID",
    "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "FrameIncrementPointer",
    "BitsAllocated", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "ImagerPixelSpacing",
    "SliceThickness", "SpacingBetweenSlices", "GridFrameOffsetVector", "DetectorInformationSequence",
    "RescaleSlope", "RescaleIntercept", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
]  # fmt: skip

_DAMAGED = (
    InvalidDicomError, BytesLengthException, struct.error, ValueError, TypeError, AttributeError, LookupError,
    NotImplementedError, EOFError, RecursionError, OverflowError, MemoryError,
)  # fmt: skip
"""What pydicom raises, sooner or later, where a header is not what the standard says."""


@dataclass(frozen=True)
class Header:
    """What is known of a DICOM image before its frames are looked at.

    Attributes:
        path: The file.
        series: The UID of its series.
        name: The description of its series.
        size: Columns, rows.
        components: Numbers per pixel.
        count: Of frames.
        grouped: It says what it has to say of its frames in functional groups.
        flat: It has no position in the patient: a projection, such as an X-ray image, or a photograph.
        inverted: Its low values are bright (MONOCHROME1).
        volume: What it forms a volume with: its series; alone, if its frames are one already.
        data: The data set without its pixels.
    """

    path: Path
    series: str
    name: str
    size: tuple[int, int]
    components: int
    count: int
    grouped: bool
    flat: bool
    inverted: bool
    volume: str
    data: Dataset


@contextmanager
def header_errors(path: Path) -> Iterator[None]:
    """Turn what pydicom raises at damaged headers into one line, and keep its warnings off the terminal."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except _DAMAGED as error:
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        fail(path, f"cannot be read: {reason}", "a complete DICOM file", "copy or export it again")


def read_header(path: Path) -> Header | str:
    """Read the header of a DICOM file; older ones have no preamble.

    Returns:
        What there is to know, or what the file is instead of an image, in words.

    Raises:
        ReadError: If it is not readable, or announces more pixels than fit into the memory that is free.
    """
    with header_errors(path):
        data = dcmread(path, stop_before_pixels=True, specific_tags=list(_KEYWORDS), force=True)
        kind = UID(str(data.get("SOPClassUID") or ""))
        if kind in _NOT_IMAGES:
            return _NOT_IMAGES[kind]
        rows, columns = int(data.get("Rows") or 0), int(data.get("Columns") or 0)
        if not (rows and columns):
            if not kind or "Image Storage" in kind.name:
                fail(
                    path, "cannot be read: no image in it", "a complete DICOM file", "copy or export it again"
                )
            return kind.name.removesuffix(" Storage") if kind.name != kind else "no image"
        count = max(1, int(data.get("NumberOfFrames") or 1))
        samples = int(data.get("SamplesPerPixel") or 1)
        colour = str(data.get("PhotometricInterpretation") or "")
        series = str(data.get("SeriesInstanceUID") or "")
        groups = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
        grouped = any(data.get(keyword) for keyword in groups)
        header = Header(
            path,
            series,
            str(data.get("SeriesDescription") or ""),
            (columns, rows),
            3 if colour == "PALETTE COLOR" else samples,
            count,
            grouped,
            count == 1 and not grouped and not data.get("ImagePositionPatient"),
            colour == "MONOCHROME1",
            str(data.get("ConcatenationUID") or (path if count > 1 else series)),
            data,
        )
        _require_whole(path, data, rows * columns * count * samples)
    require_memory(path, rows * columns * count * header.components * 4)
    return header


def _require_whole(path: Path, data: Dataset, numbers: int) -> None:
    syntax = data.file_meta.get("TransferSyntaxUID")
    if syntax is None or not (syntax.is_encapsulated or syntax.is_deflated):
        needed, found = numbers * int(data.get("BitsAllocated") or 8) // 8, path.stat().st_size
        if found < needed:
            words = f"cannot be read: {found} bytes, of {needed} that its header announces"
            fail(path, words, "a complete DICOM file", "copy or export it again")
