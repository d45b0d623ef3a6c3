"""What log.csv holds, as charts."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from mlbseg.apps.report.charts import Points, line_chart
from mlbseg.errors import UserError

MOST_POINTS = 400
"""Of a line; of more, neighbours are averaged."""

WORDS = {
    "clean": "careful labels",
    "initial": "initial labels",
    "pseudo": "pseudo labels",
    "teacher": "distance to the teacher",
    "views": "consistency of the views",
    "clean_teacher": "careful labels, distance to the teacher",
    "clean_views": "careful labels, consistency of the views",
    "mixed": "mixed images",
    "features": "changed features",
    "entropy": "entropy",
}
"""What the loss terms of log.csv are, in words."""

SOURCES = {"initial": "initial labels", "pseudo": "pseudo labels", "teacher": "the teacher's predictions"}
"""What the kept shares and the masses are of."""


@dataclass(frozen=True)
class Log:
    """log.csv.

    Attributes:
        columns: Name -> (step, value) of each row that has one; steps count on from stage to stage.
        boundary: The last step of stage 1, if both stages are there.
        stages: Those that are there.
    """

    columns: dict[str, Points]
    boundary: int | None
    stages: tuple[int, ...]

    def tail(self, name: str, share: float = 0.25) -> list[float]:
        """Return the values of a column in the last share of its rows."""
        values = [value for _, value in self.columns.get(name, ())]
        return values[-max(1, round(share * len(values))) :] if values else []


def read_log(path: Path) -> Log:
    """Read log.csv; a log that is not there holds nothing.

    Raises:
        UserError: if it cannot be read as one.
    """
    if not path.is_file():
        return Log({}, None, ())
    columns: dict[str, list[tuple[float, float]]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row.get("step")]
        stages = tuple(sorted({int(row["stage"]) for row in rows}))
        boundary = max(int(row["step"]) for row in rows if row["stage"] == "1") if stages == (1, 2) else None
        for row in rows:
            step = int(row["step"]) + (boundary or 0) * (row["stage"] == "2")
            for name, text in row.items():
                if name not in ("stage", "step") and text and math.isfinite(value := float(text)):
                    columns.setdefault(name, []).append((step, value))
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        raise UserError(f"{path}: damaged, expected the log that training wrote") from None
    return Log({name: _thinned(points) for name, points in columns.items()}, boundary, stages)


def charts(log: Log) -> Markup:
    """Return losses, validation Dice, kept shares, masses and learning rate, as far as they were written down."""
    mark = None if log.boundary is None else (float(log.boundary), "stage 2")
    losses = {words: log.columns.get(name, ()) for name, words in WORDS.items()}
    known = {
        *WORDS,
        *(f"{kind}_{name}" for kind in ("kept", "mass") for name in SOURCES),
        "validation_dice",
        "lr",
    }
    own = {name.replace("_", " "): points for name, points in log.columns.items() if name not in known}
    kept = {words: log.columns.get(f"kept_{name}", ()) for name, words in SOURCES.items()}
    if all(value >= 1 for points in kept.values() for _, value in points):
        kept = {}  # every pixel counts: a line along the top would say nothing
    mass = {words: log.columns.get(f"mass_{name}", ()) for name, words in SOURCES.items()}
    parts = [
        line_chart("Loss terms", losses, may_be_log=True, mark=mark,
                   note="What is minimised is their sum. Pale: each logged step."),
        line_chart("Further terms and values", own, may_be_log=True, mark=mark,
                   note="What the method names beside these."),
        line_chart("Validation Dice", {"Dice": log.columns.get("validation_dice", ())}, bounds=(0, 1), mark=mark,
                   note="Mean over validation cases and classes; the best checkpoint is kept."),
        line_chart("Share of pixels that are kept", kept, bounds=(0, 1), mark=mark,
                   note="Of the pixels that a source labels: those with a weight above 0."),
        line_chart("Share of all weight", mass if len(_there(mass)) > 1 else {}, bounds=(0, 1), mark=mark,
                   note="How the weight is divided between the sources of labels."),
        line_chart("Learning rate", {"learning rate": log.columns.get("lr", ())}, mark=mark, smooth=False),
    ]  # fmt: skip
    return Markup('<div class="charts">{}</div>').format(Markup("").join(parts))


def _there(lines: dict[str, Points]) -> list[str]:
    return [name for name, points in lines.items() if points]


def _thinned(points: Sequence[tuple[float, float]]) -> Points:
    """Return at most `MOST_POINTS` points, each the mean of neighbours."""
    size = math.ceil(len(points) / MOST_POINTS)
    if size == 1:
        return points
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]
