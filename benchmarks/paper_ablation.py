"""The paper's ablation in the paper's setting: 2D slices, two classes, `--preset paper`, and a network for a CPU.

    python benchmarks/paper_ablation.py LA --out runs/ablation-la --test 16
    python benchmarks/paper_ablation.py ACDC --out runs/ablation-acdc --test 20 --structure 3     # left ventricle

Rows: supervised training; with the mean teacher's consistency alone; with that of views (PLE) too; with meta weights
on initial labels, and on initial and pseudo labels, without any consistency; all of it; all of it with uniform weights.
They share one stage 1. The table has Dice, Jaccard, 95HD and ASD, means over test scans, seeds and label sets, and the
paired difference to `all of it`. The bench in --out goes on where it was stopped, and has more in its table.md.

What is not the paper's: the network has a quarter of its filters, and training a fraction of its 120 epochs of all
slices; lr and clip are larger in turn. All are options.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from mlbseg.apps.bench import BenchRequest, run_bench
from mlbseg.apps.bench.results import Results
from mlbseg.apps.bench.statistics import difference
from mlbseg.data.cases import find_cases
from mlbseg.data.readers import read_label, write_label
from mlbseg.terminal import say

ALL = "all of it"
_BARE = "mlb.views=[] mlb.ple_weight=0 mlb.teacher_weight=0"
ROWS = {
    "supervised": "",
    "with mean teacher": "mlb.weighting=uniform mlb.pseudo_weight=0 mlb.views=[] mlb.ple_weight=0",
    "with mean teacher and PLE": "mlb.weighting=uniform mlb.pseudo_weight=0",
    "meta weights, initial labels": f"mlb.sources=initial {_BARE}",
    "meta weights, both labels": _BARE,
    ALL: "",
    "all of it, uniform weights": "mlb.weighting=uniform",
}
"""What each row sets on top of the preset."""
MEASURES = {"dice": "Dice", "jaccard": "Jaccard", "hd95_mm": "95HD (mm)", "assd_mm": "ASD (mm)"}


def request(asked: argparse.Namespace, data: Path) -> BenchRequest:
    """Return the bench of the rows that are asked for."""
    chosen = list(ROWS) if asked.rows is None else [name.strip() for name in asked.rows.split(";")]
    if unknown := set(chosen) - ROWS.keys():
        raise SystemExit(f"--rows: found {sorted(unknown)[0]!r}, expected some of {'; '.join(ROWS)}")
    overrides = [
        f"plan.network_channels={asked.channels}", f"plan.patch_size={asked.patch}", f"plan.spacing={asked.spacing}",
        f"plan.steps={asked.steps}", "train.stage1_share=0.5", f"train.lr={asked.lr}", f"train.lr_bootstrap={asked.lr}",
        f"train.clip={asked.clip}", *asked.override,
    ]  # fmt: skip
    return BenchRequest(
        data,
        methods=[name for name in chosen if name == "supervised"],
        variants=[f"{name}=mlb {ROWS[name]}" for name in chosen if name != "supervised"],
        budgets=[asked.labelled],
        seeds=list(range(asked.seeds)),
        label_seeds=list(range(asked.label_sets)),
        test=asked.test,
        upper=False,
        preset="paper",
        overrides=overrides,
        cache=asked.out / "cache",
        command="benchmarks/paper_ablation.py",
    )


def binary(data: Path, out: Path, value: int) -> Path:
    """Write a copy of a labelled data set whose labels show one structure alone; return its folder.

    Args:
        data: The data set; cases of one image file.
        out: A folder; what is there already is kept.
        value: Of the structure in the label files.
    """
    for part in ("images", "labels"):
        (out / part).mkdir(parents=True, exist_ok=True)
    for case in find_cases(data).cases:
        if case.label is None:
            continue
        ending = (
            "".join(case.images[0].suffixes[-2:]) if case.images[0].suffix == ".gz" else case.images[0].suffix
        )
        image, label = out / "images" / f"{case.id}{ending}", out / "labels" / f"{case.id}.nii.gz"
        if label.exists():
            continue
        shutil.copyfile(case.images[0], image)
        found, geometry = read_label(case.label)
        write_label(label, (found == value).astype(np.uint8), geometry)
    return out


def table(results: Results, budget: int) -> str:
    """Return the rows in Markdown."""
    heads = [*MEASURES.values(), f"Dice to {ALL} [95 % CI]", "runs"]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    by_label = {group.label: group for (_, own), group in results.groups.items() if own == budget}
    for name in ROWS:
        group = by_label.get(name)
        if group is None or not group.records:
            continue
        means = [group.mean(measure) for measure in MEASURES]
        cells = ["–" if mean is None else f"{mean.mean:.4g}" for mean in means]
        whole = by_label.get(ALL)
        found = None if whole is None or whole is group else difference(group.dice, whole.dice)
        if found is None:
            cells.append("–")
        else:
            ends = "–" if found.low is None or found.high is None else f"{found.low:+.4f}, {found.high:+.4f}"
            cells.append(f"{found.mean:+.4f} [{ends}]")
        lines.append(f"| {name} | {' | '.join(cells)} | {len(group.records)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is not yet there, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder of the bench")
    add: Any = parser.add_argument
    add("--test", type=int, required=True, help="test cases, the last ones")
    add("--structure", type=int, help="label value of the one structure; all others are background")
    add("--labelled", type=int, default=8)
    add("--seeds", type=int, default=2)
    add("--label-sets", type=int, default=1)
    add("--rows", help="some of the rows, semicolons between")
    add("--channels", default="[16,32,64,128,256]")
    add("--patch", type=int, default=144)
    add("--spacing", default="[0,1.25,1.25]", help="mm; 0: each scan's own slices")
    add("--steps", type=int, default=6000, help="of both stages, half each")
    add("--lr", type=float, default=0.02, help="the paper: 0.005")
    add("--clip", type=float, default=1.0, help="the paper: 0.2")
    add("--jobs", type=int, default=1)
    add("--threads", type=int)
    add("--device", default="auto")
    add("-o", dest="override", action="append", default=[], help="further settings, key=value")
    asked = parser.parse_args(arguments)
    data = asked.data
    if asked.structure is not None:
        data = binary(asked.data, asked.out.parent / f"{asked.out.name}-data", asked.structure)
    done = run_bench(
        asked.out, request(asked, data), jobs=asked.jobs, device=asked.device, threads=asked.threads,
        console=Console(stderr=True),
    )  # fmt: skip
    for row in done.results.failed:
        say(Console(stderr=True), f"failed: {row['row']}, seed {row['seed']}: {row['reason']}")
    print(table(done.results, asked.labelled))


if __name__ == "__main__":
    main()
