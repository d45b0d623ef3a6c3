"""Do the weights of the bootstrap stage mean something? Measured with true labels that training never sees.

Stage 2 of a run is trained anew for some steps, in a copy of the run folder, from stage 1's end. Every now and
then the direction v that the method itself uses gives the alignment of every pixel of some unlabelled scans, and
true labels say which of the initial and of the pseudo labels are wrong.

    python benchmarks/weight_evidence.py RUN DATA --out evidence/    # DATA: the scans with all of their labels
    python benchmarks/weight_evidence.py RUN DATA --out evidence/ -o mlb.views=[]           # without PLE's views
    python benchmarks/weight_evidence.py RUN DATA --out evidence/ -o mlb.teacher_decay=0    # without a mean teacher

It writes weights.csv and weights.png, and prints the table:

pixels    all; unsure: the network gives the label 0.02 to 0.98; differ: the two labels are not the same
wrong     share of these pixels whose label is wrong
g         AUROC of -g for "this label is wrong"; 0.5 is chance, above it the alignment finds wrong labels
push      the same of -g / (1 - p(label)): what the direction says once the size of the residual is taken out
1-p       the same of the residual 1 - p(label) alone, which costs nothing: what any alignment has to beat
both      the same of a logistic regression on the logit of p and the push, fitted to half of the scans and scored
          on the others: above 1-p, the direction adds to the network's own doubt
mass      wrong pixels' share of this source's weights over their share of its pixels, for each weighting;
          below 1 the weights avoid wrong labels. doubt: no alignment, but max(0, 2 p(label) - 1)
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from monai.inferers.utils import sliding_window_inference
from rich.console import Console
from scipy.stats import rankdata
from torch import Tensor, nn

import mlbseg
from mlbseg.config import load_config
from mlbseg.core.directional import directional_derivative
from mlbseg.core.losses import cross_entropy_map, residual_map
from mlbseg.core.metaweights import alignment
from mlbseg.core.views import draw_views
from mlbseg.data.cache import Cache
from mlbseg.data.cases import find_cases
from mlbseg.methods import mlb
from mlbseg.runs import Run, checkpoints
from mlbseg.types import Batch, Losses, Role

output_and_tangent = mlb.output_and_tangent  # the method's own, before the probe stands in its place
SOURCES = ("initial", "pseudo")
UNSURE = (0.02, 0.98)
PIXELS = 20_000  # of a scan and a group of pixels that enter an AUROC
WEIGHTINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "share": lambda g, r: g.clamp(min=0),
    "residual": lambda g, r: (g / r.clamp(min=1e-3)).clamp(min=0),
    "sign": lambda g, r: (g > 0).float(),
    "doubt": lambda g, r: (1 - 2 * r).clamp(min=0),
}
COLUMNS = ("step", "source", "pixels", "wrong", "g", "push", "1-p", "both", *WEIGHTINGS)

Direction = Mapping[str, Tensor]
Scan = dict[str, Tensor]
Table = list[dict[str, Any]]


def auroc(score: npt.NDArray[np.floating], positive: npt.NDArray[np.bool_]) -> float:
    """Return the chance that a positive scores higher than a negative, ties counted half; NaN without both."""
    n = int(positive.sum())
    others = len(positive) - n
    if not n or not others:
        return float("nan")
    return float((rankdata(score)[positive].sum() - n * (n + 1) / 2) / (n * others))


def logistic(x: npt.NDArray[np.floating], y: npt.NDArray[np.bool_], rounds: int = 20) -> npt.NDArray[Any]:
    """Return the coefficients of a lightly ridged logistic regression, by Newton's method; x has its constant."""
    beta = np.zeros(x.shape[1])
    for _ in range(rounds):
        p = 1 / (1 + np.exp(-np.clip(x @ beta, -30, 30)))
        hessian = (x * np.maximum(p * (1 - p), 1e-6)[:, None]).T @ x + 1e-3 * np.eye(len(beta))
        beta += np.linalg.solve(hessian, x.T @ (y - p) - 1e-3 * beta)
    return beta


def fitted_auroc(
    x: npt.NDArray[np.floating], wrong: npt.NDArray[np.bool_], odd: npt.NDArray[np.bool_]
) -> float:
    """Return the AUROC of a logistic regression fitted to half of the scans on the other half, the mean of both."""
    halves = [(a, b) for a, b in ((odd, ~odd), (~odd, odd)) if 0 < wrong[a].sum() < a.sum()]
    return float(np.mean([auroc(x[b] @ logistic(x[a], wrong[a]), wrong[b]) for a, b in halves] or [np.nan]))


