"""What a threshold on the network's confidence keeps of its pseudo labels, and what flips do to them.

    python benchmarks/pseudo_label_trust.py RUN [CASES]      # whose unlabelled cases have labels that were hidden

It prints, without flips and over flips of all axes: mean Dice; and for each threshold the share of voxels, and of the
true structures' voxels, that is trusted, the rate of wrong labels among trusted voxels, and the share of all wrong
ones that is ignored.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from mlbseg.apps.export.nnunet import confidence
from mlbseg.data.cases import find_cases
from mlbseg.data.preprocess import restore_label
from mlbseg.data.readers import read_label
from mlbseg.metrics import dice
from mlbseg.runs import Run
from mlbseg.windows import case_probability

THRESHOLDS = (0.6, 0.7, 0.8, 0.9, 0.95)


def measure(run: Run, count: int, *, flips: bool) -> None:
    """Print a table of the run's first `count` unlabelled cases."""
    network = run.network()
    cases = {case.id: case for case in find_cases(run.scans).cases}
    scores, confident, wrong, structure = [], [], [], []
    for name in run.split.unlabelled[:count]:
        # Of all axes, also those that the plan does not allow.
        plan = replace(run.plan, flip_axes=tuple(range(run.plan.ndim)))
        probability, frame = case_probability(cases[name], network, plan, torch.device("cpu"), flips=flips)
        label = restore_label(probability, frame, run.plan)
        hidden = cases[name].label
        if hidden is None:
            raise SystemExit(f"{name} has no label to compare with")
        truth, _ = read_label(hidden)
        scores.append(np.mean([dice(label == v, truth == v) for v in run.plan.label_values[1:]]))
        confident.append(confidence(probability, frame).ravel())
        wrong.append((label != truth).ravel())
        structure.append((truth > 0).ravel())
    trust, errors, inside = map(np.concatenate, (confident, wrong, structure))
    print(f"flips={flips}: Dice {np.mean(scores):.3f} over {len(scores)} cases")
    for threshold in THRESHOLDS:
        kept = trust >= threshold
        print(
            f"  trust {threshold:.2f}: {kept.mean():.3f} of voxels, {kept[inside].mean():.3f} of the structures'; "
            f"wrong within {errors[kept].mean():.4f}; of all wrong ones ignored {(~kept)[errors].mean():.3f}"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="finished run")
    parser.add_argument(
        "cases", type=int, nargs="?", default=20, help="unlabelled cases to look at (default: 20)"
    )
    asked = parser.parse_args(arguments)
    for flips in (False, True):
        measure(Run.open(asked.run), asked.cases, flips=flips)


if __name__ == "__main__":
    main()
