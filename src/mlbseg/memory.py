"""How much memory is free, and whether a file's pixels fit into it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from mlbseg.errors import Fault, ReadError


def require_memory(path: Path, needed: int) -> None:
    """Refuse a file that announces more than there is room for, before anything is allocated.

    Args:
        path: The file.
        needed: Bytes that its pixels will take in memory.

    Raises:
        ReadError: If less is free.
    """
    free = free_memory()
    if needed > free:
        found = f"its header announces {needed / 2**30:.1f} GiB of pixels"
        expected = f"at most the {free / 2**30:.1f} GiB of memory that are free"
        remedy = "check the header; if it is right, use a machine with more memory or cut the scan"
        raise ReadError(Fault(str(path), found, expected, remedy, kind="memory"))


def free_memory(system: Path = Path("/")) -> int:
    """Return the bytes of memory that are free, within what a control group and `ulimit -v` grant.

    Args:
        system: The folder with ``proc`` and ``sys``.
    """
    return max(0, min([_machines(system), *_control_groups(system), *_address_space(system)]))


def _machines(system: Path) -> int:
    """Return what the machine has left, bytes."""
    with contextlib.suppress(OSError):  # only Linux has it
        for line in (system / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    import psutil  # here, as Linux does without

    return int(psutil.virtual_memory().available)


def _address_space(system: Path) -> Iterator[int]:
    """Yield what `ulimit -v`, as schedulers set it, leaves to this process, bytes."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        with contextlib.suppress(OSError):  # only Linux says how much is taken
            pages = int((system / "proc/self/statm").read_text().split()[0])
            yield limit - pages * os.sysconf("SC_PAGE_SIZE")


def _control_groups(system: Path) -> Iterator[int]:
    """Yield what each control group around this process (of version 1 or 2) has left, bytes."""
    try:
        membership = (system / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # only Linux has them
        return
    for line in membership:
        _, controllers, own = line.split(":", 2)
        if not controllers:
            root, limit, used, cached = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, used = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = "total_inactive_file"
        else:
            continue
        top = system / root
        group = top / own.lstrip("/")
        # In a container the path may be the host's: then only the top is there, and it is the container's own.
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(top))):
            with contextlib.suppress(OSError, ValueError):  # absent, or "max": no limit
                most = int((folder / limit).read_text())
                words = (folder / "memory.stat").read_text().split()
                # Files that were read count as used until another needs the memory.
                yield most - int((folder / used).read_text()) + int(words[words.index(cached) + 1])
