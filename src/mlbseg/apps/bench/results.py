"""What the cells of a folder have found, gathered: the rows of cells.csv and cases.csv, and the lines of the table."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlbseg.apps.bench import statistics
from mlbseg.apps.bench.cell import OUTCOME, SCORES, outcome
from mlbseg.apps.bench.cells import STAGE1, SUPERVISED, TEACHER, Cell
from mlbseg.apps.bench.record import Setup
from mlbseg.errors import UserError
from mlbseg.files import write_table
from mlbseg.metrics import SCORE_NAMES

UPPER = "supervised, all labels"
MEASURES = ("dice", "jaccard", "hd95_mm", "assd_mm")
CELL_COLUMNS = (
    "row", "method", "labelled", "label_seed", "seed", "status", *MEASURES, "no_distance", "steps", "seconds",
    "seconds_per_step", "peak_memory_bytes", "device", "processor", "threads", "host", "reason",
)  # fmt: skip
CASE_COLUMNS = ("row", "labelled", "label_seed", "seed", "case", "class", "name", *SCORE_NAMES)


@dataclass
class Group:
    """The cells of a row at one budget.

    Attributes:
        label: The row's.
        slug: The row's.
        budget: Labels; None for all.
        records: Run (label set and seed) -> outcome of each finished cell.
        dice: Run -> case -> mean Dice over classes.
        failed: Runs that failed.
    """

    label: str
    slug: str
    budget: int | None
    records: dict[statistics.Run, Mapping[str, Any]] = field(default_factory=dict)
    dice: dict[statistics.Run, dict[str, float]] = field(default_factory=dict)
    failed: list[statistics.Run] = field(default_factory=list)

    def mean(self, name: str) -> statistics.Spread | None:
        """Return mean and SD over runs of what was measured under a name, of those where it is there."""
        return statistics.spread([r[name] for r in self.records.values() if r.get(name) is not None])

    def by_run(self, name: str) -> dict[statistics.Run, float]:
        """Return what was measured under a name, by run."""
        return {run: r[name] for run, r in self.records.items() if r.get(name) is not None}


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
        group: Its cells.
        dice: Mean and SD over runs.
        over_supervised: Paired difference to supervised training with the same labels; None if there is none.
        over_teacher: The same to mean teacher.
        over_best: The same to the best of the other rows with the same labels.
        gap: Share of the gap between supervised with these and with all labels that it closes.
        time: Seconds per step relative to supervised with the same labels.
        hours: Of the last stage, mean over runs.
        memory: Peak, bytes, the largest over runs.
    """

    group: Group
    dice: statistics.Spread | None
    over_supervised: statistics.Difference | None
    over_teacher: statistics.Difference | None
    over_best: statistics.Difference | None
    gap: statistics.Gap | None
    time: float | None
    hours: float | None
    memory: float | None


@dataclass(frozen=True)
class Results:
    """All that is known of a bench so far.

    Attributes:
        setup: Its record.
        cells: The rows of cells.csv.
        cases: The rows of cases.csv.
        groups: By slug and budget; the upper bound's budget is None.
        budgets: In ascending order, without the upper bound's.
    """

    setup: Setup
    cells: list[dict[str, Any]]
    cases: list[dict[str, Any]]
    groups: dict[tuple[str, int | None], Group]
    budgets: list[int]

    @property
    def failed(self) -> list[dict[str, Any]]:
        """The rows of cells.csv that failed."""
        return [row for row in self.cells if row["status"] == "failed"]

    @property
    def upper(self) -> Group | None:
        """Supervised training with all labels."""
        return self.groups.get((SUPERVISED, None))

    def slugs(self, budget: int | None = None) -> list[str]:
        """Return the rows by Dice at a budget, the smallest when None, the best first; those without one last."""
        budget = next(iter(self.budgets), None) if budget is None else budget

        def rank(slug: str) -> float:
            group = self.groups.get((slug, budget))
            dice = statistics.of_runs(group.dice) if group else None
            return -1.0 if dice is None else dice.mean

        return sorted(self.setup.rows, key=rank, reverse=True)

    def _best_other(self, group: Group, budget: int) -> Group | None:
        """Return the best of the other rows of a budget."""
        others = [self.groups.get((slug, budget)) for slug in self.slugs(budget)]
        return next(
            (other for other in others if other is not None and other is not group and other.dice), None
        )

    def lines(self, budget: int) -> list[Line]:
        """Return the lines of one budget, the upper bound last."""
        supervised = self.groups.get((SUPERVISED, budget))
        teacher = self.groups.get((TEACHER, budget))
        groups = [g for slug in self.slugs(budget) if (g := self.groups.get((slug, budget))) is not None]
        groups += [self.upper] if self.upper is not None else []
        return [
            Line(
                group,
                statistics.of_runs(group.dice),
                _difference(group, supervised),
                _difference(group, teacher),
                _difference(group, self._best_other(group, budget)) if group is not self.upper else None,
                statistics.gap_closed(group.dice, supervised.dice, self.upper.dice)
                if supervised and self.upper and group not in (supervised, self.upper)
                else None,
                statistics.ratio(group.by_run("seconds_per_step"), supervised.by_run("seconds_per_step"))
                if supervised
                else None,
                None if (seconds := group.mean("seconds")) is None else seconds.mean / 3600,
                max(group.by_run("peak_memory_bytes").values(), default=None),
            )
            for group in groups
        ]


