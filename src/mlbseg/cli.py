"""The command line: thin, every command a function of the package with the same names."""

from __future__ import annotations

import errno
import json
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import mlbseg
from mlbseg.errors import Fault, UserError

# Everything heavy (torch, MONAI, Lightning) is imported inside the commands: --help must answer at once.

app = typer.Typer(
    name="mlbseg",
    help="Segment many medical scans from few labels.\n\n"
    "A folder of scans, of which a few are labelled, becomes a trained model (train), masks for new scans "
    "(predict) and figures you can trust (evaluate). Start with: mlbseg check SCANS",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]


def main() -> None:
    """Run the command line; a user's fault is one clear message and exit code 2, ours is code 1."""
    try:
        code = app(prog_name="mlbseg", standalone_mode=False)
    except UserError as error:
        _fail(str(error), error.exit_code, error.faults)
    except _UsageError as error:
        if "--json" in sys.argv:
            _fail(error.format_message(), 2)  # type: ignore[attr-defined]
        error.show()  # type: ignore[attr-defined]
        sys.exit(2)
    except MemoryError:
        _fail("not enough memory", 2)
    except OSError as error:
        # The machine's limits, met where no function expected them; any other is a fault of ours.
        if error.errno not in _MACHINE:
            raise
        _fail(f"{error.filename or 'the disk'}: {error.strerror}", 2)
    if code == _INTERRUPTED:
        _fail("interrupted", _INTERRUPTED)
    sys.exit(code)


_INTERRUPTED = 128 + signal.SIGINT  # as shells have it
# Typer's name for it differs between its versions.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
_MACHINE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENAMETOOLONG,
    errno.EMFILE,
    errno.ENOMEM,
    errno.EIO,
)


def _fail(message: str, code: int, faults: Sequence[Fault] = ()) -> NoReturn:
    if "--json" in sys.argv:
        print(json.dumps({"error": message, "faults": [f.as_dict() for f in faults]}))
    else:
        print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


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


