"""How much memory is free: the least of what the machine, a control group and the process's own limit leave."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from mlbseg.device import peak_memory
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


def test_a_machine_without_proc_is_asked_by_psutil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)  # Windows has none
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=3 << 30))
    assert free_memory(tmp_path) == 3 << 30


def test_the_peak_of_a_process_is_known_without_the_module_resource(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_memory(torch.device("cpu")) > 1 << 20
    monkeypatch.setitem(sys.modules, "resource", None)
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=5 << 30))
    monkeypatch.setattr(psutil, "Process", lambda: process)
    assert peak_memory(torch.device("cpu")) == 5 << 30


def test_more_than_is_free_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlbseg.memory.free_memory", lambda: 1 << 30)
    require_memory(Path("a.mha"), 1 << 30)
    with pytest.raises(
        ReadError, match=r"a.mha: its header announces 4.0 GiB of pixels, expected at most the 1.0"
    ):
        require_memory(Path("a.mha"), 4 << 30)
