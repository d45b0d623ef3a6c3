"""From a folder of scans to every decision, and from these to a new run folder; training has not begun."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from mlbseg.config import Config
from mlbseg.data.cache_root import default_cache_root
from mlbseg.data.cases import AS_DRAWN, LabelOptions
from mlbseg.data.check import check, no_clean_case, unknown_values, without_bad
from mlbseg.data.fingerprint import Fingerprint, fingerprint
from mlbseg.data.inputs import INPUTS, Inputs
from mlbseg.data.known import leaves_classes
from mlbseg.data.patients import Patients
from mlbseg.data.plan import Plan, make_plan
from mlbseg.data.reading import Reading
from mlbseg.data.records import write_record
from mlbseg.data.splits import Split, apply_split, leave_out, make_split
from mlbseg.data.unlike import FINGERPRINT, Usual
from mlbseg.device import available_memory, environment, use_bf16
from mlbseg.errors import FaultsError, UserError, note_lines
from mlbseg.methods import find_method
from mlbseg.progress import StepProgress
from mlbseg.runs import CONFIG, ENVIRONMENT, Run, make_method, make_student
from mlbseg.runs.plugins import plugins_of
from mlbseg.runs.starting import Started, read_start, start_from
from mlbseg.staging import staged
from mlbseg.tables import data_frame
from mlbseg.terminal import say
from mlbseg.training.continuing import Continued, show_start
from mlbseg.training.request import TrainRequest
from mlbseg.types import Case, Role

if TYPE_CHECKING:
    import pandas as pd


STAGE1_SHARE = 0.75
"""Share of the steps that stage 1 takes where it starts from nothing."""
STARTED_SHARE = 0.5
"""The same where it starts from weights: the time that they save goes to the scans without labels."""


@dataclass(frozen=True)
class Planned:
    """What is decided before a run folder is made.

    Attributes:
        config: The settings.
        split: Which case has which part.
        plan: How scans are prepared and trained on.
        skipped: Ids of the cases left out.
        patients: How patients are known; None if they are not.
        inputs: What the files of the cases held.
        facts: What the training scans have in common.
        cache: Folder for preprocessed scans; the user's cache folder when None.
        started: The network with the weights that the run starts from; None if they are drawn.
    """

    config: Config
    split: Split
    plan: Plan
    skipped: list[str]
    patients: Patients | None
    inputs: Inputs
    facts: Fingerprint
    cache: Path | None = None
    started: Started | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the plan and what was left out, for `--json`."""
        init = {} if self.started is None else {"init": asdict(self.started.record)}
        return {"plan": self.plan.as_dict(), "skipped": self.skipped, **init}

    def to_pandas(self) -> pd.DataFrame:
        """Return a row per decision: decision, value, reason.

        Raises:
            UserError: if pandas is not installed.
        """
        return data_frame(
            {"decision": name, "value": getattr(self.plan, name), "reason": reason}
            for name, reason in self.plan.reasons.items()
        )


