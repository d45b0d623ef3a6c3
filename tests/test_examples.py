"""The examples run, in small."""

from __future__ import annotations

import os
import re
import runpy
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NOTEBOOK = EXAMPLES / "own_data_to_audit.ipynb"
SIZE = "20"
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("MLBSEG_EXAMPLE_SIZE", SIZE)
    monkeypatch.delitem(sys.modules, "phantoms", raising=False)


def run(name: str, *arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_own_data(capsys: pytest.CaptureFixture[str]) -> None:
    run("own_data.py", "--steps", "4")
    printed = capsys.readouterr().out
    assert "24 scans: {'clean': 4, 'unlabelled': 16, 'noisy': 4, 'test': 0}" in printed
    assert re.search(r"^mean Dice [01]\.\d+$", printed, re.MULTILINE)
    assert len(Path("own_data/scores.csv").read_text(encoding="utf-8").splitlines()) == 1 + 6 * 2
    # The folder is no longer empty: nothing is trained over.
    with pytest.raises(SystemExit, match="not empty"):
        run("own_data.py", "--steps", "4")


def test_weights_in_your_loop(capsys: pytest.CaptureFixture[str]) -> None:
    run("weights_in_your_loop.py", "--steps", "3", "--size", "24")
    found = re.findall(r"^(.+): Dice [01]\.\d{3} on slices", capsys.readouterr().out, re.MULTILINE)
    assert found == ["careful labels alone", "all labels believed", "labels weighed"]


def test_weights_in_your_loop_takes_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    careful = np.full((10, 16, 16), -1)
    careful[:8] = rng.integers(0, 3, (8, 16, 16))
    np.savez("mine.npz", image=rng.normal(size=(10, 16, 16)), careful=careful, doubtful=careful.clip(0))
    run("weights_in_your_loop.py", "--data", "mine.npz", "--steps", "1")
    assert capsys.readouterr().out.splitlines()[-1] == "labels weighed"


def test_compare_methods(capfd: pytest.CaptureFixture[str]) -> None:
    run("compare_methods.py", "--methods", "supervised", "--steps", "4", "--size", "16", "--test", "2")
    assert re.search(
        r"^4 labels, supervised: mean Dice [01]\.\d+ \(1 seed\(s\)\)$", capfd.readouterr().out, re.MULTILINE
    )
    assert Path("compare_methods/bench/table.md").is_file()


def pictures(notebook: nbformat.NotebookNode) -> int:
    """Return how many outputs of a notebook are pictures."""
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    return sum("image/png" in out.get("data", {}) for out in outputs)


def test_the_notebook_runs_and_what_is_committed_has_its_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(committed)
    assert NOTEBOOK.stat().st_size < 1_000_000
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert pictures(committed) == 4
    assert str(EXAMPLES.parents[1]) not in NOTEBOOK.read_text(encoding="utf-8")

    monkeypatch.setenv("MLBSEG_EXAMPLE_STEPS", "8")
    paths = [str(EXAMPLES), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    fresh = nbformat.read(NOTEBOOK, as_version=4)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    resources = {"metadata": {"path": tmp_path}}
    NotebookClient(fresh, timeout=300, kernel_name="python3", resources=resources).execute()
    assert pictures(fresh) == 4
