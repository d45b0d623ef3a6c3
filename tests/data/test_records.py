"""Records come back as they were written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlbseg.data.records import read_record, write_record
from mlbseg.errors import UserError


def test_text_and_paths_of_any_bytes_come_back(tmp_path: Path) -> None:
    record = {"name": "größe 心臓", "path": os.fsdecode(b"/scans/\xff\\x"), "none": None, "dice": 0.5}
    write_record(tmp_path / "a.json", record)
    assert read_record(tmp_path / "a.json", "a record") == record
    assert "größe 心臓" in (tmp_path / "a.json").read_text(encoding="utf-8")  # a person can read it
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "holds a list"),
        (None, "cannot be read: No such file"),
    ],
)
def test_what_is_no_record_is_a_users_error(content: bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.json: {said}.*, expected a plan"):
        read_record(path, "a plan")
