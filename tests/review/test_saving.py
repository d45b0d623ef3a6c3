"""A corrected label is written whole, in the scan's geometry, over no other's work, and the old one is kept."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - as its documentation does

from blocks import write_blocks, write_case
from kills import killed_at
from mlbseg.apps.review.saving import HISTORY, NONE, Conflict, ReadOnly, Shelf
from mlbseg.data.cases import find_cases
from mlbseg.data.readers import read_label, read_scan


def shelf_of(root: Path) -> tuple[Shelf, dict[str, object]]:
    dataset = find_cases(root)
    return Shelf(dataset.root, dataset.layout), {case.id: case for case in dataset.cases}


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
def test_a_label_is_in_the_scan_s_geometry_and_the_old_one_is_kept(tmp_path: Path, suffix: str) -> None:
    geometry = {
        "spacing": (1.0, 2.0, 3.0),
        "origin": (4.0, -5.0, 6.0),
        "direction": (0, 1, 0, -1, 0, 0, 0, 0, 1),
    }
    write_case(tmp_path, f"a{suffix}", 0, labelled=True, **geometry)
    write_case(tmp_path, f"b{suffix}", 1, labelled=False, **geometry)
    shelf, cases = shelf_of(tmp_path)
    for name in ("a", "b"):
        scan = read_scan(cases[name].images)
        label = np.zeros(scan.array.shape[1:], np.int32)
        label[3:5, 6:9, 2:4] = 2
        old = shelf.version(cases[name])
        assert (old == NONE) == (name == "b")
        before = (tmp_path / "labels" / f"{name}{suffix}").read_bytes() if name == "a" else b""
        new = shelf.save(cases[name], label, scan.geometry, old, who="me", changed=12)
        path = tmp_path / "labels" / f"{name}{suffix}"
        array, lattice = read_label(path)
        assert np.array_equal(array, label)
        assert lattice == scan.geometry
        image, mask = sitk.ReadImage(str(cases[name].images[0])), sitk.ReadImage(str(path))
        assert mask.GetDirection() == image.GetDirection()
        assert mask.GetOrigin() == image.GetOrigin()
        if suffix == ".nii.gz":
            assert np.array_equal(nib.load(path).affine, nib.load(cases[name].images[0]).affine)
        entry = shelf.entries()[-1]
        assert (entry["who"], entry["what"], entry["case"], entry["version"]) == ("me", "save", name, new)
        if name == "a":
            assert (tmp_path / HISTORY / entry["kept"]).read_bytes() == before
    assert {case.id for case in find_cases(tmp_path).cases if case.label} == {"a", "b"}  # history is no label


def test_an_older_save_is_refused(tmp_path: Path) -> None:
    write_blocks(tmp_path, count=1, labelled=1)
    shelf, cases = shelf_of(tmp_path)
    scan = read_scan(cases["case_0"].images)
    label = np.zeros(scan.array.shape[1:], np.int32)
    base = shelf.version(cases["case_0"])
    shelf.save(cases["case_0"], label, scan.geometry, base, who="ann", changed=1)
    with pytest.raises(Conflict, match="ann saved it at"):
        shelf.save(cases["case_0"], label + 1, scan.geometry, base, who="ben", changed=1)
    assert read_label(tmp_path / "labels" / "case_0.nii.gz")[0].max() == 0


def test_a_kill_leaves_the_old_label_or_the_new_one(tmp_path: Path) -> None:
    write_blocks(tmp_path, count=1, labelled=1)
    shelf, cases = shelf_of(tmp_path)
    scan = read_scan(cases["case_0"].images)
    path = tmp_path / "labels" / "case_0.nii.gz"
    old = path.read_bytes()
    new = np.full(scan.array.shape[1:], 2, np.int32)
    seen = set()
    for change in range(1, 100):
        path.write_bytes(old)
        with killed_at(change) as killed:
            shelf.save(
                cases["case_0"], new, scan.geometry, shelf.version(cases["case_0"]), who="me", changed=1
            )
        whole = path.read_bytes()
        state = "old" if whole == old else "new" if np.array_equal(read_label(path)[0], new) else "half"
        seen.add(state)
        if state == "new":
            kept = [p.read_bytes() for p in (tmp_path / HISTORY).glob("case_0.*")]
            assert old in kept
        if not killed():
            break
    assert seen == {"old", "new"}
    assert state == "new"
    lines = (tmp_path / HISTORY / "log.jsonl").read_text().splitlines()
    assert all(json.loads(line)["case"] == "case_0" for line in lines if line)


def test_a_log_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    write_blocks(tmp_path, count=1, labelled=1)
    shelf, cases = shelf_of(tmp_path)
    shelf.mark(cases["case_0"], "accept", who="a\nb")
    with (tmp_path / HISTORY / "log.jsonl").open("a") as file:
        file.write('{"case": "case_')
    shelf.mark(cases["case_0"], "skip", who="c")
    assert [(e["what"], e["who"]) for e in shelf.entries()] == [("accept", "a\nb"), ("skip", "c")]


def test_what_is_not_written_is_refused_with_a_reason(tmp_path: Path) -> None:
    root, outside = write_blocks(tmp_path / "scans", count=3, labelled=3), tmp_path / "outside.nii.gz"
    labels = root / "labels"
    (labels / "case_0.nii.gz").rename(outside)
    (labels / "case_0.nii.gz").symlink_to(outside)
    image = sitk.ReadImage(str(labels / "case_1.nii.gz"))
    (labels / "case_1.nii.gz").unlink()
    sitk.WriteImage(image, str(labels / "case_1.mhd"))
    (labels / "case_2.nii.gz").unlink()
    sitk.WriteImage(image, str(labels / "case_2.seg.nrrd"))
    shelf, cases = shelf_of(root)
    for name, words in (
        ("case_0", "a link, or outside"),
        ("case_1", "is not written here"),
        ("case_2", "3D Slicer"),
    ):
        with pytest.raises(ReadOnly, match=words):
            shelf.label_path(cases[name])
    with pytest.raises(Exception, match="leads out of"):
        shelf.require_inside(cases["case_0"])
    (root / HISTORY).symlink_to(tmp_path)
    with pytest.raises(ReadOnly, match="a link"):
        shelf.mark(cases["case_1"], "accept", who="me")
