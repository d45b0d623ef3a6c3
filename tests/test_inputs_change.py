"""Scans, labels and prepared scans that change while a run is made of them, or between its beginning and its end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from blocks import TINY, write_blocks
from conftest import Command
from mlbseg.data import cache as cache_module
from mlbseg.data import known
from mlbseg.errors import UserError
from mlbseg.training import Interrupted, prepare, train
from mlbseg.training.loop import Loop
from mlbseg.types import Batch

pytestmark = pytest.mark.slow

SETTINGS = [*TINY, "steps=8"]  # 4 of each stage
CHANGED = "has changed since the run began (restore it as it was then, or start a new run)"


def begin(scans: Path, run: Path, **options: Any) -> None:
    cache = run.parent / "cache"
    train(scans, run, validation=["case_2"], overrides=SETTINGS, device="cpu", cache=cache, **options)


def weights(run: Path) -> bytes:
    return (run / "model.safetensors").read_bytes()


def at_step(monkeypatch: pytest.MonkeyPatch, stage: int, step: int, action: Callable[[], object]) -> None:
    """Do something before a training step (counted from 0)."""
    original = Loop.take_step

    def take_step(self: Loop, batch: Batch) -> Any:
        if (self.stage, self.step) == (stage, step):
            action()
        return original(self, batch)

    monkeypatch.setattr(Loop, "take_step", take_step)


def rewrite(path: Path) -> None:
    """Put another file of the same size in the place of one, with its times, as `cp -p` and `rsync -t` do."""
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[-6] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with scans, a run that was stopped in its second stage, and one that was not."""
    root = tmp_path_factory.mktemp("stopped")
    write_blocks(root / "scans", count=5, labelled=3, suffix=".nii")
    begin(root / "scans", root / "whole")
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 2, 1, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted):
            begin(root / "scans", root / "run")
    return root


@pytest.fixture
def moved(stopped: Path, tmp_path: Path) -> Path:
    """A copy of it, which may be changed."""
    root = shutil.copytree(stopped, tmp_path / "copy")
    record = json.loads((root / "run" / "data.json").read_text())
    record |= {"root": str(root / "scans"), "cache": str(root / "cache")}
    (root / "run" / "data.json").write_text(json.dumps(record))
    return root


def test_a_run_records_what_its_training_cases_hold(stopped: Path) -> None:
    record = json.loads((stopped / "run" / "inputs.json").read_text())
    assert sorted(record) == [f"case_{i}" for i in range(5)]
    assert all(set(record[name]) == {"images", "label"} for name in ("case_0", "case_1", "case_2"))
    assert all(set(record[name]) == {"images"} for name in ("case_3", "case_4"))
    assert len({str(case["images"]) for case in record.values()}) == 5


def test_scans_that_have_moved_as_they_are_change_nothing(moved: Path, stopped: Path) -> None:
    train(resume=moved / "run", device="cpu")
    assert weights(moved / "run") == weights(stopped / "whole")


@pytest.mark.parametrize(
    "name", ["images/case_0", "labels/case_0", "images/case_2", "labels/case_2", "images/case_4"]
)
def test_a_file_that_has_changed_before_a_run_is_continued_is_named(
    name: str, moved: Path, stopped: Path, command: Command
) -> None:
    path = moved / "scans" / f"{name}.nii"
    before = path.read_bytes()
    rewrite(path)
    result = command("train", "--resume", moved / "run", "-q")
    assert result.code == 2
    assert f"{path}: {CHANGED}" in result.err
    assert "Traceback" not in result.err
    path.write_bytes(before)
    assert command("train", "--resume", moved / "run", "-q").code == 0
    assert weights(moved / "run") == weights(stopped / "whole")


def test_all_files_that_have_changed_are_named_together(moved: Path) -> None:
    names = ["images/case_1", "labels/case_1", "images/case_3"]
    for name in names:
        rewrite(moved / "scans" / f"{name}.nii")
    with pytest.raises(UserError) as raised:
        train(resume=moved / "run", device="cpu")
    assert [name for name in names if f"{name}.nii: {CHANGED}" in str(raised.value)] == names
    assert str(raised.value).count(CHANGED) == 3


def test_a_scan_or_label_that_has_gone_is_named(moved: Path) -> None:
    label = moved / "scans" / "labels" / "case_1.nii"
    kept = label.rename(moved / "kept")
    with pytest.raises(UserError, match="case_1: has no label"):
        train(resume=moved / "run", device="cpu")
    kept.rename(label)
    (moved / "scans" / "images" / "case_3.nii").unlink()
    with pytest.raises(UserError, match="no case 'case_3'"):
        train(resume=moved / "run", device="cpu")


