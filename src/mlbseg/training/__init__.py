"""Training: from a folder of scans, of which some are labelled, to a run folder with a model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mlbseg.config import load_config
from mlbseg.errors import UserError
from mlbseg.run import Run, pick_device
from mlbseg.training.lock import sole_trainer
from mlbseg.training.prepare import prepare_run
from mlbseg.training.signals import Interrupted
from mlbseg.training.stages import Training, TrainResult

__all__ = ["Interrupted", "TrainResult", "train"]

# Lightning's hints and device notes would drown the progress; its warnings still come through.
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


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
    seed: int | None = None,
    preset: str | None = None,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    skip_bad: bool = False,
    device: str = "auto",
    cache: str | Path | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Train a model from a folder of scans of which some are labelled.

    Args:
        data: The folder (or datalist); see `mlbseg.data.cases.find_cases` for the layouts.
        out: The run folder to make; it must not exist or be empty.
        resume: Continue this run folder instead; nothing else but `device` may be given.
        method: A name in `mlbseg.methods.METHODS`; ``mlb`` when None.
        labelled: Hide labels for an experiment: keep those of the first K cases, or of the named ones.
        test: Set cases apart that training never sees: the last N, or the named ones.
        validation: Clean cases taken out of training to choose the checkpoint by: the last N, or the named ones.
        labels: All label values that may occur; those that the data declares, else those of the clean training
            labels, when None.
        seed: Of everything random.
        preset: A name in `mlbseg.config.PRESETS`.
        config: A YAML file of settings.
        overrides: ``key=value`` settings, such as ``train.lr=0.01``.
        skip_bad: Leave faulty cases out instead of stopping. The others keep their part: fewer than asked may be
            labelled.
        device: ``auto``, ``cpu``, ``cuda`` ...
        cache: Where preprocessed scans are kept; the user's cache folder when None.
        console: Where progress is shown; silent when None.

    Raises:
        UserError: for faults of data, settings or machine, and if another process is training this run.
        Interrupted: on SIGINT or SIGTERM, after a checkpoint.
    """
    if resume is not None:
        root = Path(resume)
        choices = {
            "data": data, "out": out, "method": method, "labelled": labelled, "test": test, "labels": labels,
            "validation": validation or None, "seed": seed, "preset": preset, "config": config,
            "override": overrides or None, "skip_bad": skip_bad or None, "cache": cache,
        }  # fmt: skip
        if given := [name for name, value in choices.items() if value is not None]:
            raise UserError(f"--resume continues {root} as it was begun, found also: {', '.join(given)}")
    elif data is None or out is None:
        raise UserError("training needs a data folder and --out RUN (or --resume RUN)")
    else:
        root = Path(out)
        settings = load_config(
            None if config is None else Path(config),
            preset=preset,
            overrides=overrides,
            method=method,
            seed=seed,
        )
        prepare_run(
            Path(data), root, settings, labelled=labelled, test=test, validation=validation, labels=labels,
            skip_bad=skip_bad, device=device, cache=cache, console=console,
        )  # fmt: skip
    run = Run.open(root)
    with sole_trainer(root):
        return Training(run, pick_device(device), console).run_stages()
