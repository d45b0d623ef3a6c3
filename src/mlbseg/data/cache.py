"""Prepared cases on disk, so that a patch is read without the scan and a second run starts at once.

An entry is a Zarr (version 3) store named by the content of the case's files and the decisions that shape it.
Images and labels are separate entries: using an image never opens a label. An entry is built under a
temporary name and renamed when it is complete, so two processes may build the same one, and a half-written
one is never used.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BloscCodec

from mlbseg.data.geometry import geometry_difference
from mlbseg.data.plan import Plan
from mlbseg.data.preprocess import Frame, prepare_label, prepare_scan
from mlbseg.data.readers import read_label, read_scan
from mlbseg.errors import ReadError, UserError
from mlbseg.types import Case, Geometry, Role

FORMAT = 1
"""Raised whenever preparation or storage changes, so that older entries are not found."""

FOREGROUND_VOXELS = 2_000
"""Positions kept per foreground class."""

STALE_SECONDS = 24 * 3600
"""A temporary folder this old was left by a build that was killed."""

_IMAGE_FIELDS = ("scan_ndim", "channels", "spacing", "normalisation", "intensity", "crop", "orientation")
_COMPRESSOR = BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle")
_DETACHED = re.compile(rb"(?im)^\s*(?:ElementDataFile|data ?file)\s*[=:]\s*(.+?)\s*$")


@dataclass(frozen=True)
class CachedImage:
    """A prepared scan on disk.

    Attributes:
        array: (C, *S) float32 on the frame's grid.
        frame: Where it lies.
    """

    array: zarr.Array
    frame: Frame


def default_cache_root() -> Path:
    """Return $MLBSEG_CACHE, else `mlbseg` in $XDG_CACHE_HOME, else in ~/.cache."""
    if own := os.environ.get("MLBSEG_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mlbseg"


class Cache:
    """Prepared images and labels of cases, built when they are first asked for.

    Raises:
        UserError: From every method, where the folder cannot be written or a file cannot be read.
    """

    def __init__(self, root: Path, plan: Plan) -> None:
        """Use the folder `root`, made when needed; entries of other plans live beside each other."""
        self.root = root / f"v{FORMAT}"
        self.plan = plan
        self._images: dict[Case, CachedImage] = {}
        self._labels: dict[Case, zarr.Group] = {}
        self._foregrounds: dict[Case, npt.NDArray[np.int32]] = {}
        _sweep(self.root)

    def image(self, case: Case) -> CachedImage:
        """Return the prepared scan of `case`."""
        if case not in self._images:
            group = self._entry(f"image-{self._image_key(case)}", lambda: self._prepare_image(case))
            frame = Frame(**{name: Geometry(**_tuples(lattice)) for name, lattice in group.attrs.items()})
            self._images[case] = CachedImage(group["array"], frame)
        return self._images[case]

    def label(self, case: Case) -> zarr.Array:
        """Return the prepared label of a clean or noisy case: (*S) uint8 class indices, `UNKNOWN` where not known.

        Raises:
            ValueError: The case is in another role: its label is not to be seen.
        """
        return self._label_group(case)["array"]

    def foreground(self, case: Case) -> npt.NDArray[np.int32]:
        """Return where the foreground of a clean or noisy case is.

        Returns:
            (n, dimensions + 1): a voxel's position on the grid in array order, then its class index; up to
            `FOREGROUND_VOXELS` of each class, drawn by a seed that depends on the content alone.

        Raises:
            ValueError: As `label`.
        """
        if case not in self._foregrounds:
            self._foregrounds[case] = np.asarray(self._label_group(case)["foreground"][:], np.int32)
        return self._foregrounds[case]

    def _label_group(self, case: Case) -> zarr.Group:
        if case.role not in (Role.CLEAN, Role.NOISY) or case.label is None:
            raise ValueError(f"{case.id}: the label of a case in role {case.role} is not to be read")
        if case not in self._labels:
            key = _key(self._image_key(case), content_hash(case.label), self.plan.label_values, case.unknown)
            self._labels[case] = self._entry(
                f"label-{key}", lambda: self._prepare_label(case, seed=int(key[:16], 16))
            )
        return self._labels[case]

    def _image_key(self, case: Case) -> str:
        settings = {name: getattr(self.plan, name) for name in _IMAGE_FIELDS}
        return _key(settings, [content_hash(path) for path in case.images])

    def _prepare_image(self, case: Case) -> _Content:
        with _naming(case):
            prepared, frame = prepare_scan(read_scan(case.images), self.plan)
        chunks = (len(prepared), *_chunks(prepared.shape[1:], self.plan.ndim))
        return _Content({"array": (prepared, chunks)}, asdict(frame))

    def _prepare_label(self, case: Case, seed: int) -> _Content:
        assert case.label is not None  # noqa: S101 - `_label_group` has seen to it
        frame = self.image(case).frame
        with _naming(case):
            label, geometry = read_label(case.label)
            if difference := geometry_difference(geometry, frame.native):
                raise UserError(f"label has {difference[0]}, expected {difference[1]} as the image has")
            prepared = prepare_label(label, frame.native, frame.grid, self.plan, case.unknown)
        positions = _foreground(prepared, self.plan.num_classes, seed)
        return _Content(
            {
                "array": (prepared, _chunks(prepared.shape, self.plan.ndim)),
                "foreground": (positions, (max(1, len(positions)), positions.shape[1])),
            }
        )

    def _entry(self, name: str, prepare: Callable[[], _Content]) -> zarr.Group:
        """Open an entry, built first if it is not there."""
        final = self.root / name
        if not final.is_dir():
            content = prepare()
            try:
                _build(final, content)
            except OSError as error:
                raise UserError(
                    f"{self.root}: the cache cannot be written: {error.strerror or error} "
                    "(make room, or choose another folder with --cache DIR)"
                ) from error
        try:
            return zarr.open_group(final, mode="r")
        except (OSError, ValueError) as error:
            raise UserError(f"{final}: damaged cache entry, expected a Zarr group (delete it)") from error


@dataclass(frozen=True)
class _Content:
    """What goes into an entry: arrays with their chunks, and attributes."""

    arrays: dict[str, tuple[npt.NDArray[Any], tuple[int, ...]]]
    attributes: dict[str, Any] = field(default_factory=dict)


def _build(final: Path, content: _Content) -> None:
    """Write an entry under a temporary name and rename it; if another process was first, its entry stays."""
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex}")
    try:
        group = zarr.create_group(temporary, attributes=content.attributes)
        for name, (array, chunks) in content.arrays.items():
            group.create_array(name, data=array, chunks=chunks, compressors=_COMPRESSOR)
        _flush(temporary)
        try:
            temporary.rename(final)
        except OSError:
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Force files onto the disk: a rename must not outlive a power cut that its chunks did not."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _sweep(root: Path) -> None:
    """Remove what builds that were killed left behind."""
    try:
        stale = [
            path
            for path in root.glob(".*-*.*")
            if path.is_dir() and time.time() - path.stat().st_mtime > STALE_SECONDS
        ]
    except OSError:  # not ours to read, or just swept by another process: nothing depends on it
        return
    for path in stale:
        shutil.rmtree(path, ignore_errors=True)


def content_hash(path: Path) -> str:
    """Return the SHA-256 of what a scan's path stands for.

    Of a folder (DICOM series) all files count; of a header file also the data file that it names.

    Raises:
        UserError: A file cannot be read.
    """
    try:
        files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
        digests = []
        for file in [*files, *_data_files(path)]:
            stat = file.stat()
            digests.append(_file_hash(file, stat.st_size, stat.st_mtime_ns))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    return _key(digests)


@cache
def _file_hash(path: Path, size: int, mtime_ns: int) -> str:
    """Hash a file once per process, as long as its size and time stay."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _data_files(path: Path) -> list[Path]:
    """Return the pixel files beside a detached header (.mhd, .nhdr)."""
    if path.suffix.lower() not in (".mhd", ".nhdr"):
        return []
    named = {name.decode(errors="replace") for name in _DETACHED.findall(path.read_bytes())}
    return sorted(
        p
        for p in path.parent.iterdir()
        if p != path and p.is_file() and (p.name in named or p.name.startswith(f"{path.stem}."))
    )


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _chunks(shape: Sequence[int], ndim: int) -> tuple[int, ...]:
    """Divide each axis evenly into chunks of at most 64 voxels; for a 2D network, slices of at most 256."""
    most = (64,) * 3 if ndim == 3 else (1, 256, 256)
    return tuple(
        math.ceil(length / math.ceil(length / side))
        for length, side in zip(shape, most[-len(shape) :], strict=True)
    )


def _foreground(label: npt.NDArray[np.uint8], num_classes: int, seed: int) -> npt.NDArray[np.int32]:
    random = np.random.default_rng(seed)
    rows = [np.empty((0, label.ndim + 1), np.int32)]
    for index in range(1, num_classes):
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
