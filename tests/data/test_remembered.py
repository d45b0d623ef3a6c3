"""What was read is not read again, and is what reading again would give."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from data.broken import BROKEN, cut, healthy, left_atrium, mask, nifti, noise, pictures, save, series
from mlbseg.data import facts as facts_module
from mlbseg.data import fingerprint as fingerprint_module
from mlbseg.data import hashes, remembered
from mlbseg.data import known as known_module
from mlbseg.data import reading as reading_module
from mlbseg.data.cases import find_cases
from mlbseg.data.check import CheckResult, check
from mlbseg.data.facts import ImageFacts, LabelFacts, image_facts, label_facts
from mlbseg.data.fingerprint import fingerprint
from mlbseg.data.hashes import content_hash
from mlbseg.data.reading import Reading
from mlbseg.data.remembered import Remembered, reader_version
from mlbseg.errors import UserError
from mlbseg.types import Known

KINDS = {
    "nifti": healthy, "nrrd": lambda root: healthy(root, ".nrrd"), "metaimage": lambda root: healthy(root, ".mha"),
    "pictures": pictures, "hdf5": left_atrium, "dicom": series,
    "skewed": lambda root: nifti(healthy(root) / "images" / "e.nii", noise(9), bent=0.01),
}  # fmt: skip


class Counted:
    """Counts what is read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: list[str] = []
        for module, name in (
            (facts_module, "read_scan"), (facts_module, "read_label"),
            (fingerprint_module, "read_scan"), (known_module, "read_label"),
        ):  # fmt: skip
            monkeypatch.setattr(module, name, self._counting(getattr(module, name)))

    def _counting(self, function):
        def counted(what):
            self.read.append(Path(what if isinstance(what, Path) else what[0]).name)
            return function(what)

        return counted

    def taken(self) -> list[str]:
        taken, self.read = sorted(self.read), []
        return taken


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


@pytest.fixture
def here(tmp_path: Path) -> Reading:
    return Reading(1, Remembered.at(tmp_path / "cache"))


def run(data: Path, reading: Reading) -> CheckResult:
    return check(find_cases(data), reading=reading)


def rewrite(path: Path, content: bytes) -> None:
    """Change a file's content and keep its size and time of writing."""
    stat = path.stat()
    assert len(content) == stat.st_size
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("kind", KINDS)
def test_an_unchanged_file_is_not_read_again(
    kind: str, tmp_path: Path, here: Reading, counted: Counted
) -> None:
    data = tmp_path / "data"
    KINDS[kind](data)
    dataset = find_cases(data)
    plain = check(dataset)
    assert check(dataset, reading=here) == plain
    assert counted.taken()
    assert check(dataset, reading=here) == plain
    assert counted.taken() == []
    shutil.copytree(data, tmp_path / "moved")  # by content, not by name
    run(tmp_path / "moved", here)
    assert counted.taken() == []
    for case in dataset.cases:
        known = image_facts(case.images, here.remembered)
        read = image_facts(case.images, Remembered())
        assert known == read
        assert known.geometry.stored == read.geometry.stored
        if case.label is not None:
            assert label_facts(case.label, here.remembered) == label_facts(case.label, Remembered())


def test_measures_are_remembered_too(tmp_path: Path, here: Reading, counted: Counted) -> None:
    cases = find_cases(healthy(tmp_path / "data")).cases
    plain = fingerprint(cases)
    counted.taken()
    run(tmp_path / "data", here)
    counted.taken()
    assert fingerprint(cases, reading=here) == plain
    assert counted.taken() == sorted(["a.nii.gz", "b.nii.gz", "c.nii.gz"] * 2)  # where there is a label
    assert fingerprint(cases, reading=here) == plain
    assert counted.taken() == []
    # What is asked counts: of a case that is not clean, no structure is measured.
    hidden = [replace(case, known=Known(ignore=1)) for case in cases]
    assert fingerprint(hidden, reading=here) == fingerprint(hidden)


def test_what_is_added_is_read(tmp_path: Path, here: Reading, counted: Counted) -> None:
    data = healthy(tmp_path / "data")
    run(data, here)
    counted.taken()
    save(data / "images" / "e.nii.gz", noise(9))
    result = run(data, here)
    assert counted.taken() == ["e.nii.gz"]
    assert result == run(data, Reading())


