"""`mlbseg plan`: the plan that training would follow, and nothing but it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blocks import TINY, write_blocks
from conftest import Command

SETTINGS = [part for setting in (*TINY, "steps=2") for part in ("-o", setting)]


def test_the_plan_is_the_one_that_training_follows(tmp_path: Path, command: Command) -> None:
    scans, run = write_blocks(tmp_path / "scans"), tmp_path / "run"
    options = ["--method", "supervised", "--labelled", 2, "--test", 1, "--seed", 3, *SETTINGS]
    planned = command("plan", scans, *options, "--json")
    assert planned.code == 0
    assert command("train", scans, "--out", run, *options, "--no-report", "-q").code == 0
    assert planned.json["plan"] == json.loads((run / "plan.json").read_text())
    assert planned.json["skipped"] == []


def test_every_decision_is_printed_with_its_reason_and_nothing_is_written(
    tmp_path: Path, command: Command
) -> None:
    scans = write_blocks(tmp_path / "scans")
    before = sorted(tmp_path.rglob("*"))
    printed = command("plan", scans, "-q")
    assert printed.code == 0
    assert printed.err == ""
    record = command("plan", scans, "--json").json["plan"]
    words = " ".join(printed.out.split())
    assert all(name in words for name in record["reasons"])
    assert "2×2×2" in words
    assert "a patch can hold a whole scan" in words
    assert sorted(tmp_path.rglob("*")) == before


def test_the_minutes_are_those_of_every_stage(tmp_path: Path, command: Command) -> None:
    scans = write_blocks(tmp_path / "scans")
    tiny = [part for setting in (*TINY, "steps=9") for part in ("-o", setting)]
    stages = command("plan", scans, "--method", "bcp", "--labelled", 2, *tiny, "--json").json["stages"]
    assert [(stage["stage"], stage["method"], stage["steps"]) for stage in stages] == [
        (1, "supervised", 4),
        (2, "bcp", 5),
    ]
    for stage in stages:
        assert stage["minutes"] == pytest.approx(stage["steps"] * stage["seconds_per_step"] / 60)
        assert 0 < stage["seconds_per_step"] < 60
    printed = command("plan", scans, "--method", "supervised", *tiny, "-q").out
    assert "training takes about" in printed
    assert "stage 1, supervised: 9 steps of" in printed
    assert "stage 2" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "plan.patch_size=15"], "expected multiples of"),
        (["--labelled", "9"], "labelled: found 9"),
        (["--method", "mlp"], "did you mean 'mlb'"),
    ],
)
def test_what_training_refuses_the_plan_refuses_too(
    tmp_path: Path, command: Command, arguments: list[str], message: str
) -> None:
    refused = command("plan", write_blocks(tmp_path / "scans"), *arguments)
    assert refused.code == 2
    assert message in refused.err


def test_faulty_cases_stop_the_plan_or_are_left_out(tmp_path: Path, command: Command) -> None:
    scans = write_blocks(tmp_path / "scans")
    (scans / "images" / "case_7.nii.gz").write_bytes(b"no scan")
    assert command("plan", scans).code == 2
    assert "left out: case_7" in command("plan", scans, "--skip-bad", "-q").out
