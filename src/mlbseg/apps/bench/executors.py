"""Cells as jobs that submitit starts, on this machine or on a Slurm cluster, in place of processes of the bench's own.

A job holds the cell's lock like any process of a cell, so that benches on one folder go on side by side. A job that
Slurm ends for its time limit, or to make room, is queued again and continues from the cell's last checkpoint.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlbseg.apps.bench import workers
from mlbseg.apps.bench.cell import exit_code
from mlbseg.apps.bench.cells import Cell
from mlbseg.apps.bench.workers import Place, Process, log_of
from mlbseg.errors import UserError, nearest

if TYPE_CHECKING:
    import submitit

EXECUTORS = ("here", "local", "slurm")
"""Where cells are computed: in processes of this command, or in jobs of submitit on this machine or of Slurm."""

Start = Callable[[Path, Cell, Place], Process]


@dataclass(frozen=True)
class CellJob:
    """What a job does.

    Attributes:
        folder: Of the bench.
        cell: The cell.
        place: Where it is computed, on the job's machine.
    """

    folder: Path
    cell: Cell
    place: Place

    def __call__(self) -> int:
        """Run the cell; return the exit code of a process that had done so."""
        return exit_code(self.folder, self.cell, self.place.device, self.place.threads)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Return what Slurm is to run where the job was interrupted."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


class Submitted:
    """A job, seen as the process of a cell."""

    def __init__(self, job: submitit.Job[int], log: Path) -> None:
        self.job = job
        self.log = log

    def poll(self) -> int | None:
        """Return the exit code; None while the job waits or runs."""
        import submitit

        if not self.job.done():
            return None
        try:
            return self.job.result()
        except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError) as error:
            self.log.write_text(f"{error}\n\n{self.job.stderr() or ''}", encoding="utf-8")
            return 1

    def terminate(self) -> None:
        """Cancel the job, which writes a checkpoint."""
        self.job.cancel(check=False)


def starter(name: str, options: Mapping[str, Any]) -> Start:
    """Return what starts cells.

    Args:
        name: Of `EXECUTORS`.
        options: Parameters of submitit's executor, such as ``timeout_min`` or ``slurm_partition``.

    Raises:
        UserError: for a name or an option that does not exist, or where submitit or Slurm is missing.
    """
    if name not in EXECUTORS:
        raise UserError(f"--executor {name!r}: {nearest(name, EXECUTORS)}")
    if name == "here":
        if options:
            raise UserError(
                "--job-option: only jobs of --executor local or slurm have options (leave it out)"
            )
        return workers.start
    if importlib.util.find_spec("submitit") is None:
        raise UserError(
            f"--executor {name}: found no package submitit, which is not in the base install (pip install "
            "'mlbseg[jobs]')"
        )
    _executor(Path("unused"), name, options)  # refuses what is wrong before anything is decided

    def start(folder: Path, cell: Cell, place: Place) -> Process:
        log = log_of(folder, cell)
        executor = _executor(log.with_suffix(""), name, options)
        return Submitted(executor.submit(CellJob(folder.resolve(), cell, place)), log)

    return start


def _executor(folder: Path, name: str, options: Mapping[str, Any]) -> submitit.AutoExecutor:
    """Return submitit's executor, whose files are in `folder`."""
    import submitit

    try:
        executor = submitit.AutoExecutor(folder, cluster=name)
        executor.update_parameters(name="mlbseg", **options)
    except (RuntimeError, ValueError, NameError, AssertionError, TypeError) as error:
        raise UserError(f"--executor {name}: {error}") from None
    return executor
