"""Pixels in a file of their own: what a header may name."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from mlbseg.data.formats.opened import fail

_TOGETHER = "put both files in one folder"


def beside(path: Path, name: str) -> Path:
    """Return the pixel file that a detached header names; it must lie beside the header.

    Raises:
        ReadError: If the name leads elsewhere, or to nothing that holds pixels.
    """
    name = name.removeprefix("./")
    if name.split(" ")[0] == "LIST" or "%" in name:
        fail(path, "names a file for each slice", "one pixel file", "convert it to one file, such as .nii.gz")
    if name != PurePosixPath(name).name or "\\" in name or "\0" in name or name in ("", ".."):
        fail(path, f"keeps its pixels in {name!r}", "a file name in the same folder", _TOGETHER)
    return of_header(path, path.parent / name)


def of_header(path: Path, data: Path) -> Path:
    """Return the pixel file `data` of a detached header, which is in the header's folder by its name.

    A raw pixel file has no form of its own: whatever a name leads to would be read as an image. So a link is followed
    only to where the header itself lies, which allows trees of links to both files, or into the header's folder.

    Raises:
        ReadError: If it is missing, leads elsewhere or is the header.
    """
    if not data.is_file():
        fail(path, f"its pixel file {data.name} is missing", remedy=_other_case(data) or _TOGETHER)
    real = data.resolve()
    if real.parent not in (path.resolve().parent, path.parent.resolve()):
        found = f"its pixel file {data.name} is a link to another folder"
        fail(path, found, "a file beside the header", "copy the file itself into the folder")
    if real == path.resolve():
        fail(path, "names itself as its pixel file", "the file that holds the pixels", "correct the header")
    return data


def _other_case(data: Path) -> str:
    """Return a remedy where the file is there in other letters, as systems that ignore case leave it."""
    try:
        there = [p.name for p in data.parent.iterdir() if p.name.lower() == data.name.lower()]
    except OSError:
        return ""
    return f"the folder has {there[0]}: correct the name in the header" if there else ""
