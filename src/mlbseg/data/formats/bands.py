"""What PNG, TIFF and JPEG files have in common: bands, transparency, labels in colours, decoders."""

from __future__ import annotations

import math
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 - as its documentation does
from PIL import Image
from PIL.ImageFile import ImageFile

from mlbseg.data.formats.itk import channels, itk_errors
from mlbseg.data.formats.opened import Opened, fail
from mlbseg.data.formats.stacks import Stack
from mlbseg.data.geometry import Unscaled, shown
from mlbseg.memory import require_memory
from mlbseg.types import Geometry

MOST_PIXELS = 1 << 28
"""Pixels of a page; a damaged header may announce more than any memory holds, and the decoder would believe it."""

LOSSLESS = "save the mask again from where it was drawn, as PNG; JPEG changes values at edges"

Pixels = npt.NDArray[Any]

_DAMAGED = (
    OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, OverflowError, AttributeError,
    RuntimeError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow raises on damaged files."""


@dataclass(frozen=True)
class Kind:
    """How the pixels of a file are: bands as they come, whether the last is an alpha, bytes of a number."""

    bands: int
    alpha: bool = False
    itemsize: int = 1


def refuse(path: Path, found: str, expected: str, remedy: str) -> NoReturn:
    """Refuse a file that is sound, but of a kind that is not read."""
    fail(path, found, expected, remedy, "picture")


def opened(
    path: Path,
    size: tuple[int, int],
    kind: Kind,
    read: Callable[[], Pixels],
    label: bool,
    *,
    stack: Stack | None = None,
    notes: tuple[str, ...] = (),
) -> Opened:
    """Judge the announced size, and see to it that what is read is what was announced, without alpha.

    Args:
        path: The file.
        size: Pixels along x and y.
        kind: Of its pixels.
        read: Returns them, (bands, [z,] y, x).
        label: Three equal bands are one value, three others are refused.
        stack: How its pages make a volume; None for one page.
        notes: For the user.

    Raises:
        ReadError: If the size is none, or more than there is memory for.
    """
    stack = stack or Stack(1)
    if 0 in size:
        fail(path, f"a picture of {shown(size)} pixels", "an image", "export it again")
    if math.prod(size) > MOST_PIXELS:
        fail(
            path, f"a picture of {shown(size)} pixels", f"at most {MOST_PIXELS}", "cut it into tiles", "size"
        )
    numbers = math.prod(size) * stack.slices * stack.channels * kind.bands
    require_memory(path, numbers * (kind.itemsize + 4))  # as stored, and as float32 or int32
    bands = (kind.bands - kind.alpha) * stack.channels
    grey = label and bands == 3 and stack.channels == 1
    whole = (*size, stack.slices) if stack.slices > 1 else size

    def checked() -> Pixels:
        pixels = read()
        if pixels.shape[1:] != whole[::-1] or len(pixels) < bands:
            shape = shown(pixels.shape)
            fail(path, f"cannot be read: pixels of shape {shape}", shown(whole[::-1]), "export it again")
        if label and kind.alpha:
            _require_opaque(path, pixels)
        return _one_of_three(path, pixels[:bands]) if grey else pixels[:bands]

    if kind.alpha and not label:
        notes = (*notes, "its transparency (alpha) is left out")
    # Dots per inch in a picture say nothing about mm in the patient, and differ between image and mask.
    geometry = Geometry.identity(whole, stack.spacing if stack.slices > 1 else None)
    if label and stack.slices > 1 and stack.spacing is None:
        geometry = Unscaled(geometry.size, geometry.spacing, geometry.origin, geometry.direction)
    return Opened(geometry, 1 if grey else bands, checked, notes)


def _require_opaque(path: Path, pixels: Pixels) -> None:
    """Refuse a mask that is drawn in nothing but transparency."""
    *colours, alpha = pixels
    if alpha.min() != alpha.max() and all(band.min() == band.max() for band in colours):
        found = "a mask drawn in its transparency, all of one colour"
        fail(path, found, "one label value per pixel", "save the transparency as grey", "label")


def _one_of_three(path: Path, pixels: Pixels) -> Pixels:
    if not (np.array_equal(pixels[0], pixels[1]) and np.array_equal(pixels[0], pixels[2])):
        remedy = "give each colour a number and save those as grey or with a palette"
        fail(path, "a mask in colours (RGB)", "one label value per pixel", remedy, "label")
    return pixels[:1]


@contextmanager
def by_pillow(path: Path, kind: str, reader: Callable[[Path], ImageFile]) -> Iterator[ImageFile]:
    """Open a file with Pillow; its exceptions become one, and its warnings on odd metadata are not shown."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with reader(path) as image:
                yield image
    except _DAMAGED as error:
        reason = str(error).replace(str(path), path.name).splitlines() or [type(error).__name__]
        fail(path, f"cannot be read: {reason[0][:100]}", f"a complete {kind} file", "copy or export it again")


def bands_of(image: ImageFile, *, coloured: bool = False) -> Pixels:
    """Return the pixels of a page as (C, y, x).

    Args:
        image: The page.
        coloured: A palette's colours in place of its indices.
    """
    pixels = np.asarray(image.convert("RGB") if coloured else image)
    if pixels.dtype == bool:
        pixels = pixels * np.uint8(255)
    return np.ascontiguousarray(np.moveaxis(pixels, -1, 0) if pixels.ndim == 3 else pixels[None])


def by_itk(path: Path, kind: str) -> Pixels:
    """Return all pixels of a file as ITK reads them, (C, [z,] y, x)."""
    with itk_errors(path, kind):
        return channels(sitk.ReadImage(str(path)))
