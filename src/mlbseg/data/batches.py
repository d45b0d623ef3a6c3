"""What training step t sees. It depends only on (seed, t, index in the batch), so any step can be drawn again.

Ranks that train together draw a step's batch in slices: theirs joined are what one rank draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from mlbseg.core.ranks import ALONE, Ranks
from mlbseg.data.augment import Augmentation
from mlbseg.data.cache import Cache
from mlbseg.data.known import hidden
from mlbseg.data.preprocess import UNKNOWN
from mlbseg.errors import Fault, ReadError
from mlbseg.types import EITHER, IGNORE, UNLABELLED, Batch, Case, Role

_CLEAN, _UNLABELLED, _BATCH, _META = range(4)  # streams of random numbers


class StepDataset(Dataset[Batch]):
    """Item t is the batch of training step t.

    Every case is drawn once before any is drawn a second time.

    Args:
        cache: Preprocessed scans and labels.
        clean: Cases with a careful label.
        others: Unlabelled and noisy cases, and clean ones whose label is not known everywhere; may be empty. Where the
            label of a clean one is known, it is `IGNORE`, and not `inside`.
        meta: Cases with a careful label that are in no other part of the batch; may be empty.
        initial_labels: A `.npy` file of class indices on the prepared grid for unlabelled and clean cases of `others`;
            one that has none is `UNLABELLED`. A noisy case brings its own label. None: batches carry no initial labels.
        pseudo_labels: Such a file for every case of `others`; may be replaced between steps. None: batches carry none.
        patch_size: Array order; its length is the network's dimension. A 2D patch of a 3D scan is one slice.
        batch_size: Clean patches per step, of all ranks together.
        unlabelled_batch_size: Patches of `others` per step, of all ranks together.
        steps: Length.
        seed: Of the run.
        stage: Stages of one run draw different numbers.
        foreground: Share of the clean patches that are centred on a voxel of a structure. The other patches of a label
            that is not known everywhere are centred on a known voxel of the background.
        augment: Applied to every patch.
        ranks: Those that share the batch.

    Raises:
        ValueError: if the ranks cannot share a batch evenly.
    """

    def __init__(
        self,
        cache: Cache,
        clean: Sequence[Case],
        others: Sequence[Case] = (),
        *,
        meta: Sequence[Case] = (),
        initial_labels: Mapping[str, Path] | None = None,
        pseudo_labels: Mapping[str, Path] | None = None,
        patch_size: Sequence[int],
        batch_size: int,
        unlabelled_batch_size: int,
        steps: int,
        seed: int,
        stage: int,
        foreground: float,
        augment: Augmentation,
        ranks: Ranks = ALONE,
    ) -> None:
        if batch_size % ranks.count or (others and unlabelled_batch_size % ranks.count):
            raise ValueError(
                f"{ranks.count} ranks cannot share {batch_size} and {unlabelled_batch_size} patches"
            )
        self.cache = cache
        self.clean = list(clean)
        self.others = list(others)
        self.meta = list(meta)
        self.initial_labels = initial_labels
        self.pseudo_labels = pseudo_labels
        self.patch_size = tuple(patch_size)
        self.batch_size = batch_size
        self.unlabelled_batch_size = unlabelled_batch_size
        self.steps = steps
        self.key = (seed, stage)
        self.foreground = foreground
        self.augment = augment
        self.ranks = ranks
        self._sets = sorted({found for case in (*clean, *meta) if (found := self._hidden(case))})

    def __len__(self) -> int:
        return self.steps

    @cached_property
    def epoch(self) -> int:
        """Steps in which as many patches are drawn as there are slices (2D patches of 3D scans) or scans.

        Those of `others` count or, where there are none, the clean ones.
        """
        cases, drawn = (
            (self.others, self.unlabelled_batch_size) if self.others else (self.clean, self.batch_size)
        )
        ndim = len(self.patch_size)
        shapes = [self.cache.image(case).array.shape[1:] for case in cases]
        return max(1, sum(math.prod(shape[: len(shape) - ndim]) for shape in shapes) // max(drawn, 1))

    @property
    def sets(self) -> torch.Tensor | None:
        """Which classes each set is of that labels ``EITHER - j`` mean, (J, K) bool, the background too; or None."""
        if not self._sets:
            return None
        table = torch.zeros(len(self._sets), self.cache.plan.num_classes, dtype=torch.bool)
        for row, classes in zip(table, self._sets, strict=True):
            row[[0, *classes]] = True
        return table

    def _hidden(self, case: Case) -> tuple[int, ...]:
        return hidden(case.known, self.cache.plan.label_values)

    def __getitem__(self, step: int) -> Batch:
        """Draw this rank's slice of the batch of a step; see `Batch` for the shapes."""
        count = self.batch_size
        clean = [self._patch(self.clean, _CLEAN, step, i, count) for i in self._own(count)]
        images, _, labels, ids = zip(*clean, strict=True)
        batch = Batch(
            torch.stack(images), torch.stack(labels)[:, 0], case_ids=ids, seed=self._seed(_BATCH, step, 0)
        )
        if self.others:
            count = self.unlabelled_batch_size
            others = [self._patch(self.others, _UNLABELLED, step, i, count) for i in self._own(count)]
            images, weak, labels, more = zip(*others, strict=True)
            batch.image, batch.weak = torch.stack(images), torch.stack(weak)
            label = torch.stack(labels)[:, 0]
            batch.inside = label != IGNORE
            if self.initial_labels is not None:
                batch.initial_label = label
            if self.pseudo_labels is not None:
                batch.pseudo_label = torch.stack(labels)[:, 1]
            batch.case_ids += more
        if self.meta:
            meta = [
                self._patch(self.meta, _META, step, i, self.batch_size) for i in self._own(self.batch_size)
            ]
            images, _, labels, more = zip(*meta, strict=True)
            batch.meta_image, batch.meta_label = torch.stack(images), torch.stack(labels)[:, 0]
            batch.case_ids += more
        return batch

    def _own(self, count: int) -> range:
        """Return the indices in the batch that are this rank's, of `count`."""
        share = count // self.ranks.count
        return range(self.ranks.index * share, (self.ranks.index + 1) * share)

    def _seed(self, *parts: int) -> int:
        return int(np.random.SeedSequence([*self.key, *parts]).generate_state(1)[0])

    def _patch(
        self, cases: Sequence[Case], stream: int, step: int, index: int, count: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, str]:
        """Draw a patch of a case.

        Returns:
            Its image (C, *S) as it is learnt from; the same with the scan's own grey values; its label and, of
            `others`, its pseudo label beside that (L, *S); and its id.
        """
        position = step * count + index
        turn, place = divmod(position, len(cases))
        order = np.random.default_rng([*self.key, stream, turn]).permutation(len(cases))
        case = cases[order[place]]
        rng = np.random.default_rng([*self.key, stream, step, index, 1])

        scan = self.cache.image(case).array
        shape = scan.shape[1:]
        centre = self._foreground_voxel(case, rng) if stream in (_CLEAN, _META) else None
        # A 2D patch of a 3D scan is a patch one slice thick.
        size = (1,) * (len(shape) - len(self.patch_size)) + self.patch_size
        start = [
            _start(n, p, rng, None if centre is None else centre[a])
            for a, (n, p) in enumerate(zip(shape, size, strict=True))
        ]
        image = _cut(scan, start, size, leading=1)
        labels = [(self._open_label if stream == _UNLABELLED else self._label)(case, start, size)]
        if stream == _UNLABELLED and self.pseudo_labels is not None:
            labels.append(_cut(_stored(self.pseudo_labels[case.id], shape), start, size, leading=0))
        image = image.reshape(image.shape[0], *self.patch_size).astype(np.float32)
        label = np.stack(labels).reshape(-1, *self.patch_size).astype(np.int64)
        seed = self._seed(stream, step, index)
        weak, moved = self.augment.moved(image, label, seed)
        return self.augment.greyed(weak, seed), weak, moved, case.id

    def _label(self, case: Case, start: Sequence[int], size: Sequence[int]) -> npt.NDArray[np.int64]:
        """Cut a patch of a label, as the case has it."""
        label = _cut(self.cache.label(case), start, size, leading=0).astype(np.int64)
        if classes := self._hidden(case):
            label[label == 0] = EITHER - self._sets.index(classes) if classes in self._sets else UNKNOWN
        label[label == UNKNOWN] = IGNORE
        return label

    def _open_label(self, case: Case, start: Sequence[int], size: Sequence[int]) -> npt.NDArray[np.int64]:
        """Cut a patch of what an unlabelled loss begins with: `IGNORE` where it has nothing to learn."""
        if case.role is Role.NOISY:
            label = _cut(self.cache.label(case), start, size, leading=0).astype(np.int64)
            open_ = label == UNKNOWN
            if self._hidden(case):
                open_ |= label == 0
            label[open_] = UNLABELLED
            return label
        path = None if self.initial_labels is None else self.initial_labels.get(case.id)
        shape = self.cache.image(case).array.shape[1:]
        source = np.broadcast_to(np.int64(UNLABELLED), shape) if path is None else _stored(path, shape)
        label = _cut(source, start, size, leading=0).astype(np.int64)
        if case.role is Role.CLEAN:
            own = self._label(case, start, size)
            label[own >= 0] = IGNORE
        return label

    def _foreground_voxel(self, case: Case, rng: np.random.Generator) -> npt.NDArray[np.int64] | None:
        voxels = self.cache.foreground(case)
        partly = len(voxels) > 0 and bool((voxels[:, -1] == 0).any())
        on_structure = rng.random() < self.foreground
        if partly and not on_structure:
            voxels = voxels[voxels[:, -1] == 0]
        elif on_structure:
            voxels = voxels[voxels[:, -1] > 0]
        else:
            return None
        if not len(voxels):
            return None
        chosen = rng.choice(np.unique(voxels[:, -1]))  # every class alike, however small
        candidates = voxels[voxels[:, -1] == chosen]
        return candidates[rng.integers(len(candidates)), :-1]


