"""What files say reaches the terminal as the characters that it has, in every command."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from blocks import TINY, blocks, save
from conftest import Command, Outcome
from data.broken import dicom_series
from mlbseg.terminal import one_line, plain, say

ESCAPE = "\x1b[31mred\x1b]0;title\x07"
MARKUP = "[bold]x[/red]"
HOSTILE = f"{ESCAPE} {MARKUP} \u202etxt\u2028 \r\x9b2J"
ID = f"{MARKUP} a"  # a case may be called so; with a control character it is refused


def clean(outcome: Outcome) -> Outcome:
    """Fail if anything in what was printed drives a terminal."""
    for text in (outcome.out, outcome.err):
        assert not (found := [c for c in text if not c.isprintable() and c != "\n"]), (found, text)
    assert "Traceback" not in outcome.err
    assert "internal error" not in outcome.err
    return outcome


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scans in nnU-Net's folders; names of classes, channels and cases are somebody's who means harm."""
    root = tmp_path_factory.mktemp("hostile") / f"set {MARKUP.replace('/', '')}"
    for number, name in enumerate((ID.replace("/", ""), "[red]", "c", "d", "e", "f")):
        image, label = blocks(number)
        save(root / "imagesTr" / f"{name}_0000.nii.gz", image)
        if number < 4:
            save(root / "labelsTr" / f"{name}.nii.gz", label)
    record = {
        "channel_names": {"0": HOSTILE},
        "name": HOSTILE,
        "labels": {"background": 0, HOSTILE: 1, f"{HOSTILE} two": 2},
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(record))
    (root / "imagesTr" / f"{ESCAPE.replace('/', '')}.txt").write_text("x")
    return root


@pytest.fixture(scope="module")
def hostile_run(hostile: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mlbseg import train

    out = tmp_path_factory.mktemp("runs") / "run [bold]"
    train(hostile, out, method="supervised", test=["c"], overrides=[*TINY, "steps=4"], device="cpu")
    return out


def test_text_is_shown_as_the_characters_that_it_has() -> None:
    assert one_line("a\nb\x1b[0m\udc80") == "a\\nb\\x1b[0m\\udc80"
    assert plain(MARKUP).plain == MARKUP
    console = Console(width=80)
    with console.capture() as captured:
        say(console, f"{MARKUP}\x1b " + "x" * 100)
        say(None, "nothing")
    assert captured.get() == f"{MARKUP}\\x1b " + "x" * 100 + "\n"


def test_check_prints_what_it_read_as_text(hostile: Path, command: Command) -> None:
    shown = clean(command("check", hostile))
    assert shown.code == 0, shown.err
    assert "[bold]x[/red]" in shown.out.replace("\n", "")
    assert "set [bold]x[red]" in shown.out
    assert "\\x1b" in shown.out
    assert command("check", hostile, "--json").json["summary"]["class_names"]["1"] == HOSTILE


@pytest.mark.parametrize(
    "rows",
    [
        f"{ESCAPE},images/a.nii.gz,",
        f"a,{ESCAPE}.nii.gz,",
        f"a,images/a.nii.gz,{ESCAPE}",
    ],
)
def test_a_list_is_quoted_as_text(rows: str, tmp_path: Path, command: Command) -> None:
    save(tmp_path / "images" / "a.nii.gz", blocks(0)[0])
    (tmp_path / "cases.csv").write_text(f"id,image,label,{ESCAPE}\n{rows}")
    assert clean(command("check", tmp_path / "cases.csv")).code == 2


def test_names_of_files_and_of_dicom_series_are_text(tmp_path: Path, command: Command) -> None:
    dicom_series(
        tmp_path / "images" / "a",
        **{
            "0020_000e": lambda i: f"1.2.826.0.1.3680043.2.1125.{2 + i % 2}",
            "0008_103e": lambda i: ESCAPE,
            "0010_0010": lambda i: ESCAPE,
            "0010_0020": lambda i: ESCAPE,
        },
    )
    save(tmp_path / "images" / f"{ESCAPE}.nii.gz", blocks(0)[0])
    save(tmp_path / "labels" / f"{ESCAPE}.nii.gz", blocks(0)[1])
    said = clean(command("check", tmp_path))
    assert said.code == 2
    assert "2 series" in said.err or "no clean case" in said.err


@pytest.mark.slow
def test_every_command_on_such_a_run_prints_text(
    hostile: Path, hostile_run: Path, tmp_path: Path, command: Command
) -> None:
    run = tmp_path / "run [bold]"
    shutil.copytree(hostile_run, run)
    masks = tmp_path / "masks [red]"
    short = [v for text in (*TINY, "steps=2") for v in ("-o", text)]
    commands: list[list[object]] = [
        ["train", hostile, "--out", tmp_path / "t", "--method", "supervised", *short],
        ["train", hostile, "--out", tmp_path / "wrong", "--labels", "0,7", *short],
        ["predict", run, hostile, "--out", masks],
        ["predict", run, hostile, "--out", masks],  # they are there already: faults
        ["evaluate", masks, hostile / "labelsTr", "--report", tmp_path / "e.html", "--scans", hostile],
        ["suggest", run, "--n", 2],
        ["audit", run],
        ["report", run, "--out", tmp_path / "r.html"],
        ["export", run, "--format", "labels", "--out", tmp_path / "labels"],
        ["export", run, "--format", "nnunet", "--out", tmp_path / "nn"],
        ["bench", hostile, "--out", tmp_path / "b", "--methods", "supervised", "--labelled", 9, "--test", 1,
         "--variant", f"{HOSTILE}=supervised lr=0.1"],
    ]  # fmt: skip
    for words in commands:
        shown = clean(command(*words))
        assert shown.code in (0, 2), shown.err
    scored = command("evaluate", masks, hostile / "labelsTr", "--json").json
    assert {row["case"] for row in scored["cases"]} >= {"[red]"}
    plan = json.loads((run / "plan.json").read_text())
    assert HOSTILE in plan["class_names"]


def test_a_table_of_a_bench_shows_names_as_text() -> None:
    from mlbseg.apps.bench.report import tables
    from mlbseg.apps.bench.results import Group, Results

    setup = SimpleNamespace(scored=("a",), rows={"x": None})
    group = Group(HOSTILE, "x", 2, {0: {"dice": 0.5}}, {0: {"a": 0.5}})
    results = Results(setup, [], [], {("x", 2): group}, [2])  # type: ignore[arg-type]
    console = Console(width=200)
    with console.capture() as captured:
        console.print(*tables(results))
    text = captured.get()
    assert re.search(r"\\x1b\[31mred.*\[bold\]x\[/red\]", text)
    assert all(c.isprintable() or c == "\n" for c in text)
