"""`mlbseg report`, and the page that other commands leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mlbseg.cli.arguments import Device, Json, Quiet, Threads, set_threads
from mlbseg.cli.printing import print_line, progress_console
from mlbseg.errors import printable

AFTER_TRAINING = 8
"""Cases that the page at the end of training shows: so few that it takes little beside the training."""


def report(
    run: Annotated[Path, typer.Argument(help="Run folder of `mlbseg train`.")],
    out: Annotated[
        Path | None, typer.Option(help="HTML file to write (default: report.html in the run folder).")
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="Folder of masks to show, in place of predicting the cases.")
    ] = None,
    cases: Annotated[int, typer.Option(help="Predict and score at most so many cases.", min=1)] = 40,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write one HTML page about a run: scores, slices to leaf through, curves, plan, and what speaks against it."""
    from mlbseg.apps.report import report as write_report
    from mlbseg.progress import StepProgress

    set_threads(threads)
    console = progress_console(quiet or as_json)
    with StepProgress(console, "predicting for the report", 0) as progress:
        result = write_report(
            run, out, predictions=predictions, cases=cases, overwrite=overwrite, device=device,
            progress=lambda done, total, case: progress.update(done, {"case": case}, total=total),
        )  # fmt: skip
    if as_json:
        print(
            json.dumps(
                {
                    "report": str(result.path),
                    "scored": result.scored,
                    "group": result.group,
                    "mean_dice": result.mean_dice,
                    "warnings": [f"{f.title}. {f.text}" for f in result.findings if f.warning],
                }
            )
        )
        return
    for finding in result.findings:
        if finding.warning:
            print_line(f"note: {finding.title}")
    print_line(f"wrote {result.path}")


def report_of_training(run: Path, device: str, *, quiet: bool) -> tuple[Path | None, str]:
    """Write the page at the end of a training.

    Returns:
        The page, or None and why there is none: whatever goes wrong here, the training is done.
    """
    from mlbseg.apps.report import report as write_report
    from mlbseg.progress import StepProgress

    try:
        with StepProgress(progress_console(quiet), "predicting for the report", 0) as progress:
            result = write_report(
                run, cases=AFTER_TRAINING, compared=1, overwrite=True, device=device,
                progress=lambda done, total, case: progress.update(done, {"case": case}, total=total),
            )  # fmt: skip
    except KeyboardInterrupt:
        return None, "no report was written: interrupted"
    except Exception as error:  # also a fault of ours: it is said, and `mlbseg report` shows where it is
        return None, printable(f"no report was written: {type(error).__name__}: {error}")
    return result.path, ""
