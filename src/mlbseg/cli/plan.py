"""`mlbseg plan`."""

from __future__ import annotations

from collections.abc import Sequence
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
    Init,
    Json,
    Labels,
    Minutes,
    Override,
    Patient,
    Preset,
    Processes,
    Quiet,
    SkipBad,
    StepCount,
    count_or_ids,
    label_values,
)
from mlbseg.cli.ending import finish
from mlbseg.cli.printing import names_note, progress_console
from mlbseg.errors import printable

if TYPE_CHECKING:
    from mlbseg.data.plan import Plan
    from mlbseg.training.timing import StageTime


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
    skip_bad: SkipBad = False,
    cache: Cache = None,
    processes: Processes = None,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Print the plan that train would follow, with its reasons, and how long training takes. No run is written."""
    from mlbseg.device import pick_device
    from mlbseg.training import TrainRequest
    from mlbseg.training.beginning import decide_run
    from mlbseg.training.timing import time_stages

    request = TrainRequest(
        data=data, method=method, labelled=count_or_ids(labelled), test=count_or_ids(test),
        labels=label_values(labels), patient=patient, seed=seed, preset=preset, config=config,
        overrides=tuple(override or ()), allow_empty=allow_empty, skip_bad=skip_bad, cache=cache, init=init,
        steps=steps, minutes=minutes,
    )  # fmt: skip
    target = pick_device(device)
    found = decide_run(
        request, device=target, console=progress_console(quiet or as_json), processes=processes
    )
    stages = time_stages(found, target)
    finish(
        {**found.as_dict(), "stages": [stage.as_dict() for stage in stages]}, as_json=as_json,
        tables=[_table(found.plan, str(data))], lines=[*_times(stages), *names_note(found.skipped, "left out")],
    )  # fmt: skip


def _times(stages: Sequence[StageTime]) -> list[str]:
    """Return how long training takes, a line for the whole and one for each stage."""
    total = sum(stage.minutes for stage in stages)
    return [
        f"training takes about {_minutes(total)} on this machine as busy as it is now, measured on a few steps "
        "(scans that are read and predicted are not counted):",
        *(
            f"  stage {stage.stage}, {stage.method}: {stage.steps} steps of {stage.seconds_per_step:.3g} s, "
            f"{_minutes(stage.minutes)}"
            for stage in stages
        ),
    ]


def _minutes(value: float) -> str:
    return f"{value:.1f} minutes" if value < 10 else f"{value:.0f} minutes"


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
