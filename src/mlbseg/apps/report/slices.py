"""A scan to leaf through: a slider over its slices, and masks and maps that can be switched and faded."""

from __future__ import annotations

import base64
import io
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.colors import to_hex
from PIL import Image

from mlbseg.apps.report.page import render
from mlbseg.pictures import COLOURS

MOST_SLICES = 64
"""That a page holds of a scan; of more, so many are taken at even distances."""

MOST_PIXELS = 256
"""Of a slice's longer side; a larger one is shown at half, a third ... of its resolution."""

QUALITIES = (82, 60, 40, 20)
"""Of the pictures of slices: the first with which those of a scan take no more than `MOST_BYTES`, else the last."""

MOST_BYTES = 1_000_000

DIFFERENCES = ("#ff4d6d", "#b8f53d", "#ffffff")
"""Where the second mask differs from the first: missing in it, only in it, another class."""

MAP_COLOURS = tuple(to_hex(mpl.colormaps["viridis"](x)) for x in np.linspace(0, 1, 9))
"""Of a map's values 0 ... 1; what lies between is interpolated."""

STYLES = ("fill", "line", "dash")
"""How the first, the second and further masks are drawn, so that two of one class can be told apart."""


@dataclass(frozen=True)
class Subject:
    """What a browser shows.

    Attributes:
        name: Of the case.
        caption: What to know about it, such as its scores.
        image: (*S) intensities, 2D or 3D.
        spacing: Between pixels along each axis of the array, mm.
        masks: By name, (*S) class values, 0 is background. The first is filled, the next outlined.
        maps: By name, (*S) in 0 ... 1; NaN is transparent.
        focus: Slice to open at, along the first axis of a 3D image; the one with the most foreground when None.
    """

    name: str
    caption: str
    image: npt.NDArray[Any]
    spacing: tuple[float, ...]
    masks: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    maps: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    focus: int | None = None


def browser(subject: Subject, class_names: Mapping[int, str]) -> Markup:
    """Return a widget for a page of `mlbseg.apps.report.page.render_page`, which brings its script and style.

    Args:
        subject: What to show.
        class_names: Name of each class value; values of the masks that it lacks are named by their number.

    Raises:
        ValueError: if an array is not of the image's shape, or the image is neither 2D nor 3D.
    """
    arrays = {**subject.masks, **subject.maps}
    if subject.image.ndim not in (2, 3) or len(subject.spacing) != subject.image.ndim:
        raise ValueError(f"image {subject.image.shape}, spacing {subject.spacing}: expected 2D or 3D")
    for name, array in arrays.items():
        if array.shape != subject.image.shape:
            raise ValueError(f"{name} is {array.shape}, expected the image's shape {subject.image.shape}")
    image = _stack(subject.image)
    masks = {name: _stack(mask) for name, mask in subject.masks.items()}
    maps = {name: _stack(values) for name, values in subject.maps.items()}
    focus = _fullest(masks, len(image)) if subject.focus is None else subject.focus
    chosen = _chosen(len(image), min(max(focus, 0), len(image) - 1))
    step = math.ceil(max(image.shape[1:]) / MOST_PIXELS)
    values = sorted({int(v) for mask in masks.values() for v in np.unique(mask)} | set(class_names) - {0})
    values = [value for value in values if value != 0]
    grey = _shrunk(_grey(image[chosen]), step)
    columns = math.ceil(math.sqrt(len(chosen)))
    seen = {name: _thinned(mask[chosen], step) for name, mask in masks.items()}
    layers = [
        _mask_layer(name, mask, values, STYLES[min(i, 2)]) for i, (name, mask) in enumerate(seen.items())
    ]
    differences: list[tuple[str, str]] = []
    if len(seen) > 1:
        (first, expected), (second, found) = list(seen.items())[:2]
        layers.append(_difference_layer(expected, found))
        kinds = (f"only in {first}", f"only in {second}", "another class")
        # Of one class there is no other to be mistaken for it.
        differences = list(zip(kinds, DIFFERENCES, strict=True))[: 2 + (len(values) > 1)]
    layers += [_map_layer(name, _thinned(array[chosen], step)) for name, array in maps.items()]
    dy, dx = subject.spacing[-2:]
    data = {
        "name": subject.name,
        "size": [grey.shape[2], grey.shape[1]],
        "columns": columns,
        "slices": [int(i) + 1 for i in chosen],
        "of": len(image),
        "image": _sprite(grey, columns),
        "layers": layers,
        "stops": MAP_COLOURS,
    }
    return Markup(  # noqa: S704 - rendered with everything escaped
        render(
            "browser.html",
            subject=subject,
            data=data,
            start=int(np.abs(chosen - focus).argmin()),
            ratio=f"{grey.shape[2] * dx / (grey.shape[1] * dy):.5g}",
            classes=[
                (class_names.get(value, f"label {value}"), COLOURS[i % len(COLOURS)])
                for i, value in enumerate(values)
            ],
            differences=differences,
            maps=list(maps),
            stops=MAP_COLOURS,
            note=_note(len(chosen), len(image), step),
        )
    )


