"""Compare methods on one split from Python, and read the result: a small bench.

    python examples/compare_methods.py                            # on generated scans, some ten minutes on one CPU core
    python examples/compare_methods.py --data scans/ --test 20 --labelled 4,8 --seeds 0,1,2 --out runs/bench

All scans of --data need labels: the bench hides those that it does not give. Run again, it continues; with more
methods, budgets or seeds it runs the new cells only. See docs/bench.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from mlbseg.apps.bench import bench
from mlbseg.data.phantom import write_phantoms
from mlbseg.errors import UserError


def main() -> None:
    """Run the bench and print the mean Dice of each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of scans with labels (default: phantoms)")
    parser.add_argument("--out", type=Path, default=Path("compare_methods"), help="folder to make")
    parser.add_argument("--methods", default="supervised,mean-teacher,bcp,mlb")
    parser.add_argument("--labelled", default="4", help="budgets of labels")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--test", type=int, default=6, help="cases set apart")
    parser.add_argument("--steps", type=int, help="of training (default: the plan's; 300 for phantoms)")
    parser.add_argument("--size", type=int, default=32, help="of the phantoms, voxels")
    arguments = parser.parse_args()

    data, steps = arguments.data, arguments.steps
    if data is None:
        data, steps = arguments.out / "phantoms", steps or 300
        if not data.is_dir():
            write_phantoms(data, count=20, seed=0, size=(arguments.size,) * 3)
    result = bench(
        data,
        arguments.out / "bench",
        methods=arguments.methods.split(","),
        labelled=[int(n) for n in arguments.labelled.split(",")],
        seeds=[int(n) for n in arguments.seeds.split(",")],
        test=arguments.test,
        upper=False,
        overrides=[] if steps is None else [f"plan.steps={steps}"],
        console=Console(stderr=True),
    )
    scores: dict[tuple[int, str], list[float]] = {}
    for cell in result.results.cells:
        if cell["dice"] is not None:
            scores.setdefault((cell["labelled"], cell["row"]), []).append(cell["dice"])
    for (labelled, method), dice in sorted(scores.items(), key=lambda item: (item[0][0], -max(item[1]))):
        print(f"{labelled} labels, {method}: mean Dice {sum(dice) / len(dice):.3f} ({len(dice)} seed(s))")
    print(f"tables and figure: {result.folder}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:  # a fault of data, settings or machine: its message says what to do
        sys.exit(f"error: {error}")
