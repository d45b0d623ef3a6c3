"""Files to arrays and back, in one geometry convention (SimpleITK's: x, y[, z], mm, LPS)."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 - as its documentation does

from mlbseg.data import dicom, hdf5
from mlbseg.data.geometry import DIRECTION_TOLERANCE, geometry_difference, listed, shown
from mlbseg.data.headers import fail, verify
from mlbseg.errors import ReadError, UserError
from mlbseg.temporaries import temporary_file
from mlbseg.types import Geometry, Scan

# ITK's warnings would run through the progress bar; what matters in them is checked here and said once.
sitk.ProcessObject.SetGlobalWarningDisplay(False)

SUFFIXES: dict[str, str] = {
    ".nii.gz": "NIfTI",
    ".nii": "NIfTI",
    ".nrrd": "NRRD",
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
}
"""File name endings that are read, and what they stand for. A DICOM series is a folder and has none."""

_PICTURES = ("PNG", "TIFF", "JPEG")
MOST_PIXELS = 1 << 28
"""Pixels of a picture; a damaged header may announce more than any memory holds, and the decoder would believe it."""

_MASK_SUFFIX = {"NRRD": ".nrrd", "MetaImage": ".mha", "PNG": ".png", "TIFF": ".png", "JPEG": ".png"}
_UNSIGNED = (np.uint8, np.uint16, np.uint32)


def suffix(path: Path) -> str:
    """Return the ending of a scan file's name, in lower case, or "" if it is none of `SUFFIXES`."""
    name = path.name.lower()
    return next((s for s in SUFFIXES if name.endswith(s) and len(name) > len(s)), "")


def stem(path: Path) -> str:
    """Return the name without the ending of a scan file: ``a.b.nii.gz`` gives ``a.b``."""
    return path.name[: len(path.name) - len(suffix(path))]


def is_scan_file(path: Path) -> bool:
    """Say whether `path` is a file, not hidden, whose name ends like a scan's."""
    return bool(suffix(path)) and not path.name.startswith(".") and path.is_file()


def mask_suffix(images: Sequence[Path]) -> str:
    """Return the ending of the mask of these images: that of the input where its format can hold a mask."""
    return _MASK_SUFFIX.get(SUFFIXES.get(suffix(images[0]), ""), ".nii.gz")


def read_scan(paths: Sequence[Path]) -> Scan:
    """Read the image files of one case.

    Args:
        paths: One file (or DICOM folder) per channel, or one with several components per pixel.

    Returns:
        The channels stacked to (C, *S) float32, in the geometry of the first.

    Raises:
        ReadError: If a file is not readable or the geometries differ.
    """
    arrays, geometries = zip(*(_read_image(path) for path in paths), strict=True)
    for path, geometry in zip(paths[1:], geometries[1:], strict=True):
        if difference := geometry_difference(geometry, geometries[0]):
            found, expected = difference
            fail(
                path,
                found,
                f"{expected} as in {paths[0].name}",
                "resample it onto the first channel",
                "geometry",
            )
    array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    return Scan(array, geometries[0])


def read_label(path: Path) -> tuple[npt.NDArray[np.int32], Geometry]:
    """Read a label map.

    Returns:
        The label values (*S), and the geometry.

    Raises:
        ReadError: If the file is not readable, has several components or holds values that are not integers.
    """
    if path.is_dir():
        fail(path, "a folder", "a label file", "save the label as .nii.gz", "label")
    if is_hdf5(path):
        with hdf5.open_dataset(path, "label") as dataset:
            geometry, array = hdf5.geometry(path, dataset), np.ascontiguousarray(dataset[()].T)
    else:
        reader, geometry, components = _header(path)
        if components != 1:
            remedy = "save it with one grey value per class"
            fail(path, f"{components} components per pixel", "one label value per pixel", remedy, "label")
        with _itk_errors(path):
            array = sitk.GetArrayFromImage(reader.Execute())
    return _as_label(path, array), geometry


