"""The machine: devices and their names, precision, memory, and what a run notes of its environment."""

from __future__ import annotations

import contextlib
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mlbseg.errors import UserError, nearest
from mlbseg.memory import free_memory

_PACKAGES = (
    "mlbseg",
    "torch",
    "monai",
    "numpy",
    "scipy",
    "SimpleITK",
    "zarr",
    "h5py",
    "safetensors",
)


def device_name(device: str, accelerator: str | None = None, devices: int = 1) -> str:
    """Return the name of a device by either way of saying it.

    Args:
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` ...
        accelerator: ``auto``, ``cpu`` or ``gpu``, in place of it.
        devices: Number of them.

    Raises:
        UserError: if they contradict each other, or the machine does not have as many.
    """
    kinds = {"auto": "auto", "cpu": "cpu", "gpu": "cuda"}
    if accelerator is not None:
        if accelerator not in kinds:
            raise UserError(f"unknown accelerator {accelerator!r}: {nearest(accelerator, kinds)}")
        if device not in ("auto", kinds[accelerator]):
            raise UserError(
                f"found --device {device} and --accelerator {accelerator} (leave one of them out)"
            )
        device = kinds[accelerator]
    if devices < 1:
        raise UserError(f"--devices: found {devices}, expected a whole number from 1")
    if devices > 1:
        chosen = pick_device(device)
        if chosen.index is not None:
            raise UserError(
                f"found --device {device} and --devices {devices} (use --accelerator gpu, and choose among "
                "the GPUs with the environment variable CUDA_VISIBLE_DEVICES)"
            )
        if chosen.type == "cuda" and (count := torch.cuda.device_count()) < devices:
            raise UserError(f"--devices: found {count} GPU(s), expected {devices} (use --devices {count})")
    return device


def pick_device(name: str = "auto") -> torch.device:
    """Return the device of that name; the first GPU, else the CPU, for ``auto``.

    Raises:
        UserError: if it does not exist here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"device {name!r}: not on this machine (use auto, cpu or cuda)") from None
    return device


def has_bf16(device: torch.device) -> bool:
    """Return whether the device computes in bfloat16 by itself; emulation would be slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


def use_bf16(precision: str, device: torch.device) -> bool:
    """Return whether to compute in bfloat16: asked for, or ``auto`` and the device has it."""
    return precision == "bf16" or (precision == "auto" and has_bf16(device))


@contextlib.contextmanager
def autocast(precision: str, device: torch.device) -> Iterator[None]:
    """Compute in bfloat16 where asked for or, with ``auto``, where the device has it."""
    with torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(precision, device)):
        yield


def available_memory(device: torch.device, *, system: Path = Path("/")) -> int:
    """Return the memory that is free on the device, bytes; of the CPU's, what a control group grants.

    Args:
        device: The device.
        system: The folder with ``proc`` and ``sys``.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory(system)


def peak_memory(device: torch.device) -> int:
    """Return the most memory that was in use since this process began, bytes.

    The GPU's, as torch counts it; on a CPU all that this process held resident.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource  # only Unix has it

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def environment() -> dict[str, Any]:
    """Return what a reader needs to repeat the run: versions, machine, threads, command."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "versions": versions,
        "machine": platform.platform(),
        "processor": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "command": sys.argv,
    }
