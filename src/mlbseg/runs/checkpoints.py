"""Checkpoints: written whole or not at all, the newest found again, the last two kept."""

from __future__ import annotations

import pickle
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mlbseg.errors import UserError
from mlbseg.files import make_folder, write_atomic
from mlbseg.runs.weights import dump_tensors

_NAME = re.compile(r"stage(\d)-(\d{8})\.pt")
KEEP = 2
UNREADABLE = (
    RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError, pickle.UnpicklingError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What is raised on bytes that are no torch file, depending on where they go wrong."""


@dataclass(frozen=True, order=True)
class Checkpoint:
    """A checkpoint file: the state after `step` steps of `stage`."""

    stage: int
    step: int
    path: Path

    def load(self, device: torch.device) -> dict[str, Any]:
        """Return what was saved.

        Raises:
            UserError: if the file is damaged.
        """
        try:
            with zipfile.ZipFile(self.path) as archive:  # torch leaves the checksums of its archives unread
                if part := archive.testzip():
                    raise zipfile.BadZipFile(part)
            content: dict[str, Any] = torch.load(self.path, map_location=device, weights_only=True)
        except UNREADABLE:
            raise UserError(
                f"{self.path}: damaged checkpoint (delete it to resume from the one before, "
                "or from the start of its stage if there is none)"
            ) from None
        return content


def find(folder: Path) -> list[Checkpoint]:
    """Return the checkpoints of a folder, oldest first."""
    found = []
    for path in folder.glob("stage*.pt"):
        match = _NAME.fullmatch(path.name)
        if match and path.is_file():
            found.append(Checkpoint(int(match[1]), int(match[2]), path))
    return sorted(found)


def save(folder: Path, stage: int, step: int, content: dict[str, Any], *, final: bool = False) -> Path:
    """Write a checkpoint and drop this stage's older ones but one; a stage's final one drops the rest.

    Raises:
        UserError: if it cannot be written; the checkpoints before it are intact.
    """
    make_folder(folder)  # of a run that never trained, or whose checkpoints were deleted
    path = folder / f"stage{stage}-{step:08d}.pt"
    write_atomic(path, dump_tensors({**content, "stage": stage, "step": step}))
    mine = [c for c in find(folder) if c.stage == stage]
    for old in mine[: -1 if final else -KEEP]:
        old.path.unlink(missing_ok=True)
    return path
