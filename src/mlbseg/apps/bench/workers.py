"""Running the cells that are left, so many at a time, each in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol

from rich.console import Console

from mlbseg.apps.bench.cell import BUSY, lock_of, outcome
from mlbseg.apps.bench.cells import STAGE1, Cell
from mlbseg.errors import UserError
from mlbseg.progress import StepProgress
from mlbseg.runs.lock import Busy, locked
from mlbseg.terminal import say

PATIENCE = 30.0
"""Seconds to wait for cells of another process when nothing else is left: one that was killed frees them soon."""
PAUSE = 0.2  # seconds between looks at the processes


class Process(Protocol):
    """What is needed of a cell's process."""

    def poll(self) -> int | None:
        """Return the exit code; None while it runs."""

    def terminate(self) -> None:
        """Ask it to stop."""


@dataclass(frozen=True)
class Place:
    """Where a cell is computed.

    Attributes:
        device: ``auto``, ``cpu``, ``cuda:1`` ...
        threads: Of the CPU.
    """

    device: str
    threads: int


@dataclass
class Done:
    """What became of the cells.

    Attributes:
        elsewhere: Cells that another process runs.
        crashed: Cells whose process ended without an outcome, with its exit code.
    """

    elsewhere: list[Cell] = field(default_factory=list)
    crashed: dict[Cell, int] = field(default_factory=dict)


class Stopped(UserError):
    """The bench was asked to stop by a signal; all cells have stopped after a checkpoint."""

    def __init__(self, number: int, done: int, total: int) -> None:
        super().__init__(
            f"stopped with {done} of {total} cells done; the same command continues, from the last checkpoint of each"
        )
        self.exit_code = 128 + number


def log_of(folder: Path, cell: Cell) -> Path:
    """Return the file that a cell's process prints into."""
    return folder / "logs" / f"{cell.key.replace('/', '.')}.log"


def start(folder: Path, cell: Cell, place: Place) -> Process:
    """Start the process of a cell."""
    log = log_of(folder, cell)
    log.parent.mkdir(exist_ok=True)
    # Not `-m`: the package has imported the module by then, and Python would warn of it.
    code = "from mlbseg.apps.bench.cell import main; main()"
    command = [sys.executable, "-c", code, str(folder), cell.row, str(cell.seed)]
    command += [] if cell.budget is None else ["--budget", str(cell.budget)]
    command += ["--label-seed", str(cell.label_seed)]
    command += ["--device", place.device, "--threads", str(place.threads)]
    with log.open("ab") as file:
        return subprocess.Popen(  # noqa: S603 - our own module
            command,
            stdin=subprocess.PIPE,  # its end tells the process that this one is gone
            stdout=file,
            stderr=file,
            start_new_session=True,  # Ctrl-C reaches this process, which tells them
            env={**os.environ, "OMP_NUM_THREADS": str(place.threads)},
        )


def run_cells(
    folder: Path,
    cells: Sequence[Cell],
    places: Sequence[Place],
    *,
    needs_stage1: Callable[[Cell], bool],
    after: Callable[[], None],
    console: Console | None,
    begin: Callable[[Path, Cell, Place], Process] | None = None,
) -> Done:
    """Run all cells that have no outcome, in their order, one in each place at a time.

    Args:
        folder: Of the bench.
        cells: The cells.
        places: Where to compute; as many cells run at once.
        needs_stage1: Whether a cell begins with the shared stage 1.
        after: Called when a cell has ended.
        console: Where progress is shown; silent when None.
        begin: What starts a cell; `start` when None.

    Returns:
        What did not get an outcome.

    Raises:
        Stopped: on SIGINT or SIGTERM.
    """
    running: dict[int, tuple[Cell, Process]] = {}
    known: dict[Cell, str] = {}  # how cells ended; what is written down is never changed
    told: set[Cell] = set()
    result = Done()
    waiting_since: float | None = None

    def status(cell: Cell) -> str | None:
        if cell not in known and (record := outcome(folder, cell)) is not None:
            known[cell] = record["status"]
        return known.get(cell)

    def count() -> int:
        return sum(status(cell) is not None for cell in cells)

    with (
        _stopping(running) as signals,
        StepProgress(console, "cells", len(cells), count()) as progress,
    ):
        while True:
            for place, (cell, process) in list(running.items()):
                if (code := process.poll()) is None:
                    continue
                del running[place]
                if isinstance(process, subprocess.Popen) and process.stdin is not None:
                    process.stdin.close()
                if status(cell) is None and code != BUSY and not signals:
                    result.crashed[cell] = code
                _tell(console, folder, cell, code, signals)
                after()
            if signals:
                for cell, process in running.values():
                    if cell not in told:
                        process.terminate()
                        told.add(cell)
                if not running:
                    raise Stopped(signals[0], count(), len(cells))
            else:
                mine = [cell for cell, _ in running.values()]
                left = [c for c in cells if status(c) is None and c not in (*mine, *result.crashed)]
                ready = [c for c in left if not needs_stage1(c) or status(c.stage1) == "done"]
                free = [place for place in range(len(places)) if place not in running]
                chosen = list(islice((c for c in ready if not busy(folder, c)), len(free)))
                for place, cell in zip(free, chosen, strict=False):
                    running[place] = (cell, (begin or start)(folder, cell, places[place]))
                if chosen:
                    waiting_since = None
                elif not running:
                    # Cells that begin with a stage 1 of another process are worth any wait; that one's own are not.
                    waiting_since = waiting_since or time.monotonic()
                    later = [c for c in left if c not in ready and c.stage1 in ready]
                    if not ready or (not later and time.monotonic() - waiting_since > PATIENCE):
                        result.elsewhere = ready
                        return result
            if (done := count()) < len(cells):  # else the last process is just ending
                now = ", ".join(title(folder, cell) for cell, _ in running.values())
                progress.update(done, {"now": now or "waiting for another process"})
            time.sleep(PAUSE)


def busy(folder: Path, cell: Cell) -> bool:
    """Return whether a process runs a cell just now."""
    lock = lock_of(folder, cell)
    lock.parent.mkdir(exist_ok=True)
    try:
        with locked(lock, ""):
            return False
    except Busy:
        return True


def title(folder: Path, cell: Cell) -> str:
    """Return a cell as it is shown, with the step that its log has come to."""
    log = folder / "runs" / cell.key / "log.csv"
    try:
        stage, step = log.read_text(encoding="utf-8").splitlines()[-1].split(",")[:2]
    except (OSError, ValueError, IndexError):
        return cell.title
    return f"{cell.title} (stage {stage}, step {step})" if step.isdecimal() else cell.title


def _tell(console: Console | None, folder: Path, cell: Cell, code: int, signals: Sequence[int]) -> None:
    if console is None or signals or code == BUSY:
        return
    record = outcome(folder, cell)
    if record is None:
        said = f"ended without a result (exit code {code}), see {log_of(folder, cell)}"
    elif record["status"] == "failed":
        said = f"failed: {record['reason']}"
    elif cell.row == STAGE1:
        said = "done"
    else:
        said = f"Dice {record['dice']:.4f}"
    say(console, f"{cell.title}: {said}")


@contextmanager
def _stopping(running: dict[int, tuple[Cell, Process]]) -> Iterator[list[int]]:
    """Note SIGINT and SIGTERM instead of dying of them, and yield what came; leave no process behind."""
    came: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    before = (
        {
            number: signal.signal(number, lambda n, _: came.append(n))
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        if main
        else {}
    )
    try:
        yield came
    finally:
        for _, process in running.values():
            process.terminate()
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
