"""One stage 1 for several runs: methods that differ in stage 2 alone need not each train the same first stage."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mlbseg.config import Config, section_name
from mlbseg.errors import UserError
from mlbseg.files import make_folder, write_atomic
from mlbseg.methods import METHODS
from mlbseg.runs import Run, checkpoints
from mlbseg.runs.lock import sole_trainer
from mlbseg.temporaries import temporary_file
from mlbseg.training.stages import Training


def stage1_settings(config: Config) -> dict[str, Any]:
    """Return the settings that stage 1 depends on: runs with equal ones, of one split and plan, share its weights."""
    settings = config.model_dump(mode="json")
    for name in ("method", *map(section_name, METHODS)):
        settings.pop(name, None)
    settings["train"] = config.train.decided()
    del settings["train"]["lr_bootstrap"], settings["train"]["stage2_factor"]
    return settings


def train_stage1(root: Path, device: torch.device, console: Console | None = None) -> float | None:
    """Train stage 1 of a prepared run to its end; stage 2 is not begun.

    Args:
        root: The run folder, of a method that uses unlabelled cases.
        device: Where to train.
        console: Where progress is shown; silent when None.

    Returns:
        Seconds per step, as `TrainResult` has them.

    Raises:
        UserError: as `mlbseg.training.train`.
        Interrupted: on SIGINT or SIGTERM, after a checkpoint.
    """
    with sole_trainer(root):
        training = Training(Run.open(root), device, console)
        training.run_first()
        return training.seconds_per_step


def begin_from_stage1(root: Path, source: Path) -> None:
    """Give a prepared run the finished stage 1 of another: it goes on as if it had trained that stage itself.

    Files are linked, or copied where links are not possible; neither run ever changes them.

    Args:
        root: The run folder to begin.
        source: The run folder that `train_stage1` has been through.

    Raises:
        UserError: if the stage would not be that of the run, or cannot be copied.
    """
    run, other = Run.open(root), Run.open(source)
    same = {
        "config.yaml": stage1_settings(run.config) == stage1_settings(other.config),
        "plan.json": run.plan == other.plan,
        "split.json": run.split == other.split,
    }
    known = [one.inputs.known for one in (run, other) if one.inputs is not None]
    same["inputs.json"] = len(known) < 2 or known[0] == known[1]
    if different := [name for name, equal in same.items() if not equal]:
        raise UserError(f"{root}: its stage 1 is not that of {source} ({', '.join(different)} differ)")
    finished = [c for c in checkpoints.find(source / "checkpoints") if c.stage == 1][-1:]
    # Linked last: all else is there then, and rows of stage 2 may have joined the log since.
    if any((root / "checkpoints" / checkpoint.path.name).is_file() for checkpoint in finished):
        return
    try:
        shutil.copytree(source / "tensorboard", root / "tensorboard", dirs_exist_ok=True)
        write_atomic(root / "log.csv", (source / "log.csv").read_bytes())
        make_folder(root / "checkpoints")
        # Last: with the checkpoint there, the stage counts as done.
        for checkpoint in finished:
            _link(checkpoint.path, root / "checkpoints" / checkpoint.path.name)
    except OSError as error:
        raise UserError(
            f"{root}: cannot take over stage 1 of {source}: {error.strerror or error} (make room)"
        ) from None


def _link(source: Path, target: Path) -> None:
    """Make a second name for a file, or a copy, whole or not at all; a target that is there stays."""
    try:
        os.link(source, target)
    except FileExistsError:
        return
    except OSError:  # another disk, or one without links
        with temporary_file(target.parent) as temporary:
            shutil.copyfile(source, temporary)
            temporary.replace(target)
