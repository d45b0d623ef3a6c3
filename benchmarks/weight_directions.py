"""Does a clean gradient tell which labels are wrong? It depends on the scans that it comes from.

    mlbseg train DATA --method supervised --labelled 5 --test 40 --out RUN ...
    python benchmarks/weight_directions.py RUN DATA     # DATA has the labels that were hidden from RUN

Each unlabelled scan gets the label that the run's own network predicts. The alignment g of a pixel is the derivative
of its cost along v, the gradient of the loss on clean scans: those that the network was trained on, or as many others
whose true labels nothing was trained on. The table has the AUROC of -g for "this label is wrong" (0.5 is chance), over
all pixels and over the unsure ones, to whose label the network gives a probability of 0.02 to 0.98. The first row is
the AUROC of 1 - p(label), which needs no gradient. Rows that differ in their seed alone show what is chance.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import mannwhitneyu
from torch import Tensor, nn

from mlbseg.core import alignment, cross_entropy_map, directional_derivative, gradient, supervised_loss
from mlbseg.core.losses import residual_map, widened
from mlbseg.data.batches import StepDataset
from mlbseg.data.cache import Cache
from mlbseg.data.cases import find_cases
from mlbseg.runs import Run, augmentation_of
from mlbseg.types import Case, Role
from mlbseg.windows import slide_windows

MANY = 12
UNSURE = (0.02, 0.98)
PIXELS = 20_000
"""Of a scan and a group of pixels, that enter an AUROC."""

Groups = dict[str, npt.NDArray[np.bool_]]
Direction = dict[str, Tensor]


def auroc(score: npt.NDArray[np.floating], positive: npt.NDArray[np.bool_]) -> float:
    """Return the chance that a positive scores higher than a negative, ties counted half; NaN without both."""
    if positive.all() or not positive.any():
        return float("nan")
    pairs = int(positive.sum()) * int((~positive).sum())
    return float(mannwhitneyu(score[positive], score[~positive]).statistic / pairs)


class Bench:
    """The run's network, its data, and the scans that are measured."""

    def __init__(self, run: Run, data: Path, scans: int) -> None:
        self.run, self.network = run, run.network()
        self.cache = Cache(Path(run.data.cache), run.plan)
        # Only here is a case that training calls unlabelled read as a clean one.
        self.known = {c.id: c.with_role(Role.CLEAN) for c in find_cases(data).cases if c.label is not None}
        hidden = [name for name in run.split.unlabelled if name in self.known]
        clean = len(run.split.clean)
        if len(hidden) <= clean:
            raise SystemExit(
                f"{data}: {len(hidden)} unlabelled scans of the run have a label here, expected more than {clean}"
            )
        # The last ones are measured; the first ones, as many as the run has labels of, give another direction.
        self.sources = {"trained on": self._cases(run.split.clean), "others": self._cases(hidden[:clean])}
        self.measured = self._cases(hidden[max(clean, len(hidden) - scans) :])

    def _cases(self, names: Sequence[str]) -> list[Case]:
        return [self.known[name] for name in names]

    def direction(self, cases: Sequence[Case], batches: int, seed: int) -> Direction:
        """Return the mean gradient of the supervised loss over batches as training draws them."""
        plan, config = self.run.plan, self.run.config
        dataset = StepDataset(
            self.cache, cases, patch_size=plan.patch_size, batch_size=plan.batch_size, unlabelled_batch_size=0,
            steps=batches, seed=seed, stage=3, foreground=config.train.foreground,
            augment=augmentation_of(self.run),
        )  # fmt: skip
        total: Direction = {}
        for step in range(batches):
            batch = dataset[step]
            loss = supervised_loss(widened(self.network(batch.clean_image)), batch.clean_label)
            for name, tensor in gradient(loss, self.network).items():
                total[name] = total.get(name, torch.zeros_like(tensor)) + tensor / batches
        return total

    def row(self, title: str, score: Callable[[Tensor, Tensor, Tensor], Tensor], v: Direction) -> str:
        """Return a line of the table: the AUROC of a score of logits, their derivative along v, and the label."""
        found: dict[str, list[npt.NDArray[np.floating]]] = {"unsure": [], "all": []}
        errors: dict[str, list[npt.NDArray[np.bool_]]] = {"unsure": [], "all": []}
        chosen = np.random.default_rng(0)
        for case in self.measured:
            logits, tangent = self._maps(case, v)
            label = logits.argmax(1)
            wrong = label[0].numpy() != np.asarray(self.cache.label(case)[...])
            doubt = residual_map(logits, label)[0].numpy()
            values = score(logits, tangent, label)[0].numpy()
            groups = {
                "unsure": (doubt > 1 - UNSURE[1]) & (doubt < 1 - UNSURE[0]),
                "all": np.ones_like(wrong),
            }
            for name, inside in groups.items():
                sample = chosen.permutation(int(inside.sum()))[:PIXELS]
                found[name].append(values[inside][sample])
                errors[name].append(wrong[inside][sample])
        cells = [f"{auroc(np.concatenate(found[n]), np.concatenate(errors[n])):.3f}" for n in found]
        return f"| {title} | {' | '.join(cells)} |"

    def _maps(self, case: Case, v: Direction) -> tuple[Tensor, Tensor]:
        """Return the logits of a whole scan and their derivative along v, both (1, K, *S)."""

        def windows(x: Tensor) -> Tensor:
            return torch.cat([widened(t) for t in directional_derivative(self.network, v, x)], 1)

        plan = self.run.plan
        image = np.asarray(self.cache.image(case).array[...])
        maps = slide_windows(
            windows, image, patch_size=plan.patch_size, device=torch.device("cpu"), overlap=0.25
        )
        logits, tangent = torch.from_numpy(maps).unsqueeze(0).chunk(2, 1)
        return logits, tangent


def disagreement(logits: Tensor, tangent: Tensor, label: Tensor) -> Tensor:
    """Return -g (1, *S): large where following the label would raise the clean loss."""
    return -alignment(partial(cross_entropy_map, label=label), logits, tangent)


def residual(logits: Tensor, _: Tensor, label: Tensor) -> Tensor:
    """Return 1 - p(label), (1, *S)."""
    return residual_map(logits, label)


def zero(network: nn.Module) -> Direction:
    """Return a direction that moves nothing."""
    return {name: torch.zeros_like(p) for name, p in network.named_parameters()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="finished run of --method supervised")
    parser.add_argument("data", type=Path, help="dataset with the true labels of the run's unlabelled scans")
    parser.add_argument("--scans", type=int, default=8, help="unlabelled scans to measure (default: 8)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    bench = Bench(Run.open(asked.run), asked.data, asked.scans)
    print("| v | unsure pixels | all pixels |\n|---|---|---|")
    print(bench.row("none: 1 - p(label)", residual, zero(bench.network)), flush=True)
    for title, cases in bench.sources.items():
        for seed in range(3):
            v = bench.direction(cases, 1, seed)
            print(bench.row(f"{title}, 1 batch, seed {seed}", disagreement, v), flush=True)
        v = bench.direction(cases, MANY, 0)
        print(bench.row(f"{title}, {MANY} batches", disagreement, v), flush=True)


if __name__ == "__main__":
    main()