def test_a_change_within_the_same_second_is_seen(tmp_path: Path, here: Reading, counted: Counted) -> None:
    """Of the same size, with its time of writing set back, at once."""
    data = healthy(tmp_path / "data", ".nii")
    path = data / "labels" / "b.nii"
    run(data, here)
    counted.taken()
    for value in (0, 2, 1):
        content = bytearray(path.read_bytes())
        content[352:] = (
            np.where(np.frombuffer(content[352:], np.uint8) > 0, value, 0).astype(np.uint8).tobytes()
        )
        rewrite(path, bytes(content))
        assert run(data, here) == run(data, Reading())
        assert "b.nii" in counted.taken()


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    tmp_path: Path, here: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = healthy(tmp_path / "data")
    path = data / "images" / "a.nii.gz"
    original, other = facts_module.read_scan, save(tmp_path / "other.nii.gz", noise(7))

    def read_and_change(paths):
        scan = original(paths)
        shutil.copyfile(other, path)
        return scan

    with monkeypatch.context() as patch:
        patch.setattr(facts_module, "read_scan", read_and_change)
        image_facts([path], here.remembered)
    assert image_facts([path], here.remembered) == image_facts([path], Remembered())


def test_a_hash_is_kept_only_of_a_file_that_was_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two changes within one tick of the clock have one time: the second would go unseen."""
    store = Remembered.at(tmp_path / "cache")
    path = tmp_path / "a.nii"
    path.write_bytes(b"one")
    content_hash(path, store)
    assert list(store.folder.iterdir()) == []
    now = path.stat().st_ctime_ns
    monkeypatch.setattr(hashes, "_hashes", {})
    monkeypatch.setattr(hashes.time, "time_ns", lambda: now + hashes._GRAIN + 1)
    before = content_hash(path, store)
    assert len(list(store.folder.iterdir())) == 1
    monkeypatch.setattr(hashes.hashlib, "file_digest", None)
    assert content_hash(path, store) == before  # another process would not hash it either


def test_where_times_are_coarse_hashes_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAT makes the time of a change from the time of writing, which can be set."""
    store = Remembered.at(tmp_path / "cache")
    path = tmp_path / "a.nii"
    path.write_bytes(b"one")
    look = hashes._look
    monkeypatch.setattr(hashes, "_look", lambda found: (*look(found)[:-1], 10**18))
    content_hash(path, store)
    assert list(store.folder.iterdir()) == []


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        content = content[: len(content) // 2]
    elif how == "empty":
        content.clear()
    elif how == "flipped":
        content[-3] ^= 1
    elif how == "another's":
        text = b'{"geometry": 3}'
        content = bytearray(remembered._checksum(text).encode() + b"\n" + text)
    elif how == "no text":
        content = bytearray(b"\xff" * 100)
    path.unlink()
    if how == "folder":
        path.mkdir()
    else:
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "empty", "flipped", "another's", "no text", "folder"])
def test_a_damaged_entry_is_none(how: str, tmp_path: Path, here: Reading) -> None:
    data = healthy(tmp_path / "data")
    plain = run(data, here)
    entries = list(here.remembered.folder.iterdir())
    assert len(entries) == 5  # the labels are alike
    for path in entries:
        damage(path, how)
    assert run(data, here) == plain
    assert run(data, here) == plain


