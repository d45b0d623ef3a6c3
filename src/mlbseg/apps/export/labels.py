"""Names and colours of a run's classes for the programs in which masks are looked at: ITK-SNAP and 3D Slicer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlbseg.data.plan import Plan
from mlbseg.errors import UserError
from mlbseg.files import write_atomic
from mlbseg.pictures import COLOURS
from mlbseg.runs import Run
from mlbseg.staging import staged

ITK_SNAP = "labels.txt"
SLICER = "labels.ctbl"

_HEADER = """\
################################################
# ITK-SnAP Label Description File
# File format:
# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL
# Fields:
#    IDX:   Zero-based index
#    -R-:   Red color component (0..255)
#    -G-:   Green color component (0..255)
#    -B-:   Blue color component (0..255)
#    -A-:   Label transparency (0.00 .. 1.00)
#    VIS:   Label visibility (0 or 1)
#    MSH:   Label mesh visibility (0 or 1)
#  LABEL:   Label description
################################################
"""


def colour(index: int) -> tuple[int, int, int]:
    """Return red, green and blue (0 to 255) of a class by its index from 1, as the package's pictures have it."""
    text = COLOURS[(index - 1) % len(COLOURS)].lstrip("#")
    return int(text[:2], 16), int(text[2:4], 16), int(text[4:], 16)


def itk_snap(plan: Plan) -> str:
    """Return ITK-SNAP's label description file: a line for each value that a mask can hold."""
    lines = []
    for index, (value, name) in enumerate(zip(plan.label_values, plan.class_names, strict=True)):
        red, green, blue = (0, 0, 0) if index == 0 else colour(index)
        shown = int(index > 0)
        text = " ".join(name.split()).replace('"', "'")  # a line each, and no escapes
        lines.append(
            f'{value:5d}   {red:4d} {green:4d} {blue:4d}     {shown:4d}  {shown:2d}  {shown:2d}    "{text}"\n'
        )
    return _HEADER + "".join(lines)


def slicer(plan: Plan) -> str:
    """Return 3D Slicer's colour table: value, name without blanks, red, green, blue, alpha."""
    lines = ["# Color table file for 3D Slicer: value name red green blue alpha\n"]
    for index, (value, name) in enumerate(zip(plan.label_values, plan.class_names, strict=True)):
        red, green, blue = (0, 0, 0) if index == 0 else colour(index)
        word = "_".join(name.split()) or f"label_{value}"  # the columns are parted by blanks
        lines.append(f"{value} {word} {red} {green} {blue} {255 * (index > 0)}\n")
    return "".join(lines)


def export_labels(run: Run, out: Path, *, overwrite: bool = False) -> list[Path]:
    """Write the label descriptions of ITK-SNAP and of 3D Slicer.

    Returns:
        The files.

    Raises:
        UserError: if they cannot be written, or are there already.
    """
    with staged(out, overwrite=overwrite) as folder:
        write_atomic(folder / ITK_SNAP, itk_snap(run.plan).encode())
        write_atomic(folder / SLICER, slicer(run.plan).encode())
    return [out / ITK_SNAP, out / SLICER]


def class_indices(label: npt.NDArray[np.int32], plan: Plan, where: str) -> npt.NDArray[np.uint8]:
    """Return the class index of each voxel of a label map (*S) of values as in the files.

    Raises:
        UserError: if it holds a value that is no class.
    """
    unknown = sorted(set(np.unique(label).tolist()) - set(plan.label_values))
    if unknown:
        raise UserError(f"{where}: label values {unknown[:10]}, expected only {list(plan.label_values)}")
    indices = np.zeros(label.shape, np.uint8)
    for index, value in enumerate(plan.label_values):
        indices[label == value] = index
    return indices
