"""A folder of scans read once, with everything that is wrong in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mlbseg.data.cases import LabelOptions
from mlbseg.data.check import CheckResult
from mlbseg.data.check import check as check_dataset
from mlbseg.data.reading import Reading
from mlbseg.data.source import DataSource

__all__ = ["CheckResult", "check"]


def check(
    data: str | Path,
    *,
    labels: Sequence[int] | None = None,
    patient: str | None = None,
    allow_empty: bool = False,
    ignore: int | None = None,
    sparse: bool = False,
    outside_unknown: bool = False,
    cache: str | Path | None = None,
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CheckResult:
    """Read every scan and label once and report all faults together. Nothing is written but the cache.

    Args:
        data: The folder (or datalist); see `mlbseg.data.cases.find_cases` for the layouts.
        labels: All label values that may occur; those that the data declares, else those that its labels agree on,
            when None.
        patient: A regular expression whose first group, found in each case id, is the patient; recognised when None.
        allow_empty: Accept careful labels without any structure: these scans have nothing to find.
        ignore: Label value of voxels whose class is not known, such as 4 of scribbles.
        sparse: Labels were drawn on some slices: slices without a drawn voxel are unknown, not background.
        outside_unknown: What a cropped segmentation of 3D Slicer does not cover is unknown, not background.
        cache: Folder that remembers what was read, so that unchanged files are not read again; the user's cache folder
            when None.
        processes: Number of processes that read; one per core when None. Fewer are used when memory is short.
        progress: Called with (cases done, cases in all).

    Returns:
        Faults, warnings and a summary. A fault is reported, not raised.

    Raises:
        UserError: if there are no cases at all.
    """
    source = DataSource(
        Path(data), labels, patient, LabelOptions(ignore, sparse, outside_unknown, allow_empty)
    )
    reading = Reading.of(processes, None if cache is None else Path(cache))
    return check_dataset(source.find(), labels=source.labels, reading=reading, progress=progress)
