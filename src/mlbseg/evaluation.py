"""A folder of predicted masks against a folder of reference labels: every case's scores and their summary.

Files belong together by name (`case_07.nii.gz` with `case_07.mha`). A case that cannot be scored is a fault
that is listed; it does not stop the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from mlbseg.data.geometry import Incomplete, onto
from mlbseg.data.grey import find_greys, grey_fault
from mlbseg.data.known import mark_unknown, placed, read_known
from mlbseg.data.layouts import declared_unknown
from mlbseg.data.places import is_file, is_folder
from mlbseg.data.readers import is_scan_file, read_label, stem
from mlbseg.data.unread import label_ending, passed_over
from mlbseg.errors import Fault, FaultsError, ReadError, UserError, brief, one_case
from mlbseg.files import require_free, write_table
from mlbseg.metrics import SCORE_NAMES, Scores, Summary, score_classes, summarise
from mlbseg.tables import data_frame
from mlbseg.terminal import plain
from mlbseg.types import ALL_KNOWN, NOT_KNOWN, Case, Known

if TYPE_CHECKING:
    import pandas as pd

LabelMap = npt.NDArray[np.int32]

ABSENT = Scores(
    1.0, 1.0, 0.0, 0.0, 0.0, 0.0
)  # a class that neither mask has: both empty, by the rule of `metrics`
COLUMNS = ("case", "class", "name", *SCORE_NAMES)
"""Of the CSV file."""
HEADINGS = {
    "dice": "Dice",
    "jaccard": "Jaccard",
    "hd95_mm": "95HD mm",
    "assd_mm": "ASSD mm",
    "hd95_voxels": "95HD voxels",
    "assd_voxels": "ASSD voxels",
}


@dataclass(frozen=True)
class Row:
    """The scores of one class of one case.

    Attributes:
        case: The case's name.
        value: The class's label value.
        name: The class's name.
        scores: What was measured.
    """

    case: str
    value: int
    name: str
    scores: Scores


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        classes: Label value to name, in the order of the rows.
        rows: One per case and class, cases sorted by name.
        summary: For each class, and for all under None, mean and SD of each score by name; see
            `metrics.summarise`.
        faults: Cases that were not scored, and label values that no class covers.
        not_predicted: References without a prediction.
        not_referenced: Predictions without a reference.
        notes: Files of both folders that were ignored.
        unknown: Number of unknown voxels by case, where there are any; they are not scored.
        known: How the references were read.
    """

    classes: dict[int, str]
    rows: tuple[Row, ...]
    summary: dict[int | None, dict[str, Summary]]
    faults: tuple[Fault, ...]
    not_predicted: tuple[str, ...]
    not_referenced: tuple[str, ...] = ()
    notes: tuple[Fault, ...] = ()
    unknown: dict[str, int] = field(default_factory=dict)
    known: Known = ALL_KNOWN

    @property
    def cases(self) -> tuple[str, ...]:
        """The names of the cases that were scored."""
        return tuple(dict.fromkeys(row.case for row in self.rows))

    @property
    def mean_dice(self) -> float:
        """Mean over cases of the mean Dice over classes."""
        mean = self.summary[None]["dice"].mean
        assert mean is not None  # noqa: S101 (an Evaluation has a row, and Dice is never missing)
        return mean

    def rows_as_dicts(self) -> list[dict[str, Any]]:
        """Return one row per case and class, with `COLUMNS`; a missing distance is None."""
        return [
            {"case": row.case, "class": row.value, "name": row.name, **row.scores.as_dict()}
            for row in self.rows
        ]

    def write_csv(self, path: Path) -> None:
        """Write one line per case and class, whole or not at all; a missing distance is an empty cell.

        Raises:
            UserError: If `path` cannot be written.
        """
        write_table(path, self.rows_as_dicts(), COLUMNS)

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per case and class, with `COLUMNS`; a missing distance is NaN.

        Raises:
            UserError: if pandas is not installed.
        """
        return data_frame(self.rows_as_dicts(), COLUMNS)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as lists, strings and finite numbers, for JSON."""
        return {
            "mean_dice": self.mean_dice,
            "cases": self.rows_as_dicts(),
            "summary": [
                {"class": value, "name": self._name(value), **{n: asdict(s) for n, s in scores.items()}}
                for value, scores in self.summary.items()
            ],
            "faults": [fault.as_dict() for fault in self.faults],
            "not_predicted": list(self.not_predicted),
            "not_referenced": list(self.not_referenced),
            "notes": [note.as_dict() for note in self.notes],
            "unknown": self.unknown,
        }

    def table(self) -> Table:
        """Return mean ± SD per class and over classes, with the number of cases and of missing distances."""
        table = Table("structure", *HEADINGS.values(), "cases", "no distance", title="mean ± SD over cases")
        for column in table.columns[1:]:
            column.justify = "right"
        for value, scores in self.summary.items():
            if value is None:
                if len(self.classes) == 1:
                    continue  # it would repeat the only class
                table.add_section()
            cells = [_cell(scores[name], 1 if "_" in name else 3) for name in HEADINGS]
            cases = scores["dice"].count
            table.add_row(plain(self._name(value)), *cells, str(cases), str(scores["hd95_mm"].missing))
        return table

    def _name(self, value: int | None) -> str:
        return "all classes" if value is None else self.classes[value]


