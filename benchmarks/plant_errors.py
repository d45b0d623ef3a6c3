"""Lay out an experiment with label errors: some cases with careful labels, many with labels of which a share is wrong.

    python benchmarks/plant_errors.py hippocampus --out planted/ --clean 8 --noisy 72 --test 40 --share 0.3

writes `noisy.csv` (careful cases clean, the others noisy, test cases apart), `trusting.csv` (the same, but every label
taken as clean), `planted.csv` (what was planted where) and the labels under `labels/`; images stay where they are.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlbseg.data.cases import find_cases
from mlbseg.data.planted import HABITS, KINDS, kinds_for, plant_error
from mlbseg.data.readers import read_label, write_label
from mlbseg.types import Role


def main(arguments: Sequence[str] | None = None) -> None:
    """Plant the errors."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="dataset of which all scans have labels")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--clean", type=int, required=True, help="cases with careful labels")
    parser.add_argument("--noisy", type=int, required=True, help="cases with unverified labels")
    parser.add_argument("--test", type=int, required=True, help="cases set apart for testing")
    parser.add_argument("--share", type=float, default=0.3, help="share of the noisy cases that get an error")
    parser.add_argument(
        "--kind", choices=[*KINDS, *HABITS], help="the one kind of error (default: those of KINDS in turn)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    asked = parser.parse_args(arguments)

    dataset = find_cases(asked.data)
    by_id = {case.id: case for case in dataset.cases if case.role is Role.CLEAN and case.label is not None}
    rng = np.random.default_rng(asked.seed)
    # As `train --labelled K` has it: the data's own order, else a seeded shuffle; the last ones are the test.
    rest = sorted(by_id.keys() - set(dataset.order))
    order = [i for i in dataset.order if i in by_id] + [rest[i] for i in rng.permutation(len(rest))]
    clean = order[: asked.clean]
    noisy = order[asked.clean : asked.clean + asked.noisy]
    test = order[len(order) - asked.test :]
    if len(order) < asked.clean + asked.noisy + asked.test:
        parser.error(f"{asked.data}: {len(order)} labelled cases are too few")

    asked.out.mkdir(parents=True)
    (asked.out / "labels").mkdir()
    wrong = sorted(rng.choice(noisy, round(asked.share * len(noisy)), replace=False))
    rows, planted = [], []
    for number, name in enumerate(wrong):
        case = by_id[name]
        assert case.label is not None
        label, geometry = read_label(case.label)
        kinds = kinds_for(label) if asked.kind is None else [asked.kind]
        kind = kinds[number % len(kinds)]
        partner = noisy[(noisy.index(name) + 1) % len(noisy)]
        other = read_label(by_id[partner].label)[0]  # type: ignore[arg-type]
        changed = plant_error(label, kind, rng, spacing=geometry.spacing[::-1], other=other)
        path = asked.out / "labels" / f"{name}.nii.gz"
        write_label(path, changed, geometry)
        planted.append({"case": name, "kind": kind, "wrong_voxels": int((changed != label).sum()),
                        "truth": str(case.label.resolve())})  # fmt: skip
    for name in order:
        if name not in {*clean, *noisy, *test}:
            continue
        case = by_id[name]
        assert case.label is not None
        role = "clean" if name in clean else "test" if name in test else "noisy"
        label_path = asked.out / "labels" / f"{name}.nii.gz" if name in wrong else case.label
        images = {f"image_{i}": str(p.resolve()) for i, p in enumerate(case.images)}
        rows.append({"id": name, **images, "label": str(label_path.resolve()), "role": role})
    _write(asked.out / "noisy.csv", rows)
    _write(asked.out / "trusting.csv", [r | {"role": r["role"].replace("noisy", "clean")} for r in rows])
    _write(asked.out / "planted.csv", planted)
    print(f"{len(clean)} clean, {len(noisy)} noisy of which {len(wrong)} wrong, {len(test)} test")


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
