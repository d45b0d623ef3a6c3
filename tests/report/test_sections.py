"""Parts of a page that come from the run folder alone."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

from mlbseg.report.sections import audit_section


def test_names_of_audited_cases_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit" / "cases.csv").write_text("rank,case,role,trust\n1,001,clean,0.25\n2,1e3,7,1\n")
    section = audit_section(SimpleNamespace(root=tmp_path))  # type: ignore[arg-type]
    assert section is not None
    cells = re.findall(r"<t[dh][^>]*>([^<]*)</t[dh]>", section.body)
    assert cells[-8:] == ["001", "1", "clean", "0.250", "1e3", "2", "7", "1"]
