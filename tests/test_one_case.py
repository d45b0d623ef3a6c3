"""A reader that fails, in whatever way, costs the scan that it was reading and no other: in every command."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydicom.errors import InvalidDicomError

from blocks import blocks, save, write_case
from data.dicom_files import companions
from export.seg_series import write_series
from mlbseg.apps.audit import audit
from mlbseg.apps.export import export
from mlbseg.apps.report.scoring import predict_cases
from mlbseg.apps.suggest import suggest
from mlbseg.data import readers
from mlbseg.data.cases import find_cases, find_scans
from mlbseg.data.check import check
from mlbseg.data.readers import read_label, read_scan, stem
from mlbseg.errors import Fault, ReadError, UserError, one_case
from mlbseg.evaluation import evaluate
from mlbseg.inference import Model, predict
from mlbseg.runs import Run

Errors = dict[str, tuple[BaseException, str]]
ERRORS: Errors = {
    "runtime": (RuntimeError("ITK said no"), "reading failed with RuntimeError: ITK said no"),
    "value": (ValueError("two\nlines"), "reading failed with ValueError: two lines"),
    "os": (OSError(5, "Input/output error"), r"cannot be opened .Input/output error."),
    "memory": (MemoryError(), "not enough memory for this scan"),
    "key": (KeyError("tag"), "reading failed with KeyError: 'tag'"),
    "dicom": (InvalidDicomError("no preamble"), "reading failed with InvalidDicomError: no preamble"),
    "struct": (struct.error("unpack requires 4 bytes"), "reading failed with error: unpack requires"),
    "recursion": (RecursionError("deep"), "reading failed with RecursionError: deep"),
}
"""Name of a case -> what its reader raises, and what is said of it."""


@pytest.fixture
def scans_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two scans that are read and one for each error, all labelled."""
    for seed, name in enumerate(["fine", "good", *ERRORS]):
        write_case(tmp_path, f"{name}.nii.gz", 30 + seed, labelled=True)
    break_readers(monkeypatch)
    return tmp_path


def break_readers(monkeypatch: pytest.MonkeyPatch, errors: Errors = ERRORS) -> None:
    healthy = readers._open

    def failing(path: Path, **options: Any) -> Any:
        if stem(path) in errors:
            raise errors[stem(path)][0]
        return healthy(path, **options)

    monkeypatch.setattr(readers, "_open", failing)


def assert_each_is_named(faults: Iterable[Fault], errors: Errors = ERRORS) -> None:
    told: dict[str, set[str]] = {}
    for fault in faults:
        told.setdefault(fault.case_id or "", set()).add(str(fault))
    assert set(told) == set(errors)
    for name, (_, words) in errors.items():
        for line in told[name]:
            assert name in line
            assert re.search(words, line), line


def test_reading_raises_read_errors_only(scans_that_fail: Path) -> None:
    for name, (_, words) in ERRORS.items():
        for look in (
            lambda name=name: read_scan([scans_that_fail / "images" / f"{name}.nii.gz"]),
            lambda name=name: read_label(scans_that_fail / "labels" / f"{name}.nii.gz"),
        ):
            with pytest.raises(ReadError, match=words):
                look()


def test_what_is_no_reading_is_no_fault_of_a_scan() -> None:
    faults: list[Fault] = []
    for error in (ValueError("ours"), KeyError("ours"), RuntimeError("ours")):
        with pytest.raises(type(error), match="ours"), one_case("a", faults, "predict"):
            raise error
    for error in (UserError("theirs"), OSError(28, "No space left"), MemoryError(), torch.OutOfMemoryError()):
        with one_case("a", faults, "predict"):
            raise error
    assert [fault.found for fault in faults] == [
        "theirs",
        "[Errno 28] No space left",
        "not enough memory for this scan",
        "not enough memory for this scan",
    ]


def test_check(scans_that_fail: Path) -> None:
    result = check(find_cases(scans_that_fail))
    assert_each_is_named(result.faults)
    assert len(result.faults) == 2 * len(ERRORS)  # the image and the label


def test_evaluate(scans_that_fail: Path) -> None:
    result = evaluate(scans_that_fail / "labels", scans_that_fail / "labels")
    assert set(result.cases) == {"fine", "good"}
    assert_each_is_named(result.faults)


@pytest.mark.slow
def test_predict(scans_that_fail: Path, supervised_run: Path) -> None:
    result = predict(supervised_run, scans_that_fail, scans_that_fail / "masks", device="cpu")
    assert set(result.masks) == {"fine", "good"}
    assert_each_is_named(result.faults)


@pytest.mark.slow
def test_what_reading_has_left_out_is_told(supervised_run: Path, tmp_path: Path) -> None:
    write_series(tmp_path / "scans" / "one", blocks(3)[0].round())
    write_series(tmp_path / "scans" / "two", blocks(4)[0].round())
    companions(tmp_path / "scans" / "one")
    result = predict(supervised_run, tmp_path / "scans", tmp_path / "masks", device="cpu")
    assert set(result.masks) == {"one", "two"}
    assert [note.case_id for note in result.notes] == ["one"]
    assert "passed over, as no slice: DOSE.dcm (dose)" in result.notes[0].found


@pytest.mark.slow
def test_report(scans_that_fail: Path, supervised_run: Path) -> None:
    run = Run.open(supervised_run)
    out = scans_that_fail / "masks"
    out.mkdir()
    cases = find_scans(scans_that_fail).cases
    masks, faults = predict_cases(Model([run], torch.device("cpu")), cases, out)
    assert set(masks) == {"fine", "good"}
    assert_each_is_named(faults)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["regional", "confident"])
def test_audit(way: str, scans_that_fail: Path, supervised_run: Path) -> None:
    options = {"scans": scans_that_fail, "way": way, "device": "cpu"}
    result = audit(supervised_run, scans_that_fail / "labels", scans_that_fail / "audit", **options)  # type: ignore[arg-type]
    assert {one.case for one in result.cases} == {"fine", "good"}
    assert_each_is_named(result.faults)


@pytest.mark.slow
def test_suggest(scans_that_fail: Path, supervised_run: Path) -> None:
    result = suggest(supervised_run, scans=scans_that_fail, device="cpu")
    assert {one.case for one in result.suggested} == {"fine", "good"}
    assert_each_is_named(result.faults)


@pytest.mark.slow
def test_export_to_nnunet(supervised_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"case_{k}" for k in (1, 2, 4, 5, 6, 7)]
    errors = dict(zip(names, ERRORS.values(), strict=False))
    break_readers(monkeypatch, errors)
    done = export(supervised_run, tmp_path / "raw", "nnunet", device="cpu")
    assert_each_is_named(done.faults, errors)
    assert [path.name for path in (tmp_path / "raw").glob("*/labelsTr/*")] == ["case_0.nii.gz"]


@pytest.mark.slow
def test_export_to_dicom_seg(supervised_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, name in enumerate(["fine", *ERRORS]):
        write_series(tmp_path / "scans" / name, blocks(seed)[0].round())
    break_readers(monkeypatch)
    done = export(supervised_run, tmp_path / "seg", "dicom-seg", scans=tmp_path / "scans", device="cpu")
    assert [path.name for path in done.files] == ["fine.dcm"]
    assert_each_is_named(done.faults)


def test_the_fault_of_another_place_is_told_as_it_is(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", np.zeros((4, 5, 6), np.float32))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ReadError) as caught:
        read_scan([path])
    assert "reading failed" not in str(caught.value)
