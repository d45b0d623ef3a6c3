"""The benchmark of reading scans, in small."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from data.broken import healthy, mask, noise, save

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks" / "reading_scans.py"


@pytest.mark.slow
def test_the_benchmark_of_reading_scans_runs(tmp_path: Path) -> None:
    data = healthy(tmp_path)
    for number, path in enumerate(sorted((data / "images").iterdir())):
        save(path, noise(number, (24, 24, 24)))
        if (data / "labels" / path.name).exists():
            save(data / "labels" / path.name, mask((24, 24, 24)))
    command = [
        sys.executable, str(BENCHMARK), str(data), "--cases", "4", "--labelled", "2", "--repeats", "1",
        "--processes", "2",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("4 cases, the fastest of 1, seconds\n")
    rows = re.findall(r"^\| ([12]) \| (first|second) \|( \d+\.\d\d \|){6}$", done.stdout, re.M)
    assert [row[:2] for row in rows] == [("1", "first"), ("1", "second"), ("2", "first"), ("2", "second")]
    assert re.search(r"^one process / 2 processes, first time: \d+\.\d\d$", done.stdout, re.M)
