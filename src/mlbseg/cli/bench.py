"""`mlbseg bench`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlbseg.cli.arguments import (
    AllowEmpty,
    Cache,
    ConfigFile,
    Device,
    Ignore,
    Json,
    Labels,
    OutsideUnknown,
    Override,
    Patient,
    Preset,
    Processes,
    Quiet,
    Sparse,
    count_or_ids,
    key_values,
    label_values,
    names,
    numbers,
)
from mlbseg.cli.ending import finish
from mlbseg.cli.printing import names_note, progress_console

if TYPE_CHECKING:
    from mlbseg.apps.bench import BenchResult

LISTS = ("--methods", "--labelled", "--seeds", "--label-seeds")
"""Options that take several values, also with spaces between them."""


def bench(
    data: Annotated[Path, typer.Argument(help="Folder of labelled scans, or a CSV/JSON list of them.")],
    out: Annotated[Path, typer.Option(help="Folder of the bench: to create, to continue or to extend.")],
    methods: Annotated[
        list[str] | None,
        typer.Option(help="Methods, one row each, such as supervised,mean-teacher,mlb; commas or spaces."),
    ] = None,
    labelled: Annotated[
        list[str] | None,
        typer.Option(help="Label budgets, such as 4,8: numbers of labelled cases, the first of the split."),
    ] = None,
    seeds: Annotated[
        list[str] | None,
        typer.Option(help="Random seeds of weights and training, such as 0,1,2 (default: 0)."),
    ] = None,
    label_seeds: Annotated[
        list[str] | None,
        typer.Option(
            help="Random seeds of which scans are labelled, such as 0,1,2; 0: the first of the split (default: 0)."
        ),
    ] = None,
    test: Annotated[
        str | None,
        typer.Option(help="Set N cases (or a file, or id,id,...) apart for testing, the same for all."),
    ] = None,
    split_seed: Annotated[int, typer.Option(help="Random seed of the order of cases.", min=0)] = 0,
    upper: Annotated[bool, typer.Option(help="Also train supervised with all labels.")] = True,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            help="A further row: 'LABEL=METHOD key=value ...', such as 'mlb without pasting=mlb mlb.mix=0'; "
            "repeatable."
        ),
    ] = None,
    labels: Labels = None,
    patient: Patient = None,
    allow_empty: AllowEmpty = False,
    ignore: Ignore = None,
    sparse: Sparse = False,
    outside_unknown: OutsideUnknown = False,
    one_slice_in: Annotated[
        int | None,
        typer.Option(
            help="Keep one slice in N of each training label, as if the others had not been drawn (not for --upper).",
            min=2,
        ),
    ] = None,
    preset: Preset = None,
    config: ConfigFile = None,
    override: Override = None,
    jobs: Annotated[
        int | None, typer.Option(help="Cells to run at a time (default: one per device).", min=1)
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Run failed cells again.")] = False,
    cache: Cache = None,
    processes: Processes = None,
    device: Device = "auto",
    devices: Annotated[int, typer.Option(help="Number of GPUs to spread the cells over.", min=1)] = 1,
    threads: Annotated[
        int | None, typer.Option(help="Total CPU threads, shared by all --jobs.", min=1)
    ] = None,
    executor: Annotated[
        str,
        typer.Option(
            help="Where cells are computed: here, in processes of this command; local or slurm, in jobs of submitit."
        ),
    ] = "here",
    job_option: Annotated[
        list[str] | None,
        typer.Option(
            help="A parameter of submitit's jobs as key=value, such as timeout_min=600 or slurm_partition=gpu; "
            "repeatable."
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare methods over label budgets and seeds, on one split.

    The same command continues a bench that was stopped. With more methods, budgets or seeds it runs the new cells only.
    """
    from mlbseg.apps.bench import BenchRequest, run_bench
    from mlbseg.data.cases import LabelOptions

    request = BenchRequest(
        data=data, methods=names(methods), variants=variant or (), budgets=numbers("--labelled", labelled),
        seeds=[0] if seeds is None else numbers("--seeds", seeds),
        label_seeds=[0] if label_seeds is None else numbers("--label-seeds", label_seeds),
        test=count_or_ids(test), split_seed=split_seed,
        upper=upper, labels=label_values(labels), patient=patient,
        label_options=LabelOptions(ignore, sparse, outside_unknown, allow_empty, one_slice_in),
        preset=preset,
        config=config, overrides=tuple(override or ()), cache=cache, processes=processes,
        command=shlex.join(["mlbseg", *sys.argv[1:]]),
    )  # fmt: skip
    result = run_bench(
        out, request, jobs=jobs, device=device, devices=devices, threads=threads, retry=retry,
        executor=executor, job_options=key_values("--job-option", job_option),
        console=progress_console(quiet or as_json),
    )  # fmt: skip
    finish(
        result.as_dict(), as_json=as_json, tables=result.tables(),
        lines=[f"tables and figure: {out}", *_missing(result)], code=_code(result),
    )  # fmt: skip


def _missing(result: BenchResult) -> list[str]:
    """Return what is missing in the table, and why."""
    return [
        *names_note([cell.key for cell in result.done.elsewhere], "cell(s) that another process runs"),
        *(
            f"failed: {row['row']}, {row['labelled']} labels, seed {row['seed']}: {row['reason']}"
            for row in result.results.failed
        ),
        *(
            f"no result: {cell.key} (exit code {code}; see {result.log_of(cell)})"
            for cell, code in result.done.crashed.items()
        ),
    ]


def _code(result: BenchResult) -> int:
    """Return 1 if a cell ended with an internal error, 2 if one failed, else 0."""
    if 1 in result.done.crashed.values():
        return 1
    return 2 if result.results.failed or result.done.crashed else 0