def plan_run(
    request: TrainRequest, *, device: torch.device, console: Console | None, processes: int | None = None
) -> Planned:
    """Split, check and measure the data, and decide; no run is written.

    Args:
        request: What is asked for.
        device: Where the run will be trained.
        console: Where progress is shown; silent when None.
        processes: Number of processes that read; one per core when None.

    Raises:
        UserError: for faults of data and settings.
    """
    config, source = request.settings, request.source
    data = source.data
    find_method(config.method)
    start = None if config.train.init is None else read_start(config.train.init)
    again = Continued.of(start, request, config, device)
    cache = again.cache
    found = source.find()
    if not any(case.role is Role.CLEAN for case in found.cases):
        raise FaultsError([*found.faults, *no_clean_case(found.cases)], str(data))
    # By names alone, and before any label is read: what a hidden or a test label holds must change nothing.
    test, validation, seed = again.split([case.id for case in found.cases])
    split = make_split(
        found.cases, order=found.order, labelled=request.labelled, test=test, validation=validation, seed=seed,
        patients=found.patients,
    )  # fmt: skip
    if found.patients is not None:
        say(console, f"patients: {found.patients} ({found.patients.advice})")
    dataset = replace(found, cases=apply_split(found.cases, split, every=source.options.every))
    reading = Reading.of(processes, cache)
    inputs = Inputs(since="the run began", remembered=reading.remembered)
    note_inputs(inputs, [case for case in dataset.cases if case.role is not Role.TEST], reading, console)
    labels = source.labels if config.plan.label_values is None else config.plan.label_values
    with StepProgress(console, "checking the scans", len(dataset.cases)) as progress:
        result = check(
            dataset, labels=labels, reading=reading, progress=lambda done, _: progress.update(done)
        )
    if labels is None and not dataset.class_names and (request.skip_bad or not result.faults):
        good = leave_out(split, [fault.case_id for fault in result.faults if fault.case_id is not None])
        result = replace(result, faults=(*result.faults, *unknown_values(result, good.clean)))
    if result.faults and not request.skip_bad:
        raise FaultsError(
            result.faults, str(data), "correct them, or pass --skip-bad to leave these cases out"
        )
    skipped = sorted({fault.case_id for fault in result.faults if fault.case_id is not None})
    cases = {case.id: case for case in without_bad(result).cases}
    split = leave_out(split, skipped)
    for line in note_lines(result.warnings):
        say(console, line)
    if skipped:
        say(console, f"left out: {', '.join(skipped)}")
    held = result.summary["per_case"]
    values = {*(labels or dataset.class_names), *(int(value) for entry in held for value in entry["labels"])}
    partly = {entry["id"] for entry in held if entry["unknown"] or leaves_classes(entry["classes"], values)}
    require_cases(data, config, split, partly=not partly.isdisjoint(split.clean))
    training = [cases[i] for i in (*split.clean, *split.noisy, *split.unlabelled)]
    with StepProgress(console, "measuring the scans", len(training)) as progress:
        facts = fingerprint(training, reading=reading, progress=lambda done, _: progress.update(done))
    names = dataset.class_names
    if labels is not None:
        names = {value: names.get(value, f"label {value}") for value in labels if value or value in names}
    plan = make_plan(
        facts,
        class_names=names,
        memory_bytes=available_memory(device),
        device=device.type,
        views=views_of(config),
        overrides=config.plan.model_dump(exclude_none=True),
        proposed=again.plan(facts),
        proposer="" if start is None else start.proposal.what,
    )
    inputs = inputs.of([*training, *(cases[i] for i in split.validation)])
    started = None
    if start is not None:
        notes = again.notes(split, plan)
        started = start_from(start, plan, config, data=data, notes=notes)
        show_start(started.record, console)
    return Planned(config, split, plan, skipped, found.patients, inputs, facts, cache, started)


def first_steps(plan: Plan, config: Config) -> int:
    """Return the steps of stage 1, of a method that has two stages."""
    share = config.train.stage1_share
    if share is None:
        share = STAGE1_SHARE if config.train.init is None else STARTED_SHARE
    return min(max(1, round(plan.steps * share)), plan.steps - 1)


def second_steps(plan: Plan, config: Config) -> int:
    """Return the steps of stage 2."""
    return max(1, round((plan.steps - first_steps(plan, config)) * config.train.stage2_factor))


def note_inputs(inputs: Inputs, cases: Sequence[Case], reading: Reading, console: Console | None) -> None:
    """Record the content of the cases' files before they are read, so that later changes are noticed."""
    with StepProgress(console, "hashing the scans", len(cases)) as progress:
        inputs.note_all(cases, reading=reading, progress=lambda done, _: progress.update(done))


def views_of(config: Config) -> int:
    """Return how many views of each unlabelled patch a step looks at, the patch itself among them; see `make_plan`."""
    method = find_method(config.method)
    return method.passes(config.of(config.method)) if method.uses_unlabelled else 0


def require_cases(data: Path, config: Config, split: Split, *, partly: bool = False) -> None:
    """Refuse a split that the method cannot be trained on.

    Args:
        data: The data set, for messages.
        config: The settings.
        split: The split.
        partly: Whether some clean label leaves voxels or classes open: these are unlabelled data.

    Raises:
        UserError: if no clean case is left for stage 1, or a semi-supervised method has no case without a clean label.
    """
    method = find_method(config.method)
    meta = config.train.meta_cases
    if meta and not method.needs_initial_labels:
        raise UserError(
            f"train.meta_cases: found {meta}, but method {config.method!r} has no weights to decide"
        )
    method.require_useful(config.of(config.method), noisy=bool(split.noisy), meta_cases=meta)
    if meta >= len(split.clean):
        raise UserError(
            f"train.meta_cases: found {meta} of {len(split.clean)} clean cases, expected fewer "
            "(stage 1 needs at least one)"
        )
    if method.uses_unlabelled and not (split.noisy or split.unlabelled or partly):
        raise UserError(
            f"{data}: every case is labelled, but method {config.method!r} also needs scans without a label "
            "(add some, or use --method supervised)"
        )


