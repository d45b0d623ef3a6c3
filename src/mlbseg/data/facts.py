"""What is kept of scans and labels after their pixels are gone: all that checking and measuring need of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from mlbseg.data.grey import Greys, find_greys, value_counts
from mlbseg.data.hashes import content_hash
from mlbseg.data.known import Slices, is_part, slices_of
from mlbseg.data.lattice import array_shape, content_box, crop, reorient
from mlbseg.data.readers import read_label, read_scan, suffix
from mlbseg.data.remembered import Remembered, combined_hash
from mlbseg.errors import UserError
from mlbseg.types import Geometry, Scan

T = TypeVar("T")

SAMPLE = 200_000
"""Voxels, evenly strided, from which a scan's percentiles are taken."""
_MOST_VALUES = 4096  # of a label, that are remembered; one with more is no label of classes


@dataclass(frozen=True)
class Intensity:
    """Intensities of one channel over one region of one scan.

    Attributes:
        low: 0.5th percentile.
        median: 50th percentile.
        high: 99.5th percentile.
        mean: Mean.
        std: Standard deviation.
    """

    low: float
    median: float
    high: float
    mean: float
    std: float

    @classmethod
    def of(cls, values: npt.NDArray[np.float32]) -> Intensity | None:
        """Describe `values` (n,); None if there are none."""
        if not values.size:
            return None
        sample = values[:: max(1, values.size // SAMPLE)].astype(np.float64)
        low, median, high = np.percentile(sample, [0.5, 50, 99.5])
        return cls(float(low), float(median), float(high), float(sample.mean()), float(sample.std()))


@dataclass(frozen=True)
class Measures:
    """What a plan needs to know of a scan's pixels.

    Attributes:
        box_size: Size of the box of non-background voxels (with a margin); array order, 3D scans turned to LPS.
        minimum: Smallest value of each channel: its background.
        integers: Whether each channel holds whole numbers only.
        content: Intensities of each channel's voxels above its minimum; None for a constant channel.
    """

    box_size: tuple[int, ...]
    minimum: tuple[float, ...]
    integers: tuple[bool, ...]
    content: tuple[Intensity | None, ...]


@dataclass(frozen=True)
class ImageFacts:
    """What is kept of the image files of a case.

    Attributes:
        geometry: Where the scan lies.
        channels: Number of channels.
        digest: A hash of the pixels.
        notes: What reading has left out or done to it.
        odd: Values that are NaN or infinite.
        constant: Channels of one value each, and the value; none of a scan with odd values.
        measures: None of a scan with odd values.
    """

    geometry: Geometry
    channels: int
    digest: str
    notes: tuple[str, ...]
    odd: int
    constant: tuple[tuple[int, float], ...]
    measures: Measures | None


@dataclass(frozen=True)
class LabelFacts:
    """What is kept of a label file.

    Attributes:
        geometry: Where it lies.
        values: How many voxels hold each value.
        greys: Values that lie at the edges of others only.
        slices: On how many slices something is drawn; None of a picture, and of an empty label.
        covers_part: Whether it covers a part of its image alone.
    """

    geometry: Geometry
    values: dict[int, int]
    greys: Greys | None
    slices: Slices | None = None
    covers_part: bool = False


def image_facts(
    paths: Sequence[Path], remembered: Remembered, read: Callable[[], Scan] | None = None
) -> ImageFacts:
    """Return what is known of a scan, which is read unless it is remembered.

    Args:
        paths: Its files.
        remembered: Where facts are kept.
        read: Reads them; `read_scan` when None.

    Raises:
        ReadError: As `read_scan`.
    """
    return facts_of(
        ImageFacts, paths, lambda: describe_image(read() if read else read_scan(paths)), remembered,
        # A note on a series names files, and names of patients must not lie in the cache.
        keep=lambda facts: not (facts.notes and any(path.is_dir() for path in paths)),
    )  # fmt: skip


def recalled(kind: type[T], paths: Sequence[Path], remembered: Remembered, *asked: object) -> T | None:
    """Return facts that are remembered of files, which are not read; None if there are none. See `facts_of`."""
    name = None if remembered.folder is None else _name(kind, paths, remembered, asked)
    return None if name is None else remembered.recall(kind, name)


def label_facts(path: Path, remembered: Remembered) -> LabelFacts:
    """Return what is known of a label, which is read unless it is remembered.

    Raises:
        ReadError: As `read_label`.
    """
    return facts_of(
        LabelFacts,
        [path],
        lambda: describe_label(*read_label(path)),
        remembered,
        keep=lambda facts: len(facts.values) <= _MOST_VALUES,
    )


def facts_of(
    kind: type[T],
    paths: Sequence[Path],
    read: Callable[[], T],
    remembered: Remembered,
    *asked: object,
    keep: Callable[[T], bool] = lambda _: True,
) -> T:
    """Return facts about files as they are now.

    Args:
        kind: Of facts.
        paths: The files, whose order counts.
        read: Reads them, if what they hold is not remembered.
        remembered: Where facts are kept.
        asked: What else the facts depend on; JSON.
        keep: Whether facts are to be remembered.

    Raises:
        ReadError: As `read`. Faults are not remembered.
    """
    if remembered.folder is None:
        return read()
    name = _name(kind, paths, remembered, asked)
    known = None if name is None else remembered.recall(kind, name)
    if known is not None:
        return known
    facts = read()
    # What has changed while it was read is known by neither name.
    if name is not None and keep(facts) and _name(kind, paths, remembered, asked) == name:
        remembered.remember(kind, name, facts)
    return facts


def _name(kind: type, paths: Sequence[Path], remembered: Remembered, asked: Sequence[object]) -> str | None:
    """Return the name of facts; None if a file cannot be read, of which reading says why."""
    try:
        held = [content_hash(path, remembered) for path in paths]
    except UserError:
        return None
    return combined_hash(kind.__name__, [(path.is_dir(), suffix(path)) for path in paths], held, list(asked))


def describe_image(scan: Scan) -> ImageFacts:
    """Return what is kept of a scan."""
    array = scan.array
    odd = array.size - int(np.isfinite(array).sum())
    constant = () if odd else tuple(
        (index, float(channel.flat[0])) for index, channel in enumerate(array) if channel.min() == channel.max()
    )  # fmt: skip
    return ImageFacts(
        geometry=scan.geometry,
        channels=len(array),
        digest=hashlib.blake2b(array.data.cast("B"), digest_size=16).hexdigest() + str(array.shape),
        notes=scan.notes,
        odd=odd,
        constant=constant,
        measures=None if odd else _measure(scan),
    )


def describe_label(array: npt.NDArray[np.int32], geometry: Geometry) -> LabelFacts:
    """Return what is kept of a label (*S)."""
    values, counts = value_counts(array)
    return LabelFacts(
        geometry,
        dict(zip(values.tolist(), counts.tolist(), strict=True)),
        find_greys(array),
        slices_of(array),
        is_part(geometry),
    )


def _measure(scan: Scan) -> Measures:
    minimum = tuple(float(channel.min()) for channel in scan.array)
    return Measures(
        box_size=array_shape(reorient(crop(scan.geometry, content_box(scan.array)), "LPS")),
        minimum=minimum,
        integers=tuple(bool(np.array_equal(channel, np.rint(channel))) for channel in scan.array),
        content=tuple(
            Intensity.of(channel[channel > low]) for channel, low in zip(scan.array, minimum, strict=True)
        ),
    )
