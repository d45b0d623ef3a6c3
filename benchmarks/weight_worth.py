"""What weights are worth: Dice after some steps of stage 2, with the weights, and nothing else, exchanged.

Every variant starts from the same stage 1 and draws the same batches. True labels of unlabelled scans, read from DATA,
score the teacher and make two of the references; no variant that a user can choose sees them.

    python benchmarks/weight_worth.py RUN DATA      # RUN: of mlb with mlb.decides=everywhere, stage 1 finished
    python benchmarks/weight_worth.py RUN DATA --variants default "every 2nd step"
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from weight_evidence import copy_run

import mlbseg
from mlbseg.data.batches import StepDataset
from mlbseg.data.cases import find_cases
from mlbseg.evaluation import evaluate
from mlbseg.inference import predict
from mlbseg.methods.mlb import MLB
from mlbseg.runs import Run
from mlbseg.training.stages import Training
from mlbseg.types import Batch, Case, Role

REFERENCES = ("other scans' direction", "perfect")
"""What a user cannot choose: weights along a direction of true labels, or of the truth itself."""

OPTIONS: dict[str, list[str]] = {
    "default": [],
    "clean batch in all views": ["mlb.clean_views=true"],
    "scope decoder": ["mlb.scope=decoder"],
    "scope head": ["mlb.scope=head"],
    "every 2nd step": ["mlb.every=2"],
    "every 4th step": ["mlb.every=4"],
    "share": ["mlb.weighting=share"],
    "residual": ["mlb.weighting=residual"],
    "all alike": ["mlb.weighting=uniform"],
    "random direction": ["mlb.direction=random"],
    "no weighted labels": ["mlb.pseudo_weight=0"],
}


@contextmanager
def exchanged(name: str, known: dict[str, Case]) -> Iterator[None]:
    """Let a reference's weights stand in for the method's; `known` holds the unlabelled cases with true labels."""
    with pytest.MonkeyPatch.context() as patch:
        if name == "other scans' direction":
            begin = Training.__init__

            def with_others(training: Training, *args: Any, **kwargs: Any) -> None:
                begin(training, *args, **kwargs)
                ids = [c.id for c in training.others if c.id in known]
                training.meta = [known[i] for i in ids[: len(training.clean)]]

            patch.setattr(Training, "__init__", with_others)
        elif name == "perfect":
            truth: dict[int, Tensor] = {}
            draw, losses, weigh = StepDataset.__getitem__, MLB.losses, MLB._weigh

            def with_truth(dataset: StepDataset, step: int) -> Batch:
                batch = draw(dataset, step)
                if dataset.others:
                    others, dataset.others = dataset.others, [known[c.id] for c in dataset.others]
                    try:
                        label = draw(dataset, step).initial_label
                    finally:
                        dataset.others = others
                    assert label is not None
                    truth[batch.seed] = label
                return batch

            def noted(method: MLB, batch: Batch, step: int) -> Any:
                truth[-1] = truth.pop(batch.seed, torch.empty(0))
                return losses(method, batch, step)

            def perfect(method: MLB, *arguments: Any) -> Any:
                labels, _ = weigh(method, *arguments)
                right = arguments[3].expand_label(truth[-1])  # by the views
                count = {n: ((y >= 0) & (y == right)).float() for n, y in labels.items()}
                total = sum(c.sum() for c in count.values())
                return labels, {n: c / total for n, c in count.items()}

            patch.setattr(StepDataset, "__getitem__", with_truth)
            patch.setattr(MLB, "losses", noted)
            patch.setattr(MLB, "_weigh", perfect)
        yield


def dice_of(run: Path, data: Path, cases: list[str]) -> np.ndarray:
    """Return the mean Dice over classes of each case."""
    labels = next(p for p in (data / "labels", data / "labelsTr") if p.is_dir())
    with tempfile.TemporaryDirectory() as folder:
        predict(run, data, folder, only=cases, device="cpu")
        rows = evaluate(folder, labels).rows
    return np.array([np.mean([r.scores.dice for r in rows if r.case == case]) for case in cases])


def main() -> None:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path, help="dataset with the true labels of the run's unlabelled scans")
    parser.add_argument("--steps", type=int, default=100, help="of stage 2 (default: 100)")
    parser.add_argument("--scans", type=int, default=16, help="unlabelled scans to score (default: 16)")
    parser.add_argument(
        "--variants", nargs="+", default=[*OPTIONS, *REFERENCES], choices=[*OPTIONS, *REFERENCES]
    )
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    known = {c.id: c.with_role(Role.CLEAN) for c in find_cases(asked.data).cases if c.label is not None}
    print(
        f"| weights ({asked.steps} steps) | Dice of {asked.scans} unlabelled scans | to the first row |\n|---|---|---|"
    )
    first: Any = None
    for name in asked.variants:
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder) / "run"
            copy_run(asked.run, scratch, asked.steps, OPTIONS.get(name, []))
            with exchanged(name, known):
                mlbseg.train(resume=scratch, device="cpu")
            dice = dice_of(scratch, asked.data, list(Run.open(scratch).split.unlabelled[-asked.scans :]))
        first = dice if first is None else first
        change, error = (dice - first).mean(), (dice - first).std(ddof=1) / len(dice) ** 0.5
        print(
            f"| {name} | {dice.mean():.4f} ± {dice.std(ddof=1):.4f} | {change:+.4f} ± {error:.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
