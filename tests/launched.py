"""What tests of `mlbseg.launch` have processes do: imported by them, and so without pytest."""

from __future__ import annotations

import os
import signal
import sys
import time
from types import ModuleType

from mlbseg.errors import Fault, UserError

RANK = int(os.environ.get("RANK", "-1"))

# These ranks build no network, and `joined` would wait for the library.
for _name in ("monai", "monai.networks", "monai.networks.nets"):
    sys.modules.setdefault(_name, ModuleType(_name))


def place(word: str) -> list[object]:
    return [word, RANK, os.environ["WORLD_SIZE"], os.environ["OMP_NUM_THREADS"]]


def fail(rank: int) -> None:
    """Fail as a user's fault on one rank, while the other would go on for long."""
    if rank == RANK:
        raise UserError("found this, expected that (do this)", faults=[Fault("a", "b", case_id="c")])
    time.sleep(600)


def crash() -> None:
    if RANK == 1:
        raise ZeroDivisionError("ours")


def end(code: int) -> None:
    """End one rank without a word (by a signal, if the code is negative), while the other waits for it."""
    import torch

    from mlbseg import processes

    with processes.joined(torch.device("cpu")) as ranks:
        if RANK == 1:
            os.kill(os.getpid(), -code) if code < 0 else os._exit(code)
        processes.wait_for_all(ranks)


def keep_waiting(minutes: float) -> None:
    import torch

    from mlbseg import processes

    with processes.joined(torch.device("cpu"), minutes) as ranks:
        if RANK == 1:
            time.sleep(600)
        processes.wait_for_all(ranks)


def stop_in_order(folder: str) -> None:
    """Say that it runs, and end with 143 and a note when told to."""

    def stop(number: int, frame: object) -> None:
        (open(f"{folder}/stopped{RANK}", "w")).close()  # noqa: PTH123
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    open(f"{folder}/running{RANK}", "w").close()  # noqa: PTH123
    time.sleep(600)


def finish_all_the_same(folder: str) -> str:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open(f"{folder}/running{RANK}", "w").close()  # noqa: PTH123
    while not os.path.exists(f"{folder}/go on"):  # noqa: PTH110
        time.sleep(0.02)
    return "done"
