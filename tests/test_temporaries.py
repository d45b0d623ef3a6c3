"""Temporaries: removed at the end, swept when their process was killed, left alone while it lives."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from kills import killed_at
from mlbseg import temporaries
from mlbseg.files import write_atomic
from mlbseg.temporaries import (
    is_temporary,
    sweep,
    sweep_tree,
    temporary_file,
    temporary_folder,
    unless_held,
)

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

    def lock(*_: object, **__: object) -> bool:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(filelock, "lock_descriptor", lock)
    write_atomic(tmp_path / "whole", b"1")
    assert sorted(tmp_path.iterdir()) == [remain, tmp_path / "whole"]


def test_a_file_that_another_process_took_for_a_remain_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = filelock.lock_descriptor

    def late(handle: int, *, blocking: bool) -> bool:
        monkeypatch.setattr(filelock, "lock_descriptor", lock)
        sweep(tmp_path)  # in another process, just before this one holds its file
        return lock(handle, blocking=blocking)

    with temporary_file(tmp_path):
        sweep(tmp_path)
        assert len(names(tmp_path)) == 1
    (tmp_path / "other").mkdir()
    monkeypatch.setattr(filelock, "lock_descriptor", late)
    with temporary_file(tmp_path) as file:
        assert file.exists()


def test_a_file_that_another_process_is_about_to_remove_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, met = filelock.lock_descriptor, []

    def held(handle: int, *, blocking: bool) -> bool:
        if not met:  # another process sweeps: it holds the new file, and has not removed it yet
            met.extend(names(tmp_path))
            return False
        return lock(handle, blocking=blocking)

    monkeypatch.setattr(filelock, "lock_descriptor", held)
    with temporary_file(tmp_path) as file:
        assert len(met) == 1
        assert file.name not in met


def test_windows_where_no_file_that_is_held_can_be_renamed_holds_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remain = tmp_path / f".mlbseg-{'0' * 32}"
    remain.write_text("of a process that may live")
    monkeypatch.setattr(temporaries, "_WINDOWS", True)
    monkeypatch.setattr(filelock, "lock_descriptor", None)

    def opened() -> set[str]:
        handles = Path("/proc/self/fd")
        if not handles.is_dir():
            pytest.skip("only Linux lists the files that a process has open")
        return {str(handle.readlink()) for handle in handles.iterdir() if handle.is_symlink()}

    with temporary_file(tmp_path) as file, temporary_folder(tmp_path) as folder:
        assert not {path for path in opened() if path.startswith(str(tmp_path))}
        file.rename(tmp_path / "kept")
        folder.rename(tmp_path / "folder")
    with unless_held(tmp_path / "note", make=True) as free:
        assert free is None
        (tmp_path / "note").unlink()
    assert names(tmp_path) == sorted([remain.name, "folder", "kept"])
