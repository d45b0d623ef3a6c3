"""BIDS, and labels beside their scans."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.broken import mask, noise, save
from mlbseg.data.cases import Dataset, find_cases, find_scans
from mlbseg.data.check import check
from mlbseg.evaluation import evaluate
from mlbseg.types import Role


def files(dataset: Dataset) -> dict[str, tuple[list[str], str | None]]:
    return {
        case.id: ([path.name for path in case.images], None if case.label is None else case.label.name)
        for case in dataset.cases
    }


def bids(root: Path, name: str, *, seed: int = 0, label: str | None = None, kind: str = "T1w") -> None:
    """Write a scan, and its label under the derivatives."""
    folder = Path(*(part for part in name.split("_") if part.startswith(("sub-", "ses-"))), "anat")
    save(root / folder / f"{name}_{kind}.nii.gz", noise(seed))
    if label is not None:
        save(root / "derivatives" / "manual" / folder / f"{name}_{label}.nii.gz", mask())


def test_bids_with_sessions_and_derivatives(tmp_path: Path) -> None:
    bids(tmp_path, "sub-01_ses-1", label="desc-manual_dseg")
    bids(tmp_path, "sub-01_ses-2", seed=1)
    bids(tmp_path, "sub-02_ses-1", seed=2, label="space-orig_label-organ_mask")
    (tmp_path / "dataset_description.json").write_text("{}")
    (tmp_path / "derivatives" / "manual" / "dseg.tsv").write_text("index\tname\n1\tatrium\n2\tventricle\n")
    dataset = find_cases(tmp_path)
    assert (dataset.layout, dataset.faults) == ("BIDS", ())
    assert files(dataset) == {
        "sub-01_ses-1": (["sub-01_ses-1_T1w.nii.gz"], "sub-01_ses-1_desc-manual_dseg.nii.gz"),
        "sub-01_ses-2": (["sub-01_ses-2_T1w.nii.gz"], None),
        "sub-02_ses-1": (["sub-02_ses-1_T1w.nii.gz"], "sub-02_ses-1_space-orig_label-organ_mask.nii.gz"),
    }
    assert dataset.class_names == {0: "background", 1: "atrium", 2: "ventricle"}
    assert check(dataset).faults == ()


def test_kinds_of_images_are_channels(tmp_path: Path) -> None:
    for subject in ("sub-01", "sub-02"):
        for kind in ("T1w", "FLAIR"):
            bids(tmp_path, subject, kind=kind, label="dseg" if (subject, kind) == ("sub-01", "T1w") else None)
    dataset = find_cases(tmp_path)
    assert files(dataset)["sub-02"] == (["sub-02_FLAIR.nii.gz", "sub-02_T1w.nii.gz"], None)
    assert "FLAIR, T1w are the channels of each case" in str(dataset.warnings[0])
    bids(tmp_path, "sub-03", kind="T1w")
    (fault,) = find_cases(tmp_path).faults
    assert (fault.case_id, fault.kind) == ("sub-03", "channels")
    assert "no FLAIR" in str(fault)


@pytest.mark.parametrize(
    ("spoil", "kind", "words"),
    [
        (lambda root: bids(root, "sub-01", label="desc-other_dseg"), "duplicate", "2 labels"),
        (
            lambda root: save(root / "derivatives/x/sub-09/anat" / "sub-09_dseg.nii.gz", mask()),
            "orphan",
            "a label without an image",
        ),
        (
            lambda root: (root / "derivatives/manual/dseg.tsv").write_text("index\tname\nx\ty\n"),
            None,
            "cannot be used",
        ),
    ],
)
def test_what_is_wrong_in_bids_is_named(spoil, kind, words, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    bids(tmp_path, "sub-01", label="dseg")
    spoil(tmp_path)
    (fault,) = find_cases(tmp_path).faults
    assert fault.kind == kind or kind is None
    assert words in str(fault)


def test_a_label_whose_name_is_not_understood_is_a_fault(tmp_path: Path) -> None:
    bids(tmp_path, "sub-01", label="dseg")
    bids(tmp_path, "sub-02", seed=1, label="T1w_dseg")
    save(tmp_path / "derivatives" / "sub-01" / "anat" / "sub-01_desc-brain_T1w.nii.gz", noise(2))
    dataset = find_cases(tmp_path)
    (fault,) = dataset.faults
    assert (fault.where, fault.kind) == ("sub-02_T1w_dseg.nii.gz", "id")
    assert [note.where for note in dataset.warnings] == ["sub-01_desc-brain_T1w.nii.gz"]


def test_a_label_beside_its_scan_is_no_channel_whatever_its_name(tmp_path: Path) -> None:
    for subject in ("sub-seg1", "sub-02"):
        bids(tmp_path, subject, label="dseg")
        save(tmp_path / subject / "anat" / f"{subject}_label-GM_probseg.nii.gz", noise(3))
        save(
            tmp_path / "derivatives" / "prep" / subject / "anat" / f"{subject}_label-GM_probseg.nii.gz",
            noise(3),
        )
    dataset = find_cases(tmp_path)
    assert (dataset.faults, [len(case.images) for case in dataset.cases]) == ((), [1, 1])
    for name in ("sub-02_seg", "sub-02_T1w_mask"):
        save(tmp_path / "sub-02" / "anat" / f"{name}.nii.gz", mask())
    assert sorted(fault.where for fault in find_cases(tmp_path).faults) == [
        "sub-02_T1w_mask.nii.gz",
        "sub-02_seg.nii.gz",
    ]


def test_what_is_derived_or_not_named_as_bids_names_is_passed_over(tmp_path: Path) -> None:
    bids(tmp_path, "sub-01", label="dseg")
    save(tmp_path / "sub-01" / "anat" / "sub-01_desc-brain_T1w.nii.gz", noise(1))
    save(tmp_path / "sub-01" / "anat" / "copy of T1.nii.gz", noise(1))
    dataset = find_cases(tmp_path)
    assert list(files(dataset)) == ["sub-01"]
    assert {fault.where for fault in dataset.warnings} == {
        "copy of T1.nii.gz",
        "sub-01_desc-brain_T1w.nii.gz",
    }
    assert [case.id for case in find_scans(tmp_path).cases] == ["sub-01"]


@pytest.mark.parametrize("ending", ["_seg", "_label", "_mask", "_gt"])
def test_labels_beside_their_scans(ending: str, tmp_path: Path) -> None:
    for number, labelled in enumerate((True, True, False)):
        save(tmp_path / f"scan{number}.nii.gz", noise(number))
        if labelled:
            save(tmp_path / f"scan{number}{ending}.nii.gz", mask())
    dataset = find_cases(tmp_path)
    assert dataset.layout == f"NAME + NAME{ending}"
    assert files(dataset) == {
        "scan0": (["scan0.nii.gz"], f"scan0{ending}.nii.gz"),
        "scan1": (["scan1.nii.gz"], f"scan1{ending}.nii.gz"),
        "scan2": (["scan2.nii.gz"], None),
    }
    assert (dataset.faults, check(dataset).faults) == ((), ())
    assert [case.id for case in find_scans(tmp_path).cases] == ["scan0", "scan1", "scan2"]
    masks = tmp_path / "masks"
    for number in range(2):
        save(masks / f"scan{number}.nii.gz", mask())
    assert evaluate(masks, tmp_path).mean_dice == 1


def test_two_kinds_of_labels_beside_scans_are_a_fault(tmp_path: Path) -> None:
    save(tmp_path / "a.nii.gz", noise(0))
    save(tmp_path / "a_seg.nii.gz", mask())
    save(tmp_path / "a_mask.nii.gz", mask())
    dataset = find_cases(tmp_path)
    assert [(fault.case_id, fault.kind) for fault in dataset.faults] == [("a", "duplicate")]
    assert "a label of a second kind, beside _seg" in str(dataset.faults[0])


def test_a_label_in_a_format_that_is_not_read_is_a_fault(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(tmp_path / f"{name}.nii.gz", noise(0))
    save(tmp_path / "a_seg.nii.gz", mask())
    (tmp_path / "b_seg.mgz").write_bytes(b"x")
    assert [(fault.case_id, fault.kind) for fault in find_cases(tmp_path).faults] == [("b", "format")]


def test_scans_whose_names_end_like_labels_are_scans(tmp_path: Path) -> None:
    for name in ("a_mask", "b_mask"):
        save(tmp_path / f"{name}.nii.gz", noise(0))
    assert [case.id for case in find_scans(tmp_path).cases] == ["a_mask", "b_mask"]
    assert all(case.role is Role.UNLABELLED for case in find_scans(tmp_path).cases)
