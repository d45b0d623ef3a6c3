"""How near cheaper weights are to the full ones.

The full weights take the clean batch in all views, tangents for all parameters, float32, at every step. Each option
saves something; `python benchmarks/meta_step.py --sweep cheaper` says how much time and memory.

    python benchmarks/cheaper_weights.py RUN      # trained with mlb.sources=initial,pseudo, stage 1 finished

It prints, for each option, at stage 1's end, over some steps' batches: the cosine of the alignments g to the full
ones, and the share of pixels whose sign, kept or not, is the same. The last row is another draw of the clean batch:
what two equally good full directions differ by. What becomes of Dice: `python benchmarks/weight_worth.py`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from weight_evidence import copy_run

from mlbseg.core.directional import directional_derivative, loss_and_gradient
from mlbseg.core.losses import cross_entropy_map, supervised_loss, widened
from mlbseg.core.metaweights import alignment
from mlbseg.core.scope import parameters_in_scope
from mlbseg.core.views import draw_views
from mlbseg.runs import Run, checkpoints, make_student
from mlbseg.training.stages import Training
from mlbseg.types import Batch

OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "clean batch in one view": {"views": ()},
    "scope decoder": {"scope": "decoder"},
    "scope head": {"scope": "head"},
    "bfloat16": {"bf16": True},
    "one clean image": {"clean": 1},
    "another clean batch": {"other": True},
}


def alignments(
    model: torch.nn.Module, batch: Batch, clean: Batch, *, views: tuple[str, ...] = ("zoom-out", "zoom-in"),
    scope: Any = "all", bf16: bool = False,
) -> Tensor:  # fmt: skip
    """Return g (U, *S) of the initial label of the unlabelled batch, for the direction of the clean batch."""
    assert batch.image is not None
    assert batch.initial_label is not None
    label = batch.initial_label
    drawn = draw_views(range(len(clean.clean_image)), clean.clean_image.ndim - 2, views)
    x, y = drawn.expand(clean.clean_image), drawn.expand_label(clean.clean_label)
    inside = parameters_in_scope(model, x, scope)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        _, v = loss_and_gradient(model, x, lambda z: supervised_loss(widened(z), y), chunk=2)
        v = {name: t for name, t in v.items() if name in inside}
        logits, tangent = map(widened, directional_derivative(model, v, batch.image, chunk=2))
    return alignment(lambda z: cross_entropy_map(z, label), logits, tangent)


def compare(run: Run, batches: int) -> None:
    """Print how near each option's alignments are to the full ones."""
    training = Training(run, torch.device("cpu"), None)
    model = make_student(run.plan, run.config)
    last = [c for c in checkpoints.find(run.root / "checkpoints") if c.stage == 1][-1]
    weights = last.load(torch.device("cpu"))["method"]
    model.load_state_dict(
        {k.removeprefix("student."): t for k, t in weights.items() if k.startswith("student.")}
    )
    folder = run.root / "initial_labels"
    data = training._dataset(2, 2 * batches, {c.id: folder / f"{c.id}.npy" for c in training.others})
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in OPTIONS}
    for step in range(batches):
        batch, other = data[step], data[batches + step]
        full = alignments(model, batch, batch)
        for name, option in OPTIONS.items():
            settings = dict(option)
            clean = other if settings.pop("other", False) else batch
            if count := settings.pop("clean", None):
                clean = Batch(clean.clean_image[:count], clean.clean_label[:count])
            g = alignments(model, batch, clean, **settings)
            known = batch.initial_label >= 0  # type: ignore[operator]
            cosine = torch.cosine_similarity(g[known], full[known], dim=0)
            found[name].append((float(cosine), float(((g > 0) == (full > 0))[known].float().mean())))
    print(f"| weights ({batches} batches) | cosine to full | same sign |\n|---|---|---|")
    for name, pairs in found.items():
        cosine, same = np.array(pairs).T
        print(f"| {name} | {cosine.mean():.3f} ± {cosine.std():.3f} | {same.mean():.2f} ± {same.std():.2f} |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument(
        "--batches", type=int, default=8, help="steps whose batches are compared (default: 8)"
    )
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder) / "run"
        copy_run(asked.run, scratch, 2 * asked.batches + 1, [])
        compare(Run.open(scratch), asked.batches)


if __name__ == "__main__":
    main()