def write_run(
    root: Path,
    config: Config,
    split: Split,
    plan: Plan,
    *,
    data: Path,
    skipped: Sequence[str],
    device: torch.device,
    cache: str | Path | None,
    inputs: Inputs,
    usual: Usual | None = None,
    patients: Patients | None = None,
    label_options: LabelOptions = AS_DRAWN,
    started: Started | None = None,
) -> None:
    """Write a new run folder with decisions that have been made; see `mlbseg.training.train`.

    Raises:
        UserError: the network cannot be built, or the folder cannot be written; then nothing is left of it.
    """
    if find_method(config.method).uses_unlabelled and plan.steps < 2:
        raise UserError(f"plan.steps: found {plan.steps}, expected at least 2, one for each stage")
    # What cannot be built must fail before there is a run folder, and not after the stage before it.
    if started is None and config.train.init is not None:
        started = start_from(read_start(config.train.init), plan, config, data=data)
    student = make_student(plan, config) if started is None else started.student
    make_method(student, Run(root, config, plan, split))
    meanwhile = "another process has begun a run there meanwhile: choose another --out"
    with staged(root, last=CONFIG, remedy=meanwhile) as folder:
        split.write(folder / "split.json")
        plan.write(folder / "plan.json")
        write_record(
            folder / ENVIRONMENT,
            {
                **environment(),
                "device": str(device),
                "bf16": use_bf16(config.train.precision, device),
                "plugins": [asdict(plugin) for plugin in plugins_of(config, plan)],
            },
        )
        write_record(
            folder / "data.json",
            {
                "root": str(data.resolve()),
                "cache": str(Path(cache if cache is not None else default_cache_root()).resolve()),
                "skipped": list(skipped),
                "patients": None if patients is None else patients.as_dict(),
                "labels": asdict(label_options),
            },
        )
        inputs.write(folder / INPUTS)
        if usual is not None:
            usual.write(folder / FINGERPRINT)
        if started is not None:
            started.write(folder)
        config.write(folder / CONFIG)  # its presence makes the folder a run


def require_shares(plan: Plan, config: Config, count: int, *, begun: bool = False) -> None:
    """Refuse a number of ranks that cannot compute the same as one rank.

    Args:
        plan: Of the run.
        config: Of the run.
        count: Of ranks.
        begun: The run exists: its plan and settings are fixed.
    """
    if count == 1:
        return
    method = find_method(config.method)
    # Patches per step, and how many of them a rank must not part.
    sizes = {"plan.batch_size": (plan.batch_size, 1)}
    if method.uses_unlabelled:
        sizes["plan.unlabelled_batch_size"] = (plan.unlabelled_batch_size, 2 if method.mixes_pairs else 1)
    uneven = {name: (size, count * group) for name, (size, group) in sizes.items() if size % (count * group)}
    if uneven:
        found = " and ".join(f"{name}={size}" for name, (size, _) in uneven.items())
        wanted = " -o ".join(f"{name}={-(-size // step) * step}" for name, (size, step) in uneven.items())
        multiples = " and ".join(dict.fromkeys(str(step) for _, step in uneven.values()))
        # An odd number of images that are mixed in pairs is no other's than one rank's.
        most = math.gcd(*(size // group if size % group == 0 else 1 for size, group in sizes.values()))
        remedy = (
            f"the batch of a run is fixed: continue on a number of ranks that divides {most}"
            if begun
            else f"such as -o {wanted}"
        )
        pairs = (
            f", and method {config.method!r} mixes pairs of images within a rank"
            if method.mixes_pairs
            else ""
        )
        raise UserError(
            f"a batch must divide evenly among {count} ranks{pairs}: found {found}, expected multiples of {multiples} "
            f"({remedy})"
        )
    if config.train.norm == "batch":
        raise UserError(
            f"train.norm: found batch, but {count} ranks do not share its statistics, expected instance or group "
            f"({'continue on one device' if begun else 'such as -o train.norm=instance'})"
        )
