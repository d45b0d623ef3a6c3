"""From a folder of scans (or a datalist) to cases with roles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field

from mlbseg.data import layouts
from mlbseg.data.datalist import CLASSES, folder_has_classes, read_classes, read_datalist
from mlbseg.data.formats.dicom import is_dicom
from mlbseg.data.layouts import Found
from mlbseg.data.patients import Patients, find_patients
from mlbseg.data.places import entries, is_file, is_folder, unusable
from mlbseg.data.readers import SUFFIXES, is_scan_file, segment_names, stem
from mlbseg.errors import Fault, FaultsError, UserError
from mlbseg.types import Case, Known, Role

_LAYOUTS = """recognised are:
  images/NAME.nii.gz + labels/NAME.nii.gz        no label means unlabelled; also labels_noisy/, images_test/
  imagesTr/ + labelsTr/ (+ imagesTs/)            Medical Segmentation Decathlon, nnU-Net v2 (NAME_0000.nii.gz)
  NAME.mhd + NAME_segmentation.mhd               PROMISE12
  NAME.nii.gz + NAME_seg.nii.gz                  or _label, _labels, _mask, _gt: side by side
  NAME/mri_norm2.h5                              Left Atrium HDF5
  sub-*/[ses-*/]anat/ + derivatives/             BIDS: labels end in _dseg or _mask
  images/NAME/*.dcm + labels/NAME.nii.gz         one DICOM series per case, in NAME or a folder below it
  images/NAME.dcm + labels/NAME.png              2D DICOM images; a file of many frames has labels/NAME.nii.gz
  cases.csv or cases.json                        a datalist: id, image, label, role, ... (see docs/labels.md)
  classes.csv beside any of these                which classes were drawn in a case, if not all: id, classes"""


@dataclass(frozen=True)
class LabelOptions:
    """What the user says of all labels of a data set; a list may say other things of single cases.

    Attributes:
        ignore: The value that stands for "not known here", where neither the data nor a list names one.
        sparse: Slices without a drawn voxel are not known.
        cropped: What a cropped segmentation of 3D Slicer does not cover is not known.
        allow_empty: Labels without any structure are meant: there is nothing to find in these scans.
        every: For experiments: of each clean training label only one slice in so many is kept (`apply_split`).
    """

    ignore: int | None = None
    sparse: bool = False
    cropped: bool = False
    allow_empty: bool = False
    every: Annotated[int, Field(ge=2)] | None = None

    def given(self) -> list[str]:
        """Return the names of what is said."""
        return [field.name for field in fields(self) if getattr(self, field.name) != field.default]


AS_DRAWN = LabelOptions()
"""Every voxel of a label is what it says, and one without a structure is a fault."""


@dataclass(frozen=True)
class Scans:
    """The scans that were found to predict.

    Attributes:
        cases: Sorted by id, without labels.
        faults: What is wrong with the names of other scans, which are not among the cases.
        notes: What was passed over, a note for each file.
    """

    cases: tuple[Case, ...]
    faults: tuple[Fault, ...] = ()
    notes: tuple[Fault, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """The cases that were found.

    Attributes:
        root: The folder that the paths lie in (a datalist's own folder).
        layout: The name of the layout that was recognised.
        cases: Sorted by id.
        class_names: Label value -> name, where the data says so; else empty.
        order: Case ids as `train.list` has them; empty where there is none.
        faults: What is wrong with names and lists, to be reported by `check` with all else.
        warnings: What was ignored.
        listed: The patient of each case whose list names one.
        patients: How cases were joined to patients; None before `with_patients` has.
    """

    root: Path
    layout: str
    cases: tuple[Case, ...]
    class_names: dict[int, str]
    order: tuple[str, ...]
    faults: tuple[Fault, ...] = ()
    warnings: tuple[Fault, ...] = ()
    listed: Mapping[str, str] = field(default_factory=dict)
    patients: Patients | None = None


def find_cases(root: Path, options: LabelOptions = AS_DRAWN) -> Dataset:
    """Find the cases in a folder of any known layout, or in a CSV or JSON datalist.

    `test.list` gives cases the role test; `train.list` the order in which labels are kept.

    Args:
        root: Where to look.
        options: What is said of all labels.

    Raises:
        UserError: If nothing is at `root`, or nothing recognised. Faults of single cases are in the result.
    """
    _require_exists(root)
    if is_file(root):
        if root.suffix.lower() not in (".csv", ".json"):
            raise UserError(
                f"{root}: a file that is no datalist; expected a folder, or a .csv or .json datalist (of scans, give "
                "the folder that holds images/ and labels/)"
            )
        found, folder = read_datalist(root), root.parent
    else:
        recognised = layouts.recognise(root)
        if recognised is None:
            scans = len(layouts.bare(root).cases)
            hint = (
                f"; `mlbseg predict` takes its {scans} scan(s) as they are, the rest needs labels"
                if scans
                else ""
            )
            raise UserError(f"{root}: no known layout (found: {_contents(root)}{hint})\n{_LAYOUTS}")
        found, folder = recognised, root
    order = layouts.read_list(folder / "train.list") if folder == root else ()
    tests = layouts.read_list(folder / "test.list") if folder == root else ()
    cases = [case.with_role(Role.TEST) if case.id in tests else case for case in found.cases]
    faults = [*found.faults, *found.label_faults]
    names = found.class_names
    if not names:
        names, differing = _segment_names(cases)
        faults += differing
    labelled, wrong = _labelled_classes(folder, found, names)
    faults += wrong
    cases = [_with_options(case, options, found.unknown, labelled.get(case.id)) for case in cases]
    faults += [*_unknown(cases, order, "train.list"), *_unknown(cases, tests, "test.list")]
    cases.sort(key=lambda case: case.id)
    return Dataset(
        folder,
        found.layout,
        tuple(cases),
        names,
        order,
        tuple(faults),
        (*found.warnings, *found.label_notes),
        {case.id: found.patients[case.id] for case in cases if case.id in found.patients},
    )


def _segment_names(cases: Sequence[Case]) -> tuple[dict[int, str], list[Fault]]:
    """Return value -> name of the segments in labels of 3D Slicer's, and a fault for each that has other names."""
    names: dict[int, str] = {}
    first: dict[int, str] = {}
    faults = []
    for case in cases:
        for value, name in segment_names(case.label).items() if case.label is not None else ():
            if names.setdefault(value, name) != name:
                found, expected = (
                    f"segment {name!r} has the value {value}",
                    f"{names[value]!r} as in {first[value]}",
                )
                remedy = "use the same segments in the same order in all labels"
                faults.append(Fault(case.id, found, expected, remedy, case.id, "labels"))
            first.setdefault(value, case.id)
    return {0: "background", **names} if names else {}, faults


def _with_options(
    case: Case, options: LabelOptions, declared: int | None, classes: tuple[int, ...] | None
) -> Case:
    """Return a case with what its list, the data's description and the user say of its label, in this order."""
    own = case.known
    ignore = next((v for v in (own.ignore, declared, options.ignore) if v is not None), None)
    known = Known(ignore, own.sparse or options.sparse, own.cropped or options.cropped, classes)
    return replace(case, known=known, may_be_empty=case.may_be_empty or options.allow_empty)


def _labelled_classes(
    folder: Path, found: Found, names: Mapping[int, str]
) -> tuple[dict[str, tuple[int, ...]], list[Fault]]:
    """Return the label values that were drawn in each case of which that is said, and what is wrong with it."""
    values = {name: value for value, name in names.items()}
    said = found.classes
    faults: list[Fault] = []
    if folder_has_classes(folder) and found.layout != "datalist":
        said, faults = read_classes(folder)
    known = {case.id for case in found.cases}
    result: dict[str, tuple[int, ...]] = {}
    for case, words in said.items():
        chosen = [int(word) if word.isdecimal() and len(word) < 11 else values.get(word) for word in words]
        wrong = [
            word
            for word, value in zip(words, chosen, strict=True)
            if value is None or (names and value not in names)
        ]
        if case not in known:
            faults.append(
                Fault(CLASSES, f"names {case!r}", "the id of a case", "correct the file", case, "list")
            )
        elif wrong:
            expected = "values or names of classes" + (f": {', '.join(names.values())}" if names else "")
            faults.append(Fault(case, f"classes {wrong[0]!r}", expected, "correct them", case, "classes"))
        else:
            result[case] = tuple(sorted({value for value in chosen if value}))
    return result, faults


def with_patients(dataset: Dataset, pattern: str | None = None, known: Patients | None = None) -> Dataset:
    """Return the data set with the cases of each patient joined, for those who divide it.

    Args:
        dataset: As `find_cases` returns it.
        pattern: The user's regular expression; see `find_patients`.
        known: What was found before and written down, in place of looking again.

    Raises:
        UserError: The pattern is none, or does not fit the ids.
    """
    patients = known or find_patients(dataset.cases, pattern, listed=dataset.listed)
    return replace(dataset, cases=patients.join(dataset.cases), patients=patients)


def find_scans(path: Path, channels: int | None = None) -> Scans:
    """Find the scans to predict: a folder of a known layout, a bare folder of scans, a file, DICOM folders.

    Labels are ignored; every image is taken, those of imagesTs too.

    Args:
        path: Where to look.
        channels: Of each scan, where that is known: it tells the channels of one scan in a bare folder
            (`NAME_0000`, `NAME_0001`) from numbered scans.

    Raises:
        UserError: If there is no scan, or none whose name can be used. What is wrong with single names, such
            as two scans that would get the same one, is in the result.
    """
    _require_exists(path)
    if odd := unusable(path):
        raise UserError(f"{path}: {odd}, expected a folder of scans or a scan")
    if path.is_file() and path.suffix.lower() not in (".csv", ".json"):
        if not (is_scan_file(path) or is_dicom(path)):
            raise UserError(
                f"{path}: not a scan; expected a name ending in {' '.join(SUFFIXES)}, or a folder"
            )
        return Scans((Case(stem(path), (path,)),))
    if path.is_file():
        return _images_only(read_datalist(path, labels=False), path)
    return _images_only(layouts.recognise(path) or layouts.bare(path, channels), path)


def still_there(
    cases: Iterable[Case],
    names: Sequence[str],
    where: Path,
    *,
    kind: str,
    labelled: bool = False,
    faults: Iterable[Fault] = (),
) -> tuple[list[Case], list[Fault]]:
    """Look for cases that were there when their names were written down.

    Args:
        cases: What there is now.
        names: The ids of those that are looked for.
        where: What was searched, for the faults.
        kind: Of the faults.
        labelled: Whether one without its label counts as gone.
        faults: What is wrong with names there; a case that one is about is not taken, as nobody knows which is meant.

    Returns:
        Those that were found, in the order of `names`, and the faults of these names: those that are known, and one
        for each other that is gone.
    """
    by_id, wanted = {case.id: case for case in cases}, set(names)
    told = [fault for fault in faults if fault.case_id in wanted]
    faulty = {fault.case_id for fault in told}
    found = []
    for name in names:
        if name in faulty:
            continue
        case = by_id.get(name)
        if case is not None and (case.label is not None or not labelled):
            found.append(case)
        else:
            what = "scan" if case is None else "label"
            told.append(Fault(name, f"no {what} of this name in {where} any more", case_id=name, kind=kind))
    return found, told


def _images_only(found: Found, path: Path) -> Scans:
    """Drop labels, and the cases that a fault names: of two scans of one name nobody knows which is meant."""
    faulty = {fault.case_id for fault in found.faults}
    cases = [replace(case, label=None, role=Role.UNLABELLED) for case in found.cases if case.id not in faulty]
    if not cases and found.faults:
        raise FaultsError(found.faults, str(path))
    if not cases:
        raise UserError(f"{path}: no scans in it (found: {_contents(path)}); expected {' '.join(SUFFIXES)}")
    unread = [fault for fault in found.label_faults if fault.kind == "format"]
    notes = [fault for fault in [*found.warnings, *unread] if not fault.where.startswith("labels")]
    return Scans(tuple(sorted(cases, key=lambda case: case.id)), tuple(found.faults), tuple(notes))


def _require_exists(path: Path) -> None:
    try:
        path.stat()
    except (OSError, ValueError) as error:  # ValueError: a null character
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be opened ({why}); expected a folder of scans") from None


def _contents(folder: Path) -> str:
    names = [path.name + "/" * is_folder(path) for path in entries(folder)]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "nothing"


def _unknown(cases: Sequence[Case], listed: Sequence[str], where: str) -> list[Fault]:
    known = {case.id for case in cases}
    return [
        Fault(where, f"names {name!r}", "the id of a case", "correct the list", name, "list")
        for name in listed
        if name not in known
    ]
