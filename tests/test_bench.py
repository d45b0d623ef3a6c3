"""A bench, in small: its cells, its table, and how it is stopped, continued and added to."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from rich.console import Console
from submitit.core.utils import UncompletedJobError

from blocks import TINY
from conftest import Command
from mlbseg.apps.bench import bench, workers
from mlbseg.apps.bench.cell import BUSY, lock_of, outcome, run_cell
from mlbseg.apps.bench.cells import Cell, Row, cells_of, in_order, parse_rows, slug
from mlbseg.apps.bench.executors import CellJob, Submitted
from mlbseg.apps.bench.record import Setup
from mlbseg.apps.bench.request import BenchRequest
from mlbseg.apps.bench.setup import begin
from mlbseg.cli.arguments import join_lists
from mlbseg.config import load_config
from mlbseg.data.cases import find_cases
from mlbseg.data.phantom import write_phantoms
from mlbseg.data.plan import Plan
from mlbseg.data.preprocess import UNKNOWN
from mlbseg.errors import UserError
from mlbseg.runs import Run
from mlbseg.runs.lock import Busy, locked
from mlbseg.training import begin_from_stage1, stages, train
from mlbseg.training.prepare import second_steps

SETTINGS = [v for text in (*TINY, "steps=4") for v in ("-o", text)]
LIMIT = 120  # seconds that a process of these tests may take


class Ended:
    """A process that has ended already."""

    def __init__(self, code: int) -> None:
        self.code = code

    def poll(self) -> int:
        return self.code

    def terminate(self) -> None:
        pass


def here(folder: Path, cell: Cell, place: workers.Place) -> Ended:
    """Run a cell in this process: a new one would need seconds for its imports alone."""
    try:
        run_cell(folder, cell, place.device)
    except Busy:
        return Ended(BUSY)
    except UserError as error:
        return Ended(error.exit_code)
    return Ended(0)


@pytest.fixture
def _in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "start", here)
    monkeypatch.setattr(workers, "PAUSE", 0.0)
    monkeypatch.setattr(workers, "PATIENCE", 0.0)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms") / "scans"
    write_phantoms(folder, count=8, seed=0, size=(16, 16, 16))
    return folder


@pytest.fixture(scope="module")
def finished(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bench of two methods and two seeds that nothing has interrupted."""
    out = tmp_path_factory.mktemp("benches") / "bench"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "start", here)
        patch.setattr(workers, "PAUSE", 0.0)
        run(phantoms, out)
    return out


def run(scans: Path, out: Path, **changes: Any) -> Any:
    asked: dict[str, Any] = {
        "methods": ["supervised", "mlb"], "labelled": [2], "seeds": [0, 1], "test": 3,
        "overrides": [*TINY, "steps=4"], "device": "cpu",
    }  # fmt: skip
    return bench(scans, out, **{**asked, **changes})


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def figures(out: Path) -> list[dict[str, str]]:
    """Return cells.csv without what the machine decides."""
    machine = ("seconds", "seconds_per_step", "peak_memory_bytes", "threads")
    return [{k: v for k, v in row.items() if k not in machine} for row in rows(out / "cells.csv")]


def contents(out: Path) -> dict[str, tuple[int, bytes]]:
    """Return time and content of every file of the cells of a bench."""
    files = [path for path in (out / "runs").rglob("*") if path.is_file()]
    return {str(path.relative_to(out)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "bench"))


