"""From a folder to a run folder: what may decide, what may not, and what is refused before anything is written."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from blocks import SIZE, TINY, blocks, save, write_blocks, write_case
from conftest import Command
from kills import killed_at
from mlbseg import train
from mlbseg.config import load_config
from mlbseg.data.batches import StepDataset
from mlbseg.data.plan import Plan
from mlbseg.data.readers import read_label
from mlbseg.data.splits import Split
from mlbseg.errors import FaultsError, UserError
from mlbseg.runs import Run
from mlbseg.runs.lock import sole_trainer
from mlbseg.training.beginning import prepare_run
from mlbseg.training.prepare import require_shares
from mlbseg.training.request import TrainRequest
from mlbseg.types import Batch


def prepared(
    data: Path, out: Path, *overrides: str, method: str = "mlb", count: int = 1, **options: Any
) -> str:
    """Prepare a run and return what was printed."""
    request = TrainRequest(data, out, method, overrides=(*TINY, *overrides), **options)
    printed = io.StringIO()
    prepare_run(request, device=torch.device("cpu"), count=count, console=Console(file=printed, width=200))
    return printed.getvalue()


def decisions(run: Path) -> tuple[str, str]:
    return (run / "split.json").read_text(), (run / "plan.json").read_text()


def garbage(path: Path) -> None:
    path.write_bytes(b"not a label")


def background(path: Path) -> None:
    save(path, np.zeros(SIZE, np.uint8))


def another_value(path: Path) -> None:
    save(path, np.full(SIZE, 9, np.uint8))


def of_another_size(path: Path) -> None:
    save(path, blocks(0, (4, 5, 6))[1])


def labelled_as(root: Path, name: str, *values: int, folder: str = "labels") -> None:
    """Give case `name` a label whose two blocks have these values."""
    (root / "labels" / f"{name}.nii.gz").unlink(missing_ok=True)
    label = np.array([0, *values], np.uint8)[blocks(0)[1]]
    save(root / folder / f"{name}.nii.gz", label)


# --- hidden and test labels -------------------------------------------------------------------------------


@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize("damage", [garbage, background, another_value, of_another_size])
def test_what_a_hidden_or_a_test_label_holds_changes_nothing(
    damage: Callable[[Path], None], skip_bad: bool, tmp_path: Path
) -> None:
    root = write_blocks(tmp_path / "scans", count=8, labelled=6)
    asked: dict[str, Any] = {"labelled": 2, "test": 2, "skip_bad": skip_bad}
    prepared(root, tmp_path / "before", **asked)
    split = Split.read(tmp_path / "before" / "split.json")
    hidden = set(split.unlabelled) & {f"case_{i}" for i in range(6)}
    assert len(hidden) == len(split.test) == 2
    for name in (*hidden, *split.test):
        damage(root / "labels" / f"{name}.nii.gz")
    printed = prepared(root, tmp_path / "after", **asked)
    assert decisions(tmp_path / "after") == decisions(tmp_path / "before")
    assert json.loads((tmp_path / "after" / "data.json").read_text())["skipped"] == []
    assert not any(word in printed for word in ("note:", "left out:"))


def test_a_label_that_is_trained_on_or_validated_on_is_checked(tmp_path: Path) -> None:
    root = write_blocks(tmp_path / "scans", count=5, labelled=3)
    for name in ("case_0", "case_1"):
        garbage(root / "labels" / f"{name}.nii.gz")
    asked: dict[str, Any] = {"labelled": ["case_0", "case_2"], "validation": ["case_2"]}
    with pytest.raises(FaultsError, match=r"1 fault in .*\n  labels/case_0"):
        prepared(root, tmp_path / "run", **asked)
    asked = {"labelled": ["case_0", "case_2"], "validation": ["case_0"]}
    with pytest.raises(FaultsError, match=r"1 fault in .*\n  labels/case_0"):
        prepared(root, tmp_path / "run", **asked)


def test_hiding_labels_makes_unlabelled_cases(tmp_path: Path) -> None:
    root = write_blocks(tmp_path / "scans", count=3, labelled=3)
    assert "no unlabelled case" not in prepared(root, tmp_path / "few", labelled=1)
    assert "no unlabelled case" in prepared(root, tmp_path / "all", method="supervised")


# --- cases that are left out ------------------------------------------------------------------------------


def test_a_bad_case_leaves_the_split_of_the_others_as_it_was(tmp_path: Path) -> None:
    root = write_blocks(tmp_path / "scans", count=8, labelled=6)
    asked: dict[str, Any] = {"labelled": 3, "test": 2, "validation": 1}
    prepared(root, tmp_path / "before", **asked)
    before = Split.read(tmp_path / "before" / "split.json")
    bad = (before.clean[0], before.unlabelled[0], before.test[0])
    for name in bad:
        garbage(root / "images" / f"{name}.nii.gz")
    printed = prepared(root, tmp_path / "after", skip_bad=True, **asked)
    after = Split.read(tmp_path / "after" / "split.json")
    for part in ("clean", "noisy", "unlabelled", "validation", "test"):
        assert getattr(after, part) == tuple(n for n in getattr(before, part) if n not in bad)
    assert len(after.clean) == 1
    assert f"left out: {', '.join(sorted(bad))}" in printed
    assert all(name in after.rule for name in bad)
    assert json.loads((tmp_path / "after" / "data.json").read_text())["skipped"] == sorted(bad)


def test_leaving_out_the_last_clean_case_is_refused(tmp_path: Path) -> None:
    root = write_blocks(tmp_path / "scans", count=5, labelled=3)
    asked: dict[str, Any] = {"labelled": ["case_0", "case_1"], "validation": ["case_1"], "skip_bad": True}
    background(root / "labels" / "case_0.nii.gz")
    with pytest.raises(UserError, match="no clean case is left to train on without case_0"):
        prepared(root, tmp_path / "run", **asked)
    assert not (tmp_path / "run").exists()


def test_without_a_clean_case_the_faults_of_names_are_told(tmp_path: Path) -> None:
    root = write_blocks(tmp_path / "scans", count=2, labelled=0)
    save(root / "labels" / "kase_0.nii.gz", blocks(0)[1])
    with pytest.raises(FaultsError) as caught:
        prepared(root, tmp_path / "run")
    assert "kase_0" in str(caught.value)
    assert "no clean case among 2" in str(caught.value)


# --- label values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["noisy", "validation"])
def test_a_value_that_no_clean_label_has_is_named_before_there_is_a_run(part: str, tmp_path: Path) -> None:
    root = write_blocks(tmp_path / "scans", count=6, labelled=4)
    noisy = part == "noisy"
    for name in ("case_2", "case_3"):  # two of them: not the odd one out
        labelled_as(root, name, 1, 7, folder="labels_noisy" if noisy else "labels")
    asked: dict[str, Any] = {} if noisy else {"validation": ["case_2", "case_3"]}
    with pytest.raises(FaultsError) as caught:
        prepared(root, tmp_path / "run", **asked)
    assert [fault.case_id for fault in caught.value.faults] == ["case_2", "case_3"]
    message = str(caught.value.faults[0])
    assert message.startswith("case_2: label values {0, 1, 7}, expected {0, 1, 2} as in the clean labels")
    assert "--labels 0,1,2,7" in message
    assert not (tmp_path / "run").exists()

    prepared(root, tmp_path / "all", labels=[0, 1, 2, 7], **asked)
    plan = Plan.read(tmp_path / "all" / "plan.json")
    assert plan.label_values == (0, 1, 2, 7)
    assert plan.class_names == ("background", "label 1", "label 2", "label 7")
    assert "left out: case_2, case_3" in prepared(root, tmp_path / "rest", skip_bad=True, **asked)
    assert Plan.read(tmp_path / "rest" / "plan.json").label_values == (0, 1, 2)


@pytest.mark.slow
def test_a_value_that_only_noisy_labels_have_can_be_trained_with(tmp_path: Path, command: Command) -> None:
    root = write_blocks(tmp_path / "scans", count=3, labelled=2)
    labelled_as(root, "case_1", 1, 7, folder="labels_noisy")
    settings = [v for text in (*TINY, "steps=2") for v in ("-o", text)]
    refused = command("train", root, "--out", tmp_path / "run", *settings, "-q")
    assert refused.code == 2
    [remedy] = [word for line in refused.err.splitlines() if "--labels" in line for word in line.split()[-1:]]
    values = remedy.strip(")")
    assert values == "0,1,2,7"
    assert command("train", root, "--out", tmp_path / "run", *settings, "-q", "--labels", values).code == 0


# --- overrides of the plan --------------------------------------------------------------------------------


def test_every_decision_of_the_plan_can_be_overridden(tmp_path: Path) -> None:
    root = write_blocks(tmp_path / "scans", count=4, labelled=2)
    window = {"lower": 0.0, "upper": 300.0, "mean": 120.0, "std": 40.0}
    prepared(
        root, tmp_path / "run", "plan.flip_axes=0", "plan.orientation=RAS", "plan.label_values=0,2,1",
        "plan.class_names=nothing,core,rim", "plan.normalisation=ct",
        f"plan.intensity={json.dumps(window)}",
    )  # fmt: skip
    plan = Plan.read(tmp_path / "run" / "plan.json")
    assert plan.flip_axes == (0,)
    assert plan.orientation == "RAS"
    assert (plan.label_values, plan.class_names) == ((0, 2, 1), ("nothing", "core", "rim"))
    assert plan.intensity == (window,)
    for name in ("flip_axes", "orientation", "label_values", "class_names", "intensity"):
        assert plan.reasons[name] == "Set by the user."
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["plan"]
    assert saved["orientation"] == "RAS"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("plan.orientation=XYZ", "plan.orientation: .*expected one letter of each"),
        ("plan.label_values=0,1", r"label values \{0, 1, 2\}, expected \{0, 1\}"),
        ("plan.class_names=a,b", "plan.class_names: found .*3 names"),
        ("plan.flip_axes=3", r"plan.flip_axes: found 3, input should be less than or equal to 2"),
    ],
)
def test_an_override_that_does_not_fit_makes_no_run_folder(
    override: str, message: str, tmp_path: Path
) -> None:
    root = write_blocks(tmp_path / "scans", count=4, labelled=2)
    with pytest.raises(UserError, match=message):
        prepared(root, tmp_path / "run", override)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_flipped_orientation_gives_masks_in_the_scans_own_pose(tmp_path: Path, command: Command) -> None:
    root = write_blocks(tmp_path / "scans", count=4, labelled=2)
    settings = [v for text in (*TINY, "steps=4", "plan.orientation=RAS") for v in ("-o", text)]
    assert command("train", root, "--out", tmp_path / "run", *settings, "-q").code == 0
    assert command("predict", tmp_path / "run", root, "--out", tmp_path / "masks", "-q").code == 0
    assert command("evaluate", tmp_path / "masks", root / "labels").code in (0, 2)
    assert len(list((tmp_path / "masks").iterdir())) == 4


# --- the paper's settings ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_paper_preset_trains_in_2d_on_3d_scans(tmp_path: Path, command: Command) -> None:
    root = tmp_path / "scans"
    for i in range(4):
        write_case(root, f"case_{i}.nii.gz", i, labelled=i < 2, size=(8, 18, 20))
    small = [v for text in ("network_channels=2,2,4,4,4", "patch_size=32", "steps=2") for v in ("-o", text)]
    done = command(
        "train", root, "--out", tmp_path / "run", "--preset", "paper", *small, "--device", "cpu", "-q"
    )
    assert (done.code, done.err) == (0, "")
    plan = Plan.read(tmp_path / "run" / "plan.json")
    assert (plan.ndim, plan.scan_ndim, plan.network) == (2, 3, "nested-unet")
    assert plan.patch_size == (32, 32)  # larger than a slice
    assert plan.flip_axes == (0, 1)
    from mlbseg.runs import Run

    names = {type(module).__name__ for module in Run.open(tmp_path / "run").network().modules()}
    assert "BatchNorm2d" in names
    assert not any("InstanceNorm" in name for name in names)
    assert command("predict", tmp_path / "run", root, "--out", tmp_path / "masks", "-q").code == 0


@pytest.mark.slow
@pytest.mark.realdata
def test_the_paper_preset_trains_on_slices_of_the_left_atrium(
    realdata: Path, tmp_path: Path, command: Command
) -> None:
    """The paper's setting at a reduced size: slices of 64 pixels, UNet++ with few filters, both stages."""
    names = (realdata / "la" / "train.list").read_text(encoding="utf-8").split()[:4]
    root = tmp_path / "la"
    for folder, kept in (("images", names), ("labels", names)):
        (root / folder).mkdir(parents=True)
        for name in kept:
            (root / folder / f"{name}.nii.gz").symlink_to(realdata / "la" / folder / f"{name}.nii.gz")
    small = [v for text in ("network_channels=4,4,8,8,8", "patch_size=64", "spacing=2.5", "steps=4",
                            "train.stage1_share=0.5") for v in ("-o", text)]  # fmt: skip
    done = command(
        "train", root, "--out", tmp_path / "run", "--preset", "paper", *small, "--labelled", "2", "--test", "1",
        "--device", "cpu", "--cache", tmp_path / "cache", "-q",
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    log = (tmp_path / "run" / "log.csv").read_text(encoding="utf-8").splitlines()
    last = dict(zip(log[0].split(","), log[-1].split(","), strict=True))
    # Both steps of paper mode were taken, and weighed.
    assert all(
        float(last[term]) > 0 for term in ("clean", "clean_teacher", "clean_views", "teacher", "views")
    )
    assert float(last["mass_initial"]) + float(last["mass_pseudo"]) == pytest.approx(1, abs=1e-4)
    assert (
        command("predict", tmp_path / "run", root, "--only", "test", "--out", tmp_path / "masks", "-q").code
        == 0
    )
    (mask,) = (tmp_path / "masks").glob("*.nii.gz")
    assert read_label(mask)[0].shape == read_label(realdata / "la" / "labels" / mask.name)[0].shape


def test_the_paper_preset_is_the_paper_on_3d_scans(tmp_path: Path) -> None:
    root = write_blocks(tmp_path / "scans", count=3, labelled=2)
    request = TrainRequest(root, tmp_path / "run", preset="paper")
    prepare_run(request, device=torch.device("cpu"), count=1, console=None)
    plan = Plan.read(tmp_path / "run" / "plan.json")
    assert (plan.ndim, plan.patch_size, plan.network) == (2, (144, 144), "nested-unet")
    assert plan.network_channels == (64, 128, 256, 512, 1024)
    assert (plan.batch_size, plan.unlabelled_batch_size) == (2, 1)


@pytest.mark.parametrize("unlabelled", [2, 3, 6])
def test_ranks_do_not_part_the_pairs_that_a_method_mixes(unlabelled: int, tmp_path: Path) -> None:
    scans = write_blocks(tmp_path / "scans", count=4, labelled=2)
    settings = ("batch_size=2", f"unlabelled_batch_size={unlabelled}")
    wanted = 4 if unlabelled < 4 else 8
    with pytest.raises(UserError) as caught:
        prepared(scans, tmp_path / "run", *settings, method="ict", count=2)
    assert str(caught.value) == (
        "a batch must divide evenly among 2 ranks, and method 'ict' mixes pairs of images within a rank: "
        f"found plan.unlabelled_batch_size={unlabelled}, expected multiples of 4 "
        f"(such as -o plan.unlabelled_batch_size={wanted})"
    )
    assert not (tmp_path / "run").exists()
    prepared(scans, tmp_path / "alone", *settings, method="ict")
    plan, config = Plan.read(tmp_path / "alone" / "plan.json"), load_config(method="ict")
    with pytest.raises(
        UserError, match=r"the batch of a run is fixed: continue on a number of ranks that divides 1\)"
    ):
        require_shares(plan, config, 2, begun=True)
    prepared(scans, tmp_path / "even", "batch_size=2", "unlabelled_batch_size=4", method="ict", count=2)
    with pytest.raises(
        UserError, match=r"found plan.batch_size=3 and plan.unlabelled_batch_size=6, .* of 2 and 4 \(such"
    ):
        prepared(scans, tmp_path / "run", "batch_size=3", "unlabelled_batch_size=6", method="ict", count=2)


def test_cases_set_apart_for_the_weights_are_some_of_several_clean_ones(tmp_path: Path) -> None:
    scans = write_blocks(tmp_path / "scans", count=4, labelled=2)
    for method, meta, message in (
        ("supervised", 1, "method 'supervised' has no weights to decide"),
        ("mlb", 2, "found 2 of 2 clean cases, expected fewer"),
    ):
        with pytest.raises(UserError, match=message):
            prepared(
                scans, tmp_path / "run", f"train.meta_cases={meta}", "mlb.decides=everywhere", method=method
            )
        assert not (tmp_path / "run").exists()
    for idle in ("mlb.decides=disputes", "mlb.weighting=uniform"):
        with pytest.raises(UserError, match=r"train\.meta_cases: changes nothing"):
            prepared(scans, tmp_path / "run", "train.meta_cases=1", idle)
    with pytest.raises(
        UserError, match=r"direction: changes nothing, as mlb\.weighting=confidence follows no"
    ):
        prepared(
            scans,
            tmp_path / "run",
            "mlb.direction=random",
            "mlb.decides=everywhere",
            "mlb.weighting=confidence",
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("mlb.sources=initial,pseudo", "mlb.weighting=softmax"), r"mlb\.weighting: found softmax"),
        (("mlb.views=flip", "plan.flip_axes=[]"), r"mlb\.views: found flip"),
    ],
    ids=["weighting", "flip"],
)
def test_what_stage_2_would_refuse_is_refused_before_stage_1(
    tmp_path: Path, settings: tuple[str, ...], message: str
) -> None:
    scans = write_blocks(tmp_path / "scans", count=4, labelled=2)
    with pytest.raises(UserError, match=message):
        prepared(scans, tmp_path / "run", *settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("setting", ["weighting=share", "direction=random", "scope=head", "per_source=true"])
def test_a_setting_of_weights_that_nothing_decides_is_refused(tmp_path: Path, setting: str) -> None:
    scans = write_blocks(tmp_path / "scans", count=4, labelled=2)
    with pytest.raises(
        UserError, match=rf"mlb\.{setting.partition('=')[0]}: changes nothing.*decides=everywhere"
    ):
        prepared(scans, tmp_path / "run", f"mlb.{setting}")
    for number, cure in enumerate(("mlb.decides=everywhere", "mlb.sources=initial,pseudo")):
        prepared(scans, tmp_path / f"run{number}", f"mlb.{setting}", cure)
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_case_set_apart_for_the_weights_is_learnt_by_neither_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans = write_blocks(tmp_path / "scans", count=4, labelled=2)
    drawn: list[tuple[tuple[str, ...], bool]] = []
    draw = StepDataset.__getitem__

    def watched(dataset: StepDataset, step: int) -> Batch:
        batch = draw(dataset, step)
        drawn.append((batch.case_ids[: len(batch.clean_image)], batch.meta_image is not None))
        return batch

    monkeypatch.setattr(StepDataset, "__getitem__", watched)
    monkeypatch.setattr("mlbseg.training.loop.kept_steps", lambda steps: set())  # it draws a batch again
    train(
        scans,
        tmp_path / "run",
        overrides=[*TINY, "steps=6", "train.meta_cases=1", "mlb.decides=everywhere"],
        device="cpu",
    )
    assert {name for names, _ in drawn for name in names} == {"case_0"}
    assert [apart for _, apart in drawn] == [False] * 3 + [True] * 3  # stage 1 knows nothing of it


@pytest.mark.slow
@pytest.mark.parametrize("existing", [False, True])
def test_a_run_folder_can_be_begun_again_wherever_its_making_was_killed(
    existing: bool, tmp_path: Path
) -> None:
    data = write_blocks(tmp_path / "scans", count=2, labelled=1, size=(8, 8, 8))
    for change in itertools.count(1):
        place = tmp_path / str(change)
        run = place / "run"
        (run if existing else place).mkdir(parents=True)
        with killed_at(change) as came:
            prepared(data, run)
        if not came():
            break
        begun = (run / "config.yaml").is_file()
        if begun:  # all of it is there
            with sole_trainer(run):
                assert Run.open(run).split.clean
            (run / ".lock").unlink()
        else:
            prepared(data, run)
        assert {path.name for path in run.iterdir()} == {
            "config.yaml", "data.json", "env.json", "fingerprint.json", "inputs.json", "plan.json", "split.json",
        }  # fmt: skip
        assert [path.name for path in place.iterdir()] == ["run"]
    assert change > 15
