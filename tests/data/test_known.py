"""Labels as people have them: where a label tells its class, from the user's words to the prepared grid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlbseg
from blocks import SIZE, TINY, blocks, save, write_blocks, write_case
from conftest import Command
from mlbseg.data.cases import LabelOptions, find_cases
from mlbseg.data.check import check
from mlbseg.data.fingerprint import fingerprint
from mlbseg.data.known import Slices, hidden, looks_sparse, mark_unknown, slices_of
from mlbseg.data.plan import make_plan
from mlbseg.data.preprocess import UNKNOWN, prepare_label
from mlbseg.data.readers import read_label
from mlbseg.errors import UserError
from mlbseg.evaluation import evaluate
from mlbseg.runs import Run
from mlbseg.types import ALL_KNOWN, NOT_KNOWN, Geometry, Known, Role


def every(label: np.ndarray, step: int, axis: int) -> np.ndarray:
    """Return a label of which every n-th slice along an axis is left."""
    index = np.arange(label.shape[axis]).reshape([-1 if a == axis else 1 for a in range(3)])
    return np.where(index % step == 3 % step, label, 0)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("step", [2, 4, 8])
def test_the_axis_of_drawn_slices_is_found(axis: int, step: int) -> None:
    label = every(blocks(0, (24, 24, 24))[1], step, axis)
    slices = slices_of(label)
    assert slices is not None
    drawn = label.any(axis=tuple(a for a in range(3) if a != axis))
    assert (slices.axis, slices.drawn, slices.total) == (axis, drawn.sum(), 24)
    assert looks_sparse(slices)
    marked = mark_unknown(label.astype(np.int32), Known(sparse=True))
    assert np.array_equal((marked == NOT_KNOWN).all(axis=tuple(a for a in range(3) if a != axis)), ~drawn)
    assert np.array_equal(marked[marked != NOT_KNOWN], label[marked != NOT_KNOWN])


def test_two_organs_apart_are_no_sign_of_drawn_slices() -> None:
    label = np.zeros((20, 20, 20), np.uint8)
    label[4:16, 5:15, 2:7] = label[4:16, 5:15, 12:18] = 1
    assert not looks_sparse(slices_of(label))
    label = every(label, 2, 0)
    assert looks_sparse(slices_of(label))
    assert slices_of(label) == Slices(0, 6, 20, True)


def test_whole_labels_and_pictures_show_no_slices() -> None:
    assert not looks_sparse(slices_of(blocks(0)[1]))
    assert slices_of(np.zeros(SIZE, np.uint8)) is None
    assert slices_of(np.ones((5, 5), np.uint8)) is None


def test_a_value_and_slices_may_both_be_unknown() -> None:
    label = every(blocks(0, (24, 24, 24))[1].astype(np.int32), 4, 0)
    label[label == 2] = 9
    marked = mark_unknown(label, Known(ignore=9, sparse=True))
    assert (marked[label == 9] == NOT_KNOWN).all()
    # A slice on which only that value stands is as one that was not drawn.
    assert set(np.unique(marked).tolist()) == {NOT_KNOWN, 0, 1}
    assert mark_unknown(label, ALL_KNOWN) is label


def test_a_list_says_it_of_single_cases(tmp_path: Path) -> None:
    write_blocks(tmp_path, count=5, labelled=5)
    (tmp_path / "cases.csv").write_text(
        "id,image,label,ignore,sparse,outside,classes\n"
        "a,images/case_0.nii.gz,labels/case_0.nii.gz,4,,,\n"
        "b,images/case_1.nii.gz,labels/case_1.nii.gz,,yes,,2\n"
        "c,images/case_2.nii.gz,labels/case_2.nii.gz,,no,unknown,1+2\n"
        "d,images/case_3.nii.gz,labels/case_3.nii.gz,,,background,\n"
    )
    found = find_cases(tmp_path / "cases.csv", LabelOptions(ignore=9))
    assert not found.faults
    assert [case.known for case in found.cases] == [
        Known(4), Known(9, sparse=True, classes=(2,)), Known(9, cropped=True, classes=(1, 2)), Known(9),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("ignore", "none", "ignore = 'none', expected a whole number"),
        ("sparse", "some", "sparse = 'some', expected yes or no"),
        ("outside", "maybe", "outside = 'maybe', expected unknown or background"),
        ("classes", "liver", "classes 'liver', expected values or names of classes"),
    ],
)
def test_what_a_list_cannot_mean_is_a_fault(column: str, value: str, message: str, tmp_path: Path) -> None:
    write_blocks(tmp_path, count=1, labelled=1)
    (tmp_path / "cases.csv").write_text(
        f"image,label,{column}\nimages/case_0.nii.gz,labels/case_0.nii.gz,{value}\n"
    )
    (fault,) = find_cases(tmp_path / "cases.csv").faults
    assert message in str(fault)


def test_a_file_beside_the_labels_says_which_classes_were_drawn(tmp_path: Path) -> None:
    for i in range(3):
        image, label = blocks(i)
        save(tmp_path / "imagesTr" / f"c{i}_0000.nii.gz", image)
        save(tmp_path / "labelsTr" / f"c{i}.nii.gz", np.where(label == 2, 2 if i else 0, label))
    labels = {"background": 0, "body": 1, "knob": 2}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels, "file_ending": ".nii.gz"}))
    (tmp_path / "classes.csv").write_text("id,classes\nc0,body\nc1,1 knob\n")
    found = find_cases(tmp_path)
    assert [case.known.classes for case in found.cases] == [(1,), (1, 2), None]
    assert [hidden(case.known, (0, 1, 2)) for case in found.cases] == [(2,), (), ()]
    assert not check(found).faults
    (tmp_path / "classes.csv").write_text("id,classes\nc1,body\nzz,body\nc2,brain\n")
    faults = check(find_cases(tmp_path)).faults
    assert {fault.case_id for fault in faults} == {"c1", "zz", "c2"}
    assert "label values {2}, expected {0, 1} as its classes say" in "\n".join(map(str, faults))
    assert "expected values or names of classes: background, body, knob" in "\n".join(map(str, faults))


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """Four scans of whose labels every 4th slice is drawn, and no other scan."""
    for i in range(4):
        image, label = blocks(i)
        save(tmp_path / "images" / f"c{i}.nii.gz", image)
        save(tmp_path / "labels" / f"c{i}.nii.gz", every(label, 4, 0).astype(np.uint8))
    return tmp_path


def test_check_asks_and_does_not_decide(sparse: Path, command: Command) -> None:
    done = command("check", sparse)
    assert done.code == 0
    assert "of 16 slices drawn" in done.err + done.out
    assert "--sparse" in done.err + done.out
    whole = check(find_cases(sparse))
    assert whole.summary["unknown"] == 0
    asked = check(find_cases(sparse, LabelOptions(sparse=True)))
    assert not [note for note in asked.warnings if note.kind == "sparse"]
    for case, entry in zip(find_cases(sparse).cases, asked.summary["per_case"], strict=True):
        assert case.label is not None
        label, _ = read_label(case.label)
        marked = mark_unknown(label, Known(sparse=True))
        values, counts = np.unique(marked[marked != NOT_KNOWN], return_counts=True)
        assert entry["labels"] == {str(v): n for v, n in zip(values.tolist(), counts.tolist(), strict=True)}
        assert entry["unknown"] == (marked == NOT_KNOWN).sum()
    facts = fingerprint(find_cases(sparse, LabelOptions(sparse=True)).cases)
    assert facts.partly_known == 4
    assert facts.extent() is None  # a slice does not show how large a structure is


def test_check_asks_about_a_value_that_fills_the_scans(tmp_path: Path) -> None:
    image, label = blocks(0)
    label[: SIZE[0] // 2 + 1] = 4
    save(tmp_path / "images" / "a.nii.gz", image)
    save(tmp_path / "labels" / "a.nii.gz", label)
    (note,) = [note for note in check(find_cases(tmp_path)).warnings if note.kind == "scribbles"]
    assert "say --ignore 4" in str(note)
    assert not [
        n for n in check(find_cases(tmp_path, LabelOptions(ignore=4))).warnings if n.kind == "scribbles"
    ]


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_on_a_coarser_grid_what_is_known_stays_known(factor: int, tmp_path: Path) -> None:
    write_case(tmp_path, "a.nii.gz", 0, labelled=True)
    plan = make_plan(fingerprint(find_cases(tmp_path).cases), memory_bytes=1 << 30)
    rng = np.random.default_rng(factor)
    side = 4 * factor
    label = np.full((side, side, side), NOT_KNOWN, np.int32)
    label[1::factor] = np.where(rng.random((len(label[1::factor]), side, side)) < 0.2, 1, NOT_KNOWN)
    label[2, 2] = 2
    native = Geometry.identity((side,) * 3)
    middle = (factor - 1) / 2
    grid = Geometry((4, 4, 4), (float(factor),) * 3, (middle,) * 3, native.direction)
    found = prepare_label(label, native, grid, plan)
    for place in np.ndindex(4, 4, 4):
        block = label[tuple(slice(factor * i, factor * (i + 1)) for i in place)]
        values = np.unique(block[block != NOT_KNOWN])
        if not len(values):
            assert found[place] == UNKNOWN
        else:
            assert found[place] in values


def test_references_that_are_known_in_places_are_scored_there(tmp_path: Path) -> None:
    label = blocks(0)[1]
    drawn = every(label, 4, 0)
    mask = label.copy()
    mask[np.arange(SIZE[0]) % 4 != 3] = 0  # wrong where nothing is known
    save(tmp_path / "masks" / "a.nii.gz", mask)
    save(tmp_path / "labels" / "a.nii.gz", drawn.astype(np.uint8))
    found = evaluate(tmp_path / "masks", tmp_path / "labels", sparse=True)
    assert found.mean_dice == 1
    assert found.unknown == {"a": int((~drawn.any(axis=(1, 2))).sum()) * SIZE[1] * SIZE[2]}
    save(tmp_path / "masks" / "a.nii.gz", label)
    assert evaluate(tmp_path / "masks", tmp_path / "labels", sparse=True).mean_dice == 1
    assert evaluate(tmp_path / "masks", tmp_path / "labels").mean_dice < 1


def test_a_case_is_scored_by_its_own_classes(tmp_path: Path) -> None:
    label = blocks(0)[1]
    save(tmp_path / "images" / "a.nii.gz", blocks(0)[0])
    save(tmp_path / "masks" / "a.nii.gz", label)
    save(tmp_path / "labels" / "a.nii.gz", np.where(label == 2, 2, 0).astype(np.uint8))
    (tmp_path / "classes.csv").write_text("id,classes\na,2\n")
    (case,) = find_cases(tmp_path).cases
    found = evaluate(tmp_path / "masks", {"a": case}, classes={1: "body", 2: "knob"})
    assert [(row.value, row.scores.dice) for row in found.rows] == [(2, 1.0)]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mlb", "mean-teacher"])
def test_labelled_scans_alone_are_enough_for_a_semi_supervised_method(
    method: str, sparse: Path, tmp_path: Path
) -> None:
    """The unknown voxels are the unlabelled data; a run knows how to read its labels ever after."""
    (sparse / "classes.csv").write_text("id,classes\nc1,1 2\n")
    options: dict[str, Any] = {"method": method, "overrides": [*TINY, "steps=6"], "device": "cpu"}
    with pytest.raises(UserError, match="every case is labelled"):
        mlbseg.train(sparse, tmp_path / "whole", **options)
    result = mlbseg.train(sparse, tmp_path / "run", sparse=True, validation=1, **options)
    run = Run.open(result.run)
    assert {case.known.sparse for case in run.find_cases().cases} == {True}
    assert run.plan.unlabelled_batch_size
    assert mlbseg.train(resume=result.run).steps == 6
    assert all(case.role is Role.CLEAN for case in run.find_cases().cases)
