"""Training: from a folder of scans, of which some are labelled, to a run folder with a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mlbseg.data.cases import LabelOptions
from mlbseg.device import device_name, pick_device
from mlbseg.errors import OtherRank, UserError
from mlbseg.launch import Killed, Signalled, launch
from mlbseg.processes import TIMEOUT, joined, of_first, own_device, require_no_launch
from mlbseg.runs import Run, checkpoints
from mlbseg.runs.lock import sole_trainer
from mlbseg.training.beginning import decide_run, prepare_run
from mlbseg.training.prepare import Planned, require_shares
from mlbseg.training.request import TrainRequest
from mlbseg.training.shared import begin_from_stage1, stage1_settings, train_stage1
from mlbseg.training.signals import Interrupted, how_to_continue
from mlbseg.training.stages import Training, TrainResult

__all__ = [
    "Interrupted", "Planned", "TrainRequest", "TrainResult", "begin_from_stage1", "plan", "stage1_settings", "train",
    "train_run", "train_stage1",
]  # fmt: skip


def train(
    data: str | Path | None = None,
    out: str | Path | None = None,
    *,
    resume: str | Path | None = None,
    method: str | None = None,
    labelled: int | Sequence[str] | None = None,
    test: int | Sequence[str] | None = None,
    validation: int | Sequence[str] = 0,
    labels: Sequence[int] | None = None,
    patient: str | None = None,
    seed: int | None = None,
    preset: str | None = None,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    allow_empty: bool = False,
    ignore: int | None = None,
    sparse: bool = False,
    outside_unknown: bool = False,
    skip_bad: bool = False,
    device: str = "auto",
    devices: int = 1,
    accelerator: str | None = None,
    timeout: float = TIMEOUT,
    cache: str | Path | None = None,
    init: str | Path | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    processes: int | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Train a model from a folder of scans of which some are labelled.

    Args:
        data: The folder (or datalist); see `mlbseg.data.cases.find_cases` for the layouts.
        out: The run folder to create; it must not exist or be empty.
        resume: Continue this run folder instead. Nothing else may be given but where to compute.
        method: A name in `mlbseg.methods.METHODS`; ``mlb`` when None.
        labelled: Hide labels for an experiment: keep those of the first K cases, or of the named ones.
        test: Set cases apart that training never sees: the last N, or the named ones.
        validation: Take clean cases out of training to select the checkpoint: the last N, or the named ones.
        labels: All label values that may occur; those that the data declares, else those of the clean training
            labels, when None.
        patient: A regular expression whose first group, found in each case id, is the patient; recognised when
            None. Cases of one patient are never on two sides of the split.
        seed: Random seed of split, weights and training.
        preset: A name in `mlbseg.config.PRESETS`.
        config: A YAML file of settings.
        overrides: Settings as ``key=value``, such as ``train.lr=0.01``.
        allow_empty: Accept careful labels without any structure: these scans have nothing to find.
        ignore: Label value of voxels whose class is not known, such as 4 of scribbles.
        sparse: Labels were drawn on some slices: slices without a drawn voxel are unknown, not background.
        outside_unknown: What a cropped segmentation of 3D Slicer does not cover is unknown, not background.
        skip_bad: Leave faulty cases out instead of stopping. The others keep their part: fewer than asked may be
            labelled.
        device: ``auto``, ``cpu``, ``cuda`` ...
        devices: Number of devices of this machine to train on together, one process each. Where torchrun has
            started the processes, they are the ranks, and this stays 1. See `docs/many-devices.md`.
        accelerator: Kind of device, instead of `device`: ``auto``, ``cpu`` or ``gpu``.
        timeout: Minutes that a rank waits for another before it gives up.
        cache: Folder for preprocessed scans; the user's cache folder when None.
        init: Weights to start from: a run folder (``RUN:teacher`` for its teacher), a file of weights, a checkpoint of
            nnU-Net or a MONAI bundle. See `docs/starting-weights.md`.
        steps: Optimiser steps of all stages; decided from the data when None.
        minutes: Train for about so long instead: the steps are those that fit, by the rate measured before training.
        processes: Number of processes that read and prepare scans; one per core when None. Fewer are used when memory
            is short.
        console: Where progress is shown; silent when None.

    Raises:
        UserError: for faults of data, settings or machine, and if another process is training this run.
        OtherRank: on the ranks that did not fail themselves.
        Interrupted: on SIGINT or SIGTERM, after a checkpoint.
    """
    request = TrainRequest(
        data=None if data is None else Path(data), out=None if out is None else Path(out), method=method,
        labelled=labelled, test=test, validation=validation, labels=labels, patient=patient, seed=seed, preset=preset,
        config=None if config is None else Path(config), overrides=tuple(overrides),
        label_options=LabelOptions(ignore, sparse, outside_unknown, allow_empty),
        skip_bad=skip_bad, cache=None if cache is None else Path(cache), init=None if init is None else str(init),
        steps=steps, minutes=minutes,
    )  # fmt: skip
    name = device_name(device, accelerator, devices)
    return train_run(
        request, resume=None if resume is None else Path(resume), device=name, devices=devices, timeout=timeout,
        processes=processes, console=console,
    )  # fmt: skip


