"""Folders and datalists to cases, in every layout that is recognised."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data.broken import dicom_series, healthy, left_atrium, mask, noise, pictures, save, series
from mlbseg.data.cases import Dataset, find_cases, find_scans, still_there
from mlbseg.data.check import check
from mlbseg.data.readers import read_label, read_scan
from mlbseg.errors import FaultsError, UserError
from mlbseg.types import Role


def touch(root: Path, *names: str) -> Path:
    """Layouts are recognised by names alone: empty files do."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def roles(dataset: Dataset) -> dict[str, str]:
    return {case.id: case.role.value for case in dataset.cases}


def test_images_and_labels(tmp_path: Path) -> None:
    touch(tmp_path, "images/b.nii.gz", "images/a.nii.gz", "images/c.nii.gz", "labels/b.nrrd")
    touch(
        tmp_path,
        "labels_noisy/c.nii.gz",
        "labels_noisy/b.nii.gz",
        "images/.hidden.nii.gz",
        "images/._a.nii.gz",
    )
    dataset = find_cases(tmp_path)
    assert dataset.layout == "images/ + labels/"
    assert roles(dataset) == {"a": "unlabelled", "b": "clean", "c": "noisy"}
    assert dataset.cases[1].label == tmp_path / "labels" / "b.nrrd"
    assert dataset.cases[2].label == tmp_path / "labels_noisy" / "c.nii.gz"
    assert dataset.cases[0].images == (tmp_path / "images" / "a.nii.gz",)
    assert (dataset.faults, dataset.order, dataset.class_names) == ((), (), {})
    (warning,) = dataset.warnings
    assert str(warning) == "labels_noisy/b.nii.gz: ignored, as the case has a label in labels/ too"


def test_test_scans_from_a_folder_and_from_a_list(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.nii.gz", "labels/a.nii.gz", "images/b.nii.gz", "labels/b.nii.gz")
    touch(tmp_path, "images_test/t.nii.gz", "labels_test/t.nii.gz", "images_test/u.nii.gz")
    (tmp_path / "test.list").write_text("b.nii.gz\r\n\r\n")
    dataset = find_cases(tmp_path)
    assert roles(dataset) == {"a": "clean", "b": "test", "t": "test", "u": "test"}
    assert [case.label is not None for case in dataset.cases] == [True, True, True, False]


def test_train_list_gives_the_order(tmp_path: Path) -> None:
    touch(tmp_path, *(f"images/{n}.nii.gz" for n in "abc"), "labels/a.nii.gz")
    (tmp_path / "train.list").write_text("\ufeffc\n a \nb\n", encoding="utf-8")
    assert find_cases(tmp_path).order == ("c", "a", "b")


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"0": "background", "1": "Anterior"}, {0: "background", 1: "Anterior"}),
        ({"background": 0, "wall": 2}, {0: "background", 2: "wall"}),
        ({"background": 0, "whole": [1, 2]}, {}),
    ],
)
def test_decathlon(labels: dict[str, object], expected: dict[int, str], tmp_path: Path) -> None:
    touch(
        tmp_path,
        "imagesTr/h_001.nii.gz",
        "imagesTr/h_002.nii.gz",
        "labelsTr/h_001.nii.gz",
        "imagesTs/h_003.nii.gz",
    )
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels, "training": ["not looked at"]}))
    dataset = find_cases(tmp_path)
    assert roles(dataset) == {"h_001": "clean", "h_002": "unlabelled", "h_003": "test"}
    assert dataset.class_names == expected


def test_decathlon_needs_no_description(tmp_path: Path) -> None:
    touch(tmp_path, "imagesTr/x_0001.nii.gz", "imagesTr/x_0000.nii.gz", "labelsTr/x_0001.nii.gz")
    assert roles(find_cases(tmp_path)) == {"x_0000": "unlabelled", "x_0001": "clean"}


@pytest.mark.parametrize("described", [True, False])
def test_nnunet_joins_channels(described: bool, tmp_path: Path) -> None:
    touch(tmp_path, *(f"imagesTr/{n}_{c:04d}.nrrd" for n in ("a", "b") for c in (0, 1)), "labelsTr/a.nrrd")
    touch(tmp_path, "imagesTs/t_0000.nrrd", "imagesTs/t_0001.nrrd", "labelsTs/t.nrrd")
    if described:
        description = {
            "labels": {"background": 0, "x": 1},
            "file_ending": ".nrrd",
            "channel_names": {"0": "T1"},
        }
        (tmp_path / "dataset.json").write_text(json.dumps(description))
        touch(tmp_path, "imagesTr/a_0000.nii.gz")  # of another ending: not the data set's
    dataset = find_cases(tmp_path)
    assert dataset.layout == "nnU-Net v2"
    assert dataset.faults == ()
    assert roles(dataset) == {"a": "clean", "b": "unlabelled", "t": "test"}
    assert [p.name for p in dataset.cases[0].images] == ["a_0000.nrrd", "a_0001.nrrd"]
    assert [w.where for w in dataset.warnings] == (["imagesTr/a_0000.nii.gz"] if described else [])


