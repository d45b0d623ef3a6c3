"""Read every file once and report all faults together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mlbseg.data.cases import Dataset
from mlbseg.data.facts import ImageFacts, LabelFacts, image_facts, label_facts, recalled
from mlbseg.data.geometry import RESAMPLE, geometry_difference, shown
from mlbseg.data.grey import grey_fault
from mlbseg.data.known import count_unknown, looks_sparse
from mlbseg.data.readers import LABEL_BYTES, SCAN_BYTES, announced
from mlbseg.data.reading import HERE, KILLED, Reading
from mlbseg.data.remembered import Remembered
from mlbseg.errors import Fault, FaultsError, ReadError
from mlbseg.tables import data_frame
from mlbseg.types import Case, Geometry, Role

if TYPE_CHECKING:
    import pandas as pd

SPACING_FACTOR = 4.0
"""A case whose spacing is further off the median than this, on any axis, is a fault."""


@dataclass(frozen=True)
class CheckResult:
    """What `check` found.

    Attributes:
        dataset: The cases that were read, bad ones included.
        faults: What must be mended; `Fault.case_id` says which case to leave out instead.
        warnings: What may be meant.
        summary: Counts by role, sizes, spacings, channels, label values, and one entry per case; JSON-safe.
    """

    dataset: Dataset
    faults: tuple[Fault, ...]
    warnings: tuple[Fault, ...]
    summary: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Return what was found, for `--json`."""
        return {
            "faults": [fault.as_dict() for fault in self.faults],
            "warnings": [fault.as_dict() for fault in self.warnings],
            "summary": self.summary,
        }

    def to_pandas(self) -> pd.DataFrame:
        """Return a row per case: role, channels, size and spacing ((x, y, z), mm), voxels of each label value, faults.

        Raises:
            UserError: if pandas is not installed.
        """
        faults: dict[str | None, list[str]] = {}
        for fault in self.faults:
            faults.setdefault(fault.case_id, []).append(str(fault))
        return data_frame(
            {**entry, "faults": "; ".join(faults.get(entry["id"], ()))} for entry in self.summary["per_case"]
        )


@dataclass
class _Seen:
    """What is kept of a case after its pixels are gone."""

    case: Case
    image: ImageFacts | None = None
    labels: dict[int, int] = field(default_factory=dict)  # value -> voxels
    unknown: int = 0  # voxels whose class the label leaves open


def check(
    dataset: Dataset,
    *,
    labels: Sequence[int] | None = None,
    require_roles: bool = True,
    reading: Reading = HERE,
    progress: Callable[[int, int], None] | None = None,
) -> CheckResult:
    """Read each file of `dataset` once, or not at all if it is remembered; one case in a process at a time.

    Args:
        dataset: As `find_cases` returns it, or with the cases of `apply_split`: then hidden and test labels are
            not there to be read.
        labels: The label values that may occur. Without it: those that the data set names; else those of at
            least two labelled cases; else, with fewer than three labelled cases, whatever there is.
        require_roles: Whether something will be trained, so that no clean case is a fault.
        reading: In how many processes files are read, and what is remembered of them. It changes no result.
        progress: Called with (cases done, cases in all).
    """
    faults, warnings = list(dataset.faults), list(dataset.warnings)
    stated = tuple(dataset.class_names) if labels is None else labels
    seen = []
    read = reading.each(
        partial(_read_case, remembered=reading.remembered), dataset.cases,
        need=partial(_need, reading.remembered), lost=_lost, short=_is_short, progress=progress,
    )  # fmt: skip
    with closing(read):
        for case, (image, label) in zip(dataset.cases, read, strict=True):
            one = _Seen(case)
            for fault in (*_check_image(one, image), *_check_label(one, label, stated)):
                (warnings if fault.kind in _WARNINGS else faults).append(_named(fault, case, dataset.root))
            seen.append(one)
    faults += _unexpected_labels(seen, labels, dataset.class_names)
    faults += _same_images(seen)
    faults += _odd_ones_out(seen)
    if require_roles:
        faults += no_clean_case(dataset.cases)
        open_ = any(one.unknown or one.case.known.classes is not None for one in seen)
        if not open_ and not any(case.role in (Role.UNLABELLED, Role.NOISY) for case in dataset.cases):
            found, remedy = "no unlabelled case", "add scans without labels to learn from them too"
            warnings.append(Fault(str(dataset.root), found, remedy=remedy, kind="roles"))
    return CheckResult(dataset, tuple(faults), tuple(warnings), _summary(dataset, seen))


