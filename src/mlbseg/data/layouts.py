"""The folder layouts that are recognised without a configuration: from names on disk to cases.

Nothing is read here but names, `dataset.json` and the two lists; whether a scan is readable, `check` says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from mlbseg.data.bids import find_bids
from mlbseg.data.dicom_folders import is_dicom_name, loose_scans, named_scans, pass_over, series_in
from mlbseg.data.formats import hdf5
from mlbseg.data.formats.dicom import slice_files
from mlbseg.data.formats.slicer import ENDING
from mlbseg.data.places import SYSTEM_FOLDERS, entries, is_file, is_folder, is_special, unusable
from mlbseg.data.readers import SUFFIXES, is_hdf5, plain, stem, suffix
from mlbseg.data.records import parse_json, read_text, validate
from mlbseg.data.unread import LABEL_ENDINGS, SEGMENTATION, judged, label_ending, note, unread
from mlbseg.errors import Fault, FaultsError, UserError, brief
from mlbseg.types import Case, Role

LONGEST_ID = 255 - len("_disagreement.nii.gz")
"""Bytes. File systems take names of 255, and no output has a longer ending than a map of disagreement."""

MOST_VALUE = 2**31 - 1
"""The largest label value."""

_LABELS: TypeAdapter[dict[str, int | str | list[int]]] = TypeAdapter(dict[str, int | str | list[int]])
_CHANNEL = re.compile(r"(.+)_(\d{4})")
IGNORED = "ignore"
"""nnU-Net's name for the label value of voxels that are not labelled."""


@dataclass(frozen=True)
class _Description:
    """What is used of a dataset.json; the rest is not looked at."""

    labels: dict[str, Any] | None = None
    file_ending: str | None = None


@dataclass
class Found:
    """What a layout yields: cases, what is wrong with the names of images and of labels, patients that are named."""

    layout: str
    cases: list[Case] = field(default_factory=list)
    class_names: dict[int, str] = field(default_factory=dict)
    unknown: int | None = None
    faults: list[Fault] = field(default_factory=list)
    label_faults: list[Fault] = field(default_factory=list)
    warnings: list[Fault] = field(default_factory=list)
    label_notes: list[Fault] = field(default_factory=list)  # of no concern to prediction
    unread: list[Path] = field(default_factory=list)  # files beside the scans that are none
    patients: dict[str, str] = field(default_factory=dict)
    classes: dict[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # that were drawn, by case, as they were written
    _by_id: dict[str, Case] = field(default_factory=dict)

    def judge_unread(self) -> None:
        """Say what the files that are no scans are, when all cases and labels are known."""
        orphans = {fault.case_id or "" for fault in self.label_faults if fault.kind == "orphan"}
        faults, notes = judged(self.unread, self.cases, orphans)
        explained = {fault.case_id for fault in faults} & orphans
        self.label_faults = [
            fault
            for fault in self.label_faults
            if not (fault.kind == "orphan" and fault.case_id in explained)
        ]
        self.label_faults += faults
        self.warnings += notes

    def add(self, case: Case) -> None:
        """Take a case, or say why its name cannot be used."""
        case = replace(case, id=plain(case.id))
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
    if (length := len(name.encode())) > LONGEST_ID:
        return f"a name of {length} bytes, of which {LONGEST_ID} are the most that outputs can be named after"
    return ""


def recognise(root: Path) -> Found | None:
    """Return the cases of the first layout that `root` has, or None."""
    names = {p.name for p in entries(root)}
    if "imagesTr" in names:
        return _paired(root, "imagesTr", "labelsTr")
    if "images" in names:
        return _paired(root, "images", "labels")
    return _beside(root) or _left_atrium(root) or _bids(root)


def bare(root: Path, channels: int | None = None) -> Found:
    """Return every scan directly in `root`, without labels, and the DICOM series in it and in the folders below.

    Files numbered as nnU-Net numbers channels are joined if that gives every case `channels` files (any number
    when None); else they are what numbered exports are, a scan each.
    """
    found = Found("a folder of scans")
    listed = _scans(root, found)
    scans = [p for p in listed if suffix(p) and not is_dicom_name(p)]
    folders = series_in(root, [p for p in listed if p.is_dir()], found.warnings)
    try:
        loose, others = loose_scans(root, alone=not (scans or folders))
        named = set(slice_files(root))  # many DICOM files have no ending
    except OSError as error:
        raise UserError(f"{root}: cannot be listed ({error.strerror})") from None
    pass_over(others, root, found.warnings)
    found.warnings += [note(path, folder=False) for path in found.unread if path not in named]
    found.warnings += [
        Fault(f"{path.name}/", "a folder without scans, ignored", kind="ignored")
        for path in listed
        if path.is_dir() and not any(place.is_relative_to(path) for _, place in folders)
    ]
    for name, path in [*folders, *((p.resolve().name, p) for p in loose if p == root)]:
        found.add(Case(name, (path,)))
    scans += [path for path in loose if path != root]
    joined = replace(found, cases=[*found.cases], faults=[*found.faults], _by_id={**found._by_id})
    groups = _channels(scans, joined) if _look_like_channels(scans) else {}
    fits = joined.faults == found.faults and all(len(images) == channels for images in groups.values())
    if groups and (fits or channels is None):
        for name, images in groups.items():
            joined.add(Case(name, tuple(images)))
        return joined
    for path in scans:
        found.add(Case(stem(path), (path,)))
    return found


def read_list(path: Path) -> tuple[str, ...]:
    """Return the case ids in a list, one a line, a scan's ending dropped; () if there is no such file."""
    if not _present(path):
        return ()
    try:
        if odd := unusable(path):
            raise UserError(f"{path}: {odd}, expected a file with one case id a line")
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error}); write one case id a line") from None
    return tuple(stem(Path(line.strip())) for line in lines if line.strip())


