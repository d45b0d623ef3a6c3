"""The cases of a run that can be judged: chosen, predicted, scored, and the telling ones made ready to look at."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlbseg.apps.report.packing import Subject
from mlbseg.apps.report.scores import caption, worth_showing
from mlbseg.data.cases import still_there
from mlbseg.data.geometry import onto
from mlbseg.data.known import label_on
from mlbseg.data.plan import Plan
from mlbseg.data.preprocess import restore_probability
from mlbseg.data.readers import is_scan_file, mask_suffix, read_label, read_scan, stem, write_label
from mlbseg.errors import Fault, FaultsError, ReadError, UserError, one_case
from mlbseg.evaluation import Evaluation, evaluate, leave_out
from mlbseg.inference import Model, Progress
from mlbseg.runs import Run
from mlbseg.types import Case, Geometry

GROUPS = {
    "test": "test cases, which training never saw",
    "validation": "validation cases, by which the checkpoint was chosen",
    "noisy": "cases with an unverified label",
    "clean": "the training cases themselves: the network was trained on these",
}
"""Parts of a split in the order in which they are taken: the first that has labels is scored."""

SURE = 0.95
"""Certainty above which a voxel needs no colour."""


@dataclass(frozen=True)
class Scored:
    """Cases with their masks and scores.

    Attributes:
        group: Which part of the split they are; a key of `GROUPS`.
        cases: By id, with their labels.
        masks: The predicted mask of each.
        evaluation: Their scores.
        faults: What kept others from being predicted or scored.
        beyond: Number of cases of the group that were left out for the cap.
        voxels: Class value -> case id -> voxels predicted and voxels labelled.
    """

    group: str
    cases: Mapping[str, Case]
    masks: Mapping[str, Path]
    evaluation: Evaluation
    faults: tuple[Fault, ...]
    beyond: int
    voxels: Mapping[int, Mapping[str, tuple[int, int]]] = field(default_factory=dict)


def labelled_cases(run: Run) -> tuple[dict[str, list[Case]], dict[str, list[Fault]]]:
    """Return the cases of each group that have a label, in the order of the split, and a fault for each that is gone.

    Test cases without a label are faults only where others have one: these may never have had any.

    Raises:
        UserError: if the scans are no longer where they were.
    """
    dataset = run.find_cases()
    parts: Mapping[str, Sequence[str]] = run.split.as_dict()
    look = partial(still_there, dataset.cases, where=run.scans, kind="report", faults=dataset.faults)
    groups: dict[str, list[Case]] = {}
    gone: dict[str, list[Fault]] = {}
    for group in GROUPS:
        groups[group], gone[group] = look(parts[group], labelled=True)
        if group == "test" and not groups[group]:
            _, gone[group] = look(parts[group])
    return groups, gone


def choose(
    groups: Mapping[str, Sequence[Case]], available: Collection[str] | None
) -> tuple[str, list[Case]] | None:
    """Return the first group with a case, of those that have a mask where that matters; None if there is none."""
    for group, cases in groups.items():
        chosen = [case for case in cases if available is None or case.id in available]
        if chosen:
            return group, chosen
    return None


def predict_cases(
    model: Model,
    cases: Sequence[Case],
    out: Path,
    progress: Progress | None = None,
    *,
    certainty: Path | None = None,
) -> tuple[dict[str, Path], list[Fault]]:
    """Write the mask of each case; return the files, and what kept cases from being predicted.

    Args:
        model: The run's.
        cases: The cases.
        out: The folder for the masks.
        progress: Called with (done, all, case id).
        certainty: A folder for ``ID.npy``, (*S) float16 on the scan's lattice: the probability of the likeliest class,
            NaN where it is above `SURE` or nothing was predicted; none are written when None.
    """
    masks: dict[str, Path] = {}
    faults: list[Fault] = []
    for number, case in enumerate(cases):
        if progress is not None:
            progress(number, len(cases), case.id)
        with one_case(case.id, faults, "predict"):
            path = out / f"{case.id}{mask_suffix(case.images)}"
            segmented = model.segment_case(case)
            write_label(path, segmented.mask(), segmented.native)
            if certainty is not None:
                [(probability, frame)] = segmented.maps
                certain = restore_probability(np.ascontiguousarray(probability.max(axis=0)), frame)
                unsure = np.where((certain > SURE) | (certain == 0), np.nan, certain)
                np.save(certainty / f"{case.id}.npy", unsure.astype(np.float16))
            masks[case.id] = path
    if progress is not None:
        progress(len(cases), len(cases), "")
    return masks, faults


def score_cases(
    group: str,
    cases: Sequence[Case],
    masks: Mapping[str, Path],
    folder: Path,
    plan: Plan,
    *,
    faults: Sequence[Fault] = (),
    beyond: int = 0,
) -> Scored:
    """Score the masks of cases that lie in a folder.

    Raises:
        UserError: if not one of them can be scored.
    """
    if faults and not masks:
        raise FaultsError(faults, "the scans", "no case could be predicted")
    labels = {case.id: case for case in cases if case.label is not None and case.id in masks}
    result = evaluate(folder, labels, classes=plan.structures)
    scored = set(result.cases)
    kept = {case.id: case for case in cases if case.id in scored}
    return Scored(
        group, kept, {name: masks[name] for name in kept}, result, (*faults, *result.faults), beyond,
        _voxels(kept, masks, plan.structures),
    )  # fmt: skip


def training_dice(model: Model, cases: Sequence[Case], out: Path) -> float | None:
    """Return the mean Dice of cases that the network was trained on; None if none can be scored."""
    masks, faults = predict_cases(model, cases, out)
    if not masks:
        return None
    return score_cases("clean", cases, masks, out, model.runs[0].plan, faults=faults).evaluation.mean_dice


def subjects(scored: Scored, run: Run, certainty: Path) -> Iterator[Subject]:
    """Yield the cases, those that tell most first, with the trust of the run's audit where there is one.

    Args:
        scored: The cases.
        run: The run.
        certainty: The folder that `predict_cases` wrote of them; without a map there a case is shown without one.
    """
    for what, name in worth_showing(scored.evaluation):
        case = scored.cases[name]
        scan = read_scan(case.images)
        label = label_on(case, scan.geometry, whose="its scan", remedy="")
        mask = mask_on(scored.masks[name], scan.geometry)
        leave_out(mask, label)
        maps: dict[str, npt.NDArray[Any]] = {}
        trust, fault = trust_map(run.root / "audit" / "trust", name, scan.geometry)
        if trust is not None:
            maps["trust"] = trust
        if (path := certainty / f"{name}.npy").is_file():
            maps["certainty"] = np.load(path, allow_pickle=False).astype(np.float32)
        yield Subject(
            name,
            caption(what, name, scored.evaluation) + fault,
            scan.array[0],
            scan.geometry,
            {"label": label, "prediction": mask},
            maps,
            differing(label, mask) if what == "worst" else None,
        )


def differing(label: npt.NDArray[Any], mask: npt.NDArray[Any]) -> npt.NDArray[np.bool_] | None:
    """Return where two masks differ; None where they are the same."""
    different = label != mask
    return different if different.any() else None


def trust_map(folder: Path, name: str, lattice: Geometry) -> tuple[npt.NDArray[np.float32] | None, str]:
    """Return the map (*S) that an audit wrote of a case; or None and, where there is one, why it is left out."""
    try:
        named = [path for path in sorted(folder.iterdir()) if is_scan_file(path) and stem(path) == name]
    except OSError:
        return None, ""
    if not named:
        return None, ""
    try:
        # A link would show what lies outside the run.
        scan = None if named[0].is_symlink() else read_scan(named[:1])
    except (UserError, OSError):
        scan = None
    if scan is None:
        return None, "; its trust map cannot be read"
    try:
        values = onto(scan.array[0], scan.geometry, lattice, where=name, whose="the scan")
    except ReadError as error:
        what = error.fault.found.partition(" ")[0]
        return None, f"; its trust map has another {what} than the scan, so it is not shown"
    if not (len(scan.array) == 1 and values.min() >= 0 and values.max() <= 1):  # NaN is neither
        return None, "; its trust map holds other values than 0 to 1, so it is not shown"
    return values, ""


def mask_on(path: Path, lattice: Geometry) -> npt.NDArray[np.int32]:
    """Return a label map (*S) on the lattice of its scan."""
    label, geometry = read_label(path)
    return onto(label, geometry, lattice, where=path.name, whose="its scan")


def _voxels(
    cases: Mapping[str, Case], masks: Mapping[str, Path], classes: Mapping[int, str]
) -> dict[int, dict[str, tuple[int, int]]]:
    counts: dict[int, dict[str, tuple[int, int]]] = {value: {} for value in classes}
    for name, case in cases.items():
        mask, lattice = read_label(masks[name])
        label = label_on(case, lattice, whose="its scan", remedy="")
        leave_out(mask, label)
        found, expected = (
            dict(zip(*np.unique(array, return_counts=True), strict=True)) for array in (mask, label)
        )
        for value in classes:
            counts[value][name] = (int(found.get(value, 0)), int(expected.get(value, 0)))
    return counts
