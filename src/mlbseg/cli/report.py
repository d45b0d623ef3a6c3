"""`mlbseg report`, and the page that training leaves behind."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlbseg.cli.arguments import Device, Json, Quiet, Run, Threads, set_threads
from mlbseg.cli.ending import finish
from mlbseg.cli.printing import case_progress
from mlbseg.errors import printable

if TYPE_CHECKING:
    from mlbseg.apps.report import Report

AFTER_TRAINING = 8
"""Cases on the page at the end of training: so few that it takes little time compared with training."""


def report(
    run: Run,
    out: Annotated[
        Path | None, typer.Option(help="HTML file to write (default: report.html in the run folder).")
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="Folder of masks to show, instead of predicting the cases.")
    ] = None,
    cases: Annotated[int, typer.Option(help="Largest number of cases to predict and score.", min=1)] = 40,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write one HTML page about a run. It shows scores, slices, curves, plan and warnings."""
    from mlbseg.apps.report import report as write_report

    set_threads(threads)
    with case_progress(quiet or as_json, "predicting for the report") as progress:
        result = write_report(
            run,
            out,
            predictions=predictions,
            cases=cases,
            overwrite=overwrite,
            device=device,
            progress=progress,
        )
    finish(
        result.as_dict(), as_json=as_json,
        lines=[*(f"note: {finding.title}" for finding in result.warnings), f"wrote {result.path}"],
    )  # fmt: skip


def report_of_training(run: Path, device: str, *, quiet: bool) -> tuple[Report | None, str]:
    """Write the page at the end of training.

    Returns:
        What was written, or None and why nothing was. Whatever goes wrong here, the training is done.
    """
    from mlbseg.apps.report import report as write_report

    try:
        with case_progress(quiet, "predicting for the report") as progress:
            result = write_report(
                run, cases=AFTER_TRAINING, compared=1, overwrite=True, device=device, progress=progress
            )
    except KeyboardInterrupt:
        return None, "no report was written: interrupted"
    except Exception as error:  # an internal error too: it is said, and `mlbseg report` shows where it is
        return None, printable(f"no report was written: {type(error).__name__}: {error}")
    return result, ""


def how_good(result: Report, run: Path) -> str:
    """Return in a sentence which cases the scores after training are of, or how to get some of other cases."""
    if result.group == "test" or result.group == "validation":
        if not result.beyond:
            return f"scores: of the {result.group} cases"
        every = result.scored + result.beyond
        again = f"mlbseg report {shlex.quote(str(run))} --cases {every} --overwrite"
        return f"scores: of the first {result.scored} of {every} {result.group} cases ({again} scores all)"
    known = "no case could be scored" if not result.scored else "scores: of labels that training has seen"
    return f"{known}; to know how good it is on other scans, set some apart with --test N"
