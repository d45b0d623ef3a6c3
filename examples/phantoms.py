"""Scans to try things on: generated, few of them labelled, some labelled badly.

python examples/phantoms.py FOLDER
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import numpy as np

from mlbseg.data.phantom import write_phantoms
from mlbseg.data.readers import read_label, write_label

CLEAN, NOISY, UNLABELLED, NEW = 4, 4, 16, 6
SIZE = int(os.environ.get("MLBSEG_EXAMPLE_SIZE", "40"))
"""Voxels along the longer sides; the tests of these examples make it smaller."""


def few_labels(folder: Path) -> tuple[Path, Path, Path]:
    """Write phantoms as one's own data might look.

    Args:
        folder: To be made.

    Returns:
        The folder of scans to train on (careful labels in `labels/`, bad ones in `labels_noisy/`), that of new scans,
        and that of the new scans' true labels.
    """
    scans, new, references = folder / "scans", folder / "new_scans", folder / "references"
    if scans.is_dir():
        return scans, new, references
    drawn = folder / "drawn"
    shutil.rmtree(drawn, ignore_errors=True)  # of a call that was stopped
    write_phantoms(drawn, count=CLEAN + NOISY + UNLABELLED + NEW, seed=0, size=(SIZE * 4 // 5, SIZE, SIZE))
    made = folder / "unfinished"
    shutil.rmtree(made, ignore_errors=True)
    for path in (new, references, made / "images", made / "labels", made / "labels_noisy"):
        path.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(sorted((drawn / "images").iterdir())):
        label = drawn / "labels" / image.name
        if number >= CLEAN + NOISY + UNLABELLED:
            shutil.copy(image, new)
            shutil.copy(label, references)
            continue
        shutil.copy(image, made / "images")
        if number < CLEAN:
            shutil.copy(label, made / "labels")
        elif number < CLEAN + NOISY:  # drawn beside the truth
            array, geometry = read_label(label)
            write_label(made / "labels_noisy" / image.name, np.roll(array, SIZE // 10, axis=1), geometry)
    made.rename(scans)
    shutil.rmtree(drawn)
    return scans, new, references


if __name__ == "__main__":
    print(*few_labels(Path(sys.argv[1])))
