"""What several runs averaged are worth against each alone, and whether their uncertainty says where they are wrong.

The runs share test cases, as cells of a bench do that differ in their seed:

    mlbseg bench la --methods mlb --labelled 8 --seeds 0 1 2 --out runs/bench-la
    python benchmarks/several_runs.py runs/bench-la/runs/8-labelled/seed-*/mlb
    mlbseg bench hippocampus --methods mlb --labelled 5 --seeds 0 1 2 --out runs/bench-hippocampus
    python benchmarks/several_runs.py runs/bench-hippocampus/runs/5-labelled/seed-*/mlb

Each network sees each test case once. First table: Dice and 95HD of each run and of the mean (`together`), and the
paired difference in Dice of the mean to each, with its interval over cases. Second table, of the entropy of each run
and of the mean, and of the runs' disagreement: the AUROC with which it tells the voxels where its own mask is wrong,
mean over cases, of all voxels and of those within `NEAR` of the label or the mask (the others are easy); and over cases
the rank correlation of its sum per voxel of the mask with 1 - Dice. Test labels are looked at here alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import ndimage, stats

from mlbseg.apps.bench.statistics import Scores, difference
from mlbseg.apps.report.scoring import labelled_cases
from mlbseg.data.known import label_on
from mlbseg.device import pick_device
from mlbseg.errors import UserError
from mlbseg.evaluation import leave_out
from mlbseg.inference import Model
from mlbseg.inference.model import Segmented
from mlbseg.metrics import score_classes
from mlbseg.runs import Run
from mlbseg.types import Case

NEAR = 5.0
"""mm."""
TOGETHER = "together"

Array = npt.NDArray[np.generic]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--cases", type=int, default=None, help="test cases at most")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args(arguments)
    model = Model([Run.open(root) for root in given.runs], pick_device(given.device))
    singles = [Model([run], model.device) for run in model.runs]
    cases = shared_test_cases(model.runs)[: given.cases]
    names = [*(f"run {i}" for i in range(1, len(model.runs) + 1)), TOGETHER]
    scores: dict[str, dict[str, tuple[float, float | None]]] = {name: {} for name in names}
    maps: dict[str, list[tuple[float, float, float, float]]] = {}
    for case in cases:
        for name, (dice, distance, uncertain) in measure(case, model, singles).items():
            scores[name][case.id] = (dice, distance)
            for kind, found in uncertain.items():
                maps.setdefault(f"{kind}, {name}", []).append((*found, 1 - dice))
    for number, run in enumerate(model.runs, start=1):
        print(f"run {number}: {run.root}")
    print(f"{len(cases)} test cases: {', '.join(case.id for case in cases)}\n")
    print(score_table(scores))
    print(uncertainty_table(maps))


def shared_test_cases(runs: Sequence[Run]) -> list[Case]:
    """Return the labelled test cases of the first run that are test cases of all others too."""
    cases = labelled_cases(runs[0])[0]["test"]
    shared = [case for case in cases if all(case.id in run.split.test for run in runs)]
    if not shared:
        raise UserError("no labelled test case is shared by the runs")
    return shared


def measure(
    case: Case, model: Model, singles: Sequence[Model]
) -> dict[str, tuple[float, float | None, dict[str, tuple[float, float, float]]]]:
    """Return Dice, 95HD (mm; None if no class has one) and what each map tells, of each run alone and together.

    A map tells: AUROC of all voxels and of those that are near, and its sum per voxel of the mask.
    """
    segmented = model.segment_case(case)
    label = label_on(case, segmented.native)
    spacing = segmented.native.spacing[::-1]
    alone = [Segmented(one, (own,)) for one, own in zip(singles, segmented.maps, strict=True)]
    found = {}
    for name, one in zip(
        [*(f"run {i}" for i in range(1, len(alone) + 1)), TOGETHER], [*alone, segmented], strict=True
    ):
        mask, truth = one.mask(), label.copy()
        leave_out(mask, truth)
        scores = score_classes(mask, truth, spacing, model.label_values[1:]).values()
        distances = [s.hd95_mm for s in scores if s.hd95_mm is not None]
        wrong, near = mask != truth, around((mask > 0) | (truth > 0), spacing)
        uncertain = {
            kind: (
                auroc(values, wrong),
                auroc(values[near], wrong[near]),
                float(values.sum() / max(1, (mask > 0).sum())),
            )
            for kind, values in one.uncertainty().items()
        }
        dice = float(np.mean([s.dice for s in scores]))
        found[name] = (dice, float(np.mean(distances)) if distances else None, uncertain)
    return found


def around(structures: npt.NDArray[np.bool_], spacing: Sequence[float]) -> npt.NDArray[np.bool_]:
    """Return the voxels (*S) within `NEAR` of any structure; all if there is none."""
    if not structures.any():
        return np.ones_like(structures)
    near: npt.NDArray[np.bool_] = ndimage.distance_transform_edt(~structures, sampling=spacing) <= NEAR
    return near


def auroc(values: Array, wrong: npt.NDArray[np.bool_]) -> float:
    """Return the chance that a wrong voxel has a larger value than a right one (ties: half); NaN without both."""
    count = int(wrong.sum())
    others = wrong.size - count
    if not count or not others:
        return float("nan")
    ranks = stats.rankdata(values.ravel())[wrong.ravel()].sum()
    return float((ranks - count * (count + 1) / 2) / (count * others))


def score_table(scores: Mapping[str, Mapping[str, tuple[float, float | None]]]) -> str:
    """Return the table of Dice and 95HD, with the gain of the mean over each row."""
    lines = ["| | Dice | 95HD mm | together, difference in Dice [95 %] |", "|---|---|---|---|"]
    dice: dict[str, Scores] = {
        name: {0: {case: one[0] for case, one in cases.items()}} for name, cases in scores.items()
    }
    for name, cases in scores.items():
        values = [one[0] for one in cases.values()]
        distances = [one[1] for one in cases.values() if one[1] is not None]
        gain = None if name == TOGETHER else difference(dice[TOGETHER], dice[name])
        cell = "–" if gain is None else f"{gain.mean:+.4f}"
        if gain is not None and gain.low is not None:
            cell += f" [{gain.low:+.4f}, {gain.high:+.4f}]"
        mean = f"{np.mean(distances):.2f}" if distances else "–"
        lines.append(f"| {name} | {np.mean(values):.4f} | {mean} | {cell} |")
    return "\n".join(lines) + "\n"


def uncertainty_table(maps: Mapping[str, Sequence[tuple[float, float, float, float]]]) -> str:
    """Return the table of what each map tells."""
    lines = ["| map | AUROC | AUROC near | rank correlation with 1 - Dice |", "|---|---|---|---|"]
    for name, rows in maps.items():
        values = np.array(rows)
        rank = stats.spearmanr(values[:, 2], values[:, 3]).statistic if len(rows) > 2 else float("nan")
        lines.append(
            f"| {name} | {np.nanmean(values[:, 0]):.3f} | {np.nanmean(values[:, 1]):.3f} | {rank:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
