"""nnU-Net datasets: careful labels as they are, pseudo labels where they are trusted, the rest ignored."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - as its documentation does

import mlbseg
from blocks import TINY, blocks, save, write_case
from mlbseg.apps.export import export
from mlbseg.apps.export.nnunet import _label_names
from mlbseg.errors import UserError
from mlbseg.inference import predict

VALUES = (0, 2, 5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run whose label values have gaps, with careful, noisy, hidden and missing labels, and its scans."""
    root = tmp_path_factory.mktemp("nnunet")
    for i in range(8):
        name = f"case_{i}" + (".mha" if i == 1 else ".nii.gz")
        turned = (
            {"direction": (0.8, -0.6, 0, 0.6, 0.8, 0, 0, 0, 1), "spacing": (1, 1.1, 1.3)} if i == 2 else {}
        )
        write_case(root / "scans", name, i, labelled=i < 7, values=VALUES, **turned)  # type: ignore[arg-type]
    (root / "scans" / "labels_noisy").mkdir()
    shutil.move(root / "scans/labels/case_5.nii.gz", root / "scans/labels_noisy/case_5.nii.gz")
    mlbseg.train(
        str(root / "scans"),
        str(root / "run"),
        method="supervised",
        labelled=["case_0", "case_1", "case_2", "case_3"],
        validation=["case_3"],
        test=["case_6"],
        overrides=[*TINY, "steps=60", "checkpoint_every=60", "plan.spacing=1.2"],
        device="cpu",
    )
    return root / "run", root / "scans"


