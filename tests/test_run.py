"""The run folder: opened whole, or refused with a line that says what to do."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from torch import nn

from mlbseg.device import autocast, available_memory, environment, has_bf16, pick_device, use_bf16
from mlbseg.errors import UserError, out_of_memory
from mlbseg.files import write_atomic
from mlbseg.runs import Run, checkpoints
from mlbseg.runs.weights import WEIGHTS, save_weights

CPU = torch.device("cpu")


@pytest.fixture
def run(mlb_run: Path, tmp_path: Path) -> Path:
    """A copy to be broken."""
    return shutil.copytree(mlb_run, tmp_path / "run")


def test_both_networks_of_mlb_load_and_differ(mlb_run: Path) -> None:
    opened = Run.open(mlb_run)
    teacher, student = opened.network("teacher"), opened.network("student")
    assert not teacher.training
    pairs = list(zip(teacher.state_dict().values(), student.state_dict().values(), strict=True))
    assert any(not torch.equal(a, b) for a, b in pairs)
    preferred = opened.network()
    assert all(torch.equal(a, b) for a, b in zip(preferred.parameters(), student.parameters(), strict=True))


@pytest.mark.parametrize("place", [0.3, 0.6, 0.999])
def test_a_flipped_bit_of_the_weights_is_named(place: float, run: Path) -> None:
    content = bytearray((run / WEIGHTS).read_bytes())
    content[int(place * len(content))] ^= 1
    (run / WEIGHTS).write_bytes(content)
    with pytest.raises(
        UserError, match=r"model\.safetensors: damaged \(it holds other weights than were written"
    ):
        Run.open(run).network()


def test_weights_of_earlier_versions_have_no_checksum(run: Path) -> None:
    weights = safetensors.torch.load_file(run / WEIGHTS)
    safetensors.torch.save_file(weights, run / WEIGHTS)
    assert Run.open(run).network()


def test_weights_come_back_as_they_were_saved(run: Path) -> None:
    opened = Run.open(run)
    student = opened.network("student")
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.normal_()
    save_weights(run, {"student": student})
    again = opened.network("student")
    for name, value in student.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_a_network_that_the_method_lacks_is_named(supervised_run: Path) -> None:
    with pytest.raises(UserError, match=r"has no 'teacher' network: known: student"):
        Run.open(supervised_run).network("teacher")
    with pytest.raises(UserError, match="did you mean 'student'"):
        Run.open(supervised_run).network("studnt")


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        Run.open(tmp_path)
    with pytest.raises(UserError, match="not a run folder"):
        Run.open(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["config.yaml", "plan.json", "split.json", WEIGHTS])
@pytest.mark.parametrize("content", [b"", b"\x00\xff{not it", None], ids=["empty", "garbage", "half"])
def test_a_damaged_file_is_named(run: Path, name: str, content: bytes | None) -> None:
    path = run / name
    whole = path.read_bytes()
    # Half of a YAML file may well be a YAML file: cut it inside a key.
    half = b"plan: {ndim" if name == "config.yaml" else whole[: len(whole) // 2]
    path.write_bytes(half if content is None else content)
    with pytest.raises(UserError, match=name):
        Run.open(run).network()


def test_weights_of_another_network_are_refused(run: Path) -> None:
    save_weights(run, {"student": nn.Conv3d(1, 3, 1)})
    with pytest.raises(UserError, match=r"model\.safetensors: does not fit plan\.json's network \(unet\)"):
        Run.open(run).network()


def test_an_unfinished_run_says_how_to_finish_it(run: Path) -> None:
    (run / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"training has not finished .*`mlbseg train --resume"):
        Run.open(run).network()


def test_a_run_of_an_earlier_version_opens_unless_it_used_what_is_gone(run: Path) -> None:
    path = run / "config.yaml"
    record, before = yaml.safe_load(path.read_text()), Run.open(run).config
    others = {**record, "cps": {**record["cps"], "redrawn": 0.5}}
    path.write_text(yaml.safe_dump(others))
    assert Run.open(run).config == before
    path.write_text(yaml.safe_dump({**record, "train": {**record["train"], "gone": 1}}))
    with pytest.raises(
        UserError, match=r"config.yaml: unknown setting 'train.gone'.*another version of mlbseg"
    ):
        Run.open(run)


def test_an_edited_plan_is_checked(run: Path) -> None:
    plan = json.loads((run / "plan.json").read_text())
    (run / "plan.json").write_text(json.dumps({**plan, "patch_size": [15, 16, 16]}))
    with pytest.raises(UserError, match=r"plan\.json\.patch_size: found \(15, 16, 16\), expected multiples"):
        Run.open(run)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"one")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_atomic(path, b"two")
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(90)])
def test_a_damaged_checkpoint_says_what_to_do(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "stage1-00000004.pt").write_bytes(content)
    (found,) = checkpoints.find(tmp_path)
    with pytest.raises(
        UserError, match=r"stage1-00000004\.pt: (damaged checkpoint .*delete it|does not fit)"
    ):
        found.load(CPU)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_cut_checkpoint_says_what_to_do(tmp_path: Path, share: float) -> None:
    path = checkpoints.save(tmp_path, 1, 4, {"method": {"weight": torch.ones(300)}})
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match=r"damaged checkpoint .*delete it to resume from the one before"):
        checkpoints.find(tmp_path)[0].load(CPU)


def test_a_checkpoint_never_runs_code(tmp_path: Path) -> None:
    torch.save({"method": os.system}, tmp_path / "stage1-00000004.pt")
    with pytest.raises(UserError, match="damaged checkpoint"):
        checkpoints.find(tmp_path)[0].load(CPU)


def test_the_last_two_checkpoints_are_kept_and_a_final_one_alone(tmp_path: Path) -> None:
    (tmp_path / "stage1-notes.pt").write_text("not ours")
    for step in (0, 4, 8):
        checkpoints.save(tmp_path, 1, step, {})
    assert [c.step for c in checkpoints.find(tmp_path)] == [4, 8]
    checkpoints.save(tmp_path, 1, 12, {}, final=True)
    checkpoints.save(tmp_path, 2, 0, {})
    assert [(c.stage, c.step) for c in checkpoints.find(tmp_path)] == [(1, 12), (2, 0)]
    assert (tmp_path / "stage1-notes.pt").exists()


def test_devices() -> None:
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type in ("cpu", "cuda")
    for name in ("cuda:99", "toaster", ""):
        with pytest.raises(UserError, match="not on this machine"):
            pick_device(name)


def test_bf16_is_used_where_it_is_asked_for_or_the_device_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for owned in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda owned=owned: {"avx512_bf16": owned})
        assert has_bf16(CPU) is owned
        assert use_bf16("auto", CPU) is owned
        assert use_bf16("bf16", CPU)
        assert not use_bf16("32", CPU)
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    with autocast("bf16", CPU):
        assert layer(x).dtype == torch.bfloat16
    with autocast("32", CPU):
        assert layer(x).dtype == torch.float32


def test_memory_is_a_plausible_number_with_and_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < available_memory(CPU) <= installed

    def absent(*_: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", absent)
    assert 0 < available_memory(CPU) <= installed  # as psutil says


MIB = 2**20
VERSION_1 = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = ("", "memory.max", "memory.current", "inactive_file")


def fake_system(
    root: Path, membership: str, groups: dict[str, tuple[object, int, int]], version: Any
) -> Path:
    """Write a system with 1 GiB free and control groups with a limit, a use and cached files."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text("MemTotal: 4194304 kB\nMemAvailable: 1048576 kB\n")
    (root / "proc" / "self" / "cgroup").write_text(membership)
    folder, limit, used, cached = version
    for group, (most, current, files) in groups.items():
        path = root / "sys" / "fs" / "cgroup" / folder / group
        path.mkdir(parents=True, exist_ok=True)
        (path / limit).write_text(f"{most}\n")
        (path / used).write_text(f"{current}\n")
        (path / "memory.stat").write_text(f"anon 5\n{cached} {files}\nactive_file 7\n")
    return root


