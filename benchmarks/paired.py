"""By how much one training's masks are better than another's, case by case, with an interval over cases.

    mlbseg evaluate masks-a/ labels/ --out a.csv
    mlbseg evaluate masks-b/ labels/ --out b.csv
    python benchmarks/paired.py --first a.csv --second b.csv     # several of each, in the same order: seeds

It prints the mean difference ± its standard error over cases, and a 95 % t interval over cases and seeds. A case's Dice
is the mean over its classes, and over the seeds.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlbseg.apps.bench.statistics import Run, Scores, difference, of_runs


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--first", type=Path, nargs="+", required=True, help="CSV files of `mlbseg evaluate`")
    parser.add_argument("--second", type=Path, nargs="+", required=True)
    asked = parser.parse_args(arguments)
    if len(asked.first) != len(asked.second):
        parser.error("expected as many files after --first as after --second, one for each seed")
    rows: list[dict[Run, dict[str, float]]] = [
        {seed: _dice(path) for seed, path in enumerate(paths)} for paths in (asked.first, asked.second)
    ]
    for paths, row in zip((asked.first, asked.second), rows, strict=True):
        dice = of_runs(row)
        assert dice is not None
        print(f"{' '.join(map(str, paths))}: mean Dice {dice.mean:.4f}")
    found = difference(*rows)
    if found is None:
        parser.error("no case is in all of the tables")
    interval = "" if found.low is None else f" [{found.low:.4f}, {found.high:.4f}]"
    print(
        f"first - second: {found.mean:+.4f} ± {_error(*rows):.4f}{interval}, {found.cases} cases, "
        f"{found.runs} seed(s)"
    )


def _error(first: Scores, second: Scores) -> float:
    """Return the standard error over cases of the mean difference, each case's the mean over the seeds."""
    pairs = [(first[seed], second[seed]) for seed in first]
    cases = set.intersection(*(set(row) for pair in pairs for row in pair))
    each = [np.mean([one[case] - other[case] for one, other in pairs]) for case in sorted(cases)]
    return float(np.std(each, ddof=1) / len(each) ** 0.5) if len(each) > 1 else math.nan


def _dice(path: Path) -> dict[str, float]:
    """Return the Dice of each case of a table, the mean over its classes."""
    by_case: dict[str, list[float]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            by_case.setdefault(line["case"], []).append(float(line["dice"]))
    return {case: sum(values) / len(values) for case, values in by_case.items()}


if __name__ == "__main__":
    main()
