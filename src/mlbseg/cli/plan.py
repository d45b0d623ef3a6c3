"""`mlbseg plan`."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from mlbseg.cli.arguments import (
    AllowEmpty,
    Cache,
    ConfigFile,
    Data,
    Device,
    Ignore,
    Init,
    Json,
    Labels,
    Minutes,
    OutsideUnknown,
    Override,
    Patient,
    Preset,
    Processes,
    Quiet,
    SkipBad,
    Sparse,
    StepCount,
    count_or_ids,
    label_values,
)
from mlbseg.cli.ending import finish
from mlbseg.cli.printing import names_note, progress_console
from mlbseg.errors import printable
from mlbseg.terminal import say

if TYPE_CHECKING:
    from mlbseg.apps.nnunet_plan import NnunetPlan
    from mlbseg.data.plan import Plan


def plan(
    data: Data,
    method: Annotated[str | None, typer.Option(help="Method to plan for (default: mlb).")] = None,
    labelled: Annotated[
        str | None,
        typer.Option(
            help="Plan with the first K labels, or with those of the cases in a file or in id,id,..."
        ),
    ] = None,
    test: Annotated[
        str | None, typer.Option(help="Set N cases (or a file, or id,id,...) apart for testing.")
    ] = None,
    labels: Labels = None,
    seed: Annotated[int | None, typer.Option(help="Random seed of the split.")] = None,
    preset: Preset = None,
    config: ConfigFile = None,
    override: Override = None,
    patient: Patient = None,
    init: Init = None,
    steps: StepCount = None,
    minutes: Minutes = None,
    allow_empty: AllowEmpty = False,
    ignore: Ignore = None,
    sparse: Sparse = False,
    outside_unknown: OutsideUnknown = False,
    skip_bad: SkipBad = False,
    cache: Cache = None,
    processes: Processes = None,
    device: Device = "auto",
    nnunet: Annotated[
        bool,
        typer.Option("--nnunet", help="Also print what nnU-Net's planner decides for the labelled scans."),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Print the plan that train would follow, with its reasons, and how long training takes. No run is written."""
    from mlbseg.apps.nnunet_plan import nnunet_plan, require_nnunet
    from mlbseg.data.cases import LabelOptions
    from mlbseg.device import pick_device
    from mlbseg.training import TrainRequest
    from mlbseg.training.beginning import decide_run
    from mlbseg.training.timing import TIMING, time_lines, time_stages

    request = TrainRequest(
        data=data, method=method, labelled=count_or_ids(labelled), test=count_or_ids(test),
        labels=label_values(labels), patient=patient, seed=seed, preset=preset, config=config,
        overrides=tuple(override or ()),
        label_options=LabelOptions(ignore, sparse, outside_unknown, allow_empty),
        skip_bad=skip_bad, cache=cache, init=init,
        steps=steps, minutes=minutes,
    )  # fmt: skip
    target = pick_device(device)
    if nnunet:
        require_nnunet()
    console = progress_console(quiet or as_json)
    found = decide_run(request, device=target, console=console, processes=processes)
    say(console, TIMING)
    stages = time_stages(found, target)
    theirs = nnunet_plan(found.facts, found.plan) if nnunet else None
    record = {**found.as_dict(), "stages": [stage.as_dict() for stage in stages]}
    tables = [_table(found.plan, str(data))]
    if theirs is not None:
        record["nnunet"] = theirs.as_dict()
        tables.append(_their_table(theirs))
    lines = [*time_lines(stages), *names_note(found.skipped, "left out")]
    finish(record, as_json=as_json, tables=tables, lines=lines)


def _table(decided: Plan, title: str) -> Table:
    table = Table("decision", "value", "reason", title=escape(printable(title)), title_justify="left")
    for name, reason in decided.reasons.items():
        value = escape(printable(_shown(getattr(decided, name))))
        table.add_row(name, value, escape(printable(reason)))
    return table


def _their_table(plan: NnunetPlan) -> Table:
    """Return nnU-Net's configurations, a column each."""
    title = f"nnU-Net {plan.version} for the {plan.cases} labelled scans, on a GPU of 8 GB"
    table = Table("decision", *(each.name for each in plan.configurations), title=title, title_justify="left")
    for name in (each.name for each in fields(plan.configurations[0]) if each.name != "name"):
        table.add_row(name, *(escape(printable(_shown(getattr(each, name)))) for each in plan.configurations))
    return table


def _shown(value: Any) -> str:
    """Return a value in few characters: 192 256, 2×2 2×1."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple):
        if value and isinstance(value[0], tuple):
            return " ".join("×".join(map(str, part)) for part in value)
        return " ".join(_shown(part) for part in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(part)}" for key, part in value.items()) or "none"
    return str(value)
