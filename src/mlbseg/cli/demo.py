"""`mlbseg demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlbseg.cli.arguments import Json, Quiet
from mlbseg.cli.ending import finish
from mlbseg.cli.printing import progress_console


def demo(
    out: Annotated[Path, typer.Option(help="Folder to create.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Random seed of phantoms and training.")] = 0,
    steps: Annotated[
        int | None, typer.Option(help="Training steps of each run (default: the demo's own).", min=2)
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare few labels, MLB and all labels on phantom scans. Creates the scans and trains three models."""
    from mlbseg.apps.demo import demo as run_demo

    result = run_demo(out, seed=seed, steps=steps, console=progress_console(quiet or as_json))
    finish(result.as_dict(), as_json=as_json, tables=[result.table()], lines=[f"picture: {result.picture}"])