def test_nnunet_faults(tmp_path: Path) -> None:
    touch(
        tmp_path, "imagesTr/a_0000.nii.gz", "imagesTr/b.nii.gz", "imagesTr/a_0000.nrrd", "labelsTr/a.nii.gz"
    )
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {}, "file_ending": ""}))
    assert find_cases(tmp_path).layout == "imagesTr/ + labelsTr/"
    (tmp_path / "imagesTr" / "a_0000.nrrd").unlink()
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {}, "file_ending": ".nii.gz"}))
    faults = find_cases(tmp_path).faults
    assert [(fault.case_id, fault.kind) for fault in faults] == [("b", "channels")]
    assert "rename it b_0000.nii.gz" in str(faults[0])


def test_one_channel_in_two_formats_is_a_fault(tmp_path: Path) -> None:
    touch(tmp_path, "imagesTr/a_0000.nii.gz", "imagesTr/a_0000.nrrd", "labelsTr/a.nii.gz")
    assert [(f.case_id, f.kind) for f in find_cases(tmp_path).faults] == [("a", "duplicate")]


def test_promise12(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / f"Case{i:02d}.mhd", noise(i))
        if i < 2:
            save(tmp_path / f"Case{i:02d}_segmentation.mhd", mask())
    dataset = find_cases(tmp_path)
    assert dataset.layout == "PROMISE12"
    assert roles(dataset) == {"Case00": "clean", "Case01": "clean", "Case02": "unlabelled"}
    assert (dataset.faults, dataset.warnings) == ((), ())
    assert check(dataset).faults == ()


def test_left_atrium(tmp_path: Path) -> None:
    left_atrium(tmp_path)
    dataset = find_cases(tmp_path)
    assert dataset.layout == "Left Atrium HDF5"
    assert roles(dataset) == {"n1": "clean", "n2": "clean", "n3": "unlabelled"}
    case = dataset.cases[0]
    assert case.label == case.images[0] == tmp_path / "n1" / "mri_norm2.h5"
    assert np.array_equal(read_scan(case.images).array[0], noise(0))
    assert case.label is not None
    assert np.array_equal(read_label(case.label)[0], mask())


def test_hdf5_under_images_brings_its_own_label(tmp_path: Path) -> None:
    left_atrium(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "images_test").mkdir()
    (tmp_path / "n1" / "mri_norm2.h5").rename(tmp_path / "images" / "a.h5")
    (tmp_path / "n3" / "mri_norm2.h5").rename(tmp_path / "images" / "b.h5")
    (tmp_path / "n2" / "mri_norm2.h5").rename(tmp_path / "images_test" / "c.h5")
    dataset = find_cases(tmp_path)
    assert roles(dataset) == {"a": "clean", "b": "unlabelled", "c": "test"}
    assert dataset.cases[2].label == tmp_path / "images_test" / "c.h5"


def test_pictures(tmp_path: Path) -> None:
    dataset = find_cases(pictures(tmp_path))
    assert roles(dataset) == {"a": "clean", "b": "clean", "c": "clean", "d": "unlabelled"}


def test_dicom_folders(tmp_path: Path) -> None:
    dataset = find_cases(series(tmp_path))
    assert roles(dataset) == {"bad_case": "unlabelled", "p1": "clean", "patient2": "clean"}
    assert dataset.cases[1].images == (tmp_path / "images" / "p1",)


