"""What several TIFF pages are together: slices, channels, and the mm between them where the file says so.

ImageJ writes it as lines ``key=value`` into the description, OME as XML (https://docs.openmicroscopy.org/ome-model/).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from mlbseg.data.formats.opened import fail
from mlbseg.data.formats.pages import Page

_MM = {
    **dict.fromkeys(("nm", "nanometer", "nanometre"), 1e-6),
    **dict.fromkeys(("um", "µm", "μm", "\\u00b5m", "micron", "microns", "micrometer", "micrometre"), 1e-3),
    **dict.fromkeys(("mm", "millimeter", "millimetre"), 1.0),
    **dict.fromkeys(("cm", "centimeter", "centimetre"), 10.0),
    **dict.fromkeys(("m", "meter", "metre"), 1000.0),
    **dict.fromkeys(("inch", "inches", "in"), 25.4),
}


@dataclass(frozen=True)
class Stack:
    """How pages make a volume.

    Attributes:
        slices: Pages along z; 1 is a 2D picture.
        channels: Pages for each slice.
        interleaved: A slice's channels follow each other; else all slices of a channel do.
        spacing: mm along x, y and z; None where the file does not say.
    """

    slices: int
    channels: int = 1
    interleaved: bool = True
    spacing: tuple[float, float, float] | None = None


def stack_of(path: Path, found: list[Page]) -> Stack:
    """Say how the pages of a file make a volume.

    Raises:
        ReadError: For a series of volumes, or where the description is of another number of pages.
    """
    first = found[0]
    if first.description.startswith("ImageJ="):
        stack, times = _imagej(first)
    elif "<OME" in first.description and "<Pixels" in first.description:
        stack, times = _ome(first)
    else:
        return Stack(len(found))
    announced = stack.slices * stack.channels * times
    if announced != len(found):
        remedy = "save it again as a TIFF stack with a page for each slice, or as NIfTI"
        fail(
            path,
            f"{len(found)} pages, though its description says {announced}",
            str(announced),
            remedy,
            "pages",
        )
    if times > 1 and stack.slices > 1:
        found_ = f"{times} time points of {stack.slices} slices"
        fail(path, found_, "one volume", "split it into time points", "4d")
    # A stack is often saved as a time series by mistake, and a series of pictures is as good as a stack here.
    return Stack(stack.slices * times, stack.channels, stack.interleaved, stack.spacing)


def _imagej(page: Page) -> tuple[Stack, int]:
    told = dict(line.split("=", 1) for line in page.description.splitlines() if "=" in line)

    def count(key: str) -> int:
        return int(told[key]) if told.get(key, "").isdecimal() and len(told[key]) < 10 else 1

    slices, channels, times = count("slices"), count("channels"), count("frames")
    if slices * channels * times == 1:
        slices = count("images")
    mm = _MM.get(told.get("unit", "").strip().lower())
    x, y = page.resolution
    spacing = None
    if mm and x > 0 and y > 0:
        spacing = _usable(mm / x, mm / y, mm * _number(told.get("spacing", "")))
    return Stack(slices, channels, True, spacing), times


def _ome(page: Page) -> tuple[Stack, int]:
    (pixels,) = re.findall(r"<Pixels\b([^>]*)>", page.description)[:1] or [""]
    told = dict(re.findall(r'(\w+)\s*=\s*"([^"]*)"', pixels))

    def count(key: str) -> int:
        return int(told[key]) if told.get(key, "").isdecimal() and len(told[key]) < 10 else 1

    # OME counts the samples of a colour page as channels.
    channels = max(1, count("SizeC") // page.layout.samples)
    order = told.get("DimensionOrder", "XYZCT")
    steps = [
        _number(told.get(f"PhysicalSize{axis}", ""))
        * _MM.get(told.get(f"PhysicalSize{axis}Unit", "µm").lower(), math.nan)
        for axis in "XYZ"
    ]
    interleaved = order.find("C") < order.find("Z")
    return Stack(count("SizeZ"), channels, interleaved, _usable(*steps)), count("SizeT")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _usable(x: float, y: float, z: float) -> tuple[float, float, float] | None:
    steps = (x, y, abs(z))  # ImageJ writes a negative spacing for a stack that runs downwards
    return steps if all(math.isfinite(s) and s > 0 for s in steps) else None
