"""Scores as tables, for the report of a run and that of masks."""

from __future__ import annotations

import numpy as np
from markupsafe import Markup

from mlbseg.evaluation import HEADINGS, Evaluation
from mlbseg.metrics import Summary
from mlbseg.report.page import Cell, number, table


def summary_table(evaluation: Evaluation) -> Markup:
    """Return mean ± SD over cases of every score, by class, and over all classes where there are several."""
    rows = []
    for value, scores in evaluation.summary.items():
        if value is None and len(evaluation.classes) == 1:
            continue  # it would repeat the only class
        name = "all classes" if value is None else evaluation.classes[value]
        cells = [_spread(scores[score], 1 if "_" in score else 3) for score in HEADINGS]
        missing = scores["hd95_mm"].missing
        rows.append([Cell(name), *cells, Cell(str(scores["dice"].count), 0), Cell(str(missing), missing)])
    headings = ["structure", *HEADINGS.values(), "cases", "no distance"]
    caption = (
        "Mean ± SD over cases. No distance: cases in which either mask is empty; they are in no mean of it."
    )
    return table(headings, rows, caption=caption, sortable=False)


def case_table(evaluation: Evaluation) -> Markup:
    """Return a row for each case, the worst first, with each class's Dice where there are several."""
    several = len(evaluation.classes) > 1
    cases = []
    for case in evaluation.cases:
        rows = [row for row in evaluation.rows if row.case == case]
        dice = float(np.mean([row.scores.dice for row in rows]))
        distances = [[row.scores.hd95_mm for row in rows], [row.scores.assd_mm for row in rows]]
        cells = [Cell(case), number(dice), *([number(row.scores.dice) for row in rows] if several else [])]
        cells += [number(_mean(values), 1, missing="none") for values in distances]
        cases.append((dice, cells))
    cases.sort(key=lambda item: item[0])
    names = list(evaluation.classes.values())
    headings = ["case", "mean Dice" if several else "Dice", *(names if several else []), "95HD mm", "ASSD mm"]
    means = ", distances are means over classes" if several else ""
    caption = f"{len(cases)} case{'s' if len(cases) > 1 else ''}, the worst first{means}."
    return table(headings, [cells for _, cells in cases], caption=caption)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def _spread(summary: Summary, digits: int) -> Cell:
    if summary.mean is None:
        return Cell("–", 0)
    spread = "" if summary.sd is None else f" ± {summary.sd:.{digits}f}"
    return Cell(f"{summary.mean:.{digits}f}{spread}", summary.mean)
