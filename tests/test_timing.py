"""How long a run takes, measured before there is one."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from blocks import TINY, write_blocks
from mlbseg.errors import UserError
from mlbseg.methods import METHODS
from mlbseg.runs import Run
from mlbseg.training import timing
from mlbseg.training.beginning import prepare_run
from mlbseg.training.prepare import Planned, plan_run
from mlbseg.training.request import TrainRequest

CPU = torch.device("cpu")


def planned(folder: Path, method: str, *overrides: str) -> Planned:
    request = TrainRequest(
        data=write_blocks(folder), method=method, labelled=2, overrides=(*TINY, "steps=8", *overrides)
    )
    return plan_run(request, device=CPU, console=None)


@pytest.mark.parametrize("method", sorted(METHODS.own))
def test_every_method_is_timed(tmp_path: Path, method: str) -> None:
    stages = timing.time_stages(planned(tmp_path, method), CPU)
    assert [stage.stage for stage in stages] == ([1, 2] if METHODS.own[method].uses_unlabelled else [1])
    assert sum(stage.steps for stage in stages) == 8
    assert all(stage.seconds_per_step > 0 for stage in stages)


def test_slower_steps_are_measured_as_slower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sleep_and_take(*arguments: object) -> None:
        time.sleep(0.2)
        take(*arguments)  # type: ignore[arg-type]

    take = timing._take_step
    monkeypatch.setattr(timing, "_take_step", sleep_and_take)
    (stage,) = timing.time_stages(planned(tmp_path, "supervised"), CPU)
    assert stage.seconds_per_step >= 0.2  # of two steps, the one before them not counted
    assert stage.minutes == pytest.approx(8 * stage.seconds_per_step / 60)


def test_cases_set_apart_for_weights_are_in_the_batch(tmp_path: Path) -> None:
    decided = planned(tmp_path, "mlb", "meta_cases=1", "mlb.decides=everywhere")
    run = Run(tmp_path, decided.config, decided.plan, decided.split)
    batch = timing._noise(run, 2, None, 0)
    assert batch.meta_image is not None
    assert batch.meta_image.shape == batch.clean_image.shape
    assert batch.image is not None
    assert batch.image.shape == (decided.plan.unlabelled_batch_size, 1, 16, 16, 16)
    assert [stage.stage for stage in timing.time_stages(decided, CPU)] == [1, 2]


def test_the_streams_of_random_numbers_stay_as_they_were(tmp_path: Path) -> None:
    decided = planned(tmp_path, "supervised")
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    timing.time_stages(decided, CPU)
    assert torch.equal(torch.rand(2), expected)


def test_a_step_that_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")

    decided = planned(tmp_path, "supervised")
    monkeypatch.setattr(timing, "_take_step", fail)
    with pytest.raises(UserError, match=r"not enough memory.*plan.patch_size"):
        timing.time_stages(decided, CPU)


def test_a_long_training_begins_with_how_long_it_takes(tmp_path: Path) -> None:
    printed = io.StringIO()
    console, data = Console(file=printed, width=200), write_blocks(tmp_path / "scans")
    for steps, said in ((8, False), (500, True)):
        request = TrainRequest(data, tmp_path / str(steps), "supervised", overrides=TINY, steps=steps)
        prepare_run(request, device=CPU, count=1, console=console)
        assert ("training takes about" in printed.getvalue()) == said
    assert "stage 1, supervised: 500 steps of" in printed.getvalue()
