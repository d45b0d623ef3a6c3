"""Segments of 3D Slicer to a label map."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlbseg.data.formats.slicer import Segment, label_map, segments
from mlbseg.errors import ReadError

PATH = Path("case.seg.nrrd")


def keys(*rows: tuple[str, int | None, int | None]) -> dict[str, str]:
    """Return the keys of segments, each a name, a value and a layer."""
    found = {"Segmentation_ReferenceImageExtentOffset": "0 0 0"}
    for i, (name, value, layer) in enumerate(rows):
        found[f"Segment{i}_ID"] = f"id_{i}"
        found[f"Segment{i}_Name"] = name
        if value is not None:
            found[f"Segment{i}_LabelValue"] = str(value)
        if layer is not None:
            found[f"Segment{i}_Layer"] = str(layer)
    return found


def test_values_are_the_files_own_where_no_two_are_alike() -> None:
    found = segments(PATH, keys(("liver", 7, 0), ("tumour", 3, 0)), 1)
    assert found == (Segment("liver", 0, 7, 7), Segment("tumour", 0, 3, 3))


def test_values_that_two_layers_share_are_numbered_in_order() -> None:
    found = segments(PATH, keys(("a", 1, 0), ("b", 2, 0), ("c", 1, 1)), 2)
    assert [s.value for s in found] == [1, 2, 3]
    layers = np.array([[0, 1, 2, 0, 0], [0, 0, 0, 1, 0]])
    assert label_map(PATH, layers, found).tolist() == [0, 1, 2, 3, 0]


def test_before_there_were_layers_each_segment_had_its_own() -> None:
    found = segments(PATH, keys(("a", None, None), ("b", None, None)), 2)
    assert [(s.layer, s.stored, s.value) for s in found] == [(0, 1, 1), (1, 1, 2)]


def test_a_file_of_another_program_has_no_segments() -> None:
    assert segments(PATH, {"key": "value", "Segmentation": "x"}, 1) == ()


def test_more_than_nine_segments_stay_in_order() -> None:
    found = segments(PATH, keys(*((f"s{i}", i + 1, 0) for i in range(12))), 1)
    assert [s.name for s in found] == [f"s{i}" for i in range(12)]


def test_an_overlap_is_named() -> None:
    found = segments(PATH, keys(("liver", 1, 0), ("vessel", 1, 1)), 2)
    with pytest.raises(
        ReadError, match=r"2 voxels lie in segment 'liver' and in segment 'vessel', expected one"
    ):
        label_map(PATH, np.array([[1, 1, 1, 0], [0, 1, 1, 0]]), found)


def test_a_value_without_a_segment_is_a_fault() -> None:
    found = segments(PATH, keys(("liver", 1, 0)), 1)
    with pytest.raises(ReadError, match="value 2 in layer 0, which no segment has"):
        label_map(PATH, np.array([[0, 1, 2]]), found)


@pytest.mark.parametrize(
    ("key", "text"), [("LabelValue", "0"), ("LabelValue", "x"), ("Layer", "2"), ("Layer", "9" * 99)]
)
def test_what_is_no_number_is_a_fault(key: str, text: str) -> None:
    with pytest.raises(ReadError, match=rf"{key} .* of a segment, expected a whole number"):
        segments(PATH, {"Segment0_ID": "a", f"Segment0_{key}": text}, 2)
