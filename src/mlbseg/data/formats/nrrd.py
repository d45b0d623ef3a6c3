"""NRRD files: .nrrd, and .nhdr with its pixels in a file beside it (https://teem.sourceforge.net/nrrd/format.html).

The header is read once, here, and so are the pixels: a header that two readers understand in two ways could lead
the second one anywhere.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlbseg.data.formats.detached import beside
from mlbseg.data.formats.opened import Opened, checked_geometry, fail, require_axes, require_room
from mlbseg.data.formats.pixels import Encoding, Pixels
from mlbseg.data.formats.slicer import Segment, label_map, segments
from mlbseg.data.formats.text_header import header_lines, keep, numbers, whole_numbers
from mlbseg.data.geometry import Part
from mlbseg.types import Geometry

_MOST_AXES = 16  # of NRRD's own library
_MOST_LINES = 10_000
_LONGEST_LINE = 1 << 16

_TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}  # fmt: skip
_KINDS = {name: kind for kind, names in _TYPES.items() for name in names}
_ENCODINGS: dict[str, Encoding] = {
    "raw": "raw",
    "gz": "gzip",
    "gzip": "gzip",
    "bz2": "bzip2",
    "bzip2": "bzip2",
    "txt": "text",
    "text": "text",
    "ascii": "text",
}
_SPATIAL = ("", "???", "none", "domain", "space", "time")
"""Kinds of axes along which the scan extends; any other axis holds the components of a pixel."""

_TO_LPS = {"right": -1.0, "left": 1.0, "anterior": -1.0, "posterior": 1.0, "superior": 1.0, "inferior": -1.0}
_DIMENSION = {word: index // 2 for index, word in enumerate(_TO_LPS)}
_SHORT = {"r": "right", "l": "left", "a": "anterior", "p": "posterior", "s": "superior", "t": "time"}
_SCANNER_SPACES = ("scanner-xyz", "3d-right-handed", "3d-left-handed")
_Place = tuple[Geometry, tuple[str, ...]]
_VECTOR = re.compile(r"none|\(([^()]*)\)", re.IGNORECASE)


@dataclass(frozen=True)
class _Axes:
    """The axes of the file, fastest first.

    Attributes:
        size: Pixels along each.
        components: Which of them holds the components of a pixel, if one does.
    """

    size: list[int]
    components: int | None

    @property
    def spatial(self) -> list[int]:
        return [i for i in range(len(self.size)) if i != self.components]


def open_nrrd(path: Path, *, label: bool = False) -> Opened:
    """Open an NRRD file; as a label, a segmentation of 3D Slicer's is joined to one value per voxel.

    Raises:
        ReadError: If it is not readable.
    """
    fields, pairs, end = _header(path)
    axes = _axes(path, fields)
    place, notes = _geometry(path, fields, axes)
    components = 1 if axes.components is None else axes.size[axes.components]
    kind = _kind(path, fields)
    require_room(path, place.size, components, kind.itemsize)
    pixels = _pixels(path, fields, end, kind, math.prod(axes.size))
    pixels.require_complete()

    def read() -> npt.NDArray[Any]:
        array = pixels.read().reshape(axes.size[::-1])
        if axes.components is not None:
            array = np.moveaxis(array, array.ndim - 1 - axes.components, 0)
        return array.reshape(components, *place.size[::-1])

    known = segments(path, pairs, components) if label else ()
    if not known:
        return Opened(place, components, read, notes)
    part = Part(place.size, place.spacing, place.origin, place.direction, place.stored)
    return Opened(part, 1, lambda: label_map(path, read(), known)[None], notes)


def segments_of(path: Path) -> tuple[Segment, ...]:
    """Return the segments that a file names; () if it is no segmentation of 3D Slicer's.

    Raises:
        ReadError: If its header is damaged.
    """
    fields, pairs, _ = _header(path)
    axes = _axes(path, fields)
    return segments(path, pairs, 1 if axes.components is None else axes.size[axes.components])


def pixel_file(path: Path) -> Path:
    """Return the file that holds the pixels of an NRRD file: itself, or one beside it.

    Raises:
        ReadError: If its header names none that may be read.
    """
    fields, _, _ = _header(path)
    return beside(path, fields["datafile"]) if "datafile" in fields else path


def _header(path: Path) -> tuple[dict[str, str], dict[str, str], int]:
    """Return the fields, by lower-case names without blanks, the key/value pairs, and the bytes before the pixels."""
    fields: dict[str, str] = {}
    pairs: dict[str, str] = {}
    with path.open("rb") as file:
        lines = header_lines(path, file)
        if not re.fullmatch(r"NRRD000\d\s*", next(lines, ""), re.ASCII):
            fail(path, "not an NRRD file", "a header that starts with NRRD", "replace it")
        for line in lines:
            if not line:
                break
            if line.startswith("#"):
                continue
            if pair := re.match(r"([^:]*):=(.*)", line):
                pairs.setdefault(pair[1].strip(), pair[2].strip())
                continue
            name, colon, value = line.partition(":")
            if not colon or "\0" in line:
                fail(path, f"damaged header ({line[:40]})", "a field and its value", "write the file again")
            keep(path, fields, re.sub(r"\s", "", name).lower(), value.strip())
            if fields.get("datafile", "").startswith("LIST"):
                break  # the names of files follow
        return fields, pairs, file.tell()


def _axes(path: Path, fields: dict[str, str]) -> _Axes:
    n = whole_numbers(path, "dimension", fields.get("dimension", ""))[0]
    if not 1 <= n <= _MOST_AXES:
        fail(path, f"{n} axes", f"1 to {_MOST_AXES}", "write the file again")
    size = whole_numbers(path, "sizes", fields.get("sizes", ""), n)
    kinds = [kind.lower() for kind in fields.get("kinds", "").split()] or [""] * n
    if len(kinds) != n:
        fail(path, f"{len(kinds)} kinds of axes", f"{n}", "correct the header")
    vectors = _vectors(path, "space directions", fields.get("spacedirections", ""))
    # Without kinds, an axis that has no direction in space is none of it.
    other = [i for i, kind in enumerate(kinds) if kind not in _SPATIAL]
    if not other and "kinds" not in fields and len(vectors) == n:
        other = [i for i, vector in enumerate(vectors) if vector is None and size[i] > 1]
    if "complex" in kinds:
        fail(path, "complex values", "real values", "save the magnitude", "complex")
    if len(other) > 1:
        found = f"{len(other)} axes of components"
        fail(path, found, "at most one", "split it into channels or time points", "4d")
    axes = _Axes(size, other[0] if other else None)
    if min(size) < 1:
        fail(path, f"sizes {size}", "at least one pixel along each axis", "write the file again")
    require_axes(path, [size[i] for i in axes.spatial])
    return axes


def _geometry(path: Path, fields: dict[str, str], axes: _Axes) -> _Place:
    size = [axes.size[i] for i in axes.spatial]
    spatial = axes.spatial[: require_axes(path, size)]
    size = size[: len(spatial)]
    if "spacedirections" not in fields:
        return _without_space(path, fields, spatial, size, len(axes.size))
    flips = _flips(path, fields)
    vectors = _vectors(path, "space directions", fields["spacedirections"])
    origin = _vectors(path, "space origin", fields.get("spaceorigin", f"({','.join('0' * len(flips))})"))
    chosen = [vectors[i] for i in spatial] if len(vectors) == len(axes.size) else []
    if (
        not chosen
        or len(origin) != 1
        or any(vector is None or len(vector) != len(flips) for vector in (*chosen, *origin))
    ):
        found = f"space directions: {fields['spacedirections'][:80]}"
        expected = f"{len(spatial)} directions and one origin in {len(flips)} dimensions"
        fail(path, found, expected, "correct the header", "geometry")
    matrix = np.array(chosen, dtype=float).T * flips[:, None]  # (space, axes)
    n = len(spatial)
    if n < len(flips) and (n == 2 or matrix[n:].any()):
        expected = f"a space of {n} dimensions"
        fail(path, f"{n} axes in a space of {len(flips)}", expected, "export it as a volume", "geometry")
    spacing = np.linalg.norm(matrix[:n], axis=0)
    start = (np.array(origin[0], dtype=float) * flips)[:n]
    direction = matrix[:n] / np.maximum(spacing, np.finfo(float).tiny)
    return checked_geometry(path, size, spacing.tolist(), start.tolist(), direction)


def _without_space(
    path: Path, fields: dict[str, str], spatial: list[int], size: list[int], count: int
) -> _Place:
    """Return the geometry by spacings alone; `axis mins` are where the first pixels begin, or lie if nodes."""
    n = len(spatial)
    spacing, origin = [1.0] * n, [0.0] * n
    if "spacings" in fields:
        spacing = _of_axes(path, fields, "spacings", spatial, count)
    elif "axismins" in fields and "axismaxs" in fields:
        fail(path, "a place by axis mins and maxs alone", "spacings", "write spacings too", "geometry")
    if "spacings" in fields and "axismins" in fields:
        centres = (fields.get("centerings") or fields.get("centers") or "cell " * count).lower().split()
        if len(centres) != count:
            fail(path, f"{len(centres)} centerings", f"{count}", "correct the header", "geometry")
        mins = _of_axes(path, fields, "axismins", spatial, count)
        shifts = [0.0 if centres[i] == "node" else step / 2 for i, step in zip(spatial, spacing, strict=True)]
        origin = [low + shift for low, shift in zip(mins, shifts, strict=True)]
    return checked_geometry(path, size, spacing, origin, np.eye(n))


def _of_axes(path: Path, fields: dict[str, str], key: str, spatial: list[int], count: int) -> list[float]:
    words = fields[key].split()
    if len(words) != count:
        fail(path, f"{len(words)} {key}", f"{count}, one for each axis", "correct the header", "geometry")
    return numbers(path, key, " ".join(words[i] for i in spatial), len(spatial))


def _flips(path: Path, fields: dict[str, str]) -> npt.NDArray[np.float64]:
    """Return the sign of each dimension of space that turns it into left, posterior, superior."""
    name = fields.get("space", "").lower().strip('"')
    if not name or name.removesuffix("-time") in _SCANNER_SPACES:
        given = fields.get("spacedimension") or ("4" if name.endswith("-time") else "3")
        dimension = whole_numbers(path, "space dimension", given)[0]
        if not 1 <= dimension <= _MOST_AXES:
            fail(path, f"a space of {dimension} dimensions", "2 or 3", "correct the header", "geometry")
        return np.ones(dimension)
    words = name.split("-") if "-" in name else [_SHORT.get(letter, letter) for letter in name]
    named = [word for word in words[:3] if word in _TO_LPS]
    if [_DIMENSION.get(word) for word in named] != [0, 1, 2] or words[3:] not in ([], ["time"]):
        expected = "right or left, anterior or posterior, superior"
        fail(path, f"space {name[:40]}", expected, "export it in LPS or RAS", "geometry")
    return np.array([*(_TO_LPS[word] for word in named), *[1.0] * len(words[3:])])


def _vectors(path: Path, key: str, text: str) -> list[list[float] | None]:
    """Return vectors such as ``none (1,0,0) (0,1,0)``; None for none."""
    if _VECTOR.sub("", text).strip():
        fail(path, f"{key}: {text[:60]}", "vectors such as (1,0,0)", "correct the header", "geometry")
    return [
        None if match[1] is None else numbers(path, key, match[1].replace(",", " "), match[1].count(",") + 1)
        for match in _VECTOR.finditer(text)
    ]


def _kind(path: Path, fields: dict[str, str]) -> np.dtype[Any]:
    name = " ".join(fields.get("type", "").lower().split())
    if name not in _KINDS:
        fail(path, f"type {name[:40] or 'unknown'}", "a number, such as short", "write the file again")
    kind = np.dtype(_KINDS[name])
    order = fields.get("endian", "").lower()
    if order not in ("little", "big") and kind.itemsize > 1 and _encoding(path, fields) != "text":
        found = f"endian {order[:40]}" if order else "no endian"
        fail(path, found, "endian: little or big", "write the file again")
    return kind.newbyteorder(">" if order == "big" else "<")


def _encoding(path: Path, fields: dict[str, str]) -> Encoding:
    name = fields.get("encoding", "").lower()
    if name not in _ENCODINGS:
        expected = "raw, gzip, bzip2 or ascii"
        fail(path, f"encoding {name[:40] or 'unknown'}", expected, "write the file again")
    return _ENCODINGS[name]


def _pixels(path: Path, fields: dict[str, str], end: int, kind: np.dtype[Any], count: int) -> Pixels:
    data, start = (beside(path, fields["datafile"]), 0) if "datafile" in fields else (path, end)
    encoding = _encoding(path, fields)
    lines = whole_numbers(path, "line skip", fields.get("lineskip", "0"))[0]
    skip = whole_numbers(path, "byte skip", fields.get("byteskip", "0"))[0]
    if not 0 <= lines <= _MOST_LINES:
        fail(path, f"line skip {lines}", f"0 to {_MOST_LINES}", "correct the header")
    if skip < -1 or (skip == -1 and encoding != "raw"):
        fail(path, f"byte skip {skip}", "bytes before the pixels, or -1 for raw", "correct the header")
    if skip == -1:
        return Pixels(path, data, kind, count, encoding, start, last=True, stated=True)
    if lines:
        start = _behind_lines(path, data, start, lines)
    return Pixels(path, data, kind, count, encoding, start, skip=skip, stated=bool(lines or skip))


def _behind_lines(path: Path, data: Path, start: int, lines: int) -> int:
    with data.open("rb") as file:
        file.seek(start)
        for _ in range(lines):
            if not file.readline(_LONGEST_LINE).endswith(b"\n"):
                fail(path, f"line skip {lines}", f"as many lines in {data.name}", "correct the header")
        return file.tell()
