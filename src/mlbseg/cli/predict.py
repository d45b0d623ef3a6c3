"""`mlbseg predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlbseg.cli.arguments import (
    Accelerator,
    Device,
    Devices,
    Json,
    Network,
    Quiet,
    Run,
    SharedThreads,
    case_ids,
    part_of,
    set_threads,
)
from mlbseg.cli.ending import finish
from mlbseg.cli.printing import case_progress


def predict(
    run: Run,
    scans: Annotated[list[Path], typer.Argument(help="Folders of scans, scan files, DICOM folders.")],
    out: Annotated[Path, typer.Option(help="Folder for the masks.")],
    network: Network = None,
    only: Annotated[
        str | None,
        typer.Option(
            help="Cases to segment: a part of the run's split (test, unlabelled ...), a file of case ids, or id,id,..."
        ),
    ] = None,
    flips: Annotated[
        bool, typer.Option("--flips", help="Average over flips of the axes that the plan allows (slower).")
    ] = False,
    largest: Annotated[
        bool | None,
        typer.Option(
            "--largest/--no-largest",
            help="Keep the largest component of every class, or all components (default: the plan's, which is the "
            "largest of those classes that are as good as in one piece in every clean label).",
            show_default=False,
        ),
    ] = None,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Also write the probability of each class.")
    ] = False,
    overlap: Annotated[
        float,
        typer.Option(
            help="Overlap of neighbouring windows, as a fraction of the window side.", min=0, max=0.9
        ),
    ] = 0.5,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing masks.")] = False,
    part: Annotated[
        str | None, typer.Option(help="K/N: segment part K of N of the scans, such as 3/16 in a job array.")
    ] = None,
    device: Device = "auto",
    devices: Devices = 1,
    accelerator: Accelerator = None,
    threads: SharedThreads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a mask for each scan, in its own geometry and format."""
    from mlbseg.device import device_name
    from mlbseg.inference import PARTS, PredictOptions, predict_scans

    set_threads(threads)
    options = PredictOptions(
        network=network, flips=flips, largest=largest, overlap=overlap,
        only=only if only is None or only in PARTS else tuple(case_ids(only)),
        probabilities=probabilities, overwrite=overwrite, part=part_of(part),
    )  # fmt: skip
    name = device_name(device, accelerator, devices)
    with case_progress(quiet or as_json, "predicting") as progress:
        result = predict_scans(run, scans, out, options, name, devices, progress)
    count = len(result.masks)
    finish(
        result.as_dict(), as_json=as_json, notes=result.notes,
        lines=[f"wrote {count} {'mask' if count == 1 else 'masks'} to {out}"],
        faults=result.faults, where="the scans", advice="the other scans were segmented" if count else "",
    )  # fmt: skip
