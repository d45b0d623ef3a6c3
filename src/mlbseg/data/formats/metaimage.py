"""MetaImage files: .mha, and .mhd with its pixels in a file beside it."""

from __future__ import annotations

import math
import re
from pathlib import Path

from mlbseg.data.formats.detached import beside
from mlbseg.data.formats.itk import open_itk
from mlbseg.data.formats.opened import Opened, fail

_HEAD = 1 << 20
_MET_BYTES = {"CHAR": 1, "SHORT": 2, "INT": 4, "LONG": 4, "LONG_LONG": 8, "FLOAT": 4, "DOUBLE": 8}


def open_metaimage(path: Path, *, label: bool = False) -> Opened:
    """Open a MetaImage file.

    Raises:
        ReadError: If it is not readable.
    """
    verify(path)
    return open_itk(path, "MetaImage")


def verify(path: Path) -> None:
    """Check sizes in a MetaImage (https://itk.org/Wiki/ITK/MetaIO/Documentation)."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    named = re.search(rb"^ElementDataFile\s*=[^\n]*\n", head, re.MULTILINE)
    if not named:
        fail(path, "not a MetaImage file", "a header that names ElementDataFile", "replace it")
    pairs = (line.split("=", 1) for line in head[: named.end()].decode("latin-1").splitlines() if "=" in line)
    fields = {key.strip(): value.strip() for key, value in pairs}
    for key in ("ElementSpacing", "Offset", "Position", "Origin", "TransformMatrix"):
        if not all(_is_finite(word) for word in fields.get(key, "").split()):
            fail(path, f"{key} = {fields[key]}", "finite numbers", "correct the header", "geometry")
    data, start = path, named.end()
    if fields["ElementDataFile"] != "LOCAL":
        data, start = beside(path, fields["ElementDataFile"]), 0
    try:
        element = _MET_BYTES[
            fields["ElementType"].removeprefix("MET_").removeprefix("U").removesuffix("_ARRAY")
        ]
        voxels = math.prod(int(n) for n in fields["DimSize"].split())
        needed = voxels * element * int(fields.get("ElementNumberOfChannels", 1))
        if fields.get("CompressedData", "").lower() == "true":
            needed = int(fields.get("CompressedDataSize", 1))
    except (KeyError, ValueError) as error:
        fail(path, f"damaged header ({error})", "DimSize and a numeric ElementType", "write the file again")
    available = data.stat().st_size - max(start, 0)
    if available < needed:
        fail(path, f"{data.name} holds {available} bytes of pixels", f"{needed}", "copy it again")


def _is_finite(word: str) -> bool:
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False