def without_bad(result: CheckResult) -> Dataset:
    """Return the data set without the cases that have a fault.

    Raises:
        FaultsError: If a fault is of no single case, or no clean case remains.
    """
    rest = [fault for fault in result.faults if fault.case_id is None]
    bad = {fault.case_id for fault in result.faults}
    cases = tuple(case for case in result.dataset.cases if case.id not in bad)
    rest = rest or no_clean_case(cases)
    if rest:
        raise FaultsError(rest, str(result.dataset.root), "these remain when the bad cases are left out")
    order = tuple(name for name in result.dataset.order if name not in bad)
    return replace(result.dataset, cases=cases, order=order, faults=())


def unknown_values(result: CheckResult, clean: Collection[str]) -> tuple[Fault, ...]:
    """Return a fault for each case whose label holds a value that no label of the cases `clean` holds.

    Where nothing else names the classes, the clean training labels do: another label cannot add one.
    """
    held = {entry["id"]: {int(value) for value in entry["labels"]} for entry in result.summary["per_case"]}
    known = {0}.union(*(held[name] for name in clean))
    return tuple(
        Fault(
            name,
            f"label values {_set(values)}",
            f"{_set(known)} as in the clean labels",
            _values_remedy(known | values),
            name,
            "labels",
        )
        for name, values in held.items()
        if not values <= known
    )


def no_clean_case(cases: Sequence[Case]) -> list[Fault]:
    """Return the fault that no case is clean, if it is so."""
    if any(case.role is Role.CLEAN for case in cases):
        return []
    found, remedy = f"no clean case among {len(cases)}", "label at least one scan with care"
    return [Fault("data set", found, "at least one scan with a label", remedy, kind="roles")]


_WARNINGS = ("constant-channel", "empty-label", "note", "sparse", "scribbles")


_Read = tuple[ImageFacts | Fault, LabelFacts | Fault | None]
"""What is known of a case's image, and of its label, if it has one."""


def _read_case(case: Case, remembered: Remembered) -> _Read:
    image: ImageFacts | Fault
    label: LabelFacts | Fault | None = None
    try:
        image = image_facts(case.images, remembered)
    except ReadError as error:
        image = error.fault
    if case.label is not None:
        try:
            label = label_facts(case.label, remembered)
        except ReadError as error:
            label = error.fault
    return image, label


def _need(remembered: Remembered, case: Case) -> int:
    """Return the memory that a case takes, bytes; what is remembered takes none."""
    image = label = 0
    if recalled(ImageFacts, case.images, remembered) is None:
        image = sum(announced(path) for path in case.images)
    if case.label is not None and recalled(LabelFacts, [case.label], remembered) is None:
        label = announced(case.label, label=True)
    return max(SCAN_BYTES * image, LABEL_BYTES * label)  # one after the other


def _lost(case: Case) -> _Read:
    remedy = "use a machine with more memory, or leave the scan out"
    return Fault(_files(case.images), KILLED, remedy=remedy, kind="memory"), None


def _is_short(read: _Read) -> bool:
    return any(isinstance(part, Fault) and part.kind == "memory" for part in read)


def _check_image(one: _Seen, image: ImageFacts | Fault) -> Iterable[Fault]:
    name = _files(one.case.images)
    if isinstance(image, Fault):
        yield image
        return
    for note in image.notes:
        yield Fault(name, note, kind="note")
    one.image = image
    if image.odd:
        found = f"{image.odd} values are NaN or infinite"
        yield Fault(name, found, "finite values", "export the scan again", kind="nan")
    elif len(image.constant) == image.channels:
        found = f"every pixel is {image.constant[0][1]:g}"
        yield Fault(name, found, "an image", "export the scan again", kind="constant")
    elif image.constant:
        found = f"channel {image.constant[0][0]} is constant"
        yield Fault(name, found, "an image in each channel", kind="constant-channel")


