"""Training: what a run leaves behind, that it can be stopped and continued, and how it fails."""

from __future__ import annotations

import csv
import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from blocks import TINY, write_blocks
from conftest import Command
from mlbseg.config import Config
from mlbseg.data.plan import Plan
from mlbseg.data.splits import Split
from mlbseg.errors import FaultsError, UserError
from mlbseg.methods.supervised import Supervised
from mlbseg.runs import checkpoints
from mlbseg.runs.lock import sole_trainer
from mlbseg.training import Interrupted, TrainResult, prepare, stages, train
from mlbseg.training.loop import Loop
from mlbseg.training.scan_labels import write_label
from mlbseg.training.stages import Training
from mlbseg.training.watching import Watch
from mlbseg.types import UNLABELLED, Batch, Losses

pytestmark = pytest.mark.slow

STEPS = 24  # of mlb: 12 of each stage; a checkpoint every 4, a row of the log every 10


def small(data: Path, out: Path, *more: str, steps: int = STEPS, **options: Any) -> TrainResult:
    settings = [*TINY, f"steps={steps}", *more]
    return train(str(data), str(out), overrides=settings, device="cpu", **options)


def weights(run: Path) -> bytes:
    return (run / "model.safetensors").read_bytes()


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def at_step(monkeypatch: pytest.MonkeyPatch, stage: int, step: int, action: Callable[[], object]) -> None:
    """Do something in the middle of a training step (counted from 0)."""
    original = Loop.take_step

    def take_step(self: Loop, batch: Batch) -> Any:
        if (self.stage, self.step) == (stage, step):
            action()
        return original(self, batch)

    monkeypatch.setattr(Loop, "take_step", take_step)


def at_every_step(monkeypatch: pytest.MonkeyPatch, action: Callable[[Batch], object]) -> None:
    """Look at the batch of every training step."""
    original = Loop.take_step

    def take_step(self: Loop, batch: Batch) -> Any:
        action(batch)
        return original(self, batch)

    monkeypatch.setattr(Loop, "take_step", take_step)


def fail(error: BaseException) -> Callable[..., Any]:
    def failing(*_: object, **__: object) -> Any:
        raise error

    return failing


# --- what is left behind ----------------------------------------------------------------------------------


def test_a_run_folder_holds_every_decision_and_result(mlb_run: Path) -> None:
    names = {path.name for path in mlb_run.iterdir()}
    assert names == {
        "config.yaml", "split.json", "env.json", "data.json", "inputs.json", "fingerprint.json", "plan.json", "log.csv",
        "tensorboard", "checkpoints", "model.safetensors", "result.json", ".lock",
    }  # fmt: skip
    assert yaml.safe_load((mlb_run / "config.yaml").read_text())["plan"]["steps"] == STEPS
    result = json.loads((mlb_run / "result.json").read_text())
    assert 0 < result.pop("seconds_per_step") < 60
    assert 1 << 20 < result.pop("peak_memory_bytes") < 1 << 40
    assert all(
        isinstance(warning, str) for warning in result.pop("warnings")
    )  # it has hardly learned anything
    assert result == {
        "steps": STEPS,
        "validation_dice": None,
        "selection": "final weights (no validation set)",
    }
    assert {name.partition(".")[0] for name in load_file(mlb_run / "model.safetensors")} == {
        "teacher",
        "student",
    }
    assert [(c.stage, c.step) for c in checkpoints.find(mlb_run / "checkpoints")] == [(1, 12), (2, 12)]
    assert [path.name for path in mlb_run.rglob(".*")] == [".lock"]  # nothing half-written


def test_the_log_has_the_losses_of_both_stages(mlb_run: Path) -> None:
    table = rows(mlb_run)
    assert [(r["stage"], r["step"]) for r in table] == [("1", "10"), ("1", "12"), ("2", "10"), ("2", "12")]
    for row in table:
        assert float(row["clean"]) > 0
        assert (row["pseudo"] != "") == (row["stage"] == "2")
    assert 0 <= float(table[-1]["kept_pseudo"]) <= 1
    events = EventAccumulator(str(mlb_run / "tensorboard" / "stage2")).Reload()
    assert [e.step for e in events.Scalars("clean")] == [10, 12]
    assert events.Scalars("clean")[-1].value == pytest.approx(float(table[-1]["clean"]))


def test_supervised_training_learns_the_blocks(supervised_run: Path) -> None:
    table = rows(supervised_run)
    assert float(table[-1]["clean"]) < 0.5 * float(table[0]["clean"])


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
    scans: Path, mlb_run: Path, tmp_path: Path
) -> None:
    small(scans, tmp_path / "again")
    small(scans, tmp_path / "other", seed=1)
    assert weights(tmp_path / "again") == weights(mlb_run)
    assert weights(tmp_path / "other") != weights(mlb_run)


def test_the_split_is_kept_to(scans: Path, tmp_path: Path) -> None:
    drawn: set[str] = set()
    original = Loop.take_step

    def take_step(self: Loop, batch: Batch) -> Any:
        drawn.update(batch.case_ids)
        return original(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "take_step", take_step)
        small(scans, tmp_path / "run", labelled=["case_0", "case_1"], test=["case_2"], validation=["case_1"])
    split = Split.read(tmp_path / "run" / "split.json")
    assert (split.clean, split.validation, split.test) == (("case_0",), ("case_1",), ("case_2",))
    assert drawn == {f"case_{i}" for i in (0, 3, 4, 5, 6, 7)}  # neither test nor validation; case_3 is hidden


