"""DICOM as archives export it: series in folders below folders, and files beside other scans."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mlbseg.data.formats.dicom import slice_files
from mlbseg.data.formats.dicom_header import Header, read_header
from mlbseg.data.readers import SUFFIXES, plain, reading, stem, suffix
from mlbseg.errors import Fault, ReadError

DEEPEST = 4
"""Levels of folders below one that are searched: patient, study, series, and one more."""


def _scans_below(folder: Path, failed: Callable[[OSError], None]) -> tuple[list[Path], list[Path]]:
    """Return the DICOM scans at or below a folder, which are folders of slices and files, and the files that are none.

    Args:
        folder: Where to look. Hidden folders and links to folders below it are passed over.
        failed: Is told of a folder that cannot be listed, or a file in it that cannot be opened.
    """
    found: list[Path] = []
    others: list[Path] = []
    for place, folders, files in os.walk(folder, onerror=failed):
        depth = len(Path(place).relative_to(folder).parts)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and depth < DEEPEST)
        try:
            if files:
                scans, rest = loose_scans(Path(place), alone=True)
                found += scans
                others += rest
        except OSError as error:
            failed(error)
    return found, others


def loose_scans(folder: Path, *, alone: bool) -> tuple[list[Path], list[Path]]:
    """Say what the DICOM files directly in a folder are.

    Args:
        folder: The folder.
        alone: Whether there is nothing else in it: then a single slice, or a volume in a file, is named after it.

    Returns:
        The scans, which are the folder itself if its files are the slices of a volume, else files; and the files that
        are none. Of a folder its reading says what it has passed over, and of all whether they are sound.

    Raises:
        OSError: The folder cannot be listed, or a file not be opened.
    """
    flat, slices, others = [], [], []
    volumes: Counter[str] = Counter()
    for path in slice_files(folder):
        header = _header(path)
        if isinstance(header, str):
            others.append(path)
            continue
        if header is not None and header.flat:
            flat.append(path)
            continue
        slices.append(path)
        volumes[str(path) if header is None else header.volume] += 1
        if volumes.most_common(1)[0][1] > 1:
            return [folder], []
    if alone and len(slices) == 1:
        return [folder], []
    return slices + flat, others


def _loose_series(files: Sequence[Path]) -> bool:
    """Say whether the first two of several DICOM files are slices of one series, and so not scans of their own."""
    first, second = (_header(path) for path in files[:2]) if len(files) > 1 else (None, None)
    if not (isinstance(first, Header) and isinstance(second, Header)):
        return False
    return not (first.flat or second.flat) and first.volume == second.volume


def _nested_id(place: Path, root: Path) -> str:
    """Return a case's id from the names on the way to its scan, without what no file's name should have."""
    way = place.relative_to(root)
    name = plain("_".join([*way.parts[:-1], stem(place) if place.is_file() else place.name]))
    return "".join(c if c.isprintable() and c != "\\" else "-" for c in name)


def named_scans(
    scans: list[Path], labels: Mapping[str, Path], faults: list[Fault], warnings: list[Fault]
) -> list[tuple[str, Path]]:
    """Name scans after their files and folders; a folder may hold its DICOM series, or several, in folders below."""
    slices = [path for path in scans if is_dicom_name(path)]
    if _loose_series(slices):
        where = f"{slices[0].parent.name}/{slices[0].name}"
        what, remedy = "one of several slices of a series", "put each series into a folder of its own"
        faults.append(Fault(where, what, f"{slices[0].parent.name}/NAME/*.dcm", remedy, kind="dicom"))
        scans = [path for path in scans if path not in slices]
    pairs = []
    for path in scans:
        series = series_in(path.parent, [path], warnings) if path.is_dir() else []
        below = [f"{path.name}/{place.relative_to(path)}" for _, place in series if place != path]
        if path.name in labels and 0 < len(below) < len(
            series
        ):  # the label is of the slices in the folder itself
            warnings.append(Fault(path.name, f"{', '.join(below[:3])} passed over", kind="ignored"))
            series = []
        elif len(series) > 1 and path.name in labels:
            remedy = "keep the one that the label was drawn on"
            what = f"{len(series)} DICOM series ({', '.join(below[:3])})"
            faults.append(Fault(path.name, what, "one, as there is a label", remedy, path.name, "dicom"))
            series = []
        pairs += series or [(stem(path), path)]
    return pairs


def series_in(root: Path, folders: list[Path], warnings: list[Fault]) -> list[tuple[str, Path]]:
    """Return the DICOM scans in `folders` and below, named after their folders; several in one, after the way."""

    def failed(error: OSError) -> None:
        where = str(error.filename or "a folder").removeprefix(f"{root}/")
        warnings.append(Fault(where, f"cannot be opened ({error.strerror}), ignored", kind="ignored"))

    named = []
    for folder in folders:
        places, others = _scans_below(folder, failed)
        pass_over(others, root, warnings)
        named += [(plain(folder.name) if len(places) == 1 else _nested_id(p, root), p) for p in places]
    return named


def pass_over(files: list[Path], root: Path, warnings: list[Fault]) -> None:
    """Name DICOM files that are no images: plans, reports, structure sets."""
    for path in files:
        what = "DICOM, but no image of a scan: passed over"
        warnings.append(Fault(str(path.relative_to(root)), what, kind="ignored"))


def is_dicom_name(path: Path) -> bool:
    """Say whether a name ends as DICOM files' names do."""
    return SUFFIXES.get(suffix(path)) == "DICOM"


def _header(path: Path) -> Header | str | None:
    try:
        with reading(path):
            return read_header(path)
    except ReadError:  # whoever reads it says why
        return None
