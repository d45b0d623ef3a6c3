"""The command line. Each command has a file of its own, and calls the function of its name in `mlbseg`."""

from __future__ import annotations

import io
import sys
import warnings
from functools import partial
from typing import Annotated

import typer

import mlbseg
from mlbseg.cli import ending
from mlbseg.cli.arguments import join_lists
from mlbseg.cli.audit import audit
from mlbseg.cli.bench import LISTS, bench
from mlbseg.cli.check import check
from mlbseg.cli.config import config
from mlbseg.cli.demo import demo
from mlbseg.cli.evaluate import evaluate
from mlbseg.cli.export import export
from mlbseg.cli.plan import plan
from mlbseg.cli.predict import predict
from mlbseg.cli.report import report
from mlbseg.cli.review import review
from mlbseg.cli.suggest import suggest
from mlbseg.cli.train import train
from mlbseg.errors import printable

# Commands import everything heavy (torch, MONAI) when they run: --help must answer at once.

app = typer.Typer(
    name="mlbseg",
    help="Segment many medical scans from few labels.\n\n"
    "Train a model on scans of which a few are labelled (train), segment new scans (predict) and score the masks "
    "(evaluate). Start with: mlbseg check SCANS",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Run the command line and exit; `mlbseg.cli.ending` says how."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # What the terminal's encoding lacks is escaped; it would be an error in the middle of a table.
            stream.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:]
    name = next((argument for argument in arguments if argument in COMMANDS), "none")
    if arguments[:1] == ["bench"]:
        arguments = join_lists(arguments, LISTS)
    usual = warnings.formatwarning
    warnings.formatwarning = _warning_line
    try:
        ending.run(partial(app, arguments, prog_name="mlbseg", standalone_mode=False), name)
    finally:
        warnings.formatwarning = usual


def _warning_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Return a warning as users read it: without the place in the source that gave it."""
    return f"warning: {printable(str(message))}\n"


def _version(wanted: bool) -> None:
    if wanted:
        print(f"mlbseg {mlbseg.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


COMMANDS = {
    command.__name__: command
    for command in (
        check,
        plan,
        train,
        predict,
        evaluate,
        report,
        audit,
        suggest,
        review,
        bench,
        export,
        config,
        demo,
    )
}
"""By name, in the order of `mlbseg --help`: the order in which they are used."""

for _command in COMMANDS.values():
    app.command()(_command)