def array(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


@pytest.mark.slow
def test_careful_labels_stay_and_doubtful_voxels_are_ignored(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    run, scans = trained
    done = export(run, tmp_path, "nnunet", dataset="Dataset007_Blocks", trust=0.9, device="cpu")
    assert not done.faults
    root = tmp_path / "Dataset007_Blocks"
    assert done.files == [root]
    record = json.loads((root / "dataset.json").read_text())
    names = json.loads((run / "plan.json").read_text())["class_names"]
    assert record["labels"] == {"background": 0, names[1]: 1, names[2]: 2, "ignore": 3}
    assert (record["numTraining"], record["file_ending"]) == (5, ".nii.gz")
    assert record["channel_names"] == {"0": "zscore"}
    expected = {f"case_{i}" for i in (0, 1, 2, 4, 5, 7)} - {
        "case_5"
    }  # test, validation and noisy ones are left out
    assert {p.name.removesuffix(".nii.gz") for p in (root / "labelsTr").iterdir()} == expected
    assert {p.name.removesuffix("_0000.nii.gz") for p in (root / "imagesTr").iterdir()} == expected
    assert not (root / "imagesTs").exists()

    for name, ending in (("case_0", ".nii.gz"), ("case_1", ".mha"), ("case_2", ".nii.gz")):
        given = array(scans / "labels" / f"{name}{ending}")
        here = array(root / "labelsTr" / f"{name}.nii.gz")
        np.testing.assert_array_equal(np.array(VALUES)[here], given)
    same = (root / "imagesTr/case_0_0000.nii.gz").read_bytes() == (
        scans / "images/case_0.nii.gz"
    ).read_bytes()
    assert same
    np.testing.assert_array_equal(
        array(root / "imagesTr/case_1_0000.nii.gz"), array(scans / "images/case_1.mha")
    )

    # The hidden label of case_4 changes nothing: it is predicted, and doubted where the network does.
    predict(run, scans, tmp_path / "p", only=["case_4"], probabilities=True, device="cpu")
    maps = np.stack([array(tmp_path / f"p/probabilities/case_4_{value}.nii.gz") for value in VALUES])
    here = array(root / "labelsTr" / "case_4.nii.gz")
    ignored = maps.max(0) < 0.9
    np.testing.assert_array_equal(here == 3, ignored)
    assert 0 < ignored.mean() < 0.5
    np.testing.assert_array_equal(
        np.array(VALUES)[here[~ignored]], array(tmp_path / "p/case_4.nii.gz")[~ignored]
    )

    notes = json.loads((root / "mlbseg.json").read_text())
    assert [row["in the run"] for row in notes["values"]] == [0, 2, 5, None]
    shares = notes["pseudo labels: share of voxels that is trusted"]
    assert set(shares) == {"case_4", "case_7"}
    assert notes["left out as not asked for with --also"] == {
        "noisy": ["case_5"],
        "validation": ["case_3"],
        "test": ["case_6"],
    }
    assert shares["case_4"] == pytest.approx(1 - ignored.mean())
    splits = json.loads((root / "splits_final.json").read_text())
    assert sorted(name for fold in splits for name in fold["val"]) == ["case_0", "case_1", "case_2"]
    assert all(set(fold["train"]) == expected - set(fold["val"]) for fold in splits)


@pytest.mark.slow
def test_other_parts_and_other_trust(trained: tuple[Path, Path], tmp_path: Path) -> None:
    run, scans = trained
    maps = tmp_path / "maps"
    maps.mkdir()
    for name in ("case_4", "case_5", "case_7"):
        image = sitk.ReadImage(str(scans / "images" / f"{name}.nii.gz"))
        trust = np.ones(image.GetSize()[::-1], np.float32)
        trust[:5] = 0.3
        one = sitk.GetImageFromArray(trust)
        one.CopyInformation(image)
        sitk.WriteImage(one, str(maps / f"{name}.nii.gz"))
    done = export(
        run, tmp_path / "raw", "nnunet", trust_maps=maps, also=["noisy", "validation", "test"], device="cpu"
    )
    assert not done.faults
    root = done.files[0]
    assert root.name == "Dataset501_Run"
    assert {p.name[:6] for p in (root / "imagesTr").iterdir()} == {f"case_{i}" for i in (0, 1, 2, 3, 4, 5, 7)}
    assert [p.name for p in (root / "imagesTs").iterdir()] == ["case_6_0000.nii.gz"]
    for name in ("case_4", "case_5", "case_7"):
        here = array(root / "labelsTr" / f"{name}.nii.gz")
        assert (here[:5] == 3).all()
        assert not (here[5:] == 3).any()
    assert (array(root / "labelsTr/case_3.nii.gz") < 3).all()

    (maps / "case_4.nii.gz").unlink()
    image = sitk.ReadImage(str(maps / "case_7.nii.gz")) * 100
    sitk.WriteImage(image, str(maps / "case_7.nii.gz"))
    done = export(run, tmp_path / "bad", "nnunet", trust_maps=maps, device="cpu")
    faults = {fault.case_id: str(fault) for fault in done.faults}
    assert set(faults) == {"case_4", "case_7"}
    assert "no trust map" in faults["case_4"]
    assert "trust from 0 to 1" in faults["case_7"]
    left = json.loads((done.files[0] / "dataset.json").read_text())
    assert left["numTraining"] == 3 == len(list((done.files[0] / "imagesTr").iterdir()))


@pytest.mark.slow
def test_nothing_of_an_earlier_export_stays_of_a_case_that_fails_now(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    run, scans = trained
    (root,) = export(run, tmp_path / "raw", "nnunet", device="cpu").files
    moved = shutil.copytree(scans, tmp_path / "scans")
    broken = moved / "images" / "case_7.nii.gz"
    broken.write_bytes(broken.read_bytes()[:-500])
    with pytest.warns(UserWarning, match=r"case_7.nii.gz: changed since the run began"):
        done = export(run, tmp_path / "raw", "nnunet", data=moved, device="cpu", overwrite=True)
    assert [fault.case_id for fault in done.faults] == ["case_7"]
    expected = {"case_0", "case_1", "case_2", "case_4"}
    assert {p.name.removesuffix(".nii.gz") for p in (root / "labelsTr").iterdir()} == expected
    assert {p.name.removesuffix("_0000.nii.gz") for p in (root / "imagesTr").iterdir()} == expected
    assert json.loads((root / "dataset.json").read_text())["numTraining"] == 4


@pytest.mark.slow
def test_requests_that_cannot_be_met(trained: tuple[Path, Path], tmp_path: Path) -> None:
    run, scans = trained
    for options, words in (
        ({"also": ["tests"]}, "--also tests: did you mean 'test'"),
        ({"trust": 1.5}, "--trust 1.5"),
        ({"dataset": "heart"}, "--dataset 'heart'"),
        ({"dataset": "Dataset007_../x"}, "--dataset"),
        ({"trust_maps": tmp_path / "none"}, "not a folder"),
        ({"data": tmp_path / "none"}, "none"),
    ):
        with pytest.raises(UserError, match=words):
            export(run, tmp_path / "raw", "nnunet", device="cpu", **options)
    assert not (tmp_path / "raw").exists() or not any((tmp_path / "raw").iterdir())
    (tmp_path / "raw" / "Dataset501_Run").mkdir(parents=True)
    (tmp_path / "raw" / "Dataset501_Run" / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match="not empty"):
        export(run, tmp_path / "raw", "nnunet", device="cpu")
    done = export(run, tmp_path / "raw", "nnunet", overwrite=True, data=scans, device="cpu")
    assert (done.files[0] / "mine.txt").read_text() == "kept"
    assert (done.files[0] / "dataset.json").is_file()
    shutil.copy(done.files[0] / "labelsTr" / "case_0.nii.gz", done.files[0] / "labelsTr" / "other.nii.gz")
    with pytest.raises(UserError, match=r"1 case\(s\) that this export has not, such as other"):
        export(run, tmp_path / "raw", "nnunet", overwrite=True, device="cpu")


@pytest.mark.slow
def test_every_channel_has_its_file_and_pictures_become_nifti(tmp_path: Path) -> None:
    for i in range(3):
        image, label = blocks(i)
        for channel in (0, 1):
            save(tmp_path / "scans" / "imagesTr" / f"c{i}_{channel:04d}.nii.gz", image / (1 + channel))
        if i < 2:
            save(tmp_path / "scans" / "labelsTr" / f"c{i}.nii.gz", label)
        write_case(tmp_path / "flat", f"p{i}.png", i, labelled=i < 2, size=(32, 40))
    for name in ("scans", "flat"):
        mlbseg.train(
            str(tmp_path / name), str(tmp_path / "run" / name), method="mean-teacher", device="cpu",
            overrides=[*TINY, "steps=4"],
        )  # fmt: skip
        export(tmp_path / "run" / name, tmp_path / "raw" / name, "nnunet", trust=0.5, device="cpu")
    root = tmp_path / "raw" / "scans" / "Dataset501_Scans"
    assert len(list((root / "imagesTr").iterdir())) == 6
    for channel in (0, 1):
        np.testing.assert_array_equal(
            array(root / f"imagesTr/c2_{channel:04d}.nii.gz"), blocks(2)[0] / (1 + channel)
        )
    root = tmp_path / "raw" / "flat" / "Dataset501_Flat"
    image = sitk.ReadImage(str(root / "imagesTr" / "p0_0000.nii.gz"))
    assert image.GetSize() == (40, 32)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), array(tmp_path / "flat/images/p0.png"))
    np.testing.assert_array_equal(array(root / "labelsTr/p0.nii.gz"), array(tmp_path / "flat/labels/p0.png"))


@pytest.mark.slow
def test_nnunet_itself_accepts_the_dataset(trained: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("nnunetv2", reason="nnU-Net is installed by `make setup` only: see the Makefile")
    run, _ = trained
    export(run, tmp_path, "nnunet", also=["noisy"], device="cpu")
    root = tmp_path / "Dataset501_Run"
    code = (
        "from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity as verify\n"
        "from nnunetv2.utilities.label_handling.label_handling import LabelManager\n"
        "import json, sys\n"
        "if __name__ == '__main__':\n"
        "    verify(sys.argv[1], 1)\n"
        "    manager = LabelManager(json.load(open(sys.argv[1] + '/dataset.json'))['labels'], None)\n"
        "    print(manager.has_ignore_label, manager.ignore_label, [int(v) for v in manager.foreground_labels])\n"
    )
    script = tmp_path / "verify.py"
    script.write_text(code)
    folders = {f"nnUNet_{name}": str(tmp_path) for name in ("raw", "preprocessed", "results")}
    arguments = [sys.executable, str(script), str(root)]

    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def verify() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            arguments, env={**environment, **folders}, capture_output=True, text=True, timeout=300
        )

    done = verify()
    assert done.returncode == 0, done.stderr
    assert "verify_dataset_integrity Done" in done.stdout
    assert "Warning" not in done.stdout
    assert "True 3 [1, 2]" in done.stdout
    # And it does look: a value beyond the ignored one is refused.
    path = root / "labelsTr" / "case_4.nii.gz"
    sitk.WriteImage(sitk.ReadImage(str(path)) + 1, str(path))
    assert verify().returncode != 0


def test_names_that_nnunet_keeps_for_itself_are_changed() -> None:
    class Named:
        label_values = (0, 1, 3, 4, 5)
        class_names = ("nothing", "ignore", "organ", "organ", "background")

    found = _label_names(Named())  # type: ignore[arg-type]
    assert found == ["background", "ignore (1)", "organ", "organ (4)", "background (5)"]
