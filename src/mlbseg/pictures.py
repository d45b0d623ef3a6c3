"""Pictures of masks over scans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

COLOURS = ("#ffb000", "#00b4d8", "#e76fff", "#7ae582", "#ff5c5c", "#c0c0c0")
"""Outlines of classes 1, 2, ...; told apart by people with the common colour-vision deficiencies."""


@dataclass(frozen=True)
class Row:
    """One scan of a picture.

    Attributes:
        name: Shown at the left.
        image: (*S) intensities; of a 3D scan the slice with the most reference is shown.
        reference: (*S) class values.
        masks: (*S) class values, one per column after the reference.
    """

    name: str
    image: npt.NDArray[np.float32]
    reference: npt.NDArray[np.int32]
    masks: Sequence[npt.NDArray[np.int32]]


def overlay(rows: Sequence[Row], columns: Sequence[str], path: Path, *, aspect: float = 1.0) -> None:
    """Draw each row's scan with the reference's and each mask's outlines, and write a PNG.

    Args:
        rows: The scans.
        columns: Titles: the reference's first, then one per mask.
        path: The file to write.
        aspect: Height of a pixel over its width.
    """
    classes = sorted({int(v) for row in rows for v in np.unique(row.reference) if v > 0})
    figure = Figure(figsize=(2.3 * len(columns), 2.4 * len(rows) + 0.4), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title, fontsize=9, parse_math=False)
    for row, line in zip(rows, axes, strict=True):
        plane = _fullest(row.reference)
        image = row.image[plane]
        low, high = np.percentile(image, [1, 99])
        for axis, mask in zip(line, (row.reference, *row.masks), strict=True):
            axis.imshow(image, cmap="gray", vmin=low, vmax=high, aspect=aspect, interpolation="nearest")
            for value, colour in zip(classes, COLOURS * (1 + len(classes) // len(COLOURS)), strict=False):
                part = (mask[plane] == value).astype(float)
                if part.any():
                    axis.contour(part, levels=[0.5], colors=[colour], linewidths=1.2)
            axis.set_xticks([])
            axis.set_yticks([])
        # Names come from files: no mathtext, whatever they hold.
        line[0].set_ylabel(row.name, fontsize=8, parse_math=False)
    figure.savefig(path, dpi=110)


def _fullest(reference: npt.NDArray[np.int32]) -> tuple[int, ...]:
    """Return the index of the slice with the most foreground; () for a 2D image."""
    if reference.ndim == 2:
        return ()
    return (int((reference > 0).sum(axis=(1, 2)).argmax()),)
