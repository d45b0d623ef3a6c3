"""Pixels in a file of their own: what a header may name."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from mlbseg.data.formats.opened import fail


def beside(path: Path, name: str) -> Path:
    """Return the pixel file that a detached header names; it must lie beside the header."""
    if name != PurePosixPath(name).name or "\\" in name or name in ("", "..", "LIST"):
        fail(
            path,
            f"keeps its pixels in {name!r}",
            "a file name in the same folder",
            "put both files in one folder",
        )
    data = path.parent / name
    if not data.is_file():
        fail(path, f"its pixel file {name} is missing", remedy="put both files in one folder")
    return data
