"""The benchmark of aimed kills, in small: processes that are really killed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks" / "aimed_kills.py"


@pytest.mark.slow
def test_killed_commands_can_be_given_again_and_leave_nothing() -> None:
    command = [sys.executable, str(BENCHMARK), "--kills", "1", "--only", "run,export itksnap"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(
        r"^\| (run|export itksnap) \| (\d) \| (\d) \| (\d) \| (\d) \| (\d) \|$", done.stdout, re.M
    )
    assert [row[1:] for row in rows] == [("1", "0", "0", "0", "0")] * 2


@pytest.mark.slow
def test_a_command_that_is_killed_is_seen_to_be(tmp_path: Path) -> None:
    code = (
        "import signal, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import aimed_kills\n"
        "folder = Path(sys.argv[2]); folder.mkdir()\n"
        "command = ['demo', '--out', str(folder / 'demo'), '--steps', '2']\n"
        "print(aimed_kills.start(command, folder, at=9, number=signal.SIGKILL)[::2])\n"
        "print(bool(aimed_kills.remains(folder)))"
    )
    command = [sys.executable, "-c", code, str(BENCHMARK.parent), str(tmp_path / "trial")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.split("\n")[:2] == ["(-9, 9)", "True"], done.stdout + done.stderr
