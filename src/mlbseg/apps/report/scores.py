"""Scores as tables, for the report of a run and that of masks."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from markupsafe import Markup

from mlbseg.apps.report.page import Cell, number, table
from mlbseg.apps.report.viewer import opener
from mlbseg.evaluation import HEADINGS, Evaluation
from mlbseg.metrics import Summary


def ranked(evaluation: Evaluation) -> list[tuple[str, float]]:
    """Return each case with its mean Dice over classes, the worst first."""
    dice: dict[str, list[float]] = {}
    for row in evaluation.rows:
        dice.setdefault(row.case, []).append(row.scores.dice)
    return sorted(((case, float(np.mean(values))) for case, values in dice.items()), key=lambda item: item[1])


def telling(evaluation: Evaluation) -> dict[str, str]:
    """Return the names of the worst, the median and the best case, by what they are; of fewer cases, of fewer."""
    names = [case for case, _ in ranked(evaluation)]
    if len(names) == 1:
        return {"only case": names[0]}
    middle = {"median": names[(len(names) - 1) // 2]} if len(names) > 2 else {}
    return {"worst": names[0], **middle, "best": names[-1]}


def worth_showing(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Return what each case is and its name: worst, median and best first, then all others, the worst first."""
    first = [(what, name) for what, name in telling(evaluation).items()]
    told = {name for _, name in first}
    return [*first, *(("", name) for name, _ in ranked(evaluation) if name not in told)]


def caption(what: str, name: str, evaluation: Evaluation) -> str:
    """Return what a case is, if anything, and its scores."""
    rows = [row for row in evaluation.rows if row.case == name]
    parts = [f"{what}{': ' if what else ''}Dice {np.mean([row.scores.dice for row in rows]):.3f}"]
    if len(rows) > 1:
        parts = [f"{parts[0]} ({', '.join(f'{row.name} {row.scores.dice:.3f}' for row in rows)})"]
    known = [row.scores.hd95_mm for row in rows if row.scores.hd95_mm is not None]
    if known:
        parts.append(f"95HD {max(known):.1f} mm" + (" (the largest)" if len(known) > 1 else ""))
    return ", ".join(parts)


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
    words = (
        "Mean ± SD over cases. No distance: cases in which either mask is empty; they are in no mean of it."
    )
    return table(headings, rows, caption=words, sortable=False)


def case_table(evaluation: Evaluation, shown: Collection[str] = ()) -> Markup:
    """Return a row for each case, the worst first, with each class's Dice where there are several.

    Args:
        evaluation: The scores.
        shown: Cases that the page's viewer can open.
    """
    several = len(evaluation.classes) > 1
    table_rows = []
    for case, dice in ranked(evaluation):
        rows = [row for row in evaluation.rows if row.case == case]
        distances = [[row.scores.hd95_mm for row in rows], [row.scores.assd_mm for row in rows]]
        cells = [
            Cell(opener(case) if case in shown else case),
            number(dice),
            *([number(row.scores.dice) for row in rows] if several else []),
        ]
        table_rows.append([*cells, *(number(_mean(values), 1, missing="none") for values in distances)])
    names = list(evaluation.classes.values())
    headings = ["case", "mean Dice" if several else "Dice", *(names if several else []), "95HD mm", "ASSD mm"]
    means = ", distances are means over classes" if several else ""
    words = f"{len(table_rows)} case{'s' if len(table_rows) > 1 else ''}, the worst first{means}."
    return table(headings, table_rows, caption=words)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def _spread(summary: Summary, digits: int) -> Cell:
    if summary.mean is None:
        return Cell("–", 0)
    spread = "" if summary.sd is None else f" ± {summary.sd:.{digits}f}"
    return Cell(f"{summary.mean:.{digits}f}{spread}", summary.mean)
