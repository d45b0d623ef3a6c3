"""`mlbseg suggest`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlbseg.cli.arguments import Device, Json, Quiet, Run, Threads, set_threads
from mlbseg.cli.ending import finish
from mlbseg.cli.printing import case_progress, names_note


def suggest(
    run: Run,
    n: Annotated[int, typer.Option("--n", "-n", help="Number of scans to suggest.", min=1)] = 10,
    scans: Annotated[
        Path | None,
        typer.Option(help="Folder of scans to choose from (default: the run's unlabelled scans)."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="CSV file to write, one line per suggestion.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    rule: Annotated[
        str,
        typer.Option(
            help="spread: first the scans farthest from the labelled ones; cover: first the scans that many others "
            "are like."
        ),
    ] = "spread",
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Rank unlabelled scans by how much labelling them would help. Each has its reason."""
    from mlbseg.apps.suggest import suggest as run_suggest

    set_threads(threads)
    with case_progress(quiet or as_json, "looking at the scans") as progress:
        result = run_suggest(
            run, n=n, scans=scans, out=out, overwrite=overwrite, rule=rule, device=device, progress=progress
        )
    finish(
        result.as_dict(), as_json=as_json, tables=[result.table()], notes=result.notes,
        lines=[
            *names_note(result.left_out, "already labelled or set apart for testing, left out"),
            *([] if out is None else [f"wrote {out}"]),
        ],
        faults=result.faults, where="the scans", advice="the other scans were ranked",
    )  # fmt: skip
