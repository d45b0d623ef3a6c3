"""How weights changed: those of one patch, kept now and then in the run folder, to be looked at."""

from __future__ import annotations

import io
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch

from mlbseg.core.ranks import ALONE
from mlbseg.data.batches import StepDataset
from mlbseg.device import autocast
from mlbseg.files import write_atomic
from mlbseg.methods import Method

FOLDER = "weights"
SEARCHED = 64  # steps whose patches are looked through for one of a case with a label of its own


def kept_steps(steps: int) -> set[int]:
    """Return the steps of a stage after which weights are kept: the first, the last, and three between."""
    return {1, *(max(1, round(steps * share / 4)) for share in (1, 2, 3)), steps}


class WeightKeeper:
    """Keeps the weights of one patch, the same at all times: of a case in role noisy, if one is drawn soon.

    Args:
        root: The run folder.
        dataset: Of the stage.
        noisy: Ids of the cases in role noisy.
        precision: As in training.
        device: Of the method.
    """

    def __init__(
        self, root: Path, dataset: StepDataset, noisy: Collection[str], precision: str, device: torch.device
    ) -> None:
        self.folder = root / FOLDER
        self.dataset = dataset
        self.noisy = set(noisy)
        self.precision = precision
        self.device = device
        self.place: tuple[int, int] | None = None

    def keep(self, method: Method, step: int) -> None:
        """Write `weights/STEP.npz`, if the method decides any weights.

        The file holds `case_id`, `image` (*S), and for each source of labels `label_SOURCE` (*S) class indices and
        `weight_SOURCE` (*S), where 1 is the mean weight of all pixels of the batch's images that have a label.

        Raises:
            UserError: if it cannot be written.
        """
        if self.place is None:
            self.place = self._find()
        at, index = self.place
        batch = self.dataset[at].to(self.device)
        ranks, method.ranks = method.ranks, ALONE  # rank 0 looks alone
        try:
            with autocast(self.precision, self.device):
                maps = method.weight_maps(batch)
        finally:
            method.ranks = ranks
        if not maps:
            return
        assert batch.image is not None  # noqa: S101 - it has been weighed
        known = sum(float((label >= 0).sum()) for label, _ in maps.values())
        total = sum(float(weight.sum()) for _, weight in maps.values())
        content: dict[str, np.ndarray] = {
            "case_id": np.array(batch.case_ids[len(batch.clean_image) + index]),
            "image": batch.image[index, 0].float().cpu().numpy(),
        }
        for name, (label, weight) in maps.items():
            content[f"label_{name}"] = label[index].cpu().numpy().astype(np.int16)
            content[f"weight_{name}"] = (weight[index].float() * (known / max(total, 1e-30))).cpu().numpy()
        self.folder.mkdir(exist_ok=True)
        file = io.BytesIO()
        np.savez_compressed(file, **content)  # type: ignore[arg-type]
        write_atomic(self.folder / f"{step:08d}.npz", file.getvalue())

    def _find(self) -> tuple[int, int]:
        """Return the step and the index in its batch of the patch."""
        if self.noisy:
            for step in range(min(SEARCHED, len(self.dataset))):
                batch = self.dataset[step]
                own = batch.case_ids[len(batch.clean_image) :]
                for index in range(0 if batch.image is None else len(batch.image)):
                    if own[index] in self.noisy:
                        return step, index
        return 0, 0
