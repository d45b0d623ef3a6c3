"""Several ranks on this machine: a function in processes of its own, joined by gloo."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mlbseg.core.ranks import Ranks

TIMEOUT = timedelta(minutes=5)  # generous: of a hang, not of a slow machine


def together(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what `function(ranks, *arguments)` returns on each of `count` ranks.

    Args:
        count: Number of processes.
        function: Of a module, not of another function; returns what `torch.load` reads without unpickling.
        arguments: The same for all.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (count, folder, function, arguments), nprocs=count)
        return [torch.load(Path(folder, f"{index}.pt"), weights_only=True) for index in range(count)]


def _rank(index: int, count: int, folder: str, function: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    # What Lightning reads of torchrun's environment. The rendezvous is a file: no port is to be found free.
    os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index), "GROUP_RANK": "0"}
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=index, world_size=count, timeout=TIMEOUT
    )
    torch.save(function(Ranks.current(), *arguments), Path(folder, f"{index}.pt"))
    dist.barrier()
    dist.destroy_process_group()