@app.command()
def check(
    data: Annotated[Path, typer.Argument(help="Folder of scans, or a CSV/JSON list of them.")],
    labels: Annotated[str | None, typer.Option(help="Label values to expect, such as 0,1,2.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read every scan and label once and report all faults together."""
    from mlbseg.data.cases import find_cases
    from mlbseg.data.check import check as run_check
    from mlbseg.errors import FaultsError
    from mlbseg.progress import StepProgress

    dataset = find_cases(data)
    console = _console(quiet or as_json)
    with StepProgress(console, "reading", len(dataset.cases)) as progress:
        result = run_check(dataset, labels=_integers(labels), progress=lambda done, _: progress.update(done))
    if as_json:
        print(
            json.dumps(
                {
                    "faults": [f.as_dict() for f in result.faults],
                    "warnings": [f.as_dict() for f in result.warnings],
                    "summary": result.summary,
                }
            )
        )
        if result.faults:
            raise typer.Exit(2)
        return
    _print_summary(result.summary, str(data))
    for fault in result.warnings:
        _plain(f"note: {fault}")
    if result.faults:
        raise FaultsError(
            result.faults, str(data), "fix them, or pass --skip-bad to train without these cases"
        )
    _plain("no faults")


@app.command()
def train(
    data: Annotated[Path | None, typer.Argument(help="Folder of scans, or a CSV/JSON list of them.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder to make.")] = None,
    method: Annotated[str | None, typer.Option(help="mlb (default) or supervised.")] = None,
    labelled: Annotated[
        str | None,
        typer.Option(
            help="For experiments: keep K labels, or those of a file (one case id a line) or id,id,..."
        ),
    ] = None,
    test: Annotated[
        str | None,
        typer.Option(help="Set N cases (or a file, or id,id,...) apart; training never sees them."),
    ] = None,
    validation: Annotated[
        str, typer.Option(help="Take N clean cases (or a file, or id,id,...) to choose the checkpoint by.")
    ] = "0",
    labels: Annotated[str | None, typer.Option(help="Label values to expect, such as 0,1,2.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="paper: the settings of the public MLB-Seg code.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    override: Annotated[
        list[str] | None, typer.Option("-o", "--override", help="key=value, such as -o plan.spacing=1.25")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue this run folder.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave faulty cases out.")] = False,
    cache: Annotated[Path | None, typer.Option(help="Where preprocessed scans are kept.")] = None,
    device: Device = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.", min=1)] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a model from scans of which some are labelled."""
    from mlbseg.training import train as run_train

    _set_threads(threads)
    result = run_train(
        data, out, resume=resume, method=method, labelled=_cases(labelled), test=_cases(test),
        validation=_cases(validation) or 0, labels=_integers(labels), seed=seed, preset=preset, config=config,
        overrides=override or (), skip_bad=skip_bad, device=device, cache=cache,
        console=_console(quiet or as_json),
    )  # fmt: skip
    if as_json:
        print(json.dumps({"run": str(result.run), "steps": result.steps,
                          "validation_dice": result.validation_dice, "selection": result.selection}))  # fmt: skip
    else:
        score = "" if result.validation_dice is None else f" (validation Dice {result.validation_dice:.3f})"
        _plain(f"trained {result.steps} steps; kept {result.selection}{score}")
        _plain(f"next: mlbseg predict {shlex.quote(str(result.run))} NEW_SCANS --out MASKS")


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="Run folder of `mlbseg train`.")],
    scans: Annotated[list[Path], typer.Argument(help="Folders of scans, scan files, DICOM folders.")],
    out: Annotated[Path, typer.Option(help="Folder for the masks.")],
    network: Annotated[
        str | None, typer.Option(help="student or teacher (default: the method's choice).")
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(help="Part of the run's split (test, unlabelled ...), or a file of ids, or id,id,..."),
    ] = None,
    flips: Annotated[bool, typer.Option("--flips", help="Average over flips (slower).")] = False,
    largest: Annotated[bool, typer.Option("--largest", help="Keep each class's largest component.")] = False,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Write each class's probability too.")
    ] = False,
    overlap: Annotated[float, typer.Option(help="Of windows, share of the side.", min=0, max=0.9)] = 0.5,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace masks that are there.")] = False,
    device: Device = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.", min=1)] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a mask for each scan, in the scan's own geometry and format."""
    from mlbseg.errors import FaultsError
    from mlbseg.inference import PARTS
    from mlbseg.inference import predict as run_predict
    from mlbseg.progress import StepProgress

    _set_threads(threads)
    chosen = only if only is None or only in PARTS else _ids(only)
    with StepProgress(_console(quiet or as_json), "predicting", 0) as progress:
        result = run_predict(
            run, scans, out, network=network, only=chosen, flips=flips, largest=largest,
            probabilities=probabilities, overlap=overlap, overwrite=overwrite, device=device,
            progress=lambda done, total, case: progress.update(done, {"case": case}, total=total),
        )  # fmt: skip
    if as_json:
        print(json.dumps({"masks": {k: str(v) for k, v in result.masks.items()},
                          "faults": [f.as_dict() for f in result.faults]}))  # fmt: skip
        if result.faults:
            raise typer.Exit(2)
        return
    _plain(f"wrote {len(result.masks)} {'mask' if len(result.masks) == 1 else 'masks'} to {out}")
    if result.faults:
        raise FaultsError(result.faults, "the scans", "the other scans were segmented")


@app.command()
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="Folder of masks.")],
    references: Annotated[Path, typer.Argument(help="Folder of reference labels, matched by name.")],
    out: Annotated[Path | None, typer.Option(help="CSV file to write, a line per case and class.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score masks against reference labels: Dice, Jaccard, 95HD and ASSD in mm and voxels."""
    from mlbseg.errors import FaultsError
    from mlbseg.evaluation import evaluate as run_evaluate
    from mlbseg.progress import StepProgress

    with StepProgress(_console(quiet or as_json), "scoring", 0) as progress:
        result = run_evaluate(
            predictions, references, out=out,
            progress=lambda done, total: progress.update(done, total=total),
        )  # fmt: skip
    if as_json:
        print(json.dumps(result.as_dict()))
        if result.faults:
            raise typer.Exit(2)
        return
    _results().print(result.table())
    if result.faults:
        raise FaultsError(result.faults, str(predictions), "the other cases were scored")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder to make.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Of the phantoms and of training.")] = 0,
    steps: Annotated[
        int | None, typer.Option(help="Training steps (default: the demo's own).", min=2)
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make phantom scans, train on few labels, on few labels with MLB and on all, and compare."""
    from mlbseg.demo import demo as run_demo

    result = run_demo(out, seed=seed, steps=steps, console=_console(quiet or as_json))
    if as_json:
        print(json.dumps(result.as_dict()))
        return
    _results().print(result.table())
    _plain(f"picture: {result.picture}")


def _results() -> Console:
    """Return where tables go; a file or a pipe has room for their columns."""
    return Console(width=None if sys.stdout.isatty() else 120)


def _console(quiet: bool) -> Console | None:
    """Return where progress goes: stderr, so that stdout holds results only."""
    return None if quiet else Console(stderr=True)


def _plain(text: str) -> None:
    from mlbseg.errors import printable

    print(printable(text))


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _integers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--labels {text!r}: expected whole numbers, such as 0,1,2") from None


def _cases(text: str | None) -> int | list[str] | None:
    """Return a number, or the case ids of a file or of a comma-separated list."""
    if text is None:
        return None
    return int(text) if text.isdecimal() else _ids(text)


def _ids(text: str) -> list[str]:
    """Return the case ids of a file (one a line) or of a comma-separated list."""
    path = Path(text)
    if "," not in text and path.is_file():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            raise UserError(f"{path}: cannot be read as a list of case ids, one a line") from None
        return [line.strip() for line in lines if line.strip()]
    return [part.strip() for part in text.split(",") if part.strip()]


def _print_summary(summary: dict[str, Any], title: str) -> None:
    table = Table("", "", title=title, show_header=False, title_justify="left")
    rows = {
        "layout": summary["layout"],
        "scans": f"{summary['cases']} ({_counts(summary['roles'])})",
        "channels": ", ".join(map(str, summary["channels"])),
        "label values": ", ".join(f"{value} in {n} scans" for value, n in summary["labels"].items()),
        "class names": ", ".join(f"{value}: {name}" for value, name in summary["class_names"].items()),
        "size (x, y, z)": _ranges(summary.get("size", {})),
        "spacing in mm": _ranges(summary.get("spacing", {})),
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, escape(value))
    _results().print(table)


def _counts(numbers: dict[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in numbers.items() if n)


def _ranges(by_dimension: dict[str, dict[str, list[float]]]) -> str:
    def shown(values: list[float]) -> str:
        return " × ".join(f"{value:.4g}" for value in values)

    return "; ".join(
        f"{name} {shown(r['median'])}"
        + (f" ({shown(r['min'])} to {shown(r['max'])})" if r["min"] != r["max"] else "")
        for name, r in by_dimension.items()
    )
