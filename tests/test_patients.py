"""Patients on the way from a folder to a split: what is said, what is written down, and who agrees on it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from blocks import TINY, write_case
from conftest import Command
from data.broken import dicom_series
from mlbseg.apps.bench.record import Setup
from mlbseg.apps.bench.request import BenchRequest
from mlbseg.apps.bench.setup import begin
from mlbseg.data.cases import find_cases
from mlbseg.data.splits import Split
from mlbseg.errors import UserError
from mlbseg.training.beginning import prepare_run
from mlbseg.training.request import TrainRequest


@pytest.fixture(scope="module")
def cardiac(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two frames each of six patients, as ACDC has them."""
    root = tmp_path_factory.mktemp("cardiac")
    for patient in range(6):
        for frame in (1, 9):
            name = f"patient{patient:03}_frame{frame:02}.nii.gz"
            write_case(root, name, 20 * patient + frame, labelled=patient < 4)
    return root


def sides(split: Split) -> list[set[str]]:
    parts = (split.test, split.validation, (*split.clean, *split.noisy, *split.unlabelled))
    return [{name.partition("_")[0] for name in part} for part in parts]


def prepared(data: Path, out: Path, **options: Any) -> str:
    printed = io.StringIO()
    request = TrainRequest(data, out, overrides=TINY, **{"test": 1, "validation": 1, **options})
    prepare_run(request, device=torch.device("cpu"), count=1, console=Console(file=printed, width=200))
    return printed.getvalue()


def test_check_says_what_was_recognised(cardiac: Path, command: Command) -> None:
    said = " ".join(command("check", cardiac).out.replace("│", " ").split())
    assert (
        "12 cases of 6 patients, by the ids' pattern patientN_frameN (--patient REGEX says otherwise" in said
    )
    record = command("check", cardiac, "--json").json["summary"]["patients"]
    assert (record["known"], record["count"], len(record["groups"])) == (True, 6, 6)
    other = command("check", cardiac, "--patient", r"frame(\d+)", "--json").json["summary"]["patients"]
    assert (other["count"], other["how"]) == (2, "by --patient")
    wrong = command("check", cardiac, "--patient", "(")
    assert (wrong.code, wrong.err.count("\n")) == (2, 1)


def test_a_run_keeps_patients_whole_and_writes_down_what_it_knew(cardiac: Path, tmp_path: Path) -> None:
    said = prepared(cardiac, tmp_path / "run")
    assert "patients: 12 cases of 6 patients, by the ids' pattern patientN_frameN (--patient" in said
    split = Split.read(tmp_path / "run" / "split.json")
    test, validation, trained = sides(split)
    assert (len(test), len(validation), len(trained)) == (1, 1, 4)
    assert not test & trained
    assert not (test | trained) & validation
    assert "patients kept whole: 12 cases of 6 patients" in split.rule
    record = json.loads((tmp_path / "run" / "data.json").read_text())["patients"]
    assert record["groups"][0] == ["patient000_frame01", "patient000_frame09"]
    # Told otherwise, each case is its own.
    prepared(cardiac, tmp_path / "own", patient="(.*)", test=3)
    assert len(Split.read(tmp_path / "own" / "split.json").test) == 3


def test_nothing_is_claimed_of_patients_that_are_unknown(scans: Path, tmp_path: Path) -> None:
    said = prepared(scans, tmp_path / "run")
    assert "patients: unknown: each case taken as its own (say them with --patient REGEX" in said
    rule = Split.read(tmp_path / "run" / "split.json").rule
    assert rule.endswith("patients unknown: each case taken as its own.")
    assert "kept whole" not in rule


def test_a_patient_id_is_in_no_file_of_a_run(tmp_path: Path) -> None:
    for number in range(4):
        tag = {"0010_0020": lambda _, n=number: f"SECRET{n % 3}"}
        dicom_series(tmp_path / "scans" / "images" / f"s{number}", **tag)
    from data.broken import mask, save

    for number in (0, 1):
        geometry = {"spacing": (0.8, 0.8, 2.5), "origin": (5, 7, 0)}
        save(tmp_path / "scans" / "labels" / f"s{number}.nii.gz", mask((6, 12, 14)), **geometry)
    said = prepared(tmp_path / "scans", tmp_path / "run", test=None, validation=0)
    assert "4 cases of 3 patients, by DICOM's PatientID" in said
    assert "SECRET" not in said
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or b"SECRET" not in path.read_bytes()


def asked(cardiac: Path, tmp_path: Path, patient: str | None = None) -> BenchRequest:
    return BenchRequest(
        cardiac, ["supervised"], budgets=[2], test=2, upper=False, patient=patient, overrides=TINY,
        cache=tmp_path / "cache",
    )  # fmt: skip


def test_the_cells_of_a_bench_agree_on_patients(cardiac: Path, tmp_path: Path) -> None:
    setup = begin(tmp_path / "b", asked(cardiac, tmp_path), torch.device("cpu"), None)
    assert "patients kept whole: 12 cases of 6 patients, by the ids' pattern" in setup.rule
    setup = Setup.read(tmp_path / "b")
    for cell in setup.cells:
        split = setup.split(cell, find_cases(cardiac))
        test, _, trained = sides(split)
        assert not test & trained
        assert split.test == setup.test
        assert "6 patients" in split.rule
    with pytest.raises(UserError, match=r"patients: found .* by --patient, expected .* by the ids' pattern"):
        begin(tmp_path / "b", asked(cardiac, tmp_path, "(.*)"), torch.device("cpu"), None)
    # The record of an earlier version names none, and goes on as it was begun.
    record = json.loads((tmp_path / "b" / "bench.json").read_text())
    del record["patients"]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "bench.json").write_text(json.dumps(record))
    assert Setup.read(tmp_path / "old").patients is None


@pytest.mark.slow
def test_the_command_takes_an_expression_and_resume_does_not(
    cardiac: Path, tmp_path: Path, command: Command
) -> None:
    settings = [v for text in (*TINY, "steps=2") for v in ("-o", text)]
    run = ["train", cardiac, "--out", tmp_path / "run", "--test", 1, "--no-report", *settings]
    done = command(*run, "--patient", r"(patient\d+)_")
    assert done.code == 0, done.err
    assert "patients: 12 cases of 6 patients, by --patient" in done.err
    assert len(Split.read(tmp_path / "run" / "split.json").test) == 2
    again = command("train", "--resume", tmp_path / "run", "--patient", "(x)")
    assert "--resume cannot change data or settings" in again.err
    assert "patient" in again.err
