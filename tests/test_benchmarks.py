"""Every benchmark runs, in small, and prints what its figures are read from."""

from __future__ import annotations

import argparse
import csv
import importlib
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - as its documentation does
import torch
from safetensors.torch import load_file, save_file

import mlbseg
from blocks import TINY, save, write_blocks
from mlbseg.apps.bench.setup import begin
from mlbseg.data.readers import read_label
from mlbseg.runs import Run
from mlbseg.runs.weights import WEIGHTS

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
ELSEWHERE = {"aimed_kills", "reading_scans"}
"""Benchmarks with a test file of their own."""

Load = Callable[[str], ModuleType]


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what a benchmark sets for its process end with the test."""
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight scans, all with labels."""
    return write_blocks(tmp_path_factory.mktemp("labelled"), labelled=8)


@pytest.fixture(scope="module")
def hidden_run(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was given two of the labels."""
    out = tmp_path_factory.mktemp("runs") / "hidden"
    mlbseg.train(
        labelled, out, method="supervised", labelled=2, test=1, overrides=[*TINY, "steps=12"], device="cpu"
    )
    return out


def rows(printed: str) -> list[list[str]]:
    """Return the cells of all lines of a printed table, without its rule."""
    lines = [line for line in printed.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def numbers(cells: list[str]) -> list[float]:
    return [float(cell) for cell in cells]


def positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def test_each_benchmark_has_a_test() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    names = {path.stem for path in BENCHMARKS.glob("*.py")}
    assert len(names) > 10
    assert {name for name in names - ELSEWHERE if f'load("{name}")' not in text} == set()


def test_paired(load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, gain in (("a", 0.25), ("b", 0.0)):
        lines = [f"case_{i},{k},{0.5 + gain * (i + k) / 8}" for i in range(4) for k in (1, 2)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["case,class,dice", *lines]), encoding="utf-8")
    load("paired").main(["--first", str(tmp_path / "a.csv"), "--second", str(tmp_path / "b.csv")])
    printed = capsys.readouterr().out
    # Gains of 1.5, 2.5, 3.5 and 4.5 eighths of 0.25.
    assert re.search(r"^first - second: \+0\.0938 ± 0\.0202, 4 cases, 1 seed\(s\)$", printed, re.MULTILINE)


@pytest.mark.slow
def test_paper_ablation(
    load: Load, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load("paper_ablation")
    small = [
        "--labelled", "2", "--test", "2", "--seeds", "1", "--channels", "[2,2,4,4,4]", "--patch", "16", "--spacing",
        "[0,0,0]", "--steps", "4", "--threads", "1", "--device", "cpu",
    ]  # fmt: skip
    out = tmp_path / "bench"
    script.main([str(labelled), "--out", str(out), "--structure", "2", "--rows", script.ALL, *small])
    found = rows(capsys.readouterr().out)
    assert [row[0] for row in found[1:]] == [script.ALL]
    assert 0 <= float(found[1][1]) <= 1
    label, _ = read_label(next((tmp_path / "bench-data" / "labels").iterdir()))
    assert sorted(set(label.flat)) == [0, 1]
    # Every row is one that a bench takes.
    asked = argparse.Namespace(
        rows=None, channels="[2,2,4,4,4]", patch=16, spacing="[0,0,0]", steps=4, lr=0.02, clip=1.0, override=[],
        labelled=2, seeds=1, label_sets=1, test=2, out=tmp_path / "all",
    )  # fmt: skip
    setup = begin(tmp_path / "all", script.request(asked, labelled), torch.device("cpu"), None)
    assert len(setup.cells) == 1 + len(script.ROWS)
    assert all(setup.needs_stage1(cell) for cell in setup.cells if cell.row not in ("stage-1", "supervised"))


@pytest.mark.slow
def test_plant_errors_and_audit_worth(
    load: Load, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planted, run = tmp_path / "planted", tmp_path / "run"
    sizes = ["--clean", "2", "--noisy", "4", "--test", "2", "--share", "0.5", "--kind", "shift"]
    load("plant_errors").main([str(labelled), "--out", str(planted), *sizes])
    with (planted / "noisy.csv").open(encoding="utf-8") as file:
        roles = [row["role"] for row in csv.DictReader(file)]
    assert sorted(roles) == ["clean"] * 2 + ["noisy"] * 4 + ["test"] * 2
    with (planted / "planted.csv").open(encoding="utf-8") as file:
        assert [int(row["wrong_voxels"]) > 0 for row in csv.DictReader(file)] == [True] * 2

    mlbseg.train(planted / "noisy.csv", run, overrides=[*TINY, "steps=8"], device="cpu")
    capsys.readouterr()
    load("audit_worth").main([str(run), str(planted), "--methods", "regional", "alignment"])
    found = rows(capsys.readouterr().out)
    assert [row[0] for row in found] == ["Method", "regional", "alignment"]
    for row in found[1:]:
        assert all(0 <= value <= 1 for value in numbers(row[1:4]))
        assert re.fullmatch(r"[0-2] of 2", row[4])


@pytest.mark.slow
def test_weight_directions(
    load: Load, labelled: Path, hidden_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = load("weight_directions")
    benchmark.main([str(hidden_run), str(labelled), "--scans", "2"])
    found = rows(capsys.readouterr().out)
    assert len(found) == 1 + 1 + 2 * 4
    assert all(0 <= value <= 1 for row in found[1:] for value in numbers(row[1:]))
    # Another seed draws other patches, which give another direction.
    assert len({tuple(row[1:]) for row in found}) == len(found)


@pytest.mark.slow
def test_weight_directions_says_which_labels_are_missing(
    load: Load, scans: Path, supervised_run: Path
) -> None:
    with pytest.raises(
        SystemExit, match=r"0 unlabelled scans of the run have a label here, expected more than"
    ):
        load("weight_directions").main([str(supervised_run), str(scans)])


@pytest.mark.slow
def test_pseudo_label_trust(load: Load, hidden_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("pseudo_label_trust").main([str(hidden_run), "2"])
    printed = capsys.readouterr().out
    assert re.findall(r"^flips=(\w+): Dice [01]\.\d+ over 2 cases$", printed, re.MULTILINE) == [
        "False",
        "True",
    ]
    kept = re.findall(r"^  trust [\d.]+: ([01]\.\d+) of voxels", printed, re.MULTILINE)
    assert len(kept) == 10
    assert numbers(kept[:5]) == sorted(numbers(kept[:5]), reverse=True)


@pytest.mark.slow
def test_suggest_worth(
    load: Load, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(labelled), str(tmp_path / "out"), "--labelled", "2", "--n", "1", "--test", "2"]
    arguments += ["--seeds", "0", "--draws", "1", *(w for item in [*TINY, "steps=2"] for w in ("-o", item))]
    benchmark = load("suggest_worth")
    benchmark.main(arguments)
    found = rows(capsys.readouterr().out)
    ways = ["none", "spread", "cover", "random"]
    assert [row[0] for row in found] == ["1 further labels, mean Dice", *ways, found[5][0], *ways]
    assert all(0 <= float(row[1]) <= 1 for row in found if row[0] in ways)
    benchmark.main([*arguments, "--evidence"])
    (row,) = rows(capsys.readouterr().out)[1:]
    assert row[0] == "0"
    assert all(-1 <= value <= 1 for value in numbers(row[1:]))


@pytest.mark.slow
def test_method_cost(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    methods = ["supervised", "mean-teacher", "mlb"]
    size = ["--patch", "8", "8", "8", "--channels", "2", "4", "--repeats", "1", "--precision", "32"]
    load("method_cost").main(["--methods", *methods, *size])
    found = rows(capsys.readouterr().out)
    assert [row[0] for row in found] == ["method", *methods]
    assert all(positive(value) for row in found[1:] for value in numbers(row[1:]))
    assert found[1][2] == "1.00"


def meta_step(load: Load, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the benchmark, measuring in this process: what it imports is here already."""
    benchmark = load("meta_step")
    monkeypatch.setattr(benchmark, "in_fresh_process", lambda **arguments: benchmark.measure(**arguments))
    monkeypatch.setattr(benchmark, "peak", iter(range(1, 1000)).__next__)  # rises, as in a process of its own
    return benchmark


@pytest.mark.slow
def test_meta_step(load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = meta_step(load, monkeypatch)
    benchmark.main(["--setting", "small", "--repeats", "1", "--threads", "1", "--precision", "float32"])
    found = rows(capsys.readouterr().out)
    assert [row[0] for row in found] == ["variant", *benchmark.VARIANTS]
    assert all(positive(value) for row in found[1:] for value in numbers([row[2], *row[4:]]))
    # In forward passes of an image, three views each of a clean and of an unlabelled one: see docs/cost.md.
    work = {row[0]: int(row[4]) for row in found[1:]}
    assert work == {
        "mean teacher": 21, "joint": 27, "paper": 48, "unrolled": 54, "weights": 9, "unrolled weights": 30
    }  # fmt: skip


@pytest.mark.slow
def test_meta_step_sweeps(
    load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = meta_step(load, monkeypatch)
    sweep = ["--setting", "small", "--repeats", "1", "--threads", "1", "--variants", "joint", "--sweep"]
    benchmark.main([*sweep, "cheaper", "--precision", "float32"])
    found = rows(capsys.readouterr().out)
    assert [row[0] for row in found[1:]] == [
        *("as it is", "clean_views False", "scope decoder", "scope head", "chunk 5", "chunk 1")
    ]
    assert all(positive(float(row[3])) for row in found[1:])


@pytest.mark.slow
def test_memory(load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = load("memory")

    def here(task: str, **arguments: Any) -> dict[str, int]:
        imports = benchmark.TASKS[task](**arguments) or 0
        return {"peak": imports + 2**20, "imports": imports}

    monkeypatch.setattr(benchmark, "in_fresh_process", here)
    benchmark.main(["--steps", "2", "--size", "24", "20", "8"])
    lines = capsys.readouterr().out.splitlines()
    assert [line[:34].strip() for line in lines if "×" in line] == [
        *("train supervised, 2 steps", "train mlb, 2 steps", "predict 24×20×8")
    ]
    assert lines[-1].startswith("the plan: unet")


@pytest.mark.slow
def test_memory_of_a_fresh_process(load: Load, tmp_path: Path) -> None:
    figures = load("memory").in_fresh_process("make_scan", out=str(tmp_path / "scan.nii.gz"), size=[8, 8, 4])
    assert figures["peak"] > 2**20
    assert (tmp_path / "scan.nii.gz").is_file()


@pytest.mark.slow
def test_onnx_networks(
    load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = load("onnx_networks")
    monkeypatch.setattr(benchmark, "DIMENSIONS", (2,))
    benchmark.main(["vnet"])
    found = re.fullmatch(
        r"vnet 2D instance: size any, difference (\S+)", capsys.readouterr().out.splitlines()[-1]
    )
    assert found
    assert float(found[1]) < 1e-4


@pytest.mark.slow
def test_bundle_masks(
    load: Load,
    scans: Path,
    supervised_run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PYTHONPATH")  # a bundle needs a library that tests hide
    load("bundle_masks").main([str(supervised_run), str(scans / "images")])
    last = capsys.readouterr().out.splitlines()[-1]
    found = re.fullmatch(r"0 of (\d+) voxels differ \((\d+) are no background\), 8 scans", last)
    assert found
    assert int(found[1]) > int(found[2]) > 0


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on the path")
def test_pages(load: Load, labelled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("pages").main(["page", str(labelled)])
    printed = capsys.readouterr().out
    assert re.match(rf"{labelled.name}: 8 of 8 cases on a page of 2\.\d MB", printed)
    assert "the browser says" not in printed


def test_fuzz_readers(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    assert load("fuzz_readers").main(["nrrd", "--count", "3"]) == 0
    found = re.fullmatch(r"nrrd: (\d) read, (\d) refused, 0 bad", capsys.readouterr().out.strip())
    assert found
    assert int(found[1]) + int(found[2]) == 3


def test_several_runs(load: Load, hidden_run: Path, labelled: Path, tmp_path: Path, capsys: Any) -> None:
    benchmark = load("several_runs")
    other = Path(shutil.copytree(hidden_run, tmp_path / "other"))
    weights = load_file(other / WEIGHTS)
    save_file({name: tensor * 0.9 for name, tensor in weights.items()}, other / WEIGHTS)
    benchmark.main([str(hidden_run), str(other), "--device", "cpu"])
    printed = capsys.readouterr().out
    (_, *scores), maps = (rows(part) for part in printed.split("| map |", 1))
    assert [row[0] for row in scores] == ["run 1", "run 2", "together"]
    assert all(0 <= float(row[1]) <= 1 for row in scores)
    found = {row[0]: row for row in maps}
    assert list(found) == ["entropy, run 1", "entropy, run 2", "entropy, together", "disagreement, together"]
    assert 0.5 < float(found["entropy, together"][1]) <= 1  # where it is unsure it is wrong more often


def test_auroc_of_several_runs(load: Load) -> None:
    benchmark = load("several_runs")
    wrong = np.array([False, False, True, True])
    assert benchmark.auroc(np.array([0.1, 0.2, 0.3, 0.4]), wrong) == 1
    assert benchmark.auroc(np.array([0.1, 0.3, 0.3, 0.4]), wrong) == pytest.approx(3.5 / 4)
    assert math.isnan(benchmark.auroc(np.zeros(4), np.zeros(4, bool)))


def test_unlike_scans(load: Load, labelled: Path, tmp_path: Path, capsys: Any) -> None:
    coarse = write_blocks(tmp_path / "coarse", count=4, spacing=(1, 1, 4))
    load("unlike_scans").main([str(labelled), str(coarse), "--train", "3", "--draws", "1"])
    found = rows(capsys.readouterr().out)[1:]
    assert [row[0] for row in found] == [f"{labelled.name}, 3", "coarse, 3"]
    assert [row[2] for row in found] == ["4 of 4 (100.0%)", "8 of 8 (100.0%)"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("comparison", "names"),
    [
        ("scribbles", ["scribbles"] * 4 + ["whole labels"]),
        ("slices", ["2 sparse"] * 2 + ["1 whole"] * 2 + ["2 whole"] * 2),
        (
            "classes",
            ["split classes"] * 2 + ["split classes as background"] + ["all classes in 1 of 2 scans"] * 2,
        ),
    ],
)
def test_partial_labels(
    comparison: str,
    names: list[str],
    labelled: Path,
    load: Load,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "data"
    shutil.copytree(labelled, data)
    (data / "scribbles").mkdir()
    for path in (data / "labels").iterdir():
        label = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        label[:, :, ::2] = 4
        save(data / "scribbles" / path.name, label)
    options = [part for item in (*TINY, "steps=2") for part in ("-o", item)]
    # A method that is there twice is trained once.
    method = "mean-teacher" if comparison == "classes" else "supervised"
    command = [
        comparison, str(data), str(tmp_path / "out"), "--test", "2", "--labelled", "2", "--every", "4",
        "--method", method, "--seeds", "0", *options,
    ]  # fmt: skip
    load("partial_labels").main(command)
    table = rows(capsys.readouterr().out)
    assert [row[0] for row in table[1:]] == names
    assert all(0 <= value <= 1 for row in table[1:] for value in numbers(row[2:]))
    load("partial_labels").main(command)
    assert rows(capsys.readouterr().out) == table  # nothing is trained again


@pytest.mark.slow
def test_init_worth(load: Load, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = load("init_worth")
    small = [part for setting in TINY if not setting.startswith("stage1") for part in ("-o", setting)]
    network = [f"--source-override={setting}" for setting in TINY if not setting.startswith("stage1")]
    module.main(
        ["across", str(labelled), str(labelled), str(tmp_path / "a"), "--source-labelled", "2", "--source-test", "1",
         "--labelled", "2", "--test", "2", "--steps", "3", "--seeds", "0", *network]
    )  # fmt: skip
    table = rows(capsys.readouterr().out)[1:]
    assert len(table) == 3
    assert all(0 <= value <= 1 for row in table for value in numbers(row[1:3]))
    plans = [
        Run.open(path).plan for path in (tmp_path / "a").iterdir() if " from " in path.name and path.is_dir()
    ]
    assert len(plans) == 2
    assert {plan.network_channels for plan in plans} == {(4, 8, 8)}
    module.main(
        ["more", str(labelled), str(tmp_path / "b"), "--labelled", "1", "--further", "2", "--test", "2", "--steps", "6",
         "--seeds", "0", "1", *small]
    )  # fmt: skip
    table = rows(capsys.readouterr().out)[1:]
    assert [row[0].split(",")[0] for row in table] == ["1 labels", "2 labels", "2 labels", "2 labels"]
    assert all(0 <= value <= 1 for row in table for value in numbers(row[1:4]))
    assert all(positive(float(row[4])) or row[4] == "0" for row in table)


def test_network_cost(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    load("network_cost").main(
        ["--networks", "unet", "resenc", "--patch", "8", "8", "8", "--channels", "2", "4", "--repeats", "1"]
    )
    head, *table = rows(capsys.readouterr().out)
    assert head[-1] == "to unet"
    assert [row[0] for row in table] == ["unet", "resenc"]
    assert all(positive(value) for row in table for value in numbers(row[2:]))
