"""Prepared cases on disk, so that a patch is read without the scan and a second run starts at once.

An entry is named by the content of the case's files and the decisions that shape it. Images and labels are separate
entries: using an image never opens a label. One that is lost or damaged, while it is used too, is made anew.
"""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlbseg.data.entries import Content, Damaged, Opened, build, open_entry
from mlbseg.data.facts import ImageFacts, recalled
from mlbseg.data.inputs import Inputs
from mlbseg.data.known import label_on, leaves_classes
from mlbseg.data.lattice import at_spacing, reorient
from mlbseg.data.plan import Plan
from mlbseg.data.preprocess import UNKNOWN, Frame, prepare_label, prepare_scan
from mlbseg.data.readers import LABEL_BYTES, SCAN_BYTES, announced, read_scan
from mlbseg.data.reading import HERE, Reading
from mlbseg.data.remembered import Remembered, combined_hash
from mlbseg.errors import ReadError, UserError, printable
from mlbseg.temporaries import sweep
from mlbseg.types import Case, Geometry, Role

FORMAT = 3
"""Raised whenever preparation or storage changes, so that older entries are not found."""

FOREGROUND_VOXELS = 2_000
"""Positions kept per foreground class."""

_GRID_BYTES = 12  # most memory for each number of a prepared scan, beside what reading takes; measured
_ATTEMPTS = 10  # to have a whole entry: others may be mending it, and a disk may be failing

_IMAGE_FIELDS = ("scan_ndim", "channels", "spacing", "normalisation", "intensity", "crop", "orientation")


class CachedArray:
    """An array of an entry; what is read from it is what was prepared, whatever has become of the files."""

    def __init__(self, entry: _Entry, name: str) -> None:
        self._entry = entry
        self._name = name

    @property
    def shape(self) -> tuple[int, ...]:
        """As NumPy's."""
        return self._entry.opened.arrays[self._name].shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """As NumPy's."""
        return self._entry.opened.arrays[self._name].dtype

    @property
    def chunks(self) -> tuple[int, ...]:
        """Size of what is read at once."""
        return self._entry.opened.arrays[self._name].chunks

    def __getitem__(self, where: Any) -> npt.NDArray[Any]:
        """Read a part of it.

        Raises:
            UserError: Its files are lost, and cannot be made anew.
        """
        return self._entry.read(self._name, where)


@dataclass(frozen=True)
class CachedImage:
    """A prepared scan on disk.

    Attributes:
        array: (C, *S) float32 on the frame's grid.
        frame: Where it lies.
    """

    array: CachedArray
    frame: Frame