class Probe:
    """Watches stage 2: keeps the direction of due steps' weights and measures with it, before the step is taken.

    Args:
        run: The run; its last unlabelled cases are measured.
        data: Root of a dataset with the true labels of these cases.
        cache: Of the run.
        scans: How many cases.
        every: Steps between measurements.
    """

    def __init__(self, run: Run, data: Path, cache: Path, scans: int, every: int) -> None:
        self.run, self.every = run, every
        self.cache = Cache(cache, run.plan)
        # Only here is a case that training calls unlabelled read as a clean one.
        self.known = {c.id: c.with_role(Role.CLEAN) for c in find_cases(data).cases if c.label is not None}
        self.cases = [self.known[name] for name in run.split.unlabelled[-scans:] if name in self.known]
        if not self.cases:
            raise SystemExit(f"{data}: no true label of any unlabelled case of the run")
        self.table: Table = []
        self.shown: dict[int, Scan] = {}
        self.step, self.done = 0, -1
        self.method: mlb.MLB | None = None

    def install(self) -> None:
        """Put the probe between the method and its forward-mode pass."""
        losses = mlb.MLB.losses

        def watched(method: mlb.MLB, batch: Batch, step: int) -> Iterator[Losses]:
            self.method, self.step = method, step
            return losses(method, batch, step)

        def derivative(model: nn.Module, direction: Direction, x: Tensor) -> Any:
            if self.step % self.every == 0 and self.step != self.done:
                self.done = self.step
                with torch.autocast(x.device.type, enabled=False):
                    self.measure(model, direction, self.step)
            return output_and_tangent(model, direction, x)

        mlb.MLB.losses = watched  # type: ignore[method-assign]
        mlb.output_and_tangent = derivative  # type: ignore[attr-defined]

    def measure(self, model: nn.Module, direction: Direction, name: int | str) -> None:
        """Add rows to the table, whose first column is `name`."""
        scans = [self._scan(case, model, direction) for case in self.cases]
        self.shown[self.step] = scans[0]
        for source in SOURCES:
            groups: dict[str, Callable[[Scan], Tensor]] = {
                "all": lambda s: s["true"] >= 0,
                "unsure": lambda s, n=source: (s[f"r_{n}"] - 0.5).abs() < UNSURE[1] - 0.5,
                "differ": lambda s: s["initial"] != s["pseudo"],
            }
            for pixels, group in groups.items():
                row = {"step": name, "source": source, "pixels": pixels, **_row(scans, source, group)}
                self.table.append(row)
                print(line(row), flush=True)

    def _scan(self, case: Any, model: nn.Module, direction: Direction) -> Scan:
        """Return a scan's labels, alignments g_* and residuals r_* of both sources, each (*S)."""
        image = torch.from_numpy(np.asarray(self.cache.image(case).array[...]))
        logits, tangent = self._slide(
            image, lambda x: torch.cat(directional_derivative(model, direction, x), 1)
        ).chunk(2, 1)
        initial = np.load(self.run.root / "initial_labels" / f"{case.id}.npy", allow_pickle=False)
        scan = {
            "image": image[0],
            "true": torch.from_numpy(np.asarray(self.cache.label(case)[...])).long(),
            "initial": torch.from_numpy(initial).long(),
            "pseudo": self._slide(image, self._ensemble).argmax(1).reshape(initial.shape),
        }
        shape = (logits.shape[1], *initial.shape)
        # (Z, K, Y, X) of a 2D network's slices, (1, K, *S) otherwise
        logits, tangent = (t.movedim(1, 0).reshape(1, *shape) for t in (logits, tangent))
        for source in SOURCES:
            label = scan[source].unsqueeze(0)
            scan[f"r_{source}"] = residual_map(logits, label)[0]
            scan[f"g_{source}"] = alignment(partial(cross_entropy_map, label=label), logits, tangent)[0]
        return scan

    def _slide(self, image: Tensor, predictor: Callable[[Tensor], Tensor]) -> Tensor:
        patch = self.run.plan.patch_size
        x = image.movedim(1, 0) if len(patch) < image.ndim - 1 else image.unsqueeze(0)
        result: Tensor = sliding_window_inference(
            x, tuple(patch), 1, predictor, overlap=0.25, mode="gaussian", padding_mode="replicate"
        )
        return result

    @torch.no_grad()
    def _ensemble(self, x: Tensor) -> Tensor:
        """Return the views' mean probabilities, as the method's pseudo label has them."""
        method = self.method
        assert method is not None
        network = method.teacher if method.pseudo_from == "teacher" else method.student
        seeds = [self.step * len(x) + i for i in range(len(x))]
        views = draw_views(
            seeds, x.ndim - 2, method.views, device=x.device,
            flip_axes=method.flip_axes, zoom=method.zoom,
        )  # fmt: skip
        aligned, seen = views.align(torch.softmax(network(views.expand(x)).float(), 1))
        return (aligned * seen).sum(0) / seen.sum(0)


