"""`mlbseg plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from mlbseg.cli.arguments import (
    AllowEmpty,
    Device,
    Json,
    Patient,
    Processes,
    Quiet,
    count_or_ids,
    label_values,
)
from mlbseg.cli.printing import print_names, progress_console, result_console
from mlbseg.errors import printable

if TYPE_CHECKING:
    from mlbseg.data.plan import Plan


def plan(
    data: Annotated[Path, typer.Argument(help="Folder of scans, or a CSV/JSON list of them.")],
    method: Annotated[str | None, typer.Option(help="Method to plan for (default: mlb).")] = None,
    labelled: Annotated[
        str | None, typer.Option(help="Plan from K labels only, or from those of a file or id,id,...")
    ] = None,
    test: Annotated[str | None, typer.Option(help="Set N cases (or a file, or id,id,...) apart.")] = None,
    labels: Annotated[str | None, typer.Option(help="Label values to expect, such as 0,1,2.")] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed of the split.")] = None,
    preset: Annotated[str | None, typer.Option(help="As for train.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    override: Annotated[
        list[str] | None, typer.Option("-o", "--override", help="key=value, such as -o plan.spacing=1.25")
    ] = None,
    patient: Patient = None,
    allow_empty: AllowEmpty = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave faulty cases out.")] = False,
    device: Device = "auto",
    processes: Processes = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Print the plan that train would follow, each decision with its reason. Nothing is trained or written."""
    from mlbseg.config import load_config
    from mlbseg.data.reading import Reading
    from mlbseg.device import device_name, pick_device
    from mlbseg.training.prepare import plan_run

    settings = load_config(config, preset=preset, overrides=override or (), method=method, seed=seed)
    found = plan_run(
        data, settings, labelled=count_or_ids(labelled), test=count_or_ids(test), validation=0,
        labels=label_values(labels), patient=patient, allow_empty=allow_empty, skip_bad=skip_bad,
        device=pick_device(device_name(device)), reading=Reading.of(processes),
        console=progress_console(quiet or as_json),
    )  # fmt: skip
    if as_json:
        print(json.dumps({"plan": found.plan.as_dict(), "skipped": found.skipped}))
        return
    result_console().print(_table(found.plan, str(data)))
    print_names(found.skipped, "left out")


def _table(decided: Plan, title: str) -> Table:
    table = Table("decision", "value", "reason", title=escape(printable(title)), title_justify="left")
    for name, reason in decided.reasons.items():
        value = escape(printable(_shown(getattr(decided, name))))
        table.add_row(name, value, escape(printable(reason)))
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
