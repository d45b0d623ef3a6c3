"""The Brain Imaging Data Structure: scans in ``sub-*/[ses-*/]anat/``, labels in ``derivatives/``.

Source: BIDS 1.10, "Magnetic Resonance Imaging" and "Imaging derivatives" (bids-specification.readthedocs.io).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mlbseg.data.places import entries, is_file, is_folder
from mlbseg.data.readers import stem, suffix
from mlbseg.data.records import read_text
from mlbseg.errors import Fault
from mlbseg.types import Case, Role

LABELS = ("dseg", "mask")
"""What the name of a label ends in: a segmentation of several structures, or of one."""

_OF_LABELS = ("space", "res", "den", "desc", "label", "seg", "atlas", "hemi")
"""Entities that derivatives add to the name of the scan that they come from."""
_SEGMENTED = re.compile(r"seg|mask|label|^gt$|roi", re.IGNORECASE)
"""What a word has in the name of a file that was meant as a label."""
_PROBABILITIES = "probseg"
"""The ending of a map of probabilities, which is read as no label."""
_NAME = re.compile(r"sub-[A-Za-z0-9+]+(?:_[a-z]+-[A-Za-z0-9+]+)*_[A-Za-z0-9]+")


@dataclass
class Bids:
    """What lies in a folder of this form.

    Attributes:
        cases: One for each subject, session and further entities; its files are its channels.
        channels: What the names of the channels end in, such as T1w and FLAIR, in their order.
        class_names: Of label values, as ``derivatives/*/dseg.tsv`` has them; may be empty.
        faults: What is wrong with the names of images.
        label_faults: What is wrong with those of labels.
        notes: What was passed over.
    """

    cases: list[Case] = field(default_factory=list)
    channels: tuple[str, ...] = ()
    class_names: dict[int, str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    label_faults: list[Fault] = field(default_factory=list)
    notes: list[Fault] = field(default_factory=list)


def find_bids(root: Path) -> Bids | None:
    """Return the cases of a folder in this form; None of any other folder.

    Labels may also lie beside their scans. Of several labels of a scan nobody knows which is meant: that is a fault.
    """
    found = Bids()
    images: dict[str, dict[str, Path]] = {}
    labels: dict[str, list[Path]] = {}
    for path in _anatomical(root):
        named = _parsed(path)
        if (named is None or named[1] not in LABELS) and _meant_as_label(path):
            found.label_faults.append(_misnamed(path))
            continue
        if named is None:
            found.notes.append(Fault(path.name, "no name of BIDS, ignored", kind="ignored"))
            continue
        entities, kind = named
        if kind in LABELS:
            labels.setdefault(_id(entities), []).append(path)
        elif kind == _PROBABILITIES:
            found.notes.append(Fault(path.name, "no label by its name, ignored", kind="ignored"))
        elif _scan_of(entities) != entities:
            found.notes.append(Fault(path.name, "derived from another image, ignored", kind="ignored"))
        else:
            images.setdefault(_id(entities), {})[kind] = path
    if not images:
        return None
    derived = root / "derivatives"
    pipelines = [derived, *(p for p in entries(derived) if is_folder(p))] if is_folder(derived) else []
    for pipeline in pipelines:
        for path in _anatomical(pipeline):
            named = _parsed(path)
            if named is not None and named[1] in LABELS:
                labels.setdefault(_id(_scan_of(named[0])), []).append(path)
            elif _meant_as_label(path):
                found.label_faults.append(_misnamed(path))
            else:
                found.notes.append(Fault(path.name, "no label by its name, ignored", kind="ignored"))
        found.class_names = found.class_names or _class_names(pipeline / "dseg.tsv", found)
    found.channels = tuple(sorted({kind for kinds in images.values() for kind in kinds}))
    _join(found, images, labels)
    return found


def _join(found: Bids, images: Mapping[str, Mapping[str, Path]], labels: Mapping[str, list[Path]]) -> None:
    for name, kinds in sorted(images.items()):
        if missing := [kind for kind in found.channels if kind not in kinds]:
            have = f"no {', '.join(missing)}"
            remedy = "add it, leave the others' out, or write a list of cases"
            found.faults.append(
                Fault(name, have, f"{', '.join(found.channels)} as of other cases", remedy, name, "channels")
            )
            continue
        own = labels.get(name, [])
        if len(own) > 1:
            both = f"{len(own)} labels ({', '.join(path.name for path in own[:3])})"
            found.label_faults.append(
                Fault(name, both, "one", "keep one, or write a list of cases", name, "duplicate")
            )
        role = Role.CLEAN if own else Role.UNLABELLED
        found.cases.append(
            Case(name, tuple(kinds[kind] for kind in found.channels), own[0] if own else None, role)
        )
    for name in sorted(labels.keys() - images.keys()):
        found.label_faults.append(
            Fault(
                labels[name][0].name, "a label without an image", f"an image of {name}", "add the image, or remove it",
                name, "orphan",
            )
        )  # fmt: skip


def _anatomical(root: Path) -> Iterator[Path]:
    """Yield the scan files in ``sub-*/anat`` and ``sub-*/ses-*/anat``."""
    for subject in entries(root):
        if not (subject.name.startswith("sub-") and is_folder(subject)):
            continue
        sessions = [p for p in entries(subject) if p.name.startswith("ses-") and is_folder(p)]
        for folder in (subject / "anat", *(session / "anat" for session in sessions)):
            if is_folder(folder):
                yield from (path for path in entries(folder) if suffix(path))


def _parsed(path: Path) -> tuple[dict[str, str], str] | None:
    """Return the entities of a name and what it ends in; None if it is no name of BIDS."""
    name = stem(path)
    if not _NAME.fullmatch(name):
        return None
    *pairs, kind = name.split("_")
    return dict(pair.split("-", 1) for pair in pairs), kind


def _meant_as_label(path: Path) -> bool:
    """Say whether a name has a word that stands for a label; what is an entity, such as ``sub-seg1``, is none."""
    words = [word for word in stem(path).split("_") if "-" not in word]
    return any(_SEGMENTED.search(word) for word in words if word != _PROBABILITIES)


def _misnamed(path: Path) -> Fault:
    found, expected = "the name of a label that BIDS does not know", "such as sub-01_ses-1_dseg.nii.gz"
    return Fault(path.name, found, expected, "rename it, or write a list of cases", kind="id")


def _scan_of(entities: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in entities.items() if key not in _OF_LABELS}


def _id(entities: Mapping[str, str]) -> str:
    return "_".join(f"{key}-{value}" for key, value in entities.items())


def _class_names(table: Path, found: Bids) -> dict[int, str]:
    """Return value -> name of a table with the columns ``index`` and ``name``; empty without one."""
    if not is_file(table):
        return {}
    try:
        rows = list(csv.DictReader(read_text(table).splitlines(), delimiter="\t"))
        names = {int(row["index"]): row["name"] for row in rows}
        if any(value < 0 or not name for value, name in names.items()):
            raise ValueError("a value below 0, or no name")
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        remedy = "mend it, or remove it"
        found.faults.append(Fault("dseg.tsv", f"cannot be used ({error})", "columns index and name", remedy))
        return {}
    return {0: "background", **names}