def test_entries_of_other_code_are_not_taken(
    tmp_path: Path, here: Reading, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = healthy(tmp_path / "data")
    run(data, here)
    counted.taken()
    monkeypatch.setattr(remembered, "reader_version", lambda: "f" * 64)
    run(data, Reading(1, Remembered.at(tmp_path / "cache")))
    assert len(counted.taken()) == 5  # the labels are alike


def test_the_version_is_of_the_code_and_its_libraries(tmp_path: Path) -> None:
    source = tmp_path / "a.py"
    source.write_text("1")
    before = remembered._version([source], ["numpy"])
    assert remembered._version([source], ["scipy"]) != before
    source.write_text("2")
    assert remembered._version([source], ["numpy"]) != before
    assert len(reader_version()) == 64


def test_a_cache_that_cannot_be_written_is_told_of_and_does_no_harm(tmp_path: Path) -> None:
    data = healthy(tmp_path / "data")
    (tmp_path / "cache").write_text("no folder")
    with pytest.warns(UserWarning, match="cache: cannot be written, so what is read now will be read again"):
        reading = Reading.of(1, tmp_path / "cache")
    assert run(data, reading) == run(data, Reading())


def test_a_full_disk_does_no_harm(tmp_path: Path, here: Reading, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    data = healthy(tmp_path / "data")
    monkeypatch.setattr(remembered, "temporary_file", full)
    assert run(data, here) == run(data, Reading())
    assert list(here.remembered.folder.iterdir()) == []


def test_without_any_folder_nothing_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise UserError("no folder")

    monkeypatch.setattr(reading_module, "default_cache_root", none)
    assert Reading.of(3) == Reading(3)


def test_what_is_remembered_names_neither_patients_nor_paths(tmp_path: Path, here: Reading) -> None:
    data = healthy(tmp_path / "Meier-folder", names=("Meier_Hans", "b", "c", "d"))
    run(data, here)
    fingerprint(find_cases(data).cases, reading=here)
    folder = series(tmp_path / "series")
    for inside in (folder / "images").iterdir():
        shutil.copyfile(next(inside.iterdir()), inside / "Meier_extra.dcm")  # two at one place: a fault
    run(folder, here)
    written = [path.name.encode() + path.read_bytes() for path in here.remembered.folder.iterdir()]
    assert written
    assert not any(
        word in content for content in written for word in (b"Meier", b"images", b".nii", b"extra")
    )


def test_notes_that_name_files_are_given_each_time(tmp_path: Path, here: Reading) -> None:
    data = series(tmp_path / "data")
    folder = next((data / "images").iterdir())
    first = sorted(folder.iterdir())[0]
    import pydicom

    report = pydicom.dcmread(first)
    del report.PixelData, report.Rows, report.Columns
    report.SOPClassUID = "1.2.840.10008.5.1.4.1.1.88.11"
    report.save_as(folder / "Meier.dcm")
    plain = run(data, Reading())
    assert any("Meier.dcm" in str(note) for note in plain.warnings)
    for _ in range(2):
        assert run(data, here) == plain
    assert not any(b"Meier" in path.read_bytes() for path in here.remembered.folder.iterdir())


def test_a_fault_is_not_remembered(tmp_path: Path, here: Reading) -> None:
    data = healthy(tmp_path / "data")
    whole = (data / "images" / "b.nii.gz").read_bytes()
    cut(data / "images" / "b.nii.gz")
    for _ in range(2):
        assert [fault.case_id for fault in run(data, here).faults] == ["b"]
    (data / "images" / "b.nii.gz").write_bytes(whole)
    assert run(data, here).faults == ()


def test_greys_are_remembered_whatever_was_stated(tmp_path: Path, here: Reading) -> None:
    data = healthy(tmp_path / "data")
    ball = 200.0 * (sum((side - 15.5) ** 2 for side in np.indices((32, 32, 32))) < 100)
    soft = np.rint(ndimage.zoom(ball, 1.3, order=1)).astype(np.uint8)
    save(data / "images" / "b.nii.gz", noise(1, soft.shape))
    save(data / "labels" / "b.nii.gz", soft)
    dataset = find_cases(data)
    values = np.unique(soft).tolist()
    for labels in (None, values, None):
        assert check(dataset, labels=labels, reading=here) == check(dataset, labels=labels)
    assert any(fault.kind == "grey" for fault in run(data, here).faults)


def told(result: CheckResult) -> list[str]:
    """Return the faults in words, but how much memory is free."""
    return [re.sub(r"the [\d.]+ GiB of memory", "the memory", str(fault)) for fault in result.faults]


@pytest.mark.slow
def test_all_broken_data_give_the_same_faults_in_two_processes_and_from_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One data set with one case of each way to be broken, as far as a NIfTI layout holds them."""
    data = healthy(tmp_path / "data")
    for number, (name, build) in enumerate(BROKEN.items()):
        root = tmp_path / "broken" / name
        root.mkdir(parents=True)
        build(root)
        for part in ("images", "labels"):
            for path in sorted((root / part).glob("*.nii.gz")) if (root / part).is_dir() else ():
                if path.is_file() and path.stat().st_size < 1 << 20:
                    (data / part).mkdir(exist_ok=True)
                    shutil.copyfile(path, data / part / f"{number}_{path.name[-20:]}")
    dataset = find_cases(data)
    plain = check(dataset)
    assert len(plain.faults) > 10
    monkeypatch.setattr(reading_module, "SOON", -1.0)
    two = Reading(2, Remembered.at(tmp_path / "cache"))
    for _ in range(2):
        found = check(dataset, reading=two)
        assert told(found) == told(plain)
        assert found.warnings == plain.warnings
        assert json.dumps(found.summary) == json.dumps(plain.summary)


def test_facts_are_read_as_they_were_written(tmp_path: Path) -> None:
    store = Remembered.at(tmp_path)
    path = save(tmp_path / "a.nii.gz", (noise(0) / 3).astype(np.float32))
    found = image_facts([path], Remembered())
    store.remember(ImageFacts, "a", found)
    again = store.recall(ImageFacts, "a")
    assert again is not None
    assert repr(again) == repr(found)
    label = label_facts(save(tmp_path / "l.nii.gz", mask()), Remembered())
    store.remember(LabelFacts, "l", label)
    assert store.recall(LabelFacts, "l") == label
    assert store.recall(ImageFacts, "l") is None
