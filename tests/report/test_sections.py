"""Parts of a page that come from the run folder alone."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

from mlbseg.apps.report.sections import _command, audit_section


def test_names_of_audited_cases_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit" / "cases.csv").write_text("rank,case,role,trust\n1,001,clean,0.25\n2,1e3,7,1\n")
    section = audit_section(SimpleNamespace(root=tmp_path))  # type: ignore[arg-type]
    assert section is not None
    cells = re.findall(r"<t[dh][^>]*>([^<]*)</t[dh]>", section.body)
    assert cells[-8:] == ["001", "1", "clean", "0.250", "1e3", "2", "7", "1"]


def test_a_command_names_no_folder() -> None:
    typed = ["/usr/bin/mlbseg", "train", "mine/scans/", "--cache=/home/me/secret", "../up/a", "-o", "steps=4"]
    typed += ["-o", "x=~/me/b", "/odd=me/c", "C:\\me\\d", "--part", "1/4"]
    assert _command(typed) == "mlbseg train scans --cache=secret a -o steps=4 -o x=b c d --part 1/4"
    assert _command(None) == ""
