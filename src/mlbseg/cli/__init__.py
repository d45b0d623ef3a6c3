"""The command line: thin, every command a function of the package with the same names."""

from __future__ import annotations

import errno
import io
import json
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

import mlbseg
from mlbseg.cli.arguments import (
    Accelerator,
    AllowEmpty,
    Device,
    Devices,
    Json,
    Patient,
    Processes,
    Quiet,
    Threads,
    Timeout,
    case_ids,
    count_or_ids,
    join_lists,
    label_values,
    names,
    numbers,
    part_of,
    set_threads,
)
from mlbseg.cli.audit import audit
from mlbseg.cli.crash import crash_message
from mlbseg.cli.export import export
from mlbseg.cli.plan import plan
from mlbseg.cli.printing import (
    print_line,
    print_names,
    print_notes,
    print_summary,
    progress_console,
    result_console,
)
from mlbseg.cli.report import report, report_of_training
from mlbseg.cli.suggest import suggest
from mlbseg.errors import Fault, OtherRank, UserError, printable
from mlbseg.files import machines_temporary_folder
from mlbseg.launch import speaks

if TYPE_CHECKING:
    from mlbseg.apps.bench import BenchResult

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


def main() -> None:
    """Run the command line; a user's fault is one clear message and exit code 2, ours is code 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # What the terminal's encoding lacks is escaped; it would be an error in the middle of a table.
            stream.reconfigure(errors="backslashreplace")
    usual = warnings.formatwarning
    warnings.formatwarning = _warning_line
    try:
        _run()
    finally:
        warnings.formatwarning = usual


def _warning_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Return a warning as users read it: without the place in the source that gave it."""
    return f"warning: {printable(str(message))}\n"


def _run() -> NoReturn:
    try:
        arguments = sys.argv[1:]
        if arguments[:1] == ["bench"]:
            arguments = join_lists(arguments, _LISTS)
        code = app(arguments, prog_name="mlbseg", standalone_mode=False)
    except OtherRank as error:
        # Of a lost one each machine tells, as rank 0 may be the one.
        if error.told or os.environ["LOCAL_RANK"] != "0":
            sys.exit(error.exit_code)
        _fail(str(error), error.exit_code)
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
            _require_temporary_folder()
            _fail(crash_message(error, _command(arguments)), 1)
        _fail(f"{error.filename or 'the disk'}: {error.strerror}", 2)
    except Exception as error:
        _fail(crash_message(error, _command(arguments)), 1)
    if code == _INTERRUPTED:
        _fail("interrupted; what was written is whole", _INTERRUPTED)
    sys.exit(code)


def _command(arguments: Sequence[str]) -> str:
    names = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    return next((argument for argument in arguments if argument in names), "none")


_LISTS = ("--methods", "--labelled", "--seeds")
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


def _require_temporary_folder() -> None:
    """Say so if no temporary file can be made: libraries raise all sorts of errors then, matplotlib at its import."""
    try:
        machines_temporary_folder()
    except UserError as error:
        _fail(str(error), error.exit_code)


