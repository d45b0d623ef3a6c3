"""The folder layouts that are recognised without a configuration: from names on disk to cases.

Nothing is read here but names, `dataset.json` and the two lists; whether a scan is readable, `check` says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlbseg.data.formats import dicom, hdf5
from mlbseg.data.readers import SUFFIXES, is_hdf5, stem, suffix
from mlbseg.errors import Fault, FaultsError, UserError
from mlbseg.types import Case, Role

_CHANNEL = re.compile(r"(.+)_(\d{4})")
_SEGMENTATION = "_segmentation"
IGNORED = "ignore"
"""nnU-Net's name for the label value of voxels that are not labelled."""
_PIXELS = (".raw", ".zraw", ".raw.gz")  # where detached headers keep their pixels


@dataclass
class Found:
    """What a layout yields: cases, and what is wrong with the names of images and of labels."""

    layout: str
    cases: list[Case] = field(default_factory=list)
    class_names: dict[int, str] = field(default_factory=dict)
    unknown: int | None = None
    faults: list[Fault] = field(default_factory=list)
    label_faults: list[Fault] = field(default_factory=list)
    warnings: list[Fault] = field(default_factory=list)
    _by_id: dict[str, Case] = field(default_factory=dict)

    def add(self, case: Case) -> None:
        """Take a case, or say why its name cannot be used."""
        if reason := unsafe(case.id):
            remedy = "rename it: outputs are named after it"
            self.faults.append(Fault(repr(case.id), reason, "a plain file name", remedy, case.id, "id"))
        elif case.id in self._by_id:
            files = ", ".join(p.name for p in (*self._by_id[case.id].images, *case.images))
            found = f"two cases of this name ({files})"
            self.faults.append(Fault(case.id, found, "one", "rename or remove one", case.id, "duplicate"))
        else:
            self.cases.append(case)
            self._by_id[case.id] = case


def unsafe(name: str) -> str:
    """Return why `name` cannot name a case, or "": it becomes the name of output files."""
    if not name or name.startswith("."):
        return "a name that is empty or starts with a dot"
    if any(c in "/\\" or not c.isprintable() for c in name):
        return "a name with a separator, a control character or bytes that are not UTF-8"
    return ""


def entries(folder: Path) -> list[Path]:
    """Return what lies in `folder`, sorted, without hidden files.

    Raises:
        UserError: If it is not a folder that can be listed.
    """
    try:
        return sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror})") from None


def recognise(root: Path) -> Found | None:
    """Return the cases of the first layout that `root` has, or None."""
    names = {p.name for p in entries(root)}
    if "imagesTr" in names:
        return _paired(root, "imagesTr", "labelsTr")
    if "images" in names:
        return _paired(root, "images", "labels")
    return _promise12(root) or _left_atrium(root)


def bare(root: Path, channels: int | None = None) -> Found:
    """Return every scan directly in `root`, without labels; DICOM folders inside count as scans.

    Files numbered as nnU-Net numbers channels are joined if that gives every case `channels` files (any number
    when None); else they are what numbered exports are, a scan each.
    """
    found = Found("a folder of scans")
    scans = [p for p in _scans(root, found) if suffix(p) or (p.is_dir() and dicom.slice_files(p))]
    joined = Found(found.layout, warnings=found.warnings)
    groups = _channels(scans, joined) if _look_like_channels(scans) else {}
    fits = not joined.faults and all(len(images) == channels for images in groups.values())
    if groups and (fits or channels is None):
        for name, images in groups.items():
            joined.add(Case(name, tuple(images)))
        return joined
    for path in scans:
        found.add(Case(stem(path), (path,)))
    return found


def read_list(path: Path) -> tuple[str, ...]:
    """Return the case ids in a list, one a line, a scan's ending dropped; () if there is no such file."""
    if not path.exists():
        return ()
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error}); write one case id a line") from None
    return tuple(stem(Path(line.strip())) for line in lines if line.strip())


