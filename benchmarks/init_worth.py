r"""What starting weights are worth: from other scans, and from one's own run when labels were added.

Two questions, each for every seed, scored on test cases that choose nothing:

* ``across``: a source run on SOURCE, then TARGET from its weights and from nothing. Both have the same plan, network,
  stages and steps; only the first weights differ (and the warm-up that goes with weights).
* ``more``: a run on few labels, then one on more labels: from the weights of the first at a third of the steps, and
  from nothing at a third of the steps and at all of them.

A cell that is there is not trained again, so the command can be stopped and repeated.

    python benchmarks/init_worth.py across acdc la OUT --source-labelled 6 --labelled 4 --test 16 \
        --source-override plan.ndim=3 -o plan.spacing=1.25 -o plan.patch_size=40,56,56 --steps 900
    python benchmarks/init_worth.py across la hippocampus OUT --source-labelled 4 --labelled 3 --test 40 \
        -o plan.spacing=1.0 -o plan.patch_size=40,56,40 --steps 900
    python benchmarks/init_worth.py more hippocampus OUT --labelled 3 --further 6 --test 40 \
        -o plan.spacing=1.0 -o plan.patch_size=40,56,40 --steps 900
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mlbseg
from mlbseg.data.cases import find_cases
from mlbseg.data.plan import ARCHITECTURE
from mlbseg.data.records import read_record, write_record
from mlbseg.evaluation import evaluate
from mlbseg.inference import predict
from mlbseg.runs import Run


@dataclass(frozen=True)
class Cells:
    """Trainings on one data set.

    Attributes:
        data: The scans, all with labels.
        out: Where run folders and outcomes go.
        method: That is trained.
        test: Number of test cases.
        overrides: ``key=value`` settings.
    """

    data: Path
    out: Path
    method: str
    test: int
    overrides: Sequence[str]

    def train(
        self,
        name: str,
        *,
        labelled: int,
        seed: int,
        steps: int,
        init: Path | None = None,
        like: Path | None = None,
    ) -> Path:
        """Train a cell unless it is there, score it, and return its run folder.

        Args:
            name: Of the cell.
            labelled: Labels that it may see.
            seed: Random seed of split, weights and training.
            steps: Of all stages.
            init: A run to start from.
            like: A run whose network and stages the cell is to have.
        """
        run, outcome = self.out / name, self.out / f"{name}.json"
        if outcome.is_file():
            return run
        settings = [*self.overrides]
        if like is not None:
            plan = Run.open(like).plan.as_dict()
            settings += [f"plan.{field}={plain(plan[field])}" for field in ARCHITECTURE if plan[field]]
        settings.append("train.stage1_share=0.6667")  # the same for all
        begun = time.monotonic()
        resume = run if (run / "config.yaml").is_file() else None
        if resume is not None:
            mlbseg.train(resume=resume, device="cpu")
        else:
            mlbseg.train(
                self.data, run, method=self.method, labelled=labelled, test=self.test, seed=seed, overrides=settings,
                device="cpu", cache=self.out / "cache", init=init, steps=steps,
            )  # fmt: skip
        seconds = time.monotonic() - begun
        write_record(outcome, {"dice": self._score(run), "seconds": None if resume is not None else seconds})
        print(f"{name}: {mean(outcome):.4f} ({seconds:.0f} s)", flush=True)
        return run

    def _score(self, run: Path) -> dict[str, float]:
        """Return the mean Dice over classes of each test case."""
        labels = {case.id: case.label for case in find_cases(self.data).cases if case.label is not None}
        tested = {name: labels[name] for name in Run.open(run).split.test}
        with tempfile.TemporaryDirectory() as folder:
            faults = predict(run, self.data, folder, only=list(tested), device="cpu").faults
            found = evaluate(folder, tested)
        assert not faults
        assert not found.faults
        return {
            case: float(np.mean([row.scores.dice for row in found.rows if row.case == case]))
            for case in found.cases
        }


def plain(value: Any) -> str:
    """Return a plan's value as YAML that stands in one word."""
    return str(value).replace("(", "[").replace(")", "]").replace(",]", "]").replace("'", '"')


def mean(outcome: Path) -> float:
    """Return the mean Dice of an outcome."""
    return float(np.mean(list(dict(read_record(outcome, "an outcome")["dice"]).values())))  # type: ignore[call-overload]


