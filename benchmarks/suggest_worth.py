"""What the picks of `mlbseg suggest` are worth: retrained with them, and with as many random ones.

For each seed, a split of its own (first cases labelled, last ones for testing) and a supervised base run on the few
labels. The base picks `--n` more scans by each rule; besides, they are drawn at random, `--draws` times. Then the same
training, of the same steps, starts anew on the first labels and the picked ones. Nothing is chosen by the test cases,
which score each run once. A cell that is there is not trained again, so the command can be stopped and repeated.

    python benchmarks/suggest_worth.py DATA OUT -o plan.spacing=1.0 -o plan.patch_size=40,56,40 -o plan.steps=600
    python benchmarks/suggest_worth.py DATA OUT -o ... --evidence     # what a look tells of the true Dice
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import stats

import mlbseg
from mlbseg.apps.suggest import suggest
from mlbseg.apps.suggest.choose import RULES
from mlbseg.data.cases import find_cases
from mlbseg.data.records import read_record, write_record
from mlbseg.evaluation import evaluate
from mlbseg.inference import predict
from mlbseg.runs import Run

BASE = "base"
LEVEL = 0.95

Scores = dict[str, list[list[dict[str, float]]]]
"""Way to choose -> of each seed, of each draw, the Dice of each test case."""


@dataclass(frozen=True)
class Bench:
    """What all cells share.

    Attributes:
        data: The scans, all with labels.
        out: Where run folders and outcomes go.
        method: That is trained.
        labelled: Number of first labels.
        test: Number of test cases.
        overrides: ``key=value`` settings.
    """

    data: Path
    out: Path
    method: str
    labelled: int
    test: int
    overrides: Sequence[str]

    def run(self, seed: int, name: str) -> Path:
        """Return the run folder of a cell."""
        return self.out / f"seed-{seed}" / name

    def dice(self, seed: int, name: str, picked: Sequence[str] = ()) -> dict[str, float]:
        """Return the mean Dice over classes of each test case, of the base run or of one with more labels."""
        outcome = self.out / f"seed-{seed}" / f"{name}.json"
        if not outcome.is_file():
            begun = time.monotonic()
            self._train(seed, name, picked)
            run = self.run(seed, name)
            dice = self.score(run, Run.open(run).split.test)
            write_record(outcome, {"picked": list(picked), "dice": dice})
            mean = np.mean(list(dice.values()))
            print(f"seed {seed} {name}: {mean:.4f} ({time.monotonic() - begun:.0f} s)", flush=True)
        record = json.loads(json.dumps(read_record(outcome, "an outcome of this benchmark")))
        if record["picked"] != list(picked):
            raise SystemExit(f"{outcome}: of other picks, {record['picked']} (name another OUT)")
        return dict(record["dice"])

    def _train(self, seed: int, name: str, picked: Sequence[str]) -> None:
        root = self.run(seed, name)
        if (root / "config.yaml").is_file():
            mlbseg.train(resume=root, device="cpu")
            return
        labelled: int | list[str] = self.labelled
        if name != BASE:
            labelled = [*Run.open(self.run(seed, BASE)).split.clean, *picked]
        mlbseg.train(
            self.data, root, method=self.method, labelled=labelled, test=self.test, seed=seed,
            overrides=self.overrides, device="cpu", cache=self.out / "cache",
        )  # fmt: skip

    def score(self, run: Path, cases: Sequence[str]) -> dict[str, float]:
        """Return the mean Dice over classes of each of the cases, as the run segments them."""
        labels = {case.id: case.label for case in find_cases(self.data).cases if case.label is not None}
        tested = {name: labels[name] for name in cases}
        with tempfile.TemporaryDirectory() as folder:
            faults = predict(run, self.data, folder, only=list(tested), device="cpu").faults
            found = evaluate(folder, tested)
        assert not faults
        assert not found.faults
        assert set(found.cases) == set(tested)
        return {
            case: float(np.mean([row.scores.dice for row in found.rows if row.case == case]))
            for case in found.cases
        }


def evidence(bench: Bench, seed: int) -> str:
    """Return a row: how well what a look finds tells the true Dice of the base run on the unlabelled scans."""
    bench.dice(seed, BASE)
    run = bench.run(seed, BASE)
    pool = Run.open(run).split.unlabelled
    rows = {row.case: row for row in suggest(run, n=len(pool), device="cpu").suggested}
    dice = bench.score(run, pool)
    lost = [1 - dice[case] for case in rows]
    unsure = stats.spearmanr([row.uncertainty for row in rows.values()], lost).statistic
    unlike = stats.spearmanr([row.distance_to_labelled for row in rows.values()], lost).statistic
    return f"| {seed} | {mean_of(dice):.3f} | {unsure:.2f} | {unlike:.2f} |"


def interval(values: Sequence[float]) -> str:
    """Return the mean of the values with its 95 % interval by Student's t; the mean alone of one value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:+.4f}"
    half = stats.sem(values) * stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)
    return f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]"