def _paired(root: Path, images: str, labels: str) -> Found:
    """`images/` + `labels/` by stem, the Decathlon's folders, or nnU-Net's with one file per channel."""
    found = Found(f"{images}/ + {labels}/")
    description = _description(root, found) if images == "imagesTr" else {}
    ending = description.get("file_ending")
    clean = _by_stem(root / labels, found)
    noisy = _by_stem(root / "labels_noisy", found)
    for name in sorted(clean.keys() & noisy.keys()):
        found.warnings.append(
            Fault(
                f"labels_noisy/{noisy[name].name}",
                f"ignored, as the case has a label in {labels}/ too",
                kind="ignored",
            )
        )
    scans = _ending(_scans(root / images, found), ending, found)
    is_nnunet = images == "imagesTr" and (bool(ending) or _look_like_channels(scans, clean))
    if is_nnunet:
        found.layout = "nnU-Net v2"
    _collect(found, scans, {**noisy, **clean}, is_nnunet, lambda i: Role.CLEAN if i in clean else Role.NOISY)
    for test_images, test_labels in (("images_test", "labels_test"), ("imagesTs", "labelsTs")):
        if _present(root / test_images):
            scans = _ending(_scans(root / test_images, found), ending, found)
            _collect(
                found, scans, _by_stem(root / test_labels, found), is_nnunet, lambda _: Role.TEST, Role.TEST
            )
    if not (found.cases or found.faults or found.label_faults):
        raise UserError(f"{root / images}: no scans in it; expected files ending in {' '.join(SUFFIXES)}")
    return found


def _promise12(root: Path) -> Found | None:
    """`CaseNN.mhd` beside `CaseNN_segmentation.mhd`."""
    found = Found("PROMISE12")
    scans = [p for p in _scans(root, found) if suffix(p)]
    labels = {stem(p).removesuffix(_SEGMENTATION): p for p in scans if stem(p).endswith(_SEGMENTATION)}
    if not labels:
        return None
    _collect(found, [p for p in scans if p not in labels.values()], labels, False, lambda _: Role.CLEAN)
    return found


def _left_atrium(root: Path) -> Found | None:
    """`NAME/mri_norm2.h5`, which holds image and label."""
    files = [p / "mri_norm2.h5" for p in entries(root) if (p / "mri_norm2.h5").is_file()]
    found = Found("Left Atrium HDF5")
    for file in files:
        labelled = hdf5.has_label(file)
        role = Role.CLEAN if labelled else Role.UNLABELLED
        found.add(Case(file.parent.name, (file,), file if labelled else None, role))
    return found if files else None


def _collect(
    found: Found,
    scans: list[Path],
    labels: Mapping[str, Path],
    by_channel: bool,
    role: Callable[[str], Role],
    unlabelled: Role = Role.UNLABELLED,
) -> None:
    """Join images and labels by id; a label that no image has is a fault."""
    groups = _channels(scans, found) if by_channel else None
    pairs = list(groups.items()) if groups else [(stem(p) if suffix(p) else p.name, [p]) for p in scans]
    for name, images in pairs:
        label = labels.get(name)
        if label is None and len(images) == 1 and is_hdf5(images[0]) and hdf5.has_label(images[0]):
            found.add(
                Case(name, tuple(images), images[0], Role.TEST if unlabelled is Role.TEST else Role.CLEAN)
            )
        else:
            found.add(Case(name, tuple(images), label, role(name) if label else unlabelled))
    for name in sorted(set(labels) - {name for name, _ in pairs}):
        remedy = "add the image, or remove the label"
        where = f"{labels[name].parent.name}/{labels[name].name}"
        found.label_faults.append(
            Fault(where, "a label without an image", f"an image named {name}", remedy, name, "orphan")
        )


def _scans(folder: Path, found: Found) -> list[Path]:
    """Return the scan files and the folders in `folder`; a file that is neither is named in a warning."""
    scans = []
    for path in entries(folder):
        if suffix(path) or path.is_dir():
            scans.append(path)
        elif not path.name.lower().endswith(_PIXELS) and folder.name.startswith(("images", "labels")):
            where = f"{folder.name}/{path.name}"
            found.warnings.append(
                Fault(where, "not a scan, ignored", f"{' '.join(SUFFIXES)}", kind="ignored")
            )
    return scans


def _present(folder: Path) -> bool:
    return (
        folder.is_symlink() or folder.exists()
    )  # a broken link is present: it must fail, not be passed over


def _by_stem(folder: Path, found: Found) -> dict[str, Path]:
    labels: dict[str, Path] = {}
    if not _present(folder):
        return labels
    for path in _scans(folder, found):
        name = stem(path)
        if name in labels:
            both = f"two labels ({labels[name].name}, {path.name})"
            found.label_faults.append(Fault(name, both, "one", "remove one", name, "duplicate"))
        labels.setdefault(name, path)
    return labels


