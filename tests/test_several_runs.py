"""Several runs as one: their mean on the scan's own lattice, how unsure they are, and which runs belong together."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch import nn

import mlbseg
from blocks import blocks, save
from conftest import Command
from mlbseg import windows
from mlbseg.data.readers import read_label, read_scan
from mlbseg.data.unlike import FINGERPRINT, Usual
from mlbseg.errors import UserError
from mlbseg.inference import predict
from mlbseg.runs import Run
from mlbseg.types import Geometry, Scan

Copied = Callable[..., Path]


@pytest.fixture
def copied(supervised_run: Path, tmp_path: Path) -> Copied:
    """Return a copy of a run whose plan says something else."""

    def copy(name: str, run: Path = supervised_run, **plan: object) -> Path:
        root = Path(shutil.copytree(run, tmp_path / "runs" / name))
        record = json.loads((root / "plan.json").read_text())
        (root / "plan.json").write_text(json.dumps(record | plan))
        return root

    return copy


def scan_values(path: Path) -> np.ndarray:
    return read_scan([path]).array[0]


def test_the_mean_is_taken_on_the_scans_own_lattice(
    supervised_run: Path, mlb_run: Path, copied: Copied, scans: Path, tmp_path: Path
) -> None:
    coarse = copied("coarse", spacing=[1.3, 1.5, 1.4])
    scan = scans / "images" / "case_5.nii.gz"
    alone = [mlbseg.load(run).probabilities(scan) for run in (supervised_run, coarse, mlb_run)]
    assert np.abs(alone[0] - alone[1]).mean() > 1e-3
    mean = np.mean(alone, axis=0)
    together = mlbseg.load(supervised_run, coarse, mlb_run)
    np.testing.assert_allclose(together.probabilities(scan), mean, atol=1e-5)
    runs = [supervised_run, coarse, mlb_run]
    result = predict(runs, scan, tmp_path, largest=False, probabilities=True, uncertainty=True)
    mask = read_label(result.masks["case_5"])[0]
    sure = np.sort(mean, axis=0)[-1] - np.sort(mean, axis=0)[-2] > 1e-3
    np.testing.assert_array_equal(mask[sure], mean.argmax(0)[sure])
    np.testing.assert_array_equal(mask, mlbseg.load(runs, largest=False).predict(scan))
    np.testing.assert_allclose(scan_values(tmp_path / "probabilities/case_5_1.nii.gz"), mean[1], atol=1e-5)
    # Entropy of the mean, and what is left of it without the runs' own, by the formulas.
    entropy, own = (
        [-(p * np.log(p.clip(1e-30))).sum(0) / math.log(3) for p in maps] for maps in ([mean], alone)
    )
    maps = {
        kind: scan_values(tmp_path / f"uncertainty/case_5_{kind}.nii.gz")
        for kind in ("entropy", "disagreement")
    }
    np.testing.assert_allclose(maps["entropy"], entropy[0], atol=1e-4)
    np.testing.assert_allclose(maps["disagreement"], entropy[0] - np.mean(own, axis=0), atol=1e-4)
    assert 0.01 < maps["disagreement"].max() <= maps["entropy"].max() <= 1


def test_one_run_has_entropy_alone_and_twice_the_same_run_agrees(
    supervised_run: Path, scans: Path, tmp_path: Path
) -> None:
    scan = scans / "images" / "case_5.nii.gz"
    one = predict(supervised_run, scan, tmp_path / "one", uncertainty=True)
    assert [p.name for p in (tmp_path / "one/uncertainty").iterdir()] == ["case_5_entropy.nii.gz"]
    np.testing.assert_array_equal(
        read_label(one.masks["case_5"])[0], mlbseg.load([supervised_run, supervised_run]).predict(scan)
    )
    maps = mlbseg.load(supervised_run, supervised_run).uncertainty(scan)
    np.testing.assert_allclose(
        maps["entropy"], mlbseg.load(supervised_run).uncertainty(scan)["entropy"], atol=1e-5
    )
    assert maps["disagreement"].max() < 1e-5
    assert maps["entropy"].max() > 0.5


def test_runs_that_contradict_each_other(
    supervised_run: Path, mlb_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = iter([(1, 0, 0), (0, 1, 0)])

    def grid(network: nn.Module, image: np.ndarray, **_: object) -> np.ndarray:
        return np.broadcast_to(np.float32(next(said))[:, None, None, None], (3, *image.shape[1:])).copy()

    monkeypatch.setattr(windows, "predict_grid", grid)
    maps = mlbseg.load(supervised_run, mlb_run).uncertainty(blocks(0)[0], spacing=(1, 1, 1))
    for kind in ("entropy", "disagreement"):
        np.testing.assert_allclose(maps[kind], math.log(2) / math.log(3), atol=1e-5)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            {"label_values": [0, 1, 3], "largest_component": []},
            "its classes are 0 background, 1 label 1, 3 label 2, but those of",
        ),
        (
            {"channels": 2, "normalisation": ["zscore"] * 2},
            r"trained on 3D scans of 2 channel\(s\), but .* on 3D scans of 1",
        ),
    ],
)
def test_runs_that_do_not_belong_together(
    plan: dict[str, object], message: str, supervised_run: Path, copied: Copied, scans: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        predict([supervised_run, copied("other", **plan)], scans, tmp_path / "masks")
    assert not (tmp_path / "masks").exists()


def test_names_count_where_both_runs_have_them(supervised_run: Path, copied: Copied) -> None:
    named = copied("named", class_names=["background", "front", "back"])
    swapped = copied("swapped", class_names=["background", "back", "front"])
    assert mlbseg.load(supervised_run, named).class_names == {0: "background", 1: "front", 2: "back"}
    with pytest.raises(UserError, match="its classes are 0 background, 1 back, 2 front, but"):
        mlbseg.load(named, swapped)


def test_one_component_is_kept_where_all_plans_say_so(copied: Copied) -> None:
    runs = [copied("a", largest_component=[1, 2]), copied("b", largest_component=[2])]
    assert [mlbseg.load(*each).in_one_piece for each in (runs[:1], runs[1:], runs)] == [(1, 2), (2,), (2,)]


def test_a_part_of_the_split_is_that_of_all_runs(
    supervised_run: Path, mlb_run: Path, copied: Copied, scans: Path, tmp_path: Path
) -> None:
    assert set(predict([supervised_run, mlb_run], scans, tmp_path, only="clean").masks) == {
        "case_0", "case_1", "case_2",
    }  # fmt: skip
    other = copied("other")
    split = json.loads((other / "split.json").read_text())
    (other / "split.json").write_text(
        json.dumps(split | {"test": ["case_2"], "clean": ["case_0", "case_1", "case_3"]})
    )
    with pytest.raises(UserError, match="no case is in the test part of the splits of all 2 runs"):
        predict([supervised_run, other], scans, tmp_path / "none", only="test")
    with pytest.raises(UserError, match="no case is in the test part of the run's split"):
        predict([supervised_run, mlb_run], scans, tmp_path / "none", only="test")


def test_the_command_takes_runs_then_scans(
    command: Command, supervised_run: Path, mlb_run: Path, scans: Path, tmp_path: Path
) -> None:
    images = [scans / "images" / f"case_{i}.nii.gz" for i in (4, 5)]
    out = command(
        "predict", supervised_run, mlb_run, *images, "--out", tmp_path / "masks", "--uncertainty", "-q"
    )
    assert (out.code, out.out) == (0, f"wrote 2 masks to {tmp_path / 'masks'}\n")
    assert len(list((tmp_path / "masks/uncertainty").iterdir())) == 4
    wrong = command("predict", supervised_run, images[0], mlb_run, "--out", tmp_path / "none")
    assert (wrong.code, "a run folder among the scans" in wrong.err) == (2, True)
    wrong = command("predict", supervised_run, mlb_run, "--out", tmp_path / "none")
    assert (wrong.code, "no scans were given, expected RUN [RUN ...] SCANS" in wrong.err) == (2, True)
    assert not (tmp_path / "none").exists()


# --- files --------------------------------------------------------------------------------------------------


def test_a_single_file_in_and_out(
    command: Command, supervised_run: Path, scans: Path, tmp_path: Path
) -> None:
    scan, out = scans / "images" / "case_5.nii.gz", tmp_path / "new" / "x_seg.nrrd"
    done = command("predict", supervised_run, scan, "--out", out, "--probabilities", "--uncertainty", "-q")
    assert (done.code, done.out) == (0, f"wrote 1 mask to {out}\n")
    assert {p.name for p in out.parent.rglob("*.nrrd")} == {
        "x_seg.nrrd", "x_seg_0.nrrd", "x_seg_1.nrrd", "x_seg_2.nrrd", "x_seg_entropy.nrrd",
    }  # fmt: skip
    mask, geometry = read_label(out)
    np.testing.assert_array_equal(mask, mlbseg.load(supervised_run).predict(scan))
    assert geometry == read_scan([scan]).geometry
    again = command("predict", supervised_run, scan, "--out", out, "-q")
    assert (again.code, "exists already (pass --overwrite" in again.err) == (2, True)
    many = command("predict", supervised_run, scans, "--out", tmp_path / "y.nii.gz")
    assert (many.code, "the name of one mask, but found 8 scans, expected one" in many.err) == (2, True)
    for name in ("z.jpg", "z.png", "z.h5", "z.mhd"):
        odd = command("predict", supervised_run, scan, "--out", tmp_path / name, "-q")
        assert (odd.code, "expected a name that ends in .nii.gz, .nii" in odd.err) == (2, True)
    itself = command("predict", supervised_run, scan, "--out", scan, "--overwrite", "-q")
    assert (itself.code, "is the scan itself" in itself.err) == (2, True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new"]


def test_masks_that_are_there_are_skipped_on_request(
    command: Command, supervised_run: Path, scans: Path, tmp_path: Path
) -> None:
    (tmp_path / "case_4.nii.gz").write_text("mine")
    arguments = ("predict", supervised_run, scans, "--only", "case_4,case_5", "--out", tmp_path, "-q")
    done = command(*arguments, "--skip-existing", "--json").json
    assert (list(done["masks"]), done["skipped"], done["faults"]) == (["case_5"], ["case_4"], [])
    assert (tmp_path / "case_4.nii.gz").read_text() == "mine"
    told = command(*arguments, "--skip-existing")
    assert "note: 2 left out: their masks are there already: case_4, case_5" in told.out
    # A mask without its map of uncertainty is no finished case, and it is not replaced.
    assert command(*arguments, "--skip-existing", "--uncertainty").code == 2
    assert (tmp_path / "case_4.nii.gz").read_text() == "mine"
    both = command(*arguments, "--skip-existing", "--overwrite")
    assert (both.code, "pass one of them" in both.err) == (2, True)


# --- scans unlike the training scans ---------------------------------------------------------------------------


def test_a_scan_unlike_the_training_scans_is_named(
    command: Command, supervised_run: Path, scans: Path, tmp_path: Path
) -> None:
    image = blocks(9)[0]
    save(tmp_path / "scans/alike.nii.gz", image)
    save(tmp_path / "scans/coarse.nii.gz", image, spacing=(1, 1, 4))
    save(tmp_path / "scans/dark.nii.gz", np.where(image > 150, 100, image))
    save(tmp_path / "scans/tilted.nii.gz", image, direction=(0.8, -0.6, 0, 0.6, 0.8, 0, 0, 0, 1))
    result = predict(supervised_run, tmp_path / "scans", tmp_path / "masks")
    assert set(result.masks) == {"alike", "coarse", "dark", "tilted"}
    assert set(result.unlike) == {"coarse", "dark", "tilted"}
    assert result.unlike["coarse"] == (
        "spacing head to foot 4 mm, training 1",
        "field of view head to foot 64 mm, training 16",
    )
    assert result.unlike["tilted"] == ("tilted by 37 degrees, training up to 0",)
    told = command(
        "predict", supervised_run, tmp_path / "scans", "--out", tmp_path / "masks", "--overwrite", "-q"
    )
    assert (
        "warning: coarse: unlike the training scans: spacing head to foot 4 mm, training 1; field" in told.out
    )
    assert "warning: look at these masks before you use them" in told.out
    with pytest.warns(UserWarning, match="the scan is unlike the training scans: spacing head to foot 4 mm"):
        mlbseg.load(supervised_run).predict(image, spacing=(4, 1, 1))


def test_hounsfield_units_are_compared_as_they_are(supervised_run: Path) -> None:
    usual = Run.open(supervised_run).usual
    assert usual is not None
    assert usual.scans == 7  # the test case is not looked at
    scan = Scan(blocks(9)[0][np.newaxis], Geometry.identity((20, 18, 16)))
    brighter = Scan(scan.array * 3 + 500, scan.geometry)
    assert not usual.unlike(brighter)  # z-scores are the same
    record = json.loads((supervised_run / FINGERPRINT).read_text())
    channel = record["channels"][0] | {
        "absolute": True, "deviation": 50.0, "low": [70, 80], "median": [100, 120], "high": [310, 330],
    }  # fmt: skip
    absolute = Usual(7, usual.spacing, usual.view, 0.0, (type(usual.channels[0])(**channel),))  # type: ignore[misc]
    assert not absolute.unlike(scan)
    assert [line.split(",")[0].rsplit(" ", 1)[0] for line in absolute.unlike(brighter)] == [
        "the darkest values", "the median value", "the brightest values",
    ]  # fmt: skip


def test_a_run_without_the_record_warns_of_nothing(copied: Copied, tmp_path: Path) -> None:
    run = copied("old")
    (run / FINGERPRINT).unlink()
    scan = save(tmp_path / "coarse.nii.gz", blocks(9)[0], spacing=(1, 1, 4))
    assert not predict(run, scan, tmp_path / "masks").unlike
    (run / FINGERPRINT).write_text("{}")
    with pytest.raises(UserError, match=f"{FINGERPRINT}.scans: Field required"):
        predict(run, scan, tmp_path / "masks", overwrite=True)
