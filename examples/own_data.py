"""Train on scans of which few have labels, segment new scans, and score them, from Python.

    python examples/own_data.py                                   # on generated scans, a few minutes on one CPU core
    python examples/own_data.py --data scans/ --new new_scans/ --references labels/ --out runs/a

What the command line does with `mlbseg check`, `train`, `predict` and `evaluate`; see docs/tutorial.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from phantoms import few_labels
from rich.console import Console

from mlbseg import evaluate, predict, train
from mlbseg.data.cases import find_cases
from mlbseg.data.check import check
from mlbseg.errors import UserError


def main() -> None:
    """Check, train, predict, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="folder of scans to train on, some labelled (default: phantoms)"
    )
    parser.add_argument("--new", type=Path, help="folder of scans to segment")
    parser.add_argument("--references", type=Path, help="their labels, to score the masks")
    parser.add_argument("--out", type=Path, default=Path("own_data"), help="folder to make")
    parser.add_argument("--steps", type=int, help="of training (default: the plan's; 400 for phantoms)")
    arguments = parser.parse_args()

    data, new, references, steps = arguments.data, arguments.new, arguments.references, arguments.steps
    if data is None:
        data, new, references = few_labels(arguments.out / "phantoms")
        steps = steps or 400

    found = check(find_cases(data))
    print(f"{found.summary['cases']} scans: {found.summary['roles']}")
    for fault in found.faults:
        print(f"fault: {fault}")
    if found.faults:
        raise SystemExit(2)

    overrides = [] if steps is None else [f"plan.steps={steps}"]
    run = train(data, arguments.out / "run", overrides=overrides, console=Console(stderr=True)).run
    if new is None:
        print(f"trained {run}; give --new FOLDER to segment scans with it")
        return
    masks = predict(run, new, arguments.out / "masks")
    print(f"{len(masks.masks)} masks in {arguments.out / 'masks'}")
    for fault in masks.faults:
        print(f"fault: {fault}")
    if references is None:
        return
    scores = evaluate(arguments.out / "masks", references, out=arguments.out / "scores.csv")
    for row in scores.rows:
        print(f"{row.case} {row.name}: Dice {row.scores.dice:.3f}")
    print(f"mean Dice {scores.mean_dice:.3f}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:  # a fault of data, settings or machine: its message says what to do
        sys.exit(f"error: {error}")
