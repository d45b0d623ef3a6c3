"""Which clean scans must the direction v come from? Compared at stage 1's end, with `weight_evidence.py`'s measures.

v is the gradient of the clean loss on the clean scans that stage 1 was trained on, as in the method, or on as many
other scans, whose true labels nothing was trained on: what a direction from disjoint scans could tell. Rows that
differ in their seed alone show what is chance.

    python benchmarks/weight_directions.py RUN DATA     # RUN and DATA as for weight_evidence.py
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from weight_evidence import COLUMNS, Direction, Probe

from mlbseg.core.losses import cross_entropy_map, soft_dice_loss, supervised_loss
from mlbseg.core.scope import parameters_in_scope
from mlbseg.data.augment import Augment
from mlbseg.data.batches import StepDataset
from mlbseg.methods.mlb import MLB
from mlbseg.runs import Run, checkpoints, make_student
from mlbseg.types import Case

MANY = 12
STRONG: dict[str, Any] = {
    "rotate": 25.0, "scale": 0.25, "affine": 1.0, "intensity": 1.0, "gamma": 0.8, "noise": 0.6,
}  # fmt: skip
Loss = Callable[[Tensor, Tensor], Tensor]


def mean_cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Return the mean cross-entropy over the known pixels: a scalar."""
    return cross_entropy_map(logits, label).sum() / (label >= 0).sum().clamp(min=1)


def stage1_student(run: Run) -> nn.Module:
    """Return the student as stage 1 left it."""
    last = [c for c in checkpoints.find(run.root / "checkpoints") if c.stage == 1][-1]
    weights = last.load(torch.device("cpu"))["method"]
    student = make_student(run.plan, run.config)
    student.load_state_dict({k.removeprefix("student."): v for k, v in weights.items() if "student." in k})
    return student.eval()


def mean_gradient(student: nn.Module, dataset: StepDataset, loss: Loss) -> Direction:
    """Return the loss's mean gradient over the batches of a dataset."""
    student.zero_grad()
    for step in range(len(dataset)):
        batch = dataset[step]
        (loss(student(batch.clean_image), batch.clean_label) / len(dataset)).backward()
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder of the method mlb whose stage 1 is finished")
    parser.add_argument("data", type=Path, help="dataset with the true labels of the run's unlabelled scans")
    parser.add_argument("--scans", type=int, default=8, help="unlabelled scans to measure (default: 8)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: 1)")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    run = Run.open(asked.run)
    plan, config = run.plan, run.config
    cache = json.loads((run.root / "data.json").read_text(encoding="utf-8"))["cache"]
    probe = Probe(run, asked.data, Path(cache), asked.scans, every=1)
    student = stage1_student(run)
    probe.method = MLB(student, **{**config.mlb.model_dump(), "flip_axes": plan.flip_axes})

    def direction(cases: Sequence[Case], steps: int, seed: int, loss: Loss, **augment: Any) -> Direction:
        dataset = StepDataset(
            probe.cache, cases, patch_size=plan.patch_size, batch_size=plan.batch_size,
            unlabelled_batch_size=plan.unlabelled_batch_size, steps=steps, seed=seed, stage=3,
            foreground=config.train.foreground,
            augment=Augment.make(plan.ndim, flip_axes=plan.flip_axes, **config.augment.model_dump() | augment),
        )  # fmt: skip
        return mean_gradient(student, dataset, loss)

    names = {
        "trained on": run.split.clean,
        # The first of the unlabelled; the last ones are measured.
        "others": run.split.unlabelled[: len(run.split.clean)],
    }
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for title, ids in names.items():
        cases = [probe.known[name] for name in ids]
        for seed in range(3):
            probe.measure(
                student, direction(cases, 1, seed, supervised_loss), f"{title}, 1 batch, seed {seed}"
            )
        several = f"{title}, {MANY} batches"
        whole = direction(cases, MANY, 0, supervised_loss)
        probe.measure(student, whole, several)
        for scope in ("decoder", "head"):
            inside = parameters_in_scope(student, torch.zeros(1, plan.channels, *plan.patch_size), scope)
            probe.measure(student, {n: t for n, t in whole.items() if n in inside}, f"{several}, {scope}")
        probe.measure(student, direction(cases, MANY, 0, mean_cross_entropy), f"{several}, cross-entropy")
        probe.measure(student, direction(cases, MANY, 0, soft_dice_loss), f"{several}, Dice")
        strong = direction(cases, MANY, 0, supervised_loss, **STRONG)
        probe.measure(student, strong, f"{several}, strong augmentation")


if __name__ == "__main__":
    main()