# --- what a bench leaves behind ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("_in_process")
def test_the_command_fills_the_table(phantoms: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "bench"
    asked = ["bench", phantoms, "--out", out, "--methods", "supervised", "mean-teacher", "--labelled", "2,3", "--seeds",
             "0", "--seeds", "1", "--test", 3, "--device", "cpu", *SETTINGS]  # fmt: skip
    done = command(*asked, "-q")
    assert done.code == 0
    for text in ("supervised", "mean-teacher", "supervised, all labels", "2 labels", "3 labels"):
        assert text in done.out
    assert f"tables and figure: {out}" in done.out

    table = rows(out / "cells.csv")
    assert [(r["row"], r["labelled"], r["seed"]) for r in table] == [
        (row, labels, seed)
        for seed in "01"
        for row, labels in [
            ("supervised", "2"), ("mean-teacher", "2"), ("supervised", "3"), ("mean-teacher", "3"),
            ("supervised, all labels", "5"),
        ]
    ]  # fmt: skip
    for row in table:
        assert row["status"] == "done"
        assert 0 <= float(row["dice"]) <= 1
        assert float(row["peak_memory_bytes"]) > 1e6
        assert float(row["seconds"]) == pytest.approx(
            float(row["seconds_per_step"]) * int(row["steps"]), rel=1e-4
        )
    cases = rows(out / "cases.csv")
    assert len(cases) == 10 * 3 * 2
    mine = [
        float(c["dice"]) for c in cases if (c["row"], c["labelled"], c["seed"]) == ("mean-teacher", "2", "1")
    ]
    stated = next(r for r in table if (r["row"], r["labelled"], r["seed"]) == ("mean-teacher", "2", "1"))
    assert float(stated["dice"]) == pytest.approx(sum(mine) / 6, abs=1e-5)

    text = (out / "table.md").read_text()
    for part in ("mlbseg bench", "no validation set", "## 2 labels", "## 3 labels", "10 of 10 done", "95 % CI",
                 "16 × 16 × 16", "Along a shuffle with seed 0"):  # fmt: skip
        assert part in text
    assert matplotlib.image.imread(out / "figure.png")[..., :3].std() > 0.05
    assert (out / "figure.svg").read_text().startswith("<?xml")
    page = (out / "report.html").read_text(encoding="utf-8")
    for part in (
        "10 of 10",
        "2 labels</h2>",
        "3 labels</h2>",
        "data:image/svg+xml;base64,",
        "95 % CI",
        f"{float(stated['dice']):.3f}",
    ):
        assert part in page
    again = command(*asked, "--json")
    assert again.code == 0
    assert [cell["status"] for cell in again.json["cells"]] == ["done"] * 10


@pytest.mark.slow
def test_all_cells_share_test_cases_first_labels_and_plan(finished: Path) -> None:
    runs = finished / "runs"
    splits = {p.parent: json.loads(p.read_text()) for p in runs.rglob("split.json")}
    assert len(splits) == 2 * 4
    assert len({tuple(sorted(s["test"])) for s in splits.values()}) == 1
    few = [set(s["clean"]) for root, s in splits.items() if "2-labelled" in str(root)]
    assert len(few) == 6
    assert all(clean == few[0] for clean in few)
    assert {len(s["clean"]) for root, s in splits.items() if "all-labelled" in str(root)} == {5}
    plans = {p.read_text() for p in runs.rglob("plan.json")}
    assert len(plans) == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["supervised", "mlb"])
def test_a_cell_is_bit_for_bit_what_train_makes_of_it(
    method: str, finished: Path, phantoms: Path, tmp_path: Path
) -> None:
    cell = finished / "runs" / "2-labelled" / "seed-1" / method
    split = json.loads((cell / "split.json").read_text())
    train(
        phantoms, tmp_path / "run", config=finished / "settings.yaml", method=method, seed=1,
        labelled=split["clean"], test=split["test"], device="cpu",
    )  # fmt: skip
    for name in ("model.safetensors", "config.yaml", "split.json", "log.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (cell / name).read_bytes(), name


@pytest.mark.slow
def test_stage_1_is_trained_once(finished: Path) -> None:
    seed = finished / "runs" / "2-labelled" / "seed-0"
    assert not (seed / "stage-1" / "model.safetensors").exists()
    own, shared = (next((seed / name / "checkpoints").glob("stage1-*")) for name in ("mlb", "stage-1"))
    assert own.samefile(shared)


@pytest.mark.slow
def test_a_cell_that_goes_on_keeps_its_rows_of_stage_2(finished: Path, tmp_path: Path) -> None:
    seed = copied(finished, tmp_path) / "runs" / "2-labelled" / "seed-0"
    before = (seed / "mlb" / "log.csv").read_bytes()
    assert len(before) > len((seed / "stage-1" / "log.csv").read_bytes())
    begin_from_stage1(seed / "mlb", seed / "stage-1")
    assert (seed / "mlb" / "log.csv").read_bytes() == before


# --- stopped, continued, added to -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("_in_process")
def test_what_is_finished_is_not_run_again_and_what_is_added_is(
    finished: Path, phantoms: Path, tmp_path: Path
) -> None:
    out = copied(finished, tmp_path)
    before = contents(out)
    run(
        phantoms, out, overrides=[*TINY, "steps=4", "train.workers=0", "train.lr=0.05"]
    )  # which changes no result
    assert contents(out) == before
    assert load_config(out / "settings.yaml").train.workers == 0
    result = run(
        phantoms, out, methods=["mean-teacher"], seeds=[1], upper=False,
        variants=["mlb, own stage 1=mlb train.lr=0.01 mlb.jitter=0.1"],
    )  # fmt: skip
    after = contents(out)
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[3] for name in after.keys() - before.keys()} == {
        "mean-teacher",
        "mlb-own-stage-1",
    }
    # A setting that stage 1 depends on: a stage 1 of its own.
    shared = out / "runs" / "2-labelled" / "seed-1"
    first = [
        (shared / n / "checkpoints" / "stage1-00000002.pt").read_bytes() for n in ("mlb", "mlb-own-stage-1")
    ]
    assert first[0] != first[1]
    labels = [group.label for group in result.results.groups.values()]
    assert labels[:2] == ["supervised", "mlb"]
    assert {"mean-teacher", "mlb, own stage 1", "supervised, all labels"} < set(labels)
    assert "| mlb, own stage 1 |" in (out / "table.md").read_text()


