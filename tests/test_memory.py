"""How much memory is free: the least of what the machine, a control group and the process's own limit leave."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from mlbseg.errors import ReadError
from mlbseg.memory import free_memory, require_memory

PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def system(tmp_path: Path) -> Path:
    """A machine with 8 GiB free, and a process of 1 GiB."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable: {8 << 20} kB\n")
    (tmp_path / "proc/self/statm").write_text(f"{(1 << 30) // PAGE} 5 5 5 0 5 0\n")
    return tmp_path


def test_what_the_machine_has(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert free_memory(system) == 8 << 30


def test_what_ulimit_leaves(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (6 << 30, resource.RLIM_INFINITY))
    assert free_memory(system) == 5 << 30


def test_more_than_is_free_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlbseg.memory.free_memory", lambda: 1 << 30)
    require_memory(Path("a.mha"), 1 << 30)
    with pytest.raises(
        ReadError, match=r"a.mha: its header announces 4.0 GiB of pixels, expected at most the 1.0"
    ):
        require_memory(Path("a.mha"), 4 << 30)