def mean_of(dice: Mapping[str, float]) -> float:
    """Return the mean over cases."""
    return float(np.mean(list(dice.values())))


def worst_of(dice: Mapping[str, float]) -> float:
    """Return the mean over the worst tenth of the cases."""
    return float(np.mean(sorted(dice.values())[: max(1, len(dice) // 10)]))


def print_table(
    title: str, scores: Scores, seeds: Sequence[int], value: Callable[[Mapping[str, float]], float]
) -> None:
    """Print a row for each way to choose, with its gain over the mean of the random draws."""
    print(f"\n| {title} | {' | '.join(f'seed {s}' for s in seeds)} | to random [95 %] |")
    print("|---|" + "---|" * (len(seeds) + 1))
    values = {name: [[value(dice) for dice in draws] for draws in rows] for name, rows in scores.items()}
    for name, rows in values.items():
        cells = [
            f"{np.mean(draws):.4f}" + (f" ({min(draws):.4f} to {max(draws):.4f})" if len(draws) > 1 else "")
            for draws in rows
        ]
        gains = [float(np.mean(a) - np.mean(b)) for a, b in zip(rows, values["random"], strict=True)]
        print(f"| {name} | {' | '.join(cells)} | {'–' if name == 'random' else interval(gains)} |")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, score and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="dataset of which all scans have labels")
    parser.add_argument("out", type=Path, help="folder to make or to continue")
    parser.add_argument("--method", default="supervised")
    parser.add_argument("--labelled", type=int, default=3, help="first labels (default: 3)")
    parser.add_argument("--n", type=int, default=3, help="further labels (default: 3)")
    parser.add_argument("--test", type=int, default=40, help="test cases (default: 40)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--draws", type=int, default=2, help="random choices for each seed (default: 2)")
    parser.add_argument(
        "--rules", nargs="*", default=list(RULES), choices=RULES, help="of `mlbseg.apps.suggest`"
    )
    parser.add_argument("-o", "--override", action="append", default=[], help="key=value, for all trainings")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--evidence",
        action="store_true",
        help="only compare what a look finds with the true Dice (rank correlation)",
    )
    asked = parser.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    bench = Bench(asked.data, asked.out, asked.method, asked.labelled, asked.test, asked.override)
    if asked.evidence:
        print("| seed | Dice of the unlabelled scans | uncertainty to 1 - Dice | distance to 1 - Dice |")
        print("|---|---|---|---|", *(evidence(bench, seed) for seed in asked.seeds), sep="\n")
        return
    scores: Scores = {}
    for seed in asked.seeds:
        scores.setdefault("none", []).append([bench.dice(seed, BASE)])
        for rule in asked.rules:
            found = suggest(bench.run(seed, BASE), n=asked.n, rule=rule, device="cpu")
            picked = [row.case for row in found.suggested]
            scores.setdefault(rule, []).append([bench.dice(seed, rule, picked)])
        pool = sorted(Run.open(bench.run(seed, BASE)).split.unlabelled)
        drawn = []
        for draw in range(asked.draws):
            picked = np.random.default_rng([seed, draw]).choice(pool, asked.n, replace=False).tolist()
            drawn.append(bench.dice(seed, f"random-{draw}", picked))
        scores.setdefault("random", []).append(drawn)
    print_table(f"{asked.n} further labels, mean Dice", scores, asked.seeds, mean_of)
    print_table("mean Dice of the worst tenth of the test scans", scores, asked.seeds, worst_of)


if __name__ == "__main__":
    main()
