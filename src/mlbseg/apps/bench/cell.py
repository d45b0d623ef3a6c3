"""One cell, in a process of its own: trained, its test cases predicted, and scored at the very end.

The process has its own peak of memory, and takes the cell's lock with it however it ends.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from mlbseg.apps.bench.cells import STAGE1, Cell
from mlbseg.data.records import read_record, validate, write_record
from mlbseg.errors import UserError
from mlbseg.launch import end_with_parent

if TYPE_CHECKING:
    import torch

    from mlbseg.apps.bench.record import Setup
    from mlbseg.types import Case

# torch is imported where it is needed: a process that starts must soon be able to take a signal.

OUTCOME = "cell.json"
SCORES = "scores.csv"
BUSY = 75
"""Exit code where another process runs the cell: EX_TEMPFAIL."""


_Number = Annotated[float, Field(allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True)
class _Outcome:
    """What cell.json may say; what is measured of a finished cell is there."""

    status: Literal["done", "failed", "trained"]
    reason: str = ""
    dice: _Number | None = None
    jaccard: _Number | None = None
    hd95_mm: _Number | None = None
    assd_mm: _Number | None = None
    no_distance: _Count = 0
    steps: _Count = 0
    seconds: _Number | None = None
    seconds_per_step: _Number | None = None
    peak_memory_bytes: _Count = 0
    device: str = ""
    processor: str = ""
    threads: _Count = 0
    host: str = ""


_OUTCOME = TypeAdapter(_Outcome)


def outcome(folder: Path, cell: Cell) -> dict[str, Any] | None:
    """Return how a cell of a bench's folder ended; None if it has not.

    Raises:
        UserError: if its record is damaged.
    """
    root = folder / "runs" / cell.key
    if not (root / OUTCOME).is_file():
        return None
    record = _recorded(root)
    if record["status"] == "done" and cell.row != STAGE1 and record.get("dice") is None:
        raise UserError(f"{root / OUTCOME}: without dice (delete it and run the bench again)")
    if record["status"] == "done" and (cell.row == STAGE1 or (root / SCORES).is_file()):
        return record
    return record if record["status"] == "failed" else None


def _recorded(root: Path) -> dict[str, Any]:
    """Return what cell.json says, and no more than it says.

    Raises:
        UserError: if it is damaged.
    """
    path = root / OUTCOME
    record = read_record(path, "the outcome of a cell")
    checked = asdict(validate(_OUTCOME, record, str(path)))
    needed = ("reason",) if checked["status"] == "failed" else ("steps", "device", "processor", "threads")
    if missing := [name for name in needed if name not in record]:
        raise UserError(f"{path}: without {', '.join(missing)} (delete it and run the bench again)")
    return {name: value for name, value in checked.items() if name in record}


def lock_of(folder: Path, cell: Cell) -> Path:
    """Return the file that is locked by whoever runs a cell."""
    return folder / "locks" / cell.key.replace("/", ".")


def run_cell(folder: Path, cell: Cell, device: str) -> dict[str, Any]:
    """Do what is left to do of a cell, and write down how it ended.

    Args:
        folder: Of the bench.
        cell: The cell.
        device: ``auto``, ``cpu``, ``cuda:1`` ...

    Returns:
        The outcome, as `outcome` returns it.

    Raises:
        Busy: if another process runs the cell.
        Interrupted: on SIGINT or SIGTERM, after a checkpoint.
    """
    from mlbseg.runs.lock import locked
    from mlbseg.training import Interrupted

    lock = lock_of(folder, cell)
    lock.parent.mkdir(exist_ok=True)
    with locked(lock, f"{cell.key}: another process runs this cell"):
        done = outcome(folder, cell)
        if done is not None and done["status"] == "done":
            return done
        root = folder / "runs" / cell.key
        try:
            record = {"status": "done", **_run(folder, cell, root, device)}
        except Interrupted:
            raise
        except UserError as error:
            root.mkdir(parents=True, exist_ok=True)
            record = {"status": "failed", "reason": _reason(error, root)}
        write_record(root / OUTCOME, record)
        return record


def _reason(error: UserError, root: Path) -> str:
    """Return why a cell failed, and what to do: of the commands that errors speak of, none would tell the bench."""
    from mlbseg.training.signals import how_to_continue

    said = str(error).replace(f" (mend it and {how_to_continue(root)})", "")
    # What asks to train anew asks for other settings, which cells that are there could not be compared with.
    said = said.replace("(train anew with ", "(begin another bench, or give this one a --variant, with ")
    return f"{said}; mend it and repeat the bench command with --retry"


def _run(folder: Path, cell: Cell, root: Path, device: str) -> dict[str, Any]:
    """Train, predict and score; return what was measured.

    Raises:
        UserError: whatever keeps the cell from being trained or scored.
    """
    from mlbseg.apps.bench.record import Setup
    from mlbseg.data.cases import find_cases
    from mlbseg.data.inputs import INPUTS, Inputs
    from mlbseg.data.plan import Plan
    from mlbseg.data.splits import apply_split
    from mlbseg.device import pick_device
    from mlbseg.training.prepare import write_run
    from mlbseg.types import Role

    setup = Setup.read(folder)
    target = pick_device(device)
    dataset = find_cases(Path(setup.data), setup.label_options)
    # The upper bound has whole labels.
    options = replace(setup.label_options, every=None if cell.budget is None else setup.label_options.every)
    if not (root / "config.yaml").is_file():
        shutil.rmtree(root, ignore_errors=True)  # what a kill left half made
        split, begun = setup.split(cell, dataset), folder / INPUTS
        inputs = Inputs.read(begun, since="the bench began") if begun.exists() else Inputs()
        used = [
            case
            for case in apply_split(dataset.cases, split, every=options.every)
            if case.role is not Role.TEST
        ]
        write_run(
            root, setup.config(folder, cell), split, Plan.from_dict(setup.plan), data=Path(setup.data),
            skipped=(), patients=setup.patients, device=target, cache=setup.cache, inputs=inputs.of(used),
            label_options=options,
        )  # fmt: skip
    if cell.row == STAGE1:
        return _train_stage1(root, target)
    measured = _train(folder, cell, root, setup, target)
    cases = {case.id: case for case in dataset.cases if case.label is not None}
    return {**_score(root, setup, [cases[name] for name in setup.scored], target), **measured}


def _train_stage1(root: Path, target: torch.device) -> dict[str, Any]:
    from rich.console import Console

    from mlbseg.training import train_stage1

    pace = train_stage1(root, target, Console(stderr=True))
    return _measured(root, target, pace)


def _train(folder: Path, cell: Cell, root: Path, setup: Setup, target: torch.device) -> dict[str, Any]:
    """Train a cell to its end, unless it has been; return what its last stage took."""
    from rich.console import Console

    from mlbseg.training import begin_from_stage1, train

    if (root / "model.safetensors").is_file() and (root / OUTCOME).is_file():
        record = _recorded(root)
        if record.get("status") == "trained":  # and then killed
            return {name: value for name, value in record.items() if name != "status"}
    if setup.needs_stage1(cell):
        begin_from_stage1(root, folder / "runs" / cell.stage1.key)
    result = train(resume=root, device=str(target), console=Console(stderr=True))
    measured = _measured(root, target, result.seconds_per_step)
    write_record(root / OUTCOME, {"status": "trained", **measured})
    return measured


def _measured(root: Path, target: torch.device, pace: float | None) -> dict[str, Any]:
    """Return what the last stage took, and where.

    The peak of memory is the GPU's, as torch counts it, or of all that this process held resident, bytes.
    """
    import torch

    from mlbseg.device import environment, peak_memory
    from mlbseg.runs import checkpoints

    machine = environment()
    steps = checkpoints.find(root / "checkpoints")[-1].step
    return {
        "steps": steps,
        "seconds": None if pace is None else pace * steps,
        "seconds_per_step": pace,
        "peak_memory_bytes": peak_memory(target),
        "device": str(target),
        "processor": torch.cuda.get_device_name(target) if target.type == "cuda" else machine["processor"],
        "threads": machine["threads"],
        "host": platform.node(),
    }


def _score(root: Path, setup: Setup, cases: Sequence[Case], target: torch.device) -> dict[str, Any]:
    """Predict the test cases and score them, which no case did before; return the means over cases."""
    from mlbseg.data.plan import Plan
    from mlbseg.evaluation import evaluate
    from mlbseg.inference import predict

    plan = Plan.from_dict(setup.plan)
    labels = {case.id: case for case in cases if case.label is not None}
    found = predict(root, setup.data, root / "masks", only=list(labels), device=str(target), overwrite=True)
    if found.faults:
        raise UserError("\n".join(str(fault) for fault in found.faults))
    scores = evaluate(root / "masks", labels, classes=plan.structures, out=root / SCORES, overwrite=True)
    if scores.faults:
        raise UserError("\n".join(str(fault) for fault in scores.faults))
    means = {name: scores.summary[None][name] for name in ("dice", "jaccard", "hd95_mm", "assd_mm")}
    return {**{name: s.mean for name, s in means.items()}, "no_distance": means["hd95_mm"].missing}


def main() -> None:
    """Be the process that `mlbseg.apps.bench.workers` starts for a cell."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("row")
    parser.add_argument("seed", type=int)
    parser.add_argument("--budget", type=int)
    parser.add_argument("--label-seed", type=int, default=0)
    parser.add_argument("--device", required=True)
    parser.add_argument("--threads", type=int, required=True)
    asked = parser.parse_args()
    cell = Cell(asked.row, asked.budget, asked.seed, asked.label_seed)
    sys.exit(exit_code(asked.folder, cell, asked.device, asked.threads))


def exit_code(folder: Path, cell: Cell, device: str, threads: int) -> int:
    """Run a cell in this process, which is there for nothing else, and return what the process is to end with."""
    import torch

    from mlbseg.runs.lock import Busy

    torch.set_num_threads(threads)
    try:
        run_cell(folder, cell, device)
    except Busy:
        return BUSY
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0
