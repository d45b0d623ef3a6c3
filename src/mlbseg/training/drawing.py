"""Processes that draw batches ahead of a GPU, which would wait for one that draws while it computes."""

from __future__ import annotations

import ctypes
import math
import os
import re
import shutil
import signal
import sys
import threading
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from mlbseg.data.batches import StepDataset
from mlbseg.errors import UserError
from mlbseg.types import Batch

MOST = 12  # processes for one GPU
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - looked at, not written to
_HELD = 3  # batches that a process may hold at once: DataLoader asks for two ahead
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl
_LOST = re.compile(r"DataLoader worker.*(killed by signal|exited unexpectedly)|shared memory")


def make_loader(
    dataset: StepDataset,
    steps: range,
    *,
    workers: int | None,
    device: torch.device,
    channels: int,
    ranks: int,
) -> DataLoader[Batch | UserError | OSError]:
    """Return a loader of the batches of some steps, on the host; an error while one is drawn comes in its place.

    Args:
        dataset: Its items.
        steps: Which, in this order.
        workers: Processes that draw; None for as many as the device is worth.
        device: Where the batches go.
        channels: Of an image.
        ranks: Processes that train on this machine.
    """
    return DataLoader(
        _Caught(dataset),
        batch_size=None,
        sampler=steps,
        num_workers=_worth(dataset, device, channels, ranks) if workers is None else workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_begin,
    )


def drawer_lost(error: BaseException) -> bool:
    """Return whether an error says that a process which draws batches was killed, or had no shared memory."""
    return isinstance(error, RuntimeError) and bool(_LOST.search(str(error)))


class _Caught(Dataset[Batch | UserError | OSError]):
    """Errors that users can mend cross from one process to another as they are; DataLoader would make them text."""

    def __init__(self, dataset: StepDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, step: int) -> Batch | UserError | OSError:
        try:
            return self.dataset[step]
        except UserError as error:
            return UserError(str(error), faults=error.faults)  # its subclasses cannot be pickled
        except OSError as error:
            return error


def _worth(dataset: StepDataset, device: torch.device, channels: int, ranks: int) -> int:
    """Return how many processes to start: on a CPU none, for the network needs its cores."""
    if device.type == "cpu":
        return 0
    wanted = max(1, min(MOST, torch.get_num_threads() - 1))
    if not _SHARED_MEMORY.is_dir():
        return wanted
    # Batches come through shared memory, of which a container may have as little as 64 MiB.
    patches = dataset.batch_size * (2 if dataset.meta else 1)
    patches += dataset.unlabelled_batch_size if dataset.others else 0
    voxel = 4 * channels + 2 * 8 + 1  # the image, two labels, and whether it is in the scan; bytes
    batch = math.prod(dataset.patch_size) * voxel * patches // dataset.ranks.count
    return min(wanted, shutil.disk_usage(_SHARED_MEMORY).free // (_HELD * batch * ranks))


def _begin(worker: int) -> None:
    """Leave signals that all processes get to the parent, which first ends its step; end when it says so, or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, daemon=True).start()
        # A parent that is killed cannot say it, and its lock on the run is held as long as one of these lives.
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)


def _obey_parent() -> None:
    if sys.platform == "linux":
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(1)
