"""How the weight maps of one patch changed during training, as small multiples."""

from __future__ import annotations

import base64
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.colors import to_rgb
from PIL import Image

from mlbseg.apps.report.page import render
from mlbseg.apps.report.viewer import MAP_COLOURS
from mlbseg.errors import UserError
from mlbseg.pictures import COLOURS

MOST_STEPS = 7
"""That are shown; of more, so many at even distances, the first and the last among them."""

MOST_WEIGHT = 3.0
"""Times the mean weight that has the brightest colour; more is shown alike."""


@dataclass(frozen=True)
class _Tile:
    uri: str
    words: str


def snapshots(folder: Path) -> list[Path]:
    """Return the files of weight maps in a run's folder of them, by step."""
    return sorted(p for p in folder.glob("*.npz") if p.stem.isdecimal()) if folder.is_dir() else []


def strips(files: list[Path]) -> Markup:
    """Return a row of pictures for the labels and the weights of each source, a column for each step.

    Args:
        files: STEP.npz, each with ``case_id``, ``image`` (*S) and, of a source, ``label_NAME`` and ``weight_NAME``
            (*S); 1 is the mean weight.

    Raises:
        UserError: if a file cannot be read as that.
    """
    chosen = np.unique(np.linspace(0, len(files) - 1, min(len(files), MOST_STEPS)).round().astype(int))
    frames = [(int(files[i].stem), _read(files[i])) for i in chosen]
    last = frames[-1][1]
    sources = [name.removeprefix("weight_") for name in last if name.startswith("weight_")]
    rows: list[tuple[str, list[_Tile]]] = []
    for source in sources:
        label, weight = f"label_{source}", f"weight_{source}"
        rows.append(
            (
                f"{source} labels",
                [_label_tile(step, source, f["image"], f[label]) for step, f in frames if label in f],
            )
        )
        rows.append(
            ("their weights", [_weight_tile(step, source, f[weight]) for step, f in frames if weight in f])
        )
    html = render(
        "strips.html", case=str(last["case_id"]), patch=_grey_tile(last["image"]), rows=rows,
        steps=[step for step, _ in frames], stops=MAP_COLOURS, most=f"{MOST_WEIGHT:g}",
    )  # fmt: skip
    return Markup(html)  # noqa: S704 - rendered with everything escaped


def _read(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Return what a file holds; of 3D arrays the middle slice."""
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
        shape = arrays["image"].shape
        maps = {name: a for name, a in arrays.items() if name.startswith(("image", "label_", "weight_"))}
        fine = len(shape) in (2, 3) and all(a.shape == shape for a in maps.values()) and "case_id" in arrays
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        fine = False
    if not fine:
        raise UserError(f"{path}: damaged, expected the weight maps that training wrote (delete it)")
    if len(shape) == 3:
        maps = {name: a[shape[0] // 2] for name, a in maps.items()}
    return {"case_id": arrays["case_id"], **maps}


def _grey(image: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return (Y, X, 3) in 0 ... 1."""
    low, high = np.percentile(image, [0.5, 99.5])
    return np.repeat(np.clip((image - low) / ((high - low) or 1), 0, 1)[..., None].astype(float), 3, axis=-1)


def _grey_tile(image: npt.NDArray[Any]) -> _Tile:
    return _Tile(_uri(_grey(image)), "the patch")


def _label_tile(step: int, source: str, image: npt.NDArray[Any], label: npt.NDArray[Any]) -> _Tile:
    picture = _grey(image)
    for value in np.unique(label[label > 0]):
        colour = np.array(to_rgb(COLOURS[(int(value) - 1) % len(COLOURS)]))
        picture[label == value] = 0.4 * picture[label == value] + 0.6 * colour
    return _Tile(_uri(picture), f"{source} labels at step {step}: {np.mean(label > 0):.0%} foreground")


def _weight_tile(step: int, source: str, weight: npt.NDArray[Any]) -> _Tile:
    known = weight[np.isfinite(weight)]
    colours = mpl.colormaps["viridis"](np.clip(np.nan_to_num(weight) / MOST_WEIGHT, 0, 1))[..., :3]
    kept = float(np.mean(known > 0)) if known.size else 0.0
    return _Tile(
        _uri(colours), f"weights of the {source} labels at step {step}: {kept:.0%} of the pixels above 0"
    )


def _uri(picture: npt.NDArray[np.float64]) -> str:
    content = io.BytesIO()
    Image.fromarray((255 * picture).round().astype(np.uint8)).save(content, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
