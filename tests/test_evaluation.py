"""Folders of masks against folders of labels: who is matched, what is scored, what is a fault."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from rich.console import Console

from mlbseg.apps.report import masks_report
from mlbseg.data.readers import write_image, write_label
from mlbseg.errors import FaultsError, UserError
from mlbseg.evaluation import Evaluation, evaluate
from mlbseg.metrics import SCORE_NAMES, Scores, score
from mlbseg.types import Geometry

Label = npt.NDArray[np.uint8]
SPACING = (0.8, 1.0, 2.5)  # (x, y, z)


def label_map(shift: int = 0, *, second: bool = True) -> Label:
    """Return a map (8, 10, 12) with a box of value 1 and, unless told otherwise, one of value 2."""
    label = np.zeros((8, 10, 12), np.uint8)
    label[2:6, 2 + shift : 6 + shift, 2:6] = 1
    if second:
        label[2:6, 2:6, 8:10] = 2
    return label


def save(folder: Path, name: str, label: Label, geometry: Geometry | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    write_label(path, label, geometry or Geometry.identity(label.shape[::-1], SPACING))
    return path


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two cases; the first is predicted one voxel off in y, the second exactly."""
    predictions, references = tmp_path / "predictions", tmp_path / "labels"
    for case, shift in (("case_1", 1), ("case_2", 0)):
        save(predictions, f"{case}.nii.gz", label_map(shift))
        save(references, f"{case}.mha", label_map())
    return predictions, references


def printed(evaluation: Evaluation) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(evaluation.table())
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_every_case_and_class_is_scored_with_the_references_spacing(folders: tuple[Path, Path]) -> None:
    result = evaluate(*folders)
    assert [(r.case, r.value, r.name) for r in result.rows] == [
        ("case_1", 1, "label 1"),
        ("case_1", 2, "label 2"),
        ("case_2", 1, "label 1"),
        ("case_2", 2, "label 2"),
    ]
    assert result.rows[0].scores == score(label_map(1) == 1, label_map() == 1, SPACING[::-1])
    assert result.rows[0].scores.hd95_mm == pytest.approx(1.0)
    assert [r.scores.dice for r in result.rows] == [0.75, 1, 1, 1]
    assert result.mean_dice == pytest.approx((0.875 + 1) / 2)
    assert result.summary[1]["dice"].mean == pytest.approx(0.875)
    assert result.cases == ("case_1", "case_2")
    assert result.faults == result.not_predicted == result.not_referenced == ()


def test_names_of_the_classes_choose_what_is_scored(folders: tuple[Path, Path]) -> None:
    result = evaluate(*folders, classes={2: "vessel"})
    assert [(r.value, r.name) for r in result.rows] == [(2, "vessel"), (2, "vessel")]
    assert result.faults == ()  # value 1 is known to the references, and was not asked for