@pytest.mark.slow
def test_a_bench_that_was_killed_goes_on_and_ends_with_the_same_table(
    finished: Path, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bench"
    asked = ["bench", phantoms, "--out", out, "--methods", "supervised,mlb", "--labelled", 2, "--seeds", "0,1",
             "--test", 3, "--device", "cpu", "-q", "--threads", 1, *SETTINGS]  # fmt: skip
    process = subprocess.Popen([sys.executable, "-m", "mlbseg", *map(str, asked)], stderr=subprocess.PIPE)
    one = Cell("stage-1", 2, 0)
    try:
        wait_for(lambda: outcome(out, one) is not None, process)
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()
    before = contents(out)
    kept = {name: before[name] for name in before if "seed-0/stage-1/" in name}
    assert kept
    monkeypatch.setattr(workers, "start", here)
    run(phantoms, out)
    after = contents(out)
    assert {name: after[name] for name in kept} == kept
    assert figures(out) == figures(finished)
    assert rows(out / "cases.csv") == rows(finished / "cases.csv")


def wait_for(what: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + LIMIT
    while not what():
        assert process.poll() is None, "ended before its time"
        assert time.monotonic() < end, "took too long"
        time.sleep(0.02)


@pytest.mark.slow
def test_a_signal_stops_the_cells_after_a_checkpoint(phantoms: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench"
    asked = ["bench", phantoms, "--out", out, "--methods", "supervised", "--labelled", 2, "--test", 3, "--device",
             "cpu", "-q", "--no-upper", "--threads", 1, *SETTINGS, "-o", "steps=100000"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "mlbseg", *map(str, asked)], stderr=subprocess.PIPE, text=True
    )
    folder = out / "runs" / "2-labelled" / "seed-0" / "supervised" / "checkpoints"
    try:
        wait_for(lambda: any(folder.glob("stage1-*[1-9]*.pt")), process)  # type: ignore[arg-type]
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "stopped with 0 of 1 cells done; the same command continues" in err
    assert not (folder.parent / "cell.json").exists()
    with locked(lock_of(out, Cell("supervised", 2, 0)), "its process is still there"):
        pass


@pytest.mark.slow
@pytest.mark.usefixtures("_in_process")
def test_cells_of_another_process_are_passed_over(
    finished: Path, phantoms: Path, tmp_path: Path, command: Command
) -> None:
    out = copied(finished, tmp_path)
    for name in ("2-labelled/seed-0/supervised", "2-labelled/seed-1/mlb"):
        shutil.rmtree(out / "runs" / name)
    asked = ["bench", phantoms, "--out", out, "--methods", "supervised,mlb", "--labelled", 2, "--seeds", "0,1",
             "--test", 3, "--device", "cpu", "-q", *SETTINGS]  # fmt: skip
    with locked(lock_of(out, Cell("supervised", 2, 0)), ""):
        done = command(*asked)
    assert done.code == 0
    assert "note: 1 cell(s) that another process runs: 2-labelled/seed-0/supervised" in done.out
    statuses = {(r["row"], r["seed"]): r["status"] for r in rows(out / "cells.csv")}
    assert statuses["supervised", "0"] == "to do"
    assert statuses["mlb", "1"] == "done"
    assert command(*asked).code == 0
    assert figures(out) == figures(finished)


@pytest.mark.slow
def test_two_benches_at_once_run_each_cell_once(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, first, second = tmp_path / "bench", Cell("supervised", 2, 0), Cell("supervised", 2, 1)
    asked = ["bench", phantoms, "--out", out, "--methods", "supervised", "--labelled", 2, "--seeds", "0,1", "--test", 3,
             "--device", "cpu", "-q", "--no-upper", "--threads", 1, *SETTINGS]  # fmt: skip
    begun: list[Cell] = []

    def start(folder: Path, cell: Cell, place: workers.Place) -> Ended:
        begun.append(cell)
        return here(folder, cell, place)

    monkeypatch.setattr(workers, "start", start)
    other = subprocess.Popen([sys.executable, "-m", "mlbseg", *map(str, asked)], stdout=subprocess.PIPE)
    try:
        wait_for(lambda: lock_of(out, first).exists() and workers.busy(out, first), other)
        result = run(phantoms, out, methods=["supervised"], upper=False)
        other.communicate(timeout=LIMIT)
    finally:
        other.kill()
    assert other.returncode == 0
    assert begun == [second]  # and it waited for the other's cell, so that its table is whole
    assert [cell["status"] for cell in result.results.cells] == ["done", "done"]
    assert not workers.log_of(out, second).exists()


@pytest.mark.slow
@pytest.mark.usefixtures("_in_process")
def test_a_cell_that_fails_is_a_line_of_the_table_and_the_others_go_on(
    phantoms: Path, tmp_path: Path, command: Command
) -> None:
    out = tmp_path / "bench"
    asked = ["bench", phantoms, "--out", out, "--variant", "too fast=supervised lr=1e38 clip=1e38", "--methods",
             "supervised", "--labelled", 2, "--test", 3, "--device", "cpu", "--no-upper", "-q", *SETTINGS]  # fmt: skip
    done = command(*asked)
    assert done.code == 2
    assert "failed: too fast, 2 labels, seed 0: the loss (" in done.out
    assert "no longer a number" in done.out
    assert "(begin another bench, or give this one a --variant, with a lower train.lr" in done.out
    assert "; mend it and repeat the bench command with --retry" in done.out
    table = {row["row"]: row for row in rows(out / "cells.csv")}
    assert (table["too fast"]["status"], table["supervised"]["status"]) == ("failed", "done")
    text = (out / "table.md").read_text()
    assert "| too fast | – | 0 (1 failed) |" in text
    assert "## Failed" in text
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Failed</h2>" in page
    assert "no longer a number" in page
    record = out / "runs" / "2-labelled" / "seed-0" / "too-fast" / "cell.json"
    when = record.stat().st_mtime_ns
    assert command(*asked).code == 2
    assert record.stat().st_mtime_ns == when  # known to fail
    assert command(*asked, "--retry").code == 2
    assert record.stat().st_mtime_ns > when


@pytest.mark.slow
def test_a_cell_is_not_trained_on_other_scans_than_the_bench_began_with(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans, out = shutil.copytree(phantoms, tmp_path / "scans"), tmp_path / "bench"
    asked: dict[str, Any] = {"methods": ["supervised"], "seeds": [0], "upper": False}
    changed: dict[Path, bytes] = {}

    def change_first(folder: Path, cell: Cell, place: workers.Place) -> Ended:
        first, second = Setup.read(folder).clean[:2]
        paths = {case.id: case.images[0] for case in find_cases(scans).cases}
        changed[paths[first]] = paths[first].read_bytes()
        shutil.copy(paths[second], paths[first])
        return here(folder, cell, place)

    monkeypatch.setattr(workers, "PAUSE", 0.0)
    monkeypatch.setattr(workers, "start", change_first)
    run(scans, out, **asked)
    (record,) = out.glob("runs/**/cell.json")
    ((path, content),) = changed.items()
    assert (
        f"{path}: has changed since the bench began (restore it" in json.loads(record.read_text())["reason"]
    )
    path.write_bytes(content)
    monkeypatch.setattr(workers, "start", here)
    run(scans, out, retry=True, **asked)
    assert json.loads(record.read_text())["status"] == "done"


@pytest.mark.slow
def test_a_disk_that_is_full_leads_back_to_the_bench(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "weights")

    out, cell = copied(finished, tmp_path), Cell("supervised", 2, 0)
    (out / "runs" / cell.key / "cell.json").unlink()
    monkeypatch.setattr(stages, "save_weights", full)
    reason = run_cell(out, cell, "cpu")["reason"]
    assert reason == (
        "weights: No space left on device; the last checkpoint is step 4 of stage 1; mend it and repeat the bench "
        "command with --retry"
    )


@pytest.mark.slow
@pytest.mark.usefixtures("_in_process")
def test_a_stage_1_that_fails_fails_those_that_begin_with_it(phantoms: Path, tmp_path: Path) -> None:
    wild = [*TINY, "steps=4", "train.lr=1e38", "clip=1e38"]
    result = run(phantoms, tmp_path / "bench", methods=["mlb"], seeds=[0], upper=False, overrides=wild)
    (row,) = result.results.failed
    assert row["reason"].startswith("stage 1 failed: the loss (")


@pytest.mark.slow
def test_a_process_that_dies_is_told_and_leaves_its_cell_to_do(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    monkeypatch.setattr(workers, "start", lambda *_: Ended(-9))
    out = tmp_path / "bench"
    asked = ["bench", phantoms, "--out", out, "--methods", "supervised", "--labelled", 2, "--test", 3, "--device",
             "cpu", "--no-upper", *SETTINGS]  # fmt: skip
    done = command(*asked)
    assert done.code == 2
    assert "no result: 2-labelled/seed-0/supervised (exit code -9; see" in done.out
    monkeypatch.setattr(workers, "start", lambda *_: Ended(1))
    assert command(*asked).code == 1  # a fault of ours
    assert [row["status"] for row in rows(out / "cells.csv")] == ["to do"]


@pytest.mark.slow
@pytest.mark.usefixtures("_in_process")
@pytest.mark.parametrize(("keep", "said"), [(0.8, "damaged"), (0.0, "found scores of 0 case(s), expected 3")])
def test_scores_that_were_cut_off_are_named_and_can_be_made_anew(
    keep: float, said: str, finished: Path, phantoms: Path, tmp_path: Path
) -> None:
    out = copied(finished, tmp_path)
    root = out / "runs" / "2-labelled" / "seed-0" / "mlb"
    whole = (root / "scores.csv").read_bytes()
    lines = whole[: int(keep * len(whole))].splitlines(keepends=True)
    (root / "scores.csv").write_bytes(b"".join([*lines[:-1], lines[-1].split(b",")[0]]) if lines else b"")
    with pytest.raises(UserError) as caught:
        run(phantoms, out)
    assert str(caught.value).startswith(f"{root / 'scores.csv'}: {said}")
    assert f"(delete {root / 'cell.json'} and run the bench again)" in str(caught.value)
    (root / "cell.json").unlink()
    run(phantoms, out)
    assert (root / "scores.csv").read_bytes() == whole
    assert figures(out) == figures(finished)


@pytest.mark.slow
def test_a_cell_as_a_job_is_the_cell_that_a_process_makes(
    finished: Path, phantoms: Path, tmp_path: Path
) -> None:
    run(phantoms, tmp_path, methods=["supervised"], seeds=[0], upper=False, executor="local", threads=1)
    cell = Cell("supervised", 2, 0)
    weights = [root / "runs" / cell.key / "model.safetensors" for root in (finished, tmp_path)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert list((tmp_path / "logs" / workers.log_of(tmp_path, cell).stem).glob("*.out"))


class Job:
    """Stands for a job of submitit: how it ends is set."""

    def __init__(self, ends: object = None) -> None:
        self.ends = ends
        self.cancelled = False

    def done(self) -> bool:
        return self.ends is not None

    def result(self) -> object:
        if isinstance(self.ends, Exception):
            raise self.ends
        return self.ends

    def stderr(self) -> str:
        return "what it printed"

    def cancel(self, check: bool) -> None:
        self.cancelled = True


def test_a_job_is_seen_as_a_process(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert Submitted(Job(), log).poll() is None  # type: ignore[arg-type]
    assert Submitted(Job(BUSY), log).poll() == BUSY  # type: ignore[arg-type]
    assert not log.exists()
    job = Job(UncompletedJobError("lost"))
    submitted = Submitted(job, log)  # type: ignore[arg-type]
    submitted.terminate()
    assert job.cancelled
    assert submitted.poll() == 1
    assert log.read_text() == "lost\n\nwhat it printed"
    queued = CellJob(tmp_path, Cell("supervised", 2, 0), workers.Place("cpu", 1))
    assert queued.checkpoint().function is queued  # Slurm runs the same cell again


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("_in_process")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"test": 2}, "test cases: found 2 ("),
        ({"split_seed": 1}, "--split-seed: found 1, expected 0"),
        ({"overrides": [*TINY, "steps=6"]}, "plan.steps: found 6, expected 4"),
        ({"overrides": [*TINY, "steps=4", "mlb.weighting=share"]}, "mlb.weighting: found share, expected sign"),
        ({"variants": ["x=mlb weighting=share"], "overrides": [*TINY, "steps=4", "lr=1.0"]}, "train.lr: found 1.0"),
    ],
)  # fmt: skip
def test_a_command_that_contradicts_the_folder_changes_nothing(
    changes: dict[str, Any], said: str, finished: Path, phantoms: Path
) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    with pytest.raises(UserError, match="begun otherwise") as caught:
        run(phantoms, finished, **changes)
    assert said in str(caught.value)
    assert "choose another --out" in str(caught.value)
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before


@pytest.mark.slow
@pytest.mark.usefixtures("_in_process")
def test_a_budget_below_the_plan_s_is_refused(finished: Path, phantoms: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    with pytest.raises(UserError) as caught:
        run(phantoms, finished, labelled=[1, 3])
    assert str(caught.value) == (
        "--labelled: found 1, but this bench was planned from 2 labels (choose another --out, and name the smallest "
        "budget first)"
    )
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before


@pytest.mark.slow
@pytest.mark.usefixtures("_in_process")
def test_labels_that_only_a_later_command_gives_are_looked_at_too(phantoms: Path, tmp_path: Path) -> None:
    scans, out = Path(shutil.copytree(phantoms, tmp_path / "scans")), tmp_path / "bench"
    asked: dict[str, Any] = {"methods": ["supervised"], "seeds": [0]}
    run(scans, out, **asked, upper=False)
    last = Setup.read(out).clean[-1]
    label = next(case.label for case in find_cases(scans).cases if case.id == last)
    assert label is not None
    label.write_bytes(b"no label")
    run(scans, out, **asked, upper=False)  # which nobody asked for yet
    with pytest.raises(UserError, match=last):
        run(scans, out, **asked)
    assert all(cell.budget == 2 for cell in Setup.read(out).cells)


@pytest.mark.slow
@pytest.mark.usefixtures("_in_process")
def test_scans_labels_and_cache_are_held_to(phantoms: Path, tmp_path: Path) -> None:
    scans, out = Path(shutil.copytree(phantoms, tmp_path / "scans")), tmp_path / "bench"
    asked: dict[str, Any] = {"methods": ["supervised"], "seeds": [0], "upper": False}
    asked["test"] = ["phantom_000", "phantom_001", "phantom_007"]  # by name: drawn ones change with the cases
    run(scans, out, **asked, cache=tmp_path / "cache")
    with pytest.raises(UserError, match=r"--labels: found 0 1 2, expected none"):
        run(scans, out, **asked, labels=[2, 1, 0])
    with pytest.raises(UserError, match=r"--cache: found .*elsewhere, expected .*cache"):
        run(scans, out, **asked, cache=tmp_path / "elsewhere")
    image = next(case.images[0] for case in find_cases(scans).cases if case.id == Setup.read(out).clean[0])
    shutil.copy(image, image.with_name("later.nii.gz"))
    with pytest.raises(UserError, match=r"unlabelled cases: new 1 \(later\): the data have changed"):
        run(scans, out, **asked)
    image.with_name("later.nii.gz").unlink()
    # A folder of an earlier version has no word of them.
    record = json.loads((out / "bench.json").read_text())
    for name in ("labels", "noisy", "unlabelled"):
        del record[name]
    (out / "bench.json").write_text(json.dumps(record))
    run(scans, out, **asked, labels=[0, 1, 2])


@pytest.mark.slow
@pytest.mark.usefixtures("_in_process")
def test_other_data_and_another_meaning_of_a_row_are_contradictions_too(
    finished: Path, phantoms: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(phantoms, tmp_path / "scans"))
    with pytest.raises(UserError, match=r"data: found .*scans, expected"):
        run(other, finished)
    out = copied(finished, tmp_path)
    record = Setup.read(out)
    record.rows["x"] = Row("x", "mlb", ("mlb.weighting=share",))
    record.write(out)
    with pytest.raises(UserError, match=r"'x' was mlb mlb\.weighting=share, found mlb \(give the new one"):
        run(phantoms, out, variants=["x=mlb"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": ["supervise"]}, "unknown method 'supervise': did you mean 'supervised'"),
        ({"methods": []}, "a bench needs --methods"),
        ({"methods": ["mlb", "mlb"]}, "found 'mlb' and 'mlb', which would share the folder mlb"),
        ({"labelled": []}, "a bench needs --labelled"),
        ({"labelled": [6]}, "--labelled: found 6, expected 1 to 5"),
        ({"labelled": [0]}, "--labelled: found 0"),
        ({"labelled": [2, 2]}, "--labelled: found 2 twice"),
        ({"labelled": [5]}, "every case is labelled, but method 'mlb' also needs scans without a label"),
        ({"seeds": [1, 1]}, "--seeds: found 1 twice"),
        ({"seeds": [-1]}, "--seeds: found -1"),
        ({"test": None}, "a bench needs test cases: --test N"),
        ({"test": 0}, "no test case has a label"),
        ({"test": ["nobody"]}, "test: no case 'nobody'"),
        ({"overrides": ["seed=3"]}, "-o seed=3: each cell has its own (use --seeds)"),
        ({"overrides": ["stepz=3"]}, "unknown override key 'stepz'"),
        ({"variants": ["mlb"]}, "--variant 'mlb': expected LABEL=METHOD"),
        ({"variants": ["x=mlb plan.steps=3"]}, "sets plan.steps, which all cells share"),
        ({"variants": ["x=mlb 'a"]}, "expected LABEL=METHOD"),
        ({"variants": ["Stage 1=mlb"]}, "gives no folder name to use"),
        ({"variants": [f"{'v' * 201}=mlb"]}, "a label of 201 bytes, expected at most 200"),
        ({"variants": ["mean teacher=mlb"]}, "is a method's own name"),
        ({"variants": ["x=mlb weighting=loud"]}, "setting mlb.weighting: found 'loud'"),
        ({"executor": "slrm"}, "--executor 'slrm': did you mean 'slurm'"),
        ({"job_options": {"timeout_min": 5}}, "--job-option: only jobs of --executor local or slurm have options"),
        ({"executor": "local", "job_options": {"timeout": 5}}, "--executor local: "),
        ({"devices": 2}, "--devices: found 2, but cpu is a single one (use --jobs 2)"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused_before_anything_is_made(
    changes: dict[str, Any], said: str, phantoms: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        run(phantoms, tmp_path / "bench", **changes)
    assert said in str(caught.value)
    assert not (tmp_path / "bench").exists()


def test_a_folder_that_holds_something_else_is_left_alone(phantoms: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds something else than a bench, such as mine.txt"):
        run(phantoms, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_settings_that_are_not_of_a_bench_are_left_alone(phantoms: Path, tmp_path: Path) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("mine: true")
    with pytest.raises(UserError, match=r"holds something else than a bench, such as settings.yaml"):
        run(phantoms, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["settings.yaml"]
    assert settings.read_text() == "mine: true"
    # Beside a lock they are of a bench that was killed at its beginning.
    (tmp_path / ".lock").touch()
    cache = tmp_path.parent / f"{tmp_path.name}-cache"
    request = BenchRequest(
        phantoms, ["supervised"], budgets=[2], test=3, upper=False, overrides=TINY, cache=cache
    )
    begin(tmp_path, request, torch.device("cpu"), None)
    assert "mine" not in settings.read_text()


def test_numbers_that_are_none_are_named(phantoms: Path, tmp_path: Path, command: Command) -> None:
    asked = ["bench", phantoms, "--out", tmp_path / "b", "--methods", "mlb", "--labelled", 2, "--test", 3]
    done = command(*asked, "--seeds", "0", "x")
    assert (done.code, done.err) == (
        2,
        "error: --seeds '0,x': expected whole numbers, such as --seeds 0,1,2\n",
    )
    assert not (tmp_path / "b").exists()


# --- small parts ------------------------------------------------------------------------------------------


def test_values_after_a_list_option_are_joined() -> None:
    def words(text: str) -> list[str]:
        return text.split()

    typed = words("bench data --seeds 0 1 2 --out x -o a=1 --methods mlb --labelled 4,8 16 -q")
    joined = words("bench data --seeds 0,1,2 --out x -o a=1 --methods mlb --labelled 4,8,16 -q")
    assert join_lists(typed, ("--seeds", "--methods", "--labelled")) == joined


def test_variants_are_parsed() -> None:
    (row,) = parse_rows([], ["mlb, uniform = mlb mlb.weighting=share 'views=[zoom-in, flip]'"])
    assert row == Row("mlb, uniform", "mlb", ("mlb.weighting=share", "views=[zoom-in, flip]"))
    assert row.slug == "mlb-uniform"
    assert slug("../Ärger | 2") == "ärger-2"


def test_cells_come_seed_by_seed_and_stage_1_first() -> None:
    rows_ = [Row("supervised", "supervised"), Row("mlb", "mlb")]
    cells = cells_of(rows_, [8, 4], [0, 1], upper=True, share=["mlb"])
    keys = [c.key for c in in_order(cells, [row.slug for row in rows_])]
    assert keys[:7] == [
        "4-labelled/seed-0/stage-1", "4-labelled/seed-0/supervised", "4-labelled/seed-0/mlb",
        "8-labelled/seed-0/stage-1", "8-labelled/seed-0/supervised", "8-labelled/seed-0/mlb",
        "all-labelled/seed-0/supervised",
    ]  # fmt: skip
    assert len(keys) == 14


def test_label_seeds_change_which_scans_are_labelled_and_nothing_else(phantoms: Path, tmp_path: Path) -> None:
    asked = [*TINY, "steps=4"]
    request = BenchRequest(
        phantoms, ["supervised", "mlb"], budgets=[2, 3], label_seeds=[0, 1, 2], test=3, overrides=asked,
        cache=tmp_path / "cache", patient=r"phantom_00(\d)",
    )  # fmt: skip
    setup = begin(tmp_path / "bench", request, torch.device("cpu"), None)
    assert len(setup.cells) == 3 * 2 * 3 + 1  # and all labels once
    dataset = find_cases(phantoms)
    splits = {cell: setup.split(cell, dataset) for cell in setup.cells}
    sets = {cell.label_seed: split.clean for cell, split in splits.items() if cell.budget == 2}
    assert sets[0] == setup.clean[:2]
    assert len({frozenset(ids) for ids in sets.values()}) > 1
    for cell, split in splits.items():
        assert split.test == setup.test
        if cell.budget is not None:
            assert len(split.clean) == cell.budget
            assert set(sets[cell.label_seed]) <= set(
                split.clean
            )  # a larger budget has the labels of a smaller one
            assert ("labels-" in cell.key) == (cell.label_seed > 0)
    assert Cell("mlb", 2, 0, 1).stage1 == Cell("stage-1", 2, 0, 1)
    assert Setup.read(tmp_path / "bench").cells == setup.cells


def test_equal_time_lengthens_stage_2_alone(phantoms: Path, tmp_path: Path) -> None:
    asked = [*TINY, "steps=20", "train.stage1_share=0.5"]
    request = BenchRequest(
        phantoms, ["bcp"], ["bcp longer=bcp train.stage2_factor=1.6"], budgets=[2], test=3, overrides=asked,
        cache=tmp_path / "cache", upper=False,
    )  # fmt: skip
    folder = tmp_path / "bench"
    setup = begin(folder, request, torch.device("cpu"), None)
    assert [setup.needs_stage1(cell) for cell in setup.cells] == [False, True, True]
    plan = Plan.from_dict(setup.plan)
    steps = {cell.row: second_steps(plan, setup.config(folder, cell)) for cell in setup.cells}
    assert (steps["bcp"], steps["bcp-longer"]) == (10, 16)


def test_supervised_training_loses_no_label_to_the_weights_of_others(phantoms: Path, tmp_path: Path) -> None:
    asked = [*TINY, "steps=4", "train.meta_cases=1", "mlb.decides=everywhere"]
    request = BenchRequest(phantoms, ["mlb"], budgets=[2], test=3, overrides=asked, cache=tmp_path / "cache")
    setup = begin(tmp_path / "bench", request, torch.device("cpu"), None)
    kept = {cell.row: setup.config(tmp_path / "bench", cell).train.meta_cases for cell in setup.cells}
    assert kept == {"stage-1": 1, "mlb": 1, "supervised": 0}
    # A row without weights is refused as `mlbseg train` refuses it.
    with pytest.raises(UserError, match="method 'supervised' has no weights to decide"):
        run(phantoms, tmp_path / "other", overrides=asked)


@pytest.mark.slow
@pytest.mark.usefixtures("_in_process")
def test_progress_is_told_cell_by_cell(finished: Path, phantoms: Path, tmp_path: Path) -> None:
    out = copied(finished, tmp_path)
    shutil.rmtree(out / "runs" / "2-labelled" / "seed-0" / "mlb")
    with (tmp_path / "log").open("w") as file:
        run(phantoms, out, console=Console(file=file, width=120))
    assert "mlb, 2 labels, seed 0: Dice 0." in (tmp_path / "log").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("_in_process")
def test_one_slice_in_so_many_is_kept_of_training_labels_alone(phantoms: Path, tmp_path: Path) -> None:
    bench(
        phantoms, tmp_path / "b", methods=["mean-teacher"], labelled=[2], test=2, one_slice_in=4, device="cpu",
        overrides=[*TINY, "steps=4"], cache=tmp_path / "cache",
    )  # fmt: skip
    setup = Setup.read(tmp_path / "b")
    assert len(setup.cells) == 3
    for cell in setup.cells:
        record = outcome(tmp_path / "b", cell)
        assert record is not None
        assert record["status"] in ("done", "trained")
        training = stages.Training(Run.open(tmp_path / "b" / "runs" / cell.key), torch.device("cpu"), None)
        for case in training.clean:
            known = np.asarray(training.cache.label(case)[...]) != UNKNOWN
            drawn = known.any(axis=(1, 2))
            assert known.all() == (cell.budget is None)
            assert cell.budget is None or 1 <= drawn.sum() <= 4
    with pytest.raises(UserError, match="what is said of all labels: found none, expected every"):
        bench(
            phantoms, tmp_path / "b", methods=["mean-teacher"], labelled=[2], test=2, device="cpu",
            overrides=[*TINY, "steps=4"], cache=tmp_path / "cache",
        )  # fmt: skip
