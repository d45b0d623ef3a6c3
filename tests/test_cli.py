"""The command line, as a user meets it: what it prints, what it leaves, how it ends."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from rich.console import Console

import mlbseg
from blocks import TINY, write_blocks, write_case
from conftest import Command
from data.broken import BROKEN
from mlbseg import cli
from mlbseg.data.plan import Plan
from mlbseg.data.splits import Split
from mlbseg.errors import UserError
from mlbseg.progress import StepProgress

SHORT = [v for text in (*TINY, "steps=4") for v in ("-o", text)]
KINDS: dict[str, dict[str, Any]] = {
    "3D": {},
    "pictures": {"suffix": ".png", "size": (32, 36), "values": (0, 255, 255)},
    "thick slices": {"size": (9, 24, 26), "spacing": (1, 1, 6)},
}


def tree(root: Path) -> dict[str, str]:
    """Return what lies below a folder, links not followed."""
    found = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder) / name
            if path.is_symlink():
                content = str(path.readlink()).encode()
            else:
                content = b"" if path.is_dir() else path.read_bytes()
            found[str(path)] = hashlib.sha256(content).hexdigest()
    return found


@pytest.fixture
def copy(scans: Path, tmp_path: Path) -> Path:
    """The scans, to be changed."""
    return shutil.copytree(scans, tmp_path / "scans")


# --- the main job -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["supervised", "mlb", "mlb in paper mode"])
def test_from_a_folder_of_scans_to_figures(kind: str, method: str, tmp_path: Path, command: Command) -> None:
    scans = write_blocks(tmp_path / "scans", count=6, labelled=4, **KINDS[kind])
    mode = ["-o", "mlb.mode=paper"] if "paper" in method else []
    name = method.partition(" ")[0]
    run, masks = tmp_path / "run", tmp_path / "masks"
    trained = command("train", scans, "--out", run, "--method", name, "--test", 1, *SHORT, *mode)
    assert (trained.code, trained.err.count("error")) == (0, 0)
    assert f"next: mlbseg predict {run} NEW_SCANS --out MASKS" in trained.out
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "split.json", "env.json", "log.csv", "tensorboard", "checkpoints"} <= names
    assert {"model.safetensors", "plan.json", "data.json", "result.json", "report.html"} <= names
    assert Plan.read(run / "plan.json").ndim == (3 if kind == "3D" else 2)
    predicted = command("predict", run, scans, "--out", masks)
    assert (predicted.code, predicted.out) == (0, f"wrote 6 masks to {masks}\n")
    assert {p.name for p in masks.iterdir()} == {p.name for p in (scans / "images").iterdir()}
    scored = command("evaluate", masks, scans / "labels", "--out", tmp_path / "scores.csv", "--json")
    # Two scans have no label: they are named, and the rest is scored.
    assert scored.code == 0
    assert 0 <= scored.json["mean_dice"] <= 1
    assert (scored.json["faults"], len(scored.json["not_referenced"])) == ([], 2)
    assert (tmp_path / "scores.csv").read_text().startswith("case,class,name,dice")


@pytest.mark.slow
def test_names_with_spaces_unicode_and_html_work(tmp_path: Path, command: Command) -> None:
    scans = tmp_path / "[red] Müller's scans <b>"
    names = ["left atrium", "Herz_größe_心臓", "<b>&amp;<script>", "[red] a$1;%s{x}", "-o plain"]
    for i, name in enumerate(names):
        write_case(scans, f"{name}.nii.gz", i, labelled=i < 3)
    run, masks = tmp_path / "a run & 心臓", tmp_path / "masks <i>"
    trained = command("train", scans, "--out", run, *SHORT)
    assert trained.code == 0, trained.err
    assert f"next: mlbseg predict '{run}'" in trained.out
    assert command("predict", run, scans, "--out", masks).code == 0
    assert {p.name for p in masks.iterdir()} == {f"{name}.nii.gz" for name in names}
    scored = command("evaluate", masks, scans / "labels")
    assert (scored.code, scored.err.count("fault")) == (0, 0)
    assert "note: 2 without a reference label, not scored: -o plain, " in scored.out
    assert command("check", scans).code == 0


@pytest.mark.slow
def test_the_package_has_the_commands_names_and_takes_plain_paths(scans: Path, tmp_path: Path) -> None:
    run, masks = str(tmp_path / "run"), str(tmp_path / "masks")
    result = mlbseg.train(
        str(scans), run, method="supervised", overrides=[*TINY, "steps=4"], cache=str(tmp_path)
    )
    assert (str(result.run), result.steps) == (run, 4)
    predictions = mlbseg.predict(run, str(scans / "images"), masks, only=["case_0"])
    assert str(predictions.masks["case_0"]) == f"{masks}/case_0.nii.gz"
    scores = mlbseg.evaluate(masks, str(scans / "labels"), out=str(tmp_path / "scores.csv"))
    assert scores.cases == ("case_0",)
    assert not hasattr(mlbseg, "nonsense")


@pytest.mark.slow
def test_a_terminal_sees_nothing_of_the_libraries(scans: Path, tmp_path: Path) -> None:
    """In a process of its own, where warnings are shown and not errors."""
    arguments = ["train", scans, "--out", tmp_path / "run", *SHORT, "--validation", "1", "-q", "--threads", 1]
    done = subprocess.run(
        [sys.executable, "-m", "mlbseg", *map(str, arguments)], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    spoken = [line for line in done.stdout.splitlines() if not line.startswith("warning: ")]
    assert "mean ± SD over cases" in spoken[0]
    after = spoken[max(number for number, line in enumerate(spoken) if line[:1] in "│└") + 1 :]
    assert [line.split()[0] for line in after] == ["trained", "scores:", "report:", "next:"]


# --- options ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("way", ["number", "list", "file"])
def test_which_labels_are_kept(way: str, scans: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "ids.txt").write_text("case_0\n\n case_2 \n")
    given = {"number": "2", "list": "case_0, case_2", "file": str(tmp_path / "ids.txt")}[way]
    options = ["--labelled", given, "--test", "case_1"]
    if way == "number":
        options = ["--labelled", given, "--test", "1", "--validation", "1"]
    outcome = command(
        "train", scans, "--out", tmp_path / "run", *options, *SHORT, "--json", "--method", "supervised"
    )
    assert outcome.code == 0
    split = Split.read(tmp_path / "run" / "split.json")
    if way == "number":
        assert (len(split.clean), len(split.validation), len(split.test)) == (1, 1, 1)
        assert outcome.json["validation_dice"] is not None
    else:
        assert (set(split.clean), split.test) == ({"case_0", "case_2"}, ("case_1",))
        assert outcome.json["validation_dice"] is None
    assert "case_3" in {*split.unlabelled, *split.clean, *split.test, *split.validation}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labelled", "9"], "labelled: found 9, expected 1 to 4"),
        (["--labelled", "0"], "labelled: found 0"),
        (["--labelled", "case_9"], "labelled: no case 'case_9', did you mean"),
        (["--labelled", "case_5"], "without a label to use"),
        (
            ["--labelled", ",".join(f"a_long_name_{i}" for i in range(40))],
            "labelled: no case 'a_long_name_0'",
        ),
        (["--test", "4"], "no clean case is left"),
        (["--test", "nobody"], "test: no case 'nobody'"),
        (["--validation", "9"], "validation: found 9"),
        (["--labels", "0,one"], "expected whole numbers, such as 0,1,2"),
        (["--labels", "0,1"], "label values {0, 1, 2}, expected {0, 1}"),
        (["--method", "mlp"], "unknown method 'mlp': did you mean 'mlb'"),
        (["--preset", "papers"], "unknown preset 'papers': did you mean 'paper'"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["--device", "toaster"], "device 'toaster': not on this machine"),
        (["-o", "lerning_rate=1"], "unknown override key 'lerning_rate'"),
        (["-o", "patch_sise=16"], "did you mean 'plan.patch_size'"),
        (["-o", "train.lr=fast"], "setting train.lr: found 'fast'"),
        (["-o", "spacing=1,1"], "plan.spacing: found 2 values, expected one or 3"),
        (["--seed", "-1"], "setting seed: found -1"),
        (["--seed", "many"], "Invalid value for '--seed'"),
        (["--threads", "0"], "Invalid value for '--threads'"),
        (["--bogus"], "No such option"),
        (
            ["--resume", "elsewhere"],
            "--resume cannot change data or settings, found also: data, out, override",
        ),
    ],
)
def test_a_wrong_option_says_what_was_expected(
    options: list[str], message: str, scans: Path, tmp_path: Path, command: Command
) -> None:
    arguments = ("train", scans, "--out", tmp_path / "run", *SHORT, *options)
    plain, machine = command(*arguments), command(*arguments, "--json")
    assert (plain.code, plain.out) == (2, "")
    assert message in plain.err
    assert "Traceback" not in plain.err
    assert machine.code == 2
    assert message in machine.json["error"]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_preset_file_and_overrides_reach_the_run(scans: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "mine.yaml").write_text("train: {momentum: 0.5, clip: 9}\n")
    options = ["--preset", "paper", "--config", tmp_path / "mine.yaml", "-o", "train.clip=3", "--seed", "7"]
    assert command("train", scans, "--out", tmp_path / "run", *options, *SHORT, "-q").code == 0
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (written["train"]["momentum"], written["train"]["clip"], written["seed"]) == (0.5, 3, 7)
    assert (written["train"]["schedule"], written["mlb"]["mode"]) == ("paper", "paper")
    again = command(
        "train", scans, "--out", tmp_path / "again", "--config", tmp_path / "run" / "config.yaml", "-q"
    )
    assert again.code == 0
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "again")]
    assert same[0] == same[1]


@pytest.mark.slow
def test_bad_cases_are_left_out_and_named(copy: Path, tmp_path: Path, command: Command) -> None:
    (copy / "images" / "case_1.nii.gz").write_bytes(b"not a scan")
    (copy / "labels" / "case_2.nii.gz").write_bytes(b"not a label")
    stopped = command("train", copy, "--out", tmp_path / "run", *SHORT)
    assert stopped.code == 2
    assert "error: 2 faults in" in stopped.err
    assert "pass --skip-bad to leave these cases out" in stopped.err
    outcome = command("train", copy, "--out", tmp_path / "run", "--skip-bad", *SHORT)
    assert outcome.code == 0
    assert "left out: case_1, case_2" in outcome.err
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert not {"case_1", "case_2"} & {
        name for part in split.values() if isinstance(part, list) for name in part
    }


def test_predict_passes_its_options_on(
    supervised_run: Path, scans: Path, tmp_path: Path, command: Command
) -> None:
    (tmp_path / "ids").write_text("case_5\ncase_6\n")
    arguments = ("predict", supervised_run, scans, "--only", tmp_path / "ids", "--out", tmp_path / "masks")
    outcome = command(*arguments, "--largest", "--probabilities", "--overlap", "0.25", "--json",
                      "--network", "student", "--threads", "1")  # fmt: skip
    assert outcome.code == 0
    assert outcome.err == ""
    assert set(outcome.json["masks"]) == {"case_5", "case_6"}
    assert len(list((tmp_path / "masks" / "probabilities").iterdir())) == 6
    again = command(*arguments)
    assert again.code == 2
    assert "error: 2 faults in the scans" in again.err
    assert "exists already (pass --overwrite or --skip-existing, or write elsewhere)" in again.err
    assert "were segmented" not in again.err
    assert again.out == f"wrote 0 masks to {tmp_path / 'masks'}\n"
    assert command(*arguments, "--json").json["faults"][0]["case_id"] == "case_5"
    assert command(*arguments, "--overwrite").code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "nobody"], "no scan found for 1 cases, such as nobody"),
        (["--only", "3"], "no scan found for 1 cases, such as 3"),
        (["--only", "noisy"], "no case is in the noisy part"),
        (["--network", "teacher"], "has no 'teacher' network"),
        (["--flips"], "the run's plan allows no flips"),
        (["--overlap", "1.5"], "Invalid value for '--overlap'"),
        (["--device", "cuda:99"], "device 'cuda:99': not on this machine"),
    ],
)
def test_a_wrong_option_of_predict(
    options: list[str], message: str, supervised_run: Path, scans: Path, tmp_path: Path, command: Command
) -> None:
    arguments = ("predict", supervised_run, scans, "--out", tmp_path / "masks", *options)
    plain = command(*arguments)
    assert (plain.code, plain.out) == (2, "")
    assert message in plain.err
    assert message in command(*arguments, "--json").json["error"]
    assert not (tmp_path / "masks").exists()


def test_a_file_of_ids_that_is_no_text(
    supervised_run: Path, scans: Path, tmp_path: Path, command: Command
) -> None:
    (tmp_path / "ids").write_bytes(b"\xff\xfe\x00")
    outcome = command(
        "predict", supervised_run, scans, "--only", tmp_path / "ids", "--out", tmp_path / "masks"
    )
    assert outcome.code == 2
    assert "cannot be read as a list of case ids, one a line" in outcome.err


def test_a_bad_scan_among_good_ones_is_named_at_the_end(
    supervised_run: Path, copy: Path, tmp_path: Path, command: Command
) -> None:
    (copy / "images" / "case_4.nii.gz").write_bytes(b"not a scan")
    outcome = command("predict", supervised_run, copy, "--out", tmp_path / "masks")
    assert outcome.code == 2
    assert outcome.out == f"wrote 7 masks to {tmp_path / 'masks'}\n"
    last = outcome.err.splitlines()[-3:]
    assert last[0] == "error: 1 fault in the scans"
    assert "case_4" in last[1]
    assert last[2] == "the other scans were segmented"
    assert len(list((tmp_path / "masks").iterdir())) == 7


# --- broken inputs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BROKEN)
def test_broken_data_is_refused_with_a_line_and_left_alone(
    name: str, tmp_path: Path, command: Command
) -> None:
    (tmp_path / "data").mkdir()
    path = BROKEN[name](tmp_path / "data")
    before = tree(tmp_path)
    for arguments in (("check", path), ("train", path, "--out", tmp_path / "run", *SHORT)):
        plain = command(*arguments, "-q")
        assert plain.code == 2
        assert plain.err.startswith("error: ")
        assert "Traceback" not in plain.out + plain.err
        machine = command(*arguments, "--json")
        assert machine.code == 2
        assert machine.err == ""
        assert machine.json["faults"] or machine.json["error"]
    assert tree(tmp_path) == before  # and no run folder


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda run: (run / "config.yaml").unlink(), "not a run folder"),
        (lambda run: (run / "model.safetensors").unlink(), "training has not finished"),
        (lambda run: (run / "model.safetensors").write_bytes(b"x" * 99), "model.safetensors: damaged"),
        (lambda run: (run / "plan.json").write_text("{"), "plan.json: not valid JSON"),
        (lambda run: (run / "plan.json").write_text("{}"), "plan.json.ndim"),
        (lambda run: (run / "plan.json").unlink(), "plan.json: cannot be read"),
        (lambda run: (run / "config.yaml").write_text("lr: [1"), "config.yaml: not a YAML file"),
        (lambda run: (run / "config.yaml").write_text("methd: mlb"), "unknown setting 'methd'"),
        (lambda run: (run / "split.json").write_text("[]"), "split.json: holds a list"),
        (lambda run: shutil.rmtree(run), "not a run folder"),
    ],
)
def test_a_broken_run_folder_is_refused(
    break_it: Callable[[Path], object], message: str, supervised_run: Path, scans: Path, tmp_path: Path,
    command: Command,
) -> None:  # fmt: skip
    run = shutil.copytree(supervised_run, tmp_path / "run")
    break_it(run)
    before = tree(tmp_path)
    outcome = command("predict", run, scans, "--out", tmp_path / "masks")
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    assert tree(tmp_path) == before


def test_evaluate_on_empty_and_missing_folders(scans: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "empty").mkdir()
    for predictions, references in (
        (tmp_path / "empty", scans / "labels"),
        (scans / "labels", tmp_path / "empty"),
        (tmp_path / "nothing", scans / "labels"),
        (scans / "labels", tmp_path / "nothing"),
    ):
        outcome = command("evaluate", predictions, references)
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err.startswith("error: ")
        assert command("evaluate", predictions, references, "--json").json["error"]


def test_a_perfect_mask_scores_1(scans: Path, tmp_path: Path, command: Command) -> None:
    outcome = command(
        "evaluate", scans / "labels", scans / "labels", "--out", tmp_path / "new" / "scores.csv"
    )
    assert outcome.code == 0
    assert "1.000 ± 0.000" in outcome.out
    assert len((tmp_path / "new" / "scores.csv").read_text().splitlines()) == 1 + 4 * 2


# --- what is printed --------------------------------------------------------------------------------------


def test_check_of_healthy_data(scans: Path, command: Command) -> None:
    plain = command("check", scans)
    assert plain.code == 0
    assert plain.out.endswith("no faults\n")
    assert "8 (4 clean, 4 unlabelled)" in plain.out
    machine = command("check", scans, "--json")
    assert (machine.code, machine.err) == (0, "")
    assert machine.json["summary"]["cases"] == 8


def test_check_notes_what_may_be_meant(copy: Path, tmp_path: Path, command: Command) -> None:
    (copy / "images" / "notes.txt").write_text("hello")
    outcome = command("check", copy)
    assert outcome.code == 0
    assert "note: images/notes.txt: not a scan, ignored" in outcome.out
    for i in range(4, 8):
        (copy / "images" / f"case_{i}.nii.gz").unlink()
    assert "no unlabelled case" in command("check", copy).out
    outcome = command("train", copy, "--out", tmp_path / "run", *SHORT)
    assert outcome.code == 2
    assert "every case is labelled" in outcome.err


def test_a_spacing_that_varies_is_shown_as_a_range(tmp_path: Path, command: Command) -> None:
    for i, step in enumerate((1, 1, 2)):
        write_case(tmp_path, f"{i}.nii.gz", i, labelled=True, spacing=(1, 1, step))
    assert "3D 1 × 1 × 1 (1 × 1 × 1 to 1 × 1 × 2)" in command("check", tmp_path).out


@pytest.mark.parametrize("name", ["check", "train", "predict", "evaluate", "demo"])
def test_help_has_a_line_for_every_option(name: str, command: Command) -> None:
    outcome = command(name, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    parameters = typer.main.get_command(cli.app).commands[name].params  # type: ignore[attr-defined]
    assert len(parameters) >= 4
    text = " ".join(outcome.out.split())
    for parameter in parameters:
        assert parameter.help, f"{parameter.name} is not explained"
        for option in parameter.opts:
            assert option in text


def test_version_and_the_bare_command(command: Command) -> None:
    assert command("--version").out == f"mlbseg {mlbseg.__version__}\n"
    assert command("--version").code == 0
    bare = command()
    assert "Usage: mlbseg" in bare.out + bare.err
    for name in ("check", "train", "predict", "evaluate", "demo"):
        assert name in bare.out + bare.err


def test_a_missing_argument_is_one_json_object_too(command: Command) -> None:
    plain = command("predict", "run")
    assert (plain.code, plain.out) == (2, "")
    assert "Usage: mlbseg predict" in plain.err
    assert "Missing argument" in plain.err
    machine = command("predict", "run", "--json")
    assert (machine.code, machine.err) == (2, "")
    assert "Missing argument" in machine.json["error"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/scratch/x"),
            "/scratch/x: No space left on device",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), "/root/x: Permission denied"),
        (MemoryError(), "not enough memory"),
    ],
)
def test_the_machines_limits_are_no_traceback(
    error: Exception, message: str, scans: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def limited(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("mlbseg.data.source.find_cases", limited)
    outcome = command("check", scans)
    assert (outcome.code, outcome.out, outcome.err) == (2, "", f"error: {message}\n")


def test_a_machine_without_a_temporary_folder_is_no_traceback(
    scans: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def matplotlib_without(*_: object, **__: object) -> None:
        raise OSError("Matplotlib requires access to a writable cache directory")

    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    with monkeypatch.context() as patch:  # pytest itself has use for temporary files
        patch.setattr("mlbseg.data.source.find_cases", matplotlib_without)
        patch.setattr(tempfile, "gettempdir", none)
        outcome = command("check", scans)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: no folder for temporary files can be written (set TMPDIR")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a fault of ours\nin \x1b[31mtwo lines " + "x" * 999),
        FileNotFoundError(errno.ENOENT, "gone", "x"),
        RecursionError("deep"),
        AssertionError(),
    ],
)
def test_what_nobody_expected_is_one_line_and_a_file_to_report_it_with(
    error: Exception, scans: Path, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def faulty(*_: object, **__: object) -> None:
        known = "name of a patient"
        raise error from RuntimeError(len(known))

    monkeypatch.setattr("mlbseg.data.source.find_cases", faulty)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    outcome = command("check", scans)
    (file,) = tmp_path.glob("mlbseg-error-*.txt")
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (1, "", 1)
    assert outcome.err.startswith(f"error: internal error ({type(error).__name__}: ")
    assert outcome.err.endswith(f"; please report it, with the file {file}\n")
    assert len(outcome.err) < 500
    assert "\x1b" not in outcome.err
    text = file.read_text()
    assert "in faulty" in text
    assert "command: check" in text
    assert str(scans) not in text
    assert "name of a patient" not in text
    assert file.stat().st_mode & 0o077 == 0
    assert command("check", scans, "--json").json["error"].startswith("internal error")


def test_a_report_that_cannot_be_written_is_printed(
    scans: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mlbseg.data.source.find_cases", None)
    monkeypatch.setattr("mlbseg.cli.crash.tempfile.mkstemp", full)
    outcome = command("check", scans)
    assert outcome.code == 1
    assert "Traceback" in outcome.err
    assert outcome.err.endswith("please report it with the traceback above\n")


def test_a_fault_of_ours_ends_with_code_1(scans: Path) -> None:
    script = (
        "import sys; from mlbseg import cli; import mlbseg.data.source as source\n"
        "source.find_cases = None\nsys.argv = ['mlbseg', 'check', sys.argv[1]]\ncli.main()"
    )
    done = subprocess.run([sys.executable, "-c", script, str(scans)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "TypeError" in done.stderr


def test_a_reader_that_has_gone_is_no_error_of_ours(
    scans: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("mlbseg.cli.ending.result_console", broken)
    with monkeypatch.context() as patch:  # it puts something else in their place, for good
        patch.setattr(sys, "stdout", sys.stdout)
        patch.setattr(sys, "stderr", sys.stderr)
        outcome = command("check", scans)
    assert (outcome.code, "error" in outcome.err) == (1, False)


def test_what_an_encoding_lacks_is_escaped(scans: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mlbseg", "check", str(scans)],
        capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert (done.returncode, b"error" in done.stderr) == (0, False), done.stderr
    assert b"\\u2502" in done.stdout or b"\\xd7" in done.stdout


def test_ctrl_c_ends_with_130(scans: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlbseg.data.source.find_cases", interrupted)
    outcome = command("check", scans)
    assert (outcome.code, outcome.out, outcome.err) == (
        130,
        "",
        "error: interrupted; all files that were written are complete\n",
    )
    assert command("check", scans, "--json").json == {
        "error": "interrupted; all files that were written are complete",
        "faults": [],
    }


def test_names_of_cases_are_no_markup_on_a_terminal() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=200)
    with StepProgress(console, "reading [/b]", 2) as progress:
        progress.update(1, {"case": "[/red] <b>", "loss": 0.12345})
    assert "[/red] <b>" in out.getvalue()
    assert "loss 0.123" in out.getvalue()


def test_a_log_gets_a_line_at_the_end_and_silence_none() -> None:
    out = io.StringIO()
    with StepProgress(Console(file=out, width=20), "a long title of a stage", 2) as progress:
        progress.update(1)
        progress.update(2, {"case": "x"})
    assert out.getvalue() == "a long title of a stage: 2/2, eta 00:00:00  case x\n"
    with StepProgress(None, "quiet", 2) as progress:
        progress.update(2)


def test_help_answers_without_loading_torch() -> None:
    script = "import sys; from mlbseg import cli; sys.exit('torch' in sys.modules or 'monai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_a_warning_is_a_line_without_its_place_in_the_source(
    scans: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warn(*_: object, **__: object) -> None:
        warnings.warn("the cache\x1b[2J is damaged", stacklevel=1)
        raise UserError("and that was it")

    usual = warnings.formatwarning
    monkeypatch.setattr("mlbseg.data.source.find_cases", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda *a, **_: sys.stderr.write(warnings.formatwarning(*a[:4]))
        done = command("check", scans)
    assert done.err == "warning: the cache\\x1b[2J is damaged\nerror: and that was it\n"
    assert warnings.formatwarning is usual
