"""Values that must be numbers, looked at on all ranks together."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from mlbseg import processes
from mlbseg.core.ranks import Ranks
from mlbseg.errors import UserError
from mlbseg.types import Losses


class Watch:
    """Stops all ranks alike where a value on any of them is no number.

    Args:
        stage: 1 or 2.
        folder: Of the checkpoints.
        ranks: Those that train together.
        at_once: Look at each value as it comes. On a GPU a look waits for all that it has to do, so values are
            gathered there until something is to be written.
    """

    def __init__(self, stage: int, folder: Path, ranks: Ranks, *, at_once: bool) -> None:
        self.stage = stage
        self.folder = folder
        self.ranks = ranks
        self.at_once = at_once
        self.saved = 0
        self._unseen: list[tuple[int, Tensor, Losses, tuple[str, ...]]] = []

    def see(self, step: int, value: Tensor, terms: Losses, case_ids: tuple[str, ...] = ()) -> None:
        """Take a value, made of these terms, of a step.

        Raises:
            UserError: as `look`, where values are looked at at once.
        """
        detached = {name: term.detach() for name, term in terms.items()}
        self._unseen.append((step, value.detach(), detached, case_ids))
        if self.at_once:
            self.look()

    def look(self) -> None:
        """Look at the values since the last look.

        Raises:
            UserError: at the first on any rank that is no number.
        """
        if not self._unseen:
            return
        unseen, self._unseen = self._unseen, []
        fine = torch.isfinite(torch.stack([value.double() for _, value, _, _ in unseen])).tolist()
        left = len(fine) - fine.index(False) if False in fine else 0
        left = int(self.ranks.max(torch.tensor(left)))
        if left == 0:
            return
        step, _, terms, case_ids = unseen[-left]
        mine = [name for name, term in terms.items() if not math.isfinite(float(term))]
        found = processes.of_all(self.ranks, (mine, case_ids))
        bad = ", ".join(dict.fromkeys(name for names, _ in found for name in names))
        cases = ", ".join(name for _, names in found for name in names)
        error = UserError(
            f"the loss ({bad}) is no longer a number at step {step} of stage {self.stage}"
            f"{', cases ' if cases else ''}{cases}; "
            f"the last good checkpoint is step {self.saved} in {self.folder} (train anew with a lower train.lr or "
            "train.lr_bootstrap, or look at these cases)"
        )
        raise processes.same_on_all(self.ranks, error)
