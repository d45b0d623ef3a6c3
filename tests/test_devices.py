"""Several devices do what one does, and end together: training, prediction and the scripts in `examples`."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from blocks import TINY, write_blocks
from conftest import REPOSITORY, Command
from mlbseg import checkpoints, train
from mlbseg.config import load_config
from mlbseg.core.ranks import ALONE, Ranks
from mlbseg.data.batches import StepDataset
from mlbseg.errors import UserError
from mlbseg.training import Interrupted, stages
from mlbseg.training.loop import Loop
from mlbseg.training.prepare import prepare_run
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
    "supervised": ("supervised", ["steps=20"]),
    "joint": ("mlb", ["steps=40", "mlb.views=[zoom-out,flip]", "plan.flip_axes=[0,2]"]),
    "paper": ("mlb", ["steps=40", "mlb.mode=paper", "mlb.weighting=share"]),
}


def trained_in_double(ranks: Ranks, folder: str) -> dict[str, Tensor]:
    """Continue prepared runs, a copy of each for each number of ranks, in float64."""
    make, draw = stages.make_student, StepDataset.__getitem__

    def getitem(self: StepDataset, step: int) -> Batch:
        batch = draw(self, step)
        batch.clean_image = batch.clean_image.double()
        batch.image = None if batch.image is None else batch.image.double()
        return batch

    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "make_student", lambda *arguments: InDouble(make(*arguments)))
        patch.setattr(StepDataset, "__getitem__", getitem)
        for variant in VARIANTS:
            run = Path(folder) / variant / str(ranks.count)
            train(resume=run, device="cpu")
            found |= {f"{variant} {name}": tensor for name, tensor in weights(run).items()}
    return found


def test_two_ranks_train_the_parameters_that_one_trains(scans: Path, tmp_path: Path) -> None:
    for variant, (method, more) in VARIANTS.items():
        config = load_config(overrides=[*EVEN, *more], method=method)
        prepare_run(
            scans, tmp_path / variant / "1", config, labelled=None, test=None, validation=0, labels=None,
            skip_bad=False, device=CPU, count=2, cache=None, console=None,
        )  # fmt: skip
        shutil.copytree(tmp_path / variant / "1", tmp_path / variant / "2")
    one = trained_in_double(ALONE, str(tmp_path))
    for rank in together(2, trained_in_double, str(tmp_path)):
        assert rank.keys() == one.keys()
        for name, tensor in one.items():
            assert tensor.dtype == torch.float64
            torch.testing.assert_close(rank[name], tensor, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


# --- from the command line --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def alone(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Uninterrupted runs of one process, by method."""
    root = tmp_path_factory.mktemp("alone")
    for method in ("supervised", "mlb"):
        train(scans, root / method, method=method, overrides=[*EVEN, "steps=24"], device="cpu")
    return {method: root / method for method in ("supervised", "mlb")}


def test_two_devices_do_what_one_does(
    scans: Path, alone: dict[str, Path], tmp_path: Path, command: Command
) -> None:
    run = tmp_path / "a run"
    result = command("train", scans, "--out", run, *options("steps=24"), *TWO, "--json")
    assert result.code == 0
    assert result.json["steps"] == 24  # of one process: the others say nothing
    assert "arning" not in result.err
    assert_same_run(run, alone["mlb"])
    assert [(c.stage, c.step) for c in checkpoints.find(run / "checkpoints")] == [(1, 12), (2, 12)]
    assert {path.name for path in run.iterdir()} == {path.name for path in alone["mlb"].iterdir()}


def test_validation_is_that_of_one_process(scans: Path, tmp_path: Path) -> None:
    settings = {
        "method": "supervised", "overrides": [*EVEN, "steps=40", "validate_every=20"], "device": "cpu",
        "validation": ["case_2", "case_3"],
    }  # fmt: skip
    one = train(scans, tmp_path / "one", **settings)  # type: ignore[arg-type]
    two = train(scans, tmp_path / "two", **settings, devices=2)  # type: ignore[arg-type]
    assert one.validation_dice is not None
    assert two.validation_dice == pytest.approx(one.validation_dice, abs=0.02)
    assert two.selection == one.selection


