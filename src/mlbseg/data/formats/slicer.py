"""Segmentations of 3D Slicer (`NAME.seg.nrrd`): segments with names, in layers, cropped to what is drawn.

The keys are those of Slicer's documentation, "Segmentations" (https://slicer.readthedocs.io, user guide, modules):
`Segment0_Name`, `Segment0_LabelValue` and `Segment0_Layer` for the first segment, and so on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlbseg.data.formats.opened import fail

ENDING = ".seg.nrrd"
_KEY = re.compile(r"Segment(\d{1,5})_(ID|Name|LabelValue|Layer)")
_MOST = 65_535


@dataclass(frozen=True)
class Segment:
    """One structure.

    Attributes:
        name: As Slicer shows it; "" where the file has none.
        layer: In which layer of the file it is drawn, from 0.
        stored: Its value there.
        value: Its value in the label map.
    """

    name: str
    layer: int
    stored: int
    value: int


def segments(path: Path, metadata: Mapping[str, str], layers: int) -> tuple[Segment, ...]:
    """Return the segments that a file's keys describe; () if it is no segmentation of Slicer's.

    A segment has its own value where no two segments share one; else all are numbered from 1 in the file's order.

    Args:
        path: The file, for messages.
        metadata: The file's key/value pairs.
        layers: How many it has.

    Raises:
        ReadError: If a key does not hold a number that it can.
    """
    found: dict[int, dict[str, str]] = {}
    for key, value in metadata.items():
        if match := _KEY.fullmatch(key):
            found.setdefault(int(match[1]), {})[match[2]] = value
    keys = [found[index] for index in sorted(found)]
    # Before there were layers, each segment had one of its own, and the value 1.
    each_its_own = layers > 1 and len(keys) == layers and not any("Layer" in key for key in keys)
    stored = [
        _whole(path, "LabelValue", key.get("LabelValue", "1" if each_its_own else str(i + 1)), 1, _MOST)
        for i, key in enumerate(keys)
    ]
    own = len(set(stored)) == len(stored)
    return tuple(
        Segment(
            key.get("Name", ""),
            i if each_its_own else _whole(path, "Layer", key.get("Layer", "0"), 0, layers - 1),
            stored[i],
            stored[i] if own else i + 1,
        )
        for i, key in enumerate(keys)
    )


def label_map(path: Path, layers: npt.NDArray[Any], known: Sequence[Segment]) -> npt.NDArray[np.int32]:
    """Join the layers of a segmentation.

    Args:
        path: The file, for messages.
        layers: (L, *S).
        known: The segments.

    Returns:
        (*S) the segments' values, 0 where there is none.

    Raises:
        ReadError: If a voxel lies in segments of two layers or, of several layers, has a value that no segment has.
    """
    if len(layers) == 1 and all(segment.stored == segment.value for segment in known):
        return np.asarray(
            layers[0], np.int32
        )  # with values that the keys leave out too: they are drawn all the same
    drawn = np.count_nonzero(layers, axis=0)
    if (twice := int((drawn > 1).sum())) > 0:
        places = np.argwhere(drawn > 1)[0]
        both = [_name(known, n, int(v)) for n, v in enumerate(layers[(slice(None), *places)]) if v]
        remedy = "remove the overlap in 3D Slicer (Segment Editor, Masking, or Logical operators: subtract)"
        fail(
            path, f"{twice} voxels lie in {' and in '.join(both[:3])}", "one segment a voxel", remedy, "label"
        )
    result = np.zeros(layers.shape[1:], np.int32)
    for number, layer in enumerate(layers):
        values = {segment.stored: segment.value for segment in known if segment.layer == number}
        for value in np.unique(layer):
            if value and int(value) not in values:
                found = f"value {value} in layer {number}, which no segment has"
                fail(path, found, "the value of a segment", "save it from 3D Slicer again", "label")
            if value:
                result[layer == value] = values[int(value)]
    return result


def _name(known: Sequence[Segment], layer: int, stored: int) -> str:
    name = next((s.name for s in known if (s.layer, s.stored) == (layer, stored)), "")
    return f"segment {name!r}" if name else f"layer {layer}"


def _whole(path: Path, key: str, text: str, low: int, high: int) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and low <= int(text) <= high):
        fail(path, f"{key} {text[:20]!r} of a segment", f"a whole number from {low} to {high}", kind="label")
    return int(text)