def print_table(out: Path, cells: Sequence[str], seeds: Sequence[int]) -> None:
    """Print a row for each cell: Dice of each seed, their mean, and the seconds that training took."""
    print(f"\n| training | {' | '.join(f'seed {s}' for s in seeds)} | mean | seconds |")
    print("|---|" + "---|" * (len(seeds) + 2))
    for name in cells:
        outcomes = [out / f"{name}-{seed}.json" for seed in seeds]
        dice = [mean(outcome) for outcome in outcomes]
        took = [read_record(outcome, "an outcome")["seconds"] for outcome in outcomes]
        known = [float(str(seconds)) for seconds in took if seconds is not None]
        shown = f"{np.mean(known):.0f}" if known else "–"
        print(f"| {name} | {' | '.join(f'{d:.4f}' for d in dice)} | {np.mean(dice):.4f} | {shown} |")


def across(asked: argparse.Namespace) -> None:
    """Train on the source, then on the target from its weights and from nothing."""
    theirs, ours = asked.source.name, asked.target.name
    names = (f"source {theirs}", f"{ours} from {theirs}", f"{ours} from nothing")
    source = Cells(asked.source, asked.out, "supervised", asked.source_test, asked.source_override)
    target = Cells(asked.target, asked.out, asked.method, asked.test, asked.override)
    for seed in asked.seeds:
        begun = source.train(
            f"{names[0]}-{seed}",
            labelled=asked.source_labelled,
            seed=seed,
            steps=asked.source_steps or asked.steps,
        )
        warm = target.train(
            f"{names[1]}-{seed}", labelled=asked.labelled, seed=seed, steps=asked.steps, init=begun
        )
        target.train(f"{names[2]}-{seed}", labelled=asked.labelled, seed=seed, steps=asked.steps, like=warm)
    print_table(asked.out, names, asked.seeds)


def more(asked: argparse.Namespace) -> None:
    """Train on few labels, then on more: from these weights, and from nothing."""
    few, many, third = asked.labelled, asked.further, max(2, asked.steps // 3)
    names = (
        f"{few} labels, {asked.steps} steps", f"{many} labels, {third} steps, from the run before",
        f"{many} labels, {third} steps, from nothing", f"{many} labels, {asked.steps} steps, from nothing",
    )  # fmt: skip
    cells = Cells(asked.data, asked.out, asked.method, asked.test, asked.override)
    for seed in asked.seeds:
        first = cells.train(f"{names[0]}-{seed}", labelled=few, seed=seed, steps=asked.steps)
        cells.train(f"{names[1]}-{seed}", labelled=many, seed=seed, steps=third, init=first)
        cells.train(f"{names[2]}-{seed}", labelled=many, seed=seed, steps=third, like=first)
        cells.train(f"{names[3]}-{seed}", labelled=many, seed=seed, steps=asked.steps, like=first)
    print_table(asked.out, names, asked.seeds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, score and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(required=True)
    for name, function in (("across", across), ("more", more)):
        kind = kinds.add_parser(name)
        kind.set_defaults(function=function)
        if name == "across":
            kind.add_argument("source", type=Path, help="data set that the weights are trained on")
            kind.add_argument("target", type=Path, help="data set that is trained on from them")
            kind.add_argument(
                "--source-labelled", type=int, default=6, help="labels of the source (default: 6)"
            )
            kind.add_argument("--source-test", type=int, default=4, help="its test cases (default: 4)")
            kind.add_argument("--source-steps", type=int, help="its steps (default: those of the target)")
            kind.add_argument(
                "--source-override", action="append", default=[], help="key=value, of the source"
            )
        else:
            kind.add_argument("data", type=Path, help="data set of which all scans have labels")
            kind.add_argument("--further", type=int, default=6, help="labels in the end (default: 6)")
        kind.add_argument("out", type=Path, help="folder to make or to continue")
        kind.add_argument("--method", default="supervised")
        kind.add_argument("--labelled", type=int, default=3, help="first labels (default: 3)")
        kind.add_argument("--test", type=int, default=40, help="test cases (default: 40)")
        kind.add_argument("--steps", type=int, default=900, help="training steps (default: 900)")
        kind.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
        kind.add_argument(
            "-o", "--override", action="append", default=[], help="key=value, for all trainings"
        )
        kind.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    asked.function(asked)


if __name__ == "__main__":
    main()