def _paired(root: Path, images: str, labels: str) -> Found:
    """`images/` + `labels/` by stem, the Decathlon's folders, or nnU-Net's with one file per channel."""
    found = Found(f"{images}/ + {labels}/")
    description = _description(root, found) if images == "imagesTr" else _Description()
    ending = description.file_ending
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
    found.label_notes += _other_folders(root, {images, labels})
    found.judge_unread()
    if not (found.cases or found.faults or found.label_faults):
        raise UserError(f"{root / images}: no scans in it; expected files ending in {' '.join(SUFFIXES)}")
    return found


def _other_folders(root: Path, known: set[str]) -> list[Fault]:
    """Name the folders beside images without a folder of labels: what is in them may be meant as labels."""
    if any(_present(root / name) for name in known if name.startswith("labels")):
        return []
    expected, remedy = "labels in a folder of this name", "rename it if it holds the labels"
    label = next(name for name in known if name.startswith("labels"))
    return [
        Fault(f"{path.name}/", "ignored", f"{expected}: {label}", remedy, kind="ignored")
        for path in entries(root)
        if is_folder(path) and not path.name.startswith(("images", "labels"))
    ]


def _beside(root: Path) -> Found | None:
    """`NAME.nii.gz` beside `NAME_seg.nii.gz`, or with another of `LABEL_ENDINGS`, the same for all."""
    found = Found("")
    scans = [p for p in _scans(root, found) if suffix(p)]
    names = {stem(p) for p in scans}
    found_endings = {label_ending(name, names) for name in names}
    used = [ending for ending in LABEL_ENDINGS if ending in found_endings]
    if not used:
        return None
    ending = used[0]
    found.layout = "PROMISE12" if ending == SEGMENTATION else f"NAME + NAME{ending}"
    labels = {stem(p).removesuffix(ending): p for p in scans if stem(p).endswith(ending)}
    for other in used[1:]:
        for path in [p for p in scans if stem(p).endswith(other)]:
            name, remedy = stem(path).removesuffix(other), "keep one kind, or write a list of cases"
            found.label_faults.append(
                Fault(
                    path.name,
                    f"a label of a second kind, beside {ending}",
                    "one kind",
                    remedy,
                    name,
                    "duplicate",
                )
            )
            scans.remove(path)
    _collect(found, [p for p in scans if p not in labels.values()], labels, False, lambda _: Role.CLEAN)
    found.judge_unread()
    return found


def _bids(root: Path) -> Found | None:
    """`sub-*/[ses-*/]anat/`, labels under `derivatives/`."""
    bids = find_bids(root)
    if bids is None:
        return None
    found = Found("BIDS", class_names=bids.class_names, faults=bids.faults)
    found.label_faults, found.warnings = bids.label_faults, bids.notes
    if len(bids.channels) > 1:
        what = f"{', '.join(bids.channels)} are the channels of each case"
        found.warnings.append(Fault("anat/", what, remedy="a list of cases says otherwise", kind="channels"))
    for case in bids.cases:
        found.add(case)
    return found