def _ending(scans: list[Path], ending: str | None, found: Found) -> list[Path]:
    """Keep the files that end as nnU-Net's `dataset.json` says."""
    others = [p for p in scans if ending and not p.name.endswith(ending)]
    for path in others:
        where = f"{path.parent.name}/{path.name}"
        found.warnings.append(
            Fault(where, "ignored", f"the file_ending {ending} of dataset.json", kind="ignored")
        )
    return [p for p in scans if p not in others]


def _look_like_channels(scans: list[Path], labels: Iterable[str] = ()) -> bool:
    """Say whether all names end in nnU-Net's channel number, the same numbers from 0000 for each case."""
    channels: dict[str, set[int]] = {}
    for path in scans:
        match = _CHANNEL.fullmatch(stem(path)) if suffix(path) else None
        if match is None or stem(path) in labels:
            return False
        channels.setdefault(match[1], set()).add(int(match[2]))
    return bool(channels) and any(set(range(len(c))) == c for c in channels.values())


def _channels(scans: list[Path], found: Found) -> dict[str, list[Path]]:
    """Group nnU-Net's `case_0000`, `case_0001`, ... by case."""
    groups: dict[str, dict[int, Path]] = {}
    for path in scans:
        match = _CHANNEL.fullmatch(stem(path))
        name, number = (match[1], int(match[2])) if match else (stem(path), 0)
        if match is None:
            expected, remedy = "a channel number", f"rename it {name}_0000{suffix(path)}"
            found.faults.append(Fault(path.name, "no channel number", expected, remedy, name, "channels"))
        elif number in groups.get(name, {}):
            both = f"{groups[name][number].name}, {path.name}"
            found.faults.append(
                Fault(name, f"two files of one channel ({both})", "one", "remove one", name, "duplicate")
            )
        groups.setdefault(name, {}).setdefault(number, path)
    for name, files in groups.items():
        if set(files) != set(range(len(files))):
            listed = ", ".join(f"{n:04d}" for n in sorted(files))
            found.faults.append(
                Fault(
                    name,
                    f"channels {listed}",
                    "numbers from 0000 without a gap",
                    "add the missing",
                    name,
                    "channels",
                )
            )
    return {name: [files[n] for n in sorted(files)] for name, files in groups.items()}


def _description(root: Path, found: Found) -> dict[str, Any]:
    """Read what `dataset.json` says beyond the folders: the names of the classes and the file ending."""
    path = root / "dataset.json"
    if not path.exists():
        return {}
    try:
        description = json.loads(path.read_text(encoding="utf-8-sig"))
        found.class_names, found.unknown = declared_labels(description.get("labels", {}))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        fault = Fault(
            "dataset.json", f"cannot be used ({error})", "a JSON object with labels", "mend or remove it"
        )
        found.faults.append(fault)
        return {}
    return description


def declared_unknown(*folders: Path) -> int | None:
    """Return the value that the `dataset.json` of the first folder that has one calls ``ignore``; None without one.

    Raises:
        FaultsError: If the file cannot be used.
    """
    for folder in folders:
        found = Found("")
        if _description(folder, found):
            return found.unknown
        if found.faults:
            raise FaultsError(found.faults, str(folder))
    return None


def declared_labels(labels: Mapping[str, Any]) -> tuple[dict[int, str], int | None]:
    """Read ``labels`` of a `dataset.json`: the Decathlon's ``{"0": "background"}`` or nnU-Net's ``{"background": 0}``.

    Returns:
        Value -> name, and the value that nnU-Net calls ``ignore``, which names no class; None if there is none.
        nnU-Net's regions (a list of values under one name) name no single value: then there are no names.
    """
    unknown = labels.get(IGNORED)
    if unknown is not None and not isinstance(unknown, int):
        raise ValueError(f"the label {IGNORED!r} is {unknown!r}, expected one whole number")
    labels = {name: value for name, value in labels.items() if name != IGNORED}
    if any(isinstance(value, list) for value in labels.values()):
        return {}, unknown
    if all(isinstance(value, int) for value in labels.values()):
        return {value: name for name, value in labels.items()}, unknown
    return {int(value): str(name) for value, name in labels.items()}, unknown
