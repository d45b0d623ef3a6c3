"""Folders that are whole or not there, wherever the process that makes them is killed."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from kills import killed_at
from mlbseg.errors import UserError
from mlbseg.staging import contents, staged
from mlbseg.temporaries import unless_held

MADE = {"a", "b", "b/c", "done"}


def make(out: Path, *, overwrite: bool = False) -> None:
    with staged(out, overwrite=overwrite, last="done") as folder:
        (folder / "b").mkdir()
        for name in ("done", "a", "b/c"):
            (folder / name).write_text(name)


def found(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*")}


@pytest.mark.parametrize("existing", [False, True])
def test_a_folder_can_be_made_again_wherever_its_maker_was_killed(existing: bool, tmp_path: Path) -> None:
    kills = 0
    for change in itertools.count(1):
        root = tmp_path / str(change)
        out = root / "out"
        (out if existing else root).mkdir(parents=True)
        with killed_at(change) as came:
            make(out)
        if not came():
            break
        kills += 1
        # Half of it is never taken for the whole.
        assert not (out / "done").exists() or found(out) >= MADE
        try:
            make(out)
        except UserError:
            assert found(out) >= MADE  # it was whole before
        assert found(out) == MADE
        assert [path.name for path in root.iterdir()] == ["out"]
    assert kills > 5


def test_nothing_is_left_beside_a_folder_after_the_next_attempt(tmp_path: Path) -> None:
    for change in range(1, 9):
        with killed_at(change):
            make(tmp_path / "out")
    assert any(path.name.startswith(".") for path in tmp_path.iterdir())
    make(tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert found(tmp_path / "out") == MADE


def test_files_of_the_user_count_beside_what_a_kill_left(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for change in itertools.count(1):
        with killed_at(change):
            make(out)
        if (out / "a").exists():
            break
    (out / "own").write_text("mine")
    with pytest.raises(UserError, match="out: exists already and is not empty"):
        make(out)
    assert (out / "own").read_text() == "mine"


def test_what_lies_there_is_not_taken_for_a_remain_of_a_killed_replacement(tmp_path: Path) -> None:
    for change in itertools.count(1):
        out = tmp_path / str(change)
        make(out)
        with killed_at(change) as came:
            make(out, overwrite=True)
        if not came():
            break
        with pytest.raises(UserError, match="exists already and is not empty"):
            make(out)
        make(out, overwrite=True)
        assert found(out) == MADE


def test_of_two_that_make_the_same_folder_one_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "new"
    with pytest.raises(UserError, match="new: another process has written there meanwhile"), staged(out):
        make(out)
    assert found(out) == MADE
    (tmp_path / "there").mkdir()
    with (
        pytest.raises(UserError, match="there: another process has written there meanwhile"),
        staged(tmp_path / "there"),
    ):
        make(tmp_path / "there")
    assert found(tmp_path / "there") == MADE


def test_a_process_that_is_just_moving_is_not_disturbed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with unless_held(out / ".mlbseg-moving", make=True) as free:
        assert free
        with pytest.raises(UserError, match="another process has written there meanwhile"):
            make(out)
        (out / ".mlbseg-moving").write_text("a\n")
        (out / "a").write_text("theirs")
        assert contents(out)
    assert not contents(out)


def test_a_name_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file: is a file, expected a folder"):
        make(tmp_path / "file")
    with pytest.raises(UserError, match="cannot be made a folder: Not a directory"):
        make(tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "mine"
