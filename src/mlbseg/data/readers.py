"""Files to arrays and back, in one geometry convention (SimpleITK's: x, y[, z], mm, LPS)."""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 - as its documentation does

from mlbseg.data.formats import metaimage, nifti, nrrd
from mlbseg.data.formats.dicom import announced_by_slice, is_dicom, is_flat, open_dicom
from mlbseg.data.formats.hdf5 import open_hdf5
from mlbseg.data.formats.itk import itk_errors
from mlbseg.data.formats.metaimage import open_metaimage
from mlbseg.data.formats.nifti import open_nifti
from mlbseg.data.formats.nifti_writer import save_nifti
from mlbseg.data.formats.nrrd import open_nrrd
from mlbseg.data.formats.opened import Opened, fail
from mlbseg.data.formats.pictures import open_picture
from mlbseg.data.formats.slicer import ENDING
from mlbseg.data.formats.tiff import is_stack, write_stack
from mlbseg.data.geometry import onto, written
from mlbseg.data.places import is_file
from mlbseg.errors import ReadError, UserError, out_of_memory
from mlbseg.temporaries import temporary_file
from mlbseg.types import NOT_KNOWN, Geometry, Scan

SUFFIXES: dict[str, str] = {
    ".nii.gz": "NIfTI",
    ".nii": "NIfTI",
    ".hdr": "NIfTI",
    ".nrrd": "NRRD",
    ENDING: "NRRD",
    ".nhdr": "NRRD",
    ".mha": "MetaImage",
    ".mhd": "MetaImage",
    ".h5": "HDF5",
    ".hdf5": "HDF5",
    ".png": "PNG",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".dcm": "DICOM",
    ".dicom": "DICOM",
    ".ima": "DICOM",
}
"""File name endings that are read, and what they stand for. A folder is a DICOM series."""

_PICTURES = ("PNG", "TIFF", "JPEG")
_OPENERS = {
    "NIfTI": open_nifti,
    "NRRD": open_nrrd,
    "MetaImage": open_metaimage,
    "HDF5": open_hdf5,
    "PNG": open_picture,
    "TIFF": open_picture,
    "JPEG": open_picture,
    "DICOM": open_dicom,
}
_PIXEL_FILES = {"NIfTI": nifti.pixel_file, "MetaImage": metaimage.pixel_file, "NRRD": nrrd.pixel_file}
_MASK_SUFFIX = {"NRRD": ".nrrd", "MetaImage": ".mha", "PNG": ".png", "TIFF": ".png", "JPEG": ".png"}
_NO_MEMORY = "not enough memory for this scan"
SCAN_BYTES, LABEL_BYTES = 20, 72
"""Most memory for each number of a scan or a label, while it is read and described; measured, of float64 scans and of a
label with interpolated edges (one with two values takes 17)."""
_ROUNDED = 1e-6
_LARGEST = float(np.finfo(np.float32).max)
_UNSIGNED = (np.uint8, np.uint16, np.uint32)


def suffix(path: Path) -> str:
    """Return the ending of a scan file's name, in lower case, or "" if it is none of `SUFFIXES`."""
    name = path.name.lower()
    return max((s for s in SUFFIXES if name.endswith(s) and len(name) > len(s)), key=len, default="")


def stem(path: Path) -> str:
    """Return the name without the ending of a scan file: ``a.b.nii.gz`` gives ``a.b``.

    Names that look alike are alike (`plain`).
    """
    return plain(path.name[: len(path.name) - len(suffix(path))])


def plain(name: str) -> str:
    """Return a name with its accents as one character each: what was on a Mac may have them as two."""
    return unicodedata.normalize("NFC", name)


def is_scan_file(path: Path) -> bool:
    """Say whether `path` is a file, not hidden, whose name ends like a scan's."""
    return bool(suffix(path)) and not path.name.startswith(".") and path.is_file()


def mask_suffix(images: Sequence[Path]) -> str:
    """Return the ending of the mask of these images: that of the input where its format can hold a mask.

    Of DICOM, a volume has NIfTI masks and a projection image PNG.
    """
    if _is_flat_dicom(images[0]):
        return ".png"
    if SUFFIXES.get(suffix(images[0])) == "TIFF" and is_stack(images[0]):
        return ".tif"
    return _MASK_SUFFIX.get(SUFFIXES.get(suffix(images[0]), ""), ".nii.gz")


