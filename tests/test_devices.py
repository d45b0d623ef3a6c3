"""Several devices do what one does, and end together: training, prediction and the scripts in `examples`."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from blocks import TINY, write_blocks
from conftest import REPOSITORY, Command, Outcome
from mlbseg import predict, train
from mlbseg.core.ranks import ALONE, Ranks
from mlbseg.data.batches import StepDataset
from mlbseg.errors import UserError
from mlbseg.runs import checkpoints
from mlbseg.runs.lock import sole_trainer
from mlbseg.training import Interrupted, stages
from mlbseg.training.beginning import prepare_run
from mlbseg.training.loop import Loop
from mlbseg.training.request import TrainRequest
from mlbseg.types import Batch
from ranks import together

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
EVEN = (*TINY, "batch_size=2", "unlabelled_batch_size=2", "train.precision=32")
TWO = ("--devices", 2, "--accelerator", "cpu")
PATIENCE = 300.0  # seconds; generous
# Ranks add up in another order than one does, and training makes more of the difference in float32.
CLOSE = {"rtol": 0, "atol": 2e-3}


def options(*more: str) -> list[str]:
    return [v for text in (*EVEN, *more) for v in ("-o", text)]


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model.safetensors")


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_same_run(found: Path, expected: Path) -> None:
    """Compare weights, logs and initial labels of two runs."""
    one = weights(expected)
    for name, tensor in weights(found).items():
        torch.testing.assert_close(tensor, one[name], **CLOSE)
    assert [(r["stage"], r["step"]) for r in rows(found)] == [(r["stage"], r["step"]) for r in rows(expected)]
    for row, wanted in zip(rows(found), rows(expected), strict=True):
        for name in ("lr", "clean"):
            assert float(row[name]) == pytest.approx(float(wanted[name]), abs=1e-2)
    names = {path.name for path in expected.rglob("*.npy")}
    assert {path.name for path in found.rglob("*.npy")} == names
    assert not [path for path in found.rglob(".*") if path.name != ".lock"]  # nothing half-written


# --- exactly ----------------------------------------------------------------------------------------------


class InDouble(nn.Module):
    """A network in float64 for images of any type."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.double()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x.double())
        return logits


VARIANTS = {
    "supervised": ("supervised", ["steps=6"]),
    "joint": ("mlb", ["steps=8", "stage1_share=0.25", "mlb.views=[zoom-out,flip]", "plan.flip_axes=[0,2]"]),
    "paper": (
        "mlb",
        ["steps=8", "stage1_share=0.25", "mlb.mode=paper", "mlb.weighting=share", "mlb.decides=everywhere"],
    ),
    "two networks": ("cps", ["steps=8", "stage1_share=0.25"]),
    "whole scans": ("mlb", ["steps=8", "stage1_share=0.25", "mlb.relabel=2"]),
}


def trained_in_double(ranks: Ranks, folder: str) -> dict[str, Tensor]:
    """Continue prepared runs, a copy of each for each number of ranks, in float64."""
    make, draw = stages.starting_student, StepDataset.__getitem__

    def getitem(self: StepDataset, step: int) -> Batch:
        batch = draw(self, step)
        batch.clean_image = batch.clean_image.double()
        batch.image = None if batch.image is None else batch.image.double()
        return batch

    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "starting_student", lambda *arguments: InDouble(make(*arguments)))
        patch.setattr(StepDataset, "__getitem__", getitem)
        for variant in VARIANTS:
            run = Path(folder) / variant / str(ranks.count)
            train(resume=run, device="cpu")
            found |= {f"{variant} {name}": tensor for name, tensor in weights(run).items()}
    return found


def test_two_ranks_train_the_parameters_that_one_trains(scans: Path, tmp_path: Path) -> None:
    for variant, (method, more) in VARIANTS.items():
        request = TrainRequest(scans, tmp_path / variant / "1", method, overrides=(*EVEN, *more))
        prepare_run(request, device=CPU, count=2, console=None)
        shutil.copytree(tmp_path / variant / "1", tmp_path / variant / "2")
    one = trained_in_double(ALONE, str(tmp_path))
    for rank in together(2, trained_in_double, str(tmp_path)):
        assert rank.keys() == one.keys()
        for name, tensor in one.items():
            assert tensor.dtype == torch.float64
            torch.testing.assert_close(
                rank[name], tensor, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )


# --- from the command line --------------------------------------------------------------------------------


# Two cases, of which each rank scores one; at the end of a stage only, so that no near tie decides anything.
MLB_OPTIONS: dict[str, Any] = {
    "overrides": [*EVEN, "steps=24", "validate_every=1000"],
    "validation": ["case_2", "case_3"],
}


@pytest.fixture(scope="session")
def alone(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Uninterrupted runs of one process, by method."""
    root = tmp_path_factory.mktemp("alone")
    train(scans, root / "supervised", method="supervised", overrides=[*EVEN, "steps=24"], device="cpu")
    train(scans, root / "mlb", **MLB_OPTIONS, device="cpu")
    return {method: root / method for method in ("supervised", "mlb")}


def dice_of(run: Path) -> float:
    return float(json.loads((run / "result.json").read_text())["validation_dice"])


def test_two_devices_do_what_one_does(
    scans: Path, alone: dict[str, Path], tmp_path: Path, command: Command
) -> None:
    run = tmp_path / "a run"
    arguments = [*options("steps=24", "validate_every=1000"), "--validation", "case_2,case_3"]
    result = command("train", scans, "--out", run, *arguments, *TWO, "--json")
    assert result.code == 0
    assert result.json["steps"] == 24  # of one process: the others say nothing
    assert result.json["validation_dice"] == pytest.approx(dice_of(alone["mlb"]), abs=0.02)
    assert result.err == ""
    assert_same_run(run, alone["mlb"])
    assert [(c.stage, c.step) for c in checkpoints.find(run / "checkpoints")] == [(1, 12), (2, 12)]
    # The command leaves a report besides what the function leaves.
    left = {path.name for path in alone["mlb"].iterdir()} | {"report.html"}
    assert {path.name for path in run.iterdir()} == left


# --- the end of one is the end of all ---------------------------------------------------------------------


def ranks_of_this_process() -> list[int]:
    """Return the ids of the processes that train, in the order in which they were started."""
    found = []
    for path in Path("/proc/self/task").glob("*/children"):
        for word in path.read_text().split():
            with contextlib.suppress(OSError):
                if b"mlbseg.launch" in Path(f"/proc/{word}/cmdline").read_bytes():
                    found.append(int(word))
    return sorted(found)


Interfere = Callable[[Callable[[list[int]], None]], tuple[Path, Outcome]]


@pytest.fixture
def interfere(scans: Path, tmp_path: Path, command: Command) -> Interfere:
    """Train on two devices, and do something to the processes in the middle of it."""
    if not Path("/proc/self/task").is_dir():
        pytest.skip("the processes of another are only found on Linux")

    def run_with(action: Callable[[list[int]], None]) -> tuple[Path, Outcome]:
        run = tmp_path / "a run"
        ranks: list[int] = []

        def act() -> None:
            deadline = time.monotonic() + PATIENCE
            while not (run / "log.csv").exists():
                assert time.monotonic() < deadline
                time.sleep(0.02)
            ranks.extend(ranks_of_this_process())
            action(ranks)

        thread = threading.Thread(target=act)
        thread.start()
        settings = options("steps=5000")
        result = command("train", scans, "--out", run, "--method", "supervised", *settings, *TWO, "-q")
        thread.join()
        assert len(ranks) == 2
        assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
        return run, result

    return run_with


def test_a_signal_stops_all_after_the_same_step(interfere: Interfere) -> None:
    run, result = interfere(lambda ranks: os.kill(os.getpid(), signal.SIGINT))  # `test_launch` has the others
    assert result.code == 128 + signal.SIGINT
    newest = checkpoints.find(run / "checkpoints")[-1]
    assert result.err == (
        f"error: stopped at step {newest.step} of stage 1; continue with: mlbseg train --resume '{run}'\n"
    )


# Has rank 0, which writes, killed in the middle of a step.
KILLED = """
import os, signal
if os.environ.get("RANK") == "0":
    from mlbseg.training.loop import Loop
    original = Loop.take_step
    def take_step(self, batch):
        if (self.stage, self.step) == (2, 6):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, batch)
    Loop.take_step = take_step