def _stack(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return (Z, Y, X): a 2D image is one slice."""
    return array if array.ndim == 3 else array[None]


def _fullest(masks: Mapping[str, npt.NDArray[Any]], count: int) -> int:
    for mask in masks.values():
        filled = (mask != 0).sum(axis=(1, 2))
        if filled.any():
            return int(filled.argmax())
    return count // 2


def _chosen(count: int, focus: int) -> npt.NDArray[np.intp]:
    """Return the slices that are shown, the focus among them."""
    chosen = np.unique(np.linspace(0, count - 1, min(count, MOST_SLICES)).round().astype(np.intp))
    chosen[np.abs(chosen - focus).argmin()] = focus
    return chosen


def _note(shown: int, count: int, step: int) -> str:
    parts = [f"{shown} of {count} slices"] if shown < count else []
    parts += [f"1/{step} of the resolution"] if step > 1 else []
    return f"Shown: {', '.join(parts)}." if parts else ""


def _grey(image: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Return (Z, Y, X) as grey levels, between the 0.5th and 99.5th percentile of the slices."""
    finite = np.nan_to_num(image.astype(np.float32))
    low, high = np.percentile(finite, [0.5, 99.5])
    return (255 * np.clip((finite - low) / ((high - low) or 1.0), 0, 1)).astype(np.uint8)


def _shrunk(grey: npt.NDArray[np.uint8], step: int) -> npt.NDArray[np.uint8]:
    """Return the means over squares of `step` pixels."""
    if step == 1:
        return grey
    rows, columns = (side // step for side in grey.shape[1:])
    squares = grey[:, : rows * step, : columns * step].reshape(len(grey), rows, step, columns, step)
    return squares.mean(axis=(2, 4)).astype(np.uint8)


def _thinned(array: npt.NDArray[Any], step: int) -> npt.NDArray[Any]:
    """Return the pixel in the middle of each square of `step` pixels: no class arises between two others."""
    rows, columns = (side // step for side in array.shape[1:])
    return array[:, step // 2 :: step, step // 2 :: step][:, :rows, :columns]


def _sprite(grey: npt.NDArray[np.uint8], columns: int) -> str:
    """Return one picture with the slices (Z, Y, X) beside and below each other, as a data URI."""
    count, height, width = grey.shape
    sheet = np.zeros((math.ceil(count / columns) * height, columns * width), np.uint8)
    for i, tile in enumerate(grey):
        row, column = divmod(i, columns)
        sheet[row * height : (row + 1) * height, column * width : (column + 1) * width] = tile
    # Lossy, at a quality that shows no blocks: a tenth of what the same levels take as PNG. Noise takes more.
    for quality in QUALITIES:
        content = io.BytesIO()
        Image.fromarray(sheet).save(content, "WEBP", quality=quality, method=4)
        if content.tell() <= MOST_BYTES:
            break
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"


def _packed(array: npt.NDArray[np.uint8]) -> str:
    return base64.b64encode(zlib.compress(array.tobytes(), 9)).decode()


def _mask_layer(name: str, mask: npt.NDArray[Any], values: list[int], style: str) -> dict[str, Any]:
    indices = np.zeros(mask.shape, np.uint8)
    for i, value in enumerate(values, start=1):
        indices[mask == value] = i
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(values))]
    return _layer(name, style, indices, colours, shown=True, opacity=45 if style == "fill" else 100)


def _difference_layer(expected: npt.NDArray[Any], found: npt.NDArray[Any]) -> dict[str, Any]:
    """Return where two masks differ, as the colours of `DIFFERENCES` have it."""
    kinds = np.select([expected == found, found == 0, expected == 0], [0, 1, 2], default=3).astype(np.uint8)
    layer = _layer("differences", "fill", kinds, list(DIFFERENCES), shown=False, opacity=80)
    return {**layer, "differs": True}


def _map_layer(name: str, values: npt.NDArray[Any]) -> dict[str, Any]:
    levels = np.where(np.isnan(values), 0, 1 + np.clip(np.nan_to_num(values), 0, 1) * 254)
    return _layer(name, "map", levels.round().astype(np.uint8), [], shown=False, opacity=60)


def _layer(
    name: str, style: str, array: npt.NDArray[np.uint8], colours: list[str], *, shown: bool, opacity: int
) -> dict[str, Any]:
    return {
        "name": name, "style": style, "colours": colours, "shown": shown, "opacity": opacity, "differs": False,
        "data": _packed(array),
    }  # fmt: skip
