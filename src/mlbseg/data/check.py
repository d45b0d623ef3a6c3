"""Read every file once and report all faults together."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mlbseg.data.cases import Dataset
from mlbseg.data.geometry import RESAMPLE, geometry_difference, shown
from mlbseg.data.grey import find_greys, grey_fault, value_counts
from mlbseg.data.readers import read_label, read_scan
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
    geometry: Geometry | None = None
    channels: int = 0
    digest: str = ""
    labels: dict[int, int] = field(default_factory=dict)  # value -> voxels
    unknown: int = 0  # voxels whose class the label leaves open


def check(
    dataset: Dataset,
    *,
    labels: Sequence[int] | None = None,
    require_roles: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> CheckResult:
    """Read each file of `dataset` once, one case in memory at a time.

    Args:
        dataset: As `find_cases` returns it, or with the cases of `apply_split`: then hidden and test labels are
            not there to be read.
        labels: The label values that may occur. Without it: those that the data set names; else those of at
            least two labelled cases; else, with fewer than three labelled cases, whatever there is.
        require_roles: Whether something will be trained, so that no clean case is a fault.
        progress: Called with (cases done, cases in all).
    """
    faults, warnings = list(dataset.faults), list(dataset.warnings)
    stated = tuple(dataset.class_names) if labels is None else labels
    seen = []
    for done, case in enumerate(dataset.cases, 1):
        one = _Seen(case)
        for fault in (*_check_image(one), *_check_label(one, stated)):
            (warnings if fault.kind in _WARNINGS else faults).append(_named(fault, case, dataset.root))
        seen.append(one)
        if progress:
            progress(done, len(dataset.cases))
    faults += _unexpected_labels(seen, labels, dataset.class_names)
    faults += _same_images(seen)
    faults += _odd_ones_out(seen)
    if require_roles:
        faults += no_clean_case(dataset.cases)
        if not any(case.role in (Role.UNLABELLED, Role.NOISY) for case in dataset.cases):
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


_WARNINGS = ("constant-channel", "empty-label", "note")


def _check_image(one: _Seen) -> Iterable[Fault]:
    name = _files(one.case.images)
    try:
        scan = read_scan(one.case.images)
    except ReadError as error:
        yield error.fault
        return
    for note in scan.notes:
        yield Fault(name, note, kind="note")
    one.geometry, one.channels = scan.geometry, len(scan.array)
    one.digest = hashlib.blake2b(scan.array.data.cast("B"), digest_size=16).hexdigest() + str(
        scan.array.shape
    )
    finite = int(np.isfinite(scan.array).sum())
    if finite < scan.array.size:
        found = f"{scan.array.size - finite} values are NaN or infinite"
        yield Fault(name, found, "finite values", "export the scan again", kind="nan")
        return
    constant = [i for i, channel in enumerate(scan.array) if channel.min() == channel.max()]
    if len(constant) == one.channels:
        found = f"every pixel is {scan.array.flat[0]:g}"
        yield Fault(name, found, "an image", "export the scan again", kind="constant")
    elif constant:
        found = f"channel {constant[0]} is constant"
        yield Fault(name, found, "an image in each channel", kind="constant-channel")


def _check_label(one: _Seen, stated: Collection[int]) -> Iterable[Fault]:
    if one.case.label is None:
        return
    name = str(one.case.label)
    try:
        array, geometry = read_label(one.case.label)
    except ReadError as error:
        yield error.fault
        return
    if greys := find_greys(array, stated):
        yield grey_fault(name, greys)
    else:  # greys are no values that other labels could be compared with
        one.labels = _histogram(array)
        one.unknown = one.labels.pop(one.case.unknown, 0) if one.case.unknown is not None else 0
        if not one.labels:
            yield Fault(
                name,
                f"every voxel is {one.case.unknown}, which stands for not known",
                "some known voxels",
                "draw them, or remove the file: then the case counts as unlabelled",
                kind="all-unknown",
            )
    if one.geometry and (difference := geometry_difference(geometry, one.geometry)):
        found, expected = difference
        yield Fault(name, found, f"{expected} as its image", RESAMPLE, kind="geometry")
    # Of a label that leaves voxels open, the structure may lie there.
    if set(one.labels) == {0} and not one.unknown and not one.case.may_be_empty:
        # A slice or a test scan may well lack the structure; a whole scan labelled with care should not.
        may_be = one.case.role is Role.TEST or geometry.ndim == 2
        remedy = (
            ""
            if may_be
            else "draw it; or remove the file: then the case counts as unlabelled; or, if there is nothing to find in "
            "the scan, say so with --allow-empty or the column empty of a list"
        )
        yield Fault(
            name, "only background", "a structure", remedy, kind="empty-label" if may_be else "background"
        )


def _histogram(array: npt.NDArray[np.int32]) -> dict[int, int]:
    return dict(zip(*(part.tolist() for part in value_counts(array)), strict=True))


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
        other = first.setdefault(one.digest, one.case.id) if one.digest else one.case.id
        if other != one.case.id:
            remedy = "remove one of them"
            yield Fault(
                one.case.id, f"the same image as {other}", "another scan", remedy, one.case.id, "identical"
            )


def _odd_ones_out(seen: Sequence[_Seen]) -> Iterable[Fault]:
    """Compare each case with the rest: number of axes, of channels, spacing."""
    for value, name, kind in ((_ndim, "axes", "dimension"), (lambda o: o.channels, "channels", "channels")):
        counts = Counter(value(one) for one in seen if one.geometry)
        for one in seen:
            if one.geometry and value(one) != (usual := counts.most_common(1)[0][0]):
                found, expected = f"an image of {value(one)} {name}", f"{usual} as in most cases"
                yield Fault(one.case.id, found, expected, "use scans of one kind", one.case.id, kind)
    for ndim in (2, 3):
        group = [
            (one.case.id, _patient_spacing(one.geometry))
            for one in seen
            if one.geometry and _ndim(one) == ndim
        ]
        if len(group) < 3:
            continue  # of two, none is the odd one
        median = np.median([spacing for _, spacing in group], axis=0)
        for name, spacing in group:
            if np.abs(np.log(spacing / median)).max() > np.log(SPACING_FACTOR):
                found, expected = f"spacing {shown(spacing.tolist())} mm", f"about {shown(median.tolist())}"
                remedy = "correct the header, or leave the case out"
                yield Fault(name, found, expected, remedy, name, "spacing")


def _ndim(one: _Seen) -> int:
    return one.geometry.ndim if one.geometry else 0


def _patient_spacing(geometry: Geometry) -> npt.NDArray[np.float64]:
    """Return the spacing along the patient's axes, so that sagittal and axial scans compare."""
    direction = np.abs(np.reshape(geometry.direction, (geometry.ndim, geometry.ndim)))
    nearest_axis = direction.argmax(axis=0)
    spacing = np.array(geometry.spacing, dtype=float)
    if len(set(nearest_axis.tolist())) < geometry.ndim:
        return spacing  # oblique beyond naming
    return spacing[np.argsort(nearest_axis)]