def _difference(group: Group, other: Group | None) -> statistics.Difference | None:
    return None if other is None or other is group else statistics.difference(group.dice, other.dice)


def gather(folder: Path, setup: Setup) -> Results:
    """Read the outcome of every cell of a folder.

    Raises:
        UserError: if one is damaged.
    """
    results = Results(setup, [], [], {}, sorted({c.budget for c in setup.cells if c.budget is not None}))
    for cell in setup.cells:
        if cell.row == STAGE1:
            continue
        label, method = _label(setup, cell)
        key = (cell.row, cell.budget)
        group = results.groups.setdefault(key, Group(label, cell.row, cell.budget))
        record = _outcome(folder, setup, cell)
        row = {
            "row": label, "method": method, "labelled": len(setup.clean) if cell.budget is None else cell.budget,
            "label_seed": cell.label_seed, "seed": cell.seed,
        }  # fmt: skip
        results.cells.append({**row, **record})
        if record["status"] == "failed":
            group.failed.append((cell.label_seed, cell.seed))
        if record["status"] != "done":
            continue
        scores, dice = _scores(folder / "runs" / cell.key, len(setup.scored))
        results.cases.extend({**row, **line} for line in scores)
        group.records[cell.label_seed, cell.seed] = record
        group.dice[cell.label_seed, cell.seed] = dice
    return results


def _label(setup: Setup, cell: Cell) -> tuple[str, str]:
    if cell.budget is None:
        return UPPER, SUPERVISED
    row = setup.rows[cell.row]
    return row.label, row.method


def _outcome(folder: Path, setup: Setup, cell: Cell) -> dict[str, Any]:
    """Return how a cell ended, or what it waits for."""
    record = outcome(folder, cell)
    if record is not None:
        return record
    if setup.needs_stage1(cell):
        before = outcome(folder, cell.stage1)
        if before is not None and before["status"] == "failed":
            return {"status": "failed", "reason": f"stage 1 failed: {before['reason']}"}
    return {"status": "begun" if (folder / "runs" / cell.key / "config.yaml").is_file() else "to do"}


def _scores(root: Path, count: int) -> tuple[list[dict[str, str]], dict[str, float]]:
    """Return the scores of a cell, line by line, and the mean Dice over classes of each of so many cases."""
    path = root / SCORES
    by_case: dict[str, list[float]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
        for line in lines:
            by_case.setdefault(line["case"], []).append(float(line["dice"]))
        if not all(0 <= value <= 1 for values in by_case.values() for value in values):
            raise ValueError
    except OSError as error:
        found = f"cannot be read: {error.strerror or error}"
    except (KeyError, TypeError, ValueError, csv.Error):
        found = "damaged, expected a line of scores for each case and class"
    else:
        if len(by_case) == count:
            return lines, {case: float(np.mean(values)) for case, values in by_case.items()}
        found = f"found scores of {len(by_case)} case(s), expected {count}"
    raise UserError(f"{path}: {found} (delete {root / OUTCOME} and run the bench again)")


def write_csvs(folder: Path, results: Results) -> None:
    """Write cells.csv and cases.csv, each whole or not at all."""
    write_table(folder / "cells.csv", results.cells, CELL_COLUMNS)
    write_table(folder / "cases.csv", results.cases, CASE_COLUMNS)


def parts(results: Results, budget: int) -> tuple[list[str], list[list[str]]]:
    """Return headings and cells, as text, of one budget's table; columns that are empty throughout are left out."""
    headings = (
        "trained with", "Dice", "runs", "95HD mm (missing)", "to supervised [95 % CI]", "to mean teacher [95 % CI]",
        "to the best other [95 % CI]", "gap closed [95 % CI]", "time per step", "hours", "GiB",
    )  # fmt: skip
    rows = []
    for line in results.lines(budget):
        group = line.group
        failed = f" ({len(group.failed)} failed)" if group.failed else ""
        rows.append(
            [
                group.label,
                _spread(line.dice),
                f"{len(group.records)}{failed}",
                _distance(group),
                _interval(line.over_supervised),
                _interval(line.over_teacher),
                _interval(line.over_best),
                _gap(line.gap),
                "–" if line.time is None else f"×{line.time:.2f}",
                "–" if line.hours is None else f"{line.hours:.2f}",
                "–" if line.memory is None else f"{line.memory / 2**30:.1f}",
            ]
        )
    shown = [i for i in range(len(headings)) if i < 3 or any(row[i] != "–" for row in rows)]
    return [headings[i] for i in shown], [[row[i] for i in shown] for row in rows]


def _spread(value: statistics.Spread | None) -> str:
    if value is None:
        return "–"
    return f"{value.mean:.3f}" + ("" if value.sd is None else f" ± {value.sd:.3f}")


def _distance(group: Group) -> str:
    distance = group.mean("hd95_mm")
    if distance is None:
        return "–"
    missing = sum(record.get("no_distance", 0) for record in group.records.values())
    return f"{distance.mean:.1f}" + (f" ({missing})" if missing else "")


def _gap(value: statistics.Gap | None) -> str:
    if value is None:
        return "–"
    if value.low is None or value.high is None:
        return f"{value.share:.0%} [–]"
    return f"{value.share:.0%} [{value.low:.0%}, {value.high:.0%}]"


def _interval(value: statistics.Difference | None) -> str:
    if value is None:
        return "–"
    if value.low is None or value.high is None:
        return f"{value.mean:+.3f} [–]"
    return f"{value.mean:+.3f} [{value.low:.3f}, {value.high:.3f}]"