def test_references_may_be_named_one_by_one(folders: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, references = folders
    # Names of files do not matter then, and a case that is left out is not scored.
    renamed = (references / "case_2.mha").rename(tmp_path / "other.mha")
    result = evaluate(predictions, {"case_2": renamed})
    assert (result.cases, result.not_referenced, result.mean_dice) == (("case_2",), ("case_1",), 1.0)
    with pytest.raises(FaultsError, match="no case could be scored"):
        evaluate(predictions, {"nobody": renamed})


def test_two_files_of_any_name_are_one_case(folders: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, references = folders
    renamed = (tmp_path / "mine.nii.gz", tmp_path / "theirs_seg.mha")
    for path, file in zip(renamed, (predictions / "case_1.nii.gz", references / "case_1.mha"), strict=True):
        path.write_bytes(file.read_bytes())
    result = evaluate(*renamed, out=tmp_path / "scores.csv")
    assert (result.cases, result.faults, result.notes) == (("theirs_seg",), (), ())
    expected = [row.scores for row in evaluate(predictions, references).rows if row.case == "case_1"]
    assert [row.scores for row in result.rows] == expected
    with pytest.raises(
        UserError, match=r"mine.nii.gz is a file and .* is no file, expected two files or two"
    ):
        evaluate(renamed[0], references)
    with pytest.raises(UserError, match=r"mine.nii.gz is a file and .*none.nii.gz is no file"):
        evaluate(renamed[0], tmp_path / "none.nii.gz")
    scan = save(tmp_path, "scan.nii.gz", label_map())
    page = masks_report(result, *renamed, tmp_path / "page.html", scans=scan).read_text()
    assert "theirs_seg" in page
    assert "no scan of this name" not in page


def test_progress_counts_the_cases(folders: tuple[Path, Path]) -> None:
    seen: list[tuple[int, int]] = []
    evaluate(*folders, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


def test_a_class_that_is_only_in_other_cases_counts_as_both_empty(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    for folder in folders:
        save(folder, "case_0.nii.gz", label_map(second=False))
    first = evaluate(predictions, references).rows[1]
    assert (first.case, first.value, first.scores) == ("case_0", 2, Scores(1, 1, 0, 0, 0, 0))


def test_a_missed_structure_has_no_distance_and_is_counted(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    predictions, references = folders
    save(predictions, "case_1.nii.gz", label_map(second=False))
    result = evaluate(predictions, references, out=tmp_path / "metrics.csv")
    assert result.rows[1].scores == Scores(0, 0, None, None, None, None)
    assert result.summary[2]["hd95_mm"].missing == 1
    assert result.summary[2]["hd95_mm"].count == 1
    assert (tmp_path / "metrics.csv").read_text().splitlines()[2] == "case_1,2,label 2,0,0,,,,"
    assert result.mean_dice == pytest.approx((0.5 + 1) / 2)


def test_a_reference_without_prediction_is_named_and_not_scored(folders: tuple[Path, Path]) -> None:
    save(folders[1], "case_9.nii.gz", label_map() + 4)  # its values are no classes either
    result = evaluate(*folders)
    assert result.not_predicted == ("case_9",)
    assert result.cases == ("case_1", "case_2")
    assert list(result.classes) == [1, 2]


def test_a_prediction_without_reference_is_named_and_not_scored(folders: tuple[Path, Path]) -> None:
    save(folders[0], "stranger.nii.gz", label_map() + 4)  # its values are no classes either
    result = evaluate(*folders)
    assert result.not_referenced == ("stranger",)
    assert result.faults == ()
    assert result.cases == ("case_1", "case_2")
    assert list(result.classes) == [1, 2]


def test_predictions_none_of_which_has_a_reference_are_faults(folders: tuple[Path, Path]) -> None:
    for name in ("case_1", "case_2"):
        (folders[0] / f"{name}.nii.gz").rename(folders[0] / f"new {name}.nii.gz")
    with pytest.raises(FaultsError, match="no case could be scored") as caught:
        evaluate(*folders)
    assert [(f.kind, f.case_id) for f in caught.value.faults] == [
        ("no-reference", "new case_1"),
        ("no-reference", "new case_2"),
    ]
    assert "new case_1.nii.gz: no reference label named new case_1" in str(caught.value)


def test_a_name_of_two_references_is_a_fault_and_nothing_else(folders: tuple[Path, Path]) -> None:
    save(folders[1], "case_1.nrrd", label_map())
    result = evaluate(*folders)
    assert [(f.kind, f.case_id) for f in result.faults] == [("duplicate", "case_1")]
    assert result.not_predicted == result.not_referenced == ()


@pytest.mark.parametrize(
    ("geometry", "said"),
    [
        (Geometry.identity((12, 10, 8), (0.8, 1.0, 2.6)), "spacing 0.8×1×2.6"),
        (Geometry((12, 10, 8), SPACING, (0, 0, 3.0), (1, 0, 0, 0, 1, 0, 0, 0, 1)), "origin (0, 0, 3)"),
        (Geometry((12, 10, 8), SPACING, (0, 0, 0), (-1, 0, 0, 0, -1, 0, 0, 0, 1)), "direction (-1, "),
    ],
)
def test_a_mask_that_lies_elsewhere_is_a_fault_of_its_case(
    folders: tuple[Path, Path], geometry: Geometry, said: str
) -> None:
    save(folders[0], "case_1.nii.gz", label_map(), geometry)
    result = evaluate(*folders)
    (fault,) = result.faults
    assert (fault.kind, fault.case_id) == ("geometry", "case_1")
    assert said in str(fault)
    assert result.cases == ("case_2",)
    assert result.mean_dice == 1


def test_a_mask_of_another_size_is_a_fault_of_its_case(folders: tuple[Path, Path]) -> None:
    save(folders[0], "case_2.nii.gz", label_map()[:-1])
    (fault,) = evaluate(*folders).faults
    assert "case_2.nii.gz: size 12×10×7, expected 12×10×8 as in its reference" in str(fault)


def test_rounding_in_a_header_is_no_fault(folders: tuple[Path, Path]) -> None:
    nearly = Geometry.identity((12, 10, 8), (0.80001, 1.0, 2.5001))
    save(folders[0], "case_1.nii.gz", label_map(), nearly)
    assert evaluate(*folders).faults == ()


def test_a_value_that_no_class_covers_is_a_fault_and_scored_as_background(folders: tuple[Path, Path]) -> None:
    label = label_map()
    label[0, 0, 0] = 7
    save(folders[0], "case_2.nii.gz", label)
    result = evaluate(*folders)
    (fault,) = result.faults
    assert (fault.kind, fault.case_id) == ("labels", "case_2")
    assert "label values [7]" in str(fault)
    assert "only [1, 2]" in str(fault)
    assert list(result.classes) == [1, 2]
    assert [r.scores.dice for r in result.rows if r.case == "case_2"] == [1, 1]


def test_one_broken_file_does_not_stop_the_others(folders: tuple[Path, Path]) -> None:
    (folders[0] / "case_1.nii.gz").write_text("not a scan")
    write_image(
        folders[0] / "case_3.nii.gz",
        np.full((8, 10, 12), 0.5, np.float32),
        Geometry.identity((12, 10, 8), SPACING),
    )
    save(folders[1], "case_3.nii.gz", label_map())
    result = evaluate(*folders)
    assert result.cases == ("case_2",)
    assert len(result.faults) == 2
    assert all(name in str(fault) for name, fault in zip(("case_1", "case_3"), result.faults, strict=True))


def test_nothing_to_score_is_an_error_with_every_fault(folders: tuple[Path, Path]) -> None:
    for name in ("case_1", "case_2"):
        (folders[0] / f"{name}.nii.gz").write_text("not a scan")
    with pytest.raises(FaultsError, match="no case could be scored") as caught:
        evaluate(*folders)
    assert len(caught.value.faults) == 2


def test_two_files_of_one_name_are_a_fault(folders: tuple[Path, Path]) -> None:
    save(folders[0], "case_1.nrrd", label_map())
    result = evaluate(*folders)
    (fault,) = result.faults
    assert "case_1.nii.gz and case_1.nrrd are both case_1" in str(fault)
    assert result.cases == ("case_2",)


def test_folders_that_are_missing_or_hold_no_masks_are_named(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"nowhere: No such file.*expected a folder of predicted masks"):
        evaluate(tmp_path / "nowhere", folders[1])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no scan files, expected reference labels"):
        evaluate(folders[0], tmp_path / "empty")
    with pytest.raises(UserError, match=r"case_1.nii.gz is a file and .*labels is no file"):
        evaluate(folders[0] / "case_1.nii.gz", folders[1])


def test_empty_references_give_no_class(tmp_path: Path) -> None:
    for folder in ("p", "r"):
        save(tmp_path / folder, "a.nii.gz", label_map() * 0)
    with pytest.raises(UserError, match="every label is empty"):
        evaluate(tmp_path / "p", tmp_path / "r")
    assert evaluate(tmp_path / "p", tmp_path / "r", classes={1: "organ"}).mean_dice == 1


def test_hidden_files_and_other_files_are_passed_over(folders: tuple[Path, Path]) -> None:
    (folders[0] / "._case_1.nii.gz").write_text("of a Mac")
    (folders[0] / "notes.txt").write_text("hello")
    assert evaluate(*folders).faults == ()


def test_hdf5_references_are_named_by_their_folder(folders: tuple[Path, Path], tmp_path: Path) -> None:
    root = tmp_path / "la"
    for case in ("case_1", "case_2"):
        (root / case).mkdir(parents=True)
        with h5py.File(root / case / "mri_norm2.h5", "w") as file:
            file["image"] = np.zeros((12, 10, 8), np.float32)
            file["label"] = label_map().T  # (x, y, z)
        save(folders[0], f"{case}.nii.gz", label_map(), Geometry.identity((12, 10, 8)))
    result = evaluate(folders[0], root)
    assert result.cases == ("case_1", "case_2")
    assert result.mean_dice == 1


def test_promise12_labels_are_told_from_the_scans_beside_them(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    for case in ("case_1", "case_2"):
        save(tmp_path / "promise", f"{case}.mhd", np.full((8, 10, 12), 9, np.uint8))  # the scan
        save(tmp_path / "promise", f"{case}_segmentation.mhd", label_map())
    result = evaluate(folders[0], tmp_path / "promise")
    assert list(result.classes) == [1, 2]
    assert result.mean_dice == pytest.approx(0.9375)


def test_flat_images_are_scored_too(tmp_path: Path) -> None:
    flat = label_map()[3]
    for folder in ("p", "r"):
        save(tmp_path / folder, "a.png", flat, Geometry.identity((12, 10)))
    assert evaluate(tmp_path / "p", tmp_path / "r").mean_dice == 1


def test_csv_reads_back_and_leaves_nothing_else_behind(folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "results" / "metrics.csv"
    result = evaluate(*folders, classes={1: "organ", 2: "vessel"}, out=out)
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["case", "class", "name", *SCORE_NAMES]
    assert len(rows) == len(result.rows)
    for read, row in zip(rows, result.rows, strict=True):
        assert (read["case"], read["class"], read["name"]) == (row.case, str(row.value), row.name)
        for name, value in row.scores.as_dict().items():
            assert float(read[name]) == pytest.approx(value, rel=1e-5)
    assert [p.name for p in out.parent.iterdir()] == ["metrics.csv"]


@pytest.mark.parametrize("name", ["=1+1", "+cmd", "-2", "@SUM(A1)"])
def test_a_name_that_a_spreadsheet_would_run_is_escaped(tmp_path: Path, name: str) -> None:
    for folder in ("p", "r"):
        save(tmp_path / folder, f"{name}.nii.gz", label_map())
    out = tmp_path / "metrics.csv"
    evaluate(tmp_path / "p", tmp_path / "r", classes={1: "=evil()"}, out=out)
    with out.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["case"], row["name"]) == (f"'{name}", "'=evil()")


def test_a_csv_that_cannot_be_written_leaves_the_old_file_alone(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "taken.csv").mkdir()
    with pytest.raises(UserError, match=r"taken\.csv: is a folder"):
        evaluate(*folders, out=tmp_path / "taken.csv", overwrite=True)
    for name in ("scores.txt", "scores"):
        with pytest.raises(UserError, match=rf"{name}: expected a name that ends in \.csv"):
            evaluate(*folders, out=tmp_path / name)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file: cannot be made a folder"):
        evaluate(*folders, out=tmp_path / "file" / "metrics.csv")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_table_that_is_there_is_not_replaced_unasked(folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "metrics.csv"
    out.write_text("mine")
    with pytest.raises(UserError, match=r"metrics\.csv exists already \(pass --overwrite"):
        evaluate(*folders, out=out)
    assert out.read_text() == "mine"
    evaluate(*folders, out=out, overwrite=True)
    assert out.read_text().startswith("case,class")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_as_dict_is_strict_json(folders: tuple[Path, Path]) -> None:
    save(folders[0], "case_1.nii.gz", label_map(second=False))
    save(folders[0], "stranger.nii.gz", label_map())
    save(folders[1], "other.nii.gz", label_map())
    stray = label_map()
    stray[0, 0, 0] = 7
    save(folders[0], "case_2.nii.gz", stray)
    result = evaluate(*folders, classes={1: "organ", 2: "vessel"})
    read = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert read["mean_dice"] == result.mean_dice
    assert read["cases"][1]["hd95_mm"] is None
    assert [s["name"] for s in read["summary"]] == ["organ", "vessel", "all classes"]
    assert read["summary"][1]["hd95_mm"] == {"mean": 0.0, "sd": None, "count": 1, "missing": 1}
    assert read["faults"][0]["case_id"] == "case_2"
    assert (read["not_referenced"], read["not_predicted"]) == (["stranger"], ["other"])


def test_table_shows_mean_and_deviation_per_class_and_over_all(folders: tuple[Path, Path]) -> None:
    text = printed(evaluate(*folders, classes={1: "[red]organ", 2: "vessel"}))
    organ = next(line for line in text.splitlines() if "organ" in line)
    assert "[red]organ" in organ  # a name is never markup
    assert "0.875 ± 0.177" in organ
    assert "0.5 ± 0.7" in organ  # 95HD in mm
    assert "all classes" in text
    assert "0.938 ± 0.088" in text


def test_table_of_one_class_and_one_case(folders: tuple[Path, Path]) -> None:
    (folders[0] / "case_2.nii.gz").unlink()
    save(folders[0], "case_1.nii.gz", label_map() * 0)
    text = printed(evaluate(*folders, classes={1: "organ"}))
    assert "all classes" not in text
    line = next(line for line in text.splitlines() if "organ" in line)
    assert "0.000 " in line
    assert "±" not in line
    assert "–" in line


@pytest.mark.realdata
def test_real_labels_agree_with_themselves(realdata: Path, tmp_path: Path) -> None:
    labels = sorted((realdata / "hippocampus" / "labelsTr").glob("*.nii.gz"))[:3]
    for path in labels:
        (tmp_path / path.name).symlink_to(path)
    result = evaluate(tmp_path, realdata / "hippocampus" / "labelsTr")
    assert result.mean_dice == 1
    assert list(result.classes) == [1, 2]
    assert len(result.not_predicted) > 100


def test_a_reference_that_states_no_spacing_is_measured_in_its_masks(tmp_path: Path) -> None:
    label = np.zeros((4, 8, 8), np.uint8)
    label[1:3, 2:6, 2:6] = 1
    for folder in ("masks", "labels"):
        (tmp_path / folder).mkdir()
    pages = [Image.fromarray(page) for page in label]
    pages[0].save(tmp_path / "labels" / "a.tif", save_all=True, append_images=pages[1:])
    moved = np.roll(label, 2, axis=2)
    write_label(tmp_path / "masks" / "a.tif", moved, Geometry.identity((8, 8, 4), (3.0, 3.0, 5.0)))
    (row,) = evaluate(tmp_path / "masks", tmp_path / "labels").rows
    assert row.scores.hd95_voxels == pytest.approx(2)
    assert row.scores.hd95_mm == pytest.approx(6)