def _fail(message: str, code: int, faults: Sequence[Fault] = ()) -> NoReturn:
    if "--json" in sys.argv:
        print(json.dumps({"error": message, "faults": [f.as_dict() for f in faults]}))
    else:
        print(f"error: {printable(message)}", file=sys.stderr)
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
    patient: Patient = None,
    allow_empty: AllowEmpty = False,
    cache: Annotated[
        Path | None, typer.Option(help="Cache folder: unchanged files are not read again.")
    ] = None,
    processes: Processes = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read every scan and label once and report all faults together."""
    from mlbseg.data.cases import find_cases, with_patients
    from mlbseg.data.check import check as run_check
    from mlbseg.data.reading import Reading
    from mlbseg.errors import FaultsError
    from mlbseg.progress import StepProgress

    dataset = with_patients(find_cases(data, allow_empty=allow_empty), patient)
    with StepProgress(progress_console(quiet or as_json), "reading", len(dataset.cases)) as progress:
        result = run_check(
            dataset,
            labels=label_values(labels),
            reading=Reading.of(processes, cache),
            progress=lambda done, _: progress.update(done),
        )
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
    print_summary(result.summary, str(data))
    print_notes(result.warnings)
    if result.faults:
        raise FaultsError(
            result.faults, str(data), "fix them, or pass --skip-bad to train without these cases"
        )
    print_line("no faults")


@app.command()
def train(
    data: Annotated[Path | None, typer.Argument(help="Folder of scans, or a CSV/JSON list of them.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder to make.")] = None,
    method: Annotated[
        str | None,
        typer.Option(help="mlb (default), supervised, mean-teacher, bcp ...: see docs/methods.md."),
    ] = None,
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
    patient: Patient = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="paper: the settings of the public MLB-Seg code, on 2D slices of 144x144 pixels; without its "
            "120 epochs (see -o steps=N) and its resizing of images (see -o plan.spacing=MM)."
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    override: Annotated[
        list[str] | None, typer.Option("-o", "--override", help="key=value, such as -o plan.spacing=1.25")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue this run folder.")] = None,
    allow_empty: AllowEmpty = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave faulty cases out.")] = False,
    cache: Annotated[Path | None, typer.Option(help="Where preprocessed scans are kept.")] = None,
    processes: Processes = None,
    with_report: Annotated[
        bool, typer.Option("--report/--no-report", help="Leave report.html in the run folder.")
    ] = True,
    device: Device = "auto",
    devices: Devices = 1,
    accelerator: Accelerator = None,
    timeout: Timeout = 30.0,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a model from scans of which some are labelled."""
    from mlbseg.device import device_name
    from mlbseg.training import train as run_train

    set_threads(threads)
    result = run_train(
        data, out, resume=resume, method=method, labelled=count_or_ids(labelled), test=count_or_ids(test),
        validation=count_or_ids(validation) or 0, labels=label_values(labels), patient=patient,
        seed=seed, preset=preset, config=config,
        overrides=override or (), allow_empty=allow_empty, skip_bad=skip_bad, device=device, devices=devices,
        accelerator=accelerator, timeout=timeout, cache=cache, processes=processes,
        console=progress_console(quiet or as_json),
    )  # fmt: skip
    if not speaks():
        return
    page, why = None, ""
    if with_report:
        page, why = report_of_training(result.run, device_name(device, accelerator), quiet=quiet or as_json)
    if as_json:
        print(json.dumps({"run": str(result.run), "steps": result.steps, "validation_dice": result.validation_dice,
                          "selection": result.selection, "report": None if page is None else str(page),
                          "note": why}))  # fmt: skip
    else:
        score = "" if result.validation_dice is None else f" (validation Dice {result.validation_dice:.3f})"
        print_line(f"trained {result.steps} steps; kept {result.selection}{score}")
        if page is not None:
            print_line(f"report: {page}")
        elif why:
            print_line(f"note: {why}")
        print_line(f"next: mlbseg predict {shlex.quote(str(result.run))} NEW_SCANS --out MASKS")


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="Run folder of `mlbseg train`.")],
    scans: Annotated[list[Path], typer.Argument(help="Folders of scans, scan files, DICOM folders.")],
    out: Annotated[Path, typer.Option(help="Folder for the masks.")],
    network: Annotated[
        str | None, typer.Option(help="student, teacher ... (default: the method's choice).")
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(help="Part of the run's split (test, unlabelled ...), or a file of ids, or id,id,..."),
    ] = None,
    flips: Annotated[
        bool, typer.Option("--flips", help="Average over the flips that the plan allows (slower).")
    ] = False,
    largest: Annotated[bool, typer.Option("--largest", help="Keep each class's largest component.")] = False,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Write each class's probability too.")
    ] = False,
    overlap: Annotated[float, typer.Option(help="Of windows, share of the side.", min=0, max=0.9)] = 0.5,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace masks that are there.")] = False,
    part: Annotated[
        str | None, typer.Option(help="K/N: the K-th of N shares of the scans, such as 3/16 in a job array.")
    ] = None,
    device: Device = "auto",
    devices: Devices = 1,
    accelerator: Accelerator = None,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a mask for each scan, in the scan's own geometry and format."""
    from mlbseg.errors import FaultsError
    from mlbseg.inference import PARTS
    from mlbseg.inference import predict as run_predict
    from mlbseg.progress import StepProgress

    set_threads(threads)
    chosen = only if only is None or only in PARTS else case_ids(only)
    console = progress_console(quiet or as_json)
    with StepProgress(console, "predicting", 0) as progress:
        result = run_predict(
            run, scans, out, network=network, only=chosen, flips=flips, largest=largest,
            probabilities=probabilities, overlap=overlap, overwrite=overwrite, part=part_of(part),
            device=device, devices=devices, accelerator=accelerator,
            progress=None if console is None else lambda done, total, case: progress.update(
                done, {"case": case}, total=total
            ),
        )  # fmt: skip
    if not speaks():
        raise typer.Exit(2 if result.faults else 0)
    if as_json:
        print(json.dumps({"masks": {k: str(v) for k, v in result.masks.items()},
                          "faults": [f.as_dict() for f in result.faults],
                          "notes": [f.as_dict() for f in result.notes]}))  # fmt: skip
        if result.faults:
            raise typer.Exit(2)
        return
    print_notes(result.notes)
    print_line(f"wrote {len(result.masks)} {'mask' if len(result.masks) == 1 else 'masks'} to {out}")
    if result.faults:
        raise FaultsError(
            result.faults, "the scans", "the other scans were segmented" if result.masks else ""
        )


