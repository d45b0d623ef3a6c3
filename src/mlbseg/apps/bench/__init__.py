"""A bench: methods by label budgets by seeds on one split, into one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from mlbseg.apps.bench import workers
from mlbseg.apps.bench.cell import OUTCOME, outcome
from mlbseg.apps.bench.cells import STAGE1, Cell
from mlbseg.apps.bench.executors import starter
from mlbseg.apps.bench.record import Setup
from mlbseg.apps.bench.report import tables, write_tables
from mlbseg.apps.bench.request import BenchRequest
from mlbseg.apps.bench.results import CELL_COLUMNS, Results, gather
from mlbseg.apps.bench.setup import begin
from mlbseg.apps.bench.workers import Done, Place
from mlbseg.data.cases import LabelOptions
from mlbseg.device import pick_device
from mlbseg.errors import UserError
from mlbseg.tables import data_frame

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["BenchRequest", "BenchResult", "bench", "run_bench"]


@dataclass(frozen=True)
class BenchResult:
    """What a bench has found so far.

    Attributes:
        folder: Where all is.
        results: All cells that the folder has, those of earlier commands too.
        done: What this command left undone.
    """

    folder: Path
    results: Results
    done: Done

    def tables(self) -> list[Table]:
        """Return the table of each budget."""
        return tables(self.results)

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per cell, with the columns of `cells.csv`.

        Raises:
            UserError: if pandas is not installed.
        """
        return data_frame(self.results.cells, CELL_COLUMNS)

    def log_of(self, cell: Cell) -> Path:
        """Return what a cell's process has printed."""
        return workers.log_of(self.folder, cell)

    def as_dict(self) -> dict[str, Any]:
        """Return the cells, for JSON."""
        return {
            "folder": str(self.folder),
            "cells": self.results.cells,
            "elsewhere": [cell.key for cell in self.done.elsewhere],
            "crashed": [cell.key for cell in self.done.crashed],
        }


def bench(
    data: str | Path,
    out: str | Path,
    *,
    methods: Sequence[str] = (),
    variants: Sequence[str] = (),
    labelled: Sequence[int],
    seeds: Sequence[int] = (0,),
    label_seeds: Sequence[int] = (0,),
    test: int | Sequence[str] | None,
    split_seed: int = 0,
    upper: bool = True,
    labels: Sequence[int] | None = None,
    patient: str | None = None,
    allow_empty: bool = False,
    ignore: int | None = None,
    sparse: bool = False,
    outside_unknown: bool = False,
    one_slice_in: int | None = None,
    preset: str | None = None,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    jobs: int | None = None,
    device: str = "auto",
    devices: int = 1,
    threads: int | None = None,
    cache: str | Path | None = None,
    processes: int | None = None,
    retry: bool = False,
    executor: str = "here",
    job_options: Mapping[str, Any] | None = None,
    command: str = "",
    console: Console | None = None,
) -> BenchResult:
    """Train, predict and score every cell of a table that is not yet there, and write the table.

    Args:
        data: The folder (or datalist); see `mlbseg.data.cases.find_cases` for the layouts.
        out: The folder of the bench: to create, to continue or to extend.
        methods: Names in `mlbseg.methods.METHODS`, one row each.
        variants: Further rows, ``LABEL=METHOD key=value ...``.
        labelled: Label budgets: numbers of labelled cases, the first of the split's order.
        seeds: Random seeds of weights and training.
        label_seeds: Random seeds of which scans are labelled, for each seed; 0 takes the first of the split's order.
        test: Cases set apart for testing: the last N, or the named ones. The same for all cells.
        split_seed: Random seed of the order of cases, where the data have none of their own.
        upper: Also train supervised with all labels but those of test cases.
        labels: All label values that may occur.
        patient: A regular expression whose first group, found in each case id, is the patient; recognised when None.
        allow_empty: Accept careful labels without any structure: these scans have nothing to find.
        ignore: Label value of voxels whose class is not known, such as 4 of scribbles.
        sparse: Labels were drawn on some slices: slices without a drawn voxel are unknown, not background.
        outside_unknown: What a cropped segmentation of 3D Slicer does not cover is unknown, not background.
        one_slice_in: Keep one slice in so many of each training label, as if the others had not been drawn; supervised
            with all labels keeps them whole.
        preset: A name in `mlbseg.config.PRESETS`, for all cells.
        config: A YAML file of settings, for all cells.
        overrides: Settings as ``key=value``, for all cells.
        jobs: Cells to run at a time; one per device when None.
        device: ``auto``, ``cpu``, ``cuda`` ...
        devices: Number of GPUs to spread the jobs over.
        threads: Total CPU threads, shared by all jobs; torch's own choice when None.
        cache: Folder for preprocessed scans; the user's cache folder when None.
        processes: Number of processes that read and prepare scans; one per core when None. Fewer are used when memory
            is short.
        retry: Run failed cells again.
        executor: Where cells are computed: ``here``, in processes of this one; ``local`` or ``slurm``, in jobs that
            submitit starts.
        job_options: Parameters of submitit's executor, such as ``{"timeout_min": 600, "slurm_partition": "gpu"}``.
        command: As typed, for the record.
        console: Where progress is shown; silent when None.

    Raises:
        UserError: for what cannot be asked, and for faults of the data; nothing has been trained then.
        Stopped: on SIGINT or SIGTERM, after a checkpoint of each cell.
    """
    request = BenchRequest(
        data=Path(data), methods=methods, variants=variants, budgets=labelled, seeds=seeds,
        label_seeds=label_seeds, test=test,
        split_seed=split_seed, upper=upper, labels=labels, patient=patient,
        label_options=LabelOptions(ignore, sparse, outside_unknown, allow_empty, one_slice_in),
        preset=preset,
        config=None if config is None else Path(config), overrides=tuple(overrides),
        cache=None if cache is None else Path(cache), processes=processes, command=command,
    )  # fmt: skip
    return run_bench(
        Path(out),
        request,
        jobs=jobs,
        device=device,
        devices=devices,
        threads=threads,
        retry=retry,
        executor=executor,
        job_options=job_options or {},
        console=console,
    )


