"""The page of a run: which cases, what it says, what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - as its documentation does

from blocks import TINY, write_blocks
from conftest import Command
from mlbseg.apps import report as package
from mlbseg.apps.report import Report, masks_report, report
from mlbseg.apps.report.packing import Subject, pack
from mlbseg.cli.report import how_good
from mlbseg.data.splits import Split
from mlbseg.errors import UserError
from mlbseg.types import Geometry
from report.pages import data_of, layer

pytestmark = pytest.mark.slow


@pytest.fixture
def run(supervised_run: Path, tmp_path: Path) -> Path:
    """A run with one test case, to be changed."""
    return shutil.copytree(supervised_run, tmp_path / "run")


def resplit(run: Path, **parts: tuple[str, ...]) -> None:
    split = Split.read(run / "split.json").as_dict()
    Split.from_dict({**split, **parts}).write(run / "split.json")


def test_cases_that_are_gone_are_named(run: Path, scans: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(scans, tmp_path / "scans")
    record = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps({**record, "root": str(moved)}))
    resplit(run, test=("case_3", "case_2", "case_1"), clean=("case_0",))
    (moved / "labels" / "case_2.nii.gz").unlink()
    (moved / "labels" / "case_1.nii.gz").unlink()
    (moved / "images" / "case_1.nii.gz").unlink()
    result = report(run)
    assert (result.scored, result.group) == (1, "test")
    html = result.path.read_text(encoding="utf-8")
    where = f"of this name in {moved} any more"
    assert f"case_2: no label {where}; case_1: no scan {where}" in html
    (moved / "labels" / "case_3.nii.gz").unlink()
    (moved / "images" / "case_3.nii.gz").unlink()
    result = report(run, overwrite=True)
    assert result.group == "clean"
    assert f"case_3: no scan of this name in {moved}" in result.path.read_text(encoding="utf-8")


def test_a_run_is_shown(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    result = report(run)
    assert (result.path, result.scored, result.group) == (run / "report.html", 1, "test")
    assert result.mean_dice is not None
    assert result.mean_dice > 0.8
    html = result.path.read_text(encoding="utf-8")
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", html)
    assert headings == [
        "At a glance",
        "Scores",
        "Cases",
        "Training",
        "Data",
        "Plan",
        "Time, memory and environment",
    ]
    data = data_of(html)
    assert [d["name"] for d in data] == ["case_3"]
    assert [item["name"] for item in data[0]["layers"]] == ["label", "prediction", "difference", "certainty"]
    assert f"{result.mean_dice:.3f}" in html
    assert "would be called over-fitting" in html
    assert "Loss terms" in html
    assert "Set by the user." in html
    after = {path: path.read_bytes() for path in before}
    assert after == before  # a report shows, it changes nothing


def test_prediction_shown_is_the_run_s_own(run: Path, scans: Path, tmp_path: Path) -> None:
    from mlbseg import predict

    predict(run, scans, tmp_path / "masks", only="test")
    own, given = report(run), report(run, tmp_path / "b.html", predictions=tmp_path / "masks")
    assert own.mean_dice == given.mean_dice
    a, b = (data_of(result.path.read_text(encoding="utf-8"))[0] for result in (own, given))
    for name in ("label", "prediction", "difference"):
        assert np.array_equal(layer(a, name), layer(b, name))
    assert [item["name"] for item in b["layers"]] == [
        "label",
        "prediction",
        "difference",
    ]  # no certainty of others
    label = sitk.GetArrayFromImage(sitk.ReadImage(str(scans / "labels" / "case_3.nii.gz")))
    assert np.array_equal(layer(a, "label"), label)


def test_a_case_without_a_mask_is_named(run: Path, scans: Path, tmp_path: Path) -> None:
    resplit(run, test=("case_3", "case_2"), clean=("case_0", "case_1"))
    (tmp_path / "masks").mkdir()
    shutil.copy(scans / "labels" / "case_2.nii.gz", tmp_path / "masks")
    result = report(run, predictions=tmp_path / "masks")
    assert (result.scored, result.mean_dice) == (1, 1.0)
    assert [f.text for f in result.findings if f.title == "Not all is scored"] == [
        "case_3: no mask in masks."
    ]


@pytest.mark.parametrize(
    ("parts", "group", "said"),
    [
        ({"test": (), "validation": ("case_3",)}, "validation", "The scored cases chose the checkpoint"),
        ({"test": (), "noisy": ("case_3",)}, "noisy", "unverified labels"),
        ({"test": ("case_7",), "unlabelled": ()}, "clean", "The scores are of training cases"),
    ],
)
def test_the_first_group_with_labels_is_scored(
    parts: dict[str, tuple[str, ...]], group: str, said: str, run: Path
) -> None:
    resplit(run, **parts)
    result = report(run)
    assert result.group == group
    assert said in result.path.read_text(encoding="utf-8")


def test_cases_are_capped_and_that_is_said(run: Path) -> None:
    resplit(run, test=(), noisy=("case_3",), clean=("case_0", "case_1", "case_2"))
    resplit(run, noisy=("case_3", "case_2"), clean=("case_0", "case_1"))
    html = report(run, cases=1).path.read_text(encoding="utf-8")
    assert "The first 1 of them; 1 more were left out" in html


def test_what_is_not_there_is_said(run: Path) -> None:
    record = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps({**record, "root": str(run / "gone")}))
    (run / "log.csv").unlink()
    result = report(run)
    html = result.path.read_text(encoding="utf-8")
    assert result.group is None
    assert "The scans are not where they were" in html
    assert "The run has no log of its steps." in html


def test_a_bad_scan_is_named_and_the_others_are_scored(
    scans: Path, supervised_run: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(scans, tmp_path / "scans")
    run = shutil.copytree(supervised_run, tmp_path / "run")
    record = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps({**record, "root": str(broken)}))
    resplit(run, test=("case_3", "case_2"), clean=("case_0", "case_1"))
    (broken / "images" / "case_2.nii.gz").write_bytes(b"no scan")
    result = report(run)
    assert result.scored == 1
    assert any("case_2" in finding.text and finding.warning for finding in result.findings)


def test_refusals(run: Path, tmp_path: Path) -> None:
    (run / "report.html").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        report(run)
    assert (run / "report.html").read_text() == "mine"
    with pytest.raises(UserError, match="no mask is named after a labelled case"):
        report(
            run, tmp_path / "a.html", predictions=write_blocks(tmp_path / "other", count=1) / "images" / ".."
        )
    with pytest.raises(UserError, match="expected a folder of predicted masks"):
        report(run, tmp_path / "a.html", predictions=tmp_path / "gone")
    with pytest.raises(UserError, match="--cases"):
        report(run, tmp_path / "a.html", cases=0)
    (run / "model.safetensors").unlink()
    with pytest.raises(UserError, match="training has not finished"):
        report(run, tmp_path / "a.html")
    (run / "log.csv").write_text("stage,step,clean\n1,x,2\n")
    assert not (tmp_path / "a.html").exists()


def test_audit_is_shown_where_there_is_one(run: Path, scans: Path) -> None:
    folder = run / "audit" / "trust"
    folder.mkdir(parents=True)
    scan = sitk.ReadImage(str(scans / "images" / "case_3.nii.gz"))
    trust = np.zeros(sitk.GetArrayFromImage(scan).shape, np.float32)
    trust[3] = 1
    image = sitk.GetImageFromArray(trust)
    image.CopyInformation(scan)
    sitk.WriteImage(image, str(folder / "case_3.nii.gz"))
    (run / "audit" / "cases.csv").write_text("rank,case,trust\n1,<i>case_3,0.25\n2,case_1,0.5\n")
    html = report(run).path.read_text(encoding="utf-8")
    values = layer(data_of(html)[0], "trust")
    assert np.array_equal(values == 255, trust == 1)
    assert "&lt;i&gt;case_3" in html
    assert "0.250" in html
    (run / "audit" / "cases.csv").write_bytes(b"\xff\xfe")
    assert "audit is damaged" in report(run, overwrite=True).path.read_text(encoding="utf-8")


def test_trust_is_found_in_the_scan_s_format_and_left_out_where_it_does_not_fit(
    run: Path, scans: Path, tmp_path: Path
) -> None:
    folder = run / "audit" / "trust"
    folder.mkdir(parents=True)
    scan = sitk.ReadImage(str(scans / "images" / "case_3.nii.gz"))
    trust = sitk.Cast(scan, sitk.sitkFloat32) * 0 + 0.5
    path = folder / "case_3.nrrd"

    def shown() -> tuple[bool, str]:
        html = report(run, overwrite=True).path.read_text(encoding="utf-8")
        case = data_of(html)[0]
        return "trust" in [item["name"] for item in case["layers"]], case["caption"]

    sitk.WriteImage(trust, str(path))
    has, html = shown()
    assert has
    assert "its trust map" not in html
    sitk.WriteImage(trust * 3, str(path))
    has, html = shown()
    assert not has
    assert "its trust map holds other values than 0 to 1" in html
    trust.SetOrigin((7.0, 8.0, 9.0))
    sitk.WriteImage(trust, str(path))
    has, html = shown()
    assert not has
    assert "its trust map has another origin than the scan" in html
    path.write_bytes(path.read_bytes()[:-20])
    has, html = shown()
    assert not has
    assert "its trust map cannot be read" in html
    path.unlink()
    trust.CopyInformation(scan)
    sitk.WriteImage(trust, str(tmp_path / "outside.nrrd"))
    path.symlink_to(tmp_path / "outside.nrrd")
    has, html = shown()
    assert not has
    assert "its trust map cannot be read" in html


def test_axes_run_as_in_training(scans: Path, supervised_run: Path, tmp_path: Path) -> None:
    """Of a scan that is stored the other way round the same slices are shown."""
    turned = shutil.copytree(scans, tmp_path / "scans")
    for kind in ("images", "labels"):
        path = turned / kind / "case_3.nii.gz"
        sitk.WriteImage(sitk.DICOMOrient(sitk.ReadImage(str(path)), "SAR"), str(path))
    run = shutil.copytree(supervised_run, tmp_path / "run")
    straight = data_of(report(run).path.read_text(encoding="utf-8"))[0]
    record = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps({**record, "root": str(turned)}))
    other = data_of(report(run, overwrite=True).path.read_text(encoding="utf-8"))[0]
    assert np.array_equal(layer(straight, "label"), layer(other, "label"))


def test_command(run: Path, tmp_path: Path, command: Command) -> None:
    done = command("report", run, "--out", tmp_path / "a.html", "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json["group"] == "test"
    again = command("report", run, "--out", tmp_path / "a.html")
    assert (again.code, again.out) == (2, "")
    assert "exists already" in again.err
    shown = command("report", run, "--out", tmp_path / "a.html", "--overwrite", "--quiet")
    assert shown.out.endswith(f"wrote {tmp_path / 'a.html'}\n")


def test_training_leaves_a_report(
    scans: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = [v for text in (*TINY, "steps=4") for v in ("-o", text)]
    arguments = ("train", scans, "--method", "supervised", "--test", 1, *short)
    done = command(*arguments, "--out", tmp_path / "a", "--json")
    assert (done.code, done.json["report"]) == (0, str(tmp_path / "a" / "report.html"))
    assert [row["name"] for row in done.json["scores"]] == ["label 1", "label 2", "all classes"]
    assert (tmp_path / "a" / "report.html").is_file()
    assert json.loads((tmp_path / "a" / "result.json").read_text())["peak_memory_bytes"] > 1 << 20
    without = command("train", "--resume", tmp_path / "a", "--no-report", "--json")
    assert (without.json["report"], without.json["scores"]) == (None, None)

    def fail(*_: object, **__: object) -> None:
        raise ValueError("a fault of ours")

    monkeypatch.setattr(package, "report", fail)
    (tmp_path / "a" / "report.html").unlink()
    failed = command("train", "--resume", tmp_path / "a")
    assert failed.code == 0
    assert "note: no report was written: ValueError: a fault of ours" in failed.out
    assert "next: mlbseg predict" in failed.out


@pytest.mark.parametrize(
    ("group", "scored", "beyond", "said"),
    [
        ("test", 3, 0, "scores: of the test cases"),
        (
            "validation",
            8,
            4,
            "first 8 of 12 validation cases (mlbseg report 'a run' --cases 12 --overwrite scores all)",
        ),
        (
            "clean",
            2,
            0,
            "scores: of labels that training has seen; to know how good it is on other scans, set some",
        ),
        (
            None,
            0,
            0,
            "no case could be scored; to know how good it is on other scans, set some apart with --test N",
        ),
    ],
)
def test_the_end_of_training_says_what_was_scored(
    group: str | None, scored: int, beyond: int, said: str
) -> None:
    page = Report(Path("a.html"), scored, group, None, (), None, beyond)
    assert said in how_good(page, Path("a run"))


def test_masks_are_shown(scans: Path, tmp_path: Path, command: Command) -> None:
    masks, page = tmp_path / "masks", tmp_path / "page.html"
    masks.mkdir()
    for number in range(4):
        label = sitk.ReadImage(str(scans / "labels" / f"case_{number}.nii.gz"))
        array = sitk.GetArrayFromImage(label)
        array[: 3 * number] = 0
        image = sitk.GetImageFromArray(array)
        image.CopyInformation(label)
        sitk.WriteImage(image, str(masks / f"case_{number}.nii.gz"))
    shutil.copy(masks / "case_0.nii.gz", masks / "alone.nii.gz")
    done = command("evaluate", masks, scans / "labels", "--report", page, "--scans", scans)
    assert done.code == 0
    assert f"report: {page}" in done.out
    html = page.read_text(encoding="utf-8")
    data = data_of(html)
    assert [d["name"] for d in data] == [
        "case_3",
        "case_2",
        "case_1",
        "case_0",
    ]  # worst, median, best, the rest
    assert "Masks without a reference: alone." in html
    assert command("evaluate", masks, scans / "labels", "--report", page).code == 2
    assert command("evaluate", masks, scans / "labels", "--scans", scans).code == 2
    early = ("--out", tmp_path / "a.csv", "--report", tmp_path / "b.html", "--scans", tmp_path / "gone")
    refused = command("evaluate", masks, scans / "labels", *early)
    assert refused.code == 2
    assert "--scans" in refused.err
    assert not (tmp_path / "a.csv").exists()  # before anything is scored
    command("evaluate", masks, scans / "labels", "--report", page, "--overwrite")
    html = page.read_text(encoding="utf-8")
    assert "the masks lie on black" in html
    assert not np.array_equal(data_of(html)[0]["image"], data[0]["image"])


def test_a_mask_s_scan_of_another_size_is_left_out(scans: Path, tmp_path: Path) -> None:
    from mlbseg import evaluate

    masks = shutil.copytree(scans / "labels", tmp_path / "masks")
    other = write_blocks(tmp_path / "other", count=4, size=(10, 10, 10))
    result = evaluate(masks, scans / "labels")
    page = masks_report(result, masks, scans / "labels", tmp_path / "a.html", scans=other)
    assert "the scan has another size" in data_of(page.read_text(encoding="utf-8"))[0]["caption"]


def test_a_mask_s_scan_that_lies_elsewhere_is_left_out(scans: Path, tmp_path: Path) -> None:
    from mlbseg import evaluate

    moved = shutil.copytree(scans, tmp_path / "scans")
    for name, change in (("case_0", "SetOrigin"), ("case_1", "SetSpacing")):
        path = moved / "images" / f"{name}.nii.gz"
        image = sitk.ReadImage(str(path))
        getattr(image, change)((7.0, 8.0, 9.0))
        sitk.WriteImage(image, str(path))
    masks = tmp_path / "masks"
    masks.mkdir()
    for name in ("case_0", "case_1"):
        shutil.copy(scans / "labels" / f"{name}.nii.gz", masks)
    result = evaluate(masks, scans / "labels")
    page = masks_report(result, masks, scans / "labels", tmp_path / "a.html", scans=moved)
    html = page.read_text(encoding="utf-8")
    captions = " ".join(d["caption"] for d in data_of(html))
    assert "the scan has another origin, so it is not shown" in captions
    assert "the scan has another spacing, so it is not shown" in captions
    assert [d["image"].max() for d in data_of(html)] == [0, 0]
    straight = masks_report(result, masks, scans / "labels", tmp_path / "b.html", scans=scans)
    assert all(d["image"].max() > 0 for d in data_of(straight.read_text(encoding="utf-8")))


def test_a_case_is_small_enough_to_send() -> None:
    """This one holds more texture than any scan."""
    rng = np.random.default_rng(0)
    image = rng.normal(0, 1, (64, 256, 256)).astype(np.float32)
    label = (rng.random((64, 32, 32)) > 0.5).repeat(8, 1).repeat(8, 2).astype(np.uint8)
    trust = rng.random((64, 128, 128), np.float32).repeat(2, 1).repeat(2, 2)
    masks = {"label": label, "prediction": label[::-1]}
    shown = Subject("a", "", image, Geometry.identity((256, 256, 64)), masks, {"trust": trust})
    assert len(pack(shown, {1: "x"})) < 5e6