def _row(scans: list[Scan], source: str, group: Callable[[Scan], Tensor]) -> dict[str, float]:
    """Return the figures of one label source over one group of pixels."""
    random = np.random.default_rng(0)
    found: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in ("g", "r", "y", "wrong", "scan")}
    mass = dict.fromkeys(WEIGHTINGS, 0.0)
    mass_wrong = dict.fromkeys(WEIGHTINGS, 0.0)
    count = count_wrong = 0
    for number, scan in enumerate(scans):
        inside = group(scan)
        g, r, y = (scan[name][inside] for name in (f"g_{source}", f"r_{source}", source))
        wrong = y != scan["true"][inside]
        count, count_wrong = count + len(wrong), count_wrong + int(wrong.sum())
        for name, weight in WEIGHTINGS.items():
            w = weight(g, r).double()
            mass[name] += float(w.sum())
            mass_wrong[name] += float(w[wrong].sum())
        # A sample: ranks of millions of pixels say no more.
        chosen = random.permutation(len(wrong))[:PIXELS]
        for name, values in {"g": g, "r": r, "y": y, "wrong": wrong}.items():
            found[name].append(values.numpy()[chosen])
        found["scan"].append(np.full(len(chosen), number))
    g, r, y, wrong, number = (np.concatenate(found[n]) for n in ("g", "r", "y", "wrong", "scan"))
    push = g / np.maximum(r, 1e-3)
    logit = np.log(np.clip(r, 1e-4, 1 - 1e-4) / np.clip(1 - r, 1e-4, 1 - 1e-4))
    told = np.tanh(push / (push.std() + 1e-20))
    both = np.stack([np.ones_like(logit), logit, told], 1)
    odd = number % 2 == 1
    return {
        "n": count,
        "wrong": count_wrong / max(count, 1),
        "g": auroc(-g, wrong),
        "push": auroc(-push, wrong),
        "1-p": auroc(r, wrong),
        "both": fitted_auroc(both, wrong, odd),
        **{
            name: mass_wrong[name] / max(mass[name], 1e-30) / max(count_wrong / max(count, 1), 1e-30)
            for name in WEIGHTINGS
        },
    }


def summary(table: Table) -> Table:
    """Return mean and SD over the measured steps of each group of pixels: a direction may differ at every step."""
    rows: Table = []
    for group in dict.fromkeys((row["source"], row["pixels"]) for row in table):
        mine = [row for row in table if (row["source"], row["pixels"]) == group]
        for name, over in (("mean", np.nanmean), ("SD", np.nanstd)):
            figures = {c: float(over([row[c] for row in mine])) for c in ("n", *COLUMNS[3:])}
            rows.append({"step": name, "source": group[0], "pixels": group[1], **figures})
    return rows


def line(row: dict[str, Any]) -> str:
    """Return a row of the table in Markdown."""
    cells = [f"{row[c]:.3f}" if isinstance(row[c], float) else str(row[c]) for c in COLUMNS]
    return f"| {' | '.join(cells)} |"


