"""Damaged files without end: small valid files of each format, changed field by field and bit by bit, always alike.

    python tests/data/mutate.py FORMAT[,FORMAT...] FIRST COUNT

reads damaged files in this process with limited memory and time, and prints what came of each. A process that ends
before its last line has crashed, or by SIGALRM been stopped, at the number printed last.
`benchmarks/fuzz_readers.py` runs thousands; `test_hostile.py` runs a few.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import mutators, seeds
from data.mutators import Mutator
from data.seeds import CANARY, Seed

MEMORY = 6 << 30
"""Bytes of address space."""
SECONDS = 20
"""For one file."""

FORMATS: dict[str, tuple[Callable[[], list[Seed]], Mutator]] = {
    "nii": (seeds.seeds_of(seeds.volumes(".nii")), mutators.nifti),
    "nii.gz": (seeds.seeds_of(seeds.volumes(".nii.gz")), mutators.nifti),
    "hdr": (seeds.seeds_of(seeds.volumes(".hdr")), mutators.nifti),
    "nrrd": (seeds.seeds_of(seeds.volumes(".nrrd")), mutators.text_header(b"\n\n")),
    "nhdr": (seeds.seeds_of(seeds.volumes(".nhdr")), mutators.text_header(b"\n\n")),
    "mha": (seeds.seeds_of(seeds.volumes(".mha")), mutators.text_header(b"ElementDataFile")),
    "mhd": (seeds.seeds_of(seeds.volumes(".mhd")), mutators.text_header(b"ElementDataFile")),
    "h5": (seeds.seeds_of(seeds.left_atrium), mutators.hdf5),
    "png": (seeds.seeds_of(seeds.pictures(".png")), mutators.png),
    "tif": (seeds.seeds_of(seeds.pictures(".tif")), mutators.tiff),
    "jpg": (seeds.seeds_of(seeds.pictures(".jpg")), mutators.jpeg),
    "dicom": (seeds.seeds_of(seeds.series), mutators.dicom),
    "frames": (seeds.seeds_of(seeds.frames), mutators.dicom),
    "csv": (seeds.seeds_of(seeds.listed("cases.csv", "cases.csv", seeds.CSV)), mutators.csv_rows),
    "json": (
        seeds.seeds_of(seeds.listed("cases.json", "cases.json", json.dumps(seeds.ROWS))),
        mutators.json_tree,
    ),
    "dataset.json": (
        seeds.seeds_of(seeds.listed("dataset.json", "", json.dumps(seeds.DECATHLON), "imagesTr")),
        mutators.json_tree,
    ),
    "nnunet.json": (
        seeds.seeds_of(seeds.listed("dataset.json", "", json.dumps(seeds.NNUNET), "imagesTr", "_0000")),
        mutators.json_tree,
    ),
}
"""Valid files and how their headers are changed; lists of cases among them."""

_UNFORESEEN = "reading failed with"
"""How `mlbseg.data.readers.reading` words an exception that no reader has foreseen."""

LISTS = ("csv", "json", "dataset.json", "nnunet.json")


def write(kind: str, number: int, folder: Path) -> Path:
    """Write damaged file `number` of a format below the empty `folder` and return what is to be read."""
    random = Random(f"{kind} {number}")  # noqa: S311 - not for secrets
    inside = folder / "inside"
    inside.mkdir()
    (folder / "canary").write_bytes(CANARY)
    shutil.copy(seeds.canary_hdf5(), folder / "canary.h5")
    if kind not in LISTS:  # in a folder of scans a link is its owner's, and is followed
        (inside / "link").symlink_to("../canary")
        (inside / "link.raw").symlink_to("../canary")
    make, mutate = FORMATS[kind]
    seed = random.choice(make())
    for name, content in seed.files.items():
        path = inside / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    content = seed.files[seed.target]
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        change = mutate if random.random() < 0.75 else mutators.anywhere
        content = change(content, random)
    canary = (
        "../canary" if kind in LISTS else str(folder / "canary")
    )  # a list may name a whole path: it is meant
    (inside / seed.target).write_bytes(content.replace(b"{canary}", canary.encode()))
    return inside / seed.read


def examine(kind: str, path: Path) -> str:
    """Read a file as `check` does, and say what came of it: ``read``, ``refused``, or what is wrong."""
    from mlbseg.data.cases import find_cases
    from mlbseg.data.check import check
    from mlbseg.data.readers import read_label, read_scan
    from mlbseg.errors import Fault, UserError

    if kind in LISTS:
        try:
            faults = check(find_cases(path)).faults
        except UserError as error:
            faults = error.faults or (Fault("", str(error)),)
        except Exception:  # whatever it is, it is what is looked for
            return "TRACEBACK " + repr(traceback.format_exc()[-1500:])
        unforeseen = [str(fault) for fault in faults if _UNFORESEEN in fault.found]
        return f"UNFORESEEN {unforeseen[0]!r}" if unforeseen else "refused" if faults else "read"
    outcome = "refused"
    for read in (lambda: read_scan([path]).array, lambda: read_label(path)[0]):
        try:
            if _shows_canary(read()):
                return "LEAK"
            outcome = "read"
        except UserError as error:
            if _UNFORESEEN in str(error):
                return f"UNFORESEEN {str(error)!r}"
        except Exception:  # whatever it is, it is what is looked for
            return "TRACEBACK " + repr(traceback.format_exc()[-1500:])
    return outcome


def _shows_canary(array: np.ndarray) -> bool:
    values = [
        np.frombuffer(CANARY[:8], kind)[0].astype(np.float64) for kind in ("u1", "u2", "u4", "u8", "f4")
    ]
    return bool(np.isin(array, np.float32(values)).mean() > 0.3)


def _watch_opened() -> list[str]:
    """Return a list that grows by each time that Python opens what lies outside of the folder."""
    opened: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes):
            name = os.fsdecode(arguments[0])
            if "\0" not in name and os.path.realpath(name).endswith(("canary", "canary.h5", "/etc/passwd")):
                opened.append(name)

    sys.addaudithook(hook)
    return opened


def main(kind: str, first: int, count: int) -> None:
    """Examine files `first` to `first + count - 1` of a format."""
    seeds.canary_hdf5()
    import mlbseg.data.check  # noqa: F401 - so that no file's time goes by with it

    for number in range(first, first + count):
        print(f"\n@begin {kind} {number}", flush=True)
        folder = Path(tempfile.mkdtemp(prefix="mutated-"))
        try:
            path = write(kind, number, folder)
            _OPENED.clear()  # the seeds themselves were written just now
            signal.setitimer(
                signal.ITIMER_REAL, SECONDS
            )  # its default ends the process, even inside a library
            outcome = examine(kind, path)
            signal.setitimer(signal.ITIMER_REAL, 0)
            print(f"\n@end {kind} {number} {f'OPENED {_OPENED[0]}' if _OPENED else outcome}", flush=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    _OPENED = _watch_opened()
    for chosen in FORMATS if sys.argv[1] == "all" else sys.argv[1].split(","):
        main(chosen, int(sys.argv[2]), int(sys.argv[3]))
    print("done", flush=True)
