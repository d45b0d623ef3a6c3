"""How a bench begins, or goes on: what is asked is checked, decided once for all cells, and written down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from pydantic import TypeAdapter
from rich.console import Console

from mlbseg.apps.bench.cells import STAGE1, Cell, cells_of, in_order
from mlbseg.apps.bench.record import RECORD, SETTINGS, Setup, shares_stage1, with_row
from mlbseg.apps.bench.request import BenchRequest
from mlbseg.apps.bench.same import require_planned, require_same, shown
from mlbseg.config import Config, load_config
from mlbseg.data.cache import Cache
from mlbseg.data.cache_root import default_cache_root
from mlbseg.data.cases import Dataset, find_cases, with_patients
from mlbseg.data.check import CheckResult, check, unknown_values
from mlbseg.data.fingerprint import fingerprint
from mlbseg.data.inputs import INPUTS, Inputs
from mlbseg.data.plan import Plan, make_plan
from mlbseg.data.reading import HERE
from mlbseg.data.remembered import Remembered
from mlbseg.data.splits import Split, apply_split, make_split
from mlbseg.device import available_memory
from mlbseg.errors import FaultsError, UserError
from mlbseg.files import make_folder, write_atomic
from mlbseg.progress import StepProgress
from mlbseg.runs.lock import locked
from mlbseg.runs.starting import read_start, start_from
from mlbseg.staging import contents
from mlbseg.terminal import say
from mlbseg.training.prepare import note_inputs, require_cases, views_of
from mlbseg.types import ALL_KNOWN, Role

LOCK = ".lock"


def begin(folder: Path, request: BenchRequest, device: torch.device, console: Console | None) -> Setup:
    """Begin a bench in a new folder, or add to one what it lacks of what is asked.

    Args:
        folder: Of the bench.
        request: What is asked.
        device: That a step is planned for.
        console: Where progress is shown.

    Returns:
        The record, with all cells that were ever asked for.

    Raises:
        UserError: if the folder holds something else, or was begun with other data, cases or settings; if what is
            asked cannot be. Nothing is changed then.
    """
    existing = _existing(folder)
    dataset = find_cases(request.data, request.label_options)
    if existing is None or existing.patients is not None or request.patient is not None:
        dataset = with_patients(dataset, request.patient)
    wide = make_split(
        dataset.cases,
        order=dataset.order,
        test=request.test,
        seed=request.split_seed,
        patients=dataset.patients,
    )
    fresh = _facts(request, dataset, wide)
    if existing is not None:
        require_same(folder, existing, fresh, names_cache=request.cache is not None)
        require_planned(existing, min(request.budgets))
    for budget in request.budgets:
        if not 1 <= budget <= len(fresh.clean):
            raise UserError(
                f"--labelled: found {budget}, expected 1 to {len(fresh.clean)}, the cases with a careful label that "
                "are not set apart for testing"
            )
    added = {row.slug: row for row in request.rows}
    if existing is not None:
        for name in added.keys() & existing.rows.keys():
            if existing.rows[name] != added[name]:
                raise UserError(
                    f"{folder}: {added[name].label!r} was {shown(existing.rows[name])}, found "
                    f"{shown(added[name])} (give the new one another label)"
                )
    share = [row.slug for row in request.rows if shares_stage1(row, request.settings)]
    rows = {**({} if existing is None else existing.rows), **added}
    asked = cells_of(
        request.rows,
        request.budgets,
        request.seeds,
        upper=request.upper,
        share=share,
        label_seeds=request.label_seeds,
    )
    cells = in_order(asked, list(rows))
    for cell in cells:
        if cell.seed == request.seeds[0] and cell.row != STAGE1 and cell.budget is not None:
            # Of all rows before anything is trained, and not of the last one after a week.
            row = rows[cell.row]
            config = with_row(request.settings, row)
            # Whether a label that may leave voxels open does is known once it has been read.
            partly = request.label_options.every is not None
            partly |= any(case.known != ALL_KNOWN for case in dataset.cases)
            require_cases(request.data, config, fresh.split(cell, dataset), partly=partly)
    inputs = _inputs(folder, request.reading.remembered)
    if existing is not None and _widest(existing.cells, wide) < _widest(cells, wide):
        _check(request, dataset, wide, Plan.from_dict(existing.plan).label_values, inputs, console)
    if existing is None and fresh.patients is not None:
        say(console, f"patients: {fresh.patients} ({fresh.patients.advice})")
    if existing is None:
        fresh = replace(fresh, plan=_decide(request, dataset, wide, device, inputs, console).as_dict())
    decided = Plan.from_dict(fresh.plan if existing is None else existing.plan)
    for row in request.rows:
        config = with_row(request.settings, row)
        if config.train.init is not None:  # weights that do not fit are refused here, and not after a week
            start_from(read_start(config.train.init), decided, config, data=request.data)
    make_folder(folder)
    with locked(folder / LOCK, f"{folder}: another bench is just beginning there (start this one again)"):
        existing = Setup.read(folder) if (folder / RECORD).exists() else None
        if existing is None:
            settings = _pinned(request.settings, Plan.from_dict(fresh.plan))
            text = yaml.safe_dump(settings.as_record(), sort_keys=False)
            write_atomic(folder / SETTINGS, text.encode())
        else:
            require_same(folder, existing, fresh, names_cache=request.cache is not None)
            require_planned(existing, min(request.budgets))
            settings = load_config(folder / SETTINGS)
            if settings.train.workers != request.settings.train.workers:  # which changes no result
                settings.train.workers = request.settings.train.workers
                write_atomic(
                    folder / SETTINGS, yaml.safe_dump(settings.as_record(), sort_keys=False).encode()
                )
            fresh = existing
        _inputs(folder).joined(inputs).write(folder / INPUTS)
        record = replace(
            fresh,
            rows={**fresh.rows, **added},
            cells=tuple(in_order({*fresh.cells, *cells}, [*fresh.rows, *added])),
            commands=tuple(dict.fromkeys((*fresh.commands, request.command))),
        )
        if record != existing:
            record.write(folder)
    return record


def _existing(folder: Path) -> Setup | None:
    """Return the record of a folder that holds a bench; None of one that is free."""
    if (folder / RECORD).is_file():
        return Setup.read(folder)
    # A bench that was killed at its beginning leaves the lock first. Without it, the settings are the user's.
    found = contents(folder)
    if others := found - ({LOCK, SETTINGS, INPUTS} if LOCK in found else set()):
        raise UserError(
            f"{folder}: holds something else than a bench, such as {sorted(others)[0]} (choose another --out)"
        )
    return None


def _inputs(folder: Path, remembered: Remembered = HERE.remembered) -> Inputs:
    """Return what is known of the files of a bench's cases."""
    since = "the bench began"
    if (folder / INPUTS).exists():
        return Inputs.read(folder / INPUTS, since=since, remembered=remembered)
    return Inputs(since=since, remembered=remembered)


