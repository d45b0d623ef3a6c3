"""`mlbseg audit`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from mlbseg.cli.arguments import Device, Json, Quiet, Run, Threads, set_threads
from mlbseg.cli.ending import finish
from mlbseg.cli.printing import case_progress
from mlbseg.terminal import plain

if TYPE_CHECKING:
    from mlbseg.apps.audit import Audit


def audit(
    run: Run,
    labels: Annotated[
        Path | None,
        typer.Option(help="Folder of labels to judge (default: the labels that the run was given)."),
    ] = None,
    scans: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the scans of --labels (default: the scans that the run was trained on)."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write (default: audit in the run folder).")
    ] = None,
    method: Annotated[
        str, typer.Option(help="regional, disagreement, confident or alignment (see docs/audit.md).")
    ] = "regional",
    threshold: Annotated[float, typer.Option(help="Voxels with a lower trust are suspected, 0 to 1.")] = 0.5,
    smallest: Annotated[
        float | None,
        typer.Option(help="Smallest volume of a suspected region to report, mm³ (mm² in 2D).", min=0),
    ] = None,
    propose: Annotated[
        bool, typer.Option("--propose", help="Also write labels with the suspected regions drawn anew.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing audit.")] = False,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find labels that may be wrong, and where. Writes trust maps, a ranked table and an HTML page."""
    from mlbseg.apps.audit import audit as run_audit

    set_threads(threads)
    with case_progress(quiet or as_json, "judging the labels") as progress:
        result = run_audit(
            run, labels, out, scans=scans, way=method, threshold=threshold, smallest=smallest, propose=propose,
            overwrite=overwrite, device=device, progress=progress,
        )  # fmt: skip
    finish(
        result.as_dict(), as_json=as_json, tables=[_table(result)], notes=result.notes,
        lines=[
            *([f"note: {result.caution}"] if result.caution else []),
            f"judged {len(result.cases)} labels; see {result.out / 'audit.html'}",
        ],
        faults=result.faults, where="the labels", advice="the other labels were judged",
    )  # fmt: skip


def _table(result: Audit) -> Table:
    title = "the least trusted labels"
    table = Table("case", "role", "trust", "suspected", "regions", title=title, title_justify="left")
    for found in result.cases[:10]:
        table.add_row(
            plain(found.case),
            plain(found.role),
            f"{found.trust:.3f}",
            f"{found.suspected:.0f} {result.unit}",
            str(found.count),
        )
    return table
