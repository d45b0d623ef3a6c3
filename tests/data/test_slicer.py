"""Segments of 3D Slicer to a label map."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - as its documentation does

from blocks import blocks, save
from conftest import Command
from mlbseg.data.cases import Dataset, LabelOptions, find_cases, find_scans
from mlbseg.data.check import check
from mlbseg.data.fingerprint import fingerprint
from mlbseg.data.formats.slicer import Segment, label_map, segments
from mlbseg.data.geometry import onto
from mlbseg.data.known import label_on
from mlbseg.data.readers import read_label, read_scan, write_label
from mlbseg.errors import ReadError
from mlbseg.types import NOT_KNOWN, Geometry

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
    found = segments(PATH, keys(("liver", 1, 0)), 2)
    with pytest.raises(ReadError, match="value 2 in layer 1, which no segment has"):
        label_map(PATH, np.array([[0, 1, 0], [0, 0, 2]]), found)


def test_one_layer_is_a_label_map_as_it_is() -> None:
    found = segments(PATH, keys(("liver", 1, 0)), 1)
    assert label_map(PATH, np.array([[0, 1, 2]]), found).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("key", "text"), [("LabelValue", "0"), ("LabelValue", "x"), ("Layer", "2"), ("Layer", "9" * 99)]
)
def test_what_is_no_number_is_a_fault(key: str, text: str) -> None:
    with pytest.raises(ReadError, match=rf"{key} .* of a segment, expected a whole number"):
        segments(PATH, {"Segment0_ID": "a", f"Segment0_{key}": text}, 2)


DIRECTION = "(0,1.2,0) (1.2,0,0) (0,0,-2)"
"""Of the image's axes, turned and one of them downwards."""


def write_nrrd(path: Path, array: np.ndarray, start: tuple[int, ...] = (0, 0, 0), **pairs: str) -> None:
    """Write (x, y, z) or (layer, x, y, z) as 3D Slicer does, the first voxel at `start` of the image."""
    layers = array.ndim == 4
    origin = [-20 + 1.2 * start[1], 15 + 1.2 * start[0], -30 - 2 * start[2]]
    head = [
        "NRRD0004", f"type: {'uchar' if array.dtype == np.uint8 else 'float'}", f"dimension: {array.ndim}",
        "space: left-posterior-superior", f"sizes: {' '.join(map(str, array.shape))}",
        f"space directions: {'none ' * layers}{DIRECTION}", f"kinds: {'list ' * layers}domain domain domain",
        "endian: little", "encoding: raw", f"space origin: ({','.join(map(str, origin))})",
        *(f"{key}:={value}" for key, value in pairs.items()),
    ]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("\n".join(head).encode() + b"\n\n" + array.tobytes(order="F"))


def study(root: Path, *, layers: bool = False) -> np.ndarray:
    """Write three scans with segmentations of a part of them, and one without; return the label (x, y, z)."""
    label = np.zeros((9, 8, 7), np.uint8)
    label[3:7, 2:5, 1:4], label[4:6, 2:4, 2:3] = 1, 2
    box = (slice(3, 7), slice(2, 5), slice(1, 4))
    for i in range(4):
        write_nrrd(
            root / "images" / f"case_{i}.nrrd", np.random.default_rng(i).random(label.shape, np.float32)
        )
        if i < 3:
            part = np.stack([label == 1, label == 2]).astype(np.uint8)[:, *box] if layers else label[box]
            rows = [("liver", 1, 0), ("vein, left", 1 if layers else 2, int(layers))]
            write_nrrd(root / "labels" / f"case_{i}.seg.nrrd", part, (3, 2, 1), **keys(*rows))
    return label