def _stored(path: Path, shape: Sequence[int]) -> npt.NDArray[np.uint8]:
    """Open what a network predicted of a whole scan, (*S)."""
    try:
        label = np.lib.format.open_memmap(path, mode="r")
        found = f"{label.dtype} of shape {label.shape}"
        if label.dtype == np.uint8 and label.shape == tuple(shape):
            return label
    except ValueError as error:
        found = str(error).partition("\n")[0]
    expected = f"class indices of shape {tuple(shape)}, as training began with"
    raise ReadError(Fault(str(path), found, expected, "delete it, and continue the run with --resume"))


def _start(length: int, patch: int, rng: np.random.Generator, centre: int | None) -> int:
    """Return where a patch starts on an axis; negative where the scan is smaller than the patch."""
    if length <= patch:
        return -int(rng.integers(patch - length + 1))
    if centre is None:
        return int(rng.integers(length - patch + 1))
    reach = patch // 4  # 0 for a patch one slice thick: it must hold the very slice
    jitter = int(rng.integers(-reach, reach + 1))
    return int(np.clip(centre + jitter - patch // 2, 0, length - patch))


def _cut(source: object, start: Sequence[int], size: Sequence[int], *, leading: int) -> npt.NDArray:
    """Cut a patch; an image (leading = 1) is continued by its edge, a label (leading = 0) by IGNORE."""
    shape = source.shape[leading:]  # type: ignore[attr-defined]
    low = [max(s, 0) for s in start]
    high = [min(s + p, n) for s, p, n in zip(start, size, shape, strict=True)]
    inner = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    patch = np.asarray(source[(slice(None),) * leading + inner])  # type: ignore[index]
    pad = [(a - s, s + p - b) for a, b, s, p in zip(low, high, start, size, strict=True)]
    if not any(before or after for before, after in pad):
        return patch
    if leading:
        return np.pad(patch, [(0, 0), *pad], mode="edge")
    return np.pad(patch.astype(np.int64), pad, constant_values=IGNORE)
