"""The pages of a TIFF file, listed before any library opens it (TIFF 6.0, section 2; BigTIFF).

A directory may point back to itself, announce more pages than anyone has, or values of many times its own size.
Decoders follow it; here each step is bounded by what the file holds.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from mlbseg.data.formats.opened import fail

MOST_PAGES = 65_535
_LONGEST_TEXT = 1 << 24  # bytes of a description; OME's holds a line for each page
_BYTES = {1: (1, 2, 6, 7), 2: (3, 8), 4: (4, 9, 11, 13), 8: (5, 10, 12, 16, 17, 18)}  # of a value -> types
_SIZES = {kind: size for size, kinds in _BYTES.items() for kind in kinds}
_NUMBERS = {1: "B", 3: "H", 4: "L", 5: "LL", 13: "L", 16: "Q"}

_KIND, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 254, 256, 257, 258, 259, 262
_DESCRIPTION, _ORIENTATION, _SAMPLES, _X_RESOLUTION, _Y_RESOLUTION = 270, 274, 277, 282, 283
_PLANAR, _TILE_WIDTH, _EXTRA, _FORMAT = 284, 322, 338, 339
_DEFAULTS = {
    _KIND: 0,
    _BITS: 1,
    _COMPRESSION: 1,
    _PHOTOMETRIC: 0,
    _ORIENTATION: 1,
    _SAMPLES: 1,
    _PLANAR: 1,
    _FORMAT: 1,
}
_WANTED = {*_DEFAULTS, _WIDTH, _HEIGHT, _X_RESOLUTION, _Y_RESOLUTION, _TILE_WIDTH, _EXTRA}


@dataclass(frozen=True)
class Layout:
    """How a page keeps its pixels; what pages of one volume share. The numbers are those of the TIFF standard."""

    width: int
    height: int
    bits: tuple[int, ...]
    samples: int
    form: int  # 1 unsigned, 2 signed, 3 floating point
    photometric: int  # 0 white is zero, 1 black is zero, 2 RGB, 3 palette, 5 CMYK, 6 YCbCr
    compression: int
    separate: bool  # a plane for each sample
    tiled: bool
    extra: tuple[int, ...]  # of the samples beyond grey or RGB: 0 anything, 1 and 2 alpha
    orientation: int


@dataclass(frozen=True)
class Page:
    """One page.

    Attributes:
        layout: How it keeps its pixels.
        kind: NewSubfileType: bit 0 a smaller copy of another page, bit 2 a transparency mask.
        description: Its text.
        resolution: Pixels per unit along x and y; 0 where the file does not say.
    """

    layout: Layout
    kind: int
    description: str
    resolution: tuple[float, float]


def pages(path: Path) -> list[Page]:
    """List the pages of a file.

    Raises:
        ReadError: If it is no TIFF file, is damaged, or its directories form a circle.
        OSError: If it cannot be opened.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        head = file.read(16)
        order = {b"II": "<", b"MM": ">"}.get(head[:2], "")
        if (
            not order
            or len(head) < 8
            or (version := struct.unpack(order + "H", head[2:4])[0]) not in (42, 43)
        ):
            fail(path, "not a TIFF file", "a TIFF file", "replace it")
        big = version == 43
        if big and len(head) < 16:
            fail(path, "a truncated TIFF file", "a complete TIFF file", "copy it again")
        offset = struct.unpack(order + ("Q" if big else "L"), head[8:16] if big else head[4:8])[0]
        found: list[Page] = []
        seen: set[int] = set()
        reader = _Directory(path, file, size, order, big)
        while offset:
            if offset in seen:
                fail(path, "its pages form a circle", "a last page", "export it again", "pages")
            if len(found) == MOST_PAGES:
                fail(path, f"more than {MOST_PAGES} pages", "a stack of slices", "cut it into parts", "pages")
            seen.add(offset)
            page, offset = reader.page(offset)
            found.append(page)
    if not found:
        fail(path, "a TIFF file without a page", "an image", "export it again", "pages")
    return found


@dataclass
class _Directory:
    path: Path
    file: BinaryIO
    size: int
    order: str
    big: bool

    def page(self, offset: int) -> tuple[Page, int]:
        """Read the directory at `offset`; return its page and where the next one is (0: nowhere)."""
        (count,) = self._unpack("Q" if self.big else "H", offset)
        at, step = offset + (8 if self.big else 2), 20 if self.big else 12
        if at + count * step > self.size:
            self._damaged()
        (following,) = self._unpack("Q" if self.big else "L", at + count * step)
        values: dict[int, tuple[int, ...]] = {}
        description = ""
        for tag, kind, number, place in self._entries(at, count, step):
            if tag == _DESCRIPTION and kind == 2:
                raw = self._bytes(place, min(number, _LONGEST_TEXT))
                description = raw.split(b"\0")[0].decode("utf-8", "replace")
            elif tag in _WANTED and kind in _NUMBERS:
                values[tag] = self._unpack(_NUMBERS[kind] * min(number, 16), place)
        return _page(self, values, description), following

    def _entries(self, at: int, count: int, step: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield tag, type, number of values and where these are, of entries whose values the file can hold."""
        announced = 0
        for index in range(count):
            entry = at + index * step
            tag, kind, number = self._unpack("HHQ" if self.big else "HHL", entry)
            length = _SIZES.get(kind, 0) * number
            inline = entry + (12 if self.big else 8)
            if length > (8 if self.big else 4):
                announced += length
                (inline,) = self._unpack("Q" if self.big else "L", inline)
                if announced > self.size or inline + length > self.size:
                    self._damaged()
            yield tag, kind, number, inline

    def _unpack(self, form: str, offset: int) -> tuple[int, ...]:
        raw = self._bytes(offset, struct.calcsize("=" + form))
        return struct.unpack(self.order + form, raw)

    def _bytes(self, offset: int, count: int) -> bytes:
        if offset + count > self.size:
            self._damaged()
        self.file.seek(offset)
        return self.file.read(count)

    def _damaged(self) -> NoReturn:
        fail(self.path, "its directory points beyond the file's end", "a complete TIFF file", "copy it again")


def _page(directory: _Directory, values: dict[int, tuple[int, ...]], description: str) -> Page:
    def one(tag: int) -> int:
        found = values.get(tag, ())
        if not found and tag not in _DEFAULTS:
            fail(directory.path, f"a page without tag {tag}", "a complete TIFF file", "export it again")
        return found[0] if found else _DEFAULTS[tag]

    def ratio(tag: int) -> float:
        over, under = values.get(tag, (0, 1))[:2] if len(values.get(tag, ())) >= 2 else (0, 1)
        return over / under if under else 0.0

    layout = Layout(
        width=one(_WIDTH),
        height=one(_HEIGHT),
        bits=values.get(_BITS) or (1,),
        samples=one(_SAMPLES),
        form=one(_FORMAT),
        photometric=one(_PHOTOMETRIC),
        compression=one(_COMPRESSION),
        separate=one(_PLANAR) == 2,
        tiled=_TILE_WIDTH in values,
        extra=values.get(_EXTRA, ()),
        orientation=one(_ORIENTATION),
    )
    return Page(layout, one(_KIND), description, (ratio(_X_RESOLUTION), ratio(_Y_RESOLUTION)))
