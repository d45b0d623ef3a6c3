"""How a run begins: all is decided, its length fitted to the time that it may take, and written down."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from mlbseg.data.unlike import Usual
from mlbseg.errors import UserError
from mlbseg.runs import CONFIG
from mlbseg.staging import require_new
from mlbseg.terminal import say
from mlbseg.training.prepare import Planned, plan_run, require_shares, write_run
from mlbseg.training.request import TrainRequest
from mlbseg.training.timing import TIMING, time_lines, time_stages

KEPT_BACK = 0.1
"""Share of the time that is left for what lies between steps: scans that are read and predicted, and checkpoints."""
WORTH_TIMING = 200
"""Steps from which on it is said before training how long it takes: a few steps are timed for it."""


def prepare_run(
    request: TrainRequest,
    *,
    device: torch.device,
    count: int,
    console: Console | None,
    processes: int | None = None,
) -> Path:
    """Split, check the data, plan, and write all decisions into a new run folder.

    Args:
        request: What is asked for.
        device: Where the run will be trained.
        count: Number of ranks that will train it.
        console: Where progress is shown; silent when None.
        processes: Number of processes that read; one per core when None.

    Returns:
        The run folder.

    Raises:
        UserError: for faults of data and settings, or a folder that is in use; nothing is written then.
    """
    if request.data is None or request.out is None:
        raise UserError("training needs a data folder and --out RUN (or --resume RUN)")
    root = request.out
    hint = f", or continue it with --resume {root}" if (root / CONFIG).is_file() else ""
    require_new(root, overwrite=False, remedy=f"choose another --out{hint}")
    decided = decide_run(request, device=device, console=console, processes=processes)
    require_shares(decided.plan, decided.config, count)
    if console is not None and count == 1 and request.minutes is None and decided.plan.steps >= WORTH_TIMING:
        say(console, TIMING)
        for line in time_lines(time_stages(decided, device)):
            say(console, line)
    write_run(
        root,
        decided.config,
        decided.split,
        decided.plan,
        data=request.data,
        skipped=decided.skipped,
        patients=decided.patients,
        device=device,
        cache=decided.cache,
        inputs=decided.inputs,
        label_options=request.label_options,
        usual=Usual.of(decided.facts, decided.plan.normalisation),
        started=decided.started,
    )
    return root


def decide_run(
    request: TrainRequest, *, device: torch.device, console: Console | None, processes: int | None = None
) -> Planned:
    """Decide as `plan_run` does, and how many steps fit into the minutes that are asked for.

    Raises:
        UserError: for faults of data and settings, or minutes that are too few for two steps.
    """
    planned = plan_run(request, device=device, console=console, processes=processes)
    if request.minutes is None:
        return planned
    say(console, TIMING)
    stages = time_stages(planned, device)
    seconds = sum(stage.minutes for stage in stages) * 60 / sum(stage.steps for stage in stages)
    steps = int(request.minutes * 60 * (1 - KEPT_BACK) / seconds)
    if steps < 2:
        raise UserError(
            f"--minutes: found {request.minutes:g}, expected {2 * seconds / 60 / (1 - KEPT_BACK):.2g} or more: a step "
            f"takes {seconds:.2g} s on this machine"
        )
    reason = (
        f"As many as fit into {request.minutes:g} minutes: a step takes {seconds:.3g} s on this machine as busy as it "
        f"is now; {KEPT_BACK:.0%} of the time is kept for what lies between steps."
    )
    say(console, f"{steps} steps fit into {request.minutes:g} minutes, {seconds:.3g} s each")
    plan = replace(planned.plan, steps=steps, reasons={**planned.plan.reasons, "steps": reason})
    return replace(planned, plan=plan)