def test_the_weights_with_the_best_validation_are_kept(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores, seen = iter([0.2, 0.9, 0.4]), []

    def validate(self: object, method: torch.nn.Module) -> float:
        seen.append({k: v.clone() for k, v in method.state_dict().items()})
        return next(scores)

    monkeypatch.setattr(Training, "validate", validate)
    result = small(scans, tmp_path / "run", "validate_every=4", steps=12, method="supervised", validation=1)
    assert result.validation_dice == 0.9
    assert "best Dice on 1 validation case" in result.selection
    kept = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(kept[name], seen[1][name]) for name in kept)
    assert not all(torch.equal(kept[name], seen[2][name]) for name in kept)
    assert [r["validation_dice"] for r in rows(tmp_path / "run") if r["validation_dice"]] == [
        "0.2",
        "0.9",
        "0.4",
    ]


def test_validation_measures_dice(scans: Path, tmp_path: Path) -> None:
    more = ("validate_every=30",)
    result = small(scans, tmp_path / "run", *more, steps=60, method="supervised", validation=["case_3"])
    assert result.validation_dice is not None
    assert 0.5 < result.validation_dice <= 1


def test_labels_that_came_with_cases_are_weighed_beside_pseudo_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = write_blocks(tmp_path / "plain", count=4, labelled=2)
    noisy = write_blocks(tmp_path / "noisy", count=4, labelled=3)
    (noisy / "labels_noisy").mkdir()
    (noisy / "labels" / "case_2.nii.gz").rename(noisy / "labels_noisy" / "case_2.nii.gz")
    for data, terms in ((plain, {"pseudo"}), (noisy, {"initial", "pseudo"})):
        run = tmp_path / "run" / data.name
        small(data, run, steps=4)
        last = rows(run)[-1]
        assert {name for name in ("initial", "pseudo") if last.get(name)} == terms
    # The frozen predictions of the unlabelled cases are learnt from only where that was asked for.
    drawn: list[torch.Tensor | None] = []
    at_every_step(monkeypatch, lambda batch: drawn.append(batch.initial_label))
    for name, settings in (("own", ()), ("frozen", ("mlb.sources=initial,pseudo",))):
        drawn.clear()
        small(noisy, tmp_path / name, *settings, steps=8)
        assert any((label == UNLABELLED).any() for label in drawn if label is not None) == (name == "own")
        written = [path.name for path in (tmp_path / name).glob("initial_labels/*")]
        assert written == ([] if name == "own" else ["case_3.npy"])
    small(noisy, tmp_path / "asked", "mlb.sources=initial", steps=4)
    last = rows(tmp_path / "asked")[-1]
    assert last["initial"]
    assert not last.get("pseudo")


def test_noisy_labels_are_learned_from_as_given(tmp_path: Path) -> None:
    root = write_blocks(tmp_path / "scans", count=5, labelled=4)
    (root / "labels_noisy").mkdir()
    (root / "labels" / "case_3.nii.gz").rename(root / "labels_noisy" / "case_3.nii.gz")
    small(root, tmp_path / "run", steps=4)
    assert Split.read(tmp_path / "run" / "split.json").noisy == ("case_3",)


def test_weights_of_one_patch_are_kept_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_blocks(tmp_path / "scans", count=5, labelled=4)
    (root / "labels_noisy").mkdir()
    (root / "labels" / "case_3.nii.gz").rename(root / "labels_noisy" / "case_3.nii.gz")
    small(root, tmp_path / "run", "stage1_share=0.2", "norm=batch", steps=10)
    files = sorted((tmp_path / "run" / "weights").iterdir())
    assert [f.name for f in files] == [f"{n:08d}.npz" for n in (1, 2, 4, 6, 8)]
    images = []
    for file in files:
        with np.load(file, allow_pickle=False) as found:
            assert str(found["case_id"]) == "case_3"
            images.append(found["image"])
            known = [found[f"label_{name}"] >= 0 for name in ("initial", "pseudo")]
            maps = [found[f"weight_{name}"] for name in ("initial", "pseudo")]
        assert all(not weight[~mask].any() for weight, mask in zip(maps, known, strict=True))
        assert 0.2 < np.concatenate([w[m] for w, m in zip(maps, known, strict=True)]).mean() < 3
    assert all(np.array_equal(image, images[0]) for image in images)
    # To look changes nothing, not even the averages of batch normalisation.
    monkeypatch.setattr("mlbseg.training.loop.kept_steps", lambda steps: set())
    small(root, tmp_path / "blind", "stage1_share=0.2", "norm=batch", steps=10)
    assert weights(tmp_path / "blind") == weights(tmp_path / "run")
    assert not (tmp_path / "blind" / "weights").exists()


def test_where_no_weight_is_decided_none_is_kept(scans: Path, tmp_path: Path) -> None:
    small(scans, tmp_path / "run", steps=4)
    assert not (tmp_path / "run" / "weights").exists()


def test_training_from_another_thread_works(scans: Path, tmp_path: Path) -> None:
    thread = threading.Thread(target=lambda: small(scans, tmp_path / "run", steps=4, method="supervised"))
    thread.start()
    thread.join()
    assert (tmp_path / "run" / "model.safetensors").is_file()


