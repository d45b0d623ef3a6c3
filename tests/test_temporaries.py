"""Temporaries: removed at the end, swept when their process was killed, left alone while it lives."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kills import killed_at
from mlbseg.files import write_atomic
from mlbseg.temporaries import is_temporary, sweep, sweep_tree, temporary_file, temporary_folder

HOLDING = """
import sys
from pathlib import Path
from mlbseg.temporaries import temporary_file, temporary_folder
with temporary_file(Path(sys.argv[1]), ".nii.gz") as file, temporary_folder(Path(sys.argv[1])) as folder:
    file.write_text("half a mask")
    (folder / "mask.nii.gz").write_text("a mask")
    print("holding", flush=True)
    sys.stdin.read()
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_not_renamed_is_removed_at_the_end(tmp_path: Path) -> None:
    with temporary_file(tmp_path) as file, temporary_folder(tmp_path) as folder:
        file.write_text("1")
        (folder / "2").write_text("2")
        assert all(is_temporary(name) for name in names(tmp_path))
    with temporary_file(tmp_path, ".nii.gz") as file:
        assert file.name.endswith(".nii.gz")
        file.rename(tmp_path / "kept")
    assert names(tmp_path) == ["kept"]


def test_nobody_else_can_look_into_a_temporary_folder(tmp_path: Path) -> None:
    with temporary_folder(tmp_path) as folder:
        assert folder.stat().st_mode & 0o077 == 0


def test_remains_are_swept_when_their_process_is_dead_and_not_before(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDING, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holding\n"
        before = names(tmp_path)
        assert len(before) == 3  # file, folder and the lock of the folder
        sweep_tree(tmp_path)
        assert names(tmp_path) == before
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert names(tmp_path) == before
    (tmp_path / ".mlbseg-notes").write_text("somebody's own")
    (tmp_path / f".mask.{'0' * 32}").write_text("another program's")
    sweep_tree(tmp_path)
    assert names(tmp_path) == sorted([".mlbseg-notes", f".mask.{'0' * 32}"])


def test_writing_a_file_sweeps_its_folder(tmp_path: Path) -> None:
    (tmp_path / f".mlbseg-{'0' * 32}").write_text("half a file")
    (tmp_path / f".mlbseg-{'1' * 32}").mkdir()
    write_atomic(tmp_path / "whole", b"1")
    assert names(tmp_path) == ["whole"]


@pytest.mark.parametrize("change", range(1, 4))
def test_a_file_is_whole_or_not_there_wherever_its_writer_is_killed(change: int, tmp_path: Path) -> None:
    with killed_at(change) as came:
        write_atomic(tmp_path / "file", b"content")
    assert came()
    assert not (tmp_path / "file").exists()
    sweep(tmp_path)
    assert names(tmp_path) == []


def test_links_are_swept_and_never_followed(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "file").write_text("mine")
    remains = tmp_path / "remains"
    remains.mkdir()
    (remains / f".mlbseg-{'0' * 32}").symlink_to(tmp_path / "own")
    (remains / f".mlbseg-{'1' * 32}").symlink_to(tmp_path / "own" / "file")
    sweep(remains)
    assert (tmp_path / "own" / "file").read_text() == "mine"


def test_without_locks_nothing_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remain = tmp_path / f".mlbseg-{'0' * 32}"
    remain.write_text("of a process that may live")

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    write_atomic(tmp_path / "whole", b"1")
    assert sorted(tmp_path.iterdir()) == [remain, tmp_path / "whole"]


def test_a_file_that_another_process_took_for_a_remain_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = fcntl.flock

    def late(handle: int, flags: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        sweep(tmp_path)  # in another process, just before this one holds its file
        lock(handle, flags)

    with temporary_file(tmp_path):
        sweep(tmp_path)
        assert len(names(tmp_path)) == 1
    (tmp_path / "other").mkdir()
    monkeypatch.setattr(fcntl, "flock", late)
    with temporary_file(tmp_path) as file:
        assert file.exists()