def write_label(path: Path, array: npt.NDArray[Any], geometry: Geometry) -> None:
    """Write a label map (*S) in the smallest unsigned integer type that holds it, all of it or nothing.

    Raises:
        UserError: If the file cannot be written.
    """
    top = int(array.max(initial=0))
    smallest = next(t for t in _UNSIGNED if top <= np.iinfo(t).max)
    _write(path, sitk.GetImageFromArray(array.astype(smallest)), geometry)


def write_image(path: Path, array: npt.NDArray[np.float32], geometry: Geometry) -> None:
    """Write an image (*S) or (C, *S), such as probabilities, all of it or nothing.

    Raises:
        UserError: If the file cannot be written.
    """
    if array.ndim == geometry.ndim + 1 and len(array) == 1:
        array = array[0]
    vector = array.ndim > geometry.ndim
    image = sitk.GetImageFromArray(np.moveaxis(array, 0, -1) if vector else array, isVector=vector)
    _write(path, image, geometry)


def _read_image(path: Path) -> tuple[npt.NDArray[np.float32], Geometry]:
    if path.is_dir():
        files, geometry, components = dicom.series(path)
        with _itk_errors(path):
            # Each slice's rescale slope and intercept are applied by GDCM while reading.
            image = sitk.ReadImage([str(f) for f in files], _pixel_type(components), imageIO="GDCMImageIO")
            return _channels(image), geometry
    if is_hdf5(path):
        with hdf5.open_dataset(path, "image") as dataset:
            geometry = hdf5.geometry(path, dataset)
            return np.ascontiguousarray(dataset[()].T, dtype=np.float32)[None], geometry
    reader, geometry, components = _header(path)
    reader.SetOutputPixelType(_pixel_type(components))
    with _itk_errors(path):
        return _channels(reader.Execute()), geometry


def _pixel_type(components: int) -> int:
    return int(sitk.sitkFloat32 if components == 1 else sitk.sitkVectorFloat32)


def _channels(image: sitk.Image) -> npt.NDArray[np.float32]:
    array = sitk.GetArrayViewFromImage(image)
    vector = image.GetNumberOfComponentsPerPixel() > 1
    return np.array(np.moveaxis(array, -1, 0) if vector else array[None], dtype=np.float32, order="C")


def _header(path: Path) -> tuple[sitk.ImageFileReader, Geometry, int]:
    """Open a file that ITK reads; the reader is set to drop trailing axes of length 1."""
    kind = SUFFIXES.get(suffix(path), "")
    if not kind:
        fail(path, "not the name of a scan", f"one of {' '.join(SUFFIXES)}, or a DICOM folder")
    try:
        if path.stat().st_size == 0:
            fail(path, "an empty file", f"a {kind} file", "copy it again")
        verify(path)
    except OSError as error:
        fail(path, f"cannot be opened ({error.strerror or error})")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    with _itk_errors(path):
        reader.ReadImageInformation()
    if "complex" in sitk.GetPixelIDValueAsString(reader.GetPixelID()):
        fail(path, "complex values", "real values", "save the magnitude", "complex")
    geometry = _itk_geometry(path, reader, picture=kind in _PICTURES)
    reader.SetExtractSize([*geometry.size, *[0] * (reader.GetDimension() - geometry.ndim)])
    return reader, geometry, reader.GetNumberOfComponents()