def test_a_file_that_is_no_scan_is_named_in_a_warning(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.nii.gz", "images/b.nii.bz2", "images/a.raw")
    assert [str(w).split(":")[0] for w in find_cases(tmp_path).warnings] == ["images/b.nii.bz2"]


def test_one_name_in_training_and_test_is_a_fault(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.nii.gz", "images_test/a.nii.gz")
    assert [(f.case_id, f.kind) for f in find_cases(tmp_path).faults] == [("a", "duplicate")]


def test_a_folder_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UserError, match=r"cannot be listed .Permission denied"):
        find_cases(tmp_path)
    with pytest.raises(UserError, match=r"cannot be listed .Permission denied"):
        find_scans(tmp_path)


def test_undecodable_name_is_a_fault(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.nii.gz", "images/b\udcff.nii.gz")
    faults = find_cases(tmp_path).faults
    assert [f.kind for f in faults] == ["id"]
    assert str(faults[0]).encode()  # can be printed


# Datalists


def test_csv(tmp_path: Path) -> None:
    healthy(tmp_path)
    path = tmp_path / "cases.csv"
    path.write_text(
        "\ufeffid, image_0,image_1,label,role,patient,comment\n"
        "x,images/a.nii.gz,images/b.nii.gz,labels/a.nii.gz,,P1,\n"
        f"y,{tmp_path}/images/c.nii.gz,,labels/c.nii.gz,noisy,P1,\n"
        "z,images/d.nii.gz,,,test,,fine\n"
        ",images/b.nii.gz,,,,,\n",
        encoding="utf-8",
    )
    dataset = find_cases(path)
    assert dataset.faults == ()
    assert dataset.root == tmp_path
    assert roles(dataset) == {"b": "unlabelled", "x": "clean", "y": "noisy", "z": "test"}
    assert {case.id: case.patient for case in dataset.cases} == {"b": "b", "x": "P1", "y": "P1", "z": "z"}
    assert [p.name for p in dataset.cases[1].images] == ["a.nii.gz", "b.nii.gz"]
    assert [w.found for w in dataset.warnings] == ["column 'comment' is ignored"]


def test_channel_columns_are_in_numeric_order(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{i}.nii.gz" for i in range(11)))
    path = tmp_path / "cases.csv"
    header = ",".join(f"image_{i}" for i in range(11))
    path.write_text(f"id,{header}\nx,{','.join(f'{i}.nii.gz' for i in range(11))}\n")
    assert [p.name for p in find_cases(path).cases[0].images] == [f"{i}.nii.gz" for i in range(11)]


def test_json_list_and_object(tmp_path: Path) -> None:
    healthy(tmp_path)
    rows = [
        {"id": "x", "image": ["images/a.nii.gz", "images/b.nii.gz"], "label": "labels/a.nii.gz"},
        {"image": "images/d.nii.gz", "patient": 7},
    ]
    path = tmp_path / "cases.json"
    path.write_text(json.dumps(rows))
    dataset = find_cases(path)
    assert roles(dataset) == {"d": "unlabelled", "x": "clean"}
    assert dataset.cases[0].patient == "7"
    path.write_text(json.dumps({"cases": rows, "labels": {"background": 0, "atrium": 1}}))
    assert find_cases(path).class_names == {0: "background", 1: "atrium"}
    path.write_text(json.dumps({"cases": rows, "labels": [1]}))
    with pytest.raises(UserError, match="labels is not an object"):
        find_cases(path)


def test_dots_that_stay_inside_are_fine(tmp_path: Path) -> None:
    healthy(tmp_path)
    path = tmp_path / "cases.csv"
    path.write_text("id,image\nx,labels/../images/a.nii.gz\n")
    assert find_cases(path).faults == ()


def test_dots_in_a_label_are_refused(tmp_path: Path) -> None:
    healthy(tmp_path)
    save(tmp_path.parent / "outside.nii.gz", mask())
    path = tmp_path / "cases.csv"
    path.write_text("id,image,label\nx,images/a.nii.gz,images/../../outside.nii.gz\n")
    assert [(f.case_id, f.kind) for f in find_cases(path).faults] == [("x", "path")]


# Scans to predict


def ids(path: Path) -> list[str]:
    scans = find_scans(path)
    assert scans.faults == ()
    cases = scans.cases
    assert all(case.label is None and case.role is Role.UNLABELLED for case in cases)
    return [case.id for case in cases]


def test_scans_of_a_layout_lose_their_labels(tmp_path: Path) -> None:
    touch(tmp_path, "imagesTr/b.nii.gz", "labelsTr/b.nii.gz", "labelsTr/z.nii.gz", "imagesTs/a.nii.gz")
    assert ids(tmp_path) == ["a", "b"]


def test_scans_in_a_bare_folder(tmp_path: Path) -> None:
    touch(tmp_path, "b.nii.gz", "a.mha", ".hidden.nii.gz", "notes.txt", "empty/x.txt")
    dicom_series(tmp_path / "series")
    assert ids(tmp_path) == ["a", "b", "series"]
    with pytest.raises(UserError, match=r"`mlbseg predict` takes its 3 scan\(s\) as they are"):
        find_cases(tmp_path)


def test_scans_with_channel_numbers_are_joined(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{n}_{c:04d}.nii.gz" for n in "ab" for c in (0, 1)))
    assert ids(tmp_path) == ["a", "b"]
    for channels in (None, 2):
        cases = find_scans(tmp_path, channels).cases
        assert [p.name for p in cases[1].images] == ["b_0000.nii.gz", "b_0001.nii.gz"]
    assert len(find_scans(tmp_path, 1).cases) == 4
    (tmp_path / "b_0001.nii.gz").unlink()
    assert [case.id for case in find_scans(tmp_path, 2).cases] == ["a_0000", "a_0001", "b_0000"]


def test_numbered_scans_are_not_channels_of_one_scan(tmp_path: Path) -> None:
    touch(tmp_path, *(f"im_{i:04d}.png" for i in range(4)))
    scans = find_scans(tmp_path, 1)
    assert [case.id for case in scans.cases] == [f"im_{i:04d}" for i in range(4)]
    assert all(len(case.images) == 1 for case in scans.cases)
    assert scans.faults == ()
    for i in range(1, 4):
        (tmp_path / f"im_{i:04d}.png").unlink()
    touch(tmp_path, "other_0000.png")
    assert [case.id for case in find_scans(tmp_path, 1).cases] == ["im", "other"]
    touch(tmp_path, "third_0007.png")
    assert [case.id for case in find_scans(tmp_path, 1).cases] == ["im_0000", "other_0000", "third_0007"]


def test_faults_of_labels_do_not_matter_to_prediction(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.nii.gz", "images/b.nii.gz", "labels/a.nii.gz", "labels/a.nrrd", "labels/z.nrrd")
    assert {fault.kind for fault in find_cases(tmp_path).faults} == {"duplicate", "orphan"}
    assert ids(tmp_path) == ["a", "b"]
    path = tmp_path / "cases.csv"
    path.write_text(
        "image,label,role\nimages/a.nii.gz,labels/none.nrrd,\nimages/b.nii.gz,,sloppy\n", encoding="utf-8"
    )
    assert len(find_cases(path).faults) == 2
    assert ids(path) == ["a", "b"]


def test_a_fault_of_one_scan_leaves_the_others(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.nii.gz", "images/a.nrrd", "images/b.nii.gz", "images/c\udcff.nii.gz")
    scans = find_scans(tmp_path)
    assert [case.id for case in scans.cases] == ["b"]  # of the two called a, nobody knows which is meant
    assert [fault.kind for fault in scans.faults] == ["duplicate", "id"]


def test_one_file_one_series_one_list(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "b.nii.gz")
    assert ids(tmp_path / "a.nii.gz") == ["a"]
    assert ids(dicom_series(tmp_path / "series")) == ["series"]
    (tmp_path / "cases.csv").write_text("id,image\nq,b.nii.gz\n")
    assert ids(tmp_path / "cases.csv") == ["q"]


def test_scans_of_left_atrium(tmp_path: Path) -> None:
    assert ids(left_atrium(tmp_path)) == ["n1", "n2", "n3"]


@pytest.mark.parametrize("name", ["notes.txt", "empty", "missing"])
def test_no_scan_is_a_users_error(name: str, tmp_path: Path) -> None:
    touch(tmp_path, "notes.txt", "empty/readme.md")
    with pytest.raises(UserError, match=name):
        find_scans(tmp_path / name)


def test_two_scans_of_one_name_would_overwrite_each_other(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "a.nrrd")
    with pytest.raises(FaultsError, match=r"a: two cases of this name \(a.nii.gz, a.nrrd\)"):
        find_scans(tmp_path)


def test_cases_that_are_looked_for_again(tmp_path: Path) -> None:
    touch(tmp_path, *(f"images/{name}.nii.gz" for name in "abcd"), "labels/a.nii.gz", "labels/d.nii.gz")
    touch(tmp_path, "images/d.nrrd")
    dataset = find_cases(tmp_path)

    def look(*, labelled: bool) -> tuple[list[str], list[str]]:
        found, faults = still_there(
            dataset.cases, list("dxba"), tmp_path, kind="audit", labelled=labelled, faults=dataset.faults
        )
        assert all(fault.case_id and fault.case_id in "dxb" for fault in faults)
        return [case.id for case in found], sorted(fault.found for fault in faults)

    twice, gone = "two cases of this name (d.nii.gz, d.nrrd)", f"of this name in {tmp_path} any more"
    assert look(labelled=False) == (["b", "a"], [f"no scan {gone}", twice])
    assert look(labelled=True) == (["a"], [f"no label {gone}", f"no scan {gone}", twice])


@pytest.mark.realdata
def test_real_folders(realdata: Path) -> None:
    la, hippocampus = find_cases(realdata / "la"), find_cases(realdata / "hippocampus")
    assert (len(la.cases), len(la.order)) == (80, 80)
    assert {case.id for case in la.cases} == set(la.order)
    assert len(hippocampus.cases) == 200
    assert ids(realdata / "dicom") == ["11_HCropVolume", "13_HCropVolume", "37830-T2reg-78532"]