def _is_flat_dicom(path: Path) -> bool:
    if not path.is_dir() and SUFFIXES.get(suffix(path), "DICOM") != "DICOM":
        return False
    try:
        with reading(path):
            return is_flat(path)
    except ReadError:  # whoever reads it says why
        return False


def read_scan(paths: Sequence[Path]) -> Scan:
    """Read the image files of one case.

    Args:
        paths: One file (or DICOM folder) per channel, or one with several components per pixel.

    Returns:
        The channels stacked to (C, *S) float32, in the geometry of the first.

    Raises:
        ReadError: If a file is not readable or the geometries differ.
    """
    arrays, geometries, notes = zip(*(_read_image(path) for path in paths), strict=True)
    turned = [
        onto(
            array,
            geometry,
            geometries[0],
            where=str(path),
            whose=f"in {paths[0].name}",
            remedy="resample it onto the first channel",
        )
        for path, array, geometry in zip(paths, arrays, geometries, strict=True)
    ]
    array = turned[0] if len(turned) == 1 else np.concatenate(turned)
    return Scan(array, geometries[0], tuple(dict.fromkeys(note for own in notes for note in own)))


def read_label(path: Path) -> tuple[npt.NDArray[np.int32], Geometry]:
    """Read a label map.

    Returns:
        The label values (*S), and the geometry.

    Raises:
        ReadError: If the file is not readable, has several components or holds values that are not integers.
    """
    with reading(path):
        opened = _open(path, label=True)
        if opened.components != 1:
            remedy = "save it with one grey value per class"
            found = f"{opened.components} components per pixel"
            fail(path, found, "one label value per pixel", remedy, "label")
        return _as_label(path, opened.read()[0]), opened.geometry


def write_label(path: Path, array: npt.NDArray[Any], geometry: Geometry) -> None:
    """Write a label map (*S) in the smallest unsigned integer type that holds it, all of it or nothing.

    Raises:
        UserError: If the file cannot be written.
    """
    top = int(array.max(initial=0))
    smallest = next(t for t in _UNSIGNED if top <= np.iinfo(t).max)
    _write(path, array.astype(smallest), geometry)


def write_image(path: Path, array: npt.NDArray[np.float32], geometry: Geometry) -> None:
    """Write an image (*S) or (C, *S), such as probabilities, all of it or nothing.

    Raises:
        UserError: If the file cannot be written.
    """
    if array.ndim == geometry.ndim + 1 and len(array) == 1:
        array = array[0]
    _write(path, array, geometry)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Let whatever goes wrong while a user's file is read be a fault of this file, so that it stops no other scan."""
    try:
        yield
    except UserError:
        raise
    except MemoryError:
        fail(path, _NO_MEMORY, kind="memory")
    except OSError as error:
        fail(path, f"cannot be opened ({error.strerror or error})")
    except Exception as error:
        if out_of_memory(error):  # as ITK says it
            fail(path, _NO_MEMORY, kind="memory")
        found = f"reading failed with {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        fail(path, found, remedy="leave the scan out, and report this line to mlbseg")


def _read_image(path: Path) -> tuple[npt.NDArray[np.float32], Geometry, tuple[str, ...]]:
    with reading(path):
        opened = _open(path)
        return _as_image(path, opened.read()), opened.geometry, opened.notes


def _open(path: Path, *, label: bool = False) -> Opened:
    """Open a file by what its name says it is; a folder is a DICOM series."""
    if path.is_dir():
        return open_dicom(path, label=label)
    kind = SUFFIXES.get(suffix(path), "")
    if not kind and is_file(path) and is_dicom(path):
        return open_dicom(path, label=label)  # many archives give no ending
    if not kind:
        fail(path, "not the name of a scan", f"one of {' '.join(SUFFIXES)}, or a DICOM folder")
    if path.stat().st_size == 0:
        fail(path, "an empty file", f"a {kind} file", "copy it again")
    return _OPENERS[kind](path, label=label)


