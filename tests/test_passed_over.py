"""What the commands pass over they name, in one line; and pictures and stacks go the whole way."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from PIL import Image

from blocks import TINY, blocks, write_blocks
from conftest import Command
from mlbseg.data.readers import read_label, read_scan, write_label
from mlbseg.types import Geometry

SHORT = [v for text in (*TINY, "steps=4") for v in ("-o", text)]


@pytest.mark.slow
def test_every_command_names_what_it_passes_over(
    supervised_run: Path, scans: Path, tmp_path: Path, command: Command
) -> None:
    given, labels, masks = tmp_path / "given", tmp_path / "references", tmp_path / "masks"
    shutil.copytree(scans / "images", given)
    shutil.copytree(scans / "labels", labels)
    for path in (given / "x.mgz", given / "y.mgz", labels / "case_7.mgz"):
        path.write_bytes(b"x")
    line = "note: 2 times (x.mgz, y.mgz): not a scan, ignored, expected .nii.gz"
    predicted = command("predict", supervised_run, given, "--out", masks)
    assert (predicted.code, line in predicted.out) == (0, True)
    again = command("predict", supervised_run, given, "--out", masks, "--overwrite", "--json")
    assert [note["where"] for note in again.json["notes"]] == ["x.mgz", "y.mgz"]
    one = command("predict", supervised_run, given, "--out", masks, "--overwrite", "--only", "case_1")
    assert "note:" not in one.out
    suggested = command("suggest", supervised_run, "--scans", given)
    assert (suggested.code, line in suggested.out) == (0, True)
    (masks / "case_0.npz").write_bytes(b"x")
    scored = command("evaluate", masks, labels)
    both = "note: 2 times (masks/case_0.npz, references/case_7.mgz): not a scan, ignored"
    assert (scored.code, both in scored.out) == (0, True)
    assert len(command("evaluate", masks, labels, "--json").json["notes"]) == 2
    audited = command("audit", supervised_run, "--labels", labels, "--out", tmp_path / "audit")
    assert "note: references/case_7.mgz: not a scan, ignored" in audited.out
    page = tmp_path / "page.html"
    command("report", supervised_run, "--predictions", masks, "--out", page)
    assert "masks/case_0.npz: not a scan, ignored" in page.read_text()


def test_notes_of_one_kind_are_one_line_in_check(tmp_path: Path, command: Command) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    for seed in range(5):
        image, label = blocks(seed, (32, 36))
        grey = image.clip(0, 255).astype(np.uint8)
        opaque = np.dstack([grey, grey, grey, np.full_like(grey, 255)])
        Image.fromarray(opaque).save(tmp_path / "images" / f"{seed}.png")
        if seed < 3:
            Image.fromarray(label).save(tmp_path / "labels" / f"{seed}.png")
    outcome = command("check", tmp_path)
    assert (outcome.code, outcome.out.count("note:")) == (0, 1)
    names = "images/0.png, images/1.png, images/2.png, ..."
    assert f"note: 5 times ({names}): its transparency (alpha) is left out" in outcome.out
    assert len(command("check", tmp_path, "--json").json["warnings"]) == 5


def test_a_label_that_is_not_read_stops_check_and_train(
    scans: Path, tmp_path: Path, command: Command
) -> None:
    data = shutil.copytree(scans, tmp_path / "scans")
    (data / "labels" / "case_7.mgz").write_bytes(b"x")
    for arguments in (["check", data], ["train", data, "--out", tmp_path / "run", *SHORT]):
        outcome = command(*arguments)
        assert outcome.code == 2
        assert "labels/case_7.mgz: a label in a format that is not read" in outcome.err


@pytest.mark.slow
def test_tiff_stacks_from_scans_to_scores(tmp_path: Path, command: Command) -> None:
    data, geometry = write_blocks(tmp_path / "nifti", count=4, labelled=3), None
    stacks = tmp_path / "stacks"
    for path in sorted(data.glob("*/*.nii.gz")):
        array = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        geometry = Geometry.identity(array.shape[::-1], (0.5, 0.5, 2.0))
        (stacks / path.parent.name).mkdir(parents=True, exist_ok=True)
        whole = array.clip(0, 65_535).astype(np.uint16)
        write_label(stacks / path.parent.name / path.name.replace(".nii.gz", ".tif"), whole, geometry)
    run, masks = tmp_path / "run", tmp_path / "masks"
    checked = command("check", stacks)
    assert (checked.code, "0.5 × 0.5 × 2" in checked.out) == (0, True)
    trained = command("train", stacks, "--out", run, "--method", "supervised", *SHORT)
    assert trained.code == 0, trained.err
    assert command("predict", run, stacks, "--out", masks, "--probabilities").code == 0
    mask, place = read_label(masks / "case_3.tif")
    assert place.spacing == pytest.approx((0.5, 0.5, 2.0))
    assert mask.shape == read_scan([stacks / "images" / "case_3.tif"]).array.shape[1:]
    shares = [read_scan([masks / "probabilities" / f"case_3_{value}.tif"]).array for value in (0, 1, 2)]
    assert np.allclose(sum(shares), 1, atol=1e-3)
    assert command("evaluate", masks, stacks / "labels", "--json").code == 0


@pytest.mark.slow
def test_palette_masks_from_pictures_to_scores(tmp_path: Path, command: Command) -> None:
    for folder in ("images", "labels"):
        (tmp_path / "set" / folder).mkdir(parents=True)
    for seed in range(5):
        image, label = blocks(seed, (32, 36))
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(tmp_path / "set" / "images" / f"{seed}.png")
        if seed < 4:
            drawn = Image.fromarray(label)
            drawn.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
            drawn.save(tmp_path / "set" / "labels" / f"{seed}.png")
    run, masks = tmp_path / "run", tmp_path / "masks"
    trained = command("train", tmp_path / "set", "--out", run, "--method", "supervised", *SHORT)
    assert trained.code == 0, trained.err
    assert command("predict", run, tmp_path / "set", "--out", masks).code == 0
    scored = command("evaluate", masks, tmp_path / "set" / "labels", "--json")
    assert {row["class"] for row in scored.json["cases"]} == {1, 2}