def _check_label(one: _Seen, label: LabelFacts | Fault | None, stated: Collection[int]) -> Iterable[Fault]:
    if label is None:
        return
    if isinstance(label, Fault):
        yield label
        return
    name = str(one.case.label)
    # Greys that are all stated are meant.
    if label.greys and not set(label.values) <= {0, *stated}:
        yield grey_fault(name, label.greys)
    else:  # greys are no values that other labels could be compared with
        _count(one, label)
        if not one.labels:
            yield Fault(
                name,
                f"every voxel is {one.case.known.ignore}, which stands for not known",
                "some known voxels",
                "draw them, or remove the file: then the case counts as unlabelled",
                kind="all-unknown",
            )
    if one.image and (difference := geometry_difference(label.geometry, one.image.geometry)):
        found, expected = difference
        yield Fault(name, found, f"{expected} as its image", RESAMPLE, kind="geometry")
    yield from _ask(one, label, name)
    # Of a label that leaves voxels open, the structure may lie there.
    if set(one.labels) == {0} and not one.unknown and not one.case.may_be_empty:
        # A slice or a test scan may well lack the structure; a whole scan labelled with care should not.
        may_be = one.case.role is Role.TEST or label.geometry.ndim == 2
        remedy = (
            ""
            if may_be
            else "draw it; or remove the file: then the case counts as unlabelled; or, if there is nothing to find in "
            "the scan, say so with --allow-empty or the column empty of a list"
        )
        yield Fault(
            name, "only background", "a structure", remedy, kind="empty-label" if may_be else "background"
        )


def _count(one: _Seen, label: LabelFacts) -> None:
    """Count the known voxels of each value, and those that do not tell their class."""
    known = one.case.known
    one.labels = dict(label.values)
    one.unknown = count_unknown(one.labels, label.slices, known)
    if known.ignore is not None:
        one.labels.pop(known.ignore, None)
    if (known.sparse or known.every is not None) and one.unknown and 0 in one.labels:
        one.labels[0] -= min(one.labels[0], one.unknown)
    if label.covers_part and one.image is not None:
        outside = math.prod(one.image.geometry.size) - math.prod(label.geometry.size)
        if known.cropped:
            one.unknown += outside
        else:
            one.labels[0] = one.labels.get(0, 0) + outside


def _ask(one: _Seen, label: LabelFacts, name: str) -> Iterable[Fault]:
    """Ask, in a note, about labels that look as if they were drawn in places; nothing is decided by itself."""
    known, slices = one.case.known, label.slices
    open_ = known.ignore is not None and known.ignore in label.values
    if looks_sparse(slices) and not known.sparse and not open_ and slices is not None:
        yield Fault(
            name,
            f"{slices.drawn} of {slices.total} slices drawn",
            "",
            "if the others were not looked at, say --sparse (or the column sparse of a list): they are unknown then; "
            "now they are background",
            kind="sparse",
        )
    total = sum(label.values.values())
    most = max(label.values, key=label.values.__getitem__)
    if most and most != known.ignore and 2 * label.values[most] > total and len(label.values) > 2:
        share = f"{label.values[most] / total:.3g} of the voxels have the label value {most}"
        remedy = f"if it stands for not drawn, say --ignore {most}; now it is a class"
        yield Fault(name, share, "", remedy, kind="scribbles")
    if known.classes is not None and (others := set(one.labels) - {0, *known.classes}):
        yield Fault(
            name,
            f"label values {_set(others)}",
            f"{_set({0, *known.classes})} as its classes say",
            "correct the label, or add them to its classes",
            kind="classes",
        )


def _files(paths: Sequence[Path]) -> str:
    return str(paths[0]) if len(paths) == 1 else f"{paths[0]} and its channels"


def _named(fault: Fault, case: Case, root: Path) -> Fault:
    """Name the file as the user sees it from the data set's folder, and the case."""
    where = fault.where.removeprefix(f"{root}/")
    return replace(fault, where=where, case_id=case.id)


def _unexpected_labels(
    seen: Sequence[_Seen], given: Sequence[int] | None, names: dict[int, str]
) -> Iterable[Fault]:
    labelled = [one for one in seen if one.labels]
    if given is not None:
        expected = {0, *given}
    elif names:
        expected = {0, *names}
    elif len(labelled) < 3:
        expected = {value for one in labelled for value in one.labels if value >= 0}
    else:
        cases = Counter(value for one in labelled for value in one.labels if value >= 0)
        expected = {value for value, n in cases.items() if n >= 2}
    for one in labelled:
        if not set(one.labels) <= expected:
            found, wanted = f"label values {_set(one.labels)}", _set(expected)
            remedy = _values_remedy({*expected, *one.labels})
            yield Fault(one.case.id, found, wanted, remedy, one.case.id, "labels")


def _values_remedy(values: Iterable[int]) -> str:
    usable = [value for value in sorted(values) if value >= 0]
    if len(usable) > 12:
        return "correct the label, or state all values that may occur with --labels"
    return f"correct the label, or state all values that may occur: --labels {','.join(map(str, usable))}"


def _set(values: Iterable[int], most: int = 12) -> str:
    ordered = sorted(values)
    more = f", ... {len(ordered) - most} more" if len(ordered) > most else ""
    return "{" + ", ".join(map(str, ordered[:most])) + more + "}"


