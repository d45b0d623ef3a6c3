"""PNG, TIFF and JPEG files: images without a place in the patient, told apart by their first bytes.

Pixels are as stored; no EXIF orientation is applied. Grey stays grey, black and white of one bit becomes 0 and 255,
colours become three channels, and transparency is left out. In a label a palette's index is the value, and three equal
channels are one.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

from PIL import ExifTags
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from mlbseg.data.formats.bands import LOSSLESS, Kind, Pixels, bands_of, by_itk, by_pillow, opened, refuse
from mlbseg.data.formats.opened import Opened, fail
from mlbseg.data.formats.tiff import open_tiff

_GREY, _COLOURS, _PALETTE, _GREY_ALPHA, _COLOURS_ALPHA = 0, 2, 3, 4, 6  # PNG, third edition, section 11.2.1
_BANDS = {_GREY: 1, _COLOURS: 3, _PALETTE: 3, _GREY_ALPHA: 2, _COLOURS_ALPHA: 4}

_BEST_RATIO = 1032  # of deflate: a byte of a file is that many of pixels at most


def open_picture(path: Path, *, label: bool = False) -> Opened:
    """Open a PNG, TIFF or JPEG file. A TIFF file of several pages is a volume.

    Raises:
        ReadError: If it is not readable, its pixels are of a kind that is not read, or it is no label.
    """
    with path.open("rb") as file:
        head = file.read(33)
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return _open_png(path, head, label)
    if head.startswith(b"\xff\xd8"):
        return _open_jpeg(path, label)
    if head[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        found = "cannot be read: neither PNG nor TIFF nor JPEG by its first bytes"
        fail(path, found, "a picture", "replace it")
    return open_tiff(path, label=label)


def _open_png(path: Path, head: bytes, label: bool) -> Opened:
    if len(head) < 33 or head[12:16] != b"IHDR":
        fail(path, "cannot be read: no complete header", "a complete PNG file", "copy it again")
    width, height, bits, colour = struct.unpack(">IIBB", head[16:26])
    sound = zlib.crc32(head[12:29]) == int.from_bytes(head[29:])
    if not sound or colour not in _BANDS or bits not in (1, 2, 4, 8, 16):
        fail(path, "cannot be read: a damaged header", "a complete PNG file", "copy it again")
    if bits == 16 and colour == _GREY_ALPHA:
        refuse(path, "16-bit grey with transparency", "grey", "save it without transparency")
    samples = 1 if colour == _PALETTE else _BANDS[colour]
    if width * height * samples * bits // 8 > _BEST_RATIO * path.stat().st_size:
        found = "cannot be read: its header announces more pixels than it can hold"
        fail(path, found, "a complete PNG file", "copy it again")
    coloured = colour == _PALETTE and not label
    alpha = colour in (_GREY_ALPHA, _COLOURS_ALPHA)
    kind = Kind(1 if colour == _PALETTE and label else _BANDS[colour], alpha, 2 if bits == 16 else 1)

    def read() -> Pixels:
        if bits == 16 and colour != _GREY:  # Pillow cuts these to 8 bits
            return by_itk(path, "PNG")
        with by_pillow(path, "PNG", PngImageFile) as image:
            return bands_of(image, coloured=coloured)

    return opened(path, (width, height), kind, read, label)


def _open_jpeg(path: Path, label: bool) -> Opened:
    if label:
        fail(path, "a JPEG file, whose compression changes label values", "a PNG file", LOSSLESS, "label")
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - 64))
        if b"\xff\xd9" not in file.read():
            fail(path, "truncated, or not a JPEG file", "a complete JPEG file", "copy it again")
    with by_pillow(path, "JPEG", JpegImageFile) as image:
        size, mode = image.size, image.mode
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) not in (0, 1)
    if mode not in ("L", "RGB"):
        refuse(path, f"{mode} colours", "grey or RGB", "convert it to RGB")

    def read() -> Pixels:
        with by_pillow(path, "JPEG", JpegImageFile) as image:
            return bands_of(image)

    notes = ("its EXIF orientation is not applied: pixels are taken as stored",) if turned else ()
    return opened(path, size, Kind(len(mode)), read, label, notes=notes)
