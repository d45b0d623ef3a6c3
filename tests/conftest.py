"""Shared fixtures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def realdata() -> Path:
    """The folder of real scans; the test is skipped where it is absent."""
    root = Path(os.environ.get("MLBSEG_REALDATA", REPOSITORY.parent / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"no real scans at {root} (set MLBSEG_REALDATA)")
    return root
