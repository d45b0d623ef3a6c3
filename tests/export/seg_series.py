"""A DICOM series in any pose, as files that highdicom takes for source images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

SPACING = (1.2, 0.9, 0.8)
"""mm along z, y, x."""


def write_series(
    folder: Path, array: np.ndarray, *, cosines: Sequence[float] = (1, 0, 0, 0, 1, 0), backwards: bool = False
) -> list[str]:
    """Write (Z, Y, X) slices, of which the first lies lowest along the normal.

    Args:
        folder: To make.
        array: Intensities, whole numbers.
        cosines: Of the rows and the columns.
        backwards: Name and number the files from the highest slice.

    Returns:
        The instances' UIDs in the order of the slices.
    """
    folder.mkdir(parents=True)
    row, column = np.array(cosines[:3], float), np.array(cosines[3:], float)
    normal = np.cross(row, column)
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    uids = []
    for i, plane in enumerate(array):
        number = len(array) - i if backwards else i + 1
        data = pydicom.Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = MRImageStorage
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = study, series, frame
        data.Modality, data.PatientID, data.PatientName = "MR", "P1", "A^B"
        data.SeriesNumber, data.InstanceNumber = 3, number
        data.Rows, data.Columns = plane.shape
        data.PixelSpacing = [SPACING[1], SPACING[2]]
        data.SliceThickness = SPACING[0]
        data.ImageOrientationPatient = [*row, *column]
        data.ImagePositionPatient = [float(v) for v in np.array([5.0, -7.0, 11.0]) + i * SPACING[0] * normal]
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
        data.PixelData = plane.astype("<i2").tobytes()
        data.save_as(folder / f"{number:03d}.dcm", enforce_file_format=True)
        uids.append(str(data.SOPInstanceUID))
    return uids
