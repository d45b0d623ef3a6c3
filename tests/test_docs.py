"""The code in the documents runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def snippets() -> list[tuple[str, str]]:
    """Return (document and number, code) of every Python block in docs/ and the README."""
    found = []
    for path in sorted([*(REPOSITORY / "docs").glob("*.md"), REPOSITORY / "README.md"]):
        blocks = re.findall(
            r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        )
        found += [(f"{path.name} {i}", block) for i, block in enumerate(blocks, start=1)]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("code", [pytest.param(code, id=name) for name, code in snippets()])
def test_snippets_run(code: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
