"""Whether any damaged file crashes, hangs or leads astray what reads scans and lists of cases.

    python benchmarks/fuzz_readers.py [--count 1000] [--first 0] [--keep FOLDER] [FORMAT ...]

Each format's valid files are changed field by field and bit by bit (`tests/data/mutate.py`), always alike for a number,
and read in a process with 6 GiB of address space, 20 s for a file. A file may be read or refused. A crash, a hang, a
traceback, pixels from outside of the folder or a file opened there are printed, and the exit code is 1. `--keep` writes
these files below a folder.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"
MUTATE = TESTS / "data" / "mutate.py"
sys.path.insert(0, str(TESTS))


def examine(kind: str, first: int, count: int) -> dict[int, str]:
    """Return what came of each file, a process after the other: one that ends early is followed by the next."""
    outcomes: dict[int, str] = {}
    end = first + count
    while first < end:
        command = [sys.executable, str(MUTATE), kind, str(first), str(end - first)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)  # noqa: S603
        last = first
        for line in done.stdout.splitlines():
            word, _, rest = line.partition(" ")
            if word in ("@begin", "@end"):  # libraries print lines of their own
                _, number, outcome = (rest + " ").split(" ", 2)
                last = int(number)
                outcomes[last] = outcome.strip()
        if done.returncode:
            ended = (
                signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit {done.returncode}"
            )
            outcomes[last] = f"CRASH {ended} {done.stderr[-300:]!r}"
        first = last + 1
    return outcomes


def main(arguments: Sequence[str] | None = None) -> int:
    """Examine formats and print a line for each, and for each file that is neither read nor refused."""
    from data.mutate import FORMATS, write

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("--count", type=int, default=1000, help="files of each format (default: 1000)")
    parser.add_argument("--first", type=int, default=0, help="number of the first file (default: 0)")
    parser.add_argument("--keep", type=Path, help="folder for the files that are neither read nor refused")
    asked = parser.parse_args(arguments)
    failed = 0
    for kind in asked.formats or FORMATS:
        outcomes = examine(kind, asked.first, asked.count)
        bad = {number: o for number, o in outcomes.items() if o not in ("read", "refused")}
        counts = Counter(o if o in ("read", "refused") else "bad" for o in outcomes.values())
        print(f"{kind}: {counts['read']} read, {counts['refused']} refused, {counts['bad']} bad", flush=True)
        for number, outcome in bad.items():
            print(f"  {kind} {number}: {outcome}", flush=True)
            if asked.keep:
                folder = asked.keep / f"{kind}-{number}"
                folder.mkdir(parents=True)
                write(kind, number, folder)
        failed += len(bad)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
