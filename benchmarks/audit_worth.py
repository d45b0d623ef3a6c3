"""How well does an audit find planted errors? Each method on the same labels, which `plant_errors.py` has laid out.

    python benchmarks/plant_errors.py hippocampus --out planted/ --clean 8 --noisy 72 --test 40 --share 0.3
    mlbseg train planted/noisy.csv --out runs/noisy
    python benchmarks/audit_worth.py runs/noisy planted/

Prints, for each method, over the noisy cases: AUROC of 1 - trust for "this voxel's label was changed", over all voxels
and over those within 3 mm of a structure; precision among the k least trusted cases, k being the number of wrong ones;
and in how many wrong cases the middle of a suspected region lies on the error, or within 3 voxels of it.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.ndimage import distance_transform_edt
from scipy.stats import mannwhitneyu

from mlbseg.apps.audit import Audit, audit
from mlbseg.apps.audit.trust import WAYS
from mlbseg.data.cases import find_cases
from mlbseg.data.readers import read_label, read_scan
from mlbseg.types import Role

NEAR = 3.0  # mm


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare the methods."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="finished run on noisy.csv")
    parser.add_argument("planted", type=Path, help="folder of plant_errors.py")
    parser.add_argument("--methods", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args(arguments)
    with (asked.planted / "planted.csv").open(encoding="utf-8") as file:
        planted = {row["case"]: Path(row["truth"]) for row in csv.DictReader(file)}
    noisy = {c.id: c for c in find_cases(asked.planted / "noisy.csv").cases if c.role is Role.NOISY}
    wrong = set(planted) & set(noisy)
    print(f"{asked.run}: {len(noisy)} noisy labels, {len(wrong)} of them wrong")
    print("| Method | AUROC, all voxels | AUROC, near | Precision at k | Found |\n|---|---|---|---|---|")
    for way in asked.methods:
        with tempfile.TemporaryDirectory() as folder:
            result = audit(asked.run, out=Path(folder) / "audit", way=way, device=asked.device)
            doubt, errors, near = [], [], []
            found = 0
            for name, case in noisy.items():
                assert case.label is not None
                label, geometry = read_label(case.label)
                truth = read_label(planted[name])[0] if name in wrong else label
                trust = read_scan([Path(folder) / "audit" / "trust" / f"{name}.nii.gz"]).array[0]
                changed = label != truth
                away = distance_transform_edt((label == 0) & (truth == 0), sampling=geometry.spacing[::-1])
                doubt.append(1 - trust.ravel())
                errors.append(changed.ravel())
                near.append(away.ravel() <= NEAR)
                found += name in wrong and _overlaps(result, name, changed)
        score, error, close = (np.concatenate(parts) for parts in (doubt, errors, near))
        ranked = [one.case for one in result.cases if one.case in noisy]
        precision = np.mean([name in wrong for name in ranked[: len(wrong)]])
        print(
            f"| {way} | {auroc(score, error):.4f} | {auroc(score[close], error[close]):.4f} | {precision:.2f} "
            f"| {found} of {len(wrong)} |",
            flush=True,
        )


def _overlaps(result: Audit, name: str, changed: npt.NDArray[np.bool_]) -> bool:
    """Return whether the middle of a suspected region of a case lies within 3 voxels of what was changed."""
    case = next(one for one in result.cases if one.case == name)
    away = distance_transform_edt(~changed)
    return any(away[region.index[::-1]] <= 3 for region in case.regions)


def auroc(score: npt.NDArray[np.floating], positive: npt.NDArray[np.bool_]) -> float:
    """Return the probability that a positive has a higher score than a negative; ties count half."""
    pairs = int(positive.sum()) * int((~positive).sum())
    return float(mannwhitneyu(score[positive], score[~positive]).statistic / pairs)


if __name__ == "__main__":
    main()
