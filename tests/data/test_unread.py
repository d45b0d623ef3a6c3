"""Files that are not read are named, and are a fault where they hide a label or an image."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.broken import healthy, save
from data.broken import mask as drawn
from mlbseg.data.cases import find_cases, find_scans
from mlbseg.data.unread import passed_over
from mlbseg.errors import Fault, note_lines
from mlbseg.types import Role


def faults(root: Path) -> list[tuple[str, str | None, str]]:
    return [(fault.where, fault.case_id, fault.kind) for fault in find_cases(root).faults]


def notes(root: Path) -> list[str]:
    return [note.where for note in find_cases(root).warnings]


UNREAD = [
    "d.mgz",
    "d.mnc",
    "d.npy",
    "d.nii.zip",
    "d.nii.bz2",
    "d.json",
    "d.seg",
    "d",
    "d.vtk",
    "d.raw",
    "d.NII.7z",
]


@pytest.mark.parametrize("name", UNREAD)
@pytest.mark.parametrize("folder", ["labels", "labels_noisy"])
def test_a_label_that_is_not_read_is_a_fault_of_its_case(folder: str, name: str, tmp_path: Path) -> None:
    root = healthy(tmp_path)
    assert faults(root) == []
    (root / folder).mkdir(exist_ok=True)
    (root / folder / name).write_bytes(b"x")
    assert faults(root) == [(f"{folder}/{name}", "d", "format")]
    text = str(find_cases(root).faults[0])
    assert "a label in a format that is not read, expected one of .nii.gz" in text
    assert text.endswith("(convert it, or move it away: then d counts as unlabelled)")
    (root / folder / name).rename(root / folder / ("other" + name))
    assert (faults(root), notes(root)) == ([], [f"{folder}/other{name}"])


def test_a_file_beside_a_label_that_is_read_is_a_note(tmp_path: Path) -> None:
    root = healthy(tmp_path)
    for name in ("a.json", "a.nii.gz.md5", "Thumbs.db"):
        (root / "labels" / name).write_bytes(b"x")
    assert (faults(root), notes(root)) == ([], ["labels/Thumbs.db", "labels/a.json", "labels/a.nii.gz.md5"])


def test_the_longest_name_is_the_case(tmp_path: Path) -> None:
    root = healthy(tmp_path, names=("a", "b", "c", "a.b"))
    (root / "labels" / "a.b.mgz").write_bytes(b"x")
    assert faults(root) == [("labels/a.b.mgz", "a.b", "format")]


def test_pixels_beside_their_header_are_no_label(tmp_path: Path) -> None:
    root = healthy(tmp_path, ".mhd")
    assert (root / "labels" / "a.raw").exists()
    assert (faults(root), notes(root)) == ([], [])


def test_an_image_that_is_not_read_explains_its_label(tmp_path: Path) -> None:
    root = healthy(tmp_path)
    (root / "images" / "a.nii.gz").rename(root / "images" / "a.mgz")
    (root / "images" / "d.nii.gz").rename(root / "images" / "d.mgz")
    assert faults(root) == [("images/a.mgz", "a", "format")]
    assert "an image in a format that is not read" in str(find_cases(root).faults[0])
    assert notes(root) == ["images/d.mgz"]


def test_nnunets_channels_and_test_folders(tmp_path: Path) -> None:
    for name in "abc":
        save(tmp_path / "imagesTr" / f"{name}_0000.nii.gz", drawn())
        save(tmp_path / "labelsTr" / f"{name}.nii.gz", drawn())
    save(tmp_path / "imagesTs" / "t_0000.nii.gz", drawn())
    save(tmp_path / "labelsTr" / "d.nii.gz", drawn())
    (tmp_path / "imagesTr" / "d_0000.mgz").write_bytes(b"x")
    (tmp_path / "labelsTs").mkdir()
    (tmp_path / "labelsTs" / "t.mgz").write_bytes(b"x")
    assert faults(tmp_path) == [("imagesTr/d_0000.mgz", "d", "format"), ("labelsTs/t.mgz", "t", "format")]


def test_promise12(tmp_path: Path) -> None:
    for name in ("Case00", "Case01"):
        save(tmp_path / f"{name}.mhd", drawn())
    save(tmp_path / "Case00_segmentation.mhd", drawn())
    (tmp_path / "Case01_segmentation.mgz").write_bytes(b"x")
    (tmp_path / "readme.txt").write_bytes(b"x")
    assert faults(tmp_path) == [(f"{tmp_path.name}/Case01_segmentation.mgz", "Case01", "format")]
    assert notes(tmp_path) == [f"{tmp_path.name}/readme.txt"]


def test_what_is_passed_over_when_scans_are_looked_for(tmp_path: Path) -> None:
    root = healthy(tmp_path / "set")
    for name in ("images/e.mgz", "images/notes.txt", "labels/d.mgz", "labels/x.txt"):
        (root / name).write_bytes(b"x")
    found = find_scans(root)
    assert [case.id for case in found.cases] == ["a", "b", "c", "d"]
    assert all(case.role is Role.UNLABELLED for case in found.cases)
    assert found.faults == ()
    assert [note.where for note in found.notes] == ["images/e.mgz", "images/notes.txt"]
    (root / "images" / "a.nii.gz").rename(root / "images" / "a.mgz")
    assert "images/a.mgz" in [note.where for note in find_scans(root).notes]


def test_what_is_passed_over_in_a_bare_folder(tmp_path: Path) -> None:
    save(tmp_path / "a.nii.gz", drawn())
    save(tmp_path / "m.mhd", drawn())
    (tmp_path / "b.mgz").write_bytes(b"x")
    (tmp_path / "more").mkdir()
    found = find_scans(tmp_path)
    assert [case.id for case in found.cases] == ["a", "m"]
    assert [str(note).split(",")[0] for note in found.notes] == [
        "b.mgz: not a scan",
        "more/: a folder without scans",
    ]


def test_passed_over_beside_masks(tmp_path: Path) -> None:
    save(tmp_path / "a.nii.gz", drawn())
    (tmp_path / "b.mgz").write_bytes(b"x")
    (tmp_path / ".hidden").write_bytes(b"x")
    assert [note.where for note in passed_over(tmp_path)] == [f"{tmp_path.name}/b.mgz"]


def test_notes_of_one_kind_are_one_line() -> None:
    many = [Fault(f"images/{i}.png", "its alpha is left out", kind="note") for i in range(664)]
    other = Fault("images/x.txt", "not a scan, ignored", ".png", kind="ignored")
    assert note_lines([*many, other]) == [
        "note: 664 times (images/0.png, images/1.png, images/2.png, ...): its alpha is left out",
        "note: images/x.txt: not a scan, ignored, expected .png",
    ]
    assert note_lines(many[:2]) == ["note: 2 times (images/0.png, images/1.png): its alpha is left out"]
    assert note_lines([]) == []