@pytest.mark.parametrize("layers", [False, True])
def test_a_segmentation_is_read_by_every_command(layers: bool, tmp_path: Path, command: Command) -> None:
    label = study(tmp_path / "d", layers=layers)
    dataset = find_cases(tmp_path / "d")
    assert dataset.class_names == {0: "background", 1: "liver", 2: "vein, left"}
    assert [case.id for case in dataset.cases if case.label] == ["case_0", "case_1", "case_2"]
    result = check(dataset)
    assert not result.faults
    for case in dataset.cases[:3]:
        array, geometry = read_label(case.label)
        lattice = read_scan(case.images).geometry
        assert np.array_equal(onto(array, geometry, lattice, where="", whose="").T, label)
    # Masks over the whole image are compared with what covers a part of it.
    (tmp_path / "m").mkdir()
    for case in dataset.cases[:3]:
        write_label(tmp_path / "m" / f"{case.id}.nrrd", label.T, read_scan(case.images).geometry)
    done = command(
        "evaluate", tmp_path / "m", tmp_path / "d" / "labels", "--json", "--report", tmp_path / "p.html"
    )
    assert done.code == 0, done.err
    assert done.json["mean_dice"] == 1
    assert facts_of(dataset) == {0: label.size - int((label > 0).sum()), 1: int((label == 1).sum()), 2: 4}


def facts_of(dataset: Dataset) -> dict[int, int]:
    """Return the voxels of each value that the plan is made from."""
    return fingerprint(dataset.cases).cases[0].label_voxels


def test_what_a_part_does_not_cover_is_unknown_if_it_is_said(tmp_path: Path) -> None:
    image, label = blocks(0)
    save(tmp_path / "images" / "a.nii.gz", image)
    box = tuple(slice(1, n - 1) for n in label.shape)
    drawn = sitk.GetImageFromArray(label[box])
    drawn.SetOrigin((1.0, 1.0, 1.0))
    for key, value in keys(("body", 1, 0), ("knob", 2, 0)).items():
        drawn.SetMetaData(key, value)
    (tmp_path / "labels").mkdir()
    sitk.WriteImage(drawn, str(tmp_path / "labels" / "a.seg.nrrd"))
    outside = label.size - label[box].size
    for options, value in ((LabelOptions(), 0), (LabelOptions(cropped=True), NOT_KNOWN)):
        found = find_cases(tmp_path, options)
        read = label_on(found.cases[0], Geometry.identity(label.shape[::-1]))
        assert np.array_equal(read[box], label[box])
        assert (read == value).sum() == outside + (label[box] == value).sum()
        (entry,) = check(found).summary["per_case"]
        assert entry["unknown"] == (outside if value else 0)
        assert sum(entry["labels"].values()) == label.size - entry["unknown"]


def test_a_part_that_does_not_lie_in_the_image_is_a_fault(tmp_path: Path) -> None:
    study(tmp_path)
    part = np.ones((4, 3, 3), np.uint8)
    write_nrrd(tmp_path / "labels" / "case_1.seg.nrrd", part, (6, 2, 1), **keys(("liver", 1, 0)))
    (fault,) = check(find_cases(tmp_path)).faults
    assert (fault.case_id, fault.kind) == ("case_1", "geometry")
    assert "size 4×3×3, expected 9×8×7" in str(fault)


def test_a_part_of_another_program_is_not_taken_for_one(tmp_path: Path) -> None:
    study(tmp_path)
    write_nrrd(tmp_path / "labels" / "case_1.seg.nrrd", np.ones((4, 3, 3), np.uint8), (3, 2, 1))
    assert [fault.case_id for fault in check(find_cases(tmp_path)).faults] == ["case_1"]


def test_segments_of_other_names_are_a_fault(tmp_path: Path) -> None:
    study(tmp_path)
    label = tmp_path / "labels" / "case_2.seg.nrrd"
    label.write_bytes(label.read_bytes().replace(b"Name:=liver", b"Name:=spleen"))
    (fault,) = check(find_cases(tmp_path)).faults
    assert str(fault).startswith("case_2: segment 'spleen' has the value 1, expected 'liver' as in case_0")


def test_a_segmentation_beside_scans_is_no_scan(tmp_path: Path) -> None:
    study(tmp_path)
    for path in (tmp_path / "labels").iterdir():
        path.rename(tmp_path / "images" / path.name)
    found = find_scans(tmp_path / "images")
    assert [case.id for case in found.cases] == [f"case_{i}" for i in range(4)]
    assert sum("segmentation of 3D Slicer" in str(note) for note in found.notes) == 3