def train_run(
    request: TrainRequest,
    *,
    resume: Path | None = None,
    device: str = "auto",
    devices: int = 1,
    timeout: float = TIMEOUT,
    processes: int | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Begin a run as the request says, or continue one, and train it to its end. See `train`.

    Raises:
        UserError: for faults of data, settings or machine, and if another process is training this run.
        OtherRank: on the ranks that did not fail themselves.
        Interrupted: on SIGINT or SIGTERM, after a checkpoint.
    """
    require_no_launch(devices)
    target = own_device(device)

    def begin(count: int) -> Path:
        if resume is None:
            return prepare_run(request, device=target, count=count, console=console, processes=processes)
        if given := request.given():
            raise UserError(
                f"--resume cannot change data or settings, found also: {', '.join(given)} "
                f"(leave them out to continue {resume}, or start a new run)"
            )
        run = Run.open(resume)
        require_shares(run.plan, run.config, count, begun=True)
        return resume

    if devices > 1:
        return _launch(begin(devices), device, devices, timeout, processes, shown=console is not None)
    return _train_as_rank(begin, target, timeout, processes, console)


def plan(
    data: str | Path,
    *,
    method: str | None = None,
    labelled: int | Sequence[str] | None = None,
    test: int | Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    patient: str | None = None,
    seed: int | None = None,
    preset: str | None = None,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    allow_empty: bool = False,
    ignore: int | None = None,
    sparse: bool = False,
    outside_unknown: bool = False,
    skip_bad: bool = False,
    cache: str | Path | None = None,
    init: str | Path | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    processes: int | None = None,
    device: str = "auto",
    console: Console | None = None,
) -> Planned:
    """Return what `train` would decide, each decision with its reason. Nothing is trained, and no run is written.

    Arguments are those of `train`.

    Raises:
        UserError: for faults of data and settings.
    """
    request = TrainRequest(
        data=Path(data), method=method, labelled=labelled, test=test, labels=labels, patient=patient, seed=seed,
        preset=preset, config=None if config is None else Path(config), overrides=tuple(overrides),
        label_options=LabelOptions(ignore, sparse, outside_unknown, allow_empty),
        skip_bad=skip_bad, cache=None if cache is None else Path(cache),
        init=None if init is None else str(init), steps=steps, minutes=minutes,
    )  # fmt: skip
    return decide_run(request, device=pick_device(device), console=console, processes=processes)


def _train_as_rank(
    begin: Callable[[int], Path],
    target: torch.device,
    timeout: float,
    processes: int | None,
    console: Console | None,
) -> TrainResult:
    """Train in this process: by itself, or as one of the ranks that were started."""
    root: Path | None = None
    try:
        with joined(target, timeout) as ranks, ExitStack() as held:
            root = of_first(ranks, lambda: begin(ranks.count))
            of_first(ranks, lambda: held.enter_context(sole_trainer(root)))
            run = Run.open(root)
            shown = console if ranks.index == 0 else None
            return Training(run, target, shown, ranks, processes=processes).run_stages()
    except OtherRank as lost:
        if root is None or lost.told:
            raise
        raise OtherRank(f"{lost} ({how_to_continue(root)})", told=False) from None


def _launch(
    root: Path, device: str, count: int, timeout: float, processes: int | None, *, shown: bool
) -> TrainResult:
    """Train a run that is prepared with several processes of this machine."""
    arguments = {
        "root": str(root), "device": device, "timeout": timeout, "processes": processes, "shown": shown,
    }  # fmt: skip
    try:
        told = launch("mlbseg.training:_launched", arguments, count)[0]
        return TrainResult(root, **{**told, "warnings": tuple(told["warnings"])})
    except Signalled as stop:
        newest = checkpoints.find(root / "checkpoints")[-1:]
        where = "".join(f" at step {c.step} of stage {c.stage}" for c in newest)
        raise Interrupted(root, stop.number, where) from None
    except Killed as error:
        raise UserError(f"{error} ({how_to_continue(root)})") from None


def _launched(root: str, device: str, timeout: float, processes: int | None, shown: bool) -> dict[str, Any]:
    """Be a rank of those that `_launch` starts."""
    console = Console(stderr=True) if shown else None
    result = train_run(
        TrainRequest(),
        resume=Path(root),
        device=device,
        timeout=timeout,
        processes=processes,
        console=console,
    )
    return {name: value for name, value in asdict(result).items() if name != "run"}
