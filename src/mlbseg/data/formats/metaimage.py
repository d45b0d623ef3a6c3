"""MetaImage files: .mha, and .mhd with its pixels in a file beside it (https://itk.org/Wiki/ITK/MetaIO/Documentation).

The header is read once, here, and so are the pixels: a header that two readers understand in two ways could lead
the second one anywhere.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlbseg.data.formats.detached import beside
from mlbseg.data.formats.opened import Opened, checked_geometry, fail, require_axes, require_room
from mlbseg.data.formats.pixels import Encoding, Pixels
from mlbseg.data.formats.text_header import header_lines, keep, numbers, whole_numbers
from mlbseg.types import Geometry

_FIELD = re.compile(
    r"\s*([^\s=:][^=:]*?)\s*[=:]\s*(.*?)\s*", re.ASCII
)  # ITK adds keys such as dim[1] and 0008|0020
_TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",  # of 32 bits wherever it is written
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
_LOCAL = ("LOCAL", "Local", "local")


def open_metaimage(path: Path, *, label: bool = False) -> Opened:
    """Open a MetaImage file.

    Raises:
        ReadError: If it is not readable.
    """
    fields, end = _header(path)
    place, notes = _geometry(path, fields)
    pixels, components = _pixels(path, fields, end)
    require_room(path, place.size, components, pixels.kind.itemsize)
    pixels.require_complete()

    def read() -> npt.NDArray[Any]:
        return np.moveaxis(pixels.read().reshape(*place.size[::-1], components), -1, 0)

    return Opened(place, components, read, notes)


def pixel_file(path: Path) -> Path:
    """Return the file that holds the pixels of a MetaImage: itself, or one beside it.

    Raises:
        ReadError: If its header names none.
    """
    name = _header(path)[0]["ElementDataFile"]
    return path if name in _LOCAL else beside(path, name)


def _header(path: Path) -> tuple[dict[str, str], int]:
    """Return the fields, of which `ElementDataFile` is the last, and the number of bytes up to its line's end."""
    fields: dict[str, str] = {}
    with path.open("rb") as file:
        for line in header_lines(path, file):
            if not line.strip():
                continue
            if "\0" in line:
                break
            field = _FIELD.fullmatch(line)
            if not field:  # the next line of a text of several
                continue
            keep(path, fields, field[1], field[2])
            if field[1] == "ElementDataFile":
                return fields, file.tell()
    return fail(path, "not a MetaImage file", "a header that names ElementDataFile", "replace it")


def _pixels(path: Path, fields: dict[str, str], end: int) -> tuple[Pixels, int]:
    name = fields["ElementDataFile"]
    data, start = (path, end) if name in _LOCAL else (beside(path, name), 0)
    kind = fields.get("ElementType", "").removesuffix("_ARRAY")
    if kind not in _TYPES:
        found = f"damaged header (ElementType = {kind[:40] or 'nothing'})"
        fail(path, found, "a numeric ElementType, such as MET_SHORT", "write the file again")
    order = _alias(path, fields, "BinaryDataByteOrderMSB", "ElementByteOrderMSB")
    components = whole_numbers(path, "ElementNumberOfChannels", fields.get("ElementNumberOfChannels", "1"))[0]
    if components < 1:
        fail(path, f"{components} components per pixel", "at least one", "write the file again")
    encoding: Encoding = "raw" if _is_true(path, "BinaryData", fields.get("BinaryData", "True")) else "text"
    if _is_true(path, "CompressedData", fields.get("CompressedData", "False")):
        _require_compressed(path, fields, data.stat().st_size - start, encoding)
        encoding = "zlib"
    head = whole_numbers(path, "HeaderSize", fields.get("HeaderSize", "0"))[0]
    if head < -1 or (head == -1 and encoding != "raw"):
        fail(path, f"HeaderSize = {head}", "the number of bytes before the pixels", "correct the header")
    byte_order = ">" if _is_true(path, "BinaryDataByteOrderMSB", order or "False") else "<"
    size = whole_numbers(path, "DimSize", fields["DimSize"], len(fields["DimSize"].split()))
    return Pixels(
        path,
        data,
        np.dtype(byte_order + _TYPES[kind]),
        math.prod(size) * components,
        encoding,
        head if head > 0 else start,
        last=head < 0,
        stated=head != 0,
    ), components


def _require_compressed(path: Path, fields: dict[str, str], held: int, encoding: Encoding) -> None:
    if encoding == "text":
        fail(path, "compressed text", "BinaryData = True with CompressedData", "write the file again")
    announced = whole_numbers(path, "CompressedDataSize", fields.get("CompressedDataSize", "0"))[0]
    if held < announced:
        fail(path, f"{max(held, 0)} bytes of pixels", f"{announced} as its header announces", "copy it again")


def _geometry(path: Path, fields: dict[str, str]) -> tuple[Geometry, tuple[str, ...]]:
    if fields.get("ObjectType", "Image") != "Image":
        fail(path, f"a MetaIO {fields['ObjectType'][:40]}", "an Image", "export the image itself")
    words = fields.get("DimSize", "").split()
    n = whole_numbers(path, "NDims", fields.get("NDims", ""))[0]
    if n != len(words):
        fail(path, f"damaged header (NDims = {n})", f"DimSize of {n} numbers", "write the file again")
    size = whole_numbers(path, "DimSize", " ".join(words), n)
    require_axes(path, size)
    spacing = fields.get("ElementSpacing", fields.get("ElementSize", "1 " * n))
    origin = _alias(path, fields, "Offset", "Position", "Origin") or "0 " * n
    matrix = _alias(path, fields, "TransformMatrix", "Rotation", "Orientation")
    direction = numbers(path, "TransformMatrix", matrix, n * n) if matrix else np.eye(n).ravel().tolist()
    return checked_geometry(
        path,
        size,
        numbers(path, "ElementSpacing", spacing, n),
        numbers(path, "Offset", origin, n),
        np.reshape(direction, (n, n)).T,  # the direction of each axis is a row
    )


def _alias(path: Path, fields: dict[str, str], *names: str) -> str:
    """Return the value of a field of several names; "" if there is none."""
    given = {name: fields[name] for name in names if name in fields}
    if len({tuple(value.split()) for value in given.values()}) > 1:
        found = " and ".join(f"{name} = {value[:40]}" for name, value in given.items())
        fail(path, found, "one value", "remove one of them from the header", "geometry")
    return next(iter(given.values()), "")


def _is_true(path: Path, key: str, value: str) -> bool:
    if value[:1] not in tuple("TtFf10"):
        fail(path, f"{key} = {value[:40]}", "True or False", "correct the header")
    return value[0] in "Tt1"