def _facts(request: BenchRequest, dataset: Dataset, wide: Split) -> Setup:
    """Return the record of what is asked, with no plan yet."""
    by_id = {case.id: case for case in dataset.cases}
    scored = tuple(name for name in wide.test if by_id[name].label is not None)
    if not scored:
        raise UserError(
            "no test case has a label, so nothing could be scored (set cases apart with --test, such as --test 10)"
        )
    cache = request.cache if request.cache is not None else default_cache_root()
    return Setup(
        data=str(request.data.resolve()),
        cache=str(Path(cache).resolve()),
        split_seed=request.split_seed,
        rule=wide.rule,
        clean=wide.clean,
        test=wide.test,
        scored=scored,
        asked=request.settings.as_record(),
        plan={},
        labels=tuple(sorted(set(request.labels or ()))),
        noisy=wide.noisy,
        unlabelled=wide.unlabelled,
        patients=dataset.patients,
        label_options=request.label_options,
    )


def _widest(cells: Sequence[Cell], wide: Split) -> int:
    """Return how many labels are given to the cell that is given most."""
    return max(len(wide.clean) if cell.budget is None or cell.label_seed else cell.budget for cell in cells)


def _check(
    request: BenchRequest,
    dataset: Dataset,
    wide: Split,
    labels: Sequence[int] | None,
    inputs: Inputs,
    console: Console | None,
) -> tuple[CheckResult, Split]:
    """Check all that any cell will read, and return what was found and the split of the largest budget.

    Raises:
        FaultsError: for faults of the data.
    """
    most = len(wide.clean) if request.upper or any(request.label_seeds) else max(request.budgets)
    widest = make_split(
        dataset.cases,
        order=dataset.order,
        labelled=wide.clean[:most],
        test=wide.test,
        seed=request.split_seed,
    )
    by_id = {case.id: case for case in dataset.cases}
    # Test labels are looked at for faults, which had better be known before training than after it, and for no more.
    seen = [
        replace(case, label=by_id[case.id].label) if case.role is Role.TEST else case
        for case in apply_split(dataset.cases, widest, every=request.label_options.every)
    ]
    kept = replace(dataset, cases=tuple(seen))
    read = [case for case in seen if case.role is not Role.TEST]
    note_inputs(inputs, read, request.reading, console)
    with StepProgress(console, "checking the scans", len(kept.cases)) as progress:
        result = check(
            kept, labels=labels, reading=request.reading, progress=lambda done, _: progress.update(done)
        )
    if result.faults:
        raise FaultsError(
            result.faults, str(request.data), "correct them, or take these cases out of the data"
        )
    inputs.require(read)
    return result, widest


