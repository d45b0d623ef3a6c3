"""The package leaves alone what a process has for all that runs in it: random numbers, warnings, environment ..."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import mlbseg
from blocks import TINY
from mlbseg.apps.bench import workers
from mlbseg.config import config_of
from mlbseg.data.readers import read_scan
from mlbseg.methods import METHODS
from mlbseg.runs import Run, make_method, make_student
from state import differences, global_state


class Ended:
    """A cell's process that has ended without a result."""

    def poll(self) -> int:
        return 1

    def terminate(self) -> None:
        pass


def everything(run: Path, scans: Path, out: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the functions of the package that do something, by name."""
    from mlbseg.apps.report import masks_report

    masks, labels = out / "masks", scans / "labels"
    mask = np.pad(np.ones((4, 4, 4), np.int32), 2)
    settings = [*TINY, "steps=4"]
    yield "check", lambda: mlbseg.check(scans).to_pandas()
    yield "plan", lambda: mlbseg.plan(scans, overrides=settings, device="cpu").to_pandas()
    yield "predict", lambda: mlbseg.predict(run, scans, masks, device="cpu", probabilities=True, largest=True)
    scan = read_scan([scans / "images" / "case_0.nii.gz"]).array[0]
    yield "load", lambda: mlbseg.load(run, device="cpu").predict(scan, spacing=(1, 1, 1))
    yield "evaluate", lambda: mlbseg.evaluate(masks, labels, out=out / "scores.csv").to_pandas()
    yield "evaluate arrays", lambda: mlbseg.evaluate(mask, mask, spacing=(1, 1, 1))
    yield "report", lambda: mlbseg.report(run, out / "report.html", device="cpu")
    yield (
        "masks_report",
        lambda: masks_report(mlbseg.evaluate(masks, labels), masks, labels, out / "masks.html"),
    )
    yield "audit", lambda: mlbseg.audit(run, out=out / "audit", device="cpu").to_pandas()
    yield "suggest", lambda: mlbseg.suggest(run, n=1, device="cpu").to_pandas()
    for name in ("bundle", "onnx", "nnunet", "itksnap"):
        yield f"export {name}", lambda name=name: mlbseg.export(run, out / name, name)
    yield (
        "bench",
        lambda: mlbseg.bench(
            scans, out / "bench", methods=["supervised"], labelled=[2], test=1, upper=False, overrides=settings,
            device="cpu",
        ).to_pandas(),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mlb", "supervised"])
def test_training_changes_nothing(method: str, scans: Path, tmp_path: Path) -> None:
    settings = [*TINY, "steps=8", "train.dropout=0.2"]
    mlbseg.train(
        scans, tmp_path / "first", overrides=settings, method=method, device="cpu"
    )  # packages are imported
    torch.manual_seed(5)
    np.random.seed(5)
    before = global_state()
    mlbseg.train(scans, tmp_path / "second", overrides=settings, method=method, device="cpu")
    assert differences(before, global_state()) == []
    # Nor does it look at what the caller has.
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second


@pytest.mark.slow
def test_what_is_done_with_a_run_changes_nothing(
    mlb_run: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a cell's process does with its own state is its own affair.
    monkeypatch.setattr(workers, "start", lambda *_: Ended())
    torch.set_num_threads(2)  # others than a command's own: they must not matter, and stay
    again = dict(everything(mlb_run, scans, tmp_path / "second"))
    try:
        for name, action in everything(mlb_run, scans, tmp_path / "first"):
            if changed_by(action):  # packages have been imported, perhaps
                assert changed_by(again[name]) == [], name
    finally:
        torch.set_num_threads(1)


def changed_by(action: Callable[[], object]) -> list[str]:
    """Return what an action has changed."""
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    before = global_state()
    action()
    return differences(before, global_state())


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_made_from_the_seed_alone(name: str, mlb_run: Path) -> None:
    opened = Run.open(mlb_run)
    config = config_of({**opened.config.model_dump(), "method": name})
    run = Run(opened.root, config, opened.plan, opened.split)
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        made.append(make_method(make_student(run.plan, config), run).state_dict())
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(made[1][key], value) for key, value in made[0].items())
