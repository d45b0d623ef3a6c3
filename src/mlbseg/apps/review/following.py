"""Training on from a review: a process of `mlbseg train --init`, and what its run folder says meanwhile."""

from __future__ import annotations

import csv
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlbseg.data.readers import mask_suffix, read_label
from mlbseg.errors import UserError
from mlbseg.files import make_folder
from mlbseg.runs import CONFIG, Run

if TYPE_CHECKING:
    from mlbseg.apps.review.desk import Desk

COMPARED = 5
"""Cases whose masks before and after are compared."""


class TrainOn:
    """Goes on training from the run that is reviewed, in a new run folder beside it.

    Args:
        desk: Of the review.
    """

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.process: subprocess.Popen[bytes] | None = None
        self.out: Path | None = None
        self.changes: list[str] = []
        self.compared = False
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start `mlbseg train`, unless it runs.

        Raises:
            UserError: if there is no run to go on from.
        """
        run = self.desk.run
        if run is None:
            raise UserError("going on training needs a trained run, expected a run folder to review")
        with self._lock:
            if self.process is not None and self.process.poll() is None:
                return
            root = run.root.resolve()
            number = next(n for n in range(2, 10_000) if not root.with_name(f"{root.name}-{n}").exists())
            self.out, self.changes, self.compared = root.with_name(f"{root.name}-{number}"), [], False
            settings = ["--config", str(root / CONFIG)]  # its method and steps, in place of the usual ones
            words = ["train", str(run.scans), "--init", str(root), *settings, "--out", str(self.out)]
            make_folder(root / "review")
            with (root / "review" / "train.log").open("wb") as log:
                self.process = subprocess.Popen(  # noqa: S603 - our own command
                    [sys.executable, "-m", "mlbseg", *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )

    def status(self) -> dict[str, Any]:
        """Return how far training is, and what has changed when it has ended."""
        if self.process is None or self.out is None:
            return {"state": "none"}
        code = self.process.poll()
        found: dict[str, Any] = {"out": self.out.name, "step": self._step()}
        if code is None:
            return {"state": "running", **found}
        if code:
            return {"state": "failed", "words": self._last_words(), **found}
        with self._lock:
            if not self.compared:
                self.compared = True
                threading.Thread(target=self._compare, daemon=True).start()
        return {"state": "done", "dice": self._dice(), "changes": list(self.changes), **found}

    def _step(self) -> str:
        """Return the last step that is written down: ``stage 1, step 30``."""
        assert self.out is not None  # noqa: S101 - asked for after the start
        try:
            with (self.out / "log.csv").open(newline="", encoding="utf-8") as file:
                rows = deque(csv.DictReader(file), maxlen=1)
        except (OSError, ValueError, csv.Error):
            return ""
        return f"stage {rows[0].get('stage')}, step {rows[0].get('step')}" if rows else ""

    def _last_words(self) -> str:
        assert self.desk.run is not None  # noqa: S101 - asked for after the start
        try:
            text = (self.desk.run.root / "review" / "train.log").read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            return str(error)
        return "\n".join(text.strip().splitlines()[-5:])

    def _dice(self) -> list[str]:
        """Return the validation Dice of both runs, where they have one."""
        assert self.desk.run is not None and self.out is not None  # noqa: S101, PT018 - asked for after the start
        words = []
        for name, root in (("before", self.desk.run.root), ("now", self.out)):
            try:
                dice = Run.open(root).result.validation_dice
            except UserError:
                dice = None
            words.append(
                f"{name}: " + ("no validation Dice" if dice is None else f"validation Dice {dice:.3f}")
            )
        return words

    def _compare(self) -> None:
        """Say of some cases how many voxels the new run draws otherwise."""
        from mlbseg.inference import predict

        desk = self.desk
        assert desk.run is not None and self.out is not None  # noqa: S101, PT018 - asked for after the start
        masks = self.out / "review" / "masks"
        for number, item in enumerate(desk.items[:COMPARED]):
            try:
                desk.predict(number)
                before = desk.run.root / "review" / "masks" / f"{item.case.id}{mask_suffix(item.case.images)}"
                predict(self.out, desk.run.scans, masks, only=[item.case.id], device=str(desk.device))
                a, b = (read_label(path)[0] for path in (before, masks / before.name))
                both = np.count_nonzero(a) + np.count_nonzero(b)
                dice = 2 * np.count_nonzero((a == b) & (a != 0)) / both if both else 1.0
                self.changes.append(
                    f"{item.case.id}: {np.count_nonzero(a != b):,} voxels otherwise, Dice with before {dice:.3f}"
                )
            except (UserError, OSError) as error:
                self.changes.append(f"{item.case.id}: {error}")