def announced(path: Path, *, label: bool = False) -> int:
    """Return how many numbers a file holds, by its header; of a DICOM series, by the header of a slice.

    Returns:
        Voxels times components; 0 if the file cannot be opened, as whoever reads it will say why.
    """
    try:
        with reading(path):
            if path.is_dir() and not label:
                return announced_by_slice(path)
            opened = _open(path, label=label)
            return math.prod(opened.geometry.size) * opened.components
    except ReadError:
        return 0


def pixel_file(path: Path) -> Path:
    """Return the file that holds the pixels of a scan file: itself, or one beside it that its header names.

    Raises:
        ReadError: If the header is damaged, or what it names may not be read.
    """
    find = _PIXEL_FILES.get(SUFFIXES.get(suffix(path), ""))
    return find(path) if find else path


def segment_names(path: Path) -> dict[int, str]:
    """Return value -> name of the segments in a label of 3D Slicer's; {} of any other, and of one that is damaged."""
    if SUFFIXES.get(suffix(path)) != "NRRD" or not is_file(path):
        return {}
    try:
        with reading(path):
            found = nrrd.segments_of(path)
    except ReadError:  # whoever reads the label says why
        return {}
    return {segment.value: segment.name for segment in found if segment.name}


def is_hdf5(path: Path) -> bool:
    """Say whether the name is an HDF5 file's, which may hold image and label."""
    return SUFFIXES.get(suffix(path)) == "HDF5"


def _as_image(path: Path, array: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return the pixels in single precision, in which larger values would be infinite."""
    if array.dtype.kind == "f" and array.itemsize > 4:
        top = np.abs(array).max(where=np.isfinite(array), initial=0)
        if top > _LARGEST:
            fail(path, f"values up to {top:.3g}", f"at most {_LARGEST:.3g}", "scale them", "range")
    return np.ascontiguousarray(array, dtype=np.float32)


def _as_label(path: Path, array: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    if array.dtype.kind == "f":
        nearest = np.rint(array)
        # What single precision does to a whole number is no other value.
        with np.errstate(invalid="ignore"):  # the difference of infinities is NaN, and NaN is no whole number
            other = ~(np.abs(array - nearest) <= _ROUNDED * np.maximum(1, np.abs(nearest)))
        if other.any():
            place = tuple(int(i) for i in np.argwhere(other)[0][::-1])
            found = f"label value {array[other].flat[0]:.7g} at voxel {place}"
            fail(path, found, "whole numbers", "resample labels with nearest neighbour", "label")
        array = nearest
    if array.size and (array.max() > np.iinfo(np.int32).max or array.min() <= NOT_KNOWN):
        outermost = max(array.max(), array.min(), key=lambda value: abs(int(value)))
        expected = "values below 2147483648"
        fail(path, f"label value {outermost}", expected, "number the classes 0, 1, 2", "label")
    return array.astype(np.int32)


def _write(path: Path, array: npt.NDArray[Any], geometry: Geometry) -> None:
    try:
        with temporary_file(path.parent, suffix(path)) as temporary:
            if SUFFIXES.get(suffix(path)) == "NIfTI":
                save_nifti(temporary, array, geometry)
            elif SUFFIXES.get(suffix(path)) == "TIFF" and geometry.ndim == 3:
                write_stack(temporary, array, geometry.spacing)
            else:
                _save_itk(temporary, array, geometry)
            with reading(temporary):
                _open(temporary).read()  # a full disk must not leave half a mask under the final name
            os.replace(temporary, path)  # noqa: PTH105 - pathlib's replace is the same call
    except (ReadError, OSError) as error:
        reason = error.fault.found if isinstance(error, ReadError) else (error.strerror or str(error))
        raise UserError(
            f"{path}: could not be written ({reason}); is the disk full or the folder read-only?"
        ) from None


def _save_itk(path: Path, array: npt.NDArray[Any], geometry: Geometry) -> None:
    kind = SUFFIXES.get(suffix(path), "scan")
    vector = array.ndim > geometry.ndim
    image = sitk.GetImageFromArray(np.moveaxis(array, 0, -1) if vector else array, isVector=vector)
    if kind not in _PICTURES:
        geometry = written(geometry)
        image.SetSpacing(geometry.spacing)
        image.SetOrigin(geometry.origin)
        image.SetDirection(geometry.direction)
    with itk_errors(path, kind):
        sitk.WriteImage(image, str(path), useCompression=True)