# --- stopped and continued --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def references(
    scans: Path, mlb_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, ...], Path]:
    """Uninterrupted runs by method and overrides."""
    root = tmp_path_factory.mktemp("references")
    small(scans, root / "supervised", method="supervised")
    small(scans, root / "paper", "mlb.mode=paper")
    return {
        ("mlb",): mlb_run,
        ("supervised",): root / "supervised",
        ("mlb", "mlb.mode=paper"): root / "paper",
    }


@pytest.mark.parametrize(
    ("method", "stage", "step", "number"),
    [
        (("supervised",), 1, 17, signal.SIGTERM),
        (("mlb",), 1, 5, signal.SIGINT),
        (("mlb",), 2, 10, signal.SIGTERM),
        (("mlb", "mlb.mode=paper"), 2, 6, signal.SIGINT),
    ],
    ids=str,
)
def test_a_stopped_run_ends_as_if_it_had_not_been_stopped(
    method: tuple[str, ...], stage: int, step: int, number: int,
    scans: Path, references: dict[tuple[str, ...], Path], tmp_path: Path, command: Command,
) -> None:  # fmt: skip
    run = tmp_path / "a run"
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    settings = [v for text in (*TINY, f"steps={STEPS}", *method[1:]) for v in ("-o", text)]
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, stage, step, lambda: signal.raise_signal(number))
        stopped = command("train", scans, "--out", run, "--method", method[0], *settings, "-q")
    assert stopped.code == 128 + number
    assert f"stopped at step {step + 1} of stage {stage}" in stopped.err
    assert f"mlbseg train --resume '{run}'" in stopped.err  # quoted, to be pasted
    newest = checkpoints.find(run / "checkpoints")[-1]
    assert (newest.stage, newest.step) == (stage, step + 1)  # the very last step
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert not (run / "model.safetensors").exists()

    predicted: list[str] = []
    predict = Training._predict
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "_predict", lambda *told: (predicted.append(told[2].id), predict(*told))[1])
        assert command("train", "--resume", run, "-q").code == 0
    if stage == 2:  # the guard looks at what the last network makes of a few scans, no more
        assert sorted(set(predicted)) == sorted(predicted)
        assert len(predicted) == 6
    assert not (run / "looks").exists()
    assert weights(run) == weights(references[method])
    found, expected = (json.loads((root / "result.json").read_text()) for root in (run, references[method]))
    assert found["warnings"] == expected["warnings"]
    assert (run / "log.csv").read_text() == (references[method] / "log.csv").read_text()


def test_batches_that_processes_draw_ahead_are_the_same(scans: Path, mlb_run: Path, tmp_path: Path) -> None:
    small(scans, tmp_path / "run", "train.workers=2")
    assert weights(tmp_path / "run") == weights(mlb_run)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_processes_that_draw_batches_end_with_a_stopped_run(
    number: int, scans: Path, mlb_run: Path, tmp_path: Path, command: Command
) -> None:
    run = tmp_path / "run"
    settings = [v for text in (*TINY, f"steps={STEPS}", "train.workers=2") for v in ("-o", text)]
    drawing: list[multiprocessing.process.BaseProcess] = []

    def stop() -> None:
        drawing.extend(multiprocessing.active_children())
        # As a terminal and torchrun do: all get the signal, from another process.
        subprocess.run(["kill", f"-{int(number)}", *(str(process.pid) for process in drawing)], check=True)
        time.sleep(0.2)
        signal.raise_signal(number)

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 2, 3, stop)
        stopped = command("train", scans, "--out", run, *settings, "-q")
    assert stopped.code == 128 + number
    assert len(drawing) == 2
    assert not any(process.is_alive() for process in drawing)
    assert command("train", "--resume", run, "-q").code == 0
    assert weights(run) == weights(mlb_run)


def test_a_process_that_draws_batches_and_is_killed_is_said_with_a_remedy(
    scans: Path, mlb_run: Path, tmp_path: Path, command: Command
) -> None:
    run = tmp_path / "a run"
    settings = [v for text in (*TINY, f"steps={STEPS}", "train.workers=1") for v in ("-o", text)]
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 2, 3, lambda: [process.kill() for process in multiprocessing.active_children()])
        lost = command("train", scans, "--out", run, *settings, "-q")
    assert lost.code == 2
    assert "a process that draws batches was killed" in lost.err
    assert "workers: 0" in lost.err
    assert "Traceback" not in lost.err
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("workers: 1", "workers: 0"))
    assert command("train", "--resume", run, "-q").code == 0
    assert weights(run) == weights(mlb_run)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_is_gone_while_batches_are_drawn_is_named(
    workers: int, scans: Path, tmp_path: Path, command: Command
) -> None:
    run = tmp_path / "run"
    settings = [
        v
        for text in (*TINY, f"steps={STEPS}", f"train.workers={workers}", "mlb.sources=initial,pseudo")
        for v in ("-o", text)
    ]
    original = Loop.fit

    def fit(self: Loop, title: str, until: int) -> None:
        if self.stage == 2:
            shutil.rmtree(run / "initial_labels")
        original(self, title, until)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "fit", fit)
        gone = command("train", scans, "--out", run, *settings, "-q")
    assert gone.code == 2
    assert re.search(r"initial_labels/case_\d+\.npy: No such file or directory", gone.err)
    assert "Traceback" not in gone.err


