"""Headers of text, a field a line, as MetaImage and NRRD have them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from io import BufferedIOBase
from math import isfinite
from pathlib import Path

from mlbseg.data.formats.opened import fail

LONGEST_HEADER = 1 << 24
"""Bytes. 3D Slicer describes each segment in its headers; no header of a scan is near this."""

_WHOLE = re.compile(r"[-+]?\d{1,18}", re.ASCII)
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.ASCII | re.IGNORECASE)


def header_lines(path: Path, file: BufferedIOBase) -> Iterator[str]:
    """Yield lines without their ends; the file then stands behind the line that was yielded last.

    Raises:
        ReadError: If the header does not end.
    """
    left = LONGEST_HEADER
    while line := file.readline(left):
        left -= len(line)
        if not left:
            fail(path, f"a header of more than {LONGEST_HEADER} bytes", "a header", "write the file again")
        yield os.fsdecode(line.rstrip(b"\r\n"))


def keep(path: Path, fields: dict[str, str], key: str, value: str) -> None:
    """Enter a field; one that is given twice would mean two things.

    Raises:
        ReadError: If it is there.
    """
    if key in fields:
        fail(path, f"{key!r} twice in its header", "each field once", "correct the header")
    fields[key] = value


def numbers(path: Path, key: str, text: str, count: int) -> list[float]:
    """Return the numbers of a field, finite ones.

    Raises:
        ReadError: If they are not `count` numbers.
    """
    words = text.split()
    values = [float(word) for word in words if _NUMBER.fullmatch(word)]
    if len(values) != len(words) or len(words) != count or not all(map(isfinite, values)):
        found, expected = f"{key} = {text[:60]}", f"finite numbers, {count} of them"
        fail(path, found, expected, "correct the header", "geometry")
    return values


def whole_numbers(path: Path, key: str, text: str, count: int = 1) -> list[int]:
    """Return the whole numbers of a field.

    Raises:
        ReadError: If they are not `count` whole numbers.
    """
    words = text.split()
    if len(words) != count or not all(map(_WHOLE.fullmatch, words)):
        found, expected = f"{key} = {text[:60]}", f"{count} whole number{'s' * (count > 1)}"
        fail(path, f"damaged header ({found})", expected, "write the file again")
    return [int(word) for word in words]