def _same_images(seen: Sequence[_Seen]) -> Iterable[Fault]:
    """Find one scan under two names: it could be trained on and tested on at once."""
    first: dict[str, str] = {}
    for one in seen:
        other = first.setdefault(one.image.digest, one.case.id) if one.image else one.case.id
        if other != one.case.id:
            remedy = "remove one of them"
            yield Fault(
                one.case.id, f"the same image as {other}", "another scan", remedy, one.case.id, "identical"
            )


def _odd_ones_out(seen: Sequence[_Seen]) -> Iterable[Fault]:
    """Compare each case with the rest: number of axes, of channels, spacing."""
    read = [(one.case.id, one.image) for one in seen if one.image]
    for value, name, kind in ((_ndim, "axes", "dimension"), (lambda i: i.channels, "channels", "channels")):
        counts = Counter(value(image) for _, image in read)
        for case, image in read:
            if value(image) != (usual := counts.most_common(1)[0][0]):
                found, expected = f"an image of {value(image)} {name}", f"{usual} as in most cases"
                yield Fault(case, found, expected, "use scans of one kind", case, kind)
    for ndim in (2, 3):
        group = [(case, _patient_spacing(image.geometry)) for case, image in read if _ndim(image) == ndim]
        if len(group) < 3:
            continue  # of two, none is the odd one
        median = np.median([spacing for _, spacing in group], axis=0)
        for name, spacing in group:
            if np.abs(np.log(spacing / median)).max() > np.log(SPACING_FACTOR):
                found, expected = f"spacing {shown(spacing.tolist())} mm", f"about {shown(median.tolist())}"
                remedy = "correct the header, or leave the case out"
                yield Fault(name, found, expected, remedy, name, "spacing")


def _ndim(image: ImageFacts) -> int:
    return image.geometry.ndim


def _patient_spacing(geometry: Geometry) -> npt.NDArray[np.float64]:
    """Return the spacing along the patient's axes, so that sagittal and axial scans compare."""
    direction = np.abs(np.reshape(geometry.direction, (geometry.ndim, geometry.ndim)))
    nearest_axis = direction.argmax(axis=0)
    spacing = np.array(geometry.spacing, dtype=float)
    if len(set(nearest_axis.tolist())) < geometry.ndim:
        return spacing  # oblique beyond naming
    return spacing[np.argsort(nearest_axis)]


def _summary(dataset: Dataset, seen: Sequence[_Seen]) -> dict[str, Any]:
    read = [one.image for one in seen if one.image]
    summary: dict[str, Any] = {
        "root": str(dataset.root),
        "layout": dataset.layout,
        "cases": len(seen),
        "roles": {role.value: sum(one.case.role is role for one in seen) for role in Role},
        "channels": sorted({image.channels for image in read}),
        "labels": {
            str(value): sum(value in one.labels for one in seen)
            for value in sorted({value for one in seen for value in one.labels})
        },
        "patients": None if dataset.patients is None else dataset.patients.summary(),
        "unknown": sum(one.unknown > 0 for one in seen),
        "known_share": _known_share(seen),
        "partly_labelled": sum(one.case.known.classes is not None for one in seen),
        "class_names": {str(value): name for value, name in dataset.class_names.items()},
        "per_case": [_entry(one) for one in seen],
    }
    for name in ("size", "spacing"):
        for ndim in (2, 3):
            rows = [getattr(image.geometry, name) for image in read if _ndim(image) == ndim]
            if rows:
                table = np.array(rows, dtype=float)
                summary.setdefault(name, {})[f"{ndim}D"] = {
                    "min": table.min(0).tolist(),
                    "median": np.median(table, 0).tolist(),
                    "max": table.max(0).tolist(),
                }
    return summary


def _known_share(seen: Sequence[_Seen]) -> float | None:
    """Return the share of known voxels in the labels that leave some open; None without such labels."""
    partly = [one for one in seen if one.unknown]
    known = sum(sum(one.labels.values()) for one in partly)
    return known / (known + sum(one.unknown for one in partly)) if partly else None


def _entry(one: _Seen) -> dict[str, Any]:
    return {
        "id": one.case.id,
        "role": one.case.role.value,
        "channels": one.image.channels if one.image else 0,
        "size": list(one.image.geometry.size) if one.image else None,
        "spacing": list(one.image.geometry.spacing) if one.image else None,
        "labels": {str(value): count for value, count in one.labels.items()},
        "unknown": one.unknown,
        "classes": None if one.case.known.classes is None else list(one.case.known.classes),
    }