KILLED = """
import os, signal, sys
from mlbseg.cli import main
from mlbseg.training.loop import Loop
from mlbseg.training.watching import Watch
stage, step, where = int(sys.argv.pop(1)), int(sys.argv.pop(1)), sys.argv.pop(1)
def kill(): os.kill(os.getpid(), signal.SIGKILL)
original, now = Loop.take_step, [None]
def take_step(self, batch):
    now[0] = (self.stage, self.step)
    if where == "step" and now[0] == (stage, step): kill()
    return original(self, batch)
Loop.take_step = take_step
fsync = os.fsync
def half_written(number):
    if where == "checkpoint" and now[0] == (stage, step): kill()
    fsync(number)
os.fsync = half_written
main()
"""


def killed(*arguments: object) -> None:
    """Run a command in a process of its own that kills itself at a stage and step."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize("method", [("mlb",), ("supervised",)], ids=str)
def test_a_killed_run_ends_as_if_it_had_not_been_killed(
    method: tuple[str, ...], scans: Path, references: dict[tuple[str, ...], Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = [v for text in (*TINY, f"steps={STEPS}") for v in ("-o", text)]
    begin = ("train", scans, "--out", run, "--method", method[0], *settings, "--threads", 1, "-q")
    # The step after row 10 of the log and two after the checkpoint of step 8; then while one is written.
    killed(1, 10, "step", *begin)
    assert rows(run)[-1]["step"] == "10"
    if method == ("mlb",):
        killed(2, 7, "checkpoint", "train", "--resume", run, "--threads", 1, "-q")
        newest = checkpoints.find(run / "checkpoints")[-1]
        assert (newest.stage, newest.step) == (2, 4)
    train(resume=run)
    assert weights(run) == weights(references[method])
    assert (run / "log.csv").read_text() == (references[method] / "log.csv").read_text()


def test_the_best_weights_outlive_an_interruption(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.9, 0.1, 0.2])
    monkeypatch.setattr(Training, "validate", lambda *_: next(scores))
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 1, 5, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Interrupted):
            small(scans, tmp_path / "run", "validate_every=4", steps=12, method="supervised", validation=1)
    kept = checkpoints.find(tmp_path / "run" / "checkpoints")[-1].load(torch.device("cpu"))["best_weights"]
    assert train(resume=tmp_path / "run").validation_dice == 0.9
    final = load_file(tmp_path / "run" / "model.safetensors")
    assert final
    assert all(torch.equal(final[name], kept[name]) for name in final)


def test_a_signal_between_the_stages_is_obeyed_at_once(
    scans: Path, frozen: tuple[Path, Path], tmp_path: Path, command: Command
) -> None:
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        original = Training._predict

        def predict(self: Any, network: Any, case: Any) -> Any:
            if case.id == "case_5":
                signal.raise_signal(signal.SIGINT)
            return original(self, network, case)

        patch.setattr(Training, "_predict", predict)
        asked = (*TINY, f"steps={STEPS}", "mlb.sources=initial,pseudo")
        settings = [v for text in asked for v in ("-o", text)]
        stopped = command("train", scans, "--out", run, *settings, "-q")
    assert stopped.code == 130
    assert "continue with: mlbseg train --resume" in stopped.err
    train(resume=run)
    assert weights(run) == weights(frozen[1])


def test_continuing_a_finished_run_changes_nothing(mlb_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(mlb_run, tmp_path / "run")
    assert train(resume=run).steps == STEPS
    assert weights(run) == weights(mlb_run)
    assert (run / "log.csv").read_bytes() == (mlb_run / "log.csv").read_bytes()


def test_a_resumed_run_takes_no_new_settings(mlb_run: Path) -> None:
    before = weights(mlb_run)
    with pytest.raises(UserError, match="cannot change data or settings, found also: method, override"):
        train(resume=mlb_run, method="supervised", overrides=["train.lr=1"])
    assert weights(mlb_run) == before


def test_what_is_no_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        train(resume=tmp_path)
    with pytest.raises(UserError, match="needs a data folder and --out RUN"):
        train()


def test_a_run_whose_scans_moved_says_so(tmp_path: Path) -> None:
    root = write_blocks(tmp_path / "scans", count=3, labelled=2)
    small(root, tmp_path / "run", steps=4)
    root.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="scans: cannot be opened"):
        train(resume=tmp_path / "run")


@pytest.mark.parametrize(
    "gone",
    [
        "checkpoints",
        "checkpoints/stage1-*",
        "initial_labels",
        "log.csv",
        "tensorboard",
        "weights",
        "env.json",
    ],
)
def test_what_was_deleted_to_save_space_is_made_again(
    frozen: tuple[Path, Path], tmp_path: Path, command: Command, gone: str
) -> None:
    run = shutil.copytree(frozen[0], tmp_path / "run")
    found = list(run.glob(gone))
    assert found
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    result = command("train", "--resume", run)
    assert result.code == 0
    assert weights(run) == weights(frozen[1])
    assert ("no checkpoint is there, so training starts from its first step" in result.err) == (
        gone == "checkpoints"
    )
    assert (run / "log.csv").is_file()
    if gone.startswith("checkpoints"):
        assert (run / "log.csv").read_text() == (frozen[1] / "log.csv").read_text()
    assert len([c for c in checkpoints.find(run / "checkpoints") if c.stage == 2]) == 1


def test_a_finished_run_without_checkpoints_is_not_trained_again(
    mlb_run: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(mlb_run, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    monkeypatch.setattr(Loop, "fit", fail(AssertionError("trained again")))
    result = command("train", "--resume", run)
    assert result.code == 0
    assert "note: " in result.err
    assert "training has finished, nothing is left to do" in result.err
    assert f"trained {STEPS} steps" in result.out
    assert weights(run) == weights(mlb_run)


@pytest.mark.parametrize("stage", [1, 2])
def test_what_killed_processes_left_in_a_run_is_swept_when_it_is_resumed(
    stopped: dict[int, Path], tmp_path: Path, stage: int
) -> None:
    run = shutil.copytree(stopped[stage], tmp_path / "run")
    for folder in (tmp_path, run, run / "checkpoints", run / "tensorboard"):
        (folder / f".mlbseg-{'0' * 32}").write_bytes(b"half a checkpoint")
        (folder / f".mlbseg-{'1' * 32}").mkdir()
        (folder / f".mlbseg-{'1' * 32}" / "mask.nii.gz").write_bytes(b"a mask")
    with sole_trainer(run):
        assert [path.name for path in run.rglob(".*")] == [".lock"]
        assert [path.name for path in tmp_path.iterdir()] == ["run"]


# --- failing ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def stopped(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs that were stopped after step 6 of stage 1 or of stage 2."""
    runs = {}
    for stage in (1, 2):
        runs[stage] = tmp_path_factory.mktemp("stopped") / "run"
        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, stage, 5, lambda: signal.raise_signal(signal.SIGTERM))
            with pytest.raises(Interrupted):
                small(scans, runs[stage])
    return runs


