"""Which cases are of one patient: what is recognised, what is not, and what is said about it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from data.broken import dicom_series, healthy, mask, save
from mlbseg.data.cases import Dataset, find_cases, with_patients
from mlbseg.data.patients import Patients, find_patients
from mlbseg.data.splits import make_split
from mlbseg.errors import UserError
from mlbseg.types import Case


def found(*ids: str, pattern: str | None = None) -> Patients:
    return find_patients([Case(name, (Path(f"{name}.nii.gz"),)) for name in ids], pattern)


FORMS: dict[str, tuple[list[list[str]], str]] = {
    "ACDC": (
        [["patient007_frame01", "patient007_frame07"], ["patient010_frame01", "patient010_frame13"]],
        "patientN_frameN",
    ),
    "HC18": ([["010_2HC", "010_3HC", "010_HC"], ["011_HC"], ["014_2HC", "014_HC"]], "NNN_kHC"),
    "BIDS": (
        [["sub-01_ses-1_T1w", "sub-01_ses-2_T1w"], ["sub-02_ses-1_T1w"], ["sub-A7_T2w"]],
        "sub-X_…",
    ),
    "BIDS, many runs": (
        [[f"sub-{s}_run-{i}_bold" for i in range(1, 9)] for s in ("anna", "ben")],
        "sub-X_…",
    ),
    "subjects": ([["subject_1_pre", "subject_1_post"], ["subject_2_pre"], ["subject_12_pre"]], "patientN_…"),
    "BraTS": ([["BraTS-GLI-00005-000", "BraTS-GLI-00005-001"], ["BraTS-GLI-00006-000"]], "BraTS-X-N-N"),
    "OASIS": ([["OAS1_0001_MR1", "OAS1_0001_MR2"], ["OAS1_0002_MR1"]], "OASN_N_MRN"),
    "ADNI": ([["002_S_0295_m06", "002_S_0295_m12"], ["002_S_0413_m06"]], "N_S_N"),
    "phases": ([["A0S9V9_ED", "A0S9V9_ES"], ["B3T0X1_ED", "B3T0X1_ES"]], "_ED, _ES"),
    "sequences": ([["p1_T1", "p1_T2", "p1_flair"], ["p2_T1", "p2_T2", "p2_flair"]], "_TN, _flair"),
    "visits": ([["12_visit1", "12_visit2"], ["13_visit1"]], "_visitN"),
    "sessions": ([["12_ses-1", "12_ses-2"], ["13_ses-1"]], "_ses-N"),
    "times": ([["a_t0", "a_t1"], ["b_t0", "b_t1"]], "_tN"),
    "follow-up": (
        [["anna_baseline", "anna_followup"], ["ben_baseline", "ben_followup2"]],
        "_baseline, _foll",
    ),
    "the first has no ending": ([["007", "007_followup"], ["008"], ["009"]], "_followup"),
    "several endings": ([["p1_visit1_T1", "p1_visit2_T1", "p1_visit2_T2"], ["p2_visit1_T1"]], "_TN, _visitN"),
    "slices": ([[f"case{c:04}_slice_{i}" for i in range(30)] for c in range(3)], "_slice_N"),
    "case does not count": ([["Sub-01_ses-1", "sub-01_ses-2"], ["sub-02_ses-1"]], "sub-X_…"),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_that_name_patients_are_recognised(name: str) -> None:
    groups, shown = FORMS[name]
    ids = [name for group in groups for name in group]
    patients = found(*ids[::-1])
    assert patients.known
    assert patients.groups == tuple(sorted(tuple(sorted(group)) for group in groups if len(group) > 1))
    assert patients.count == len(groups)
    assert str(patients).startswith(f"{len(ids)} cases of {len(groups)} patients, by the ids' ")
    assert shown in str(patients)
    assert "--patient" in patients.advice


@pytest.mark.parametrize(
    "ids",
    [
        [f"case_{i:02}" for i in range(1, 30)],
        [f"hippocampus_{i:03}" for i in range(1, 9)],
        ["06SR5RBREL16DQ6M8LWS", "0RPELLU007I4OC62NQQF", "1D7CUD1955YZPGK8XHJX"],
        [f"Case{i:02}" for i in range(5)],
        [f"{i:03}" for i in range(5)],
        [f"case_t{i}" for i in range(1, 20)],  # all of one `patient`: a study
        [f"lung_v{i}" for i in range(30)] + [f"liver_v{i}" for i in range(30)],
        [f"set1_t{i}" for i in range(30)] + [f"set2_t{i}" for i in range(30)],
        [f"subject_2023_{i:02}" for i in range(1, 9)],
        [f"subject_2022_{i:02}" for i in range(30)] + [f"subject_2023_{i:02}" for i in range(30)],
        ["001_T1", "002_T1", "003_T1"],
        ["scan_l", "scan_r"],
        ["la_12_3", "la_12_4"],
        ["t1", "t2", "ed", "es"],
        ["only"],
        [],
    ],
    ids=lambda ids: ids[0] if ids else "none",
)
def test_ids_that_name_no_patient_join_nothing(ids: list[str]) -> None:
    patients = found(*ids)
    assert (patients.known, patients.groups, patients.count) == (False, (), len(ids))
    assert str(patients) == "unknown: each case taken as its own"
    assert "--patient REGEX" in patients.advice


def test_cases_beside_a_form_are_counted_as_their_own() -> None:
    patients = found("sub-1_ses-1", "sub-1_ses-2", "sub-2_ses-1", "phantom")
    assert patients.groups == (("sub-1_ses-1", "sub-1_ses-2"),)
    assert str(patients).endswith("by the ids' pattern sub-X_…; 1 without one taken as its own")
    assert not found("sub-1_a", "x1", "x2", "x3").known


def test_an_expression_of_the_users_counts_before_all_else() -> None:
    ids = ("patient1_frame1", "patient1_frame2", "patient2_frame1")
    other = found(*ids, pattern=r"_frame(\d)")
    assert other.groups == (("patient1_frame1", "patient2_frame1"),)
    assert str(other) == "3 cases of 2 patients, by --patient"
    assert found(*ids, pattern="(.*)").groups == ()
    assert found(*ids, pattern="(.*)").known


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("patient[", "no regular expression"),
        (r"patient\d+", "no group"),
        (r"(patient1)_", r"finds no patient in 1 of 2 case ids, such as patient2_b"),
        ("(x?)", "finds no patient in 2 of 2"),
        ("(a{99999999999})", "no regular expression"),
    ],
)
def test_an_expression_that_does_not_fit_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(UserError, match="--patient") as caught:
        found("patient1_a", "patient2_b", pattern=pattern)
    assert message in str(caught.value)


def listed(tmp_path: Path, *rows: str) -> Dataset:
    healthy(tmp_path)
    (tmp_path / "cases.csv").write_text("\n".join(["id,image,label,patient", *rows]))
    return with_patients(find_cases(tmp_path / "cases.csv"))


def test_a_lists_column_counts_before_ids(tmp_path: Path) -> None:
    dataset = listed(
        tmp_path,
        "sub-1_ses-1,images/a.nii.gz,labels/a.nii.gz,X",
        "sub-1_ses-2,images/b.nii.gz,labels/b.nii.gz,Y",
        "sub-2_ses-1,images/c.nii.gz,,X",
        "sub-3,images/d.nii.gz,,",
    )
    assert dataset.patients is not None
    assert dataset.patients.groups == (("sub-1_ses-1", "sub-2_ses-1"),)
    said = "4 cases of 3 patients, by the list's column patient; 1 without one taken as its own"
    assert str(dataset.patients) == said
    # A patient who is called like another's case is not that one.
    own = listed(tmp_path / "own", "a,images/a.nii.gz,,b", "b,images/b.nii.gz,,c")
    assert [case.patient for case in own.cases] == ["a", "b"]


def dicom_set(root: Path, patient_ids: dict[str, Any]) -> Dataset:
    for name, patient in patient_ids.items():
        dicom_series(root / "images" / name, 2, **{"0010_0020": lambda _, p=patient: p})
    return find_cases(root)


def test_dicoms_patient_id_joins_and_is_written_nowhere(tmp_path: Path) -> None:
    ids = {"a": "SECRET^1", "b": "SECRET^2", "c": "SECRET^1", "d": "", "e": "ANONYMOUS"}
    dataset = with_patients(dicom_set(tmp_path, ids))
    assert dataset.patients is not None
    assert dataset.patients.groups == (("a", "c"),)
    assert "by DICOM's PatientID" in str(dataset.patients)
    assert "SECRET" not in repr(dataset)


def test_a_patient_id_that_all_have_says_nothing(tmp_path: Path) -> None:
    dataset = with_patients(dicom_set(tmp_path, {"a": "STUDY7", "b": "STUDY7", "c": "STUDY7"}))
    assert dataset.patients is not None
    assert not dataset.patients.known
    assert "is the same in all" in str(dataset.patients)
    assert "STUDY7" not in str(dataset.patients)


def test_no_patient_is_on_two_sides_and_the_rule_says_what_was_known() -> None:
    cases = [Case(f"patient{p:03}_frame{f:02}", (Path("x"),), Path("y")) for p in range(10) for f in (1, 9)]
    cases = [case.with_role(case.role.CLEAN) for case in cases]
    patients = find_patients(cases)
    for seed in range(5):
        split = make_split(
            patients.join(cases), test=3, validation=2, labelled=6, seed=seed, patients=patients
        )
        sides = [split.test, split.validation, (*split.clean, *split.unlabelled)]
        named = [{name.partition("_")[0] for name in side} for side in sides]
        assert sum(map(len, named)) == len(set().union(*named)) == 10
    assert "patients kept whole: 20 cases of 10 patients, by the ids' pattern patientN_frameN." in split.rule
    unknown = [Case(f"c{i}", (Path("x"),), Path("y")).with_role(cases[0].role) for i in range(4)]
    rule = make_split(unknown, test=1, patients=find_patients(unknown)).rule
    assert rule.endswith("patients unknown: each case taken as its own.")
    assert make_split(unknown, test=1).rule.endswith("patients unknown: each case taken as its own.")


@pytest.mark.realdata
def test_real_sets_have_their_patients(realdata: Path) -> None:
    acdc = with_patients(find_cases(realdata / "acdc")).patients
    assert acdc is not None
    assert (acdc.cases, acdc.count, acdc.known) == (100, 50, True)
    fetal = with_patients(find_cases(realdata / "fetal"))
    with (realdata / "fetal" / "patients.csv").open(newline="") as file:
        truth = {row["id"]: row["patient"] for row in csv.DictReader(file)}
    ours = {case.id: case.patient for case in fetal.cases}
    assert ours.keys() == truth.keys()
    pairs = {(ours[a] == ours[b], truth[a] == truth[b]) for a in truth for b in truth}
    assert pairs == {(True, True), (False, False)}
    for name in ("hippocampus", "la"):
        patients = with_patients(find_cases(realdata / name)).patients
        assert patients is not None
        assert not patients.known


def test_one_image_under_two_ids_is_a_fault_that_training_meets(tmp_path: Path) -> None:
    healthy(tmp_path)
    save(tmp_path / "labels" / "e.nii.gz", mask())
    (tmp_path / "images" / "e.nii.gz").write_bytes((tmp_path / "images" / "a.nii.gz").read_bytes())
    from mlbseg import train

    with pytest.raises(UserError, match="e: the same image as a"):
        train(tmp_path, tmp_path / "run", test=["e"], method="supervised", device="cpu")
    assert not (tmp_path / "run").exists()
