"""Small DICOM files: one volume as single slices and as files of many frames, projections, and what is no image."""

from __future__ import annotations

from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

MR, ENHANCED_MR, LEGACY_CT = (f"1.2.840.10008.5.1.4.1.1.{tail}" for tail in ("4", "4.1", "2.2"))
XRAY, CAPTURE, FILM, NUCLEAR = (f"1.2.840.10008.5.1.4.1.1.{tail}" for tail in ("1.1", "7", "3.1", "20"))
COMPANIONS = {
    "RS.dcm": ("1.2.840.10008.5.1.4.1.1.481.3", "RT Structure Set", False),
    "SR0001": ("1.2.840.10008.5.1.4.1.1.88.67", "X-Ray Radiation Dose SR", False),
    "PR.dcm": ("1.2.840.10008.5.1.4.1.1.11.1", "Grayscale Softcopy Presentation State", False),
    "DOSE.dcm": ("1.2.840.10008.5.1.4.1.1.481.2", "dose", True),
    "SEG.dcm": ("1.2.840.10008.5.1.4.1.1.66.4", "segmentation", True),
}
"""Name -> SOP class, how it is called, whether it has pixels."""

SPACING = (2.0, 1.3, 1.2)
"""mm along z, y, x."""
ORIGIN = np.array([-20.0, 15.0, -30.0])
OBLIQUE = (0.8, 0.6, 0.0, -0.48, 0.64, 0.6)


def volume(seed: int = 0, shape: tuple[int, int, int] = (6, 8, 10)) -> np.ndarray:
    """Return (Z, Y, X) uint16, every slice another."""
    return np.random.default_rng(seed).integers(0, 4096, shape).astype(np.uint16)


def items(**values: Any) -> Sequence:
    """Return a sequence of one item."""
    item = Dataset()
    for name, value in values.items():
        setattr(item, name, value)
    return Sequence([item])


def dataset(sop: str, pixels: np.ndarray | None = None, *, series: str = "1.2.3.4", **values: Any) -> Dataset:
    """Return a data set with pixels (rows, columns), (frames, rows, columns) or, of uint8, (rows, columns, 3)."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = sop
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.PatientID, data.PatientName = "P", "A^B"
    data.StudyInstanceUID, data.SeriesInstanceUID, data.Modality = "1.2.3", series, "OT"
    data.FrameOfReferenceUID = "1.2.3.5"
    if pixels is not None:
        colour = pixels.ndim == 3 and pixels.dtype == np.uint8
        data.Rows, data.Columns = pixels.shape[:2] if colour else pixels.shape[-2:]
        data.SamplesPerPixel, data.PixelRepresentation = (3, 0) if colour else (1, 0)
        data.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
        if colour:
            data.PlanarConfiguration = 0
        data.BitsAllocated = 8 * pixels.itemsize
        data.BitsStored = 8 if pixels.itemsize == 1 else 12
        data.HighBit = data.BitsStored - 1
        data.PixelData = pixels.tobytes()
    for name, value in values.items():
        setattr(data, name, value)
    return data


def write(path: Path, data: Dataset) -> Path:
    """Write a part 10 file; make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, data, enforce_file_format=True)
    return path


def position(index: float, cosines: Many[float] = (1, 0, 0, 0, 1, 0)) -> list[float]:
    """Return where slice `index` lies, upwards along the normal."""
    normal = np.cross(cosines[:3], cosines[3:])
    return [float(v) for v in ORIGIN + index * SPACING[0] * normal]


def slices(
    folder: Path, array: np.ndarray, *, cosines: Many[float] = (1, 0, 0, 0, 1, 0), **values: Any
) -> Path:
    """Write (Z, Y, X) as a file a slice."""
    for index, plane in enumerate(array):
        data = dataset(MR, plane, **values)
        data.PixelSpacing, data.SliceThickness, data.InstanceNumber = list(SPACING[1:]), SPACING[0], index + 1
        data.ImagePositionPatient, data.ImageOrientationPatient = position(index, cosines), list(cosines)
        write(folder / f"{index:03d}.dcm", data)
    return folder


def frames(
    path: Path,
    array: np.ndarray,
    order: Many[int] | None = None,
    *,
    sop: str = ENHANCED_MR,
    cosines: Many[float] = (1, 0, 0, 0, 1, 0),
    places: Many[float] | None = None,
    each: Many[dict[str, Any]] | None = None,
    **values: Any,
) -> Path:
    """Write slices of (Z, Y, X) as one file of many frames.

    Args:
        path: The file.
        array: The volume.
        order: The slices in the order in which they are stored.
        sop: The SOP class.
        cosines: Of rows and columns.
        places: Of the frames along the normal, in slices; the slices' own when None.
        each: For each frame, its functional groups beside its place: sequence -> item.
        values: Further elements of the data set.
    """
    order = range(len(array)) if order is None else order
    places = order if places is None else places
    data = dataset(sop, np.ascontiguousarray(array[list(order)]), NumberOfFrames=len(order))
    data.SharedFunctionalGroupsSequence = items(
        PlaneOrientationSequence=items(ImageOrientationPatient=list(cosines)),
        PixelMeasuresSequence=items(PixelSpacing=list(SPACING[1:]), SliceThickness=SPACING[0]),
    )
    groups = []
    for number, place in enumerate(places):
        group = items(PlanePositionSequence=items(ImagePositionPatient=position(place, cosines)))[0]
        for sequence, item in (each[number] if each else {}).items():
            setattr(group, sequence, items(**item))
        groups.append(group)
    data.PerFrameFunctionalGroupsSequence = Sequence(groups)
    for name, value in values.items():
        setattr(data, name, value)
    return write(path, data)


def companions(folder: Path) -> None:
    """Write what archives keep beside the slices."""
    for name, (sop, _, pixels) in COMPANIONS.items():
        write(
            folder / name,
            dataset(sop, volume(9, (1, 4, 4))[0] if pixels else None, series=f"1.2.9.{len(name)}"),
        )
