"""What exports need beyond the base install, and how they write what other programs read."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from mlbseg.errors import UserError
from mlbseg.files import write_atomic


def require_extra(what: str, *packages: str) -> None:
    """Make sure that the packages of the extra ``mlbseg[export]`` that a format needs can be imported.

    Raises:
        UserError: if one is missing.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{what}: found no package {' and none '.join(missing)}, which is not in the base install "
            "(pip install 'mlbseg[export]')"
        )


def files_in(folder: Path) -> list[Path]:
    """Return all files in a folder and the folders in it, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def write_json(path: Path, content: Any) -> None:
    """Write JSON as other programs read it, text in UTF-8."""
    write_atomic(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