@pytest.mark.parametrize(
    ("membership", "version", "groups", "expected"),
    [
        ("0::/\n", VERSION_2, {}, 1024),
        ("0::/\n", VERSION_2, {"": ("max", 100 * MIB, 0)}, 1024),
        ("0::/\n", VERSION_2, {"": (500 * MIB, 100 * MIB, 0)}, 400),
        ("0::/\n", VERSION_2, {"": (500 * MIB, 400 * MIB, 300 * MIB)}, 400),
        ("0::/\n", VERSION_2, {"": (9000 * MIB, 0, 0)}, 1024),
        ("0::/a/b\n", VERSION_2, {"a": (300 * MIB, 0, 0), "a/b": ("max", 0, 0)}, 300),
        ("0::/a/b\n", VERSION_2, {"a": ("max", 0, 0), "a/b": (200 * MIB, 0, 0), "other": (1, 0, 0)}, 200),
        ("0::/a\n", VERSION_2, {"a": (200 * MIB, 300 * MIB, 0)}, 0),
        ("4:memory:/a\n2:cpu:/\n0::/\n", VERSION_1, {"a": (2**63 - 4096, 0, 0)}, 1024),
        ("4:memory:/a\n2:cpu:/\n0::/\n", VERSION_1, {"a": (600 * MIB, 150 * MIB, 50 * MIB)}, 500),
        ("4:memory:/of/the/host\n", VERSION_1, {"": (700 * MIB, 0, 0)}, 700),
    ],
)
def test_memory_is_what_the_control_group_grants(
    tmp_path: Path, membership: str, version: Any, groups: Any, expected: int
) -> None:
    system = fake_system(tmp_path, membership, groups, version)
    assert available_memory(CPU, system=system) == expected * MIB


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:130] DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("sizes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_running_out_of_memory_is_told_from_other_errors(error: Exception, expected: bool) -> None:
    assert out_of_memory(error) is expected


def test_the_environment_names_the_versions() -> None:
    record = environment()
    assert record["versions"]["torch"] == torch.__version__
    assert record["threads"] == torch.get_num_threads()
    assert json.loads(json.dumps(record)) == record
