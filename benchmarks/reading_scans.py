"""How long scans take to be checked, measured and prepared: in one process and in several, and when they are known.

    python benchmarks/reading_scans.py SCANS --cases 64 --processes 2 --repeats 3

All ways take turns in one run, each in a new Python with a cache of its own, so the ratios are of one machine in one
state. Of each way the fastest of the repeats counts. The second time is with the cache that the first has left. `CPU`
is what all processes of a way have computed together: other work on the machine slows it less. On a machine that is
busy with other work, more processes get a larger share of it, so the ratio of the times flatters them.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

STEPS = ("start", "check", "measure", "prepare", "all", "CPU")


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="folder of scans, of which some are labelled")
    parser.add_argument("--cases", type=int, default=64, help="take the first N cases")
    parser.add_argument("--labelled", type=int, default=8, help="keep the first K labels")
    parser.add_argument("--processes", type=int, default=2, help="compare one process with N")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--once", type=Path, metavar="CACHE", help="measure once, and print the times as JSON"
    )
    arguments = parser.parse_args()
    if arguments.once:
        print(json.dumps(_once(arguments)))
        return
    ways = [(count, time) for count in (1, arguments.processes) for time in ("first", "second")]
    fastest: dict[tuple[int, str], dict[str, float]] = {}
    cases = 0.0
    for _ in range(arguments.repeats):
        for count in (1, arguments.processes):
            with tempfile.TemporaryDirectory() as cache:
                for when in ("first", "second"):
                    took = _in_new_python(arguments, count, cache)
                    cases = took.pop("cases")
                    best = fastest.setdefault((count, when), took)
                    fastest[count, when] = {step: min(best[step], took[step]) for step in STEPS}
    print(f"{cases:.0f} cases, the fastest of {arguments.repeats}, seconds\n")
    print(f"| processes | time | {' | '.join(STEPS)} |\n|---|---|{'---|' * len(STEPS)}")
    for count, when in ways:
        print(f"| {count} | {when} | {' | '.join(f'{fastest[count, when][step]:.2f}' for step in STEPS)} |")
    one, several = fastest[1, "first"]["all"], fastest[arguments.processes, "first"]["all"]
    print(f"\none process / {arguments.processes} processes, first time: {one / several:.2f}")
    for count in (1, arguments.processes):
        print(
            f"first / second time, {count} process(es): check {_ratio(fastest, count, 'check'):.1f}, "
            f"all {_ratio(fastest, count, 'all'):.1f}"
        )


def _ratio(fastest: dict[tuple[int, str], dict[str, float]], count: int, step: str) -> float:
    return fastest[count, "first"][step] / fastest[count, "second"][step]


def _in_new_python(arguments: argparse.Namespace, count: int, cache: str) -> dict[str, float]:
    command = [
        sys.executable, __file__, str(arguments.data), "--cases", str(arguments.cases),
        "--labelled", str(arguments.labelled), "--processes", str(count), "--once", cache,
    ]  # fmt: skip
    began, before = time.perf_counter(), _computed()
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - ourselves
    took: dict[str, float] = json.loads(done.stdout)
    return {**took, "all": time.perf_counter() - began, "CPU": _computed() - before}


def _computed() -> float:
    """Return the seconds of CPU that all processes have taken that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _once(arguments: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of each step; `start` is what is imported before the first scan is read."""
    began = time.perf_counter()
    from mlbseg.data.cases import find_cases
    from mlbseg.data.check import check
    from mlbseg.data.reading import Reading
    from mlbseg.data.splits import apply_split, make_split

    reading = Reading.of(arguments.processes, arguments.once)
    found = find_cases(arguments.data)
    cases = found.cases[: arguments.cases]
    split = make_split(cases, order=[name for name in found.order if name in {case.id for case in cases}],
                       labelled=arguments.labelled)  # fmt: skip
    dataset = replace(found, cases=apply_split(cases, split))
    marks = [time.perf_counter()]
    result = check(dataset, reading=reading)
    assert not result.faults, result.faults
    marks.append(time.perf_counter())
    from mlbseg.data.cache import Cache
    from mlbseg.data.fingerprint import fingerprint
    from mlbseg.data.inputs import Inputs
    from mlbseg.data.plan import make_plan

    facts = fingerprint(dataset.cases, reading=reading)
    marks.append(time.perf_counter())
    plan = make_plan(facts, memory_bytes=8 << 30)
    Cache(arguments.once, plan, Inputs(remembered=reading.remembered)).fill(dataset.cases, reading=reading)
    marks.append(time.perf_counter())
    steps = [end - start for start, end in zip([began, *marks[:-1]], marks, strict=True)]
    return {**dict(zip(STEPS, steps, strict=False)), "cases": len(dataset.cases)}


if __name__ == "__main__":
    main()
