"""What labels of a part are worth: scribbles, some slices, some classes, beside labels of the whole.

Three comparisons, each by its own labels of the same training scans, its methods and seeds, scored once on whole labels
of test scans that choose nothing:

    scribbles   DATA/scribbles (`--ignore` stands for not drawn), against DATA/labels of the same scans
    slices      every n-th slice of K scans, against K scans labelled whole and as many whole as make the same number
                of drawn slices; the other training scans have no label
    classes     each class drawn in its own share of the scans, against all classes in one share of them, and against
                the naive reading, in which what was not drawn is background

Spacing, patch, batch and steps are the same in all arms: those that `mlbseg.plan` decides from the whole labels, unless
`-o` says otherwise. A cell that is there is not trained again, so the command can be stopped and repeated.

    python benchmarks/partial_labels.py scribbles DATA/acdc OUT --test 40 --seeds 0,1 -o steps=1500
    python benchmarks/partial_labels.py slices DATA/la OUT --labelled 8 --every 8 --test 16 --seeds 0,1 \
        -o plan.spacing=1.25
    python benchmarks/partial_labels.py classes DATA/hippocampus OUT --train 40 --test 40 --seeds 0,1
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import mlbseg
from mlbseg.data.cases import Dataset
from mlbseg.data.readers import read_label, write_label
from mlbseg.data.records import read_record, write_record
from mlbseg.data.source import DataSource
from mlbseg.data.splits import make_split
from mlbseg.evaluation import evaluate
from mlbseg.files import write_table
from mlbseg.inference import predict
from mlbseg.runs import Run
from mlbseg.types import Case, Geometry

WHOLE = "whole labels"
PINNED = ("spacing", "patch_size", "batch_size", "steps")
"""Decisions of the plan that all arms share."""


@dataclass(frozen=True)
class Labels:
    """Labels that training may see.

    Attributes:
        name: Of the table's rows.
        of: The label file of each case; a case that is not there has none.
        columns: Further columns of the list of cases, by case.
        methods: That are trained on them.
        ignore: The value that stands for not known.
    """

    name: str
    of: Mapping[str, Path]
    methods: Sequence[str]
    columns: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    ignore: int | None = None


@dataclass(frozen=True)
class Bench:
    """What all cells share.

    Attributes:
        out: Where lists, run folders and outcomes go.
        cases: All cases, with their whole labels.
        train: Ids of the training scans.
        test: Ids of the test scans.
        overrides: ``key=value`` settings.
        crf: Weight of the CRF in rows of methods that end in ``+crf``.
    """

    out: Path
    cases: Mapping[str, Case]
    train: Sequence[str]
    test: Sequence[str]
    overrides: Sequence[str]
    crf: float

    def dice(self, labels: Labels, method: str, seed: int) -> dict[str, float]:
        """Return the mean Dice over classes of each test case, of a cell that is trained if it is not there."""
        name = f"{labels.name}, {method}".replace(" ", "-").replace(",", "")
        outcome = self.out / f"seed-{seed}" / f"{name}.json"
        if not outcome.is_file():
            begun = time.monotonic()
            run = self.out / f"seed-{seed}" / name
            self._train(run, labels, method, seed)
            dice = self._score(run)
            write_record(outcome, {"dice": dice})
            mean = np.mean(list(dice.values()))
            print(
                f"seed {seed} {labels.name}, {method}: {mean:.4f} ({time.monotonic() - begun:.0f} s)",
                flush=True,
            )
        return dict(json.loads(json.dumps(read_record(outcome, "an outcome of this benchmark")))["dice"])

    def _train(self, run: Path, labels: Labels, method: str, seed: int) -> None:
        if (run / "config.yaml").is_file():
            mlbseg.train(resume=run, device="cpu")
            return
        kind, _, crf = method.partition("+")
        more = [f"train.crf={self.crf}"] if crf else []
        mlbseg.train(
            self.listed(labels), run, method=kind, seed=seed, overrides=[*self.overrides, *more], ignore=labels.ignore,
            device="cpu", cache=self.out / "cache",
        )  # fmt: skip

    def listed(self, labels: Labels) -> Path:
        """Write the list of cases of an arm; test scans have no label there."""
        path = self.out / "lists" / f"{labels.name.replace(' ', '-')}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        keys = sorted({key for columns in labels.columns.values() for key in columns})
        rows = []
        for name in [*self.train, *self.test]:
            case = self.cases[name]
            (image,) = case.images
            label = labels.of.get(name) if name in set(self.train) else None
            rows.append(
                {
                    "id": name,
                    "image": str(image.resolve()),
                    "label": "" if label is None else str(label.resolve()),
                    "role": "test" if name in set(self.test) else "",
                    "patient": case.patient,
                    **{key: labels.columns.get(name, {}).get(key, "") if label else "" for key in keys},
                }
            )
        write_table(path, rows, list(rows[0]))
        return path

    def _score(self, run: Path) -> dict[str, float]:
        tested = {name: self.cases[name] for name in self.test}
        with tempfile.TemporaryDirectory() as folder:
            faults = predict(run, run_list(run), folder, only=list(tested), device="cpu").faults
            if faults:
                raise SystemExit("\n".join(map(str, faults)))
            rows = evaluate(folder, tested, classes=Run.open(run).plan.structures).rows
        return {
            name: float(np.mean([row.scores.dice for row in rows if row.case == name])) for name in tested
        }

    def pinned(self) -> list[str]:
        """Return the decisions of the plan that whole labels lead to, as settings."""
        whole = Labels(WHOLE, {name: _label(self.cases[name]) for name in self.train}, ())
        plan = mlbseg.plan(
            self.listed(whole),
            method="supervised",
            overrides=self.overrides,
            device="cpu",
            cache=self.out / "cache",
        ).plan
        values = {name: getattr(plan, name) for name in PINNED}
        values["unlabelled_batch_size"] = plan.batch_size
        return [f"plan.{name}={json.dumps(value)}" for name, value in values.items()]


def run_list(run: Path) -> Path:
    """Return the list of cases that a run was trained on."""
    return Run.open(run).scans


def _label(case: Case) -> Path:
    if case.label is None:
        raise SystemExit(f"{case.id}: has no label, and this benchmark needs whole labels of all scans")
    return case.label


def scribbles(bench: Bench, asked: argparse.Namespace) -> Iterator[Labels]:
    """Yield scribbles, and whole labels of the same scans."""
    drawn = {path.name.removesuffix(".nii.gz"): path for path in sorted((asked.data / "scribbles").iterdir())}
    methods = ("supervised", "supervised+crf", asked.method, f"{asked.method}+crf")
    yield Labels("scribbles", {name: drawn[name] for name in bench.train}, methods, ignore=asked.ignore)
    yield Labels(WHOLE, {name: _label(bench.cases[name]) for name in bench.train}, ("supervised",))


def slices(bench: Bench, asked: argparse.Namespace) -> Iterator[Labels]:
    """Yield every n-th slice of some scans, whole labels of these, and as many drawn slices in whole labels."""
    chosen = bench.train[: asked.labelled]
    thinned = {name: bench.out / "slices" / f"{name}.nii.gz" for name in chosen}
    for name, path in thinned.items():
        label, geometry = read_label(_label(bench.cases[name]))
        label[np.arange(len(label)) % asked.every != asked.every // 2] = 0
        _write(path, label, geometry)
    methods = ("supervised", asked.method)
    whole = {name: _label(bench.cases[name]) for name in chosen}
    yield Labels(f"{len(chosen)} sparse", thinned, methods, {name: {"sparse": "yes"} for name in chosen})
    few = max(1, round(len(chosen) / asked.every))
    yield Labels(f"{few} whole", {name: whole[name] for name in chosen[:few]}, methods)
    yield Labels(f"{len(chosen)} whole", whole, methods)


def classes(bench: Bench, asked: argparse.Namespace) -> Iterator[Labels]:
    """Yield each class in its own share of the scans, with and without saying so, and all classes in one share."""
    values = sorted(
        {int(v) for name in bench.train for v in np.unique(read_label(_label(bench.cases[name]))[0])} - {0}
    )
    single = {name: values[i % len(values)] for i, name in enumerate(bench.train)}
    split = {name: bench.out / "classes" / f"{name}.nii.gz" for name in bench.train}
    for name, path in split.items():
        label, geometry = read_label(_label(bench.cases[name]))
        _write(path, np.where(label == single[name], label, 0), geometry)
    columns = {name: {"classes": str(value), "empty": "yes"} for name, value in single.items()}
    yield Labels("split classes", split, ("supervised", asked.method), columns)
    naive = {name: {"empty": "yes"} for name in single}
    yield Labels("split classes as background", split, ("supervised",), naive)
    share = {name: _label(bench.cases[name]) for name in bench.train[:: len(values)]}
    yield Labels(f"all classes in 1 of {len(values)} scans", share, ("supervised", asked.method))


def _write(path: Path, label: np.ndarray, geometry: Geometry) -> None:
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_label(path, label, geometry)


COMPARISONS = {"scribbles": scribbles, "slices": slices, "classes": classes}


def divide(dataset: Dataset, asked: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Return training and test scans, patients kept whole; the training scans in the order of the data."""
    split = make_split(dataset.cases, order=dataset.order, test=asked.test, seed=0, patients=dataset.patients)
    return list(split.clean[: asked.train]), list(split.test)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("comparison", choices=COMPARISONS)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--method", default="mlb")
    parser.add_argument("--train", type=int, help="training scans (default: all that are no test scans)")
    parser.add_argument("--test", type=int, required=True, help="test scans")
    parser.add_argument("--labelled", type=int, default=8, help="slices: scans with a label")
    parser.add_argument("--every", type=int, default=8, help="slices: one of so many is drawn")
    parser.add_argument(
        "--ignore", type=int, default=4, help="scribbles: the value of voxels that were not drawn"
    )
    parser.add_argument("--crf", type=float, default=0.3, help="scribbles: train.crf in the rows with it")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--override", action="append", default=[])
    asked = parser.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    dataset = DataSource(asked.data).find()
    train, test = divide(dataset, asked)
    bench = Bench(asked.out, {c.id: c for c in dataset.cases}, train, test, asked.override, asked.crf)
    pinned = bench.pinned()
    bench = Bench(asked.out, bench.cases, train, test, [*asked.override, *pinned], asked.crf)
    print(f"{len(train)} training and {len(test)} test scans; {' '.join(pinned)}", flush=True)
    seeds = [int(seed) for seed in asked.seeds.split(",")]
    rows = []
    for labels in COMPARISONS[asked.comparison](bench, asked):
        for method in labels.methods:
            means = [float(np.mean(list(bench.dice(labels, method, seed).values()))) for seed in seeds]
            rows.append((labels.name, method, means))
    print(f"| labels | method | {' | '.join(f'seed {seed}' for seed in seeds)} | mean |")
    print("|---|---|" + "---|" * (len(seeds) + 1))
    for name, method, means in rows:
        print(f"| {name} | {method} | {' | '.join(f'{mean:.4f}' for mean in means)} | {np.mean(means):.4f} |")


if __name__ == "__main__":
    main()
