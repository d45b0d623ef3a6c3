"""What the tests of pages share: subjects, contrast, and reading a page back."""

from __future__ import annotations

import base64
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from mlbseg.apps.report.packing import Subject
from mlbseg.apps.report.page import Markup, Section, render_page
from mlbseg.apps.report.viewer import SCRIPTS, Gallery
from mlbseg.types import Geometry

EVIL = '<script>document.title="stolen"</script><b>x</b>&amp;"\''
"""A case's name as nobody should call one."""


def subject(name: str = "case_1", *, shape: tuple[int, ...] = (6, 20, 30), **changes: Any) -> Subject:
    """Return a scan with a label that grows from slice to slice, a prediction beside it, and a trust map."""
    image = np.random.default_rng(0).normal(100, 20, shape)
    label, trust = np.zeros(shape, int), np.full(shape, np.nan)
    if len(shape) == 3:
        for z in range(1, shape[0] - 1):
            label[z, 4 : 6 + z, 5:15] = 1
            label[z, 14:17, 18:22] = 2
    else:
        label[4:12, 5:15] = 1
    trust[label > 0] = np.linspace(0, 1, int((label > 0).sum()))
    masks = {"label": label, "prediction": np.roll(label, 2, axis=-1)}
    geometry = Geometry.identity(shape[::-1], (1.0, 1.0, 3.0)[: len(shape)])
    values = {"image": image, "geometry": geometry, "masks": masks, "maps": {"trust": trust}, **changes}
    return Subject(name, "Dice 0.9", **values)


def page_of(*subjects: Subject, title: str = "Cases") -> str:
    looked = Gallery({1: "organ", 2: "vessel"})
    looked.fill(iter(subjects), len(subjects))
    return render_page(
        title,
        [Section("Cases", looked.html(), looked.note, SCRIPTS), Section("More", Markup("<p>text</p>"))],
    )


def unpack(content: bytes) -> dict[str, Any]:
    """Return a packed case: its head, with "image" (Z, Y, X) and each layer's "data" as it was, (Z, Y, X), in LPS."""
    length = int.from_bytes(content[:4], "little")
    head = json.loads(content[4 : 4 + length])
    nx, ny, nz = head["size"]
    planes = np.frombuffer(zlib.decompress(content[4 + length :]), np.uint8).reshape(-1, nz, ny, nx)
    head["turned"] = {item["name"]: plane for item, plane in zip(head["layers"], planes[2:], strict=True)}
    flips = (1,) if head["flat"] else (1, 2)
    planes = np.flip(planes, [1 + axis for axis in flips])
    head["image"] = head["low"] + head["step"] * (planes[0] + 256.0 * planes[1])
    for item, plane in zip(head["layers"], planes[2:], strict=True):
        item["data"] = plane
    return dict(head)


def data_of(html: str) -> list[dict[str, Any]]:
    """Return each case that a page holds, unpacked."""
    found = re.findall(r'<script type="text/plain" class="packed">(.*?)</script>', html, re.S)
    return [unpack(base64.b64decode(text)) for text in found]


def layer(data: dict[str, Any], name: str) -> np.ndarray:
    """Return the voxels (Z, Y, X) of a layer."""
    return np.asarray(next(item for item in data["layers"] if item["name"] == name)["data"])


def contrast(a: str, b: str) -> float:
    """Return the contrast of two colours, WCAG 2.2's definition."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def write(path: Path, html: str) -> str:
    """Write a page and return its address."""
    path.write_text(html, encoding="utf-8")
    return path.resolve().as_uri()