@app.command()
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="Folder of masks.")],
    references: Annotated[Path, typer.Argument(help="Folder of reference labels, matched by name.")],
    out: Annotated[Path | None, typer.Option(help="CSV file to write, a line per case and class.")] = None,
    ignore: Annotated[
        int | None,
        typer.Option(
            help="Value of the references for voxels that are not known; they are not scored (default: what nnU-Net's "
            "dataset.json calls ignore)."
        ),
    ] = None,
    page: Annotated[
        Path | None, typer.Option("--report", help="HTML file to write: scores, and masks to leaf through.")
    ] = None,
    scans: Annotated[Path | None, typer.Option(help="Scans for the report to lay the masks over.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a CSV file or report that is there.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score masks against reference labels: Dice, Jaccard, 95HD and ASSD in mm and voxels."""
    from mlbseg.errors import FaultsError
    from mlbseg.evaluation import evaluate as run_evaluate
    from mlbseg.progress import StepProgress

    if page is not None:
        from mlbseg.apps.report.page import require_free_page

        require_free_page(page, overwrite=overwrite)
        if scans is not None and not scans.exists():
            raise UserError(f"--scans: {scans} does not exist, expected the scans of the masks")
    elif scans is not None:
        raise UserError("--scans: the scans are for a page (add --report FILE.html, or leave them out)")
    with StepProgress(progress_console(quiet or as_json), "scoring", 0) as progress:
        result = run_evaluate(
            predictions, references, unknown=ignore, out=out, overwrite=overwrite,
            progress=lambda done, total: progress.update(done, total=total),
        )  # fmt: skip
    if page is not None:
        from mlbseg.apps.report import masks_report

        masks_report(result, predictions, references, page, scans=scans, overwrite=overwrite)
    if as_json:
        print(json.dumps(result.as_dict()))
        if result.faults:
            raise typer.Exit(2)
        return
    result_console().print(result.table())
    print_notes(result.notes)
    print_names(result.not_referenced, "without a reference label, not scored")
    print_names(result.not_predicted, "of the references without a mask")
    if result.unknown:
        count = sum(result.unknown.values())
        print_line(
            f"note: {count} voxels of {len(result.unknown)} references are not known; they were not scored"
        )
    if page is not None:
        print_line(f"report: {page}")
    if result.faults:
        raise FaultsError(result.faults, str(predictions), "the table has what could be scored")


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
    from mlbseg.apps.demo import demo as run_demo

    result = run_demo(out, seed=seed, steps=steps, console=progress_console(quiet or as_json))
    if as_json:
        print(json.dumps(result.as_dict()))
        return
    result_console().print(result.table())
    print_line(f"picture: {result.picture}")


@app.command()
def bench(
    data: Annotated[Path, typer.Argument(help="Folder of scans with labels, or a CSV/JSON list of them.")],
    out: Annotated[Path, typer.Option(help="Folder of the bench: to make, to continue, to add to.")],
    methods: Annotated[
        list[str] | None,
        typer.Option(help="Rows: names such as supervised,mean-teacher,mlb; or the option again, or spaces."),
    ] = None,
    labelled: Annotated[
        list[str] | None, typer.Option(help="Budgets of labels, such as 4,8; the first of the order.")
    ] = None,
    seeds: Annotated[
        list[str] | None, typer.Option(help="Of initial weights and draws, such as 0,1,2 (default: 0).")
    ] = None,
    test: Annotated[
        str | None, typer.Option(help="Set N cases (or a file, or id,id,...) apart, the same for all.")
    ] = None,
    split_seed: Annotated[int, typer.Option(help="Of the shuffle of the cases.", min=0)] = 0,
    upper: Annotated[bool, typer.Option(help="Also train supervised with all labels.")] = True,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            help="A further row: 'LABEL=METHOD key=value ...', such as 'mlb, nothing pasted=mlb mlb.mix=0'."
        ),
    ] = None,
    labels: Annotated[str | None, typer.Option(help="Label values to expect, such as 0,1,2.")] = None,
    patient: Patient = None,
    allow_empty: AllowEmpty = False,
    preset: Annotated[str | None, typer.Option(help="As for train, for all cells.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings, for all cells.")] = None,
    override: Annotated[
        list[str] | None, typer.Option("-o", "--override", help="key=value, for all cells.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Cells at a time (default: one for each device).", min=1)
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Run failed cells again.")] = False,
    cache: Annotated[Path | None, typer.Option(help="Where preprocessed scans are kept.")] = None,
    processes: Processes = None,
    device: Device = "auto",
    devices: Annotated[int, typer.Option(help="GPUs to spread the cells over.", min=1)] = 1,
    threads: Annotated[int | None, typer.Option(help="CPU threads, of all jobs together.", min=1)] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare methods: each with each budget of labels and each seed, on one split, into one table.

    The same command continues a bench that was stopped; more methods, budgets or seeds run the new cells only.
    """
    from mlbseg.apps.bench import bench as run_bench

    result = run_bench(
        data, out, methods=names(methods), variants=variant or (), labelled=numbers("--labelled", labelled),
        seeds=[0] if seeds is None else numbers("--seeds", seeds), test=count_or_ids(test), split_seed=split_seed,
        upper=upper, labels=label_values(labels), patient=patient, allow_empty=allow_empty, preset=preset,
        config=config, overrides=override or (), jobs=jobs, device=device, devices=devices, threads=threads,
        cache=cache, processes=processes, retry=retry,
        command=shlex.join(["mlbseg", *sys.argv[1:]]), console=progress_console(quiet or as_json),
    )  # fmt: skip
    if as_json:
        print(json.dumps(result.as_dict()))
    else:
        for table in result.tables():
            result_console().print(table)
        print_line(f"tables and figure: {out}")
        print_names([cell.key for cell in result.done.elsewhere], "cell(s) that another process runs")
    _end_bench(result, as_json=as_json)


def _end_bench(result: BenchResult, *, as_json: bool) -> None:
    """Say what is missing in the table, and end with the code for it."""
    failed, crashed = result.results.failed, result.done.crashed
    if not as_json:
        for row in failed:
            print_line(f"failed: {row['row']}, {row['labelled']} labels, seed {row['seed']}: {row['reason']}")
        for cell, code in crashed.items():
            print_line(f"no result: {cell.key} (exit code {code}; see {result.log_of(cell)})")
    if any(code == 1 for code in crashed.values()):
        raise typer.Exit(1)
    if failed or crashed:
        raise typer.Exit(2)


app.command()(plan)
app.command()(audit)
app.command()(report)
app.command()(export)
app.command()(suggest)
