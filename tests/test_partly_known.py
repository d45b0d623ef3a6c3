"""Labels that leave voxels open (nnU-Net's *ignore*), and labels that are empty on purpose, through every command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - as its documentation does

import mlbseg
from blocks import SIZE, TINY, UNCHANGED, blocks, save, write_case
from conftest import Command
from mlbseg.apps.audit import audit
from mlbseg.apps.audit.trust import WAYS
from mlbseg.apps.export import export
from mlbseg.apps.report import report
from mlbseg.data.augment import Augment
from mlbseg.data.batches import StepDataset
from mlbseg.data.cache import Cache
from mlbseg.data.cases import find_cases
from mlbseg.data.check import check
from mlbseg.data.fingerprint import fingerprint
from mlbseg.data.known import mark_unknown
from mlbseg.data.plan import make_plan
from mlbseg.data.preprocess import UNKNOWN, prepare_label
from mlbseg.data.structures import structures
from mlbseg.errors import UserError
from mlbseg.evaluation import evaluate
from mlbseg.types import IGNORE, UNLABELLED, Geometry, Known, Role

IGNORE_VALUE = 3
OPEN = (slice(None), slice(0, 6))
"""The slab of each label that is left open; it holds voxels of both blocks."""
OPEN_VOXELS = SIZE[0] * 6 * SIZE[2]


def write_nnunet(root: Path, count: int = 6, *, spoilt: bool = True) -> Path:
    """Write an nnU-Net data set whose labels are wrong (`spoilt`) or right in a slab that is said to be open."""
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    for i in range(count):
        image, label = blocks(i)
        save(root / "imagesTr" / f"case_{i}_0000.nii.gz", image)
        if i < 4:
            if spoilt:
                label[OPEN] = IGNORE_VALUE
            save(root / "labelsTr" / f"case_{i}.nii.gz", label)
    labels = {"background": 0, "body": 1, "knob": 2, "ignore": IGNORE_VALUE}
    (root / "dataset.json").write_text(
        json.dumps({"channel_names": {"0": "MRI"}, "labels": labels, "file_ending": ".nii.gz"})
    )
    return root


def values(path: Path) -> set[int]:
    return set(np.unique(sitk.GetArrayFromImage(sitk.ReadImage(str(path)))).tolist())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_nnunet(tmp_path_factory.mktemp("open") / "data")


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    out = data.parent / "run"
    mlbseg.train(data, out, method="supervised", test=["case_3"], overrides=[*TINY, "steps=40"], device="cpu")
    return out


def test_the_value_is_no_class_anywhere(data: Path) -> None:
    dataset = find_cases(data)
    assert dataset.class_names == {0: "background", 1: "body", 2: "knob"}
    assert {case.known.ignore for case in dataset.cases} == {IGNORE_VALUE}
    result = check(dataset)
    assert not result.faults
    assert result.summary["labels"].keys() == {"0", "1", "2"}
    assert result.summary["unknown"] == 4
    image, label = blocks(0)
    assert result.summary["per_case"][0]["unknown"] == OPEN_VOXELS
    facts = fingerprint(dataset.cases)
    assert facts.label_values() == (0, 1, 2)
    label[OPEN] = 0
    drawn = structures(label.astype(np.int32), Geometry.identity(SIZE[::-1]))
    assert facts.cases[0].structures == drawn
    assert [structure.value for structure in drawn] == [1, 2]
    known = image[: label.shape[0], 6:][label[:, 6:] > 0]
    assert facts.cases[0].foreground[0] is not None
    assert facts.cases[0].foreground[0].mean == pytest.approx(float(known.mean()))


def test_a_label_that_is_open_everywhere_is_a_fault(tmp_path: Path) -> None:
    root = write_nnunet(tmp_path / "d")
    save(root / "labelsTr" / "case_1.nii.gz", np.full(blocks(1)[1].shape, IGNORE_VALUE, np.uint8))
    (fault,) = check(find_cases(root)).faults
    assert (fault.case_id, fault.kind) == ("case_1", "all-unknown")


@pytest.mark.parametrize("value", ["3", None, [3], 1.5])
def test_what_is_called_ignore_must_be_one_value(value: object, tmp_path: Path) -> None:
    root = write_nnunet(tmp_path / "d")
    record = json.loads((root / "dataset.json").read_text())
    record["labels"]["ignore"] = value
    (root / "dataset.json").write_text(json.dumps(record))
    found = find_cases(root)
    assert "ignore" in str(found.faults)


def test_a_description_in_the_decathlons_way_may_name_it_too(tmp_path: Path) -> None:
    root = write_nnunet(tmp_path / "d")
    record = json.loads((root / "dataset.json").read_text())
    record["labels"] = {str(value): name for name, value in record["labels"].items()}
    (root / "dataset.json").write_text(json.dumps(record))
    found = find_cases(root)
    assert found.class_names == {0: "background", 1: "body", 2: "knob"}
    assert found.cases[0].known.ignore == IGNORE_VALUE


def test_resampling_keeps_open_voxels_apart(data: Path) -> None:
    plan = make_plan(fingerprint(find_cases(data).cases), memory_bytes=1 << 30)
    label = np.zeros((8, 8, 8), np.int32)
    label[:4], label[4:, 4:] = 1, IGNORE_VALUE
    lattice = Geometry.identity((8, 8, 8))
    marked = mark_unknown(label, Known(ignore=IGNORE_VALUE))
    same = prepare_label(marked, lattice, lattice, plan)
    assert np.array_equal(same, np.where(label == IGNORE_VALUE, UNKNOWN, label))
    fine = Geometry.identity((16, 16, 16), (0.5, 0.5, 0.5))
    assert set(np.unique(prepare_label(marked, lattice, fine, plan))) == {0, 1, UNKNOWN}
    with pytest.raises(UserError, match=r"label values \[3\]"):
        prepare_label(label, lattice, lattice, plan)


def test_careful_open_voxels_are_not_learnt_and_noisy_ones_are_as_unlabelled(
    data: Path, tmp_path: Path
) -> None:
    cases = find_cases(data).cases
    plan = make_plan(fingerprint(cases), memory_bytes=1 << 30)
    steps = StepDataset(
        Cache(tmp_path, plan), cases[:1], [cases[1].with_role(Role.NOISY)], initial_labels={},
        patch_size=SIZE, batch_size=1, unlabelled_batch_size=1, steps=1, seed=0, stage=1, foreground=0.0,
        augment=Augment.make(3, **UNCHANGED),
    )  # fmt: skip
    batch = steps[0]
    assert batch.initial_label is not None
    assert batch.inside is not None
    assert batch.inside.all()
    for label, value in ((batch.clean_label, IGNORE), (batch.initial_label, UNLABELLED)):
        assert set(label.unique().tolist()) == {value, 0, 1, 2}
        assert int((label == value).sum()) == OPEN_VOXELS


@pytest.mark.slow
def test_training_does_not_see_what_stands_in_open_voxels(data: Path, run: Path, tmp_path: Path) -> None:
    """Whatever value stands for open, and whatever the truth is there: the same weights, bit for bit."""
    other = tmp_path / "other"
    shutil.copytree(data, other)
    record = json.loads((other / "dataset.json").read_text())
    record["labels"]["ignore"] = 7
    (other / "dataset.json").write_text(json.dumps(record))
    for path in (other / "labelsTr").iterdir():
        label = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        label[label == IGNORE_VALUE] = 7
        save(path, label)
    again = mlbseg.train(
        other,
        tmp_path / "run",
        method="supervised",
        test=["case_3"],
        overrides=[*TINY, "steps=40"],
        device="cpu",
    )
    assert (again.run / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_masks_and_scores_know_no_open_voxels(
    data: Path, run: Path, tmp_path: Path, command: Command
) -> None:
    masks = tmp_path / "masks"
    assert command("predict", run, data, "--out", masks).code == 0
    assert set.union(*(values(path) for path in masks.iterdir())) <= {0, 1, 2}
    done = command("evaluate", masks, data / "labelsTr", "--json")
    assert done.code == 0
    assert done.json["unknown"] == {f"case_{i}": OPEN_VOXELS for i in range(4)}
    assert {row["class"] for row in done.json["cases"]} == {1, 2}
    # What a mask holds in open voxels changes no score.
    for path in masks.iterdir():
        mask = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        mask[OPEN] = 2
        save(path, mask)
    changed = command("evaluate", masks, data / "labelsTr", "--json", "--report", tmp_path / "page.html")
    assert "unknown voxels, not scored" in (tmp_path / "page.html").read_text()
    assert changed.json["cases"] == done.json["cases"]
    assert "unknown voxels" in command("evaluate", masks, data / "labelsTr").out


def test_the_value_can_be_given_to_evaluate(tmp_path: Path) -> None:
    label = blocks(0)[1]
    spoilt = label.copy()
    spoilt[OPEN] = 9
    save(tmp_path / "masks" / "a.nii.gz", label)
    save(tmp_path / "labels" / "a.nii.gz", spoilt)
    assert evaluate(tmp_path / "masks", tmp_path / "labels").classes.keys() == {1, 2, 9}
    result = evaluate(tmp_path / "masks", tmp_path / "labels", unknown=9)
    assert result.classes.keys() == {1, 2}
    assert result.mean_dice == 1
    assert result.unknown == {"a": OPEN_VOXELS}


@pytest.mark.slow
def test_an_audit_judges_known_voxels_only(data: Path, run: Path, tmp_path: Path) -> None:
    for way in WAYS:
        found = audit(run, out=tmp_path / way, way=way, propose=True, threshold=0.5)
        assert not found.faults
        # Unknown voxels of the scan that hold the blocks' edge.
        undrawn = [one.undrawn for one in found.cases]
        assert all(0 <= volume <= OPEN_VOXELS for volume in undrawn)
        assert max(undrawn) > 0
        for path in (tmp_path / way / "trust").iterdir():
            trust = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
            assert trust[OPEN].min() == 1
            proposed = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / way / "proposed" / path.name)))
            assert (proposed[OPEN] == IGNORE_VALUE).all()
            assert (np.delete(proposed, range(6), axis=1) != IGNORE_VALUE).all()


@pytest.mark.slow
def test_open_voxels_cast_no_doubt_on_their_neighbours(data: Path, run: Path, tmp_path: Path) -> None:
    """A label that is open in a part is trusted beside it at least as much as where that part is drawn."""
    maps = {}
    for name, spoilt in (("drawn", False), ("open", True)):
        root = write_nnunet(tmp_path / name, spoilt=spoilt)
        done = audit(run, labels=root / "labelsTr", out=tmp_path / f"audit of {name}")
        assert not done.faults
        paths = sorted((done.out / "trust").iterdir())
        maps[name] = np.stack([sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in paths])
    assert maps["drawn"].shape == (4, *SIZE)
    assert (maps["open"] >= maps["drawn"] - 1e-5).all()


@pytest.mark.slow
def test_a_report_scores_known_voxels_only(run: Path, tmp_path: Path) -> None:
    page = report(run, tmp_path / "page.html", device="cpu")
    assert (
        f"label {IGNORE_VALUE}" not in Path(page if isinstance(page, str | Path) else page.path).read_text()
    )


@pytest.mark.slow
def test_nnunet_round_trip_keeps_open_voxels(data: Path, run: Path, tmp_path: Path) -> None:
    export(run, tmp_path, "nnunet", dataset="Dataset007_Open", trust=1.0, device="cpu")
    root = tmp_path / "Dataset007_Open"
    for i in range(3):
        given, back = (
            sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "labelsTr" / f"case_{i}.nii.gz")))
            for folder in (data, root)
        )
        np.testing.assert_array_equal(back, given)
    again = check(find_cases(root))
    assert not again.faults
    assert again.summary["labels"].keys() <= {"0", "1", "2"}
    assert [case.known.ignore for case in find_cases(root).cases] == [3] * len(again.dataset.cases)


@pytest.mark.slow
def test_a_bench_scores_known_voxels_only(data: Path, tmp_path: Path, command: Command) -> None:
    done = command(
        "bench", data, "--out", tmp_path / "b", "--methods", "supervised", "--labelled", "2", "--test", "1",
        "--no-upper", *(part for o in (*TINY, "steps=8") for part in ("-o", o)), "--device", "cpu",
    )  # fmt: skip
    assert done.code == 0, done.err
    scores = next((tmp_path / "b").rglob("scores.csv")).read_text()
    assert {line.split(",")[1] for line in scores.splitlines()[1:]} == {"1", "2"}


@pytest.fixture
def healthy(tmp_path: Path) -> Path:
    """Three scans with structures, one in which there are none, and one without a label."""
    root = tmp_path / "healthy"
    for i in range(5):
        write_case(root, f"case_{i}.nii.gz", i, labelled=i < 4)
    save(root / "labels" / "case_1.nii.gz", np.zeros(SIZE, np.uint8))
    return root


def test_an_empty_label_is_a_fault_unless_it_is_meant(healthy: Path, command: Command) -> None:
    done = command("check", healthy)
    assert done.code == 2
    assert "case_1.nii.gz: only background" in done.err
    assert "--allow-empty" in done.err
    assert command("check", healthy, "--allow-empty").code == 0
    rows = [
        "id,image,label,empty",
        *(f"c{i},images/case_{i}.nii.gz,labels/case_{i}.nii.gz," for i in range(4)),
    ]
    rows[2] += "yes"
    (healthy / "cases.csv").write_text("\n".join(rows))
    assert command("check", healthy / "cases.csv").code == 0
    (healthy / "cases.csv").write_text("\n".join(rows).replace("yes", "perhaps"))
    assert "empty = 'perhaps', expected yes or no" in command("check", healthy / "cases.csv").err


@pytest.mark.slow
@pytest.mark.parametrize("method", ["supervised", "mlb"])
def test_a_scan_with_nothing_to_find_is_trained_on(
    method: str, healthy: Path, tmp_path: Path, command: Command
) -> None:
    options = [part for o in (*TINY, "steps=8") for part in ("-o", o)]
    done = command(
        "train", healthy, "--out", tmp_path / "r", "--method", method, "--allow-empty", "--no-report",
        "--device", "cpu", *options,
    )  # fmt: skip
    assert done.code == 0, done.err
    split = json.loads((tmp_path / "r" / "split.json").read_text())
    assert "case_1" in split["clean"]
    assert command("train", "--resume", tmp_path / "r").code == 0