def _left_atrium(root: Path) -> Found | None:
    """`NAME/mri_norm2.h5`, which holds image and label."""
    found = Found("Left Atrium HDF5")
    files = [p / "mri_norm2.h5" for p in _scans(root, found) if is_file(p / "mri_norm2.h5")]
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
    pairs = (
        list(groups.items())
        if groups
        else [(name, [p]) for name, p in named_scans(scans, labels, found.faults, found.warnings)]
    )
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
    """Return the scan files and the folders in `folder`; what is neither is named in a warning, or kept to be judged.

    A broken link with the name of a scan is among them: it stands for a scan that is lost.
    """
    listed = []
    for path in entries(folder):
        if path.name.lower().endswith(ENDING) and not folder.name.startswith("labels"):
            what = "a segmentation of 3D Slicer's and no scan, ignored"
            found.warnings.append(Fault(f"{folder.name}/{path.name}", what, kind="ignored"))
        elif odd := _passed_over(path):
            found.warnings.append(odd)
        else:
            listed.append(path)
    found.unread += unread(listed)
    return [path for path in listed if suffix(path) or is_folder(path)]


def _passed_over(path: Path) -> Fault | None:
    """Return the note on what is never opened, or None; a lost scan is not one that is passed over."""
    odd = SYSTEM_FOLDERS.get(path.name) or unusable(path)
    if not odd or (suffix(path) and path.is_symlink() and not is_special(path)):
        return None
    return Fault(f"{path.parent.name}/{path.name}", f"{odd}, ignored", kind="ignored")


def _present(folder: Path) -> bool:
    return (
        folder.is_symlink() or folder.exists()
    )  # a broken link is present: it must fail, not be passed over


def _by_stem(folder: Path, found: Found) -> dict[str, Path]:
    labels: dict[str, Path] = {}
    if not _present(folder):
        return labels
    for path in entries(folder):
        if suffix(path) and is_special(path):  # ignored, it would make its case one without a label
            fault = Fault(
                f"{folder.name}/{path.name}", unusable(path), "a label file", "remove it", stem(path), "label"
            )
            found.label_faults.append(fault)
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


def _description(root: Path, found: Found) -> _Description:
    """Read what `dataset.json` says beyond the folders: the names of the classes and the file ending."""
    path = root / "dataset.json"
    if not _present(path):
        return _Description()
    try:
        if odd := unusable(path):
            raise ValueError(odd)
        described = parse_json(read_text(path))
        description = validate(TypeAdapter(_Description), described, "dataset.json")
        found.class_names, found.unknown = declared_labels(description.labels or {})
    except (OSError, ValueError, UserError) as error:
        said = str(error).replace("\n", "; ")
        fault = Fault(
            "dataset.json", f"cannot be used ({said})", "a JSON object with labels", "mend or remove it"
        )
        found.faults.append(fault)
        return _Description()
    return description


def declared_unknown(*folders: Path) -> int | None:
    """Return the value that the `dataset.json` of the first folder that has one calls ``ignore``; None without one.

    Raises:
        FaultsError: If the file cannot be used.
    """
    for folder in folders:
        if (folder / "dataset.json").exists():
            found = Found("")
            _description(folder, found)
            if found.faults:
                raise FaultsError(found.faults, str(folder))
            return found.unknown
    return None


def declared_labels(labels: Mapping[str, Any]) -> tuple[dict[int, str], int | None]:
    """Read ``labels`` of a `dataset.json`: the Decathlon's ``{"0": "background"}`` or nnU-Net's ``{"background": 0}``.

    Returns:
        Value -> name, and the value that nnU-Net calls ``ignore``, which names no class; None if there is none.
        nnU-Net's regions (a list of values under one name) name no single value: then there are no names.

    Raises:
        UserError: A value or a name is neither text nor a whole number.
        ValueError: A value is none that a label can have.
    """
    checked = validate(_LABELS, dict(labels), "labels")
    unknown = checked.pop(IGNORED, None)
    if unknown is not None and not isinstance(unknown, int):
        raise ValueError(f"the label {IGNORED!r} is {brief(unknown)}, expected one whole number")
    by_name = {name: value for name, value in checked.items() if isinstance(value, int)}
    if any(isinstance(value, list) for value in checked.values()):
        names = {}
    elif len(by_name) == len(checked):
        names = {value: name for name, value in by_name.items()}
    else:
        if wrong := [value for value in checked if not re.fullmatch(r"-?\d{1,18}", value)]:
            raise ValueError(f"label value {brief(wrong[0])} is no whole number")
        names = {int(value): str(name) for value, name in checked.items() if name != IGNORED}
        unknown = next((int(value) for value, name in checked.items() if name == IGNORED), unknown)
    declared = [*names, *([] if unknown is None else [unknown])]
    if outside := [value for value in declared if not 0 <= value <= MOST_VALUE]:
        raise ValueError(f"label value {brief(outside[0])}, expected 0 to {MOST_VALUE}")
    return names, unknown
