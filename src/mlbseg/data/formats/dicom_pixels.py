"""The pixels of DICOM files, in the values that are meant: rescaled frame by frame."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 - as its documentation does
from pydicom import Dataset, dcmread, dcmwrite
from pydicom.dataset import FileMetaDataset
from pydicom.pixels import get_decoder, pixel_array
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from mlbseg.data.formats.dicom_frames import Frame
from mlbseg.data.formats.dicom_header import Header, header_errors
from mlbseg.data.formats.itk import channels, itk_errors
from mlbseg.data.formats.opened import fail
from mlbseg.errors import ReadError
from mlbseg.temporaries import temporary_folder

Pixels = npt.NDArray[np.float32]

_GREY = "1.2.840.10008.5.1.4.1.1.7.3"
_COLOUR = "1.2.840.10008.5.1.4.1.1.7.4"
"""Multi-frame secondary captures: GDCM reads these as they are stored."""


def read_slices(where: Path, files: Sequence[Path], components: int) -> Pixels:
    """Read files of one frame each, (C, Z, Y, X); GDCM rescales each file by its own slope and intercept."""
    kind = sitk.sitkFloat32 if components == 1 else sitk.sitkVectorFloat32
    try:
        with itk_errors(where, "DICOM series"):
            return channels(sitk.ReadImage([str(file) for file in files], kind, imageIO="GDCMImageIO"))
    except ReadError:
        for file in files if len(files) > 1 else ():  # which one is it?
            read_slices(file, [file], components)
        raise


def read_stored(frames: Sequence[Frame], components: int) -> Pixels:
    """Read frames, (C, Z, Y, X), each rescaled by its own slope and intercept: GDCM knows one of a file only."""
    first = frames[0]
    volume = np.empty((components, len(frames), *reversed(first.size)), np.float32)
    for path in dict.fromkeys(frame.path for frame in frames):
        stored = _stored(path)
        for place, frame in enumerate(frames):
            if frame.path == path:
                _require_fit(path, stored, (frame.count, *reversed(frame.size), components))
                volume[:, place] = np.moveaxis(stored[frame.index], -1, 0)
                volume[:, place] *= _slope(frame)
                volume[:, place] += frame.intercept
    return volume


def read_flat(header: Header) -> Pixels:
    """Read one image, (C, Y, X). GDCM turns MONOCHROME1 round over the range of the stored bits: bright is bright."""
    pixels = read_slices(header.path, [header.path], header.components)
    return pixels[:, 0] if pixels.ndim == 4 else pixels


def _slope(frame: Frame) -> float:
    if not (np.isfinite([frame.slope, frame.intercept]).all() and frame.slope):
        found = f"RescaleSlope {frame.slope:g}, RescaleIntercept {frame.intercept:g} of {frame.name}"
        fail(frame.path, found, "finite numbers, the slope not 0", "export the series again", "dicom")
    return frame.slope


def _stored(path: Path) -> npt.NDArray[Any]:
    """Return the stored values of all frames, (N, Y, X, C)."""
    with header_errors(path):
        data = dcmread(path, force=True)
        if "TransferSyntaxUID" not in data.file_meta:  # a file without a preamble
            implicit = data.original_encoding[0]
            data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
        decoder = get_decoder(data.file_meta.TransferSyntaxUID)
        array = pixel_array(data) if decoder.is_available else _by_gdcm(path, data)
        count, components = int(data.get("NumberOfFrames") or 1), int(data.get("SamplesPerPixel") or 1)
    shape = (count, *array.shape[array.ndim - (3 if components > 1 else 2) :][:2], components)
    if array.size != math.prod(shape):
        found, expected = f"{array.size} numbers of pixels", f"{math.prod(shape)} as its header says"
        fail(path, found, expected, "copy or export it again", "dicom")
    return array.reshape(shape)


def _by_gdcm(path: Path, data: Dataset) -> npt.NDArray[Any]:
    """Decode what pydicom cannot, by GDCM, from a copy that has nothing but the pixels: no patient, no rescaling."""
    colour = int(data.get("SamplesPerPixel") or 1) > 1
    copy = Dataset()
    copy.file_meta = FileMetaDataset()
    copy.file_meta.TransferSyntaxUID = data.file_meta.TransferSyntaxUID
    copy.file_meta.MediaStorageSOPClassUID = copy.SOPClassUID = _COLOUR if colour else _GREY
    copy.file_meta.MediaStorageSOPInstanceUID = copy.SOPInstanceUID = data.SOPInstanceUID
    for element in data.group_dataset(0x0028):
        if element.keyword not in ("RescaleSlope", "RescaleIntercept", "FrameIncrementPointer"):
            copy.add(element)
    if not colour:
        copy.PhotometricInterpretation = "MONOCHROME2"
    copy.PixelData = data.PixelData
    copy["PixelData"].is_undefined_length = True
    with temporary_folder(Path(tempfile.gettempdir())) as folder:
        file = folder / path.name
        dcmwrite(file, copy, enforce_file_format=True)
        with itk_errors(path, "DICOM file"):
            return sitk.GetArrayFromImage(sitk.ReadImage(str(file), imageIO="GDCMImageIO"))


def _require_fit(path: Path, stored: npt.NDArray[Any], expected: tuple[int, ...]) -> None:
    if stored.shape != expected:
        fail(path, f"pixels {stored.shape}", f"{expected} as its header says", "copy or export it again")
