"""What a pseudo label of a patch gains from what lies beyond the patch.

    python benchmarks/patch_context.py RUN [CASES] [--network student]    # RUN's unlabelled cases have hidden labels

It takes random patches of unlabelled scans, and prints the Dice of all their voxels together, foreground against
background, of the network shown the patch alone and of its prediction of the whole scan by sliding windows; for all
of the patch, and apart for its inner part (a fifth of the side off on each side) and the rest.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from mlbseg.data.cache import Cache
from mlbseg.data.cases import find_cases
from mlbseg.data.records import read_record
from mlbseg.runs import Run
from mlbseg.types import Role
from mlbseg.windows import predict_grid

CPU = torch.device("cpu")


def measure(run: Run, count: int, patches: int, which: str | None) -> None:
    """Print a line for each part of the patches."""
    cases = {case.id: case for case in find_cases(run.scans).cases}
    prepared = Path(str(read_record(run.root / "data.json", "the data of a run")["cache"]))
    cache, network = Cache(prepared, run.plan), run.network(which)
    size, rng = run.plan.patch_size, np.random.default_rng(0)
    inner = np.zeros(size, bool)
    inner[tuple(slice(n // 5, n - n // 5) for n in size)] = True
    sums: dict[tuple[str, str], np.ndarray] = defaultdict(lambda: np.zeros(3))
    for name in run.split.unlabelled[:count]:
        case = cases[name].with_role(Role.CLEAN)
        if case.label is None:
            raise SystemExit(f"{name} has no label to compare with")
        image, label = np.asarray(cache.image(case).array[...]), np.asarray(cache.label(case)[...])
        if any(n < p for n, p in zip(label.shape, size, strict=True)):
            continue
        whole = predict_grid(network, image, patch_size=size, device=CPU).argmax(0) > 0
        for _ in range(patches):
            start = [int(rng.integers(n - p + 1)) for n, p in zip(label.shape, size, strict=True)]
            part = tuple(slice(s, s + p) for s, p in zip(start, size, strict=True))
            alone = (
                predict_grid(network, image[(slice(None), *part)], patch_size=size, device=CPU).argmax(0) > 0
            )
            truth = label[part] > 0
            for where, mask in (("all", np.ones_like(inner)), ("inner", inner), ("outer", ~inner)):
                for way, found in (("patch alone", alone), ("whole scan", whole[part])):
                    both, one, other = found & truth & mask, found & mask, truth & mask
                    sums[where, way] += (both.sum(), one.sum(), other.sum())
    for (where, way), (both, one, other) in sums.items():
        print(
            f"{where:5} {way:11} Dice {2 * both / (one + other):.4f}, volume {one / other:.3f} of the label's"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("cases", type=int, nargs="?", default=20)
    parser.add_argument("--patches", type=int, default=3, help="of each case")
    parser.add_argument("--network", help="student or teacher; the run's own choice unless named")
    arguments = parser.parse_args()
    measure(Run.open(arguments.run), arguments.cases, arguments.patches, arguments.network)
