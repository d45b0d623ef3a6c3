"""`mlbseg train`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from mlbseg.cli.arguments import (
    Accelerator,
    AllowEmpty,
    Cache,
    ConfigFile,
    Device,
    Devices,
    Ignore,
    Init,
    Json,
    Labels,
    Minutes,
    OutsideUnknown,
    Override,
    Patient,
    Preset,
    Processes,
    Quiet,
    SharedThreads,
    SkipBad,
    Sparse,
    StepCount,
    Timeout,
    count_or_ids,
    label_values,
    set_threads,
)
from mlbseg.cli.ending import finish
from mlbseg.cli.printing import progress_console
from mlbseg.cli.report import how_good, report_of_training
from mlbseg.launch import speaks


def train(
    data: Annotated[Path | None, typer.Argument(help="Folder of scans, or a CSV/JSON list of them.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder to create.")] = None,
    method: Annotated[
        str | None,
        typer.Option(help="Method: mlb (default), supervised, mean-teacher, bcp ... (see docs/methods.md)."),
    ] = None,
    labelled: Annotated[
        str | None,
        typer.Option(
            help="For experiments: keep the first K labels, or those of the cases in a file (one case id a line) or "
            "in id,id,... and hide the others."
        ),
    ] = None,
    test: Annotated[
        str | None,
        typer.Option(
            help="Set N cases (or a file, or id,id,...) apart for testing; training never sees them."
        ),
    ] = None,
    validation: Annotated[
        str,
        typer.Option(help="Set N labelled cases (or a file, or id,id,...) apart to select the checkpoint."),
    ] = "0",
    labels: Labels = None,
    patient: Patient = None,
    init: Init = None,
    steps: StepCount = None,
    minutes: Minutes = None,
    seed: Annotated[int | None, typer.Option(help="Random seed.")] = None,
    preset: Preset = None,
    config: ConfigFile = None,
    override: Override = None,
    resume: Annotated[Path | None, typer.Option(help="Run folder to continue.")] = None,
    allow_empty: AllowEmpty = False,
    ignore: Ignore = None,
    sparse: Sparse = False,
    outside_unknown: OutsideUnknown = False,
    skip_bad: SkipBad = False,
    cache: Cache = None,
    processes: Processes = None,
    with_report: Annotated[
        bool, typer.Option("--report/--no-report", help="Write report.html into the run folder.")
    ] = True,
    device: Device = "auto",
    devices: Devices = 1,
    accelerator: Accelerator = None,
    timeout: Timeout = 30.0,
    threads: SharedThreads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a model from scans of which some are labelled."""
    from mlbseg.data.cases import LabelOptions
    from mlbseg.device import device_name
    from mlbseg.training import TrainRequest, train_run

    set_threads(threads)
    request = TrainRequest(
        data=data, out=out, method=method, labelled=count_or_ids(labelled), test=count_or_ids(test),
        validation=count_or_ids(validation) or 0, labels=label_values(labels), patient=patient, seed=seed,
        preset=preset, config=config, overrides=tuple(override or ()),
        label_options=LabelOptions(ignore, sparse, outside_unknown, allow_empty),
        skip_bad=skip_bad,
        cache=cache, init=init, steps=steps, minutes=minutes,
    )  # fmt: skip
    result = train_run(
        request, resume=resume, device=device_name(device, accelerator, devices), devices=devices, timeout=timeout,
        processes=processes, console=progress_console(quiet or as_json),
    )  # fmt: skip
    shown, why = None, ""
    if with_report and speaks():
        shown, why = report_of_training(result.run, device_name(device, accelerator), quiet=quiet or as_json)
    score = "" if result.validation_dice is None else f" (validation Dice {result.validation_dice:.3f})"
    lines = [f"trained {result.steps} steps; kept {result.selection}{score}"]
    lines += [f"warning: {warning}" for warning in result.warnings]
    if shown is not None:
        lines += [how_good(shown, result.run), f"report: {shown.path}"]
    elif why:
        lines.append(f"note: {why}")
    lines.append(f"next: mlbseg predict {shlex.quote(str(result.run))} NEW_SCANS --out MASKS")
    record = {"run": str(result.run), "steps": result.steps, "validation_dice": result.validation_dice,
              "selection": result.selection, "report": None if shown is None else str(shown.path),
              "scores": None if shown is None else shown.as_dict()["scores"],
              "warnings": list(result.warnings), "note": why}  # fmt: skip
    scores = None if shown is None else shown.evaluation
    finish(record, as_json=as_json, tables=[] if scores is None else [scores.table()], lines=lines)
