"""This process's place among those that work together, started by `mlbseg.launch` or by torchrun."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mlbseg.core.ranks import ALONE, Ranks
from mlbseg.device import pick_device
from mlbseg.errors import OtherRank, UserError
from mlbseg.launch import started

T = TypeVar("T")

TIMEOUT = 30.0
"""Minutes that a rank waits for another unless told otherwise."""


def require_no_launch(devices: int) -> None:
    """Refuse to start processes in a rank."""
    if devices > 1 and started():
        raise UserError(
            f"--devices: found {devices}, but torchrun has already started {os.environ['WORLD_SIZE']} processes "
            "(leave --devices out)"
        )


def nodes() -> tuple[int, int]:
    """Return the number of ranks on this machine, and of machines."""
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    return local, int(os.environ["WORLD_SIZE"]) // local


def own_device(name: str) -> torch.device:
    """Return the device of that name; of several GPUs, the one that is this rank's.

    Raises:
        UserError: if it does not exist here, or is one that several ranks would have to share.
    """
    if not started():
        return pick_device(name)
    device = pick_device(name)
    if device.index is not None:
        raise UserError(f"--device {name}: several ranks cannot share one device (use cpu, cuda or auto)")
    return device if device.type != "cuda" else pick_device(f"cuda:{os.environ['LOCAL_RANK']}")


@contextmanager
def joined(device: torch.device, minutes: float = TIMEOUT) -> Iterator[Ranks]:
    """Join the ranks that were started with this process; `ALONE` if it was started by itself.

    Args:
        device: Of this rank.
        minutes: How long to wait for an answer of another rank.

    Raises:
        UserError: if the ranks do not find each other.
        OtherRank: if one is lost before the end of the block.
    """
    if dist.is_available() and dist.is_initialized():
        yield Ranks.current()
        return
    if not started():
        yield ALONE
        return
    # While there is a group, some modules take it as the default of their functions when they are imported, such as
    # torch.distributed.nn. That keeps the group's threads beyond its end, and the process may then abort when it ends.
    # MONAI, which every rank needs, imports such modules, so it is imported first.
    import monai.networks.nets  # noqa: F401

    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"  # small things that live on the host stay there
    try:
        dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"rank {os.environ['RANK']} did not find the other ranks at {place} within {minutes:g} minutes "
            f"({str(error).partition(chr(10))[0]}; check that every machine reaches this address, "
            "and that all ranks were started)"
        ) from None
    ranks = Ranks.current()
    try:
        yield ranks
    except RuntimeError as error:
        if not lost(error):
            raise
        raise OtherRank(
            f"rank {ranks.index} lost another of the {ranks.count} ranks: it ended, or did not answer for "
            f"{minutes:g} minutes",
            told=False,
        ) from error
    # After a failure the group is left as it is: to leave it in order, the others would have to answer.
    dist.destroy_process_group()


def lost(error: BaseException) -> bool:
    """Return whether an error says that another rank does not answer."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def wait_for_all(ranks: Ranks) -> None:
    """Return when every rank has come here."""
    ranks.sum(torch.zeros(()))


def of_first(ranks: Ranks, action: Callable[[], T]) -> T:
    """Return to every rank what rank 0's action returns there, such as files it has looked for.

    Raises:
        UserError: rank 0's, which becomes every rank's.
    """
    if ranks.count == 1:
        return action()
    answer: list[Any] = [None, None]
    failure: UserError | None = None
    if ranks.index == 0:
        try:
            answer[0] = action()
        except UserError as error:
            failure = error
            answer[1] = (str(error), error.exit_code)
    dist.broadcast_object_list(answer, group=ranks.group)
    if failure is not None:
        raise failure
    if answer[1] is not None:
        raise OtherRank(answer[1][0], exit_code=answer[1][1])
    value: T = answer[0]
    return value


def of_all(ranks: Ranks, value: T) -> list[T]:
    """Return every rank's value to every rank."""
    if ranks.count == 1:
        return [value]
    values: list[Any] = [None] * ranks.count
    dist.all_gather_object(values, value, group=ranks.group)
    return values


def same_on_all(ranks: Ranks, error: UserError) -> UserError:
    """Return what to raise for an error that every rank has seen: rank 0 tells it."""
    return error if ranks.index == 0 else OtherRank(str(error), exit_code=error.exit_code)
