"""What tests of `mlbseg.data.reading` have processes do: imported by them, and so without pytest."""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from pathlib import Path

from mlbseg.data.check import _read_case
from mlbseg.data.reading import Reading
from mlbseg.data.remembered import Remembered
from mlbseg.errors import Fault, FaultsError, ReadError, UserError
from mlbseg.types import Case


def square(number: int) -> int:
    time.sleep(0.02 * (5 - number % 5))  # later ones are done first
    return number * number


def fail_at_three_and_one(number: int) -> int:
    if number == 3:
        raise ReadError(Fault("three", "cannot be read", case_id="3"))
    if number == 1:
        time.sleep(0.3)  # the later fault is met first
        raise FaultsError([Fault("one", "is odd"), Fault("one", "is first")], "the numbers", "count again")
    return number


def break_down(number: int) -> int:
    return 1 // (number - 2)


def die_at_two(marks: Path, number: int) -> int:
    (marks / f"{number}.{time.monotonic_ns()}").touch()
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def die_unless_alone(marks: Path, number: int) -> int:
    with (marks / f"{number}.{time.monotonic_ns()}").open("w"):
        if number == 2 and len(list(marks.glob("2.*"))) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    return number


def in_use(marks: Path, number: int) -> int:
    """Return how many are at work at once, this one among them."""
    mark = marks / str(number)
    mark.touch()
    deadline = time.monotonic() + 0.3
    most = 0
    while time.monotonic() < deadline:
        most = max(most, len(list(marks.iterdir())))
        time.sleep(0.02)
    mark.unlink()
    return most


def refuse_once(marks: Path, number: int) -> int:
    """Say of one item, in the words of a reader, that memory was short; when it comes again, it is not."""
    if number == 2 and not (marks / "2").exists():
        (marks / "2").touch()
        fault = Fault("two", "its header announces 9 GiB of pixels", kind="memory")
        raise UserError(f"two: {fault}", faults=[fault])
    return number


def warn(number: int) -> int:
    if number == 1:
        warnings.warn("one is odd", UserWarning, stacklevel=1)
    return number


def loaded(case: Case) -> list[str]:
    """Return which heavy packages a process has imported after it has read a case."""
    _read_case(case, Remembered())
    return sorted({"torch", "monai", "lightning", "zarr", "pandas"} & set(sys.modules))


def linger(folder: Path, number: int) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(60)


def process(number: int) -> int:
    return os.getpid()


def tell(number: int) -> str:
    raise UserError(f"number {number}")


if __name__ == "__main__":  # a user's script, which Ctrl-C or a kill ends
    from functools import partial

    import mlbseg.data.reading

    mlbseg.data.reading.SOON = -1
    list(Reading(2).each(partial(linger, Path(sys.argv[1])), [0, 1, 2, 3]))
