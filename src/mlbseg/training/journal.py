"""What a stage leaves of its values: rows of log.csv, curves for TensorBoard, and what the progress shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mlbseg.training.log import append_row, cut_log

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

LOG_EVERY = 10  # steps between rows of log.csv


class Journal:
    """Writes the values of a stage; on other ranks than the first it only remembers what to show.

    Args:
        root: The run folder.
        stage: 1 or 2.
        step: Steps that are done: what was written of later ones is dropped.
        writes: Whether this rank writes.
    """

    def __init__(self, root: Path, stage: int, step: int, *, writes: bool) -> None:
        self.path = root / "log.csv"
        self.stage = stage
        self.shown: dict[str, float | str] = {}
        self._board: SummaryWriter | None = None
        if writes:
            # Here, as every process pays for an import: TensorBoard's takes half a second.
            from torch.utils.tensorboard import SummaryWriter

            cut_log(self.path, stage, step)
            self._board = SummaryWriter(str(root / "tensorboard" / f"stage{stage}"), purge_step=step + 1)

    def show(self, values: Mapping[str, float]) -> None:
        """Remember values for the progress."""
        self.shown |= {k: v if "kept" not in k else f"{v:.0%}" for k, v in values.items() if "mass" not in k}

    def write(self, step: int, lr: float, values: Mapping[str, float]) -> None:
        """Write the values of a step."""
        if self._board is None:
            return
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        append_row(self.path, {"stage": self.stage, "step": step, "lr": lr, **values})

    def close(self) -> None:
        """Write what TensorBoard still holds back."""
        if self._board is not None:
            self._board.close()