def run_bench(
    folder: Path,
    request: BenchRequest,
    *,
    jobs: int | None = None,
    device: str = "auto",
    devices: int = 1,
    threads: int | None = None,
    retry: bool = False,
    executor: str = "here",
    job_options: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> BenchResult:
    """Run the cells that are asked for and not there yet, and write the table. See `bench`.

    Raises:
        UserError: for what cannot be asked, and for faults of the data; nothing has been trained then.
        Stopped: on SIGINT or SIGTERM, after a checkpoint of each cell.
    """
    begin_cell = starter(executor, job_options or {})
    target = pick_device(device)
    # The machine of a job may have other devices than this one.
    places = (
        _places(target, jobs, devices, threads)
        if executor == "here"
        else [Place(device, threads or 1)] * (1 if jobs is None else jobs)
    )
    setup = begin(folder, request, target, console)
    asked = _asked(setup, request)
    for cell in asked if retry else ():
        record = outcome(folder, cell)
        if record is not None and record["status"] == "failed" and not workers.busy(folder, cell):
            (folder / "runs" / cell.key / OUTCOME).unlink(missing_ok=True)

    def rebuild() -> None:
        write_tables(folder, gather(folder, Setup.read(folder)))

    done = workers.run_cells(
        folder,
        asked,
        places,
        needs_stage1=setup.needs_stage1,
        after=rebuild,
        console=console,
        begin=None if executor == "here" else begin_cell,
    )
    results = gather(folder, Setup.read(folder))
    write_tables(folder, results)
    return BenchResult(folder, results, done)


def _asked(setup: Setup, request: BenchRequest) -> list[Cell]:
    """Return the cells that this command asked for, of all that the folder knows of."""
    slugs = {row.slug for row in request.rows}
    if any(setup.shares_stage1(row) for row in request.rows):
        slugs.add(STAGE1)
    return [
        cell
        for cell in setup.cells
        if cell.seed in request.seeds
        and (cell.budget is None or cell.label_seed in request.label_seeds)
        and (request.upper if cell.budget is None else cell.budget in request.budgets and cell.row in slugs)
    ]


def _places(target: torch.device, jobs: int | None, devices: int, threads: int | None) -> list[Place]:
    """Return where cells are computed at once: a share of the threads each, on the GPUs in turn."""
    count = devices if jobs is None else jobs
    share = max(1, (torch.get_num_threads() if threads is None else threads) // count)
    if devices > 1 and target.type != "cuda":
        raise UserError(f"--devices: found {devices}, but {target} is a single one (use --jobs {devices})")
    if devices > 1 and (there := torch.cuda.device_count()) < devices:
        raise UserError(f"--devices: found {there} GPU(s), expected {devices} (use --devices {there})")
    names = [f"cuda:{i}" for i in range(devices)] if devices > 1 else [str(target)]
    return [Place(names[i % len(names)], share) for i in range(count)]
