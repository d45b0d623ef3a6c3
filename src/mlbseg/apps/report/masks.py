"""The page of masks and references: scores, and the cases to look at."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mlbseg.apps.report.packing import Subject
from mlbseg.apps.report.page import Section, paragraphs, render_page, require_free_page, write_page
from mlbseg.apps.report.scores import caption, case_table, summary_table, worth_showing
from mlbseg.apps.report.scoring import differing
from mlbseg.apps.report.viewer import SCRIPTS, Gallery
from mlbseg.data.cases import find_scans
from mlbseg.data.geometry import Incomplete, onto
from mlbseg.data.known import placed, read_known
from mlbseg.data.readers import read_label, read_scan
from mlbseg.errors import ReadError
from mlbseg.evaluation import Evaluation, leave_out, mask_files, two_files
from mlbseg.types import Case, Geometry, Known


def masks_report(
    evaluation: Evaluation,
    predictions: Path,
    references: Path,
    out: Path,
    *,
    scans: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Write one HTML file about masks that were scored.

    Args:
        evaluation: Their scores.
        predictions: The folder of masks that was scored, or the one mask.
        references: The folder of labels that it was scored against, or the one label.
        out: The file.
        scans: A folder of the scans, in any layout that training reads; without it masks are shown alone.
        overwrite: Replace a file that is there.

    Raises:
        UserError: if the file is there or cannot be written, or there are no scans in their folder.
    """
    require_free_page(out, overwrite=overwrite)
    known = {} if scans is None else {case.id: case for case in find_scans(scans).cases}
    if pair := two_files(predictions, references):
        predicted, expected = pair
        if len(known) == 1:  # one scan belongs to the one mask, whatever they are called
            known = dict(zip(expected, known.values(), strict=True))
    else:
        predicted, expected = (
            mask_files(predictions, "predicted masks")[0],
            mask_files(references, "labels")[0],
        )
    looked = Gallery(evaluation.classes)
    shown = (
        _subject(
            name,
            caption(what, name, evaluation),
            predicted[name],
            expected[name],
            known,
            evaluation.known,
            worst=what == "worst",
        )
        for what, name in worth_showing(evaluation)
    )
    looked.fill(shown, len(evaluation.cases))
    black = " No scans were given (--scans), so the masks lie on black." if scans is None else ""
    sections = [
        Section("Scores", summary_table(evaluation)),
        Section("Cases", looked.html() + case_table(evaluation, looked.names), looked.note + black, SCRIPTS),
    ]
    if missing := _not_scored(evaluation):
        sections.append(Section("Not scored", paragraphs(*missing)))
    count = len(evaluation.cases)
    facts = [("mean Dice", f"{evaluation.mean_dice:.3f}"), ("cases", str(count))]
    distance = evaluation.summary[None]["hd95_mm"].mean
    if distance is not None:
        facts.insert(1, ("95HD, mean", f"{distance:.1f} mm"))
    if unknown := sum(evaluation.unknown.values()):
        facts.append(("unknown voxels, not scored", f"{unknown:,}"))
    title = f"Masks {predictions.resolve().name} against {references.resolve().name}"
    write_page(out, render_page(title, sections, facts=facts))
    return out


def _subject(
    name: str,
    words: str,
    predicted: Path,
    expected: Path,
    scans: Mapping[str, Case],
    how: Known,
    *,
    worst: bool,
) -> Subject:
    label, geometry = read_known(expected, how)
    mask, lattice = read_label(predicted)
    if isinstance(geometry, Incomplete):
        label = placed(label, geometry, lattice, how, where=expected.name, whose="the mask")
        geometry = lattice
    mask = onto(mask, lattice, geometry, where=predicted.name, whose="in its reference", case_id=name)
    leave_out(mask, label)
    masks = {"label": label, "prediction": mask}
    image = np.zeros(label.shape, np.uint8)
    if scans:
        found, fault = _image(scans.get(name), geometry)
        if found is None:
            words += f"; {fault}"
        else:
            image = found
    return Subject(name, words, image, geometry, masks, focus=differing(label, mask) if worst else None)


def _image(case: Case | None, lattice: Geometry) -> tuple[np.ndarray | None, str]:
    """Return the first channel of a scan that lies on a lattice, or why there is none."""
    if case is None:
        return None, "no scan of this name"
    try:
        scan = read_scan(case.images)
    except ReadError:
        return None, "the scan cannot be read"
    try:
        image = onto(scan.array[0], scan.geometry, lattice, where=case.id, whose="its label")
    except ReadError as error:
        what = error.fault.found.partition(" ")[0]
        return None, f"the scan has another {what}, so it is not shown"
    return image, ""


def _not_scored(evaluation: Evaluation) -> list[str]:
    lines = [str(fault) for fault in evaluation.faults]
    for names, words in (
        (evaluation.not_predicted, "References without a mask"),
        (evaluation.not_referenced, "Masks without a reference"),
    ):
        if names:
            lines.append(f"{words}: {', '.join(names)}.")
    return lines
