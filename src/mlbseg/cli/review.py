"""`mlbseg review`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlbseg.cli.arguments import Device, Quiet, Threads, set_threads
from mlbseg.cli.printing import case_progress, print_line


def review(
    target: Annotated[Path, typer.Argument(help="Run folder of `mlbseg train`, or a folder of scans.")],
    order: Annotated[
        str,
        typer.Option(
            help="audit: the last audit's order; suggest: unlabelled scans, ranked now; names; or a CSV file with a "
            "column case."
        ),
    ] = "audit",
    port: Annotated[
        int, typer.Option(help="Port of the page's address; 0: a free one.", min=0, max=65535)
    ] = 0,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the page in the browser.")
    ] = True,
    user: Annotated[
        str | None, typer.Option(help="Name for the log of corrections (default: the user's).")
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Look at labels and correct them in the browser, in the order of audit or suggest."""
    from mlbseg.apps.review import ORDERS
    from mlbseg.apps.review import review as run_review

    set_threads(threads)
    with case_progress(quiet or order != "suggest", "looking at the scans") as progress:
        run_review(
            target, order=order if order in ORDERS else Path(order), port=port, browser=browser, who=user,
            device=device, progress=progress, say=print_line,
        )  # fmt: skip