# --- the end of one is the end of all ---------------------------------------------------------------------


def children(pid: int) -> list[int]:
    return [
        int(word)
        for path in Path(f"/proc/{pid}/task").glob("*/children")
        for word in path.read_text().split()
    ]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def long_run(scans: Path, tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A run on two devices, in the middle of its steps."""
    if not Path("/proc/self/task").is_dir():
        pytest.skip("the processes of another are only found on Linux")
    run = tmp_path / "a run"
    arguments = ["train", scans, "--out", run, "--method", "supervised", *options("steps=2000"), *TWO, "-q"]
    with subprocess.Popen(
        [sys.executable, "-m", "mlbseg", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        wait_until(lambda: (run / "log.csv").exists() or process.poll() is not None)
        yield run, process
        process.kill()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_run_with_one_message(
    rank: int, long_run: tuple[Path, subprocess.Popen[str]]
) -> None:
    run, process = long_run
    ranks = children(process.pid)
    assert len(ranks) == 2
    os.kill(sorted(ranks)[rank], signal.SIGKILL)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert out == ""
    [line] = err.splitlines()
    assert f"rank {rank} of 2 was killed (SIGKILL" in line
    assert line.endswith(f"(continue with: mlbseg train --resume '{run}')")
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_after_the_same_step(
    number: signal.Signals, long_run: tuple[Path, subprocess.Popen[str]]
) -> None:
    run, process = long_run
    ranks = children(process.pid)
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + number
    newest = checkpoints.find(run / "checkpoints")[-1]
    assert err == (
        f"error: stopped at step {newest.step} of stage 1; continue with: mlbseg train --resume '{run}'\n"
    )
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


# Has rank 1 killed in the middle of a step.
KILLED = """
import os, signal, sys
if os.environ.get("RANK") == "1":
    from mlbseg.training.loop import Loop
    original = Loop.training_step
    def training_step(self, batch, index):
        if (self.stage, self.step) == ({stage}, {step}):
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, batch, index)
    Loop.training_step = training_step
