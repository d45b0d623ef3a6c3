"""`mlbseg predict`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from mlbseg.cli.printing import case_progress, names_note
from mlbseg.errors import UserError

MOST_WARNINGS = 5
"""Scans unlike the training scans that are named."""


def predict(
    run: Run,
    scans: Annotated[
        list[Path],
        typer.Argument(
            help="Folders of scans, scan files, DICOM folders; before them further run folders, whose probabilities "
            "are averaged with those of the first."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(help="Folder for the masks; of a single scan also a file, such as x_seg.nii.gz."),
    ],
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
    uncertainty: Annotated[
        bool,
        typer.Option(
            "--uncertainty",
            help="Also write maps from 0 to 1 to uncertainty/: entropy and, of several runs, disagreement.",
        ),
    ] = False,
    overlap: Annotated[
        float,
        typer.Option(
            help="Overlap of neighbouring windows, as a fraction of the window side.", min=0, max=0.9
        ),
    ] = 0.5,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing masks.")] = False,
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Leave out scans whose masks are there already.")
    ] = False,
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
    """Write a mask for each scan, in its own geometry and format. With one run, or with several together."""
    from mlbseg.device import device_name
    from mlbseg.inference import PARTS, PredictOptions, predict_scans

    set_threads(threads)
    options = PredictOptions(
        network=network, flips=flips, largest=largest, overlap=overlap,
        only=only if only is None or only in PARTS else tuple(case_ids(only)),
        probabilities=probabilities, uncertainty=uncertainty, overwrite=overwrite, skip_existing=skip_existing,
        part=part_of(part),
    )  # fmt: skip
    runs, scans = runs_and_scans(run, scans)
    name = device_name(device, accelerator, devices)
    with case_progress(quiet or as_json, "predicting") as progress:
        result = predict_scans(runs, scans, out, options, name, devices, progress)
    count = len(result.masks)
    lines = unlike_lines(result.unlike)
    if result.skipped:
        lines += names_note(result.skipped, "left out: their masks are there already")
    lines.append(f"wrote {count} {'mask' if count == 1 else 'masks'} to {out}")
    finish(
        result.as_dict(), as_json=as_json, notes=result.notes, lines=lines,
        faults=result.faults, where="the scans", advice="the other scans were segmented" if count else "",
    )  # fmt: skip


def runs_and_scans(run: Path, paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Return all run folders, and the scans after them.

    Args:
        run: The first run.
        paths: Further ones, then the scans.

    Raises:
        UserError: if there are no scans, or a run folder is among them.
    """
    from mlbseg.runs import CONFIG

    count = next((i for i, path in enumerate(paths) if not (path / CONFIG).is_file()), len(paths))
    runs, scans = [run, *paths[:count]], list(paths[count:])
    if not scans:
        raise UserError("no scans were given, expected RUN [RUN ...] SCANS: run folders, then scans")
    for path in scans:
        if (path / CONFIG).is_file():
            raise UserError(
                f"{path}: a run folder among the scans, expected all run folders before the scans"
            )
    return runs, scans


def unlike_lines(unlike: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a warning for each scan that is unlike the training scans, of the first ones, and the number of all."""
    lines = [
        f"warning: {case}: unlike the training scans: {'; '.join(found)}"
        for case, found in list(unlike.items())[:MOST_WARNINGS]
    ]
    if len(unlike) > MOST_WARNINGS:
        lines.append(f"warning: {len(unlike)} scans in all are unlike the training scans (--json lists them)")
    if lines:
        lines.append("warning: look at these masks before you use them: the network has not seen such scans")
    return lines