"""


def test_a_run_that_lost_a_rank_is_continued_by_one_process(
    scans: Path, alone: dict[str, Path], tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Python reads this file in every process that it starts.
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(KILLED)
    path = os.environ.get("PYTHONPATH")
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), *([path] if path else [])]))
        arguments = [*options("steps=24", "validate_every=1000"), "--validation", "case_2,case_3"]
        result = command("train", scans, "--out", run, *arguments, *TWO, "-q")
    assert (result.code, result.out) == (2, "")
    # Python's own surprise at what this test has done to the rank does not count.
    [line] = [line for line in result.err.splitlines() if "<frozen runpy>" not in line]
    assert "rank 0 of 2 was killed (SIGKILL" in line
    assert line.endswith(f"(continue with: mlbseg train --resume {run})")
    newest = checkpoints.find(run / "checkpoints")[-1]
    assert (newest.stage, newest.step) == (2, 4)
    assert command("train", "--resume", run, "--devices", 1, "-q").code == 0
    assert_same_run(run, alone["mlb"])


def test_a_run_begun_by_one_process_is_continued_by_two(
    scans: Path, alone: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    original = Loop.take_step

    def take_step(self: Loop, batch: Batch) -> Any:
        if (self.stage, self.step) == (1, 6):
            signal.raise_signal(signal.SIGTERM)
        return original(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "take_step", take_step)
        with pytest.raises(Interrupted):
            train(scans, run, **MLB_OPTIONS, device="cpu")
    train(resume=run, devices=2, accelerator="cpu")
    assert_same_run(run, alone["mlb"])


def test_a_loss_that_is_no_number_is_told_once(scans: Path, tmp_path: Path, command: Command) -> None:
    settings = options("steps=12", "train.lr=1e30")
    run = tmp_path / "run"
    result = command("train", scans, "--out", run, "--method", "supervised", *settings, *TWO, "-q")
    assert result.code == 2
    [line] = result.err.splitlines()
    assert "is no longer a number at step" in line
    assert line.count("case_") == 2  # of both ranks


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["batch_size=3", "unlabelled_batch_size=4"],
            r"found plan.batch_size=3, expected multiples of 2 \(such as -o plan.batch_size=4\)",
        ),
        (
            ["batch_size=1", "unlabelled_batch_size=3"],
            r"such as -o plan.batch_size=2 -o plan.unlabelled_batch_size=4",
        ),
        (["train.norm=batch"], "found batch, but 2 ranks do not share its statistics, expected instance or"),
    ],
)
def test_what_two_ranks_cannot_do_as_one_makes_no_run_folder(
    settings: Sequence[str], message: str, scans: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        train(scans, tmp_path / "run", overrides=[*EVEN, *settings, "steps=4"], devices=2, device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_continued_on_a_number_that_does_not_fit(alone: dict[str, Path]) -> None:
    with pytest.raises(
        UserError, match=r"found plan.batch_size=2 .* continue on a number of ranks that divides 2"
    ):
        train(resume=alone["mlb"], devices=3, device="cpu")


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"device": "cpu", "accelerator": "gpu"}, "found --device cpu and --accelerator gpu"),
        ({"accelerator": "gpus"}, "did you mean 'gpu'"),
        ({"devices": 0}, "--devices: found 0"),
        ({"device": "cpu:0", "devices": 2}, "found --device cpu:0 and --devices 2"),
    ],
)
def test_devices_that_contradict_each_other_are_refused(
    choice: dict[str, Any], message: str, alone: dict[str, Path]
) -> None:
    with pytest.raises(UserError, match=message):
        train(resume=alone["supervised"], **choice)


def what_is_said(ranks: Ranks, trained: str, nothing: str) -> list[str]:
    """Return the errors that this rank raises: of a run that is being trained, and of none."""
    said = []
    for action in (lambda: train(resume=trained), lambda: predict(nothing, nothing, nothing)):
        try:
            action()
        except UserError as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def test_what_all_would_say_is_said_by_the_first(alone: dict[str, Path], tmp_path: Path) -> None:
    with sole_trainer(alone["supervised"]):
        first, other = together(2, what_is_said, str(alone["supervised"]), str(tmp_path))
    assert [text.partition(":")[0] for text in first] == ["Busy", "UserError"]
    assert "another process is training this run" in first[0]
    assert "not a run folder" in first[1]
    assert other == [f"OtherRank:{text.partition(':')[2]}" for text in first]  # `cli` keeps quiet about it


# --- prediction -------------------------------------------------------------------------------------------


def masks(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="session")
def eight_masks(alone: dict[str, Path], scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("masks") / "one"
    predict(alone["supervised"], scans, out, device="cpu")
    return out


def test_two_devices_write_the_masks_that_one_writes_but_of_faulty_scans(
    alone: dict[str, Path], eight_masks: Path, tmp_path: Path, command: Command
) -> None:
    scans = write_blocks(tmp_path / "scans", count=8, labelled=0)
    for name in ("case_1", "case_2"):
        (scans / "images" / f"{name}.nii.gz").write_bytes(b"not a scan")
    out = tmp_path / "masks"
    out.mkdir()
    (out / "case_3.nii.gz").write_bytes(b"here already")
    result = command("predict", alone["supervised"], scans, "--out", out, *TWO, "--json")
    assert (result.code, result.err) == (2, "")
    good = [f"case_{i}" for i in (0, 4, 5, 6, 7)]
    assert list(result.json["masks"]) == good
    assert [fault["case_id"] for fault in result.json["faults"]] == ["case_1", "case_2", "case_3"]
    expected = masks(eight_masks)
    assert masks(out) == {
        "case_3.nii.gz": b"here already",
        **{f"{name}.nii.gz": expected[f"{name}.nii.gz"] for name in good},
    }


def test_parts_are_disjoint_and_together_all(
    alone: dict[str, Path], scans: Path, eight_masks: Path, tmp_path: Path, command: Command
) -> None:
    written = []
    for k in (1, 2, 3):
        result = command(
            "predict", alone["supervised"], scans, "--out", tmp_path, "--part", f"{k}/3", "--device", "cpu",
            "--json",
        )  # fmt: skip
        assert result.code == 0  # without --overwrite: no mask is another part's
        written += list(result.json["masks"])
    assert sorted(written) == [f"case_{i}" for i in range(8)]
    assert masks(tmp_path) == masks(eight_masks)
    result = command("predict", alone["supervised"], scans, "--out", tmp_path, "--part", "9/16", "--json")
    assert (result.code, result.json["masks"]) == (0, {})  # more parts than scans: some have none


@pytest.mark.parametrize("part", ["0/16", "17/16", "x", "3", "-1/2", "1/0"])
def test_a_part_that_is_none_is_refused(
    part: str, alone: dict[str, Path], scans: Path, command: Command
) -> None:
    result = command("predict", alone["supervised"], scans, "--out", "masks", f"--part={part}")
    assert result.code == 2
    assert result.err == f"error: --part {part!r}: expected K/N with K from 1 to N, such as 3/16\n"


# --- the scripts ------------------------------------------------------------------------------------------

EXAMPLES = sorted(p for p in (REPOSITORY / "examples").iterdir() if p.suffix in (".sh", ".sbatch"))


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_a_script(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False).stderr == ""
    named = (REPOSITORY / "docs" / "many-devices.md").read_text()
    assert f"examples/{script.name}" in named


def test_the_torchrun_script_trains_and_predicts(
    scans: Path, alone: dict[str, Path], eight_masks: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    environment = {
        **os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "NODES": "1", "PROCESSES": "2",
    }  # fmt: skip
    script = REPOSITORY / "examples" / "torchrun.sh"
    settings = ["--method", "supervised", *options("steps=24")]
    for arguments in (
        ["train", scans, "--out", run, *settings, "--accelerator", "cpu"],
        ["predict", run, scans, "--out", tmp_path / "masks", "--accelerator", "cpu"],
    ):
        done = subprocess.run(
            ["bash", script, *map(str, arguments)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        last = "next: mlbseg predict" if arguments[0] == "train" else "wrote 8 masks"
        assert [line.startswith(last) for line in done.stdout.splitlines()].count(
            True
        ) == 1  # one process speaks
    assert_same_run(run, alone["supervised"])
    assert masks(tmp_path / "masks").keys() == masks(eight_masks).keys()