"""


@pytest.mark.parametrize(("method", "stage"), [("supervised", 1), ("mlb", 2)])
def test_a_run_that_lost_a_rank_is_continued_by_one_process(
    method: str, stage: int, scans: Path, alone: dict[str, Path], tmp_path: Path, command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # Python reads this file in every process that it starts.
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        KILLED.format(stage=stage, step=6)
    )
    path = os.environ.get("PYTHONPATH")
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), *([path] if path else [])]))
        run = tmp_path / "run"
        result = command("train", scans, "--out", run, "--method", method, *options("steps=24"), *TWO, "-q")
    assert result.code == 2
    assert "rank 1 of 2 was killed" in result.err
    newest = checkpoints.find(run / "checkpoints")[-1]
    assert (newest.stage, newest.step) == (stage, 4)
    assert command("train", "--resume", run, "--devices", 1, "-q").code == 0
    assert_same_run(run, alone[method])


@pytest.mark.parametrize(("method", "stage", "step"), [("supervised", 1, 7), ("mlb", 1, 6)])
def test_a_run_begun_by_one_process_is_continued_by_two(
    method: str, stage: int, step: int, scans: Path, alone: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    original = Loop.training_step

    def training_step(self: Loop, batch: Batch, index: int) -> None:
        if (self.stage, self.step) == (stage, step):
            signal.raise_signal(signal.SIGTERM)
        original(self, batch, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "training_step", training_step)
        with pytest.raises(Interrupted):
            train(scans, run, method=method, overrides=[*EVEN, "steps=24"], device="cpu")
    train(resume=run, devices=2, accelerator="cpu")
    assert_same_run(run, alone[method])


def test_a_loss_that_is_no_number_is_told_once(
    scans: Path, tmp_path: Path, command: Command
) -> None:
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
        (["train.norm=batch"], "found batch, whose statistics 2 ranks would not share, expected instance or"),
    ],
)
def test_what_two_ranks_cannot_do_as_one_makes_no_run_folder(
    settings: Sequence[str], message: str, scans: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        train(scans, tmp_path / "run", overrides=[*EVEN, *settings, "steps=4"], devices=2, device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_continued_on_a_number_that_does_not_fit(alone: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"found plan.batch_size=2 .* continue it on a number that divides 2"):
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


def test_a_run_that_is_being_trained_is_refused(alone: dict[str, Path], command: Command) -> None:
    from mlbseg.training.lock import sole_trainer

    with sole_trainer(alone["supervised"]):
        result = command("train", "--resume", alone["supervised"], *TWO, "-q")
    assert result.code == 2
    assert result.err == (
        f"error: {alone['supervised']}: another process is training this run "
        "(wait for its end, or stop it first)\n"
    )


# --- prediction -------------------------------------------------------------------------------------------


def masks(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="session")
def eight_masks(alone: dict[str, Path], scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mlbseg import predict

    out = tmp_path_factory.mktemp("masks") / "one"
    predict(alone["supervised"], scans, out, device="cpu")
    return out


def test_two_devices_write_the_masks_that_one_writes(
    alone: dict[str, Path], scans: Path, eight_masks: Path, tmp_path: Path, command: Command
) -> None:
    result = command("predict", alone["supervised"], scans, "--out", tmp_path / "two", *TWO, "--json")
    assert result.code == 0
    assert list(result.json["masks"]) == [f"case_{i}" for i in range(8)]
    assert masks(tmp_path / "two") == masks(eight_masks)
    assert result.err == ""

    # Again: none is written a second time, and all faults are reported together.
    result = command("predict", alone["supervised"], scans, "--out", tmp_path / "two", *TWO, "-q")
    assert result.code == 2
    assert result.out == f"wrote 0 masks to {tmp_path / 'two'}\n"
    assert [line.split(":")[0].strip() for line in result.err.splitlines()[1:-1]] == [
        f"case_{i}" for i in range(8)
    ]


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


def test_a_bad_scan_is_named_once_and_stops_no_other(
    alone: dict[str, Path], tmp_path: Path, command: Command
) -> None:
    scans = write_blocks(tmp_path / "scans", count=4, labelled=0)
    for name in ("case_1", "case_2"):
        (scans / "images" / f"{name}.nii.gz").write_bytes(b"not a scan")
    result = command("predict", alone["supervised"], scans, "--out", tmp_path / "masks", *TWO, "-q")
    assert result.code == 2
    assert result.out.startswith("wrote 2 masks")
    assert [line.split(":")[0] for line in result.err.splitlines()[:3]] == ["error", "  case_1", "  case_2"]
    assert {path.name for path in (tmp_path / "masks").iterdir()} == {"case_0.nii.gz", "case_3.nii.gz"}


def test_what_all_would_say_is_said_once(tmp_path: Path, command: Command) -> None:
    result = command("predict", tmp_path, tmp_path, "--out", tmp_path / "masks", *TWO, "-q")
    assert result.code == 2
    assert len(result.err.splitlines()) == 1
    assert "not a run folder" in result.err


# --- the scripts ------------------------------------------------------------------------------------------

EXAMPLES = sorted((REPOSITORY / "examples").iterdir())


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
    for arguments in (
        [
            "train",
            scans,
            "--out",
            run,
            "--method",
            "supervised",
            *options("steps=24"),
            "--accelerator",
            "cpu",
        ],
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
        assert len(done.stdout.splitlines()) == (2 if arguments[0] == "train" else 1)  # one process speaks
    assert_same_run(run, alone["supervised"])
    assert masks(tmp_path / "masks").keys() == masks(eight_masks).keys()