def _decide(
    request: BenchRequest,
    dataset: Dataset,
    wide: Split,
    device: torch.device,
    inputs: Inputs,
    console: Console | None,
) -> Plan:
    """Check all that any cell will read, decide what all cells share, and prepare the scans.

    The facts are those of the smallest budget: nothing that all cells share may rest on labels that some of them
    must not see. Only which values stand for classes is read from all labels: that is the task.

    Raises:
        UserError: for faults of the data, and settings that contradict each other.
    """
    init = request.settings.train.init
    start = None if init is None else read_start(init)
    labels = (
        request.labels if request.settings.plan.label_values is None else request.settings.plan.label_values
    )
    result, widest = _check(request, dataset, wide, labels, inputs, console)
    names = dataset.class_names
    if labels is None and not names:
        found = [entry["labels"] for entry in result.summary["per_case"] if entry["id"] in widest.clean]
        labels = sorted({int(value) for values in found for value in values})
        # The other labels cannot add a class.
        if faults := unknown_values(result, widest.clean):
            raise FaultsError(faults, str(request.data), "correct them, or name all values with --labels")
    if labels is not None:
        names = {value: names.get(value, f"label {value}") for value in labels if value or value in names}
    narrow = make_split(
        dataset.cases,
        order=dataset.order,
        labelled=wide.clean[: min(request.budgets)],
        test=wide.test,
        seed=request.split_seed,
    )
    cases = {case.id: case for case in apply_split(dataset.cases, narrow, every=request.label_options.every)}
    training = [cases[i] for i in (*narrow.clean, *narrow.noisy, *narrow.unlabelled)]
    with StepProgress(console, "measuring the scans", len(training)) as progress:
        facts = fingerprint(training, reading=request.reading, progress=lambda done, _: progress.update(done))
    plan = make_plan(
        facts,
        class_names=names,
        memory_bytes=available_memory(device),
        device=device.type,
        views=max(views_of(with_row(request.settings, row)) for row in request.rows),
        overrides=request.settings.plan.model_dump(exclude_none=True),
        proposed={} if start is None else start.proposal.of(facts.scan_ndim, facts.channels),
        proposer="" if start is None else start.proposal.what,
    )
    root = request.cache if request.cache is not None else default_cache_root()
    cache = Cache(Path(root), plan, inputs)
    used = [case for case in result.dataset.cases if case.role is not Role.TEST]
    # Here and not in the cells: the first of them would pay for all, in time and in memory.
    with StepProgress(console, "preprocessing", len(used)) as progress:
        cache.fill(used, reading=request.reading, progress=lambda done, _: progress.update(done))
    return plan


def _pinned(config: Config, plan: Plan) -> Config:
    """Return the settings with every decision of the plan in them."""
    data = config.model_dump(mode="json")
    decided = TypeAdapter(Plan).dump_python(plan, mode="json")
    data["plan"] = {
        # A plan may do without these, which no setting says.
        name: decided[name] or None if name in ("unlabelled_batch_size", "intensity") else decided[name]
        for name in data["plan"]
    }
    return load_config(**data)
