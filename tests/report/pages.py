"""What the tests of pages share: subjects, contrast, and reading a page back."""

from __future__ import annotations

import base64
import io
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mlbseg.apps.report.page import Markup, Section, render_page
from mlbseg.apps.report.slices import Subject, browser

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
    values = {"spacing": (3.0, 1.0, 1.0)[-len(shape) :], "masks": masks, "maps": {"trust": trust}, **changes}
    return Subject(name, "Dice 0.9", image, **values)


def page_of(*subjects: Subject, title: str = "Cases") -> str:
    widgets = Markup("").join(browser(s, {1: "organ", 2: "vessel"}) for s in subjects)
    return render_page(title, [Section("Cases", widgets), Section("More", Markup("<p>text</p>"))])


def data_of(html: str) -> list[dict[str, Any]]:
    """Return what each browser of a page is given."""
    return [
        json.loads(text) for text in re.findall(r'<script type="application/json">(.*?)</script>', html, re.S)
    ]


def layer(data: dict[str, Any], name: str) -> np.ndarray:
    """Return the pixels (Z, Y, X) of a layer."""
    found = next(item for item in data["layers"] if item["name"] == name)
    width, height = data["size"]
    values = np.frombuffer(zlib.decompress(base64.b64decode(found["data"])), np.uint8)
    return values.reshape(-1, height, width)


def sprite(data: dict[str, Any]) -> np.ndarray:
    """Return the grey levels of the sheet of slices."""
    content = base64.b64decode(data["image"].partition("base64,")[2])
    return np.asarray(Image.open(io.BytesIO(content)).convert("L"))


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
