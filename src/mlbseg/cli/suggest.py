"""`mlbseg suggest`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mlbseg.cli.arguments import Device, Json, Quiet, Threads, set_threads
from mlbseg.cli.printing import print_line, print_names, print_notes, progress_console, result_console


def suggest(
    run: Annotated[Path, typer.Argument(help="Run folder of `mlbseg train`.")],
    n: Annotated[int, typer.Option("--n", "-n", help="Scans to suggest.", min=1)] = 10,
    scans: Annotated[
        Path | None, typer.Option(help="Choose from these scans (default: the run's unlabelled ones).")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="CSV file to write, a line per suggestion.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it is there.")] = False,
    rule: Annotated[
        str, typer.Option(help="spread: what is unlike all others first; cover: what many scans are like.")
    ] = "spread",
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Rank unlabelled scans by what labelling them is worth, each with its reason."""
    from mlbseg.apps.suggest import suggest as run_suggest
    from mlbseg.errors import FaultsError
    from mlbseg.progress import StepProgress

    set_threads(threads)
    with StepProgress(progress_console(quiet or as_json), "looking", 0) as progress:
        result = run_suggest(
            run, n=n, scans=scans, out=out, overwrite=overwrite, rule=rule, device=device,
            progress=lambda done, total, case: progress.update(done, {"case": case}, total=total),
        )  # fmt: skip
    if as_json:
        print(json.dumps(result.as_dict()))
        raise typer.Exit(2 if result.faults else 0)
    result_console().print(result.table())
    print_notes(result.notes)
    print_names(result.left_out, "labelled or set apart for testing already, passed over")
    if out is not None:
        print_line(f"wrote {out}")
    if result.faults:
        raise FaultsError(result.faults, "the scans", "the other scans were looked at")
