"""`mlbseg audit`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from mlbseg.cli.arguments import Device, Json, Quiet, Threads, set_threads
from mlbseg.cli.printing import print_line, print_notes, progress_console, result_console
from mlbseg.terminal import plain


def audit(
    run: Annotated[Path, typer.Argument(help="Run folder of `mlbseg train`.")],
    labels: Annotated[
        Path | None, typer.Option(help="Folder of labels to judge (default: those that the run was given).")
    ] = None,
    scans: Annotated[
        Path | None,
        typer.Option(help="Where the scans of --labels are (default: where the run was trained)."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write (default: audit in the run folder).")
    ] = None,
    method: Annotated[
        str, typer.Option(help="regional, disagreement, confident or alignment: see docs/audit.md.")
    ] = "regional",
    threshold: Annotated[float, typer.Option(help="Voxels with less trust are doubted, 0 to 1.")] = 0.5,
    smallest: Annotated[
        float | None, typer.Option(help="Volume of a region worth a look, mm³ (mm² in 2D).", min=0)
    ] = None,
    propose: Annotated[
        bool, typer.Option("--propose", help="Also write labels with their suspected regions drawn anew.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an audit that is there.")] = False,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say which labels are to be doubted, and where in them: trust maps, a ranked table, a page to look at."""
    from mlbseg.apps.audit import audit as run_audit
    from mlbseg.errors import FaultsError
    from mlbseg.progress import StepProgress

    set_threads(threads)
    console = progress_console(quiet or as_json)
    with StepProgress(console, "judging", 0) as progress:
        result = run_audit(
            run, labels, out, scans=scans, way=method, threshold=threshold, smallest=smallest, propose=propose,
            overwrite=overwrite, device=device,
            progress=None if console is None else lambda done, total, case: progress.update(
                done, {"case": case}, total=total
            ),
        )  # fmt: skip
    if as_json:
        print(json.dumps(result.as_dict()))
        if result.faults:
            raise typer.Exit(2)
        return
    table = Table(
        "case",
        "role",
        "trust",
        "suspected",
        "regions",
        title="the least trusted labels",
        title_justify="left",
    )
    for found in result.cases[:10]:
        table.add_row(
            plain(found.case),
            plain(found.role),
            f"{found.trust:.3f}",
            f"{found.suspected:.0f} {result.unit}",
            str(found.count),
        )
    result_console().print(table)
    print_notes(result.notes)
    if result.caution:
        print_line(f"note: {result.caution}")
    print_line(f"{len(result.cases)} labels judged; look at {result.out / 'audit.html'}")
    if result.faults:
        raise FaultsError(result.faults, "the labels", "the other labels were judged")
