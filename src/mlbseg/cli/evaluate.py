"""`mlbseg evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlbseg.cli.arguments import Json, OutsideUnknown, Quiet, Sparse
from mlbseg.cli.ending import finish
from mlbseg.cli.printing import names_note, progress_console
from mlbseg.errors import UserError


def evaluate(
    predictions: Annotated[Path, typer.Argument(help="Folder of masks, or one mask.")],
    references: Annotated[
        Path, typer.Argument(help="Folder of reference labels, matched by name; or that of one mask.")
    ],
    out: Annotated[Path | None, typer.Option(help="CSV file to write, one line per case and class.")] = None,
    ignore: Annotated[
        int | None,
        typer.Option(
            help="Label value of unknown voxels in the references; they are not scored (default: the ignore value of "
            "nnU-Net's dataset.json)."
        ),
    ] = None,
    sparse: Sparse = False,
    outside_unknown: OutsideUnknown = False,
    page: Annotated[
        Path | None, typer.Option("--report", help="HTML file to write, with scores and slices.")
    ] = None,
    scans: Annotated[
        Path | None, typer.Option(help="Folder of scans to show under the masks of the report.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing CSV file or report.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score masks against reference labels. Dice, Jaccard, 95HD and ASSD, in mm and voxels."""
    from mlbseg.evaluation import evaluate as run_evaluate
    from mlbseg.progress import StepProgress

    if page is not None:
        from mlbseg.apps.report.page import require_free_page

        require_free_page(page, overwrite=overwrite)
        if scans is not None and not scans.exists():
            raise UserError(f"--scans: {scans} does not exist, expected the scans of the masks")
    elif scans is not None:
        raise UserError("--scans: only a report shows scans (add --report FILE.html, or leave --scans out)")
    with StepProgress(progress_console(quiet or as_json), "scoring", 0) as progress:
        result = run_evaluate(
            predictions, references, unknown=ignore, sparse=sparse, outside_unknown=outside_unknown, out=out,
            overwrite=overwrite,             progress=lambda done, total: progress.update(done, total=total),
        )  # fmt: skip
    lines = [
        *names_note(result.not_referenced, "without a reference label, not scored"),
        *names_note(result.not_predicted, "of the references without a mask"),
    ]
    if result.unknown:
        count = sum(result.unknown.values())
        lines.append(f"note: {count} unknown voxels in {len(result.unknown)} references were not scored")
    if page is not None:
        from mlbseg.apps.report import masks_report

        masks_report(result, predictions, references, page, scans=scans, overwrite=overwrite)
        lines.append(f"report: {page}")
    finish(
        result.as_dict(), as_json=as_json, tables=[result.table()], notes=result.notes, lines=lines,
        faults=result.faults, where=str(predictions), advice="the table has the cases that could be scored",
    )  # fmt: skip
