"""Processes that draw batches: how many, what ends them, and how their errors come across."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from mlbseg.errors import Fault, ReadError, UserError
from mlbseg.training import drawing

CUDA = torch.device("cuda")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="by means of Linux")


class Disk(NamedTuple):
    free: int


def dataset(**changes: Any) -> Any:
    """Batches of 2 + 2 patches of 10 voxels, of 20 + 1 bytes a voxel with one channel."""
    fields = {"patch_size": (2, 5), "batch_size": 2, "unlabelled_batch_size": 2, "others": [1], "meta": []}
    return SimpleNamespace(ranks=SimpleNamespace(count=1), **{**fields, **changes})


@pytest.mark.parametrize(("threads", "wanted"), [(1, 1), (2, 1), (5, 4), (64, drawing.MOST)])
def test_a_gpu_gets_the_processes_that_the_threads_leave(
    threads: int, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert drawing._worth(dataset(), CUDA, 1, 1) == wanted
    assert drawing._worth(dataset(), torch.device("cpu"), 1, 1) == 0


def test_shared_memory_bounds_their_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(drawing, "_SHARED_MEMORY", tmp_path)
    batch = 4 * 10 * 21
    for free, made, ranks, wanted in (
        (3 * 5 * batch, dataset(), 1, 5),
        (3 * 5 * batch - 1, dataset(), 1, 4),
        (3 * 5 * batch, dataset(), 2, 2),
        (3 * 5 * batch, dataset(others=[]), 1, 10),
        (3 * 6 * batch, dataset(meta=[1]), 1, 4),
        (3 * batch - 1, dataset(), 1, 0),
    ):
        monkeypatch.setattr(drawing.shutil, "disk_usage", lambda _, free=free: Disk(free))
        assert drawing._worth(made, CUDA, 1, ranks) == wanted


class Faulty:
    """Stands for a dataset; what it raises depends on the step."""

    def __getitem__(self, step: int) -> int:
        if step == 1:
            raise ReadError(Fault("a.nii", "cut off", case_id="a"))
        if step == 2:
            raise FileNotFoundError(2, "No such file or directory", "b.npy")
        if step == 3:
            raise ZeroDivisionError("ours")
        return step


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_errors_that_users_can_mend_come_as_they_are(workers: int) -> None:
    loader = drawing.make_loader(
        Faulty(),  # type: ignore[arg-type]
        range(4),
        workers=workers,
        device=torch.device("cpu"),
        channels=1,
        ranks=1,
    )
    with pytest.raises(ZeroDivisionError, match="ours"):
        list(loader)
    iterator = iter(loader)
    first, unread, missing = (next(iterator) for _ in range(3))
    assert first == 0
    assert isinstance(unread, UserError)
    assert (str(unread), unread.faults) == ("a.nii: cut off", (Fault("a.nii", "cut off", case_id="a"),))
    assert isinstance(missing, FileNotFoundError)
    assert (missing.errno, missing.strerror, missing.filename) == (2, "No such file or directory", "b.npy")


PARENT = """
import multiprocessing, sys, time
from mlbseg.training.drawing import _begin

def draw(ready):
    _begin(0)
    ready.set()
    time.sleep(60)

ready = multiprocessing.Event()
child = multiprocessing.get_context("fork").Process(target=draw, args=(ready,), daemon=True)
child.start()
ready.wait()
print(child.pid, flush=True)
sys.stdin.readline()
child.terminate()
child.join(5)
print(child.exitcode, flush=True)
"""


def alive(pid: int) -> bool:
    """Return whether a process runs; one that ended and was not asked for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@LINUX
@pytest.mark.slow
def test_they_end_when_their_parent_says_so_or_dies_and_at_no_signal_of_others() -> None:
    for killed in (False, True):
        with subprocess.Popen(
            [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as parent:
            assert parent.stdin is not None
            assert parent.stdout is not None
            child = int(parent.stdout.readline())
            os.kill(child, signal.SIGTERM)
            os.kill(child, signal.SIGINT)
            time.sleep(0.5)
            assert alive(child)
            if killed:
                parent.kill()
                parent.wait()
                deadline = time.monotonic() + 10
                while alive(child) and time.monotonic() < deadline:
                    time.sleep(0.05)
                assert not alive(child)
            else:
                assert parent.communicate("end\n")[0].strip() == "1"