def test_another_number_of_channels_is_named(moved: Path) -> None:
    record = json.loads((moved / "run" / "inputs.json").read_text())
    record["case_1"]["images"] *= 2
    (moved / "run" / "inputs.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"case_1: 1 image file\(s\), expected 2 as when the run began"):
        train(resume=moved / "run", device="cpu")


def test_cases_of_no_run_may_change(moved: Path, stopped: Path) -> None:
    (moved / "scans" / "notes.txt").write_text("more")
    write_blocks(moved / "more", count=6, labelled=6, suffix=".nii")
    for part in ("images", "labels"):
        shutil.copy(moved / "more" / part / "case_5.nii", moved / "scans" / part)
    # Nor does a label matter that training never opens.
    shutil.copy(moved / "more" / "labels" / "case_4.nii", moved / "scans" / "labels")
    train(resume=moved / "run", device="cpu")
    assert weights(moved / "run") == weights(stopped / "whole")


def test_a_record_that_is_gone_or_damaged_is_said(moved: Path, stopped: Path) -> None:
    record = moved / "run" / "inputs.json"
    record.write_text('{"case_0": 3}')
    with pytest.raises(UserError, match=re.escape(f"{record}.case_0: ")):
        train(resume=moved / "run", device="cpu")
    record.unlink()
    with pytest.warns(UserWarning, match=r"inputs\.json: is missing, so a scan that has changed"):
        train(resume=moved / "run", device="cpu")
    assert weights(moved / "run") == weights(stopped / "whole")


@pytest.mark.parametrize("name", ["images/case_0", "labels/case_0", "images/case_2", "images/case_4"])
@pytest.mark.parametrize("after", ["check", "fingerprint", "make_plan"])
def test_a_file_that_changes_while_a_run_is_prepared_is_named(
    after: str, name: str, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans = shutil.copytree(stopped / "scans", tmp_path / "scans")
    path = scans / f"{name}.nii"
    original = getattr(prepare, after)

    def then_change(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        rewrite(path)
        return result

    monkeypatch.setattr(prepare, after, then_change)
    with pytest.raises(UserError, match=re.escape(f"{path}: {CHANGED}")):
        begin(scans, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("module", "reader"), [(cache_module, "read_scan"), (known, "read_label")])
def test_a_file_that_changes_while_it_is_prepared_is_named(
    module: ModuleType, reader: str, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans = shutil.copytree(stopped / "scans", tmp_path / "scans")
    original = getattr(module, reader)
    changed: list[Path] = []

    def change_first(files: Any) -> Any:
        path = files if reader == "read_label" else files[0]
        if not changed:
            changed.append(path)
            rewrite(path)
        return original(files)

    monkeypatch.setattr(module, reader, change_first)
    with pytest.raises(UserError) as raised:
        begin(scans, tmp_path / "run")
    assert f"{changed[0]}: {CHANGED}" in str(raised.value)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("what", ["cache", "entries"])
def test_a_cache_that_goes_in_the_middle_of_training_changes_nothing(
    what: str, workers: int, moved: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch, recwarn: Any
) -> None:
    def lose() -> None:
        if what == "cache":
            shutil.rmtree(moved / "cache")
        for path in (moved / "cache").glob("v*/*/array/c"):
            shutil.rmtree(path)

    file = moved / "run" / "config.yaml"
    text = file.read_text()
    assert "workers: null" in text
    file.write_text(text.replace("workers: null", f"workers: {workers}"))
    original = Loop.fit

    def fit(self: Loop, title: str, until: int) -> None:
        lose()
        original(self, title, until)

    at_step(monkeypatch, 2, 3, lose)
    monkeypatch.setattr(Loop, "fit", fit)
    train(resume=moved / "run", device="cpu")
    assert weights(moved / "run") == weights(stopped / "whole")
    if workers == 0:  # else the processes that draw say so
        found = "has gone" if what == "cache" else "is damaged"
        assert any(f"its entry in the cache {found}" in str(note.message) for note in recwarn)


def test_a_scan_that_has_changed_when_its_entry_is_lost_is_named(
    moved: Path, stopped: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = sorted((moved / "scans" / "images").iterdir())
    before = [path.read_bytes() for path in paths]

    def lose() -> None:
        shutil.rmtree(moved / "cache")
        for path in paths:
            rewrite(path)

    with monkeypatch.context() as patch:
        at_step(patch, 2, 2, lose)
        with pytest.warns(UserWarning, match="has gone"):
            result = command("train", "--resume", moved / "run", "-q")
    assert result.code == 2
    assert re.search(rf"{re.escape(str(moved))}/scans/images/case_\d\.nii: has changed since", result.err)
    for path, content in zip(paths, before, strict=True):
        path.write_bytes(content)
    assert command("train", "--resume", moved / "run", "-q").code == 0
    assert weights(moved / "run") == weights(stopped / "whole")


@pytest.fixture
def changed(moved: Path) -> Path:
    """A finished run of whose scans two have changed since, and the label of a third."""
    (moved / "run" / "data.json").replace(moved / "whole" / "data.json")
    for name in ("images/case_0", "images/case_3", "labels/case_1"):
        rewrite(moved / "scans" / f"{name}.nii")
    return moved / "whole"


def test_commands_that_read_changed_scans_of_a_run_say_so_once(
    changed: Path, tmp_path: Path, command: Command
) -> None:
    for arguments, count in (
        (("audit", changed), 2),
        (("suggest", changed), 2),
        (("export", changed, tmp_path / "nnunet", "--format", "nnunet"), 3),
    ):
        with pytest.warns(UserWarning, match="changed since the run began; what is said here") as notes:
            assert command(*arguments).code == 0
        (note,) = [str(note.message) for note in notes if "since the run began" in str(note.message)]
        assert note.count(str(changed.parent / "scans")) == count


def test_the_report_says_that_scans_have_changed(changed: Path, command: Command) -> None:
    assert (
        command("report", changed).code == 0
    )  # only case_2, for validation, is scored, and two are compared
    page = (changed / "report.html").read_text()
    assert "Files have changed since the run began" in page
    assert "case_0.nii" in page
    assert "labels/case_1.nii" in page


def test_scans_that_are_as_they_were_are_no_news(moved: Path, command: Command) -> None:
    (moved / "run" / "data.json").replace(moved / "whole" / "data.json")
    for name in ("audit", "report", "suggest"):
        assert command(name, moved / "whole").code == 0  # a warning would be an error here
    assert "have changed since" not in (moved / "whole" / "report.html").read_text()
