from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - as its documentation does

from mlbseg.data import hashes
from mlbseg.data import inputs as module
from mlbseg.data.hashes import content_hash
from mlbseg.data.inputs import Inputs
from mlbseg.errors import FaultsError, UserError
from mlbseg.types import Case, Role


def make_case(folder: Path, name: str = "a", role: Role = Role.CLEAN) -> Case:
    folder.mkdir(exist_ok=True)
    for part in ("0", "1", "label"):
        (folder / f"{name}_{part}").write_text(f"{name} {part}")
    return Case(name, (folder / f"{name}_0", folder / f"{name}_1"), folder / f"{name}_label", role)


def rewrite(path: Path, content: bytes) -> None:
    """Change a file's content and keep its times."""
    stat = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_the_data_file_of_a_header_counts(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(np.arange(24, dtype=np.int16).reshape(2, 3, 4))
    sitk.WriteImage(image, str(tmp_path / "a.mhd"))
    before = content_hash(tmp_path / "a.mhd")
    data = next(tmp_path.glob("a.*raw"))
    content = bytearray(data.read_bytes())
    content[3] ^= 1
    rewrite(data, bytes(content))
    assert content_hash(tmp_path / "a.mhd") != before
    assert content_hash(tmp_path / "a.mhd") == content_hash(tmp_path / "a.mhd")


def test_every_slice_of_a_series_counts_and_nothing_else(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.dcm").write_text(name)
    before = content_hash(tmp_path)
    for name in (".DS_Store", "Thumbs.db", "DICOMDIR", "notes.txt"):
        (tmp_path / name).write_text("not read" * 20)
    assert content_hash(tmp_path) == before
    (tmp_path / "c.dcm").write_text("c")
    after = content_hash(tmp_path)
    assert after != before
    rewrite(tmp_path / "a.dcm", b"A")
    assert content_hash(tmp_path) not in (before, after)


def test_a_change_that_keeps_size_and_time_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_text("one")
    seen = {content_hash(path)}
    for content in (b"two", b"six"):
        rewrite(path, content)
        seen.add(content_hash(path))
    assert len(seen) == 3
    # So it is where hashes are remembered, which they are not of a file that has just been written.
    monkeypatch.setattr(hashes, "_GRAIN", -1)
    before = content_hash(path)
    (tmp_path / "new").write_bytes(b"ten")
    (tmp_path / "new").replace(path)
    assert content_hash(path) != before


def test_a_file_is_hashed_once_while_it_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_text("one")
    calls: list[Any] = []
    original = hashlib.file_digest

    def digest(*arguments: Any) -> Any:
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(hashes.hashlib, "file_digest", digest)
    content_hash(path)
    content_hash(path)
    assert len(calls) == 2  # it has just been written: another change could carry the same time
    monkeypatch.setattr(hashes, "_GRAIN", -(10**9))
    for _ in range(3):
        content_hash(path)
    assert len(calls) == 3


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: cannot be read: not a file"):
        content_hash(tmp_path / "pipe")
    with pytest.raises(UserError, match="gone: cannot be read: No such file"):
        content_hash(tmp_path / "gone")


def test_labels_count_where_they_may_be_opened(tmp_path: Path) -> None:
    inputs = Inputs()
    for name, role in (("a", Role.CLEAN), ("b", Role.NOISY), ("c", Role.UNLABELLED), ("d", Role.TEST)):
        case = make_case(tmp_path, name, role)
        if role in (Role.UNLABELLED, Role.TEST):
            assert case.label is not None
            case.label.unlink()  # nothing may need it
        inputs.note(case)
    assert {name: sorted(parts) for name, parts in inputs.known.items()} == {
        "a": ["images", "label"],
        "b": ["images", "label"],
        "c": ["images"],
        "d": ["images"],
    }


def test_all_changes_are_named(tmp_path: Path) -> None:
    a, b = make_case(tmp_path, "a"), make_case(tmp_path, "b")
    inputs = Inputs(since="noon")
    inputs.require([a, b])
    rewrite(a.images[1], b"a 2")
    rewrite(tmp_path / "b_label", b"b LABEL")
    with pytest.raises(FaultsError) as raised:
        inputs.require([a, b])
    assert [Path(fault.where).name for fault in raised.value.faults] == ["a_1", "b_label"]
    assert "a_1: has changed since noon (restore it" in str(raised.value)
    with pytest.raises(UserError, match="a_1: has changed since noon"):
        inputs.images(a)
    with pytest.raises(UserError, match="b_label: has changed since noon"):
        inputs.label(b)
    assert len(inputs.images(b)) == 2


def test_a_file_that_changes_back_at_once_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(tmp_path)
    inputs = Inputs(since="noon")
    inputs.note(case)
    held = iter(["other", *inputs.known["a"]["images"][1:]])
    monkeypatch.setattr(module, "content_hash", lambda path, _: next(held, None) or content_hash(path))
    with pytest.raises(UserError, match="a_0: has changed since noon"):
        inputs.images(case)


def test_what_cannot_be_read_is_left_to_those_who_read_it(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    case.images[0].unlink()
    inputs = Inputs()
    inputs.note(case)
    assert set(inputs.known["a"]) == {"label"}
    assert inputs.of([case]).known == inputs.known
    with pytest.raises(UserError, match="a_0: cannot be read"):
        inputs.images(case)


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    inputs = Inputs()
    inputs.note(make_case(tmp_path))
    inputs.write(tmp_path / "inputs.json")
    assert Inputs.read(tmp_path / "inputs.json").known == inputs.known
    assert str(tmp_path) not in (tmp_path / "inputs.json").read_text()  # a moved scan is the same


@pytest.mark.parametrize("text", ["", "[]", '{"a": 3}', '{"a": {"images": 3}}', '{"a": {"images": [3]}}'])
def test_a_damaged_record_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "inputs.json").write_text(text)
    with pytest.raises(UserError, match=r"inputs\.json"):
        Inputs.read(tmp_path / "inputs.json")


def test_what_was_known_first_counts(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    first, later = Inputs({"a": {"images": ("x", "y")}, "b": {"images": ("z",)}}), Inputs()
    later.note(case)
    joined = first.joined(later)
    assert json.loads(json.dumps(joined.known)) == {
        "a": {"images": ["x", "y"], "label": [content_hash(tmp_path / "a_label")]},
        "b": {"images": ["z"]},
    }