class Cache:
    """Prepared images and labels of cases, built when they are first asked for.

    Raises:
        UserError: From every method, where the folder cannot be written or a file cannot be read.
    """

    def __init__(self, root: Path, plan: Plan, inputs: Inputs | None = None) -> None:
        """Use the folder `root`, made when needed; entries of other plans live beside each other.

        Args:
            root: The folder.
            plan: How scans are prepared.
            inputs: What the files of cases must hold; whatever they hold when they are first read, when None.
        """
        self.root = root / f"v{FORMAT}"
        self.plan = plan
        self.inputs = Inputs() if inputs is None else inputs
        self._images: dict[Case, CachedImage] = {}
        self._labels: dict[Case, _Entry] = {}
        self._foregrounds: dict[Case, npt.NDArray[np.int32]] = {}
        sweep(self.root)

    def fill(
        self,
        cases: Sequence[Case],
        *,
        reading: Reading = HERE,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Prepare what is not prepared yet of some cases: images, and labels of the clean and noisy ones.

        Args:
            cases: The cases.
            reading: In how many processes scans are prepared.
            progress: Called with (cases done, cases in all).
        """
        todo = [case for case in cases if not all(map(os.path.lexists, self._folders(case)))]
        total, there = len(cases), len(cases) - len(todo)
        prepare = partial(_prepare, self.root.parent, self.plan, self.inputs.without_look(todo))
        made = reading.each(
            prepare, todo, need=lambda case: self._need(case, reading.remembered),
            progress=None if progress is None else lambda done, _: progress(there + done, total),
        )  # fmt: skip
        try:
            with closing(made):
                for _ in made:
                    pass
        finally:
            sweep(self.root)  # processes that were killed leave what they had begun
        if progress:
            progress(total, total)

    def _folders(self, case: Case) -> Iterator[Path]:
        """Yield where the entries of a case are or shall be."""
        yield self.root / f"image-{self._image_key(case)}"
        if _is_labelled(case):
            yield self.root / f"label-{self._label_key(case)}"

    def _need(self, case: Case, remembered: Remembered) -> int:
        """Return the memory that preparing a case takes, bytes: of the whole grid, as a crop is not known yet."""
        known = recalled(ImageFacts, case.images, remembered)
        if known is None:
            native = grid = sum(announced(path) for path in case.images)
        else:
            lattice = at_spacing(reorient(known.geometry, self.plan.orientation), self.plan.spacing)
            native, grid = (known.channels * math.prod(place.size) for place in (known.geometry, lattice))
        label = announced(case.label, label=True) if _is_labelled(case) and case.label else 0
        return max(SCAN_BYTES * native + _GRID_BYTES * grid, LABEL_BYTES * label)

    def image(self, case: Case) -> CachedImage:
        """Return the prepared scan of `case`."""
        if case not in self._images:
            key = self._image_key(case)
            entry = _Entry(self.root / f"image-{key}", case, partial(self._prepare_image, case))
            lattices = entry.opened.attributes.items()
            frame = Frame(**{name: Geometry(**_tuples(lattice)) for name, lattice in lattices})
            self._images[case] = CachedImage(CachedArray(entry, "array"), frame)
        return self._images[case]

    def label(self, case: Case) -> CachedArray:
        """Return the prepared label of a clean or noisy case: (*S) uint8 class indices, `UNKNOWN` where not known.

        Raises:
            ValueError: The case is in another role: its label is not to be seen.
        """
        return CachedArray(self._label_entry(case), "array")

    def foreground(self, case: Case) -> npt.NDArray[np.int32]:
        """Return where the foreground of a clean or noisy case is; of a partly known label, its background too.

        Returns:
            (n, dimensions + 1): a voxel's position on the grid in array order, then its class index; up to
            `FOREGROUND_VOXELS` of each class, drawn by a seed that depends on the content alone.

        Raises:
            ValueError: As `label`.
        """
        if case not in self._foregrounds:
            self._foregrounds[case] = np.asarray(
                CachedArray(self._label_entry(case), "foreground")[:], np.int32
            )
        return self._foregrounds[case]

    def is_partly_known(self, case: Case) -> bool:
        """Return whether the prepared label of a clean or noisy case leaves voxels open, or classes."""
        leaves = leaves_classes(case.known.classes, self.plan.label_values)
        return leaves or bool(self._label_entry(case).opened.attributes["unknown"])

    def _label_entry(self, case: Case) -> _Entry:
        if not _is_labelled(case):
            raise ValueError(f"{case.id}: the label of a case in role {case.role} is not to be read")
        if case not in self._labels:
            key = self._label_key(case)
            prepare = partial(self._prepare_label, case)
            self._labels[case] = _Entry(self.root / f"label-{key}", case, prepare)
        return self._labels[case]

    def _label_key(self, case: Case) -> str:
        contents = self._image_key(case), self.inputs.label(case)
        # What a case's classes are changes what its label means, and not what is stored.
        return combined_hash(*contents, self.plan.label_values, asdict(replace(case.known, classes=None)))

    def _image_key(self, case: Case) -> str:
        settings = {name: getattr(self.plan, name) for name in _IMAGE_FIELDS}
        return combined_hash(settings, self.inputs.images(case))

    def _prepare_image(self, case: Case) -> Content:
        with _naming(case), _unchanged(partial(self.inputs.images, case)):
            prepared, frame = prepare_scan(read_scan(case.images), self.plan)
        chunks = (len(prepared), *_chunks(prepared.shape[1:], self.plan.ndim))
        return Content({"array": (prepared, chunks)}, asdict(frame))

    def _prepare_label(self, case: Case) -> Content:
        frame = self.image(case).frame
        with _naming(case), _unchanged(partial(self.inputs.label, case)):
            label = label_on(case, frame.native)
            prepared = prepare_label(label, frame.native, frame.grid, self.plan)
        positions = _foreground(prepared, self.plan.num_classes)
        return Content(
            {
                "array": (prepared, _chunks(prepared.shape, self.plan.ndim)),
                "foreground": (positions, (max(1, len(positions)), positions.shape[1])),
            },
            {"unknown": int(np.count_nonzero(prepared == UNKNOWN))},
        )


def _prepare(root: Path, plan: Plan, inputs: Inputs, case: Case) -> None:
    cache = Cache(root, plan, inputs)
    cache.image(case)
    if _is_labelled(case):
        cache.label(case)


def _is_labelled(case: Case) -> bool:
    return case.role in (Role.CLEAN, Role.NOISY) and case.label is not None


class _Entry:
    """An entry as a process uses it."""

    def __init__(self, folder: Path, case: Case, prepare: Callable[[], Content]) -> None:
        self.folder = folder
        self.case = case
        self.prepare = prepare
        self.opened = self._open(expected=False)

    def read(self, name: str, where: Any) -> npt.NDArray[Any]:
        """Read a part of an array; where the entry is lost, it is made anew first."""
        for _ in range(_ATTEMPTS):
            try:
                return np.asarray(self.opened.arrays[name][where])
            except Damaged as error:
                damage = error
            self.opened = self._open(expected=True)
        raise self._hopeless(damage)

    def _open(self, *, expected: bool) -> Opened:
        """Open the entry, made if it is not there and made anew if it is damaged: another process may have done so."""
        for _ in range(_ATTEMPTS):
            try:
                return open_entry(self.folder)
            except FileNotFoundError as error:
                damage: Exception = error
                if expected:
                    self._note("has gone")
            except Damaged as error:
                damage = error
                self._note(f"is damaged ({error})")
            self._make()
        raise self._hopeless(damage)

    def _note(self, found: str) -> None:
        text = f"{self.case.id}: its entry in the cache {found}; it is made anew ({self.folder})"
        warnings.warn(printable(text), stacklevel=2)

    def _make(self) -> None:
        content = self.prepare()
        try:
            build(self.folder, content)
        except OSError as error:
            raise UserError(
                f"{self.folder.parent}: the cache cannot be written: {error.strerror or error} "
                "(make room, or choose another folder with --cache DIR)"
            ) from error

    def _hopeless(self, damage: Exception) -> UserError:
        return UserError(
            f"{self.folder}: this entry of the cache is damaged as soon as it is made ({damage}; look at the disk, or "
            "choose another folder with --cache DIR)"
        )


def _chunks(shape: Sequence[int], ndim: int) -> tuple[int, ...]:
    """Divide each axis evenly into chunks of at most 64 voxels; for a 2D network, slices of at most 256."""
    most = (64,) * 3 if ndim == 3 else (1, 256, 256)
    return tuple(
        math.ceil(length / math.ceil(length / side))
        for length, side in zip(shape, most[-len(shape) :], strict=True)
    )


def _foreground(label: npt.NDArray[np.uint8], num_classes: int) -> npt.NDArray[np.int32]:
    # The same of labels that say the same, whatever stands for "not known" in their files.
    random = np.random.default_rng(
        int.from_bytes(hashlib.blake2b(label.tobytes(), digest_size=8).digest(), "big")
    )
    rows = [np.empty((0, label.ndim + 1), np.int32)]
    # Of a label that is known in places, patches must be told where it is background too.
    first = 0 if (label == UNKNOWN).any() else 1
    for index in range(first, num_classes):
        voxels = np.flatnonzero(label == index)
        if len(voxels) > FOREGROUND_VOXELS:
            voxels = np.sort(random.choice(voxels, FOREGROUND_VOXELS, replace=False))
        positions = np.unravel_index(voxels, label.shape)
        rows.append(np.stack([*positions, np.full(len(voxels), index)], axis=1).astype(np.int32))
    return np.concatenate(rows)


def _tuples(lattice: dict[str, list[Any]]) -> dict[str, tuple[Any, ...]]:
    return {name: tuple(values) for name, values in lattice.items()}


@contextmanager
def _naming(case: Case) -> Iterator[None]:
    """Say in an error which case it was."""
    try:
        yield
    except ReadError:  # names its file already
        raise
    except UserError as error:
        raise UserError(f"{case.id}: {error}", faults=error.faults) from error


@contextmanager
def _unchanged(look: Callable[[], object]) -> Iterator[None]:
    """Look at files before and after they are read: what was read is then what is known of them."""
    look()
    yield
    look()
