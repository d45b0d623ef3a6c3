"""How often the warning for scans unlike the training scans comes: on scans of the same data set, and of others.

Of each folder `--most` scans are drawn. `--draws` times, `--train` of them stand for the training scans; a warning for
one of the others is a false alarm, one for a scan of another folder is right. No label is looked at.

    python benchmarks/unlike_scans.py acdc la hippocampus fetal
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlbseg.data.cases import find_scans
from mlbseg.data.fingerprint import CaseFacts, Fingerprint, fingerprint
from mlbseg.data.readers import read_scan
from mlbseg.data.unlike import Usual
from mlbseg.types import Scan


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--train", type=int, default=8, help="scans that stand for the training scans")
    parser.add_argument("--most", type=int, default=24, help="scans of a folder at most")
    parser.add_argument("--draws", type=int, default=5)
    given = parser.parse_args(arguments)
    draw = random.Random(0)  # noqa: S311 - no secret
    scans: dict[str, list[Scan]] = {}
    facts: dict[str, tuple[CaseFacts, ...]] = {}
    for folder in given.folders:
        cases = list(find_scans(folder).cases)
        cases = draw.sample(cases, min(given.most, len(cases)))
        scans[folder.name] = [read_scan(case.images) for case in cases]
        facts[folder.name] = fingerprint(cases).cases
    print("| training scans | false alarms | scans of others with a warning |\n|---|---|---|")
    for name, own in facts.items():
        false, right = [], []
        for _ in range(given.draws):
            order = draw.sample(range(len(own)), len(own))
            chosen = Fingerprint(tuple(own[i] for i in order[: given.train]))
            usual = Usual.of(chosen, ["zscore"] * chosen.channels)
            false += [bool(usual.unlike(scans[name][i])) for i in order[given.train :]]
            # A scan of another dimension is refused and not warned of.
            right += [
                bool(usual.unlike(scan))
                for other, theirs in scans.items()
                if other != name
                for scan in theirs
                if scan.geometry.ndim == chosen.scan_ndim
            ]
        shown = [
            f"{sum(each)} of {len(each)} ({np.mean(each):.1%})" if each else "–" for each in (false, right)
        ]
        print(f"| {name}, {given.train} | {shown[0]} | {shown[1]} |")


if __name__ == "__main__":
    main()