def _summary(dataset: Dataset, seen: Sequence[_Seen]) -> dict[str, Any]:
    read = [(one, one.geometry) for one in seen if one.geometry]
    summary: dict[str, Any] = {
        "root": str(dataset.root),
        "layout": dataset.layout,
        "cases": len(seen),
        "roles": {role.value: sum(one.case.role is role for one in seen) for role in Role},
        "channels": sorted({one.channels for one, _ in read}),
        "labels": {
            str(value): sum(value in one.labels for one in seen)
            for value in sorted({value for one in seen for value in one.labels})
        },
        "patients": None if dataset.patients is None else dataset.patients.summary(),
        "unknown": sum(one.unknown > 0 for one in seen),
        "class_names": {str(value): name for value, name in dataset.class_names.items()},
        "per_case": [_entry(one) for one in seen],
    }
    for name in ("size", "spacing"):
        for ndim in (2, 3):
            rows = [getattr(geometry, name) for _, geometry in read if geometry.ndim == ndim]
            if rows:
                table = np.array(rows, dtype=float)
                summary.setdefault(name, {})[f"{ndim}D"] = {
                    "min": table.min(0).tolist(),
                    "median": np.median(table, 0).tolist(),
                    "max": table.max(0).tolist(),
                }
    return summary


def _entry(one: _Seen) -> dict[str, Any]:
    return {
        "id": one.case.id,
        "role": one.case.role.value,
        "channels": one.channels,
        "size": list(one.geometry.size) if one.geometry else None,
        "spacing": list(one.geometry.spacing) if one.geometry else None,
        "labels": {str(value): count for value, count in one.labels.items()},
        "unknown": one.unknown,
    }
