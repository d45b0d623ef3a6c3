"""Files that are not read: named in a note, and a fault where one hides the label or the image of a case.

A label in a format that is not read would make its case an unlabelled one without a word.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from mlbseg.data.places import entries
from mlbseg.data.readers import SUFFIXES, suffix
from mlbseg.errors import Fault
from mlbseg.types import Case

NOT_A_SCAN = "not a scan, ignored"
SEGMENTATION = "_segmentation"
"""What PROMISE12 adds to the name of a label."""
LABEL_ENDINGS = (SEGMENTATION, "_seg", "_label", "_labels", "_mask", "_gt")
"""By which a label beside its scan is known."""

_FORMATS = " ".join(SUFFIXES)
_PIXELS = (".raw", ".zraw", ".raw.gz")  # where detached headers keep their pixels
_HEADERS = (".mhd", ".nhdr")
_CHANNEL = re.compile(r"_\d{4}$")


def label_ending(name: str, beside: Collection[str]) -> str:
    """Return by which of `LABEL_ENDINGS` a name is that of a label; "" if it is none.

    PROMISE12's is a label's even where its image is lost; the others may end the name of a scan.

    Args:
        name: Without the file's ending.
        beside: The names in the same folder.
    """
    endings = (ending for ending in LABEL_ENDINGS if name.endswith(ending))
    return next((e for e in endings if e == SEGMENTATION or name.removesuffix(e) in beside), "")


def unread(listed: Iterable[Path]) -> list[Path]:
    """Return the files of a folder that are no scans, nor the pixels of one."""
    files = [path for path in listed if not path.is_dir()]
    detached = any(suffix(path) in _HEADERS for path in files)
    return [path for path in files if not suffix(path) and not _is_pixels(path, detached)]


def _is_pixels(path: Path, detached: bool) -> bool:
    """Say whether a file is the pixels of another; among labels the header must be there."""
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(".img"):
        return path.with_name(f"{path.name[: len(name) - 4]}.hdr").exists()
    return path.name.lower().endswith(_PIXELS) and (detached or not path.parent.name.startswith("labels"))


def note(path: Path, *, folder: bool = True) -> Fault:
    """Return the note on one of them, with the name of its folder."""
    where = f"{path.parent.name}/{path.name}" if folder else path.name
    return Fault(where, NOT_A_SCAN, _FORMATS, kind="ignored")


def passed_over(folder: Path) -> tuple[Fault, ...]:
    """Return a note on each file of a folder of masks that is not read.

    Raises:
        UserError: If it cannot be listed.
    """
    return tuple(note(path) for path in unread(entries(folder)))


def judged(
    files: Sequence[Path], cases: Iterable[Case], orphans: Collection[str]
) -> tuple[list[Fault], list[Fault]]:
    """Say of files beside scans and labels whether they hide something.

    Args:
        files: As `unread` returns them.
        cases: All that were found.
        orphans: Case ids of labels without an image.

    Returns:
        Faults, each of a case, and notes on all other files.
    """
    unlabelled = {case.id: case.label is None for case in cases}
    faults, notes = [], []
    for path in files:
        owner = _owner(path.name, {*unlabelled, *orphans})
        is_label = path.parent.name.startswith("labels") or SEGMENTATION in path.name
        if not path.parent.name.startswith("images"):  # beside those, labels have a folder
            is_label |= any(f"{ending}." in path.name for ending in LABEL_ENDINGS)
        if owner in orphans and not is_label:
            what, remedy = "an image", "convert it"
        elif is_label and unlabelled.get(owner or ""):
            what, remedy = "a label", f"convert it, or move it away: then {owner} counts as unlabelled"
        else:
            notes.append(note(path))
            continue
        where = f"{path.parent.name}/{path.name}"
        found = f"{what} in a format that is not read"
        faults.append(Fault(where, found, f"one of {_FORMATS}", remedy, owner, "format"))
    return faults, notes


def _owner(name: str, known: Collection[str]) -> str | None:
    """Return the case whose file this is by its name up to a dot, without what stands for a channel or a label."""
    while name:
        for candidate in (
            name,
            *(name.removesuffix(ending) for ending in LABEL_ENDINGS),
            _CHANNEL.sub("", name),
        ):
            if candidate in known:
                return candidate
        name = name.rpartition(".")[0]
    return None