def draw(shown: dict[int, Scan], weighting: str, path: Path) -> None:
    """Draw the first and the last measured step of one scan, in the slice with most wrong initial labels."""
    steps = sorted({min(shown), max(shown)})
    titles = (
        "scan, truth (solid), initial (dotted)", "initial label wrong", "push towards the initial label",
        "weight of the initial label", "weight of the pseudo label",
    )  # fmt: skip
    errors = shown[steps[0]]["initial"] != shown[steps[0]]["true"]
    height = 2.6 * errors.shape[-2] / errors.shape[-1]
    figure = Figure(figsize=(2.6 * len(titles), (height + 0.1) * len(steps) + 0.3), layout="constrained")
    axes = figure.subplots(len(steps), len(titles), squeeze=False)
    plane = (int(errors.flatten(1).sum(1).argmax()),) if errors.ndim == 3 else ()
    for step, row in zip(steps, axes, strict=True):
        scan = {name: values[plane] for name, values in shown[step].items()}
        push = scan["g_initial"] / scan["r_initial"].clamp(min=1e-3)
        limit = float(push.abs().quantile(0.98)) or 1.0
        low, high = np.percentile(scan["image"], [1, 99])
        row[0].imshow(scan["image"], cmap="gray", vmin=low, vmax=high)
        row[0].contour(scan["true"] > 0, levels=[0.5], colors=["#ffb000"], linewidths=1.2)
        row[0].contour(
            scan["initial"] > 0, levels=[0.5], colors=["#00b4d8"], linewidths=1, linestyles="dotted"
        )
        row[1].imshow(scan["initial"] != scan["true"], cmap="gray")
        row[2].imshow(push, cmap="PuOr", vmin=-limit, vmax=limit)
        for axis, source in zip(row[3:], SOURCES, strict=True):
            weight = WEIGHTINGS.get(weighting, WEIGHTINGS["share"])(scan[f"g_{source}"], scan[f"r_{source}"])
            axis.imshow(weight, cmap="magma", vmin=0, vmax=float(weight.quantile(0.995)) or 1.0)
            axis.contour(scan[source] != scan["true"], levels=[0.5], colors=["#7ae582"], linewidths=0.6)
        row[0].set_ylabel(f"step {step}", fontsize=8)
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=8)
    figure.savefig(path, dpi=110)


def copy_run(root: Path, scratch: Path, steps: int, overrides: list[str]) -> None:
    """Copy a run at its stage 1's end, with `steps` steps of stage 2 before it."""
    before = [c for c in checkpoints.find(root / "checkpoints") if c.stage == 1]
    if not before or not (root / "initial_labels").is_dir():
        raise SystemExit(
            f"{root}: stage 1 has not finished, or made no initial labels (train with -o mlb.sources=initial,pseudo)"
        )
    shutil.copytree(
        root, scratch, ignore=shutil.ignore_patterns("stage2-*", "tensorboard", "*.safetensors", ".lock")
    )
    first = before[-1].step
    plan = json.loads((root / "plan.json").read_text(encoding="utf-8"))
    (scratch / "plan.json").write_text(json.dumps({**plan, "steps": first + steps}), encoding="utf-8")
    share = f"train.stage1_share={first / (first + steps)!r}"
    load_config(root / "config.yaml", overrides=[*overrides, share]).write(scratch / "config.yaml")


def main() -> None:
    """Train, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder of the method mlb whose stage 1 is finished")
    parser.add_argument("data", type=Path, help="dataset with the true labels of the run's unlabelled scans")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights.csv and weights.png")
    parser.add_argument("--scans", type=int, default=8, help="unlabelled scans to measure (default: 8)")
    parser.add_argument("--steps", type=int, default=200, help="steps of stage 2 (default: 200)")
    parser.add_argument("--every", type=int, default=50, help="steps between measurements (default: 50)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: 1)")
    parser.add_argument("-o", dest="overrides", action="append", default=[], help="setting, as for train")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    asked.out.mkdir(parents=True, exist_ok=True)
    config = load_config(asked.run / "config.yaml", overrides=asked.overrides)
    if not config.mlb.asks_direction(noisy=bool(Run.open(asked.run).split.noisy)):
        raise SystemExit("these settings leave nothing to a direction; add -o mlb.decides=everywhere")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder) / "run"
        # One step more, so that the weights after the last whole one are seen as well.
        copy_run(asked.run, scratch, asked.steps + 1, asked.overrides)
        cache = json.loads((scratch / "data.json").read_text(encoding="utf-8"))["cache"]
        run = Run.open(scratch)
        probe = Probe(run, asked.data, Path(cache), asked.scans, asked.every)
        probe.install()
        print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
        mlbseg.train(resume=scratch, device="cpu", console=Console(stderr=True))
    means = summary(probe.table)
    print("\n".join(map(line, means)))
    with (asked.out / "weights.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*COLUMNS[:3], "n", *COLUMNS[3:]])
        writer.writeheader()
        writer.writerows(probe.table + means)
    draw(probe.shown, run.config.mlb.weighting, asked.out / "weights.png")


if __name__ == "__main__":
    main()