def _itk_geometry(path: Path, reader: sitk.ImageFileReader, *, picture: bool) -> Geometry:
    size, total = reader.GetSize(), reader.GetDimension()
    if total < 2:
        fail(path, f"{total} axis", "2 or 3 axes")
    ndim = total
    while ndim > 3 and size[ndim - 1] == 1:
        ndim -= 1
    if ndim > 3:
        fail(
            path, f"{ndim}D image of {shown(size)}", "2D or 3D", "split it into channels or time points", "4d"
        )
    if picture:
        if ndim == 3:
            fail(path, f"{size[2]} pages", "one page", "save a stack as NIfTI with its spacing", "pages")
        if math.prod(size) > MOST_PIXELS:
            fail(
                path,
                f"a picture of {shown(size)} pixels",
                f"at most {MOST_PIXELS}",
                "cut it into tiles",
                "size",
            )
        # Dots per inch in a picture say nothing about mm in the patient, and differ between image and mask.
        return Geometry.identity(size)
    spacing, direction = (
        reader.GetSpacing()[:ndim],
        np.reshape(reader.GetDirection(), (total, total))[:ndim, :ndim],
    )
    if not (np.isfinite(spacing).all() and min(spacing) > 0):
        fail(path, f"spacing {shown(spacing)} mm", "finite spacing above 0", "correct the header", "spacing")
    if not np.allclose(direction @ direction.T, np.eye(ndim), atol=DIRECTION_TOLERANCE):
        found = f"direction {listed(direction.ravel().tolist())}"
        fail(path, found, "axes at right angles", "resample it onto a straight grid", "direction")
    if not np.isfinite(reader.GetOrigin()).all():
        fail(path, "origin is not a number", "finite numbers", "correct the header", "geometry")
    return Geometry(size[:ndim], spacing, reader.GetOrigin()[:ndim], tuple(direction.ravel().tolist()))


@contextmanager
def _itk_errors(path: Path) -> Iterator[None]:
    """Turn ITK's exception, which quotes C++ sources, into one short line."""
    try:
        yield
    except RuntimeError as error:
        lines = [re.sub(r".*(ERROR|\(0x[0-9a-f]+\)): ", "", line).strip() for line in str(error).splitlines()]
        lines = [s for s in lines if s and not s.startswith(("Exception thrown", "Reason:", "[nrrd] nrrd"))]
        reason = (lines[-1] if lines else "no reason given").replace(str(path), path.name)[:100]
        kind = "DICOM series" if path.is_dir() else SUFFIXES.get(suffix(path), "scan")
        fail(path, f"cannot be read: {reason}", f"a complete {kind}", "copy or export it again")


def is_hdf5(path: Path) -> bool:
    """Say whether the name is an HDF5 file's, which may hold image and label."""
    return SUFFIXES.get(suffix(path)) == "HDF5"


def _as_label(path: Path, array: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    if array.dtype.kind == "f" and not np.array_equal(array, np.rint(array)):  # NaN equals nothing
        value = array[array != np.rint(array)].flat[0]
        fail(
            path, f"label value {value:g}", "whole numbers", "resample labels with nearest neighbour", "label"
        )
    if array.size and (array.max() > np.iinfo(np.int32).max or array.min() < np.iinfo(np.int32).min):
        fail(
            path,
            f"label value {array.max()}",
            "values below 2147483648",
            "number the classes 0, 1, 2",
            "label",
        )
    return array.astype(np.int32)


def _write(path: Path, image: sitk.Image, geometry: Geometry) -> None:
    picture = SUFFIXES.get(suffix(path)) in _PICTURES
    if not picture:
        image.SetSpacing(geometry.spacing)
        image.SetOrigin(geometry.origin)
        image.SetDirection(geometry.direction)
    try:
        with temporary_file(path.parent, suffix(path)) as temporary:
            with _itk_errors(temporary):
                sitk.WriteImage(image, str(temporary), useCompression=True)
            verify(temporary)  # a full disk must not leave half a mask under the final name
            os.replace(temporary, path)  # noqa: PTH105 - pathlib's replace is the same call
    except (ReadError, OSError) as error:
        reason = error.fault.found if isinstance(error, ReadError) else (error.strerror or str(error))
        raise UserError(
            f"{path}: could not be written ({reason}); is the disk full or the folder read-only?"
        ) from None
