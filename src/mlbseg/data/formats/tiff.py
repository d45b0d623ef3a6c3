"""TIFF files: a picture, or a volume of several pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from mlbseg.data.formats.bands import LOSSLESS, Kind, Pixels, bands_of, by_itk, by_pillow, opened, refuse
from mlbseg.data.formats.opened import Opened, fail
from mlbseg.data.formats.pages import Layout, Page, pages
from mlbseg.data.formats.stacks import Stack, stack_of
from mlbseg.errors import ReadError

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _YCBCR = 0, 1, 2, 3, 6
_OTHER_COLOURS = {5: "CMYK", 6: "YCbCr", 8: "Lab"}
_UNSIGNED, _SIGNED, _FLOATING = 1, 2, 3
_GREYS = {
    1: (_UNSIGNED,),
    8: (_UNSIGNED, _SIGNED),
    16: (_UNSIGNED, _SIGNED),
    32: (_UNSIGNED, _SIGNED, _FLOATING),
}
_ALPHA = (
    (),
    (1,),
    (2,),
)  # what the sample after grey or RGB is: premultiplied alpha, or plain; nothing said is meant so
_JPEG = (6, 7, 34892)  # compressions: JPEG, old and new, and as DNG has it


def open_tiff(path: Path, *, label: bool = False) -> Opened:
    """Open a TIFF file; several pages are a volume.

    Raises:
        ReadError: If it is not readable, its pixels are of a kind that is not read, its pages are no volume, or
            it is no label.
    """
    listed = pages(path)
    wanted = [n for n, page in enumerate(listed) if not page.kind & 5] or [0]  # no thumbnails, no masks
    found = [listed[n] for n in wanted]
    layout = found[0].layout
    _require_alike(path, found)
    kind = _kind(path, layout, label)
    stack = stack_of(path, found)
    if stack.channels > 1 and kind.bands > 1:
        refuse(path, f"{stack.channels} channels of colours", "channels of grey", "split the channels")
    numbers = layout.width * layout.height * layout.samples
    if layout.compression == 1 and numbers * layout.bits[0] // 8 > path.stat().st_size:
        found_ = "cannot be read: its header announces more pixels than it holds"
        fail(path, found_, "a complete TIFF file", "copy it again")

    def read() -> Pixels:
        if _is_itks(layout):
            return by_itk(path, "TIFF")
        return _volume(path, wanted, layout, stack, coloured=layout.photometric == _PALETTE and not label)

    return opened(path, (layout.width, layout.height), kind, read, label, stack=stack)


def is_stack(path: Path) -> bool:
    """Say whether a file has several pages that are slices; False if it cannot be opened (reading says why)."""
    try:
        return stack_of(path, [page for page in pages(path) if not page.kind & 5]).slices > 1
    except (OSError, ReadError):
        return False


def write_stack(path: Path, array: npt.NDArray[Any], spacing: tuple[float, ...]) -> None:
    """Write a volume (z, y, x) as a page for each slice, with its spacing as ImageJ has it.

    Raises:
        OSError: If it cannot be written.
    """
    array = (
        array.astype(np.int32) if array.dtype == np.uint32 else array
    )  # TIFF and Pillow know no other 32 bits
    first, *others = (Image.fromarray(plane) for plane in array)
    x, y, z = spacing
    facts = f"ImageJ=1.54f\nimages={len(array)}\nslices={len(array)}\nunit=mm\nspacing={z!r}\nloop=false\n"
    tags: dict[int, Any] = {270: facts, 282: 1 / x, 283: 1 / y, 296: 1}  # no unit but that of the description
    first.save(path, save_all=True, append_images=others, compression="tiff_adobe_deflate", tiffinfo=tags)


def _require_alike(path: Path, found: list[Page]) -> None:
    first = found[0].layout
    for page in found[1:]:
        one = page.layout
        if (one.width, one.height) != (first.width, first.height):
            sizes = f"pages of {first.width}×{first.height} and of {one.width}×{one.height} pixels"
            fail(path, sizes, "pages of one size", "save each as a file of its own", "pages")
        if (one.bits, one.samples, one.form) != (first.bits, first.samples, first.form) or (
            one.photometric != first.photometric
        ):
            remedy = "save each as a file of its own"
            fail(path, "pages of different kinds of pixels", "pages of one kind", remedy, "pages")


def _kind(path: Path, layout: Layout, label: bool) -> Kind:
    """Return the kind of pixels; refuse what neither Pillow nor ITK reads right."""
    bits = layout.bits[0]
    if label and layout.compression in _JPEG:
        found = "a TIFF file with JPEG compression, which changes label values"
        fail(path, found, "a lossless file", LOSSLESS, "label")
    if layout.orientation != 1:
        found = f"TIFF orientation {layout.orientation}, which programs do not agree upon"
        refuse(path, found, "orientation 1", "save it again as it is to be seen")
    if len(set(layout.bits)) != 1:
        refuse(path, "samples of different sizes", "samples of one size", "save it as 8- or 16-bit")
    grey, colours = layout.photometric in (_WHITE_IS_ZERO, _BLACK_IS_ZERO), _has_colours(layout)
    if grey and layout.samples == 1:
        _require_number(path, bits, layout.form)
        return Kind(1, itemsize=max(1, bits // 8))
    if layout.photometric == _PALETTE and layout.samples == 1 and bits <= 8:
        return Kind(1 if label else 3)
    if grey and layout.samples == 2 and bits == 8 and layout.extra in _ALPHA[1:]:
        return Kind(2, alpha=True)
    if colours and bits == 16 and not _is_itks(layout):
        found = "16-bit colours in tiles or in separate planes"
        refuse(path, found, "strips of pixels", "save it without tiles, or as PNG")
    if layout.photometric in _OTHER_COLOURS and not colours:
        refuse(path, f"{_OTHER_COLOURS[layout.photometric]} colours", "grey or RGB", "convert it to RGB")
    if not colours:
        found = f"{layout.samples} samples of {bits} bits per pixel"
        remedy = "save each channel as a file or a page of its own"
        refuse(path, found, "grey, or RGB of 8 or 16 bits", remedy)
    return Kind(layout.samples, layout.samples == 4 and layout.extra in _ALPHA, bits // 8)


def _has_colours(layout: Layout) -> bool:
    rgb = layout.photometric == _RGB or (layout.photometric == _YCBCR and layout.compression in _JPEG)
    return rgb and layout.form == _UNSIGNED and layout.bits[0] in (8, 16) and layout.samples in (3, 4)


def _require_number(path: Path, bits: int, form: int) -> None:
    if form not in _GREYS.get(bits, ()):
        name = {_UNSIGNED: "unsigned", _SIGNED: "signed", _FLOATING: "floating-point"}.get(form, "unusual")
        remedy = "save it as 32-bit floating point" if form == _FLOATING else "save it as 8- or 16-bit"
        refuse(path, f"{bits}-bit {name} samples", "8, 16 or 32 bits", remedy)


def _is_itks(layout: Layout) -> bool:
    """Say whether ITK has to read the pixels: Pillow cuts 16-bit colours to 8, and drops or divides by a 4th sample."""
    straight = layout.photometric == _RGB and not layout.tiled and not layout.separate
    return straight and (layout.bits[0] == 16 or layout.samples == 4)


def _volume(path: Path, wanted: list[int], layout: Layout, stack: Stack, *, coloured: bool) -> Pixels:
    """Return the wanted pages as (C, [z,] y, x)."""
    planes = []
    with by_pillow(path, "TIFF", TiffImageFile) as image:
        for number in wanted:
            image.seek(number)
            planes.append(_as_stored(bands_of(image, coloured=coloured), layout))
        volume = np.stack(planes, axis=1)  # (bands, pages, y, x)
    if stack.channels > 1:
        shape = (stack.slices, stack.channels) if stack.interleaved else (stack.channels, stack.slices)
        volume = volume[0].reshape(*shape, *volume.shape[2:])
        volume = np.moveaxis(volume, 1, 0) if stack.interleaved else volume
    return np.ascontiguousarray(volume if stack.slices > 1 else volume[:, 0])


def _as_stored(pixels: Pixels, layout: Layout) -> Pixels:
    """Undo what Pillow does to grey: it inverts 8 bits where white is zero, and knows one sign for 8 and 32 bits."""
    bits = layout.bits[0]
    if (
        layout.samples != 1
        or layout.photometric not in (_WHITE_IS_ZERO, _BLACK_IS_ZERO)
        or bits not in (8, 32)
    ):
        return pixels
    if layout.photometric == _WHITE_IS_ZERO and bits == 8:
        pixels = 255 - pixels
    return pixels.view({_UNSIGNED: "u", _SIGNED: "i", _FLOATING: "f"}[layout.form] + str(bits // 8))