def evaluate(
    predictions: str | Path | npt.NDArray[Any],
    references: str | Path | Mapping[str, Path | Case] | npt.NDArray[Any],
    *,
    spacing: Sequence[float] | None = None,
    classes: Mapping[int, str] | None = None,
    unknown: int | None = None,
    sparse: bool = False,
    outside_unknown: bool = False,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score every predicted mask that has a reference label, or one mask in memory.

    Args:
        predictions: Folder of masks, one file per case; or one mask: a file, or an array (*S) of label values.
        references: Folder of labels of the same names; `CASE_segmentation.mhd` (PROMISE12) and
            `CASE/mri_norm2.h5` (LA) count as `CASE`. Or the label files, or the cases with their labels, by name. A
            mask without a reference and a reference without a mask are listed, not scored. Of one mask its
            reference: a file of any name, or an array (*S).
        spacing: mm between voxels of arrays, in their order: (z, y, x). Files state their own.
        classes: Label value to name of the classes to score; by default every value but 0 that occurs in the
            references of the scored cases, named ``label 1`` and so on.
        unknown: The value of the references that stands for "not known here": such voxels count for nothing. When None,
            the value that a `dataset.json` in the folder of references, or beside it, calls ``ignore``.
        sparse: Slices of a reference without a labelled voxel are not known: they count for nothing.
        outside_unknown: What a cropped segmentation of 3D Slicer does not cover is not known.
        out: CSV file to write.
        overwrite: Replace an existing file.
        progress: Called after each case with the number done and the number in all.

    Returns:
        The scores, with faults for cases that could not be scored, and for values in a prediction that
        neither `classes` nor any reference has: such voxels are scored as background. The case of arrays is called
        ``array``.

    Raises:
        FaultsError: If not one case could be scored.
        UserError: If a folder is missing or holds no masks, no class can be found, arrays do not fit each other or lack
            their spacing, or `out` is there already, is no name of a table, or cannot be written.
    """
    if out is not None:
        require_free(Path(out), overwrite=overwrite, suffixes=(".csv",))
    if isinstance(predictions, np.ndarray) or isinstance(references, np.ndarray):
        result = _evaluate_arrays(predictions, references, spacing, classes, Known(unknown, sparse))
    elif spacing is not None:
        raise UserError("spacing: only arrays need one, and files state their own (leave it out)")
    else:
        known = dict(references) if isinstance(references, Mapping) else Path(references)
        how = Known(unknown, sparse, outside_unknown)
        result = _evaluate_files(Path(predictions), known, classes, how, progress)
    if out is not None:
        result.write_csv(Path(out))
    return result


def _evaluate_arrays(
    prediction: object,
    reference: object,
    spacing: Sequence[float] | None,
    classes: Mapping[int, str] | None,
    known: Known,
) -> Evaluation:
    """Score one mask in memory."""
    if not isinstance(prediction, np.ndarray) or not isinstance(reference, np.ndarray):
        raise UserError("found an array and a path, expected two arrays or two folders")
    if prediction.shape != reference.shape or prediction.ndim not in (2, 3):
        raise UserError(
            f"the mask has {prediction.shape} voxels and its reference {reference.shape}, expected two arrays of one "
            "shape, (z, y, x) or (y, x)"
        )
    if prediction.dtype.kind not in "biu" or reference.dtype.kind not in "biu":
        raise UserError(f"the arrays hold {prediction.dtype} and {reference.dtype}, expected whole numbers")
    if spacing is None or len(spacing) != prediction.ndim or not all(0 < step < math.inf for step in spacing):
        raise UserError(
            f"spacing: found {brief(spacing)}, expected {prediction.ndim} positive numbers, mm in the arrays' order"
        )
    scoring = _Scoring(classes, known)
    marked = mark_unknown(reference.astype(np.int32), known)
    scoring.add("array", prediction.astype(np.int32), marked, tuple(map(float, spacing)), known)
    return scoring.result("the reference")


def _evaluate_files(
    predictions: Path,
    references: dict[str, Path | Case] | Path,
    classes: Mapping[int, str] | None,
    how: Known,
    progress: Callable[[int, int], None] | None,
) -> Evaluation:
    """Score the masks of a folder."""
    labels: dict[str, tuple[Path, Known]]
    if isinstance(references, dict):
        where = "the references"
        predicted, _, faults, notes = _found(predictions, None)
        labels = {name: (found, how) for name, found in references.items() if isinstance(found, Path)}
        for name, found in references.items():
            if isinstance(found, Case) and found.label is not None:
                labels[name] = found.label, found.known
    else:
        where = str(references)
        predicted, files, faults, notes = _found(predictions, references)
        folder = references.parent if is_file(references) else references
        if how.ignore is None:
            how = replace(how, ignore=declared_unknown(folder, folder.resolve().parent))
        labels = {name: (path, how) for name, path in files.items()}
    ambiguous = {fault.case_id for fault in faults}
    alone = sorted(predicted.keys() - labels.keys() - ambiguous)
    paired = sorted(predicted.keys() & labels.keys())
    scoring = _Scoring(classes, how)
    for done, case in enumerate(paired, start=1):
        with one_case(case, faults, "evaluate", "pair of masks"):
            path, own = labels[case]
            prediction, reference, spacing = _read_pair(case, predicted[case], path, own)
            if classes is None:
                _require_no_greys({predicted[case]: prediction, path: reference}, case)
            scoring.add(case, prediction, reference, spacing, own)
        if progress is not None:
            progress(done, len(paired))
    if not scoring.scored:
        faults += [_unmatched(predicted[case], case, where) for case in alone]
        raise FaultsError(faults, f"{predictions}: no case could be scored")
    result = scoring.result(where)
    return replace(
        result,
        faults=(*faults, *result.faults),
        not_predicted=tuple(sorted(labels.keys() - predicted.keys() - ambiguous)),
        not_referenced=tuple(alone),
        notes=notes,
    )


def _found(
    predictions: Path, references: Path | None
) -> tuple[dict[str, Path], dict[str, Path], list[Fault], tuple[Fault, ...]]:
    """Return masks and references by case name, faults of their names, and notes on files that were ignored.

    Raises:
        UserError: if a folder is missing or holds no masks, or only one of both is a file.
    """
    if references is not None and (pair := two_files(predictions, references)):
        return *pair, [], ()
    predicted, faults = mask_files(predictions, "predicted masks")
    notes = passed_over(predictions)
    if references is None:
        return predicted, {}, faults, notes
    files, doubles = mask_files(references, "reference labels")
    return predicted, files, [*faults, *doubles], (*notes, *passed_over(references))


class _Scoring:
    """Scores case by case; the classes are known when all cases are.

    Args:
        classes: Label value to name of the classes; when None, they are the values of the references.
        known: How references are read, where they are not those of cases.
    """

    def __init__(self, classes: Mapping[int, str] | None, known: Known) -> None:
        self.classes = classes
        self.known = known
        self.drawn: dict[str, tuple[int, ...]] = {}  # of cases in which not all classes were
        self.scored: dict[str, dict[int, Scores]] = {}
        self.stray: dict[str, set[int]] = {}
        self.left_out: dict[str, int] = {}
        self.in_references: set[int] = set()

    def add(
        self,
        case: str,
        prediction: LabelMap,
        reference: LabelMap,
        spacing: tuple[float, ...],
        known: Known,
    ) -> None:
        """Score a case: two (*S), which are changed, their spacing in array order, mm, and what is known.

        Of a case in which some classes were not drawn, those are not scored.
        """
        left_out = leave_out(prediction, reference)
        values = _values(reference)
        stray = _values(prediction) - {known.ignore}
        if known.classes is not None:
            self.drawn[case] = known.classes
        # A class that both masks lack needs no look; it is filled in when all cases' classes are known.
        chosen = values | stray if self.classes is None else set(self.classes)
        self.scored[case] = score_classes(prediction, reference, spacing, sorted(chosen))
        self.stray[case] = stray
        self.left_out[case] = left_out
        self.in_references |= values

    def result(self, where: str) -> Evaluation:
        """Return the scores of all cases.

        Args:
            where: The references, in words.

        Raises:
            UserError: if no class is known.
        """
        names = dict(self.classes) if self.classes else {v: f"label {v}" for v in sorted(self.in_references)}
        if not names:
            raise UserError(
                f"{where}: every label is empty, expected values above 0 (name the classes to score)"
            )
        stray = {case: values - names.keys() - self.in_references for case, values in self.stray.items()}
        table = {
            case: {c: by_class.get(c, ABSENT) for c in names if c in self.drawn.get(case, names)}
            for case, by_class in self.scored.items()
        }
        return Evaluation(
            classes=names,
            rows=tuple(
                Row(case, c, names[c], s) for case, by_class in table.items() for c, s in by_class.items()
            ),
            summary=summarise(table.values()),
            faults=tuple(_stray_fault(case, values, names) for case, values in stray.items() if values),
            not_predicted=(),
            unknown={case: count for case, count in self.left_out.items() if count},
            known=self.known,
        )


def two_files(prediction: Path, reference: Path) -> tuple[dict[str, Path], dict[str, Path]] | None:
    """Return two files as the mask and the reference of one case, which is called as the reference; None of folders.

    Raises:
        UserError: if only one is a file.
    """
    files = [is_file(path) for path in (prediction, reference)]
    if not any(files):
        return None
    if not all(files):
        kinds = ["a file" if file else "no file" for file in files]
        raise UserError(
            f"{prediction} is {kinds[0]} and {reference} is {kinds[1]}, expected two files or two folders"
        )
    name = stem(reference)
    return {name: prediction}, {name: reference}


def mask_files(folder: Path, what: str) -> tuple[dict[str, Path], list[Fault]]:
    """Return the mask files of a folder by case name, and a fault for each name that two files claim.

    Args:
        folder: The folder.
        what: What it should hold, in words.

    Raises:
        UserError: If it is missing or holds no masks.
    """
    try:
        files = sorted(p for p in folder.iterdir() if is_scan_file(p))
        folders = (p for p in folder.iterdir() if not p.name.startswith(".") and is_folder(p))
        files += sorted(file for p in folders if is_file(file := p / "mri_norm2.h5"))
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}, expected a folder of {what}") from error
    found: dict[str, Path] = {}
    faults: list[Fault] = []
    for path, case in _named(files):
        if case in found:
            text = f"{found[case].name} and {path.name} are both {case}"
            faults.append(Fault(case, text, "one file", "remove one of them", case, "duplicate"))
        else:
            found[case] = path
    if not found:
        raise UserError(
            f"{folder}: no scan files, expected {what} such as case_01.nii.gz (name the folder that holds them)"
        )
    return {case: path for case, path in found.items() if case not in {f.case_id for f in faults}}, faults


def _named(files: Iterable[Path]) -> list[tuple[Path, str]]:
    """Return each mask file with its case's name."""
    names = {path: path.parent.name if path.name == "mri_norm2.h5" else stem(path) for path in files}
    every = set(names.values())
    cases = {name: name.removesuffix(label_ending(name, every)) for name in every}
    # Where the image CaseNN.mhd lies beside its label CaseNN_segmentation.mhd, it is no mask.
    images = {case for name, case in cases.items() if case != name}
    return [(path, cases[name]) for path, name in names.items() if name not in images]


def _read_pair(
    case: str, prediction: Path, reference: Path, known: Known
) -> tuple[LabelMap, LabelMap, tuple[float, ...]]:
    """Return both label maps (*S) and the reference's spacing in array order, mm.

    Raises:
        ReadError: If one cannot be read or they do not lie on one another.
    """
    try:
        predicted, geometry = read_label(prediction)
        expected, reference_geometry = read_known(reference, known)
    except ReadError as error:
        raise ReadError(replace(error.fault, case_id=case)) from None
    if isinstance(reference_geometry, Incomplete):
        expected = placed(
            expected,
            reference_geometry,
            geometry,
            known,
            where=reference.name,
            whose="the mask",
            case_id=case,
        )
        reference_geometry = geometry
    predicted = onto(
        predicted,
        geometry,
        reference_geometry,
        where=prediction.name,
        whose="in its reference",
        remedy="predict on the scan that the label was drawn on",
        case_id=case,
    )
    return predicted, expected, reference_geometry.spacing[::-1]


def _require_no_greys(labels: Mapping[Path, LabelMap], case: str) -> None:
    """Refuse masks with grey edges, each grey of which would count as a class.

    Raises:
        ReadError: If one has them.
    """
    for path, label in labels.items():
        if greys := find_greys(label):
            raise ReadError(
                replace(grey_fault(f"{path.parent.name}/{path.name}", greys, stating=""), case_id=case)
            )


def leave_out(prediction: LabelMap, reference: LabelMap) -> int:
    """Make both (*S) background, in place, where the reference is `NOT_KNOWN`; return the number of voxels."""
    open_ = reference == NOT_KNOWN
    prediction[open_] = reference[open_] = 0
    return int(open_.sum())


def _values(label: LabelMap) -> set[int]:
    """Return the label values but background, 0."""
    return {int(v) for v in np.unique(label)} - {0}


def _unmatched(mask: Path, case: str, references: str) -> Fault:
    found = f"no reference label named {case} in {references}"
    return Fault(mask.name, found, "", "add the label", case, "no-reference")


def _stray_fault(case: str, unknown: set[int], names: Mapping[int, str]) -> Fault:
    return Fault(
        case,
        f"label values {sorted(unknown)} in the prediction, scored as background",
        f"only {sorted(names)}",
        "name every class, or predict again with the right model",
        case,
        "labels",
    )


def _cell(summary: Summary, digits: int) -> str:
    if summary.mean is None:
        return "–"
    spread = "" if summary.sd is None else f" ± {summary.sd:.{digits}f}"
    return f"{summary.mean:.{digits}f}{spread}"