@pytest.fixture(params=[1, 2], ids=["stage1", "stage2"])
def half_done(request: pytest.FixtureRequest, stopped: dict[int, Path], tmp_path: Path) -> Path:
    return shutil.copytree(stopped[request.param], tmp_path / "run")


def newest(run: Path) -> dict[str, Any]:
    """Return the last checkpoint, which must be whole and finite."""
    content = checkpoints.find(run / "checkpoints")[-1].load(torch.device("cpu"))
    assert all(torch.isfinite(value).all() for value in content["method"].values())
    return content


def test_a_loss_that_is_no_number_stops_training(scans: Path, tmp_path: Path, command: Command) -> None:
    run = tmp_path / "run"
    settings = [
        v for text in (*TINY, "steps=12", "train.lr=1e30", "checkpoint_every=1") for v in ("-o", text)
    ]
    result = command("train", scans, "--out", run, *settings, "-q")
    assert result.code == 2
    assert "no longer a number at step" in result.err
    assert "of stage 1, cases case_" in result.err
    step = newest(run)["step"]
    assert f"the last good checkpoint is step {step}" in result.err
    assert "Traceback" not in result.err


def test_where_looking_waits_a_value_that_is_no_number_is_found_before_the_next_checkpoint(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    look = Watch.look

    def counted(self: Watch) -> None:
        looks.append((self._unseen[-1][0] if self._unseen else -1, len(self._unseen)))
        look(self)

    def losses(self: Supervised, batch: Batch, step: int) -> Iterator[Losses]:
        loss = self.student(batch.clean_image).square().mean()
        yield {"clean": loss * (float("nan") if step == 16 else 1)}

    monkeypatch.setattr(Loop, "looks_each_step", False)  # as on a GPU
    monkeypatch.setattr(Watch, "look", counted)
    monkeypatch.setattr(Supervised, "losses", losses)
    run = tmp_path / "run"
    with pytest.raises(
        UserError, match=r"the loss \(clean\) is no longer a number at step 16 of stage 1, cases"
    ):
        small(scans, run, "checkpoint_every=14", method="supervised", steps=60)
    assert newest(run)["step"] == 14
    assert [step for step, unseen in looks if unseen > 1] == [9, 14, 19]


def test_how_often_values_are_looked_at_changes_nothing(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("each", "some"):
        monkeypatch.setattr(Loop, "looks_each_step", name == "each")
        small(scans, tmp_path / name)
    each, some = tmp_path / "each", tmp_path / "some"
    assert (each / "log.csv").read_bytes() == (some / "log.csv").read_bytes()
    assert (each / "model.safetensors").read_bytes() == (some / "model.safetensors").read_bytes()


def test_weights_that_are_no_numbers_are_in_no_checkpoint(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def after_step(self: Supervised, step: int) -> None:
        if step == 6:  # as a step that overflows does
            next(self.student.parameters()).data.view(-1)[0] = torch.inf

    monkeypatch.setattr(Supervised, "after_step", after_step)
    run = tmp_path / "run"
    with pytest.raises(
        UserError, match=r"the loss \(weights\) .* at step 7 of stage 1; the last good .* step 0"
    ):
        small(scans, run, "checkpoint_every=7", method="supervised")
    assert newest(run)["step"] == 0


def test_a_gradient_that_is_no_number_spoils_no_weights(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses(self: Supervised, batch: Batch, step: int) -> Iterator[Losses]:
        logits = self.student(batch.clean_image)
        # The square root of 0 is 0, but its slope is not finite.
        yield {"clean": (logits * 0).abs().sqrt().mean() if step == 6 else logits.square().mean()}

    monkeypatch.setattr(Supervised, "losses", losses)
    with pytest.raises(UserError, match=r"the loss \(gradient\) is no longer a number at step 6 of stage 1"):
        small(scans, tmp_path / "run", "checkpoint_every=1", method="supervised")
    assert newest(tmp_path / "run")["step"] == 6


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("can't allocate memory: 2 TB"),
    ],
    ids=repr,
)
def test_too_little_memory_is_said_with_a_remedy(
    error: Exception, half_done: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = newest(half_done)["step"]
    monkeypatch.setattr(Loop, "take_step", fail(error))
    result = command("train", "--resume", half_done, "-q")
    assert result.code == 2
    assert f"not enough memory; the last checkpoint is step {before} of stage" in result.err
    assert "plan.patch_size" in result.err
    assert newest(half_done)["step"] == before


def test_too_little_memory_before_the_first_checkpoint(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Training, "_fill_cache", fail(MemoryError()))
    with pytest.raises(UserError, match="not enough memory; there is no checkpoint yet"):
        small(scans, tmp_path / "run")


def test_other_errors_are_ours_and_keep_their_traceback(
    half_done: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Loop, "take_step", fail(RuntimeError("sizes do not match")))
    done = command("train", "--resume", half_done, "-q")
    assert done.code == 1
    assert "internal error" in done.err
    kept = Path(re.search(r"\S*mlbseg-error-\S*\.txt", done.err)[0])  # type: ignore[index]
    text = kept.read_text()
    kept.unlink()
    assert "Traceback" in text
    assert "sizes do not match" in text


def test_a_full_disk_leaves_the_last_checkpoint_and_can_be_continued_from(
    half_done: Path, mlb_run: Path, command: Command
) -> None:
    before = newest(half_done)["step"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fail(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        result = command("train", "--resume", half_done, "-q")
    assert result.code == 2
    assert "No space left on device" in result.err
    assert newest(half_done)["step"] == before
    assert not list((half_done / "checkpoints").glob(".*"))
    assert command("train", "--resume", half_done, "-q").code == 0
    assert weights(half_done) == weights(mlb_run)


def _log(run: Path) -> Path:
    return run / "log.csv"


def _board(run: Path) -> Path:
    return run / "tensorboard"


@pytest.mark.parametrize("where", [_log, _board], ids=["log.csv", "tensorboard"])
def test_a_log_that_cannot_be_written_is_named(
    where: Callable[[Path], Path], half_done: Path, mlb_run: Path, command: Command
) -> None:
    path = where(half_done)
    aside = path.rename(path.with_name("aside")) if path.exists() else None
    # A folder where a file should be, and the other way round: no rights stop the superuser.
    path.mkdir() if path.suffix else path.write_text("")
    result = command("train", "--resume", half_done, "-q")
    assert result.code == 2
    assert path.name in result.err
    assert "the last checkpoint is step 6" in result.err
    assert "Traceback" not in result.err
    path.rmdir() if path.suffix else path.unlink()
    if aside:
        aside.rename(path)
    assert command("train", "--resume", half_done, "-q").code == 0
    assert weights(half_done) == weights(mlb_run)


def test_tensorboard_that_cannot_write_is_named(
    half_done: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "events.out")
    monkeypatch.setattr(SummaryWriter, "add_scalar", fail(full))
    result = command("train", "--resume", half_done, "-q")
    assert result.code == 2
    assert "events.out: No space left on device; the last checkpoint is step" in result.err


@pytest.fixture(scope="session")
def frozen(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that learns from what stage 1 predicted, stopped after step 6 of stage 2; and one that went on."""
    half, whole = (tmp_path_factory.mktemp("frozen") / "run" for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 2, 5, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted):
            small(scans, half, "mlb.sources=initial,pseudo")
    shutil.copytree(half, whole)
    train(resume=whole)
    return half, whole


def test_initial_labels_that_cannot_be_written_are_named(
    frozen: tuple[Path, Path], tmp_path: Path, command: Command
) -> None:
    run = shutil.copytree(frozen[0], tmp_path / "run")
    shutil.rmtree(run / "initial_labels")
    (run / "initial_labels").write_text("")
    result = command("train", "--resume", run, "-q")
    assert result.code == 2
    assert "initial_labels: File exists; the last checkpoint is step 6 of stage 2" in result.err
    (run / "initial_labels").unlink()
    assert command("train", "--resume", run, "-q").code == 0
    assert weights(run) == weights(frozen[1])


def test_whole_scans_are_labelled_anew_by_the_network_as_it_then_stands(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[int, str, str]] = []
    drawn: list[Batch] = []
    before: dict[str, list[bytes]] = {}

    def note(path: Path, label: np.ndarray) -> None:
        if path.parent.parent.name == "pseudo_labels":  # the guard keeps what it sees too
            written.append((len(drawn), path.parent.name, path.stem))
            before.setdefault(path.stem, []).append(label.tobytes())
        write_label(path, label)

    monkeypatch.setattr(stages, "write_label", note)
    with monkeypatch.context() as patch:
        at_every_step(patch, drawn.append)
        small(scans, tmp_path / "run", "mlb.relabel=3")
    others = [f"case_{i}" for i in range(4, 8)]
    assert sorted(written) == [(12 + 4 * turn, str(turn), name) for turn in range(3) for name in others]
    assert all(len(set(labels)) > 1 for labels in before.values())
    for batch in drawn:
        assert (batch.pseudo_label is None) == (batch.image is None)
    assert not (tmp_path / "run" / "pseudo_labels").exists()

    # Killed in the middle of it, the run takes up the labels that are there.
    count = len(written)

    def stop(path: Path, label: np.ndarray) -> None:
        if len(written) == count + 6:
            signal.raise_signal(signal.SIGTERM)
        note(path, label)

    monkeypatch.setattr(stages, "write_label", stop)
    with pytest.raises(Interrupted):
        small(scans, tmp_path / "again", "mlb.relabel=3")
    monkeypatch.setattr(stages, "write_label", note)
    train(resume=tmp_path / "again")
    assert [row[1:] for row in written[count:]] == [row[1:] for row in written[:count]]
    assert weights(tmp_path / "again") == weights(tmp_path / "run")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_labels_whole_scans_too(scans: Path, tmp_path: Path) -> None:
    # Between the stages Lightning brings the networks back to the CPU.
    train(str(scans), str(tmp_path / "run"), overrides=[*TINY, "steps=8", "mlb.relabel=2"], device="cuda")
    assert (tmp_path / "run" / "model.safetensors").is_file()


def _truncated(path: Path) -> str:
    path.write_bytes(path.read_bytes()[:-10])
    return "cannot be read: "


def _a_byte_short(path: Path) -> str:
    path.write_bytes(path.read_bytes()[:-1])
    return "found other bytes than were written"


def _another_voxel(path: Path) -> str:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1  # a class that there is
    path.write_bytes(content)
    return "found other bytes than were written"


def _emptied(path: Path) -> str:
    path.write_bytes(b"")
    return "cannot be read: EOF"


def _zipped(path: Path) -> str:
    with path.open("wb") as file:
        np.savez(file, np.load(path.with_name("case_5.npy")))
    return "cannot be read: the magic string is not correct"


def _a_folder(path: Path) -> str:
    path.unlink()
    path.mkdir()
    return "cannot be read: Is a directory"


def _of_another_shape(path: Path) -> str:
    np.save(path, np.zeros((3, 4, 5), np.uint8))
    return "found uint8 of shape (3, 4, 5)"


def _of_another_type(path: Path) -> str:
    np.save(path, np.load(path).astype(np.float32))
    return "found float32 of shape"


def _of_another_class(path: Path) -> str:
    np.save(path, np.load(path) + np.uint8(3))
    return "found class index "


@pytest.mark.parametrize(
    "damage",
    [
        _truncated,
        _a_byte_short,
        _another_voxel,
        _emptied,
        _zipped,
        _a_folder,
        _of_another_shape,
        _of_another_type,
        _of_another_class,
    ],
)
def test_a_damaged_initial_label_is_named(
    damage: Callable[[Path], str], frozen: tuple[Path, Path], tmp_path: Path, command: Command
) -> None:
    run = shutil.copytree(frozen[0], tmp_path / "run")
    path = run / "initial_labels" / "case_4.npy"
    shape = np.load(path).shape
    found = damage(path)
    result = command("train", "--resume", run, "-q")
    assert result.code == 2
    [line] = result.err.splitlines()
    assert line.startswith(f"error: {path}: {found}")
    assert f"expected class indices below 3 of shape {shape} (delete it to have it predicted anew)" in line


def test_a_deleted_initial_label_is_predicted_anew(frozen: tuple[Path, Path], tmp_path: Path) -> None:
    run = shutil.copytree(frozen[0], tmp_path / "run")
    path = run / "initial_labels" / "case_4.npy"
    before = path.read_bytes()
    path.unlink()
    train(resume=run)
    assert path.read_bytes() == before
    assert weights(run) == weights(frozen[1])


def test_a_damaged_checkpoint_can_be_deleted_and_the_run_continued(
    half_done: Path, mlb_run: Path, command: Command
) -> None:
    for _ in range(2):
        found = checkpoints.find(half_done / "checkpoints")[-1]
        found.path.write_bytes(found.path.read_bytes()[:1000])
        result = command("train", "--resume", half_done, "-q")
        assert result.code == 2
        assert f"{found.path}: damaged checkpoint (delete it to resume from the one before" in result.err
        found.path.unlink()
    assert command("train", "--resume", half_done, "-q").code == 0
    assert weights(half_done) == weights(mlb_run)
    assert (half_done / "log.csv").read_text() == (mlb_run / "log.csv").read_text()


def test_a_checkpoint_of_another_network_is_refused(half_done: Path, command: Command) -> None:
    plan = json.loads((half_done / "plan.json").read_text())
    (half_done / "plan.json").write_text(json.dumps({**plan, "network_channels": [4, 8, 16]}))
    result = command("train", "--resume", half_done, "-q")
    assert result.code == 2
    assert "does not fit this run" in result.err


def test_a_torn_log_is_mended(half_done: Path, mlb_run: Path) -> None:
    with (half_done / "log.csv").open("a") as file:
        file.write("2,10,0.0")
    train(resume=half_done)
    assert (half_done / "log.csv").read_text() == (mlb_run / "log.csv").read_text()


# --- one process at a time --------------------------------------------------------------------------------


PAUSED = """
import sys
from mlbseg.cli import main
from mlbseg.training.loop import Loop
from mlbseg.training.watching import Watch
original = Loop.take_step
def take_step(self, batch):
    if (self.stage, self.step) == (1, 10):
        print("paused", flush=True)
        sys.stdin.read()
    return original(self, batch)
Loop.take_step = take_step
main()
"""


def test_a_run_that_is_being_trained_is_refused_until_its_process_is_gone(
    scans: Path, mlb_run: Path, tmp_path: Path, command: Command
) -> None:
    run = tmp_path / "run"
    settings = [v for text in (*TINY, f"steps={STEPS}") for v in ("-o", text)]
    arguments = ["train", str(scans), "--out", str(run), *settings, "--threads", "1", "-q"]
    with subprocess.Popen(
        [sys.executable, "-c", PAUSED, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "paused\n"
        before = checkpoints.find(run / "checkpoints")
        second = command("train", "--resume", run, "-q")
        third = command("train", scans, "--out", run, "-q")
        assert checkpoints.find(run / "checkpoints") == before
        first.kill()
    assert second.code == third.code == 2
    assert second.err == (
        f"error: {run}: another process is training this run (wait for its end, or stop it first)\n"
    )
    assert "exists already" in third.err
    assert command("train", "--resume", run, "-q").code == 0
    assert weights(run) == weights(mlb_run)
    assert (run / "log.csv").read_text() == (mlb_run / "log.csv").read_text()


def test_of_two_processes_that_begin_the_same_run_one_is_refused(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def another_is_faster(*_: object) -> None:
        (run / "checkpoints").mkdir(parents=True)
        (run / "config.yaml").write_text("theirs")

    monkeypatch.setattr(prepare, "make_method", another_is_faster)
    with pytest.raises(UserError, match=r"run: .*another process has begun a run there"):
        small(scans, run)
    assert (run / "config.yaml").read_text() == "theirs"
    assert {path.name for path in run.iterdir()} == {"checkpoints", "config.yaml"}


def test_a_run_folder_that_cannot_be_locked_for_writing_is_named(half_done: Path, command: Command) -> None:
    (half_done / ".lock").unlink()
    (half_done / ".lock").mkdir()
    result = command("train", "--resume", half_done, "-q")
    assert result.code == 2
    assert result.err == f"error: {half_done / '.lock'}: cannot be written: Is a directory (fix the rights)\n"


def test_a_file_system_without_locks_is_trained_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mlbseg.runs.lock.lock_descriptor", fail(OSError(errno.ENOLCK, os.strerror(errno.ENOLCK)))
    )
    with pytest.warns(UserWarning, match=r"cannot be locked \(No locks available\)"), sole_trainer(tmp_path):
        pass


# --- a folder is a run or is not there --------------------------------------------------------------------


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr
)
def test_no_half_made_run_folder_is_left(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, existing: bool
) -> None:
    run = tmp_path / "run"
    if existing:
        run.mkdir()
    monkeypatch.setattr(Config, "write", fail(error))
    expected = UserError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        small(scans, run)
    assert list(tmp_path.iterdir()) == ([run] if existing else [])
    assert not existing or not list(run.iterdir())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["steps=1"], "plan.steps: found 1, expected at least 2"),
        (["network=unett"], "did you mean 'unet'"),
        (["patch_size=15"], "expected multiples of"),
        (["batch_size=two"], "setting plan.batch_size"),
    ],
)
def test_settings_that_do_not_fit_make_no_run_folder(
    scans: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        small(scans, tmp_path / "run", *more)
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_cannot_be_looked_into_is_refused(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    original = Path.iterdir

    def iterdir(path: Path) -> Iterator[Path]:
        if path.name == "run":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return original(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(UserError, match="run: cannot be looked into: Permission denied"):
        small(scans, tmp_path / "run")


def test_a_run_folder_in_use_is_refused(scans: Path, mlb_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"exists already .* or continue it with --resume"):
        small(scans, mlb_run)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"exists already and is not empty \(choose another --out\)"):
        small(scans, tmp_path / "notes")
    with pytest.raises(UserError, match=r"mine\.txt: cannot be made a folder: Not a directory"):
        small(scans, tmp_path / "notes" / "mine.txt" / "run")
    assert (tmp_path / "notes" / "mine.txt").read_text() == "mine"


def test_mlb_without_unlabelled_scans_says_what_to_do(tmp_path: Path) -> None:
    root = write_blocks(tmp_path / "scans", count=2, labelled=2)
    with pytest.raises(UserError, match="every case is labelled"):
        small(root, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    small(root, tmp_path / "run", steps=2, method="supervised")


def test_bad_cases_stop_training_unless_they_are_left_out(tmp_path: Path) -> None:
    root = write_blocks(tmp_path / "scans", count=5, labelled=3)
    (root / "images" / "case_1.nii.gz").write_bytes(b"not a scan")
    with pytest.raises(FaultsError, match=r"1 fault in .*\n  images/case_1.*\n.*--skip-bad"):
        small(root, tmp_path / "run")
    small(root, tmp_path / "run", steps=4, skip_bad=True)
    split = Split.read(tmp_path / "run" / "split.json")
    assert "case_1" not in {*split.clean, *split.unlabelled, *split.test, *split.validation}
    assert json.loads((tmp_path / "run" / "data.json").read_text())["skipped"] == ["case_1"]


def test_the_schedules(scans: Path, tmp_path: Path) -> None:
    rates = {}
    for name in ("poly", "paper", "constant"):
        small(scans, tmp_path / name, f"schedule={name}", "train.lr=0.1", method="supervised", steps=20)
        rates[name] = [float(row["lr"]) for row in rows(tmp_path / name)]
    assert rates["poly"] == pytest.approx([0.1 * (1 - step / 20) ** 0.9 for step in (9, 19)])
    epochs = [step * Plan.read(tmp_path / "paper" / "plan.json").batch_size // 4 for step in (9, 19)]
    assert rates["paper"] == pytest.approx([0.1 * 20 / (epoch + 20) for epoch in epochs])
    assert rates["constant"] == [0.1, 0.1]
